"""The rooms of ``losa`` and ``losa_kernels``: who may import whom; how long files and functions may be."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.tools import tool

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 100
imports_in = tool("docs_pages").imports_in
# Each room and the rooms that it may import, lowest first: a room imports rooms above it in its table alone.
LOSA: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "storage": set(),
    "recipe": set(),
    "distributed": {"recipe"},
    "record": {"recipe"},
    "modules": set(),
    "pruners": {"recipe"},
    "model": {"distributed", "modules", "storage"},
    "data": {"distributed", "recipe", "storage"},
    "training": {"data", "distributed", "model", "modules", "recipe", "storage"},
    "algorithm": {"distributed", "model", "modules", "pruners", "recipe", "record", "training"},
    "evaluation": {"data", "distributed", "model", "recipe", "training"},
    "packed": {"model", "modules", "storage"},
    "inference": {"model", "modules", "packed", "storage"},
    "output": {"distributed", "model", "packed", "recipe", "record", "storage"},
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
    "cli": {"distributed", "evaluation", "inference", "output", "packed", "recipe", "run", "storage"},
    "__main__": {"cli"},
}
KERNELS: dict[str, set[str]] = {
    "version": set(),
    "_build_info": set(),
    "settings": set(),
    "arguments": set(),
    "tensors": set(),
    "scratch": set(),
    "timing": set(),
    "cuda_graphs": set(),
    "cuda_memory": set(),
    "native": {"_build_info", "settings"},
    "measured": {"cuda_graphs", "settings"},
    "dispatch": {"native", "settings"},
    "bitmask": {"arguments", "dispatch", "native"},
    "cka": {"arguments", "dispatch", "native", "tensors"},
    "decoder_step": {"arguments", "dispatch", "native"},
    "packing": {"arguments", "bitmask", "dispatch", "native", "tensors"},
    "pruning": {"arguments", "bitmask", "cuda_graphs", "dispatch", "measured", "native", "settings", "tensors"},
    "masked_lora": {"arguments", "bitmask", "dispatch", "measured", "native", "scratch", "settings", "tensors"},
    "grouped_masked_lora": {"arguments", "dispatch", "masked_lora", "settings", "tensors"},
    "dense_linear": {"arguments", "dispatch", "native"},
    "sparse_linear": {
        "arguments",
        "bitmask",
        "cuda_graphs",
        "cuda_memory",
        "dispatch",
        "measured",
        "native",
        "packing",
        "scratch",
        "settings",
        "tensors",
    },
}
TABLES = {"losa": LOSA, "losa_kernels": KERNELS}
# Whoever reads may import these. The first two import nothing of losa but each other.
EVERYBODY = {"losa": {"errors", "registry", "__version__"}, "losa_kernels": set()}
CODE = ("losa", "losa_kernels", "benchmarks", "tests", "tools")
PYTHON = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> set[str]:
    return imports_in(ast.parse(file.read_text()), file)


@pytest.mark.parametrize(
    "text",
    [
        "import losa.model",
        "import losa.model.blocks as b",
        "from losa import model",
        "from losa.model import find_blocks",
        "from losa.model.blocks import find_blocks",
        "from .. import model",
        "from ..model.blocks import find_blocks",
        "def f():\n    from losa.model import find_blocks",
        "if TYPE_CHECKING:\n    from losa.model import find_blocks",
        "try:\n    import losa.model\nexcept ImportError:\n    pass",
    ],
)
def test_every_form_of_an_import_is_seen(text):
    (found,) = imports_in(ast.parse(text), ROOT / "losa" / "modules" / "sparse.py")
    assert found.split(".")[:2] == ["losa", "model"]


def own_modules(package: str) -> dict[str, Path]:
    """The package's files by dotted name."""
    files = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


@pytest.mark.parametrize("package", TABLES)
def test_rooms_import_only_what_the_table_allows(package):
    table, used = TABLES[package], set()
    for name, file in own_modules(package).items():
        if name == package:  # the package's own __init__ names everything, and imports it on first use
            continue
        room = name.split(".")[1]
        assert room in table, f"{file}: the table has no room {room!r}"
        for target in imports(file):
            first, *inside = target.split(".")
            if first != package:
                continue
            assert inside, f"{file}: expected an import of what is used, got the whole package"
            if inside[0] not in EVERYBODY[package] | {room}:
                assert inside[0] in table[room], f"{file}: {room} may not import {target}"
                used.add((room, inside[0]))
    stated = {(room, other) for room, others in table.items() for other in others}
    assert used == stated, f"arrows of the table that nothing uses: {stated - used}"


@pytest.mark.parametrize("package", TABLES)
def test_the_table_runs_one_way(package):
    before: set[str] = set()
    for room, others in TABLES[package].items():
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


class AtImport(ast.NodeTransformer):
    """Keeps of a module only what runs when it is imported: no functions, and nothing for type checkers alone."""

    def visit_FunctionDef(self, node):
        return None

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def around(module: str) -> set[str]:
    """The packages that Python imports before a module."""
    parts = module.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


@pytest.mark.parametrize("package", TABLES)
def test_modules_import_in_no_circle(package):
    modules = own_modules(package)
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        targets = imports_in(AtImport().visit(ast.parse(file.read_text())), file)
        known = {t if t in modules else t.rpartition(".")[0] for t in targets} & modules.keys()
        packages = {outer for target in known for outer in around(target)} - around(name)
        graph[name] = (known | packages) - {name}
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
