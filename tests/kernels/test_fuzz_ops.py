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
from tests.helpers.fuzzed_lora import as_double, grouped_masked_lora_linear, masked_lora_linear, merge_masked_lora
from tests.helpers.hostile import FLOATS, assert_near, hostile, normal, same_bits, size, spoilt
from tests.helpers.pruning_calls import PATTERNS, alps_prune, hessian, inverse_factor_, sparsegpt_prune, wanda_mask

CALLS = 2000
FEWER = {"alps_prune": 100}  # each call iterates, and wanda_mask is its only native code
NAMED = re.compile(r"^[A-Za-z_]+(\[\d+\])?(, [a-z_]+)*: .")

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
        F = as_double(a["features"])
        F = (F - F[..., :1, :]).abs() if F.numel() else F
        bound = (F @ F.mT).amax((-2, -1), True) if F.numel() else torch.zeros(expected.shape)
        bound = bound + (0 if a["out"] is None else as_double(a["out"]).abs())
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
        packed, x = state["packed"], as_double(state["x"])
        assert expected.shape == found.shape and expected.dtype == found.dtype
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(expected.numel() // max(1, packed.shape[0]), 0)
        bias = torch.zeros(packed.shape[0]) if state["bias"] is None else state["bias"]
        W, bias = as_double(packed.unpack().to(found.dtype)), as_double(bias.to(found.dtype))
        k = unpack_mask(packed.mask(), packed.shape[1]).double()
        bad_x, bad = (~x.isfinite()).double(), (k * ~W.isfinite()).sum(1) + ~bias.isfinite()
        x, W, bias = (t.abs().nan_to_num(0, 0, 0) for t in (x, W, bias))
        must = bad_x @ k.T + bad
        may = must + bad_x.sum(1, True)
        bound, must, may = (t.view(expected.shape) for t in (x @ W.T + bias, must, may))
        assert_near(expected, found, bound, 8, len(W.T), must > 0, may > 0)

    return run, compare


def dense_linear(r):
    rows, columns, dtype = size(r), size(r), r.choice(FLOATS)
    lead = r.choice(((), (1,), (2,), (5,), (12,), (20,), (2, 2), (0,), (3, 17)))
    a = {"x": normal(r, *lead, columns, dtype=dtype), "weight": normal(r, rows, columns, dtype=dtype)}
    a = spoilt(r, a | {"bias": None if r.random() < 0.5 else normal(r, rows, dtype=dtype)}, 0.5)

    def compare(expected, found):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        x, W = as_double(a["x"]), as_double(a["weight"])
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(expected.numel() // max(1, len(W)), 0)
        bias = torch.zeros(len(W)) if a["bias"] is None else as_double(a["bias"])
        bad = (~x.isfinite()).any(1, True) | ~W.isfinite().all(1) | ~bias.isfinite()
        x, W, bias = (t.abs().nan_to_num(0, 0, 0) for t in (x, W, bias))
        bound, bad = (t.view(expected.shape) for t in (x @ W.T + bias, bad))
        # Of odd columns torch's bf16 products multiply the next row's first number by zero.
        assert_near(expected, found, bound, 8, W.shape[1], bad, torch.full_like(bad, bool(bad.any())))

    return lambda: kernels.dense_linear(**a), compare


CASES = {
    "pack_mask": pack_mask,
    "unpack_mask": unpack_mask_,
    "masked_lora_linear": masked_lora_linear,
    "grouped_masked_lora_linear": grouped_masked_lora_linear,
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
    "dense_linear": dense_linear,
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
