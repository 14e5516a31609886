"""The work of a decoder: floating-point operations of its matrix products."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from losa.model.blocks import Blocks, expert_choices, find_blocks, stacked_weights, weight_count
from losa.model.forms import has_views, holder_of
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear


@dataclass(frozen=True)
class TokenWork:
    """What the matrix products of a token depend on: ``linears``, weights of the blocks' linears and stacked experts;
    ``masked`` of them have an adapter under the mask; ``head``, weights of the output layer; ``attention``, widths of
    the attention heads of all blocks together; ``dropout``: whether the adapters drop inputs in training.

    Of a mixture of experts the share counts that a token is sent to. ``routed``: False where the configuration does not
    say how many experts that is; then all of them count.
    """

    linears: float
    masked: float
    head: int
    attention: int
    dropout: bool = False
    routed: bool = True

    @classmethod
    def of(cls, model: Any) -> TokenWork:
        """``model``: a causal LM of transformers, wrapped. Raises ModelError: the model has no blocks."""
        linears = find_blocks(model).linears()
        masked = {n for n, m in linears.items() if isinstance(m, MaskedLoRALinear) and not isinstance(m, LoRALinear)}
        dropout = any(m.dropout_p > 0 for m in linears.values() if isinstance(m, MaskedLoRALinear))
        return cls.with_adapters(model, masked, dropout)

    @classmethod
    def with_adapters(cls, model: Any, masked: Collection[str], dropout: bool) -> TokenWork:
        """``model``: wrapped or not; ``masked``: names of linears that have an adapter under the mask."""
        blocks, config = find_blocks(model), model.config.get_text_config()
        head = model.get_output_embeddings()
        shares, routed = _shares(blocks, number_of(config, "num_experts_per_tok"))
        weights = {n: shares.get(id(holder_of(m)), 1.0) * weight_count(m) for n, m in blocks.linears().items()}
        stacked = sum(
            shares[id(module)] * getattr(module, name).numel()
            for block in blocks
            for module in block.modules()
            for name in (() if has_views(module) else stacked_weights(module))
        )
        return cls(
            linears=sum(weights.values()) + stacked,
            masked=sum(weights[name] for name in masked),
            head=0 if head is None else head.weight.numel(),
            attention=attention_width(config, blocks.modules, hidden_size(model)) * len(blocks),
            dropout=dropout,
            routed=routed,
        )

    def forward(self, length: int, training: bool = False) -> float:
        """FLOP a token of a forward pass through the blocks, in texts of ``length`` tokens."""
        # A causal token attends to half of the text on average: q k^T and p v.
        attention = 2.0 * length * self.attention
        # Dropout is of the adapter's input alone, so that W and B A cannot be one product.
        return 2.0 * (self.linears + self.masked * (training and self.dropout)) + attention

    def training(self, length: int, distills: bool = False) -> float:
        """FLOP a token of forward and backward passes, without recomputation. A linear's backward pass has the products
        of its forward pass, and one more under the mask, dY^T x. Products with A or B of an adapter do not count.
        ``distills``: the dense model's forward pass and logits come on top."""
        beside = 2.0 * length * self.attention + 4.0 * self.head
        if distills:
            beside += self.forward(length) + 2.0 * self.head
        return 2 * self.forward(length, training=True) + 2.0 * self.masked + beside


def _shares(blocks: Blocks, experts_of_a_token: int | None) -> tuple[dict[int, float], bool]:
    """The share of a token's experts among all, by the ``id`` of each module in a list of experts or with stacked
    weights; and whether all shares are known."""
    shares: dict[int, float] = {}
    known = True
    for block in blocks:
        choices = expert_choices(block)
        for parent in block.modules() if choices else ():
            for experts in parent.children():
                if (count := choices.get(experts)) is None:
                    continue
                chosen = experts_of_a_token or _top_k(parent)
                known &= chosen is not None
                share = min(1.0, (chosen or count) / count)
                shares |= {id(module): share for module in experts.modules()}
    return shares, known


def _top_k(parent: nn.Module) -> int | None:
    """How many experts a token is sent to, as the module says that holds them, or its router."""
    return next((k for module in (parent, *parent.children()) if (k := number_of(module, "top_k"))), None)


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
    """A positive integer of a configuration, or of a module; None where it has none, or a different one for each
    layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers' own for what differs between layers
        return None
    return value if isinstance(value, int) and value > 0 else None
