"""The environment variables: one table, one dialect, and nobody beside it reads any."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losa_kernels import native, pack_bitmask, pack_mask, settings
from losa_kernels.settings import Choice, Switch

ROOT = Path(__file__).parents[2]
ROWS = {setting.name: setting for setting in settings.TABLE}
CHOICES = [setting for setting in settings.TABLE if isinstance(setting, Choice)]


def sources(*patterns: str) -> dict[Path, str]:
    return {path: path.read_text() for pattern in patterns for path in ROOT.glob(pattern)}


def test_a_row_says_all_there_is_to_say():
    for setting in settings.TABLE:
        assert setting.about.endswith(".") and setting.read and setting.expected, setting.name
    assert all(setting.default in setting.values for setting in CHOICES)
    assert len(ROWS) == len(settings.TABLE)


def test_python_reads_variables_through_the_table_alone():
    python = sources("losa/**/*.py", "losa_kernels/**/*.py", "tools/*.py", "benchmarks/*.py", "setup.py")
    del python[Path(settings.__file__)]
    for path, text in python.items():
        assert not re.search(r"(environ(\.get|\.pop)?[\[(]|getenv\()\s*f?[\"']LOSA_", text), path


def test_every_variable_that_is_named_has_a_row():
    for path, text in sources(
        "losa*/**/*.py", "csrc/**/*.*", "tools/*", "benchmarks/*.py", "*.md", "docs/**/*.md"
    ).items():
        named = set(re.findall(r"\b(LOSA_[A-Z0-9_]+)=|(?:getenv|setting)\(\"(LOSA_[A-Z0-9_]+)", text))
        assert {name for pair in named for name in pair if name} <= set(ROWS), path


def test_native_code_knows_the_same_words():
    found = {}
    for text in sources("csrc/**/*.*").values():
        for name, words in re.findall(r"setting\(\"(LOSA_\w+)\", \{([^}]*)\}", text):
            found[name] = tuple(re.findall(r"\"(\w+)\"", words))
    assert found == {name: ROWS[name].values for name in ("LOSA_CPU_ISA", "LOSA_DEPENDENT_LAUNCH", "LOSA_WINDOW_LOT")}
    assert not [path for path, text in sources("csrc/**/*.*").items() if "getenv" in text and path.name != "settings.h"]


@pytest.mark.parametrize("setting", CHOICES, ids=lambda setting: setting.name)
def test_choices(setting, monkeypatch):
    for unset in ("", "  "):
        monkeypatch.setenv(setting.name, unset)
        assert setting() == setting.default and not setting.is_set
    for value in setting.values:
        monkeypatch.setenv(setting.name, f" {value.upper()}\n")
        assert setting() == value == setting.value_text() and setting.is_set
    monkeypatch.setenv(setting.name, "Other")
    first, last = ", ".join(setting.values[:-1]), setting.values[-1]
    with pytest.raises(settings.SettingError, match=f"^{setting.name}: expected {first} or {last}, got 'Other'$"):
        setting()


@pytest.mark.parametrize("setting", [s for s in settings.TABLE if isinstance(s, Switch)], ids=lambda s: s.name)
def test_switches(setting, monkeypatch):
    monkeypatch.delenv(setting.name, raising=False)
    assert setting() is setting.default
    for text, value in {"1": True, " ON": True, "yes": True, "0": False, "Off ": False, "false": False}.items():
        monkeypatch.setenv(setting.name, text)
        assert setting() is value and setting.value_text() == str(int(value))
    monkeypatch.setenv(setting.name, "2")
    with pytest.raises(ValueError, match=f"{setting.name}: expected 0 or 1, got '2'"):
        setting()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "8 minutes"])
def test_numbers(text, monkeypatch):
    monkeypatch.setenv("LOSA_GPU_MINUTES", " 2.5 ")
    assert settings.GPU_MINUTES() == 2.5
    monkeypatch.setenv("LOSA_GPU_MINUTES", text)
    with pytest.raises(ValueError, match=f"LOSA_GPU_MINUTES: expected a number above 0, got '{text}'"):
        settings.GPU_MINUTES()


def test_texts_are_left_as_they_are(monkeypatch):
    monkeypatch.setenv("LOSA_FAILED_TESTS", " /Tmp/Names ")
    assert settings.FAILED_TESTS() == "/Tmp/Names"


@pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
def test_native_code_reads_by_the_same_rules(monkeypatch):
    weight, mask = torch.ones(8, 16), pack_mask(torch.ones(8, 16, dtype=torch.bool))
    monkeypatch.setenv("LOSA_CPU_ISA", " Scalar ")
    assert native.cpu_isa() == "scalar"
    monkeypatch.setenv("LOSA_CPU_ISA", "")
    pack_bitmask(weight, mask)
    monkeypatch.setenv("LOSA_CPU_ISA", "SSE")
    message = "LOSA_CPU_ISA: expected auto, scalar, avx2 or avx512, got 'SSE'"
    with pytest.raises(Exception, match=message):
        pack_bitmask(weight, mask)
    with pytest.raises(settings.SettingError, match=message):
        native.cpu_isa()
    assert native.status()["losa_cpu"] == f"loaded ({message})"


@pytest.mark.subprocess
def test_it_runs_where_the_package_cannot_be_imported():
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['GPU_MINUTES']())"
    command = [sys.executable, "-S", "-I", "-c", code, settings.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "8"
