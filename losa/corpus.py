"""Text that every Python carries: the language reference of ``pydoc_data.topics``, in three disjoint parts."""

from __future__ import annotations

from pydoc_data.topics import topics

SHARES = {"calibration": 0.15, "train": 0.6, "heldout": 0.25}


def documents(part: str) -> list[str]:
    """Topics of ``part`` ("calibration", "train" or "heldout").

    Whole topics are dealt out by size, each to the part that is furthest below its share, so that the parts differ in
    subject, not in kind. Raises KeyError for another part.
    """
    total = sum(map(len, topics.values()))
    dealt: dict[str, list[str]] = {name: [] for name in SHARES}
    filled = dict.fromkeys(SHARES, 0)
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):
        target = max(SHARES, key=lambda p: SHARES[p] - filled[p] / total)
        dealt[target].append(topics[name])
        filled[target] += len(topics[name])
    return dealt[part]
