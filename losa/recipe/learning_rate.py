"""How a learning rate rises and falls over the steps of an optimiser."""

from __future__ import annotations


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate in ``step`` (from 0) of ``steps``.

    Linear warm-up over the first round(warmup * steps) steps, the full rate at the next step, then linear decay that
    would reach zero one step after the last: no step is wasted on a rate of zero.
    """
    warm = min(round(warmup * steps), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return (steps - step) / (steps - warm)
