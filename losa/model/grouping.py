"""Linears of a block that read the same input, as rows of one weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from losa.modules.sparse import SparseLinear, share_rows

Kind = TypeVar("Kind", bound=nn.Module)

# Linears that read the same input, by their names' last components: their rows lie together in memory.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_linears(block: nn.Module) -> None:
    """Put linears of a block that read the same input (``TOGETHER``) into one packed weight that they share."""
    for members in sparse_groups(block):
        share_rows(members)


def join_linears(block: nn.Module) -> None:
    """The same for dense linears: their weights become rows of one, and frozen."""
    for members in _groups(block, nn.Linear):
        weights = [member.weight.detach() for member in members]
        if len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1:
            parts = torch.cat(weights).split([len(w) for w in weights])
            for member, part in zip(members, parts, strict=True):
                member.weight = nn.Parameter(part, requires_grad=False)


def sparse_groups(block: nn.Module) -> Iterator[Sequence[SparseLinear]]:
    """The complete groups of ``TOGETHER`` among siblings, where all members are packed."""
    return _groups(block, SparseLinear)


def _groups(block: nn.Module, kind: type[Kind]) -> Iterator[Sequence[Kind]]:
    for parent in block.modules():
        for names in TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            members = [member for member in found if type(member) is kind]
            if len(members) == len(names):
                yield members
