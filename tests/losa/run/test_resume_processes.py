"""A run goes on with another number of processes, and with another way to hold the model."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.processes import run_groups
from tests.helpers.tiny import EPS
from tests.helpers.workers.resuming import (
    BEGUN,
    EXPERTS,
    EXPERTS_APART,
    SHARDED,
    UNINTERRUPTED,
    WEIGHTS,
    WHOLE,
)


@pytest.mark.subprocess
def test_two_then_one_then_four_processes_take_the_same_steps(tmp_path):
    found = run_groups("resuming", [2, 1, 4], tmp_path / "found", str(tmp_path))
    for whole, name, processes in (
        (UNINTERRUPTED, WHOLE, 4),
        (UNINTERRUPTED, SHARDED, 4),
        (UNINTERRUPTED, BEGUN, 1),
        (EXPERTS, EXPERTS_APART, 4),
    ):
        expected = found[2][0][whole]
        assert [step for step, *_ in expected] == list(range(1, 11))
        weights, masks = torch.load(tmp_path / whole / WEIGHTS)
        assert_close(torch.tensor(found[processes][0][name]), torch.tensor(expected))
        resumed, same_masks = torch.load(tmp_path / name / WEIGHTS)
        assert masks and all(torch.equal(same_masks[linear], mask) for linear, mask in masks.items())
        assert weights.keys() == resumed.keys()
        for parameter, weight in weights.items():
            assert_close(resumed[parameter], weight)
        assert any(".experts.3.down_proj" in linear for linear in masks) == (name == EXPERTS_APART)
    # Each process has written its rows: the files are of one size but for rows that do not divide.
    files = (tmp_path / WHOLE / "losa" / "checkpoints" / "round-02").glob("*.distcp")
    sizes = sorted(file.stat().st_size for file in files)
    assert len(sizes) == 4 and sizes[-1] < 1.5 * sizes[0]
    for process in range(2):
        assert found[2][process]["newest sound"] == "round-02-pruned"
        apart, others, earlier = found[2][process]["refusals"]
        assert "round-01-pruned: process 1 wrote a file of it that process 0 does not find; " in apart
        assert "round-02-step-00000003: process 1 does not find the state.json that process 0 has read; " in others
        assert re.search(r"round-02-\S+: was written by an earlier version of losa; go on with that one", earlier)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Some steps of sums in another order, in fp32. A step that is missed or taken twice is off by 1e-3 and more."""
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()
