"""Resume states: everything comes back to the bit, and nothing comes back from the wrong or a damaged one."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from losa.distributed import watch
from losa.errors import OutputError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.run import state_writing, states
from losa.run.states import Point, Stage, newest_state, stored_shapes
from tests.helpers.saved_rounds import OWNER, at_step, names, records, same, saver, state_of, step, train, wrapped
from tests.helpers.tiny import tiny_llama


@pytest.mark.parametrize("layer", [MaskedLoRALinear, LoRALinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_to_the_bit(tmp_path, layer, dtype, asynchronous):
    def make():
        model = tiny_llama(layers=2).to(dtype)
        wrap_model(model, layer=layer, rank=2, scaling=2.0)
        return model

    model, generator = train(make()), torch.Generator().manual_seed(5)
    for source in (torch.manual_seed, np.random.seed, random.seed):
        source(7)
    random.gauss(0, 1), np.random.standard_normal()  # leaves half a pair behind
    done, writing = records(2), saver(tmp_path, model)
    writing.save(Stage.PRUNED, done)
    step(model, generator)
    state, trained = at_step(model, 3), state_of(model)
    writing.save(Stage.TRAINING, done, state, background=asynchronous)
    expected = {name: moment.clone() for name, moment in state.moments.items()}
    for moment in state.moments.values():  # the next step, while the state may still be written
        moment.add_(1)
    step(model, generator)
    drawn = torch.rand(3), np.random.standard_normal(3), [random.gauss(0, 1) for _ in range(3)]
    with writing.waiting():
        pass

    again = make()
    originals = {name: m.weight.clone() for name, m in wrapped_linears(again).items()}
    dense = {name: m.weight.data for name, m in wrapped_linears(again).items()}
    resumed = saver(tmp_path, again).resume()
    fresh = torch.rand(3), np.random.standard_normal(3), [random.gauss(0, 1) for _ in range(3)]
    assert torch.equal(fresh[0], drawn[0]) and np.array_equal(fresh[1], drawn[1]) and fresh[2] == drawn[2]
    assert same(state_of(again), trained)
    assert resumed.point == Point(2, Stage.TRAINING, 3) and [*resumed.done, resumed.pruned] == done
    assert resumed.start.position == state.position and same(resumed.start.moments, expected)
    before, after = wrapped_linears(model).values(), wrapped_linears(again).values()
    assert [m.weight_replaced for m in after] == [m.weight_replaced for m in before]
    assert same(dense, originals)  # other methods start from these


def test_masks_and_replaced_weights_are_stored_once_in_a_round(tmp_path):
    model = train(wrapped())
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(1))
    writing.save(Stage.TRAINING, records(1), at_step(model, 1))
    writing.save(Stage.DONE, records(1))
    writing.save(Stage.DONE, records(2))  # of a round without training
    parts = {path.name: {key.rpartition(".")[2] for key in stored_shapes(path)} for path in tmp_path.iterdir()}
    assert parts == {
        "round-01-pruned": {"mask", "weight", "lora_A", "lora_B"},
        "round-01": {"lora_A", "lora_B"},
        "round-02": {"mask", "weight", "lora_A", "lora_B"},
    }
    weights = {key.removesuffix(".weight") for key in stored_shapes(tmp_path / "round-02") if key.endswith(".weight")}
    assert weights == {name for name, layer in wrapped_linears(model).items() if layer.weight_replaced}
    assert 0 < len(weights) < len(wrapped_linears(model))


def test_restored_weights_do_not_depend_on_the_file(tmp_path):
    """A tensor of a mapped file would lie at an odd address and round differently."""
    saver(tmp_path, train(wrapped())).save(Stage.DONE, records(1))
    model = wrapped()
    saver(tmp_path, model).resume()
    replaced = [m for m in wrapped_linears(model).values() if m.weight_replaced]
    assert replaced and all(m.weight.data_ptr() % 64 == 0 for m in replaced)


@pytest.mark.parametrize(
    "keep, left",
    [
        (1, ["round-100-pruned", "round-100-step-00000007"]),
        (2, ["round-100-pruned", "round-100-step-00000005", "round-100-step-00000007", "round-99"]),
        (4, ["round-100-pruned", "round-100-step-00000005", "round-100-step-00000007", "round-99"]),
    ],
)
def test_newest_are_kept_with_what_they_need(tmp_path, keep, left):
    model = wrapped()
    writing = saver(tmp_path, model, keep=keep)
    for count in (9, 98, 99):
        writing.save(Stage.DONE, records(count))
    writing.save(Stage.PRUNED, records(100))
    for number in (5, 7):
        writing.save(Stage.TRAINING, records(100), at_step(model, number))
    assert names(tmp_path) == left
    assert saver(tmp_path, wrapped()).resume().point == Point(100, Stage.TRAINING, 7)


def test_a_state_that_was_passed_over_does_not_stay_the_newest(tmp_path, caplog):
    model = wrapped()
    writing = saver(tmp_path, model, keep=1)
    writing.save(Stage.PRUNED, records(1))
    for number in (5, 7):
        writing.save(Stage.TRAINING, records(1), at_step(model, number))
    cut(tmp_path / "round-01-step-00000007")
    resumed = saver(tmp_path, model, keep=1)
    assert resumed.resume().point == Point(1, Stage.PRUNED)
    resumed.save(Stage.TRAINING, records(1), at_step(model, 6))
    assert names(tmp_path) == ["round-01-pruned", "round-01-step-00000006"]


def test_nothing_to_load(tmp_path):
    assert saver(tmp_path / "absent", wrapped()).resume().point is None
    (tmp_path / ".round-01.partial-1").mkdir()
    (tmp_path / "round-one").mkdir()
    assert saver(tmp_path, wrapped()).resume().point is None


def test_an_earlier_versions_state_is_refused(tmp_path):
    (tmp_path / "round-01").mkdir()
    (tmp_path / "round-01" / "layers.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="round-01: was written by an earlier version of losa; .*--overwrite"):
        saver(tmp_path, wrapped()).resume()


def test_another_recipe_or_input_is_named(tmp_path):
    saver(tmp_path, wrapped()).save(Stage.DONE, records(1))
    model = wrapped()
    before = state_of(model)
    other = {"recipe": {"prune": {"sparsity": 0.6}, "seed": 3}, "inputs": OWNER["inputs"]}
    with pytest.raises(OutputError) as caught:
        saver(tmp_path, model, other).resume()
    message = str(caught.value)
    assert "round-01" in message and "prune.sparsity was 0.5, is 0.6" in message and "seed was 0, is 3" in message
    assert message.count(" was 0") == 2
    with pytest.raises(OutputError, match="the model weights changed"):
        saver(tmp_path, model, OWNER | {"inputs": {"model weights": "b"}}).resume()
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    "settings, message",
    [({"layers": 3}, "the checkpoint lacks model.layers.2"), ({"layers": 1}, "the model lacks model.layers.1")],
)
def test_another_model_is_refused(tmp_path, settings, message):
    saver(tmp_path, wrapped()).save(Stage.DONE, records(1))
    model = tiny_llama(**settings)
    wrap_model(model, rank=2, scaling=2.0)
    with pytest.raises(OutputError, match=f"another model; {message}"):
        saver(tmp_path, model).resume()


def test_other_shapes_are_refused(tmp_path):
    saver(tmp_path, train(wrapped())).save(Stage.DONE, records(1))
    model = wrapped(hidden=64)
    before = state_of(model)
    with pytest.raises(OutputError, match=r"another model; model.layers.0.*expected \(64, 8\), found \(32, 4\)"):
        saver(tmp_path, model).resume()
    assert same(state_of(model), before)


def cut(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def flip_bit(path):
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[-1] ^= 1
    (path / "__0_0.distcp").write_bytes(data)


def change_index(path):
    with (path / ".metadata").open("ab") as file:
        file.write(b"x")


def lose_tensors(path):
    (path / "__0_0.distcp").unlink()


def cut_json(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-20])


def remove(path):
    (path / "state.json").unlink()


@pytest.mark.parametrize(
    "damage", [cut, flip_bit, change_index, lose_tensors, cut_json, remove], ids=lambda d: d.__name__
)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    """A damaged state, and a state whose base is damaged, for the one before it."""
    first = train(wrapped(), seed=1)
    saver(tmp_path, first).save(Stage.DONE, records(1))
    model = train(wrapped(), seed=2)
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(2))
    writing.save(Stage.TRAINING, records(2), at_step(model, 4))
    damage(tmp_path / "round-02-pruned")
    again = wrapped()
    with caplog.at_level(logging.WARNING, logger="losa"):
        assert saver(tmp_path, again).resume().point == Point(1, Stage.DONE)
    assert "round-02-step-00000004: damaged" in caplog.text and "round-02-pruned: damaged" in caplog.text
    assert same(state_of(again), state_of(first))
    damage(tmp_path / "round-01")
    with pytest.raises(OutputError, match="round-02-step-00000004: damaged .*none before it can be read; --overwrite"):
        saver(tmp_path, wrapped()).resume()


def test_a_state_of_another_base_is_no_state(tmp_path, caplog):
    """A base that was written again under its name must not serve the states of the one before."""
    model = train(wrapped())
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(1))
    writing.save(Stage.TRAINING, records(1), at_step(model, 4))
    saver(tmp_path / "other", train(wrapped(), seed=3)).save(Stage.PRUNED, records(1))
    (tmp_path / "round-01-pruned").rename(tmp_path / "before")
    (tmp_path / "other" / "round-01-pruned").rename(tmp_path / "round-01-pruned")
    assert saver(tmp_path, wrapped()).resume().point == Point(1, Stage.PRUNED)
    assert "round-01-pruned, which it needs, is another one" in caplog.text


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("when", ["write_data", "finish"])
@pytest.mark.parametrize(
    "raised, expected, message",
    [
        (no_space(), OutputError, "^checkpoint .*step-00000001: No space left on device$"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch, background, when, raised, expected, message):
    model = wrapped()
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(1))
    write = getattr(dcp.FileSystemWriter, when)

    def fails(*arguments):
        write(*arguments)
        raise raised

    monkeypatch.setattr(dcp.FileSystemWriter, when, fails)
    with pytest.raises(expected, match=message), writing.waiting():
        writing.save(Stage.TRAINING, records(1), at_step(model, 1), background)
    assert names(tmp_path) == ["round-01-pruned"]
    assert saver(tmp_path, wrapped()).resume().point == Point(1, Stage.PRUNED)


def test_a_save_in_the_background_goes_on_beside_training(tmp_path, monkeypatch):
    """Until all of it is written no state has its name. A failure is known without waiting, and raised at a save."""
    model = wrapped()
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(1))
    digest, go = state_writing.file_digest, threading.Event()

    def waits(path):
        assert go.wait(30)
        if "step-00000002" in str(path):
            raise no_space()
        return digest(path)

    monkeypatch.setattr(state_writing, "file_digest", waits)
    writing.save(Stage.TRAINING, records(1), at_step(model, 1), background=True)
    assert "round-01-step-00000001" not in names(tmp_path) and not writing.failed
    go.set()
    writing.save(Stage.TRAINING, records(1), at_step(model, 2), background=True)
    assert (tmp_path / "round-01-step-00000001").is_dir()
    deadline = time.monotonic() + 30
    while not writing.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(OutputError, match="step-00000002: No space left on device"):
        writing.save(Stage.DONE, records(1))
    assert names(tmp_path) == ["round-01-pruned", "round-01-step-00000001"]


def test_the_watch_waits_for_files(tmp_path, monkeypatch):
    """Writing and checking may take longer than ``distributed.timeout``."""
    seen = []

    def noted(name, real):
        def notes(*arguments):
            deadline = time.monotonic() + 10
            while not watch._position.awaited and time.monotonic() < deadline:
                time.sleep(0.001)
            seen.append((name, watch._position.awaited))
            return real(*arguments)

        return notes

    model = wrapped()
    writing = saver(tmp_path, model)
    for name in ("write_data", "finish"):
        monkeypatch.setattr(dcp.FileSystemWriter, name, noted(name, getattr(dcp.FileSystemWriter, name)))
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", noted("read_data", dcp.FileSystemReader.read_data))
    monkeypatch.setattr(states, "file_digest", noted("file_digest", states.file_digest))
    with writing.waiting():
        writing.save(Stage.PRUNED, records(1))
        writing.save(Stage.TRAINING, records(1), at_step(model, 1), background=True)
    saver(tmp_path, model).resume()
    assert {name for name, _ in seen} == {"write_data", "finish", "read_data", "file_digest"}
    assert all(awaited for _, awaited in seen) and not watch._position.awaited


def test_an_interrupt_lets_a_save_in_the_background_end(tmp_path, monkeypatch):
    model = wrapped()
    writing = saver(tmp_path, model)
    writing.save(Stage.PRUNED, records(1))
    digest, go = state_writing.file_digest, threading.Event()
    monkeypatch.setattr(state_writing, "file_digest", lambda path: go.wait(30) and digest(path))

    def interrupt():
        while not watch._position.awaited:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        go.set()

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), writing.waiting():
        writing.save(Stage.TRAINING, records(1), at_step(model, 1), background=True)
        thread.start()
    thread.join()
    assert names(tmp_path) == ["round-01-pruned", "round-01-step-00000001"]
    assert saver(tmp_path, wrapped()).resume().point == Point(1, Stage.TRAINING, 1)


def test_the_document_is_plain_json(tmp_path):
    saver(tmp_path, wrapped()).save(Stage.DONE, records(4))
    document = json.loads((tmp_path / "round-04" / "state.json").read_text())
    assert [each["index"] for each in document["state"]["rounds"]] == [1, 2, 3, 4]
    assert document["recipe"] == OWNER["recipe"] and document["base"] is None
    assert newest_state(tmp_path, OWNER).document == document
