"""The mask format: native and reference agree with numpy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losa_kernels import bitmask, native, pack_mask, unpack_mask

given = pytest.importorskip("hypothesis").given
from hypothesis import settings, strategies  # noqa: E402

SHAPES = [(1, 1), (3, 7), (2, 8), (5, 9), (4, 31), (4, 32), (3, 33), (7, 64), (2, 129), (130, 1000)]
EMPTY = [(0, 0), (0, 9), (3, 0)]

needs_native = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


def numpy_pack(mask: torch.Tensor) -> torch.Tensor:
    packed = np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed.reshape(mask.shape[0], bitmask.packed_width(mask.shape[1])))


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_matches_numpy_and_round_trips(shape, backend, device, monkeypatch, poisoned_native_memory):
    monkeypatch.setenv("LOSA_BACKEND", backend)
    mask = random_mask(*shape).to(device)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.device == mask.device and packed.is_contiguous()
    assert torch.equal(packed.cpu(), numpy_pack(mask))
    back = unpack_mask(packed, shape[1])
    assert back.dtype == torch.bool and back.is_contiguous()
    assert torch.equal(back, mask)


@needs_native
@settings(deadline=None, max_examples=60)
@given(rows=strategies.integers(0, 9), columns=strategies.integers(0, 150), seed=strategies.integers(0, 1 << 30))
def test_native_equals_reference(rows, columns, seed):
    mask = random_mask(rows, columns, seed)
    packed = bitmask.pack_native(mask)
    assert torch.equal(packed, bitmask.pack_reference(mask))
    assert torch.equal(bitmask.unpack_native(packed, columns), bitmask.unpack_reference(packed, columns))


@pytest.mark.parametrize("columns", [1, 5, 8, 31, 32, 33, 70])
def test_each_instruction_set(isa, columns, poisoned_native_memory):
    mask = random_mask(6, columns)
    packed = bitmask.pack_native(mask)
    assert torch.equal(packed, numpy_pack(mask))
    assert torch.equal(bitmask.unpack_native(packed, columns), mask)


@pytest.mark.parametrize("columns", [1, 13, 40, 77])
def test_any_nonzero_byte_is_true(isa, columns):
    """A bool tensor that shares memory with bytes may hold values other than 0 and 1."""
    values = torch.randint(0, 256, (5, columns), dtype=torch.uint8)
    values[values < 100] = 0
    assert torch.equal(bitmask.pack_native(values.view(torch.bool)), numpy_pack(values != 0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_strided_inputs(device, backend, monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", backend)
    base = random_mask(48, 96).to(device)
    for mask in (base.t(), base[::2, 3:40], base[:, ::3], base[1:2].expand(7, 96), base[:, 5:6]):
        packed = pack_mask(mask)
        assert torch.equal(packed.cpu(), numpy_pack(mask.contiguous()))
        wide = torch.zeros(packed.shape[0], packed.shape[1] + 5, dtype=torch.uint8, device=device)
        wide[:, 2 : 2 + packed.shape[1]] = packed
        assert torch.equal(unpack_mask(wide[:, 2 : 2 + packed.shape[1]], mask.shape[1]), mask)
        assert torch.equal(unpack_mask(packed.t().contiguous().t(), mask.shape[1]), mask)


def test_padding_bits_are_zero_and_ignored(device):
    packed = pack_mask(torch.ones(2, 11, dtype=torch.bool, device=device))
    assert packed.tolist() == [[0xFF, 0x07]] * 2
    assert torch.equal(unpack_mask(packed | 0xF8, 11), torch.ones(2, 11, dtype=torch.bool, device=device))


def test_more_rows_than_one_task():
    mask = random_mask(70, 5000)
    assert torch.equal(unpack_mask(pack_mask(mask), 5000), mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_mask(torch.ones(4, dtype=torch.bool)), r"mask: expected 2 dimensions.*\(4,\)"),
        (lambda: pack_mask(torch.ones(2, 4)), r"mask: expected dtype torch.bool, got torch.float32"),
        (lambda: unpack_mask(torch.zeros(4, dtype=torch.uint8), 4), r"packed: expected 2 dimensions"),
        (lambda: unpack_mask(torch.zeros(2, 4, dtype=torch.int32), 32), r"packed: expected dtype torch.uint8"),
        (lambda: unpack_mask(torch.zeros(2, 4, dtype=torch.uint8), 33), r"in_features: 33 columns need 5.*has 4"),
        (lambda: unpack_mask(torch.zeros(2, 4, dtype=torch.uint8), 24), r"in_features: 24 columns need 3.*has 4"),
        (lambda: unpack_mask(torch.zeros(2, 0, dtype=torch.uint8), -1), r"in_features: expected a count >= 0, got -1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_native
def test_operators_check_what_python_did_not():
    with pytest.raises(RuntimeError, match="in_features"):
        bitmask.unpack_native(torch.zeros(2, 4, dtype=torch.uint8), 99)
    with pytest.raises(RuntimeError, match="mask"):
        bitmask.pack_native(torch.zeros(2, 4))


@needs_native
def test_opcheck(device):
    mask = random_mask(5, 19).to(device)
    torch.library.opcheck(torch.ops.losa.pack_mask.default, (mask,))
    torch.library.opcheck(torch.ops.losa.pack_mask.default, (mask.t(),))
    torch.library.opcheck(torch.ops.losa.unpack_mask.default, (pack_mask(mask), 19))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_graph_breaks(device, backend, monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", backend)
    torch.compiler.reset()
    run = torch.compile(lambda m: unpack_mask(pack_mask(m), m.shape[1]) & m, fullgraph=True, backend="aot_eager")
    for columns in (13, 16, 40):
        mask = random_mask(3, columns).to(device)
        assert torch.equal(run(mask), mask)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(3, 7), (2, 64), (5, 33)])
def test_tiny_on_gpu(shape):
    mask = random_mask(*shape).cuda()
    assert torch.equal(unpack_mask(pack_mask(mask), shape[1]), mask)
