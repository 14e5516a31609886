"""How fast training runs: tokens a second, and the share of a device's peak that the model's own work takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from losa.distributed.processes import process_count
from losa.model.flops import TokenWork

# Dense bf16 and fp16 products with fp32 sums, TFLOP/s, by a word of the device's name: the first line that fits counts.
# From NVIDIA's data sheets and, for GeForce, white papers; where they state a rate "with sparsity", it is halved.
PEAKS = (
    ("B200", 2250),
    ("H200 NVL", 835),
    ("(H200|GH200)", 989),
    ("H100 NVL", 835),
    ("H100 PCIe", 756),
    ("H100", 989),
    ("(A100|A100-.*)", 312),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("A40", 150),
    ("A10", 125),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device's matrix products, without sparsity; None for another dtype than bf16 and fp16, and where the
    peak is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    # A MIG instance has a part of the device; GPUs of laptops are other chips.
    other = re.search(r" (MIG|Laptop) ", name)
    fits = (peak for word, peak in PEAKS if not other and re.search(rf"(^| ){word}( |$)", name))
    peak = next(fits, None)
    return None if peak is None else 1e12 * peak


@dataclass(frozen=True)
class Throughput:
    """``devices``: one a process. ``flops_a_token``: what training has to compute, without recomputation; ``peak``:
    FLOP/s of a device. Both are None where the peak is not known, or how many experts a token is sent to."""

    devices: int = 1
    flops_a_token: float | None = None
    peak: float | None = None

    @classmethod
    def of(
        cls, model: Any, length: int, device: torch.device, autocast: torch.dtype | None, distills: bool = False
    ) -> Throughput:
        """Of ``model``, wrapped, on sequences of ``length`` tokens. ``distills``: of ``TokenWork.training``."""
        peak = peak_flops(device, autocast or _dtype_of(model))
        work = None if peak is None else TokenWork.of(model)
        if work is None or not work.routed:
            return cls(process_count())
        return cls(process_count(), work.training(length, distills), peak)

    def measures(self, tokens: int, seconds: float) -> dict[str, float]:
        """What metrics.jsonl says of a step: ``tokens_per_s`` of all processes, ``tokens_per_s_per_device``, and, where
        the peak is known, ``mfu``, the model-FLOP utilisation (Chowdhery et al. 2022, PaLM, appendix B).

        Args:
            tokens: of all processes.
        """
        rate = tokens / seconds
        found = {"tokens_per_s": rate, "tokens_per_s_per_device": rate / self.devices}
        if self.flops_a_token is not None and self.peak is not None:
            found["mfu"] = rate / self.devices * self.flops_a_token / self.peak
        return found


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of the weights: the first floating-point parameter is one, and adapters come later."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
