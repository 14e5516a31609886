"""Products with packed weights are the dense product's, to within what the dense product itself is wrong by."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_kernels import dispatch, native, pack_24, pack_bitmask, pack_mask, pack_nm, sparse_linear
from losa_kernels.sparse_linear import cpu
from tests.helpers.sparse_linear_problems import assert_close, random_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_native = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
HALF = torch.tensor([True, False, False, True] * 16).expand(32, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_is_the_dense_product(dtype, device):
    weight, mask, bias = WEIGHT.to(device, dtype), pack_mask(HALF.to(device)), torch.randn(32).to(device, dtype)
    dense = weight.masked_fill(~HALF.to(device), 0)
    formats = [pack_bitmask(weight, mask), pack_nm(weight, mask, 2, 4)]
    formats += [pack_24(weight, mask)] if weight.element_size() == 2 else []
    for packed in formats:
        for shape in ((64,), (0, 64), (1, 64), (3, 64), (2, 5, 64), (17, 64)):
            x = torch.randn(shape).to(device, dtype)
            assert_close(sparse_linear(x, packed, bias), x, dense, bias)
            assert_close(sparse_linear(x, packed), x, dense, None)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 5), st.floats(0, 1), st.integers(0, 99))
def test_any_shape_and_density(rows, columns, batch, density, seed):
    g = torch.Generator().manual_seed(seed)
    weight, kept = torch.randn(rows, columns, generator=g), torch.rand(rows, columns, generator=g) < density
    x = torch.randn(batch, columns, generator=g)
    packed = pack_bitmask(weight, pack_mask(kept))
    assert_close(sparse_linear(x, packed), x, weight.masked_fill(~kept, 0), None, few=True)


def test_pruned_places_never_reach_the_product():
    weight = WEIGHT.masked_fill(~HALF, float("nan"))
    packed = pack_bitmask(weight, pack_mask(HALF))
    x = torch.randn(3, 64)
    assert_close(sparse_linear(x, packed), x, WEIGHT.masked_fill(~HALF, 0), None)


def test_strided_input():
    packed, x = pack_bitmask(WEIGHT, pack_mask(HALF)), torch.randn(64, 6).T[::2]
    assert not x.is_contiguous()
    assert_close(sparse_linear(x, packed), x, WEIGHT.masked_fill(~HALF, 0), None)


def test_the_product_runs_in_the_inputs_dtype():
    packed = pack_bitmask(WEIGHT.bfloat16(), pack_mask(HALF))
    x, bias = torch.randn(4, 64), torch.randn(32).bfloat16()
    dense = WEIGHT.bfloat16().float().masked_fill(~HALF, 0)
    assert_close(sparse_linear(x, packed, bias), x, dense, bias.float())


@pytest.mark.parametrize("density", [0, 0.2, 0.3, 0.4, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_each_instruction_set(isa, dtype, density, poisoned_native_memory):
    """Batches for every kernel; widths around what a register, a mask word and a chunk hold; odd numbers of outputs."""
    for columns, rows in ((1, 3), (7, 1), (16, 5), (40, 7), (64, 33), (100, 6), (130, 19), (256, 4), (523, 18)):
        weight, dense, kept = random_problem(rows, columns, density, dtype, seed=columns)
        packed, bias = pack_bitmask(weight, pack_mask(kept)), torch.randn(rows).to(dtype)
        for batch in (1, 2, 3, 4, 5, 8, 9, 16):
            x = torch.randn(batch, columns).to(dtype)
            assert_close(sparse_linear(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("batch", range(1, 18))
def test_every_number_of_rows(isa, batch):
    weight, dense, kept = random_problem(13, 200, 0.5)
    x = torch.randn(batch, 200)
    assert_close(sparse_linear(x, pack_bitmask(weight, pack_mask(kept))), x, dense, None)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_long_rows_are_summed_as_precisely(isa, dtype):
    """Rows in several chunks, more of them than a tile; fixed rows give the same bits as counted ones."""
    weight, dense, kept = random_problem(19, 40000, 0.5, dtype)
    packed = pack_bitmask(weight, pack_mask(kept))
    scores = torch.rand(19, 5000, 8)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(3, 2).indices, True).flatten(1)
    bitmask, fixed = pack_bitmask(dense.to(dtype), pack_mask(kept)), pack_nm(dense.to(dtype), pack_mask(kept), 3, 8)
    for batch in (1, 2, 4, 8, 16):
        x = torch.randn(batch, 40000).to(dtype)
        assert_close(sparse_linear(x, packed), x, dense, None)
        assert torch.equal(sparse_linear(x, fixed), sparse_linear(x, bitmask))


@pytest.mark.parametrize("rows, columns", [(0, 64), (5, 0), (0, 0)])
def test_weights_of_nothing(rows, columns):
    weight, bias = torch.zeros(rows, columns), torch.randn(rows)
    formats = [pack_bitmask(weight, pack_mask(weight.bool())), pack_nm(weight, pack_mask(weight.bool()), 2, 4)]
    for packed in formats:
        for batch in (0, 1, 20):
            x = torch.randn(batch, columns)
            assert torch.equal(sparse_linear(x, packed, bias), bias.expand(batch, rows))


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (2, 8), (3, 5)])
@pytest.mark.parametrize("batch", [1, 4, 16, 40])
def test_patterns_of_fixed_rows(isa, pattern, batch):
    keep_n, m = pattern
    scores = torch.rand(11, 40, m)
    kept = torch.zeros(11, 40, m, dtype=torch.bool).scatter_(2, scores.topk(keep_n, 2).indices, True).reshape(11, -1)
    kept[5, : 3 * m] = False
    weight, x = torch.randn(kept.shape).bfloat16(), torch.randn(batch, kept.shape[1])
    packed = pack_nm(weight, pack_mask(kept), keep_n, m)
    assert_close(sparse_linear(x, packed), x, weight.masked_fill(~kept, 0), None)


@pytest.mark.parametrize("x_dtype", DTYPES[:3])
@pytest.mark.parametrize("bias_dtype", [*DTYPES[:3], None])
def test_mixed_dtypes(isa, x_dtype, bias_dtype):
    for dtype in DTYPES[:3]:
        weight, dense, kept = random_problem(21, 104, 0.5, dtype)
        packed, bias = pack_bitmask(weight, pack_mask(kept)), None
        if bias_dtype is not None:
            bias = torch.randn(21).to(bias_dtype)
        for batch in (1, 6, 16, 20):
            x = torch.randn(batch, 104).to(x_dtype)
            assert_close(sparse_linear(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_a_neighbours_nan_stays_there(isa, batch):
    """Registers hold values of the next columns and rows too; those must not meet x."""
    for dtype in DTYPES[:3]:
        weight, dense, kept = random_problem(6, 72, 0.5, dtype)
        weight[3], dense[3], kept[3] = float("nan"), 0, True
        weight[1], dense[1], kept[1] = float("inf"), 0, True
        x = torch.randn(batch, 72).to(dtype)
        y = sparse_linear(x, pack_bitmask(weight, pack_mask(kept)))
        assert y[:, 3].isnan().all() and not y[:, 1].isfinite().any()
        y[:, [1, 3]] = 0
        assert_close(y, x, dense, None)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_threads_do_not_change_a_bit(isa, batch):
    weight, _, kept = random_problem(1023, 520, 0.5, torch.bfloat16)
    kept[:200] &= torch.rand(200, 520) < 0.1  # so that equal work is not equally many rows
    packed, x = pack_bitmask(weight, pack_mask(kept)), torch.randn(batch, 520)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse_linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
@pytest.mark.parametrize("batch", [1, 4, 16, 30])
def test_strided_inputs_of_any_dimension(batch):
    weight, dense, kept = random_problem(17, 72, 0.5)
    packed = pack_bitmask(weight, pack_mask(kept))
    base = torch.randn(2 * batch, 3 * 72)
    inputs = [base[::2, ::3], base[::2, 5:77], torch.randn(72, batch).T, torch.randn(72).expand(batch, 72)]
    inputs += [torch.randn(1, batch, 72), torch.randn(72, batch, 1).permute(2, 1, 0)]
    for x in inputs:
        assert_close(sparse_linear(x, packed), x, dense, None)


@pytest.fixture
def fp32_products(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    monkeypatch.setattr(cpu, "PANEL", 64 * 72)


@needs_native
@pytest.mark.parametrize("fp32_products", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_many_rows_go_by_panels(fp32_products, dtype):
    weight, dense, kept = random_problem(150, 72, 0.5, dtype)
    x, bias = torch.randn(2, 20, 72).to(dtype), torch.randn(150).to(dtype)
    nm = pack_nm(WEIGHT.to(dtype), pack_mask(HALF), 2, 4)
    for _ in range(2):
        packed = pack_bitmask(weight, pack_mask(kept))
        first = sparse_linear(x, packed, bias)
        assert_close(sparse_linear(x[..., :64], nm), x[..., :64], WEIGHT.to(dtype).masked_fill(~HALF, 0), None)
        assert_close(first, x, dense, bias)


@needs_native
def test_the_crossover_is_a_setting(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "many_rows", lambda x, *_: seen.append(x.shape[0]))
    packed = pack_bitmask(WEIGHT, pack_mask(HALF))
    for rows in (0, 1, 16, 17):
        sparse_linear(torch.randn(rows, 64), packed)
    monkeypatch.setattr(cpu, "DECODE_ROWS", 4)
    sparse_linear(torch.randn(5, 64), packed)
    assert seen == [17, 5]


@needs_native
def test_threads_of_python_do_not_share_panels():
    problems = [random_problem(200, 64, 0.5, seed=seed) for seed in range(2)]
    packed = [pack_bitmask(weight, pack_mask(kept)) for weight, _, kept in problems]
    x, wrong = torch.randn(20, 64), []

    def work(which):
        expected = sparse_linear(x, packed[which])
        wrong.extend(1 for _ in range(50) if not torch.equal(sparse_linear(x, packed[which]), expected))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_native
def test_what_native_code_does_not_do_goes_to_the_reference(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu.reference, "sparse_linear", lambda x, packed, bias: seen.append(x.dtype) or x)
    mask, x = pack_mask(HALF), torch.randn(2, 64)
    sparse_linear(x.double(), pack_bitmask(WEIGHT, mask))
    sparse_linear(x, pack_bitmask(WEIGHT.double(), mask))
    sparse_linear(x.half(), pack_24(WEIGHT.half(), mask))
    sparse_linear(x, pack_bitmask(WEIGHT, mask), torch.randn(32, dtype=torch.float64))
    assert seen == [torch.float64, torch.float32, torch.float16, torch.float32]


@needs_native
def test_native_code_is_chosen(monkeypatch):
    assert dispatch.implementation("sparse_linear", "cpu") is cpu.sparse_linear
    packed, x = pack_bitmask(WEIGHT, pack_mask(HALF)), torch.randn(3, 64)
    native_result = sparse_linear(x, packed)
    monkeypatch.setenv("LOSA_BACKEND", "reference")
    assert torch.allclose(native_result, sparse_linear(x, packed), rtol=1e-5, atol=1e-5)


@needs_native
def test_opcheck():
    weight, _, kept = random_problem(9, 40, 0.5)
    packed = pack_bitmask(weight, pack_mask(kept))
    parts = (packed.values, packed.bitmask, packed.row_offsets)
    for x in (torch.randn(40), torch.randn(3, 40), torch.randn(2, 3, 40)):
        torch.library.opcheck(torch.ops.losa.sparse_linear.default, (x, *parts, None))
        torch.library.opcheck(torch.ops.losa.sparse_linear.default, (x, *parts, torch.randn(9)))
    torch.library.opcheck(torch.ops.losa.sparse_linear_many_rows.default, (torch.randn(20, 40), *parts, None))


@needs_native
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(17, 40)}, "x: expected at most 16 rows, got 17"),
        ({"x": torch.ones(2, 0), "bitmask": torch.zeros(9, 0, dtype=torch.uint8)}, "x: expected at least one column"),
        ({"x": torch.ones(2, 48)}, "x: 48 columns do not fit packed rows of 5 bytes"),
        ({"x": torch.ones(2, 40, dtype=torch.float64)}, "x: expected float32"),
        ({"values": torch.ones(90, dtype=torch.float64)}, "values: expected float32"),
        ({"row_offsets": torch.zeros(8, dtype=torch.int64)}, "row_offsets: expected"),
        ({"row_offsets": None, "values": torch.ones(91)}, "values: expected rows of equal length"),
        ({"bias": torch.ones(8)}, "bias: expected"),
    ],
)
def test_the_operator_checks_what_python_did_not(change, message):
    arguments = {
        "x": torch.ones(2, 40),
        "values": torch.ones(90),
        "bitmask": torch.zeros(9, 5, dtype=torch.uint8),
        "row_offsets": torch.zeros(9, dtype=torch.int64),
        "bias": None,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.losa.sparse_linear.default(*{**arguments, **change}.values())


@pytest.mark.parametrize("rows", [1, 40])
def test_compiles_to_one_graph(rows):
    torch.compiler.reset()
    weight, dense, kept = random_problem(24, 64, 0.5)
    packed = pack_bitmask(weight, pack_mask(kept))
    run = torch.compile(lambda x, bias: sparse_linear(x, packed, bias), fullgraph=True, backend="aot_eager")
    x, bias = torch.randn(rows, 64), torch.randn(24)
    with torch.no_grad():
        assert_close(run(x, bias), x, dense, bias)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: sparse_linear(torch.randn(3, 63), p), r"x: expected floating point \(..., 64\), got .* \(3, 63\)"),
        (lambda p: sparse_linear(torch.ones(3, 64, dtype=torch.int64), p), "x: expected floating point"),
        (lambda p: sparse_linear(torch.tensor(1.0), p), "x: expected floating point"),
        (lambda p: sparse_linear(torch.randn(3, 64, device="meta"), p), "x: expected on cpu as packed, got meta"),
        (lambda p: sparse_linear(torch.randn(3, 64), p.unpack()), "packed: expected a packed weight, got Tensor"),
        (lambda p: sparse_linear(torch.randn(3, 64), p, torch.randn(31)), r"bias: expected \(32,\), got \(31,\)"),
        (lambda p: sparse_linear(torch.randn(3, 64), p, torch.randn(32, device="meta")), "bias: expected on cpu"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(pack_bitmask(WEIGHT, pack_mask(HALF)))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_outputs_may_be_changed_in_place(tokens):
    """Where gradients are enabled too, though the output was made without."""
    packed, scale = pack_bitmask(WEIGHT, pack_mask(HALF)), torch.ones(32, requires_grad=True)
    with torch.no_grad():
        y = sparse_linear(torch.randn(1, tokens, 64), packed)
    before = y.clone()
    y.mul_(scale).sum().backward()
    assert torch.equal(y, before) and torch.allclose(scale.grad, before.sum((0, 1)))


@pytest.mark.parametrize("name", ["x", "bias"])
def test_no_backward_pass(name):
    packed = pack_bitmask(WEIGHT, pack_mask(HALF))
    x, bias = (torch.randn(size, requires_grad=name == n) for n, size in (("x", (2, 64)), ("bias", (32,))))
    with pytest.raises(RuntimeError, match=f"^{name}: requires a gradient, but sparse_linear is for inference only"):
        sparse_linear(x, packed, bias)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not sparse_linear(x, packed, bias).requires_grad
