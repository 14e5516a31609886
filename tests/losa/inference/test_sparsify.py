"""Packed models: surgery there and back, grouped rows, packed files; the lean generation loop against transformers."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
import transformers
from torch import nn

from losa.errors import LosaError, ModelError, OutputError
from losa.inference.decoding import LeanDecoder, Unsupported
from losa.inference.generation import choose, generate
from losa.inference.sparsify import densify, sparsify
from losa.inference.waiting_decoders import _looks, _waiting
from losa.model.wrapping import merge_model, sparsity_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear
from losa.packed import directory as files
from losa.packed.weights import pack_weight
from losa_kernels.packing import PackedBitmask, PackedNM
from losa_kernels.packing.rows import join_rows, take_rows
from losa_kernels.tensors import as_bits
from tests.helpers.tiny import assert_same_function, logits, randomise, tiny_llama, tiny_tokenizer, wrap
from tests.losa.model.test_wrapping import COMMON, random_model


@pytest.fixture
def merged():
    """As a run leaves it: 60 % zeros and a trained adapter merged in."""
    model = tiny_llama(layers=2, tie_word_embeddings=True)
    layers = wrap(model)
    randomise(layers)
    for layer in layers.values():
        layer.set_mask(torch.rand(layer.weight.shape) < 0.4)
    return merge_model(model).requires_grad_(False)


def test_sparsify_and_back(merged):
    dense, expected, zeros = copy.deepcopy(merged), logits(merged), sparsity_of(merged)
    sparsify(merged)
    packed = [m for m in merged.modules() if isinstance(m, SparseLinear)]
    assert len(packed) == 14 and not any(isinstance(m, nn.Linear) for m in merged.model.modules())
    assert_same_function(logits(merged), expected)
    assert sparsity_of(merged) == zeros
    densify(merged)
    for (name, ours), theirs in zip(merged.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(as_bits(ours), as_bits(theirs)), name


def test_groups_share_memory_and_moving_unshares(merged):
    sparsify(merged)
    attention = merged.model.layers[0].self_attn
    group = attention.q_proj.group
    assert group is attention.k_proj.group is attention.v_proj.group and attention.o_proj.group is None
    x = torch.randn(3, 32)
    together = nn.functional.linear(x, group.unpack())
    apart = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    assert (together - apart).abs().max() <= 64 * torch.finfo(torch.float32).eps * apart.abs().max()
    storage = attention.q_proj.packed.values.untyped_storage().data_ptr()
    assert storage == attention.v_proj.packed.values.untyped_storage().data_ptr() == group.values.data_ptr()
    merged.to(torch.bfloat16)
    assert attention.q_proj.group is None and attention.q_proj.packed.dtype == torch.bfloat16
    assert attention.q_proj(x.bfloat16()).dtype == torch.bfloat16


def test_zeros_of_either_sign_are_dropped():
    weight = torch.tensor([[0.0, -0.0, 1.5, 0.0, float("inf"), 0.0, 0.0, -2.0]])
    packed = pack_weight(weight, "bitmask")
    assert packed.values.tolist() == [1.5, float("inf"), -2.0]
    assert torch.equal(as_bits(packed.unpack()), as_bits(weight + 0.0))


@pytest.mark.parametrize(
    ("groups", "pattern"),
    [([0, 1], (2, 4)), ([1], (1, 4)), ([0, 1, 2, 3], (4, 8)), ([2, 3, 7], (3, 8)), ([0, 1, 2, 3, 4], (5, 8))],
)
def test_patterns_are_found(groups, pattern):
    weight = torch.zeros(4, 32)
    keep_n, m = pattern
    period = [c for c in range(32) if c % (m if (m == 4 or max(groups) < m) else 8) in groups]
    weight[:, period] = torch.randn(4, len(period))
    packed = pack_weight(weight)
    assert isinstance(packed, PackedNM) and (packed.keep_n, packed.m) == pattern
    assert torch.equal(packed.unpack(), weight)


def test_irregular_weights_take_a_bitmask():
    weight = torch.randn(16, 64) * (torch.rand(16, 64) > 0.6)
    assert isinstance(pack_weight(weight), PackedBitmask)
    assert isinstance(pack_weight(weight, "nm"), PackedNM)
    with pytest.raises(ValueError, match="format: expected one of auto, bitmask, nm, got 'csr'"):
        pack_weight(weight, "csr")


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rows_join_and_part(format):
    weights = [torch.randn(rows, 16) * (torch.rand(rows, 16) > 0.5) for rows in (3, 1, 4)]
    for weight in weights:
        weight[0, :8] = 1  # the same pattern for all
    parts = [pack_weight(weight, format) for weight in weights]
    whole = join_rows(parts)
    assert torch.equal(whole.unpack(), torch.cat(weights))
    assert torch.equal(take_rows(whole, 3, 8).unpack(), torch.cat(weights[1:]))
    assert take_rows(whole, 8, 8).unpack().shape == (0, 16)
    with pytest.raises(ValueError, match="start, stop: expected"):
        take_rows(whole, 3, 9)
    with pytest.raises(ValueError, match="of one kind, got 2"):
        join_rows([parts[0], pack_weight(torch.ones(2, 8), format)])


def test_dense_and_wrapped_models_are_refused(merged):
    with pytest.raises(ModelError, match="none of 14 linears has 20% zeros"):
        sparsify(tiny_llama(layers=2))
    model = tiny_llama(layers=2)
    wrap(model)
    with pytest.raises(ModelError, match="merge_model first"):
        sparsify(model)
    last = merged.model.layers[-1].mlp
    last.down_proj = MaskedLoRALinear.from_linear(last.down_proj, rank=1)
    with pytest.raises(ModelError, match="mlp.down_proj is a MaskedLoRALinear"):
        sparsify(merged)
    assert not any(isinstance(module, SparseLinear) for module in merged.modules())


def test_state_dict_of_a_packed_layer_loads():
    weight = torch.randn(8, 16) * (torch.rand(8, 16) > 0.5)
    layer, other = SparseLinear(pack_weight(weight, "bitmask"), torch.randn(8)), None
    other = copy.deepcopy(layer)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(other(x), layer(x)) and "sparsity=0." in repr(other)


def test_a_loaded_weight_is_another_object(merged):
    """What kernels hang on a packed weight was made from the values before, though they were copied in place."""
    model = sparsify(merged)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.model.layers[0].self_attn.q_proj
    before, values = layer.packed, layer.values
    assert layer.group is not None
    ids = generate(model, tiny_tokenizer(), "hello", max_new_tokens=4, stop_at_eos=False).tokens
    layer.load_state_dict({}, strict=False)
    assert layer.packed is before and layer.group is not None
    model.load_state_dict(state)
    assert layer.values is values and layer.packed is not before and layer.group is None
    LeanDecoder(model, 4)  # puts them together again, in memory that can be loaded into
    assert layer.group is not None and not layer.values.is_inference()
    model.load_state_dict(state)
    assert generate(model, tiny_tokenizer(), "hello", max_new_tokens=4, stop_at_eos=False).tokens == ids


def test_a_waiting_decoder_sees_that_values_were_loaded(merged):
    model = sparsify(merged)
    generate(model, tiny_tokenizer(), "hello", max_new_tokens=2)
    (before, _), now = _waiting[model], _looks(model)
    assert before == now
    model.load_state_dict(model.state_dict())
    assert _looks(model) != before


@pytest.fixture
def saved(merged, tmp_path):
    directory = tmp_path / "merged"
    merged.save_pretrained(directory)
    tiny_tokenizer("{{ messages[0]['content'] }}").save_pretrained(directory)
    (directory / "losa_config.json").write_text("{}")
    return merged, directory


def test_packed_files_round_trip(saved, tmp_path):
    model, directory = saved
    report = files.pack_directory(directory, tmp_path / "packed")
    assert (report.packed, report.dense) == (14, 0) and report.packed_bytes < report.dense_bytes
    assert files.is_packed(tmp_path / "packed") and (tmp_path / "packed" / "losa_config.json").exists()
    assert not list((tmp_path / "packed").glob("model*"))
    loaded, tokenizer = files.load(tmp_path / "packed")
    assert_same_function(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and tokenizer("ab").input_ids
    assert sparsity_of(loaded) == sparsity_of(model)
    files.unpack_directory(tmp_path / "packed", tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(as_bits(ours), as_bits(theirs)), name


def test_packing_in_another_dtype(saved, tmp_path):
    model, directory = saved
    files.pack_directory(directory, tmp_path / "packed", dtype=torch.bfloat16)
    loaded, _ = files.load(tmp_path / "packed")
    assert loaded.dtype == torch.bfloat16 and loaded.model.layers[0].mlp.up_proj.packed.dtype == torch.bfloat16
    expected = copy.deepcopy(model).bfloat16()
    dense = densify(loaded)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), expected.parameters(), strict=True))


def test_damage_is_found(saved, tmp_path):
    _, directory = saved
    files.pack_directory(directory, tmp_path / "packed")
    target = tmp_path / "packed" / "block-00001.safetensors"
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(ModelError, match="block-00001.safetensors: the checksum of .* differs"):
        files.load(tmp_path / "packed")
    target.unlink()
    with pytest.raises(ModelError, match="block-00001.safetensors: cannot be read"):
        files.load(tmp_path / "packed")
    manifest = tmp_path / "packed" / files.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 9}))
    with pytest.raises(ModelError, match="expected format version 1, got 9"):
        files.load(tmp_path / "packed")


def test_shapes_that_differ_are_found(saved, tmp_path):
    _, directory = saved
    files.pack_directory(directory, tmp_path / "packed")
    config = tmp_path / "packed" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 1}))
    with pytest.raises(ModelError, match=r"losa_packed.json: model.embed_tokens.weight: expected shape \[99, 32\]"):
        files.load(tmp_path / "packed")
    config.write_text(json.dumps(settings | {"intermediate_size": 80}))
    with pytest.raises(ModelError, match=r"_proj.weight: expected shape \[32, 80\]"):
        files.load(tmp_path / "packed")


def test_nothing_to_pack_leaves_nothing(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="none of 14 linears has 20% zeros"):
        files.pack_directory(tmp_path / "dense", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ModelError, match="no packed checkpoint"):
        files.load(tmp_path / "dense")
    with pytest.raises(ModelError, match="no config.json"):
        files.pack_directory(tmp_path, tmp_path / "packed")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        files.pack_directory(tmp_path / "dense", tmp_path / "taken", min_sparsity=0)


LLAMA_KIND = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": None}),
}
OTHERS = {
    "mistral with a window": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": 4}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 64}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(config_class, settings):
    own = {"vocab_size": 98, "num_hidden_layers": 2, "max_position_embeddings": 256, "eos_token_id": 1}
    model = random_model(config_class(**(COMMON | own | settings)))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # far from ties
    return model.requires_grad_(False)


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_lean_loop_gives_transformers_tokens(name, packed):
    model, tokenizer = build(*LLAMA_KIND[name]), tiny_tokenizer()
    count = 200
    if packed:
        thin(model)
    expected = greedy(densify(copy.deepcopy(model)), tokenizer, "hello there", count)
    LeanDecoder(model, 41)
    pieces = []
    found = generate(model, tokenizer, "hello there", max_new_tokens=count, stop_at_eos=False, on_text=pieces.append)
    assert found.tokens == expected and found.prompt_tokens == 11
    assert "".join(pieces) == found.text and found.tokens_per_second > 0


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_go_through_transformers(name):
    model, tokenizer = build(*OTHERS[name]), tiny_tokenizer()
    with pytest.raises(Unsupported, match="generate: "):
        LeanDecoder(model, 32)
    found = generate(model, tokenizer, "hello", max_new_tokens=8, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello", 8)


def test_a_model_that_computes_something_else_is_found_out():
    model = build(*LLAMA_KIND["llama"])
    inner = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 1.01 * inner(x)
    with pytest.raises(Unsupported, match="computes something else"):
        LeanDecoder(model, 32)


def counted(monkeypatch):
    """A list that grows by one for each decoder that is built and checked."""
    built, check = [], LeanDecoder._check
    monkeypatch.setattr(LeanDecoder, "_check", lambda self, model: built.append(self) or check(self, model))
    return built


def test_a_decoder_is_built_once_and_frees_its_cache(monkeypatch):
    model, tokenizer, built = build(*LLAMA_KIND["qwen2"]), tiny_tokenizer(), counted(monkeypatch)
    for prompt, count in (("hello", 8), ("hi there", 40), ("hello", 8)):
        found = generate(model, tokenizer, prompt, max_new_tokens=count, stop_at_eos=False)
        assert found.tokens == greedy(model, tokenizer, prompt, count)
        assert built[0].cache.numel() == 0
    # A text in the middle of another takes a decoder of its own.
    inner = []

    def interrupt(_):
        inner.append(generate(model, tokenizer, "hello", max_new_tokens=8, stop_at_eos=False).tokens)

    generate(model, tokenizer, "ab", max_new_tokens=3, stop_at_eos=False, on_text=interrupt)
    assert len(inner) == 3 and all(tokens == found.tokens for tokens in inner) and len(built) == 2


def test_a_waiting_decoder_does_not_keep_its_model():
    model = build(*LLAMA_KIND["llama"])
    generate(model, tiny_tokenizer(), "hello", max_new_tokens=2)
    leaves = weakref.ref(model)
    del model
    gc.collect()
    assert leaves() is None


def thin(model):
    """Half of the weights of every block linear, packed."""
    for linear in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        linear.weight.mul_(torch.rand_like(linear.weight) > 0.5)
    return sparsify(model, min_sparsity=0.3)


# What is done to a model between two texts: (packed before, change, decoders that must be built anew)
CHANGES = {
    "weight": (False, lambda m: setattr(m.model.norm, "weight", nn.Parameter(1.5 * m.model.norm.weight)), 1),
    "data": (False, lambda m: setattr(m.model.layers[0].input_layernorm.weight, "data", torch.rand(32) + 0.5), 1),
    "in place": (False, lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.5), 0),
    "module": (False, lambda m: m.model.layers[0].self_attn.set_submodule("v_proj", nn.Linear(32, 16)), 1),
    "dtype": (False, lambda m: m.double(), 1),
    "sparsify": (False, thin, 1),
    "densify": (True, densify, 1),
    "bias in place": (True, lambda m: m.model.layers[0].self_attn.k_proj.bias.add_(3), 0),
    "packed dtype": (True, lambda m: m.bfloat16().float(), 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_decoder_sees_changes(monkeypatch, name):
    packed, change, builds = CHANGES[name]
    model, tokenizer = build(*LLAMA_KIND["qwen2"]), tiny_tokenizer()
    if packed:
        thin(model)
    built = counted(monkeypatch)
    generate(model, tokenizer, "hello", max_new_tokens=4, stop_at_eos=False)
    change(model)
    found = generate(model, tokenizer, "hello", max_new_tokens=20, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello", 20) and len(built) == 1 + builds


def test_hooked_models_are_checked_every_time(monkeypatch):
    model, tokenizer, built = build(*LLAMA_KIND["llama"]), tiny_tokenizer(), counted(monkeypatch)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    for _ in range(2):
        generate(model, tokenizer, "hello", max_new_tokens=3)
    assert len(built) == 2


def test_reading_in_pieces_and_the_caches_end():
    decoder = LeanDecoder(build(*LLAMA_KIND["llama"]), 12)
    ids = torch.randint(2, 90, (12,))
    whole = decoder(ids)
    decoder.reset()
    for part in ids.split([5, 1, 4, 2]):
        pieces = decoder(part)
    assert (whole - pieces).abs().max() <= 64 * torch.finfo(torch.float32).eps * whole.abs().max()
    with pytest.raises(LosaError, match="13 tokens are more than max_length, 12"):
        decoder(ids[:1])


def test_choosing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.0, 3.0, 2.0, -5.0])
    assert choose(scores, 0.0, 1.0, generator) == 1
    assert {int(choose(scores, 1.0, 0.5, generator)) for _ in range(50)} == {1}
    drawn = torch.tensor([choose(scores, 1.0, 1.0, generator) for _ in range(4000)])
    expected = scores.softmax(0)
    counted = torch.bincount(drawn, minlength=4) / 4000
    # Five standard deviations of a count.
    assert ((counted - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1 / 4000).all()


def test_messages_sampling_and_bad_settings():
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer("{{ messages[0]['content'] }}")
    said = generate(model, tokenizer, [{"role": "user", "content": "hi"}], max_new_tokens=3)
    assert said.tokens == generate(model, tokenizer, "hi", max_new_tokens=3).tokens
    drawn = [generate(model, tokenizer, "hi", max_new_tokens=12, temperature=2.0, seed=s).tokens for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for settings in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}):
        with pytest.raises(LosaError, match="generate: expected max_new_tokens"):
            generate(model, tokenizer, "hi", **settings)
    with pytest.raises(LosaError, match="prompt is empty"):
        generate(model, tokenizer, "")


def test_generation_stops_at_the_end_token():
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()
    first = generate(model, tokenizer, "abc", max_new_tokens=5, stop_at_eos=False).tokens
    model.generation_config.eos_token_id = [first[2]]
    stopped = generate(model, tokenizer, "abc", max_new_tokens=5).tokens
    assert stopped == first[: first.index(first[2]) + 1]


def invoke(*arguments):
    from typer.testing import CliRunner

    from losa.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_commands(saved, tmp_path):
    _, directory = saved
    for source in (directory, tmp_path / "packed"):
        if source != directory:
            done = invoke("pack", directory, "--output", source, "--dtype", "bfloat16")
            assert done.exit_code == 0 and "packed, 0 left dense" in done.output, done.output
        said = invoke("generate", source, "--prompt", "hello", "--max-new-tokens", 4)
        assert said.exit_code == 0 and "4 tokens, " in said.output, said.output
    done = invoke("unpack", tmp_path / "packed", "--output", tmp_path / "dense")
    assert done.exit_code == 0 and (tmp_path / "dense" / "model.safetensors.index.json").exists()
    refused = invoke("pack", directory, "--output", tmp_path / "packed")
    assert refused.exit_code == 1 and "exists" in refused.output
    assert invoke("pack", directory, "--output", tmp_path / "x", "--format", "csr").exit_code == 1


def test_bench_command(saved, tmp_path):
    _, directory = saved
    done = invoke("bench", directory, "--tokens", 3, "--repetitions", 1, "--json", tmp_path / "speed.json")
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "speed.json").read_text())["rows"]}
    assert set(rows) == {
        f"{who}, {what}"
        for who in ("transformers", "losa")
        for what in ("dense", "packed", "packed bfloat16", "dense bfloat16")
    }
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["losa, packed"]["bytes_per_token"] < rows["losa, dense"]["bytes_per_token"]
    short = invoke("bench", directory, "--tokens", 3, "--repetitions", 1, "--short")
    assert short.exit_code == 0 and "decoding, tokens/s: transformers, dense " in short.output
    assert "; losa, packed bfloat16 " in short.output and short.output.count(" x)") == 2
