"""Masked-LoRA linear: y = x (M * (W + s B A))^T + bias, without keeping anything of size out x in.

Eager LoSA forms BA, the mask and their product in every forward, recompute and backward pass, next to a separate
product with W. This op needs three large products per step (Y, dX, G) and saves x and references only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments
from losa_kernels.masked_lora.calls import MAX_RANK as MAX_RANK
from losa_kernels.masked_lora.calls import check_adapter_dtype, check_input, check_layer, run
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.tensors import wide_dtype


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
    scaling = check_layer(weight, mask, lora_A, lora_B, scaling)
    x = check_input(x, weight, lora_A, lora_B, bias)
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
    scaling = check_layer(weight, mask, lora_A, lora_B, scaling)
    check_adapter_dtype(lora_A, lora_B, (torch.float32, weight.dtype), "the weight's")
    with torch.no_grad():
        return run("merge_masked_lora", weight.device, Layer(weight, mask, lora_A, lora_B, scaling))


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
    y = run("masked_lora_forward", x.device, x, layer, bias, dropout_p, number)
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
    grads = run("masked_lora_backward", grad_y.device, grad_y, x, layer, dropout_p, number, needs)
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
