"""The window kernel and the row kernel: in the emulator on every machine, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from losa_kernels import pack_24, pack_bitmask, pack_mask, pack_nm, sparse_linear
from losa_kernels.packing import PackedBitmask
from losa_kernels.packing.reference import unpack_24
from losa_kernels.packing.rows import take_rows
from losa_kernels.sparse_linear import cuda
from tests.helpers.captured_chain import check_captured_chain
from tests.helpers.packing_problems import nm_mask
from tests.helpers.sparse_linear_problems import assert_close, random_problem

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]


@pytest.fixture
def multiply(emulate):
    def run(x, packed, bias=None, per_byte=0, split=0, aligned=True, lead=0, lot=0, seed=0, counts=False):
        (batch, columns), rows, dtype = x.shape, packed.shape[0], packed.dtype
        tensor = x.dtype == dtype != FP32
        assert tensor or x.dtype == FP32
        kind, bias_kind = DTYPES.index(dtype), DTYPES.index(FP32 if bias is None else bias.dtype)
        values = torch.cat([torch.ones(lead).to(dtype), packed.values.flatten()])
        arrays = {"values": values, "mask": packed.bitmask, "x": pad(x, (0, -columns % 8)), "bias": bias}
        arrays["offsets"] = getattr(packed, "row_offsets", None)
        numbers = (rows, columns, batch, tensor, kind, bias_kind, per_byte, split, aligned, lead, lot)
        command = "devices" if counts else "multiply"
        folder = emulate("sparse_linear", command, *numbers, seed=seed, result="y", **arrays)
        y = torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=x.dtype).reshape(batch, rows)
        return (y, np.fromfile(folder / "attributes", np.int32).tolist()) if counts else y

    return run


@pytest.mark.subprocess
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "density"),
    [(1, 1, 1), (1, 8, 0.5), (3, 13, 0.5), (17, 300, 0.0), (5, 523, 1.0), (9, 2568, 0.5), (34, 264, 0.3)],
)
def test_emulated_row_kernel_is_the_dense_product(multiply, rows, columns, density, dtype):
    """Rows and windows that end anywhere, an empty row, and a full one."""
    weight, dense, kept = random_problem(rows, columns, density, dtype, seed=columns)
    packed, bias = pack_bitmask(weight, pack_mask(kept)), torch.randn(rows).to(dtype)
    for seed, batch in enumerate((1, 3, 16)):
        for x_dtype in {dtype, FP32}:
            x = torch.randn(batch, columns).to(x_dtype)
            y = multiply(x, packed, bias if batch != 3 else None, split=1, seed=seed)
            assert_close(y, x, dense, bias if batch != 3 else None)


@pytest.mark.subprocess
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_emulated_batches_and_shares_of_columns(multiply, dtype):
    weight, dense, kept = random_problem(7, 1400, 0.5, dtype)
    packed = pack_bitmask(weight, pack_mask(kept))
    for batch, split in ((1, 2), (2, 4), (4, 8), (5, 0), (8, 2), (9, 8), (12, 1)):
        x = torch.randn(batch, 1400).to(dtype)
        assert_close(multiply(x, packed, split=split, seed=batch), x, dense, None)


@pytest.mark.subprocess
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (2, 8), (8, 8), (5, 16)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_emulated_patterns_of_fixed_rows(multiply, pattern, dtype):
    keep_n, m = pattern
    for columns in (16, 304, 1104):
        kept = nm_mask(11, columns, keep_n, m)
        kept[5, : m * (columns // m) // 2] = False
        weight = torch.randn(11, columns).to(dtype)
        packed, dense = pack_nm(weight, pack_mask(kept), keep_n, m), weight.masked_fill(~kept, 0)
        per_byte = keep_n * 8 // m if m <= 8 else 0
        for batch, split in ((1, 0), (1, 1), (6, 4)):
            x = torch.randn(batch, columns).to(dtype)
            assert_close(multiply(x, packed, per_byte=per_byte, split=split, seed=columns), x, dense, None)


@pytest.mark.subprocess
def test_emulated_a_neighbours_nan_stays_there(multiply):
    """Rings hold values of the next columns and rows too; tensor cores multiply more than is used."""
    for dtype in (BF16, FP32):
        weight, dense, kept = random_problem(6, 72, 0.5, dtype)
        weight[3], dense[3], kept[3] = float("nan"), 0, True
        weight[1], dense[1], kept[1] = float("inf"), 0, True
        weight[0, kept[0]] = dense[0, kept[0]] = -0.0
        x = torch.randn(5, 72).to(dtype)
        y = multiply(x, pack_bitmask(weight, pack_mask(kept)))
        assert y[:, 3].isnan().all() and not y[:, 1].isfinite().any() and y[:, 0].eq(0).all()
        y[:, [1, 3]] = 0
        assert_close(y, x, dense, None)


@pytest.mark.subprocess
def test_emulated_mixed_and_unaligned(multiply):
    for dtype in (BF16, FP16):
        weight, dense, kept = random_problem(9, 320, 0.6, dtype)
        packed = pack_bitmask(weight, pack_mask(kept))
        for x_dtype, bias_dtype in ((FP32, BF16), (FP32, FP16), (dtype, FP32)):
            x, bias = torch.randn(2, 320).to(x_dtype), torch.randn(9).to(bias_dtype)
            assert_close(multiply(x, packed, bias, aligned=False, lead=5), x, dense, bias)


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("rows", "columns", "density", "lot", "dtype"),
    [
        (1, 32, 1, 0, FP16),
        (43, 64, 0.5, 0, BF16),  # 10 or 11 rows for each of 4 blocks, in three lots
        (21, 64, 0.3, 1, FP16),
        (14, 1056, 0.5, 1, BF16),
        (38, 1056, 0.5, 3, FP16),
        (9, 2048, 1.0, 0, BF16),
        (21, 3104, 0.3, 2, BF16),
        (9, 5120, 0.5, 0, FP16),
        (5, 11264, 0.05, 0, BF16),
    ],
)
def test_emulated_up_to_four_rows(multiply, rows, columns, density, lot, dtype):
    """The kernel that keeps x in registers: several lots of rows, ragged windows, values longer than it holds ahead."""
    weight, dense, kept = random_problem(rows, columns, density, dtype, seed=columns)
    kept[rows // 2], dense[rows // 2] = False, 0
    packed, bias = pack_bitmask(weight, pack_mask(kept)), torch.randn(rows).to(dtype)
    for batch in (1, 2, 3, 4):
        x, added = torch.randn(batch, columns).to(dtype), bias if batch == 1 else None
        y = multiply(x, packed, added, lead=2 * batch - 1, lot=lot, seed=rows)
        assert_close(y, x, dense, added)


@pytest.mark.subprocess
@pytest.mark.parametrize(("batch", "windows"), [(1, 28), (2, 20), (4, 12)])
def test_emulated_widest_windows_on_two_devices(multiply, batch, windows):
    """Attributes of a kernel are set once for each device; without them its shared memory is too much."""
    for more in (0, 32):
        columns = 1024 * windows + more
        weight, dense, kept = random_problem(2, columns, 0.1, BF16)
        x = torch.randn(batch, columns).bfloat16()
        y, told = multiply(x, pack_bitmask(weight, pack_mask(kept)), counts=True)
        assert_close(y, x, dense, None)
        assert told == [2, 2, 4, 256 if more else 32 * windows]  # beyond, the kernel of 256 threads


@pytest.mark.subprocess
def test_emulated_one_row_against_values_that_are_not_finite(multiply):
    """A lane may read into the next columns, windows and rows; x multiplies only what is its own."""
    weight, dense, kept = random_problem(8, 1088, 0.5, BF16)
    weight[3], dense[3], kept[3] = float("nan"), 0, True
    weight[5], dense[5], kept[5] = float("inf"), 0, True
    x = torch.randn(1, 1088).bfloat16()
    y = multiply(x, pack_bitmask(weight, pack_mask(kept)))
    assert y[:, 3].isnan().all() and not y[:, 5].isfinite().any()
    y[:, [3, 5]] = 0
    assert_close(y, x, dense, None)


@pytest.mark.subprocess
def test_emulated_damaged_files_are_not_read_beyond(multiply):
    packed = PackedBitmask(
        (4, 160),
        torch.ones(100),
        torch.full((4, 20), 255, dtype=torch.uint8),
        torch.tensor([-5, 90, 1 << 40, -(1 << 40)]),
    )
    for split in (1, 2):
        assert multiply(torch.ones(2, 160), packed, split=split).shape == (2, 4)
    # A row that begins near the values' end leaves others as they are, in every window.
    columns, kept = 4096, torch.full((4, 512), 255, dtype=torch.uint8)
    offsets = torch.tensor([0, columns, 2 * columns, 3 * columns - 5])
    cut = PackedBitmask((4, columns), torch.ones(3 * columns).bfloat16(), kept, offsets)
    for seed in range(3):
        y = multiply(torch.ones(1, columns).bfloat16(), cut, seed=seed)
        assert y.tolist() == [[columns, columns, columns, 5]]
    # Rows that begin anywhere, in several lots.
    cut = PackedBitmask(
        (60, 1088), cut.values, torch.full((60, 136), 255, dtype=torch.uint8), torch.randint(-99, 1 << 16, (60,))
    )
    assert multiply(torch.ones(2, 1088).bfloat16(), cut).isfinite().all()
    halves = PackedBitmask(packed.shape, packed.values.bfloat16(), packed.bitmask, packed.row_offsets)
    assert multiply(torch.ones(1, 160).bfloat16(), halves)[0, 0] == 100  # and zeros where there are no values


@pytest.mark.subprocess
def test_emulated_order_of_threads_does_not_change_a_bit(multiply):
    weight, _, kept = random_problem(54, 1504, 0.5, BF16)
    packed, x = pack_bitmask(weight, pack_mask(kept)), torch.randn(4, 1504).bfloat16()
    for rows, split, seeds in ((4, 2, 2), (4, 0, 2), (1, 0, 6)):
        runs = [multiply(x[:rows], packed, split=split, seed=seed) for seed in range(seeds)]
        assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize(
    ("pattern", "columns", "expected"), [((2, 4), 16, 4), ((2, 8), 16, 2), ((8, 16), 16, 0), ((2, 4), 20, 0)]
)
def test_values_per_byte(pattern, columns, expected):
    kept = nm_mask(3, columns, *pattern)
    assert cuda.values_per_byte(pack_nm(torch.randn(3, columns), pack_mask(kept), *pattern)) == expected
    assert cuda.values_per_byte(pack_bitmask(torch.randn(3, columns), pack_mask(kept))) == 0


def test_calls_take_the_kernel_that_fits(monkeypatch):
    """What reaches the operators, from CPU tensors: the CPU has the same one for the bitmask."""
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")
    seen = []

    def nm(x, values, bitmask, per_byte, bias):
        seen.append(("nm", x.dtype, per_byte))
        return x.new_zeros(*x.shape[:-1], bitmask.shape[0])

    monkeypatch.setattr(torch.ops.losa.sparse_linear_nm, "default", nm)
    monkeypatch.setattr(cuda.reference, "sparse_linear", lambda x, *_: seen.append(("reference", x.dtype)))
    kept = nm_mask(32, 64, 2, 4)
    weight, mask = torch.randn(32, 64).bfloat16(), pack_mask(kept)
    packed = pack_nm(weight, mask, 2, 4)
    assert cuda.sparse_linear(torch.randn(2, 64).half(), packed, None).dtype == FP16
    cuda.sparse_linear(torch.randn(2, 8, 64).bfloat16(), packed, None)
    cuda.sparse_linear(torch.randn(17, 64), packed, None)
    cuda.sparse_linear(torch.randn(1, 64).bfloat16(), pack_24(weight, mask), None)
    cuda.sparse_linear(torch.randn(1, 64).double(), packed, None)
    expected = [("nm", FP32, 4), ("nm", BF16, 4), ("reference", FP32), ("reference", BF16)]
    assert seen == [*expected, ("reference", torch.float64)]


@pytest.mark.parametrize("bias", [None, torch.randn(32).bfloat16()])
def test_semi_structured_products_are_padded_and_turned(monkeypatch, bias):
    """torch's kernel is on GPUs only; its contract is a product with the weight that it reads."""
    seen = []

    def product(values, meta, columns):
        seen.append(tuple(columns.shape))
        return unpack_24(values, meta) @ columns

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda b, *rest: product(*rest) + b[:, None])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setenv("LOSA_24", "cutlass")
    kept, weight, x = nm_mask(32, 64, 2, 4), torch.randn(32, 64).bfloat16(), torch.randn(3, 7, 64).bfloat16()
    y = cuda.sparse_linear(x, pack_24(weight, pack_mask(kept)), bias)
    assert_close(y, x, weight.masked_fill(~kept, 0), bias)
    assert seen == [(64, 32)]
    monkeypatch.setenv("LOSA_24", "fast")
    with pytest.raises(ValueError, match="LOSA_24: expected unpack or cutlass, got 'fast'"):
        cuda.sparse_linear(x, pack_24(weight, pack_mask(kept)), bias)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_semi_structured_products_are_refused_where_torch_has_none(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    packed, x = pack_24(torch.randn(32, 64).bfloat16(), pack_mask(nm_mask(32, 64, 2, 4))), torch.randn(2, 64).bfloat16()
    assert cuda.sparse_linear(x, packed, None).shape == (2, 32)
    monkeypatch.setenv("LOSA_24", "cutlass")
    message = r"LOSA_24=cutlass: .* compute capability 8\.x, this one has {}\.{}; LOSA_24=unpack"
    with pytest.raises(RuntimeError, match=message.format(*capability)):
        cuda.sparse_linear(x, packed, None)


@pytest.fixture
def packed_kernels(monkeypatch):
    """The kernels that read packed rows, whatever else a measurement or the table would take."""
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")


def on_gpu(packed, x, bias=None):
    moved = sparse_linear(x.cuda(), packed.to("cuda"), None if bias is None else bias.cuda())
    return moved.cpu()


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_on_gpu(dtype, packed_kernels):
    for rows, columns, density in ((1, 1, 1), (17, 300, 0.0), (5, 523, 1.0), (9, 2568, 0.5), (9, 1056, 0.5)):
        weight, dense, kept = random_problem(rows, columns, density, dtype, seed=columns)
        packed, bias = pack_bitmask(weight, pack_mask(kept)), torch.randn(rows).to(dtype)
        for batch in (1, 3, 16):
            for x_dtype in DTYPES:
                x = torch.randn(batch, columns).to(x_dtype)
                assert_close(on_gpu(packed, x, bias), x, dense, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (2, 8), (5, 16), (3, 12)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patterns_on_gpu(pattern, dtype, packed_kernels):
    keep_n, m = pattern
    kept = nm_mask(300, 68 * m, keep_n, m)
    weight = torch.randn(kept.shape).to(dtype)
    packed, dense = pack_nm(weight, pack_mask(kept), keep_n, m), weight.masked_fill(~kept, 0)
    for batch in (1, 2, 4, 7, 16, 40):
        x = torch.randn(batch, 68 * m).to(dtype)
        assert_close(on_gpu(packed, x), x, dense, None)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (576, 1536), (192, 11008)], ids=str)
def test_full_size_on_gpu_repeats_to_the_bit(shape, packed_kernels):
    weight, dense, kept = random_problem(*shape, 0.5, BF16)
    packed = pack_bitmask(weight, pack_mask(kept)).to("cuda")
    for batch in (1, 2, 4, 8, 16):
        x = torch.randn(batch, shape[1]).bfloat16().cuda()
        y = sparse_linear(x, packed)
        assert torch.equal(y, sparse_linear(x, packed))
        exact = x.double() @ dense.cuda().double().T
        assert (y - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()


@pytest.mark.gpu
def test_views_of_joined_rows_on_gpu(packed_kernels):
    """Parts of one packed weight begin anywhere in its memory."""
    weight, dense, kept = random_problem(9, 328, 0.5, BF16)
    packed, x = pack_bitmask(weight, pack_mask(kept)).to("cuda"), torch.randn(2, 328).bfloat16()
    for start, stop in ((0, 3), (3, 5), (5, 9)):
        y = sparse_linear(x.cuda(), take_rows(packed, start, stop)).cpu()
        assert_close(y, x, dense[start:stop], None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_in_a_graph_on_gpu(rows, packed_kernels):
    weight, _, kept = random_problem(1024, 1024, 0.5, BF16)
    packed, x = pack_bitmask(weight / 32, pack_mask(kept)).to("cuda"), torch.randn(rows, 1024).bfloat16().cuda()

    check_captured_chain(lambda y: sparse_linear(y, packed), x)


@pytest.mark.gpu
def test_compiles_to_one_graph_on_gpu():
    weight, dense, kept = random_problem(24, 64, 0.5, BF16)
    packed = pack_bitmask(weight, pack_mask(kept)).to("cuda")
    run = torch.compile(lambda x: sparse_linear(x, packed), fullgraph=True, backend="aot_eager")
    for rows in (1, 40):
        x = torch.randn(rows, 64).bfloat16()
        with torch.no_grad():
            assert_close(run(x.cuda()).cpu(), x, dense, None)


@pytest.mark.gpu
def test_semi_structured_on_gpu(monkeypatch):
    major, minor = torch.cuda.get_device_capability()
    if major != cuda.MAJOR_24:
        pytest.skip(f"torch has its 2:4 product for compute capability 8.x only, this GPU has {major}.{minor}")
    monkeypatch.setenv("LOSA_24", "cutlass")
    kept, weight, bias = nm_mask(128, 256, 2, 4), torch.randn(128, 256).bfloat16(), torch.randn(128).bfloat16()
    packed, x = pack_24(weight, pack_mask(kept)), torch.randn(33, 256).bfloat16()
    for b in (None, bias):
        assert_close(on_gpu(packed, x, b), x, weight.masked_fill(~kept, 0), b)
