"""Rows to tokens and labels: plain text, instructions and conversations."""

from __future__ import annotations

from typing import Literal

import numpy as np

from losa.data.answers import answer_spans, marked, unused_character
from losa.data.row_files import Row
from losa.data.row_formats import Conversation, checked_message, row_format, row_text, row_tools
from losa.data.sequences import IGNORED
from losa.errors import DataError, reason, shown
from losa.recipe.sources import DataSource

TITLES = {"user": "Instruction", "assistant": "Response"}


class Renderer:
    """Rows to tokens and labels.

    Conversations are rendered by the tokenizer's chat template. Without one, they are "### Instruction:" and
    "### Response:" sections and the end-of-text token. Plain text is tokenized as it is, with the end-of-text token.

    A message may hold any field that its template knows (tool_calls, tool_call_id, name, reasoning_content, ...). Its
    content may be null beside tool calls, or a list of text parts, which are joined. The template also gets the row's
    ``tools``. ``skipped``: places of rows whose template does not show which part of the text is the assistant's.
    """

    def __init__(self, tokenizer, train_on: Literal["response", "all"]):
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.skipped: list[str] = []
        self._shows_calls = False

    def __call__(self, row: Row, source: DataSource) -> tuple[list[int], list[int]] | None:
        """(input_ids, labels) of one row, of equal length; None: the row is skipped, and noted in ``skipped``.

        With ``train_on="response"`` the assistant's turns have labels, and no token with text of another message has.

        Raises:
            DataError: a malformed row, or one that the template refuses.
        """
        kind = row_format(row, source)
        if kind == "text":
            ids = self._end(encode(self.tokenizer, row_text(row, source.text_field)))
            return ids, ids
        chat = self._chat(row, kind)
        text = self._render(chat, chat.messages)
        if self.train_on == "all":
            ids = self._conversation(text)
            return ids, ids
        spans = answer_spans(lambda messages, prompt=False: self._render(chat, messages, prompt), chat.messages)
        found = None if spans is None else self._token_spans(text, spans)
        if found is None:
            self.skipped.append(row.where)
            return None
        ids, answers = found
        labels = [IGNORED] * len(ids)
        for start, stop in answers:
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def _token_spans(self, text: str, spans) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Tokens of ``text``, and the ranges of them that hold the spans; None if tokens cannot be placed.

        A token across the border between the template's opening and the answer belongs to the answer, unless it also
        holds text of another message. A token across the end of an answer belongs to the text after it.
        """
        if not self.tokenizer.is_fast:
            return self._token_spans_by_parts(text, spans)
        encoded = _encoding(self.tokenizer, text, return_offsets_mapping=True, **self._specials)
        ids = self._end(encoded["input_ids"]) if not self.templated else encoded["input_ids"]
        # Special tokens that the tokenizer adds have the empty range (0, 0).
        ends = np.maximum.accumulate(np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64))
        ranges = []
        for span in spans:
            start = int(np.searchsorted(ends, span.start, side="right"))
            if start and ends[start - 1] < span.free:
                start += 1
            stop = len(ids) if span.stop == len(text) else int(np.searchsorted(ends, span.stop, side="right"))
            ranges.append((start, stop))
        return ids, ranges

    def _token_spans_by_parts(self, text: str, spans) -> tuple[list[int], list[tuple[int, int]]] | None:
        """``_token_spans`` for tokenizers that give no offsets: the text up to each border is tokenized."""
        ids = self._conversation(text)
        ranges = []
        for span in spans:
            start = _prefix(self._conversation(text[: span.start], end=False), ids)
            last = span.stop == len(text)
            stop = len(ids) if last else _prefix(self._conversation(text[: span.stop], end=False), ids)
            if start is None or stop is None:
                return None
            ranges.append((start + (span.free == span.start), stop))
        return ids, ranges

    def _conversation(self, text: str, end: bool = True) -> list[int]:
        ids = encode(self.tokenizer, text, **self._specials)
        return ids if self.templated or not end else self._end(ids)

    @property
    def _specials(self) -> dict:
        # A template writes special tokens itself.
        return {"add_special_tokens": False} if self.templated else {}

    def _render(self, chat: Conversation, messages: list[dict], prompt: bool = False) -> str:
        """Text of a conversation; ``prompt`` adds the opening of the assistant's next message."""
        if not self.templated:
            text = "\n\n".join(f"### {_title(m['role'])}:\n{m['content']}" for m in messages)
            return text + ("\n\n" if text else "") + f"### {_title('assistant')}:\n" if prompt else text
        tools = {} if chat.tools is None else {"tools": chat.tools}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **tools)
        except Exception as error:  # an error of jinja, or any that the template raises
            raise DataError(f"{chat.where}: the tokenizer's chat template refuses this row ({error})") from error

    def _end(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _chat(self, row: Row, kind: str) -> Conversation:
        """A row's conversation, which holds a message of the assistant."""
        if kind == "alpaca":
            prompt = row_text(row, "instruction")
            if row.values.get("input"):
                prompt += f"\n\n{row_text(row, 'input')}"
            answer = row_text(row, "output")
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return Conversation(row.where, turns, None)
        messages = row.values["messages"]
        if not isinstance(messages, list):
            raise DataError(
                f"{row.where}: field 'messages': expected a list of objects with role and content, "
                f"got {shown(messages)}"
            )
        messages = [checked_message(f"{row.where}: messages[{i}]", message) for i, message in enumerate(messages)]
        if not any(m["role"] == "assistant" for m in messages):
            raise DataError(f"{row.where}: field 'messages': expected an assistant's message, got none")
        chat = Conversation(row.where, messages, row_tools(row))
        self._check_calls(chat)
        return Conversation(row.where, self._without_null_text(chat), chat.tools)

    def _check_calls(self, chat: Conversation) -> None:
        """Raises DataError if tool calls do not show in the text: many templates leave them out without an error."""
        calls = [index for index, message in enumerate(chat.messages) if message.get("tool_calls")]
        if not calls or self._shows_calls:
            return
        index, message = calls[0], chat.messages[calls[0]]
        where = f"{chat.where}: messages[{index}].tool_calls"
        if not self.templated:
            raise DataError(f"{where}: the tokenizer has no chat template, and without one no layout for tool calls")
        text = self._render(chat, chat.messages)
        other = marked(message, unused_character(text)) | {"content": message["content"]}
        if self._render(chat, [*chat.messages[:index], other, *chat.messages[index + 1 :]]) == text:
            raise DataError(f"{where}: the tokenizer's chat template does not render tool calls")
        self._shows_calls = True

    def _without_null_text(self, chat: Conversation) -> list[dict]:
        """The messages, with "" in place of a content of null for which the template would write the word None."""
        messages = list(chat.messages)
        for index, message in enumerate(messages):
            if message["content"] is None:
                emptied = [*messages[:index], message | {"content": ""}, *messages[index + 1 :]]
                text, without = self._render(chat, messages), self._render(chat, emptied)
                if any(text[:at] + text[at + 4 :] == without for at in range(len(text)) if text.startswith("None", at)):
                    messages = emptied
        return messages


def encode(tokenizer, text: str, **options) -> list[int]:
    """Tokens of a text of any length. Raises DataError if the tokenizer cannot encode it."""
    return _encoding(tokenizer, text, **options)["input_ids"]


def _encoding(tokenizer, text: str, **options):
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # the package tokenizers raises plain Exceptions
        raise DataError(f"the tokenizer cannot encode the text that begins {text[:40]!r} ({reason(error)})") from error


def _prefix(part: list[int], whole: list[int]) -> int | None:
    """How many leading tokens agree; None if ``part`` is no prefix of ``whole``. The last token of ``part`` may differ,
    since it may be merged with the text after it."""
    shared = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return shared if shared >= len(part) - 1 else None


def _title(role: str) -> str:
    return TITLES.get(role, role.capitalize())
