"""Metrics on a full or failing disk: an error that names the file, and a file that the next run can go on with."""

from __future__ import annotations

import errno
import io
import json
import os
import sys

import pytest
import torch

from losa.data.sequences import PackedData
from losa.errors import NumericsError, OutputError
from losa.recipe.training import TrainConfig
from losa.training.trainer import Trainer
from tests.helpers.tiny import tiny_llama, wrap


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trainer(directory, **settings) -> Trainer:
    model = tiny_llama(layers=1)
    wrap(model)
    config = TrainConfig(data="unused", length=16, batch_size=2, **settings)
    return Trainer(model, config, seed=0, output_dir=directory, total_sequences=8, device="cpu")


def data(sequences=8) -> PackedData:
    ids = torch.randint(2, 90, (sequences, 16), generator=torch.Generator().manual_seed(0))
    return PackedData(ids, ids.clone())


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Disk(io.RawIOBase):
    """A file with room for so many bytes; ``closing``: the error comes when it is closed, as of some network disks."""

    def __init__(self, path, room: int, closing: bool = False):
        self.file, self.room, self.closing_fails = io.FileIO(path, "ab"), room, closing

    def write(self, chunk) -> int:
        taken = self.file.write(bytes(chunk)[: self.room])
        if not taken:
            raise full()
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()
        if self.closing_fails:
            self.closing_fails = False
            raise full()


@pytest.mark.parametrize("room, closing", [(0, False), (100, False), (150, True), (10_000, True)])
def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path, monkeypatch, room, closing):
    path = tmp_path / "metrics.jsonl"
    opened = type(path).open

    def limited(self, mode="r", **options):
        return Disk(self, room, closing) if mode == "ab" else opened(self, mode, **options)

    failing = trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", limited)
        with pytest.raises(OutputError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            failing.train(data(), round_index=1)
    assert path.stat().st_size == min(room, path.stat().st_size)
    trainer(tmp_path).train(data(), round_index=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_an_error_in_training_is_not_hidden_by_the_disk(tmp_path, monkeypatch):
    failing = trainer(tmp_path, learning_rate=1e-3)
    monkeypatch.setattr(failing, "_step", lambda *arguments: (_ for _ in ()).throw(NumericsError("round 1")))
    opened = type(tmp_path).open
    monkeypatch.setattr(
        type(tmp_path),
        "open",
        lambda self, mode="r", **o: Disk(self, 9, True) if mode == "ab" else opened(self, mode, **o),
    )
    with pytest.raises(NumericsError, match="round 1"):
        failing.train(data(), round_index=1)


@pytest.mark.parametrize(
    "junk",
    [
        b'{"step": 2, "lo',
        b'{"step": 2, "loss": 1.0}',
        b"\xff\xfe\x00\n",
        b'{"loss": 1.0}\n',
        b'{"step": "2"}\n',
        b"[1]\nnull\n3\n\n",
        b"[" * 5000 + b"\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b'{"step": 1, "text": "a\\u2028b"}\x0b\x1c\n',
    ],
)
def test_cut_and_broken_lines_go(tmp_path, junk):
    whole = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(junk if junk.startswith(b'{"step": 1') else whole + junk)
    going_on = trainer(tmp_path)
    going_on.global_step = 1
    going_on.train(data(), round_index=2)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps[-4:] == [2, 3, 4, 5] and set(steps[:-4]) <= {1}


def test_failures_of_reading_rewriting_and_opening(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')

    def fails(*arguments, **options):
        raise full()

    for owner, name in ((type(tmp_path), "read_bytes"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(OutputError, match=r"metrics\.jsonl: No space"):
                trainer(tmp_path).train(data(), round_index=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 9}\n'
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: Is a directory"):
        trainer(tmp_path).train(data(), round_index=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/metrics: Not a directory"):
        trainer(tmp_path / "file" / "metrics")


@pytest.mark.parametrize("where", ["__init__", "add_scalar", "close"])
def test_tensorboard_on_a_full_disk(tmp_path, monkeypatch, where):
    def fails(self, *arguments, **options):
        raise full()

    methods = {name: lambda self, *a, **k: None for name in ("__init__", "add_scalar", "close")}
    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = type("SummaryWriter", (), methods | {where: fails})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    failing = trainer(tmp_path, tensorboard=True)
    with pytest.raises(OutputError, match="cannot write .*tensorboard: No space"):
        failing.train(data(), round_index=1)
    monkeypatch.setattr(fake.SummaryWriter, where, lambda self, *a, **k: None)
    trainer(tmp_path, tensorboard=True).train(data(), round_index=1)
    assert len(lines(tmp_path)) == 4
