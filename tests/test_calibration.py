"""Streaming calibration: block by block gives what one forward pass gives, within a stated bound of memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from losa.calibration import BlockStream, ErrorMeter, collect
from losa.errors import ModelError, NumericsError
from losa.model import find_blocks, find_linears
from losa_kernels import gram
from tests.tiny import tiny_llama

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


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_opt])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stream_equals_a_whole_forward_pass(build, batch_size):
    model = build()
    _, blocks = find_blocks(model)
    expected = outputs_of_blocks(model, blocks, IDS)
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, batch_size)
        for index in range(len(blocks)):
            stream.advance(index)
            got = torch.cat(stream.hidden)
            # Two orders of fp32 sums over at most 48 terms: a few units in the last place of the largest value.
            bound = 48 * torch.finfo(torch.float32).eps * expected[index].abs().max()
            assert (got - expected[index]).abs().max() <= bound


def test_memory_between_blocks_is_the_stated_bound():
    model = tiny_llama(layers=6)
    _, blocks = find_blocks(model)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
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
                for t in gc.get_objects()
                if isinstance(t, torch.Tensor) and t.shape[-1:] == (32,) and t.dim() == 3
            }
            held.append(sum(n for pointer, n in live.items() if pointer not in known))
    assert max(held) <= stream.nbytes + calls
    assert held[0] == held[-1], "memory grows with depth"


def test_gram_of_a_stream_is_the_gram_of_all_features():
    model = tiny_llama()
    _, blocks = find_blocks(model)
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 4)
        stream.advance(0)
        whole = gram(torch.cat(stream.hidden).flatten(1).double())
        sliced = stream.gram(slice_features=6 * 37)
    assert sliced.shape == (6, 6)
    assert torch.allclose(sliced.double(), whole.double(), rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_collectors_equal_direct_statistics_and_share_inputs():
    model = tiny_llama()
    name, blocks = find_blocks(model)
    linears = find_linears(blocks[0])
    inputs: dict[str, list] = {n: [] for n in linears}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, n=n: inputs[n].append(a[0].flatten(0, 1).double()))
        for n, m in linears.items()
    ]
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 4)
        for statistic in ("input_norms", "hessian"):
            for values in inputs.values():
                values.clear()
            with collect(linears, statistic, name, lambda: stream.position) as results:
                for _ in stream.run(0):
                    pass
            for n in linears:
                x = torch.cat(inputs[n])
                expected = x.norm(dim=0) if statistic == "input_norms" else x.T @ x
                error = (results[n].double() - expected).abs().max()
                assert error <= len(x) * torch.finfo(torch.float32).eps * expected.abs().max()
            assert results["self_attn.q_proj"] is results["self_attn.v_proj"]
            assert results["mlp.gate_proj"] is results["mlp.up_proj"]
            assert results["mlp.gate_proj"] is not results["self_attn.q_proj"]
    for handle in handles:
        handle.remove()


def test_non_finite_input_names_block_linear_and_sample():
    model = tiny_llama()
    _, blocks = find_blocks(model)
    linears = find_linears(blocks[0])
    with torch.no_grad():
        stream = BlockStream(model, blocks, IDS, 2)
        stream.hidden[1][0, 3, 5] = float("nan")
        with (
            pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj.*samples 2\.\.3"),
            collect(linears, "input_norms", "model.layers.0", lambda: stream.position),
        ):
            for _ in stream.run(0):
                pass


def test_arguments_that_depend_on_tokens_are_refused():
    model = tiny_llama()
    _, blocks = find_blocks(model)
    original = blocks[0].forward
    embed = model.model.embed_tokens

    class Inner(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_states, side=None, **kwargs):
            return self.block(hidden_states, **kwargs)

    model.model.layers[0] = Inner(blocks[0])
    inner_forward = model.model.forward

    def forward(input_ids=None, **kwargs):
        side = embed(input_ids).sum(-1)
        hook = model.model.layers[0].register_forward_pre_hook(
            lambda _m, a, k: (a, {**k, "side": side}), with_kwargs=True, prepend=True
        )
        try:
            return inner_forward(input_ids=input_ids, **kwargs)
        finally:
            hook.remove()

    model.model.forward = forward
    with pytest.raises(ModelError, match="depend on the tokens"):
        BlockStream(model, model.model.layers, IDS, 1)
    assert original is not None


def test_error_meter():
    torch.manual_seed(0)
    dense, sparse = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    d, s = dense.flatten(0, 1).double(), sparse.flatten(0, 1).double()
    relative = (((d - s) / d.norm(dim=0)) ** 2).sum() / 16
    frobenius = (d - s).norm()
    for kind, expected in (("relative", relative), ("frobenius", frobenius)):
        meter = ErrorMeter(16, kind)
        for part in range(4):
            meter.update(dense[part : part + 1], sparse[part : part + 1])
        assert meter.result() == pytest.approx(expected.item(), rel=1e-5)
