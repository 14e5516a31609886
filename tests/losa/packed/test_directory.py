"""Packed directories: written and read back, in another dtype, damaged, and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from losa.errors import ModelError, OutputError
from losa.inference.sparsify import densify
from losa.model.wrapping import sparsity_of
from losa.packed import directory as files
from losa_kernels.tensors import as_bits
from tests.helpers.tiny import assert_same_function, logits, tiny_llama


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
    with pytest.raises(ModelError, match="expected format version 1 or 2, got 9"):
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
