"""Which of transformers' classes makes a model: of a checkpoint of several modalities losa takes the text half."""

from __future__ import annotations

import inspect
from typing import Any

from losa.errors import ModelError


def auto_class(config: Any) -> Any:
    """``AutoModelForImageTextToText`` for a configuration of several modalities that it knows, so that the other half
    of the model stays; else ``AutoModelForCausalLM``. A repository's own code is taken by the class that it names."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    both = (AutoModelForCausalLM, AutoModelForImageTextToText)
    own = getattr(config, "auto_map", None) or {}
    if named := [auto for auto in both if auto.__name__ in own]:
        return named[0]
    composite = config.get_text_config() is not config
    known = [auto for auto in (reversed(both) if composite else both) if type(config) in auto._model_mapping]
    return known[0] if known else AutoModelForCausalLM


def check_text_alone(name: str, model: Any) -> None:
    """Raises ModelError for a model that asks for more than tokens. ``name``: what the user gave."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed and needed != ["input_ids"]:
        raise ModelError(f"model {name!r}: does not run on text alone; it needs {', '.join(needed)}")
