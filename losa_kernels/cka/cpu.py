"""Centred Gram on a CPU: csrc/cpu/cka/. The operator's fake kernel is here too."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.cka import reference


def gram(features: Tensor) -> Tensor:
    """features (L, n, p) -> (L, n, n) fp64, of fp32 products; fp64 features: the reference."""
    if features.numel() == 0 or features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return reference.gram(features)
    return torch.ops.losa.gram.default(features if features.stride(2) == 1 else features.contiguous())


if native.missing("cpu") is None:

    @torch.library.register_fake("losa::gram")
    def _(features):
        return features.new_empty((*features.shape[:2], features.shape[1]), dtype=torch.float64)
