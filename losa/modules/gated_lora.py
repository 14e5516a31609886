"""Dense adapters whose components a vector of gates scales, so that their rank can be trained: SoRA and AdaLoRA."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import gaussian


class SoRALinear(LoRALinear):
    """Sparse low-rank adaptation (Ding et al. 2023, Eq. 5): y = x (M * W)^T + s ((x A^T) * g) B^T + bias.

    * ``gate`` g (rank, 1), fp32, trained: Gaussian at first, as in the paper's code. A component whose gate is zero
      does nothing; ``drop_closed`` removes it.

    All else is as in ``LoRALinear``: the adapter ignores the mask, and merging under the mask changes the function.
    """

    adapter_parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "gate")

    gate: nn.Parameter

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().adapter_shapes(rank), "gate": (rank, 1)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(g) A (rank, in) and B (out, rank)."""
        return self.lora_A * self.gate, self.lora_B

    def set_rank(self, rank: int, generator: torch.Generator | None = None) -> None:
        """As ``MaskedLoRALinear.set_rank``; gates of new components are 1, and their columns of B zero."""
        extra, gate = rank - self.rank, self.gate.detach()
        super().set_rank(rank, generator)
        if extra > 0:
            self.gate = nn.Parameter(torch.cat([gate, gate.new_ones(extra, 1)]))

    def drop_closed(self) -> None:
        """Drop the components whose gate is zero. One component stays where all are closed: it does nothing."""
        kept = self.gate.detach().nonzero()[:, 0]
        self._keep_components(kept if len(kept) else kept.new_zeros(1))

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        super()._make_adapter(rank, generator)
        self.gate = nn.Parameter(gaussian((rank, 1), 1, generator, self.weight.device))

    def _keep_components(self, kept: Tensor) -> None:
        super()._keep_components(kept)
        self.gate = nn.Parameter(self.gate.detach()[kept])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        gate = state_dict.get(f"{prefix}gate")
        if gate is not None and gate.ndim == 2 and len(gate) != len(self.gate):
            self.gate = nn.Parameter(self.gate.new_zeros(len(gate), 1))
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaLoRALinear(SoRALinear):
    """Adaptive budget allocation (Zhang et al. 2023, Eq. 3): y = x (M * W)^T + s ((x P^T) * lambda) Q^T + bias, with
    P = ``lora_A``, lambda = ``gate`` and Q = ``lora_B``.

    Singular vectors start as Gaussians of standard deviation 0.02 and singular values at zero, as in PEFT. Who trains
    the layer keeps P and Q near orthogonal and closes gates (``losa.training.adalora``).
    """

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        super()._make_adapter(rank, generator)
        device = self.weight.device
        self._set_adapter(*(gaussian(tuple(t.shape), 50, generator, device) for t in (self.lora_A, self.lora_B)))
        self.gate = nn.Parameter(torch.zeros(rank, 1, device=device))
