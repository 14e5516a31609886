"""What a run leaves behind, as plain data: written to losa_config.json, read by reports and `losa inspect`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from losa.recipe.methods import find_method


@dataclass
class RoundRecord:
    """One round. Per-block lists are ordered as ``RunRecord.blocks``; ``damping`` is what each linear's Hessian needed,
    None where the Hessian stayed singular and Wanda's mask was taken; ``delta`` is the half width of the rates' box,
    where losses chose it; ``linear_sparsity`` and ``linear_ranks`` are those of linears by full name, where the linears
    of a block differ; ``train_loss`` is in nats a label token, with ``train.distill`` the mixed loss a token, and
    ``train_label_loss`` the label loss in it, in nats a label token (None otherwise); ``seconds`` is wall time by
    stage. ``loss_pruned`` and ``loss_reconstructed``: the loss of some samples before and after a block's
    reconstruction, None where blocks are not reconstructed. ``expert_tokens``: how many calibration tokens the
    statistics of each expert are of, by the name of the experts' list; None without experts."""

    index: int
    target_sparsity: float
    mean_rank: float | None
    sparsity: list[float]
    ranks: list[int]
    errors: list[float] | None = None
    keep_n: list[int] | None = None
    m: int | None = None
    importance: list[float] | None = None
    delta: float | None = None
    linear_sparsity: dict[str, float] | None = None
    linear_ranks: dict[str, int] | None = None
    similarity: list[list[float]] | None = None
    damping: dict[str, float | None] = field(default_factory=dict)
    train_steps: int = 0
    train_tokens: int = 0
    train_loss: float | None = None
    train_label_loss: float | None = None
    perplexity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    loss_pruned: list[float] | None = None
    loss_reconstructed: list[float] | None = None
    expert_tokens: dict[str, list[int]] | None = None


# Lists of a round with a value for each block. A round may lack any of them but the first.
_PER_BLOCK = ("sparsity", "errors", "keep_n", "importance", "similarity", "loss_pruned", "loss_reconstructed")


@dataclass
class MethodResult:
    """One row of the final table; perplexities on the recipe's evaluation text, ``sparsity`` 0..1, ``seconds`` of wall
    time."""

    method: str
    perplexity: float | None
    sparsity: float
    zeros: int
    prunable: int
    seconds: float
    mergeable: bool = True
    perplexity_unmerged: float | None = None
    train_tokens: int = 0
    parameters_trained: int = 0


@dataclass
class MaskRecord:
    """Checksum (SHA-256 of the packed bytes) and counts of one linear's mask."""

    sha256: str
    shape: list[int]
    kept: int


@dataclass
class ShrunkRecord:
    """An export that is smaller than the model that was pruned: ``config``, its sizes in config.json, before and after;
    ``removed``: the weights of the blocks' linears that are gone, which the result counts among its zeros."""

    config: dict[str, list[int]]
    removed: int


@dataclass
class RunRecord:
    """What a run measured and decided. ``rounds`` are the exported method's, ``results`` all methods'; ``masks`` by
    linear, in the shapes of the export; ``evaluation``: text and windows of the perplexities; ``seconds``: wall time of
    the whole run; ``shrunk``: what a structured pruner took away, None where all shapes are the dense model's;
    ``unmasked``: weights in matrices of the blocks that have no mask."""

    losa_version: str
    method: str
    recipe: dict
    model: str
    blocks: list[str]
    environment: dict
    rounds: list[RoundRecord] = field(default_factory=list)
    results: list[MethodResult] = field(default_factory=list)
    masks: dict[str, MaskRecord] = field(default_factory=dict)
    evaluation: dict | None = None
    seconds: float = 0.0
    shrunk: ShrunkRecord | None = None
    unmasked: int = 0

    @property
    def ranked(self) -> bool:
        """Whether the rounds' ranks are ranks of trained adapters; a method that losa does not know counts so."""
        method = find_method(self.method)
        return method is None or method.ranked

    @property
    def masked(self) -> tuple[int, int]:
        """(pruned, all) weights under masks."""
        total = sum(math.prod(mask.shape) for mask in self.masks.values())
        return total - sum(mask.kept for mask in self.masks.values()), total

    @property
    def leaves_dense(self) -> bool:
        """Whether more than a hundredth of the weights in the blocks' matrices has no mask."""
        return self.unmasked > 0.01 * (self.masked[1] + self.unmasked)

    @property
    def sparsity_of_blocks(self) -> float:
        """Share of the weights in all matrices of the blocks that masks remove."""
        pruned, total = self.masked
        return pruned / max(1, total + self.unmasked)

    def to_dict(self) -> dict:
        """What ``losa_config.json`` holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> RunRecord:
        """What ``to_dict`` gave, read back.

        Raises:
            ValueError: an entry is missing, unknown, of another type or length; names it.
        """
        record = _read(data, cls, "the record")
        if record.rounds and not record.blocks:
            raise ValueError("blocks: expected the names of the blocks, found none")
        for r in record.rounds:
            where = f"round {r.index}"
            lists = {name: getattr(r, name) for name in _PER_BLOCK}
            lists |= {f"similarity, row {i}": row for i, row in enumerate(r.similarity or [])}
            if r.ranks or record.ranked:
                lists["ranks"] = r.ranks
            for name, values in lists.items():
                if values is not None and len(values) != len(record.blocks):
                    raise ValueError(f"{where}: {name}: expected {len(record.blocks)} values, found {len(values)}")
            if (r.keep_n is None) != (r.m is None):
                raise ValueError(f"{where}: keep_n and m: expected both or neither")
        for name, mask in record.masks.items():
            if len(mask.shape) != 2:
                raise ValueError(f"masks: {name}: expected a shape of two numbers, found {mask.shape}")
        if record.shrunk is not None:
            for key, sizes in record.shrunk.config.items():
                if len(sizes) != 2:
                    raise ValueError(f"shrunk: config: {key[:100]}: expected two numbers, found {sizes}")
        if record.evaluation is not None:
            _check_evaluation(record.evaluation)
        allocation = record.recipe.get("allocation", {})
        if not isinstance(allocation, dict) or not isinstance(allocation.get("error", ""), str):
            raise ValueError("recipe: allocation: expected an object whose error is text")
        return record


def _check_evaluation(evaluation: dict) -> None:
    for name in ("length", "windows", "tokens"):
        _read(evaluation.get(name), int, f"evaluation: {name}")
    data = _read(evaluation.get("data"), dict, "evaluation: data")
    _read(data.get("path"), str, "evaluation: data: path")
    for name in ("subset", "split"):
        _read(data.get(name), str | None, f"evaluation: data: {name}")


def _read(value: object, kind: Any, where: str) -> Any:
    """``value`` as a ``kind`` (a dataclass is built from its dict), or ValueError that names ``where``."""
    if isinstance(kind, type) and is_dataclass(kind):
        return _build(value, kind, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None:
            return None
        return _read(value, next(one for one in inner if one is not NoneType), where)
    if origin is list and isinstance(value, list):
        return [_read(item, inner[0], f"{where}, entry {index}") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(item, inner[1], f"{where}: {key[:100]}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and type(value) is int and abs(value) < 2**63:
        return value
    if origin is None and type(value) is kind and not (isinstance(value, int) and abs(value) >= 2**63):
        return value
    name = getattr(origin or kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {name}, found {type(value).__name__}")


def _build(value: object, kind: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected dict, found {type(value).__name__}")
    hints = get_type_hints(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{where}: unknown entry {unknown[0][:100]!r}")
    found = {name: _read(item, hints[name], f"{where}: {name}") for name, item in value.items()}
    try:
        return kind(**found)
    except TypeError as error:
        absent = [f.name for f in fields(kind) if f.name not in found]
        raise ValueError(f"{where}: {', '.join(absent)} missing") from error
