"""Masked-LoRA linear: y = x (M * (W + s B A))^T + bias, without keeping anything of size out x in.

Eager LoSA forms BA, the mask and their product in every forward, recompute and backward pass, next to a separate
product with W. This op needs three large products per step (Y, dX, G) and saves x and references only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.bitmask import check_packed
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.tensors import wide_dtype

MAX_RANK = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x (M * (W + s B A))^T + bias (the bracket of LoSA's Eq. 1), differentiable in x, lora_A, lora_B and bias.

    With G = dY^T x:  dX = dY W_eff,  dA = s B^T (M * G),  dB = s (M * G) A^T. W is frozen. W_eff is formed in fp32
    (fp64 for fp64) and rounded once to x's dtype. The backward pass saves x and references to the other arguments, and
    computes only the gradients that are asked for; on a GPU, and on a CPU that multiplies bf16, G of a bf16 layer may
    be rounded to bf16. No second derivatives.

    A NaN or inf of x, W, A, B, bias or dY makes each result not finite (NaN or inf, which of the two is not defined)
    that a kept weight connects it to. What stands at pruned places of W reaches no result. Whether NaN and inf of x,
    dY, A and B also pass through pruned weights (0 * NaN) is not defined: implementations differ.

    Args:
        x: (..., in), any strides, an empty batch allowed; bf16, fp16, fp32 or fp64. Under autocast it is cast to the
            autocast dtype, as in ``nn.Linear``; the other arguments are left as they are.
        weight: (out, in) in x's dtype (under autocast in any floating-point dtype); never differentiated.
        mask: packed uint8 (out, ceil(in/8)), bit b of byte j = column 8j+b, 1 = kept; None means W != 0.
        lora_A: (r, in) and lora_B: (out, r), 1 <= r <= 128, in fp32 or in x's or the weight's dtype.
        scaling: s, finite in fp32 (fp64 for fp64).
        bias: (out,) or None, floating point.
        dropout_p: 0 <= p < 1, on the adapter's input only: y = x (M * W)^T + s drop(x) (M * BA)^T + bias. The
            backward pass replays the dropout mask from a seed drawn here from torch's default generator.

    Returns:
        (..., out) in x's dtype, contiguous; it may be changed in place.

    Raises:
        ValueError: a wrong shape, dtype, device or value; names the argument.
    """
    scaling = _check(weight, mask, lora_A, lora_B, scaling)
    x = _check_input(x, weight, lora_A, lora_B, bias)
    dropout_p = arguments.number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    # A tensor, because a compiled graph cannot turn it into an int; it is drawn on the CPU, so reading it waits for
    # no device.
    seed = torch.randint(2**31 - 1, (), device="cpu") if dropout_p > 0 else None
    # torch.compile and subclasses of tensors (fake ones) need an operator; eager mode saves its overhead. Both call the
    # same functions.
    eager = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    call = _MaskedLoRALinear.apply if eager else _forward_op
    return call(x, weight, mask, lora_A, lora_B, scaling, bias, dropout_p, seed)


def merge_masked_lora(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """M * (W + s B A) in fp32 (fp64 for fp64 weights) with one rounding to the weight's dtype; (out, in), a new tensor.

    Pruned entries are exactly +0.0, whatever W, A and B hold there (NaN, inf, -0.0); a NaN or inf makes the kept
    entries that it is part of not finite. Not differentiable. Arguments and errors: see ``masked_lora_linear``.
    """
    scaling = _check(weight, mask, lora_A, lora_B, scaling)
    _check_adapter_dtype(lora_A, lora_B, (torch.float32, weight.dtype), "the weight's")
    with torch.no_grad():
        return _run("merge_masked_lora", weight.device, Layer(weight, mask, lora_A, lora_B, scaling))


def _check(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """scaling as a float."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        arguments.tensor(name, tensor)
    if weight.dim() != 2 or weight.dtype not in _FLOATS or weight.numel() == 0:
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


def _check_input(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """x, cast where autocast asks for it."""
    arguments.tensor("x", x)
    if bias is not None:
        arguments.tensor("bias", bias)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: expected bf16, fp16, fp32 or fp64, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device} as weight, got {x.device}")
    if _autocast_is_on(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    _check_adapter_dtype(lora_A, lora_B, (torch.float32, x.dtype, weight.dtype), "x's")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype not in _FLOATS):
        raise ValueError(f"bias: expected floating point ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    if bias is not None and bias.device != weight.device:
        raise ValueError(f"bias: expected on {weight.device} as weight, got {bias.device}")
    return x


def _check_adapter_dtype(lora_A: Tensor, lora_B: Tensor, allowed: tuple[torch.dtype, ...], whose: str) -> None:
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in allowed:
            raise ValueError(f"{name}: expected float32 or {whose} {allowed[1]}, got {factor.dtype}")


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _run(op: str, device: torch.device, *inputs):
    """The implementation for the device, with autocast off: it would round W + s B A and G to low precision."""
    run = dispatch.implementation(op, device)
    if _autocast_is_on(device.type):
        with torch.autocast(device.type, enabled=False):
            return run(*inputs)
    return run(*inputs)


def _forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    number = 0 if seed is None else int(seed)
    layer = Layer(weight, mask, lora_A, lora_B, scaling)
    y = _run("masked_lora_forward", x.device, x, layer, bias, dropout_p, number)
    # Autograd forbids changing in place what a Function returns as a view; decoder blocks do change outputs in place.
    return torch.ops.aten._unsafe_view(y, y.shape)


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, lora_A, lora_B and bias that ``needs`` asks for, in this order."""
    number = 0 if seed is None else int(seed)
    layer = Layer(weight, mask, lora_A, lora_B, scaling)
    grads = _run("masked_lora_backward", grad_y.device, grad_y, x, layer, dropout_p, number, needs)
    return [grad for grad in grads if grad is not None]


def _save(ctx, inputs, output) -> None:
    x, weight, mask, lora_A, lora_B, ctx.scaling, bias, ctx.dropout_p, seed = inputs
    ctx.needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 6)]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs[1] or ctx.needs[2] else None, weight, mask, lora_A, lora_B, seed)


def _differentiate(ctx, grad_y: Tensor, backward) -> tuple[Tensor | None, ...]:
    x, weight, mask, lora_A, lora_B, seed = ctx.saved_tensors
    grads = iter(backward(grad_y, x, weight, mask, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, ctx.needs))
    dx, dA, dB, dbias = (next(grads) if needed else None for needed in ctx.needs)
    return dx, None, None, dA, dB, None, None if dbias is None else dbias.to(ctx.bias_dtype), None, None


class _MaskedLoRALinear(torch.autograd.Function):
    # Without setup_context, for which torch inspects the signature at every call: tens of microseconds.
    @staticmethod
    def forward(ctx, *inputs):
        y = _forward(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled():
            raise RuntimeError("masked_lora_linear has no second derivatives (create_graph=True)")
        return _differentiate(ctx, grad_y, _backward)


_forward_op = torch.library.custom_op("losa::masked_lora_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("losa::masked_lora_backward", _backward, mutates_args=())
_forward_op.register_autograd(lambda ctx, grad_y: _differentiate(ctx, grad_y, _backward_op), setup_context=_save)


@_forward_op.register_fake
def _(x, weight, mask, lora_A, lora_B, scaling, bias, dropout_p, seed):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_backward_op.register_fake
def _(grad_y, x, weight, mask, lora_A, lora_B, scaling, dropout_p, seed, needs):
    like = (
        grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1]),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
        grad_y.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype)),
    )
    return [grad for grad, needed in zip(like, needs, strict=True) if needed]
