"""Sparsity, mean rank and share of the data, round by round."""

from __future__ import annotations

from dataclasses import dataclass

from losa.recipe.sections import AllocationConfig, RoundsConfig


@dataclass(frozen=True)
class Round:
    """Round ``index`` (from 1): prune to ``sparsity``, adapters of ``mean_rank``, train on ``sequences`` sequences.
    ``later`` is 1 - t/T, the share of the rounds that come after it."""

    index: int
    sparsity: float
    mean_rank: int
    sequences: int
    later: float = 1.0


def sparsity_at(t: int, rounds: int, final: float, schedule: str) -> float:
    """theta_t: cubic theta_f - theta_f (1 - t/T)^3 (Eq. 8), linear theta_f t / T (Eq. 10); exactly theta_f at t = T."""
    if t == rounds or schedule == "oneshot":
        return final
    return final * t / rounds if schedule == "linear" else final - final * (1 - t / rounds) ** 3


def mean_rank_at(t: int, allocation: AllocationConfig) -> int:
    """Omega_t = Omega_0 + growth (t - 1) (Eq. 9), never above rank_max."""
    return min(allocation.mean_rank + allocation.rank_growth * (t - 1), allocation.rank_max)


def sequences_per_round(rounds: int, total: int, share: float) -> list[int]:
    """``share`` of ``total`` for every round but the last, which takes the rest; the sum is ``total``.

    A share above 1 / rounds would starve the last and sparsest round, so it counts as 1 / rounds. Every round gets at
    least one sequence; where there are fewer sequences than rounds, the last rounds get them.
    """
    wanted = max(1, round(min(share, 1 / rounds) * total))
    counts, left = [], total
    for later in range(rounds - 1, -1, -1):
        counts.append(left if later == 0 else min(wanted, max(left - later, 0)))
        left -= counts[-1]
    return counts


def make_schedule(
    rounds: RoundsConfig,
    allocation: AllocationConfig,
    final_sparsity: float,
    total_sequences: int,
    round_share: float,
) -> list[Round]:
    """The schedule: all rounds of a run, the data shared out by ``sequences_per_round``.

    ``oneshot`` is one round with the last round's sparsity and mean rank and all the data, so that schedules are
    compared at one budget.

    Raises:
        ValueError: a negative number of sequences, or a share outside (0, 1].
    """
    if total_sequences < 0:
        raise ValueError(f"total_sequences: expected >= 0, got {total_sequences}")
    if not 0 < round_share <= 1:
        raise ValueError(f"round_share: expected 0 < round_share <= 1, got {round_share}")
    if rounds.schedule == "oneshot":
        return [Round(1, final_sparsity, mean_rank_at(rounds.count, allocation), total_sequences, 0.0)]
    last, sequences = rounds.count, sequences_per_round(rounds.count, total_sequences, round_share)
    return [
        Round(t, sparsity_at(t, last, final_sparsity, rounds.schedule), mean_rank_at(t, allocation), own, 1 - t / last)
        for t, own in enumerate(sequences, start=1)
    ]
