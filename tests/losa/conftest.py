"""Fixtures of the package's tests."""

from __future__ import annotations

import pytest
import torch

from losa.model.wrapping import merge_model
from tests.helpers.tiny import randomise, tiny_llama, tiny_tokenizer, wrap


@pytest.fixture
def own_names(monkeypatch):
    """Names that a test registers are gone after it."""
    from losa import pruners
    from losa.algorithm import importance, statistics
    from losa.packed.formats import NOTES
    from losa.packed.weights import FORMATS
    from losa.recipe.rates import RATES

    for registry in (pruners._REGISTRY, importance._REGISTRY, statistics._REGISTRY, RATES, FORMATS, NOTES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def merged():
    """As a run leaves it: 60 % zeros and a trained adapter merged in."""
    model = tiny_llama(layers=2, tie_word_embeddings=True)
    layers = wrap(model)
    randomise(layers)
    for layer in layers.values():
        layer.set_mask(torch.rand(layer.weight.shape) < 0.4)
    return merge_model(model).requires_grad_(False)


@pytest.fixture
def saved(merged, tmp_path):
    directory = tmp_path / "merged"
    merged.save_pretrained(directory)
    tiny_tokenizer("{{ messages[0]['content'] }}").save_pretrained(directory)
    (directory / "losa_config.json").write_text("{}")
    return merged, directory
