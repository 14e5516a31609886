"""Sparsity, mean rank and share of the data, round by round."""

from __future__ import annotations

from dataclasses import dataclass

from losa.recipe import AllocationConfig, RoundsConfig


@dataclass(frozen=True)
class RoundPlan:
    """Round ``index`` (from 1): prune to ``sparsity``, adapters of ``mean_rank``, train on ``sequences`` sequences."""

    index: int
    sparsity: float
    mean_rank: int
    sequences: int


def sparsity_at(t: int, rounds: int, final: float, schedule: str) -> float:
    """theta_t: cubic theta_f - theta_f (1 - t/T)^3 (Eq. 8), linear theta_f t / T (Eq. 10); exactly theta_f at t = T."""
    if t == rounds or schedule == "oneshot":
        return final
    return final * t / rounds if schedule == "linear" else final - final * (1 - t / rounds) ** 3


def mean_rank_at(t: int, allocation: AllocationConfig) -> int:
    """Omega_t = Omega_0 + growth (t - 1) (Eq. 9), never above rank_max."""
    return min(allocation.mean_rank + allocation.rank_growth * (t - 1), allocation.rank_max)


def plan_rounds(
    rounds: RoundsConfig,
    allocation: AllocationConfig,
    final_sparsity: float,
    total_sequences: int,
    round_share: float,
) -> list[RoundPlan]:
    """All rounds of a run.

    Every round trains on ``round_share`` of the sequences (at least one while the data suffices), the last on what is
    left. ``oneshot`` is one round with the last round's sparsity and mean rank and all the data, so that schedules are
    compared at one budget.
    """
    if total_sequences < 0:
        raise ValueError(f"total_sequences: expected >= 0, got {total_sequences}")
    if not 0 < round_share <= 1:
        raise ValueError(f"round_share: expected 0 < round_share <= 1, got {round_share}")
    last = mean_rank_at(rounds.count, allocation)
    if rounds.schedule == "oneshot":
        return [RoundPlan(1, final_sparsity, last, total_sequences)]
    plans, left = [], total_sequences
    for t in range(1, rounds.count + 1):
        share = left if t == rounds.count else min(left, max(1, round(round_share * total_sequences)))
        left -= share
        sparsity = sparsity_at(t, rounds.count, final_sparsity, rounds.schedule)
        plans.append(RoundPlan(t, sparsity, mean_rank_at(t, allocation), share))
    return plans
