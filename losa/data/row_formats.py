"""What a row holds: plain text, an instruction or a conversation. Its fields are checked here."""

from __future__ import annotations

import json
from dataclasses import dataclass

from losa.data.row_files import Row
from losa.errors import DataError, shown
from losa.recipe.sources import DataSource


def row_format(row: Row, source: DataSource) -> str:
    """ "messages", "alpaca" or "text": the source's format, or for "auto" the format that the row's fields show.

    Raises:
        DataError: no format fits, or a field of the source's format is missing.
    """
    needs = {"messages": ["messages"], "alpaca": ["instruction", "output"], "text": [source.text_field]}
    if source.format == "auto":
        for name, fields in needs.items():
            if all(field in row.values for field in fields):
                return name
        raise DataError(
            f"{row.where}: unknown format; expected the field 'messages', the fields 'instruction' and 'output', or "
            f"{source.text_field!r} (text_field), got {shown(sorted(row.values))}"
        )
    if missing := [field for field in needs[source.format] if field not in row.values]:
        raise DataError(
            f"{row.where}: a row in {source.format} format needs {missing[0]!r}, got {shown(sorted(row.values))}"
        )
    return source.format


def row_text(row: Row, field: str) -> str:
    """The text of a field. Raises DataError if the field holds anything but text."""
    text = row.values[field]
    if not isinstance(text, str):
        raise DataError(f"{row.where}: field {field!r}: expected text, got {_kind(text)}")
    return text


@dataclass(frozen=True)
class Conversation:
    """A conversation: messages with role and content, and the tools that the assistant may call."""

    where: str
    messages: list[dict]
    tools: list[dict] | None


def checked_message(where: str, message) -> dict:
    """One message, checked, without fields that are null (Parquet gives every message the fields of all messages)."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: expected an object with role and content, got {shown(message)}")
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where}.role: expected text, got {_kind(message.get('role'))}")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise DataError(f"{where}.tool_calls: expected a list of objects, got {shown(calls)}")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    elif not (isinstance(content, str) or (content is None and calls)):
        raise DataError(f"{where}.content: expected text, got {_kind(content)}")
    return {k: v for k, v in message.items() if v is not None} | {"content": content}


def _part(where: str, part) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        raise DataError(f"{where}: expected a part of type text, got {shown(part)}")
    return part["text"]


def row_tools(row: Row) -> list[dict] | None:
    """A row's tools, given as a list of objects or as its JSON text; None: the row has no tools."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{row.where}: field 'tools': not JSON ({error})") from error
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{row.where}: field 'tools': expected a list of objects, got {shown(tools)}")
    return tools


def _kind(value) -> str:
    return "null" if value is None else type(value).__name__
