"""What code outside the package can add without touching it: packed formats."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from losa.errors import ModelError
from losa.inference.generation import generate
from losa.inference.sparsify import sparsify
from losa.model.blocks import find_blocks
from losa.modules.sparse import SparseLinear
from losa.output.inspection import inspect_directory
from losa.packed.directory import load, pack_directory, unpack_directory
from losa.packed.formats import help_text
from losa.packed.weights import Format, format_of, pack_weight, register_format
from losa_kernels import pack_mask, sparse_linear
from losa_kernels.packing import Packed
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

IDS = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True, eq=False)
class Rows(Packed):
    """Whole rows are kept or not: their values (kept, in), their indices (kept,) int64, and how many rows there are."""

    index: Tensor
    kept: int

    def _check_fields(self):
        if self.values.shape != (self.kept, self.shape[1]) or self.index.shape != (self.kept,):
            raise ValueError(f"values: expected {(self.kept, self.shape[1])}, got {tuple(self.values.shape)}")

    def _check_data(self):
        if self.kept and int(self.index.max()) >= self.shape[0]:
            raise ValueError("index: expected rows of the weight")

    def unpack(self):
        return self.values.new_zeros(self.shape).index_copy(0, self.index, self.values)

    def mask(self):
        kept = torch.zeros(self.shape, dtype=torch.bool)
        kept[self.index] = True
        return pack_mask(kept)


@dataclass(frozen=True, eq=False)
class Biased(Rows):
    """A tensor called like one that the linear has itself."""

    bias: Tensor


class OwnOp(Rows):
    """The same, multiplied without its zeros."""

    calls = 0

    def linear(self, x, bias):
        OwnOp.calls += 1
        y = x.new_zeros(*x.shape[:-1], self.shape[0]).index_copy(-1, self.index, x @ self.values.to(x.dtype).T)
        return y if bias is None else y + bias


def pack_rows(weight):
    index = weight.any(1).nonzero().flatten()
    return Rows(tuple(weight.shape), weight[index].clone(), index, len(index)) if len(index) < len(weight) else None


def without_rows(path):
    """A checkpoint in which every second row of each block linear but one is zero."""
    model = tiny_llama(layers=2)
    for name, linear in find_blocks(model).linears().items():
        if name != "model.layers.1.mlp.down_proj":
            linear.weight.data[::2] = 0
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return model


def test_a_packed_format_of_ones_own(own_names, tmp_path):
    register_format(Format("rows", Rows, pack_rows, needs="rows of zeros"), "whole rows")
    assert "nm (N of every 8 or 4) or rows (whole rows); or sparse-bitmask" in help_text()
    model = without_rows(tmp_path / "dense")
    report = pack_directory(tmp_path / "dense", tmp_path / "packed", format="rows", min_sparsity=0)
    assert (report.packed, report.dense) == (13, 1)
    entry = json.loads((tmp_path / "packed" / "losa_packed.json").read_text())["linears"]["model.layers.0.mlp.up_proj"]
    assert entry == {"format": "rows", "shape": [64, 32], "tensors": ["index", "values"], "kept": 32}

    found = inspect_directory(tmp_path / "packed")
    assert found.packed and len(found.tensors) == 14 and {t.zeros / t.total for t in found.tensors} == {0, 0.5}
    loaded, tokenizer = load(tmp_path / "packed")
    assert type(loaded.model.layers[0].mlp.up_proj.packed) is Rows
    assert type(loaded.model.layers[1].mlp.down_proj) is nn.Linear
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = sparsify(copy.deepcopy(model), "rows", min_sparsity=0)
    texts = {generate(m, tokenizer, "a row", max_new_tokens=8).text for m in (loaded, model, again)}
    assert len(texts) == 1 and not generate(loaded, tokenizer, "a row", max_new_tokens=1).fallback

    unpack_directory(tmp_path / "packed", tmp_path / "unpacked")
    unpacked = LlamaForCausalLM.from_pretrained(tmp_path / "unpacked").state_dict()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"format: expected one of auto, bitmask, nm, rows, got 'columns'"):
        pack_weight(torch.ones(2, 4), "columns")
    with pytest.raises(ModelError, match="the format needs rows of zeros; .* of 14 linears have zeros enough"):
        tiny_llama(layers=2).save_pretrained(tmp_path / "full")
        pack_directory(tmp_path / "full", tmp_path / "none", format="rows", min_sparsity=0)
    with pytest.raises(ModelError, match="sparsify: the format rows needs rows of zeros; 14 of 14 linears have zeros"):
        sparsify(tiny_llama(layers=2), "rows", min_sparsity=0)


def test_a_damaged_directory_of_such_a_format(own_names, tmp_path):
    without_rows(tmp_path / "dense")
    register_format(Format("rows", Rows, pack_rows))
    pack_directory(tmp_path / "dense", tmp_path / "packed", format="rows", min_sparsity=0)
    path = tmp_path / "packed" / "losa_packed.json"
    manifest = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj"
    for change, message in (
        ({"kept": "32"}, f"linears: {name}: kept: expected a whole number, got '32'"),
        ({"kept": 31}, f"{name}: values: expected \\(31, 32\\), got \\(32, 32\\)"),
        ({"keep_n": 2}, f"linears: {name}: only the format nm has keep_n and m, not rows"),
        ({"tensors": ["values"]}, f"linears: {name}: rows has the tensors index, values, got"),
        ({"format": "columns"}, f"linears: {name}: expected a format among bitmask, nm, 24, rows, got 'columns'"),
        ({"format": "bitmask"}, f"linears: {name}: bitmask has the tensors bitmask, row_offsets, values, got"),
    ):
        linears = manifest["linears"] | {name: manifest["linears"][name] | change}
        path.write_text(json.dumps(manifest | {"linears": linears}))
        with pytest.raises(ModelError, match=message):
            load(tmp_path / "packed")


@torch.no_grad()
def test_products_of_a_class_of_ones_own():
    weight, x, bias = torch.randn(6, 8), torch.randn(3, 8), torch.randn(6)
    weight[::2] = 0
    packed = pack_rows(weight)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.equal(sparse_linear(x, packed, bias), expected)
    assert torch.equal(torch.compile(sparse_linear, backend="eager", fullgraph=True)(x, packed, bias), expected)
    own = OwnOp(**vars(replace(packed)))
    torch.testing.assert_close(sparse_linear(x, own, bias), expected)
    torch.testing.assert_close(SparseLinear(own)(x), expected - bias)
    assert OwnOp.calls == 2
    with pytest.raises(ValueError, match="x: expected floating point"):
        sparse_linear(x[:, 1:], own)


def test_formats_are_registered_once(own_names):
    register_format(Format("rows", Rows, pack_rows))
    register_format(Format("rows", Rows, pack_rows))
    for format, message in (
        (Format("rows", OwnOp, pack_rows), "format 'rows': already registered as"),
        (Format("lines", Rows, pack_rows), "format 'lines': Rows belongs to the format 'rows'"),
        (Format("biased", Biased), "format 'biased': bias: expected a name that no tensor"),
        (Format("auto", OwnOp), "format 'auto': the name has a meaning already"),
        (Format("sparse-bitmask", OwnOp), "format 'sparse-bitmask': the name has a meaning already"),
    ):
        with pytest.raises(ValueError, match=message):
            register_format(format)
    with pytest.raises(ValueError, match="packed: OwnOp is of no registered format"):
        format_of(OwnOp(**vars(pack_rows(torch.zeros(2, 4)))))
