"""Packed directories of models whose tensors are called otherwise on disk, or are read past their linears."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from losa.errors import ModelError
from losa.inference.sparsify import sparsify
from losa.model.blocks import block_linears
from losa.model.naming import Naming
from losa.modules.sparse import SparseLinear
from losa.packed.directory import load, pack_directory, unpack_directory
from tests.helpers.tiny import assert_same_function, logits, tiny_llama, tiny_tokenizer

SIZES = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None}
SIZES |= {"pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# (settings, a name on disk that is not the model's, linears that stay dense)
KINDS = {
    "GPTNeoX": ({"tie_word_embeddings": False}, "embed_out.weight", 0),
    "Qwen3Moe": (EXPERTS, "model.layers.1.mlp.experts.3.up_proj.weight", 0),
    "DeepseekV3": (
        LATENT | ROUTED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
        "model.layers.1.mlp.experts.0.down_proj.weight",
        0,
    ),
    "Mamba": ({"state_size": 4, "time_step_rank": 4, "use_mambapy": False}, None, 2),
}


def pruned(model):
    for linear in block_linears(model).values():
        linear.weight.data[:, ::2] = 0
    return model.requires_grad_(False)


def build(kind):
    torch.manual_seed(0)
    settings = SIZES | KINDS[kind][0]
    config = getattr(transformers, f"{kind}Config")(**settings)
    return pruned(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def save(model, directory):
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def contents(directory):
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def same_tensors(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_it_is_the_same_function_and_comes_back(kind, tmp_path):
    model = build(kind)
    source = save(model, tmp_path / "model")
    _, stored, direct = KINDS[kind]
    linears = block_linears(model)
    assert stored is None or (stored in contents(source) and stored not in model.state_dict())
    report = pack_directory(source, tmp_path / "packed")
    assert (report.packed, report.dense) == (len(linears) - direct, direct)
    loaded, _ = load(tmp_path / "packed")
    assert {n for n, m in loaded.named_modules() if isinstance(m, SparseLinear)} <= linears.keys()
    assert_same_function(logits(loaded), logits(model))
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    same_tensors(tmp_path / "dense", source)
    # transformers' own saving of what was loaded: names on disk again.
    loaded.save_pretrained(tmp_path / "saved")
    same_tensors(tmp_path / "saved", source)


def test_linears_that_a_model_reads_itself_stay_dense_in_memory_too():
    model = build("Mamba")
    expected = logits(model)
    sparsify(model)
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith(("dt_proj", "in_proj"))}
    assert {n.rpartition(".")[2] for n, kind in kinds.items() if kind is SparseLinear} == {"in_proj"}
    assert_same_function(logits(model), expected)


def edit(directory, change):
    path = directory / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


def test_a_base_models_names_and_buffers_of_old(tmp_path):
    """Names without the prefix of the model with a head, and buffers that transformers no longer has."""
    model = pruned(tiny_llama(layers=2, tie_word_embeddings=True))
    source = save(model, tmp_path / "model")

    def change(tensors):
        renamed = {name.removeprefix("model."): t for name, t in tensors.items()}
        return renamed | {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}

    edit(source, change)
    assert pack_directory(source, tmp_path / "packed").packed == 14
    loaded, _ = load(tmp_path / "packed")
    assert_same_function(logits(loaded), logits(model))
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    same_tensors(tmp_path / "dense", source)


def test_weights_are_kept_in_the_type_that_transformers_keeps_them_in(tmp_path):
    model = pruned(tiny_llama(layers=2).bfloat16())
    source = save(model, tmp_path / "model")
    edit(source, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].float()})
    pack_directory(source, tmp_path / "packed")
    loaded, _ = load(tmp_path / "packed")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert loaded.model.norm.weight.dtype == dense.model.norm.weight.dtype == torch.bfloat16
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    pack_directory(source, tmp_path / "again")
    assert load(tmp_path / "again")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.layers.9.mlp.up_proj.weight": torch.ones(4, 4)}, "that there are 2 blocks"),
        (lambda t: {n: v for n, v in t.items() if "experts.2" not in n}, "tensors do not make|expected shape"),
        (lambda t: t | {"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(3, 3)}, "experts.0.*do not make"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith("model.norm")}, "missing: model.norm.weight"),
        (lambda t: t | {f"model.layers.{'7' * 5000}.x": torch.ones(1)}, "5015 characters.: no model has a tensor"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_before_anything_is_written(change, message, tmp_path):
    source = save(build("Qwen3Moe"), tmp_path / "model")
    edit(source, change)
    with pytest.raises(ModelError, match=message):
        pack_directory(source, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_used_afterwards_gets_no_name(tmp_path):
    source = save(build("GPTNeoX"), tmp_path / "model")
    (source / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=f"nothing was written.*{source}: generation_config.json"):
        pack_directory(source, tmp_path / "packed")
    (source / "generation_config.json").unlink()
    edit(source, lambda tensors: {n: t * (1e30 if "dense_4h" in n else 1) for n, t in tensors.items()})
    with pytest.raises(ModelError, match="nothing was written.*logits are not finite"):
        pack_directory(source, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_names_follow_ties():
    tied = Naming(tiny_llama(layers=1, tie_word_embeddings=True), [])
    every = tied.expected.keys()
    assert tied.missing(every - {"lm_head.weight"}) == tied.missing(every - {"model.embed_tokens.weight"}) == []
    assert len(tied.missing(every - {"lm_head.weight", "model.embed_tokens.weight"})) == 2
    untied = Naming(tiny_llama(layers=1), [])
    assert untied.missing(every - {"lm_head.weight"}) == ["lm_head.weight"]
