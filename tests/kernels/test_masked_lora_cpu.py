"""The CPU backend of masked_lora on every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import masked_lora_linear, native, pack_mask
from losa_kernels.masked_lora import cpu, cpu_sparse
from losa_kernels.tensors import as_bits
from tests.helpers.masked_lora_problems import LOW, SHAPES, assert_error_model, double, formula, merge, problem, run

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason="the native CPU library is not built")


@pytest.fixture(autouse=True)
def every_isa(isa):
    """Every test here runs with the code of each instruction set."""


compose, project = torch.ops.losa.compose_masked_lora.default, torch.ops.losa.project_masked_lora.default
# Rows and columns around the registers, tiles and chunks (512) of every instruction set.
PANELS = [(1, 1, 1), (3, 7, 2), (5, 31, 128), (9, 300, 128), (8, 64, 8), (9, 33, 4), (70, 513, 7), (150, 1100, 16)]


def panel(rows, columns, rank, dtype=torch.float32):
    """weight, its mask as bools, and fp32 factors, with NaN, inf and -0.0 where pruned and -0.0 where kept."""
    g = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=g)
    kept = torch.rand(rows, columns, generator=g) > 0.5
    weight[~kept] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])[torch.arange(int((~kept).sum())) % 4]
    weight[kept & (torch.rand(rows, columns, generator=g) < 0.1)] = -0.0
    return weight.to(dtype), kept, torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)


def multiply(x, weight, mask, A, B, bias, transposed, out):
    """The sparse product of one group."""
    layer = [len(x)], [weight], [mask], [A], [B]
    if transposed:
        torch.ops.losa.differentiate_masked_lora.default(x, None, *layer, out, [], [])
    else:
        torch.ops.losa.multiply_masked_lora.default(x, *layer, [] if bias is None else [bias], out)


def sample(dy, x, mask, A, B, dA, dB):
    """The projected gradient of one group, whose weight nobody reads."""
    unread = torch.empty(len(B), A.shape[1], dtype=torch.bfloat16)
    gradients = [[] if gradient is None else [gradient] for gradient in (dA, dB)]
    layer = [len(dy)], [unread], [mask], [A], [B]
    torch.ops.losa.differentiate_masked_lora.default(dy, x, *layer, None, *gradients)


def allowed(exact, magnitude, terms, dtype=torch.float32):
    """fp32 sums of ``terms`` products of this total magnitude, then one rounding to ``dtype``."""
    return terms * torch.finfo(torch.float32).eps * magnitude + exact.abs() * torch.finfo(dtype).eps / 2 + 1e-30


@pytest.mark.parametrize("shape", PANELS)
@pytest.mark.parametrize("weight_dtype", LOW)
@pytest.mark.parametrize("out_dtype", LOW)
def test_compose(shape, weight_dtype, out_dtype):
    weight, kept, A, B = panel(*shape, weight_dtype)
    out = torch.full(shape[:2], float("nan"), dtype=out_dtype)
    clean = weight.double().where(kept, 0)
    for base, factors in ((True, (A, B)), (False, (A, B)), (True, (None, None))):
        compose(weight, pack_mask(kept), base, *factors, out)
        assert bool((as_bits(out)[~kept] == 0).all()), "+0.0 to the bit where pruned"
        exact, magnitude = (clean, clean.abs()) if base else (torch.zeros_like(clean), torch.zeros_like(clean))
        if factors[0] is not None:
            exact = exact + B.double() @ A.double()
            magnitude = magnitude + B.double().abs() @ A.double().abs()
        exact = exact.where(kept, 0)
        tiny = torch.finfo(out_dtype).smallest_normal * torch.finfo(out_dtype).eps
        error = (out.double() - exact).abs()
        assert bool((error <= allowed(exact, magnitude, shape[2] + 1, out_dtype) + tiny).all()), (base, factors)
        if factors[0] is None and out_dtype == weight_dtype:
            assert torch.equal(as_bits(out)[kept], as_bits(weight)[kept]), "M * W is exact, -0.0 too"


@pytest.mark.parametrize("dtype", LOW)
def test_compose_keeps_what_is_not_zero_without_a_mask(dtype):
    weight = panel(6, 70, 3)[0].nan_to_num(1.0, 2.0).to(dtype)
    A, B = torch.randn(3, 70), torch.randn(6, 3)
    derived, explicit = torch.empty_like(weight), torch.empty_like(weight)
    for base in (True, False):
        compose(weight, None, base, A, B, derived)
        compose(weight, pack_mask(weight != 0), base, A, B, explicit)
        assert torch.equal(as_bits(derived), as_bits(explicit))


@pytest.mark.parametrize("shape", PANELS)
@pytest.mark.parametrize("dtype", LOW)
def test_project(shape, dtype):
    rows, columns, rank = shape
    weight, kept, A, B = panel(*shape)
    G = torch.randn(rows, columns).to(dtype)
    start = torch.randn(rows, rank)
    dA, dB = torch.zeros(rank, columns), start.clone()
    project(G.masked_fill(~kept, float("nan")), weight, pack_mask(kept), A, B, dA, dB)
    masked = G.double().where(kept, 0)
    for ours, left, right, more in ((dA, B.T, masked, 0), (dB, masked, A.T, start)):
        exact = left.double() @ right.double() + more
        magnitude = left.double().abs() @ right.double().abs() + abs(more)
        assert bool(((ours.double() - exact).abs() <= allowed(exact, magnitude, left.shape[1] + 1)).all())
    for wanted in ((True, False), (False, True)):
        one = [torch.zeros_like(t) if w else None for t, w in zip((dA, dB), wanted, strict=True)]
        project(G, weight, pack_mask(kept), A, B, *one)
        again = [torch.zeros_like(dA), torch.zeros_like(dB)]
        project(G, weight, pack_mask(kept), A, B, *again)
        assert all(o is None or torch.equal(o, a) for o, a in zip(one, again, strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 33, 128, 200])
@pytest.mark.parametrize("shape", PANELS)
def test_sample(shape, tokens):
    rows, columns, rank = shape
    _, kept, A, B = panel(*shape)
    dy, x = torch.randn(tokens, rows), torch.randn(tokens, columns)
    dA, dB = torch.randn(rank, columns), torch.randn(rows, rank)
    truth = [dA.double(), dB.double()]
    sample(dy, x, pack_mask(kept), A, B, dA, dB)
    wide = [t.double() for t in (dy, x, A, B)]
    G, large = ((a.T @ b).where(kept, 0) for a, b in (wide[:2], [t.abs() for t in wide[:2]]))
    for ours, start, value, total, terms in (
        (dA, truth[0], wide[3].T @ G, wide[3].abs().T @ large, rows),
        (dB, truth[1], G @ wide[2].T, large @ wide[2].abs().T, columns),
    ):
        error = (ours.double() - start - value).abs()
        assert bool((error <= allowed(start + value, start.abs() + total, terms + tokens)).all())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 33, 128, 200])
@pytest.mark.parametrize("shape", PANELS)
def test_multiply(shape, tokens, transposed):
    weight, kept, A, B = panel(*shape)
    x = torch.randn(tokens, shape[0] if transposed else shape[1])
    bias = None if transposed else torch.randn(shape[0])
    out = torch.full((tokens, shape[1] if transposed else shape[0]), float("nan"))
    multiply(x, weight, pack_mask(kept), A, B, bias, transposed, out)
    clean = weight.double().where(kept, 0)
    effective = clean + (B.double() @ A.double()).where(kept, 0)
    magnitude = clean.abs() + (B.double().abs() @ A.double().abs()).where(kept, 0)
    if not transposed:
        effective, magnitude = effective.T, magnitude.T
    start = 0 if bias is None else bias.double()
    exact, total = x.double() @ effective + start, x.double().abs() @ magnitude + abs(start)
    assert bool(((out.double() - exact).abs() <= allowed(exact, total, x.shape[1] + shape[2] + 1)).all())


@pytest.mark.parametrize("columns", [1, 9, 33, 90, 130])
def test_bits_beyond_the_last_column_are_ignored(columns):
    """The last bytes of the rows are the last of the mask's memory, too."""
    weight, kept, A, B = panel(37, columns, 3)
    dy, x, G = torch.randn(70, 37), torch.randn(70, columns), torch.randn(37, columns)
    clean = pack_mask(kept)
    dirty = clean.clone()
    dirty[:, -1] |= 0xFF << columns % 8 & 0xFF
    results = []
    for mask in (clean, dirty):
        out, y, dx = torch.empty(37, columns), torch.empty(70, 37), torch.empty(70, columns)
        factors = [torch.zeros(3, columns), torch.zeros(37, 3), torch.zeros(3, columns), torch.zeros(37, 3)]
        compose(weight, mask, True, A, B, out)
        project(G, weight, mask, A, B, *factors[:2])
        sample(dy, x, mask, A, B, *factors[2:])
        multiply(x, weight, mask, A, B, None, False, y)
        multiply(dy, weight, mask, A, B, None, True, dx)
        results.append([out, y, dx, *factors, torch.tensor(cpu_sparse.pays(torch.float32, 70, columns, [mask], 64))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kept_share", [1.0, -1.0])
def test_what_is_not_finite_reaches_what_it_is_kept_for(kept_share, monkeypatch):
    """By sparse products and by dense ones."""
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", kept_share)
    args = problem(30, 40, 3, tokens=70, dtype=torch.float32)
    kept = torch.ones(30, 40, dtype=torch.bool)
    kept[:, ::2] = False
    weight = args["weight"].masked_fill(~kept, float("nan"))
    weight[4, 7] = float("inf")
    results = run(masked_lora_linear, args | {"mask": pack_mask(kept), "weight": weight}, torch.randn(70, 30))
    bad = {name: ~value.isfinite() for name, value in results.items()}
    assert bool(bad["y"][:, 4].all()) and int(bad["y"].sum()) == 70
    assert bool(bad["x"][:, 7].all()) and int(bad["x"].sum()) == 70
    assert not any(bool(bad[name].any()) for name in ("lora_A", "lora_B", "bias"))
    x = args["x"].clone()
    x[5, 7] = float("nan")
    results = run(masked_lora_linear, args | {"mask": pack_mask(kept), "x": x}, torch.randn(70, 30))
    assert bool(results["y"][5].isnan().all()) and int(results["y"].isnan().sum()) == 30
    assert bool(results["lora_A"][:, 7].isnan().all()) and int(results["lora_A"].isnan().sum()) == 3
    assert bool(results["lora_B"].isnan().all()) and not bool(results["x"].isnan().any())


def test_sparse_products_read_strided_tokens_and_ignore_what_is_pruned():
    weight, kept, A, B = panel(70, 90, 4)
    dy, x = torch.randn(40, 140)[:, :70], torch.randn(40, 90)
    kept[:, 5] = False
    dead = x.clone()
    dead[:, 5] = float("nan")
    packed, results = pack_mask(kept), []
    for left, right in ((dy, dead), (dy.contiguous(), x)):
        dA, dB, y = torch.zeros(4, 90), torch.zeros(70, 4), torch.zeros(40, 70)
        sample(left, right, packed, A, B, dA, dB)
        multiply(right, weight, packed, A, B, None, False, y)
        results.append((dA, dB, y))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    only = torch.zeros(4, 90)
    sample(dy, x, packed, A, B, only, None)
    assert torch.equal(only, results[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("change", [{}, {"dropout_p": 0.3}, {"bias": None}])
def test_sparse_products_give_what_dense_ones_give(dtype, change, monkeypatch):
    """Several parts of the tokens, too."""
    monkeypatch.setattr(cpu, "product_dtype", lambda _: torch.float32)
    args = problem(150, 205, 5, tokens=300, dtype=dtype) | change
    grad_y = torch.randn(300, 150).to(dtype)
    results = {}
    for name, limit in (("sparse", 1.0), ("dense", -1.0)):
        monkeypatch.setattr(cpu_sparse, "MOST_KEPT", limit)
        torch.manual_seed(0)
        results[name] = run(masked_lora_linear, args, grad_y)
    assert not torch.equal(results["sparse"]["lora_A"], results["dense"]["lora_A"]), "one path ran twice"
    for name, whole in results["dense"].items():
        error = (results["sparse"][name] - whole).abs().max()
        assert error <= 64 * torch.finfo(torch.float32).eps * whole.abs().max(), name


@pytest.mark.parametrize("shape", [(130, 129, 128), (200, 4096, 8), (3000, 100, 8)])
def test_sparse_products_error_model(shape, monkeypatch):
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", 1.0)
    args = problem(*shape, tokens=70, dtype=torch.float32)
    grad_y = torch.randn(70, shape[0])
    truth = run(formula, double(args), grad_y.double())
    ours = run(masked_lora_linear, args, grad_y)
    assert_error_model(ours, run(formula, args, grad_y), truth, torch.float32)


def test_when_sparse_products_pay():
    kept = torch.zeros(8, 10, dtype=torch.bool)
    kept[:, :6] = True
    assert cpu_sparse.pays(torch.float32, 64, 10, [pack_mask(kept)], 64), "60 %"
    assert not cpu_sparse.pays(torch.float32, 63, 10, [pack_mask(kept)], 64)
    assert not cpu_sparse.pays(torch.bfloat16, 64, 10, [pack_mask(kept)], 64)
    more = kept.clone()
    more[0, 9] = True
    assert not cpu_sparse.pays(torch.float32, 64, 10, [pack_mask(more)], 64)
    kept[0, 5] = False
    assert cpu_sparse.pays(torch.float32, 64, 10, [pack_mask(more), pack_mask(kept)], 64), "60 % of both"


def test_panels_inside_larger_matrices():
    """Columns [16, 120) of everything, as the backward pass takes them."""
    weight, kept, A, B = panel(20, 200, 5)
    packed, part = pack_mask(kept), slice(16, 120)
    G = torch.randn(20, 200)
    out, dA, dB = torch.zeros(20, 200), torch.zeros(5, 200), torch.zeros(20, 5)
    compose(weight[:, part], packed[:, 2:15], True, A[:, part], B, out[:, part])
    project(G[:, part], weight[:, part], packed[:, 2:15], A[:, part], B, dA[:, part], dB)
    own = [t[:, part].contiguous() for t in (weight, kept, A, G)]
    alone, dA_alone, dB_alone = torch.zeros(20, 104), torch.zeros(5, 104), torch.zeros(20, 5)
    compose(own[0], pack_mask(own[1]), True, own[2], B, alone)
    project(own[3], own[0], pack_mask(own[1]), own[2], B, dA_alone, dB_alone)
    assert torch.equal(out[:, part], alone) and torch.equal(dA[:, part], dA_alone) and torch.equal(dB, dB_alone)
    for matrix in (out, dA):
        assert not matrix[:, :16].any() and not matrix[:, 120:].any(), "nothing outside the panel is touched"


def test_threads_do_not_change_a_bit():
    weight, kept, A, B = panel(700, 300, 8)
    dy, x = torch.randn(40, 700), torch.randn(40, 300)
    G, packed, results, before = torch.randn(700, 300), pack_mask(kept), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dA, dB, out = torch.zeros(8, 300), torch.zeros(700, 8), torch.zeros(700, 300)
            project(G, weight, packed, A, B, dA, dB)
            sample(dy, x, packed, A, B, dA, dB)
            compose(weight, packed, True, A, B, out)
            y = torch.zeros(40, 700)
            multiply(x, weight, packed, A, B, None, False, y)
            results.append((dA, dB, out, y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, product", [(d, p) for d in LOW for p in (d, torch.float32)][1:])
def test_products_in_their_own_or_a_wider_dtype(shape, dtype, product, monkeypatch):
    """Which of the two a CPU gets depends on its instruction set."""
    monkeypatch.setattr(cpu, "product_dtype", lambda _: product)
    args = problem(*shape, tokens=16, dtype=dtype)
    grad_y = torch.randn(16, shape[0]).to(dtype)
    truth = run(formula, double(args), grad_y.double())
    assert_error_model(run(masked_lora_linear, args, grad_y), run(formula, args, grad_y), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"bias": None}, {"dropout_p": 0.3}, {"mask": None}])
def test_panels(dtype, change, monkeypatch):
    """Panels of 64 rows or columns, the last one partial, against one panel."""
    args = problem(150, 205, 5, dtype=dtype) | change
    grad_y = torch.randn(7, 150).to(dtype)
    torch.manual_seed(0)
    whole, merged = run(masked_lora_linear, args, grad_y), merge(args)
    monkeypatch.setattr(cpu, "PANEL", 1)
    torch.manual_seed(0)
    for name, value in run(masked_lora_linear, args, grad_y).items():
        allowed = torch.finfo(dtype if name in ("y", "x") else value.dtype).eps * 8 * value.abs().max()
        assert (value - whole[name]).abs().max() <= allowed, name
    assert torch.equal(merge(args), merged)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": torch.zeros(4, 2, dtype=torch.uint8)}, "mask: expected a uint8"),
        ({"A": torch.zeros(2, 7)}, "lora_A: expected float32"),
        ({"B": torch.zeros(3, 2)}, "lora_B: expected float32"),
        ({"B": None}, "both or neither"),
        ({"A": torch.zeros(129, 8), "B": torch.zeros(4, 129)}, "lora_A: expected .* r <= 128"),
        ({"weight": torch.zeros(4, 8).double()}, "weight: expected float32, bfloat16 or float16, got Double"),
        ({"out": torch.zeros(4, 7)}, "out: expected"),
        ({"out": torch.zeros(8, 4).T}, "out: expected"),
        ({"out": torch.zeros(4, 8, dtype=torch.float64)}, "out: expected float32, bfloat16 or float16"),
    ],
)
def test_compose_errors_name_the_argument(change, message):
    args = {"weight": torch.zeros(4, 8), "mask": None, "A": torch.zeros(2, 8), "B": torch.zeros(4, 2)}
    args |= {"out": torch.zeros(4, 8)} | change
    with pytest.raises(RuntimeError, match=message):
        compose(args["weight"], args["mask"], True, args["A"], args["B"], args["out"])
