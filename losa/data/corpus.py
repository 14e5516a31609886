"""Text that is part of every Python: the language reference of ``pydoc_data.topics``, in three disjoint parts.

For demonstrations and tests without a network. Text and parts differ between versions of Python.
"""

from __future__ import annotations

import re
from functools import cache
from pydoc_data.topics import topics

# Of a text that is split into parts, the user's own too.
SHARES = {"calibration": 0.15, "train": 0.6, "heldout": 0.25}
SHORTEST = 500


def documents(part: str) -> list[str]:
    """Topics of ``part``: "calibration" (15 % of the characters), "train" (60 %) or "heldout" (25 %).

    Raises:
        KeyError: another part.
    """
    texts = _topics()
    return [texts[name] for name in split()[part]]


@cache
def split() -> dict[str, list[str]]:
    """Names of the topics in each part.

    Topics are assigned whole, the longest first, each to the part that is furthest below its share. So every part gets
    some long topics.
    """
    texts = _topics()
    total = sum(map(len, texts.values()))
    dealt: dict[str, list[str]] = {part: [] for part in SHARES}
    filled = dict.fromkeys(SHARES, 0)
    for name in sorted(texts, key=lambda n: (-len(texts[n]), n)):
        part = max(SHARES, key=lambda p: SHARES[p] - filled[p] / total)
        dealt[part].append(name)
        filled[part] += len(texts[name])
    return dealt


@cache
def _topics() -> dict[str, str]:
    """Topics in which each paragraph occurs once. Many topics are sections of a longer topic ("while" of "compound"),
    and the same text would get into two parts. The longest topic keeps a shared paragraph; topics shorter than
    ``SHORTEST`` after that are dropped."""
    seen: set[str] = set()
    texts = {}
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):
        kept = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        text = "\n\n".join(kept) + "\n"
        if len(text) >= SHORTEST:
            texts[name] = text
    return texts
