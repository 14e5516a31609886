"""For ``tests/losa/model/test_sharded_loading.py``: loads what lies in a directory, whole and in shards."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from losa.distributed.processes import process_index
from losa.distributed.sharding import device_of, make_sharding, sharding_of, whole
from losa.errors import LosaError
from losa.model import hub_files
from losa.model.limits import check_ids, positions
from losa.model.loading import load_model
from losa.model.sharded_loading import load_sharded
from losa.run.fingerprint import model_digest
from losa.storage.tensor_files import TensorFiles
from losa_kernels.tensors import as_bits
from tests.helpers.memory import peak
from tests.helpers.processes import finish, start_worker

read: list[int] = []


def counted(files, name, rows=None, get=TensorFiles.get):
    tensor = get(files, name, rows)
    read.append(tensor.nbytes)
    return tensor


def settings(model) -> list:
    tokens = model.generation_config.max_new_tokens
    conversions = [repr(entry) for entry in model._weight_conversions]
    grads = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tied = sorted(model.all_tied_weights_keys.items())
    return [str(model.dtype), tokens, conversions, grads, tied, model.training, positions(model).limit]


def difference(loaded, expected) -> list[str]:
    """What differs between a sharded model and a whole one, by name."""
    buffers = [dict(model.named_buffers()) for model in (loaded, expected)]
    tensors = [{k: whole(t) for k, t in loaded.state_dict().items()} | buffers[0], expected.state_dict() | buffers[1]]
    wrong = sorted(tensors[0].keys() ^ tensors[1].keys())
    wrong += [n for n, p in loaded.named_parameters() if not isinstance(p, DTensor) or p.shape != tensors[1][n].shape]
    for name, tensor in tensors[0].items():
        other = tensors[1].get(name)
        if other is not None and (tensor.dtype != other.dtype or not torch.equal(as_bits(tensor), as_bits(other))):
            wrong.append(name)
    names = [[id(p) for _, p in m.named_parameters(remove_duplicate=False)] for m in (loaded, expected)]
    uses = [[each.index(i) for i in each] for each in names]
    return (
        wrong
        + [f"{a} is not {b}" for a, b in zip(settings(loaded), settings(expected), strict=True) if a != b]
        + (["ties"] if uses[0] != uses[1] else [])
    )


def loads(directory: Path, sharding, dtype: str) -> dict:
    read.clear()
    loaded, tokenizer = load_sharded(str(directory), sharding, dtype=dtype)
    count = sum(read)
    expected, _ = load_model(str(directory), dtype=dtype, device="cpu")
    check_ids(loaded, torch.tensor([96]), "text")
    rows = {id(p): p.to_local().numel() for p in loaded.parameters()}
    return {
        "difference": difference(loaded, expected),
        "digest": model_digest(loaded) == model_digest(expected),
        "device": str(device_of(loaded)),
        "sharding": sharding_of(loaded) == sharding,
        "read": count,
        "rows": sum(rows.values()),
        "tokens": tokenizer("ab").input_ids,
        "whole": sum(t.nbytes for t in {id(p): p for p in expected.parameters()}.values()),
    }


def error(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except LosaError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


def errors(root: Path, sharding) -> dict:
    """What the sharded and the whole loading say of every damaged directory."""
    found = {}
    for directory in sorted((root / "damaged").iterdir()):
        dtype = "float16" if directory.name == "overflow" else "auto"
        sharded = error(load_sharded, str(directory), sharding, dtype=dtype)
        found[directory.name] = [sharded, error(load_model, str(directory), dtype=dtype, device="cpu")]
    found["gguf"] = [error(load_sharded, str(root / "llama"), sharding, gguf_file="llama.gguf"), ""]
    found["dtype"] = [error(load_sharded, str(root / "llama"), sharding, dtype="int8"), ""]
    found["offline"] = [error(load_sharded, "some/model", sharding), error(load_model, "some/model")]
    own = root / ("llama" if process_index() == 1 else "tied")
    found["other files"] = [error(load_sharded, str(own), sharding), ""]
    # The same names and shapes: on the disk of one machine lies a model that was trained further.
    own = root / ("trained" if process_index() == 1 else "tied")
    found["other weights"] = [error(load_sharded, str(own), sharding), ""]
    os.chdir(root / "damaged" if process_index() == 1 else root)
    found["one has none"] = [error(load_sharded, "llama", sharding), ""]
    os.chdir("/")
    return found


def hub(root: Path, sharding, source: str, commit: str = "commit") -> dict:
    """Downloads by the first process of each of two machines: process 2 is the first of the second one."""
    calls = []
    os.environ["LOCAL_RANK"] = "0" if process_index() in (0, 2) else "1"
    cache = root / f"cache-{process_index() // 2}" / source / commit

    def download(name, revision=None, allow_patterns=(), local_files_only=False):
        calls.append([revision, local_files_only])
        if not local_files_only:
            cache.mkdir(parents=True, exist_ok=True)
            for file in (root / name).iterdir():
                if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, cache)
        return str(cache)

    real, huggingface_hub.snapshot_download = huggingface_hub.snapshot_download, download
    try:
        fetched = hub_files.fetch(source)
    except LosaError as raised:
        return {"error": str(raised)}
    finally:
        huggingface_hub.snapshot_download = real
    loaded, _ = load_sharded(str(fetched), sharding)
    return {
        "calls": calls,
        "files": sorted(file.name for file in fetched.iterdir()),
        "difference": difference(loaded, load_model(str(root / source), device="cpu")[0]),
    }


def memory(directory: Path, sharding) -> list[int]:
    peak()
    before = peak()
    loaded, _ = load_sharded(str(directory), sharding)
    return [peak() - before, sum(p.nbytes for p in loaded.parameters())]


def main(directory: str, *names: str) -> None:
    start_worker()
    TensorFiles.get = counted  # type: ignore[method-assign]
    root = Path(directory)
    sharding = make_sharding(torch.device("cpu"))
    found: dict = {}
    for name in names:
        found[name] = loads(root / name, sharding, "float16" if name == "OPT" else "auto")
    found["memory"] = memory(root / "large", sharding)  # after transformers has imported what it needs
    found["errors"] = errors(root, sharding)
    found["hub"] = hub(root, sharding, "llama")
    found["hub, one file"] = hub(root, sharding, "tied")
    found["hub, two revisions"] = hub(root, sharding, "tied", commit=f"commit-{process_index() // 2}")
    dist.barrier()
    finish(found)
