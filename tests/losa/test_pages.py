"""The documentation: its code runs, and its reference holds every public name."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import losa
import losa_kernels
from losa_kernels import dispatch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```python(?: title="(?P<file>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if BLOCK.search(page.read_text())]
ROOMS = ("modules", "model", "pruners", "recipe", "errors", "run")
PUBLIC = ["losa", *(f"losa.{room}" for room in ROOMS), "losa_kernels", "losa_kernels.packing", "losa_kernels.pruning"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, own_names, tmp_path, monkeypatch):
    """In order, in one namespace. A block with a file's name is that file, which a later block may import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "TABLE", dict(dispatch.TABLE))
    monkeypatch.setattr(losa_kernels, "__path__", [*losa_kernels.__path__, str(tmp_path / "losa_kernels")])
    namespace: dict = {}
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            file = tmp_path / block["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["code"])
        else:
            line = page.read_text()[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_entry(name):
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = {resolved(path) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None) or own_names(module)
    missing = [key for key in public if key != "__version__" and id(getattr(module, key)) not in described]
    assert not missing, f"docs/reference: no entry for {', '.join(missing)} of {name}"


def own_names(module: ModuleType) -> list[str]:
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [key for key in own if not key.startswith("_")]


def resolved(path: str) -> int:
    """The identity of what an entry describes."""
    module, _, name = path.rpartition(".")
    return id(getattr(importlib.import_module(module), name))


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads((DOCS / "tiny_model.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_one_version():
    assert losa.__version__ == losa_kernels.__version__
    assert f"## [{losa.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_lazy_names_are_those_that_are_listed():
    assert set(losa.__all__) == {"__version__", *losa._LAZY}
    assert set(losa_kernels.__all__) == {"__version__", *losa_kernels._EXPORTS}
