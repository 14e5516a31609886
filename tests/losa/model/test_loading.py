"""Loading: checkpoints of the hub's kind, GGUF files, packages, and models that are not there."""

from __future__ import annotations

import pytest
import torch
import transformers

from losa.errors import ModelError
from losa.model.loading import load_model
from losa.model.wrapping import merge_model, sparsity_of
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import assert_same_function, logits, randomise, tiny_llama, tiny_tokenizer, wrap


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
