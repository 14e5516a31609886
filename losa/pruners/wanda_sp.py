"""Wanda-sp: whole attention heads and MLP channels by Wanda's score (An et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa.pruners.structure import ROLES, Counts, Structure
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask


class WandaSP(Pruner):
    """Heads and channels with the lowest scores go as a whole; kept weights stay as they are.

    Column j of o_proj and of down_proj scores c_j = mean_i |W_ij| ||X_j||. A channel scores c_j of its column, a query
    head the sum of c_j over its columns, and a group of heads with one key and value head the sum over the query heads
    that it would keep. Every kept group keeps the same number of query heads. ``Structure.nearest`` says how many
    groups, heads and channels stay, so that every block keeps the same counts. Ties: the lowest index goes first.
    Heads and channels that the masks have pruned already stay pruned.

    Raises RecipeError for ``prune.pattern`` and ``prune.targets``.
    """

    statistic = "input_norms"
    structured = True

    def __init__(self, config: PruneConfig):
        if config.pattern is not None:
            raise RecipeError(
                f"prune.pattern: {config.pruner!r} removes whole heads and channels and takes prune.sparsity, "
                f"got {config.pattern!r}"
            )
        if config.targets is not None:
            raise RecipeError(
                f"prune.targets: {config.pruner!r} removes heads and channels from all linears of a block; "
                f"expected null, got {config.targets!r}"
            )

    def prune_block(
        self,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        masks: Mapping[str, Tensor | None],
    ) -> Iterator[tuple[str, Pruned]]:
        structure = self.structure
        if structure is None or pattern.sparsity is None:
            raise ValueError("prune_block: expected a structure, which the engine gives, and a sparsity")
        outputs = [structure.linears[role] for role in ("o_proj", "down_proj")]
        # (heads, head_dim) and (channels,); -1 where a column is pruned already, as scores are 0 and more.
        columns, channels = (_column_scores(name, weights[name], statistics[name], masks[name]) for name in outputs)
        heads = columns.view(structure.full.heads, structure.head_dim).sum(1)
        grouped = heads.view(structure.full.groups, structure.full.per_group)
        counts = structure.nearest(pattern.sparsity, _alive(grouped, channels))
        kept_heads = _kept_heads(grouped, counts)
        kept = {
            "heads": kept_heads.flatten().repeat_interleave(structure.head_dim),
            "groups": kept_heads.any(1).repeat_interleave(structure.head_dim),
            "channels": _highest(channels, counts.channels),
        }
        for role in ROLES:
            yield structure.linears[role], Pruned(pack_mask(_mask(role, kept, structure)))


def _column_scores(name: str, weight: Tensor, norms: Tensor | None, mask: Tensor | None) -> Tensor:
    """(in,) fp32 mean_i |W_ij| ||X_j||; -1 for columns of which ``mask`` keeps nothing."""
    assert norms is not None
    try:
        check_finite(weight)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
    scores = weight.abs().mean(0) * norms.to(weight)
    return scores if mask is None else scores.masked_fill(~unpack_mask(mask, len(scores)).any(0), -1.0)


def _alive(grouped: Tensor, channels: Tensor) -> Counts:
    """What earlier rounds have left: ``grouped`` (groups, query heads) and ``channels`` are scores, negative where a
    head or channel has been pruned."""
    heads = (grouped >= 0).sum(1)
    heads = heads[heads > 0]
    return Counts(len(heads), int(heads.min()), int((channels >= 0).sum()))


def _kept_heads(grouped: Tensor, counts: Counts) -> Tensor:
    """bool (groups, query heads): ``counts.per_group`` heads of ``counts.groups`` groups."""
    kept = torch.stack([_highest(scores, counts.per_group) for scores in grouped])
    return kept & _highest(torch.where(kept, grouped, 0).sum(1), counts.groups)[:, None]


def _highest(scores: Tensor, count: int) -> Tensor:
    """bool, like ``scores``: the ``count`` highest."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.argsort(stable=True)[: len(scores) - count]] = False
    return kept


def _mask(role: str, kept: Mapping[str, Tensor], structure: Structure) -> Tensor:
    """bool (out, in) of one linear. ``kept``: which features of the query heads, of the key heads, and of the MLP."""
    part = {"q_proj": "heads", "k_proj": "groups", "v_proj": "groups", "o_proj": "heads"}.get(role, "channels")
    features = kept[part]
    if role in ("o_proj", "down_proj"):
        return features.expand(structure.hidden, -1).contiguous()
    return features[:, None].expand(-1, structure.hidden).contiguous()
