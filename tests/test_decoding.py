"""The one-token step of static shapes against the plain loop and transformers, on any device; its recordings; and on a
GPU everything from wrapping to generating, with CUDA graphs."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from test_sparse import LLAMA_KIND, build, greedy, thin
from tiny import tiny_llama, tiny_tokenizer, wrap
from torch import nn
from torch.nn.functional import cross_entropy

from losa import decoding, token_graphs
from losa.decoding import LeanDecoder
from losa.errors import LosaError
from losa.generation import generate
from losa.model import find_blocks, merge_model
from losa.modules import SparseLinear
from losa.sparse import join_linears, sparsify
from losa.speed import decode_speeds
from losa.token_graphs import CudaRecorder, TokenGraphs
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.column_sweep import accumulate_hessian, complete_hessian

EPS = torch.finfo(torch.float32).eps


class Recorder:
    """Recordings that call the function again; ``made`` of them, ``replays`` in all."""

    def __init__(self):
        self.made, self.replays, self.closed = 0, 0, 0

    def __call__(self, function):
        self.made += 1

        def replay():
            self.replays += 1
            function()

        return replay

    def close(self):
        self.closed += 1


@pytest.fixture
def recorders(monkeypatch):
    """Decoders read single tokens by the step on any device; the recorders they made."""
    made = []

    def graphs_for(device):
        made.append(Recorder())
        return TokenGraphs(made[-1], device)

    monkeypatch.setattr(decoding, "graphs_for", graphs_for)
    for module in (decoding, token_graphs):
        monkeypatch.setattr(module, "BUCKET", 16)
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_steps_give_the_loops_logits(recorders, name, packed):
    model = build(*LLAMA_KIND[name])
    if packed:
        thin(model)
    ids = torch.randint(2, 90, (40,))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    decoder = LeanDecoder(model, 40)
    assert decoder.room == 48
    found = [decoder(ids[:3]).clone(), *(decoder(token[None]).clone() for token in ids[3:])]
    for logits, truth in zip(found, expected[2:], strict=True):
        assert (logits - truth).abs().max() <= 64 * EPS * truth.abs().max()
    # 16 places were recorded at their second token, the fifth of all, and so on.
    assert recorders[-1].made == 3 and recorders[-1].replays == 37 - 3
    with pytest.raises(LosaError, match="41 tokens are more than max_length, 40"):
        decoder(ids[:1])


@pytest.mark.parametrize("name", LLAMA_KIND)
def test_steps_give_transformers_tokens(recorders, name):
    model, tokenizer = build(*LLAMA_KIND[name]), tiny_tokenizer()
    found = generate(model, tokenizer, "hello there", max_new_tokens=100, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello there", 100)
    assert sum(recorder.replays for recorder in recorders) > 80
    assert recorders[-1].closed == 1 and all(recorder.closed for recorder in recorders)


def test_drawn_tokens_do_not_depend_on_the_way(recorders, monkeypatch):
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()

    def drawn():
        return generate(model, tokenizer, "hi", max_new_tokens=30, temperature=0.7, top_p=0.9, stop_at_eos=False).tokens

    found = drawn()
    assert sum(recorder.replays for recorder in recorders) > 20
    monkeypatch.setattr(decoding, "graphs_for", lambda device: None)
    assert found == drawn()


def test_texts_in_pieces(recorders):
    """Single tokens between longer pieces, a reset, and junk that an earlier text left in the cache."""
    decoder = LeanDecoder(build(*LLAMA_KIND["qwen3"]), 24)
    ids = torch.randint(2, 90, (20,))
    decoder.cache.fill_(float("nan"))
    decoder.reset()
    whole = decoder(ids)
    decoder.reset()
    for part in ids.split([5, 1, 1, 4, 1, 7, 1]):
        pieces = decoder(part)
    assert (whole - pieces).abs().max() <= 64 * EPS * whole.abs().max()


def test_likeliest_follows_itself(recorders):
    decoder = LeanDecoder(build(*LLAMA_KIND["llama"]), 40)
    decoder(torch.arange(3, 8))
    tokens = [torch.tensor([9])]
    for _ in range(30):
        tokens.append(decoder.likeliest(tokens[-1]).clone())
    decoder.reset()
    decoder(torch.arange(3, 8))
    token, again = torch.tensor([9]), [9]
    for _ in range(30):
        token = decoder.likeliest(token)
        again.append(int(token))
    assert again == [int(token) for token in tokens] and len(set(again)) > 3


def test_a_recording_that_fails_is_said_once(recorders, monkeypatch, caplog):
    model = build(*LLAMA_KIND["llama"])
    ids = torch.randint(2, 90, (9,))
    expected = LeanDecoder(model, 12)(ids)
    monkeypatch.setattr(Recorder, "__call__", lambda self, function: 1 / 0)
    decoder = LeanDecoder(model, 12)
    with caplog.at_level(logging.WARNING, logger="losa"):
        for token in ids:
            logits = decoder(token[None])
    assert (logits - expected).abs().max() <= 64 * EPS * expected.abs().max() and decoder.length == 9
    assert [record.message for record in caplog.records] == [
        "generate: no CUDA graph, tokens are read step by step: division by zero"
    ]


def test_only_gpus_have_graphs(monkeypatch):
    assert token_graphs.graphs_for(torch.device("cpu")) is None
    monkeypatch.setenv("LOSA_DECODE_GRAPH", "0")
    assert token_graphs.graphs_for(torch.device("cuda")) is None


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_joined_linears(name):
    model = build(*LLAMA_KIND[name])
    ids = torch.arange(3, 20)
    expected = LeanDecoder(model, 20)(ids)
    for block in find_blocks(model)[1]:
        before = block.mlp.up_proj.weight.clone()
        join_linears(block)
        assert torch.equal(block.mlp.up_proj.weight, before)
        assert decoding._joined([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]) is not None
        assert decoding._joined([block.mlp.up_proj, block.mlp.gate_proj]) is None
    found = LeanDecoder(model, 20)(ids)
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()
    assert thin(model).model.layers[0].mlp.gate_proj.group is not None


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
def test_from_wrapping_to_generating(device, pruner, monkeypatch):
    """Dense and packed, by graph (on a GPU), by the plain loop and by transformers: the same greedy tokens."""
    model, tokenizer = pruned_and_trained(pruner, device), tiny_tokenizer()
    packed = sparsify(copy.deepcopy(model))
    linears = [m for m in packed.modules() if isinstance(m, SparseLinear)]
    assert len(linears) == 14 and all(0.49 < m.sparsity < 0.63 for m in linears)
    ids = tokenizer("hello there", return_tensors="pt").input_ids.to(device)
    length = 300  # two buckets
    with torch.no_grad():
        model.config.max_position_embeddings = 512
        options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    for graphs in ("1", "0"):
        monkeypatch.setenv("LOSA_DECODE_GRAPH", graphs)
        for one in (model, packed):
            found = generate(one, tokenizer, "hello there", max_new_tokens=length, stop_at_eos=False)
            assert found.tokens == expected, (graphs, one is packed)
    assert len(set(expected)) > 5


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
    replays, record = [], CudaRecorder.__call__

    def counting(self, function):
        replay = record(self, function)
        return lambda: (replays.append(1), replay())

    monkeypatch.setattr(CudaRecorder, "__call__", counting)
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
def test_bench_on_gpu():
    model = pruned_and_trained("wanda", "cuda")
    speeds = {s.name: s.tokens_per_second for s in decode_speeds(model, tokens=40, repetitions=2)}
    assert speeds["losa, packed"] > speeds["transformers, dense"]
    assert len(speeds) == 8
