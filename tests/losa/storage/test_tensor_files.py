"""Which files of a directory are the checkpoint, adapters beside it, and files that are damaged or do not fit."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from losa.cli.app import app
from losa.errors import LosaError, ModelError, OutputError
from losa.model.blocks import block_linears
from losa.model.loading import load_model
from losa.output.inspection import inspect_directory
from losa.packed.directory import load, load_any, pack_directory, unpack_directory
from losa.storage.tensor_files import INDEX, WHOLE, checkpoint_tensors
from tests.helpers.tiny import assert_same_function, logits, tiny_llama, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llama(layers=2).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight[:, ::2] = 0
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    return model, root / "model"


@pytest.fixture
def source(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "model")
    return tmp_path / "model"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def store(directory, **changes):
    tensors = load_file(directory / WHOLE)
    new = {name: tensors[UP] if change is None else change(tensors[UP]) for name, change in changes.items()}
    save_file({n: t.clone().contiguous() for n, t in (tensors | new).items()}, directory / WHOLE, {"format": "pt"})


def index(directory, places):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def test_headers_and_the_ends_of_tensors(source):
    tensors = load_file(source / WHOLE)
    with checkpoint_tensors(source) as files:
        assert files.stored is files.stored  # made once: a mixture of experts has tens of thousands of tensors
        for name, tensor in tensors.items():
            raw = tensor.numpy().tobytes()
            assert files.ends(name, 20) == raw[:20] + raw[-20:] and files.ends(name, len(raw) + 1) == 2 * raw


def test_the_index_or_the_whole_file_decides(made, source, tmp_path):
    model, _ = made
    tensors = load_file(source / WHOLE)
    dense = {name: torch.ones_like(t) for name, t in tensors.items()}
    save_file(dense, source / "old.safetensors", {"format": "pt"})
    save_file(dense, source / "model-00001-of-00001.safetensors", {"format": "pt"})
    assert inspect_directory(source).sparsity == pytest.approx(0.5)
    pack_directory(source, tmp_path / "a")
    # Two shards that an index names, and a third that it does not.
    names = sorted(tensors)
    (source / WHOLE).unlink()
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"part{number}.safetensors"
        save_file({name: tensors[name] for name in part}, source / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index(source, places)
    assert inspect_directory(source).sparsity == pytest.approx(0.5)
    pack_directory(source, tmp_path / "b")
    for name in ("a", "b"):
        assert_same_function(logits(load(tmp_path / name)[0]), logits(model))
        assert not list((tmp_path / name).glob("*old*")) and not list((tmp_path / name).glob("part*"))


WRONG_INDEX = {
    "no map": ({"metadata": {}}, "expected an object with a weight_map"),
    "a list": ([1], "expected an object with a weight_map"),
    "a number": ({"weight_map": {UP: 3}}, "expected the name of a safetensors file, got 3"),
    "outside": ({"weight_map": {UP: "../model/part.safetensors"}}, "lies outside of the directory"),
    "absolute": ({"weight_map": {UP: "/part.safetensors"}}, "lies outside of the directory"),
    "no such file": ({"weight_map": {UP: "other.safetensors"}}, "there is no other.safetensors"),
    "no such tensor": ({"weight_map": {UP: "part.safetensors", "more": "part.safetensors"}}, "more is not in it"),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_an_index_that_is_wrong_is_named(name, source, tmp_path):
    (source / WHOLE).rename(source / "part.safetensors")
    content, message = WRONG_INDEX[name]
    (source / INDEX).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        pack_directory(source, tmp_path / "packed")
    with pytest.raises(OutputError, match=message):
        inspect_directory(source)


def test_other_weights_than_safetensors_are_named(source, tmp_path):
    (source / WHOLE).rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors files.*found pytorch_model.bin, which transformers can load"):
        pack_directory(source, tmp_path / "packed")
    for number in (1, 2):
        shutil.copy(source / "pytorch_model.bin", source / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(ModelError, match="2 of 3 shards are there"):
        checkpoint_tensors(source)


def test_an_adapter_beside_the_model_is_refused_at_once(source, tmp_path):
    (source / "adapter_config.json").write_text("{}")
    for refused in (
        lambda: load_model(str(source)),
        lambda: pack_directory(source, tmp_path / "packed"),
        lambda: load_any(source),
    ):
        with pytest.raises(ModelError, match="adapter_config.json: a PEFT adapter lies beside the model; merge it"):
            refused()
    for file in ("config.json", WHOLE):
        (source / file).unlink()
    for refused in (lambda: load_model(str(source)), lambda: pack_directory(source, tmp_path / "packed")):
        with pytest.raises(ModelError, match="holds a PEFT adapter alone"):
            refused()
    with pytest.raises(LosaError, match="holds a PEFT adapter alone"):
        inspect_directory(source)


def header(change):
    def damage(directory):
        data = (directory / WHOLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        text = json.dumps(change(entries)).encode() if callable(change) else change
        (directory / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def entry(**changes):
    return header(lambda entries: entries | {UP: entries[UP] | changes})


def text(file, content):
    return lambda directory: (directory / file).write_text(content)


DAMAGE = {
    "empty": (lambda d: store(d, **{UP: lambda t: t[:0]}), f"{UP}: expected shape .64, 32., the file has .0, 32."),
    "reshaped": (lambda d: store(d, **{UP: lambda t: t.reshape(32, 64)}), f"{UP}: expected shape"),
    "a vector": (lambda d: store(d, **{UP: lambda t: t[0]}), f"{UP}: expected shape"),
    "bytes": (lambda d: store(d, **{UP: lambda t: t.to(torch.uint8)}), f"{UP}: expected floating-point weights"),
    "truths": (lambda d: store(d, **{UP: lambda t: t != 0}), f"{UP}: expected floating-point weights"),
    "another block": (lambda d: store(d, **{UP.replace("1", "12"): None}), "says that there are 2 blocks"),
    "no such block": (lambda d: store(d, **{UP.replace("1", "1" * 4999): None}), "no model has a tensor of that name"),
    "overlap": (
        header(lambda e: e | {UP: e[UP] | {"data_offsets": [n + 4 for n in e[GATE]["data_offsets"]]}}),
        "overlap",
    ),
    "fractions": (entry(data_offsets=[0.0, 8192.0]), f"{UP}: shape and data_offsets must be"),
    "truth as a side": (entry(shape=[True, 2048]), f"{UP}: shape and data_offsets must be"),
    "too far": (entry(data_offsets=[2**40, 2**40 + 8192]), "it ends within"),
    "half a type": (entry(dtype="F4"), f"{UP} is F4"),
    "deep": (header(b"[" * 100_000), "no safetensors file"),
    "many digits": (header(b'{"x": {"shape": [' + b"1" * 5000 + b"]}}"), "no safetensors file"),
    "name twice": (header(b'{"x": {}, "x": {}}'), "no safetensors file"),
    "list": (text("config.json", "[]"), "config.json: expected an object"),
    "null": (text("config.json", "null"), "config.json: expected an object"),
    "deep settings": (text("config.json", '{"a":' * 100_000), "config.json: nested too deep"),
    "half": (text("config.json", '{"a": '), "config.json: not JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, source, tmp_path):
    damage, message = DAMAGE[name]
    damage(source)
    with pytest.raises(ModelError, match=message):
        pack_directory(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(OutputError, match=message):
        inspect_directory(source)


def test_loading_names_the_damaged_tensor_too(source):
    store(source, **{UP: lambda t: t[:-1]})
    with pytest.raises(ModelError, match=f"{UP}: expected shape .64, 32., the file has .63, 32."):
        load_model(str(source), device="cpu")


@pytest.mark.parametrize("value", [[1], "x", 3])
def test_settings_of_another_kind_are_named(value, source, tmp_path):
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": value}))
    for refused in (lambda: pack_directory(source, tmp_path / "packed"), lambda: load_any(source, device="cpu")):
        with pytest.raises(ModelError, match="config.json|cannot be loaded"):
            refused()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers'.* expected int, got str"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
    ],
)
def test_settings_that_no_model_has_are_one_line(change, message, source, tmp_path):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for refused in (lambda: pack_directory(source, tmp_path / "packed"), lambda: load_model(str(source), device="cpu")):
        with pytest.raises(ModelError, match=message) as found:
            refused()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_weights_that_are_not_finite_are_named(value, name, source, tmp_path):
    tensors = load_file(source / WHOLE)
    tensors[name][7] = value
    save_file(tensors, source / WHOLE, {"format": "pt"})
    place = "index 7" if tensors[name].ndim == 1 else "row 7, column 0"
    for refused in (lambda: pack_directory(source, tmp_path / "packed"), lambda: load_model(str(source), device="cpu")):
        with pytest.raises(ModelError, match=f"{name} is {value:g} at {place}"):
            refused()


def test_weights_that_are_not_finite_are_named_in_other_files(made, source):
    tensors = load_file(source / WHOLE)
    tensors[UP][3, 5] = float("nan")
    (source / WHOLE).unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{UP} is nan at row 3, column 5"):
        load_model(str(source), device="cpu")


def test_files_that_a_config_names_are_not_passed_over(source, tmp_path):
    shutil.copy(source / WHOLE, source / "other.safetensors")
    store(source, **{UP: lambda weight: weight + 1})
    path = source / "config.json"
    config = json.loads(path.read_text())
    for name in ("other.safetensors", ["other.safetensors"]):
        path.write_text(json.dumps(config | {"transformers_weights": name}))
        for refused in (lambda: pack_directory(source, tmp_path / "packed"), lambda: inspect_directory(source)):
            with pytest.raises(LosaError, match="config.json: transformers_weights: expected none, got .*other"):
                refused()


def test_weights_of_other_formats_are_not_copied(source, tmp_path):
    (source / "original").mkdir()
    for name in ("consolidated.00.pth", "part.safetensors", "params.json"):
        (source / "original" / name).write_text("{}")
    pack_directory(source, tmp_path / "packed")
    unpack_directory(tmp_path / "packed", tmp_path / "dense")
    for directory in (tmp_path / "packed", tmp_path / "dense"):
        assert [path.name for path in (directory / "original").iterdir()] == ["params.json"]


def test_numbers_that_a_type_does_not_hold_are_told_apart(made, source, tmp_path):
    pack_directory(source, tmp_path / "packed")
    tensors = load_file(source / WHOLE)
    tensors[UP][3, 5] = -7e4
    save_file(tensors, source / WHOLE, {"format": "pt"})
    message = f"{UP} is -70000 at row 3, column 5, beyond 65504, the largest number of float16"
    with pytest.raises(ModelError, match=message):
        pack_directory(source, tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ModelError, match=message):
        load_model(str(source), dtype="float16", device="cpu")
    assert load_model(str(source), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    pack_directory(source, tmp_path / "large", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="up_proj is -7.* at row 3, column 5, beyond 65504"):
        load_any(tmp_path / "large", "float16", "cpu")
    with pytest.raises(ModelError, match="dtype: expected one of auto, float32.*got 'half'"):
        load_any(tmp_path / "packed", "half", "cpu")


def test_what_a_format_needs_is_said(made, tmp_path):
    model = tiny_llama(layers=2).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight[:, : linear.in_features // 4 * 3] = 0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="needs 2:4 weights .*model.layers.0.*and 13 others of 14 linears have zeros"):
        pack_directory(tmp_path / "model", tmp_path / "packed", format="sparse-24-bitmask")
    config = tiny_llama(layers=1).config
    config.intermediate_size = 70
    narrow = type(model)(config).requires_grad_(False)
    for linear in block_linears(narrow).values():
        linear.weight[:, ::2] = 0
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="mlp.down_proj: .*nm needs a width that is a multiple of 4, got 70"):
        pack_directory(tmp_path / "narrow", tmp_path / "packed", format="nm")
    assert not (tmp_path / "packed").exists()
    assert pack_directory(tmp_path / "narrow", tmp_path / "packed").packed == 7


def test_commands_on_packed_directories(made, source, tmp_path):
    pack_directory(source, tmp_path / "packed")
    (tmp_path / "text.txt").write_text("the old mill by the river " * 30)
    for command in ("eval", "inspect"):
        more = ("--data", tmp_path / "text.txt", "--length", 16) if command == "eval" else ()
        seen = [invoke(command, directory, *more) for directory in (source, tmp_path / "packed")]
        assert [done.exit_code for done in seen] == [0, 0], seen[1].output
        dense, packed = ([w for w in done.stdout.split() if w[:1].isdigit()] for done in seen)
        assert dense == packed, seen[1].output
    refused = invoke(
        "prune", tmp_path / "packed", "--output", tmp_path / "x", "--data", tmp_path / "text.txt", "--sparsity", 0.5
    )
    assert refused.exit_code == 1 and "packed; `losa unpack` it first" in refused.output


def test_models_that_transformers_does_not_know_are_measured_unchecked(source):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard_of"}))
    found = inspect_directory(source)
    assert found.sparsity == pytest.approx(0.5) and "unheard_of" in found.unchecked
    assert "shapes were not checked against a model" in invoke("inspect", source).output
    path.unlink()
    assert inspect_directory(source).unchecked == "no config.json"


def test_some_rows_of_a_tensor(source):
    tensors = load_file(source / WHOLE)
    with checkpoint_tensors(source) as files:
        for name, tensor in tensors.items():
            for rows in (
                range(0, 1),
                range(3, 16),
                range(5, 5),
                range(len(tensor) - 1, len(tensor)),
                range(len(tensor)),
            ):
                assert torch.equal(files.get(name, rows), tensor[rows.start : rows.stop]), (name, rows)
