"""A model that several processes write together: the same directory as one process writes, and the same checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from losa.storage.tensor_files import INDEX
from losa_kernels.tensors import as_bits
from tests.helpers.families import save_families
from tests.helpers.processes import run_workers
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

# What every process says, whichever finds it.
ERRORS = {
    "recorded_count": "q_proj: the mask keeps .* and is not the record's",
    "minus_zero": "q_proj.weight: 1 pruned weights are not .0.0",
    "block": "q_proj.weight: the written tensor differs",
    "embedding": "model.embed_tokens.weight: the written tensor differs",
    "not_finite": "model.layers.0.mlp.up_proj.weight is not finite",
    "recorded_zeros": "are zero, the record says",
    "missing_mask": "q_proj .of 1. has a mask in the model or in the record",
    "other_function": "logits differ from those in memory, from model.layers.0 on",
    "other_positions": "logits differ from those in memory, before model.layers.0",
    "missing_tensor": "cannot be loaded.*model.norm.weight",
    "full disk": "bad: No space left on device",
    "asked to stop": "Stopped: stopped by SIGUSR1",
    "exists": "llama: exists; give another directory",
    "other tokenizer": "another chat template",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, list[str], list[dict]]:
    root = tmp_path_factory.mktemp("export")
    names = save_families(root, ["GPTNeoX", "Qwen3Moe", "llama"])
    (root / "notes").write_text("{}")
    deep = tiny_llama(layers=12, hidden=512)
    deep.save_pretrained(root / "deep")
    tiny_tokenizer().save_pretrained(root / "deep")
    return root, names, run_workers("sharded_export", 2, root / "results", str(root), *names)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.subprocess
def test_the_directory_is_the_one_that_a_single_process_writes(exported):
    root, names, found = exported
    assert [each["said"] for each in found] == [[], []], "transformers warns"
    for name in (*names, "bfloat16"):
        assert all(each["exports"][name] == {"masks": True, "sharded": True} for each in found), name
        whole, parts = root / "out" / f"{name}-whole", root / "out" / name
        expected, written = tensors(whole), tensors(parts)
        assert written.keys() == expected.keys(), name
        for tensor, value in written.items():
            assert value.dtype == expected[tensor].dtype
            assert torch.equal(as_bits(value), as_bits(expected[tensor])), (name, tensor)
        index = json.loads((parts / INDEX).read_text())
        count = len(list(parts.glob("*.safetensors")))
        assert count == 3 and set(index["weight_map"]) == set(written)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
        files = [{p.name: p for p in d.iterdir() if "safetensors" not in p.name} for d in (whole, parts)]
        assert files[1].keys() - files[0].keys() == {"notes"}
        for file in files[0]:
            if files[0][file].is_file():
                assert files[0][file].read_bytes() == files[1][file].read_bytes(), (name, file)
        assert len({path.stat().st_mode for path in parts.iterdir() if path.is_file()}) == 1


@pytest.mark.subprocess
def test_transformers_loads_it(exported):
    root, names, _ = exported
    ids = torch.arange(20)[None]
    for name in (*names, "bfloat16"):
        models = [AutoModelForCausalLM.from_pretrained(root / "out" / each) for each in (name, f"{name}-whole")]
        with torch.no_grad():
            assert torch.equal(*(model(ids).logits for model in models)), name
        assert models[0].generation_config.max_new_tokens == 7


@pytest.mark.subprocess
@pytest.mark.parametrize("damage", ERRORS)
def test_every_process_names_what_is_wrong(exported, damage):
    root, _, found = exported
    texts = {each["damages"][damage] for each in found}
    assert len(texts) == 1
    with pytest.raises(RuntimeError, match=ERRORS[damage]):
        raise RuntimeError(texts.pop())
    assert sorted(path.name for path in root.iterdir() if "bad" in path.name) == []


@pytest.mark.subprocess
def test_no_process_holds_the_model(exported):
    for each in exported[2]:
        size = each["memory"].pop("model")
        assert size > 100e6 and len(each["memory"]) == 6
        for step, most in each["memory"].items():
            # A few copies of a block, a twelfth of it; FSDP2 gathers a block ahead. Who holds the model, or its own
            # half twice, takes as much as the model beside a block's copies.
            assert most < (0.7 if step == "train" else 0.5) * size, step
