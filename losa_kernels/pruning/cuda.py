"""Selection and sweep on CUDA: csrc/cuda/{selection,pruning}, and trailing products of the vendor's.

``LOSA_TRAILING`` says how trailing products are computed. ``fp32``: in fp32, whatever torch's global precision is.
``3xtf32``: on tensor cores, from operands in two TF32 parts each, which leaves out at most 3 * 2^-22 of each product.
``auto``: the faster of the two at the first weight of a shape (``measured``), if ``3xtf32`` is as accurate on this
device as it should be; ``fp32`` where nothing may be measured. The blocks become one CUDA graph from the second call on
(``graph.py``; ``LOSA_SWEEP_GRAPH=0``: never).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from losa_kernels import measured, settings
from losa_kernels.pruning import blocks, reference
from losa_kernels.pruning.graph import CudaCapture, SweepGraphs
from losa_kernels.pruning.wanda import wanda_faults

WIDEST_BLOCK = 128  # columns that sweep_block takes
# Columns whose errors reach what is right of them in one product: four times as deep as a block's, it moves the rest of
# the weight a quarter as often.
PANEL = 512
GROUPS = (4, 8, 16)
LEFT_OUT = 3 * 2.0**-22  # of a product in TF32 parts, at most

graphs = SweepGraphs(CudaCapture())


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)); an fp32 ``weight`` is given up.

    The reference serves fp64, blocks that are wider than 128 columns or begin inside a byte of the mask, groups other
    than 4, 8 and 16, and weights of nothing.
    """
    if weight.numel() == 0:
        return reference.column_sweep(weight, factor, sparsity, keep_n, m, block_size, mask)
    if weight.dtype != torch.float32 or block_size > WIDEST_BLOCK or block_size % 8 or m not in (None, *GROUPS):
        return reference.column_sweep(weight, factor, sparsity, keep_n, m, block_size, mask)
    split = _trailing(weight, factor) == "3xtf32"

    counts = None if sparsity is None else blocks.block_counts(sparsity, weight, block_size, mask)

    def loop(
        weight: Tensor, factor: Tensor, mask: Tensor | None, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return blocks.column_sweep(
            weight, factor, None, keep_n, m, block_size, mask, panel=PANEL, split=split, counts=counts
        )

    with matmul_precision("tf32" if split else "ieee"):
        swept, kept, loss = graphs.run(
            loop, (weight, factor.contiguous(), mask, counts), (keep_n, m, block_size, split)
        )
    return swept, kept, loss


def _trailing(weight: Tensor, factor: Tensor) -> str:
    """How trailing products are computed: fp32 or 3xtf32."""
    setting = settings.TRAILING()
    if setting != "auto":
        return setting
    rows, columns = weight.shape
    if columns <= PANEL:
        return "fp32"

    # Half of the columns: as many as a panel's product has on average.
    def product(precision: str, upper: Tensor) -> None:
        errors = weight.new_zeros(rows, len(upper))
        with matmul_precision(precision):
            blocks.update_rest(weight.new_zeros(rows, columns - columns // 2), errors, upper[:, columns // 2 :])

    def plain() -> None:
        product("ieee", factor[:PANEL])

    def tensor_cores() -> None:
        check_3xtf32(weight.device)
        product("tf32", blocks.split_factor(factor[:PANEL], PANEL))

    candidates = {"fp32": plain, "3xtf32": tensor_cores}
    return measured.fastest("trailing product", (rows, columns), candidates, weight.device, "fp32")


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Packed mask by |W_ij| ||X_j||. The reference serves fp64 and groups other than 4, 8 and 16."""
    if weight.dtype not in blocks.NATIVE_WEIGHTS or m not in (None, *GROUPS) or weight.numel() == 0:
        return reference.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask)
    with wanda_faults.for_call(weight.device) as faults:
        return blocks.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask, faults)


@cache
def check_3xtf32(device: torch.device) -> None:
    """ArithmeticError unless a product in TF32 parts is nearly as accurate on the device as one in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    errors, upper = (torch.randn(256, PANEL, generator=generator, device=device) for _ in range(2))
    upper, exact = upper.T.contiguous(), errors.double() @ upper.T.double()
    high = blocks.rounded_to_tf32(errors)
    parts = torch.cat([high, high, blocks.rounded_to_tf32(errors - high)], 1)
    with matmul_precision("tf32"):
        split = parts @ blocks.split_factor(upper, PANEL)
    with matmul_precision("ieee"):
        plain = errors @ upper
    ours, theirs = (float((found - exact).norm() / exact.norm()) for found in (split, plain))
    if not ours <= 4 * theirs + LEFT_OUT:
        raise ArithmeticError(f"error {ours:.1e} of products in TF32 parts, {theirs:.1e} of fp32's")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's fp32 precision of CUDA products, "ieee" or "tf32", inside the block."""
    matmul = torch.backends.cuda.matmul
    before, medium = matmul.fp32_precision, _is_medium()
    changes = (before == "tf32") != (name == "tf32")
    if changes:
        # The older of two switches: it sets both, and torch refuses to work while they disagree.
        matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        if changes:
            matmul.allow_tf32 = before == "tf32"
            if medium:
                torch.set_float32_matmul_precision("medium")
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def _is_medium() -> bool:
    """Whether torch's global precision is "medium": on CUDA the same as "high", which the older switch stands for."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # its parts were set one by one
        return False
