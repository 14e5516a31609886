"""Masked-LoRA linear of groups of rows, each with a layer of its own: the experts of a mixture, in one call.

As many calls of ``masked_lora_linear`` as a block has experts cost more than their products where experts get few
tokens. On a CPU one operator shares fp32 products by masks with many zeros out over the threads; on a GPU of compute
capability 9 or 10 the vendor's grouped GEMM takes bf16. Other groups are computed one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from losa_kernels import arguments
from losa_kernels.grouped_masked_lora.groups import Groups
from losa_kernels.masked_lora.calls import check_input, check_layer, run


def grouped_masked_lora_linear(
    x: Tensor,
    ends: Tensor,
    weights: Sequence[Tensor] | Tensor,
    masks: Sequence[Tensor] | Tensor,
    lora_A: Sequence[Tensor] | Tensor,
    lora_B: Sequence[Tensor] | Tensor,
    scaling: float,
    biases: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """y = x (M_g * (W_g + s B_g A_g))^T + bias_g for the rows of each group g; differentiable in x, lora_A, lora_B and
    biases. Each group is a ``masked_lora_linear`` (there: formulas, precision, and what is not finite), and rows of one
    group touch nothing of another. Rows of no group are 0, and so are their gradients.

    On a GPU the host reads ``ends``, and waits for it, where groups are computed one after another (see the module),
    and where their W_eff take more than ``losa_kernels.grouped_masked_lora.groups.STACK_BYTES``. torch.compile breaks
    its graph here: how many rows a group has is not known before it runs.

    Args:
        x: (rows, in), rows in the order of their groups; bf16, fp16, fp32 or fp64. Under autocast it is cast to the
            autocast dtype.
        ends: int32 or int64 (groups,) on x's device, none less than the one before: where each group's rows end. The
            first group begins at row 0; a group may have no rows. Only a CPU checks the numbers.
        weights: (out, in) of every group: a sequence, or one tensor (groups, out, in), as the next arguments may be; of
            one shape and of x's dtype (under autocast any floating point); never differentiated.
        masks: packed uint8 (out, ceil(in/8)) of every group, 1 = kept.
        lora_A: (r, in) and lora_B: (out, r) of every group, 1 <= r <= 128, in fp32 or x's or the weights' dtype; r may
            differ from group to group.
        scaling: s.
        biases: (out,) of every group, or None.

    Returns:
        (rows, out) in x's dtype. Gradients of a group without rows are zeros.

    Raises:
        ValueError: a wrong shape, dtype, device, value or number of tensors; names the argument.
    """
    given = {"weights": weights, "masks": masks, "lora_A": lora_A, "lora_B": lora_B}
    if biases is not None:
        given["biases"] = biases
    named = {name: arguments.tensors(name, value) for name, value in given.items()}
    count = len(named["weights"])
    if count == 0:
        raise ValueError("weights: expected at least one group, got none")
    for name, tensors in named.items():
        if len(tensors) != count:
            raise ValueError(f"{name}: expected {count} tensors, one for each weight, got {len(tensors)}")
    # Groups are alike but for their ranks, and a check costs more than to see that it was made.
    checked = set()
    for group, (weight, mask, A, B, *bias) in enumerate(zip(*named.values(), strict=True)):
        alike = tuple((type(t), t.shape, t.dtype, t.device) for t in (weight, mask, A, B, *bias))
        if alike in checked:
            continue
        try:
            scaling = check_layer(weight, mask, A, B, scaling)
            like = named["weights"][0]
            if (weight.shape, weight.dtype, weight.device) != (like.shape, like.dtype, like.device):
                told = [f"{w.dtype} {tuple(w.shape)} on {w.device}" for w in (like, weight)]
                raise ValueError(f"weight: expected {told[0]} as weights[0], got {told[1]}")
            x = check_input(x, weight, A, B, bias[0] if bias else None)
        except ValueError as error:
            raise ValueError(_of_group(str(error), group)) from None
        checked.add(alike)
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, in), got {tuple(x.shape)}")
    _check_ends(ends, count, x)
    return _GroupedMaskedLoRALinear.apply(x, ends, scaling, count, *chain.from_iterable(named.values()))


def _of_group(error: str, group: int) -> str:
    """An error of one layer's argument, by the name that this function has for it."""
    name, _, rest = error.partition(": ")
    name = {"weight": "weights", "mask": "masks", "bias": "biases"}.get(name, name)
    return f"{name}: {rest}" if name in ("x", "scaling") else f"{name}[{group}]: {rest}"


def _check_ends(ends: Tensor, groups: int, x: Tensor) -> None:
    arguments.with_data("ends", arguments.tensor("ends", ends))
    if ends.dtype not in (torch.int32, torch.int64) or tuple(ends.shape) != (groups,):
        raise ValueError(f"ends: expected int32 or int64 ({groups},), got {ends.dtype} {tuple(ends.shape)}")
    if ends.device != x.device:
        raise ValueError(f"ends: expected on {x.device} as x, got {ends.device}")
    if ends.device.type == "cpu":
        places = [0, *ends.tolist(), len(x)]
        if any(end < start for start, end in zip(places, places[1:], strict=False)):
            raise ValueError(f"ends: expected numbers from 0 to {len(x)}, none less than the one before")


def _groups(scaling: float, count: int, tensors: Sequence[Tensor]) -> Groups:
    each = [tensors[start : start + count] for start in range(0, len(tensors), count)]
    return Groups(each[0], each[1], each[2], each[3], scaling, each[4] if len(each) > 4 else ())


class _GroupedMaskedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, scaling: float, count: int, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad
        kinds = [needed[4 + kind * count : 4 + (kind + 1) * count] for kind in range(len(tensors) // count)]
        ctx.needs = [needed[0], any(kinds[2]), any(kinds[3]), len(kinds) > 4 and any(kinds[4])]
        ctx.scaling, ctx.count = scaling, count
        ctx.save_for_backward(x if ctx.needs[1] or ctx.needs[2] else None, ends, *tensors)
        return run("grouped_masked_lora_forward", x.device, x, ends, _groups(scaling, count, tensors))

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("grouped_masked_lora_linear has no second derivatives (create_graph=True)")
        x, ends, *tensors = ctx.saved_tensors
        groups = _groups(ctx.scaling, ctx.count, tensors)
        dx, dA, dB, d_bias = run("grouped_masked_lora_backward", grad_y.device, grad_y, x, ends, groups, ctx.needs)
        none = [None] * ctx.count
        found = [*none, *none, *(dA or none), *(dB or none)]
        if groups.biases:
            found += none if d_bias is None else [d.to(b.dtype) for d, b in zip(d_bias, groups.biases, strict=True)]
        return dx, None, None, None, *found
