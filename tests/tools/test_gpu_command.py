"""tools/gpu.sh without a GPU: dry runs, what becomes of steps that fail or hang, and the checks that it runs first."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losa_kernels import native
from tests.gpu import checks, checks_decode, smoke
from tests.helpers.tools import tool

ROOT = Path(__file__).parents[2]
MOST_FILES = 8

gpu_steps, gpu = tool("gpu_steps"), tool("gpu")


@pytest.fixture
def fresh(tmp_path):
    return gpu.Run(tmp_path, minutes=1)


def step(name: str, code: str, limit: int = 20, **fields) -> gpu_steps.Step:
    return gpu_steps.Step(name, 1, limit, [sys.executable, "-c", code], **fields)


def on_a_card(monkeypatch, out: Path) -> None:
    """As if set_up had found a GPU."""

    def found(run):
        run.out = out
        run.document["machine"] = {"device": "a card", "driver": "1.2"}
        run.record("setup", "ok")
        return True

    monkeypatch.setattr(gpu.Run, "set_up", found)


@pytest.mark.subprocess
def test_both_commands_say_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "LOSA_GPU_MINUTES": "1"}
    for command, prefix in (([], ""), (["again"], "again-")):
        shell = [ROOT / "tools" / "gpu.sh", *command]
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        document = json.loads((tmp_path / "out" / f"{prefix}results.json").read_text())
        assert {row["status"] for row in document["steps"]} == {"no GPU"} and len(document["steps"]) > 8
        assert document["machine"]["torch"] and document["origin"]["commit"] and document["origin"]["date"]
        assert (tmp_path / "out" / f"{prefix}summary.txt").read_text().count("no GPU") == len(document["steps"])
    assert len(list((tmp_path / "out").iterdir())) <= MOST_FILES


def test_a_step_that_fails_or_hangs_ends_alone(tmp_path, monkeypatch, capsys):
    """Results are complete after each; a process that the step started dies with it."""
    out, child = tmp_path / "out", tmp_path / "child"
    on_a_card(monkeypatch, out)
    hang = "import subprocess, time; p = subprocess.Popen(['sleep', '60'])"
    hang += f"; open({str(child)!r}, 'w').write(str(p.pid))"
    rows = '{"rows": [{"op": "x"}]}'
    tests = "import os; open(os.environ['LOSA_FAILED_TESTS'], 'a').write('tests/test_x.py::test_y[a b]\\n')"
    seen = f"import json; json.load(open({str(out / 'results.json')!r})); print('before: ok')"
    steps = [
        step("good", f"open('{{work}}/good.json', 'w').write('{rows}'); print('fine')", kind="benchmark"),
        step("partial", f"open('{{work}}/partial.json', 'w').write('{rows}'); raise SystemExit(1)", kind="benchmark"),
        step("killed", "import os; os.kill(os.getpid(), 9)"),
        step("hangs", hang + "; time.sleep(60)", limit=2),
        step("tests", tests + "; raise SystemExit(1)", kind="tests"),
        step("later", seen),
        step("tool", "", tool="a-program-that-nobody-has"),
    ]
    assert gpu.main([], first=lambda: steps) == 1
    document = json.loads((out / "results.json").read_text())
    statuses = {row["step"]: row["status"] for row in document["steps"]}
    assert statuses == {
        "setup": "ok",
        "good": "ok",
        "partial": "failed",
        "killed": "failed",
        "hangs": "time limit",
        "tests": "failed",
        "later": "ok",
        "tool": "skipped",
    }
    assert document["benchmarks"] == {"good": [{"op": "x"}], "partial": [{"op": "x"}]}
    assert document["failed_tests"] == {"tests": ["tests/test_x.py::test_y[a b]"]}
    state = Path("/proc", child.read_text(), "stat")
    assert not state.exists() or ") Z " in state.read_text()  # nobody may have asked how it ended
    assert "a card, driver 1.2" in (out / "summary.txt").read_text() and "before: ok" in (out / "logs.txt").read_text()
    assert "a-program-that-nobody-has not found" in capsys.readouterr().out

    monkeypatch.setattr(gpu_steps, "again", lambda failed, smoke: [step("again", f"print({failed!r}, {smoke})")])
    assert gpu.main(["again"]) == 0
    assert "['tests/test_x.py::test_y[a b]'] False" in (out / "again-logs.txt").read_text()


def test_the_whole_run_has_a_limit(tmp_path, monkeypatch):
    on_a_card(monkeypatch, tmp_path / "out")
    monkeypatch.setenv("LOSA_GPU_MINUTES", str(3 / 60))
    sleep = "import time; time.sleep(60)"
    assert gpu.main([], first=lambda: [step("first", sleep), step("second", sleep)]) == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert [row["status"] for row in rows] == ["ok", "time limit", "no time"]


def test_the_steps_fit_their_time():
    """Expected: six and a half minutes of eight, and a second command of four."""
    first, again = gpu_steps.first(), gpu_steps.again(["tests/test_x.py::test_y"], True)
    assert sum(s.expected for s in first) + 30 <= 400 and sum(s.expected for s in again) <= 260
    assert all(s.expected <= s.limit for s in (*first, *again))
    assert len({s.name for s in first}) == len(first)


def test_sanitizers_collect_the_files_with_their_tests_alone():
    for step in gpu_steps.first():
        if step.tool == "compute-sanitizer":
            files = [Path(part) for part in step.command if part.endswith(".py")]
            assert len(files) > 4 and all("mark.sanitizer" in file.read_text() for file in files)
            assert Path(__file__) not in files, "it names the mark and has no test for sanitizers"


@pytest.mark.parametrize(
    "step", [s for s in (*gpu_steps.first(), *gpu_steps.again([], True)) if s.kind == "benchmark"], ids=lambda s: s.name
)
def test_benchmarks_take_their_flags(step, monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments):
        raise Parsed(parse(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    assert step.command[1:3] == ["-m", "benchmarks"]
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{step.command[3]}").main(step.command[4:])


def test_the_architecture_to_build_for(monkeypatch):
    assert gpu.architecture([9, 0]) == "90a" and gpu.architecture([8, 6]) == "86" and gpu.architecture([12, 0]) == "120"
    built = {"cuda_archs": ["80", "90a"]}
    monkeypatch.setattr(native, "build_info", lambda: built)
    runs = {(8, 0): True, (8, 6): True, (8, 9): True, (9, 0): True, (7, 5): False, (10, 0): False, (12, 0): False}
    assert {capability: native.built_for(capability) for capability in runs} == runs
    built["cuda_archs"] = ["89"]
    assert not native.built_for((8, 6))


def test_a_library_older_than_the_sources_is_built_anew(tmp_path, monkeypatch):
    from benchmarks import _machine

    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source, library = tmp_path / "csrc" / "cuda" / "x.cu", tmp_path / "x.so"
    source.touch()
    monkeypatch.setattr(_machine, "ROOT", tmp_path)
    monkeypatch.setattr(native, "LIBRARY_FOLDER", tmp_path)
    assert not _machine.built_in_place()
    library.touch()
    os.utime(source, (0, library.stat().st_mtime - 1))
    assert _machine.built_in_place()
    os.utime(source, (0, library.stat().st_mtime + 1))
    assert not _machine.built_in_place()


def test_every_cuda_operator_and_triton_kernel_has_a_case():
    cases = list(checks.cases(checks.LLAMA, "cuda"))
    covered = {name for case in cases for name in case.runs}
    sources = [file.read_text() for file in (ROOT / "csrc" / "cuda").rglob("*.cu")]
    operators = {name for text in sources for name in re.findall(r'library\.impl\("(\w+)"', text)}
    assert operators and operators <= covered, f"no case in tests/gpu/checks.py: {operators - covered}"
    pytest.importorskip("triton")
    assert set(smoke.triton_kernels()) <= covered
    assert len({case.label for case in cases}) == len(cases)


def test_the_checks_pass_here_and_see_a_wrong_kernel(monkeypatch, capsys):
    rows = smoke.run(checks.cases(checks.SMALL, "cpu"))
    assert [row for row in rows if row["status"] != "PASS"] == []
    monkeypatch.setattr(checks_decode, "sparse_linear", lambda x, packed, bias: 1.02 * packed_product(x, packed, bias))
    for module in (checks, checks_decode):
        monkeypatch.setattr(module, "pack_mask", lambda kept: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(checks, "gram", lambda x: torch.full((2, x.shape[1], x.shape[1]), float("nan")))
    rows = smoke.run(checks.cases(checks.SMALL, "cpu"))
    for kind in ("mask ", "pack", "window", "wanda", "gram"):
        assert {row["status"] for row in rows if row["name"].startswith(kind)} == {"FAIL"}, kind
    assert next(row for row in rows if row["name"].startswith("pack"))["message"].startswith("ValueError")


def packed_product(x, packed, bias):
    return torch.nn.functional.linear(x, packed.unpack(), bias)


def test_what_cannot_run_after_a_lost_context_is_named(monkeypatch, tmp_path):
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "synchronize", synchronize)
    fine = checks.Case("fine", (), lambda: (0.0, 0.0))
    bad = checks.Case("bad", (), lambda: (lost.append(1), 0.0))
    rows = smoke.run([fine, bad, fine], tmp_path / "rows.json")
    assert [row["status"] for row in rows] == ["PASS", "FAIL", "not run"]
    assert "illegal memory access" in rows[1]["message"] and rows[2]["message"] == "the CUDA context was lost in: bad"
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


LOSES_THE_CONTEXT = """
import pytest, torch

lost = []
def synchronize(*_):
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(4))
def test_one(i):
    if i == 1:
        lost.append(i)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_context_is_the_fault_of_one_test(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_losing.py").write_text(LOSES_THE_CONTEXT)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  sanitizer\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-n", str(workers)] if workers else []
    environment = os.environ | {"LOSA_FAILED_TESTS": str(tmp_path / "failed.txt")}
    environment.pop("PYTEST_XDIST_WORKER", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 if workers else done.returncode != 0, done.stdout + done.stderr
    named = {name.rpartition("::")[2] for name in (tmp_path / "failed.txt").read_text().splitlines()}
    assert named == {"test_one[1]"}, done.stdout
    if workers:  # a new process runs the others
        assert re.search(r"PASSED.*test_one\[3\]", done.stdout), done.stdout
    else:
        assert "test_one[1]: the CUDA context is lost" in done.stdout and "test_one[2]" not in done.stdout
