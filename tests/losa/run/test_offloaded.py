"""Pruning with one block in memory at a time: the same bits as with all of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from losa.errors import LosaError
from losa.recipe.reading import parse_recipe
from losa.run.pipeline import run_recipe
from losa_kernels.tensors import as_bits
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.runs import settings
from tests.helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(workspace, tmp_path_factory):
    def saved(name, dtype=torch.float32, **options):
        made = tmp_path_factory.mktemp(name)
        of_kind(KINDS[name]).to(dtype).save_pretrained(made / "model", **options)
        tiny_tokenizer().save_pretrained(made / "model")
        (made / "text.txt").write_text((workspace / "text.txt").read_text())
        return made

    return saved


def run(made, output, **sections):
    return run_recipe(parse_recipe(settings(made, output, method="prune_only", **sections)))


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
