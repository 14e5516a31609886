"""The sweep on CUDA: what its kernels take, its products in TF32 parts, and on a GPU the reference's results."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import native, pack_mask, sparsegpt_prune, unpack_mask
from losa_kernels.pruning import blocks, cuda, reference
from tests.helpers.column_sweep_problems import hessian, operands, tied

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def precision():
    """torch's global precision of fp32 products, restored."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("outside", ["highest", "high", "medium"])
def test_precision_is_set_and_restored(precision, outside):
    precision(outside)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    for name in ("ieee", "tf32"):
        with pytest.raises(KeyError), cuda.matmul_precision(name):
            assert (settings.fp32_precision == "tf32") == settings.allow_tf32 == (name == "tf32")
            raise KeyError
        assert settings.fp32_precision == before and torch.get_float32_matmul_precision() == outside


def test_split_products_are_nearly_exact():
    """Parts are TF32 numbers, which tensor cores multiply exactly, and lose at most 2^-22 of an entry."""

    def cut(x):
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    errors, upper, rest = torch.randn(40, 128), torch.randn(128, 70), torch.randn(40, 70)
    high, low, again = blocks.split_factor(upper, 32).view(4, 3, 32, 70).transpose(0, 1).reshape(3, 128, 70)
    assert torch.equal(high, again) and torch.equal(cut(high), high) and torch.equal(cut(low), low)
    assert bool(((high.double() + low - upper).abs() <= 2.0**-22 * upper.abs()).all())
    high = blocks.rounded_to_tf32(errors)
    parts = torch.cat([high, high, blocks.rounded_to_tf32(errors - high)], 1)
    exact, plain = errors.double() @ upper.double(), errors @ upper
    split = parts.double() @ blocks.split_factor(upper, 128).double()
    assert bool(((split - exact).abs() <= 3 * 2.0**-22 * (errors.abs().double() @ upper.abs().double())).all())
    blocks.update_rest(rest, parts, blocks.split_factor(upper, 128))
    assert (split - exact).norm() <= 2 * (plain - exact).norm()
    cuda.check_3xtf32(torch.device("cpu"))


def test_errors_are_written_in_their_parts():
    """By sweep_block itself: beside the same sweep, high parts twice and low parts."""
    o, bound = operands(rows=40), torch.tensor([0x3F800000, 0, 0], dtype=torch.int32)
    factor = torch.eye(24) + 0.1 * torch.rand(24, 24).triu(1)
    found = []
    for width in (8, 24):
        errors, weight = torch.zeros(40, width), o["weight"].clone()
        kept, loss = torch.zeros(40, 3, dtype=torch.uint8), torch.zeros(40)
        torch.ops.losa.sweep_block(weight, factor, 8, 16, 0, 0, bound, None, kept, errors, loss)
        found.append((weight, kept, loss, errors))
    (*results, errors), (*split, parts) = found
    assert all(map(torch.equal, results, split)) and bool(errors.any())
    high = blocks.rounded_to_tf32(errors)
    assert torch.equal(parts, torch.cat([high, high, blocks.rounded_to_tf32(errors - high)], 1))


@pytest.mark.parametrize("inaccurate", [False, True])
def test_trailing_products_are_chosen_by_measurement(monkeypatch, inaccurate):
    weight, factor, asked = torch.randn(8, 1024), torch.eye(1024), []
    if inaccurate:
        monkeypatch.setattr(cuda, "LEFT_OUT", -1.0)
    cuda.check_3xtf32.cache_clear()

    def fastest(op, key, candidates, device, table):
        asked.append((op, key, table))
        for name, run in candidates.items():
            if inaccurate and name == "3xtf32":
                with pytest.raises(ArithmeticError, match="TF32 parts"):
                    run()
            else:
                run()
        return "3xtf32"

    monkeypatch.setattr(cuda.measured, "fastest", fastest)
    assert cuda._trailing(weight, factor) == "3xtf32" and asked == [("trailing product", (8, 1024), "fp32")]
    assert cuda._trailing(weight[:, :512], factor[:512, :512]) == "fp32"
    for setting in ("fp32", "3xTF32"):
        monkeypatch.setenv("LOSA_TRAILING", setting)
        assert cuda._trailing(weight, factor) == setting.lower()
    assert len(asked) == 1
    cuda.check_3xtf32.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "m", "block_size", "runs"),
    [
        (torch.float32, None, 128, "blocks"),
        (torch.float32, 16, 32, "blocks"),
        (torch.float64, None, 128, "reference"),
        (torch.float32, None, 129, "reference"),
        (torch.float32, None, 4, "reference"),
        (torch.float32, 6, 48, "reference"),
    ],
)
def test_what_the_cuda_kernels_take(monkeypatch, dtype, m, block_size, runs):
    calls = []
    for module in (blocks, reference):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "column_sweep", lambda *args, n=name, **more: (calls.append((n, more)), None, None))
    weight, factor = torch.randn(4, 48, dtype=dtype), torch.eye(48, dtype=dtype)
    cuda.column_sweep(weight, factor, None if m else 0.5, m and 2, m, block_size, None)
    assert [name for name, _ in calls] == [runs]
    monkeypatch.setenv("LOSA_TRAILING", "3xTF32")
    cuda.column_sweep(weight, factor, None if m else 0.5, m and 2, m, block_size, None)
    name, options = calls[-1]
    counts = options.pop("counts", None)
    assert (name, options) == (runs, {"panel": cuda.PANEL, "split": True} if runs == "blocks" else {})
    assert counts is None or counts.tolist() == [96]
    monkeypatch.setenv("LOSA_TRAILING", "fast")
    if runs == "blocks":
        with pytest.raises(ValueError, match="LOSA_TRAILING: expected auto, fp32 or 3xtf32, got 'fast'"):
            cuda.column_sweep(weight, factor, 0.5, None, None, 128, None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "goal", [(0.5, None, None), (0.9, None, None), (None, 2, 4), (None, 3, 8), (None, 6, 16)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (100, 400), (1030, 1024)])
def test_cuda_sweep_equals_the_reference_where_nothing_rounds(goal, rows, columns):
    factor = torch.eye(columns) + torch.diag(0.5 * (torch.arange(1, columns) % 3 > 0), 1)
    weight = tied(rows, columns)
    for mask in (None, pack_mask(torch.rand(rows, columns) < 0.7)):
        expected = reference.column_sweep(weight, factor, *goal, 128, mask)
        there = None if mask is None else mask.cuda()
        found = cuda.column_sweep(weight.cuda(), factor.cuda(), *goal, 128, there)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("trailing", ["fp32", "3xtf32"])
@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"keep_n": 2, "m": 4}, {"keep_n": 6, "m": 16}])
def test_cuda_agrees_with_fp64(monkeypatch, precision, goal, trailing):
    monkeypatch.setenv("LOSA_TRAILING", trailing)
    precision("high")  # which must not reach the sweep
    weight, h = torch.randn(300, 512).cuda(), hessian(512, 1.0).cuda()
    found, truth = sparsegpt_prune(weight, h.float(), **goal), sparsegpt_prune(weight.double(), h, **goal)
    ours, exact = unpack_mask(found.mask, 512), unpack_mask(truth.mask, 512)
    assert ours.sum() == exact.sum() and (ours == exact).double().mean() >= 0.9995
    alike = (ours == exact).all(1)
    error = (found.weight.double() - truth.weight)[alike].norm() / truth.weight[alike].norm()
    assert error <= 2e-4
    again = sparsegpt_prune(weight, h.float(), **goal)
    assert torch.equal(again.weight, found.weight) and torch.equal(again.mask, found.mask)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiny_on_gpu(dtype):
    norms = torch.rand(80)
    for weight in (torch.randn(5, 80).to(dtype), tied(5, 80).to(dtype)):
        for goal in ((0.3, None, None), (None, 2, 4), (None, 3, 8), (None, 6, 16)):
            mask = pack_mask(torch.rand(5, 80) < 0.7)
            expected = reference.wanda_mask(weight, norms, *goal, mask)
            assert torch.equal(cuda.wanda_mask(weight.cuda(), norms.cuda(), *goal, mask.cuda()).cpu(), expected)
            wide, factor = weight.float(), torch.eye(80)
            expected = reference.column_sweep(wide, factor, *goal, 64 if goal[2] is None else 48, mask)
            found = cuda.column_sweep(wide.cuda(), factor.cuda(), *goal, 64 if goal[2] is None else 48, mask.cuda())
            assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])
            # A sum's order, and whether its squares are rounded first, is each implementation's own.
            assert torch.allclose(found[2].cpu(), expected[2], rtol=80 * EPS, atol=0)


@pytest.mark.gpu
def test_wanda_on_gpu_at_full_size():
    for columns, dtype in ((4096, torch.bfloat16), (4096, torch.float32), (11008, torch.float32), (30000, torch.half)):
        weight, norms = torch.randn(40, columns).to(dtype), torch.rand(columns)
        expected = reference.wanda_mask(weight, norms, 0.6, None, None, None)
        assert torch.equal(cuda.wanda_mask(weight.cuda(), norms.cuda(), 0.6, None, None, None).cpu(), expected)
