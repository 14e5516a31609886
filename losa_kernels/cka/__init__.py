"""Linear CKA between blocks from one centred Gram per block: L Grams of n x n instead of 2 L^2."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import dispatch

MAX_SAMPLES = 256


def gram(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Centred Gram K = (F - mean F)(F - mean F)^T, the dual form of linear CKA (LoSA's Eq. 6).

    Each feature column is centred over the samples before products are taken: the most accurate order when columns
    share a large common component.

    Args:
        features: (n, p) or (L, n, p), 2 <= n <= 256 samples of p features; floating point, finite.
        out: (n, n) or (L, n, n) fp32 (fp64 for fp64 features) to add to: one sample's features may come in slices of p.

    Returns:
        (n, n) or (L, n, n), fp32 (fp64 for fp64 features); ``out`` itself where given.

    Raises:
        ValueError: a wrong shape or dtype, or non-finite features.
    """
    if features.dim() not in (2, 3) or not features.is_floating_point():
        raise ValueError(
            f"features: expected floating point (n, p) or (L, n, p), got {features.dtype} {tuple(features.shape)}"
        )
    samples = features.shape[-2]
    if not 2 <= samples <= MAX_SAMPLES:
        raise ValueError(f"features: expected 2..{MAX_SAMPLES} samples, got {samples}")
    expected = (*features.shape[:-1], samples)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    if out is not None and (tuple(out.shape) != expected or out.dtype != wide or out.device != features.device):
        raise ValueError(
            f"out: expected {wide} {expected} on {features.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    batched = features if features.dim() == 3 else features[None]
    into = None if out is None else out.view(batched.shape[0], samples, samples)
    result = dispatch.implementation("gram", features.device)(batched, into)
    if not torch.isfinite(result).all():
        raise ValueError("features: expected finite values, got nan or inf (or squares beyond fp32)")
    return result.view(expected) if out is None else out


def cka_similarity(grams: Tensor) -> Tensor:
    """Linear CKA of every pair: <K_i, K_j> / (||K_i|| ||K_j||), in one product.

    Args:
        grams: (L, n, n) centred Grams.

    Returns:
        (L, L) fp64, symmetric, in [0, 1], unit diagonal.

    Raises:
        ValueError: a wrong shape, non-finite values, or a zero Gram (features that are the same for all samples).
    """
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2]:
        raise ValueError(f"grams: expected (L, n, n), got {tuple(grams.shape)}")
    flat = grams.flatten(1).double()
    norms = flat.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise ValueError("grams: expected finite values")
    if (norms == 0).any():
        index = int((norms == 0).nonzero()[0])
        raise ValueError(f"grams: Gram {index} is zero: its features are the same for all samples")
    flat = flat / norms[:, None]
    similarity = flat @ flat.T
    similarity = ((similarity + similarity.T) / 2).clamp(0, 1)
    return similarity.fill_diagonal_(1)
