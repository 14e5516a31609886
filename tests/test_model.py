"""Models: discovery over architectures, wrapping and back, targets, loading. All models are tiny, random and local."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

from losa.errors import ModelError
from losa.model import (
    cache_off,
    find_blocks,
    find_linears,
    load_model,
    merge_model,
    sparsity_of,
    unwrap_model,
    wrap_model,
    wrapped_linears,
)
from losa.modules import LoRALinear, MaskedLoRALinear

LAYERS, VOCABULARY = 3, 97
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
IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
EPS = torch.finfo(torch.float32).eps


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


def wrap(model, **settings):
    return wrap_model(model, **({"rank": 4, "scaling": 2.0} | settings))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def assert_same_function(ours, truth):
    """Each of 3 blocks rounds some 10 times; a wrong weight or a lost bias is off by 1e-3 and more."""
    assert (ours - truth).abs().max() <= 64 * EPS * truth.abs().max()


@torch.no_grad()
def randomise(layers, seed=1):
    """Random masks, and adapters as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.6)
        layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrap_merge_unwrap(name):
    model, expected = build(name), ARCHITECTURES[name][2]
    original, parameters, dense = copy.deepcopy(model), dict(model.named_parameters()), logits(model)

    prefix, blocks = find_blocks(model)
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
    assert list(find_linears(blocks[0])) == expected and find_blocks(model) == (prefix, blocks)
    assert_same_function(logits(model), dense)

    randomise(layers)
    wrapped, zeros = logits(model), sparsity_of(model)
    assert (wrapped - dense).abs().max() > 1000 * EPS * dense.abs().max()
    merged = merge_model(copy.deepcopy(model))
    assert not wrapped_linears(merged) and sparsity_of(merged) == zeros
    assert {type(m) for m in find_linears(find_blocks(merged)[1][1]).values()} == {nn.Linear}
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
    prefix, blocks = find_blocks(model)
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
    assert find_blocks(model)[0] == "0" and find_blocks(nn.Sequential(model[0][:1]))[0] == "0"
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
    assert find_blocks(model) == ("text", model.text)


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


def test_cache_off_is_temporary():
    model = tiny_llama(layers=2)
    assert model.config.use_cache
    with pytest.raises(KeyError), cache_off(model) as same:
        assert same is model and model(IDS).past_key_values is None
        raise KeyError
    assert model.config.use_cache and model(IDS).past_key_values is not None


def convert(model, dtype):
    """Unlike model.to(dtype), leaves the rotary frequencies in fp32, as loading in that dtype does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture
def saved(tmp_path):
    """A checkpoint as the Hugging Face hub holds it: safetensors, config, tokenizer."""
    model = convert(tiny_llama(layers=2, tie_word_embeddings=True), torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer("{{ messages[0]['content'] }}").save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_load_roundtrip(saved, dtype, expected):
    model, path = saved
    assert (path / "model.safetensors").exists()
    loaded, tokenizer = load_model(str(path), dtype=dtype, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {expected} and not loaded.training
    assert all(torch.equal(v, model.state_dict()[k].to(expected)) for k, v in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(convert(model, expected)))
    assert tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_merged_model_saves_and_loads(saved, tmp_path):
    model, _ = saved
    randomise(wrap(model))
    wrapped, zeros = logits(model.float()), sparsity_of(model)
    merge_model(model).save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    loaded, _ = load_model(str(tmp_path / "merged"), device="cpu")
    assert sparsity_of(loaded) == zeros and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_function(logits(loaded), wrapped)


def test_device_auto(saved):
    loaded, _ = load_model(str(saved[1]))
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/directory", "no such directory"),
        ("/no/such/directory", "no such directory"),
        ("package:no_such_package", "no Python package 'no_such_package' is installed"),
        ("package:no-such.package", "no Python package"),
        ("package:losa", "expected exactly one .gguf file .* found none"),
    ],
)
def test_models_that_are_not_there(model, message):
    with pytest.raises(ModelError, match=message):
        load_model(model)


def test_no_such_device(saved):
    with pytest.raises(ModelError, match="^device 'nonsense': not available here"):
        load_model(str(saved[1]), device="nonsense")


def test_offline_and_unknown_names_say_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand so on")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(
        ModelError, match="^model 'some/model': not a local directory.*couldn't connect.*give the directory$"
    ):
        load_model("some/model")


def test_empty_directory(tmp_path):
    with pytest.raises(ModelError, match=f"cannot be loaded from {tmp_path}"):
        load_model(str(tmp_path))


def edit_config(path, **changes):
    config = transformers.AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(path)


def test_quantised_checkpoints_are_refused(saved):
    edit_config(saved[1], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\)"):
        load_model(str(saved[1]))


def test_encoder_decoder_checkpoints_are_refused(saved):
    edit_config(saved[1], is_encoder_decoder=True)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(str(saved[1]))


def test_incomplete_checkpoints_are_refused(saved):
    edit_config(saved[1], num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks 9 weight\(s\) of its architecture: model\.layers\.2\."):
        load_model(str(saved[1]))


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_gguf_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (package / name).write_bytes(b"not a gguf file")
    with pytest.raises(
        ModelError, match="exactly one .gguf file .else set gguf_file. in the package, found a.gguf, b.gguf"
    ):
        load_model("package:some_gguf_package")
    with pytest.raises(ModelError, match="expected 'c.gguf' in the package, found a.gguf, b.gguf"):
        load_model("package:some_gguf_package", gguf_file="c.gguf")
    with pytest.raises(ModelError, match=f"cannot be loaded from {package}"):
        load_model("package:some_gguf_package", gguf_file="b.gguf")
    with pytest.raises(ModelError, match="'c.gguf': no such file in .*; found a.gguf, b.gguf"):
        load_model(str(package), gguf_file="c.gguf")


def write_gguf(path, model):
    """The model as a GGUF file: llama.cpp's names, and its order of the rotary dimensions in q and k."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<unk>", "<eos>"] + [chr(c) for c in range(33, 125)] + ["ab", "cd"]
    tokens += [f"extra{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        array = value.float().numpy()
        if "layers" in parts:
            if parts[-2] in ("q_proj", "k_proj"):
                heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(f"blk.{parts[2]}.{names[parts[-2]]}.weight", array.copy())
        elif parts[-2] != "lm_head":
            writer.add_tensor({"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[-2]], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_an_ordinary_dense_model(tmp_path):
    model = tiny_llama(layers=2, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_model(str(tmp_path), gguf_file="tiny.gguf", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_function(logits(loaded), logits(model))
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}" and tokenizer.eos_token == "<eos>"
    # It forgets where it came from: transformers would not save a model that it takes for quantised.
    loaded.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    again, _ = load_model(str(tmp_path / "dense"), device="cpu")
    assert torch.equal(logits(again), logits(loaded))
    direct, _ = load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16", device="cpu")
    assert direct.dtype == torch.bfloat16


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
