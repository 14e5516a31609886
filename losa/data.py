"""Text to tokens: packed training sequences, calibration samples, evaluation text."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from losa.errors import DataError
from losa.recipe import DataSource
from losa.sources import Row, located_rows, read_rows

__all__ = ["IGNORED", "PackedData", "calibration_tokens", "evaluation_tokens", "read_rows", "training_sequences"]

logger = logging.getLogger("losa")

IGNORED = -100
TITLES = {"user": "Instruction", "assistant": "Response"}


@dataclass(frozen=True)
class PackedData:
    """Sequences of one length: ``input_ids`` and ``labels``, both (n, length) int64.

    Labels are aligned with the inputs, as Hugging Face models shift them: position t learns to predict label t + 1.
    They are -100 where nothing is learnt, and so at each sequence's start, which no position predicts.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def slice(self, start: int, stop: int) -> PackedData:
        """Sequences start..stop - 1 (views, not copies)."""
        return PackedData(self.input_ids[start:stop], self.labels[start:stop])


def training_sequences(
    sources: Sequence[DataSource],
    tokenizer,
    length: int,
    seed: int,
    train_on: Literal["response", "all"] = "response",
    max_tokens: int | None = None,
) -> PackedData:
    """Examples of all sources shuffled together by ``seed``, concatenated, and cut every ``length`` tokens.

    The last, incomplete sequence is dropped. ``train_on="response"`` gives labels to assistants' answers only; rows of
    plain text are learnt whole. ``max_tokens`` limits the sequences to floor(max_tokens / length); where the text is
    shorter, each example is used once and a warning gives the numbers.

    Raises:
        DataError: a source cannot be read, a row is malformed, or there is no whole sequence.
    """
    wanted = None if max_tokens is None else max_tokens // length
    if wanted == 0:
        raise DataError(f"train.max_tokens: expected at least train.length, {length}, got {max_tokens}")
    renderer = Renderer(tokenizer, train_on)
    ids, labels = _packed(sources, renderer, seed, None if wanted is None else wanted * length)
    count = len(ids) // length
    if count == 0:
        raise DataError(f"train.data: {len(ids)} tokens are less than one sequence of train.length, {length}")
    if wanted is not None:
        if count < wanted:
            logger.warning(
                "train.data: text for %d sequences of %d tokens, fewer than the %d that train.max_tokens allows; "
                "each is used once",
                *(count, length, wanted),
            )
        count = min(count, wanted)
    ids = torch.from_numpy(ids[: count * length]).reshape(count, length)
    labels = torch.from_numpy(labels[: count * length]).reshape(count, length)
    labels[:, 0] = IGNORED
    if not bool((labels != IGNORED).any()):
        raise DataError("train.data: no token to learn from; every response is empty")
    return PackedData(ids, labels)


def calibration_tokens(sources: Sequence[DataSource], tokenizer, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) int64: windows of the sources' text.

    Documents are shuffled by ``seed`` and concatenated, an end-of-text token after each, until the text suffices; of
    its windows, ``samples`` are drawn by ``seed``. So short documents fill long samples, and one long document gives
    other samples for another seed.

    Raises:
        DataError: a source cannot be read, a row is malformed, or the text is too short; says what it suffices for.
    """
    ids, _ = _packed(sources, Renderer(tokenizer, "all"), seed, samples * length)
    windows = len(ids) // length
    if windows < samples:
        raise DataError(
            f"calibration.data: text for {windows} samples of {length} tokens, but calibration.samples is {samples}; "
            "give more text, fewer or shorter samples"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.from_numpy(ids[: windows * length]).reshape(windows, length)[chosen]


def evaluation_tokens(source: DataSource, tokenizer) -> Tensor:
    r"""(tokens,) int64: the whole source as one text, in one tokenizer call.

    Rows of text are joined by "\n\n". The rows of a .txt or .raw file are its lines with their line ends, blank lines
    as "": on the raw WikiText-2 files those are the hub data set's rows, joined as SparseGPT, Wanda and their
    successors do, so that their perplexities are comparable. ``source.limit`` counts such lines. The tokenizer adds the
    special tokens that it adds by default (a beginning-of-text token for some models), once. Rows of instructions or
    messages are rendered as in training and concatenated instead.

    Raises:
        DataError: the source cannot be read, or a row is malformed.
    """
    rows = located_rows(source)
    if any(row_format(row, source) != "text" for row in rows):
        renderer = Renderer(tokenizer, "all")
        ids = [token for row in rows for token in renderer(row, source)[0]]
    else:
        texts: list[str] = []
        for row in rows:
            text = _text(row, source.text_field)
            if row.plain:
                # Not splitlines: only a line feed ends a line of these files.
                lines = text.split("\n")
                ends = [line + "\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
                texts += [line if line.strip() else "" for line in ends]
            else:
                texts.append(text)
        ids = _encode(tokenizer, "\n\n".join(texts[: source.limit]))
    return torch.tensor(ids, dtype=torch.int64)


def row_format(row: Row, source: DataSource) -> str:
    """ "messages", "alpaca" or "text": the source's format, or else the one that the row's fields speak for.

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
            f"{source.text_field!r} (text_field), got {sorted(row.values)}"
        )
    if missing := [field for field in needs[source.format] if field not in row.values]:
        raise DataError(f"{row.where}: a row in {source.format} format needs {missing[0]!r}, got {sorted(row.values)}")
    return source.format


class Renderer:
    """Rows to tokens and labels.

    Conversations take the tokenizer's chat template, or else a plain layout of "### Instruction:" and "### Response:"
    sections that ends with the end-of-text token. Text is tokenized as it is and ends with that token too.
    """

    def __init__(self, tokenizer, train_on: Literal["response", "all"]):
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.templated = bool(tokenizer.chat_template)
        self._warned = False

    def __call__(self, row: Row, source: DataSource) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of one row, equally long. Raises DataError for a malformed row."""
        kind = row_format(row, source)
        if kind == "text":
            ids = self._end(_encode(self.tokenizer, _text(row, source.text_field)))
            return ids, ids
        messages = _messages(row, kind)
        ids = self._conversation(row, messages)
        if not self.templated:
            ids = self._end(ids)
        if self.train_on == "all":
            return ids, ids
        spans = self._response_spans(row, messages, ids)
        if spans is None:
            if not self._warned:
                logger.warning(
                    "%s: the chat template does not render the prompt as the beginning of its conversation; such rows "
                    "are learnt whole",
                    row.where,
                )
            self._warned = True
            return ids, ids
        labels = [IGNORED] * len(ids)
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def _response_spans(self, row: Row, messages: list[dict], ids: list[int]) -> list[tuple[int, int]] | None:
        """Token ranges of the assistant's messages, from renderings of the conversation up to each; None if those are
        no prefixes of the whole."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = _prefix(self._conversation(row, messages[:i], prompt=True), ids)
            last = i == len(messages) - 1
            stop = len(ids) if last else _prefix(self._conversation(row, messages[: i + 1]), ids)
            if start is None or stop is None:
                return None
            spans.append((start, stop))
        return spans

    def _conversation(self, row: Row, messages: list[dict], prompt: bool = False) -> list[int]:
        """Tokens of a conversation; ``prompt``: with the opening of the assistant's next message."""
        if not self.templated:
            text = "\n\n".join(f"### {_title(m['role'])}:\n{m['content']}" for m in messages)
            if prompt:
                text += ("\n\n" if text else "") + f"### {_title('assistant')}:\n"
            return _encode(self.tokenizer, text)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's, or whatever the template raises
            raise DataError(f"{row.where}: the tokenizer's chat template refuses this row ({error})") from error
        return _encode(self.tokenizer, text, add_special_tokens=False)

    def _end(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _prefix(part: list[int], whole: list[int]) -> int | None:
    """How many leading tokens agree; None if ``part`` is not a prefix. Its last token may merge with what follows."""
    shared = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return shared if shared >= len(part) - 1 else None


def _title(role: str) -> str:
    return TITLES.get(role, role.capitalize())


def _encode(tokenizer, text: str, **options) -> list[int]:
    return tokenizer(text, verbose=False, **options)["input_ids"]


def _text(row: Row, field: str) -> str:
    text = row.values[field]
    if not isinstance(text, str):
        raise DataError(f"{row.where}: field {field!r}: expected text, got {type(text).__name__}")
    return text


def _messages(row: Row, kind: str) -> list[dict]:
    """A conversation as [{"role", "content"}, ...] that holds an assistant's message."""
    if kind == "alpaca":
        prompt = _text(row, "instruction")
        if row.values.get("input"):
            prompt += f"\n\n{_text(row, 'input')}"
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, "output")}]
    messages = row.values["messages"]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed:
        raise DataError(
            f"{row.where}: field 'messages': expected a list of objects with texts role and content, "
            f"got {str(messages)[:200]}"
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{row.where}: field 'messages': expected an assistant's message, got none")
    return messages


def _packed(
    sources: Sequence[DataSource], renderer: Renderer, seed: int, enough: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all sources in an order drawn by ``seed``, rendered and concatenated until there are ``enough`` tokens:
    (ids, labels), int64."""
    rows = [(row, source) for source in sources for row in located_rows(source)]
    random.Random(seed).shuffle(rows)
    ids, labels = [], []
    total = 0
    for row, source in rows:
        row_ids, row_labels = renderer(row, source)
        ids.append(np.array(row_ids, dtype=np.int64))
        labels.append(ids[-1] if row_labels is row_ids else np.array(row_labels, dtype=np.int64))
        total += len(row_ids)
        if enough is not None and total >= enough:
            break
    return np.concatenate(ids), np.concatenate(labels)
