"""What is held in memory, in which phase of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from losa.recipe.sections import Recipe

PHASES = (
    *("throughout", "loading", "gradients", "calibration", "pruning", "reconstruction", "training", "evaluation"),
    "export",
)
# A block runs on its calibration samples, its linears are pruned, it is reconstructed.
BLOCK_PHASES = ("calibration", "pruning", "reconstruction")


@dataclass(frozen=True)
class Holding:
    """``size`` bytes held on ``place`` ("device" or "host") during ``phase``; ``how`` says how they are counted.
    ``main_only``: the main process alone holds them, else every process of a run holds as many. ``certain``: whether it
    cannot be less; not so pages of files, which the system takes back when it needs memory, what is counted as its
    most, and what the pruner does without where memory is short."""

    phase: str
    place: str
    what: str
    size: int
    how: str
    main_only: bool = False
    certain: bool = True


def in_phases(phases: Iterable[str], holding: Holding) -> Iterator[Holding]:
    """``holding`` in each of ``phases``."""
    for phase in phases:
        yield replace(holding, phase=phase)


def block_phases(recipe: Recipe) -> tuple[str, ...]:
    """The ``BLOCK_PHASES`` of a recipe."""
    return BLOCK_PHASES if recipe.reconstruct is not None else BLOCK_PHASES[:2]


def phase_sums(held: list[Holding], place: str) -> dict[str, int]:
    """Bytes on ``place`` in each phase, with what is always there."""
    sums = {phase: 0 for phase in PHASES if any(h.phase == phase for h in held)}
    for holding in held:
        if holding.place == place:
            sums[holding.phase] += holding.size
    always = sums.pop(PHASES[0])
    return {phase: always + size for phase, size in sums.items()}


def machine_sums(held: list[Holding], processes: int) -> dict[str, int]:
    """Bytes of host memory in each phase, of a machine with so many processes, the main process among them."""
    main = phase_sums(held, "host")
    others = [h for h in held if not h.main_only]
    always = sum(h.size for h in others if h.phase == PHASES[0] and h.place == "host")
    other = phase_sums(others, "host")
    return {phase: size + (processes - 1) * other.get(phase, always) for phase, size in main.items()}
