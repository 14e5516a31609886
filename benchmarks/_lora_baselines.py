"""The baselines of a masked-LoRA linear, in plain PyTorch or PEFT, as functions of one ``Problem``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from losa_kernels import masked_lora_linear, pack_mask


@dataclass
class Problem:
    """One layer at ``sparsity`` and one batch.

    x and grad (tokens, .), weight (out, in) with zeros where the mask prunes, as the official code needs it; lora_A
    (r, in) and lora_B (out, r) in fp32.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    kept: Tensor
    mask: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float

    @classmethod
    def random(
        cls,
        out_features: int,
        in_features: int,
        tokens: int,
        rank: int,
        dtype: torch.dtype,
        device: str,
        dropout_p: float = 0.0,
        sparsity: float = 0.7,
    ) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape, std=1.0, dtype=dtype):
            return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

        kept = torch.rand((out_features, in_features), generator=generator, device=device) >= sparsity
        return cls(
            normal(tokens, in_features).requires_grad_(),
            normal(tokens, out_features),
            normal(out_features, in_features, std=in_features**-0.5).mul_(kept),
            kept,
            pack_mask(kept),
            normal(rank, in_features, std=in_features**-0.5, dtype=torch.float32).requires_grad_(),
            normal(out_features, rank, std=0.1, dtype=torch.float32).requires_grad_(),
            2.0,
            dropout_p,
        )

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.lora_A, self.lora_B


Forward = Callable[[Problem], Tensor]


def losa(p: Problem) -> Tensor:
    return masked_lora_linear(p.x, p.weight, p.mask, p.lora_A, p.lora_B, p.scaling, None, p.dropout_p)


def plain(p: Problem) -> Tensor:
    """The frozen linear alone: two products a step."""
    return F.linear(p.x, p.weight)


def eager_losa_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, dropout_p: float, recompute: bool
) -> Tensor:
    """The frozen product plus the product with the adapter, which ``W != 0`` masks.

    ``recompute`` puts the adapter under a checkpoint, as the official code does. A step then costs 12 T out in
    FLOPs instead of 10.
    """

    def adapter(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, (B @ A) * (weight != 0))

    x_adapter = F.dropout(x, dropout_p)
    if recompute and torch.is_grad_enabled():
        low_rank = checkpoint(adapter, x_adapter, A, B, use_reentrant=False)
    else:
        low_rank = adapter(x_adapter, A, B)
    return F.linear(x, weight) + scaling * low_rank


def eager_losa(p: Problem, recompute: bool = False) -> Tensor:
    A, B = p.lora_A.to(p.x.dtype), p.lora_B.to(p.x.dtype)
    return eager_losa_linear(p.x, p.weight, A, B, p.scaling, p.dropout_p, recompute)


def eager_losa_checkpointed(p: Problem) -> Tensor:
    return eager_losa(p, recompute=True)


def compose(p: Problem) -> Tensor:
    """The masked weight with its adapter added, by autograd, then one product."""
    base = torch.where(p.kept, p.weight, 0)
    delta = p.scaling * (p.lora_B.to(base.dtype) @ p.lora_A.to(base.dtype)) * p.kept
    if p.dropout_p:
        return F.linear(p.x, base) + F.linear(F.dropout(p.x, p.dropout_p), delta)
    return F.linear(p.x, base + delta)


def compiled(formula: Forward) -> Forward:
    run = torch.compile(formula, dynamic=False)
    return lambda p: run(p)


def peft_lora(p: Problem) -> Forward | None:
    """PEFT's LoRA on the same weight (no mask: another function, the usual cost); None if PEFT is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    out_features, in_features = p.weight.shape
    rank = p.lora_A.shape[0]
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="meta"))
    base[0].weight = nn.Parameter(p.weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p.dropout_p, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(p.x.dtype).train()
    return lambda problem: model(problem.x)


def three_products(p: Problem) -> Callable[[], None]:
    """The floor of a step: Y, dX and the weight's gradient by the vendor's library, into kept buffers."""
    x, weight = p.x.detach(), p.weight
    y, dx, G = torch.empty_like(p.grad), torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.T, out=y)
        torch.mm(p.grad, weight, out=dx)
        torch.mm(p.grad.T, x, out=G)

    return run


def step(forward: Forward, p: Problem) -> Callable[[], None]:
    """Runs forward and backward, and drops the gradients at once."""

    def run() -> None:
        forward(p).backward(p.grad)
        for leaf in p.leaves:
            leaf.grad = None

    return run
