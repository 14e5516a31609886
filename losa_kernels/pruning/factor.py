"""The inverse factor on CUDA: torch's Cholesky and an inverse by products, column blocks from the last to the first, or
in little memory (``losa_kernels.pruning.in_place``).

``LOSA_FACTOR=auto`` takes the faster of the first two at the first Hessian of a width (``measured``), and torch's where
nothing may be measured; a Hessian of more than ``TOGETHER`` is factored in place. None of them reads anything back
before its end, so that the Hessians of a block are factored on several streams at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losa_kernels import cuda_graphs, measured, settings
from losa_kernels.pruning.cuda import matmul_precision
from losa_kernels.pruning.graph import CudaCapture, SweepGraphs
from losa_kernels.pruning.in_place import flipped_cholesky, invert_upper_
from losa_kernels.pruning.reference import MAX_DAMPING, SingularHessianError, damped_diagonal, singular

LEAF = 128  # a diagonal block that torch inverts, all of them at once
BLOCK = 128  # columns that factor_panel takes
SLICE = 512  # columns of a triangle that are multiplied at once, without the zeros below them
STREAMS = 4  # on which the Hessians of a block are factored
# Bytes of Hessians that are factored at a time; each takes five times its own. A larger one is factored in place.
TOGETHER = 1 << 30

graphs = SweepGraphs(CudaCapture(), kept=STREAMS)

# (factor, whether it exists and is finite) of a Hessian with another diagonal
Attempt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by products, in a few launches.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]: all diagonal blocks of a size at once, sizes doubling.
    """
    n = len(upper)
    upper = upper.contiguous()
    inverse = torch.zeros_like(upper)
    whole = n // LEAF
    for count, first, size in ((whole, 0, LEAF), (1, whole * LEAF, n % LEAF)):
        if count and size:
            identity = torch.eye(size, dtype=upper.dtype, device=upper.device).expand(count, size, size)
            leaves = torch.linalg.solve_triangular(
                _diagonal(upper, count, first, first, size, size, LEAF), identity, upper=True
            )
            _diagonal(inverse, count, first, first, size, size, LEAF).copy_(leaves)
    half = LEAF
    while half < n:
        whole = n // (2 * half)
        _join(upper, inverse, whole, 0, half, half)
        # A last pair whose second block is smaller, if there is one.
        _join(upper, inverse, 1, 2 * half * whole, half, n - 2 * half * whole - half)
        half *= 2
    return inverse


def _join(upper: Tensor, inverse: Tensor, count: int, first: int, height: int, width: int) -> None:
    """-A^-1 B C^-1 of ``count`` pairs of neighbours A (height) and C (width) on the diagonal, from row ``first`` on."""
    if count <= 0 or width <= 0:
        return
    second, step = first + height, height + width
    A = _diagonal(inverse, count, first, first, height, height, step)
    B = _diagonal(upper, count, first, second, height, width, step)
    C = _diagonal(inverse, count, second, second, width, width, step)
    corner = _diagonal(inverse, count, first, second, height, width, step)
    product = torch.empty(count, height, width, dtype=upper.dtype, device=upper.device)
    for start in range(0, width, SLICE):
        end = min(start + SLICE, width)
        torch.bmm(B[:, :, :end], C[:, :end, start:end], out=product[:, :, start:end])
    for start in range(0, height, SLICE):
        end = min(start + SLICE, height)
        corner[:, start:end].baddbmm_(A[:, start:end, start:], product[:, start:], beta=0, alpha=-1)


def _diagonal(matrix: Tensor, count: int, row: int, column: int, height: int, width: int, step: int) -> Tensor:
    """(count, height, width): views of a contiguous square at (row, column), then ``step`` further down and right."""
    n = len(matrix)
    return matrix.as_strided((count, height, width), (step * (n + 1), n, 1), row * n + column + matrix.storage_offset())


def by_torch(hessian: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.inverse_factor``'s attempt with the inverse above."""
    flipped = hessian.flip(0, 1)
    flipped.diagonal().copy_(diagonal.flip(0))
    lower, info = torch.linalg.cholesky_ex(flipped)
    factor = invert_upper(lower.flip(0, 1))
    return factor, _finite(factor).logical_and_(info == 0)


def in_place(hessian: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the memory of one copy of the Hessian and a quarter, and what the library takes to factor it."""
    # Contiguous, so that nobody copies it: neither what looks for NaN, nor a sweep.
    upper, info = flipped_cholesky(hessian, diagonal, by_rows=True)
    factor = invert_upper_(upper)
    return factor, _finite(factor).logical_and_(info == 0)


def by_blocks(hessian: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """U from the last column block to the first, H = R R^T and U = R^-1 in the same products: two for each block, and
    a kernel that factors and inverts its diagonal (``factor_panel``)."""
    work = hessian.triu()
    work.add_(hessian.triu(1).T)
    work.diagonal().copy_(diagonal)
    failed = torch.zeros(1, dtype=torch.int32, device=work.device)
    factor, failed = graphs.run(_blocked, (work, failed), ("factor",))
    return factor, _finite(factor).logical_and_(failed[0] == 0)


def _blocked(work: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
    """(U, failed) of a symmetric positive definite matrix (n, n), which is given up.

    Rows [start, end) of ``work`` hold the reduced H up to column ``end``; right of it, an identity to which the same
    operations were applied. Multiplied by the inverse of R's diagonal block these rows are [R^T | U]; multiples of them
    are then subtracted from the rows above.
    """
    n = len(work)
    factor = torch.empty_like(work)
    for start in reversed(range(0, n, BLOCK)):
        end = min(start + BLOCK, n)
        inverse = work.new_empty(end - start, end - start)
        torch.ops.losa.factor_panel(work, start, end, inverse, failed)
        torch.mm(inverse, work[start:end], out=factor[start:end])
        if start:
            work[:start, start:end] = 0
            work[:start].addmm_(factor[start:end, :start].T, factor[start:end], alpha=-1)
    return factor.triu_(), failed


def inverse_factors(hessians: Sequence[Tensor], damping: float) -> list[tuple[Tensor, float] | SingularHessianError]:
    """``reference.inverse_factor`` of each (n, n) CUDA Hessian, or its error; several at a time.

    Each Hessian has a damping of its own. The device is asked once for each round of attempts. All Hessians take part
    in the first round, and the Hessians whose attempt failed take part in the next one.
    """
    results: list = [None] * len(hessians)
    waiting = [(index, damping) for index in range(len(hessians))]
    while waiting:
        batch, waiting = _batch(hessians, waiting)
        factors, right = _attempts([(hessians[index], used) for index, used in batch])
        for (index, used), factor, good in zip(batch, factors, right, strict=True):
            if good:
                results[index] = (factor, used)
            elif 10 * used <= MAX_DAMPING * (1 + 1e-9):
                waiting.append((index, 10 * used))
            else:
                results[index] = singular(used)
    return results


def _batch(hessians: Sequence[Tensor], waiting: list[tuple[int, float]]) -> tuple[list, list]:
    """The attempts that may be made together, and the remaining ones."""
    size, count = 0, 0
    for index, _ in waiting:
        size += hessians[index].nbytes
        if count and size > TOGETHER:
            break
        count += 1
    return waiting[:count], waiting[count:]


def _attempts(problems: list[tuple[Tensor, float]]) -> tuple[list[Tensor], list[bool]]:
    """Factors of (Hessian, damping), and which of them are right."""
    device = problems[0][0].device
    prepared = []
    for hessian, damping in problems:
        diagonal = damped_diagonal(hessian, damping)
        prepared.append((_method(hessian, diagonal), hessian, diagonal))
    if len(prepared) == 1 or device.type != "cuda":
        found = [run(hessian, diagonal) for run, hessian, diagonal in prepared]
    else:
        found = _on_streams(prepared, device)
    return [factor for factor, _ in found], torch.stack([right for _, right in found]).tolist()


def _on_streams(prepared: list[tuple[Attempt, Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    with torch.cuda.device(device):
        here, found = torch.cuda.current_stream(), []
        streams = _streams(device)[: len(prepared)]
        for stream in streams:
            stream.wait_stream(here)
        try:
            # The largest first, so that none of them is left to run alone at the end.
            order = sorted(range(len(prepared)), key=lambda index: -len(prepared[index][1]))
            for turn, index in enumerate(order):
                run, hessian, diagonal = prepared[index]
                with torch.cuda.stream(streams[turn % len(streams)]):
                    found.append((index, run(hessian, diagonal)))
        finally:
            # Attempts that were started read Hessians and diagonals that may be freed on this stream.
            for stream in streams:
                here.wait_stream(stream)
        results = [result for _, result in sorted(found, key=lambda item: item[0])]
        for factor, right in results:
            # Their memory belongs to the stream that made them, which must not reuse it while this stream reads it.
            factor.record_stream(here)
            right.record_stream(here)
        return results


_kept_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    if device not in _kept_streams:
        # Streams that nothing else uses: a graph captured on one of them would share its cuBLAS workspace.
        _kept_streams[device] = [cuda_graphs.private_stream() for _ in range(STREAMS)]
    return _kept_streams[device]


def _method(hessian: Tensor, diagonal: Tensor) -> Attempt:
    setting, methods = settings.FACTOR(), {"torch": by_torch, "blocked": by_blocks, "in_place": in_place}

    def exact(run: Attempt) -> Attempt:
        def call(hessian: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
            with matmul_precision("ieee"):
                return run(hessian, diagonal)

        return call

    if hessian.dtype != torch.float32 or len(hessian) <= BLOCK:
        setting = "torch"
    if setting == "auto" and hessian.nbytes > TOGETHER:
        setting = "in_place"
    if setting == "auto":
        runs = {name: lambda run=methods[name]: exact(run)(hessian, diagonal) for name in ("torch", "blocked")}
        setting = measured.fastest("inverse_factor", (len(hessian),), runs, hessian.device, "torch")
    return exact(methods[setting])


def _finite(factor: Tensor) -> Tensor:
    return torch.isfinite(torch.stack(torch.aminmax(factor))).all()
