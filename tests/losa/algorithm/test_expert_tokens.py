"""Which tokens the statistics of experts are of."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from losa.algorithm.engine import Engine
from losa.algorithm.schedule import make_schedule
from losa.algorithm.statistics import Hessian
from losa.errors import RecipeError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.linear_experts import RoutedExperts, every_token_to_every_expert
from losa.modules.pruned_linear import PrunedLinear
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig, RoundsConfig
from tests.helpers.book import check_mask
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.tiny import tiny_llama

IDS = torch.randint(2, 90, (6, 24), generator=torch.Generator().manual_seed(1))
ALLOCATION = AllocationConfig(mean_rank=2, rank_max=4, rates="uniform", ranks="uniform")


def engine_of(model, experts="routed", pruner="wanda", batch_size=2, **changes):
    wrap_model(model, layer=PrunedLinear, rank=1, scaling=1.0)
    calibration = CalibrationConfig(
        data="unused", samples=6, length=24, batch_size=batch_size, experts=experts, **changes
    )
    prune = PruneConfig(pruner=pruner, sparsity=0.5)
    return Engine(model, IDS, prune, ALLOCATION, calibration, measure_errors=False)


def run(engine):
    (one,) = make_schedule(RoundsConfig(schedule="oneshot"), ALLOCATION, 0.5, 0, 0.1)
    return engine.run_round(one)


@torch.no_grad()
def seen_by_experts(model, name):
    """(hidden states (tokens, hidden), chosen experts (tokens, k)) of a stack, in a pass of the dense model."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([*args, *kwargs.values()][:2]), with_kwargs=True
    )
    model(IDS, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "LongcatFlash"])
def test_tokens_of_every_expert_are_recorded(name, pruner):
    model = of_kind(KINDS[name]).eval()
    experts = "model.layers.0.mlp.experts"
    hidden, chosen = seen_by_experts(model, experts)
    record = run(engine_of(model, pruner=pruner))
    count = len(model.get_submodule(experts))
    # Of LongCat's five choices three are experts.
    assert record.expert_tokens[experts] == torch.bincount(chosen.flatten(), minlength=count).tolist()[:count]
    if name != "LongcatFlash":
        assert all(sum(tokens) == chosen.numel() for tokens in record.expert_tokens.values())
    # Its two attentions and two dense MLPs of each block are no experts.
    assert list(record.expert_tokens) == [f"model.layers.{i}.mlp.experts" for i in range(2)]


def test_all_tokens_for_experts_beside_choices_that_are_none():
    record = run(engine_of(of_kind(KINDS["LongcatFlash"]).eval(), experts="all"))
    assert set(map(tuple, record.expert_tokens.values())) == {(IDS.numel(),) * 3}


def test_statistics_may_be_of_all_tokens():
    model = of_kind(KINDS["Mixtral"]).eval()
    experts = "model.layers.0.mlp.experts"
    hidden, _ = seen_by_experts(model, experts)
    stack = model.get_submodule(experts)
    gate_up, down = stack.gate_up_proj.detach().clone(), stack.down_proj.detach().clone()
    record = run(engine_of(model, experts="all"))
    assert record.expert_tokens[experts] == [IDS.numel()] * len(gate_up)
    layers = wrapped_linears(model)
    for e, both in enumerate(gate_up):
        gate, up = both.chunk(2)
        inner = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
        for part, weight, inputs in (
            ("gate_proj", gate, hidden),
            ("up_proj", up, hidden),
            ("down_proj", down[e], inner),
        ):
            scores = weight.double().abs() * inputs.double().norm(dim=0)
            check_mask(layers[f"{experts}.{e}.{part}"].mask_bool(), scores, 0.5)


def test_routed_and_all_differ_and_all_share_one_hessian(monkeypatch):
    made, init = [], Hessian.__init__
    monkeypatch.setattr(Hessian, "__init__", lambda self, *args: made.append(init(self, *args)))
    routed = run_masks("routed")
    each = len(made)
    made.clear()
    every = run_masks("all")
    assert any(not torch.equal(routed[name], every[name]) for name in routed)
    # Of two blocks: gate and up of the experts together, in place of those of each of four.
    assert each - len(made) == 2 * 3


def run_masks(experts):
    model = of_kind(KINDS["Mixtral"]).eval()
    run(engine_of(model, experts=experts, pruner="sparsegpt"))
    return {name: layer.mask_bool() for name, layer in wrapped_linears(model).items()}


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3", "Dbrx", "LongcatFlash"])
@torch.no_grad()
def test_experts_give_the_same_whatever_they_see(name):
    model = of_kind(KINDS[name]).eval()
    wrap_model(model, layer=PrunedLinear, rank=1, scaling=1.0)
    assert any(isinstance(m, RoutedExperts) for m in model.modules())
    expected = model(IDS, use_cache=False).logits
    experts = next(m for m in model.modules() if isinstance(m, RoutedExperts))
    rows = []
    handle = experts[0].up_proj.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with every_token_to_every_expert(model):
        found = model(IDS, use_cache=False).logits
    handle.remove()
    assert rows == [IDS.numel()]
    assert (found - expected).abs().max() <= 64 * torch.finfo(found.dtype).eps * expected.abs().max()
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_models_without_experts_have_no_record_of_them():
    assert run(engine_of(tiny_llama(layers=2), experts="all")).expert_tokens is None


@pytest.mark.parametrize("name", ["JetMoe", "Llama4Text"])
def test_experts_that_get_their_own_tokens_alone_are_refused(name):
    with pytest.raises(RecipeError, match="calibration.experts: all: experts of model.layers.0"):
        engine_of(of_kind(KINDS[name]).eval(), experts="all")


def test_experts_with_few_tokens_are_warned_of(caplog):
    model = of_kind(KINDS["Mixtral"]).eval()
    engine = engine_of(model)
    engine.input_ids = IDS[:1, :6]
    with caplog.at_level(logging.WARNING, logger="losa"):
        record = run(engine)
    few = sum(4 * tokens < 32 for own in record.expert_tokens.values() for tokens in own)
    assert few and f"{few} of 8 experts saw few tokens" in caplog.text and "32 inputs" in caplog.text
    (one,) = make_schedule(RoundsConfig(schedule="oneshot"), ALLOCATION, 0.5, 0, 0.1)
    caplog.clear()
    engine.run_round(replace(one, index=2))
    assert "few tokens" not in caplog.text, "once"
