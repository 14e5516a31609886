"""LLaMA-2-70B without the hub and without weights."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tools import ROOT, tool

RECIPE = ROOT / "examples/llama2-70b-wanda70.yaml"


def configuration(directory: Path) -> Path:
    """A directory that holds the configuration that docs/guide/planning.md shows, and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(tool("docs_pages").shown_configuration())
    return directory
