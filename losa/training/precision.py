"""The number type that training computes in."""

from __future__ import annotations

import logging

import torch

from losa_kernels import native

logger = logging.getLogger("losa")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None for ``TrainConfig.precision``: "auto" is bfloat16 on GPUs that support it. A CPU without bf16
    instructions computes in fp32, with a warning: emulated bf16 is many times slower than fp32."""
    if device.type == "cpu":
        if precision != "bfloat16":
            return None
        if native.cpu_has_bf16():
            return torch.bfloat16
        logger.warning("train.precision: this CPU has no bfloat16 instructions; training in float32")
        return None
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.bfloat16 if wanted else None
