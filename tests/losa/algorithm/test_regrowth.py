"""Weights that come back by gradient: which, how many, and with what values."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.engine import Engine
from losa.algorithm.regrowth import Regrowing
from losa.algorithm.schedule import Round
from losa.errors import RecipeError
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
    pruner = Regrowing(get_pruner(prune), {"a": gradient}, share)
    ((name, pruned),) = pruner.prune_block({"a": weight}, {"a": norms}, pattern, {"a": pack_mask(kept)})
    assert name == "a" and pruned.weight is None
    return unpack_mask(pruned.mask, COLUMNS)


def kept_of(pruner, pattern):
    weight, _, norms = problem()
    return unpack_mask(get_pruner(pruner).prune(weight, norms, pattern, None).mask, COLUMNS)


def exchanged(kept, scores, effect, wanted, most):
    """What stays of the line ``kept``: a set. One pair after the other, as long as it lowers the loss."""
    own = sorted((c for c, one in enumerate(kept) if one), key=lambda c: -scores[c])[:wanted]
    gone = sorted((c for c, one in enumerate(kept) if not one), key=lambda c: effect[c])
    back, gone = gone[: wanted - len(own)], gone[wanted - len(own) :]
    leave = sorted(own[wanted - most :], key=lambda c: -effect[c])
    pairs = 0
    for leaves, returns in zip(leave, gone, strict=False):
        if effect[returns] >= 0 or effect[returns] - effect[leaves] >= 0:
            break
        pairs += 1
    return {*own, *back, *gone[:pairs]} - {*leave[:pairs]}, pairs


@pytest.mark.parametrize("before, sparsity, most", [(0.25, 0.5, 4), (0.5, 0.25, 6), (0.5, 0.45, 4), (0, 0.5, 0)])
@pytest.mark.parametrize("share", [0.2, 0.0])
def test_pairs_of_a_row_are_exchanged_where_the_loss_falls(before, sparsity, most, share):
    """At most a fifth of the kept weights; all that a rate brings back that falls; none where nothing was pruned."""
    wanda = PruneConfig(sparsity=0.5)
    kept = kept_of(wanda, Pattern(sparsity=before))
    found = regrown(wanda, Pattern(sparsity=sparsity), kept, share)
    weight, gradient, norms = (each.double() for each in problem())
    wanted, pairs = COLUMNS - int(sparsity * COLUMNS), []
    for row in range(ROWS):
        scores, effect = (weight[row].abs() * norms).tolist(), (gradient[row] * weight[row]).tolist()
        stays, count = exchanged(kept[row].tolist(), scores, effect, wanted, most if share else 0)
        assert set(found[row].nonzero().flatten().tolist()) == stays
        pairs.append(count)
    if share and (before, sparsity) == (0.25, 0.5):
        assert 0 < min(pairs) < max(pairs) or min(pairs) < most, "some pairs would raise the loss"


def test_a_pruner_of_the_whole_matrix_gets_them_back_over_the_matrix():
    magnitude = PruneConfig(pruner="magnitude", sparsity=0.5)
    kept = kept_of(magnitude, Pattern(sparsity=0.25))
    found = regrown(magnitude, Pattern(sparsity=0.5), kept)
    weight, gradient, _ = (each.double() for each in problem())
    assert len({int(row.sum()) for row in kept}) > 1
    wanted = ROWS * COLUMNS // 2
    scores, effect = (each.flatten().tolist() for each in (weight.abs(), gradient * weight))
    stays, pairs = exchanged(kept.flatten().tolist(), scores, effect, wanted, wanted // 5)
    assert set(found.flatten().nonzero().flatten().tolist()) == stays and 0 < pairs < wanted // 5


@pytest.mark.parametrize("keep_n, before", [(2, 3), (1, 2), (2, 2), (3, 2)])
def test_groups_exchange_one_pair_where_it_helps_most(keep_n, before):
    """A row has 10 groups of 4. Where more is to be kept than before, every group gets what it lacks."""
    wanda = PruneConfig(pattern="2:4")
    kept = kept_of(wanda, Pattern(keep_n=before, m=4))
    found = regrown(wanda, Pattern(keep_n=keep_n, m=4), kept).view(ROWS, -1, 4)
    weight, gradient, norms = (each.double() for each in problem())
    scores, effect = ((weight.abs() * norms).view_as(found), (gradient * weight).view_as(found))
    kept = kept.view_as(found)
    assert bool((found.sum(-1) == keep_n).all())
    for row in range(ROWS):
        stays, changes = [], {}
        for group in range(10):
            own, score, change = (each[row, group].tolist() for each in (kept, scores, effect))
            stays.append(exchanged(own, score, change, keep_n, 0)[0])
            exchange, pairs = exchanged(own, score, change, keep_n, 1 if before >= keep_n else 0)
            if pairs:
                changes[group] = sum(change[c] for c in exchange - stays[-1]) - sum(
                    change[c] for c in stays[-1] - exchange
                )
                stays[-1] = (stays[-1], exchange)
        best = sorted(changes, key=changes.__getitem__)[: int(0.2 * keep_n * 10)]
        for group, either in enumerate(stays):
            wanted = either if isinstance(either, set) else either[group in best]
            assert set(found[row, group].nonzero().flatten().tolist()) == wanted


def engine_of(allocation=None, **prune):
    model = tiny_llama(layers=2)
    wrap_model(model, rank=3, scaling=2.0)
    uniform = {"rates": "uniform", "ranks": "uniform"}
    allocation = AllocationConfig(**(allocation or uniform), mean_rank=3, rank_max=6)
    calibration = CalibrationConfig(data="unused", samples=3, length=12, cka_samples=2, batch_size=2)
    settings = {"regrow": True, "regrow_by": "gradient"} | prune
    engine = Engine(model, IDS, PruneConfig(**settings), allocation, calibration, measure_errors=False)
    return engine, wrapped_linears(model)


@pytest.mark.parametrize("pruner, per", [("wanda", "block"), ("wanda", "linear"), ("magnitude", "block")])
def test_rates_that_fall_bring_back_what_the_target_asks_for(pruner, per):
    """The blocks change places between two rounds, and all together lose what the round asks for."""
    engine, layers = engine_of({"rates": "update", "delta": 0.25, "per": per}, pruner=pruner, sparsity=0.5)
    rates = []
    for index, importance in enumerate(([0.0, 1.0], [1.0, 0.0]), start=1):
        engine.rates._function = lambda found, importance=importance: torch.tensor(importance)
        before = {name: layer.mask_bool() for name, layer in layers.items()}
        record = engine.run_round(Round(index, 0.5, 3, 0))
        assert sum(record.sparsity) == pytest.approx(1.0, abs=1e-3)
        rates.append(record.sparsity)
    assert rates[0] == pytest.approx([0.75, 0.25]) and rates[1] == pytest.approx([0.25, 0.75])
    assert "gradients" in record.seconds
    first = [name for name in layers if name.startswith("model.layers.0.")]
    assert all(bool((layers[name].mask_bool() & ~before[name]).any()) for name in first)


@pytest.mark.parametrize("later, exchanges", [(1.0, True), (0.0, False)])
def test_the_last_round_exchanges_nothing(later, exchanges):
    engine, layers = engine_of(pruner="wanda", sparsity=0.5)
    first = engine.run_round(Round(1, 0.25, 3, 0))
    assert "gradients" not in first.seconds, "nothing can come back"
    before = {name: layer.mask_bool() for name, layer in layers.items()}
    record = engine.run_round(Round(2, 0.5, 3, 0, later))
    assert record.sparsity == [0.5, 0.5]
    assert any(bool((layers[name].mask_bool() & ~kept).any()) for name, kept in before.items()) == exchanges


class WholeBlocks(Pruner):
    def prune_block(self, *args):
        raise AssertionError


def test_what_cannot_be_done_is_refused(own_names):
    register("blocks", WholeBlocks)
    with pytest.raises(RecipeError, match="^prune.regrow_by: gradient brings .* 'blocks' decides about whole blocks"):
        engine_of(pruner="blocks", sparsity=0.5)
    with pytest.raises(RecipeError, match="prune.pruner 'sparsegpt' changes kept weights, which then make up for"):
        engine_of(pruner="sparsegpt", sparsity=0.5)
    calibration = {"data": "c.txt"}
    prune = {"sparsity": 0.5, "regrow_by": "gradient"}
    with pytest.raises(RecipeError, match="prune.regrow_by: gradient needs prune.regrow: true"):
        parse_recipe({"model": "m", "output": "o", "method": "prune_only", "prune": prune, "calibration": calibration})
