"""AdaLoRA's budget of ranks over all linears, by PEFT's own allocator, and its orthogonal regularisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losa.model.wrapping import wrapped_linears
from losa.modules.gated_lora import AdaLoRALinear
from losa.training.extension import Extension

ORTHOGONAL = 0.5
"""Weight of the mean of ||P P^T - I||_F and ||Q^T Q - I||_F over all adapters, PEFT's default."""
WARM_UP, FINAL = 0.1, 0.3
"""Shares of a round's steps before the budget begins to fall, and after it has come to its end."""
ALLOCATIONS = 100
"""How often, about, the budget is shared out anew."""
_NAME, _VALUES = "default", "lora_E"  # PEFT's of an adapter, and of its singular values
_AVERAGES = {"importance": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}
_KEPT = "kept"


class RankBudget(Extension):
    """The singular values that matter least, over all linears together, are set to zero, so that their number falls
    from the adapters' ranks to ``rank`` a linear: by a cubic schedule after a warm-up, and no more in the last steps
    (Zhang et al. 2023, Algorithm 1). The importance of a value is PEFT's: moving averages of |w * dL/dw| and of its
    spread.

    The allocator sees the layers under PEFT's names. It needs whole parameters: a model in shards is not supported.

    Args:
        model: with ``AdaLoRALinear`` layers of a rank above ``rank``.
        rank: mean rank at the end.

    Raises:
        ImportError: PEFT is not installed.
    """

    def __init__(self, model: nn.Module, rank: int):
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        self.model = model
        self.rank = rank
        self._make: Any = (AdaLoraConfig, RankAllocator)
        self._allocator: Any = None
        self._pattern: dict[str, list[bool]] | None = None  # of the values that stay, once the budget is at its end

    def begin(self, steps: int, state: Mapping[str, Tensor]) -> None:
        make_config, make_allocator = self._make
        self._pattern = None
        if steps < 2:  # too few for an importance
            self._allocator = None
            return
        config = make_config(
            target_r=self.rank,
            tinit=int(WARM_UP * steps),
            tfinal=int(FINAL * steps),
            deltaT=max(1, steps // ALLOCATIONS),
            total_step=steps,
            orth_reg_weight=ORTHOGONAL,
        )
        self._allocator = make_allocator(_Named(self.model), config, _NAME)
        for ours, peft, _ in _parameters(self.model):
            for part, averages in _AVERAGES.items():
                if (found := state.get(f"{ours}.{part}")) is not None:
                    getattr(self._allocator, averages)[peft] = found
                    self._allocator.ipt[peft] = torch.zeros_like(found)  # PEFT replaces it before any use
            if (kept := state.get(f"{ours}.{_KEPT}")) is not None:
                self._pattern = (self._pattern or {}) | {peft: kept.flatten().bool().tolist()}

    def penalty(self) -> Tensor:
        distances = []
        for layer in wrapped_linears(self.model).values():
            for rows in (layer.lora_A, layer.lora_B.T):
                gram = rows @ rows.T
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return ORTHOGONAL * torch.stack(distances).mean()

    def after_update(self, step: int, learning_rate: float) -> None:
        if self._allocator is None:
            return
        named, config = _Named(self.model), self._allocator.peft_config
        with _any_algorithm():
            if self._pattern is not None:
                self._allocator.mask_using_rank_pattern(named, self._pattern)
            elif step < config.total_step - config.tfinal:
                self._allocator.update_and_allocate(named, step)
            elif self._allocator.exp_avg_ipt:
                _, self._pattern = self._allocator.update_and_allocate(named, step, force_mask=True)
                self._allocator.reset_ipt()

    def state(self) -> dict[str, Tensor]:
        kept = self._pattern or {}
        found = {}
        for ours, peft, parameter in _parameters(self.model):
            for part, averages in _AVERAGES.items():
                if (average := getattr(self._allocator, averages, {}).get(peft)) is not None:
                    found[f"{ours}.{part}"] = average
            if peft in kept:
                found[f"{ours}.{_KEPT}"] = torch.tensor(kept[peft]).to(parameter).view_as(parameter)
        return found


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """A recipe's ``deterministic`` does not hold within the context. The allocator takes a k-th value, which torch
    refuses on a GPU because the value's place is not deterministic; the allocator does not ask for the place."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class _Named:
    """The adapters of a model as the allocator looks for them."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for _, peft, parameter in _parameters(self.model):
            yield peft, parameter


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every adapter's parameters: the name in the model, the name that PEFT would give, and the parameter."""
    for name, layer in wrapped_linears(model).items():
        assert isinstance(layer, AdaLoRALinear)
        for part in layer.adapter_parts:
            yield f"{name}.{part}", f"{name}.{_VALUES if part == 'gate' else part}.{_NAME}", getattr(layer, part)
