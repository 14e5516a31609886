"""A trainer of a tiny model, and what it is given and leaves."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from losa.algorithm.block import WrappedBlock
from losa.data.sequences import IGNORED, PackedData
from losa.model.blocks import find_blocks
from losa.model.norms import train_norms
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.training import DistillConfig, TrainConfig
from losa.training.distillation import DistillationLoss
from losa.training.loss import TokenLoss
from losa.training.trainer import Trainer
from tests.helpers.tiny import tiny_llama

LENGTH = 12
TIMES = ("tokens_per_s", "tokens_per_s_per_device")


def sequences(count: int, seed: int = 0, highest: int = 90) -> PackedData:
    """Random tokens below ``highest``, with labels on a random part of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, highest, (count, LENGTH), generator=generator)
    shares = torch.rand(count, 1, generator=generator)
    labels = ids.masked_fill(torch.rand(count, LENGTH, generator=generator) < shares, IGNORED)
    return PackedData(ids, labels)


def wrapped_llama(dtype=torch.float32, dropout_p: float = 0.0, scale_b: float = 0.02):
    model = tiny_llama(layers=2).to(dtype)
    wrap_model(model, rank=4, scaling=2.0, dropout_p=dropout_p)
    generator = torch.Generator().manual_seed(5)
    for layer in wrapped_linears(model).values():
        layer.lora_A.data = layer.lora_A.data.to(dtype)
        layer.lora_B.data = scale_b * torch.randn(layer.lora_B.shape, generator=generator).to(dtype)
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.6)
    return model


class Experts(nn.Module):
    """A mixture of four experts, each a copy of ``mlp`` with other weights. A router sends each text to one of them."""

    def __init__(self, mlp: nn.Module, hidden: int):
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(mlp) for _ in range(4)])
        for index, expert in enumerate(self.experts):
            for parameter in expert.parameters():
                parameter.data *= 1 + index / 4
        self.gate = nn.Linear(hidden, 4, bias=False)
        # The expert of each text so far.
        self.chosen: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.gate(hidden.mean(1)).argmax(-1).tolist()
        self.chosen += chosen
        return torch.cat([self.experts[index](text[None]) for index, text in zip(chosen, hidden, strict=True)])


def odd_llama(dtype=torch.float64, dropout_p: float = 0.0, experts: bool = False, layer=MaskedLoRALinear):
    """A wrapped model of two blocks with sizes that few numbers divide, biases, and one tensor for both embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=10, max_position_embeddings=64, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for block in model.model.layers if experts else ():
        block.mlp = Experts(block.mlp, 36)
    model.to(dtype)
    wrap_model(model, layer=layer, rank=5, scaling=2.0, dropout_p=dropout_p)
    generator = torch.Generator().manual_seed(5)
    for layer in wrapped_linears(model).values():
        if layer.rank:
            layer.lora_A.data = layer.lora_A.data.to(torch.promote_types(dtype, torch.float32))
            layer.lora_B.data = 0.05 * torch.randn(layer.lora_B.shape, generator=generator).to(layer.lora_A.dtype)
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.6)
    return model


def trainer(model, output_dir=None, total=16, loss_factory=TokenLoss, **settings):
    config = {"data": "unused", "length": LENGTH, "batch_size": 4, "warmup": 0.0, "max_grad_norm": 1e9} | settings
    return Trainer(
        model,
        TrainConfig(**config),
        seed=0,
        output_dir=output_dir,
        total_sequences=total,
        device="cpu",
        loss_factory=loss_factory,
    )


def distillation(model, config: dict, scale: float = 1.1):
    """Trained norms, other weights in every second linear of a wrapped model, and the factory of a loss whose teacher
    has the weights of before."""
    train_norms(model)
    blocks = find_blocks(model)
    made = [WrappedBlock(name, block, True, True) for name, block in zip(blocks.names, blocks, strict=True)]
    for block in made:
        with block.gathered(), torch.no_grad():
            for name, layer in list(block.linears.items())[::2]:
                layer.replace_weight(scale * layer.weight)
                block.originals.replaced(name)
    originals = {block.name: block.originals for block in made}
    return partial(DistillationLoss, config=DistillConfig(**config), originals=originals)


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


def break_training(model, data: PackedData, broken: str, row: int, backward: int) -> None:
    """Make numbers that are not finite: "loss", at the sequence ``row``; else in the gradient, at the ``backward``-th
    pass, from 1."""
    if broken == "loss":
        model.model.embed_tokens.weight.data[95] = math.nan
        data.input_ids[row, 3] = 95
        return
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == backward else 1.0)

    adapters(model)[0].register_hook(poison)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    """The lines without what differs from run to run."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder)]
