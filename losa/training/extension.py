"""What a method adds to the optimiser steps of a round."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Extension:
    """Called by the trainer around each optimiser step; a subclass overrides what it needs. All processes make the same
    calls, in the same order, and must come to the same numbers.

    What it remembers from step to step is part of a resume state.
    """

    def begin(self, steps: int, state: Mapping[str, Tensor]) -> None:
        """A round begins or goes on.

        Args:
            steps: optimiser steps of the whole round.
            state: as ``state`` returned it, with other entries beside it; empty at a round's beginning.
        """

    def penalty(self) -> Tensor | None:
        """A scalar that a step's loss gains: a function of trained parameters alone, differentiable. It counts once a
        step, whatever the number of batches and processes, and is no part of the loss that is reported."""
        return None

    def after_update(self, step: int, learning_rate: float) -> None:
        """After each update, while the parameters still have the update's gradients. A step that has nothing
        to learn from updates nothing and is left out.

        Args:
            step: of the round, from 1.
            learning_rate: of this step.
        """

    def state(self) -> dict[str, Tensor]:
        """What the rest of the round needs: tensors named ``PARAMETER.part``, of the shape of that parameter of the
        model and on its device. ``part`` is neither "step" nor begins with "exp_avg"."""
        return {}
