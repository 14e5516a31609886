"""Finds the assistant's turns in the text that a chat template makes of a conversation.

A template may render a message differently when other messages follow (Qwen3's empty <think> block), rename roles,
strip contents or leave messages out. So turns are found in the text of the whole conversation. The conversation is
rendered again with a changed message; the part of the text that changes belongs to that message.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from os.path import commonprefix
from typing import NamedTuple

from losa.errors import DataError

# render(messages, prompt=False) -> text; prompt adds the opening of the assistant's next turn. May raise DataError.
Render = Callable[..., str]

# Fields that a template checks or copies. They are not changed, since other parts of the text could change with them.
_KEPT_FIELDS = ("role", "type", "id", "tool_call_id")


class Span(NamedTuple):
    """Characters start..stop - 1 are one turn of the assistant; characters free..start - 1 are markup of the
    template."""

    start: int
    stop: int
    free: int


class _Region(NamedTuple):
    """Characters start..stop - 1 depend on one message. ``varied``: the whole text with that message marked."""

    start: int
    stop: int
    varied: str


class _Unclear(Exception):
    """The text does not show which part of it belongs to a message."""


def answer_spans(render: Render, messages: list[dict]) -> list[Span] | None:
    """The assistant's turns in ``render(messages)``, in the order of the text. A turn begins after the opening that the
    template gives to an answer, and ends after the template's markup for the end of the answer (the end-of-turn token).

    None: the turns cannot be told from other text. No span holds text of another message.
    """
    text = render(messages)
    try:
        return _by_prefixes(render, messages, text) or _by_changes(render, messages, text)
    except (DataError, _Unclear):
        # The template refuses a part of the conversation, or the conversation with other contents.
        return None


def marked(message: dict, mark: str) -> dict:
    """The message with ``mark`` as its content; for the assistant, with ``mark`` in place of every text in it."""
    return _with_mark(message, mark) if message["role"] == "assistant" else message | {"content": mark}


def unused_character(text: str) -> str:
    """A character of Unicode's private use area that does not occur in ``text``."""
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def _with_mark(value, mark: str):
    if isinstance(value, dict):
        return {k: v if k in _KEPT_FIELDS else _with_mark(v, mark) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_mark(v, mark) for v in value]
    return mark if isinstance(value, str) else value


def _by_prefixes(render: Render, messages: list[dict], text: str) -> list[Span] | None:
    """Spans between two renderings, of the conversation before each answer and with it. None unless these renderings
    are beginnings of ``text``, and the spans hold the same text when all other messages have other contents."""
    mark = unused_character(text)
    others = [m if m["role"] == "assistant" else marked(m, mark) for m in messages]
    spans = []
    try:
        changed = render(others)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            (start, stop), (start_there, stop_there) = (
                _between(render, conversation, whole, index)
                for conversation, whole in ((messages, text), (others, changed))
            )
            if text[start:stop] != changed[start_there:stop_there]:
                return None
            before = _common_suffix(text[:start], changed[:start_there])
            spans.append(Span(start, stop, start - before))
    except (DataError, _Unclear):
        return None
    return spans


def _between(render: Render, messages: list[dict], text: str, index: int) -> tuple[int, int]:
    opened = render(messages[:index], prompt=True)
    closed = text if index == len(messages) - 1 else render(messages[: index + 1])
    if not (text.startswith(opened) and text.startswith(closed) and len(opened) <= len(closed)):
        raise _Unclear
    return len(opened), len(closed)


def _by_changes(render: Render, messages: list[dict], text: str) -> list[Span]:
    """Spans around the text that depends on each answer. Raises _Unclear."""
    mark = unused_character(text)
    regions = {}
    for index, message in enumerate(messages):
        region = _region(render, messages[:index] + [marked(message, mark)] + messages[index + 1 :], text, mark)
        if region is not None:
            regions[index] = region
    # A system message may be rendered anywhere. All other messages must be rendered in order, each in one place.
    turns = [region for index, region in regions.items() if messages[index]["role"] != "system"]
    for ordered in (turns, sorted(regions.values())):
        if any(one.stop > following.start for one, following in pairwise(ordered)):
            raise _Unclear
    spans = []
    for index, region in regions.items():
        if messages[index]["role"] == "assistant":
            rest = [other for i, other in regions.items() if i != index]
            free = max((other.stop for other in rest if other.stop <= region.start), default=0)
            limit = min((other.start for other in rest if other.start >= region.stop), default=len(text))
            start = _opening_end(render, messages[:index], text, free, region.start, mark)
            after = region.varied[region.varied.rfind(mark) + 1 :]
            own = commonprefix([_closing(render, messages[: index + 1], mark) or "", after])
            spans.append(Span(start, max(region.stop, min(len(text) - len(after) + len(own), limit)), free))
    return spans


def _region(render: Render, conversation: list[dict], text: str, mark: str) -> _Region | None:
    """The difference between ``text`` and the text of a conversation with one marked message; None: no difference."""
    varied = render(conversation)
    if varied == text:
        return None
    if mark not in varied:
        raise _Unclear
    start = len(commonprefix([text, varied]))
    stop = len(text) - min(_common_suffix(text, varied), len(text) - start)
    return _Region(start, stop, varied)


def _opening_end(render: Render, before: list[dict], text: str, free: int, start: int, mark: str) -> int:
    """Where the template's opening of an answer ends within text[free:start]; ``start`` if the opening is not there. An
    answer without an opening (Mistral's) begins after the message before it and the markup of that message."""
    try:
        opened, closed = render(before, prompt=True), render(before)
    except DataError:  # templates refuse an empty conversation
        return start
    opening = opened[len(closed) :] if opened.startswith(closed) else None
    if opening == "" and before:
        closing = _closing(render, before, mark)
        return start if closing is None or not text[free:start].startswith(closing) else free + len(closing)
    found = text.rfind(opening, free, start) if opening else -1
    return found + len(opening) if opening and found >= 0 else start


def _closing(render: Render, conversation: list[dict], mark: str) -> str | None:
    """The markup that ends the last message of a conversation; None if it is not known."""
    try:
        alone = render([*conversation[:-1], marked(conversation[-1], mark)])
    except DataError:
        return None
    return alone[alone.rfind(mark) + 1 :] if mark in alone else None


def _common_suffix(one: str, other: str) -> int:
    return len(commonprefix([one[::-1], other[::-1]]))
