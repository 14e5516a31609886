"""Pruning with one block in memory at a time: the same bits as with all of them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from losa.errors import ModelError, OutputError, RecipeError
from losa.output import offloaded_export
from losa.recipe.reading import parse_recipe
from losa.run import block_store, offloaded
from losa.run.block_store import BLOCKS, BlockStore
from losa.run.pipeline import run_recipe
from losa_kernels.tensors import as_bits
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.runs import settings
from tests.helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(workspace, tmp_path_factory):
    def saved(name, dtype=torch.float32, layers=2, **options):
        made = tmp_path_factory.mktemp(name)
        of_kind(replace(KINDS[name], layers=max(layers, KINDS[name].layers))).to(dtype).save_pretrained(
            made / "model", **options
        )
        tiny_tokenizer().save_pretrained(made / "model")
        (made / "text.txt").write_text((workspace / "text.txt").read_text())
        return made

    return saved


def run(made, output, resume=False, **sections):
    return run_recipe(parse_recipe(settings(made, output, method="prune_only", **sections)), resume=resume)


def tensors_of(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_output(ours, theirs):
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(as_bits(found[name]), as_bits(tensor)), name


def assert_same_record(ours, theirs):
    assert ours.masks == theirs.masks and ours.unmasked == theirs.unmasked
    for mine, other in zip(ours.results, theirs.results, strict=True):
        assert vars(mine) | {"seconds": 0} == vars(other) | {"seconds": 0}
    for mine, other in zip(ours.rounds, theirs.rounds, strict=True):
        assert vars(mine) | {"seconds": 0} == vars(other) | {"seconds": 0}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_out_as_from_memory(name, directory, tmp_path):
    made = directory(name)
    whole = run(made, tmp_path / "whole")
    offloaded = run(made, tmp_path / "offloaded", offload="disk")
    assert_same_output(tmp_path / "offloaded", tmp_path / "whole")
    assert_same_record(offloaded, whole)


ALL = {"allocation": {"mean_rank": 2, "rank_max": 6, "apply_to": "all"}}
VARIANTS = {
    "sparsegpt": {"prune": {"pruner": "sparsegpt", "pattern": "2:4"}},
    "alps": {"prune": {"pruner": "alps", "sparsity": 0.5}},
    "magnitude": {"prune": {"pruner": "magnitude", "sparsity": 0.7}},
    "some linears": {"prune": {"sparsity": 0.5, "targets": ["q_proj", "down_proj"]}},
    "cka": ALL,
    "mixed": ALL | {"prune": {"pattern": "2:4", "mixed": True}},
    "owl": {"allocation": ALL["allocation"] | {"rates": "owl"}},
    "update": {"allocation": ALL["allocation"] | {"rates": "update"}},
    # A batch that is smaller than the others, and nothing to evaluate.
    "uneven": {
        "calibration": {"data": "TEXT", "samples": 5, "length": 32, "cka_samples": 4, "batch_size": 2},
        "evaluate": None,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_of_pruning_comes_out_as_from_memory(variant, directory, tmp_path):
    """In bfloat16, from several files."""
    made = directory("Llama", torch.bfloat16, max_shard_size="10KB")
    sections = VARIANTS[variant]
    if "calibration" in sections:
        sections = sections | {"calibration": sections["calibration"] | {"data": str(made / "text.txt")}}
    whole = run(made, tmp_path / "whole", **sections)
    offloaded = run(made, tmp_path / "offloaded", offload="disk", **sections)
    assert_same_output(tmp_path / "offloaded", tmp_path / "whole")
    assert_same_record(offloaded, whole)
    assert len({*offloaded.rounds[0].sparsity}) == 1 or "allocation" in sections


class Killed(BaseException):
    """A process that ends here."""


def killed(*args, **kwargs):
    raise Killed


@pytest.fixture
def interrupted(directory, tmp_path, monkeypatch):
    """(model and text, output) of a run of four blocks with rates by CKA that ended somewhere."""

    def at(place, name, after=0):
        made = directory("Llama", layers=4)
        original, calls = getattr(place, name), []

        def counted(*args, **kwargs):
            calls.append(name)
            return killed() if len(calls) > after else original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, counted)
            with pytest.raises(Killed):
                run(made, tmp_path / "out", offload="disk", **ALL)
        return made, tmp_path / "out"

    return at


def go_on(made, output, monkeypatch, pruned):
    """Resume, and compare with a run in memory. ``pruned``: how many blocks the second process prunes."""
    taken = []
    take = BlockStore.take
    monkeypatch.setattr(BlockStore, "take", lambda self, index, *args: taken.append(index) or take(self, index, *args))
    found = run(made, output, resume=True, offload="disk", **ALL)
    expected = run(made, output.with_name("whole"), **ALL)
    assert taken == list(range(4 - pruned, 4))
    assert_same_output(output, output.with_name("whole"))
    assert_same_record(found, expected)
    assert not output.with_name("out.work").exists()


PLACES = {
    "before anything": (BlockStore, "begin", 0, 4),
    "in the rates": (BlockStore, "rates", 0, 4),
    "in the first block": (BlockStore, "take", 0, 4),
    "in the third block": (BlockStore, "take", 2, 2),
    # The file of the third block is there, and nothing says that it is complete.
    "before a document": (block_store, "write_document", 4, 2),
    "behind the blocks": (offloaded, "_result", 0, 0),
    "in the export": (offloaded_export, "write_rest", 0, 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_later_process_goes_on_with_the_next_block(place, interrupted, monkeypatch):
    owner, name, after, pruned = PLACES[place]
    made, output = interrupted(owner, name, after)
    assert not output.exists()
    if place == "before anything":
        assert not output.with_name("out.work").exists()
    go_on(made, output, monkeypatch, pruned)


def store_of(output):
    return output.with_name("out.work") / "prune_only" / BLOCKS


@pytest.mark.parametrize(
    "damaged", ["block-00001.json", "model-00003-of-00005.safetensors", "rates.json", "start.json"]
)
def test_a_damaged_block_is_pruned_again(damaged, interrupted, monkeypatch, caplog):
    made, output = interrupted(BlockStore, "take", 3)
    path = store_of(output) / damaged
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        go_on(made, output, monkeypatch, 4 if damaged in ("rates.json", "start.json") else 3)
    assert "damaged" in caplog.text


def test_blocks_of_another_recipe_or_model_are_refused(interrupted):
    made, output = interrupted(BlockStore, "take", 2)
    with pytest.raises(OutputError, match="written by another recipe .prune.sparsity was 0.5, is 0.6"):
        run(made, output, resume=True, offload="disk", **ALL | {"prune": {"sparsity": 0.6}})
    with pytest.raises(OutputError, match="unfinished work"):
        run(made, output, offload="disk", **ALL)
    path = next((made / "model").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="the model weights changed"):
        run(made, output, resume=True, offload="disk", **ALL)
    assert len(list(store_of(output).glob("block-*.json"))) == 2


def test_a_written_block_is_compared_with_the_one_in_memory(directory, tmp_path, monkeypatch):
    made, write = directory("Llama"), offloaded_export.write_shard

    def changed(path, tensors):
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        return write(path, tensors | {name: tensors[name] + 1})

    monkeypatch.setattr(offloaded_export, "write_shard", changed)
    with pytest.raises(OutputError, match="down_proj.weight: the written tensor differs"):
        run(made, tmp_path / "out", offload="disk")
    assert not (tmp_path / "out").exists()


def test_a_written_model_is_compared_with_the_one_that_was_pruned(directory, tmp_path, monkeypatch):
    made, write = directory("Llama"), offloaded_export.write_shard

    def changed(path, tensors):
        scale = 2 if "model.norm.weight" in tensors else 1
        return write(path, {name: tensor * scale for name, tensor in tensors.items()})

    monkeypatch.setattr(offloaded_export, "write_shard", changed)
    with pytest.raises(OutputError, match="the written tensor differs"):
        run(made, tmp_path / "out", offload="disk")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work").exists()


REFUSED = {
    "a method that trains": (
        {"method": "losa"},
        "offload: disk: expected method prune_only alone, got losa, which train",
    ),
    "a method that is compared": ({"compare": ["lora"]}, "got lora, which train"),
    "a GGUF file": ({"gguf_file": "a.gguf"}, "not with gguf_file"),
    "rows in host memory": ({"distributed": {"mode": "fsdp", "cpu_offload": True}}, "not with distributed.cpu_offload"),
    "a smaller model": ({"prune": {"pruner": "wanda_sp", "sparsity": 0.25}}, "wanda_sp makes a smaller model"),
    "gradients": (
        {"prune": {"pruner": "pruner_zero", "sparsity": 0.5}},
        "gradients, and needs the model whole, not offl",
    ),
    "expected losses": (
        {"allocation": ALL["allocation"] | {"rates": "fisher"}},
        "needs the model whole, not offloaded",
    ),
    "tried widths": ({"allocation": ALL["allocation"] | {"rates": "atp"}}, "tries masks of the whole model"),
    "rates of linears": ({"allocation": ALL["allocation"] | {"per": "linear"}}, "allocation.per: block, got linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_whole_model_is_refused(case, directory, tmp_path):
    sections, message = REFUSED[case]
    made = directory("Llama")
    with pytest.raises(RecipeError, match=message):
        run_recipe(
            parse_recipe(settings(made, tmp_path / "out", **{"method": "prune_only", "offload": "disk"} | sections))
        )
    assert not list(tmp_path.glob("out*"))


def test_a_weight_that_is_not_finite_is_named(directory, tmp_path):
    made = directory("Llama")
    path = made / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little") + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data[begin : begin + 4] = b"\x00\x00\x80\x7f"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj.weight is inf at row 0, column 0"):
        run(made, tmp_path / "out", offload="disk")
