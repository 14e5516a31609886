"""Selection is exact; the sweep is the optimal-brain-surgeon solution for its mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_kernels import pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.column_sweep import SingularHessianError, inverse_factor


def hessian(columns, tokens=None, seed=0, spread=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * columns, columns, generator=g, dtype=torch.float64)
    x = x * torch.logspace(0, -spread, columns, dtype=torch.float64)
    return (x.T @ x).to(dtype)


def damped(h, damping=0.01):
    h = h.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def eliminate(row, pruned, h):
    """Zero one row's weights in column order, each time updating the columns after it by the inverse Hessian of those
    columns: the definition, with an explicit inverse at every step."""
    row, loss = row.double().clone(), 0.0
    for i in range(len(row)):
        if not pruned[i]:
            continue
        inverse = torch.linalg.inv(h[i:, i:])
        error = row[i] / inverse[0, 0]
        loss += 0.5 * float(row[i] ** 2 / inverse[0, 0])
        row[i:] -= error * inverse[:, 0]
        row[i] = 0
    return row, loss


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"keep_n": 2, "m": 4}, {"keep_n": 2, "m": 8}])
@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_sweep_is_the_elimination_for_its_mask(goal, spread, block_size):
    torch.manual_seed(0)
    weight, h = torch.randn(6, 48, dtype=torch.float64), hessian(48, spread=spread)
    result = sparsegpt_prune(weight, h, block_size=block_size, **goal)
    kept = unpack_mask(result.mask, 48)
    for row in range(6):
        expected, loss = eliminate(weight[row], ~kept[row], damped(h))
        assert torch.allclose(result.weight[row], expected, rtol=1e-8, atol=1e-9)
        assert float(result.loss[row]) == pytest.approx(loss, rel=1e-8)
    assert bool((result.weight[~kept].view(torch.int64) == 0).all()), "pruned weights are +0.0 to the bit"


def test_fp32_agrees_with_fp64():
    torch.manual_seed(0)
    weight, h = torch.randn(32, 64), hessian(64)
    low = sparsegpt_prune(weight, h.float(), sparsity=0.5)
    high = sparsegpt_prune(weight.double(), h, sparsity=0.5)
    assert low.weight.dtype == torch.float32
    same = (unpack_mask(low.mask, 64) == unpack_mask(high.mask, 64)).all(1)
    assert same.float().mean() > 0.95
    assert (low.weight.double() - high.weight)[same].abs().max() <= 1e-5 * high.weight.abs().max()


def test_compensation_beats_masking():
    torch.manual_seed(0)
    weight, h = torch.randn(16, 64, dtype=torch.float64), hessian(64, spread=1.5)
    result = sparsegpt_prune(weight, h, sparsity=0.6)

    def error(w):
        d = w - weight
        return float((d @ h * d).sum())

    magnitude = weight * (weight.abs() >= weight.abs().flatten().kthvalue(int(0.6 * weight.numel())).values)
    assert error(result.weight) < error(weight * unpack_mask(result.mask, 64))
    assert error(result.weight) < 0.8 * error(magnitude)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.95), st.sampled_from([4, 16, 128]))
def test_unstructured_count_is_exact(rows, columns, sparsity, block_size):
    torch.manual_seed(rows * columns)
    result = sparsegpt_prune(
        torch.randn(rows, columns), hessian(columns, 80).float(), sparsity=sparsity, block_size=block_size
    )
    assert int((~unpack_mask(result.mask, columns)).sum()) == int(sparsity * rows * columns + 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8), st.sampled_from([(1, 4), (2, 4), (3, 8), (7, 8)]), st.booleans())
def test_nm_is_exact(rows, groups, pattern, wanda):
    keep_n, m = pattern
    weight = torch.randn(rows, groups * m)
    if wanda:
        mask = wanda_mask(weight, torch.rand(groups * m), keep_n=keep_n, m=m)
    else:
        mask = sparsegpt_prune(weight, hessian(groups * m, 99).float(), keep_n=keep_n, m=m, block_size=2 * m).mask
    assert bool((unpack_mask(mask, groups * m).reshape(-1, m).sum(1) == keep_n).all())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 0.95), st.integers(1, 5), st.integers(0, 99))
def test_wanda_is_a_stable_sort(rows, columns, sparsity, levels, seed):
    """Few distinct values, so that ties are everywhere: the lowest columns go first."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=g).float()
    norms = torch.randint(0, 3, (columns,), generator=g).float()
    count = int(sparsity * columns + 1e-6)
    order = (weight.abs() * norms).argsort(dim=1, stable=True)
    expected = torch.ones(rows, columns, dtype=torch.bool).scatter_(1, order[:, :count], False)
    assert torch.equal(unpack_mask(wanda_mask(weight, norms, sparsity=sparsity), columns), expected)


def test_floor_of_a_decimal_sparsity():
    for sparsity, columns, expected in ((0.7, 10, 7), (0.3, 10, 3), (0.95, 20, 19), (0.6, 5, 3), (0.55, 576, 316)):
        mask = wanda_mask(torch.randn(3, columns), torch.ones(columns), sparsity=sparsity)
        assert bool(((~unpack_mask(mask, columns)).sum(1) == expected).all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "first, then", [({"sparsity": 0.3}, {"sparsity": 0.6}), ({"keep_n": 6, "m": 8}, {"keep_n": 2, "m": 8})]
)
def test_masks_are_nested(method, first, then):
    torch.manual_seed(0)
    weight, h = torch.randn(12, 64), hessian(64).float()

    def prune(w, goal, mask=None):
        if method == "wanda":
            return wanda_mask(w, h.diagonal().sqrt(), mask=mask, **goal)
        return sparsegpt_prune(w, h, mask=mask, **goal).mask

    early = prune(weight, first)
    late = prune(torch.randn(12, 64), then, early)
    early_kept, late_kept = unpack_mask(early, 64), unpack_mask(late, 64)
    assert not bool((late_kept & ~early_kept).any())
    assert int(late_kept.sum()) == (
        12 * 16 if "m" in then else 12 * 64 - (12 * int(0.6 * 64) if method == "wanda" else int(0.6 * 12 * 64))
    )
    same = prune(weight, {"sparsity": 0.1}, early)
    assert torch.equal(same, early) or int(unpack_mask(same, 64).sum()) <= int(early_kept.sum())


def test_dead_columns_are_zeroed_without_error():
    torch.manual_seed(0)
    weight, h = torch.randn(8, 32, dtype=torch.float64), hessian(32)
    h[5, :] = h[:, 5] = 0
    result = sparsegpt_prune(weight, h, sparsity=0.25)
    assert bool((result.weight[:, 5] == 0).all())
    assert not bool(unpack_mask(result.mask, 32)[:, 5].any()), "a dead column is the cheapest to prune"
    without = weight.clone()
    without[:, 5] = 0
    assert torch.equal(sparsegpt_prune(without, h, sparsity=0.25).weight, result.weight)


def test_inverse_factor():
    h = hessian(40)
    factor, used = inverse_factor(h, 0.01)
    assert used == 0.01 and torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped(h)), rtol=1e-8, atol=1e-12)


def test_damping_escalates_and_is_recorded():
    torch.manual_seed(0)
    h = hessian(24)
    h -= 1.05 * torch.linalg.eigvalsh(h)[0] * torch.eye(24) + 0.05 * h.diagonal().mean() * torch.eye(24)
    before = h.clone()
    result = sparsegpt_prune(torch.randn(4, 24, dtype=torch.float64), h, sparsity=0.5, damping=0.001)
    assert result.damping > 0.05 and torch.isfinite(result.weight).all()
    assert torch.equal(h, before)


def test_hopeless_hessian_is_refused():
    with pytest.raises(SingularHessianError, match="damping"):
        sparsegpt_prune(torch.randn(4, 8), -torch.eye(8), sparsity=0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": None}, "sparsity: give"),
        ({"keep_n": 2, "m": 4}, "sparsity: give"),
        ({"sparsity": 1.0}, "sparsity: expected"),
        ({"sparsity": -0.1}, "sparsity: expected"),
        ({"sparsity": None, "keep_n": 5, "m": 4}, "keep_n: expected"),
        ({"sparsity": None, "keep_n": 2, "m": 5}, "m: expected a divisor"),
        ({"mask": torch.zeros(4, 8, dtype=torch.uint8)}, "mask: expected"),
        ({"weight": torch.full((4, 8), float("nan"))}, "weight: expected finite"),
        ({"hessian": torch.full((8, 8), float("inf"))}, "hessian: expected finite"),
        ({"hessian": torch.eye(7)}, "hessian: expected"),
        ({"damping": 0.0}, "damping: expected"),
        ({"sparsity": None, "keep_n": 2, "m": 4, "block_size": 6}, "block_size: expected"),
    ],
)
def test_sweep_errors_name_the_argument(change, message):
    arguments = {"weight": torch.randn(4, 8), "hessian": torch.eye(8), "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=message):
        sparsegpt_prune(**arguments)


@pytest.mark.parametrize(
    "norms, message",
    [(torch.ones(7), "input_norms"), (-torch.ones(8), "input_norms"), (torch.full((8,), float("nan")), "input_norms")],
)
def test_wanda_errors_name_the_argument(norms, message):
    with pytest.raises(ValueError, match=message):
        wanda_mask(torch.randn(4, 8), norms, sparsity=0.5)


def test_pack_of_a_full_mask_keeps_everything():
    weight = torch.randn(4, 8)
    full = pack_mask(torch.ones(4, 8, dtype=torch.bool))
    assert torch.equal(wanda_mask(weight, torch.ones(8), sparsity=0.0, mask=full), full)
