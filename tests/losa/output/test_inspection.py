"""Inspecting the zeros of any directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from losa.errors import OutputError
from losa.output.inspection import inspect_directory
from losa.output.tables import zeros_table
from tests.helpers.records import cells, make_record
from tests.helpers.tiny import tiny_llama


def test_inspect_measures_any_directory(tmp_path):
    model = tiny_llama(layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:8] = 0.0
        model.model.layers[1].mlp.up_proj.weight[8, :4] = -0.0
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = inspect_directory(tmp_path)
    assert found.record is None and found.lost_zeros == []
    assert {t.name for t in found.tensors} == {
        name for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2
    }
    sizes = {t.name: (t.shape, t.zeros, t.total) for t in found.tensors}
    assert sizes["model.layers.1.mlp.up_proj.weight"] == ((64, 32), 8 * 32 + 4, 64 * 32)
    assert sum(t.zeros for t in found.tensors) == 8 * 32 + 4
    assert found.sparsity == pytest.approx(260 / sum(t.total for t in found.tensors))
    rows = cells(zeros_table(found))
    assert [row[0] for row in rows] == ["model.layers.0", "model.layers.1"] and rows[1][3] == "260"


def test_inspect_orders_blocks_by_number(tmp_path):
    names = [f"h.{i}.attn.c.weight" for i in (10, 2, 0)] + ["vision.h.1.x.weight", "wte.weight", "h.0.ln.weight"]
    tensors = {name: torch.ones(2, 2) for name in names}
    tensors["h.0.ln.weight"] = torch.ones(2)
    tensors["h.0.q.weight"] = torch.ones(2, 2, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    rows = cells(zeros_table(inspect_directory(tmp_path)))
    assert [row[0] for row in rows] == ["h.0", "h.2", "h.10", "vision.h.1"]
    assert rows[0][1:] == ["1", "4", "0", "0.00 %"]


def test_inspect_finds_lost_zeros(tmp_path):
    weight = torch.ones(20, 50)
    weight[:14] = 0
    (tmp_path / "losa_config.json").write_text(json.dumps(make_record().to_dict()))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: weight}, tmp_path / "model.safetensors")
    found = inspect_directory(tmp_path)
    assert found.record == make_record() and found.lost_zeros == []
    weight[0, 0] = 1e-3
    save_file({name: weight}, tmp_path / "model.safetensors")
    found = inspect_directory(tmp_path)
    assert found.lost_zeros == [name]
    assert name in str(zeros_table(found).caption)


def test_inspect_says_what_is_wrong(tmp_path):
    with pytest.raises(OutputError, match="no such directory"):
        inspect_directory(tmp_path / "absent")
    with pytest.raises(OutputError, match="no safetensors files"):
        inspect_directory(tmp_path)
    save_file({"wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match="no floating-point matrix"):
        inspect_directory(tmp_path)
    (tmp_path / "losa_config.json").write_text('{"method": 1}')
    with pytest.raises(OutputError, match="losa_config.json: damaged"):
        inspect_directory(tmp_path)
    (tmp_path / "losa_config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(OutputError, match=r"model.safetensors: cannot be read"):
        inspect_directory(tmp_path)
