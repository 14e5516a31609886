"""Warm-up and decay."""

from __future__ import annotations

from losa.recipe.learning_rate import lr_factor


def test_lr_factor():
    assert [lr_factor(k, 4, 0.0) for k in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [lr_factor(k, 6, 0.5) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 2 / 3, 1 / 3]
    for steps in range(1, 30):
        for warmup in (0.0, 0.3, 0.99):
            factors = [lr_factor(k, steps, warmup) for k in range(steps)]
            assert max(factors) == 1.0 and min(factors) > 0
            peak = factors.index(1.0)
            assert factors[: peak + 1] == sorted(factors[: peak + 1])
            assert factors[peak:] == sorted(factors[peak:], reverse=True)
