"""A run that does not fit is refused before it has loaded anything."""

from __future__ import annotations

import io
import resource

import pytest
import torch
from rich.console import Console

from losa.distributed.joining import Place
from losa.errors import LosaError
from losa.recipe.reading import parse_recipe
from losa.run import choice, machine, memory_gate, pipeline
from losa.run.estimate import estimate as planned
from losa.run.holding import Holding, machine_sums, phase_sums
from losa.run.memory_gate import check_memory
from losa.run.pipeline import run_recipe
from losa.run.placement import Placement
from losa.run.planned import Planned, planned_model
from losa.storage.files import write_json
from tests.helpers.runs import settings


def recipe(workspace, output, **sections):
    return parse_recipe(settings(workspace, output, **sections))


@pytest.fixture
def memory(monkeypatch):
    """Sets what there is."""

    def there(**bytes):
        monkeypatch.setattr(choice, "capacity", lambda device: bytes)

    return there


def test_a_run_that_does_not_fit_is_refused_with_the_table(workspace, tmp_path, memory, monkeypatch):
    wanted = recipe(workspace, tmp_path / "out")
    peak, phase = planned(wanted, probe=False).peak("host")  # all of it certain
    memory(host=peak - 1)
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: pytest.fail("loaded"))
    text = io.StringIO()
    with pytest.raises(LosaError, match=f"in the phase {phase} the run holds .* on the host .*--force goes on"):
        run_recipe(wanted, console=Console(file=text, width=200))
    assert "throughout" in text.getvalue() and "merged weights of a block" in text.getvalue()
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
    check_memory(offloaded, Placement(), "cpu", Console(quiet=True))
    with pytest.raises(LosaError, match="--offload disk"):
        check_memory(whole, Placement(), "cpu", Console(quiet=True))


def test_a_gpu_is_what_counts_where_there_is_one(workspace, tmp_path, memory, monkeypatch):
    monkeypatch.setattr(memory_gate, "torch_device", lambda device: None)
    wanted = recipe(workspace, tmp_path / "out", device="cuda", method="prune_only", evaluate=None)
    weights = planned(wanted, probe=False).size("weights")
    memory(device=10 * weights, host=weights)
    check_memory(wanted, Placement(), "cuda", Console(quiet=True))
    memory(device=weights, host=10 * weights)
    with pytest.raises(LosaError, match="the run holds at least .* on the GPU by its plan"):
        check_memory(wanted, Placement(), "cuda", Console(quiet=True))


def test_a_recipe_without_a_plan_is_left_to_the_run(workspace, tmp_path, memory):
    memory(host=1)
    check_memory(recipe(workspace, tmp_path / "out", model="/no/such/model"), Placement(), "cpu", Console(quiet=True))


def test_what_may_be_held_besides_is_warned_of(workspace, tmp_path, memory, caplog):
    wanted = recipe(workspace, tmp_path / "out", method="prune_only", prune={"pruner": "sparsegpt", "sparsity": 0.5})
    peak, phase = planned(wanted, probe=False).peak("host")
    memory(host=peak)
    check_memory(wanted, Placement(), "cpu", Console(quiet=True))
    assert not caplog.text
    memory(host=peak - 1)
    check_memory(wanted, Placement(), "cpu", Console(quiet=True))
    assert f"in the phase {phase} the run holds up to" in caplog.text
    caplog.clear()
    memory(host=peak, process=peak - 1)
    check_memory(wanted, Placement(), "cpu", Console(quiet=True))
    assert f"in the phase {phase} the run holds up to" in caplog.text


@pytest.mark.parametrize("placement", [Placement(2), Placement(2, 2)])
def test_processes_that_do_not_fit_are_refused(placement, two_processes, workspace, tmp_path, monkeypatch, caplog):
    """By what a machine's processes hold together, by what one holds on its GPU, and by what each may have."""
    wanted = recipe(workspace, tmp_path / "out", device="auto", prune={"pruner": "sparsegpt", "sparsity": 0.5})
    monkeypatch.setattr(memory_gate, "launched", lambda: Place(0, 2, 0, 2, "a", 1))
    text = io.StringIO()

    def check(on: str, **there) -> None:
        monkeypatch.setattr(choice, "capacity", lambda _: there)
        check_memory(wanted, placement, on, Console(file=text, width=200))

    plan = Planned.of(wanted, planned_model(wanted), torch.device("cpu"), {})
    certain = [holding for holding in plan.holdings(placement) if holding.certain]
    held, one = max(machine_sums(certain, 2).values()), max(phase_sums(certain, "host").values())
    assert held > one
    check("cpu", host=held, process=one)
    assert not text.getvalue()
    with pytest.raises(LosaError, match="the 2 processes of a machine hold at least .* on a machine's host .* table"):
        check("cpu", host=held - 1)
    assert "merged weights of a block" in text.getvalue()
    with pytest.raises(LosaError, match="a process holds at least .* on the host by its plan"):
        check("cpu", host=held, process=one - 1)
    plan = Planned.of(wanted, planned_model(wanted), torch.device("cuda"), {})
    own = max(phase_sums([h for h in plan.holdings(placement) if h.certain], "device").values())
    caplog.clear()
    check("cuda", host=10**12, device=own)
    plan = Planned.of(wanted, planned_model(wanted), torch.device("cuda"), {"device": own})
    most = max(phase_sums(plan.holdings(placement), "device").values())
    assert ("a process holds up to" in caplog.text and "on a GPU by its plan" in caplog.text) == (most > own)
    with pytest.raises(LosaError, match="a process holds at least .* on a GPU .* --gpus 2.*--force goes on"):
        check("cuda", host=10**12, device=own - 1)
    monkeypatch.setattr(choice, "planned_model", lambda recipe: 1 / 0)
    check("cuda", host=1)


def test_address_space_is_of_a_process(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (12345, -1) if which == resource.RLIMIT_AS else (-1, -1))
    found = machine.capacity(torch.device("cpu"))
    assert found.keys() == {"host", "process"} and found["process"] == 12345 < found["host"]


def test_processes_of_which_one_alone_has_a_phase_hold_their_weights(workspace, tmp_path):
    """While the main process reads its export back, the other one holds its model."""
    held = [Holding("throughout", "host", "weights", 5, ""), Holding("export", "host", "read", 7, "", main_only=True)]
    assert machine_sums(held, 3) == {"export": 5 + 7 + 2 * 5}


@pytest.mark.parametrize("text, expected", [("1000\n", 1000), ("max\n", 5 * 4096), (None, 5 * 4096)])
@pytest.mark.parametrize(
    "own, file",
    [
        ("0::/", "memory.max"),
        ("0::/jobs/job-7/step", "jobs/job-7/memory.max"),
        ("12:cpu,cpuacct:/x\n9:memory:/jobs/7", "memory/jobs/7/memory.limit_in_bytes"),
        ("9:memory:/jobs/7", "memory/memory.limit_in_bytes"),
    ],
)
def test_limits_of_a_container_or_a_job_count(own, file, text, expected, tmp_path, monkeypatch):
    """Of both versions of control groups, also of a group that the process's own is in."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text(own + "\n")
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 5}
    monkeypatch.setattr(machine.os, "sysconf", sizes.get)
    if text is not None:
        (tmp_path / "groups" / file).parent.mkdir(parents=True)
        (tmp_path / "groups" / file).write_text(text)
    assert machine.capacity(torch.device("cpu")) == {"host": expected}


def test_unfinished_work_stays_where_a_run_is_refused(workspace, tmp_path, memory):
    work = tmp_path / "out.work" / "prune_only"
    run_recipe(recipe(workspace, tmp_path / "other", method="prune_only", evaluate=None))
    work.mkdir(parents=True)
    write_json(tmp_path / "out.work" / "work.json", {"processes": 1})
    (work / "prune_only.json").touch()
    memory(host=1)
    with pytest.raises(LosaError, match="memory:"):
        run_recipe(recipe(workspace, tmp_path / "out", method="prune_only", evaluate=None), overwrite=True)
    assert (work / "prune_only.json").exists()


def test_a_plan_that_fails_stops_no_run(workspace, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("a model of another kind")

    monkeypatch.setattr(memory_gate, "planned_on", fail)
    check_memory(recipe(workspace, tmp_path / "out"), Placement(), "cpu", Console(quiet=True))


def test_what_may_be_less_does_not_count(workspace, tmp_path, memory):
    """Hessians are counted at their most; weights on their way to a GPU are pages of files."""
    wanted = recipe(workspace, tmp_path / "out", method="prune_only", prune={"pruner": "sparsegpt", "sparsity": 0.5})
    plan = planned(wanted, probe=False)
    uncertain = {holding.what for holding in plan.holdings if not holding.certain}
    assert uncertain == {"Hessians of a block"}
    sums = phase_sums([holding for holding in plan.holdings if holding.certain], "host")
    memory(host=max(sums.values()))
    check_memory(wanted, Placement(), "cpu", Console(quiet=True))
    memory(host=max(sums.values()) - 1)
    with pytest.raises(LosaError, match="memory:"):
        check_memory(wanted, Placement(), "cpu", Console(quiet=True))
