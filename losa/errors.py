"""Errors a user can act on. The CLI prints their message without a traceback."""

from __future__ import annotations

import reprlib


class LosaError(Exception):
    """Base of every error that losa raises on purpose."""

    # Of the command that it ends.
    exit_code = 1


class RecipeError(LosaError):
    """A recipe is missing, malformed, or asks for something impossible."""


class DataError(LosaError):
    """A data source is missing, empty, or not in the expected format."""


class ModelError(LosaError):
    """A model cannot be loaded, or has no structure that losa can work on."""


class NumericsError(LosaError):
    """A statistic, loss or weight became non-finite, or a Hessian singular."""


class OutputError(LosaError):
    """The output cannot be written, or fails its final check."""


def reason(error: BaseException) -> str:
    """What a library or the system says in one line: the system's own words; else the message's first line, with the
    next where the first announces it, and with the error's type where the message is only a key or nothing."""
    if words := getattr(error, "strerror", None):
        return words
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {told}" if isinstance(error, KeyError) else told


class _Repr(reprlib.Repr):
    def repr_int(self, x, level):
        # Python refuses to write integers of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"an integer of {x.bit_length()} bits"


def shown(value) -> str:
    """How a value of a user's is quoted in a message: its repr, cut where it is long, deep or goes round in circles."""
    short = _Repr()
    short.maxstring = short.maxother = 80
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 8
    short.maxlevel = 4
    text = short.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def shown_name(name: str) -> str:
    """A name as messages show it: not a thousand letters of it, and nothing that a terminal cannot print."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= 120 else f"{name[:100]}... ({len(name)} characters)"
