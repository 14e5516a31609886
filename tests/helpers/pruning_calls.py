"""Random calls of pruning ops, right ones and wrong ones, for ``tests/kernels/test_fuzz_ops.py``: (function of no
arguments, comparison of its results by the reference and by native code)."""

from __future__ import annotations

import torch

import losa_kernels as kernels
from losa_kernels import unpack_mask
from losa_kernels.pruning import accumulate_hessian, complete_hessian, inverse_factor
from losa_kernels.tensors import as_bits
from tests.helpers.hostile import FLOATS, hostile, normal, same_bits, size, spoilt

PATTERNS = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (3, 3), (5, 16))


def hessian_of(r, columns, dtype):
    # Rounded, so that the Hessian is exact: the same for both, whatever order a product's sums have.
    x = torch.randn(r.choice((1, columns, 2 * columns + 1)), columns, dtype=dtype).mul(64).round() / 64
    if columns and r.random() < 0.2:
        x[:, r.randrange(columns)] = 0
    return x.T @ x


def hessian(r):
    columns, dtype = r.choice((0, 1, 5, 16, 33, 300 if r.random() < 0.05 else 7)), r.choice(FLOATS[::4])
    x = normal(r, size(r), columns, dtype=r.choice(FLOATS))
    a = spoilt(r, {"hessian": torch.zeros(columns, columns, dtype=dtype), "x": x}, 0.5)

    def run():
        accumulate_hessian(**a)
        return complete_hessian(a["hessian"])

    return run, same_bits


def inverse_factor_(r):
    dtype = r.choice((torch.float32, torch.float64))
    columns = r.choice((0, 1, 4, 17, 33, 150 if r.random() < 0.03 else 8))
    a = spoilt(r, {"hessian": hessian_of(r, columns, dtype), "damping": r.choice((0.01, 0.1, 1.0, 1e-3))}, 0.5)

    def compare(expected, found):
        assert expected[1] == found[1]
        if not torch.equal(expected[0], found[0]):
            error = columns * torch.finfo(dtype).eps * float(torch.linalg.cond(expected[0].double()))
            assert float((expected[0] - found[0]).abs().max()) <= error * float(expected[0].abs().max())

    return lambda: inverse_factor(**a), compare


def goal(r, columns):
    """sparsity, or keep_n and m."""
    fitting = [pattern for pattern in PATTERNS if columns % pattern[1] == 0]
    if fitting and r.random() < 0.5:
        return dict(zip(("sparsity", "keep_n", "m"), (None, *r.choice(fitting)), strict=True))
    return {"sparsity": r.choice((0.0, 0.3, 0.5, 0.9)), "keep_n": None, "m": None}


def packed_mask(r, rows, columns, share=0.5):
    return None if r.random() < share else kernels.pack_mask(torch.rand(rows, columns) < 0.7)


def sparsegpt_prune(r):
    rows, columns, dtype = size(r), r.choice((1, 4, 8, 24, 32, 33, 48, 0 if r.random() < 0.3 else 16)), r.choice(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = {"weight": normal(r, rows, columns, dtype=dtype), "hessian": hessian_of(r, columns, wide)} | goal(r, columns)
    a |= {"damping": 0.01, "block_size": (a["m"] or 1) * r.choice((1, 2, 8, 100))}
    a = spoilt(r, a | {"mask": packed_mask(r, rows, columns)})
    upper = torch.eye(columns, dtype=wide) + torch.randn(columns, columns, dtype=wide).triu(1) / (columns + 1)
    factor = (upper, 0.01) if r.random() < 0.3 else None
    if factor and r.random() < 0.3:
        factor = tuple(hostile(r, part) if r.random() < 0.5 else part for part in factor)

    def compare(expected, found):
        assert torch.equal(expected.mask, found.mask) and expected.damping == found.damping
        pruned = ~unpack_mask(found.mask, found.weight.shape[1])
        assert not as_bits(found.weight)[pruned].any() and expected.weight.dtype == found.weight.dtype
        eps = torch.finfo(found.weight.dtype).eps
        for one, other in zip(expected[::2], found[::2], strict=True):
            assert one.isfinite().all() and other.isfinite().all()
            assert torch.allclose(one, other, 2**11 * eps, 2**11 * eps * float(one.abs().sum()) / max(1, len(one)))

    return lambda: kernels.sparsegpt_prune(**a, factor=factor), compare


def alps_prune(r):
    rows, columns, dtype = size(r), r.choice((1, 4, 8, 24, 0 if r.random() < 0.3 else 9)), r.choice(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = {"weight": normal(r, rows, columns, dtype=dtype), "hessian": hessian_of(r, columns, wide)} | goal(r, columns)
    a = spoilt(r, a | {"damping": 0.01, "mask": packed_mask(r, rows, columns)})
    parts = (torch.rand(columns, dtype=wide), torch.eye(columns, dtype=wide), 1 + torch.rand(columns, dtype=wide))
    spectrum = (*parts, 0.01) if r.random() < 0.3 else None
    if spectrum and r.random() < 0.3:
        spectrum = tuple(hostile(r, part) if r.random() < 0.5 else part for part in spectrum)

    def compare(expected, found):
        assert all(part.isfinite().all() for part in found[:3])
        # The native code selects alone, and all products are torch's.
        same_bits(list(expected[:3]), list(found[:3]))

    return lambda: kernels.alps_prune(**a, spectrum=spectrum), compare


def wanda_mask(r):
    rows, columns = size(r), r.choice((0, 1, 4, 8, 9, 24, 32, 33, 48))
    a = {"weight": normal(r, rows, columns, dtype=r.choice(FLOATS))} | goal(r, columns)
    norms = normal(r, columns, dtype=r.choice((torch.float32, torch.float64, torch.bfloat16))).abs()
    if r.random() < 0.2:
        a["weight"], norms = (t.mul(3).round() for t in (a["weight"], norms))  # ties
    a = spoilt(r, a | {"input_norms": norms, "mask": packed_mask(r, rows, columns)})
    return lambda: kernels.wanda_mask(**a), same_bits
