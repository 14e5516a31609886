"""Models of several modalities: which class makes them, what runs on text alone, and the files of processors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import transformers

from losa.errors import ModelError
from losa.model import processors
from losa.model.auto_class import auto_class, check_text_alone
from losa.model.blocks import find_blocks
from losa.model.loading import configured_model, load_model
from tests.helpers.architectures import config_of, model_of
from tests.helpers.tiny import tiny_tokenizer


@pytest.mark.parametrize("name", ["mistral3", "qwen3_5", "llama4"])
def test_the_class_keeps_the_other_half(name):
    """Where transformers has a class for the text half alone, too."""
    auto = auto_class(config_of(name))
    assert auto is transformers.AutoModelForImageTextToText
    model = model_of(name)
    names = [each for each, _ in model.named_parameters()]
    assert any("vis" in each for each in names)
    assert find_blocks(model).prefix.endswith("language_model.layers") or "language_model" in find_blocks(model).prefix


def test_other_configurations_are_of_causal_models():
    assert auto_class(config_of("llama")) is transformers.AutoModelForCausalLM
    assert auto_class(transformers.BertConfig()) is transformers.AutoModelForCausalLM


def test_a_repositorys_own_code_is_taken_by_the_class_that_it_names():
    config = config_of("mistral3")
    config.auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    assert auto_class(config) is transformers.AutoModelForCausalLM
    config = config_of("llama")
    config.auto_map = {"AutoModelForImageTextToText": "own.Model"}
    assert auto_class(config) is transformers.AutoModelForImageTextToText


def test_a_model_that_needs_images_is_refused(tmp_path):
    config = transformers.Blip2Config()
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not run on text alone; it needs pixel_values"):
        configured_model(str(tmp_path))
    check_text_alone("fine", SimpleNamespace(forward=lambda input_ids, pixel_values=None, **kwargs: None))


def test_processor_files_come_from_the_directory_or_the_hubs_cache(tmp_path, monkeypatch):
    """And the export asks nobody: what is not in the cache is left out."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "preprocessor_config.json").write_text(json.dumps({"size": 7}))
    processors.copy_processors(SimpleNamespace(name_or_path=str(source)), target)
    assert [file.name for file in target.iterdir()] == ["preprocessor_config.json"]
    asked = []

    def cached(name, file, local_files_only, **_):
        asked.append((file, local_files_only))
        if file == "processor_config.json":
            raise OSError("401 Client Error")
        return str(source / "preprocessor_config.json") if file == "preprocessor_config.json" else None

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    other = tmp_path / "other"
    other.mkdir()
    processors.copy_processors(SimpleNamespace(name_or_path="maker/model"), other)
    assert [file.name for file in other.iterdir()] == ["preprocessor_config.json"]
    assert asked == [(file, True) for file in processors.FILES]
    asked.clear()
    processors.fetch_processors("maker/model")
    assert asked == [(file, False) for file in processors.FILES]
    processors.copy_processors(SimpleNamespace(), other)
    processors.copy_processors(SimpleNamespace(name_or_path="/gone/dir"), other)


def test_a_model_of_two_modalities_is_loaded_whole(tmp_path):
    model_of("qwen3_5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert loaded.state_dict().keys() == model_of("qwen3_5").state_dict().keys()
    assert configured_model(str(tmp_path)).state_dict().keys() == loaded.state_dict().keys()
