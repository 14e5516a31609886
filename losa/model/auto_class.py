"""Which of transformers' classes makes a model: of a checkpoint of several modalities losa takes the text half."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """``AutoModelForCausalLM``; or ``AutoModelForImageTextToText`` for a configuration that only that class knows. Its
    models take text alone, too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in autos if type(config) in auto._model_mapping), AutoModelForCausalLM)
