"""Outputs and unfinished work: who may write, what may be replaced, what is kept and what is cleaned up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from losa.cli.app import app
from losa.errors import DataError, LosaError, OutputError
from losa.recipe.reading import parse_recipe
from losa.run import methods, pipeline, workspace
from losa.run.pipeline import run_recipe
from losa.run.workspace import Workspace
from losa.storage import lock
from losa.storage.files import MARKER, MARKERS, check_output, recover_all, staged_directory, write_json
from losa.storage.lock import claimed
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_trace_in_the_environment(monkeypatch):
    """The command line sets this one when nobody watches; put back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny_llama(layers=2).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps over the lazy dog.\n" for i in range(60)))
    return root


def recipe(inputs, output, **changes):
    text = str(inputs / "text.txt")
    settings = {
        "model": str(inputs / "model"),
        "output": str(output),
        "device": "cpu",
        "method": "prune_only",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": text, "samples": 2, "length": 16, "cka_samples": 2},
    }
    return parse_recipe(settings | changes)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(directory, *files):
    directory.mkdir(parents=True)
    for name in files:
        (directory / name).write_text("{}")
    return directory


@pytest.mark.parametrize("marker", MARKERS)
def test_only_what_losa_wrote_is_replaced(tmp_path, marker):
    ours, other = fill(tmp_path / "ours", "weights", marker), fill(tmp_path / "other", "thesis.tex")
    (tmp_path / "empty").mkdir()
    check_output(ours, overwrite=True)
    check_output(tmp_path / "empty", overwrite=False)
    with pytest.raises(OutputError, match="losa did not write it.*--force"):
        check_output(other, overwrite=True)
    with pytest.raises(OutputError, match="exists; give another directory or --overwrite"):
        check_output(other, overwrite=False)
    check_output(other, overwrite=True, force=True)
    assert names(other) == ["thesis.tex"]


def test_a_directory_without_a_mark_gets_one(tmp_path):
    with staged_directory(tmp_path / "plain") as staged:
        (staged / "model.safetensors").write_text("")
    with staged_directory(tmp_path / "run") as staged:
        write_json(staged / "losa_config.json", {})
    assert names(tmp_path / "plain") == [MARKER, "model.safetensors"] and names(tmp_path / "run") == [
        "losa_config.json"
    ]


def test_names_too_long_are_found_early(tmp_path):
    with pytest.raises(OutputError, match="File name too long"):
        check_output(tmp_path / ("a" * 245), overwrite=False)
    with pytest.raises(OutputError, match="cannot write"), claimed(tmp_path / ("a" * 300)):
        pass


@pytest.mark.parametrize("key", ["calibration", "model"])
def test_a_failure_before_any_work_leaves_nothing_in_the_way(inputs, tmp_path, key):
    output = tmp_path / "out"
    wrong = {"calibration": {"data": str(tmp_path / "nothing.txt"), "samples": 2, "length": 16}}
    wrong = wrong if key == "calibration" else {"model": str(tmp_path / "nothing")}
    with pytest.raises(LosaError, match="nothing"):
        run_recipe(recipe(inputs, output, **wrong))
    assert names(tmp_path) == []
    run_recipe(recipe(inputs, output))
    assert names(tmp_path) == ["out"]


def test_work_that_was_killed_before_its_first_result_is_no_obstacle(inputs, tmp_path):
    fill(tmp_path / "out.work", workspace.MARKER)
    fill(tmp_path / "out.work" / "losa", "metrics.jsonl", ".x.partial-1")
    run_recipe(recipe(inputs, tmp_path / "out"))
    assert names(tmp_path) == ["out"]


def test_work_that_was_killed_before_it_had_its_mark_is_no_obstacle(inputs, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    fill(tmp_path / "out.work", f".{workspace.MARKER}.partial-{dead.pid}")
    run_recipe(recipe(inputs, tmp_path / "out"))
    assert names(tmp_path) == ["out"]


def test_work_elsewhere_behind_a_link_is_left_there(inputs, tmp_path):
    elsewhere = fill(tmp_path / "scratch" / "work", workspace.MARKER)
    (tmp_path / "out.work").symlink_to(elsewhere)
    run_recipe(recipe(inputs, tmp_path / "out"))
    assert names(tmp_path) == ["out", "scratch"] and names(elsewhere) == [workspace.MARKER]


def test_somebody_elses_work_directory_is_left_alone(inputs, tmp_path):
    fill(tmp_path / "out.work", "notes")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=r"out\.work is needed .* losa did not make it"):
            run_recipe(recipe(inputs, tmp_path / "out"), **options)
    assert names(tmp_path / "out.work") == ["notes"]
    run_recipe(recipe(inputs, tmp_path / "out"), force=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("function", ["recover", "is_ours", "recover_all"])
def test_a_work_directory_that_may_not_be_read_is_named(inputs, tmp_path, monkeypatch, function):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    fill(tmp_path / "out.work", workspace.MARKER)
    monkeypatch.setattr(workspace, function, refused)
    with pytest.raises(OutputError, match=r"cannot work in .*out\.work \(Permission denied\)"):
        run_recipe(recipe(inputs, tmp_path / "out"))
    assert names(tmp_path) == ["out.work"]


def test_work_keeps_the_number_of_processes_that_it_began_with(inputs, tmp_path, monkeypatch):
    made, work = recipe(inputs, tmp_path / "out"), Workspace(tmp_path / "out")
    for now, then in ((3, 3), (2, 3)):
        monkeypatch.setattr(workspace, "process_count", lambda now=now: now)
        work.open(made, resume=True, overwrite=False, force=False)
        assert work.processes() == then
        (work.path / "lora.json").write_text("{}")
    assert work.open(made, resume=False, overwrite=True, force=False) is None and work.processes() == 2
    (work.path / workspace.MARKER).write_text("{}")
    with pytest.raises(OutputError, match=r"out\.work was made by another version of losa; .*--overwrite"):
        work.processes()


class Killed(BaseException):
    """Stands for SIGKILL: what cleans up in Python does not run where it is raised."""


def killed(*arguments, **options):
    raise Killed


def test_killed_between_the_last_rename_and_the_cleaning_up(inputs, tmp_path, monkeypatch):
    output, made = tmp_path / "out", recipe(inputs, tmp_path / "out")
    monkeypatch.setattr(Workspace, "close", killed)
    with pytest.raises(Killed):
        run_recipe(made)
    monkeypatch.undo()
    assert names(tmp_path) == ["out", "out.work"]
    before = (output / "losa_config.json").read_bytes()
    record = run_recipe(made, resume=True)
    assert names(tmp_path) == ["out"] and (output / "losa_config.json").read_bytes() == before
    assert record.to_dict() == json.loads(before)
    # Finished and cleaned up: a batch system may start it again.
    assert run_recipe(made, resume=True).to_dict() == json.loads(before)
    with pytest.raises(OutputError, match="exists"):
        run_recipe(recipe(inputs, output, seed=1), resume=True)
    with pytest.raises(OutputError, match="exists"):
        run_recipe(made)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
def test_another_recipe_does_not_pass_for_the_one_that_was_killed_at_its_end(inputs, tmp_path, monkeypatch, options):
    output = tmp_path / "out"
    monkeypatch.setattr(Workspace, "close", killed)
    with pytest.raises(Killed):
        run_recipe(recipe(inputs, output))
    monkeypatch.undo()
    if "overwrite" in options:
        assert run_recipe(recipe(inputs, output, seed=1), **options).recipe["seed"] == 1
    else:
        with pytest.raises(OutputError, match="exists"):
            run_recipe(recipe(inputs, output, seed=1), **options)
    assert names(tmp_path) == ["out"]


def test_unfinished_work_beside_an_older_output_is_not_taken_for_finished(inputs, tmp_path, monkeypatch):
    made = recipe(inputs, tmp_path / "out")
    run_recipe(made)
    monkeypatch.setattr(pipeline, "export_together", killed)
    with pytest.raises(Killed):
        run_recipe(made, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="exists"):
        run_recipe(made, resume=True)
    run_recipe(made, resume=True, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_the_only_round_is_kept_when_the_export_fails(inputs, tmp_path, monkeypatch):
    made = recipe(inputs, tmp_path / "out", prune={"sparsity": 0.5, "pruner": "sparsegpt"})

    def full(*arguments, **options):
        raise OutputError("output: No space left on device")

    monkeypatch.setattr(pipeline, "export_together", full)
    with pytest.raises(OutputError, match="No space"):
        run_recipe(made)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="--resume"):
        run_recipe(made)
    monkeypatch.setattr(methods.Engine, "run_round", killed)
    resumed = run_recipe(made, resume=True)
    monkeypatch.undo()
    assert resumed.masks == run_recipe(recipe(inputs, tmp_path / "again", prune=made.prune.model_dump())).masks


def test_a_live_process_holds_the_output(inputs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/losa", "run", "my recipe.yaml"])
    entered, leave, tried = threading.Event(), threading.Event(), []

    def first():
        with claimed(output):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(30)
    try:
        for options in ({}, {"resume": True}, {"overwrite": True, "force": True}):
            with pytest.raises(OutputError, match=rf"pid {os.getpid()} on .* since 20.*: losa run 'my recipe.yaml'"):
                run_recipe(recipe(inputs, output), **options)
            tried.append(options)
        # By another name, too.
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(OutputError, match="another process"), claimed(tmp_path / "link" / "out"):
            pass
        with claimed(tmp_path / "other"):
            pass
    finally:
        leave.set()
        thread.join()
    with claimed(output):
        assert ".out.lock" in names(tmp_path)
    assert names(tmp_path) == ["link"]


@pytest.mark.subprocess
def test_a_dead_process_holds_nothing(tmp_path):
    code = """
import sys, time
from pathlib import Path
from losa.storage.lock import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    with pytest.raises(OutputError, match=f"pid {process.pid} "), claimed(tmp_path / "out"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == [".out.lock"]
    with claimed(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_lock_file_without_sense_and_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    with claimed(tmp_path / "out"):
        (tmp_path / ".out.lock").write_text("[]")
        with pytest.raises(OutputError, match="which has just started"), claimed(tmp_path / "out"):
            pass

    def none(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with claimed(tmp_path / "out"):
        assert "no locks on this file system" in caplog.text


def test_errors_in_the_data_stay_what_they_are(inputs, tmp_path, monkeypatch):
    """Cleaning up must not hide why a run failed."""
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: (_ for _ in ()).throw(DataError("row 3")))
    monkeypatch.setattr(workspace, "remove_directory", lambda path: (_ for _ in ()).throw(OutputError("busy")))
    with pytest.raises(DataError, match="row 3"):
        run_recipe(recipe(inputs, tmp_path / "out"))


@pytest.mark.parametrize("broken", ["round-01", "prune_only.json", "out"])
def test_a_full_disk_is_named_and_the_run_goes_on(inputs, tmp_path, monkeypatch, broken):
    """``broken``: the file or directory that finds no room: a checkpoint, a comparison's result, the output."""
    changes = {"method": "sparse_lora", "compare": ["prune_only"], "lora": {"rank": 2}}
    changes["train"] = {"data": str(inputs / "text.txt"), "length": 16, "batch_size": 2, "max_tokens": 64}
    made = recipe(inputs, tmp_path / "out", **changes)
    replace = os.replace

    def full(source, target):
        if Path(target).name == broken:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=f"{broken}.*No space left on device"):
            run_recipe(made)
    # Nothing half-written, and all that was finished before.
    expected = {"round-01": {"prune_only.json"}, "prune_only.json": set(), "out": {"prune_only.json"}}[broken]
    work = tmp_path / "out.work"
    assert {path.name for path in work.glob("[!w]*.json")} - {"losa_config.json"} == expected
    assert [str(path) for path in tmp_path.rglob(".*.partial-*")] == []
    assert work.exists() == bool(expected)
    record = run_recipe(made, resume=True)
    assert [r.method for r in record.results] == ["dense", "prune_only", "sparse_lora"]
    assert names(tmp_path) == ["out"]


def test_leftovers_of_dead_processes_go_at_any_depth(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    fill(tmp_path / f"a/b/.round-01.partial-{dead.pid}", "x")
    fill(tmp_path / f"a/.round-02.old-{dead.pid}", "y")
    (tmp_path / f"a/.lora.json.partial-{dead.pid}").write_text("{")
    # A process with this number lives, but wrote nothing here: the number is of another machine.
    (tmp_path / f"a/.live.json.partial-{os.getppid()}").write_text("{")
    fill(tmp_path / "a/b/.round-03.partial-0", "z")
    recover_all(tmp_path)
    assert names(tmp_path / "a") == ["b", "round-02"] and names(tmp_path / "a/b") == []
    assert names(tmp_path / "a/round-02") == ["y"]


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_packing_and_unpacking_never_replace_what_they_read(inputs, tmp_path, command):
    run_recipe(recipe(inputs, tmp_path / "all" / "model"))
    source = tmp_path / "all" / "model"
    if command == "unpack":
        source = tmp_path / "all" / "packed"
        assert CliRunner().invoke(app, ["pack", str(tmp_path / "all/model"), "--output", str(source)]).exit_code == 0
    (tmp_path / "link").symlink_to(tmp_path / "all")
    for output in (tmp_path / "all", tmp_path / "link", source):
        told = CliRunner().invoke(app, [command, str(source), "--output", str(output), "--force"])
        assert told.exit_code == 1 and "overwriting would destroy" in told.output
    assert (source / "config.json").exists()


def test_packing_and_unpacking_ask_before_they_replace(inputs, tmp_path):
    def losa_(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    source, thesis = tmp_path / "pruned", fill(tmp_path / "thesis", "thesis.tex")
    model = tiny_llama(layers=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter[:, ::2] = 0
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    assert losa_("pack", source, "--output", packed).exit_code == 0
    # Nothing in these two tells that losa made them, but for the mark.
    assert losa_("unpack", packed, "--output", plain).exit_code == 0
    assert losa_("pack", source, "--output", tmp_path / "ct", "--format", "sparse-bitmask").exit_code == 0
    for name in ("plain", "ct"):
        assert MARKER in names(tmp_path / name)
        assert losa_("pack", source, "--output", tmp_path / name, "--overwrite").exit_code == 0
    for command in (["pack", source], ["unpack", packed]):
        refused = losa_(*command, "--output", thesis, "--overwrite")
        assert refused.exit_code == 1 and "--force" in refused.stderr and names(thesis) == ["thesis.tex"]
    assert losa_("unpack", packed, "--output", thesis, "--force").exit_code == 0
    assert "thesis.tex" not in names(thesis)
