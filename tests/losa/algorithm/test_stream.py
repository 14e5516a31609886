"""Streaming calibration: block by block gives what one forward pass gives, within a stated bound of memory."""

from __future__ import annotations

import copy
import gc
import os
import signal
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from losa.algorithm.stream import BlockStream
from losa.distributed.stop import Stopped, heeding_signals
from losa.errors import ModelError
from losa.model.block_calls import Call
from losa.model.blocks import find_blocks
from losa.model.call_recording import CallsOfTokens
from losa.model.norms import train_norms, trained_norms
from losa.modules.masked_lora import dense_mode
from losa_kernels import gram
from tests.helpers.architectures import model_of
from tests.helpers.tiny import tiny_llama

IDS = torch.arange(6 * 16).reshape(6, 16) % 90


def tiny_gemma2():
    config = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def tiny_opt():
    config = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return OPTForCausalLM(config).eval()


def outputs_of_blocks(model, blocks, ids):
    seen = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_a_signal_stops_a_stream_before_its_next_pass():
    model = tiny_llama()
    passes = []

    def stop(*_):
        passes.append(1)
        os.kill(os.getpid(), signal.SIGUSR1)

    model.model.norm.register_forward_hook(stop)
    with heeding_signals(), pytest.raises(Stopped):
        BlockStream(model, find_blocks(model), IDS, 3)
    assert len(passes) == 1


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_opt])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stream_equals_a_whole_forward_pass(build, batch_size):
    model = build()
    blocks = find_blocks(model)
    expected = outputs_of_blocks(model, blocks, IDS)
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, batch_size)
        for index in range(len(blocks)):
            stream.advance(index)
            got = torch.cat(stream.hidden)
            # Two orders of fp32 sums over at most 48 terms: a few units in the last place of the largest value.
            bound = 48 * torch.finfo(torch.float32).eps * expected[index].abs().max()
            assert (got - expected[index]).abs().max() <= bound


def tensors_alive() -> list[torch.Tensor]:
    # By type: a weak proxy of something that is gone cannot be asked, and what torch.compile leaves has no memory.
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]


def test_memory_between_blocks_is_the_stated_bound():
    model = tiny_llama(layers=6)
    blocks = find_blocks(model)
    before = tensors_alive()  # held, so that no address comes back
    known = {t.untyped_storage().data_ptr() for t in before}
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 2)
        assert stream.nbytes == IDS.numel() * 32 * 4
        calls = sum(
            t.numel() * t.element_size()
            for c in stream._calls[(2, 16)][0].kwargs.values()
            for t in (c if isinstance(c, tuple) else [c])
            if isinstance(t, torch.Tensor)
        )
        held = []
        for index in range(len(blocks)):
            stream.advance(index)
            gc.collect()
            live = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors_alive()
                if t.shape[-1:] == (32,) and t.dim() == 3
            }
            held.append(sum(n for pointer, n in live.items() if pointer not in known))
    assert max(held) <= stream.nbytes + calls
    assert held[0] == held[-1], "memory grows with depth"


def test_gram_of_a_stream_is_the_gram_of_all_features():
    model = tiny_llama()
    blocks = find_blocks(model)
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 4)
        stream.advance(0)
        whole = gram(torch.cat(stream.hidden).flatten(1).double())
        sliced = stream.gram(slice_features=6 * 37)
    assert sliced.shape == (6, 6)
    assert torch.allclose(sliced.double(), whole.double(), rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def tensors_in(value) -> list[torch.Tensor]:
    """Of a mapping or an object, and of what these hold."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for each in inside for tensor in tensors_in(each)]


def test_norms_outside_of_the_blocks_are_the_streams_own():
    """A context of a stream holds for arguments that are recorded later, too."""
    model = model_of("gemma4_inputs")
    blocks, dense = find_blocks(model), copy.deepcopy(model)
    train_norms(model)
    outside = next(norm for name, norm in trained_norms(model).items() if "per_layer_projection_norm" in name)
    with torch.no_grad():
        outside.weight.mul_(1.5)
    streams = []
    for each, within in ((model, partial(dense_mode, model)), (dense, nullcontext), (model, nullcontext)):
        stream = BlockStream(each, find_blocks(each), IDS, 1, within=within)
        for index in range(len(blocks)):
            stream.advance(index)
        streams.append(torch.cat(stream.hidden))
    assert torch.equal(streams[0], streams[1]) and not torch.allclose(streams[2], streams[1])


def test_a_stream_that_is_dropped_is_freed():
    """At once: nothing that it made refers to it."""
    model = model_of("gemma4_inputs")
    stream = BlockStream(model, find_blocks(model), IDS, 1)
    assert any(stream._own)
    found = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("stores", [{}, {"cache": {"k": 1}}])
def test_what_blocks_write_in_stays_by_place_and_keyword(stores):
    """Each recording has new containers; those of the first one are given to every block."""
    made = []

    def record():
        made.append(({}, torch.ones(1), {}))
        return [Call((made[-1][1], made[-1][0]), {"x": 3, **stores, "shared": made[-1][2]}, None)] * 2

    calls = CallsOfTokens(record)
    for index in range(2):
        call = calls[index]
        assert call.args[0] is made[-1][1] and call.args[1] is made[0][0]
        assert (
            call.kwargs["shared"] is made[0][2]
            and call.kwargs["x"] == 3
            and call.kwargs.keys() == {"x", "shared", *stores}
        )


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma3n_shared", "gemma4_inputs", "gemma4_shared"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_arguments_that_depend_on_tokens_are_those_of_each_batch(name, batch_size):
    """Inputs of each block beside hidden states, and keys and values that later blocks share."""
    model = model_of(name)
    blocks = find_blocks(model)
    expected = [outputs_of_blocks(model, blocks, batch) for batch in IDS.split(batch_size)]
    calls = {}
    with torch.no_grad():
        for _ in range(2):  # the second stream is told what the first one has found out
            stream = BlockStream(model, blocks, IDS, batch_size, calls=calls)
            assert batch_size == 4 or all(stream._own[1:]), "calls of one shape are those of its first batch"
            for own in filter(None, stream._own):  # of its arguments nothing waits but what blocks will write in
                assert not any(tensors_in(each) for each in own._stores) and len(vars(own)) == 2
            for index in range(len(blocks)):
                stream.advance(index)
                for found, own in zip(stream.hidden, expected, strict=True):
                    assert torch.equal(found, own[index])
        if any(stream._own):
            with pytest.raises(ModelError, match="samples in another order"):
                stream.run_on(0, stream.hidden[0])


class Wrapped(nn.Module):
    """A block of a model whose ``store`` all its blocks share."""

    def __init__(self, block, index, store):
        super().__init__()
        self.block, self.index, self.store = block, index, store

    def forward(self, hidden_states, **kwargs):
        return self.block(hidden_states, **kwargs)


class Remembering(Wrapped):
    """What one block leaves behind is read by the next one: shared keys and values, residuals."""

    def forward(self, hidden_states, **kwargs):
        if self.index == 2:
            hidden_states = hidden_states + self.store["mean"]
        self.store["mean"] = hidden_states.mean((1, 2), keepdim=True)
        return super().forward(hidden_states, **kwargs)


class TakingExtra(Wrapped):
    """The model hands the second block an argument that depends on the tokens."""

    def forward(self, hidden_states, extra=None, **kwargs):
        return super().forward(hidden_states if extra is None else hidden_states * extra, **kwargs)


class NotAlone(Wrapped):
    """The second block takes away what the first one left."""

    def forward(self, hidden_states, **kwargs):
        if self.index == 0:
            self.store["left"] = True
        elif self.index == 1:
            self.store.pop("left")
        return super().forward(hidden_states, **kwargs)


def wrapped_blocks(kind):
    model, store = tiny_llama(), {}
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = kind(block, index, store)
    return model


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: wrapped_blocks(Remembering), r"model\.layers\.2: .* another output"),
        (lambda: extra_by_tokens(wrapped_blocks(TakingExtra)), r"model\.layers\.1: .* another output"),
        (lambda: wrapped_blocks(NotAlone), r"model\.layers\.1: cannot be run by itself.*KeyError: 'left'"),
    ],
)
@pytest.mark.parametrize("samples", [1, 6])
def test_blocks_that_cannot_be_replayed_are_refused_by_name(build, message, samples):
    model = build()
    with pytest.raises(ModelError, match=message):
        BlockStream(model, find_blocks(model), IDS[:samples], 1)


def extra_by_tokens(model):
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))

    def add(_module, args, kwargs):
        return args, {**kwargs, "extra": 1 + seen[-1][:, :, None] / 90}

    model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True, prepend=True)
    return model


def test_prompts_in_front_of_the_tokens():
    """Hidden states may be longer than the tokens that they come from."""
    model = tiny_llama()
    prompt = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    inner = model.model.forward

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        embedded = torch.cat([prompt.expand(len(input_ids), -1, -1), model.model.embed_tokens(input_ids)], 1)
        return inner(inputs_embeds=embedded, **kwargs)

    model.model.forward = forward
    expected = outputs_of_blocks(model, model.model.layers, IDS)[-1]
    with torch.no_grad():
        stream = BlockStream(model, find_blocks(model), IDS, 4)
        for index in range(len(model.model.layers)):
            stream.advance(index)
    assert expected.shape == (6, 19, 32)
    assert (torch.cat(stream.hidden) - expected).abs().max() <= 48 * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()


def test_a_model_that_fails_on_the_tokens_is_named():
    model = tiny_llama()
    with pytest.raises(ModelError, match="forward pass fails on calibration tokens .*IndexError"):
        BlockStream(model, find_blocks(model), IDS + 50, 1)


def test_a_block_may_work_in_its_input_s_memory():
    model = tiny_llama()
    blocks = find_blocks(model)
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 4)
        before = [hidden.clone() for hidden in stream.hidden]
        blocks.modules[0].forward = lambda hidden_states, **others: hidden_states.mul_(2)
        list(stream.run(0))
        stream.advance(0)
    assert all(torch.equal(now, 2 * then) for now, then in zip(stream.hidden, before, strict=True))
