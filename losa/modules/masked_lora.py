"""A frozen linear under an explicit mask with a low-rank adapter, for training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.modules.trained_norm import TrainedNorm
from losa_kernels import masked_lora_linear, merge_masked_lora, pack_mask, unpack_mask
from losa_kernels.masked_lora import MAX_RANK


class MaskedLoRALinear(nn.Module):
    """y = x (M * (W + s B A))^T + bias, with W and M frozen (the bracket of Eq. 1).

    All tensors are direct Parameters, without children and buffers, so that FSDP2 shards each of them by rows:

    * ``weight`` (out, in), frozen; ``bias`` (out,), frozen, or None;
    * ``mask`` packed uint8 (out, ceil(in/8)), frozen: bit b of byte j is column 8j+b, 1 = kept;
    * ``lora_A`` (rank, in) and ``lora_B`` (out, rank), fp32, trained.

    In a sharded model the methods need whole parameters (``losa.distributed.sharding.gathered``); ``set_rank`` needs
    the adapter alone.

    ``scaling`` (s) and ``dropout_p`` (for the adapter's input in training) are plain floats. With ``adapter_enabled``
    False the layer computes the dense linear that it wraps, without mask and adapter (see ``dense_mode``).

    ``to(dtype)`` and ``half()`` convert the adapter along with the weight, as in any ``nn.Module``; convert a model
    before wrapping it to train the adapter in fp32. A state dict of any rank can be loaded. Loading another rank and
    ``set_rank`` replace the adapter's Parameters: make a new optimiser afterwards.

    Args:
        weight: (out, in) floating point; its storage is shared, and never written to.
        bias: (out,) or None; shared too.
        rank: of the adapter.
        scaling: s.
        mask: bool (out, in) or packed; None keeps everything.
        dropout_p: 0 <= p < 1.
        generator: for ``lora_A`` (Gaussian, std 1/sqrt(3 in)); ``lora_B`` starts at zero.

    Raises:
        ValueError: rank outside 1..min(in, out, 128), a bad mask, or a weight that is not floating point.
    """

    adapter_parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    """Names of the Parameters that are trained."""
    has_rank: ClassVar[bool] = True
    """Whether an adapter's rank must fit the linear."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        rank: int = 8,
        *,
        scaling: float = 2.0,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
        self.out_features, self.in_features = weight.shape
        self.scaling = float(scaling)
        self.dropout_p = float(dropout_p)
        self.adapter_enabled = True
        # New Parameters over the same storage: assigning to their .data leaves the source module as it was.
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight_replaced = False
        self.keep_all()
        self._make_adapter(rank, generator)
        if mask is not None:
            self.set_mask(mask)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 8,
        *,
        scaling: float = 2.0,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> MaskedLoRALinear:
        """Wrap a linear; its weight and bias stay where they are in memory. Arguments: see the class."""
        layer = cls(
            linear.weight,
            linear.bias,
            rank,
            scaling=scaling,
            mask=mask,
            dropout_p=dropout_p,
            generator=generator,
        )
        return layer.train(linear.training)

    @property
    def weight_is_given(self) -> bool:
        """Whether ``weight`` still holds the numbers of the linear that was wrapped."""
        return not self.weight_replaced

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of ``adapter_parts`` at a rank."""
        return {"lora_A": (rank, self.in_features), "lora_B": (self.out_features, rank)}

    @property
    def sparsity(self) -> float:
        """Share of weights that the mask prunes, 0..1."""
        return 1 - int(self.mask_bool().sum()) / self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.adapter_enabled:
            return F.linear(x, self.weight, self.bias)
        dropout_p = self.dropout_p if self.training else 0.0
        return masked_lora_linear(
            x, self.weight, self.mask, self.lora_A, self.lora_B, self.scaling, self.bias, dropout_p
        )

    def mask_bool(self) -> Tensor:
        """The mask as bool (out, in), True = kept."""
        return unpack_mask(self.mask.detach(), self.in_features)

    def keep_all(self) -> None:
        """Take a new mask, where the weight is, that keeps everything."""
        shape = (self.out_features, -(-self.in_features // 8))
        packed = torch.full(shape, 255, dtype=torch.uint8, device=self.weight.device)
        packed[:, -1] = (1 << ((self.in_features - 1) % 8 + 1)) - 1
        self.mask = nn.Parameter(packed, requires_grad=False)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask, given as bool (out, in) or packed uint8 (out, ceil(in/8)) with zero padding bits.

        Raises:
            ValueError: another dtype or shape, or a padding bit that is set.
        """
        dense = (self.out_features, self.in_features)
        packed = tuple(self.mask.shape)
        expected = {torch.bool: dense, torch.uint8: packed}.get(mask.dtype)
        if expected is None or tuple(mask.shape) != expected:
            raise ValueError(
                f"mask: expected bool {dense} or packed uint8 {packed}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if mask.dtype == torch.bool:
            mask = pack_mask(mask)
        elif self.in_features % 8 and bool((mask[:, -1] >> (self.in_features % 8)).any()):
            raise ValueError(f"mask: a padding bit beyond column {self.in_features - 1} is set")
        with torch.no_grad():
            self.mask.copy_(mask)

    def set_rank(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Grow or shrink the adapter: ``lora_A`` and ``lora_B`` become new Parameters of the new size.

        Growing appends Gaussian rows to A and zero columns to B, so that the function stays the same. Shrinking
        drops the components i with the smallest ||b_i|| ||a_i|| (of equal ones the last) and keeps the order of the
        remaining components.

        Raises:
            ValueError: rank outside 1..min(in, out, 128).
        """
        self._check_rank(rank)
        if rank == self.rank:
            return
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if rank > self.rank:
            extra = rank - self.rank
            rows = self._gaussian_rows(extra, generator, a.device).to(a.dtype)
            self._set_adapter(torch.cat([a, rows]), torch.cat([b, b.new_zeros(self.out_features, extra)], dim=1))
            return
        left, right = self.factors()
        size = left.detach().float().norm(dim=1) * right.detach().float().norm(dim=0)
        self._keep_components(size.argsort(descending=True, stable=True)[:rank].sort().values)

    def replace_weight(self, weight: Tensor) -> None:
        """Take another frozen weight (out, in), from a pruner that changes kept weights. The wrapped linear keeps its
        weight.

        Raises:
            ValueError: another shape.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected {tuple(self.weight.shape)}, got {tuple(weight.shape)}")
        self.weight.data = weight.to(self.weight.dtype)
        self.weight_replaced = True

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of the product s B A, as training sees them."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W + s B A without the mask: fp32 (out, in), a new tensor."""
        A, B = self.factors()
        return torch.addmm(self.weight.float(), B.float(), A.float(), alpha=self.scaling)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """M * (W + s B A), rounded once to the weight's dtype: (out, in), a new tensor, exactly +0.0 where pruned."""
        return merge_masked_lora(self.weight.detach(), self.mask.detach(), *self.factors(), self.scaling)

    def merge(self) -> nn.Linear:
        """A plain, frozen linear with ``effective_weight``. The bias keeps its storage."""
        return self._plain(self.effective_weight())

    def unwrap(self) -> nn.Linear:
        """The plain, frozen linear underneath: weight W and bias as stored, without mask and adapter."""
        return self._plain(self.weight.detach())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, bias={self.bias is not None}"
        )

    def _plain(self, weight: Tensor) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return linear.train(self.training)

    def _check_rank(self, rank: int) -> None:
        limit = min(self.in_features, self.out_features, MAX_RANK)
        if not 1 <= rank <= limit:
            shape = (self.out_features, self.in_features)
            raise ValueError(f"rank: expected 1..{limit} for a weight of shape {shape}, got {rank}")

    def _gaussian_rows(self, rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """(rows, in) fp32 with the variance of ``nn.Linear``'s own initialisation."""
        return gaussian((rows, self.in_features), math.sqrt(3 * self.in_features), generator, device)

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        """The adapter of a new layer."""
        self._check_rank(rank)
        zeros = torch.zeros(self.out_features, rank, device=self.weight.device)
        self._set_adapter(self._gaussian_rows(rank, generator, self.weight.device), zeros)

    def _keep_components(self, kept: Tensor) -> None:
        """Leave the components of these indices (kept,) int64, in their order."""
        self._set_adapter(self.lora_A.detach()[kept], self.lora_B.detach()[:, kept].contiguous())

    def _set_adapter(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        a, b = state_dict.get(f"{prefix}lora_A"), state_dict.get(f"{prefix}lora_B")
        if a is not None and b is not None and a.ndim == b.ndim == 2 and 0 < a.shape[0] == b.shape[1] != self.rank:
            rank = a.shape[0]
            self._set_adapter(
                self.lora_A.new_zeros(rank, self.in_features), self.lora_B.new_zeros(self.out_features, rank)
            )
        # Loading copies in place, which must not change the module that was wrapped.
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            if f"{prefix}{name}" in state_dict and parameter is not None:
                parameter.data = parameter.data.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


def gaussian(shape: tuple[int, ...], divisor: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard Gaussian numbers over ``divisor``, fp32."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    # Numbers are drawn on the generator's device, by default the host, so that they do not depend on ``device``.
    source = "cpu" if generator is None else generator.device
    return (torch.randn(shape, generator=generator, device=source) / divisor).to(device)


@contextmanager
def dense_mode(module: nn.Module) -> Iterator[None]:
    """Within the context every wrapped linear inside ``module`` computes x W^T + bias, without mask and adapter, and
    every trained norm has the weights that it was given."""
    with _disabled(module, (MaskedLoRALinear, TrainedNorm)):
        yield


@contextmanager
def plain_linears(module: nn.Module) -> Iterator[None]:
    """Within the context every wrapped linear inside ``module`` computes x W^T + bias; trained norms stay trained."""
    with _disabled(module, MaskedLoRALinear):
        yield


@contextmanager
def _disabled(module: nn.Module, kinds: type | tuple[type, ...]) -> Iterator[None]:
    layers: list[Any] = [m for m in module.modules() if isinstance(m, kinds)]
    before = [layer.adapter_enabled for layer in layers]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled
