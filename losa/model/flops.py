"""The work of a decoder: floating-point operations of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from losa.model.blocks import find_blocks, weight_count
from losa.modules.masked_lora import MaskedLoRALinear


@dataclass(frozen=True)
class TokenWork:
    """What the matrix products of a token depend on: ``linears``, weights of the blocks' linears; ``adapted`` of them
    have an adapter; ``head``, weights of the output layer; ``attention``, widths of the attention heads of all blocks
    together."""

    linears: int
    adapted: int
    head: int
    attention: int

    @classmethod
    def of(cls, model: Any) -> TokenWork:
        """``model``: a causal LM of transformers, wrapped. Raises ModelError: the model has no blocks."""
        blocks = find_blocks(model)
        linears = blocks.linears().values()
        head = model.get_output_embeddings()
        return cls(
            linears=sum(weight_count(linear) for linear in linears),
            adapted=sum(weight_count(linear) for linear in linears if isinstance(linear, MaskedLoRALinear)),
            head=0 if head is None else head.weight.numel(),
            attention=attention_width(model.config.get_text_config(), blocks.modules, hidden_size(model)) * len(blocks),
        )

    def forward(self, length: int) -> float:
        """FLOP a token of a forward pass through the blocks, in texts of ``length`` tokens."""
        # A causal token attends to half of the text on average: q k^T and p v.
        return 2.0 * self.linears + 2.0 * length * self.attention

    def training(self, length: int) -> float:
        """FLOP a token of forward and backward passes, without recomputation. Gradients are taken of the weights with
        an adapter alone."""
        per_token = 6.0 * self.adapted + 4.0 * (self.linears - self.adapted) + 4.0 * self.head
        return per_token + 3 * (self.forward(length) - 2.0 * self.linears)


def hidden_size(model: Any) -> int:
    """Width of a token between the blocks."""
    return number_of(model.config.get_text_config(), "hidden_size") or model.get_input_embeddings().weight.shape[-1]


def attention_width(config, blocks: nn.Module, hidden: int) -> int:
    """Width of all attention heads of a block together, 0 where there is no attention. It comes from the configuration;
    where heads differ between layers, the modules' own widest size counts.

    Args:
        config: of the text model.
        hidden: of ``hidden_size``.
    """
    count = number_of(config, "num_attention_heads")
    if count is None:
        return 0
    sizes = [size for module in blocks.modules() if isinstance(size := getattr(module, "head_dim", None), int)]
    return count * (number_of(config, "head_dim") or max(sizes, default=0) or hidden // count)


def number_of(config, name: str) -> int | None:
    """A positive integer of a configuration; None where it has none, or a different one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers' own for what differs between layers
        return None
    return value if isinstance(value, int) and value > 0 else None
