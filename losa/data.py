"""Text to tokens: calibration samples, packed training sequences, evaluation text."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losa import corpus
from losa.errors import DataError
from losa.recipe import DataSource

logger = logging.getLogger("losa")

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".raw")
BUILTIN = "builtin:pydoc/"
IGNORED = -100


@dataclass(frozen=True)
class PackedData:
    """``input_ids`` and ``labels`` (n, length) int64; labels are aligned with inputs, -100 where nothing is learnt."""

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def slice(self, start: int, stop: int) -> PackedData:
        return PackedData(self.input_ids[start:stop], self.labels[start:stop])


def read_rows(source: DataSource) -> list[dict]:
    """All rows of a source as dictionaries; plain text files give one row per file, ``{"text": ...}``.

    Raises:
        DataError: missing, unreadable or empty; names file and line.
    """
    if source.path.startswith(BUILTIN):
        part = source.path.removeprefix(BUILTIN)
        if part not in corpus.SHARES:
            raise DataError(f"data {source.path!r}: expected {BUILTIN}{{{','.join(corpus.SHARES)}}}")
        rows = [{"text": text} for text in corpus.documents(part)]
    else:
        path = Path(source.path).expanduser()
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
            if not files:
                raise DataError(f"data {source.path!r}: no {', '.join(SUFFIXES)} file in this directory")
            rows = [row for file in files for row in _read_file(file, source)]
        elif path.exists():
            rows = _read_file(path, source)
        elif path.suffix in SUFFIXES or path.is_absolute() or source.path.startswith("."):
            raise DataError(f"data {source.path!r}: no such file or directory")
        else:
            rows = _read_hub(source)
    rows = rows[: source.limit]
    if not rows:
        raise DataError(f"data {source.path!r}: no rows")
    return rows


def _read_file(path: Path, source: DataSource) -> list[dict]:
    try:
        if path.suffix == ".parquet":
            from datasets import Dataset

            return list(Dataset.from_parquet(str(path)))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {str(path)!r}: cannot be read ({error})") from error
    if path.suffix in (".txt", ".raw"):
        return [{source.text_field: text}] if text.strip() else []
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"data {str(path)!r}: expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        line = number if path.suffix == ".jsonl" else error.lineno
        raise DataError(f"data {str(path)!r}: line {line} is not JSON ({error.msg})") from error
    if bad := next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise DataError(f"data {str(path)!r}: row {bad}: expected an object")
    return rows


def _read_hub(source: DataSource) -> list[dict]:
    from datasets import load_dataset

    try:
        return list(load_dataset(source.path, source.subset, split=source.split))
    except Exception as error:  # the hub client raises errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data {source.path!r}: neither a local file nor loadable from the Hugging Face hub ({reason}); "
            "check name, subset and split, or give a local file"
        ) from error


def row_format(row: dict, source: DataSource) -> str:
    """The source's format, or the one the row's keys speak for.

    Raises DataError when nothing fits.
    """
    needs = {"messages": "messages", "alpaca": "instruction", "text": source.text_field}
    if source.format != "auto":
        if needs[source.format] not in row:
            raise DataError(f"data {source.path!r}: a {source.format} row needs {needs[source.format]!r}, got {sorted(row)}")
        return source.format
    for name, key in needs.items():
        if key in row and (name != "alpaca" or "output" in row):
            return name
    raise DataError(
        f"data {source.path!r}: unknown format; expected keys 'messages', 'instruction' and 'output', or "
        f"{source.text_field!r}, got {sorted(row)}"
    )


def _messages(row: dict, kind: str) -> list[dict]:
    if kind == "messages":
        return row["messages"]
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.get("output", "")}]


def _plain_layout(messages: list[dict], prompt_only: bool) -> str:
    parts = [f"### {'Response' if m['role'] == 'assistant' else 'Instruction'}:\n{m['content']}\n\n" for m in messages]
    return "".join(parts[:-1]) + "### Response:\n" if prompt_only else "".join(parts).rstrip("\n")


def render(row: dict, source: DataSource, tokenizer, train_on: str = "response") -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one row: chat template where the tokenizer has one, EOS at the end of plain layouts."""
    kind = row_format(row, source)
    if kind == "text":
        ids = tokenizer(row[source.text_field], verbose=False)["input_ids"] + _eos(tokenizer)
        return ids, ids
    messages = _messages(row, kind)
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(f"data {source.path!r}: expected the last message from the assistant, got {messages!r:.200}")
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        end = []
    else:
        text, prompt, end = _plain_layout(messages, False), _plain_layout(messages, True), _eos(tokenizer)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"] + end
    if train_on == "all":
        return ids, ids
    prompt_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    if shared < len(prompt_ids) - 1:
        raise DataError(f"data {source.path!r}: the chat template's prompt is no prefix of its conversation; set train_on: all")
    return ids, [IGNORED] * shared + ids[shared:]


def _eos(tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _examples(sources: Sequence[DataSource], tokenizer, seed: int, train_on: str):
    """Rendered rows of all sources, shuffled together."""
    rows = [(row, source) for source in sources for row in read_rows(source)]
    random.Random(seed).shuffle(rows)
    for row, source in rows:
        yield render(row, source, tokenizer, train_on)


def training_sequences(
    sources: Sequence[DataSource],
    tokenizer,
    length: int,
    seed: int,
    train_on: str = "response",
    max_tokens: int | None = None,
) -> PackedData:
    """Rows shuffled by ``seed``, concatenated, and cut into sequences of ``length``; the tail is dropped.

    ``max_tokens`` caps the number of sequences at floor(max_tokens / length); with less text all of it is used, once,
    and a warning says so.

    Raises:
        DataError: not even one sequence.
    """
    wanted = None if max_tokens is None else max_tokens // length
    if wanted == 0:
        raise DataError(f"train.max_tokens: expected at least one sequence of {length} tokens, got {max_tokens}")
    ids: list[int] = []
    labels: list[int] = []
    for row_ids, row_labels in _examples(sources, tokenizer, seed, train_on):
        ids += row_ids
        labels += row_labels
        if wanted is not None and len(ids) >= wanted * length:
            break
    count = len(ids) // length
    if wanted is not None:
        if count < wanted:
            logger.warning("training data gives %d of the %d sequences asked for; using all of it once", count, wanted)
        count = min(count, wanted)
    if count == 0:
        raise DataError(f"train.data: {len(ids)} tokens are less than one sequence of {length}")
    shape = (count, length)
    return PackedData(
        torch.tensor(ids[: count * length]).reshape(shape), torch.tensor(labels[: count * length]).reshape(shape)
    )


def calibration_tokens(sources: Sequence[DataSource], tokenizer, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) int64: documents shuffled by ``seed`` and packed, so that short ones fill long samples.

    Raises:
        DataError: too little text; says how many samples there are.
    """
    ids: list[int] = []
    for row_ids, _ in _examples(sources, tokenizer, seed, "all"):
        ids += row_ids
        if len(ids) >= samples * length:
            break
    if len(ids) < samples * length:
        raise DataError(
            f"calibration.data: text for {len(ids) // length} samples of {length} tokens, but calibration.samples is {samples}"
        )
    return torch.tensor(ids[: samples * length]).reshape(samples, length)


def evaluation_tokens(source: DataSource, tokenizer) -> Tensor:
    r"""(tokens,) int64 of the whole source in one tokenizer call.

    Rows are joined by "\n\n". A text file's rows are its lines with their line ends, blank ones as "": for the raw
    WikiText-2 files that is the rows of the hub's data set, which the pruning papers join this way.
    """
    rows = read_rows(source)
    if row_format(rows[0], source) != "text":
        texts = ["\n".join(m["content"] for m in _messages(row, row_format(row, source))) for row in rows]
    else:
        texts = [row[source.text_field] for row in rows]
        if Path(source.path).suffix in (".txt", ".raw"):
            texts = [line if line.strip() else "" for text in texts for line in text.splitlines(keepends=True)]
    return torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
