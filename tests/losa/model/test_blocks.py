"""Decoder blocks and the linears in them are found by structure: targets, experts, shared weights, unclear models."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from losa.errors import ModelError
from losa.model.blocks import find_blocks, find_linears
from losa.model.wrapping import sparsity_of, wrapped_linears
from tests.helpers.decoders import COMMON, GATED, LAYERS, random_model
from tests.helpers.tiny import assert_same_function, logits, tiny_llama, wrap


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["up_proj", "q_proj"], ["self_attn.q_proj", "mlp.up_proj"]),
        (["self_attn.k_proj"], ["self_attn.k_proj"]),
        ("v_proj", ["self_attn.v_proj"]),
        ("re:[kv]_proj$", ["self_attn.k_proj", "self_attn.v_proj"]),
        ("re:^mlp", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        (["re:^mlp.*up", "o_proj"], ["self_attn.o_proj", "mlp.up_proj"]),
    ],
)
def test_targets(targets, expected):
    model = tiny_llama(layers=2)
    found = find_blocks(model)
    prefix, blocks = found.prefix, found.modules
    assert list(find_linears(blocks[1], targets)) == expected
    layers = wrap(model, targets=targets)
    assert list(layers) == [f"{prefix}.{i}.{n}" for i in range(2) for n in expected]
    zeros, prunable = sparsity_of(model)
    assert zeros == 0 and prunable == sum(m.weight.numel() for b in blocks for m in find_linears(b).values())


@pytest.mark.parametrize("targets", [["q_proj", "nope"], "proj", "re:lm_head", ["re:("]])
def test_targets_that_match_nothing_are_errors(targets):
    model = tiny_llama(layers=2)
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match="targets: 're:|targets: '(nope|proj)' matches no linear.*mlp.up_proj"):
        wrap(model, targets=targets)
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_a_mixture_of_experts_keeps_routers_dense(caplog):
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    model = random_model(config)
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model)
    experts = [f"mlp.experts.{e}.{name}_proj" for e in range(4) for name in ("gate", "up", "down")]
    assert sorted(n.split(".", 3)[3] for n in layers) == sorted((GATED[:4] + experts) * LAYERS)
    assert not caplog.text and logits(model).isfinite().all()


class Gates(nn.Module):
    """A recurrent mixer: a matrix a head, and a value a channel."""

    def __init__(self, heads=4):
        super().__init__()
        self.gate_weight = nn.Parameter(torch.randn(heads, 4, 4))
        self.gate_bias = nn.Parameter(torch.zeros(heads, 4))
        self.decay = nn.Parameter(torch.zeros(16))


class Mixer(nn.Module):
    """Matrices a head beside linears of its own."""

    def __init__(self, heads=4):
        super().__init__()
        self.x_proj_weight = nn.Parameter(torch.randn(heads, 4, 4))
        self.in_proj = nn.Linear(16, 16)


class Stack(nn.Module):
    """Experts with biases, of which one stack holds two more that compute nothing."""

    def __init__(self, experts=4):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts + 2, 16, 32))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts + 2, 32))
        self.down_proj = nn.Parameter(torch.randn(experts, 16, 16))
        self.act_fn = nn.SiLU()


@pytest.mark.parametrize("part, stacked", [(Gates, []), (Mixer, []), (Stack, ["gate_up_proj", "down_proj"])])
def test_experts_are_told_from_heads_by_structure(caplog, part, stacked):
    def block():
        return nn.ModuleDict({"mixer": part(), "per_head": nn.Linear(16, 6), "out": nn.Linear(16, 16)})

    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(nn.Sequential(nn.ModuleList(block() for _ in range(2))), rank=2)
    assert [f"mixer.{name}" in caplog.text for name in stacked] == [True] * len(stacked)
    assert bool(caplog.text) == bool(stacked)
    # Beside experts a linear with an output for each is a router.
    assert ("0.0.per_head" in layers) == (not stacked) and "0.0.out" in layers


class Experts(nn.Module):
    """A block in the older style: a router beside a list of experts."""

    def __init__(self, count=4):
        super().__init__()
        self.mixer = nn.Linear(16, 16)
        self.moe = nn.Module()
        self.moe.gating = nn.Sequential(nn.Linear(16, count))
        self.moe.shared_gate = nn.Linear(16, 1)
        self.moe.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, count), nn.Linear(count, 16)) for _ in range(count)
        )


def test_expert_lists_are_pruned_and_routers_are_not():
    names = ["mixer"] + [f"moe.experts.{i}.{j}" for i in range(4) for j in range(2)]
    model = nn.Sequential(nn.ModuleList(Experts() for _ in range(2)))
    assert find_blocks(model).prefix == "0" and find_blocks(nn.Sequential(model[0][:1])).prefix == "0"
    assert list(find_linears(Experts())) == names
    wrap(model, rank=2)
    assert [n for n in wrapped_linears(model) if n.startswith("0.1.")] == [f"0.1.{n}" for n in names]
    assert list(find_linears(model[0][0])) == names


def test_shared_linears_stay_dense(caplog):
    model = tiny_llama(layers=2)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[0].self_attn.v_proj = layers[0].self_attn.k_proj
    dense = logits(model)
    assert "mlp.up_proj" in find_linears(layers[0]) and "mlp.up_proj" not in find_linears(layers[0], model=model)
    assert not {"self_attn.k_proj", "self_attn.v_proj"} & find_linears(layers[0]).keys()
    with caplog.at_level(logging.WARNING, logger="losa"):
        wrapped = wrap(model)
    left = {f"model.layers.{n}" for n in ("0.mlp.up_proj", "1.mlp.up_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")}
    assert len(wrapped) == 2 * 7 - 4 and not left & wrapped.keys()
    assert "shared weight" in caplog.text and "1.mlp.up_proj" in caplog.text
    assert_same_function(logits(model), dense)


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


class Choosy(nn.Linear):
    """A router: it gives more than a product."""

    def forward(self, x):
        return x @ self.weight.T, x


class InOtherWords(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def test_linears_are_told_by_what_they_compute():
    block = nn.ModuleDict({"plain": nn.Linear(8, 8), "own": Quantised(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    block.update({"words": InOtherWords(8, 8), "choosy": Choosy(8, 8)})
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        assert list(find_linears(block)) == ["plain", "words"]
    assert torch.equal(torch.random.get_rng_state(), state)


def config_only(encoder_decoder=False):
    return SimpleNamespace(is_encoder_decoder=encoder_decoder)


def listed(**lists):
    model = nn.Module()
    for name, blocks in lists.items():
        setattr(model, name, nn.ModuleList(blocks))
    return model


class Other(nn.Sequential):
    """A second class of blocks."""


def block(kind=nn.Sequential, width=8):
    return kind(nn.Linear(width, width))


def test_the_largest_list_is_the_decoder():
    model = listed(vision=[block(width=4) for _ in range(2)], text=[block() for _ in range(3)])
    found = find_blocks(model)
    assert (found.prefix, found.modules) == ("text", model.text)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4), "found no repeated blocks.*no nn.ModuleList"),
        (listed(a=[block(), block()], b=[block(), block()]), r"cannot tell.*'a' \(2 x Sequential\).*'b'"),
        (listed(a=[block(), Other(nn.Linear(8, 8)), nn.Identity()]), "hold linears, which Identity does not; saw 'a'"),
        (listed(a=[nn.Linear(4, 4), nn.Linear(4, 4)]), "not linears.*2 x Linear"),
    ],
    ids=["none", "ambiguous", "mixed", "bare linears"],
)
def test_models_without_clear_blocks(model, message):
    with pytest.raises(ModelError, match=message):
        find_blocks(model)


def test_a_model_without_linears_says_what_it_has_instead():
    model = listed(h=[nn.Sequential(nn.Conv1d(4, 4, 1)) for _ in range(2)])
    with pytest.raises(ModelError, match=r"'h' \(2 x Sequential\) with no nn.Linear \(weights live in Conv1d\)"):
        wrap(model)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))


def test_blocks_are_one_value():
    model = tiny_llama(layers=3)
    blocks = find_blocks(model)
    assert len(blocks) == 3 and blocks.prefix == "model.layers" and blocks.modules is model.model.layers
    assert blocks.names == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert [*blocks] == [model.get_submodule(name) for name in blocks.names]
    linears = blocks.linears()
    assert all(model.get_submodule(name) is linear for name, linear in linears.items()) and len(linears) == 21
    assert list(blocks.linears("up_proj")) == [f"{name}.mlp.up_proj" for name in blocks.names]
    names = ("model.layers.1.mlp.up_proj.weight", "model.layers.12.x", "model.norm.weight", "model.layers.one", "2.x")
    assert [blocks.index_of(name) for name in names] == [1, 12, None, None, None]
    # A weight that something outside the blocks shares is not prunable.
    model.lm_head.weight = model.model.layers[0].self_attn.q_proj.weight
    assert len(blocks.linears()) == 20
