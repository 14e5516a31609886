"""The cases of checks.py that decode: products by packed weights, and the operators between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from losa_kernels import decoder_step, pack_bitmask, pack_mask, pack_nm, sparse_linear
from losa_kernels.decoder_step import reference as steps
from losa_kernels.sparse_linear import tiles
from losa_kernels.tensors import as_bits
from tests.gpu.case import (
    BF16,
    FP16,
    FP32,
    Case,
    Sizes,
    Verdict,
    bounded,
    differing,
    kept_at_half,
    kept_groups,
    text,
    worst,
)

BATCHES = (1, 2, 4, 8, 16)


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    on_gpu = device != "cpu"
    shapes = (sizes.odd, sizes.groups, sizes.square, sizes.tall)
    for shape in (*shapes, sizes.wide):
        for dtype in (BF16, FP16, FP32) if shape in shapes[:3] else (BF16,):
            for pattern in (None, (2, 4)) if shape[1] % 8 == 0 else (None,):
                op = "sparse_linear" if pattern is None else "sparse_linear_nm"
                packed = f"{'bitmask' if pattern is None else '2:4'} {text(shape)} {text(dtype)}"
                for batch in BATCHES:
                    given = (shape, dtype, pattern, batch, device)
                    yield Case(f"window {packed} batch {batch}", (op,), partial(product, "window", *given))
                    yield Case(f"as chosen {packed} batch {batch}", (), partial(product, "auto", *given))
                    if on_gpu and dtype != FP32:
                        label, run_case = f"tiles {packed} batch {batch}", partial(product_by_tiles, *given)
                        yield Case(label, ("count_tiles", "write_tiles", "sparse_linear_tiles"), run_case)
                if on_gpu and dtype != FP32:
                    run_case = partial(tiles_hold, shape, dtype, pattern, device)
                    yield Case(f"unpack tiles of {packed}", ("unpack_tiles",), run_case)
    for width in (sizes.odd[1], sizes.square[1]):
        yield Case(f"residual and RMS norm {width} bf16", ("add_rms_norm",), partial(rms_norm, width, BF16, device))
        yield Case(f"gated SiLU {width} bf16", ("gated_silu",), partial(gated, width, BF16, device))
    for queries, keys, size, position in ((6, 2, 24, 5), (32, 32, 128, 300), (32, 8, 128, 4000)):
        for normed in (False, True):
            label = f"rotary {queries}/{keys} heads of {size}{', normed' if normed else ''} bf16"
            run_case = partial(rotary, queries, keys, size, normed, BF16, device)
            yield Case(label, ("rotate_and_store",), run_case)
        label = f"attention {queries}/{keys} heads of {size}, {position + 1} places bf16"
        yield Case(label, ("attend_cache",), partial(attention, queries, keys, size, position, BF16, device))


def problem(shape, dtype, pattern, batch, device):
    """(packed weight, dense weight, x, bias)"""
    kept = kept_at_half(shape, device) if pattern is None else kept_groups(shape, *pattern, device)
    weight, mask = torch.randn(shape, device=device).to(dtype), pack_mask(kept)
    packed = pack_bitmask(weight, mask) if pattern is None else pack_nm(weight, mask, *pattern)
    x, bias = (torch.randn(size, device=device).to(dtype) for size in ((batch, shape[1]), (shape[0],)))
    return packed, weight.masked_fill(~kept, 0), x, bias


def product(way, shape, dtype, pattern, batch, device) -> Verdict:
    packed, dense, x, bias = problem(shape, dtype, pattern, batch, device)
    with torch.no_grad(), patch.dict(os.environ, LOSA_SPARSE_LINEAR=way):
        return verdict(sparse_linear(x, packed, bias), dense, x, bias)


def product_by_tiles(shape, dtype, pattern, batch, device) -> Verdict:
    packed, dense, x, bias = problem(shape, dtype, pattern, batch, device)
    return verdict(tiles.multiply(x, tiles.make(packed), bias), dense, x, bias)


def verdict(ours: Tensor, dense: Tensor, x: Tensor, bias: Tensor) -> Verdict:
    truth = F.linear(x.double(), dense.double(), bias.double())
    return bounded(ours, F.linear(x, dense, bias), truth, x.dtype)


def tiles_hold(shape, dtype, pattern, device) -> Verdict:
    packed, dense, _, _ = problem(shape, dtype, pattern, 1, device)
    return differing(as_bits(tiles.unpack_on_device(tiles.make(packed))), as_bits(dense))


def normal(*shape, dtype, device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def rms_norm(width, dtype, device) -> Verdict:
    x, update = (normal(3, width, dtype=dtype, device=device) for _ in range(2))
    weight, sums = 1 + 0.1 * normal(width, dtype=dtype, device=device), [x.clone(), x.clone(), x.double()]
    with torch.no_grad():
        ours = decoder_step.add_rms_norm(sums[0], update, weight, 1e-5)
        plain = steps.add_rms_norm(sums[1], update, weight, 1e-5)
        truth = steps.add_rms_norm(sums[2], update.double(), weight.double(), 1e-5)
    return worst([bounded(ours, plain, truth, dtype), bounded(*sums, dtype)])


def gated(width, dtype, device) -> Verdict:
    x = normal(2, 2 * width, dtype=dtype, device=device)
    return bounded(decoder_step.gated_silu(x), steps.gated_silu(x), steps.gated_silu(x.double()), dtype)


def rotary(queries, keys, size, normed, dtype, device, places: int = 40) -> Verdict:
    """The queries, and the cache with the keys and values in it."""
    heads, cache = normal(queries + 2 * keys, size, dtype=dtype, device=device), []
    tables = [normal(places, size, dtype=dtype, device=device) for _ in range(2)]
    norms = [1 + 0.1 * normal(size, dtype=dtype, device=device) if normed else None for _ in range(2)]
    position = torch.tensor([places - 3], device=device)
    found = []
    for function, wide in (
        (decoder_step.rotate_and_store, False),
        (steps.rotate_and_store, False),
        (steps.rotate_and_store, True),
    ):
        cache.append(torch.zeros(2, keys, places, size, dtype=torch.float64 if wide else dtype, device=device))
        given = [None if t is None else t.double() if wide else t for t in (heads, *tables, *norms)]
        with torch.no_grad():
            found.append(function(*given[:3], position, cache[-1], *given[3:], 1e-5))
    return worst([bounded(*found, dtype), bounded(*cache, dtype)])


def attention(queries, keys, size, position, dtype, device) -> Verdict:
    places = position + 7
    q, cache = (
        normal(queries, size, dtype=dtype, device=device),
        normal(2, keys, places + 2, size, dtype=dtype, device=device),
    )
    at, finished = torch.tensor([position], device=device), torch.zeros(queries, dtype=torch.int32, device=device)
    settings = (at, places, size**-0.5, finished)
    with torch.no_grad():
        ours = decoder_step.attend_cache(q, cache, *settings)
        plain = steps.attend_cache(q, cache, *settings)
        truth = steps.attend_cache(q.double(), cache.double(), *settings)
    verdict = bounded(ours, plain, truth, dtype)
    return verdict if not finished.any() else (float("inf"), 0.0)
