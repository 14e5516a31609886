"""All that the formulae of an estimate need to know of a model, from its configuration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from losa.errors import RecipeError
from losa.model.blocks import Blocks, find_blocks
from losa.model.flops import TokenWork, hidden_size, number_of
from losa.model.forms import holder_of, tensors_of, views
from losa.pruners import LinearShape
from losa.recipe.sections import Recipe
from losa.training.loss import head_gives_logits
from losa.training.precision import autocast_dtype


@dataclass(frozen=True)
class Rows:
    """A parameter as it is sharded: ``count`` rows of ``size`` bytes."""

    count: int
    size: int


@dataclass(frozen=True)
class ModelShape:
    """``work``: with masked adapters; ``computed``: dtype of training's products; ``whole_logits``: a loss needs the
    logits of all its tokens at once; ``linears``: of all blocks; ``by_block``: those that are pruned; ``together``:
    weights of the pruned linears that one call multiplies, where that is most: of a linear, or of all experts of a
    stack, of which each is ``of_expert``; ``drops``: whether training has dropout; ``inside``: all parameters of each
    block, where linears of another form are parameters of their own, and ``stored``: where they lie in the tensors of
    that form; ``replaced``: these tensors, of each module of another form; ``outside``: parameters outside of the
    blocks."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype
    hidden: int
    work: TokenWork
    vocabulary: int
    whole_logits: bool
    linears: list[LinearShape]
    by_block: list[list[LinearShape]]
    together: int
    of_expert: LinearShape
    drops: bool
    inside: list[list[Rows]]
    stored: list[list[Rows]]
    replaced: list[list[Rows]]
    outside: list[Rows]

    @classmethod
    def of(cls, model: Any, recipe: Recipe, device: torch.device) -> ModelShape:
        """``model``: on the meta device. Raises ModelError: no blocks; RecipeError: targets that match no linear."""
        blocks = find_blocks(model)
        every = [_shape_of(linear) for linear in blocks.linears().values()]
        by_block: list[list[LinearShape]] = [[] for _ in blocks]
        pruned = blocks.linears(recipe.prune.targets)
        for name, linear in pruned.items():
            by_block[cast(int, blocks.index_of(name))].append(_shape_of(linear))
        if not any(by_block):
            raise RecipeError(f"prune.targets: {recipe.prune.targets!r} matches no linear of {recipe.model!r}")
        together, of_expert = _most_together(pruned)
        embedding = model.get_input_embeddings().weight
        counted: set[int] = set()
        holders = {holder for linear in pruned.values() if (holder := holder_of(linear)) is not linear}
        inside = [_wrapped_rows(block, holders, counted) for block in blocks]
        of_blocks: set[int] = set()
        precision = recipe.train.precision if recipe.train is not None else "float32"
        return cls(
            device=device,
            dtype=model.dtype,
            computed=_training_dtype(precision, device) or model.dtype,
            hidden=hidden_size(model),
            work=TokenWork.with_adapters(model, pruned.keys(), recipe.lora.dropout > 0),
            vocabulary=number_of(model.config.get_text_config(), "vocab_size") or embedding.shape[0],
            whole_logits=not _head_gives_logits(model, blocks),
            linears=every,
            by_block=by_block,
            together=together,
            of_expert=of_expert,
            drops=recipe.lora.dropout > 0,
            inside=inside,
            stored=[_rows_of(block.parameters(), of_blocks) for block in blocks],
            replaced=[_rows_of(tensors_of(form).values(), set()) for form in holders],
            outside=_rows_of(model.parameters(), counted),
        )

    @property
    def weight_bytes(self) -> int:
        return sum(rows.count * rows.size for part in (self.outside, *self.stored) for rows in part)

    @property
    def blocks(self) -> int:
        return len(self.by_block)

    @property
    def pruned(self) -> list[LinearShape]:
        """Of all blocks."""
        return [linear for block in self.by_block for linear in block]

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def computes_on(self) -> Literal["device", "host"]:
        """The place where the model computes."""
        return "device" if self.on_gpu else "host"

    @property
    def prunable(self) -> int:
        return sum(w.numel for w in self.pruned)

    @property
    def widest(self) -> int:
        return max(w.numel for w in self.pruned)


def _most_together(linears: Mapping[str, nn.Module]) -> tuple[int, LinearShape]:
    counts: Counter[tuple[int, str]] = Counter()
    shapes: dict[tuple[int, str], LinearShape] = {}
    for name, linear in linears.items():
        key = id(holder_of(linear)), name.rpartition(".")[2]
        shapes[key] = _shape_of(linear)
        counts[key] += shapes[key].numel
    (most, count), *_ = counts.most_common(1)
    return count, shapes[most]


def _training_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``autocast_dtype`` gives; for a GPU that this machine lacks, what it gives on the GPUs of today."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None if precision == "float32" else torch.bfloat16
    return autocast_dtype(precision, device)


def _head_gives_logits(model: nn.Module, blocks: Blocks) -> bool:
    """``head_gives_logits``. Where a block cannot run without numbers, as experts that are chosen by them, all blocks
    give back their input; where the rest of the model cannot either, the answer is that of most models."""
    stubs: list[Any] = [None, lambda hidden, *_, **__: hidden, lambda hidden, *_, **__: (hidden,)]
    for stub in stubs:
        with ExitStack() as stack:
            for block in blocks if stub is not None else ():
                block.forward = stub
                stack.callback(delattr, block, "forward")
            try:
                return head_gives_logits(model)
            except Exception:  # of any kind: it is the model's own code, which expects numbers
                continue
    return True


def _rows_of(parameters: Iterable[nn.Parameter], counted: set[int]) -> list[Rows]:
    """Of parameters that are not yet ``counted``, by their ``id``: a parameter in two places is there once."""
    new = [p for p in parameters if id(p) not in counted]
    counted.update(map(id, new))
    counts = [p.shape[0] if p.ndim else 1 for p in new]
    return [Rows(count, p.nbytes // max(1, count)) for p, count in zip(new, counts, strict=True)]


def _wrapped_rows(block: nn.Module, holders: Collection[nn.Module], counted: set[int]) -> list[Rows]:
    """``_rows_of`` a block in which linears have taken the place of ``holders``, which are of another form."""
    forms = [module for module in block.modules() if module in holders]
    found = _rows_of((p for form in forms for linear in views(form).values() for p in linear.parameters()), set())
    counted.update(id(tensor) for form in forms for tensor in tensors_of(form).values())
    return _rows_of(block.parameters(), counted) + found


def _shape_of(linear: nn.Module) -> LinearShape:
    return LinearShape(cast(int, linear.in_features), cast(int, linear.out_features))
