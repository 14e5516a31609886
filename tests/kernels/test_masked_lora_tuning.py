"""What the Triton masked-LoRA linear decides before it launches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from losa_kernels import measured, settings
from losa_kernels.cka import triton as cka
from losa_kernels.masked_lora import triton as lora
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.masked_lora.triton import launch as launchers
from losa_kernels.masked_lora.triton import tuning

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_inner_split():
    sizes = sorted({2**i for i in range(4, 10)} | {3 * 2**i for i in range(4, 9)})
    for inner in range(1, 3 * 128 + 1):
        head, tail = tuning.inner_split(inner)
        assert head + tail == min(size for size in sizes if size >= inner)
        assert head >= 16 and head & (head - 1) == 0 and tail in (0, head // 2)


def test_the_way_is_predicted_by_tokens_rank_and_shape():
    for arch in (80, 89, 90, 120):
        for inner in (16, 32, 48, 96):
            choices = [tuning.fused(1 << i, 4096, 4096, inner, arch) for i in range(15)]
            assert choices[0] and not choices[-1]
            assert choices == sorted(choices, reverse=True), "fused up to a number of tokens"
            backward = [tuning.fused(1 << i, 4096, 4096, inner, arch, True) for i in range(15)]
            assert sum(backward) <= sum(choices), "the gradient of x is slower in registers"
            dropped = [tuning.fused(1 << i, 4096, 4096, inner, arch, dropout=True) for i in range(15)]
            assert dropped[0] and not dropped[-1], "two products by the vendor's GEMM cost less than two in registers"
        assert tuning.fused(64, 4096, 4096, 32, arch) and not tuning.fused(64, 4096, 4096, 384, arch)
        assert not tuning.fused(64, 128, 1 << 14, 32, arch), "few tiles leave the machine empty"
        assert not tuning.fused_projection(64, 4096, 4096, 2, arch), "G in bf16 costs less than it saves"
        assert tuning.fused_projection(32, 4096, 4096, 4, arch)
        assert not tuning.fused_projection(1 << 12, 4096, 4096, 4, arch)


def by_way(wide=False, predicted=True, device=CPU):
    return tuning.by_way("op", (1,), wide, device, predicted, lambda: "fused", lambda: "compose")


def test_the_way_is_as_asked_for_or_as_measured(monkeypatch):
    monkeypatch.delenv("LOSA_MASKED_LORA", raising=False)
    assert by_way() == "fused" and by_way(predicted=False) == "compose"
    assert by_way(wide=True) == "compose", "fp32"
    asked = []

    def fastest(op, key, ways, device, table):
        asked.append((op, key, *ways))
        return "compose"

    monkeypatch.setattr(measured, "fastest", fastest)
    assert by_way(device=GPU) == "compose" and asked == [("masked LoRA, op", (1,), "fused", "compose")]
    for name in ("fused", "compose"):
        monkeypatch.setenv("LOSA_MASKED_LORA", name.upper())
        assert by_way(True, name != "fused", GPU) == name
    assert len(asked) == 1
    monkeypatch.setenv("LOSA_MASKED_LORA", "both")
    with pytest.raises(ValueError, match="LOSA_MASKED_LORA: expected auto, fused or compose, got 'both'"):
        by_way()


def test_a_choice_holds_for_token_counts_up_to_a_power_of_two(monkeypatch):
    """Training calls differ in their tokens; each new key costs a measurement."""
    keys = []
    monkeypatch.delenv("LOSA_MASKED_LORA", raising=False)
    monkeypatch.setattr(launchers, "start_kernel", lambda *args, **arguments: None)
    monkeypatch.setattr(
        measured, "fastest", lambda op, key, candidates, device, table: keys.append((op, key)) or "compose"
    )
    for tokens in (1025, 1500, 2048):
        x, weight = torch.zeros(tokens, 64).bfloat16(), torch.zeros(48, 64).bfloat16()
        layer = Layer(weight, None, torch.zeros(8, 64), torch.zeros(48, 8), 2.0)
        lora.forward(x, layer, None, 0.1, 5)
        lora.backward(x[:, :48].contiguous(), x, layer, 0.1, 5, [True, True, True, False])
    ways = [key for key in keys if key[0].endswith(("forward", "of x", "A and B"))]
    assert len(ways) == 9 and len(set(ways)) == 3
    assert len(set(keys)) == len(keys) // 3


def test_fp32_precision_is_checked(monkeypatch):
    monkeypatch.setenv("LOSA_TRITON_FP32", "tf32")
    with pytest.raises(ValueError, match="LOSA_TRITON_FP32: expected ieee or tf32x3, got 'tf32'"):
        settings.TRITON_FP32()


class Card:
    """Tiles that run, and those for which a device has too little shared memory."""

    def __init__(self, fitting):
        self.fitting, self.launched = fitting, []

    def run(self, tile):
        self.launched.append(tile)
        if tile not in self.fitting:
            raise OutOfResources(131072, 101376, "shared memory")
        return f"by {tile.rows}x{tile.columns}"


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(tuning, "_too_large", set())
    monkeypatch.setattr(measured, "_choices", {})


@pytest.mark.usefixtures("forgetful")
def test_the_first_tile_that_fits_runs_unmeasured(monkeypatch):
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    tiles = tuning.PROJECT[80]
    card = Card(tiles[2:])
    for _ in range(2):
        assert tuning.tuned("op", (1,), tiles, GPU, card.run) == "by 64x128"
    assert card.launched == [*tiles, tiles[2]], "what is too large is asked for once"
    small = Card(())
    with pytest.raises(OutOfResources, match="shared memory"):
        tuning.tuned("op", (2,), tiles, GPU, small.run)
    with pytest.raises(OutOfResources):
        tuning.tuned("op", (2,), tiles, GPU, small.run)
    assert small.launched == [*tiles, tiles[2]]


@pytest.mark.usefixtures("forgetful")
def test_composes_where_no_tile_fits(monkeypatch):
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    monkeypatch.delenv("LOSA_MASKED_LORA", raising=False)

    def fused():
        return tuning.tuned("op", (1,), tuning.LINEAR[80], GPU, Card(()).run)

    for _ in range(2):
        assert tuning.by_way("op", (1,), False, GPU, True, fused, lambda: "composed") == "composed"
    monkeypatch.setenv("LOSA_MASKED_LORA", "fused")
    with pytest.raises(OutOfResources):
        tuning.by_way("op", (1,), False, GPU, True, fused, lambda: "composed")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("capturing", [False, True])
def test_tiles_are_measured_where_they_may_be(monkeypatch, capturing):
    monkeypatch.delenv("LOSA_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    tiles = tuning.LINEAR[90]
    times = dict(zip(tiles, (2.0, 1.0, float("inf")), strict=True))
    monkeypatch.setattr(measured, "_milliseconds", lambda run, name: times[run.args[0]])
    card = Card(tiles)
    for _ in range(2):
        tuning.tuned("op", (1,), tiles, GPU, card.run)
    assert card.launched == [tiles[0 if capturing else 1]] * 2
    found = [(choice.op, choice.times) for choice in measured.choices()]
    assert found == ([] if capturing else [("masked LoRA, op", times)])


@pytest.mark.parametrize(
    "capability, arch, family",
    [((8, 0), 80, 80), ((8, 6), 86, 80), ((8, 9), 89, 80), ((9, 0), 90, 90), ((10, 0), 100, 90), ((10, 3), 103, 90),
     ((12, 0), 120, 80), ((12, 1), 121, 80)],
)  # fmt: skip
def test_architectures(capability, arch, family, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tuning.architecture(GPU) == arch and tuning.family(arch) == family
    assert tuning.architecture(CPU) == 80


class Launch(Exception):
    pass


@pytest.mark.parametrize("call", ["forward", "backward", "merge", "gram"])
def test_launches_are_on_the_tensors_device(call, monkeypatch):
    """Triton launches on the current device: tensors on another one would be addresses of nothing there."""
    current = [0]

    @contextlib.contextmanager
    def device_of(tensor):
        before, current[0] = current[0], tensor.get_device()
        yield
        current[0] = before

    seen = []

    def launch(*args, **arguments):
        seen.append(current[0])
        raise Launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cka, "_processors", lambda device: 132)
    monkeypatch.setattr(cka, "start_kernel", launch)
    monkeypatch.setattr(launchers, "start_kernel", launch)
    with FakeTensorMode():
        x, weight = (torch.empty(64, 64, device="cuda:1", dtype=torch.bfloat16) for _ in range(2))
        A, B = torch.empty(8, 64, device="cuda:1"), torch.empty(64, 8, device="cuda:1")
        layer = Layer(weight, None, A, B, 2.0)
        with pytest.raises(Launch):
            if call == "forward":
                lora.forward(x, layer, None, 0.1, 5)
            elif call == "backward":
                lora.backward(x, x, layer, 0.1, 5, [True, True, True, False])
            elif call == "merge":
                lora.merge(layer)
            else:
                cka.gram(torch.empty(2, 16, 128, device="cuda:1"))
    assert seen == [1]
