"""Random calls of the masked-LoRA functions, for test_fuzz_ops.py: from a generator's state, a function of no arguments
and a comparison of its results by the reference and by native code."""

from __future__ import annotations

import random

import torch

import losa_kernels as kernels
from losa_kernels import unpack_mask
from losa_kernels.tensors import as_bits
from tests.helpers.hostile import FLOATS, assert_near, normal, size, spoilt, with_special


def layer(r, most=33):
    """weight, mask, lora_A, lora_B, scaling of a masked-LoRA linear."""
    rows, columns, rank = r.choice((1, 3, 8, 17, most)), r.choice((1, 5, 8, 24, 31, most)), r.choice((1, 2, 5, 16))
    dtype = r.choice(FLOATS)
    adapter = torch.float64 if dtype == torch.float64 else r.choice((torch.float32, dtype))
    mask = kernels.pack_mask(torch.rand(rows, columns) < r.choice((0, 0.3, 0.5, 1)))
    return {
        "weight": normal(r, rows, columns, dtype=dtype),
        "mask": None if r.random() < 0.2 else mask,
        "lora_A": normal(r, rank, columns, dtype=adapter),
        "lora_B": normal(r, rows, rank, dtype=adapter),
        "scaling": r.choice((2.0, 0.5, 1, -1.5)),
    }


def merge_masked_lora(r):
    a = spoilt(r, layer(r))

    def compare(expected, found):
        W = as_double(a["weight"])
        bound = W.abs() + abs(float(a["scaling"])) * as_double(a["lora_B"]).abs() @ as_double(a["lora_A"]).abs()
        kept = kept_places(a)
        assert torch.equal(as_bits(expected).masked_fill(kept, 0), as_bits(found).masked_fill(kept, 0))
        assert_near(
            expected, found, bound.nan_to_num(0, 0), 4, len(a["lora_A"]), kept & ~torch.isfinite(expected), ~kept
        )

    return lambda: kernels.merge_masked_lora(**a), compare


def masked_lora_linear(r):
    a = layer(r)
    columns = a["weight"].shape[1]
    lead = r.choice(((), (size(r),), (1,), (2, 3), (70,), (0, 4)))
    a["x"] = normal(r, *lead, columns, dtype=a["weight"].dtype)
    a["bias"] = normal(r, a["weight"].shape[0], dtype=r.choice((torch.float32, a["weight"].dtype)))
    a["bias"] = None if r.random() < 0.4 else a["bias"]
    a["dropout_p"] = r.choice((0.0, 0.0, 0.25))
    a = spoilt(r, a)
    wanted = [name for name in ("x", "lora_A", "lora_B", "bias") if r.random() < 0.8]
    grad_special = r.random() < 0.1

    def run():
        leaves = dict(a)
        for name in wanted:
            if isinstance(a[name], torch.Tensor) and a[name].is_floating_point():
                leaves[name] = a[name].detach().requires_grad_()
        y = kernels.masked_lora_linear(**leaves)
        results = {"y": y.detach()}
        if y.requires_grad:
            dy = torch.randn(y.shape).to(y.dtype)
            dy = with_special(random.Random(0), dy) if grad_special and not y.is_meta else dy.to(y.device)
            y.backward(dy)
            results |= {n: leaves[n].grad for n in wanted if getattr(leaves[n], "requires_grad", False)} | {"dy": dy}
        return results

    return run, lambda expected, found: compare_linear(a, expected, found)


def grouped_masked_lora_linear(r):
    first, sizes = layer(r), [r.choice((0, 1, 3, 70)) for _ in range(r.choice((1, 2, 4)))]
    rows, columns = first["weight"].shape

    def like(name):
        return [normal(r, *first[name].shape, dtype=first[name].dtype) for _ in sizes]

    a = {
        "x": normal(r, sum(sizes) + r.choice((0, 2)), columns, dtype=first["weight"].dtype),
        "ends": torch.tensor(sizes).cumsum(0).to(r.choice((torch.int32, torch.int64))),
        "weights": like("weight"),
        "masks": [kernels.pack_mask(torch.rand(rows, columns) < r.choice((0, 0.3, 0.5, 1))) for _ in sizes],
        "lora_A": like("lora_A"),
        "lora_B": like("lora_B"),
        "scaling": first["scaling"],
        "biases": None if r.random() < 0.5 else [normal(r, rows) for _ in sizes],
    }
    a = spoilt(r, a)
    wanted = [name for name in ("x", "lora_A", "lora_B", "biases") if r.random() < 0.8 and a[name] is not None]

    def run():
        leaves = dict(a)
        for name in wanted:
            if isinstance(a[name], list):
                leaves[name] = [_leaf(t) for t in a[name]]
            else:
                leaves[name] = _leaf(a[name])
        y = kernels.grouped_masked_lora_linear(**leaves)
        results = {"y": y.detach()}
        if y.requires_grad:
            dy = torch.randn(y.shape).to(y.dtype).to(y.device)
            y.backward(dy)
            results["dy"] = dy
            grads = {
                name: leaves[name] if isinstance(leaves[name], list | tuple) else [leaves[name]] for name in wanted
            }
            results |= {name: [getattr(t, "grad", None) for t in each] for name, each in grads.items()}
        return results

    def compare(expected, found):
        assert expected.keys() == found.keys()
        if expected["y"].is_meta:
            return
        groups, start = len(a["weights"]), 0
        for group in range(groups):
            end = int(a["ends"][group])
            if end == start:
                grads = [found[name][group] for name in ("lora_A", "lora_B", "biases") if name in found]
                assert not any(grad is not None and grad.any() for grad in grads), "of a group without rows"
                continue
            part = {name: a[plural][group] for name, plural in SINGULAR.items() if a[plural] is not None}
            part = {"bias": None} | part | {"x": a["x"][start:end], "scaling": a["scaling"], "dropout_p": 0.0}
            compare_linear(part, *(_of_group(results, group, start, end) for results in (expected, found)))
            start = end
        assert not found["y"][start:].any()

    return run, compare


SINGULAR = {"weight": "weights", "mask": "masks", "lora_A": "lora_A", "lora_B": "lora_B", "bias": "biases"}


def _leaf(value):
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided
    return value.detach().requires_grad_() if floats else value


def _of_group(results, group, start, end):
    """Of one group, as ``compare_linear`` takes them."""
    own = {name: results[name][start:end] for name in ("y", "dy") if name in results}
    for name in ("lora_A", "lora_B", "biases"):
        if results.get(name, [None])[0] is not None:
            own["bias" if name == "biases" else name] = results[name][group]
    if results.get("x", [None])[0] is not None:
        own["x"] = results["x"][0][start:end]
    return own


def rows_reached(bad):
    """Rows that hold a bad value, and rows before them: bf16 products of torch on CPUs with AMX read 64 values at a
    time, and multiply by zero what is beyond a row's end."""
    rows = bad.sum(1, True)
    reach = -(-64 // max(1, bad.shape[1])) if bad.shape[1] % 64 else 0
    shifted = [torch.nn.functional.pad(rows[d:], (0, 0, 0, min(d, len(rows)))) for d in range(reach + 1)]
    return torch.stack(shifted).sum(0)


def compare_linear(a, expected, found):
    """What is promised of values that are not finite: where a kept weight connects them, results are not finite."""
    assert expected.keys() == found.keys() and all(found[n].shape == v.shape for n, v in expected.items())
    assert all(found[n].dtype == v.dtype for n, v in expected.items())
    if expected["y"].is_meta:
        return
    kept, s = kept_places(a), abs(float(a["scaling"]))
    x, W, A, B = (as_double(a[name]) for name in ("x", "weight", "lora_A", "lora_B"))
    x = x.reshape(-1, x.shape[-1])
    bias = None if a["bias"] is None else as_double(a["bias"])
    k = kept.double()
    nf = {name: (~t.isfinite()).double() for name, t in (("x", x), ("W", W), ("A", A), ("B", B))}
    x, W, A, B = (t.abs().nan_to_num(0, 0, 0) for t in (x, W, A, B))
    p = float(a["dropout_p"])
    x, effective = x / (1 - p), k * (W + s * B @ A)
    bad = k * (nf["W"] + nf["B"].amax(1, True) + nf["A"].amax(0, True))
    terms = x.shape[1] + A.shape[0]
    bound = x @ effective.T + (0 if bias is None else bias.abs().nan_to_num(0, 0, 0))
    must = nf["x"] @ k.T + bad.sum(1) + (0 if bias is None else (~bias.isfinite()).double())
    may = must + rows_reached(nf["x"])
    shape = expected["y"].shape
    assert_near(expected["y"], found["y"], bound.view(shape), 8, terms, must.view(shape) > 0, may.view(shape) > 0)
    if "dy" not in expected:
        return
    dy = as_double(expected["dy"]).reshape(-1, W.shape[0])
    bad_dy, dy = (~dy.isfinite()).double(), dy.abs().nan_to_num(0, 0, 0)
    bad_G, G = k * (bad_dy.amax(0) if len(dy) else bad_dy.sum(0))[:, None], k * (dy.T @ x)
    bad_G = bad_G + k * (nf["x"].amax(0) if len(dy) else nf["x"].sum(0))
    terms = len(dy) + W.shape[0] + W.shape[1]
    grads = {
        "x": (dy @ effective / (1 - p), bad_dy @ k + bad.sum(0), rows_reached(bad_dy)),
        "lora_A": (s * B.T @ G, bad_G.sum(0) + nf["B"].T @ k, nf["B"].sum(0)[:, None]),
        "lora_B": (s * G @ A.T, bad_G.sum(1, True) + k @ nf["A"].T, nf["A"].sum(1)),
        "bias": (dy.sum(0), bad_dy.sum(0), torch.zeros(())),
    }
    for name, (bound, must, poison) in grads.items():
        if name in expected:
            shape = expected[name].shape
            must, may = (torch.broadcast_to(t, bound.shape).reshape(shape) > 0 for t in (must, must + poison))
            # Rounded to x's dtype may be G, and what dy is multiplied with.
            assert_near(expected[name], found[name], bound.reshape(shape), 16, terms, must, may, a["x"].dtype)


def as_double(t):
    return t.detach().double()


def kept_places(a):
    W = a["weight"]
    return W != 0 if a["mask"] is None else unpack_mask(a["mask"], W.shape[1])
