"""Triton kernels of the masked-LoRA linear; triton.py launches them.

One identity carries the file. With W_eff = M * (W + s B A), transposing every operand turns the forward pass into the
gradient of x:

    Y^T  = W_eff   X^T       left = B,    right = A,    W as stored
    dX^T = W_eff^T dY^T      left = A^T,  right = B^T,  W with its strides swapped

so ``linear_kernel`` is both. In it W_eff is the *left* operand, because that is the operand which Hopper's wgmma takes
from registers: the tile is formed where the product left right has put its sums, and goes from there into the main
product without passing through shared memory. The tokens become the short side of the instruction (8 to 256 wide), so
that a batch of 16 wastes nothing.

**Sums of rank-one terms.** W + s B A has to be right to fp32 before it is rounded to x's dtype. Factors rounded to
bf16 would err by 2^-8 |B| |A|, as much as the rounding itself; tf32 errs by up to 2^-9 where the hardware truncates,
which is too much for fp16, and costs twice a bf16 product. Instead every fp32 factor is split into two bf16 terms,
F = hi + lo + 2^-18 F, and the product keeps three of the four terms:

    B A = B_hi A_hi + B_lo A_hi + B_hi A_lo,   error <= 2^-16 |B| |A|

The three are one product with a three times longer inner side, [B_hi B_lo B_hi] [A_hi; A_hi; A_lo], which
``split_kernel`` lays out ahead, padded with zeros to HEAD + TAIL (tuning.factor_split): 32 for rank 8, 48 for rank 16.
Forming W_eff anew for every BT tokens hence costs (HEAD + TAIL) / BT of the product it serves. bf16 rather than fp16,
also for fp16 layers: its exponent is fp32's, so that no low term is lost to underflow. Factors in 16 bits are one term
as they are, and fp32 layers take one fp32 term.

Offsets are int64: tokens * features passes 2^31 in long contexts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(tile, row_inside, column_inside, ROWS_WHOLE: tl.constexpr, COLUMNS_WHOLE: tl.constexpr):
    """A tile, zeros outside; without predicates where the launcher knows that nothing is outside."""
    if ROWS_WHOLE and COLUMNS_WHOLE:
        values = tl.load(tile)
    elif ROWS_WHOLE:
        values = tl.load(tile, mask=column_inside[None, :], other=0.0)
    elif COLUMNS_WHOLE:
        values = tl.load(tile, mask=row_inside[:, None], other=0.0)
    else:
        values = tl.load(tile, mask=row_inside[:, None] & column_inside[None, :], other=0.0)
    return values


@triton.jit
def _load_bits(packed, stride, row, byte, rows, columns, ROWS_WHOLE: tl.constexpr, COLUMNS_WHOLE: tl.constexpr):
    """Bytes (row, byte) of a packed mask (rows, ceil(columns / 8)), zeros outside."""
    tile = packed + row.to(tl.int64)[:, None] * stride + byte[None, :]
    return _load(tile, row < rows, byte < (columns + 7) // 8, ROWS_WHOLE, COLUMNS_WHOLE)


@triton.jit
def _expand(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Packed bytes (ROWS, COLUMNS / 8) to bool (ROWS, COLUMNS).

    In 32 bits, where the test of a bit is one instruction. The bytes reach the registers that need them before they
    are spread, so that a warp exchanges a 16th of what it would for a mask as large as bf16 weights.
    """
    spread = bits[:, :, None].to(tl.int32) & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(spread, (ROWS, COLUMNS)) != 0


@triton.jit
def _two_terms(value, LOW: tl.constexpr):
    """(high, low) in a 16-bit dtype whose sum is value up to 2^-18 (bf16)."""
    high = value.to(LOW)
    return high, (value - high.to(tl.float32)).to(LOW)


@triton.jit
def _as_terms(value, LOW: tl.constexpr, TERMS: tl.constexpr):
    """(high, low): value in two terms of dtype LOW, in one (twice), or as it is (TERMS == 0, twice)."""
    high, low = value, value
    if TERMS == 1:
        high = value.to(LOW)
        low = high
    elif TERMS == 2:
        high, low = _two_terms(value, LOW)
    return high, low


@triton.jit
def _accumulate(acc, left, right, one, PRECISION: tl.constexpr):
    """acc + left right.

    fp32 products are summed apart before they are added, lest roundings pile up along the whole reduction: by an fma
    with a ``one`` that the compiler does not know, for it would make a sum the product's own accumulator again.
    """
    if left.dtype == tl.float32:
        product = tl.dot(left, right, input_precision=PRECISION)
        acc = tl.fma(product, tl.full(product.shape, one, tl.float32), acc)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _thin_product(factor, high, low, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + factor G: factor (rank, k) fp32 and G (k, n) in TERMS terms, see _as_terms.

    16-bit tensor cores get the factor in two terms of the same dtype. The rank, less than 64, is the product's
    first side, which keeps wgmma out: where two wgmma of one kernel read the same place of shared memory in different
    layouts, ptxas 12.8 (Triton 3.6) takes the low word of a descriptor for its high word as well.
    """
    if TERMS == 0:
        acc += tl.dot(factor, high, input_precision=PRECISION)
    else:
        factor_high, factor_low = _two_terms(factor, high.dtype)
        acc = tl.dot(factor_low, high, acc)
        if TERMS == 2:
            acc = tl.dot(factor_high, low, acc)
        acc = tl.dot(factor_high, high, acc)
    return acc


@triton.jit
def _split_rows(source, target, source_r, source_n, target_r, features, rank, TERMS, LOW_TERM, r, n):
    """Row r of target is component r % rank of source: its low part in term LOW_TERM, else its high part."""
    term, component = r // rank, r % rank
    inside = (r < TERMS * rank)[:, None] & (n < features)[None, :]
    offset = component.to(tl.int64)[:, None] * source_r + n.to(tl.int64)[None, :] * source_n
    value = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)
    high, low = _two_terms(value, target.dtype.element_ty)
    part = tl.where((term == LOW_TERM)[:, None], low, high)
    tl.store(target + r.to(tl.int64)[:, None] * target_r + n[None, :], part, mask=(n < target_r)[None, :])


@triton.jit
def split_kernel(
    lora_A, lora_B, A_terms, B_terms, inputs, outputs, rank,
    A_r, A_i, B_o, B_r, A_terms_r, B_terms_r,
    TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A_terms (depth, in) = [hi; hi; lo; 0] of A and B_terms (depth, out) = [hi; lo; hi; 0] of B^T.

    One term, [hi; 0], serves factors that the dtype of the terms holds exactly.
    """
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(2) == 0:
        _split_rows(lora_A, A_terms, A_r, A_i, A_terms_r, inputs, rank, TERMS, 2, r, n)
    else:
        _split_rows(lora_B, B_terms, B_r, B_o, B_terms_r, outputs, rank, TERMS, 1, r, n)


@triton.jit
def _terms(factor, stride, n, start, SIZE: tl.constexpr):
    """Terms start to start + SIZE of columns n, (SIZE, columns); split_kernel padded both sides."""
    r = start + tl.arange(0, SIZE)
    return tl.load(factor + r.to(tl.int64)[:, None] * stride + n[None, :])


@triton.jit
def _low_rank(left_head, left_tail, right, right_r, k, HEAD: tl.constexpr, TAIL: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """A tile of B A in fp32, columns k."""
    sums = tl.dot(left_head, _terms(right, right_r, k, 0, HEAD), input_precision=PRECISION)
    if TAIL > 0:
        sums = tl.dot(left_tail, _terms(right, right_r, k, HEAD, TAIL), sums, input_precision=PRECISION)
    return sums


@triton.jit
def linear_kernel(
    x, weight, mask, left, right, bias, y, drop,
    tokens, rows, depth,
    x_t, x_k, w_m, w_k, mask_o, left_r, right_r, y_t, drop_t,
    scaling, drop_scale, one,
    HEAD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_K: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (tokens, rows) = x (tokens, depth) W_eff^T + bias, the tile of W_eff formed in registers (see the top).

    weight (rows, depth) by its strides; left (HEAD + TAIL, rows) and right (HEAD + TAIL, depth) from split_kernel.
    DROPOUT acts on the adapter's path, drop being packed like a mask, (tokens, ceil(in / 8)):
    "input": y = x (M * W)^T + s drop(x) (M * BA)^T; both products share one accumulator.
    "output": y = x (M * W)^T + drop(s x (M * BA)^T), for the gradient of x; two accumulators.
    """
    # Programs in flight share GROUP strips of W and few of x, which then come from L2.
    tiles_m, tiles_t = tl.cdiv(rows, BM), tl.cdiv(tokens, BT)
    group = tl.program_id(0) // (GROUP * tiles_t)
    inside_group = tl.program_id(0) % (GROUP * tiles_t)
    group_rows = min(tiles_m - group * GROUP, GROUP)
    m_tile, t_tile = group * GROUP + inside_group % group_rows, inside_group // group_rows
    m, t = m_tile * BM + tl.arange(0, BM), t_tile * BT + tl.arange(0, BT)
    m_byte = m_tile * (BM // 8) + tl.arange(0, BM // 8)
    m_inside, t_inside = m < rows, t < tokens

    left_head = _terms(left, left_r, m, 0, HEAD).T
    left_tail = left_head
    if TAIL > 0:
        left_tail = _terms(left, left_r, m, HEAD, TAIL).T

    # Rows past the last token repeat it and are not stored.
    x_tile = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t
    w_tile = weight + m.to(tl.int64)[:, None] * w_m
    acc = tl.zeros((BM, BT), dtype=tl.float32)
    adapter_acc = tl.zeros((BM, BT), dtype=tl.float32)
    if MASKED:
        # Rows of bytes may be too ill aligned for asynchronous copies, hence one step ahead by hand.
        if TRANSPOSED:
            bits = _load_bits(mask, mask_o, tl.arange(0, BK), m_byte, depth, rows, WHOLE_K, WHOLE_M)
        else:
            bits = _load_bits(mask, mask_o, m, tl.arange(0, BK // 8), rows, depth, WHOLE_M, WHOLE_K)
    steps = tl.cdiv(depth, BK)
    for step in range(0, steps):
        following = min(step + 1, steps - 1)
        k = step * BK + tl.arange(0, BK)
        k_inside = k < depth
        x_block = _load(x_tile + k.to(tl.int64)[None, :] * x_k, t_inside, k_inside, True, WHOLE_K)
        w = _load(w_tile + k.to(tl.int64)[None, :] * w_k, m_inside, k_inside, WHOLE_M, WHOLE_K)
        if not MASKED:
            # Of the widened weight, or the compiler compares before it exchanges, and exchanges bools besides weights.
            kept = w.to(tl.float32) != 0
        elif TRANSPOSED:
            kept = tl.trans(_expand(bits, BK, BM))
            o = following * BK + tl.arange(0, BK)
            bits = _load_bits(mask, mask_o, o, m_byte, depth, rows, WHOLE_K, WHOLE_M)
        else:
            kept = _expand(bits, BM, BK)
            byte = following * (BK // 8) + tl.arange(0, BK // 8)
            bits = _load_bits(mask, mask_o, m, byte, rows, depth, WHOLE_M, WHOLE_K)
        ba = _low_rank(left_head, left_tail, right, right_r, k, HEAD, TAIL, PRECISION)
        if DROPOUT == "none":
            effective = tl.where(kept, w.to(tl.float32) + scaling * ba, 0.0).to(x_block.dtype)
            acc = _accumulate(acc, effective, x_block.T, one, PRECISION)
        else:
            base = tl.where(kept, w, 0.0).to(x_block.dtype)
            adapter = tl.where(kept, scaling * drop_scale * ba, 0.0).to(x_block.dtype)
            acc = _accumulate(acc, base, x_block.T, one, PRECISION)
            if DROPOUT == "input":
                x_byte = step * (BK // 8) + tl.arange(0, BK // 8)
                drop_bits = _load_bits(drop, drop_t, t, x_byte, tokens, depth, False, WHOLE_K)
                dropped = tl.where(_expand(drop_bits, BT, BK), x_block, 0.0)
                acc = _accumulate(acc, adapter, dropped.T, one, PRECISION)
            else:
                adapter_acc = _accumulate(adapter_acc, adapter, x_block.T, one, PRECISION)

    if DROPOUT == "output":
        drop_bits = _load_bits(drop, drop_t, t, m_byte, tokens, rows, False, WHOLE_M)
        acc += tl.where(tl.trans(_expand(drop_bits, BT, BM)), adapter_acc, 0.0)
    if bias is not None:
        acc += tl.load(bias + m, mask=m_inside, other=0.0).to(tl.float32)[:, None]
    y_tile = y + t.to(tl.int64)[:, None] * y_t + m[None, :]
    tl.store(y_tile, acc.T.to(y.dtype.element_ty), mask=t_inside[:, None] & m_inside[None, :])


@triton.jit
def compose_kernel(
    weight, mask, left, right, composed,
    rows, depth, w_m, w_k, mask_o, left_m, left_r, right_r, right_k,
    scaling,
    RANK: tl.constexpr, TERMS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """composed (rows, depth), contiguous = M * (W + s B A), one rounding to its dtype, +0.0 where pruned.

    RANK > 0: left (rows, RANK) and right (RANK, depth) are B and A, multiplied in fp32 by the ordinary units: small
    ranks hide behind the memory, and tensor cores' sums would have to be exchanged to meet W. Else left (TERMS, rows)
    and right (TERMS, depth) are from split_kernel. WHOLE: no tile is ragged.
    """
    tiles_k = tl.cdiv(depth, BK)
    m_tile, k_tile = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    m, k = m_tile * BM + tl.arange(0, BM), k_tile * BK + tl.arange(0, BK)
    m_inside, k_inside = m < rows, k < depth
    w_tile = weight + m.to(tl.int64)[:, None] * w_m + k.to(tl.int64)[None, :] * w_k
    w = _load(w_tile, m_inside, k_inside, WHOLE, WHOLE)
    if MASKED:
        byte = k_tile * (BK // 8) + tl.arange(0, BK // 8)
        kept = _expand(_load_bits(mask, mask_o, m, byte, rows, depth, WHOLE, WHOLE), BM, BK)
    else:
        kept = w != 0
    ba = tl.zeros((BM, BK), dtype=tl.float32)
    # Without a loop, across which the compiler would not let the sums have the layout of W.
    for r in tl.static_range(RANK):
        b_tile, a_tile = left + m.to(tl.int64) * left_m + r * left_r, right + k.to(tl.int64) * right_k + r * right_r
        if WHOLE:
            b, a = tl.load(b_tile), tl.load(a_tile)
        else:
            b, a = tl.load(b_tile, mask=m_inside, other=0.0), tl.load(a_tile, mask=k_inside, other=0.0)
        ba += b.to(tl.float32)[:, None] * a.to(tl.float32)[None, :]
    if TERMS > 0:
        for start in range(0, TERMS, STEP):
            left_tile, right_tile = _terms(left, left_r, m, start, STEP), _terms(right, right_r, k, start, STEP)
            ba = tl.dot(left_tile.T, right_tile, ba, input_precision=PRECISION)
    effective = tl.where(kept, w.to(tl.float32) + scaling * ba, 0.0).to(composed.dtype.element_ty)
    target = composed + m.to(tl.int64)[:, None] * depth + k[None, :]
    if WHOLE:
        tl.store(target, effective)
    else:
        tl.store(target, effective, mask=m_inside[:, None] & k_inside[None, :])


@triton.jit
def _factor(pointer, stride_r, stride_n, r, n, rank, features):
    """Components r of an adapter's factor at features n in fp32, (r, n), zeros outside."""
    tile = pointer + r.to(tl.int64)[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_n
    return tl.load(tile, mask=(r < rank)[:, None] & (n < features)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_share(parts, share, values, r, n, rank, features):
    """Share number ``share`` of parts (shares, rank, features) at components r and features n."""
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

    Each program writes its share of dA and of dB^T, which sum_kernel adds up in a fixed order: results are the same in
    every run. The tokens may be divided among ``splits`` programs; the projection is linear, so their shares add up
    like the others. G goes into the products as _as_terms says.

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

    dy_tile, x_tile = dy + o.to(tl.int64)[None, :] * dy_o, x + i.to(tl.int64)[None, :] * x_i
    g = tl.zeros((BO, BI), dtype=tl.float32)
    begin = split * split_tokens
    for t_start in range(begin, min(begin + split_tokens, tokens), BT):
        t = (t_start + tl.arange(0, BT)).to(tl.int64)
        t_inside = (t < tokens)[:, None]
        dy_block = tl.load(dy_tile + t[:, None] * dy_t, mask=t_inside & o_inside[None, :], other=0.0)
        x_block = tl.load(x_tile + t[:, None] * x_t, mask=t_inside & i_inside[None, :], other=0.0)
        if DROPOUT:
            drop_bits = _load_bits(drop, drop_t, t, i_byte, tokens, inputs, False, False)
            x_block = tl.where(_expand(drop_bits, BT, BI), x_block, 0.0)
        g = _accumulate(g, dy_block.T, x_block, one, PRECISION)

    if MASKED:
        kept = _expand(_load_bits(mask, mask_o, o, i_byte, outputs, inputs, False, False), BO, BI)
    else:
        w = weight + o.to(tl.int64)[:, None] * w_o + i.to(tl.int64)[None, :] * w_i
        kept = tl.load(w, mask=o_inside[:, None] & i_inside[None, :], other=0.0) != 0
    g = tl.where(kept, g, 0.0)
    high, low = _as_terms(g, LOW, TERMS)
    # In steps of the rank, or a large one would not fit the registers; unpipelined, or it would not fit shared memory.
    for start in tl.range(0, R, RANK_STEP, num_stages=1):
        r = start + tl.arange(0, RANK_STEP)
        if B_parts is not None:
            A = _factor(lora_A, A_r, A_i, r, i, rank, inputs)
            dB = _thin_product(A, high.T, low.T, tl.zeros((RANK_STEP, BO), tl.float32), TERMS, PRECISION)
            _store_share(B_parts, i_tile * splits + split, dB, r, o, rank, outputs)
        if A_parts is not None:
            B = _factor(lora_B, B_r, B_o, r, o, rank, outputs)
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

    A program walks down SPAN rows of BI columns: its share of dA stays in registers, one of dB^T leaves at each step.
    It goes into the products as _as_terms says.

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
        A = _factor(lora_A, A_r, A_i, r, i, rank, inputs)
    dA = tl.zeros((RANK_STEP, BI), tl.float32)
    begin, end = span * SPAN, min(span * SPAN + SPAN, outputs)
    if MASKED:
        bits = _load_bits(mask, mask_o, begin + tl.arange(0, BO), i_byte, outputs, inputs, False, False)
    for start in range(begin, end, BO):
        o = start + tl.arange(0, BO)
        inside = (o < outputs)[:, None] & i_inside[None, :]
        g = tl.load(G + o.to(tl.int64)[:, None] * inputs + i[None, :], mask=inside, other=0.0)
        if MASKED:
            kept = _expand(bits, BO, BI)
            bits = _load_bits(mask, mask_o, o + BO, i_byte, outputs, inputs, False, False)
        else:
            w = weight + o.to(tl.int64)[:, None] * w_o + i.to(tl.int64)[None, :] * w_i
            kept = tl.load(w, mask=inside, other=0.0) != 0
        g = tl.where(kept, g, 0.0)
        high, low = _as_terms(g, LOW, TERMS)
        if A_parts is not None:
            B = _factor(lora_B, B_r, B_o, r, o, rank, outputs)
            dA = _thin_product(B, high, low, dA, TERMS, PRECISION)
        if B_parts is not None:
            dB = _thin_product(A, high.T, low.T, tl.zeros((RANK_STEP, BO), tl.float32), TERMS, PRECISION)
            _store_share(B_parts, i_tile, dB, r, o, rank, outputs)
    if A_parts is not None:
        _store_share(A_parts, span, dA, r, i, rank, inputs)


@triton.jit
def _sum_parts(parts, n, count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements n of the sum of parts (count, size), PARTS at a time so that as many loads are under way."""
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        tile = parts + part.to(tl.int64)[:, None] * size + n[None, :]
        sums += tl.sum(tl.load(tile, mask=(part < count)[:, None] & (n < size)[None, :], other=0.0), 0)
    return sums


@triton.jit
def sum_kernel(
    A_parts, B_parts, dA, dB, A_count, B_count, inputs, outputs, rank, factor,
    ACCUMULATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dA (rank, inputs) (+)= factor * the sum of A_parts (A_count, rank, inputs), and dB (outputs, rank) = that of
    B_parts (B_count, rank, outputs), always in the same order. Either pair may be None.
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


@triton.jit(do_not_specialize=["seed"])
def drop_kernel(drop, tokens, width, seed, threshold, BT: tl.constexpr, BYTES: tl.constexpr):
    """The dropout mask (tokens, width) packed like a weight mask: 1 = kept.

    Column 8j + b of row t is kept if half word b of Philox4x32-10(key = seed, counter = (j, t, 0, 0)) is at least
    ``threshold``; half word b is the low (b < 4) or the high half of output b % 4. A function of seed, row and column
    alone, whatever the tile sizes, so that the backward pass replays it.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    zero = tl.zeros((BT, BYTES), dtype=tl.uint32)
    words = tl.philox(seed, zero + byte[None, :].to(tl.uint32), zero + t[:, None].to(tl.uint32), zero, zero)
    bits = tl.zeros((BT, BYTES), dtype=tl.uint8)
    for b in tl.static_range(4):
        bits |= ((words[b] & 0xFFFF) >= threshold).to(tl.uint8) << b
        bits |= ((words[b] >> 16) >= threshold).to(tl.uint8) << (b + 4)
    inside = (t < tokens)[:, None] & (byte < width)[None, :]
    tl.store(drop + t.to(tl.int64)[:, None] * width + byte[None, :], bits, mask=inside)
