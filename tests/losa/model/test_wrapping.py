"""Models of many architectures, wrapped and back. All are tiny, random and local."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from torch import nn

from losa.errors import ModelError
from losa.model.blocks import find_blocks, find_linears
from losa.model.norms import train_norms, trained_norms
from losa.model.wrapping import (
    merge_model,
    replace_layers,
    sparsity_of,
    unwrap_model,
    wrap_model,
    wrapped_linears,
)
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from losa.modules.pruned_linear import PrunedLinear
from losa.modules.trained_norm import TrainedNorm
from tests.helpers.decoders import COMMON, GATED, LAYERS, random_model
from tests.helpers.tiny import EPS, assert_same_function, logits, randomise, tiny_llama, wrap

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


def test_layers_are_replaced_one_by_one():
    """A new set of weights never stands beside a whole old one."""
    model = tiny_llama(layers=2)
    layers = [weakref.ref(layer) for layer in wrap(model).values()]
    held = []

    def made(layer):
        held.append(sum(each() is not None for each in layers))
        return layer.merge()

    replace_layers(model, made)
    assert held == list(range(len(layers), 0, -1)) and not any(each() for each in layers)


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


def test_a_rank_that_does_not_fit_leaves_the_model_alone():
    model = tiny_llama(layers=2)
    with pytest.raises(
        ModelError,
        match=r"expected at most 16 as a rank, the smaller side of model\.layers\.0\.self_attn\.k_proj, got ",
    ):
        wrap(model, rank=17)
    assert not wrapped_linears(model) and all(p.requires_grad for p in model.parameters())


def test_the_few_that_are_too_narrow_stay_dense(caplog):
    model = tiny_llama(layers=2)
    for layer in model.model.layers:
        layer.mlp.gate = torch.nn.Linear(32, 3)  # 96 of 9,312 weights
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model, highest_rank=16)
    assert (
        len(layers) == 2 * 7
        and "too narrow for their adapters' ranks stay dense: model.layers.0.mlp.gate" in caplog.text
    )
    unwrap_model(model)
    assert len(wrap(model, layer=PrunedLinear, highest_rank=16)) == 2 * 8, "without ranks nothing is narrow"


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


def test_layers_that_are_replaced_are_not_kept():
    """Otherwise a model's old weights would all stand beside its new ones."""
    model = tiny_llama(layers=2)
    wrap(model)
    old: list[weakref.ref] = []
    alive = []

    def merged(layer):
        alive.append(sum(other() is not None for other in old))
        old.append(weakref.ref(layer))
        return layer.merge()

    replace_layers(model, merged)
    assert len(alive) == 14 and max(alive) <= 1


def test_sparsity_counts_masks_and_zeros():
    model = tiny_llama(layers=2)
    layers = wrap(model, targets=["q_proj"])
    for layer in layers.values():
        layer.set_mask((torch.arange(32) % 4 != 0).expand(32, 32))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 0
    assert sparsity_of(model) == (2 * 32 * 8 + 32, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32))


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


def test_norms_are_trained_and_merged_or_given_back():
    model, original = tiny_llama(layers=2), tiny_llama(layers=2)
    wrap(model)
    norms = train_norms(model)
    names = [f"model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]
    assert list(norms) == [*names, "model.norm"] == list(trained_norms(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"{name}.trained_weight" for name in norms} == {n for n in trained if not n.endswith(("lora_A", "lora_B"))}
    for norm in norms.values():
        norm.trained_weight.data += 0.1
    given = original.model.norm
    with torch.no_grad(), dense_mode(model):
        assert torch.equal(logits(model), logits(original))
        assert torch.equal(model.model.norm.weight, given.weight)
    # Models read the attributes of their norms.
    assert torch.equal(model.model.norm.weight, given.weight + 0.1)
    assert model.model.norm.variance_epsilon == given.variance_epsilon and not hasattr(model.model.norm, "bias")
    half = TrainedNorm(torch.nn.LayerNorm(4, dtype=torch.bfloat16))
    assert half.bias.dtype == half.weight.dtype == torch.bfloat16 and half.trained_bias.dtype == torch.float32
    expected = logits(model)
    merge_model(model)
    assert not trained_norms(model) and model.state_dict().keys() == original.state_dict().keys()
    assert_same_function(logits(model), expected)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight + 0.1)
    wrap(model)
    train_norms(model)
    given = unwrap_model(model).model.norm.weight
    assert torch.equal(given, original.model.norm.weight + 0.1)
    wrap(bare := tiny_llama(layers=2))
    for module in list(bare.modules()):
        if "Norm" in type(module).__name__:
            del module.weight
    with pytest.raises(ModelError, match="expected norms with parameters"):
        train_norms(bare)


def test_a_kernel_of_training_that_takes_weights_is_passed_by():
    """A module that calls its linear in evaluation alone keeps evaluating: a kernel sees no mask or adapter."""
    model = tiny_llama(layers=2)
    plain = type(model.model.layers[0].mlp)

    class Fused(plain):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return nn.functional.linear(gated, self.down_proj.weight)

    mlp = model.model.layers[1].mlp
    mlp.__class__ = Fused
    wrapped = wrap(model, dropout_p=0.5)
    randomise(wrapped)
    assert "model.layers.1.mlp.down_proj" in wrapped
    evaluated = logits(model)
    model.train()
    assert model.model.layers[1].training and not mlp.training
    assert mlp.down_proj.training and not torch.equal(logits(model), evaluated), "adapters drop their inputs"
    for layer in wrapped.values():
        layer.dropout_p = 0.0
    assert torch.equal(logits(model), evaluated)
    merge_model(model)
    model.train()
    assert mlp.training and "train" not in vars(mlp)
