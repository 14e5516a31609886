"""What a user reads when a command fails for a reason that nobody foresaw, or for want of memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from losa import __version__
from losa.cli import errors as cli_errors
from losa.distributed.stop import Stopped
from losa.errors import LosaError, ModelError

ROOT = Path(__file__).parents[3]


def app(error: BaseException | None = None) -> typer.Typer:
    """Commands named as losa's that fail with ``error``."""
    made = typer.Typer(cls=cli_errors.Commands, pretty_exceptions_enable=False)

    @made.callback()
    def options(debug: bool = False):
        pass

    def fail():
        if error is not None:
            raise error

    for name in ("run", "prune", "eval", "inspect"):
        made.command(name)(fail)
    return made


def invoke(error, *arguments):
    return CliRunner().invoke(app(error), [*arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["losa", "run", "my recipe.yaml"])
    return tmp_path


@pytest.mark.parametrize(
    "error", [ValueError("a bug\nsecond line"), KeyError("x"), RecursionError("too deep"), AssertionError()]
)
def test_an_unexpected_error_is_a_report_with_the_traceback_in_a_file(here, error):
    result = invoke(error, "run")
    assert result.exit_code == 1 and "Traceback" not in result.output
    (file,) = here.iterdir()
    assert re.fullmatch(r"losa-error-\d{8}-\d{6}-\d+\.txt", file.name) and str(file) in result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith(f"losa: unexpected error: {type(error).__name__}") and "second line" not in result.stderr
    for part in (f"losa {__version__}", f"torch {torch.__version__}", "transformers ", "losa run 'my recipe.yaml'"):
        assert part in result.stderr
    text = file.read_text()
    assert "Traceback" in text and type(error).__name__ in text and "in fail" in text


def test_the_report_finds_another_place_or_stderr(here, monkeypatch):
    write = Path.write_text
    closed: list[str] = [os.curdir]

    def refuse(self, *arguments, **options):
        if str(self.parent) in closed:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    other = here / "tmp"
    other.mkdir()
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(other))
    result = invoke(ValueError("a bug"), "run")
    assert len(list(other.iterdir())) == 1 and str(other) in result.stderr
    closed.append(str(other))
    result = invoke(ValueError("a bug"), "run")
    assert result.exit_code == 1 and "ValueError: a bug" in result.stderr and "in fail" in result.stderr
    assert len(list(other.iterdir())) == 1


def test_debug_lets_everything_through(here, monkeypatch):
    assert isinstance(invoke(ValueError("a bug"), "--debug", "run").exception, ValueError)
    monkeypatch.setenv("LOSA_DEBUG", "1")
    assert isinstance(invoke(LosaError("no"), "run").exception, LosaError)
    assert list(here.iterdir()) == []


def test_a_run_that_was_stopped_has_an_exit_code_of_its_own(here):
    for arguments in (["run"], ["--debug", "run"]):
        result = invoke(Stopped("SIGUSR1", saved=True), *arguments)
        assert result.exit_code == 75
        assert result.stderr == "losa: stopped by SIGUSR1 after saving; run again with --resume\n"


def test_errors_before_a_command_starts(here, monkeypatch):
    def broken(self, *arguments, **options):
        raise RuntimeError("in parsing")

    monkeypatch.setattr(cli_errors.Commands, "make_context", broken)
    result = invoke(None, "run")
    assert result.exit_code == 1 and "unexpected error: RuntimeError: in parsing" in result.stderr
    assert isinstance(invoke(None, "--debug", "run").exception, RuntimeError)


def wrapped(cause):
    try:
        try:
            raise cause
        except Exception as error:
            raise ModelError("model 'x': cannot be loaded") from error
    except ModelError as error:
        return error


EXHAUSTED = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    "command, error, message",
    [
        ("run", torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory; lower train.batch_size"),
        ("prune", torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory; take --offload disk"),
        ("prune", EXHAUSTED, "out of memory; take --offload disk"),
        ("eval", MemoryError(), "out of memory; lower --batch-size"),
        ("eval", wrapped(EXHAUSTED), "out of memory; lower --batch-size"),
        ("prune", OSError(12, "Cannot allocate memory"), "out of memory; take --offload disk"),
        ("inspect", MemoryError(), "out of memory; this needs"),
    ],
)
def test_used_up_memory_has_advice_for_the_command(here, command, error, message):
    result = invoke(error, command)
    assert result.exit_code == 1 and result.stderr.startswith(f"losa: {message}")
    for key in ("train.", "distributed.mode: fsdp", "distributed.cpu_offload"):
        assert (key in result.stderr) == (command == "run")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name, shown", [(None, "standard output"), ("numbers.json", "numbers.json")])
def test_a_full_disk_is_a_sentence(here, name, shown):
    result = invoke(OSError(28, "No space left on device", name), "eval")
    assert result.exit_code == 1 and list(here.iterdir()) == []
    assert result.stderr == f"losa: cannot write {shown}: No space left on device\n"


@pytest.mark.parametrize("command, resumable", [("run", True), ("prune", True), ("eval", False)])
def test_ctrl_c_names_resume_where_there_is_one(here, command, resumable):
    result = invoke(KeyboardInterrupt(), command)
    assert result.exit_code == 130 and ("--resume" in result.stderr) == resumable


def test_a_reader_that_went_away_ends_quietly(here):
    result = invoke(BrokenPipeError(32, "Broken pipe"), "inspect")
    assert result.exit_code == 1 and result.stderr == "" and list(here.iterdir()) == []


def test_messages_survive_any_encoding(monkeypatch, capsys):
    class Ascii:
        encoding = "ascii"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text.encode("ascii").decode()

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Ascii())
    cli_errors._say("losa: Größe \udc80")
    assert sys.stderr.text == "losa: Gr\\xf6\\xdfe \\udc80\n"


def test_warnings_of_libraries_say_what_they_are(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    cli_errors.set_up_messages(False)
    warnings.showwarning("old", FutureWarning, "/x/torch/functional.py", 3)
    thread = threading.Thread(target=lambda: [].pop(), name="conversion")
    thread.start()
    thread.join()
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["warning from functional: FutureWarning: old", "warning from thread conversion: IndexError"]


@pytest.mark.subprocess
def test_a_broken_pipe_of_a_real_process():
    code = """
import os
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
from losa.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
