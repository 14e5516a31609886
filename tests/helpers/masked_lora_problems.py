"""Problems, formulas and the error model that the tests of masked_lora share."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from losa_kernels import masked_lora_linear, merge_masked_lora, pack_mask, unpack_mask

SHAPES = [(17, 33, 1), (33, 17, 3), (64, 40, 8), (130, 129, 128)]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def problem(out_features=24, in_features=20, rank=4, tokens=7, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(tokens, in_features).to(dtype),
        "weight": normal(out_features, in_features).to(dtype),
        "mask": pack_mask(torch.rand(out_features, in_features, generator=g) > 0.6),
        "lora_A": (normal(rank, in_features) / in_features**0.5).to(adapter),
        "lora_B": (normal(out_features, rank) / rank**0.5).to(adapter),
        "scaling": 2.0,
        "bias": normal(out_features).to(dtype) if bias else None,
    }


def leaves(args, names=("x", "lora_A", "lora_B", "bias")):
    return {k: args[k].detach().clone().requires_grad_() for k in names if args[k] is not None}


def formula(x, weight, mask, lora_A, lora_B, scaling, bias=None):
    """What the paper writes, in the arguments' own dtype."""
    kept = weight != 0 if mask is None else unpack_mask(mask, weight.shape[1])
    effective = (weight + scaling * (lora_B @ lora_A).to(weight.dtype)) * kept
    return F.linear(x, effective, bias)


def run(function, args, grad_y):
    inputs = leaves(args)
    y = function(**(args | inputs))
    y.backward(grad_y.to(y.dtype))
    return {"y": y.detach(), **{k: v.grad for k, v in inputs.items()}}


def tensors(args, change):
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def double(args):
    return tensors(args, lambda t: t.double() if t.is_floating_point() else t)


def assert_error_model(ours, plain, truth, dtype):
    """At most twice plain torch's error in the same precision, plus one rounding of the largest value. Names may go on
    with the number of a group; a group without rows has an empty result."""
    for name, value in truth.items():
        assert ours[name].dtype == (dtype if name.partition(".")[0] in ("y", "x", "bias") else torch.float32), name
        assert ours[name].shape == value.shape, name
        if not value.numel():
            continue
        error = (ours[name].double() - value).abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert error <= allowed, (name, error, allowed)


def close(ours, expected):
    """Equal but for the order of summation: 64 roundings of the largest value."""
    return (ours - expected).abs().max() <= 64 * torch.finfo(ours.dtype).eps * expected.abs().max()


def merge(args):
    return merge_masked_lora(*(args[k] for k in ("weight", "mask", "lora_A", "lora_B", "scaling")))


def dropout_formula(x, weight, mask, lora_A, lora_B, scaling, bias, keep):
    kept = unpack_mask(mask, weight.shape[1])
    return F.linear(x, weight * kept, bias) + F.linear(x * keep, scaling * (lora_B @ lora_A) * kept)


def implicit(args):
    """The same matrix with the mask in the zeros of W."""
    kept = unpack_mask(args["mask"], args["weight"].shape[1])
    return args | {"weight": args["weight"] * kept, "mask": None}


def check(args, grad_y, dtype, factor_error=2**-13):
    """Outputs and gradients by the error model; those of the factors are nearly fp32's, whatever x's dtype."""
    truth = run(formula, double(args), grad_y.double())
    ours = run(masked_lora_linear, args, grad_y)
    assert_error_model(ours, run(formula, args, grad_y), truth, dtype)
    for name in ("lora_A", "lora_B"):
        error = (ours[name].double() - truth[name]).abs().max()
        assert error <= factor_error * truth[name].abs().max(), (name, error)
    return ours
