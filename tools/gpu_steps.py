"""The steps of ``tools/gpu.sh``: what each runs, how long it takes on an H200 with 16 CPU cores, and its time limit.

Benchmarks measure while nothing else runs.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = "4096x4096,11008x4096,4096x11008"
OURS = "losa bf16;losa bf16, window;losa bf16, tiles;losa bf16, unpack"


@dataclass(frozen=True)
class Step:
    """One process. ``kind`` says what it leaves in the work folder: "benchmark" and "smoke" leave NAME.json, "tests"
    leaves the names of failed tests, and "" leaves nothing."""

    name: str
    expected: int  # seconds
    limit: int  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    tool: str | None = None  # a program that must be on the PATH


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def benchmark(name: str, expected: int, limit: int, *flags: str, title: str = "", **environment: str) -> Step:
    title = title or name
    command = python("-m", "benchmarks", name, "--device", "cuda", "--json", f"{{work}}/{title}.json", *flags)
    return Step(title, expected, limit, command, environment, "benchmark")


def tests(name: str, expected: int, limit: int, *flags: str, workers: int = 0, **environment: str) -> Step:
    """Runs pytest, with ``workers`` processes where pytest-xdist is installed. A test that hangs is ended where
    pytest-timeout is installed."""
    command = python("-m", "pytest", *flags)
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "worksteal"]
        environment = {"OMP_NUM_THREADS": "2"} | environment  # each would take threads for all cores
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "90"]
    return Step(name, expected, limit, command, environment, "tests")


def sanitizer(tool: str, expected: int, limit: int, *flags: str) -> Step:
    """Runs the tests marked "sanitizer" under a tool of compute-sanitizer. torch does not cache memory then, because no
    access is out of bounds inside the large segments of its cache."""
    marked = (file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.sanitizer" in file.read_text())
    files = sorted(map(str, marked))
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LOSA_AUTOTUNE": "0"}
    step = tests(tool, expected, limit, "-m", "sanitizer", *flags, *files, **environment)
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    return Step(tool, expected, limit, [*prefix, *step.command], step.environment, "tests", "compute-sanitizer")


def first() -> list[Step]:
    return [
        Step("smoke", 30, 70, python("tests/gpu/smoke.py", "--json", "{work}/smoke.json"), kind="smoke"),
        benchmark(
            "sparse_linear", 30, 70,
            "--shapes", SHAPES, "--patterns", "50%,60%,70%,2:4", "--batches", "1,4,8,16", "--only", OURS,
        ),
        benchmark(
            "masked_lora", 45, 130,
            "--shape", "4096x4096x4096", "--shape", "11008x4096x4096", "--rank", "8", "--rank", "16",
            "--repetitions", "5", "--no-slow-baselines",
        ),
        tests("gpu tests", 60, 110, "-m", "gpu", "-k", "not every_tile", workers=8, LOSA_AUTOTUNE="0"),
        tests("every tile", 15, 45, "-m", "gpu", "-k", "every_tile", workers=4, LOSA_AUTOTUNE="0"),
        benchmark("column_sweep", 12, 40, "--shape", "4096x4096", "--repetitions", "5"),
        benchmark("selection", 8, 25, "--shape", "4096x4096", "--repetitions", "5"),
        benchmark("hessian", 8, 25, "--width", "4096", "--tokens", "2048", "--repetitions", "5"),
        Step(
            "ncu", 30, 60,
            [
                "ncu", "--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats",
                "--section", "WarpStateStats", "--clock-control", "none", "--profile-from-start", "off",
                "--kernel-name", "regex:^({kernels})$", "--csv", "--log-file", "{work}/ncu.csv",
                *python("tests/gpu/smoke.py", "--profile"),
            ],
            tool="ncu",
        ),
        benchmark(
            "decode", 40, 80,
            "--random", "llama2-7b", "--sparsity", "0.5,0.7", "--tokens", "32", "--repetitions", "2",
        ),
        benchmark("decoder_step", 7, 25, "--quick"),
        benchmark("packing", 8, 25, "--shapes", "11008x4096", "--patterns", "50%,2:4"),
        benchmark("bitmask", 6, 20),
        benchmark("cka", 8, 25),
        sanitizer("memcheck", 30, 80),
        sanitizer("racecheck", 25, 80, "-k", "sparse_linear or tiles or packing or column_sweep"),
    ]  # fmt: skip


def decoded(title: str, **environment: str) -> Step:
    flags = ["--shapes", "4096x4096,11008x4096", "--patterns", "50%,70%", "--batches", "1"]
    ours = ["--only", "losa bf16, window;losa bf16, tiles"]
    return benchmark("sparse_linear", 8, 20, *flags, *ours, title=f"sparse_linear, {title}", **environment)


def swept(title: str, **environment: str) -> Step:
    flags = ["--shape", "4096x4096", "--repetitions", "3"]
    return benchmark("column_sweep", 9, 25, *flags, title=f"column_sweep, {title}", **environment)


def token(title: str, **environment: str) -> Step:
    flags = ["--random", "llama2-7b", "--sparsity", "0.7", "--tokens", "24", "--repetitions", "2"]
    return benchmark("decode", 25, 50, *flags, title=f"decode, {title}", **environment)


def again(failed_tests: list[str], smoke_failed: bool) -> list[Step]:
    steps = []
    blocking = {"CUDA_LAUNCH_BLOCKING": "1", "LOSA_AUTOTUNE": "0"}
    if smoke_failed:
        command = python("tests/gpu/smoke.py", "--json", "{work}/smoke again.json")
        steps.append(Step("smoke again", 40, 70, command, blocking, "smoke"))
    if failed_tests:
        steps.append(tests("failed tests again", 30, 80, *failed_tests, **blocking))
    return [
        *steps,
        *(decoded(f"LOSA_WINDOW_LOT={rows}", LOSA_WINDOW_LOT=str(rows)) for rows in (1, 2, 4)),
        decoded("LOSA_DEPENDENT_LAUNCH=always", LOSA_DEPENDENT_LAUNCH="always"),
        *(swept(f"LOSA_TRAILING={way}", LOSA_TRAILING=way) for way in ("fp32", "3xtf32")),
        *(swept(f"LOSA_FACTOR={way}", LOSA_FACTOR=way) for way in ("torch", "blocked")),
        *(token(f"LOSA_SPARSE_LINEAR={way}", LOSA_SPARSE_LINEAR=way) for way in ("window", "tiles")),
        token("LOSA_DEPENDENT_LAUNCH=0", LOSA_DEPENDENT_LAUNCH="0"),
        Step("chosen", 15, 60, python("-m", "losa.inference.choices")),
    ]


def missing(step: Step) -> bool:
    return step.tool is not None and shutil.which(step.tool) is None


def wheel_scripts() -> Path:
    """Programs of this interpreter's environment, cmake and ninja among them."""
    return Path(sys.executable).parent
