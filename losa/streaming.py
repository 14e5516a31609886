"""Checkpoint directories block by block: what packing, unpacking and loading have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from losa.errors import ModelError, OutputError
from losa.files import write_json
from losa.model import block_linears, find_blocks
from losa.sparse import zero_share
from losa.tensor_files import TensorFiles
from losa_kernels.packing import Packed

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


@dataclass
class Part:
    """One block's tensors (``block`` its index), or the model's others (None).

    ``left``: names of linears that were not packed; ``source_bytes``: of the tensors that all of it was made from.
    """

    block: int | None
    linears: dict[str, Packed]
    dense: dict[str, Tensor]
    left: list[str]
    source_bytes: int


def packed_parts(
    source: Path,
    pack: Callable[[Tensor], Packed | None],
    dtype: torch.dtype | None,
    min_sparsity: float,
) -> Iterator[Part]:
    """The dense checkpoint in ``source``, packed; one block's weights in memory at a time.

    Args:
        pack: a linear's weight -> packed, or None to leave it dense.
        dtype: to round floating-point tensors to first; None keeps each tensor's.
        min_sparsity: linears with a smaller share of zeros are left dense.

    Raises:
        ModelError: not a Hugging Face directory of safetensors, or (at the end) no linear was packed.
    """
    model = skeleton(source)
    prefix, blocks = find_blocks(model)
    linears = block_linears(model)

    def parts() -> Iterator[Part]:
        done = left_in_all = 0
        with safetensors_of(source) as files:
            for block, names in by_block(files.names, prefix, len(blocks)):
                part = Part(block, {}, {}, [], 0)
                for name in names:
                    tensor = files.get(name)
                    if dtype is not None and tensor.is_floating_point():
                        tensor = tensor.to(dtype)
                    part.source_bytes += tensor.nbytes
                    linear = name.removesuffix(".weight")
                    if linear in linears and name.endswith(".weight"):
                        packed = pack(tensor) if zero_share(tensor) >= min_sparsity else None
                        if packed is not None:
                            part.linears[linear] = packed
                            continue
                        part.left.append(linear)
                    part.dense[name] = tensor
                done, left_in_all = done + len(part.linears), left_in_all + len(part.left)
                yield part
        if not done:
            raise ModelError(f"{source}: none of {left_in_all} linears has {min_sparsity:.0%} zeros; is it pruned?")

    return parts()


def safetensors_of(directory: Path) -> TensorFiles:
    """All tensors of a directory. Raises ModelError if it has no safetensors files."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{directory}: no safetensors files; expected a merged Hugging Face checkpoint")
    return TensorFiles(paths)


def by_block(names: Iterable[str], prefix: str, blocks: int) -> Iterator[tuple[int | None, list[str]]]:
    """Names by the block they belong to, blocks in order and all others last."""
    groups: dict[int | None, list[str]] = {**{i: [] for i in range(blocks)}, None: []}
    for name in names:
        number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
        index = int(number) if number.isdigit() else None
        if index is not None and index >= blocks:
            raise ModelError(f"{name}: config.json says that there are {blocks} blocks")
        groups[index].append(name)
    yield from ((index, found) for index, found in groups.items() if found)


class Shards:
    """Writes the tensors of a Hugging Face directory, shard by shard, then their index."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._shards: list[list[str]] = []
        self._bytes = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        self._shards.append(list(tensors))
        self._bytes += sum(t.nbytes for t in tensors.values())
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        save_file(contiguous, self._path(len(self._shards)), {"format": "pt"})

    def finish(self) -> None:
        """Names as transformers writes them say how many shards there are, which is known only now."""
        weight_map, count = {}, len(self._shards)
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        write_json(self.directory / "model.safetensors.index.json", index)

    def _path(self, number: int) -> Path:
        return self.directory / f"model-{number:05d}.safetensors"


def copy_other_files(source: Path, target: Path, leave: Iterable[str] = ()) -> None:
    """All but weights and what ``leave`` names."""
    weights = {path for pattern in (*_WEIGHTS, *leave) for path in source.glob(pattern)}
    for path in source.iterdir():
        if path in weights:
            continue
        try:
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)
        except OSError as error:
            raise OutputError(f"cannot copy {path}: {error}") from error


def read_config(directory: Path) -> dict:
    """config.json. Raises ModelError."""
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{directory}: no config.json; expected a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: config.json cannot be read ({error})") from error


def state_dtype(directory: Path, dtype: torch.dtype | None) -> None:
    """Write into config.json which type the weights have now; None leaves it as it is."""
    if dtype is not None:
        config = read_config(directory)
        config.pop("torch_dtype", None)
        write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def skeleton(directory: Path, meta: bool = True) -> nn.Module:
    """The model that config.json describes, without weights: all on meta, or where the context creates them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        # How weights are stored is not the model's business, and not every transformers knows every format.
        config.__dict__.pop("quantization_config", None)
        dtype = config.get_text_config().dtype or torch.float32
        if not meta:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the model cannot be built from config.json ({error})") from error
