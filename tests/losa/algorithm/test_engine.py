"""Rounds on a tiny model: budgets exact, masks nested, ablations valid, dense reference untouched."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from losa.algorithm.block import _WeightsToPrune
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import make_schedule
from losa.errors import NumericsError
from losa.model.wrapping import merge_model, wrap_model, wrapped_linears
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig, RoundsConfig
from losa_kernels.pruning import cuda, factor
from tests.helpers.tiny import tiny_llama

IDS = torch.randint(0, 90, (8, 24), generator=torch.Generator().manual_seed(1))


def build(prune=None, allocation=None, layers=4, seed=0, **kwargs):
    model = tiny_llama(layers=layers)
    wrap_model(model, rank=4, scaling=2.0, seed=seed)
    prune = PruneConfig(**(prune or {"sparsity": 0.7}))
    allocation = AllocationConfig(**({"mean_rank": 4, "rank_max": 12} | (allocation or {})))
    calibration = CalibrationConfig(data="unused", samples=8, length=24, cka_samples=8, batch_size=4)
    return model, Engine(model, IDS, prune, allocation, calibration, seed=seed, **kwargs)


def run_all(engine, rounds=3, schedule="cubic", perturb=True):
    config = RoundsConfig(count=rounds, schedule=schedule)
    made = make_schedule(config, engine.allocation, engine.prune_config.final_sparsity, 0, 0.1)
    records, masks = [], []
    for this_round in made:
        records.append(engine.run_round(this_round))
        masks.append([m.mask_bool().clone() for block in engine.blocks for m in block.linears.values()])
        if perturb:
            with torch.no_grad():
                for layer in wrapped_linears(engine.model).values():
                    layer.lora_B.normal_(std=0.02)
    return made, records, masks


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_budgets_are_exact_and_masks_nested(pruner):
    model, engine = build({"pruner": pruner, "sparsity": 0.6})
    schedule, records, masks = run_all(engine)
    sizes = [sum(m.weight.numel() for m in block.linears.values()) for block in engine.blocks]
    for this_round, record in zip(schedule, records, strict=True):
        mean = sum(record.sparsity) / len(record.sparsity)
        # Counts are floored per row (wanda) of at least 32 columns, so a block misses its rate by at most 1/32.
        assert this_round.sparsity - 1 / 32 <= mean <= this_round.sparsity + 1e-9
        assert sum(record.ranks) == this_round.mean_rank * len(engine.blocks)
        assert len(record.errors) == len(sizes) and all(e > 0 for e in record.errors)
    for earlier, later in zip(masks, masks[1:], strict=False):
        assert all(bool((late <= early).all()) for early, late in zip(earlier, later, strict=True))
    for index, block in enumerate(engine.blocks):
        assert {m.rank for m in block.linears.values()} == {records[-1].ranks[index]}


def test_no_graph_outlives_the_pruning(monkeypatch):
    """Training would miss their memory."""
    closed = []
    for module in (cuda, factor):
        monkeypatch.setattr(module.graphs, "close", lambda name=module.__name__: closed.append(name))
    run_all(build()[1], rounds=2)
    assert closed == 2 * [cuda.__name__, factor.__name__]


def test_dense_reference_is_the_original_model():
    for pruner in ("wanda", "sparsegpt"):
        model, engine = build({"pruner": pruner, "sparsity": 0.5})
        original = tiny_llama()
        run_all(engine)
        hidden = torch.randn(2, 5, 32)
        position = original.model.rotary_emb(hidden, torch.arange(5)[None])
        with torch.no_grad():
            for index in range(len(engine.blocks)):
                with engine.blocks[index].dense():
                    got = engine.blocks[index].module(hidden, position_embeddings=position)
                expected = original.model.layers[index](hidden, position_embeddings=position)
                assert torch.equal(got, expected), pruner


def test_sparsegpt_replaces_weights_without_touching_the_given_ones():
    model = tiny_llama()
    given = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    wrap_model(model, rank=2, scaling=2.0)
    calibration = CalibrationConfig(data="unused", samples=8, length=24, cka_samples=8, batch_size=8)
    engine = Engine(model, IDS, PruneConfig(pruner="sparsegpt", sparsity=0.5), AllocationConfig(), calibration)
    run_all(engine)
    for name, (parameter, before) in given.items():
        assert torch.equal(parameter, before), name
    changed = [not torch.equal(m.weight, given[f"{n}.weight"][0]) for n, m in wrapped_linears(model).items()]
    assert all(changed)


def test_sparsegpt_sees_the_adapter():
    """The base is (swept W_eff) - sBA, so the merged weight is the swept one."""
    model, engine = build({"pruner": "sparsegpt", "sparsity": 0.5}, {"rates": "uniform", "ranks": "uniform"})
    with torch.no_grad():
        for layer in wrapped_linears(model).values():
            layer.lora_B.normal_(std=0.05)
    seen = {}
    prune = engine.pruner.prune

    def spy(weight, statistic, pattern, mask):
        result = prune(weight, statistic, pattern, mask)
        seen[len(seen)] = (weight.clone(), result)
        return result

    engine.pruner.prune = spy
    run_all(engine, rounds=1, schedule="oneshot", perturb=False)
    for (_, result), layer in zip(seen.values(), wrapped_linears(model).values(), strict=True):
        merged = layer.merge().weight
        eps = torch.finfo(torch.float32).eps
        assert (merged - result.weight).abs().max() <= 8 * eps * result.weight.abs().max()


@pytest.mark.parametrize(
    "switch", [{"rates": "uniform"}, {"ranks": "uniform"}, {"ranks": "sparsity"}, {"error": "frobenius"}]
)
def test_ablations_keep_the_budget(switch):
    model, engine = build(allocation=switch)
    schedule, records, _ = run_all(engine)
    assert sum(records[-1].ranks) == schedule[-1].mean_rank * len(engine.blocks)
    assert abs(sum(records[-1].sparsity) / 4 - 0.7) <= 1 / 32
    if switch.get("rates") == "uniform":
        assert records[-1].similarity is None and len({round(s, 6) for s in records[-1].sparsity}) == 1
    if switch.get("ranks") == "uniform":
        assert len(set(records[-1].ranks)) == 1


def test_oneshot_has_the_final_budget():
    model, engine = build()
    schedule, records, _ = run_all(engine, rounds=5, schedule="oneshot")
    reference = make_schedule(RoundsConfig(count=5), engine.allocation, 0.7, 0, 0.1)
    assert len(schedule) == 1
    assert (schedule[0].sparsity, schedule[0].mean_rank) == (reference[-1].sparsity, reference[-1].mean_rank)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("mixed", [False, True])
def test_n_to_m_rounds(pruner, mixed):
    model, engine = build({"pruner": pruner, "pattern": "2:8", "mixed": mixed})
    schedule, records, masks = run_all(engine)
    assert sum(records[-1].keep_n) == 2 * len(engine.blocks)
    if not mixed:
        assert set(records[-1].keep_n) == {2}
    for index, block in enumerate(engine.blocks):
        for layer in block.linears.values():
            kept = layer.mask_bool().reshape(layer.out_features, -1, 8).sum(-1)
            assert bool((kept == records[-1].keep_n[index]).all())


def test_regrow_may_bring_weights_back():
    model, engine = build({"sparsity": 0.5, "regrow": True, "pruner": "magnitude"})
    with torch.no_grad():
        _, _, masks = run_all(engine, perturb=True)
    back = [bool((late & ~early).any()) for early, late in zip(masks[0], masks[-1], strict=True)]
    assert any(back)
    total = sum(m.numel() for m in masks[-1])
    kept = sum(int(m.sum()) for m in masks[-1])
    assert abs(1 - kept / total - 0.5) < 0.02


def test_same_seed_same_rounds():
    first, second = build(seed=3), build(seed=3)
    a, b = run_all(first[1], perturb=False)[1], run_all(second[1], perturb=False)[1]
    assert [r.ranks for r in a] == [r.ranks for r in b]
    states = first[0].state_dict(), second[0].state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_weights_are_formed_only_when_they_are_read(monkeypatch):
    block, formed = build()[1].blocks[0], []
    monkeypatch.setattr(block, "dense_values", lambda name, *how: formed.append(name))
    weights = _WeightsToPrune(block, block.linears, {}, updates_weight=False, nested=True)
    assert "mlp.up_proj" in weights and "lm_head" not in weights and list(weights) == list(block.linears)
    assert len(weights) == 7 and not formed
    assert weights["mlp.up_proj"] is None and formed == ["mlp.up_proj"]
    with pytest.raises(KeyError):
        weights["lm_head"]


@pytest.mark.parametrize("kept", [True, False])
def test_replaced_weights_are_kept_for_a_dense_stream_alone(kept):
    ranks = {"ranks": "error" if kept else "uniform"}
    model, engine = build({"pruner": "sparsegpt", "sparsity": 0.5}, ranks, measure_errors=False)
    before = [StorageWeakRef(layer.weight.untyped_storage()) for layer in wrapped_linears(model).values()]
    (record,) = run_all(engine, rounds=1)[1]
    assert (record.errors is not None) == kept
    gc.collect()
    assert all(storage.expired() != kept for storage in before)


def test_merged_model_equals_wrapped_model():
    model, engine = build()
    run_all(engine)
    with torch.no_grad():
        wrapped = model(IDS).logits
        merged = merge_model(copy.deepcopy(model))(IDS).logits
    assert (wrapped - merged).abs().max() <= 64 * torch.finfo(torch.float32).eps * wrapped.abs().max()


def test_numerics_error_names_the_block():
    model, engine = build()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    only = make_schedule(RoundsConfig(count=1), engine.allocation, 0.7, 0, 0.1)[0]
    with pytest.raises(NumericsError, match=r"layers\.2"):
        engine.run_round(only)
