"""Models: discovery over architectures, wrapping and back, targets. All models are tiny, random and local."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from losa.errors import ModelError
from losa.model.blocks import find_blocks, find_linears
from losa.model.wrapping import merge_model, sparsity_of, unwrap_model, wrap_model, wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from tests.helpers.tiny import EPS, VOCABULARY, assert_same_function, logits, randomise, tiny_llama, wrap

LAYERS = 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GATED = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}, GATED),
    "llama one kv head": (transformers.LlamaConfig, {"num_key_value_heads": 1}, GATED),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}, GATED),
    "mistral": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": 4}, GATED),
    "qwen2": (transformers.Qwen2Config, {}, GATED),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}, GATED),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 4}, GATED),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4}, GATED),
    "opt": (
        transformers.OPTConfig,
        {"ffn_dim": 48, "word_embed_proj_dim": 16},
        [f"self_attn.{n}_proj" for n in "kvq"] + ["self_attn.out_proj", "fc1", "fc2"],
    ),
}


def build(name):
    config_class, settings, _ = ARCHITECTURES[name]
    return random_model(config_class(**(COMMON | settings)))


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero after initialisation, where a lost bias would not show
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrap_merge_unwrap(name):
    model, expected = build(name), ARCHITECTURES[name][2]
    original, parameters, dense = copy.deepcopy(model), dict(model.named_parameters()), logits(model)

    found = find_blocks(model)
    prefix, blocks = found.prefix, found.modules
    assert len(blocks) == LAYERS and model.get_submodule(prefix) is blocks
    assert list(find_linears(blocks[0])) == expected

    layers = wrap(model)
    assert list(layers) == [f"{prefix}.{i}.{n}" for i in range(LAYERS) for n in expected]
    assert list(wrapped_linears(model).items()) == list(layers.items())
    assert all(model.get_submodule(n) is m for n, m in layers.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.{a}" for n in layers for a in ("lora_A", "lora_B")
    }
    # Embeddings, head and norms are the very same parameters.
    rest = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[0] not in layers}
    assert rest and all(p is parameters[n] for n, p in rest.items())
    again = find_blocks(model)
    assert list(find_linears(blocks[0])) == expected and (again.prefix, again.modules) == (prefix, blocks)
    assert_same_function(logits(model), dense)

    randomise(layers)
    wrapped, zeros = logits(model), sparsity_of(model)
    assert (wrapped - dense).abs().max() > 1000 * EPS * dense.abs().max()
    merged = merge_model(copy.deepcopy(model))
    assert not wrapped_linears(merged) and sparsity_of(merged) == zeros
    assert {type(m) for m in find_linears(find_blocks(merged).modules[1]).values()} == {nn.Linear}
    assert_same_function(logits(merged), wrapped)
    assert merged.state_dict().keys() == original.state_dict().keys()

    assert unwrap_model(model) is model and not wrapped_linears(model)
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), dense)


def test_tied_embeddings_stay_tied():
    model = build("llama tied")
    randomise(wrap(model))
    merge_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("lm_head" in n or "embed" in n for n in wrap(model))


def test_adapters_are_seeded_by_name():
    first, same, other, fewer = (tiny_llama() for _ in range(4))
    every = wrap(first, seed=5)
    assert all(torch.equal(m.lora_A, every[n].lora_A) for n, m in wrap(same, seed=5).items())
    assert not any(torch.equal(m.lora_A, every[n].lora_A) for n, m in wrap(other, seed=6).items())
    chosen = wrap(fewer, seed=5, targets=["down_proj", "q_proj"])
    assert all(torch.equal(m.lora_A, every[n].lora_A) for n, m in chosen.items())
    assert len({m.lora_A.flatten()[0].item() for m in every.values()}) == len(every)


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


def test_a_rank_that_does_not_fit_leaves_the_model_alone():
    model = tiny_llama(layers=2)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj: rank: expected 1\.\.16"):
        wrap(model, rank=17)
    assert not wrapped_linears(model) and all(p.requires_grad for p in model.parameters())


def test_wrapping_twice_is_an_error():
    model = tiny_llama(layers=2)
    wrap(model, targets=["q_proj"])
    with pytest.raises(ModelError, match="already wrapped"):
        wrap(model)


def test_layer_class_and_settings_are_passed_on():
    layers = wrap(tiny_llama(layers=2), layer=LoRALinear, rank=3, scaling=0.5, dropout_p=0.1)
    assert {(type(m), m.rank, m.scaling, m.dropout_p, m.training) for m in layers.values()} == {
        (LoRALinear, 3, 0.5, 0.1, False)
    }


def test_wrapping_shares_memory_with_the_original():
    model = tiny_llama(layers=2)
    weights = {n: m.weight.data_ptr() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all(m.weight.data_ptr() == weights[n] for n, m in wrap(model).items())


def test_sparsity_counts_masks_and_zeros():
    model = tiny_llama(layers=2)
    layers = wrap(model, targets=["q_proj"])
    for layer in layers.values():
        layer.set_mask((torch.arange(32) % 4 != 0).expand(32, 32))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 0
    assert sparsity_of(model) == (2 * 32 * 8 + 32, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32))


def test_a_mixture_of_experts_keeps_routers_and_fused_experts_dense(caplog):
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    model = random_model(config)
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model)
    assert [n.split(".", 3)[3] for n in layers] == GATED[:4] * LAYERS
    assert "stacked expert weights" in caplog.text and "mlp.experts.down_proj" in caplog.text
    assert logits(model).isfinite().all()


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


def test_linears_with_another_forward_stay_dense():
    block = nn.ModuleDict({"plain": nn.Linear(8, 8), "own": Quantised(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    assert list(find_linears(block)) == ["plain"]


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
        (listed(a=[block(), block(Other)]), "of one class.*1 x Sequential, 1 x Other"),
        (listed(a=[nn.Linear(4, 4), nn.Linear(4, 4)]), "of one class.*2 x Linear"),
    ],
    ids=["none", "ambiguous", "mixed", "bare linears"],
)
def test_models_without_clear_blocks(model, message):
    with pytest.raises(ModelError, match=message):
        find_blocks(model)


def test_gpt2_says_what_it_has_instead():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    with pytest.raises(
        ModelError, match=r"'transformer.h' \(2 x GPT2Block\) with no nn.Linear \(weights live in Conv1D\)"
    ):
        wrap(model)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))


def test_import_is_light():
    code = "import sys, losa; losa.__version__; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    import losa

    assert losa.MaskedLoRALinear is MaskedLoRALinear and losa.wrap_model is wrap_model
    assert losa.merge_model is merge_model and callable(losa.load_recipe)
    assert {"run_recipe", "load_recipe", "wrap_model"} <= set(dir(losa))
    with pytest.raises(AttributeError, match="no_such_name"):
        losa.no_such_name  # noqa: B018
