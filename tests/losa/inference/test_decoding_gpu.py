"""From wrapping to generating on any device, and single tokens by CUDA graphs on a GPU."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from losa.inference.decoder_blocks import Block
from losa.inference.decoding import LeanDecoder
from losa.inference.generation import generate
from losa.inference.speed import decode_speeds
from losa.model.wrapping import merge_model
from losa.modules.sparse import SparseLinear
from losa.packed import directory as files
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.cuda_graphs import Recorder
from losa_kernels.pruning import accumulate_hessian, complete_hessian
from tests.helpers.decoders import LLAMA_KIND, build, thin
from tests.helpers.tiny import EPS, tiny_llama, tiny_tokenizer, wrap


def inputs_of(model, ids):
    """What every block linear is given: {name: (tokens, in) fp32}."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "layers" in name:
            hook = lambda m, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).float())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def pruned_and_trained(pruner, device):
    """A tiny model, wrapped, pruned by the kernels themselves, two training steps taken, merged."""
    model = tiny_llama(layers=2, hidden=64).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # far from ties
    ids = torch.randint(2, 90, (8, 16), device=device)
    inputs = inputs_of(model, ids)
    layers = wrap(model)
    for name, layer in layers.items():
        x, weight = inputs[name], layer.weight.detach()
        if pruner == "wanda":
            layer.set_mask(wanda_mask(weight, x.norm(dim=0), sparsity=0.6))
        else:
            hessian = torch.zeros(x.shape[1], x.shape[1], device=device)
            accumulate_hessian(hessian, x)
            complete_hessian(hessian)
            swept = sparsegpt_prune(weight, hessian, keep_n=2, m=4)
            layer.weight.data = swept.weight
            layer.set_mask(swept.mask)
    trained = [p for n, p in model.named_parameters() if "lora" in n]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(3):
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    return merge_model(model).requires_grad_(False)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_from_wrapping_to_generating(device, pruner, monkeypatch, tmp_path, caplog):
    """Dense, and packed into files and loaded again: by graph (on a GPU), by the plain loop and by transformers the
    same greedy tokens."""
    model, tokenizer = pruned_and_trained(pruner, device), tiny_tokenizer()
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    files.pack_directory(tmp_path / "dense", tmp_path / "packed")
    packed, _ = files.load(tmp_path / "packed", device)
    linears = [m for m in packed.modules() if isinstance(m, SparseLinear)]
    assert len(linears) == 14 and all(0.49 < m.sparsity < 0.63 for m in linears)
    ids = tokenizer("hello there", return_tensors="pt").input_ids.to(device)
    length = 300  # two buckets
    options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    replays = counted(monkeypatch)
    for graphs in ("1", "0"):
        monkeypatch.setenv("LOSA_DECODE_GRAPH", graphs)
        for one in (model, packed):
            with caplog.at_level(logging.WARNING, logger="losa"):
                found = generate(one, tokenizer, "hello there", max_new_tokens=length, stop_at_eos=False)
            assert found.tokens == expected, (graphs, one is packed)
    assert len(set(expected)) > 5 and not caplog.records
    # Of 299 steps the first of a bucket is not replayed.
    assert len(replays) == (2 * (length - 1 - 2) if device.type == "cuda" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_graphs_on_gpu(monkeypatch, caplog, name, packed, dtype):
    model = build(*LLAMA_KIND[name])
    if packed:
        thin(model)
    model.to("cuda", dtype)
    ids = torch.randint(2, 90, (270,), device="cuda")
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0].float()
    replays = counted(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="losa"):
        decoder = LeanDecoder(model, 270)
        found = [decoder(ids[:3]).clone(), *(decoder(token[None]).clone() for token in ids[3:])]
    assert not caplog.records and sum(replays) == 267 - 2
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max()
    assert (torch.stack(found).float() - expected[2:]).abs().max() <= allowed


def counted(monkeypatch):
    """A list that grows with every replay."""
    replays, record = [], Recorder.__call__

    def counting(self, function, *settings):
        replay = record(self, function, *settings)
        return lambda: (replays.append(1), replay())

    monkeypatch.setattr(Recorder, "__call__", counting)
    return replays


@pytest.mark.gpu
def test_graphs_on_gpu_hold_nothing_afterwards(monkeypatch):
    model, replays = build(*LLAMA_KIND["llama"]).cuda(), counted(monkeypatch)

    def held(close):
        decoder = LeanDecoder(model, 600)
        token = decoder(torch.arange(3, 9, device="cuda")).argmax(-1, keepdim=True)
        for _ in range(500):
            token = decoder.likeliest(token)
        if close:
            decoder.resize(0)
        else:
            del decoder
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = held(True)
    for close in (True, False, True, False):
        assert held(close) <= first
    assert sum(replays) == 5 * (500 - 2)


@pytest.mark.gpu
def test_two_decoders_take_turns_on_gpu():
    """Graphs of one do not touch what those of another need, even after the other is gone."""
    model = build(*LLAMA_KIND["qwen3"]).cuda()
    ids = torch.randint(2, 90, (100,), device="cuda")
    plain = [LeanDecoder(model, 100)(ids[: n + 1]).clone() for n in range(100)]
    one, two = LeanDecoder(model, 100), LeanDecoder(model, 100)
    for n, token in enumerate(ids):
        if n == 50:
            two.resize(0)
            gc.collect()
            torch.cuda.empty_cache()
            torch.full((1 << 24,), float("nan"), device="cuda")
        for decoder in (one, two)[: 2 if n < 50 else 1]:
            logits = decoder(token[None])
            assert (logits - plain[n]).abs().max() <= 64 * EPS * plain[n].abs().max(), n


@pytest.mark.gpu
def test_a_capture_that_fails_on_gpu(monkeypatch, caplog):
    """The text goes on by the plain loop, and the next one has graphs again."""
    model, tokenizer, step = build(*LLAMA_KIND["llama"]).cuda(), tiny_tokenizer(), Block.step

    def reading(self, x, *rest):
        float(x.sum())  # no capture allows that
        return step(self, x, *rest)

    def text():
        return generate(model, tokenizer, "hello", max_new_tokens=20, stop_at_eos=False).tokens

    replays, stream = counted(monkeypatch), torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger="losa"):
        with monkeypatch.context() as context:
            context.setattr(Block, "step", reading)
            found = text()
        assert len(caplog.records) == 1 and not replays and torch.cuda.current_stream() == stream
        assert torch.randn(9, device="cuda").isfinite().all()
        assert text() == found
    assert len(caplog.records) == 1 and len(replays) == 18


@pytest.mark.gpu
def test_bench_on_gpu():
    model = pruned_and_trained("wanda", "cuda")
    speeds = {s.name: s.tokens_per_second for s in decode_speeds(model, tokens=40, repetitions=2)}
    assert speeds["losa, packed"] > speeds["transformers, dense"]
    assert len(speeds) == 8
