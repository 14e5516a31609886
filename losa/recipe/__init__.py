"""What a user asks for: recipes, read from YAML and checked."""

from losa.recipe.machines import CheckpointConfig, DistributedConfig
from losa.recipe.methods import METHODS, Method, MethodName
from losa.recipe.paths import output_path, work_path
from losa.recipe.reading import data_source, load_recipe, override, parse_recipe, read_settings, read_yaml
from losa.recipe.sections import (
    AllocationConfig,
    CalibrationConfig,
    EvaluateConfig,
    LoraConfig,
    PruneConfig,
    Recipe,
    RoundsConfig,
    Targets,
)
from losa.recipe.sources import DataSource, Source, Sources
from losa.recipe.training import ReconstructConfig, TrainConfig

__all__ = [
    "AllocationConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "DataSource",
    "DistributedConfig",
    "EvaluateConfig",
    "LoraConfig",
    "METHODS",
    "Method",
    "MethodName",
    "PruneConfig",
    "Recipe",
    "ReconstructConfig",
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
