"""What tests of pruners share."""

from __future__ import annotations

import torch


def statistic_for(pruner, columns, seed=0, rows=1):
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed))
    gradients = x[:rows].abs()
    known = {None: None, "input_norms": x.norm(dim=0), "hessian": x.T @ x, "gradient_norms": gradients}
    return known[pruner.statistic]


def expected_nested(scores, gone, count):
    """Per row: ``gone`` first, then the smallest scores, ties lowest column first, until ``count``."""
    kept = ~gone
    for row in range(len(scores)):
        left = [c for c in range(scores.shape[1]) if kept[row, c]]
        room = max(count - int(gone[row].sum()), 0)
        for column in sorted(left, key=lambda c: (float(scores[row, c]), c))[:room]:
            kept[row, column] = False
    return kept
