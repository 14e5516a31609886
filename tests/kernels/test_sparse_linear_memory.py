"""Products with packed weights read their buffers and nothing beyond, damaged ones too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losa_kernels import native

needs_native = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))

PAST_THE_END = """
import ctypes, mmap, os, torch
from losa_kernels import native, pack_bitmask, pack_mask
from losa_kernels.packing import native as packing_native

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
maps = []

def at_the_end(tensor):
    # The same tensor, right before a page that must not be touched.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    maps.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(address + pages * PAGE), PAGE, 0) == 0
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages * PAGE - size)
    return copy.copy_(tensor.reshape(-1)).view(tensor.shape)

best = native.cpu_isa()
for level in ("scalar", "avx2", "avx512"):
    os.environ["LOSA_CPU_ISA"] = level
    if native.cpu_isa() != level:
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns, density in ((3, 40, .5), (2, 64, 1), (5, 100, .3), (4, 77, .02), (3, 300, .6), (1, 8, 1)):
            weight, kept = torch.randn(rows, columns).to(dtype), torch.rand(rows, columns) < density
            kept[-1, -1] = True
            mask = at_the_end(pack_mask(kept))
            values, offsets = packing_native.pack_bitmask(at_the_end(weight), mask)
            values, offsets = at_the_end(values), at_the_end(offsets)
            out = at_the_end(torch.zeros(rows, columns, dtype=dtype))
            dense = packing_native.unpack_bitmask(values, mask, offsets, (rows, columns), out=out)
            assert torch.equal(dense, weight.masked_fill(~kept, 0))
            for batch in (1, 2, 4, 7, 16):
                x = at_the_end(torch.randn(batch, columns))
                y = torch.ops.losa.sparse_linear.default(x, values, mask, offsets, at_the_end(torch.randn(rows)))
                assert y.isfinite().all()
    for columns, keep_n in ((24, 1), (72, 2), (5000, 3), (9000, 7)):
        mask = at_the_end(pack_mask((torch.arange(columns) % 8 < keep_n).expand(2, columns)))
        values = at_the_end(torch.randn(2, columns // 8 * keep_n).to(dtype))
        for batch in (1, 2, 4, 7, 16):
            x = at_the_end(torch.randn(batch, columns).to(dtype))
            y = torch.ops.losa.sparse_linear_nm.default(x, values, mask, keep_n, None)
            assert y.isfinite().all()
print("done", best)
"""


@needs_native
@pytest.mark.subprocess
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_past_the_end_of_a_buffer_is_read():
    result = subprocess.run(
        [sys.executable, "-c", PAST_THE_END],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.startswith("done"), (result.returncode, result.stderr)


@needs_native
def test_damaged_files_are_not_read_beyond(isa):
    """Offsets and masks that claim more values than there are: wrong numbers, but from within the buffer."""
    values, bitmask = torch.ones(100), torch.full((4, 20), 255, dtype=torch.uint8)
    offsets = torch.tensor([-5, 90, 1 << 40, -(1 << 40)])
    for batch in (1, 2, 4, 8, 16):
        y = torch.ops.losa.sparse_linear.default(torch.ones(batch, 160), values, bitmask, offsets, None)
        assert torch.equal(y, torch.tensor([100.0, 10.0, 0.0, 100.0]).expand(batch, 4))
        y = torch.ops.losa.sparse_linear_nm.default(
            torch.ones(batch, 200), values, bitmask[:, :1].repeat(1, 25), 1, None
        )
        assert y.isfinite().all()
    for per_byte in (0, 2, 9):
        with pytest.raises(RuntimeError, match="per_byte: expected the number of values of every 8 columns, got"):
            torch.ops.losa.sparse_linear_nm.default(
                torch.ones(1, 200), values, bitmask[:, :1].repeat(1, 25), per_byte, None
            )
