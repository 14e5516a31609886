"""A run that does not fit is refused before it has loaded anything."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from losa.errors import LosaError
from losa.recipe.reading import parse_recipe
from losa.run import estimate, machine, memory_gate, pipeline
from losa.run.estimate import estimate as planned
from losa.run.memory_gate import check_memory
from losa.run.pipeline import run_recipe
from tests.helpers.runs import settings


def recipe(workspace, output, **sections):
    return parse_recipe(settings(workspace, output, **sections))


@pytest.fixture
def memory(monkeypatch):
    """Sets what there is."""

    def there(**bytes):
        monkeypatch.setattr(estimate, "capacity", lambda device: bytes)

    return there


def test_a_run_that_does_not_fit_is_refused_with_the_table(workspace, tmp_path, memory, monkeypatch):
    wanted = recipe(workspace, tmp_path / "out")
    peak, phase = planned(wanted, probe=False).peak("host")
    memory(host=peak - 1)
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: pytest.fail("loaded"))
    text = io.StringIO()
    with pytest.raises(LosaError, match=f"in the phase {phase} the run holds .* on the host .*--force goes on"):
        run_recipe(wanted, console=Console(file=text, width=200))
    assert "throughout" in text.getvalue() and "all together" in text.getvalue()
    assert not list(tmp_path.glob("out*"))


def test_a_run_that_fits_goes_on(workspace, tmp_path, memory):
    wanted = recipe(workspace, tmp_path / "out", method="prune_only", evaluate=None)
    memory(host=planned(wanted, probe=False).peak("host")[0])
    run_recipe(wanted)


def test_force_goes_on(workspace, tmp_path, memory):
    memory(host=1)
    run_recipe(recipe(workspace, tmp_path / "out", method="prune_only", evaluate=None), force=True)
    assert (tmp_path / "out").exists()


def test_pruning_block_by_block_is_advised_and_needs_less(workspace, tmp_path, memory):
    whole = recipe(workspace, tmp_path / "out", method="prune_only")
    offloaded = recipe(workspace, tmp_path / "out", method="prune_only", offload="disk")
    memory(host=planned(offloaded, probe=False).peak("host")[0])
    check_memory(offloaded, Console(quiet=True))
    with pytest.raises(LosaError, match="--offload disk"):
        check_memory(whole, Console(quiet=True))


def test_a_gpu_is_what_counts_where_there_is_one(workspace, tmp_path, memory):
    wanted = recipe(workspace, tmp_path / "out", device="cuda", method="prune_only", evaluate=None)
    weights = planned(wanted, probe=False).size("weights")
    memory(device=10 * weights, host=10 * weights)
    check_memory(wanted, Console(quiet=True))
    memory(device=weights, host=10 * weights)
    with pytest.raises(LosaError, match="on cuda by its plan"):
        check_memory(wanted, Console(quiet=True))


def test_several_processes_and_recipes_without_a_plan_are_left_to_others(workspace, tmp_path, memory, monkeypatch):
    memory(host=1)
    check_memory(recipe(workspace, tmp_path / "out", model="/no/such/model"), Console(quiet=True))
    monkeypatch.setattr(memory_gate, "process_count", lambda: 2)
    check_memory(recipe(workspace, tmp_path / "out"), Console(quiet=True))


@pytest.mark.parametrize(
    "text, expected", [("1000\n", 1000), ("max\n", 5 * 4096), (None, 5 * 4096), ("9223372036854771712\n", 5 * 4096)]
)
def test_a_container_s_limit_counts(text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    monkeypatch.setattr(
        machine, "os", SimpleNamespace(sysconf={"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 5}.get, sysconf_names={
            "SC_PAGE_SIZE": 0, "SC_PHYS_PAGES": 1
        })
    )  # fmt: skip
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    assert machine.capacity(torch.device("cpu")) == {"host": expected}
