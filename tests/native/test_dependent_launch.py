"""Which launches may start before the kernel before them is complete (csrc/cuda/launch.h)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import shared

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def attributes():
    def compile(path: Path) -> None:
        flags = ["-x", "c++", "-std=c++20", "-DLOSA_KERNELS_ONLY", f"-I{ROOT / 'csrc'}", "-cudart", "none"]
        subprocess.run([NVCC, *flags, Path(__file__).with_name("dependent_launch.cpp"), "-o", path], check=True)

    program = shared.made("dependent_launch", compile)

    def run(capturing, ptx_version, setting=None):
        environment = {} if setting is None else {"LOSA_DEPENDENT_LAUNCH": setting}
        command = [program, str(int(capturing)), str(ptx_version)]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    return run


@pytest.mark.subprocess
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_only_code_that_waits_starts_early_and_only_in_graphs(attributes):
    """PTX for 8.0, which a build for 8.0 and 9.0a holds, is what a GPU of compute capability 12.0 runs."""
    assert [attributes(True, version) for version in (80, 89, 90, 120)] == [0, 0, 1, 1]
    assert attributes(False, 90) == 0
    assert [attributes(False, 90, setting) for setting in (" Always", "auto", "0")] == [1, 0, 0]
    assert attributes(True, 90, "0") == 0 and attributes(False, 80, "always") == 0
    with pytest.raises(subprocess.CalledProcessError) as failed:
        attributes(True, 90, "1")
    assert b"LOSA_DEPENDENT_LAUNCH: expected auto, 0 or always, got '1'" in failed.value.stderr
