"""What every masked-LoRA linear does first: it checks its arguments, and chooses its implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.bitmask import check_packed
from losa_kernels.tensors import wide_dtype

MAX_RANK = 128
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layer(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """The scaling as a float. Raises ValueError as ``masked_lora_linear``."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        arguments.tensor(name, tensor)
    if weight.dim() != 2 or weight.dtype not in FLOATS or weight.numel() == 0:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"weight: expected floating point (out, in), out and in at least 1, got {got}")
    out_features, in_features = weight.shape
    rank = lora_A.shape[0] if lora_A.dim() == 2 else 0
    if not 1 <= rank <= MAX_RANK or tuple(lora_A.shape) != (rank, in_features):
        raise ValueError(f"lora_A: expected (r, {in_features}) with 1 <= r <= {MAX_RANK}, got {tuple(lora_A.shape)}")
    if tuple(lora_B.shape) != (out_features, rank):
        raise ValueError(f"lora_B: expected ({out_features}, {rank}), got {tuple(lora_B.shape)}")
    if mask is not None:
        check_packed(mask, weight)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as weight, got {tensor.device}")
    scaling = arguments.number("scaling", scaling)
    largest = torch.finfo(wide_dtype(weight.dtype)).max
    if not abs(scaling) <= largest:
        raise ValueError(f"scaling: expected a finite number up to {largest:g}, got {scaling}")
    return scaling


def check_input(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """x, cast where autocast asks for it. Raises ValueError as ``masked_lora_linear``."""
    arguments.tensor("x", x)
    if bias is not None:
        arguments.tensor("bias", bias)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x: expected bf16, fp16, fp32 or fp64, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device} as weight, got {x.device}")
    if (dtype := _autocast_dtype(x)) is not None:
        x = x.to(dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    check_adapter_dtype(lora_A, lora_B, (torch.float32, x.dtype, weight.dtype), "x's")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype not in FLOATS):
        raise ValueError(f"bias: expected floating point ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    if bias is not None and bias.device != weight.device:
        raise ValueError(f"bias: expected on {weight.device} as weight, got {bias.device}")
    return x


def check_adapter_dtype(lora_A: Tensor, lora_B: Tensor, allowed: tuple[torch.dtype, ...], whose: str) -> None:
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in allowed:
            raise ValueError(f"{name}: expected float32 or {whose} {allowed[1]}, got {factor.dtype}")


def autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_input(x: Tensor) -> Tensor:
    """x in the type of autocast, where it is on; fp64 stays."""
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x; None where it leaves x as it is."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocast_is_on(kind) and x.dtype != torch.float64 else None


def run(op: str, device: torch.device, *inputs):
    """The implementation for the device, with autocast off: it would round W + s B A and G to low precision."""
    implementation = dispatch.implementation(op, device)
    if autocast_is_on(device.type):
        with torch.autocast(device.type, enabled=False):
            return implementation(*inputs)
    return implementation(*inputs)
