"""Models without some of their heads and channels: the masked model's function in smaller shapes."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round
from losa.algorithm.structure import find_structure, shrink
from losa.errors import ModelError, OutputError, RecipeError
from losa.model import shrinking
from losa.model.blocks import block_linears
from losa.model.wrapping import merge_model, sparsity_of, wrapped_linears
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa_kernels import unpack_mask
from tests.helpers.families import family
from tests.helpers.tiny import EPS, IDS, logits, tiny_llama, wrap

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "eos_token_id": 1,
}  # fmt: skip
# What is asked for, and what config.json then says: heads, key heads, channels.
MODELS = {
    "Llama": ({"attention_bias": True, "mlp_bias": True}, 0.5, (4, 2, 25)),  # 5 and 7 heads do not divide 48
    "Mistral": ({"head_dim": 8, "tie_word_embeddings": True}, 0.7, (2, 2, 13)),
    "Qwen2": ({}, 0.25, (6, 3, 38)),  # biases, and a configuration without head_dim
    "Qwen3": ({"head_dim": 16}, 0.5, (4, 2, 25)),  # norms of heads
    "Gemma": ({"head_dim": 8, "num_key_value_heads": 1}, 0.5, (4, 1, 22)),  # all heads share one key head
}


def model_of(kind: str, **changes):
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero
            torch.nn.init.normal_(parameter)
    return model.eval()


def pruned_and_merged(model, sparsity: float, rates="uniform") -> dict[str, torch.Tensor]:
    """Two rounds with something like training after each; the masks."""
    layers = wrap(model)
    prune, calibration = PruneConfig(pruner="wanda_sp", sparsity=sparsity), CalibrationConfig(data="unused")
    engine = Engine(model, IDS, prune, AllocationConfig(rates=rates, mean_rank=4), calibration)
    for index, share in enumerate((0.4 * sparsity, sparsity), start=1):
        engine.run_round(Round(index, share, 4, 0))
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    masks = {name: layer.mask.detach().clone() for name, layer in wrapped_linears(model).items()}
    merge_model(model)
    return masks


@pytest.mark.parametrize("kind", MODELS)
def test_the_smaller_model_computes_what_the_masked_one_computes(kind, tmp_path):
    changes, sparsity, (heads, groups, channels) = MODELS[kind]
    model = model_of(kind, **changes)
    masks = pruned_and_merged(model, sparsity)
    expected, (zeros, prunable) = logits(model), sparsity_of(model)
    new_masks, record = shrink(model, masks, IDS)
    head_dim = record.config["head_dim"][0]
    assert {key: after for key, (_, after) in record.config.items()} == {
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
        "intermediate_size": channels,
    }  # fmt: skip
    # As near as a channel allows, and what is gone are the zeros.
    assert zeros / prunable == pytest.approx(sparsity, abs=1.5 * 48 * 2 / prunable + 1e-9)
    assert record.removed == zeros and sparsity_of(model) == (0, prunable - zeros)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    queries, keys = heads * head_dim, groups * head_dim
    shapes = {
        "q_proj": (queries, 48), "k_proj": (keys, 48), "v_proj": (keys, 48), "o_proj": (48, queries),
        "gate_proj": (channels, 48), "up_proj": (channels, 48), "down_proj": (48, channels),
    }  # fmt: skip
    for name, linear in block_linears(loaded).items():
        assert tuple(linear.weight.shape) == shapes[name.rpartition(".")[2]]
        kept = unpack_mask(new_masks[name], linear.in_features)
        assert kept.shape == linear.weight.shape and bool(kept.all())
    for found in (logits(model), logits(loaded)):
        # Two blocks of sums in another order; a wrong head or bias is off by more than a hundredth.
        assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()


def test_rates_that_differ_between_blocks_are_refused():
    with pytest.raises(RecipeError, match="allocation.rates: expected uniform, got 'cka': prune.pruner 'wanda_sp'"):
        pruned_and_merged(tiny_llama(layers=2), 0.5, rates="cka")


REFUSED = {
    "OPT": "type 'opt': expected q_proj, .*found fc1, fc2, k_proj, out_proj",
    "GPTNeoX": "type 'gpt_neox': expected q_proj.*found dense, dense_4h",
    "Qwen3Moe": "type 'qwen3_moe': expected .*gate_proj.* found k_proj, o_proj, q_proj, v_proj$",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_models_are_refused(kind):
    with pytest.raises(ModelError, match=REFUSED[kind]):
        find_structure(family(kind))


def test_models_that_depend_on_their_heads_elsewhere_are_refused():
    # Norms over all heads together, which have a weight for every feature of every head.
    with pytest.raises(ModelError, match="type 'olmo2': expected other shapes of q_proj.*q_norm.weight has shape"):
        find_structure(model_of("Olmo2"))
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48)
    with pytest.raises(
        ModelError, match=r"expected model.layers.1.mlp.up_proj of shape \(64, 32\) by .*found \(48, 32\)"
    ):
        find_structure(model)


def test_a_smaller_model_that_differs_is_not_written(monkeypatch):
    model = tiny_llama(layers=2)
    masks = pruned_and_merged(model, 0.5)
    # Another head than the one whose rows and columns are zero.
    for role, dim, message in (
        ("o_proj", 1, "^model.layers.0: expected masks of q_proj and o_proj that keep the same"),
        ("q_proj", 0, "expected zeros in pruned rows and columns"),
    ):
        masks[f"model.layers.0.self_attn.{role}"] = masks[f"model.layers.0.self_attn.{role}"].flip(dim)
        with pytest.raises(ModelError, match=message):
            shrink(model, masks, IDS)
    monkeypatch.setattr(shrinking, "_check_zeros", lambda *_: None)
    with pytest.raises(OutputError, match="logits of the smaller model differ"):
        shrink(model, masks, IDS)
    single = dict(masks)
    up = single["model.layers.1.mlp.up_proj"] = masks["model.layers.1.mlp.up_proj"].clone()
    up[up.any(1).nonzero()[0], 0] &= 0xFE
    with pytest.raises(
        ModelError, match="model.layers.1.mlp.up_proj: expected a mask that prunes whole rows and columns"
    ):
        shrink(tiny_llama(layers=2), single, IDS)
