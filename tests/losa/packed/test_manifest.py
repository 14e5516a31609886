"""losa_packed.json and the tensors it lists: whatever is wrong with them is an error that names the file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa.errors import ModelError, OutputError
from losa.model.blocks import block_linears
from losa.output.inspection import inspect_directory
from losa.packed.block_files import digest
from losa.packed.directory import load, pack_directory, unpack_directory
from losa.packed.manifest import MANIFEST
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

LINEAR = "model.layers.1.self_attn.o_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="module", params=["bitmask", "nm"])
def packed(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("manifest")
    model = tiny_llama(layers=2).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight[:, ::2] = 0
    model.save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    pack_directory(root / "dense", root / "packed", format=request.param)
    return request.param, root / "packed"


@pytest.fixture
def copied(packed, tmp_path):
    shutil.copytree(packed[1], tmp_path / "packed")
    return packed[0], tmp_path / "packed"


def linear(**changes):
    def edit(manifest):
        manifest["linears"][LINEAR] |= changes
        return manifest

    return edit


def entry(section, name, value):
    def edit(manifest):
        manifest[section][name] = value
        return manifest

    return edit


def without(section, name):
    def edit(manifest):
        del manifest[section][name]
        return manifest

    return edit


EDITS = {
    "null": lambda m: None,
    "text": lambda m: "packed",
    "version true": lambda m: m | {"version": True},
    "linears a list": lambda m: m | {"linears": [LINEAR]},
    "checksums null": lambda m: m | {"sha256": None},
    "linear null": entry("linears", LINEAR, None),
    "linear absent": without("linears", LINEAR),
    "format a list": linear(format=["nm"]),
    "shape of one": linear(shape=[32]),
    "shape of three": linear(shape=[32, 32, 1]),
    "negative shape": linear(shape=[-32, -32]),
    "fractions": linear(shape=[32.0, 32.0]),
    "truth": linear(shape=[True, 1024]),
    "huge shape": linear(shape=[2**40, 2**40]),
    "other shape": linear(shape=[64, 16]),
    "no tensors": linear(tensors=[]),
    "tensors twice": linear(tensors=["bitmask", "bitmask", "values"]),
    "tensors a number": linear(tensors=3),
    "of another kind": linear(format="24", tensors=["meta", "values"]),
    "keep_n 0": linear(format="nm", keep_n=0, m=4, tensors=["bitmask", "values"]),
    "keep_n above m": linear(format="nm", keep_n=5, m=4, tensors=["bitmask", "values"]),
    "m text": linear(format="nm", keep_n=2, m="4", tensors=["bitmask", "values"]),
    "m no divisor": linear(format="nm", keep_n=1, m=3, tensors=["bitmask", "values"]),
    "file outside": entry("files", NORM, "../rest.safetensors"),
    "file of another kind": entry("files", NORM, "config.json"),
    "file a number": entry("files", NORM, 7),
    "file of a block": entry("files", NORM, "block-00000.safetensors"),
    "file that is not there": entry("files", NORM, "block-00077.safetensors"),
    "file absent": without("files", NORM),
    "part absent": without("files", f"{LINEAR}.bitmask"),
    "checksum absent": without("sha256", NORM),
    "checksum short": entry("sha256", NORM, "abc"),
    "packed and dense": lambda m: entry("sha256", f"{LINEAR}.weight", "0" * 64)(
        entry("files", f"{LINEAR}.weight", "rest.safetensors")(m)
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_is_wrong_is_named(edit, copied):
    _, directory = copied
    path = directory / MANIFEST
    path.write_text(json.dumps(EDITS[edit](json.loads(path.read_text()))))
    with pytest.raises(ModelError, match=f"{MANIFEST}|safetensors: cannot be read|the model has no such linear"):
        load(directory)
    with pytest.raises(OutputError):
        inspect_directory(directory)
    with pytest.raises(ModelError):
        unpack_directory(directory, directory.with_name("dense"))
    assert not directory.with_name("dense").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"version": ' + "1" * 5000 + "}", '{"version": 1, "version": 1}', "\xff"]
)
def test_a_manifest_that_is_no_json_is_named(text, copied):
    _, directory = copied
    (directory / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=MANIFEST):
        load(directory)


def flipped(t):
    return t ^ 1


CONTRADICTIONS = {
    "a bit": {"bitmask": flipped},
    "counts": {"values": lambda t: t.flatten()[:-1].clone()},
    "kind": {"bitmask": lambda t: t.to(torch.int32)},
    "whole numbers": {"values": lambda t: t.to(torch.int32)},
    "width": {"bitmask": lambda t: t[:, :-1].clone()},
    "offsets": {"row_offsets": lambda t: t.flip(0)},
    "offsets far away": {"row_offsets": lambda t: t + 2**40},
    "fewer offsets": {"row_offsets": lambda t: t[1:].clone()},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_found_though_checksums_match(name, copied):
    format, directory = copied
    file = directory / "block-00001.safetensors"
    tensors, manifest = load_file(file), json.loads((directory / MANIFEST).read_text())
    for part, change in CONTRADICTIONS[name].items():
        key = f"{LINEAR}.{part}"
        if key not in tensors:
            pytest.skip(f"{format} has no {part}")
        tensors[key] = change(tensors[key]).contiguous()
        manifest["sha256"][key] = digest(tensors[key])
    save_file(tensors, file, {"format": "pt"})
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=LINEAR):
        load(directory)
    with pytest.raises(ModelError, match=LINEAR):
        unpack_directory(directory, directory.with_name("dense"))


def test_inspecting_a_packed_directory(packed):
    _, directory = packed
    found = inspect_directory(directory)
    assert found.packed and found.unchecked is None and found.sparsity == pytest.approx(0.5)
    assert {t.name for t in found.tensors} == {f"{name}.weight" for name in block_linears(tiny_llama(layers=2))}
