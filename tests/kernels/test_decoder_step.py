"""What a decoder does between its products: the reference against transformers, the CUDA kernels in the emulator and on
a GPU against the reference in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from losa_kernels import decoder_step, native
from losa_kernels.decoder_step import reference
from tests.helpers.decoder_steps import assert_close, compare, wide
from tests.helpers.emulation import NEEDED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # as FloatType numbers them
EPS = 1e-5

emulated = [pytest.param("emulator", marks=NEEDED)]
ISAS = ["scalar", "avx2", "avx512"]
WAYS = [*emulated, *ISAS, pytest.param("cuda", marks=pytest.mark.gpu)]
# The emulator has no attention in fp16, which would take long to compile.
ATTENTION = [
    *(pytest.param("emulator", dtype, marks=NEEDED) for dtype in DTYPES[:2]),
    *((isa, dtype) for isa in ISAS for dtype in DTYPES),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in DTYPES),
]


@pytest.fixture
def run(request, way, monkeypatch):
    """The op of that name: its CUDA kernel in the emulator, or the public function on a CPU or a GPU."""
    if way == "emulator":
        return Emulated(request.getfixturevalue("emulate"))
    if way == "cuda":
        return OnGpu()
    monkeypatch.setenv("LOSA_CPU_ISA", way)
    if native.missing("cpu") is not None or native.cpu_isa() != way:
        pytest.skip(f"this build or CPU does not run {way}")
    return OnCpu()


class OnCpu:
    seed = 0

    def __getattr__(self, name):
        return getattr(decoder_step, name)


class OnGpu:
    seed = 0

    def __getattr__(self, name):
        return lambda *arguments: _moved(getattr(decoder_step, name), arguments)


def _moved(function, arguments):
    """What the function returns for arguments on the GPU; it changes those on the CPU as it changes them there."""
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
    found = function(*moved).cpu()
    for before, after in zip(arguments, moved, strict=True):
        if isinstance(before, torch.Tensor):
            before.copy_(after)
    return found


class Emulated:
    """``vectors``: 16 bytes at a time; ``processors``: multiprocessors, which decide how places are divided."""

    def __init__(self, emulate):
        self._emulate, self.seed, self.vectors, self.processors = emulate, 0, True, 2

    def _run(self, command, like, result, *numbers, **arrays):
        kind = DTYPES.index(like.dtype)
        folder = self._emulate("decoder_step", command, kind, *numbers, seed=self.seed, result=result, **arrays)
        return lambda name, shape: torch.from_numpy(np.fromfile(folder / name, np.uint8)).view(like.dtype).view(shape)

    def add_rms_norm(self, x, update, weight, eps):
        numbers = (x.numel() // x.shape[-1], x.shape[-1], self.vectors, round(1e6 * eps))
        load = self._run("norm", x, "normed", *numbers, x=x, update=update, weight=weight)
        x.copy_(load("x", x.shape))
        return load("normed", x.shape)

    def gated_silu(self, gate_up):
        *rows, columns = gate_up.shape[0], gate_up.shape[-1] // 2
        return self._run("silu", gate_up, "out", *rows, columns, self.vectors, gate_up=gate_up)("out", (*rows, columns))

    def rotate_and_store(self, heads, cos, sin, position, cache, q_norm, k_norm, eps):
        _, keys, places, size = cache.shape
        arrays = {"heads": heads, "cos": cos, "sin": sin, "position": position, "cache": cache}
        numbers = (len(heads) - 2 * keys, keys, size, places, round(1e6 * eps))
        load = self._run("rotate", heads, "rotated", *numbers, q_norm=q_norm, k_norm=k_norm, **arrays)
        cache.copy_(load("cache", cache.shape))
        return load("rotated", (numbers[0], size))

    def attend_cache(self, q, cache, position, places, scaling, finished):
        _, keys, room, size = cache.shape
        scale = np.array([scaling], np.float32)
        arrays = {"q": q, "cache": cache, "position": position, "scale": scale}
        load = self._run("attend", q, "out", len(q), keys, size, room, places, self.processors, **arrays)
        finished.copy_(load("finished", (-1,)).view(torch.int32))
        return load("out", q.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "vectors"),
    [(1, 8, True), (3, 576, True), (1, 2056, True), (2, 7, False), (1, 130, False), (1, 2100, False)],
)
def test_add_rms_norm(run, dtype, rows, columns, vectors):
    """Whole 16 bytes and odd widths, few threads and more loads of a thread than it keeps."""
    run.vectors = vectors
    x, weight = torch.randn(rows, columns).to(dtype), torch.rand(columns).add(0.5).to(dtype)
    before = x.clone()
    compare(run, "add_rms_norm", x, None, weight, EPS)
    assert torch.equal(x, before)
    update = torch.randn(rows, columns).to(dtype)
    compare(run, "add_rms_norm", x, update, weight, EPS)
    assert torch.equal(x, before + update)


@pytest.mark.parametrize("way", emulated)
def test_add_rms_norm_of_more_than_the_registers_hold(run):
    """Beyond 1024 threads' two loads of 16 bytes, and of an element."""
    for columns, vectors in ((8 * 2100, True), (2100, False)):
        run.vectors = vectors
        x, weight, update = (torch.randn(columns).bfloat16() for _ in range(3))
        compare(run, "add_rms_norm", x[None], update[None], weight, EPS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "vectors"), [(1, 8, True), (3, 1536, True), (2, 13, False)])
def test_gated_silu(run, dtype, rows, columns, vectors):
    run.vectors = vectors
    gate_up = 4 * torch.randn(rows, 2 * columns).to(dtype)
    gate_up[0, 0], gate_up[-1, 1] = -100.0, 100.0  # beyond exp's range in fp32
    compare(run, "gated_silu", gate_up)


def rotation(dtype, queries, keys, size, places=9):
    """Tables with halves that differ, so that each number has to come from its own place."""
    heads, cos, sin = torch.randn(queries + 2 * keys, size), torch.randn(places, size), torch.randn(places, size)
    cache = torch.randn(2, keys, places, size)
    return [tensor.to(dtype) for tensor in (heads, cos, sin, cache)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("queries", "keys", "size"), [(1, 1, 2), (4, 2, 16), (9, 3, 80), (5, 1, 256)])
def test_rotate_and_store(run, dtype, normed, queries, keys, size):
    heads, cos, sin, cache = rotation(dtype, queries, keys, size)
    norms = [torch.randn(size).to(dtype) if normed else None for _ in range(2)]
    for position in (0, 8):
        before, place = cache.clone(), torch.tensor([position])
        expected = cache.double()
        reference.rotate_and_store(*wide(heads, cos, sin), place, expected, *wide(*norms), EPS)
        plain = cache.clone()
        reference.rotate_and_store(heads, cos, sin, place, plain, *norms, EPS)
        compare(run, "rotate_and_store", heads, cos, sin, place, cache, *norms, EPS)
        assert_close(cache[0], plain[0], expected[0])
        assert torch.equal(cache[1], plain[1])
        rest = torch.arange(9) != position
        assert torch.equal(cache[:, :, rest], before[:, :, rest])


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_stored_beyond_the_cache(run):
    heads, cos, sin, cache = rotation(torch.float32, 4, 2, 16)
    before = cache.clone()
    for position in (-1, 9, 2**40):
        run.rotate_and_store(heads, cos, sin, torch.tensor([position]), cache, None, None, EPS)
    assert torch.equal(cache, before)


SHAPES = [  # queries, keys, size, room, places, positions
    (1, 1, 64, 4, 4, (0, 3)),
    (2, 2, 128, 130, 100, (0, 31, 32, 99)),
    (9, 3, 64, 70, 70, (5, 69)),
    (4, 1, 80, 300, 256, (200, 255)),
    (10, 2, 96, 70, 40, (39,)),
    (8, 1, 128, 256, 256, (64, 255)),
]


@pytest.mark.parametrize(("way", "dtype"), ATTENTION)
@pytest.mark.parametrize(("queries", "keys", "size", "room", "places", "positions"), SHAPES, ids=str)
def test_attend_cache(run, dtype, queries, keys, size, room, places, positions):
    """Groups of one, of three, of a set and of more, few places and many, and whatever lies beyond them."""
    q, cache = 2 * torch.randn(queries, size).to(dtype), torch.randn(2, keys, room, size).to(dtype)
    for position in positions:
        given = cache.clone()
        given[:, :, position + 1 :] = float("nan")
        finished = torch.zeros(queries, dtype=torch.int32)
        compare(run, "attend_cache", q, given, torch.tensor([position]), places, size**-0.5, finished)
        assert not finished.any()


@pytest.mark.parametrize(("way", "dtype"), ATTENTION)
@pytest.mark.parametrize("size", [8, 104, 256])
def test_attend_cache_of_other_heads(run, dtype, size):
    """Also beyond what a warp reads at once in fp32: torch serves those."""
    if size == 256 and dtype == torch.float32 and isinstance(run, Emulated):
        size = 128
    q, cache = torch.randn(6, size).to(dtype), torch.randn(2, 2, 50, size).to(dtype)
    finished = torch.zeros(6, dtype=torch.int32)
    compare(run, "attend_cache", q, cache, torch.tensor([49]), 50, 0.3, finished)


@pytest.mark.parametrize("way", emulated)
def test_attention_does_not_depend_on_the_order_of_threads(run):
    """Nor much on how many blocks share its places."""
    q, cache = torch.randn(4, 64).bfloat16(), torch.randn(2, 1, 300, 64).bfloat16()
    arguments = q, cache, torch.tensor([290]), 300, 0.125, torch.zeros(4, dtype=torch.int32)
    found = []
    for run.seed in range(3):
        found.append(run.attend_cache(*arguments))
    assert all(torch.equal(one, found[0]) for one in found)
    for run.processors in (1, 132):
        compare(run, "attend_cache", *arguments)


@pytest.mark.parametrize("way", WAYS)
def test_scores_far_apart(run):
    """A place that outweighs all others by more than fp32's range, wherever it is."""
    for best in (0, 40, 199):
        q, cache = torch.ones(4, 64), torch.randn(2, 1, 200, 64)
        cache[0] *= 0.01
        cache[0, 0, best] = 30.0
        found = compare(run, "attend_cache", q, cache, torch.tensor([199]), 200, 1.0, torch.zeros(4, dtype=torch.int32))
        assert torch.equal(found, cache[1, 0, best].expand(4, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_transformers(dtype):
    norm = LlamaRMSNorm(64, EPS).to(dtype)
    nn.init.normal_(norm.weight)
    x, update = torch.randn(2, 64).to(dtype), torch.randn(2, 64).to(dtype)
    with torch.no_grad():
        assert torch.equal(reference.add_rms_norm(x.clone(), update, norm.weight, EPS), norm(x + update))
        heads, cos, sin, cache = rotation(dtype, 4, 2, 16)
        q, k, v = heads[None, :, None].split((4, 2, 2), 1)
        place = torch.tensor([3])
        expected = apply_rotary_pos_emb(q, k, cos[None, 3:4], sin[None, 3:4])
        signed = torch.cat([-sin[:, :8], sin[:, 8:]], -1)
        found = reference.rotate_and_store(heads, cos, signed, place, cache, None, None, EPS)
        assert torch.equal(found, expected[0][0, :, 0]) and torch.equal(cache[0, :, 3], expected[1][0, :, 0])
        assert torch.equal(cache[1, :, 3], v[0, :, 0])
        gate, up = torch.randn(2, 3, 8).to(dtype)
        assert_close(reference.gated_silu(torch.cat([gate, up], -1)), *[F.silu(gate) * up] * 2)


def test_arguments_that_do_not_fit():
    x, weight = torch.randn(2, 8), torch.randn(8)
    heads, cos, sin, cache = rotation(torch.float32, 4, 2, 16)
    place, finished = torch.tensor([3]), torch.zeros(4, dtype=torch.int32)
    calls = {
        "x: expected floating point": lambda: decoder_step.add_rms_norm(x.int(), None, weight, EPS),
        r"update: expected \(2, 8\), got \(8,\)": lambda: decoder_step.add_rms_norm(x, weight, weight, EPS),
        "weight: expected torch.float32 on cpu, got torch.float64": lambda: decoder_step.add_rms_norm(
            x, None, weight.double(), EPS
        ),
        r"gate_up: expected \(..., 2 n\), got \(7,\)": lambda: decoder_step.gated_silu(torch.randn(7)),
        r"heads: expected \(queries \+ 4, even size\)": lambda: decoder_step.rotate_and_store(
            heads[:4], cos, sin, place, cache
        ),
        r"sin: expected \(9 or more, 16\), got \(8, 16\)": lambda: decoder_step.rotate_and_store(
            heads, cos, sin[1:], place, cache
        ),
        r"cache: expected \(2, key heads, places, 16\)": lambda: decoder_step.attend_cache(
            heads, cache[..., :8], place, 9, 1.0, finished
        ),
        r"q: expected \(a multiple of 2, 16\)": lambda: decoder_step.attend_cache(
            heads[:3], cache, place, 9, 1.0, finished
        ),
        "position: expected int64": lambda: decoder_step.attend_cache(heads[:4], cache, place.int(), 9, 1.0, finished),
        "places: expected 1 to 9, got 10": lambda: decoder_step.attend_cache(
            heads[:4], cache, place, 10, 1.0, finished
        ),
        r"finished: expected int32 \(4,\)": lambda: decoder_step.attend_cache(
            heads[:4], cache, place, 9, 1.0, finished[:3]
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="weight: requires a gradient"):
        decoder_step.add_rms_norm(x, None, weight.requires_grad_(), EPS)


def step(x, update, weight, heads, cos, sin, position, cache, finished):
    """All four operations, one on the other's results where shapes allow."""
    normed = decoder_step.add_rms_norm(x, update, weight, EPS)
    q = decoder_step.rotate_and_store(heads, cos, sin, position, cache)
    attended = decoder_step.attend_cache(q, cache, position, cache.shape[2], 0.25, finished)
    return decoder_step.gated_silu(normed), attended


def step_arguments(device="cpu"):
    arguments = torch.randn(1, 64), torch.randn(1, 64), torch.randn(64), *rotation(torch.float32, 4, 2, 16)
    x, update, weight, heads, cos, sin, cache = (tensor.to(device) for tensor in arguments)
    cache.zero_()
    finished = torch.zeros(4, dtype=torch.int32, device=device)
    return x, update, weight, heads, cos, sin, torch.tensor([3], device=device), cache, finished


@torch.no_grad()
def test_compiled(device):
    arguments = step_arguments(device)
    expected = step(*(tensor.clone() for tensor in arguments))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    found = torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * other.abs().max()


@pytest.mark.gpu
def test_operators_pass_opcheck_on_gpu():
    x, update, weight, heads, cos, sin, position, cache, finished = step_arguments("cuda")
    checked = {
        "add_rms_norm": (x, update, weight, EPS),
        "rotate_and_store": (heads, cos, sin, position, cache, None, None, EPS),
        "attend_cache": (heads[:4].clone(), cache, position, 9, 0.25, finished),
        "gated_silu": (x,),
    }
    for name, arguments in checked.items():
        torch.library.opcheck(getattr(torch.ops.losa, name).default, arguments)


@pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
def test_fake_results_have_the_references_shapes():
    from losa_kernels.decoder_step import cuda
    from losa_kernels.decoder_step import native as kernels

    arguments = [tensor.to("meta") for tensor in step_arguments()]
    x, update, weight, heads, cos, sin, position, cache, finished = arguments
    assert kernels.add_rms_norm(x, update, weight, EPS).shape == x.shape
    for way in (kernels, cuda):
        assert way.rotate_and_store(heads, cos, sin, position, cache, None, None, EPS).shape == (4, 16)
        assert way.attend_cache(heads[:4], cache, position, 9, 1.0, finished).shape == (4, 16)
    assert kernels.gated_silu(x).shape == (1, 32)


@pytest.mark.gpu
@pytest.mark.sanitizer
@torch.no_grad()
def test_tiny_step_for_the_sanitizer():
    arguments = step_arguments("cuda")
    expected = step(*(tensor.cpu() for tensor in arguments))
    for one, other in zip(step(*arguments), expected, strict=True):
        assert (one.cpu() - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * other.abs().max()
