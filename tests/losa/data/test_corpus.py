"""The text that Python carries, in parts."""

from __future__ import annotations

import pytest

from losa.data import corpus
from losa.data.sources import read_rows
from losa.recipe.sources import DataSource


def test_builtin_text_is_split_without_overlap():
    def grams(texts, n=13):
        words = [text.split() for text in texts]
        return {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}

    parts = {part: read_rows(DataSource(path=f"builtin:pydoc/{part}")) for part in corpus.SHARES}
    sizes = {part: sum(len(row["text"]) for row in rows) for part, rows in parts.items()}
    for part, share in corpus.SHARES.items():
        assert sizes[part] / sum(sizes.values()) == pytest.approx(share, abs=0.02)
        assert len(parts[part]) >= 5
    names = [name for dealt in corpus.split().values() for name in dealt]
    assert len(names) == len(set(names))
    seen = {part: grams(row["text"] for row in rows) for part, rows in parts.items()}
    assert not seen["heldout"] & (seen["train"] | seen["calibration"])
