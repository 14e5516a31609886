"""What csrc keeps to: short files and functions, and includes that run one way."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SUFFIXES = (".h", ".cpp", ".cu")
FILES = sorted(p for folder in (CSRC, ROOT / "tests" / "emulator") for p in folder.rglob("*") if p.suffix in SUFFIXES)
FILE_LINES, FUNCTION_LINES = 400, 100
NOT_A_FUNCTION = re.compile(r"\b(namespace|struct|class|enum|union|extern)\b")


def long_functions(text: str) -> list[str]:
    """``line: header`` of each pair of braces over more than FUNCTION_LINES lines that no type or namespace opens."""
    code = re.sub(r'R"\(.*?\)"', lambda raw: "\n" * raw[0].count("\n"), text, flags=re.DOTALL)
    lines = [re.sub(r"//.*|\"(\\.|[^\"])*\"|'(\\.|[^'])'", "", line) for line in code.splitlines()]
    found, opened = [], []
    for number, line in enumerate(lines, 1):
        for brace in re.findall("[{}]", line):
            if brace == "{":
                opened.append(number)
                continue
            first = opened.pop()
            if number - first >= FUNCTION_LINES and not NOT_A_FUNCTION.search(lines[first - 1]):
                found.append(f"{first}: {lines[first - 1].strip()}")
    assert not opened, "braces that nothing closes"
    return found


@pytest.mark.parametrize("more", [0, 1])
def test_long_functions_are_found(more):
    body = "  x = '{';  // {\n" * (FUNCTION_LINES - 2 + more)
    found = long_functions(f"namespace n {{\nvoid f() {{\n{body}}}\n\nvoid g() {{}}\n}}  // namespace n\n")
    assert found == (["2: void f() {"] if more else [])


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= FILE_LINES, file
        assert not long_functions(text), file


def room(path: str) -> tuple[str, ...]:
    """(common,), (cpu,) or (cuda,) for a file that all ops share; followed by the op for a file of one op."""
    return Path(path).parts[:-1][:2]


def test_includes_run_one_way():
    """common knows no device, no device knows another, and no two folders know each other, even through others."""
    included: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for file in FILES:
        if CSRC not in file.parent.parents:  # files at the top of csrc may include everything
            continue
        own = room(str(file.relative_to(CSRC)))
        for name in re.findall(r'#include "([^"]+)"', file.read_text()):
            if (CSRC / name).exists():
                assert room(name)[0] in ("common", own[0]), f"{file}: {name}"
                included.setdefault(own, set()).add(room(name))
    assert included
    TopologicalSorter({own: others - {own} for own, others in included.items()}).prepare()
