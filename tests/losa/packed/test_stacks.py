"""Linears that are no stored tensors of their own: packed, loaded, written dense again, and damaged."""

from __future__ import annotations

import copy
import json
import pickle
import re
import weakref

import pytest
import torch
import transformers

from losa.errors import ModelError, OutputError
from losa.evaluation.measure import count_zeros
from losa.inference.sparsify import _Packer, densify, sparsify
from losa.inference.speed import bytes_per_token
from losa.model import replacing
from losa.model.blocks import block_linears
from losa.model.wrapping import merge_model, unwrap_model
from losa.modules.linear_experts import stack_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear, unpack_linears
from losa.output.inspection import inspect_directory
from losa.packed.directory import load, load_any, pack_directory, unpack_directory
from losa.packed.weights import pack_weight
from losa.record import MaskRecord
from losa.storage.files import MANIFEST, RECORD, write_json
from losa_kernels.tensors import as_bits
from tests.helpers.exports import tensors_of
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.records import make_record
from tests.helpers.tiny import assert_same_function, logits, randomise, tiny_tokenizer, wrap

STORED = ("GPT2", "GptOss", "GraniteMoe", "Llama4Text", "JetMoe", "Dbrx")
kinds = pytest.mark.parametrize("name", STORED)


def pruned(name, share=0.5, only=""):
    """A model of a kind with zeros in the linears whose names contain ``only``, some of them negative."""
    model = of_kind(KINDS[name]).eval()
    generator = torch.Generator().manual_seed(3)
    for linear, module in block_linears(model).items():
        if only in linear:
            weight = module.weight.data
            weight.mul_(torch.rand(weight.shape, generator=generator) >= share)
    return model


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(as_bits(ours[name]), as_bits(tensor + 0.0)), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    def made(name):
        directory = tmp_path_factory.mktemp(name) / "dense"
        model = pruned(name)
        model.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        return model, directory

    return made


@kinds
def test_packed_and_back(name, saved, tmp_path):
    model, directory = saved(name)
    report = pack_directory(directory, tmp_path / "packed")
    assert (report.packed, report.dense) == (len(block_linears(model)), 0)
    loaded, _ = load(tmp_path / "packed")
    assert sum(isinstance(m, SparseLinear) for m in loaded.modules()) == report.packed
    assert_same_function(logits(loaded), logits(model))
    expected = tensors_of(directory)
    unpack_directory(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_tensors(tensors_of(tmp_path / "unpacked"), expected)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_of(tmp_path / "saved"), expected)
    unpack_linears(loaded)
    assert_same_function(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "plain")
    assert_same_tensors(tensors_of(tmp_path / "plain"), expected)
    for found in (count_zeros(loaded), count_zeros(load(tmp_path / "packed")[0])):
        truth = count_zeros(model)
        assert (found.zeros, found.prunable, found.others) == (truth.zeros, truth.prunable, truth.others)


@pytest.mark.parametrize("stacks", [False, True], ids=["a tensor for each expert", "stacks"])
def test_rows_that_no_linear_has(stacks, tmp_path):
    """LongCat-Flash has rows of gates for choices that are no experts."""
    model = pruned("LongcatFlash")
    model.save_pretrained(tmp_path / "dense", save_original_format=not stacks)
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    expected = tensors_of(tmp_path / "dense")
    assert any(name.endswith("gate_up_proj") for name in expected) == stacks
    assert any(".experts.4.gate_proj" in name for name in expected) != stacks
    report = pack_directory(tmp_path / "dense", tmp_path / "packed")
    # A tensor that linears do not fill stays as it is.
    gates = [name for name in block_linears(model) if ".experts." in name and "down_proj" not in name]
    assert report.packed == len(block_linears(model)) - len(gates) * stacks
    loaded, _ = load(tmp_path / "packed")
    assert_same_function(logits(loaded), logits(model))
    unpack_directory(tmp_path / "packed", tmp_path / "unpacked")
    unpacked = tensors_of(tmp_path / "unpacked")
    assert unpacked.keys() == expected.keys()
    assert all(torch.equal(unpacked[tensor], value) for tensor, value in expected.items())
    for directory in ("dense", "packed"):
        found = inspect_directory(tmp_path / directory).tensors
        assert not any(re.search(r"experts\.[34]\.", tensor.name) for tensor in found)
        experts = [tensor for tensor in found if "experts.0" in tensor.name or "down_proj" in tensor.name]
        assert experts and all(0.4 < tensor.zeros / tensor.total < 0.6 for tensor in experts)


def test_rows_that_no_linear_has_do_not_decide_what_is_packed():
    model = pruned("LongcatFlash", share=0.3)
    for block in model.model.layers:
        block.mlp.experts.gate_up_proj.data[3:] = 1
    sparsify(model, min_sparsity=0.25)
    assert all(type(model.get_submodule(name)) is SparseLinear for name in block_linears(pruned("LongcatFlash")))
    model = pruned("LongcatFlash", share=0.0)
    for block in model.model.layers:
        block.mlp.experts.gate_up_proj.data[3:] = 0
    with pytest.raises(ModelError, match="none of .* linears has 25% zeros"):
        sparsify(model, min_sparsity=0.25)


@kinds
def test_inspecting_sees_what_is_lost(name, saved, tmp_path):
    model, directory = saved(name)
    record = make_record(blocks=1)
    record.masks = {
        linear: MaskRecord("0" * 64, list(module.weight.shape), 5) for linear, module in block_linears(model).items()
    }
    write_json(directory / RECORD, record.to_dict())
    pack_directory(directory, tmp_path / "packed")
    packed = inspect_directory(tmp_path / "packed").lost_zeros
    assert len(packed) == len(record.masks) and inspect_directory(directory).lost_zeros


@kinds
def test_in_memory_and_back(name, tmp_path):
    model = pruned(name)
    before, expected, linears = copy.deepcopy(model.state_dict()), logits(model), len(block_linears(model))
    sparsify(model)
    packed = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(packed) == linears and any(stack_of(module) is not None for module in model.modules())
    assert_same_function(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_tensors(again.state_dict(), before)
    densify(model)
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(logits(model), expected) and len(block_linears(model)) == linears


@pytest.mark.parametrize("name, only", [("GptOss", "down_proj"), ("GptOss", "gate_proj"), ("GPT2", "c_attn")])
def test_a_stack_without_zeros_stays_beside_one_with_them(name, only, tmp_path):
    """And its biases with it."""
    model = pruned(name, 0.7, only)
    model.save_pretrained(tmp_path / "dense")
    report = pack_directory(tmp_path / "dense", tmp_path / "packed")
    # gate_proj is half of its stack, of whose weights 35 % are zero.
    per = 2 if only == "gate_proj" else 1
    assert report.packed == per * sum(only in linear for linear in block_linears(model))
    assert report.packed + report.dense == len(block_linears(model))
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    loaded, _ = load(tmp_path / "packed")
    assert_same_function(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "dense"))
    sparsify(model)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == report.packed
    assert_same_function(logits(model), logits(loaded))


def test_formats_of_others_leave_them_dense(saved, tmp_path):
    model, directory = saved("GptOss")
    report = pack_directory(directory, tmp_path / "packed", format="sparse-bitmask")
    assert (report.packed, report.dense) == (8, len(block_linears(model)) - 8)
    loaded, _ = load(tmp_path / "packed")
    packed = {name for name, module in loaded.named_modules() if isinstance(module, SparseLinear)}
    assert packed == {name for name in block_linears(model) if "experts" not in name}
    assert_same_function(logits(loaded), logits(model))


def changed(*path, to):
    def edit(manifest):
        *way, last = path
        place = manifest["stacks"]
        for key in way:
            place = place[key]
        place[last] = to
        return manifest

    return edit


TENSOR, FIRST = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.down_proj"
EDITS = {
    "no object": lambda m: m | {"stacks": [TENSOR]},
    "null": changed(TENSOR, to=None),
    "no linears": changed(TENSOR, "linears", to={}),
    "no shape": changed(TENSOR, "shape", to=None),
    "a huge shape": changed(TENSOR, "shape", to=[2**40, 2**40, 1]),
    "a larger shape": changed(TENSOR, "shape", to=[5, 32, 32]),
    "another shape": changed(TENSOR, "shape", to=[4, 64, 64]),
    "no place": changed(TENSOR, "linears", FIRST, to=None),
    "a stride of one": changed(TENSOR, "linears", FIRST, "stride", to=[1]),
    "a long stride": changed(TENSOR, "linears", FIRST, "stride", to=[2**40, 1]),
    "a fraction": changed(TENSOR, "linears", FIRST, "offset", to=0.5),
    "before the tensor": changed(TENSOR, "linears", FIRST, "offset", to=-1),
    "beyond the tensor": changed(TENSOR, "linears", FIRST, "offset", to=2**20),
    "where another lies": changed(TENSOR, "linears", FIRST, "offset", to=1),
    "an unknown linear": changed(TENSOR, "linears", "model.nothing", to={"stride": [1, 1], "offset": 0}),
    "another tensor": lambda m: m | {"stacks": {("x" if k == TENSOR else k): v for k, v in m["stacks"].items()}},
    "twice": lambda m: m | {"stacks": m["stacks"] | {"x": m["stacks"][TENSOR]}},
    "beside": lambda m: m | {"stacks": m["stacks"] | {"model.norm.weight": m["stacks"].pop(TENSOR)}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_damaged_manifest_is_named(edit, packed_experts):
    path = packed_experts / MANIFEST
    before = path.read_text()
    path.write_text(json.dumps(EDITS[edit](json.loads(before))))
    try:
        with pytest.raises(ModelError, match=MANIFEST):
            load(packed_experts)
        if edit not in ("another tensor", "another shape"):  # these are told by the model alone
            with pytest.raises((ModelError, OutputError)):
                unpack_directory(packed_experts, packed_experts.with_name("unpacked"))
            assert not packed_experts.with_name("unpacked").exists()
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def packed_experts(saved, tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "packed"
    pack_directory(saved("GptOss")[1], directory)
    return directory


def test_dense_weights_go_block_by_block():
    """Of a plain model too: when the second block is packed, the first one's dense weights are gone."""
    for name in ("Llama", "GptOss"):
        model = pruned(name)
        alive = [weakref.ref(w) for w in model.model.layers[0].parameters() if w.ndim > 1]
        seen = []

        class Watched(_Packer):
            def _replace(self, block, part, linear, seen=seen, alive=alive, model=model):
                if block is model.model.layers[1]:
                    seen.append(sum(each() is not None for each in alive))
                super()._replace(block, part, linear)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("losa.inference.sparsify._Packer", Watched)
            sparsify(model)
        # A router stays.
        assert seen and set(seen) == {1 if name == "GptOss" else 0}, name


@pytest.mark.parametrize("name", ["GptOss", "GPT2"])
def test_a_refusal_leaves_a_model_that_can_be_saved(name, tmp_path):
    model = pruned(name)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    with pytest.raises(ModelError, match="none of .* linears has 95% zeros"):
        sparsify(model, min_sparsity=0.95)
    assert all(torch.equal(as_bits(tensor), as_bits(before[key])) for key, tensor in model.state_dict().items())
    assert not any(stack_of(module) is not None for module in model.modules())
    calls = []

    def failing(weight, format):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return pack_weight(weight, format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losa.inference.sparsify.pack_weight", failing)
        with pytest.raises(MemoryError):
            sparsify(model)
    assert_same_function(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    # Zeros of either sign are equal: some linears are packed.
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())


def test_memory_that_runs_out_loses_no_weight(monkeypatch):
    model = sparsify(pruned("GptOss"))
    expected = logits(model)
    make, calls = replacing.empty_like, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return make(*arguments)

    monkeypatch.setattr(replacing, "empty_like", failing)
    with pytest.raises(MemoryError):
        densify(model)
    monkeypatch.undo()
    assert_same_function(logits(model), expected)
    assert not any(stack_of(module) is not None for module in densify(model).modules())


def test_what_was_packed_is_wrapped_as_any_other_model(saved, tmp_path):
    """A square transposed matrix would come back as its transpose without a word."""
    model, directory = saved("GPT2")
    pack_directory(directory, tmp_path / "packed")
    loaded, _ = load_any(tmp_path / "packed", dense=True)
    assert_same_tensors(loaded.state_dict(), {k: v for k, v in model.state_dict().items()})
    layers = wrap(loaded)
    randomise(layers)
    expected = logits(merge_model(loaded))
    loaded.save_pretrained(tmp_path / "merged")
    assert_same_function(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    in_memory = sparsify(pruned("GPT2"))
    unpack_linears(in_memory)
    assert len(wrap(in_memory)) == len(layers)
    assert_same_tensors(unwrap_model(in_memory).state_dict(), pruned("GPT2").state_dict())


def test_a_wrapped_model_is_no_packed_one():
    model = of_kind(KINDS["Mixtral"])
    layers = wrap(model)
    densify(model)
    assert {name for name, m in model.named_modules() if isinstance(m, MaskedLoRALinear)} == layers.keys()


def test_a_stack_that_computes_something_else_is_not_packed(saved, tmp_path, monkeypatch):
    model, directory = saved("GptOss")
    stack = type(model.model.layers[0].mlp.experts)
    forward = stack.forward
    monkeypatch.setattr(stack, "forward", lambda self, *args, **more: 2 * forward(self, *args, **more))
    report = pack_directory(directory, tmp_path / "packed")
    assert (report.packed, report.dense) == (8, 0), "attention alone: the experts are no linears"
    assert_same_function(logits(load(tmp_path / "packed")[0]), logits(model))


def test_linears_in_one_place_are_refused(packed_experts):
    path = packed_experts / MANIFEST
    before = path.read_text()
    manifest = json.loads(before)
    for place in manifest["stacks"][TENSOR]["linears"].values():
        place["offset"] = 0
    path.write_text(json.dumps(manifest))
    try:
        with pytest.raises(ModelError, match="two of its linears lie in one place"):
            unpack_directory(packed_experts, packed_experts.with_name("unpacked"))
    finally:
        path.write_text(before)


def test_copies_and_moves_of_a_loaded_model(saved, tmp_path):
    model, directory = saved("GptOss")
    pack_directory(directory, tmp_path / "packed")
    loaded, _ = load(tmp_path / "packed")
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_same_function(logits(other), logits(model))
        other.save_pretrained(tmp_path / "saved")
        assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(directory))
    assert bytes_per_token(loaded) < bytes_per_token(densify(copy.deepcopy(loaded)))
    narrow = loaded.bfloat16()
    narrow.save_pretrained(tmp_path / "narrow")
    found = tensors_of(tmp_path / "narrow")
    assert_same_tensors(found, {name: tensor.bfloat16() for name, tensor in tensors_of(directory).items()})


def test_parameters_may_share_a_storage():
    """As those of a file that is mapped into memory."""
    model = pruned("GptOss", 0.7, "down_proj")
    experts = [layer.mlp.experts for layer in model.model.layers]
    whole = torch.cat([p.detach().flatten() for module in experts for p in module.parameters()])
    parts = iter(whole.split([p.numel() for module in experts for p in module.parameters()]))
    for module in experts:
        for name, p in list(module._parameters.items()):
            module._parameters[name] = torch.nn.Parameter(next(parts).view(p.shape), requires_grad=False)
    expected = logits(model)
    sparsify(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert packed and all(name.endswith("down_proj") for name in packed)
    assert_same_function(logits(model), expected)
