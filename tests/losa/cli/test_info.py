"""losa info: what is there, and what was chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from losa.inference import choices
from losa_kernels import measured, native, settings
from tests.helpers.command_line import fail, succeed

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_it_says_what_was_loaded_and_set(monkeypatch):
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    text = succeed("info")
    assert torch.__version__ in text and f"losa_cpu: {native.status()['losa_cpu']}" in text
    assert "losa_cuda: " in text


def test_it_lists_every_setting_with_its_value_and_whether_it_is_set(monkeypatch):
    for setting in settings.TABLE:
        monkeypatch.delenv(setting.name, raising=False)
    monkeypatch.setenv("LOSA_AUTOTUNE", " off")
    monkeypatch.setenv("LOSA_BACKEND", "")
    monkeypatch.setenv("LOSA_TRAILING", "fast")
    monkeypatch.setenv("LOSA_CPU_ISA", "sse")
    monkeypatch.setenv("LOSA_CUDA_ARCHS", "90a")
    monkeypatch.setenv("LOSA_TRIALING", "fp32")
    lines = succeed("info").splitlines()
    found = [line.strip() for line in lines[lines.index("settings:") + 1 :]]
    assert len(found) == len(settings.TABLE) + 1
    assert "LOSA_AUTOTUNE=0 (set)" in found and "LOSA_BACKEND=auto" in found and "LOSA_MASKED_LORA=auto" in found
    assert "LOSA_TRAILING: expected auto, fp32 or 3xtf32, got 'fast' (set)" in found
    assert "LOSA_CPU_ISA: expected auto, scalar, avx2 or avx512, got 'sse' (set)" in found
    assert "LOSA_CUDA=1 (read by setup.py)" in found and "LOSA_CUDA_ARCHS=90a (set, read by setup.py)" in found
    assert found[-1] == "LOSA_TRIALING: set, but nothing reads a variable of this name"


def test_a_bad_setting_is_a_sentence(monkeypatch):
    monkeypatch.setenv("LOSA_DEBUG", "perhaps")
    assert fail("info").strip() == "losa: LOSA_DEBUG: expected 0 or 1, got 'perhaps'"


@CPU_ONLY
def test_without_a_gpu_nothing_can_be_chosen(tmp_path):
    assert "GPU: none that torch sees" in succeed("info")
    assert "losa: info --gpu: torch sees no GPU here" in fail("info", "--gpu")
    assert "a directory is for --gpu" in fail("info", tmp_path)


def test_a_card_without_code_for_it_is_pointed_out(monkeypatch):
    card = {"major": 12, "minor": 0, "name": "a card", "total_memory": 24 << 30, "multi_processor_count": 170}
    card = SimpleNamespace(**card, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(native, "missing", lambda backend: None)
    monkeypatch.setattr(
        native, "build_info", lambda: {"cuda_archs": ["80", "90a"], "compiler": "", "torch_headers": ""}
    )
    ran = []
    monkeypatch.setattr(choices, "decode_shapes", ran.append)
    monkeypatch.setattr(choices, "train_shapes", ran.append)
    times = {"window": 0.01, "tiles": 0.0075}
    choice = measured.Choice("sparse_linear", (1, 4096, 4096), torch.device("cuda"), "tiles", times)
    monkeypatch.setattr(measured, "choices", lambda: [choice])
    text = succeed("info", "--gpu")
    assert "a card, compute capability 12.0, 24 GiB, 170 multiprocessors, 99 KiB" in text
    assert "no code for it: build with LOSA_CUDA_ARCHS=120" in text and ran == ["cuda", "cuda"]
    assert "sparse_linear 1 4096 4096: tiles (ms: window 0.0100, tiles 0.0075)" in text


def test_what_is_run_to_choose():
    """The same calls on the CPU, where nothing is measured."""
    choices.decode_shapes("cpu", [(16, 24)])
    choices.train_shapes("cpu", [(16, 24)], tokens=5)
    assert choices.lines() == ["nothing was measured: LOSA_AUTOTUNE=0, torch's deterministic mode, or one way only"]


def test_a_models_shapes(monkeypatch):
    from losa.inference.sparsify import sparsify
    from losa.model.blocks import block_linears
    from tests.helpers.tiny import tiny_llama

    model = tiny_llama(layers=2).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape) < 0.6, 0)
    sparsify(model)
    ran = []
    monkeypatch.setattr(choices, "sparse_linear", lambda x, weight: ran.append((tuple(weight.shape), len(x))))
    assert choices.decode_model(model) == len(set(ran)) / len(choices.BATCHES)
    attention = model.model.layers[0].self_attn
    joined = sum(linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert {shape for shape, _ in ran} >= {(joined, attention.q_proj.in_features), tuple(attention.o_proj.packed.shape)}
