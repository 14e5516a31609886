"""save_pretrained of sparsified, packed and wrapped models, and output layers that only seem to be tied."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from losa.errors import ModelError
from losa.inference.generation import generate
from losa.inference.sparsify import densify, sparsify
from losa.model.blocks import block_linears
from losa.model.wrapping import merge_model, sparsity_of, unwrap_model
from losa.modules.lora import LoRALinear
from losa.modules.sparse import SparseLinear
from losa.output.export import save_model
from losa.packed.directory import load, load_any, pack_directory, unpack_directory
from tests.helpers.tiny import assert_same_function, logits, randomise, tiny_llama, tiny_tokenizer, wrap


def pruned(**settings):
    model = tiny_llama(layers=2, **settings).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight[:, 1::2] = 0
    return model


def save(model, directory):
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def reload(directory):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_a_sparsified_model_is_written_dense(settings, tmp_path):
    model = pruned(**settings)
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    sparsify(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    for path in tmp_path.iterdir():
        found = reload(path).state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state), path
    assert_same_function(logits(model), expected)  # still packed
    densify(model).save_pretrained(tmp_path / "dense")
    assert_same_function(logits(reload(tmp_path / "dense")), expected)


def test_state_dicts_of_packed_models_stay_packed():
    model = sparsify(pruned())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = sparsify(pruned())
    for module in other.modules():
        if isinstance(module, SparseLinear):
            module.values.zero_()
    other.load_state_dict(torch.load(file))
    assert "model.layers.0.mlp.up_proj.values" in other.state_dict()
    assert_same_function(logits(other), logits(model))


def test_a_whole_model_can_be_pickled(tmp_path):
    model = sparsify(pruned())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same_function(logits(again), logits(model))
    again.save_pretrained(tmp_path)
    assert_same_function(logits(reload(tmp_path)), logits(model))


@pytest.mark.parametrize("layer", [{}, {"layer": LoRALinear}])
def test_adapters_are_refused_until_they_are_merged(layer, tmp_path):
    model = tiny_llama(layers=2)
    randomise(wrap(model, **layer))
    with pytest.raises(ModelError, match="14 adapters .model.layers.0.self_attn.q_proj.*merge_model first"):
        model.save_pretrained(tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
    merge_model(model)
    save(model, tmp_path / "merged")
    assert_same_function(logits(reload(tmp_path / "merged")), logits(model))
    model = tiny_llama(layers=2)
    wrap(model)
    unwrap_model(model).save_pretrained(tmp_path / "unwrapped")
    reload(tmp_path / "unwrapped")


def config(directory):
    return json.loads((directory / "config.json").read_text())


def store(directory, change):
    path = directory / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, {"format": "pt"})


def test_an_output_layer_of_its_own_is_kept_and_stated(tmp_path):
    source = save(pruned(tie_word_embeddings=True), tmp_path / "model")
    store(source, lambda t: t | {"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])})
    truth = reload(source)
    assert config(source)["tie_word_embeddings"] is True
    pack_directory(source, tmp_path / "packed")
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    save_model(truth, tiny_tokenizer(), tmp_path / "export", untied=True)
    for directory in ("packed", "dense", "export"):
        assert config(tmp_path / directory)["tie_word_embeddings"] is False
        loaded, tokenizer = load_any(tmp_path / directory, device="cpu")
        assert torch.equal(loaded.lm_head.weight, truth.lm_head.weight)
        assert_same_function(logits(loaded), logits(truth))
    # The lean loop has an output layer of its own to take.
    settings = {"max_new_tokens": 4, "stop_at_eos": False}
    expected = generate(truth, tokenizer, "the old mill", **settings).tokens
    assert generate(load(tmp_path / "packed")[0], tokenizer, "the old mill", **settings).tokens == expected
    # Through pruning: wrapping, merging and packing in memory leave both alone.
    wrapped = copy.deepcopy(truth)
    wrap(wrapped)
    assert_same_function(logits(sparsify(merge_model(wrapped))), logits(truth))


def test_what_the_file_has_decides_the_other_ways_too(tmp_path):
    """Equal copies are one; the output layer alone serves both; one of two that are not tied is missing."""
    model = pruned(tie_word_embeddings=True)
    source = save(model, tmp_path / "model")
    store(source, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    pack_directory(source, tmp_path / "equal")
    loaded, _ = load(tmp_path / "equal")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert config(tmp_path / "equal")["tie_word_embeddings"] is True
    store(source, lambda t: {n: v for n, v in t.items() if n != "model.embed_tokens.weight"})
    pack_directory(source, tmp_path / "head")
    assert_same_function(logits(load(tmp_path / "head")[0]), logits(model))
    (source / "config.json").write_text(json.dumps(config(source) | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="tensors are missing: model.embed_tokens.weight"):
        pack_directory(source, tmp_path / "untied")


def test_zeros_of_loaded_packed_models_are_counted(tmp_path):
    model = pruned()
    pack_directory(save(model, tmp_path / "model"), tmp_path / "packed")
    assert sparsity_of(load(tmp_path / "packed")[0]) == sparsity_of(model)
