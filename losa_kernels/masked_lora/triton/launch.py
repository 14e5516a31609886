"""Launchers, one for each kernel of kernels.py and projection.py; __init__.py composes them into the operators.

``LOSA_TRITON_FP32`` says how fp32 operands are multiplied: ``ieee`` is exact and runs on the fp32 units; ``tf32x3`` is
three TF32 products on tensor cores, which keep about 21 bits. It does not concern fp16 and bf16 operands.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from losa_kernels import settings
from losa_kernels.dispatch import interpreted
from losa_kernels.masked_lora.layer import DIRECT_RANK, Layer
from losa_kernels.masked_lora.triton import kernels, projection, tuning
from losa_kernels.masked_lora.triton.tuning import Tile, ceil_div, next_power_of_2

PARTIAL_BYTES = 32 << 20  # shares of dA and dB in memory at a time
G_BYTES = 128 << 20  # of G at a time, where the vendor's GEMM makes it
GROUP = 8  # strips of W that programs in flight share
LONGEST = 128  # rows of the tallest tile
RANK_STEP = 16  # components of the adapter at a time: the factors of more would not fit the registers

Gradients = tuple[Tensor | None, Tensor | None]  # of A and of B, or shares of both


def linear(
    x: Tensor,
    layer: Layer,
    bias: Tensor | None,
    drop: Tensor | None,
    dropout_p: float,
    transposed: bool,
) -> Tensor:
    """x (tokens, in) W_eff^T + bias; ``transposed``: x (tokens, out) W_eff, for the gradient of the input."""
    A_terms, B_terms = split(layer, x.dtype)
    # The weight (rows, depth) of this product with its left factor (terms, rows) and its right one (terms, depth).
    weight, left, right = (layer.weight.T, A_terms, B_terms) if transposed else (layer.weight, B_terms, A_terms)
    mask, (tokens, depth), rows = layer.mask, x.shape, weight.shape[0]
    head, tail = tuning.inner_split(right.shape[0])
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    dropout = "none" if drop is None else "output" if transposed else "input"
    wide, arch = x.dtype == torch.float32, tuning.architecture(x.device)

    def run(tile: Tile) -> None:
        start_kernel(
            kernels.linear_kernel,
            ceil_div(rows, tile.rows) * ceil_div(tokens, tile.columns), tile,
            x=x, weight=weight, mask=mask, left=left, right=right, bias=bias, y=y, drop=drop,
            tokens=tokens, rows=rows, depth=depth,
            x_t=x.stride(0), x_k=x.stride(1), w_m=weight.stride(0), w_k=weight.stride(1),
            mask_o=_row_stride(mask), left_r=left.stride(0), right_r=right.stride(0), y_t=y.stride(0),
            drop_t=_row_stride(drop), scaling=layer.scaling, drop_scale=drop_scale(dropout_p), one=1.0,
            HEAD=head, TAIL=tail, MASKED=mask is not None, TRANSPOSED=transposed, DROPOUT=dropout,
            PRECISION=settings.TRITON_FP32(), WHOLE_M=rows % tile.rows == 0, WHOLE_K=depth % tile.step == 0,
            BM=tile.rows, BT=tile.columns, BK=tile.step, GROUP=GROUP,
        )  # fmt: skip

    aligned = _aligned(x, weight)
    words = tuning.words(mask=mask is not None, transposed=transposed, dropout=drop is not None, aligned=aligned)
    key = (next_power_of_2(tokens), rows, depth, head + tail, x.dtype, weight.dtype, *words)
    whole = rows % LONGEST == 0 and depth % 64 == 0
    tiles = tuning.linear_tiles(arch, tokens, head + tail, wide, drop is not None, aligned, whole)
    tuning.tuned("product", key, tiles, x.device, run)
    return y


def compose(
    layer: Layer,
    dtype: torch.dtype,
    apart: bool = False,
    terms_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """M * (W + s B A) (out, in), rounded once to ``dtype``, and None; or, ``apart``, M * W and M * (s B A)."""
    weight, mask, lora_A, lora_B, scaling = layer
    composed = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    adapter = torch.empty_like(composed) if apart else None
    rows, depth = weight.shape
    rank, low = lora_A.shape[0], terms_dtype or dtype
    direct = rank <= DIRECT_RANK
    tile = tuning.compose_tile(tuning.architecture(weight.device), rows, depth, direct, low == torch.float32)
    if direct:
        left, right, inner, step = lora_B, lora_A.T, 0, 1
    else:
        A_terms, B_terms = split(layer, low)
        left, right, (head, tail) = B_terms.T, A_terms.T, tuning.inner_split(A_terms.shape[0])
        inner, step = head + tail, min(tail or head, 32)
    start_kernel(
        kernels.compose_kernel, ceil_div(rows, tile.rows) * ceil_div(depth, tile.columns), tile,
        weight=weight, mask=mask, left=left, right=right, composed=composed, adapter=adapter,
        rows=rows, depth=depth, w_m=weight.stride(0), w_k=weight.stride(1), mask_o=_row_stride(mask),
        left_m=left.stride(0), left_r=left.stride(1), right_r=right.stride(1), right_k=right.stride(0),
        scaling=scaling, RANK=rank if direct else 0, INNER=inner, STEP=step, MASKED=mask is not None,
        WHOLE=rows % tile.rows == 0 and depth % tile.columns == 0, PRECISION=settings.TRITON_FP32(),
        BM=tile.rows, BK=tile.columns,
    )  # fmt: skip
    return composed, adapter


def split(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of B A as sums of terms for products in ``dtype``: A (inner, in), B^T (inner, out), see split_kernel.

    inner = HEAD + TAIL >= terms * rank. Rows are padded with zeros to whole tiles, so that no load of them is guarded.
    """
    lora_A, lora_B = layer.lora_A, layer.lora_B
    rank, inner, (terms, low) = lora_A.shape[0], inner_size(layer, dtype), _terms(layer, dtype)
    A_terms, B_terms = (
        torch.empty(inner, LONGEST * ceil_div(n, LONGEST), dtype=low, device=lora_A.device)
        for n in (lora_A.shape[1], lora_B.shape[0])
    )
    rows, block = 16, 128
    grid = (ceil_div(max(A_terms.shape[1], B_terms.shape[1]), block), inner // rows, 2)
    start_kernel(
        kernels.split_kernel, grid, Tile(rows, block, 0, 4, 1),
        lora_A=lora_A, lora_B=lora_B, A_terms=A_terms, B_terms=B_terms,
        inputs=lora_A.shape[1], outputs=lora_B.shape[0], rank=rank,
        A_r=lora_A.stride(0), A_i=lora_A.stride(1), B_o=lora_B.stride(0), B_r=lora_B.stride(1),
        A_terms_r=A_terms.stride(0), B_terms_r=B_terms.stride(0), TERMS=terms, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return A_terms, B_terms


def draw(tokens: int, features: int, p: float, seed: int, device: torch.device) -> Tensor | None:
    """The packed dropout mask, uint8 (tokens, ceil(features / 8)), 1 = kept; None if nothing is dropped."""
    if _threshold(p) == 0:
        return None
    drop = torch.empty(tokens, ceil_div(features, 8), dtype=torch.uint8, device=device)
    block = Tile(16, 64, 0, 4, 1)
    grid = (ceil_div(tokens, block.rows), ceil_div(drop.shape[1], block.columns))
    start_kernel(
        kernels.drop_kernel, grid, block,
        drop=drop, tokens=tokens, width=drop.shape[1], seed=seed, threshold=_threshold(p),
        BT=block.rows, BYTES=block.columns,
    )  # fmt: skip
    return drop


def keep(rows: Tensor, drop: Tensor, out: Tensor | None = None) -> Tensor:
    """rows (tokens, features) where ``drop`` keeps them, else 0, in ``out``, which may be rows and is contiguous."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if out is None else out
    tokens, width = rows.shape
    block = tuning.KEEP
    start_kernel(
        kernels.keep_kernel, (ceil_div(tokens, block.rows), ceil_div(width, block.columns)), block,
        source=rows, drop=drop, target=out, tokens=tokens, width=width,
        source_t=rows.stride(0), source_i=rows.stride(1), drop_t=drop.stride(0), BT=block.rows, BI=block.columns,
    )  # fmt: skip
    return out


def project(
    dy: Tensor,
    x: Tensor,
    layer: Layer,
    drop: Tensor | None,
    needs_A: bool,
    needs_B: bool,
) -> Gradients:
    """dA = s B^T (M * G) and dB = s (M * G) A^T with G = dY^T drop(x), in slices of the rows of G.

    Memory beyond the results: PARTIAL_BYTES, and G_BYTES where the vendor's GEMM makes G; or what one strip of tiles
    takes, if that is more. The vendor's GEMM also takes a dropped copy of x.
    """
    weight, mask, lora_A, lora_B, scaling = layer
    (outputs, inputs), (rank, tokens), device = weight.shape, (lora_A.shape[0], x.shape[0]), weight.device
    if tokens == 0:
        return lora_A.new_zeros(lora_A.shape) if needs_A else None, lora_B.new_zeros(lora_B.shape) if needs_B else None
    wide, arch, G_dtype = x.dtype == torch.float32, tuning.architecture(device), _product_dtype(x.dtype)

    def slices(rows: Tensor, in_registers: bool, tiles: tuple[Tile, ...], terms: int) -> Gradients:
        dA = torch.empty(lora_A.shape, dtype=torch.float32, device=device) if needs_A else None
        dB = torch.empty(lora_B.shape, dtype=torch.float32, device=device) if needs_B else None
        strip = tiles[0].rows if in_registers else tiles[0].step
        shares = 4 * rank * (inputs * needs_A + strip * ceil_div(inputs, tiles[0].columns) * needs_B)
        strips = PARTIAL_BYTES // shares
        if not in_registers:
            strips = min(strips, G_BYTES // (G_dtype.itemsize * inputs * strip))
        step = max(1, strips) * strip
        for start in range(0, outputs, step):
            sliced, dy_part, dB_part = layer, dy, dB
            # A slice of everything is skipped: it costs the host microseconds.
            if step < outputs:
                part = slice(start, min(start + step, outputs))
                sliced = Layer(weight[part], None if mask is None else mask[part], lora_A, lora_B[part], scaling)
                dy_part, dB_part = dy[:, part], None if dB is None else dB[part]
            if in_registers:
                A_parts, B_parts = _project(dy_part, rows, sliced, drop, needs_A, needs_B, terms, tiles)
            else:
                G = _product(dy_part.T, rows, G_dtype)
                A_parts, B_parts = _project_given(G, sliced, needs_A, needs_B, terms, tiles)
            _sum(A_parts, B_parts, dA, dB_part, scaling, accumulate=start > 0)
        return dA, dB

    def fused() -> Gradients:
        return slices(x, True, tuning.project_tiles(arch, wide, _aligned(dy, x)), 0 if wide else 2)

    def composed() -> Gradients:
        terms = 0 if wide else 2 if G_dtype == torch.float32 else 1
        return slices(x if drop is None else keep(x, drop), False, tuning.project_given_tiles(terms), terms)

    words = tuning.words(mask=mask is not None, dropout=drop is not None, A=needs_A, B=needs_B)
    key = (next_power_of_2(tokens), outputs, inputs, rank, x.dtype, *words)
    predicted = tuning.fused_projection(tokens, outputs, inputs, G_dtype.itemsize, arch)
    dA, dB = tuning.by_way("gradients of A and B", key, wide, device, predicted, fused, composed)
    return None if dA is None else dA.to(lora_A.dtype), None if dB is None else dB.to(lora_B.dtype)


def _project(
    dy: Tensor,
    x: Tensor,
    layer: Layer,
    drop: Tensor | None,
    needs_A: bool,
    needs_B: bool,
    terms: int,
    tiles: tuple[Tile, ...],
) -> Gradients:
    """Shares of dA (shares, rank, in) and of dB^T (shares, rank, rows of the slice), G formed in registers."""
    weight, mask, lora_A, lora_B, _ = layer
    (outputs, inputs), tokens, rank, device = weight.shape, x.shape[0], lora_A.shape[0], weight.device
    arch, R = tuning.architecture(device), padded(rank)

    def run(tile: Tile) -> Gradients:
        tiles_o, tiles_i = ceil_div(outputs, tile.rows), ceil_div(inputs, tile.columns)
        splits = _token_splits(tiles_o * tiles_i, tokens, arch)
        split_tokens = ceil_div(ceil_div(tokens, tile.step), splits) * tile.step
        A_parts, B_parts = _shares(tiles_o * splits, tiles_i * splits, weight, rank, needs_A, needs_B)
        start_kernel(
            projection.project_kernel, tiles_o * tiles_i * splits, tile,
            dy=dy, x=x, weight=weight, mask=mask, lora_A=lora_A, lora_B=lora_B, drop=drop,
            A_parts=A_parts, B_parts=B_parts,
            tokens=tokens, outputs=outputs, inputs=inputs, rank=rank, splits=splits, split_tokens=split_tokens,
            dy_t=dy.stride(0), dy_o=dy.stride(1), x_t=x.stride(0), x_i=x.stride(1),
            w_o=weight.stride(0), w_i=weight.stride(1), mask_o=_row_stride(mask),
            A_r=lora_A.stride(0), A_i=lora_A.stride(1), B_o=lora_B.stride(0), B_r=lora_B.stride(1),
            drop_t=_row_stride(drop), one=1.0, R=R, RANK_STEP=RANK_STEP,
            MASKED=mask is not None, DROPOUT=drop is not None,
            LOW=TRITON_DTYPE[_low_dtype()], TERMS=terms, PRECISION=settings.TRITON_FP32(),
            BO=tile.rows, BI=tile.columns, BT=tile.step, GROUP=GROUP,
        )  # fmt: skip
        return A_parts, B_parts

    words = tuning.words(mask=mask is not None, dropout=drop is not None, aligned=_aligned(dy, x), A=needs_A, B=needs_B)
    key = (next_power_of_2(tokens), outputs, inputs, R, x.dtype, *words)
    return tuning.tuned("gradients of A and B in registers", key, tiles, device, run)


def _project_given(
    G: Tensor, layer: Layer, needs_A: bool, needs_B: bool, terms: int, tiles: tuple[Tile, ...]
) -> Gradients:
    """The same of G (rows of the slice, in), contiguous, which goes into the products in ``terms`` terms."""
    weight, mask, lora_A, lora_B, _ = layer
    (outputs, inputs), rank = weight.shape, lora_A.shape[0]
    R = padded(rank)

    def run(tile: Tile) -> Gradients:
        spans, tiles_i = ceil_div(outputs, tile.step), ceil_div(inputs, tile.columns)
        A_parts, B_parts = _shares(spans, tiles_i, weight, rank, needs_A, needs_B)
        start_kernel(
            projection.project_given_kernel, spans * tiles_i * (R // RANK_STEP), tile,
            G=G, weight=weight, mask=mask, lora_A=lora_A, lora_B=lora_B, A_parts=A_parts, B_parts=B_parts,
            outputs=outputs, inputs=inputs, rank=rank,
            w_o=weight.stride(0), w_i=weight.stride(1), mask_o=_row_stride(mask),
            A_r=lora_A.stride(0), A_i=lora_A.stride(1), B_o=lora_B.stride(0), B_r=lora_B.stride(1),
            R=R, RANK_STEP=RANK_STEP, MASKED=mask is not None, TERMS=terms, PRECISION=settings.TRITON_FP32(),
            LOW=TRITON_DTYPE[_low_dtype() if G.dtype == torch.float32 else G.dtype],
            BO=tile.rows, BI=tile.columns, SPAN=tile.step,
        )  # fmt: skip
        return A_parts, B_parts

    key = (outputs, inputs, R, G.dtype, terms, *tuning.words(mask=mask is not None, A=needs_A, B=needs_B))
    return tuning.tuned("gradients of A and B from G", key, tiles, G.device, run)


def _shares(A_count: int, B_count: int, weight: Tensor, rank: int, needs_A: bool, needs_B: bool) -> Gradients:
    outputs, inputs = weight.shape

    def empty(count: int, features: int) -> Tensor:
        return torch.empty(count, rank, features, dtype=torch.float32, device=weight.device)

    return empty(A_count, inputs) if needs_A else None, empty(B_count, outputs) if needs_B else None


def _sum(
    A_parts: Tensor | None, B_parts: Tensor | None, dA: Tensor | None, dB: Tensor | None, factor: float,
    accumulate: bool,
) -> None:  # fmt: skip
    """dA (rank, in) (+)= factor * A_parts.sum(0) and dB (out, rank) = factor * B_parts.sum(0)^T."""
    given = [parts for parts in (A_parts, B_parts) if parts is not None]
    A_shape, B_shape = (given[0].shape if parts is None else parts.shape for parts in (A_parts, B_parts))
    rank, inputs, outputs = A_shape[1], A_shape[2], B_shape[2]
    tile = tuning.SUM
    start_kernel(
        projection.sum_kernel, (ceil_div(rank * max(p.shape[2] for p in given), tile.columns), 2), tile,
        A_parts=A_parts, B_parts=B_parts, dA=dA, dB=dB, A_count=A_shape[0], B_count=B_shape[0],
        inputs=inputs, outputs=outputs, rank=rank, factor=factor,
        ACCUMULATE=accumulate, PARTS=tile.rows, BLOCK=tile.columns,
    )  # fmt: skip


def start_kernel(kernel, grid: int | tuple[int, ...], tile: Tile, **arguments) -> None:
    """The one place that launches: tests/native/test_triton_aot.py records here what to compile."""
    grid = grid if isinstance(grid, tuple) else (grid,)
    if all(grid):
        kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def inner_size(layer: Layer, dtype: torch.dtype) -> int:
    """HEAD + TAIL: the inner side of the product B A when the main product runs in ``dtype``."""
    return sum(tuning.inner_split(_terms(layer, dtype)[0] * layer.lora_A.shape[0]))


def _terms(layer: Layer, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """How many terms the product B A takes, and in which dtype, when the main product runs in ``dtype``."""
    if dtype == torch.float32:
        return 1, torch.float32
    if layer.lora_A.dtype == layer.lora_B.dtype != torch.float32:
        return 1, layer.lora_A.dtype
    return 3, _low_dtype()


def _low_dtype() -> torch.dtype:
    """bf16 for its exponent; the interpreter computes bf16 wrongly, and its tests stay within fp16's range."""
    return torch.float16 if interpreted() else torch.bfloat16


TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def padded(rank: int) -> int:
    """The rank as a side of tl.dot."""
    return max(16, next_power_of_2(rank))


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of G when the vendor's GEMM makes it: bf16 as torch's own gradient, fp32 for fp16, which G may exceed."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if right.dtype == dtype:
        return torch.mm(left, right)
    if right.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _threshold(p: float) -> int:
    """Of 65536 equally likely half words, how many drop: at most all but one, so that something may be kept."""
    return min(round(p * 65536), 65535)


def drop_scale(p: float) -> float:
    """1 / (the share kept), by the share that is really dropped."""
    return 65536 / (65536 - _threshold(p))


def _token_splits(tiles: int, tokens: int, arch: int) -> int:
    """Into how many programs to divide the tokens: until the machine is full, or a share is 512 tokens."""
    return max(1, min(tuning.MACHINES[tuning.family(arch)].units // tiles, tokens // 512))


def _aligned(*matrices: Tensor) -> bool:
    """Whether they are read by 16 bytes: Triton knows of a stride whether it is 1 and whether 16 divides it."""
    return all(min(m.stride()) == 1 and max(m.stride()) % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)


def _row_stride(packed: Tensor | None) -> int:
    return 0 if packed is None else packed.stride(0)
