"""Sparsity, ranks and data per round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa.algorithm.schedule import make_schedule, sequences_per_round
from losa.recipe.sections import AllocationConfig, RoundsConfig


def rounds_of(count=5, schedule="cubic", final=0.7, sequences=100, share=0.1, **allocation):
    return make_schedule(
        RoundsConfig(count=count, schedule=schedule), AllocationConfig(**allocation), final, sequences, share
    )


def test_the_papers_five_rounds():
    rounds = rounds_of()
    assert [round(r.sparsity, 4) for r in rounds] == [0.3416, 0.5488, 0.6552, 0.6944, 0.7]
    assert [r.mean_rank for r in rounds] == [6, 7, 8, 9, 10]
    assert [r.sequences for r in rounds] == [10, 10, 10, 10, 60]
    assert [r.index for r in rounds] == [1, 2, 3, 4, 5]
    assert [round(r.later, 9) for r in rounds] == [0.8, 0.6, 0.4, 0.2, 0]


def test_linear_and_oneshot():
    assert [round(r.sparsity, 6) for r in rounds_of(schedule="linear")] == [0.14, 0.28, 0.42, 0.56, 0.7]
    (only,) = rounds_of(schedule="oneshot")
    assert (only.sparsity, only.mean_rank, only.sequences, only.later) == (0.7, 10, 100, 0)


def test_mean_rank_stops_at_rank_max():
    assert [r.mean_rank for r in rounds_of(mean_rank=14, rank_growth=1, rank_max=16)] == [14, 15, 16, 16, 16]


def test_growth_of_the_mean_rank():
    assert [r.mean_rank for r in rounds_of(mean_rank=6, rank_growth=0)] == [6] * 5
    assert [r.mean_rank for r in rounds_of(mean_rank=2, rank_growth=3)] == [2, 5, 8, 11, 14]


def test_cubic_removes_most_in_the_first_rounds():
    sparsities = [0.0] + [r.sparsity for r in rounds_of(count=8)]
    steps = [b - a for a, b in zip(sparsities, sparsities[1:], strict=False)]
    assert all(a > b for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize(
    "rounds, total, share, expected",
    [
        (5, 10000, 0.1, [1000, 1000, 1000, 1000, 6000]),
        (5, 100, 1.0, [20, 20, 20, 20, 20]),
        (5, 9, 0.3, [2, 2, 2, 2, 1]),
        (5, 7, 0.1, [1, 1, 1, 1, 3]),
        (5, 3, 0.1, [0, 0, 1, 1, 1]),
        (5, 0, 0.1, [0, 0, 0, 0, 0]),
        (1, 50, 0.1, [50]),
    ],
)
def test_sequences_of_each_round(rounds, total, share, expected):
    assert sequences_per_round(rounds, total, share) == expected


@given(st.integers(1, 30), st.integers(0, 2000), st.floats(0.001, 1.0))
def test_every_round_gets_data_where_there_is_enough(rounds, total, share):
    counts = sequences_per_round(rounds, total, share)
    assert len(counts) == rounds and sum(counts) == total
    assert min(counts) >= (1 if total >= rounds else 0)
    assert counts[-1] >= (1 if total > 0 else 0)
    wanted = share * total
    if share * rounds <= 1 and wanted >= 1 and total >= 2 * rounds:
        assert all(abs(c - wanted) <= 0.5 for c in counts[:-1])


@given(
    st.integers(1, 12),
    st.sampled_from(["cubic", "linear", "oneshot"]),
    st.floats(0.01, 0.95),
    st.integers(0, 500),
    st.floats(0.01, 1.0),
)
def test_invariants(count, schedule, final, sequences, share):
    rounds = rounds_of(count, schedule, final, sequences, share)
    assert rounds[-1].sparsity == final
    assert sum(r.sequences for r in rounds) == sequences
    assert all(r.sequences >= 0 for r in rounds)
    sparsities = [r.sparsity for r in rounds]
    assert sparsities == sorted(sparsities) and sparsities[0] > 0


@pytest.mark.parametrize("sequences, share", [(-1, 0.1), (10, 0.0), (10, 1.5)])
def test_bad_arguments(sequences, share):
    with pytest.raises(ValueError, match="expected"):
        rounds_of(sequences=sequences, share=share)
