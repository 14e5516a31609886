"""Native operators called past their Python functions: whatever they are given, they read and write nothing else."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import random
import sys

import pytest
import torch

from losa_kernels import dispatch, native, pack_bitmask, pack_mask, pack_nm
from losa_kernels.bitmask import packed_width
from tests.helpers.hostile import size, spoilt

for implementations in dispatch.TABLE.values():  # they register what operators do on meta
    if "cpu" in implementations:
        importlib.import_module(implementations["cpu"].partition(":")[0])

CALLS = 2000
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu"))),
    pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect"),
]


class Fences:
    """Memory whose end is followed, and whose begin is preceded, by a page that must not be touched."""

    SIZE = 1 << 16

    def __init__(self, count=64):
        self.areas, self.next = [], 0
        page, protect = mmap.PAGESIZE, ctypes.CDLL(None).mprotect
        for _ in range(count):
            area = mmap.mmap(-1, self.SIZE + 2 * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(area))
            for fence in (start, start + page + self.SIZE):
                assert protect(ctypes.c_void_p(fence), page, 0) == 0
            self.areas.append((area, page))

    def place(self, tensor):
        """The same tensor, strides too, at the end of such memory; or as it is, where it cannot lie there."""
        if isinstance(tensor, list):
            return [self.place(each) for each in tensor]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return tensor
        items = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        width = items * tensor.element_size()
        if tensor.numel() == 0 or width > self.SIZE:
            return tensor
        area, page = self.areas[self.next % len(self.areas)]
        self.next += 1
        flat = torch.frombuffer(area, dtype=torch.uint8, count=width, offset=page + self.SIZE - width)
        flat.copy_(tensor.detach().as_strided((items,), (1,)).view(torch.uint8))
        return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def mask_of(rows, columns):
    return torch.randint(256, (rows, packed_width(columns)), dtype=torch.uint8)


def floats(r, *shape, dtype=None):
    return torch.randn(shape).to(dtype or r.choice(FLOATS))


def layer(r):
    rows, columns, rank = size(r), size(r), r.choice((0, 1, 3, 16, 128))
    mask = mask_of(rows, columns)
    return rows, columns, torch.randn(rows, columns), mask, torch.randn(rank, columns), torch.randn(rows, rank)


def compose(r):
    rows, columns, weight, mask, A, B = layer(r)
    weight = weight.to(r.choice(FLOATS))
    mask = None if r.random() < 0.2 else mask
    return {"weight": weight, "mask": mask, "base": True, "A": A, "B": B, "out": floats(r, rows, columns)}


def project(r):
    rows, columns, weight, mask, A, B = layer(r)
    gradients = {"dA": torch.zeros_like(A), "dB": torch.zeros_like(B)}
    return {"gradient": floats(r, rows, columns), "weight": weight, "mask": mask, "A": A, "B": B} | gradients


def groups(r):
    """The layers of a few groups, and where the rows of each end."""
    rows, columns, count = size(r), size(r), r.choice((1, 1, 2, 4))
    ranks = [r.choice((0, 1, 3, 16, 128)) for _ in range(count)]
    tokens = sorted(size(r) for _ in range(count))
    layers = {
        "weights": [torch.randn(rows, columns) for _ in ranks],
        "masks": [mask_of(rows, columns) for _ in ranks],
        "A": [torch.randn(rank, columns) for rank in ranks],
        "B": [torch.randn(rows, rank) for rank in ranks],
    }
    return rows, columns, tokens, layers


def multiply(r):
    rows, columns, ends, layers = groups(r)
    x, biases = torch.randn(ends[-1], columns), [torch.randn(rows) for _ in ends] if r.random() < 0.5 else []
    return {"x": x, "ends": ends} | layers | {"biases": biases, "out": torch.zeros(ends[-1], rows)}


def differentiate(r):
    rows, columns, ends, layers = groups(r)
    a = {"dy": torch.randn(ends[-1], rows), "x": torch.randn(ends[-1], columns), "ends": ends} | layers
    a |= {"dx": None if r.random() < 0.3 else torch.zeros(ends[-1], columns)}
    for name, factors in (("dA", layers["A"]), ("dB", layers["B"])):
        a[name] = [] if r.random() < 0.2 else [torch.zeros_like(factor) for factor in factors]
    return a


def pack(r):
    rows, columns = size(r), size(r)
    return {"weight": floats(r, rows, columns), "mask": mask_of(rows, columns)}


def packing_nm(r):
    m = r.choice((1, 2, 4, 8, 16))
    rows, columns = size(r), m * r.choice((0, 1, 2, 5, 9))
    kept = (torch.arange(columns) % m < m // 2).expand(rows, columns)
    return {"weight": floats(r, rows, columns), "mask": pack_mask(kept), "keep_n": max(1, m // 2), "m": m}


def largest_group(r):
    a = packing_nm(r)
    return {"mask": a["mask"], "in_features": a["weight"].shape[1], "m": a["m"]}


def unpack(r):
    packed = pack_bitmask(**pack(r))
    dense = torch.zeros(packed.shape, dtype=packed.dtype)
    return {"dense": dense, "values": packed.values, "bitmask": packed.bitmask, "row_offsets": packed.row_offsets}


def sparse_linear(r):
    a = unpack(r)
    rows, columns = a.pop("dense").shape
    bias = None if r.random() < 0.5 else floats(r, rows)
    return {"x": floats(r, *r.choice(((), (1,), (3,), (2, 2), (8,), (16,), (0,))), columns)} | a | {"bias": bias}


def sparse_linear_nm(r):
    a = packing_nm(r) | {"m": r.choice((4, 8))}
    columns = 8 * r.choice((1, 2, 8, 9, 33))
    kept = (torch.arange(columns) % a["m"] < a["m"] // 2).expand(size(r), columns)
    packed = pack_nm(floats(r, *kept.shape), pack_mask(kept), a["m"] // 2, a["m"])
    x = floats(r, r.choice((1, 2, 5, 16)), columns)
    return {"x": x, "values": packed.values, "bitmask": packed.bitmask, "per_byte": 4, "bias": None}


def dense_linear(r):
    rows, columns = size(r), size(r)
    bias = None if r.random() < 0.5 else floats(r, rows)
    x = floats(r, *r.choice(((), (1,), (3,), (2, 2), (16,), (0,))), columns)
    return {"x": x, "weight": floats(r, rows, columns), "bias": bias}


def add_rms_norm(r):
    rows, columns, dtype = size(r), size(r), r.choice(FLOATS)
    update = None if r.random() < 0.3 else floats(r, rows, columns, dtype=dtype)
    x, weight = floats(r, rows, columns, dtype=dtype), floats(r, columns, dtype=dtype)
    return {"x": x, "update": update, "weight": weight, "eps": 1e-5}


def a_cache(r):
    keys, places, columns, dtype = (
        r.choice((1, 2, 3)),
        r.choice((1, 5, 70)),
        2 * r.choice((1, 3, 8, 20, 33)),
        r.choice(FLOATS),
    )
    return keys, places, columns, dtype, floats(r, 2, keys, places, columns, dtype=dtype)


def rotate_and_store(r):
    keys, places, columns, dtype, cache = a_cache(r)
    heads = floats(r, r.choice((1, 3, 4)) + 2 * keys, columns, dtype=dtype)
    cos, sin = (floats(r, places, columns, dtype=dtype) for _ in range(2))
    position = torch.tensor([r.choice((0, places - 1, places, -1, 2**40))])
    norms = [None if r.random() < 0.5 else floats(r, columns, dtype=dtype) for _ in range(2)]
    a = {"heads": heads, "cos": cos, "sin": sin, "position": position, "cache": cache}
    return a | {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-5}


def attend_cache(r):
    keys, places, columns, dtype, cache = a_cache(r)
    q = floats(r, keys * r.choice((1, 2, 3, 5)), columns, dtype=dtype)
    position = torch.tensor([r.choice((0, places - 1, places // 2))])
    a = {"q": q, "cache": cache, "position": position, "places": places, "scaling": 0.3}
    return a | {"finished": torch.zeros(len(q), dtype=torch.int32)}


def wanda_select(r):
    a, m = pack(r), 0
    columns = a["weight"].shape[1]
    if r.random() < 0.5:
        m = r.choice([n for n in (1, 2, 4, 5, 8, 16) if columns % n == 0])
    count = r.randint(0, m or columns)
    mask = None if r.random() < 0.5 else a["mask"]
    return {"weight": a["weight"], "norms": torch.rand(columns), "count": count, "m": m, "mask": mask, "faults": None}


def pruned_per_block(r):
    columns = size(r)
    return {"mask": mask_of(size(r), columns), "in_features": columns, "block_size": r.choice((1, 3, 8, 128))}


def block(r):
    rows, columns = size(r), max(1, size(r))
    start = r.randrange(columns)
    mask = None if r.random() < 0.5 else mask_of(rows, columns)
    a = {"weight": torch.randn(rows, columns), "factor": torch.rand(columns, columns) + 0.5, "start": start}
    return a | {"end": r.randint(start + 1, columns)}, mask


def select_block(r):
    a, mask = block(r)
    entries = len(a["weight"]) * (a["end"] - a["start"])
    a |= {"counts": torch.tensor([r.randint(0, entries)]), "index": 0, "mask": mask, "scratch": torch.zeros(entries)}
    return a | {"state": torch.zeros(r.choice((3, 4096)), dtype=torch.int32)}


def factor_panel(r):
    n = max(1, size(r))
    start = r.randrange(n)
    end = r.randint(start + 1, min(n, start + 128))
    a = {"matrix": torch.randn(n, n), "start": start, "end": end, "inverse": torch.zeros(end - start, end - start)}
    return a | {"failed": torch.zeros(1, dtype=torch.int32)}


def sweep_block(r):
    a, mask = block(r)
    rows, width = len(a["weight"]), a["end"] - a["start"]
    m = r.choice([0, *(n for n in (1, 2, 4, 5, 8, 16) if width % n == 0)])
    state = torch.randint(-(2**31), 2**31, (3,)).int() if m == 0 or r.random() < 0.2 else None
    a |= {"m": m, "prune": r.randint(0, m), "state": state, "mask": mask}
    a |= {"kept": torch.zeros(rows, packed_width(a["weight"].shape[1]), dtype=torch.uint8)}
    return a | {"errors": torch.zeros(rows, r.choice((1, 1, 3)) * width), "loss": torch.zeros(rows)}


OPERATORS = {
    "pack_mask": lambda r: {"mask": torch.rand(size(r), size(r)) < 0.5},
    "unpack_mask": lambda r: {"packed": mask_of(size(r), n := size(r)), "in_features": n},
    "compose_masked_lora": compose,
    "project_masked_lora": project,
    "kept_share": lambda r: {"masks": [mask_of(size(r), n := size(r)), mask_of(size(r), n)], "in_features": n},
    "multiply_masked_lora": multiply,
    "differentiate_masked_lora": differentiate,
    "pack_bitmask": pack,
    "pack_nm": packing_nm,
    "largest_group": largest_group,
    "unpack_bitmask": unpack,
    "sparse_linear": sparse_linear,
    "sparse_linear_nm": sparse_linear_nm,
    "dense_linear": dense_linear,
    "add_rms_norm": add_rms_norm,
    "rotate_and_store": rotate_and_store,
    "attend_cache": attend_cache,
    "gated_silu": lambda r: {"gate_up": floats(r, *r.choice(((), (1,), (2, 3))), 2 * size(r))},
    "gram": lambda r: {"features": floats(r, r.choice((0, 1, 3)), size(r), size(r))},
    "wanda_select": wanda_select,
    "pruned_per_block": pruned_per_block,
    "select_block": select_block,
    "factor_panel": factor_panel,
    "sweep_block": sweep_block,
}


@pytest.fixture(scope="module")
def fences():
    return Fences()


def test_all_operators_are_tried():
    assert set(OPERATORS) == {str(s).split("::")[1].split("(")[0].split(".")[0] for s in schemas()}


def schemas():
    every = torch._C._jit_get_all_schemas()
    made_in_python = ("checked_gram", "cka_similarity", "masked_lora_forward", "masked_lora_backward", "many_rows")
    on_cpu = torch._C._dispatch_has_kernel_for_dispatch_key
    ours = [s for s in every if s.name.startswith("losa::") and on_cpu(s.name, "CPU")]
    return [f"{s.name}(" for s in ours if not s.name.endswith(made_in_python)]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore")
def test_operators_survive_whatever_they_are_given(name, fences, monkeypatch):
    monkeypatch.setenv("LOSA_CPU_ISA", "")
    run, done = getattr(torch.ops.losa, name).default, 0
    for seed in range(CALLS):
        r = random.Random(seed)
        torch.default_generator.manual_seed(seed)
        os.environ["LOSA_CPU_ISA"] = r.choice(("scalar", "avx2", "avx512"))
        arguments = spoilt(r, OPERATORS[name](r), 0.7)
        try:
            run(*map(fences.place, arguments.values()))
            done += 1
        except (RuntimeError, TypeError, ValueError, OverflowError):
            pass  # torch's own errors among them: what no operator of this name takes
    print(f"{name}: {done} of {CALLS} calls went through")
    assert 0.25 * CALLS < done < CALLS
