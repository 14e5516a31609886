"""Loading a packed checkpoint takes little more memory than its file has bytes."""

from __future__ import annotations

import pytest
import torch

from benchmarks._loading import loading_memory
from losa.errors import ModelError
from losa.model.blocks import block_linears
from losa.packed.directory import pack_directory
from losa.storage.tensor_files import TensorFiles
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.subprocess
def test_loading_peaks_little_above_the_file(tmp_path):
    model = tiny_llama(layers=16, hidden=1024).requires_grad_(False).bfloat16()
    for linear in block_linears(model).values():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape) < 0.7, 0)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    found = loading_memory(tmp_path / "packed")
    assert found["file"] > 100e6  # enough to tell weights from noise
    assert 0.8 * found["file"] < found["peak"] < 1.2 * found["file"]
    assert found["linears_dense_bf16"] == sum(linear.weight.nbytes for linear in block_linears(model).values())
    # 70 %: 0.3 of the values, a bit a weight, and row offsets.
    assert 0.35 < found["linears"] / found["linears_dense_bf16"] < 0.45


def test_tensor_files_name_what_is_wrong(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.randn(3, 5), "empty": torch.zeros(0, 4), "one": torch.tensor(2, dtype=torch.int64)}, path)
    with TensorFiles([path]) as files:
        assert set(files.names) == {"x", "empty", "one"}
        assert files.get("empty").shape == (0, 4) and files.get("one") == 2
        assert files.get("x").data_ptr() % 64 == 0
        with pytest.raises(ModelError, match="tensors are missing: y"):
            files.get("y")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ModelError, match="a.safetensors: cannot be read .it ends within"), TensorFiles([path]):
        pass
    for damaged in (b"", whole[:40], b"\xff" * 16, b"\x02" + 7 * b"\0" + b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="a.safetensors: cannot be read .no safetensors file"), TensorFiles([path]):
            pass
    path.write_bytes(whole.replace(b'"F32"', b'"F99"'))
    with pytest.raises(ModelError, match="is F99; expected one of F64"), TensorFiles([path]):
        pass
    path.write_bytes(whole)
    (tmp_path / "b.safetensors").write_bytes(whole)
    with pytest.raises(ModelError, match="is in another file too"), TensorFiles(tmp_path.glob("*.safetensors")):
        pass
