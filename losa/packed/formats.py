"""Names of the formats in which a weight is stored without its zeros. Nothing here needs torch, so help is quick."""

from __future__ import annotations

from losa.registry import Registry
from losa.storage.kinds import COMPRESSED

# Asks for the format that suits a weight best.
AUTO = "auto"
# Formats that can be asked for, each with a note for help. The formats are in losa.packed.weights, whose
# ``register_format`` adds names here.
NOTES: Registry[str] = Registry("note of format")
NOTES.register("bitmask", "")
NOTES.register("nm", "N of every 8 or 4")


def own_names() -> tuple[str, ...]:
    """What can be asked for of a directory as losa writes it, and of a weight in memory."""
    return (AUTO, *NOTES)


def all_names() -> tuple[str, ...]:
    """``own_names``, and the formats of a directory as compressed-tensors writes it."""
    return (*own_names(), *COMPRESSED)


def help_text() -> str:
    """All names in a sentence."""
    noted = [f"{name} ({NOTES[name]})" if NOTES[name] else name for name in NOTES]
    *most, last = (AUTO, *noted)
    theirs = ", ".join(COMPRESSED)
    return f"{', '.join(most)} or {last}; or {theirs}: a directory as compressed-tensors 0.12.2 writes it."
