"""Grouped masked-LoRA linear on a GPU: W_eff of every group composed into one stack, and the vendor's grouped GEMMs.

Of the composed stack, and of the stack of G in the backward pass, ``groups.STACK_BYTES`` exist at a time. One launch
composes all groups, and one projects all of G: with 128 experts, a launch for each costs the host more than the GPU
works.

Only bf16 has a grouped GEMM that waits for nothing, on GPUs of the compute capabilities 9 and 10; on others torch has a
loop in its place. Groups of other types, on other GPUs, of ranks above ``DIRECT_RANK``, and of sizes that the
GEMM cannot read by 16 bytes, are computed one after another (masked_lora/triton).

Weights that do not lie in one stack are copied at every call: ``groups.as_stack`` says when they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from losa_kernels import settings
from losa_kernels.dispatch import interpreted
from losa_kernels.grouped_masked_lora import groups as limits
from losa_kernels.grouped_masked_lora import one_by_one
from losa_kernels.grouped_masked_lora.groups import Gradients, Groups, as_stack, may_multiply_together
from losa_kernels.masked_lora import triton as single
from losa_kernels.masked_lora.triton import kernels, projection, tuning
from losa_kernels.masked_lora.triton.launch import RANK_STEP, TRITON_DTYPE, padded, start_kernel
from losa_kernels.masked_lora.triton.tuning import Tile, ceil_div

ARCHITECTURES = (9, 10)


@triton.jit
def compose_groups_kernel(
    weight, mask, lora_A, lora_B, composed,
    rows, depth, w_g, w_m, w_k, mask_g, mask_o, scaling,
    RANK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """composed (groups, rows, depth) = M * (W + s B A) of each group, by ``kernels.compose_kernel``; the second axis of
    the grid is the group. lora_A (groups, RANK, depth), lora_B (groups, rows, RANK) and composed are contiguous."""
    group = tl.program_id(1).to(tl.int64)
    kernels.compose_kernel(
        weight + group * w_g, mask + group * mask_g, lora_B + group * rows * RANK, lora_A + group * RANK * depth,
        composed + group * rows * depth, None,
        rows, depth, w_m, w_k, mask_o, RANK, 1, depth, 1, scaling,
        RANK, 0, 1, True, WHOLE, PRECISION, BM, BK,
    )  # fmt: skip


@triton.jit
def project_groups_kernel(
    G, mask, lora_A, lora_B, A_parts, B_parts,
    outputs, inputs, rank, mask_g, mask_o, A_share, B_share,
    R: tl.constexpr, RANK_STEP: tl.constexpr, LOW: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Shares of dA and dB^T of each group, by ``projection.project_given_kernel``; the second axis of the grid is the
    group. G (groups, outputs, inputs) and the factors are contiguous; a group's shares lie A_share or B_share numbers
    behind those of the group before. A_parts or B_parts may be None."""
    group = tl.program_id(1).to(tl.int64)
    # The outer conditions are decided by the compiler.
    if A_parts is not None:
        A_parts += group * A_share
    if B_parts is not None:
        B_parts += group * B_share
    projection.project_given_kernel(
        G + group * outputs * inputs, None, mask + group * mask_g, lora_A + group * rank * inputs,
        lora_B + group * outputs * rank, A_parts, B_parts,
        outputs, inputs, rank, 0, 0, mask_o, inputs, 1, rank, 1,
        R, RANK_STEP, True, LOW, TERMS, PRECISION, BO, BI, SPAN,
    )  # fmt: skip


def forward(x: Tensor, ends: Tensor, groups: Groups) -> Tensor:
    """y (rows, out) in x's dtype; 0 in rows of no group."""
    if not _together(x, groups):
        return one_by_one.forward(single.forward, x, ends, groups)
    with torch.cuda.device_of(x):
        x = _by_16_bytes(x)
        parts = [
            _product(x[rows], _composed(some, _Stack.of(some), x.dtype).mT, offs)
            for some, rows, offs in _stacks(x, ends, groups, 0)
        ]
        y = _with_rest(parts, len(x))
        if groups.biases:
            y += torch.stack([bias.to(y.dtype) for bias in groups.biases])[_groups_of(len(x), ends)]
        return y.masked_fill_(_of_none(len(x), ends), 0)


def backward(grad_y: Tensor, x: Tensor | None, ends: Tensor, groups: Groups, needs: list[bool]) -> Gradients:
    """Gradients of x, lora_A and lora_B in their dtypes, and of biases in fp32; of ``reference.backward``."""
    if not _together(grad_y, groups):
        return one_by_one.backward(single.backward, grad_y, x, ends, groups, needs)
    needs_x, needs_A, needs_B, needs_bias = needs
    with torch.cuda.device_of(grad_y):
        dy = _by_16_bytes(grad_y)
        given = None if x is None else _by_16_bytes(x)
        dx_parts: list[Tensor] = []
        dA: list[Tensor] = []
        dB: list[Tensor] = []
        for some, rows, offs in _stacks(dy, ends, groups, _share_bytes(groups) if needs_A or needs_B else 0):
            stack = _Stack.of(some)
            if needs_x:
                dx_parts.append(_product(dy[rows], _composed(some, stack, dy.dtype), offs))
            if needs_A or needs_B:
                assert given is not None
                G = _product(dy[rows].mT, given[rows], offs)
                A_gradients, B_gradients = _projected(G, some, stack, needs_A, needs_B)
                dA += A_gradients
                dB += B_gradients
        dx = _with_rest(dx_parts, len(dy)).masked_fill_(_of_none(len(dy), ends), 0) if needs_x else None
        d_bias = list(_sums(dy, ends)) if needs_bias else None
    return dx, dA if needs_A else None, dB if needs_B else None, d_bias


def _together(rows: Tensor, groups: Groups) -> bool:
    """Whether a grouped GEMM computes these rows."""
    # The interpreter computes bf16 wrongly; the CPU's grouped GEMM takes fp16 as well.
    dtype = torch.bfloat16 if interpreted() and rows.dtype == torch.float16 else rows.dtype
    here = interpreted() or tuning.architecture(rows.device) // 10 in ARCHITECTURES
    wide = torch.float64 in (groups.weights[0].dtype, groups.lora_A[0].dtype, groups.lora_B[0].dtype)
    return (
        here and len(rows) > 0 and not wide and may_multiply_together(dtype, max(map(len, groups.lora_A)), groups.shape)
    )


def _stacks(rows: Tensor, ends: Tensor, groups: Groups, shares: int) -> Iterator[tuple[Groups, slice, Tensor]]:
    """Groups whose stack takes ``STACK_BYTES``, and whose ``shares``, bytes of each group, take no more; their rows,
    and where each group ends among these, int32. The host waits for the device where there are several stacks."""
    count, (outputs, inputs) = len(groups.weights), groups.shape
    size = max(rows.element_size() * outputs * inputs, shares)
    step = max(1, limits.STACK_BYTES // size)
    if step >= count:
        yield groups, slice(0, len(rows)), ends.to(torch.int32)
        return
    places = [0, *ends.tolist()]
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield (
            groups.some(start, stop),
            slice(places[start], places[stop]),
            (ends[start:stop] - places[start]).to(torch.int32),
        )


def _share_bytes(groups: Groups) -> int:
    """Of the shares of one group's gradients of A and B."""
    (outputs, inputs), rank, tile = groups.shape, max(map(len, groups.lora_A)), tuning.project_given_tiles(1)[0]
    return 4 * rank * (ceil_div(outputs, tile.step) * inputs + ceil_div(inputs, tile.columns) * outputs)


def _product(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """torch's grouped GEMM, which takes no matrices without rows."""
    if left.numel() and right.numel():
        return F.grouped_mm(left, right, offs=offs)
    shape = (len(left), right.shape[-1])
    return left.new_zeros(shape if right.dim() == 3 else (len(offs), *shape))


def _with_rest(parts: list[Tensor], rows: int) -> Tensor:
    """The parts one after another, and rows up to ``rows``, which hold anything."""
    if len(parts) == 1 and len(parts[0]) == rows:
        return parts[0]
    missing = rows - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_empty(missing, parts[0].shape[1])])


def _groups_of(rows: int, ends: Tensor) -> Tensor:
    """The group of every row (rows,); rows of no group have the last one."""
    ends = ends.to(torch.int64)
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True).clamp_max(len(ends) - 1)


def _sums(matrix: Tensor, ends: Tensor) -> Tensor:
    """The sum of every group's rows (groups, columns), fp32, in an order that is always the same."""
    bounds = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(matrix))]).to(torch.int64)
    return torch.segment_reduce(matrix.float(), "sum", lengths=bounds.diff(), axis=0, unsafe=True)[:-1]


def _of_none(rows: int, ends: Tensor) -> Tensor:
    return (torch.arange(rows, device=ends.device) >= ends[-1])[:, None]


def _by_16_bytes(matrix: Tensor) -> Tensor:
    """The matrix, in memory that the grouped GEMM can read; a contiguous one may begin anywhere, and a row of one may
    have any stride."""
    rows, columns = matrix.stride()
    if columns == 1 and rows >= matrix.shape[1] and rows % 8 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(groups, ...): a view where the tensors lie in one stack, else a copy."""
    stack = as_stack(tensors)
    return torch.stack(list(tensors)) if stack is None else stack


class _Stack(NamedTuple):
    """What both passes read of all groups beside the weights: ``mask`` (groups, out, ceil(in / 8)), bytes of a row side
    by side; ``A`` (groups, r, in) and ``B`` (groups, out, r), fp32 and contiguous, with zeros where a group has a
    smaller rank."""

    mask: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, groups: Groups) -> _Stack:
        mask, A, B = _stacked(groups.masks), list(groups.lora_A), list(groups.lora_B)
        mask = mask if mask.stride(2) == 1 else mask.contiguous()
        if len({len(each) for each in A}) == 1:
            return cls(mask, torch.stack(A).float(), torch.stack(B).float())
        padded_A = torch.nn.utils.rnn.pad_sequence(A, batch_first=True)
        padded_B = torch.nn.utils.rnn.pad_sequence([each.T for each in B], batch_first=True).mT
        return cls(mask, padded_A.float().contiguous(), padded_B.float().contiguous())


def _composed(groups: Groups, stack: _Stack, dtype: torch.dtype) -> Tensor:
    """W_eff of every group, rounded once to ``dtype``: (groups, out, in), contiguous."""
    weight, (mask, A, B) = _stacked(groups.weights), stack
    count, rows, depth = weight.shape
    composed = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    tile = tuning.compose_tile(tuning.architecture(weight.device), rows, depth, True, False)
    start_kernel(
        compose_groups_kernel, (ceil_div(rows, tile.rows) * ceil_div(depth, tile.columns), count), tile,
        weight=weight, mask=mask, lora_A=A, lora_B=B, composed=composed, rows=rows, depth=depth,
        w_g=weight.stride(0), w_m=weight.stride(1), w_k=weight.stride(2), mask_g=mask.stride(0), mask_o=mask.stride(1),
        scaling=groups.scaling, RANK=A.shape[1],
        WHOLE=rows % tile.rows == 0 and depth % tile.columns == 0, PRECISION=settings.TRITON_FP32(),
        BM=tile.rows, BK=tile.columns,
    )  # fmt: skip
    return composed


def _projected(
    G: Tensor, groups: Groups, stack: _Stack, needs_A: bool, needs_B: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """dA = s B^T (M * G) and dB = s (M * G) A^T of every group, G (groups, out, in); empty where not needed."""
    (mask, A, B), device, G = stack, G.device, G.contiguous()
    (count, outputs, inputs), rank, R = G.shape, A.shape[1], padded(A.shape[1])

    def empty(*shape: int) -> Tensor:
        return torch.empty(count, *shape, dtype=torch.float32, device=device)

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        spans, tiles_i = ceil_div(outputs, tile.step), ceil_div(inputs, tile.columns)
        A_parts = empty(spans, rank, inputs) if needs_A else None
        B_parts = empty(tiles_i, rank, outputs) if needs_B else None
        start_kernel(
            project_groups_kernel, (spans * tiles_i * (R // RANK_STEP), count), tile,
            G=G, mask=mask, lora_A=A, lora_B=B, A_parts=A_parts, B_parts=B_parts,
            outputs=outputs, inputs=inputs, rank=rank, mask_g=mask.stride(0), mask_o=mask.stride(1),
            A_share=spans * rank * inputs, B_share=tiles_i * rank * outputs,
            R=R, RANK_STEP=RANK_STEP, LOW=TRITON_DTYPE[G.dtype], TERMS=1, PRECISION=settings.TRITON_FP32(),
            BO=tile.rows, BI=tile.columns, SPAN=tile.step,
        )  # fmt: skip
        return A_parts, B_parts

    key = (count, outputs, inputs, R, G.dtype, *tuning.words(A=needs_A, B=needs_B))
    tiles = tuning.project_given_tiles(1)
    A_parts, B_parts = tuning.tuned("gradients of grouped A and B", key, tiles, device, run)
    dA = [] if A_parts is None else list(A_parts.sum(1).mul_(groups.scaling))
    dB = [] if B_parts is None else list(B_parts.sum(1).mul_(groups.scaling).mT)
    own_A = [gradient[: len(own)].to(own.dtype) for gradient, own in zip(dA, groups.lora_A, strict=False)]
    own_B = [gradient[:, : own.shape[1]].to(own.dtype) for gradient, own in zip(dB, groups.lora_B, strict=False)]
    return own_A, own_B
