"""Wanda's mask by weights and the norms of their inputs, and when a GPU's kernel is asked what was wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.bitmask import pack_mask, packed_width, unpack_mask
from losa_kernels.pruning import reference
from losa_kernels.pruning.checks import check_problem


@torch.no_grad()
def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    mask: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """Packed mask by Wanda's score |W_ij| ||X_j|| (Sun et al. 2023).

    Exactly floor(sparsity * in) entries go per row, or m - keep_n of every m; ties lowest column first. ``whole``:
    floor(sparsity * out * in) entries of the matrix go, wherever they are; ties lowest row, then lowest column first.

    Args:
        weight: (out, in) floating point, finite; scores are taken in fp32 (fp64 for fp64), one that overflows is inf,
            with ``whole`` the largest number.
        input_norms: (in,) finite and non-negative in the scores' dtype, same device.
        sparsity: 0 <= s < 1; or keep_n of every m kept.
        mask: packed; what is pruned stays pruned and counts. A row, group or matrix that has lost more already keeps
            its zeros.
        whole: whether ``sparsity`` is of the matrix, and not of each row; then the values are looked at at once, also
            within ``checks_together``.

    Returns:
        packed uint8 (out, ceil(in/8)).

    Raises:
        ValueError: a bad argument, or non-finite values; names the argument.
    """
    sparsity, keep_n, m = check_problem(weight, sparsity, keep_n, m, mask)
    if whole and sparsity is None:
        raise ValueError(f"whole: expected a sparsity, whose count may be the matrix's; got {keep_n}:{m}")
    arguments.tensor("input_norms", input_norms)
    if tuple(input_norms.shape) != (weight.shape[1],):
        raise ValueError(f"input_norms: expected ({weight.shape[1]},), got {tuple(input_norms.shape)}")
    if input_norms.is_complex():
        raise ValueError(f"input_norms: expected real numbers, got {input_norms.dtype}")
    if input_norms.device != weight.device:
        raise ValueError(f"input_norms: expected on {weight.device} as weight, got {input_norms.device}")
    if weight.numel() == 0:
        reference.check_values(weight, input_norms)
        return weight.new_zeros(len(weight), packed_width(weight.shape[1]), dtype=torch.uint8)
    # The implementations look at the values: on CUDA the kernel does, and the host asks once everything is queued.
    if not whole:
        run = dispatch.implementation("wanda_mask", weight.device)
        return run(weight, input_norms, sparsity, keep_n, m, mask)
    reference.check_values(weight, input_norms)
    scores = reference.scores(weight, input_norms)
    # One row of weights, which must be finite.
    row = scores.clamp_(max=torch.finfo(scores.dtype).max).view(1, -1)
    select = selection_of_one_row(weight.device)
    return from_one_row(select(row, row.new_ones(row.numel()), sparsity, None, None, as_one_row(mask, weight)), weight)


def selection_of_one_row(device: torch.device) -> Callable[..., Tensor]:
    """The implementation of ``wanda_mask`` for a matrix as one row. CUDA's kernel gives a row to one block of threads:
    there torch's own selection takes the whole device."""
    return reference.wanda_mask if device.type == "cuda" else dispatch.implementation("wanda_mask", device)


def as_one_row(mask: Tensor | None, matrix: Tensor) -> Tensor | None:
    """The packed mask of a matrix for the same matrix as a single row."""
    return None if mask is None else pack_mask(unpack_mask(mask, matrix.shape[1]).view(1, -1))


def from_one_row(mask: Tensor, matrix: Tensor) -> Tensor:
    """The packed mask of a matrix that was one row, for the matrix."""
    return pack_mask(unpack_mask(mask, matrix.numel()).view(matrix.shape))


def checks_together() -> AbstractContextManager[None]:
    """Inside it ``wanda_mask`` on CUDA returns without waiting for the device. What it would have raised for values
    that are not finite, or negative norms, is raised at the end of the block, for the first such call; until then its
    mask means nothing."""
    return wanda_faults.together()


class Faults(threading.local):
    """What Wanda's kernel found wrong with its arguments: read after each call, or inside ``together`` once for all."""

    def __init__(self):
        self._zeros: dict[torch.device, Tensor] = {}
        self._waiting: list[tuple[torch.cuda.Stream, Tensor]] | None = None

    @contextmanager
    def for_call(self, device: torch.device) -> Iterator[Tensor]:
        """An int32 of zero for a kernel's faults, which are raised at the end of the block or left to ``together``."""
        if self._waiting is not None:
            faults = torch.zeros(1, dtype=torch.int32, device=device)
            yield faults
            self._waiting.append((torch.cuda.current_stream(device), faults))
            return
        # One that was read as zero serves again, so that no call fills one first.
        if device in self._zeros:
            faults = self._zeros.pop(device)
        else:
            with torch.inference_mode(False):  # made in inference mode it could not be written to outside
                faults = torch.zeros(1, dtype=torch.int32, device=device)
        yield faults
        reference.raise_faults(int(faults))
        self._zeros[device] = faults

    @contextmanager
    def together(self) -> Iterator[None]:
        """Calls inside return at once; ValueError at the end for the first that had something wrong."""
        if self._waiting is not None:
            yield
            return
        waiting: list[tuple[torch.cuda.Stream, Tensor]] = []
        self._waiting = waiting
        try:
            yield
        finally:
            self._waiting = None
        found = [0] * len(waiting)
        for stream in dict.fromkeys(stream for stream, _ in waiting):
            own = [index for index, (other, _) in enumerate(waiting) if other == stream]
            with torch.cuda.stream(stream):
                values = torch.cat([waiting[index][1] for index in own]).tolist()
            for index, value in zip(own, values, strict=True):
                found[index] = value
        for faults in found:
            reference.raise_faults(faults)


wanda_faults = Faults()
