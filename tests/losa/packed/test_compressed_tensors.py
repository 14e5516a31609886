"""Directories in compressed-tensors' sparse formats, written and read; that package is the truth."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from losa.errors import LosaError, ModelError
from losa.inference.generation import generate
from losa.model.blocks import block_linears
from losa.modules.sparse import SparseLinear
from losa.packed import compressed_tensors as compressed
from losa.packed import directory as packed
from losa.packed.weights import pack_weight
from losa_kernels.packing import PackedBitmask, PackedNM
from losa_kernels.tensors import as_bits
from tests.helpers.command_line import invoke
from tests.helpers.tiny import assert_same_function, logits, tiny_llama, tiny_tokenizer

PATTERNS = {"sparse-bitmask": "unstructured", "sparse-24-bitmask": "2:4"}


def test_the_oracle_is_the_version_that_has_these_formats():
    assert __version__ == compressed.VERSION


def pruned(format: str):
    model = tiny_llama(layers=2, hidden=40, tie_word_embeddings=True).requires_grad_(False).bfloat16()
    for linear in block_linears(model).values():
        scores = torch.rand(linear.weight.shape)
        kept = scores < 0.4
        if format == "sparse-24-bitmask":
            kept = (scores.reshape(-1, 4).argsort(1).argsort(1) < 2).reshape(kept.shape)
        linear.weight.masked_fill_(~kept, 0)
    return model


@pytest.fixture(params=PATTERNS)
def saved(request, tmp_path):
    model = pruned(request.param)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return request.param, model, tmp_path


def oracle(format: str):
    return ModelCompressor(sparsity_config=SparsityCompressionConfig.load_from_registry(format))


def contents(directory) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("columns", [8, 10, 15, 64])
def test_packed_rows_are_the_packages_own(columns):
    """Masks whose last byte is not full, rows without values, zeros of either sign, extremes."""
    weight = torch.randn(6, columns) * (torch.rand(6, columns) < 0.4)
    weight[2], weight[0, :3] = 0, torch.tensor([float("inf"), -0.0, 1e-45])
    expected = oracle("sparse-bitmask").sparsity_compressor.compress({"x.weight": weight})
    found = pack_weight(weight, "bitmask")
    ours = {"compressed": found.values, "bitmask": found.bitmask, "row_offsets": found.row_offsets}
    equal({f"x.{name}": t for name, t in ours.items()} | {"x.shape": torch.tensor(weight.shape)}, expected)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        same = [as_bits(t) if t.is_floating_point() else t for t in (found[name], tensor)]
        assert torch.equal(*same), name


def test_written_bytes_are_the_packages_own(saved):
    format, model, root = saved
    report = packed.pack_directory(root / "dense", root / "packed", format=format)
    assert (report.packed, report.dense) == (14, 0) and report.packed_bytes < report.dense_bytes
    dense = contents(root / "dense")
    linears = set(block_linears(model))
    expected = oracle(format).sparsity_compressor.compress(dense, compression_targets=linears)
    equal(contents(root / "packed"), expected)


def test_the_package_reads_what_is_written(saved):
    format, _, root = saved
    packed.pack_directory(root / "dense", root / "packed", format=format)
    entry = json.loads((root / "packed" / "config.json").read_text())["quantization_config"]
    reader = ModelCompressor.from_compression_config(entry)
    assert reader.sparsity_config.format == format and reader.quantization_config is None
    assert reader.sparsity_config.sparsity_structure == PATTERNS[format]
    assert reader.sparsity_config.ignore == ["lm_head"] and reader.sparsity_config.targets == ["Linear"]
    assert reader.sparsity_config.global_sparsity == pytest.approx(0.5 if "24" in format else 0.6, abs=0.02)
    equal(dict(reader.sparsity_compressor.decompress(str(root / "packed"))), contents(root / "dense"))


def test_what_the_package_wrote_is_read(saved):
    """Its own config entry and tensors, a linear's tensors scattered over two files."""
    format, model, root = saved
    compressor = oracle(format)
    targets = set(block_linears(model))
    tensors = compressor.sparsity_compressor.compress(contents(root / "dense"), compression_targets=targets)
    directory = root / "theirs"
    directory.mkdir()
    for file in (root / "dense").iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        chosen = {name: tensors[name].contiguous() for name in part}
        save_file(chosen, directory / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
    compressor.update_config(str(directory))
    assert packed.is_packed(directory)
    loaded, tokenizer = packed.load(directory)
    linears = [m for m in loaded.modules() if isinstance(m, SparseLinear)]
    kind = PackedNM if format == "sparse-24-bitmask" else PackedBitmask
    assert len(linears) == 14 and all(type(m.packed) is kind for m in linears)
    for name, linear in block_linears(model).items():
        assert torch.equal(as_bits(loaded.get_submodule(name).packed.unpack()), as_bits(linear.weight)), name
    assert_same_function(logits(loaded.float()), logits(model.float()))
    assert generate(loaded, tokenizer, "hello", max_new_tokens=3).tokens


def test_unpacked_it_is_the_dense_directory_again(saved):
    format, _, root = saved
    done = invoke("pack", root / "dense", "--output", root / "packed", "--format", format)
    assert done.exit_code == 0 and "14 linears packed, 0 left dense" in done.output, done.output
    with pytest.raises(ModelError, match="is packed already"):
        packed.pack_directory(root / "packed", root / "again")
    packed.unpack_directory(root / "packed", root / "unpacked")
    equal(contents(root / "unpacked"), contents(root / "dense"))
    config = [json.loads((root / name / "config.json").read_text()) for name in ("dense", "unpacked")]
    assert config[0] == config[1]
    AutoModelForCausalLM.from_pretrained(root / "unpacked")


def test_linears_that_are_not_2_of_4_stay_dense(tmp_path):
    model = pruned("sparse-24-bitmask")
    first = model.model.layers[0].mlp.up_proj
    first.weight[0, :3] = 1
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    report = packed.pack_directory(tmp_path / "dense", tmp_path / "packed", format="sparse-24-bitmask")
    assert (report.packed, report.dense) == (13, 1)
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["ignore"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert_same_function(logits(packed.load(tmp_path / "packed")[0].float()), logits(model.float()))


DAMAGE = {
    "bitmask": (lambda t: t ^ 1, "values, but the bitmask has|are not 2 of every 4"),
    "compressed": (lambda t: t[:-1].clone(), "values, but the bitmask has|are not 2 of every 4"),
    "shape": (lambda t: t + 8, ".weight: expected shape"),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_tensors_that_contradict_each_other_are_refused(saved, part):
    format, _, root = saved
    packed.pack_directory(root / "dense", root / "packed", format=format)
    file = sorted((root / "packed").glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = f"model.layers.0.self_attn.q_proj.{part}"
    change, message = DAMAGE[part]
    save_file(tensors | {name: change(tensors[name])}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"q_proj.*({message})"):
        packed.load(root / "packed")
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"q_proj.{part}" if part != "compressed" else "q_proj"):
        packed.load(root / "packed")


def test_quantised_directories_and_unknown_formats_are_refused(saved):
    format, _, root = saved
    with pytest.raises(LosaError, match="format: expected one of auto, .*sparse-24-bitmask, got 'marlin-24'"):
        packed.pack_directory(root / "dense", root / "packed", format="marlin-24")
    packed.pack_directory(root / "dense", root / "packed", format=format)
    path = root / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {}}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised; expected floating-point weights"):
        packed.load(root / "packed")
