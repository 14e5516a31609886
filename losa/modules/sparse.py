"""A packed weight in place of a linear, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from losa.modules.linear_experts import stack_of, stand_for
from losa_kernels import sparse_linear
from losa_kernels.packing import Packed, PackedNM
from losa_kernels.packing.rows import join_rows, take_rows


class SparseLinear(nn.Module):
    """y = x W^T + bias from a packed weight, for inference.

    Buffers: the packed tensors (``values``, ``bitmask``, ...) and ``bias``. ``to`` and state dicts of equal shapes work
    as in any module.

    ``group``: the packed weight of all linears that read the same input, whose rows this weight is a view of; or None.
    Moving the module or loading a state dict gives this weight memory of its own.

    Args:
        packed: a packed weight of any format (``losa_kernels.pack_bitmask``, ...); shared, and never written to.
        bias: (out,) or None; shared.
    """

    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.set_packed(packed)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def packed(self) -> Packed:
        return self._packed

    @property
    def sparsity(self) -> float:
        """Share of weights that are not stored, 0..1."""
        return 1 - self._packed.values.numel() / max(1, self.out_features * self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        return sparse_linear(x, self._packed, self.bias)

    def to_linear(self) -> nn.Linear:
        """The dense linear: weights with the bits that are stored, and +0.0 elsewhere."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._packed.unpack(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        kind = type(self._packed).__name__
        pattern = f", {self._packed.keep_n}:{self._packed.m}" if isinstance(self._packed, PackedNM) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{kind}{pattern}, sparsity={self.sparsity:.3f}, dtype={self._packed.dtype}"
        )

    def set_packed(self, packed: Packed, group: Packed | None = None) -> None:
        """Replace the weight by one of the same shape, which may be part of a ``group``."""
        if packed.shape != (self.out_features, self.in_features):
            raise ValueError(f"packed: expected {(self.out_features, self.in_features)}, got {packed.shape}")
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self._packed, self.group = packed, group

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Also where values were copied in place: tiles were made from the values before, and a group has its own row
        # offsets.
        self._refresh(loaded=any(prefix + name in state_dict for name in self._packed.tensors()))

    def _refresh(self, loaded: bool = False) -> None:
        """Make the packed weight from the current buffers, after something replaced buffers or their contents."""
        before = self._packed.tensors()
        current = {name: getattr(self, name) for name in before}
        if loaded or any(current[name] is not tensor for name, tensor in before.items()):
            self._packed, self.group = replace(self._packed, **current), None


def unpack_linears(module: nn.Module) -> None:
    """Replace each ``SparseLinear`` inside ``module`` by the dense linear, in place."""
    for name, child in list(module.named_modules()):
        if isinstance(child, SparseLinear):
            module.set_submodule(name, stand_for(child.to_linear(), stack_of(child)))


def share_rows(linears: Sequence[SparseLinear]) -> Packed | None:
    """Make linears that read the same input rows of one packed weight, their ``group``, and return it. Returns None and
    changes nothing if formats, patterns or devices differ, or memory is short."""
    try:
        # Buffers made in inference mode could not be loaded into outside of it.
        with torch.inference_mode(False), torch.no_grad():
            whole, start = join_rows([linear.packed for linear in linears]), 0
            for linear in linears:
                stop = start + linear.out_features
                linear.set_packed(take_rows(whole, start, stop), group=whole)
                start = stop
    except (ValueError, torch.OutOfMemoryError):
        return None
    return whole
