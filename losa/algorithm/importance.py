"""How much each block matters: what ``allocation.rates`` of a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from losa.recipe.rates import RATES, Fill, Needs, Rates
from losa.registry import Registry

# See ``register_importance``. What each function needs is in ``losa.recipe.rates.RATES``.
Importance = Callable[[Any], Tensor | None]

_REGISTRY: Registry[Importance] = Registry("importance")


def register_importance(
    name: str, *, needs: Needs, fill: Fill = "lp", delta: float | Literal["rule", "loss"] = "rule"
) -> Callable[[Importance], Importance]:
    """Let recipes name a function as ``allocation.rates: name``: a decorator of the function.

    The function takes what it needs and returns the importance of every block, (L,) floating point, finite; or None,
    where all blocks get the same rate.

    Args:
        needs: "similarity", for (L, L) fp64 CKA between the outputs of blocks (Eq. 6); "normalised similarity", for the
            same of features without massive activations; "scores", for an iterator over the blocks that gives lists of
            Wanda's scores |W| ||X||, (out, in) fp32 of each linear; "cosines", for (L,) fp64, the mean cosine between
            tokens' hidden states before and after each block; "position", for (L,) fp64 0 to L - 1; "losses", for a
            list of L dictionaries of ``losa.algorithm.expected_loss.loss_curve`` by linear's name within the block; or
            "linears", for the same of ``MaskedLoRALinear``. In a sharded model their parameters are DTensors; an
            importance that is a DTensor too is made whole.
        fill: "lp", Eq. 5's linear programme, which takes the order of importances alone; "smooth", rates that are
            affine in the importance; or, with "losses", "curves": rates of the least expected loss, which take nothing
            of the importance.
        delta: half width of the box where a recipe gives none; "rule": ``default_delta``'s.

    Raises:
        ValueError: ``needs`` or ``fill`` is something else, or they do not fit; or the name belongs to another
            function.
    """
    for what, value, kind in (("needs", needs, Needs), ("fill", fill, Fill)):
        if value not in get_args(kind):
            *most, last = get_args(kind)
            raise ValueError(f"importance {name!r}: {what}: expected {', '.join(most)} or {last}, got {value!r}")
    if fill == "curves" and needs != "losses":
        raise ValueError(f"importance {name!r}: fill: curves comes with needs losses, got {needs!r}")
    if fill == "curves" and delta == "loss":
        raise ValueError(f"importance {name!r}: delta: expected a number or 'rule' with fill curves, got 'loss'")
    row = Rates(needs, fill, delta)

    def add(importance: Importance) -> Importance:
        RATES.register(name, row)
        _REGISTRY.register(name, importance)
        return importance

    return add


def get_importance(name: str) -> Importance:
    """The function that a recipe names. Raises KeyError; recipes are checked for it when they are read."""
    return _REGISTRY[name]


def cka_importance(similarity: Tensor, beta: float = 1.0) -> Tensor:
    """I_l = exp(-beta c_l / sum_k c_k) with c_l = sum_{j != l} CKA(l, j) (Eq. 4, normalised): a block that repeats what
    other blocks carry matters less.

    ``beta`` > 0 rescales importance but keeps its order, and the optimum of Eq. 5 depends on the order only, so rates
    do not depend on it.

    Args:
        similarity: (L, L), diagonal ignored.

    Returns:
        (L,) fp64.

    Raises:
        ValueError: not square, or not finite.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) == 0:
        raise ValueError(f"similarity: expected (L, L), got {tuple(similarity.shape)}")
    if not torch.isfinite(similarity).all():
        raise ValueError("similarity: expected finite values")
    redundancy = similarity.double().clone().fill_diagonal_(0).sum(1)
    total = redundancy.sum()
    return torch.exp(-beta * redundancy / total) if total != 0 else torch.ones_like(redundancy)


def uniform_importance(linears: object) -> None:
    """The ablation without layer-wise rates."""


def owl_importance(scores: Iterable[Sequence[Tensor]], multiple: float = 5.0) -> Tensor:
    """Share of a block's Wanda scores that are above ``multiple`` times their mean over the block: a block with many
    outliers matters more (OWL, Yin et al. 2024).

    Args:
        scores: of each block, of each of its linears: (out, in).

    Returns:
        (L,) fp64.
    """
    shares = []
    for block in scores:
        count = sum(each.numel() for each in block)
        mean = torch.stack([each.sum(dtype=torch.float64) for each in block]).sum() / count
        outliers = torch.stack([(each > multiple * mean).sum() for each in block]).sum()
        shares.append(outliers.double() / count)
    return _on_host(shares)


def dlp_importance(scores: Iterable[Sequence[Tensor]]) -> Tensor:
    """1 - m_l / sum_k m_k with m_l the median of block l's Wanda scores (DLP, Chen et al. 2025): where most scores are
    large, few of them stand out, and the block matters less. Of an even number of scores the lower median counts.

    Args, returns:
        as ``owl_importance``.
    """
    medians = _on_host([_lower_median(block) for block in scores])
    total = medians.sum()
    return 1 - medians / total if total > 0 else torch.ones_like(medians)


def _lower_median(parts: Sequence[Tensor]) -> Tensor:
    """The lower median of the fp32 numbers of all parts, none of them negative: such numbers are ordered as their bits
    are. So many numbers are counted, and neither copied nor sorted."""
    bits = [part.flatten().view(torch.int32) for part in parts]
    place = (sum(each.numel() for each in bits) - 1) // 2
    high, place = _in_bin([each >> 16 for each in bits], place)
    low, _ = _in_bin([each[each >> 16 == high] & 0xFFFF for each in bits], place)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32)


def _in_bin(parts: Sequence[Tensor], place: int) -> tuple[int, int]:
    """Which of 2^16 integers stands at ``place`` in the order of all parts' integers, and where among its equals."""
    counts = torch.stack([part.bincount(minlength=1 << 16) for part in parts]).sum(0).cpu()
    value = int(torch.searchsorted(counts.cumsum(0), place, right=True))
    return value, place - int(counts[:value].sum())


def update_importance(cosines: Tensor) -> Tensor:
    """1 - the mean cosine between a block's input and its output, (L,): a block that hardly turns its hidden states
    adds little (block influence, Men et al. 2024)."""
    return 1 - cosines


def fisher_importance(losses: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """How much the loss is expected to grow if half of each row of a block's linears goes: (L,) fp64."""
    return torch.stack([torch.stack([curve[len(curve) // 2] for curve in block.values()]).sum() for block in losses])


def atp_importance(position: Tensor) -> Tensor:
    """-l: rates then rise from block to block by one and the same step, an arithmetic progression (ATP, Huang et al.
    2025)."""
    return -position


def _on_host(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).cpu()


_REGISTRY.register("cka", cka_importance)
_REGISTRY.register("uniform", uniform_importance)
_REGISTRY.register("cka_normalised", cka_importance)
_REGISTRY.register("owl", owl_importance)
_REGISTRY.register("dlp", dlp_importance)
_REGISTRY.register("update", update_importance)
_REGISTRY.register("atp", atp_importance)
_REGISTRY.register("fisher", fisher_importance)
