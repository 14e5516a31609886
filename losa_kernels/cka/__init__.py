"""Linear CKA between blocks from one centred Gram per block: L Grams of n x n instead of 2 L^2."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.tensors import wide_dtype

MAX_SAMPLES = 256


@torch.no_grad()
def gram(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Centred Gram K = (F - mean F)(F - mean F)^T, the dual form of linear CKA (LoSA's Eq. 6).

    Each feature column is centred over the samples before products are taken: the most accurate order when columns
    share a large common component. Features that are the same for all samples give exact zeros. Not differentiable;
    autocast does not touch it.

    Args:
        features: (n, p) or (L, n, p), 2 <= n <= 256 samples of p features; floating point, finite.
        out: (n, n) or (L, n, n) fp32 (fp64 for fp64 features) to add to: one sample's features may come in slices of p.

    Returns:
        (n, n) or (L, n, n), fp32 (fp64 for fp64 features); ``out`` itself where given.

    Raises:
        ValueError: a wrong shape, dtype or device, or features that are not finite or whose squares are not (``out``
            stays as it was then).
    """
    arguments.with_data("features", arguments.tensor("features", features))
    if features.dim() not in (2, 3) or not features.is_floating_point():
        raise ValueError(
            f"features: expected floating point (n, p) or (L, n, p), got {features.dtype} {tuple(features.shape)}"
        )
    samples = features.shape[-2]
    if not 2 <= samples <= MAX_SAMPLES:
        raise ValueError(f"features: expected 2..{MAX_SAMPLES} samples, got {samples}")
    expected, wide = _shape(features), wide_dtype(features.dtype)
    if out is not None:
        arguments.written_to("out", arguments.tensor("out", out))
    if out is not None and (tuple(out.shape) != expected or out.dtype != wide or out.device != features.device):
        raise ValueError(
            f"out: expected {wide} {expected} on {features.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    # torch.compile needs an operator; eager mode saves its overhead.
    result = (_gram_op if torch.compiler.is_compiling() else _gram)(features, out)
    return result if out is None else out.copy_(result)


def _gram(features: Tensor, before: Tensor | None) -> Tensor:
    """The Gram of ``features`` plus ``before``, a new tensor."""
    run = dispatch.implementation("gram", features.device)
    with torch.autocast(features.device.type, enabled=False):
        total = run(features if features.dim() == 3 else features[None]).view(_shape(features))
    result = (total if before is None else total + before).to(wide_dtype(features.dtype))
    if not torch.isfinite(result).all():
        raise ValueError(_what_is_not_finite(features))
    return result


def _shape(features: Tensor) -> tuple[int, ...]:
    return (*features.shape[:-1], features.shape[-2])


def _what_is_not_finite(features: Tensor) -> str:
    places = (~torch.isfinite(features.to(wide_dtype(features.dtype)))).nonzero()  # of dtypes of 8 bits too
    if len(places) == 0:
        return "features: too large: their squares, or the values of out, are not finite"
    *layer, sample, column = places[0].tolist()
    where = "".join(f"layer {index}, " for index in layer) + f"sample {sample}, column {column}"
    return f"features: expected finite values, got {features[tuple(places[0])].item()} in {where}"


@torch.no_grad()
def cka_similarity(grams: Tensor) -> Tensor:
    """Linear CKA of every pair (LoSA's Eq. 6): <K_i, K_j> / (||K_i|| ||K_j||), in one fp64 product.

    Args:
        grams: (L, n, n) centred Grams, floating point.

    Returns:
        (L, L) fp64, exactly symmetric, in [0, 1], diagonal exactly 1.

    Raises:
        ValueError: a wrong shape or dtype, non-finite values, or a zero Gram (features that are the same for all
            samples); names the Gram's index.
    """
    arguments.with_data("grams", arguments.tensor("grams", grams))
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2] or not grams.is_floating_point():
        raise ValueError(f"grams: expected floating point (L, n, n), got {grams.dtype} {tuple(grams.shape)}")
    return (_similarity_op if torch.compiler.is_compiling() else _similarity)(grams)


def _similarity(grams: Tensor) -> Tensor:
    flat = grams.flatten(1).double()
    # Scaled first: the squares of tiny and of huge Grams stay within fp64.
    largest = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    for index, value in enumerate(largest.tolist()):
        if value == 0:
            raise ValueError(f"grams: Gram {index} is zero: its features are the same for all samples")
        if not 0 < value < float("inf"):
            raise ValueError(f"grams: expected finite values, got {value} in Gram {index}")
    flat = torch.nn.functional.normalize(flat / largest[:, None])
    similarity = flat @ flat.T
    similarity = ((similarity + similarity.T) / 2).clamp(0, 1)
    return similarity.fill_diagonal_(1)


_gram_op = torch.library.custom_op("losa::checked_gram", _gram, mutates_args=())
_similarity_op = torch.library.custom_op("losa::cka_similarity", _similarity, mutates_args=())


@_gram_op.register_fake
def _(features, before):
    return features.new_empty(_shape(features), dtype=wide_dtype(features.dtype))


@_similarity_op.register_fake
def _(grams):
    return grams.new_empty((grams.shape[0], grams.shape[0]), dtype=torch.float64)
