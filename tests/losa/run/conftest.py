"""Fixtures of runs."""

from __future__ import annotations

import pytest

from tests.helpers.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tiny model and a text."""
    root = tmp_path_factory.mktemp("run")
    tiny_llama(layers=3).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    text = "The quick brown fox jumps over the lazy dog; a sparse model decodes faster than a dense one. "
    (root / "text.txt").write_text("\n".join(f"{i}: {text}" for i in range(60)))
    return root
