"""Sparsity, ranks and data per round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa.recipe import AllocationConfig, RoundsConfig
from losa.schedule import plan_rounds


def plans(count=5, schedule="cubic", final=0.7, sequences=100, share=0.1, **allocation):
    return plan_rounds(
        RoundsConfig(count=count, schedule=schedule), AllocationConfig(**allocation), final, sequences, share
    )


def test_the_papers_five_rounds():
    rounds = plans()
    assert [round(r.sparsity, 4) for r in rounds] == [0.3416, 0.5488, 0.6552, 0.6944, 0.7]
    assert [r.mean_rank for r in rounds] == [6, 7, 8, 9, 10]
    assert [r.sequences for r in rounds] == [10, 10, 10, 10, 60]
    assert [r.index for r in rounds] == [1, 2, 3, 4, 5]


def test_linear_and_oneshot():
    assert [round(r.sparsity, 6) for r in plans(schedule="linear")] == [0.14, 0.28, 0.42, 0.56, 0.7]
    (only,) = plans(schedule="oneshot")
    assert (only.sparsity, only.mean_rank, only.sequences) == (0.7, 10, 100)


def test_mean_rank_stops_at_rank_max():
    assert [r.mean_rank for r in plans(mean_rank=14, rank_growth=1, rank_max=16)] == [14, 15, 16, 16, 16]


@given(
    st.integers(1, 12),
    st.sampled_from(["cubic", "linear", "oneshot"]),
    st.floats(0.01, 0.95),
    st.integers(0, 500),
    st.floats(0.01, 1.0),
)
def test_invariants(count, schedule, final, sequences, share):
    rounds = plans(count, schedule, final, sequences, share)
    assert rounds[-1].sparsity == final
    assert sum(r.sequences for r in rounds) == sequences
    assert all(r.sequences >= 0 for r in rounds)
    sparsities = [r.sparsity for r in rounds]
    assert sparsities == sorted(sparsities) and sparsities[0] > 0


@pytest.mark.parametrize("sequences, share", [(-1, 0.1), (10, 0.0), (10, 1.5)])
def test_bad_arguments(sequences, share):
    with pytest.raises(ValueError, match="expected"):
        plans(sequences=sequences, share=share)
