"""For compute-sanitizer on a GPU: sparse_linear's kernels at sizes that use their buffers more than once, by the card's
count of multiprocessors. What each block does only once shows no race between its stages."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from losa_kernels import pack_bitmask, pack_mask, pack_nm, sparse_linear
from losa_kernels.sparse_linear import tiles

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]
BF16 = torch.bfloat16
BLOCKS = 8  # of a multiprocessor, at most


def problem(rows, columns, pattern=None):
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    kept = torch.rand(rows, columns, device="cuda") < 0.5
    if pattern is not None:
        kept = (torch.arange(columns, device="cuda") % 4 < 2).expand(rows, -1)
    mask = pack_mask(kept)
    packed = pack_bitmask(weight, mask) if pattern is None else pack_nm(weight, mask, *pattern)
    return packed, weight.masked_fill(~kept, 0)


def check(y, x, dense):
    truth = F.linear(x.float(), dense.float())
    assert (y - truth).abs().max() <= 2 * torch.finfo(BF16).eps * truth.abs().max()


def processors():
    return torch.cuda.get_device_properties("cuda").multi_processor_count


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("columns", [1024, 2080])
@torch.no_grad()
def test_window_kernel_with_several_lots_a_block(columns, pattern, monkeypatch):
    """Five lots of four rows for each block; a lot's memory is used again by the third after it."""
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")
    packed, dense = problem(20 * BLOCKS * processors() + 5, columns, pattern)
    for batch in (1, 2, 4):
        x = torch.randn(batch, columns, device="cuda").bfloat16()
        check(sparse_linear(x, packed), x, dense)


@pytest.mark.parametrize("batch", [8, 16])
@torch.no_grad()
def test_row_kernel_with_many_steps(batch, monkeypatch):
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")
    packed, dense = problem(64 * processors() + 3, 2072)
    x = torch.randn(batch, 2072, device="cuda").bfloat16()
    check(sparse_linear(x, packed), x, dense)


@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_tiles_in_several_stages(batch):
    """A warp's slice of K has more chunks than the shared memory holds."""
    packed, dense = problem(16 * processors() + 3, 11008)
    x = torch.randn(batch, 11008, device="cuda").bfloat16()
    check(tiles.multiply(x, tiles.make(packed), None), x, dense)
