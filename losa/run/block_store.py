"""The pruned blocks of an offloaded model on disk: each is written when it is finished, so that a later process goes on
with the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from losa.algorithm.block import WrappedBlock
from losa.algorithm.block_pruning import PrunedBlock
from losa.algorithm.block_rates import Decided
from losa.algorithm.finished_blocks import FinishedBlock
from losa.model.offloaded import OffloadedBlocks
from losa.model.wrapping import zeros_of
from losa.output.checks import check_masked, mask_records
from losa.output.offloaded_export import write_block
from losa.pruners.base import Pattern
from losa.record import MaskRecord, MethodResult
from losa.run.documents import DAMAGE, check_belonging, read_document, write_document
from losa.storage.files import file_digest

logger = logging.getLogger("losa")

_START, _RATES = "start.json", "rates.json"


@dataclass(frozen=True)
class Stored:
    """A finished block: what the engine wants to know of it; its file, and the file's SHA-256; records of its masks by
    full name; its zeros and weights that could be zeros; seconds that it took."""

    finished: FinishedBlock
    path: Path
    sha256: str
    masks: dict[str, MaskRecord]
    zeros: int
    prunable: int
    seconds: float


class BlockStore:
    """The finished blocks of one run, in the order of the model's; a ``FinishedBlocks`` for the engine.

    Args:
        directory: of the store; made if need be.
        source: where the model's blocks are read from, which a finished block changes.
        log: gets a line for each block.
    """

    def __init__(self, directory: Path, source: OffloadedBlocks, log: Callable[[str], None]):
        self._directory, self._source, self._log = directory, source, log
        # Checksum of the newest document. Each document holds that of the one before it: what a document says of a
        # block is of use only behind the very blocks that were there.
        self._last = ""
        self._decided: Decided | None = None
        self._began = time.perf_counter()
        self.stored: list[Stored] = []

    def open(self, owner: dict) -> MethodResult | None:
        """Find what an earlier process has left, and read finished blocks from their files from now on.

        Args:
            owner: what the blocks depend on (``losa.run.documents.belonging``).

        Returns:
            the dense model's result, where there is one; else ``begin`` is to be called with it. A damaged document or
            file is left out with a warning, with all blocks behind it.

        Raises:
            OutputError: the store belongs to another recipe, model or data.
        """
        try:
            document = read_document(self._directory / _START)
            check_belonging(f"{self._directory}", document, owner)
            dense, self._last = MethodResult(**document["dense"]), document["checksum"]
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            logger.warning("%s: damaged (%s); the run begins anew", self._directory / _START, error)
            return None
        try:
            rates = self._next(_RATES)
            self._decided, self._last = _as_decided(rates["rates"]), rates["checksum"]
            while len(self.stored) < len(self._source.blocks):
                self._add(self._read(len(self.stored)))
        except FileNotFoundError:
            pass
        except DAMAGE as error:
            logger.warning("%s: damaged (%s); what it stands for is done again", self._directory, error)
        return dense

    def begin(self, owner: dict, dense: MethodResult) -> None:
        """Say what the blocks to come belong to. Raises OutputError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._last = write_document(self._directory / _START, {**owner, "dense": vars(dense)})

    def rates(self, decide: Callable[[], Decided]) -> Decided:
        """``FinishedBlocks.rates``."""
        if self._decided is None:
            self._decided = decide()
            self._write(_RATES, {"rates": _as_document(self._decided)})
        return self._decided

    def find(self, index: int) -> FinishedBlock | None:
        """``FinishedBlocks.find``."""
        self._began = time.perf_counter()
        return self.stored[index].finished if index < len(self.stored) else None

    def take(self, index: int, block: WrappedBlock, pruned: PrunedBlock) -> FinishedBlock:
        """``FinishedBlocks.take``: write the block's file, and read it back for comparison.

        Raises:
            OutputError: the file cannot be written, or differs from the block in memory.
        """
        layers = {f"{block.name}.{name}": layer for name, layer in block.linears.items()}
        masks = {name: layer.mask.detach().cpu() for name, layer in layers.items()}
        records = mask_records(masks, {name: layer.in_features for name, layer in layers.items()})
        kept = {name: record.kept for name, record in zip(block.linears, records.values(), strict=True)}
        path = write_block(self._source, index, self._directory)
        for name, layer in layers.items():
            check_masked(name, layer.weight.detach().cpu(), masks[name], records[name])
        zeros, prunable = zeros_of(block.module)
        seconds = time.perf_counter() - self._began
        finished = FinishedBlock(kept, pruned.damping, pruned.expert_tokens)
        stored = Stored(finished, path, file_digest(path), records, zeros, prunable, seconds)
        self._write(_document(index), asdict(stored) | {"path": path.name})
        self._add(stored)
        share = 1 - sum(kept.values()) / sum(layer.weight.numel() for layer in layers.values())
        self._log(f"block {index + 1}/{len(self._source.blocks)}: sparsity {share:.3f}, {seconds:.0f} s")
        return stored.finished

    def _add(self, stored: Stored) -> None:
        self._source.read_from(len(self.stored), stored.path)
        self.stored.append(stored)

    def _read(self, index: int) -> Stored:
        found = self._next(_document(index))
        path = self._directory / found["path"]
        if file_digest(path) != found["sha256"]:
            raise ValueError(f"{path.name} has another checksum than when it was written")
        masks = {name: MaskRecord(**record) for name, record in found["masks"].items()}
        counts = found["zeros"], found["prunable"], found["seconds"]
        stored = Stored(FinishedBlock(**found["finished"]), path, found["sha256"], masks, *counts)
        self._last = found["checksum"]
        return stored

    def _next(self, name: str) -> dict:
        """The document of that name, if it was written next."""
        found = read_document(self._directory / name)
        if found.get("after") != self._last:
            raise ValueError(f"{name} does not belong behind what is there")
        return found

    def _write(self, name: str, document: dict) -> None:
        self._last = write_document(self._directory / name, document | {"after": self._last})


def _document(index: int) -> str:
    return f"block-{index:05d}.json"


def _as_document(decided: Decided) -> dict:
    assert decided.linears is None, "the recipe's checks saw to it"
    return {
        "patterns": [asdict(pattern) for pattern in decided.patterns],
        "importance": None if decided.importance is None else decided.importance.tolist(),
        "similarity": None if decided.similarity is None else decided.similarity.tolist(),
        "delta": decided.delta,
    }


def _as_decided(document: dict) -> Decided:
    importance, similarity = (
        None if document[name] is None else torch.tensor(document[name], dtype=torch.float64)
        for name in ("importance", "similarity")
    )
    return Decided([Pattern(**each) for each in document["patterns"]], importance, similarity, document["delta"])
