"""Triton kernels of the gradients of A and B: M * G, G = dY^T X, projected by both; launch.py launches them.

dA = s B^T (M * G) and dB = s (M * G) A^T are thin: the rank is at most 128. Either a tile of G is projected where the
main product has put its sums (``project_kernel``), or the vendor's GEMM writes G, and one pass over it suffices
(``project_given_kernel``). Both write shares, which ``sum_kernel`` adds up in a fixed order: results are the same in
every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from losa_kernels.masked_lora.triton.kernels import accumulate, expand, load_bits, two_terms


@triton.jit
def _as_terms(value, LOW: tl.constexpr, TERMS: tl.constexpr):
    """(high, low): value in two terms of dtype LOW, in one (twice), or as it is (TERMS == 0, twice)."""
    high, low = value, value
    if TERMS == 1:
        high = value.to(LOW)
        low = high
    elif TERMS == 2:
        high, low = two_terms(value, LOW)
    return high, low


@triton.jit
def _thin_product(factor, high, low, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + factor G: acc [R, N], factor [R, K] fp32 and G [K, N] in TERMS terms, see _as_terms.

    16-bit tensor cores get the factor in two terms of the same dtype. The rank, less than 64, is the product's
    first side, which keeps wgmma out: where two wgmma of one kernel read the same place of shared memory in different
    layouts, ptxas 12.8 (Triton 3.6) takes the low word of a descriptor for its high word as well.
    """
    if TERMS == 0:
        acc += tl.dot(factor, high, input_precision=PRECISION)
    else:
        factor_high, factor_low = two_terms(factor, high.dtype)
        acc = tl.dot(factor_low, high, acc)
        if TERMS == 2:
            acc = tl.dot(factor_high, low, acc)
        acc = tl.dot(factor_high, high, acc)
    return acc


@triton.jit
def _factor(pointer, stride_r, stride_n, r, n, rank, features):
    """Components r [R] of an adapter's factor at features n [N] in fp32, zeros outside."""
    tile = pointer + r.to(tl.int64)[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_n
    return tl.load(tile, mask=(r < rank)[:, None] & (n < features)[None, :], other=0.0).to(tl.float32)  # [R, N]


@triton.jit
def _store_share(parts, share, values, r, n, rank, features):
    """values [R, N] to share number ``share`` of parts (shares, rank, features) at components r [R], features n [N]."""
    row = share.to(tl.int64) * rank + r
    inside = (r < rank)[:, None] & (n < features)[None, :]
    tl.store(parts + row[:, None] * features + n[None, :], values, mask=inside)


@triton.jit
def project_kernel(
    dy, x, weight, mask, lora_A, lora_B, drop, A_parts, B_parts,
    tokens, outputs, inputs, rank, splits, split_tokens,
    dy_t, dy_o, x_t, x_i, w_o, w_i, mask_o, A_r, A_i, B_o, B_r, drop_t,
    one,
    R: tl.constexpr, RANK_STEP: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    LOW: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of M * G, G = dY^T X, projected by A and by B before it leaves the registers.

    The tokens may be divided among ``splits`` programs; the projection is linear, so the shares of splits add up like
    the shares of tiles. G goes into the products as _as_terms says.

    A_parts (tiles of outputs * splits, rank, inputs) or None, B_parts (tiles of inputs * splits, rank, outputs) or
    None.
    """
    tiles_o, tiles_i = tl.cdiv(outputs, BO), tl.cdiv(inputs, BI)
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    group = tile // (GROUP * tiles_i)
    inside_group = tile % (GROUP * tiles_i)
    group_rows = min(tiles_o - group * GROUP, GROUP)
    o_tile, i_tile = group * GROUP + inside_group % group_rows, inside_group // group_rows
    o, i = o_tile * BO + tl.arange(0, BO), i_tile * BI + tl.arange(0, BI)
    i_byte = i_tile * (BI // 8) + tl.arange(0, BI // 8)
    o_inside, i_inside = o < outputs, i < inputs

    # G of this tile and split, in registers.
    dy_tile, x_tile = dy + o.to(tl.int64)[None, :] * dy_o, x + i.to(tl.int64)[None, :] * x_i  # [1, BO], [1, BI]
    g = tl.zeros((BO, BI), dtype=tl.float32)
    begin = split * split_tokens
    for t_start in range(begin, min(begin + split_tokens, tokens), BT):
        t = (t_start + tl.arange(0, BT)).to(tl.int64)
        t_inside = (t < tokens)[:, None]
        dy_block = tl.load(dy_tile + t[:, None] * dy_t, mask=t_inside & o_inside[None, :], other=0.0)  # [BT, BO]
        x_block = tl.load(x_tile + t[:, None] * x_t, mask=t_inside & i_inside[None, :], other=0.0)  # [BT, BI]
        if DROPOUT:
            drop_bits = load_bits(drop, drop_t, t, i_byte, tokens, inputs, False, False)  # [BT, BI / 8]
            x_block = tl.where(expand(drop_bits, BT, BI), x_block, 0.0)
        g = accumulate(g, dy_block.T, x_block, one, PRECISION)

    # M * G [BO, BI].
    if MASKED:
        kept = expand(load_bits(mask, mask_o, o, i_byte, outputs, inputs, False, False), BO, BI)
    else:
        w = weight + o.to(tl.int64)[:, None] * w_o + i.to(tl.int64)[None, :] * w_i
        kept = tl.load(w, mask=o_inside[:, None] & i_inside[None, :], other=0.0) != 0  # [BO, BI]
    g = tl.where(kept, g, 0.0)
    high, low = _as_terms(g, LOW, TERMS)
    # The projections by A and by B, in steps of the rank, because a large rank would not fit the registers. There is no
    # pipeline, because it would not fit shared memory.
    for start in tl.range(0, R, RANK_STEP, num_stages=1):
        r = start + tl.arange(0, RANK_STEP)
        if B_parts is not None:
            A = _factor(lora_A, A_r, A_i, r, i, rank, inputs)  # [RANK_STEP, BI]
            dB = _thin_product(A, high.T, low.T, tl.zeros((RANK_STEP, BO), tl.float32), TERMS, PRECISION)
            _store_share(B_parts, i_tile * splits + split, dB, r, o, rank, outputs)
        if A_parts is not None:
            B = _factor(lora_B, B_r, B_o, r, o, rank, outputs)  # [RANK_STEP, BO]
            dA = _thin_product(B, high, low, tl.zeros((RANK_STEP, BI), tl.float32), TERMS, PRECISION)
            _store_share(A_parts, o_tile * splits + split, dA, r, i, rank, inputs)


@triton.jit
def project_given_kernel(
    G, weight, mask, lora_A, lora_B, A_parts, B_parts,
    outputs, inputs, rank, w_o, w_i, mask_o, A_r, A_i, B_o, B_r,
    R: tl.constexpr, RANK_STEP: tl.constexpr, MASKED: tl.constexpr, LOW: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """M * G projected by A and by B, G (outputs, inputs) read once for every RANK_STEP components.

    A program walks down SPAN rows of BI columns: its share of dA stays in registers, and a share of dB^T leaves at each
    step. G goes into the products as _as_terms says.

    A_parts (spans of outputs, rank, inputs) or None, B_parts (tiles of inputs, rank, outputs) or None.
    """
    steps: tl.constexpr = R // RANK_STEP
    tiles_i = tl.cdiv(inputs, BI)
    r = (tl.program_id(0) % steps) * RANK_STEP + tl.arange(0, RANK_STEP)
    tile = tl.program_id(0) // steps
    span, i_tile = tile // tiles_i, tile % tiles_i
    i = i_tile * BI + tl.arange(0, BI)
    i_byte = i_tile * (BI // 8) + tl.arange(0, BI // 8)
    i_inside = i < inputs
    if B_parts is not None:
        A = _factor(lora_A, A_r, A_i, r, i, rank, inputs)  # [RANK_STEP, BI]
    dA = tl.zeros((RANK_STEP, BI), tl.float32)
    begin, end = span * SPAN, min(span * SPAN + SPAN, outputs)
    if MASKED:
        # One step ahead by hand: rows of bytes may be too ill aligned for asynchronous copies.
        bits = load_bits(mask, mask_o, begin + tl.arange(0, BO), i_byte, outputs, inputs, False, False)  # [BO, BI / 8]
    for start in range(begin, end, BO):
        o = start + tl.arange(0, BO)
        inside = (o < outputs)[:, None] & i_inside[None, :]
        g = tl.load(G + o.to(tl.int64)[:, None] * inputs + i[None, :], mask=inside, other=0.0)  # [BO, BI]
        if MASKED:
            kept = expand(bits, BO, BI)
            bits = load_bits(mask, mask_o, o + BO, i_byte, outputs, inputs, False, False)
        else:
            w = weight + o.to(tl.int64)[:, None] * w_o + i.to(tl.int64)[None, :] * w_i
            kept = tl.load(w, mask=inside, other=0.0) != 0  # [BO, BI]
        g = tl.where(kept, g, 0.0)
        high, low = _as_terms(g, LOW, TERMS)
        if A_parts is not None:
            B = _factor(lora_B, B_r, B_o, r, o, rank, outputs)  # [RANK_STEP, BO]
            dA = _thin_product(B, high, low, dA, TERMS, PRECISION)
        if B_parts is not None:
            dB = _thin_product(A, high.T, low.T, tl.zeros((RANK_STEP, BO), tl.float32), TERMS, PRECISION)
            _store_share(B_parts, i_tile, dB, r, o, rank, outputs)
    if A_parts is not None:
        _store_share(A_parts, span, dA, r, i, rank, inputs)


@triton.jit
def _sum_parts(parts, n, count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements n [BLOCK] of the sum of parts (count, size), PARTS at a time so that as many loads are under way."""
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        tile = parts + part.to(tl.int64)[:, None] * size + n[None, :]  # [PARTS, BLOCK]
        sums += tl.sum(tl.load(tile, mask=(part < count)[:, None] & (n < size)[None, :], other=0.0), 0)
    return sums


@triton.jit
def sum_kernel(
    A_parts, B_parts, dA, dB, A_count, B_count, inputs, outputs, rank, factor,
    ACCUMULATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dA (rank, inputs) (+)= factor * the sum of A_parts (A_count, rank, inputs); dB (outputs, rank) = factor * the sum
    of B_parts (B_count, rank, outputs). The order of a sum is always the same. Either pair may be None.
    """
    n, first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) == 0
    # The outer conditions are decided by the compiler.
    if A_parts is not None:  # noqa: SIM102
        if first:
            size = rank * inputs
            sums = factor * _sum_parts(A_parts, n, A_count, size, PARTS, BLOCK)
            if ACCUMULATE:
                sums += tl.load(dA + n, mask=n < size, other=0.0)
            tl.store(dA + n, sums, mask=n < size)
    if B_parts is not None:  # noqa: SIM102
        if not first:
            size = rank * outputs
            sums = factor * _sum_parts(B_parts, n, B_count, size, PARTS, BLOCK)
            tl.store(dB + (n % outputs) * rank + n // outputs, sums, mask=n < size)
