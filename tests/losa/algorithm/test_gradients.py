"""Statistics of gradients against autograd of the merged model in fp64, one sample after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losa.algorithm.engine import Engine
from losa.algorithm.gradient_statistics import GradientNorms, GradientSums
from losa.algorithm.gradients import Gradients
from losa.algorithm.schedule import Round
from losa.errors import NumericsError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from tests.helpers.tiny import EPS, randomise, tiny_llama, twice

IDS = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(1))
BOTH = {"norms": GradientNorms, "sums": GradientSums}


def autograd(layers, change=lambda model: model):
    """By linear, the gradients of the samples' losses (samples, out, in) fp64."""
    model = change(tiny_llama(layers=2)).double()
    weights = {}
    with torch.no_grad():
        for name, layer in layers.items():
            adapter = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
            weights[name] = model.get_submodule(name).weight
            weights[name].copy_((layer.weight.double() + adapter) * layer.mask_bool())
    found = [torch.autograd.grad(model(s[None], labels=s[None]).loss, list(weights.values())) for s in IDS]
    return {name: torch.stack(parts) for name, parts in zip(weights, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("change", [lambda model: model, twice], ids=["as it is", "a linear that runs twice"])
def test_statistics_are_autograd_s(change):
    model = tiny_llama(layers=2)
    wrap_model(model, rank=3, scaling=2.0)
    model.model.norm.weight.requires_grad_(True)
    layers = wrapped_linears(change(model))
    randomise(layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        gradients = Gradients(model, layers, IDS, BOTH)
    expected = autograd(layers, change)
    for block in ("model.layers.0", "model.layers.1"):
        owners = {name.removeprefix(f"{block}."): 0 for name in layers if name.startswith(block)}
        norms, sums = (gradients.of_block(key, block, owners) for key in BOTH)
        for name in owners:
            each = expected[f"{block}.{name}"]
            # A backward pass of fp32 through two blocks.
            for found, truth in ((norms, (100 * each).square().sum(0).sqrt()), (sums, each.sum(0))):
                assert (found[name] - truth).abs().max() <= 64 * EPS * truth.abs().max(), name
    assert all(p.grad is None for p in model.parameters()), "weights have no gradients"
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert not any(layer._forward_hooks for layer in layers.values())


def engine_of(model, **prune):
    allocation = AllocationConfig(rates="uniform", mean_rank=3, rank_max=6)
    calibration = CalibrationConfig(data="unused", samples=3, length=12, cka_samples=2, batch_size=2)
    return Engine(model, IDS, PruneConfig(**prune), allocation, calibration)


def test_a_pruner_is_given_the_gradients_of_the_model_as_it_is():
    model = tiny_llama(layers=2)
    wrap_model(model, rank=3, scaling=2.0)
    engine, layers = engine_of(model, pruner="pruner_zero", sparsity=0.5), wrapped_linears(model)
    engine.run_round(Round(1, 0.25, 3, 0))
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(std=0.05)
    expected, seen = autograd(layers), []
    prune = engine.pruner.prune
    engine.pruner.prune = lambda weight, statistic, *args: seen.append(statistic) or prune(weight, statistic, *args)
    record = engine.run_round(Round(2, 0.5, 3, 0))
    assert record.sparsity == [0.5, 0.5] and record.seconds["gradients"] > 0
    for name, found in zip(layers, seen, strict=True):
        truth = (100 * expected[name]).square().sum(0).sqrt()
        assert (found - truth).abs().max() <= 64 * EPS * truth.abs().max(), name


def test_a_loss_that_is_not_finite_names_its_sample():
    model = tiny_llama(layers=2)
    wrap_model(model, rank=3, scaling=2.0)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone(), False)
    own = next(token for token in IDS[2].tolist() if token not in IDS[:2])
    model.model.embed_tokens.weight[own] = torch.nan
    with pytest.raises(NumericsError, match="calibration: the loss is nan at sample 2"):
        Gradients(model, wrapped_linears(model), IDS, BOTH)
