"""Text to tokens: packed training sequences, calibration samples, evaluation text."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from losa.data.rendering import Renderer, encode
from losa.data.row_formats import row_format, row_text
from losa.data.sequences import IGNORED, PackedData
from losa.data.sources import located_rows
from losa.distributed.watch import progress
from losa.errors import DataError
from losa.recipe.sources import DataSource

logger = logging.getLogger("losa")


def training_sequences(
    sources: Sequence[DataSource],
    tokenizer,
    length: int,
    seed: int,
    train_on: Literal["response", "all"] = "response",
    max_tokens: int | None = None,
) -> PackedData:
    """Examples of all sources shuffled together by ``seed``, concatenated, and cut every ``length`` tokens.

    The last, incomplete sequence is dropped. With ``train_on="response"`` only the assistant's answers have labels;
    rows of plain text are learnt whole. Rows of blank text are left out. So are conversations whose rendering by the
    chat template does not show which part is the assistant's; a warning counts them. ``max_tokens`` limits the number
    of sequences to floor(max_tokens / length). If the text is shorter, each example is used once, with a warning.

    Raises:
        DataError: a source cannot be read, a row is malformed, there is no row to learn from, or no whole sequence.
    """
    wanted = None if max_tokens is None else max_tokens // length
    if wanted == 0:
        raise DataError(f"train.max_tokens: expected at least train.length, {length}, got {max_tokens}")
    renderer = Renderer(tokenizer, train_on)
    ids, labels = _packed("train.data", sources, renderer, seed, None if wanted is None else wanted * length)
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
    sequences = torch.from_numpy(ids[: count * length]).reshape(count, length)
    targets = torch.from_numpy(labels[: count * length]).reshape(count, length)
    targets[:, 0] = IGNORED
    if not bool((targets != IGNORED).any()):
        raise DataError("train.data: no token to learn from; every response is empty")
    return PackedData(sequences, targets)


def calibration_tokens(sources: Sequence[DataSource], tokenizer, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) int64: windows of the sources' text.

    Documents (rows that are not blank) are shuffled by ``seed`` and concatenated, an end-of-text token after each,
    until the text suffices. Of its windows ``samples`` are drawn by ``seed``. So short documents fill long samples, and
    one long document gives other samples for another seed.

    Raises:
        DataError: a source cannot be read, a row is malformed, or the text is too short; says for how many samples it
            suffices.
    """
    ids, _ = _packed("calibration.data", sources, Renderer(tokenizer, "all"), seed, samples * length)
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

    Rows of text are joined by "\n\n". The rows of a .txt or .raw file are its lines with their line ends, and "" for a
    blank line. For the raw WikiText-2 files they are the rows of the hub data set, joined as in SparseGPT, Wanda and
    later papers, so that perplexities are comparable. ``source.limit`` counts these lines. The tokenizer adds its
    default special tokens once (a beginning-of-text token for some models). Rows of instructions or messages are
    rendered as in training and concatenated instead.

    Raises:
        DataError: the source cannot be read, or a row is malformed.
    """
    rows = located_rows(source)
    if any(row_format(row, source) != "text" for row in rows):
        renderer = Renderer(tokenizer, "all")
        ids = []
        for row in rows:
            progress("tokenizing evaluate.data")
            rendered = renderer(row, source)
            assert rendered is not None  # where all tokens count, no row is skipped
            ids += rendered[0]
    else:
        texts: list[str] = []
        for row in rows:
            text = row_text(row, source.text_field)
            if row.plain:
                # Not splitlines: only a line feed ends a line of these files.
                lines = text.split("\n")
                ends = [line + "\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
                texts += [line if line.strip() else "" for line in ends]
            else:
                texts.append(text)
        ids = encode(tokenizer, "\n\n".join(texts[: source.limit]))
    return torch.tensor(ids, dtype=torch.int64)


def _packed(
    what: str, sources: Sequence[DataSource], renderer: Renderer, seed: int, enough: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all sources in an order drawn by ``seed``, rendered and concatenated until there are ``enough`` tokens:
    (ids, labels), int64. Rows of blank text are left out: they would add end-of-text tokens only."""
    rows = [(row, source) for source in sources for row in located_rows(source)]
    random.Random(seed).shuffle(rows)
    ids, labels = [], []
    total = read = 0
    where = f"tokenizing {what}"
    for row, source in rows:
        progress(where)
        if row_format(row, source) == "text" and not row_text(row, source.text_field).strip():
            continue
        read += 1
        rendered = renderer(row, source)
        if rendered is None:
            continue
        row_ids, row_labels = rendered
        ids.append(np.array(row_ids, dtype=np.int64))
        labels.append(ids[-1] if row_labels is row_ids else np.array(row_labels, dtype=np.int64))
        total += len(row_ids)
        if enough is not None and total >= enough:
            break
    if not read:
        raise DataError(f"{what}: the text of all {len(rows)} rows is blank")
    if renderer.skipped:
        found = (
            f"{what}: in {len(renderer.skipped)} of {read} rows the chat template does not show which part is the "
            f"assistant's; the first is {renderer.skipped[0]}"
        )
        if not ids:
            raise DataError(found)
        logger.warning("%s; they are skipped", found)
    return np.concatenate(ids), np.concatenate(labels)
