"""What a user asks for: recipes, read from YAML and checked."""

from losa.recipe.methods import METHODS, Method, MethodName
from losa.recipe.reading import data_source, load_recipe, override, parse_recipe, read_settings, read_yaml
from losa.recipe.sections import (
    AllocationConfig,
    CalibrationConfig,
    DataSource,
    EvaluateConfig,
    LoraConfig,
    PruneConfig,
    Recipe,
    RoundsConfig,
    Source,
    Sources,
    Targets,
    TrainConfig,
    output_path,
    work_path,
)

__all__ = [
    "AllocationConfig",
    "CalibrationConfig",
    "DataSource",
    "EvaluateConfig",
    "LoraConfig",
    "METHODS",
    "Method",
    "MethodName",
    "PruneConfig",
    "Recipe",
    "RoundsConfig",
    "Source",
    "Sources",
    "Targets",
    "TrainConfig",
    "output_path",
    "work_path",
    "data_source",
    "load_recipe",
    "override",
    "parse_recipe",
    "read_settings",
    "read_yaml",
]
