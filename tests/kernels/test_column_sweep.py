"""The sweep is the optimal-brain-surgeon solution for its mask; the factor and the Hessian that it works on."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from losa_kernels import pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import SingularHessianError, accumulate_hessian, complete_hessian, inverse_factor
from losa_kernels.pruning import hessian as hessian_module
from tests.helpers.column_sweep_problems import hessian


def damped(h, damping=0.01):
    h = h.clone()
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def slow_sweep(weight, h, pruned=None, *, sparsity=None, keep_n=None, m=None, block_size=128):
    """The definition, one weight at a time: (weight, pruned, loss).

    A weight is zeroed and the columns after it take the update that its removal costs least with, from an explicit
    inverse of the Hessian of the columns not yet passed. Without ``pruned`` it also decides, by sorting costs.
    """
    rows, columns = weight.shape
    weight, loss = weight.clone(), torch.zeros(rows, dtype=weight.dtype)
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]
    decide, done = pruned is None, 0
    pruned = torch.zeros(rows, columns, dtype=torch.bool) if decide else pruned

    def cost(row, column):
        return float(weight[row, column] ** 2 / inverses[column][0, 0])

    for i in range(columns):
        if decide and keep_n is not None and i % m == 0:
            for row in range(rows):
                for column in sorted(range(i, i + m), key=lambda c, r=row: (cost(r, c), c))[: m - keep_n]:
                    pruned[row, column] = True
        if decide and sparsity is not None and i % block_size == 0:
            end = min(i + block_size, columns)
            places = [(r, c) for r in range(rows) for c in range(i, end)]
            places.sort(key=lambda place: (cost(*place), place[1], place[0]))
            count = int(sparsity * rows * end + 1e-6) - done
            done += count
            for row, column in places[:count]:
                pruned[row, column] = True
        error = torch.where(pruned[:, i], weight[:, i], 0) / inverses[i][0, 0]
        loss += error * weight[:, i] / 2
        weight[:, i:] -= error[:, None] * inverses[i][0]
        weight[pruned[:, i], i] = 0
    return weight, pruned, loss


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"keep_n": 2, "m": 4}, {"keep_n": 2, "m": 8}])
@pytest.mark.parametrize(
    ("spread", "tokens", "damping"), [(0.5, 192, 0.01), (2.0, 192, 0.01), (1.0, 20, 1e-4)], ids=["well", "ill", "rank"]
)
@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_sweep_is_the_definition(goal, spread, tokens, damping, block_size):
    """Both the choice from updated weights and the update; "rank" has fewer tokens than columns."""
    weight, h = torch.randn(6, 48, dtype=torch.float64), hessian(48, tokens=tokens, spread=spread)
    result = sparsegpt_prune(weight, h, damping=damping, block_size=block_size, **goal)
    assert result.damping == damping
    full = damped(h, damping)
    expected, pruned, loss = slow_sweep(weight, full, block_size=block_size, **goal)
    kept = unpack_mask(result.mask, 48)
    assert torch.equal(kept, ~pruned)
    # Either side inverts the Hessian to within its condition number times a rounding.
    bound = 16 * float(torch.linalg.cond(full)) * torch.finfo(torch.float64).eps
    assert (result.weight - expected).abs().max() <= bound * expected.abs().max()
    assert (result.loss - loss).abs().max() <= bound * loss.max()
    assert bool((result.weight[~kept].view(torch.int64) == 0).all()), "pruned weights are +0.0 to the bit"


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_fp32_error_is_that_of_plain_fp32(spread):
    """One given mask for all: only the arithmetic differs."""
    weight, h = torch.randn(32, 64), hessian(64, spread=spread, dtype=torch.float32)
    result = sparsegpt_prune(weight, h, sparsity=0.5)
    assert result.weight.dtype == result.loss.dtype == torch.float32
    pruned = ~unpack_mask(result.mask, 64)
    exact, _, exact_loss = slow_sweep(weight.double(), damped(h.double()), pruned)
    plain, _, plain_loss = slow_sweep(weight, damped(h), pruned)
    eps = torch.finfo(torch.float32).eps
    for ours, theirs, truth in ((result.weight, plain, exact), (result.loss, plain_loss, exact_loss)):
        error = (ours - truth).norm()
        assert error <= 2 * (theirs - truth).norm() + eps * truth.norm()


def test_low_precision_weights_are_swept_in_fp32():
    weight, h = torch.randn(8, 32), hessian(32, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        low = sparsegpt_prune(weight.to(dtype), h, sparsity=0.5)
        high = sparsegpt_prune(weight.to(dtype).float(), h, sparsity=0.5)
        assert low.weight.dtype == torch.float32
        assert torch.equal(low.weight, high.weight) and torch.equal(low.mask, high.mask)
        norms = 100 + torch.arange(32) / 64  # bf16 would round all of them to 100
        flat = torch.ones(3, 32, dtype=dtype)
        assert unpack_mask(wanda_mask(flat, norms, sparsity=0.5), 32).int().tolist() == [[0] * 16 + [1] * 16] * 3


def test_compensation_beats_masking():
    weight, h = torch.randn(16, 64, dtype=torch.float64), hessian(64, spread=1.5)
    result = sparsegpt_prune(weight, h, sparsity=0.6)

    def error(w):
        d = w - weight
        return float((d @ h * d).sum())

    magnitude = weight * (weight.abs() >= weight.abs().flatten().kthvalue(int(0.6 * weight.numel())).values)
    assert error(result.weight) < error(weight * unpack_mask(result.mask, 64))
    assert error(result.weight) < 0.8 * error(magnitude)


@pytest.mark.parametrize("goal", [{"sparsity": 0.6}, {"keep_n": 2, "m": 4}])
def test_values_under_the_mask_are_compensated(goal):
    """The mask that a sweep chose, given to another that may choose nothing, leads to the same weights."""
    weight, h = torch.randn(8, 32), hessian(32, dtype=torch.float32)
    chosen = sparsegpt_prune(weight, h, block_size=8, **goal)
    nothing = {"sparsity": 0.0} if "sparsity" in goal else {"keep_n": 4, "m": 4}
    given_mask = sparsegpt_prune(weight, h, block_size=8, mask=chosen.mask, **nothing)
    assert torch.equal(given_mask.mask, chosen.mask)
    assert torch.equal(given_mask.weight, chosen.weight) and torch.equal(given_mask.loss, chosen.loss)
    swept_again = sparsegpt_prune(chosen.weight, torch.eye(32), mask=chosen.mask, **nothing)
    assert torch.equal(swept_again.weight, chosen.weight) and not bool(swept_again.loss.any()), "zeros cost nothing"


def test_arguments_are_left_alone():
    weight, h, norms = torch.randn(32, 8).T, hessian(64, dtype=torch.float32)[::2, ::2], torch.rand(64)[::2]
    mask = pack_mask(torch.rand(8, 32) < 0.9)
    before = [t.clone() for t in (weight, h, norms, mask)]
    for goal in ({"sparsity": 0.5}, {"keep_n": 2, "m": 4}):
        strided = sparsegpt_prune(weight, h, mask=mask, **goal)
        dense = sparsegpt_prune(before[0].contiguous(), before[1].contiguous(), mask=mask, **goal)
        assert torch.equal(strided.weight, dense.weight) and torch.equal(strided.mask, dense.mask)
        assert strided.weight.is_contiguous()
        assert torch.equal(wanda_mask(weight, norms, **goal), wanda_mask(before[0].contiguous(), before[2], **goal))
    assert all(map(torch.equal, (weight, h, norms, mask), before))
    result = sparsegpt_prune(weight.clone().requires_grad_(), h.clone().requires_grad_(), sparsity=0.5)
    assert not result.weight.requires_grad and not result.loss.requires_grad, "no graph is built"


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_weights(shape):
    rows, columns = shape
    weight, h = torch.randn(shape), torch.eye(columns)
    for goal in ({"sparsity": 0.5}, {"keep_n": 2, "m": 4}):
        result = sparsegpt_prune(weight, h, **goal)
        assert result.weight.shape == shape and result.loss.shape == (rows,)
        assert result.mask.shape == wanda_mask(weight, torch.ones(columns), **goal).shape == (rows, columns // 8)


def test_dead_columns_are_zeroed_without_error():
    weight, h = torch.randn(8, 32, dtype=torch.float64), hessian(32)
    h[5, :] = h[:, 5] = 0
    result = sparsegpt_prune(weight, h, sparsity=0.25)
    assert bool((result.weight[:, 5] == 0).all())
    assert not bool(unpack_mask(result.mask, 32)[:, 5].any()), "a dead column is the cheapest to prune"
    without = weight.clone()
    without[:, 5] = 0
    again = sparsegpt_prune(without, h, sparsity=0.25)
    assert torch.equal(again.weight, result.weight) and torch.equal(again.loss, result.loss)
    expected, _, _ = slow_sweep(without, damped(h), ~unpack_mask(result.mask, 32))
    bound = 16 * float(torch.linalg.cond(damped(h))) * torch.finfo(torch.float64).eps
    assert (result.weight - expected).abs().max() <= bound * expected.abs().max()
    kept = sparsegpt_prune(weight, h, sparsity=0.0)
    assert bool((kept.weight[:, 5] == 0).all()) and torch.equal(kept.weight, without)


@pytest.mark.parametrize("dead", [[], [0, 7, 39]])
def test_inverse_factor(dead):
    h = hessian(40)
    h[dead] = h[:, dead] = 0
    before = h.clone()
    factor, used = inverse_factor(h, 0.01)
    assert used == 0.01 and torch.equal(factor, factor.triu()) and torch.equal(h, before)
    full = damped(h)
    # With U^T U = (H + E)^-1, the residual of U H U^T is E seen through U: a condition number times a rounding.
    identity = factor @ full @ factor.T
    bound = 40 * float(torch.linalg.cond(full)) * torch.finfo(torch.float64).eps
    assert (identity - torch.eye(40)).abs().max() <= bound


def test_a_factor_serves_several_weights():
    h = hessian(32, dtype=torch.float32)
    factor = inverse_factor(h, 0.05)
    for weight, goal in ((torch.randn(5, 32), {"sparsity": 0.5}), (torch.randn(3, 32), {"keep_n": 2, "m": 4})):
        alone = sparsegpt_prune(weight, h, damping=0.05, **goal)
        shared = sparsegpt_prune(weight, h, factor=factor, **goal)
        assert torch.equal(alone.weight, shared.weight) and torch.equal(alone.mask, shared.mask)
        assert shared.damping == 0.05
    for bad in (factor[0][:31, :31], factor[0].double(), factor[0].to("meta")):
        with pytest.raises(ValueError, match=r"factor: expected torch.float32 \(32, 32\) on cpu, got"):
            sparsegpt_prune(torch.randn(5, 32), h, sparsity=0.5, factor=(bad, 0.05))


@pytest.mark.parametrize("columns", [1, 7, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hessian_is_summed_above_the_diagonal(columns, dtype, device, monkeypatch):
    monkeypatch.setattr(hessian_module, "PANEL", 32)
    monkeypatch.setattr(hessian_module, "TENSOR_CORE_PANEL", 32)
    batches = [torch.randn(tokens, columns, device=device).to(dtype) for tokens in (50, 1, 9)]
    total = torch.zeros(columns, columns, device=device)
    for x in batches:
        accumulate_hessian(total, x)
    assert columns <= 32 or not bool(total[32:, :32].any()), "nothing is done twice"
    assert complete_hessian(total) is total and torch.equal(total, total.T)
    rows = torch.cat(batches).float()
    exact, plain = rows.double().T @ rows.double(), rows.T @ rows
    scale = exact.norm() * torch.finfo(torch.float32).eps
    # A tensor core's sums are cut where others are rounded.
    assert (total - exact).norm() <= 2 * (plain - exact).norm() + (
        2 if total.is_cuda and dtype != rows.dtype else 1
    ) * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hessian_from_tensor_cores(dtype, monkeypatch):
    """Panels of 16-bit inputs, never widened, in full precision whatever torch is set to; a fake stands in for the
    product."""
    settings, calls = torch.backends.cuda.matmul, []

    def product(a, b):
        assert not any(getattr(settings, name) for name in hessian_module.REDUCED)
        calls.append((a.dtype, tuple(a.shape), tuple(b.shape)))
        return a.float() @ b.float()

    monkeypatch.setattr(hessian_module, "_on_tensor_cores", lambda hessian, x: True)
    monkeypatch.setattr(hessian_module, "_product", product)
    monkeypatch.setattr(hessian_module, "TENSOR_CORE_PANEL", 32)
    before = {name: getattr(settings, name) for name in hessian_module.REDUCED}
    total = torch.zeros(80, 80)
    batches = [torch.randn(tokens, 80).to(dtype) for tokens in (50, 1)]
    for x in batches:
        accumulate_hessian(total, x)
    assert {name: getattr(settings, name) for name in hessian_module.REDUCED} == before
    assert calls[:3] == [(dtype, (32, 50), (50, 80)), (dtype, (32, 50), (50, 48)), (dtype, (16, 50), (50, 16))]
    assert not total[64:, :64].any() and not total[32:, :32].any()
    exact = torch.cat(batches).double().T @ torch.cat(batches).double()
    assert torch.allclose(complete_hessian(total).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_what_tensor_cores_take(device):
    def takes(hessian, x):
        with FakeTensorMode():
            total, batch = (torch.empty(4, 4, dtype=dtype, device=device) for dtype in (hessian, x))
            return hessian_module._on_tensor_cores(total, batch)

    on = device == "cuda"
    assert takes(torch.float32, torch.bfloat16) == takes(torch.float32, torch.float16) == on
    assert not takes(torch.float32, torch.float32) and not takes(torch.float64, torch.bfloat16)


def test_damping_escalates_and_is_recorded():
    h = hessian(24)
    h -= 1.05 * torch.linalg.eigvalsh(h)[0] * torch.eye(24) + 0.05 * h.diagonal().mean() * torch.eye(24)
    before = h.clone()
    result = sparsegpt_prune(torch.randn(4, 24, dtype=torch.float64), h, sparsity=0.5, damping=0.001)
    factor, used = inverse_factor(h, 0.001)
    assert result.damping == used == pytest.approx(0.1) and torch.isfinite(result.weight).all()
    assert torch.equal(h, before)
    assert torch.linalg.eigvalsh(damped(h, 0.01))[0] < 0 < torch.linalg.eigvalsh(damped(h, used))[0]
    # Each attempt starts afresh: only the recorded damping is in the factor.
    assert torch.equal(factor, inverse_factor(h, used)[0])


@pytest.mark.parametrize("damping", [1e-6, 1e-5, 0.001, 0.01, 0.1, 1.0])
def test_damping_of_one_is_reached_by_tens(damping):
    assert inverse_factor(torch.diag(torch.tensor([1.0] * 7 + [-0.7])), damping)[1] == pytest.approx(1.0)


def test_hopeless_hessian_is_refused():
    with pytest.raises(SingularHessianError, match="^hessian: singular even with damping 1 of its mean diagonal"):
        sparsegpt_prune(torch.randn(4, 8), -torch.eye(8), sparsity=0.5)
    with pytest.raises(SingularHessianError, match="damping 0.5 "):
        sparsegpt_prune(torch.randn(4, 8), -torch.eye(8), sparsity=0.5, damping=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": None}, "sparsity: give"),
        ({"keep_n": 2, "m": 4}, "sparsity: give"),
        ({"m": 4}, "sparsity: give"),
        ({"sparsity": 1.0}, "sparsity: expected"),
        ({"sparsity": -0.1}, "sparsity: expected"),
        ({"sparsity": float("nan")}, "sparsity: expected"),
        ({"sparsity": None, "keep_n": 5, "m": 4}, "keep_n: expected"),
        ({"sparsity": None, "keep_n": 2, "m": 5}, "m: expected a divisor"),
        ({"mask": torch.zeros(4, 8, dtype=torch.uint8)}, "mask: expected packed"),
        ({"mask": torch.zeros(4, 1, dtype=torch.uint8, device="meta")}, "mask: expected on cpu"),
        ({"weight": torch.full((4, 8), float("nan"))}, "weight: expected finite"),
        ({"weight": torch.ones(8)}, "weight: expected floating point"),
        ({"hessian": torch.full((8, 8), float("inf"))}, "hessian: expected finite"),
        ({"hessian": torch.full((8, 8), float("nan"))}, "hessian: expected finite"),
        ({"hessian": torch.eye(8, dtype=torch.float64) * 1e300}, "hessian: expected finite values in torch.float32"),
        ({"hessian": torch.eye(7)}, "hessian: expected"),
        ({"hessian": torch.eye(8, device="meta")}, "hessian: expected on cpu"),
        ({"damping": 0.0}, "damping: expected"),
        ({"damping": 1.5}, "damping: expected 0 < damping <= 1, got 1.5"),
        ({"damping": float("nan")}, "damping: expected"),
        ({"block_size": 0}, "block_size: expected a positive number"),
        ({"sparsity": None, "keep_n": 2, "m": 4, "block_size": 6}, "block_size: expected a positive multiple of m=4"),
    ],
)
def test_sweep_errors_name_the_argument(change, message):
    arguments = {"weight": torch.randn(4, 8), "hessian": torch.eye(8), "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=message) as raised:
        sparsegpt_prune(**arguments)
    assert not isinstance(raised.value, SingularHessianError)


def test_inverse_factor_errors():
    for bad, message in ((torch.full((8, 8), float("nan")), "finite values"), (torch.ones(8, 7), r"\(in, in\)")):
        with pytest.raises(ValueError, match=f"hessian: expected .*{message}"):
            inverse_factor(bad, 0.01)
