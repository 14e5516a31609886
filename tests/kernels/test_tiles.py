"""Weights in tiles: the layout, the kernels in the emulator, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from losa_kernels import native, pack_bitmask, pack_mask, pack_nm
from losa_kernels.packing import PackedBitmask
from losa_kernels.sparse_linear import tiles
from tests.helpers.captured_chain import check_captured_chain
from tests.helpers.emulation import NEEDED, load

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = {torch.float32: 0, BF16: 1, FP16: 2}
SHARED = 99 << 10  # bytes that a block may have on the smallest GPU


def problem(rows, columns, density, dtype, seed=0):
    """(weight, the same with zeros where it is pruned, kept); of several rows one is empty and one full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    kept = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        kept[rows // 2], kept[rows // 3] = False, True
    return weight, weight.masked_fill(~kept, 0), kept


def assert_close(y, x, dense, bias):
    """Sums in fp32 of exact products, one rounding at the end."""
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ dense.double().abs().T
    eps = torch.finfo(y.dtype).eps
    allowed = eps * exact.abs() + 16 * torch.finfo(torch.float32).eps * size + torch.finfo(y.dtype).smallest_normal
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.fixture
def multiply(emulate):
    def run(x, made, bias=None, bulk=True, shared=SHARED, seed=0):
        batch, columns = x.shape
        bias_kind = 0 if bias is None else KINDS[bias.dtype]
        numbers = (made.shape[0], columns, batch, KINDS[x.dtype], bias_kind, bulk, shared)
        arrays = {"data": made.data, "places": made.offsets, "x": pad(x, (0, -columns % 64)), "bias": bias}
        folder = emulate("tiles", "multiply", *numbers, seed=seed, result="y", **arrays)
        return load(folder, "y", np.int16, batch, made.shape[0]).view(x.dtype)

    return run


def emulated(test):
    for mark in NEEDED:
        test = mark(test)
    return test


@emulated
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [((1, 1), None), ((17, 300), None), ((5, 523), None), ((40, 256), None), ((18, 264), (2, 4)), ((9, 64), (5, 16))],
    ids=str,
)
def test_emulated_packing_and_unpacking(emulate, shape, pattern):
    rows, columns = shape
    weight, dense, kept = problem(rows, columns, 0.5, BF16)
    if pattern is None:
        packed, offsets = pack_bitmask(weight, pack_mask(kept)), True
    else:
        keep_n, m = pattern
        kept &= kept.view(-1, m).cumsum(1).view(kept.shape) <= keep_n
        packed, offsets, dense = pack_nm(weight, pack_mask(kept), keep_n, m), False, weight.masked_fill(~kept, 0)
    expected = tiles.pack(packed)
    for seed in range(2):
        arrays = {"values": packed.values, "mask": packed.bitmask, "offsets": packed.row_offsets if offsets else None}
        folder = emulate("tiles", "pack", rows, columns, seed=seed, result="data", **arrays)
        assert load(folder, "places", np.int64, -1).equal(expected.offsets)
        assert load(folder, "data", np.uint8, -1).equal(expected.data)
    arrays = {"data": expected.data, "places": expected.offsets}
    folder = emulate("tiles", "unpack", rows, columns, result="dense", **arrays)
    assert load(folder, "dense", np.int16, rows, columns).equal(dense.view(torch.int16))


@emulated
def test_emulated_packing_of_damaged_files_stays_inside(emulate):
    packed = PackedBitmask(
        (4, 160),
        torch.ones(100).bfloat16(),
        torch.full((4, 20), 255, dtype=torch.uint8),
        torch.tensor([-5, 90, 1 << 40, -(1 << 40)]),
    )
    arrays = {"values": packed.values, "mask": packed.bitmask, "offsets": packed.row_offsets}
    folder = emulate("tiles", "pack", 4, 160, result="data", **arrays)
    arrays = {"data": load(folder, "data", np.uint8, -1), "places": load(folder, "places", np.int64, -1)}
    folder = emulate("tiles", "unpack", 4, 160, result="dense", **arrays)
    dense = load(folder, "dense", np.int16, 4, 160).view(BF16)
    assert dense.sum(1).tolist() == [100, 10, 0, 100]


@emulated
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("rows", "columns", "density"),
    [(1, 1, 1), (17, 300, 0.5), (5, 523, 1.0), (34, 264, 0.3), (3, 2560, 0.5), (2, 8768, 0.1)],
)
def test_emulated_product_is_the_dense_one(multiply, rows, columns, density, dtype):
    """By bulk copies and by the lanes' own, of many chunks a warp and few, and where shared memory holds few."""
    weight, dense, kept = problem(rows, columns, density, dtype, seed=columns)
    made, bias = tiles.pack(pack_bitmask(weight, pack_mask(kept))), torch.randn(rows).to(dtype)
    for seed, (batch, bulk, shared) in enumerate(
        ((1, True, SHARED), (5, False, SHARED), (8, True, 10 << 10), (9, True, SHARED), (16, False, 30 << 10))
    ):
        x, added = torch.randn(batch, columns).to(dtype), bias if batch != 5 else None
        y = multiply(x, made, added, bulk=bulk, shared=shared, seed=seed)
        assert_close(y, x, dense, added)


@emulated
def test_emulated_warp_with_many_chunks(multiply):
    """One warp, with one stage: more turns than it looks up at a time."""
    weight, dense, kept = problem(1, 8768, 1.0, BF16)
    made, x = tiles.pack(pack_bitmask(weight, pack_mask(kept))), torch.randn(2, 8768).bfloat16()
    for bulk in (True, False):
        assert_close(multiply(x, made, bulk=bulk, shared=3 << 10, seed=bulk), x, dense, None)


@emulated
def test_emulated_product_of_patterns_and_other_biases(multiply):
    kept = torch.zeros(20, 128, 4, dtype=torch.bool)
    kept.scatter_(2, torch.rand(kept.shape).topk(2).indices, True)
    kept, weight = kept.view(20, 512), torch.randn(20, 512).half()
    made, dense = tiles.pack(pack_nm(weight, pack_mask(kept), 2, 4)), weight.masked_fill(~kept, 0)
    for dtype in KINDS:
        x, bias = torch.randn(2, 512).half(), torch.randn(20).to(dtype)
        assert_close(multiply(x, made, bias), x, dense, bias)


@emulated
def test_emulated_values_that_are_not_finite_stay_in_their_row(multiply):
    weight, dense, kept = problem(20, 192, 0.5, BF16)
    weight[3], dense[3], kept[3] = float("nan"), 0, True
    weight[18], dense[18], kept[18] = float("inf"), 0, True
    weight[0, kept[0]] = dense[0, kept[0]] = -0.0
    x = torch.randn(5, 192).bfloat16()
    y = multiply(x, tiles.pack(pack_bitmask(weight, pack_mask(kept))))
    assert y[:, 3].isnan().all() and not y[:, 18].isfinite().any() and y[:, 0].eq(0).all()
    y[:, [3, 18]] = 0
    assert_close(y, x, dense, None)
    x[2, 7] = float("nan")
    y = multiply(x, tiles.pack(pack_bitmask(dense, pack_mask(kept))))
    assert y[[0, 1, 3, 4]].isfinite().all()


@emulated
def test_emulated_order_of_threads_does_not_change_a_bit(multiply):
    weight, _, kept = problem(20, 2900, 0.5, BF16)
    made, x = tiles.pack(pack_bitmask(weight, pack_mask(kept))), torch.randn(9, 2900).bfloat16()
    for batch in (2, 9):
        runs = [multiply(x[:batch], made, bulk=seed != 2, seed=seed) for seed in range(4)]
        assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 300), (5, 523), (40, 256)], ids=str)
def test_the_layout_keeps_every_bit(shape, dtype):
    weight, dense, kept = problem(*shape, 0.5, dtype)
    odd = torch.tensor([0x7FC1, -0x0401, 0x7F80, -0x8000, 0x0001], dtype=torch.int16).view(dtype)
    flat = weight.view(-1)[: len(odd)]
    flat.copy_(odd[: len(flat)])
    dense = torch.where(kept, weight, torch.zeros((), dtype=dtype))
    made = tiles.pack(pack_bitmask(weight, pack_mask(kept)))
    assert torch.equal(tiles.unpack(made).view(torch.int16), dense.view(torch.int16))
    assert made.nbytes <= tiles.bytes_of(pack_bitmask(weight, pack_mask(kept))) + 8


def test_a_tile_byte_by_byte():
    """What TILES.md says, of a few entries of the first and the fifth tile."""
    kept = torch.zeros(16, 320, dtype=torch.bool)
    places = [(3, 0), (11, 38), (0, 261)]  # nibble 0 of lane 12; nibble 7 of lane 12; nibble 1 of lane 0
    for row, column in places:
        kept[row, column] = True
    values = torch.zeros(16, 320, dtype=BF16)
    for number, place in enumerate(places):
        values[place] = 1 + number
    made = tiles.pack(pack_bitmask(values, pack_mask(kept)))
    assert made.offsets.tolist() == [0, 33, 42] and made.largest == 528
    words = made.data[:128].view(torch.int32)
    assert words.nonzero().flatten().tolist() == [12] and int(words[12]) == 1 | 1 << (4 * 7 + 2)
    assert made.data[512:516].view(BF16).tolist() == [1, 2] and not made.data[516:528].any()
    second = made.data[528:]
    assert second[:128].view(torch.int32).tolist() == [1 << 5] + [0] * 31
    assert second[128:130].view(BF16).tolist() == [3] and not second[130:].any()


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tiny_on_gpu(dtype):
    for rows, columns, density in ((1, 1, 1.0), (17, 300, 0.3), (5, 523, 1.0), (40, 2568, 0.5), (9, 1088, 0.5)):
        weight, dense, kept = problem(rows, columns, density, dtype, seed=columns)
        packed = pack_bitmask(weight, pack_mask(kept))
        made, expected = tiles.make(packed.to("cuda")), tiles.pack(packed)
        assert torch.equal(made.data.cpu(), expected.data) and torch.equal(made.offsets.cpu(), expected.offsets)
        assert torch.equal(tiles.unpack_on_device(made).cpu().view(torch.int16), dense.view(torch.int16))
        for batch in (1, 3, 8, 9, 16):
            x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
            assert_close(tiles.multiply(x.cuda(), made, bias.cuda()).cpu(), x, dense, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (576, 1536), (192, 14336)], ids=str)
def test_full_size_on_gpu_repeats_to_the_bit(shape):
    for density in (0.3, 0.5, 1.0):
        weight, dense, kept = problem(*shape, density, BF16)
        made = tiles.make(pack_bitmask(weight, pack_mask(kept)).to("cuda"))
        assert torch.equal(tiles.unpack_on_device(made).cpu().view(torch.int16), dense.view(torch.int16))
        for batch in (1, 2, 8, 16):
            x = torch.randn(batch, shape[1]).bfloat16().cuda()
            y = tiles.multiply(x, made, None)
            assert torch.equal(y, tiles.multiply(x, made, None))
            exact = x.double() @ dense.cuda().double().T
            assert (y - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()


@pytest.mark.gpu
def test_in_a_graph_on_gpu():
    weight, dense, kept = problem(1024, 1024, 0.5, BF16)
    made = tiles.make(pack_bitmask(weight / 32, pack_mask(kept)).to("cuda"))
    x = torch.randn(1, 1024).bfloat16().cuda()

    check_captured_chain(lambda y: tiles.multiply(y, made, None), x)


@pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
def test_shapes_of_the_operators():
    bitmask = torch.empty(40, 38, dtype=torch.uint8, device="meta")
    assert torch.ops.losa.count_tiles.default(bitmask, 300).shape == (3 * 2,)
    data, offsets = (torch.empty(n, dtype=kind, device="meta") for n, kind in ((16, torch.uint8), (7, torch.int64)))
    y = torch.ops.losa.sparse_linear_tiles.default(
        bitmask.new_empty(2, 3, 300, dtype=BF16), data, offsets, 40, 16, None
    )
    assert y.shape == (2, 3, 40) and y.dtype == BF16
