"""Linears of a block that read the same input, stored as rows of one weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from losa.modules.sparse import SparseLinear, share_rows

Kind = TypeVar("Kind", bound=nn.Module)

# Last components of the names of linears that read the same input. Their rows are put together in memory.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_linears(block: nn.Module) -> None:
    """Make packed linears of a block that read the same input (``TOGETHER``) rows of one packed weight."""
    for members in sparse_groups(block):
        share_rows(members)


def join_linears(block: nn.Module) -> None:
    """Make dense linears of a block that read the same input rows of one weight, and freeze them."""
    for members in _groups(block, nn.Linear):
        weights = [member.weight.detach() for member in members]
        if len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1:
            parts = torch.cat(weights).split([len(w) for w in weights])
            for member, part in zip(members, parts, strict=True):
                member.weight = nn.Parameter(part, requires_grad=False)


def sparse_groups(block: nn.Module) -> Iterator[Sequence[SparseLinear]]:
    """Groups of ``TOGETHER`` in the block whose members are siblings, all there, and all packed."""
    return _groups(block, SparseLinear)


def _groups(block: nn.Module, kind: type[Kind]) -> Iterator[Sequence[Kind]]:
    for parent in block.modules():
        for names in TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            members = [member for member in found if type(member) is kind]
            if len(members) == len(names):
                yield members
