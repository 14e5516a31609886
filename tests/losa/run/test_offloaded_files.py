"""The files of an offloaded run: of the model, of finished blocks, and of the output; runs that end and go on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from losa.errors import ModelError, OutputError
from losa.output import offloaded_export
from losa.run import block_store, offloaded, pipeline
from losa.run.block_store import BlockStore
from losa.run.workspace import BLOCKS
from tests.helpers.offloaded import ALL, Killed, assert_same_output, assert_same_record, killed, run
from tests.helpers.runs import settings


@pytest.fixture
def interrupted(kind_directory, tmp_path, monkeypatch):
    """(model and text, output) of a run of four blocks with rates by CKA that ended somewhere."""

    def at(place, name, after=0):
        made = kind_directory("Llama", layers=4)
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


def test_a_run_that_is_killed_goes_on(kind_directory, tmp_path):
    """By SIGKILL, twice, each time as soon as a block is finished: nobody cleans up."""
    made = kind_directory("Llama", layers=24)
    sections = {"offload": "disk", "method": "prune_only", "evaluate": None}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings(made, tmp_path / "out", **sections)))
    done = [0]
    for more in ([], ["--resume"]):
        command = [sys.executable, "-m", "losa", "run", str(recipe), *more]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(list(store_of(tmp_path / "out").glob("block-*.json"))) == done[-1]:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        done.append(len(list(store_of(tmp_path / "out").glob("block-*.json"))))
        assert done[-2] < done[-1] < 24 and not (tmp_path / "out").exists()
    run(made, tmp_path / "out", resume=True, offload="disk", evaluate=None)
    run(made, tmp_path / "whole", evaluate=None)
    assert_same_output(tmp_path / "out", tmp_path / "whole")


def test_a_written_block_is_compared_with_the_one_in_memory(kind_directory, tmp_path, monkeypatch):
    made, write = kind_directory("Llama"), offloaded_export.write_shard

    def changed(path, tensors):
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        return write(path, tensors | {name: tensors[name] + 1})

    monkeypatch.setattr(offloaded_export, "write_shard", changed)
    with pytest.raises(OutputError, match="down_proj.weight: the written tensor differs"):
        run(made, tmp_path / "out", offload="disk")
    assert not (tmp_path / "out").exists()


def test_a_written_model_is_compared_with_the_one_that_was_pruned(kind_directory, tmp_path, monkeypatch):
    made, write = kind_directory("Llama"), offloaded_export.write_shard

    def changed(path, tensors):
        scale = 2 if "model.norm.weight" in tensors else 1
        return write(path, {name: tensor * scale for name, tensor in tensors.items()})

    monkeypatch.setattr(offloaded_export, "write_shard", changed)
    with pytest.raises(OutputError, match="the written tensor differs"):
        run(made, tmp_path / "out", offload="disk")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work").exists()


def test_files_that_take_the_model_s_place_are_not_read(kind_directory, tmp_path, monkeypatch):
    made, take = kind_directory("Llama", layers=4), BlockStore.take
    other = made / "other.safetensors"
    path = made / "model" / "model.safetensors"
    run(made, tmp_path / "whole")
    save_file({n: t * 2 for n, t in load_file(path).items()}, other, {"format": "pt"})

    def taken(self, index, *args):
        if index == 0:
            os.replace(other, path)
        return take(self, index, *args)

    monkeypatch.setattr(BlockStore, "take", taken)
    run(made, tmp_path / "out", offload="disk")
    assert_same_output(tmp_path / "out", tmp_path / "whole")


def test_files_that_are_written_to_are_noticed(kind_directory, tmp_path, monkeypatch):
    made, take = kind_directory("Llama", layers=4), BlockStore.take
    path = made / "model" / "model.safetensors"

    def taken(self, index, *args):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        return take(self, index, *args)

    monkeypatch.setattr(BlockStore, "take", taken)
    with pytest.raises(ModelError, match="model.safetensors: was written to while it was read"):
        run(made, tmp_path / "out", offload="disk")


def test_a_block_that_is_damaged_before_the_export_is_noticed(kind_directory, tmp_path, monkeypatch):
    made, result = kind_directory("Llama"), offloaded._result

    def damaging(model, inputs, store):
        found = result(model, inputs, store)
        data = bytearray(store.stored[1].path.read_bytes())
        data[-7] ^= 1
        store.stored[1].path.write_bytes(data)
        return found

    monkeypatch.setattr(offloaded, "_result", damaging)
    with pytest.raises(OutputError, match="model-00003-of-00003.safetensors is not the file that was written"):
        run(made, tmp_path / "out", offload="disk")
    assert not (tmp_path / "out").exists()


def test_blocks_behind_a_damaged_one_do_not_come_back(interrupted, monkeypatch):
    """Not even if the process that pruned the damaged block again ends before the next one."""
    made, output = interrupted(BlockStore, "take", 3)
    path = store_of(output) / "block-00001.json"
    path.write_text(path.read_text().replace("0", "1", 1))
    with monkeypatch.context() as patch:
        add = BlockStore._add
        patch.setattr(BlockStore, "_add", lambda self, stored: killed() if len(self.stored) == 1 else add(self, stored))
        with pytest.raises(Killed):
            run(made, output, resume=True, offload="disk", **ALL)
    go_on(made, output, monkeypatch, 2)


@pytest.mark.parametrize("begun, then", [("disk", None), (None, "disk")])
def test_work_of_the_other_kind_is_not_thrown_away(begun, then, kind_directory, tmp_path, monkeypatch):
    made = kind_directory("Llama")
    place = offloaded if begun else pipeline
    with monkeypatch.context() as patch:
        patch.setattr(place, "_result" if begun else "export_together", killed)
        with pytest.raises(Killed):
            run(made, tmp_path / "out", offload=begun)
    other = "with" if begun else "without"
    with pytest.raises(OutputError, match=f"was begun {other} offload: disk"):
        run(made, tmp_path / "out", resume=True, offload=then)
    run(made, tmp_path / "out", resume=True, offload=begun)
