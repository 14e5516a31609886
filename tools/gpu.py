"""Runs the steps of ``gpu_steps`` one after another, each in a process of its own with its own time limit and log.

Steps need the build and nothing else from each other, and a step that fails does not end the run. After each step the
results in OUT are complete up to this step: ``results.json`` (machine, steps, benchmark rows, smoke cases, failed
tests; ``python -m benchmarks report`` reads it), ``logs.txt``, ``summary.txt`` and ``ncu.csv``. The files of ``again``
have the same names after "again-". By default OUT is benchmarks/results/CARD, and nothing is written without a GPU.
Without a GPU every step says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_steps
from gpu_steps import Step

ROOT = Path(__file__).parents[1]
PROBE_LIMIT, SETUP_LIMIT = 90, 150  # seconds; the second includes a build
LOG_BYTES = 200_000  # of each step's log, its end
NO_GPU, SKIPPED, NO_TIME = "no GPU", "skipped", "no time"
BAD = ("failed", "time limit")


class Ended(BaseException):
    """SIGTERM or SIGINT asks the run to end."""


class Run:
    def __init__(self, work: Path, minutes: float, prefix: str = ""):
        self.work, self.prefix = work, prefix
        self.deadline = time.monotonic() + 60 * minutes
        self.steps: list[dict] = []
        self.document: dict = {"machine": {}, "origin": {}, "steps": self.steps, "benchmarks": {}}
        self.out: Path | None = None
        self.committed: Path | None = None  # where this card's results are by default
        self.kernels = ""  # a regular expression of the names of losa's kernels

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(gpu_steps.wheel_scripts()), os.environ.get("PATH", "")])
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": python_path,
            "HF_HUB_OFFLINE": "1",
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
            "LOSA_FAILED_TESTS": str(self.work / "failed-tests.txt"),
        }

    def call(self, name: str, command: list[str], limit: float, **environment: str) -> tuple[str, float, Path]:
        """Runs a process until it ends or its limit is over; (status, seconds, log) of it and all that it starts."""
        log, start = self.work / f"{name}.log", time.monotonic()
        filled = [part.replace("{work}", str(self.work)).replace("{kernels}", self.kernels) for part in command]
        with log.open("wb") as file:
            file.write(f"$ {' '.join(f'{k}={v}' for k, v in environment.items())} {' '.join(filled)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                filled,
                cwd=ROOT,
                env=self.environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit)
                status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "time limit"
            finally:
                end_group(process)
        return status, time.monotonic() - start, log

    def record(self, name: str, status: str, seconds: float = 0.0, limit: float = 0.0, detail: str = "") -> None:
        row = {"step": name, "status": status, "seconds": round(seconds, 1), "limit": round(limit), "detail": detail}
        self.steps.append(row)
        print(line(row), flush=True)
        self.save()

    def save(self) -> None:
        """Writes all results so far, each file whole or not at all."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        logs = []
        for step in self.steps:
            log = self.work / f"{step['step']}.log"
            if log.exists():
                text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
                logs.append(f"===== {step['step']}: {step['status']}\n{text}")
        replace(self.out / f"{self.prefix}results.json", json.dumps(self.document, indent=1))
        replace(self.out / f"{self.prefix}logs.txt", "\n".join(logs))
        replace(self.out / f"{self.prefix}summary.txt", self.summary())
        if (table := self.work / "ncu.csv").exists():
            replace(self.out / f"{self.prefix}ncu.csv", table.read_text(errors="replace"))

    def summary(self) -> str:
        described = {**self.document["machine"], **self.document["origin"]}
        head = ", ".join(f"{key} {value}" for key, value in described.items() if value is not None)
        total = sum(step["seconds"] for step in self.steps)
        return "\n".join([head, "", *map(line, self.steps), f"{'':<54}{total:>7.1f} s in all", ""])

    def set_up(self) -> bool:
        """Finds versions, and builds for this GPU where the library does not load, has no code for it or is older than
        the sources. Returns whether to run the steps: not where there is no GPU. Where torch itself fails they run, and
        their logs say why."""
        probe = gpu_steps.python("-m", "benchmarks._machine")
        status, seconds, log = self.call("setup", probe, min(PROBE_LIMIT, self.left()))
        found = last_json(log)
        detail = ""
        if found.get("gpu") and not found["runs"] and self.left() > 0:
            detail = f"built for {architecture(found['capability'])}"
            build = gpu_steps.python("setup.py", "-q", "build_ext", "--inplace")
            limit = min(SETUP_LIMIT, self.left())
            built, more, _ = self.call("build", build, limit, LOSA_CUDA_ARCHS=architecture(found["capability"]))
            status, again, log = self.call("setup", probe, min(PROBE_LIMIT, self.left()))
            found, seconds = last_json(log), seconds + more + again
            shutil.copyfileobj((self.work / "build.log").open("rb"), log.open("ab"))
            if built != "ok" or not found.get("runs"):
                status, detail = "failed", f"the build: {built}; {found.get('native', {}).get('losa_cuda')}"
        self.document |= {key: found[key] for key in ("machine", "origin", "native") if key in found}
        if found.get("gpu"):
            self.out = self.committed = ROOT / "benchmarks" / "results" / found["card"]
        if "OUT" in os.environ:
            self.out = Path(os.environ["OUT"])
        status = NO_GPU if found.get("gpu") is False else status
        self.record("setup", status, seconds, SETUP_LIMIT, detail)
        return status != NO_GPU

    def run(self, step: Step) -> None:
        if gpu_steps.missing(step):
            return self.record(step.name, SKIPPED, detail=f"{step.tool} not found")
        if any("{kernels}" in part for part in step.command):
            names = gpu_steps.python("tests/gpu/smoke.py", "--kernels")
            self.kernels = last_line(self.call("kernels", names, min(PROBE_LIMIT, self.left()))[2])
        limit = min(step.limit, self.left())
        if limit < 1:
            return self.record(step.name, NO_TIME)
        failed = self.work / "failed-tests.txt"
        failed.unlink(missing_ok=True)
        status, seconds, log = self.call(step.name, step.command, limit, **step.environment)
        self.take(step, failed)
        self.record(step.name, status, seconds, limit, last_line(log) if status != "time limit" else "")

    def take(self, step: Step, failed: Path) -> None:
        """Adds what the step left to the document, also where the step was cut short."""
        file = self.work / f"{step.name}.json"
        if step.kind in ("benchmark", "smoke") and file.exists():
            with contextlib.suppress(ValueError):
                content = json.loads(file.read_text())
                if step.kind == "smoke":
                    self.document["smoke"] = content
                else:
                    self.document["benchmarks"][step.name] = content["rows"]
        if step.kind == "tests" and failed.exists():
            tests = list(dict.fromkeys(failed.read_text().splitlines()))
            self.document.setdefault("failed_tests", {})[step.name] = tests


def line(step: dict) -> str:
    return f"{step['step']:<44}{step['status']:<10}{step['seconds']:>7.1f} s  {step['detail'][:110]}".rstrip()


def end_group(process: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=patience)


def replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def last_json(log: Path) -> dict:
    for text in reversed(log.read_text(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(text), dict):
                return found
    return {}


def last_line(log: Path) -> str:
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines()[1:] if text.strip(" \n─└┘┴")]
    return lines[-1] if lines else ""


def architecture(capability: list[int]) -> str:
    """nvcc's name of the architecture. Instructions that only Hopper has need the suffix "a"."""
    return f"{capability[0]}{capability[1]}" + ("a" if tuple(capability) == (9, 0) else "")


def previous(*places: Path | None) -> dict:
    """The results of the first command, from the first place that has them."""
    for place in places:
        if place is not None:
            with contextlib.suppress(OSError, ValueError):
                return json.loads((place / "results.json").read_text())
    return {}


def steps_again(before: dict) -> list[Step]:
    tests = [test for name in before.get("failed_tests", {}) for test in before["failed_tests"][name]]
    failed = any(row["status"] != "PASS" for row in before.get("smoke", []))
    return gpu_steps.again(list(dict.fromkeys(tests)), failed)


def end(*_) -> None:
    raise Ended


def main(argv: list[str], first: Callable[[], list[Step]] = gpu_steps.first) -> int:
    if argv not in ([], ["again"]):
        print("usage: tools/gpu.sh [again]", file=sys.stderr)
        return 2
    minutes = runpy.run_path(str(ROOT / "losa_kernels/settings.py"))["GPU_MINUTES"]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="losa-gpu-") as folder:
        run = Run(Path(folder), minutes, "again-" if argv else "")
        try:
            gpu = run.set_up()
            for step in steps_again(previous(run.out, run.committed)) if argv else first():
                if gpu:
                    run.run(step)
                else:
                    run.record(step.name, NO_GPU)
        except Ended:
            run.record("ended", "failed", detail="from outside")
        print(f"\nresults: {run.out}" if run.out else "")
        return int(any(step["status"] in BAD for step in run.steps))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
