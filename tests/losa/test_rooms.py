"""The rooms of ``losa`` and ``losa_kernels``: who may import whom; how long files and functions may be."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 100
# Whoever reads may import these; they import nothing of losa but each other.
EVERYBODY = {"errors", "registry", "__version__"}
# Each room and the rooms that it may import, lowest first: a room imports rooms above it in this table alone.
LOSA: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "distributed": set(),
    "storage": set(),
    "recipe": set(),
    "record": {"recipe"},
    "modules": set(),
    "pruners": {"recipe"},
    "model": {"modules", "storage"},
    "data": {"recipe", "storage"},
    "algorithm": {"distributed", "model", "modules", "pruners", "recipe", "record"},
    "training": {"data", "distributed", "recipe", "storage"},
    "evaluation": {"data", "model", "recipe", "training"},
    "packed": {"model", "modules", "storage"},
    "inference": {"model", "modules", "packed", "storage"},
    "output": {"model", "packed", "recipe", "record", "storage"},
    "run": {
        "algorithm",
        "data",
        "distributed",
        "evaluation",
        "model",
        "modules",
        "output",
        "pruners",
        "recipe",
        "record",
        "storage",
        "training",
    },
    "cli": {"evaluation", "inference", "output", "packed", "recipe", "record", "run", "storage"},
    "__main__": {"cli"},
}
CODE = ("losa", "losa_kernels", "benchmarks", "tests", "tools")
PYTHON = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> list[str]:
    """Dotted names of what a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def own_modules(package: str) -> dict[str, Path]:
    """The package's files by dotted name."""
    files = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def test_rooms_import_only_what_the_table_allows():
    allowed = set()
    for name, file in own_modules("losa").items():
        room = name.split(".")[1] if "." in name else None
        if room is None:  # losa/__init__.py names everything, and imports it on first use
            continue
        assert room in LOSA, f"{file}: the table has no room {room!r}"
        for target in imports(file):
            parts = target.split(".")
            if parts[0] != "losa" or len(parts) == 1 or parts[1] in EVERYBODY | {room}:
                continue
            assert parts[1] in LOSA[room], f"{file}: {room} may not import {target}"
            allowed.add((room, parts[1]))
    stated = {(room, other) for room, others in LOSA.items() for other in others}
    assert allowed == stated, f"arrows of the table that nothing uses: {stated - allowed}"


def test_the_table_runs_one_way():
    before: set[str] = set()
    for room, others in LOSA.items():
        assert others <= before, f"{room} stands above {others - before}"
        before.add(room)


def test_the_map_shows_the_levels_of_the_table():
    """docs/develop/map.md: a room imports from the lines below its own."""
    levels = next(block for block in (ROOT / "docs/develop/map.md").read_text().split("```") if "\ncli\n" in block)
    below = set(LOSA)
    for line in levels.split("losa_kernels")[0].strip().splitlines():
        rooms = set(line.split(", "))
        below -= rooms
        for room in rooms:
            assert LOSA[room] <= below, f"{room} stands above {LOSA[room] - below}"
    assert below == {"__main__"}


def test_only_run_knows_a_recipe_as_a_whole():
    """Everything below is given the section that it needs."""
    for name, file in own_modules("losa").items():
        if not name.startswith(("losa.run", "losa.cli", "losa.recipe")) and name != "losa":
            assert not [t for t in imports(file) if t.startswith("losa.recipe") and t.endswith(".Recipe")], file


def test_losa_kernels_knows_nothing_above_it():
    for file in own_modules("losa_kernels").values():
        assert not [target for target in imports(file) if target.split(".")[0] == "losa"], file


@pytest.mark.parametrize("package", ["losa", "losa_kernels"])
def test_modules_import_in_no_circle(package):
    """At import time: an import inside a function, or for type checkers alone, waits until both modules are there."""
    modules = own_modules(package)
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        at_once = ast.Module([n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom)], [])
        targets = {f"{node.module}.{alias.name}" for node in at_once.body for alias in node.names}
        known = {t if t in modules else t.rpartition(".")[0] for t in targets}
        graph[name] = (known & modules.keys()) - {name}
    TopologicalSorter(graph).prepare()


def test_files_and_functions_are_short():
    for file in PYTHON:
        text = file.read_text()
        assert text.count("\n") <= FILE_LINES, f"{file}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= FUNCTION_LINES, f"{file}: {node.name} has {lines} lines"


def test_no_test_imports_another_test():
    for file in (ROOT / "tests").rglob("test_*.py"):
        assert not [target for target in imports(file) if ".test_" in f".{target}"], file
