"""The written model and its final check."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from losa.errors import OutputError
from losa.model.loading import load_model
from losa.model.wrapping import wrap_model
from losa.output import export
from losa.output.checks import mask_records
from losa.output.export import check_export, export_model
from losa.record import RunRecord
from losa.storage.files import write_text
from losa_kernels import unpack_mask
from tests.helpers.exports import pruned
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def leftovers(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundtrip(tmp_path, dtype):
    model, masks, record = pruned(dtype)
    tokenizer = tiny_tokenizer(TEMPLATE)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    extra = tmp_path / "metrics"
    extra.write_text("{}")
    ids = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    output = tmp_path / "out"
    export_model(model, tokenizer, output, record, masks, sample_ids=ids, extra_files={"metrics.jsonl": extra})

    again = AutoModelForCausalLM.from_pretrained(output)
    assert again.dtype == dtype
    for name, mask in masks.items():
        weight = again.get_submodule(name).weight
        kept = unpack_mask(mask, weight.shape[1])
        assert not weight[~kept].any() and not torch.signbit(weight[~kept]).any()
        assert torch.equal(weight, model.get_submodule(name).weight)
        assert record.masks[name].kept == int(kept.sum())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.max_new_tokens == 7
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded("Hello").input_ids == tokenizer("Hello").input_ids
    assert loaded.chat_template == TEMPLATE
    assert RunRecord.from_dict(json.loads((output / "losa_config.json").read_text())) == record
    assert (output / "metrics.jsonl").read_text() == "{}"
    assert (output / "README.md").exists() and (output / "figures" / "sparsity.png").exists()
    assert leftovers(tmp_path) == ["metrics", "out"]
    assert len({path.stat().st_mode for path in output.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize("length", range(4))
def test_logits_of_one_token_do_not_depend_on_addresses(tmp_path, length):
    """A product with one row rounds by where the weights lie; files of any header length must pass."""
    model, masks, record = pruned()
    for name in masks:
        weight = model.get_submodule(name).weight
        home = torch.zeros(weight.numel() + length)[length:].view(weight.shape)
        weight.data = home.copy_(weight.data)
    export_model(model, None, tmp_path / "out", record, masks, sample_ids=torch.tensor([[5]]))


def test_tied_embeddings_and_sharded_files(tmp_path, monkeypatch):
    model, masks, record = pruned(tie_word_embeddings=True)
    save = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, path: save(self, path, max_shard_size="20KB"))
    export_model(model, None, tmp_path / "out", record, masks)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_config_says_nothing_of_storage(tmp_path):
    model, masks, record = pruned()
    model.config.sparsity_config = {"format": "dense"}
    model.config.quantization_config = {"quant_method": "gguf"}
    export_model(model, None, tmp_path / "out", record, masks)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not set(config) & {"sparsity_config", "quantization_config"}
    assert config["hidden_size"] == 32


def test_generation_config_that_would_not_be_valid_today(tmp_path):
    """Published checkpoints have sampling settings without do_sample; they must still be exported."""
    source = tmp_path / "base"
    tiny_llama(layers=2).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    settings = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_model(str(source), device="cpu")
    _, masks, record = pruned()
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.data
        weight[~unpack_mask(mask, weight.shape[1])] = 0
    record.results = []
    export_model(model, tokenizer, tmp_path / "out", record, masks)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_kept_zeros_are_allowed_and_counted(tmp_path):
    model, masks, record = pruned()
    name = next(iter(masks))
    weight = model.get_submodule(name).weight.data
    rows, columns = unpack_mask(masks[name], weight.shape[1]).nonzero(as_tuple=True)
    weight[rows[:3], columns[:3]] = torch.tensor([0.0, -0.0, -0.0])
    record.results[0].zeros += 3
    export_model(model, None, tmp_path / "out", record, masks)
    assert check_export(tmp_path / "out", model, None, record, masks) == 3


def test_unmerged_model_is_refused(tmp_path):
    model = tiny_llama(layers=2)
    wrap_model(model, rank=2, scaling=2.0)
    with pytest.raises(ValueError, match="merge"):
        export_model(model, None, tmp_path / "out", pruned()[2], {})
    assert leftovers(tmp_path) == []


def pruned_entry(masks, name, width):
    return tuple((~unpack_mask(masks[name], width)).nonzero()[0].tolist())


def flip(tensors, model, masks, record):
    name = next(iter(masks))
    tensors[f"{name}.weight"][pruned_entry(masks, name, 32)] = 1e-30
    return "pruned weights are not"


def minus_zero(tensors, model, masks, record):
    name = next(iter(masks))
    tensors[f"{name}.weight"][pruned_entry(masks, name, 32)] = -0.0
    return "pruned weights are not"


def embedding(tensors, model, masks, record):
    tensors["model.embed_tokens.weight"][-1, -1] += 1e-7
    return "model.embed_tokens.weight: the written tensor differs"


def not_finite(tensors, model, masks, record):
    tensors["model.norm.weight"][0] = float("nan")
    return "model.norm.weight is not finite"


def recorded_count(tensors, model, masks, record):
    record.masks[next(iter(masks))].kept += 1
    return "is not the record's"


def recorded_zeros(tensors, model, masks, record):
    record.results[0].zeros -= 1
    return "are zero, the record says"


def missing_mask(tensors, model, masks, record):
    del record.masks[next(iter(masks))]
    return "not in both"


def other_function(tensors, model, masks, record):
    model.config.rms_norm_eps = 0.1
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1
    return "logits differ"


DAMAGES = [flip, minus_zero, embedding, not_finite, recorded_count, recorded_zeros, missing_mask, other_function]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_found(tmp_path, monkeypatch, damage):
    model, masks, record = pruned()
    check = export.check_export

    def tampered(directory, *args):
        tensors = load_file(directory / "model.safetensors")
        tampered.message = damage(tensors, model, masks, record)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return check(directory, *args)

    monkeypatch.setattr(export, "check_export", tampered)
    with pytest.raises(OutputError) as caught:
        export_model(model, None, tmp_path / "out", record, masks)
    assert tampered.message in str(caught.value)
    assert leftovers(tmp_path) == []


def test_other_tokenizer_is_found(tmp_path):
    model, masks, record = pruned()
    export_model(model, tiny_tokenizer(TEMPLATE), tmp_path / "out", record, masks)
    with pytest.raises(OutputError, match="chat template"):
        check_export(tmp_path / "out", model, tiny_tokenizer("other"), record, masks)


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    model, masks, record = pruned()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tiny_tokenizer(), tmp_path / "out", record, masks)
    assert leftovers(tmp_path) == []


def test_full_disk_names_the_reason(tmp_path, monkeypatch):
    model, masks, record = pruned()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OutputError, match="out.*No space left"):
        export_model(model, None, tmp_path / "out", record, masks)
    assert leftovers(tmp_path) == []


def test_failed_write_inside_safetensors(tmp_path):
    """The real thing: the kernel refuses to let files grow, in code that reports no OSError."""
    model, masks, record = pruned()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="out.*File too large"):
            export_model(model, None, tmp_path / "out", record, masks)
        with pytest.raises(OutputError, match="notes.*File too large"):
            write_text(tmp_path / "notes", "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []


def test_mask_records():
    mask = torch.tensor([[0b101, 1], [0, 0]], dtype=torch.uint8)
    found = mask_records({"a": mask}, {"a": 9})["a"]
    assert (found.shape, found.kept) == ([2, 9], 3)
    other = mask_records({"a": mask.flip(0)}, {"a": 9})["a"]
    assert other.kept == 3 and other.sha256 != found.sha256 and len(found.sha256) == 64


@pytest.mark.gpu
def test_roundtrip_on_a_gpu(tmp_path):
    model, masks, record = pruned(torch.bfloat16)
    model.cuda()
    export_model(model, tiny_tokenizer(), tmp_path / "out", record, masks)
    assert all(p.device.type == "cuda" for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").cuda()
    ids = torch.arange(40, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
