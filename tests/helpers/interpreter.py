"""Tests that run in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from losa_kernels.dispatch import interpreted
from tests.native.aot import interpreter_problem

IN_INTERPRETER = interpreted()
interpreter = pytest.mark.skipif(not IN_INTERPRETER, reason="runs within test_in_the_interpreter")


def starts_interpreter(test: Callable) -> Callable:
    """Marks of a test that calls ``run_in_interpreter``."""
    marks = (
        pytest.mark.subprocess,
        pytest.mark.skipif(IN_INTERPRETER, reason="this is the process that it starts"),
        pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem())),
    )
    for mark in marks:
        test = mark(test)
    return test


def run_in_interpreter(file: str, *options: str, **environment: str) -> None:
    """Run a file's tests there, but those that need a GPU; none may fail, and some must pass."""
    own = {"TRITON_INTERPRET": "1", "LOSA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", file, "-m", "not gpu", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and re.search(r"^[s.]*\.\.\.", done.stdout, re.M), done.stdout
