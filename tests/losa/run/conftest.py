"""Fixtures of the tests of runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend

from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    tiny_llama(layers=3).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    text = "The quick brown fox jumps over the lazy dog; a sparse model decodes faster than a dense one. "
    (root / "text.txt").write_text("\n".join(f"{i}: {text}" for i in range(60)))
    return root


@pytest.fixture(scope="module")
def kind_directory(workspace, tmp_path_factory):
    """A model of a kind, and text, by the kind's name."""

    def saved(name, dtype=torch.float32, layers=2, **options):
        made = tmp_path_factory.mktemp(name)
        of_kind(replace(KINDS[name], layers=max(layers, KINDS[name].layers))).to(dtype).save_pretrained(
            made / "model", **options
        )
        tiny_tokenizer().save_pretrained(made / "model")
        (made / "text.txt").write_text((workspace / "text.txt").read_text())
        return made

    return saved


@pytest.fixture
def two_processes():
    """This process is the first of two, on a machine of its own."""
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()
