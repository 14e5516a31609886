"""Triton kernels of the products with W_eff; launch.py launches them, projection.py has the other kernels.

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
``split_kernel`` lays out ahead, padded with zeros to HEAD + TAIL (tuning.inner_split): 32 for rank 8, 48 for rank 16.
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
    """The elements at the pointers ``tile`` [R, C], zeros outside.

    row_inside [R], column_inside [C]. A load has no predicate where the launcher knows that nothing is outside.
    """
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
def load_bits(packed, stride, row, byte, rows, columns, ROWS_WHOLE: tl.constexpr, COLUMNS_WHOLE: tl.constexpr):
    """Bytes [R, C / 8] at row [R] and byte [C / 8] of a packed mask (rows, ceil(columns / 8)), zeros outside."""
    tile = packed + row.to(tl.int64)[:, None] * stride + byte[None, :]  # [R, C / 8]
    return _load(tile, row < rows, byte < (columns + 7) // 8, ROWS_WHOLE, COLUMNS_WHOLE)


@triton.jit
def expand(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Packed bytes (ROWS, COLUMNS / 8) to bool (ROWS, COLUMNS).

    In 32 bits, where the test of a bit is one instruction. The bytes reach the registers that need them before they
    are spread, so that a warp exchanges a 16th of what it would for a mask as large as bf16 weights.
    """
    spread = bits[:, :, None].to(tl.int32) & (1 << tl.arange(0, 8))[None, None, :]  # [ROWS, COLUMNS / 8, 8]
    return tl.reshape(spread, (ROWS, COLUMNS)) != 0


@triton.jit
def two_terms(value, LOW: tl.constexpr):
    """(high, low) in a 16-bit dtype whose sum is value up to 2^-18 (bf16)."""
    high = value.to(LOW)
    return high, (value - high.to(tl.float32)).to(LOW)


@triton.jit
def accumulate(acc, left, right, one, PRECISION: tl.constexpr):
    """acc + left right.

    acc [M, N], left [M, K], right [K, N]. An fp32 product is summed apart before it is added: otherwise roundings pile
    up along the whole reduction (one chain of 1024 errs by 2.5 times what chains of 16 do). It is added by an fma with
    a ``one`` that the compiler does not know, because the compiler would turn a plain sum into the product's
    accumulator.
    """
    if left.dtype == tl.float32:
        product = tl.dot(left, right, input_precision=PRECISION)
        acc = tl.fma(product, tl.full(product.shape, one, tl.float32), acc)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _split_rows(source, target, source_r, source_n, target_r, features, rank, TERMS, LOW_TERM, r, n):
    """Row r of target is component r % rank of source: its low part in term LOW_TERM, else its high part.

    source (rank, features) and target (inner, target_r), rows r [ROWS] and columns n [BLOCK] of it.
    """
    term, component = r // rank, r % rank
    inside = (r < TERMS * rank)[:, None] & (n < features)[None, :]
    offset = component.to(tl.int64)[:, None] * source_r + n.to(tl.int64)[None, :] * source_n
    value = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    high, low = two_terms(value, target.dtype.element_ty)
    part = tl.where((term == LOW_TERM)[:, None], low, high)
    tl.store(target + r.to(tl.int64)[:, None] * target_r + n[None, :], part, mask=(n < target_r)[None, :])


@triton.jit
def split_kernel(
    lora_A, lora_B, A_terms, B_terms, inputs, outputs, rank,
    A_r, A_i, B_o, B_r, A_terms_r, B_terms_r,
    TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A_terms (inner, in) = [hi; hi; lo; 0] of A and B_terms (inner, out) = [hi; lo; hi; 0] of B^T.

    inner is HEAD + TAIL. One term, [hi; 0], serves factors that the dtype of the terms holds exactly.
    """
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(2) == 0:
        _split_rows(lora_A, A_terms, A_r, A_i, A_terms_r, inputs, rank, TERMS, 2, r, n)
    else:
        _split_rows(lora_B, B_terms, B_r, B_o, B_terms_r, outputs, rank, TERMS, 1, r, n)


@triton.jit
def _terms(factor, stride, n, start, SIZE: tl.constexpr):
    """Terms start to start + SIZE of columns n [N]; split_kernel padded both sides, so that no load is guarded."""
    r = start + tl.arange(0, SIZE)
    return tl.load(factor + r.to(tl.int64)[:, None] * stride + n[None, :])  # [SIZE, N]


@triton.jit
def _low_rank(left_head, left_tail, right, right_r, k, HEAD: tl.constexpr, TAIL: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """A tile [BM, BK] of B A in fp32, columns k [BK]; left_head [BM, HEAD], left_tail [BM, TAIL]."""
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

    # The left factor of this program's rows, for all steps.
    left_head = _terms(left, left_r, m, 0, HEAD).T  # [BM, HEAD]
    left_tail = left_head
    if TAIL > 0:
        left_tail = _terms(left, left_r, m, HEAD, TAIL).T  # [BM, TAIL]

    # Rows past the last token repeat it and are not stored.
    x_tile = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t  # [BT, 1]
    w_tile = weight + m.to(tl.int64)[:, None] * w_m  # [BM, 1]
    acc = tl.zeros((BM, BT), dtype=tl.float32)
    adapter_acc = tl.zeros((BM, BT), dtype=tl.float32)
    if MASKED:
        # Rows of bytes may be too ill aligned for asynchronous copies, hence one step ahead by hand.
        if TRANSPOSED:
            bits = load_bits(mask, mask_o, tl.arange(0, BK), m_byte, depth, rows, WHOLE_K, WHOLE_M)  # [BK, BM / 8]
        else:
            bits = load_bits(mask, mask_o, m, tl.arange(0, BK // 8), rows, depth, WHOLE_M, WHOLE_K)  # [BM, BK / 8]
    steps = tl.cdiv(depth, BK)
    for step in range(0, steps):
        following = min(step + 1, steps - 1)
        k = step * BK + tl.arange(0, BK)
        k_inside = k < depth
        x_block = _load(x_tile + k.to(tl.int64)[None, :] * x_k, t_inside, k_inside, True, WHOLE_K)  # [BT, BK]
        w = _load(w_tile + k.to(tl.int64)[None, :] * w_k, m_inside, k_inside, WHOLE_M, WHOLE_K)  # [BM, BK]
        # Which weights of the tile are kept [BM, BK]; the bytes of the next step are loaded already.
        if not MASKED:
            # The widened weight is compared: otherwise the compiler compares before threads exchange values, and they
            # exchange bools in addition to weights.
            kept = w.to(tl.float32) != 0
        elif TRANSPOSED:
            kept = tl.trans(expand(bits, BK, BM))
            o = following * BK + tl.arange(0, BK)
            bits = load_bits(mask, mask_o, o, m_byte, depth, rows, WHOLE_K, WHOLE_M)
        else:
            kept = expand(bits, BM, BK)
            byte = following * (BK // 8) + tl.arange(0, BK // 8)
            bits = load_bits(mask, mask_o, m, byte, rows, depth, WHOLE_M, WHOLE_K)
        # The tile of W_eff in registers, and its product with x.
        ba = _low_rank(left_head, left_tail, right, right_r, k, HEAD, TAIL, PRECISION)  # [BM, BK]
        if DROPOUT == "none":
            effective = tl.where(kept, w.to(tl.float32) + scaling * ba, 0.0).to(x_block.dtype)
            acc = accumulate(acc, effective, x_block.T, one, PRECISION)
        else:
            base = tl.where(kept, w, 0.0).to(x_block.dtype)
            adapter = tl.where(kept, scaling * drop_scale * ba, 0.0).to(x_block.dtype)
            acc = accumulate(acc, base, x_block.T, one, PRECISION)
            if DROPOUT == "input":
                x_byte = step * (BK // 8) + tl.arange(0, BK // 8)
                drop_bits = load_bits(drop, drop_t, t, x_byte, tokens, depth, False, WHOLE_K)  # [BT, BK / 8]
                dropped = tl.where(expand(drop_bits, BT, BK), x_block, 0.0)
                acc = accumulate(acc, adapter, dropped.T, one, PRECISION)
            else:
                adapter_acc = accumulate(adapter_acc, adapter, x_block.T, one, PRECISION)

    if DROPOUT == "output":
        drop_bits = load_bits(drop, drop_t, t, m_byte, tokens, rows, False, WHOLE_M)  # [BT, BM / 8]
        acc += tl.where(tl.trans(expand(drop_bits, BT, BM)), adapter_acc, 0.0)
    if bias is not None:
        acc += tl.load(bias + m, mask=m_inside, other=0.0).to(tl.float32)[:, None]  # [BM, 1]
    y_tile = y + t.to(tl.int64)[:, None] * y_t + m[None, :]  # [BT, BM]
    tl.store(y_tile, acc.T.to(y.dtype.element_ty), mask=t_inside[:, None] & m_inside[None, :])


@triton.jit
def _store(tile, values, row_inside, column_inside, WHOLE: tl.constexpr):
    """values [R, C] to the pointers ``tile``, as _load reads them."""
    if WHOLE:
        tl.store(tile, values)
    else:
        tl.store(tile, values, mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def compose_kernel(
    weight, mask, left, right, composed, adapter,
    rows, depth, w_m, w_k, mask_o, left_m, left_r, right_r, right_k,
    scaling,
    RANK: tl.constexpr, INNER: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """composed (rows, depth), contiguous = M * (W + s B A), one rounding to its dtype, +0.0 where pruned; or, if
    adapter (rows, depth) is not None, composed = M * W and adapter = M * (s B A).

    RANK > 0: left (rows, RANK) and right (RANK, depth) are B and A, multiplied in fp32 by the ordinary units: small
    ranks hide behind the memory, and tensor cores' sums would have to be exchanged to meet W. Else left (INNER, rows)
    and right (INNER, depth) are from split_kernel, INNER = HEAD + TAIL. WHOLE: no tile is ragged.
    """
    tiles_k = tl.cdiv(depth, BK)
    m_tile, k_tile = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    m, k = m_tile * BM + tl.arange(0, BM), k_tile * BK + tl.arange(0, BK)
    m_inside, k_inside = m < rows, k < depth
    w_tile = weight + m.to(tl.int64)[:, None] * w_m + k.to(tl.int64)[None, :] * w_k
    w = _load(w_tile, m_inside, k_inside, WHOLE, WHOLE)  # [BM, BK]
    if MASKED:
        byte = k_tile * (BK // 8) + tl.arange(0, BK // 8)
        kept = expand(load_bits(mask, mask_o, m, byte, rows, depth, WHOLE, WHOLE), BM, BK)  # [BM, BK]
    else:
        kept = w != 0
    ba = tl.zeros((BM, BK), dtype=tl.float32)
    # Without a loop, across which the compiler would not let the sums have the layout of W.
    for r in tl.static_range(RANK):
        b_tile, a_tile = left + m.to(tl.int64) * left_m + r * left_r, right + k.to(tl.int64) * right_k + r * right_r
        if WHOLE:
            b, a = tl.load(b_tile), tl.load(a_tile)  # [BM], [BK]
        else:
            b, a = tl.load(b_tile, mask=m_inside, other=0.0), tl.load(a_tile, mask=k_inside, other=0.0)
        ba += b.to(tl.float32)[:, None] * a.to(tl.float32)[None, :]
    if INNER > 0:
        for start in range(0, INNER, STEP):
            left_tile = _terms(left, left_r, m, start, STEP)  # [STEP, BM]
            right_tile = _terms(right, right_r, k, start, STEP)  # [STEP, BK]
            ba = tl.dot(left_tile.T, right_tile, ba, input_precision=PRECISION)
    place = m.to(tl.int64)[:, None] * depth + k[None, :]
    sums = scaling * ba
    if adapter is None:
        sums += w.to(tl.float32)
    else:
        base = tl.where(kept, w, 0.0).to(composed.dtype.element_ty)
        _store(composed + place, base, m_inside, k_inside, WHOLE)
    target = composed if adapter is None else adapter
    _store(target + place, tl.where(kept, sums, 0.0).to(target.dtype.element_ty), m_inside, k_inside, WHOLE)


@triton.jit
def keep_kernel(
    source, drop, target, tokens, width, source_t, source_i, drop_t, BT: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    """target (tokens, width), contiguous = source where the packed dropout mask keeps it, else +0.0. They may be the
    same tensor."""
    t, i = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BI + tl.arange(0, BI)
    byte = tl.program_id(1) * (BI // 8) + tl.arange(0, BI // 8)
    inside = (t < tokens)[:, None] & (i < width)[None, :]
    kept = expand(load_bits(drop, drop_t, t, byte, tokens, width, False, False), BT, BI)  # [BT, BI]
    tile = source + t.to(tl.int64)[:, None] * source_t + i.to(tl.int64)[None, :] * source_i
    values = tl.load(tile, mask=inside, other=0.0)  # [BT, BI]
    tl.store(target + t.to(tl.int64)[:, None] * width + i[None, :], tl.where(kept, values, 0.0), mask=inside)


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
    # Four words of 32 bits [BT, BYTES], a half word for every bit of a byte.
    words = tl.philox(seed, zero + byte[None, :].to(tl.uint32), zero + t[:, None].to(tl.uint32), zero, zero)
    bits = tl.zeros((BT, BYTES), dtype=tl.uint8)
    for b in tl.static_range(4):
        bits |= ((words[b] & 0xFFFF) >= threshold).to(tl.uint8) << b
        bits |= ((words[b] >> 16) >= threshold).to(tl.uint8) << (b + 4)
    inside = (t < tokens)[:, None] & (byte < width)[None, :]
    tl.store(drop + t.to(tl.int64)[:, None] * width + byte[None, :], bits, mask=inside)
