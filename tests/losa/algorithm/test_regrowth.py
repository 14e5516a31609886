"""Weights that come back by gradient: which, how many, and with what values."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.engine import Engine
from losa.algorithm.regrowth import Regrowing
from losa.algorithm.schedule import Round
from losa.errors import LosaError, RecipeError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.pruners import Pattern, Pruner, get_pruner, register
from losa.recipe.reading import parse_recipe
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa_kernels import pack_mask, unpack_mask
from tests.helpers.tiny import tiny_llama

IDS = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(1))
ROWS, COLUMNS = 5, 40


def problem(seed=0):
    """Weight, gradient and input norms of one linear."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    return weight, gradient, torch.rand(COLUMNS, generator=generator) + 0.1


def regrown(prune, pattern, kept, share=0.2):
    weight, gradient, norms = problem()
    pruner = Regrowing(get_pruner(prune), {"a": gradient}, lambda name: weight, share)
    ((name, pruned),) = pruner.prune_block({"a": weight}, {"a": norms}, pattern, {"a": pack_mask(kept)})
    assert name == "a"
    return unpack_mask(pruned.mask, COLUMNS)


def kept_of(pruner, pattern):
    weight, _, norms = problem()
    return unpack_mask(get_pruner(pruner).prune(weight, norms, pattern, None).mask, COLUMNS)


@pytest.mark.parametrize("before, sparsity, returning", [(0.25, 0.5, 4), (0.5, 0.25, 10), (0.5, 0.45, 4), (0, 0.5, 0)])
def test_the_best_of_a_row_come_back_for_the_lowest_scores(before, sparsity, returning):
    """A fifth of the kept weights; all that a rate brings back that falls; none where nothing was pruned."""
    wanda = PruneConfig(sparsity=0.5)
    kept = kept_of(wanda, Pattern(sparsity=before))
    found = regrown(wanda, Pattern(sparsity=sparsity), kept)
    weight, gradient, norms = (each.double() for each in problem())
    wanted = COLUMNS - int(sparsity * COLUMNS)
    for row in range(ROWS):
        own = sorted((c for c in range(COLUMNS) if kept[row, c]), key=lambda c: -float(weight[row, c].abs() * norms[c]))
        gone = [c for c in range(COLUMNS) if not kept[row, c]]
        back = sorted(gone, key=lambda c: float(gradient[row, c] * weight[row, c]))[:returning]
        assert set(found[row].nonzero().flatten().tolist()) == {*own[: wanted - returning], *back}


def test_a_pruner_of_the_whole_matrix_gets_them_back_over_the_matrix():
    magnitude = PruneConfig(pruner="magnitude", sparsity=0.5)
    kept = kept_of(magnitude, Pattern(sparsity=0.25))
    found = regrown(magnitude, Pattern(sparsity=0.5), kept)
    weight, gradient, _ = (each.double() for each in problem())
    assert len({int(row.sum()) for row in kept}) > 1 and int(found.sum()) == ROWS * COLUMNS // 2
    change = (gradient * weight)[~kept].sort().values[: ROWS * 4]
    assert torch.equal((gradient * weight)[found & ~kept].sort().values, change)
    left = weight.abs()[kept].sort(descending=True).values[: ROWS * 16]
    assert torch.equal(weight.abs()[found & kept].sort(descending=True).values, left)


@pytest.mark.parametrize("keep_n, before", [(2, 3), (1, 2), (2, 2), (3, 2)])
def test_groups_exchange_one_weight_where_it_helps_most(keep_n, before):
    """A row has 10 groups of 4. Where more is to be kept than before, every group gets what it lacks."""
    wanda = PruneConfig(pattern="2:4")
    kept = kept_of(wanda, Pattern(keep_n=before, m=4))
    found = regrown(wanda, Pattern(keep_n=keep_n, m=4), kept).view(ROWS, -1, 4)
    weight, gradient, norms = (each.double() for each in problem())
    scores, change = ((weight.abs() * norms).view_as(found), (gradient * weight).view_as(found))
    kept = kept.view_as(found)
    assert bool((found.sum(-1) == keep_n).all())
    best = change.masked_fill(kept, torch.inf).amin(-1)
    for row in range(ROWS):
        exchanging = best[row].argsort()[: int(0.2 * keep_n * 10)].tolist()
        for group in range(10):
            own = [c for c in range(4) if kept[row, group, c]]
            count = min(before, keep_n - (group in exchanging))
            stay = sorted(own, key=lambda c: -float(scores[row, group, c]))[:count]
            gone = [c for c in range(4) if not kept[row, group, c]]
            back = sorted(gone, key=lambda c: float(change[row, group, c]))[: keep_n - len(stay)]
            assert set(found[row, group].nonzero().flatten().tolist()) == {*stay, *back}


def engine_of(**prune):
    model = tiny_llama(layers=2)
    wrap_model(model, rank=3, scaling=2.0)
    allocation = AllocationConfig(rates="uniform", ranks="uniform", mean_rank=3, rank_max=6)
    calibration = CalibrationConfig(data="unused", samples=3, length=12, cka_samples=2, batch_size=2)
    settings = {"regrow": True, "regrow_by": "gradient"} | prune
    engine = Engine(model, IDS, PruneConfig(**settings), allocation, calibration, measure_errors=False)
    return engine, wrapped_linears(model)


def test_rounds_of_sparsegpt_give_back_what_is_stored():
    engine, layers = engine_of(pruner="sparsegpt", sparsity=0.5)
    first = engine.run_round(Round(1, 0.25, 3, 0))
    assert "gradients" not in first.seconds, "nothing can come back"
    with pytest.raises(LosaError, match="expected the dense model's weight to be kept"):  # nobody asks for it
        engine.blocks[0].originals.whole()
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(std=0.05)
    before = {name: (layer.mask_bool(), layer.dense_weight()) for name, layer in layers.items()}
    record = engine.run_round(Round(2, 0.5, 3, 0))
    assert record.sparsity == [0.5, 0.5]
    eps = torch.finfo(torch.float32).eps
    for name, layer in layers.items():
        kept, dense = before[name]
        back = layer.mask_bool() & ~kept
        # Of each row's kept weights, which are half of its weights, a tenth.
        assert int(back.sum()) == layer.out_features * (layer.in_features // 20), name
        assert (layer.merge().weight - dense)[back].abs().max() <= 4 * eps * dense.abs().max()


class WholeBlocks(Pruner):
    def prune_block(self, *args):
        raise AssertionError


def test_what_cannot_be_done_is_refused(own_names):
    register("blocks", WholeBlocks)
    with pytest.raises(RecipeError, match="^prune.regrow_by: gradient brings .* 'blocks' decides about whole blocks"):
        engine_of(pruner="blocks", sparsity=0.5)
    with pytest.raises(RecipeError, match="prune.pruner 'sparsegpt' changes kept weights, so that with prune.pattern"):
        engine_of(pruner="sparsegpt", pattern="2:4")
    calibration = {"data": "c.txt"}
    prune = {"sparsity": 0.5, "regrow_by": "gradient"}
    with pytest.raises(RecipeError, match="prune.regrow_by: gradient needs prune.regrow: true"):
        parse_recipe({"model": "m", "output": "o", "method": "prune_only", "prune": prune, "calibration": calibration})
