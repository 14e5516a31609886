"""The checks of the project check what they say: hooks, `make lint`, `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def recipe_of(target: str) -> str:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, target
    return found[1]


def test_hooks_check_what_make_lint_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == set(re.findall(r"\$\(BIN\)/(\S+)", recipe_of("lint")))
    pattern = next(hook["files"] for hook in hooks if hook["id"] == "clang-format")
    files = [file for folder in ("csrc", "tests") for file in (ROOT / folder).rglob("*")]
    sources = [str(file.relative_to(ROOT)) for file in files if file.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 50 and all(re.search(pattern, source) for source in sources)


def test_a_warning_fails_the_documentation():
    """mkdocs counts the warnings that it logs, and --quiet has it log none."""
    assert "mkdocs build --strict" in recipe_of("docs") and "-q" not in recipe_of("docs")


def test_ci_stops_at_the_first_failure():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and "||" not in script
    assert re.findall(r"^make (\w+)", script, re.MULTILINE) == ["lint", "test", "docs"]
