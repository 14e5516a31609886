"""Entries that settings name: the package registers its own, and code outside the package adds more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Registry(Generic[_T]):
    """Entries by name, in the order in which they were registered. ``kind``: what an entry is, for messages."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, _T] = {}

    def register(self, name: str, entry: _T) -> None:
        """Add an entry; the very same one may come again. Raises ValueError: the name belongs to another entry."""
        if self._entries.get(name, entry) != entry:
            raise ValueError(f"{self.kind} {name!r}: already registered as {_shown(self._entries[name])}")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> _T:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _shown(entry: object) -> str:
    return entry if isinstance(entry, str) else getattr(entry, "__name__", repr(entry))
