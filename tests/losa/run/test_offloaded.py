"""Pruning with one block in memory at a time: the same bits as with all of them."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from losa.distributed.sharding import gathered
from losa.errors import ModelError, OutputError, RecipeError
from losa.evaluation.perplexity import perplexity
from losa.model.block_passes import BlockPasses
from losa.model.offloaded import OffloadedBlocks, load_offloaded
from losa.model.wrapping import sparsity_of
from losa.recipe.reading import parse_recipe
from losa.run import block_store
from losa.run.fingerprint import model_digest
from losa.run.offloaded import _survey as survey_of
from losa.run.pipeline import run_recipe
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.offloaded import ALL, Killed, assert_same_output, assert_same_record, killed, run
from tests.helpers.runs import settings


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_out_as_from_memory(name, kind_directory, tmp_path):
    made = kind_directory(name)
    whole = run(made, tmp_path / "whole")
    offloaded = run(made, tmp_path / "offloaded", offload="disk")
    assert_same_output(tmp_path / "offloaded", tmp_path / "whole")
    assert_same_record(offloaded, whole)


VARIANTS = {
    "sparsegpt": {"prune": {"pruner": "sparsegpt", "pattern": "2:4"}},
    "alps": {"prune": {"pruner": "alps", "sparsity": 0.5}},
    "weights that may come back": {"prune": {"pruner": "sparsegpt", "sparsity": 0.5, "regrow": True}},
    "in parts": {
        "prune": {"pruner": "sparsegpt", "sparsity": 0.5, "regrow": True},
        "calibration": {"data": "TEXT", "samples": 4, "length": 32, "batch_size": 2, "statistics_gb": 1e-6},
    },
    "another dtype": {"dtype": "float32"},
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
def test_every_way_of_pruning_comes_out_as_from_memory(variant, kind_directory, tmp_path):
    """In bfloat16, from several files."""
    made = kind_directory("Llama", torch.bfloat16, max_shard_size="10KB")
    sections = VARIANTS[variant]
    if "calibration" in sections:
        sections = sections | {"calibration": sections["calibration"] | {"data": str(made / "text.txt")}}
    whole = run(made, tmp_path / "whole", **sections)
    offloaded = run(made, tmp_path / "offloaded", offload="disk", **sections)
    assert_same_output(tmp_path / "offloaded", tmp_path / "whole")
    assert_same_record(offloaded, whole)
    assert (len({*offloaded.rounds[0].sparsity}) > 1) == ("allocation" in sections and variant != "mixed")


REFUSED = {
    "a method that trains": (
        {"method": "losa"},
        "offload: disk: expected method prune_only alone, got losa, which train",
    ),
    "a method that is compared": ({"compare": ["lora"]}, "got lora, which train"),
    "a GGUF file": ({"gguf_file": "a.gguf"}, "not with gguf_file"),
    "shards": ({"distributed": {"mode": "fsdp"}}, "holds no shards, got distributed.mode: fsdp"),
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
def test_what_needs_the_whole_model_is_refused(case, kind_directory, tmp_path):
    sections, message = REFUSED[case]
    made = kind_directory("Llama")
    with pytest.raises(RecipeError, match=message):
        run_recipe(
            parse_recipe(settings(made, tmp_path / "out", **{"method": "prune_only", "offload": "disk"} | sections))
        )
    assert not list(tmp_path.glob("out*"))


def test_a_weight_that_is_not_finite_is_named(kind_directory, tmp_path):
    made = kind_directory("Llama")
    path = made / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little") + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data[begin : begin + 4] = b"\x00\x00\x80\x7f"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj.weight is inf at row 0, column 0"):
        run(made, tmp_path / "out", offload="disk")


def test_one_block_is_in_memory_at_a_time(kind_directory, tmp_path, monkeypatch):
    """And none is when the run is over; nor is the model, when nobody holds it."""
    made = kind_directory("Llama", layers=4)
    models, most = [], []
    load = OffloadedBlocks._load

    def counted(self, index):
        load(self, index)
        models.append(weakref.ref(self.model))
        most.append(sum(any(not p.is_meta for p in block.parameters()) for block in self.blocks))

    monkeypatch.setattr(OffloadedBlocks, "_load", counted)
    run(made, tmp_path / "out", offload="disk", **ALL)
    assert len(most) > 20 and set(most) == {1}
    gc.collect()
    assert not any(model() for model in models)


def test_what_is_held_does_not_grow_with_the_blocks(kind_directory, tmp_path, monkeypatch):
    """Of tensors that Python sees, when a block has come and when it is written."""
    held, load, write = [], OffloadedBlocks._load, block_store.write_block

    def noting(work):
        def noted(*args):
            found = work(*args)
            gc.collect()
            alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta]
            held[-1].append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values()))
            return found

        return noted

    monkeypatch.setattr(OffloadedBlocks, "_load", noting(load))
    monkeypatch.setattr(block_store, "write_block", noting(write))
    for layers in (2, 6):
        made = kind_directory("Llama", layers=layers)
        held.append([])
        run(made, tmp_path / str(layers), offload="disk", evaluate=None)
    block = 4 * sum(p.numel() for p in of_kind(KINDS["Llama"]).model.layers[0].parameters())
    assert max(held[1]) - max(held[0]) < block, "four blocks more"


EARLY = {
    "targets": ({"prune": {"sparsity": 0.5, "targets": ["nope"]}}, ModelError, "'nope' matches no linear"),
    "a pattern": ({"prune": {"pattern": "3:7"}}, RecipeError, "no multiple of 7"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_is_wrong_is_told_before_weights_are_read(case, kind_directory, tmp_path, monkeypatch):
    sections, kind, message = EARLY[case]
    made = kind_directory("Llama")
    monkeypatch.setattr(OffloadedBlocks, "_load", lambda *_: pytest.fail("read"))
    with pytest.raises(kind, match=message):
        run(made, tmp_path / "out", offload="disk", **sections)
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_is_too_small_is_told(kind_directory, tmp_path, monkeypatch):
    made = kind_directory("Llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OutputError, match="GB of disk, 1e-08 GB are free"):
        run(made, tmp_path / "out", offload="disk")


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT2"])
def test_the_digest_is_that_of_the_model_in_memory(name, kind_directory):
    model, _, source = load_offloaded(str(kind_directory(name) / "model"), device="cpu")
    digest, zeros, prunable = survey_of(model, source.blocks)
    whole = of_kind(KINDS[name])
    assert digest == model_digest(whole) and (zeros, prunable) == sparsity_of(whole)


def test_windows_are_taken_in_groups(kind_directory, monkeypatch):
    made = kind_directory("Llama", layers=4)
    loads, load = [], OffloadedBlocks._load
    monkeypatch.setattr(OffloadedBlocks, "_load", lambda self, index: loads.append(index) or load(self, index))
    model, _, _ = load_offloaded(str(made / "model"), device="cpu")
    tokens = torch.randint(0, 90, (32 * 7,), generator=torch.Generator().manual_seed(0))
    expected = perplexity(model, tokens, 32, 2)
    loads.clear()
    monkeypatch.setattr("losa.evaluation.perplexity.HIDDEN_BYTES", 2 * 2 * 32 * 32 * 4)
    assert perplexity(model, tokens, 32, 2) == expected
    assert loads == [0, 1, 2, 3] * 2, "four batches, two at a time"


def test_hidden_states_of_one_group_of_windows_are_held(kind_directory, monkeypatch):
    model, _, _ = load_offloaded(str(kind_directory("Llama") / "model"), device="cpu")
    alive, most, init = weakref.WeakSet(), [], BlockPasses.__init__

    def counted(self, *args):
        alive.add(self)
        most.append(len(alive))
        init(self, *args)

    monkeypatch.setattr(BlockPasses, "__init__", counted)
    monkeypatch.setattr("losa.evaluation.perplexity.HIDDEN_BYTES", 1)
    perplexity(model, torch.arange(32 * 5) % 90, 32, 1)
    assert most == [1] * 5


def test_a_number_beyond_the_dtype_is_named(kind_directory, tmp_path):
    made = kind_directory("Llama")
    path = made / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = 1e6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="up_proj.weight is 1e.06 at row 3, column 2, beyond 65504"):
        run(made, tmp_path / "out", offload="disk", dtype="float16")


def test_a_block_that_cannot_be_read_is_not_half_in_memory(kind_directory, monkeypatch):
    model, _, source = load_offloaded(str(kind_directory("Llama") / "model"), device="cpu")
    put, calls = OffloadedBlocks._put, []
    monkeypatch.setattr(
        OffloadedBlocks, "_put", lambda self, *args: killed() if len(calls) > 2 else calls.append(put(self, *args))
    )
    with pytest.raises(Killed), gathered(source.blocks.modules[0]):
        pass
    assert all(p.is_meta for p in source.blocks.modules.parameters())
