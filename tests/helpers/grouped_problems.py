"""Problems of the grouped masked-LoRA linear, and its formula group by group."""

from __future__ import annotations

import torch

from losa_kernels import grouped_masked_lora_linear
from tests.helpers.masked_lora_problems import double, formula, problem

LISTS = ("weight", "mask", "lora_A", "lora_B", "bias")


def grouped_problem(
    sizes, out_features=24, in_features=20, ranks=None, dtype=torch.float32, bias=True, extra=2, seed=0
):
    """A problem of ``masked_lora_problems`` for each group, and x of all groups with some rows of none."""
    ranks = ranks or [3] * len(sizes)
    own = [
        problem(out_features, in_features, rank, size, dtype, bias, seed=seed + i)
        for i, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    ]
    none = torch.randn(extra, in_features).to(dtype)
    return {
        "x": torch.cat([each["x"] for each in own] + [none]),
        "ends": torch.tensor(sizes).cumsum(0),
        "scaling": own[0]["scaling"],
        **{name: None if own[0][name] is None else [each[name] for each in own] for name in LISTS},
    }


def by_formula(args):
    """y of ``args``, each group by the formula; 0 in rows of no group."""
    outputs, start = [], 0
    for group, end in enumerate(args["ends"].tolist()):
        layer = {name: None if args[name] is None else args[name][group] for name in LISTS}
        outputs.append(formula(args["x"][start:end], scaling=args["scaling"], **layer))
        start = end
    none = args["x"].new_zeros(len(args["x"]) - start, args["weight"][0].shape[0])
    return torch.cat([*outputs, none.to(args["weight"][0].dtype)])


def by_op(args):
    names = {"weight": "weights", "mask": "masks", "bias": "biases"}
    return grouped_masked_lora_linear(**{names.get(name, name): value for name, value in args.items()})


def run_grouped(function, args, grad_y):
    """y and all gradients, by name and group."""
    inputs = {"x": args["x"].detach().requires_grad_()}
    for name in ("lora_A", "lora_B", "bias"):
        if args[name] is not None:
            inputs[name] = [each.detach().clone().requires_grad_() for each in args[name]]
    y = function(args | inputs)
    y.backward(grad_y.to(y.dtype))
    found = {"y": y.detach(), "x": inputs.pop("x").grad}
    for name, each in inputs.items():
        for group, leaf in enumerate(each):
            found[f"{name}.{group}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def doubled(args):
    lists = {name: args[name] and [double({"t": each})["t"] for each in args[name]] for name in LISTS}
    return double(args) | lists


def moved(args, device):
    lists = {name: args[name] and [each.to(device) for each in args[name]] for name in LISTS}
    return args | lists | {name: args[name].to(device) for name in ("x", "ends")}
