"""Compiles and runs the drivers in tests/emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import shared

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "emulator"
COMPILER = shutil.which("g++")
# -g1: line numbers for the sanitizers' reports, in three quarters of the time that -g takes.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DLOSA_EMULATOR"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
NEEDED = [
    pytest.mark.subprocess,
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the emulator switches x86-64 stacks"),
]


@pytest.fixture(scope="session")
def drivers():
    """The path of a driver in tests/emulator, compiled when it is first asked for."""

    def build(name: str) -> Path:
        def compile(path: Path) -> None:
            command = [COMPILER, *FLAGS, *WARNINGS, f"-I{ROOT / 'csrc'}", f"-I{FOLDER}", FOLDER / f"{name}.cpp"]
            result = subprocess.run([*command, "-o", path], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr

        return shared.made(f"emulated-{name}", compile)

    return build


@pytest.fixture
def emulate(drivers, tmp_path):
    """Run a driver's command on arrays; the array it writes as ``result``."""

    def run(driver, command, *numbers, seed=0, result=None, **arrays):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, array in arrays.items():
            if array is not None:
                values = array if isinstance(array, np.ndarray) else as_bytes(array)
                values.tofile(tmp_path / name)
        done = subprocess.run(
            [drivers(driver), tmp_path, str(seed), command, *map(str, map(int, numbers))],
            capture_output=True,
            text=True,
            env={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )
        if result is None:
            return done
        assert done.returncode == 0, done.stderr
        return tmp_path

    return run


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def load(folder: Path, name: str, dtype: type, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(folder / name, dtype)).reshape(shape)
