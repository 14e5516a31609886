"""Rows of a linear that are pruned by what their outputs matter, against sorts and sums in fp64."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.expected_loss import Energies, loss_curve
from losa.algorithm.row_scales import ByRows, row_scales
from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.model.wrapping import wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners import get_pruner
from losa.pruners.base import Pattern
from losa.pruners.wanda import Wanda
from losa.recipe.sections import AllocationConfig, PruneConfig
from losa_kernels import pack_mask, unpack_mask, wanda_mask
from tests.helpers.expected_loss import IDS, build
from tests.helpers.tiny import EPS


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [10, 600])
def test_a_curve_by_rows_is_what_the_cheapest_of_the_matrix_cost(rows, nested):
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLoRALinear(torch.randn(rows, 20, generator=generator), rank=2, generator=generator)
    inputs, outputs = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (20, rows))
    outputs[:2] = torch.tensor([1e-4, 1e4])
    median = float(outputs.sort().values[(rows - 1) // 2])
    layer.set_mask(wanda_mask(layer.dense_weight(), torch.rand(20, generator=generator), sparsity=0.25))
    curve = loss_curve(layer, Energies(inputs, outputs), nested, by_rows=True)
    own = torch.tensor([min(max(x, median / 16), median * 16) for x in outputs.tolist()], dtype=torch.float64)
    costs = 0.5 * layer.weight.detach().double().square() * own[:, None] * inputs
    part = slice(None, None, 3 if rows > 256 else 1)
    going = costs[part].flatten()
    going = going * layer.mask_bool()[part].flatten() if nested else going
    lost = (costs * ~layer.mask_bool())[part].sum() if nested else 0.0
    for count in range(21):
        truth = (lost + going.sort().values[: count * len(costs[part])].sum()) / costs[part].sum() * costs.sum()
        assert float(curve[count]) == pytest.approx(float(truth), rel=64 * EPS, abs=1e-12)
    by_count = loss_curve(layer, Energies(inputs, own), nested)
    assert bool((curve <= by_count * (1 + 64 * EPS)).all()) and float(curve[10]) < 0.99 * float(by_count[10])


def test_weights_of_all_rows_compete_by_score_and_energy():
    """The masks of a first round against a sort of scores in fp64."""
    _, engine = build({"sparsity": 0.5}, per="row")
    block = engine.blocks[0]
    weights = {name: linear.weight.detach().double() for name, linear in block.linears.items()}
    engine.run_round(Round(1, 0.5, 4, 0))
    with torch.no_grad(), block.dense():
        stream = engine._stream(IDS)
        norms = {}
        watched = [
            linear.register_forward_hook(lambda _, args, output, name=name: norms.setdefault(name, []).append(args[0]))
            for name, linear in block.linears.items()
        ]
        list(stream.run(0))
    for hook in watched:
        hook.remove()
    energies, uneven = engine.rates.measured.energies(), 0
    for name, linear in block.linears.items():
        norm = torch.cat([x.flatten(0, -2) for x in norms[name]]).double().norm(dim=0)
        outputs = energies[f"{block.name}.{name}"].outputs
        median = outputs.sort().values[(len(outputs) - 1) // 2]
        own = outputs.clamp(median / 16, median * 16)
        scores = weights[name].abs() * norm * own.sqrt()[:, None]
        kept = linear.mask_bool()
        assert kept.sum() % linear.out_features == 0, "as many columns as the linear's rate says, over all rows"
        least_kept, most_pruned = scores[kept].min(), scores[~kept].max()
        assert least_kept >= most_pruned * (1 - 1e-5), name
        uneven += len(set(kept.sum(1).tolist())) > 1
    assert uneven == len(block.linears)


def test_sparsegpt_weighs_the_errors_of_rows():
    """Least squares whose rows count differently: the sum that counts is lower than with rows that count alike."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 32, generator=generator), torch.randn(256, 32, generator=generator)
    x[:, 1:] += x[:, :1]
    scales = torch.rand(24, generator=generator).mul(3).sub(1.5).exp().double()
    sparsegpt = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5))
    pattern, statistic = Pattern(sparsity=0.5), {"own": x.T @ x}
    found = {}
    for name, pruner in {"alike": sparsegpt, "weighed": ByRows(sparsegpt, {"own": scales})}.items():
        ((_, pruned),) = pruner.prune_block({"own": weight}, statistic, pattern, {"own": None})
        kept = unpack_mask(pruned.mask, 32)
        assert int(kept.sum()) == weight.numel() // 2 and not pruned.weight[~kept].any()
        off = (weight - pruned.weight).double()
        damped = pruned.damping * statistic["own"].diagonal().mean() * off.square().sum(1)
        found[name] = float(scales.square() @ ((off @ x.T.double()).square().sum(1) + damped))
    assert pruned.loss == pytest.approx(found["weighed"] / 2, rel=1e-4), "the sum that its own estimate is of"
    assert found["weighed"] < 0.9 * found["alike"]


def test_scales_stay_near_the_median():
    outputs = torch.tensor([0.0, 1.0, 4.0, 16.0, 1e9]).double()
    assert row_scales(outputs).tolist() == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert row_scales(torch.tensor([0.0, 0.0, 3.0]).double()).tolist() == [1.0, 1.0, 4.0], (
        "rows without energy count least"
    )
    assert row_scales(torch.zeros(3).double()).tolist() == [1.0, 1.0, 1.0]


def test_wanda_in_place_of_a_singular_hessian_counts_over_the_matrix():
    """Also where rows have lost different numbers before."""
    generator = torch.Generator().manual_seed(0)
    weight, scales = torch.randn(16, 32, generator=generator), torch.linspace(0.25, 4, 16).double()
    pruner = ByRows(get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda")), {"own": scales})
    hessian, before = -torch.eye(32), torch.rand(16, 32, generator=generator) >= torch.linspace(0, 0.8, 16)[:, None]
    hessian[0, 0] = 1
    how = {"own": weight}, {"own": hessian}, Pattern(sparsity=0.5), {"own": pack_mask(before)}
    ((_, pruned),) = pruner.prune_block(*how)
    kept = unpack_mask(pruned.mask, 32)
    assert pruned.damping == float("inf") and int(kept.sum()) == 256 and bool((kept <= before).all())
    assert len(set(kept.sum(1).tolist())) > 4


def test_pruner_zero_takes_gradients_by_the_scaled_weight():
    """Those are G / f: a row's energy is in them already."""
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(12, 16, generator=generator), torch.rand(12, 16, generator=generator) + 0.5
    scales = torch.linspace(0.25, 4, 12).double()
    pruner = ByRows(get_pruner(PruneConfig(pruner="pruner_zero", sparsity=0.5)), {"own": scales}, of_gradients=True)
    ((_, pruned),) = pruner.prune_block({"own": weight}, {"own": gradients}, Pattern(sparsity=0.5), {"own": None})
    by_scaled = gradients.double() / scales[:, None]
    scores = (weight.double() * scales[:, None]).square() * (by_scaled - by_scaled.min())
    expected = torch.ones(12 * 16, dtype=torch.bool)
    expected[scores.flatten().argsort()[:96]] = False
    assert torch.equal(unpack_mask(pruned.mask, 16).flatten(), expected)


def test_a_row_without_energy_is_never_worth_more_than_another():
    """More dead rows than others: the curve is what the masks cost, and the masks cost less than Wanda's."""
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLoRALinear(torch.randn(9, 20, generator=generator), rank=2, generator=generator)
    outputs = torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 3, 4]).double()
    energies = Energies(torch.ones(20).double(), outputs)
    curve = loss_curve(layer, energies, False, by_rows=True)
    pruner = ByRows(get_pruner(PruneConfig(sparsity=0.5)), {"own": row_scales(outputs)})
    weights, norms = {"own": layer.weight.detach()}, {"own": torch.ones(20)}
    ((_, pruned),) = pruner.prune_block(weights, norms, Pattern(sparsity=0.55), {"own": None})
    costs = 0.5 * layer.weight.detach().double().square()
    lost = (costs * ~unpack_mask(pruned.mask, 20)).sum(1)
    own = outputs.clamp(2 / 16, 2 * 16)
    assert float(curve[11]) == pytest.approx(float(own @ lost), rel=64 * EPS)
    by_count = (costs * ~unpack_mask(wanda_mask(layer.weight.detach(), norms["own"], sparsity=0.55), 20)).sum(1)
    assert float(outputs @ lost) < 0.5 * float(outputs @ by_count)


@pytest.mark.parametrize(
    "changes, said", [({"rates": "cka"}, "got rates 'cka'"), ({"fill": "smooth"}, "fill 'smooth'")]
)
def test_rows_take_expected_losses(changes, said):
    with pytest.raises(ValueError, match=f"allocation.per: row: .*{said}"):
        AllocationConfig(**({"rates": "fisher", "per": "row"} | changes))


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "alps", "pruner_zero"])
@pytest.mark.parametrize("regrow", [False, True])
def test_later_rounds_keep_counts_of_the_matrix(pruner, regrow):
    """Nested, and where pruned weights come back by gradient."""
    changes = {"sparsity": 0.5, "pruner": pruner}
    if regrow and pruner in ("sparsegpt", "alps"):
        pytest.skip("weights that others make up for do not come back")
    model, engine = build(changes | ({"regrow": True, "regrow_by": "gradient"} if regrow else {}), per="row")
    before = None
    for index, target in enumerate((0.3, 0.5), start=1):
        record = engine.run_round(Round(index, target, 4, 0))
        assert sum(record.sparsity) / len(record.sparsity) == pytest.approx(target, abs=1 / 32)
        now = torch.cat([linear.mask_bool().flatten() for linear in wrapped_linears(model).values()])
        back = int((now & ~before).sum()) if before is not None else 0
        assert (back > 0) == (regrow and index == 2)
        before = now.clone()
        for name, linear in wrapped_linears(model).items():
            assert int(linear.mask_bool().sum()) % linear.out_features == 0, name


def test_a_pruner_that_counts_in_each_row_is_refused(own_names):
    from losa.pruners import register

    @register("rows-only")
    class RowsOnly(Wanda):
        counts = "row"

    with pytest.raises(RecipeError, match=r"allocation.per: row: .*'rows-only', which counts in each row"):
        build({"sparsity": 0.5, "pruner": "rows-only"}, per="row")
    with pytest.raises(RecipeError, match=r"allocation.per: row needs prune.sparsity, got prune.pattern '2:4'"):
        build({"pattern": "2:4"}, per="row")
