"""All that the formulae of an estimate need to know of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from losa.errors import RecipeError
from losa.model.blocks import find_blocks
from losa.model.flops import attention_width, hidden_size, number_of
from losa.pruners import LinearShape
from losa.recipe.sections import Recipe
from losa.training.precision import autocast_dtype


@dataclass(frozen=True)
class ModelShape:
    """``heads``: width of all attention heads of a block together, 0 where there is no attention; ``head``: weights of
    the output layer; ``computed``: dtype of training's products; ``linears``: of all blocks, ``pruned`` of them."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype
    weight_bytes: int
    blocks: int
    hidden: int
    heads: int
    head: int
    vocabulary: int
    linears: list[LinearShape]
    pruned: list[LinearShape]

    @classmethod
    def of(cls, model: Any, recipe: Recipe, device: torch.device) -> ModelShape:
        """``model``: on the meta device. Raises ModelError: no blocks; RecipeError: targets that match no linear."""
        blocks = find_blocks(model)
        config = model.config.get_text_config()
        every, pruned = (
            [_shape_of(linear) for linear in blocks.linears(targets).values()]
            for targets in (None, recipe.prune.targets)
        )
        if not pruned:
            raise RecipeError(f"prune.targets: {recipe.prune.targets!r} matches no linear of {recipe.model!r}")
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        hidden = hidden_size(model)
        precision = recipe.train.precision if recipe.train is not None else "float32"
        return cls(
            device=device,
            dtype=model.dtype,
            computed=_training_dtype(precision, device) or model.dtype,
            weight_bytes=sum(p.nbytes for p in model.parameters()),
            blocks=len(blocks),
            hidden=hidden,
            heads=attention_width(config, blocks.modules, hidden),
            head=0 if head is None else head.weight.numel(),
            vocabulary=number_of(config, "vocab_size") or embedding.shape[0],
            linears=every,
            pruned=pruned,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def prunable(self) -> int:
        return sum(w.numel for w in self.pruned)

    @property
    def widest(self) -> int:
        return max(w.numel for w in self.pruned)


def _training_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``autocast_dtype`` gives; for a GPU that this machine lacks, what it gives on the GPUs of today."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None if precision == "float32" else torch.bfloat16
    return autocast_dtype(precision, device)


def _shape_of(linear: nn.Module) -> LinearShape:
    return LinearShape(cast(int, linear.in_features), cast(int, linear.out_features))
