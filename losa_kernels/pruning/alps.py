"""ALPS: ADMM finds the weights that stay, and conjugate gradients the values that they take (Meng et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.bitmask import pack_mask, unpack_mask
from losa_kernels.pruning.checks import (
    check_damping,
    check_hessian,
    check_hessian_of,
    check_problem,
    check_used_damping,
)
from losa_kernels.pruning.cuda import matmul_precision
from losa_kernels.pruning.hessian import accumulate_hessian, complete_hessian
from losa_kernels.pruning.reference import MAX_DAMPING, damped_diagonal, singular
from losa_kernels.pruning.sweep import SweepResult
from losa_kernels.pruning.wanda import as_one_row, selection_of_one_row
from losa_kernels.tensors import all_finite, wide_dtype

PENALTY = 0.1  # the first rho; G has a diagonal of ones
ITERATIONS = 3  # of ADMM with one rho
MOST_PENALTIES = 100
# rho grows by FAST where this share of the kept weights, or more, was exchanged since it last grew, and else by SLOW.
MANY, FAST, SLOW = 0.1, 1.3, 1.2
# Share of kept weights below which the support counts as stable: the few later exchanges would take a third more
# iterations, and leave the error as it is.
STABLE = 0.005
CG_STEPS = 10


class ScaledSpectrum(NamedTuple):
    """G = S^-1 (H + d mean(diag H) I) S^-1 = Q diag(``values``) Q^T, whose diagonal is one: ``values`` (in,) >= 0,
    ``vectors`` Q (in, in), ``scale`` (in,) the diagonal of S, ``damping`` d."""

    values: Tensor
    vectors: Tensor
    scale: Tensor
    damping: float


@torch.no_grad()
def scaled_spectrum(hessian: Tensor, damping: float) -> ScaledSpectrum:
    """Eigenvalues and vectors of the damped Hessian, scaled to a diagonal of ones.

    A zero on the diagonal (an input that was never active) counts as 1, in the mean too.

    Args:
        hessian: (in, in) floating point, symmetric (the upper triangle is read), not changed; computed in fp32 (fp64
            for fp64).
        damping: first d tried, 0 < d <= 1; grows tenfold, up to 1, until no eigenvalue is negative by more than
            rounding makes it.

    Raises:
        ValueError: a wrong shape or damping, or a non-finite Hessian; names the argument.
        SingularHessianError: no damping up to 1 makes it positive semi-definite.
    """
    hessian, damping = check_hessian(hessian), check_damping(damping)
    last = damping
    while damping <= MAX_DAMPING * (1 + 1e-9):
        scale = damped_diagonal(hessian, damping).sqrt()  # nan where the diagonal is negative
        found = _eigh(_scaled(hessian, scale)) if bool((scale > 0).all()) else None
        if found is not None:
            return ScaledSpectrum(*found, scale, damping)
        last, damping = damping, 10 * damping
    raise singular(last)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """(values >= 0, vectors) of a symmetric matrix; None where it is indefinite by more than rounding."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # it did not converge
        return None
    # eigh's backward error is a small multiple of eps times the largest eigenvalue, whatever the size.
    rounding = 10 * torch.finfo(gram.dtype).eps * values[-1:]
    right = bool((values >= -rounding).all()) and all_finite(vectors)
    return (values.clamp_min_(0), vectors) if right else None


@torch.no_grad()
def alps_prune(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    damping: float = 0.01,
    mask: Tensor | None = None,
    spectrum: ScaledSpectrum | None = None,
    cg_steps: int = CG_STEPS,
) -> SweepResult:
    """Prune and give kept weights new values (ALPS, Meng et al. 2024, Algorithms 1 and 2).

    Minimises tr((W - B) H_d (W - B)^T), H_d = H + d mean(diag H) I, over matrices B with so many entries that are not
    zero. With H_d and weights scaled so that G has a diagonal of ones, ADMM repeats

        B = W + (D - W - U) rho (G + rho I)^-1,   D = P(B + U),   U = U + B - D

    where P keeps the largest entries; rho grows while fewer and fewer entries are exchanged. Conjugate gradients, one
    least-squares problem for each row, then solve for the kept entries alone. What is minimised ends at most where it
    is at P(W).

    Unstructured: over the whole matrix, exactly floor(sparsity * out * in) entries go, ties in row-major order (lowest
    row, then lowest column). keep_n:m: in each group of a row, ties lowest column first.

    Args:
        weight: (out, in) floating point, not changed; computed in fp32 (fp64 for fp64).
        hessian: (in, in) X^T X, symmetric, same device, not changed. Columns never active (H_jj = 0) go first where the
            pattern lets them go, and are zero in any case.
        sparsity: 0 <= s < 1; or keep_n of every m kept.
        damping: share of the mean diagonal added, as ``scaled_spectrum`` takes it.
        mask: packed; weights already pruned stay pruned and count, and where the matrix (keep_n:m: a group) has lost
            more than asked, nothing else goes. Their values are compensated for like any other pruned weight's: pass
            zeros there if that has happened already. With sparsity=0 this is least squares for a given mask.
        spectrum: ``scaled_spectrum(hessian, damping)``, for weights that share a Hessian; ``damping`` is then unused.
        cg_steps: of conjugate gradients, >= 0.

    Returns:
        ``SweepResult``; its ``loss`` is half of each row's share of what is minimised.

    Raises:
        ValueError: a bad argument; or a weight, Hessian or spectrum that is not finite, or so large that the result or
            its loss would not be. No result is not finite.
        SingularHessianError: no damping up to 1 gives a spectrum.
    """
    sparsity, keep_n, m = check_problem(weight, sparsity, keep_n, m, mask)
    check_hessian_of(weight, hessian)
    cg_steps = arguments.integer("cg_steps", cg_steps)
    if cg_steps < 0:
        raise ValueError(f"cg_steps: expected a count >= 0, got {cg_steps}")
    wide = wide_dtype(weight.dtype)
    if not all_finite(weight):
        raise ValueError("weight: expected finite values, got nan or inf")
    hessian = hessian.to(wide)
    spectrum = scaled_spectrum(hessian, damping) if spectrum is None else _check_spectrum(spectrum, hessian)
    if weight.numel() == 0:
        empty = weight.to(wide, copy=True)
        return SweepResult(empty, pack_mask(empty != 0), empty.sum(1), spectrum.damping)
    gram = _scaled(hessian, spectrum.scale)
    target = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    target.masked_fill_(hessian.diagonal() == 0, 0).mul_(spectrum.scale)
    _check_size(target)
    choose = _selection(target, sparsity, keep_n, m, mask)
    with matmul_precision("ieee") if target.is_cuda else nullcontext():
        solved, kept = _admm(target, spectrum, choose)
        solved, loss = _solve(target, solved, kept, gram, cg_steps)
        # Where inputs hardly depend on each other, or many weights are equal, the largest weights may be a better
        # support than ADMM's.
        first = choose(target)
        plain = target.masked_fill(~first, 0)
        if bool(_loss(target, plain, gram).sum() <= loss.sum()):
            kept = first
            solved, loss = _solve(target, plain, kept, gram, cg_steps)
    pruned = solved.div_(spectrum.scale).masked_fill_(~kept, 0)
    _check_size(pruned, loss)
    return SweepResult(pruned, pack_mask(kept), loss, spectrum.damping)


def _check_size(*found: Tensor) -> None:
    if not all(map(all_finite, found)):
        raise ValueError(f"weight: too large: what pruning makes of it, or the loss, is beyond {found[0].dtype}")


def _scaled(hessian: Tensor, scale: Tensor) -> Tensor:
    """G of ``ScaledSpectrum``; the damping is in the scale alone, as it changes the diagonal alone."""
    gram = hessian.triu(1).div_(scale).div_(scale[:, None])
    return gram.add_(gram.T.clone()).fill_diagonal_(1)


def _selection(
    weight: Tensor, sparsity: float | None, keep_n: int | None, m: int | None, mask: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """P's support: bool (out, in), the entries of a matrix like ``weight`` that stay."""
    rows, columns = weight.shape
    if keep_n is None:
        # The matrix as one row: the count is over all of it.
        mask, rows, columns = as_one_row(mask, weight), 1, weight.numel()
        select = selection_of_one_row(weight.device)
    else:
        select = dispatch.implementation("wanda_mask", weight.device)
    flat = weight.new_ones(columns)  # with equal norms the score is the magnitude

    def choose(values: Tensor) -> Tensor:
        kept = select(values.view(rows, columns), flat, sparsity, keep_n, m, mask)
        return unpack_mask(kept, columns).view(weight.shape)

    return choose


def _admm(target: Tensor, spectrum: ScaledSpectrum, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(D, its support) once the support is stable, or after MOST_PENALTIES values of rho.

    The dual variable is scaled, U = V / rho, so that products are with matrices whose eigenvalues are at most 1.
    """
    rho, kept = PENALTY, choose(target)
    D = target.masked_fill(~kept, 0)
    U = target - D
    count = max(int(kept.sum()), 1)
    for _ in range(MOST_PENALTIES):
        pull = _pull(spectrum, rho)
        before = kept
        for _ in range(ITERATIONS):
            B_plus_U = torch.addmm(target + U, D.sub_(target).sub_(U), pull)
            kept = choose(B_plus_U)
            torch.mul(B_plus_U, kept, out=D)
            torch.sub(B_plus_U, D, out=U)
        exchanged = int((kept & ~before).sum()) / count
        if exchanged < STABLE:
            break
        growth = FAST if exchanged >= MANY else SLOW
        rho *= growth
        U /= growth
    return D, kept


def _pull(spectrum: ScaledSpectrum, rho: float) -> Tensor:
    """rho (G + rho I)^-1, symmetric and so by half of a product."""
    roots = spectrum.vectors * (rho / (spectrum.values + rho)).sqrt()
    pull = torch.zeros_like(roots)
    accumulate_hessian(pull, roots.T)
    return complete_hessian(pull)


def _loss(target: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    """(out,), half of each row's (target - found) G (target - found)^T."""
    off = target - found
    return (off @ gram).mul_(off).sum(1).div_(2)


def _solve(target: Tensor, start: Tensor, kept: Tensor, gram: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(B, its loss (out,)) of conjugate gradients; rows that rounding makes worse stay as they are in ``start``."""
    before = _loss(target, start, gram)
    found = _conjugate_gradients(target, start.clone(), kept, gram, steps)
    after = _loss(target, found, gram)
    better = after <= before
    return torch.where(better[:, None], found, start), torch.where(better, after, before).clamp_min_(0)


def _conjugate_gradients(target: Tensor, start: Tensor, kept: Tensor, gram: Tensor, steps: int) -> Tensor:
    """``steps`` steps from ``start`` towards the B with B = 0 outside ``kept`` that minimises each row's
    (target - B) G (target - B)^T; ``start`` becomes it. The preconditioner is G's diagonal, which is one."""
    residual = ((target - start) @ gram).masked_fill_(~kept, 0)
    direction = residual.clone()
    squares = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram).masked_fill_(~kept, 0)
        step = _ratio(squares, (direction * image).sum(1, keepdim=True))
        start += step * direction
        residual -= step * image
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(squares, before) * direction
    return start


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where a row is solved, or rounding has made a curvature negative."""
    return torch.where(below > 0, above / below, 0)


def _check_spectrum(spectrum: object, hessian: Tensor) -> ScaledSpectrum:
    if not isinstance(spectrum, tuple | list) or len(spectrum) != 4:
        raise ValueError(f"spectrum: expected what scaled_spectrum returns, got {type(spectrum).__name__}")
    values, vectors, scale, damping = spectrum
    parts, columns = (values, vectors, scale), len(hessian)
    for part, shape in zip(parts, ((columns,), (columns, columns), (columns,)), strict=True):
        arguments.tensor("spectrum", part)
        if tuple(part.shape) != shape or part.dtype != hessian.dtype or part.device != hessian.device:
            raise ValueError(
                f"spectrum: expected {hessian.dtype} {shape} on {hessian.device}, "
                f"got {part.dtype} {tuple(part.shape)} on {part.device}"
            )
    damping = check_used_damping("spectrum", damping)
    if not all(map(all_finite, parts)) or bool((values < 0).any()) or not bool((scale > 0).all()):
        raise ValueError("spectrum: expected finite values, eigenvalues >= 0 and a positive scale")
    if not all_finite(hessian):
        raise ValueError("hessian: expected finite values, got nan or inf")
    return ScaledSpectrum(values, vectors, scale, damping)
