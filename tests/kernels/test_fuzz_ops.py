"""Native code against the reference on random calls: both raise the same named error, or both give the same result."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace

import pytest
import torch

import losa_kernels as kernels
from losa_kernels import native, unpack_mask
from losa_kernels.tensors import as_bits
from tests.helpers.hostile import FLOATS, assert_near, hostile, normal, same_bits, size, spoilt, with_special
from tests.helpers.pruning_calls import PATTERNS, alps_prune, hessian, inverse_factor_, sparsegpt_prune, wanda_mask

CALLS = 2000
FEWER = {"alps_prune": 100}  # each call iterates, and wanda_mask is its only native code
NAMED = re.compile(r"^[A-Za-z_]+(, [a-z_]+)*: .")

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


# Calls: (function of no arguments, comparison of its results by the reference and by native code). Made from a seed,
# once for each of the two, so that neither sees what the other has written to.


def pack_mask(r):
    a = spoilt(r, {"mask": normal(r, size(r), size(r)) > 0})
    return lambda: kernels.pack_mask(**a), same_bits


def unpack_mask_(r):
    rows, columns = size(r), size(r)
    packed = torch.randint(256, (rows, -(-columns // 8)), dtype=torch.uint8)
    a = spoilt(r, {"packed": packed, "in_features": columns})
    return lambda: kernels.unpack_mask(**a), same_bits


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
        W = _double(a["weight"])
        bound = W.abs() + abs(float(a["scaling"])) * _double(a["lora_B"]).abs() @ _double(a["lora_A"]).abs()
        kept = _kept(a)
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
    kept, s = _kept(a), abs(float(a["scaling"]))
    x, W, A, B = (_double(a[name]) for name in ("x", "weight", "lora_A", "lora_B"))
    x = x.reshape(-1, x.shape[-1])
    bias = None if a["bias"] is None else _double(a["bias"])
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
    dy = _double(expected["dy"]).reshape(-1, W.shape[0])
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


def gram(r):
    layers = () if r.random() < 0.5 else (r.choice((0, 1, 3)),)
    samples, dtype = r.choice((2, 3, 5, 16, 17, 33)), r.choice(FLOATS)
    features = normal(r, *layers, samples, size(r), dtype=dtype)
    if r.random() < 0.2:
        features = features + 100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = {"features": features, "out": torch.randn(*layers, samples, samples, dtype=wide) if r.random() < 0.3 else None}
    a = spoilt(r, a, 0.5)

    def compare(expected, found):
        F = _double(a["features"])
        F = (F - F[..., :1, :]).abs() if F.numel() else F
        bound = (F @ F.mT).amax((-2, -1), True) if F.numel() else torch.zeros(expected.shape)
        bound = bound + (0 if a["out"] is None else _double(a["out"]).abs())
        assert_near(expected, found, bound.expand(expected.shape), 4, F.shape[-1])

    return lambda: kernels.gram(**a), compare


def cka_similarity(r):
    count, samples = r.choice((0, 1, 2, 4)), r.choice((1, 2, 3, 9))
    features = torch.randn(count, samples, r.choice((1, 5, 20)))
    grams = (features @ features.mT).to(r.choice(FLOATS))
    a = spoilt(r, {"grams": grams}, 0.5)
    return lambda: kernels.cka_similarity(**a), same_bits


def weight_and_mask(r, columns, kept):
    weight = normal(r, *kept.shape, dtype=r.choice((*FLOATS, torch.float8_e5m2)))
    return {"weight": weight, "mask": kernels.pack_mask(kept)}


def kept_nm(rows, columns, keep_n, m):
    scores = torch.rand(rows, columns // m, m)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(2, scores.topk(keep_n, 2).indices, True).view(rows, columns)


def a_format(r):
    """(function that packs, its arguments)."""
    kind = r.random()
    if kind < 0.45:
        rows, columns = size(r), r.choice((0, 1, 8, 13, 64, 65, 72, 130))
        return kernels.pack_bitmask, weight_and_mask(r, columns, torch.rand(rows, columns) < r.choice((0, 0.3, 0.7, 1)))
    if kind < 0.9:
        (keep_n, m), rows = r.choice(PATTERNS), size(r)
        kept = kept_nm(rows, m * r.choice((0, 1, 2, 7, 12)), keep_n, m) & (torch.rand(rows, 1) < 0.8)
        return kernels.pack_nm, weight_and_mask(r, kept.shape[1], kept) | {"keep_n": keep_n, "m": m}
    shape = (32 * r.choice((0, 1, 2)), 64 * r.choice((0, 1, 2)))
    a = weight_and_mask(r, shape[1], kept_nm(*shape, 2, 4))
    return kernels.pack_24, a | {"weight": a["weight"].to(r.choice((torch.float16, torch.bfloat16)))}


def pack(r):
    function, a = a_format(r)
    a = spoilt(r, a)

    def run():
        packed = function(**a)
        packed.check()
        return [*packed.tensors().values(), packed.unpack(), packed.mask()]

    return run, same_bits


def packed_weight(r):
    """(a packed weight or the error of making it, whether it is as it was packed)."""
    function, a = a_format(r)
    if a["weight"].element_size() == 1 and r.random() < 0.9:
        a["weight"] = a["weight"].float()
    packed = function(**a)
    if r.random() < 0.5:
        return packed, True
    field = r.choice(list(vars(packed)))
    value = getattr(packed, field)
    wrong = tuple(hostile(r, n) if r.random() < 0.5 else n for n in value) if field == "shape" else hostile(r, value)
    return replace(packed, **{field: wrong}), False


def unpack(r):
    def run():
        packed, _ = packed_weight(r)
        packed.check()
        return [packed.unpack(), packed.mask()]

    return run, same_bits


def sparse_linear(r):
    state = {}

    def run():
        packed, _ = packed_weight(r)
        packed.check()
        lead = r.choice(((), (1,), (2,), (5,), (16,), (20,), (2, 2), (0,), (3, 17)))
        x = normal(r, *lead, packed.shape[1], dtype=r.choice(FLOATS))
        bias = None if r.random() < 0.5 else normal(r, packed.shape[0], dtype=r.choice(FLOATS))
        state.update(packed=packed, **spoilt(r, {"x": x, "bias": bias}, 0.4))
        return kernels.sparse_linear(state["x"], packed, state["bias"])

    def compare(expected, found):
        packed, x = state["packed"], _double(state["x"])
        assert expected.shape == found.shape and expected.dtype == found.dtype
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(expected.numel() // max(1, packed.shape[0]), 0)
        bias = torch.zeros(packed.shape[0]) if state["bias"] is None else state["bias"]
        W, bias = _double(packed.unpack().to(found.dtype)), _double(bias.to(found.dtype))
        k = unpack_mask(packed.mask(), packed.shape[1]).double()
        bad_x, bad = (~x.isfinite()).double(), (k * ~W.isfinite()).sum(1) + ~bias.isfinite()
        x, W, bias = (t.abs().nan_to_num(0, 0, 0) for t in (x, W, bias))
        must = bad_x @ k.T + bad
        may = must + bad_x.sum(1, True)
        bound, must, may = (t.view(expected.shape) for t in (x @ W.T + bias, must, may))
        assert_near(expected, found, bound, 8, len(W.T), must > 0, may > 0)

    return run, compare


def _double(t):
    return t.detach().double()


def _kept(a):
    W = a["weight"]
    return W != 0 if a["mask"] is None else unpack_mask(a["mask"], W.shape[1])


CASES = {
    "pack_mask": pack_mask,
    "unpack_mask": unpack_mask_,
    "masked_lora_linear": masked_lora_linear,
    "merge_masked_lora": merge_masked_lora,
    "gram": gram,
    "cka_similarity": cka_similarity,
    "hessian": hessian,
    "inverse_factor": inverse_factor_,
    "sparsegpt_prune": sparsegpt_prune,
    "alps_prune": alps_prune,
    "wanda_mask": wanda_mask,
    "pack": pack,
    "unpack": unpack,
    "sparse_linear": sparse_linear,
}


def outcome(case, seed, backend):
    os.environ["LOSA_BACKEND"] = backend
    r = random.Random(seed)
    torch.default_generator.manual_seed(seed)
    call, compare = case(r)
    torch.default_generator.manual_seed(seed)
    try:
        return None, call(), compare
    except ValueError as error:
        assert NAMED.match(str(error)), error
        return type(error), str(error), compare


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_native_code_does_what_the_reference_does(name, monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", "reference")  # so that it is what it was in the end
    monkeypatch.setenv("LOSA_CPU_ISA", "")
    raised, calls = 0, FEWER.get(name, CALLS)
    for seed in range(calls):
        os.environ["LOSA_CPU_ISA"] = random.Random(-seed).choice(("scalar", "avx2", "avx512"))
        try:
            error, expected, _ = outcome(CASES[name], seed, "reference")
            found_error, found, compare = outcome(CASES[name], seed, "cpu")
            assert error == found_error, (expected, found)
            if error is None:
                compare(expected, found)
        except Exception as problem:
            raise AssertionError(f"{name}, seed {seed}, {os.environ['LOSA_CPU_ISA']}") from problem
        raised += error is not None
    print(f"{name}: {raised} of {calls} calls raised")
    assert 0.1 * calls < raised < 0.6 * calls
