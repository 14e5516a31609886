"""Directories in the sparse formats of compressed-tensors 0.12.2, which later versions and transformers 5 dropped.

A weight X.weight is stored as ``X.compressed``, ``X.bitmask`` and ``X.shape`` (sparse-24-bitmask), and also
``X.row_offsets`` (sparse-bitmask). config.json names the format under ``quantization_config``. The tensors hold the
same bytes as the formats of ``losa_kernels.packing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError, shown_name
from losa.model.naming import Naming
from losa.model.skeleton import skeleton
from losa.packed.parts import Contents, PackedPart, by_block
from losa.packed.shards import Shards
from losa.packed.weights import Format
from losa.storage.files import write_json
from losa.storage.kinds import COMPRESSED, COMPRESSED_KEYS, compressed_format, compression, read_config
from losa.storage.tensor_files import Stored, checkpoint_tensors
from losa_kernels import unpack_mask
from losa_kernels.packing import Packed, PackedBitmask, PackedNM

VERSION = "0.12.2"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def write(directory: Path, parts: Iterator[PackedPart], format: Format) -> Iterator[tuple[PackedPart, int]]:
    """Write a shard for each part, and the entry of config.json at the end. Yields each part with its bytes."""
    model, shards, zeros, weights = skeleton(directory), Shards(directory), 0, 0
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for part in parts:
        tensors = dict(part.dense)
        for linear, packed in part.linears.items():
            tensors |= {f"{linear}.{name}": t for name, t in _stored(packed).items()}
            weights += packed.shape[0] * packed.shape[1]
            zeros += packed.shape[0] * packed.shape[1] - packed.values.numel()
        dense -= part.modules
        shards.write(tensors)
        yield part, sum(t.nbytes for t in tensors.values())
    shards.finish()
    sparsity = {
        "format": format.name,
        "global_sparsity": zeros / weights,
        "ignore": sorted(dense),
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4" if format.kind is PackedNM else "unstructured",
        "targets": ["Linear"],
    }
    entry = {
        "quant_method": "compressed-tensors",
        "sparsity_config": sparsity,
        "transform_config": {},
        "version": VERSION,
    }
    write_json(directory / "config.json", read_config(directory) | {"quantization_config": entry})


def _stored(packed: Any) -> dict[str, Tensor]:
    shape = torch.tensor(packed.shape)
    tensors = {"compressed": packed.values, "bitmask": packed.bitmask}
    if isinstance(packed, PackedNM):
        return tensors | {"shape": shape[:, None]}
    return tensors | {"shape": shape, "row_offsets": packed.row_offsets}


def forget(directory: Path) -> None:
    """Remove the entry from config.json, where the weights are dense again."""
    config = read_config(directory)
    if compressed_format(config) in COMPRESSED:
        write_json(directory / "config.json", {key: v for key, v in config.items() if key not in COMPRESSED_KEYS})


def read(directory: Path) -> Contents:
    """What the directory holds.

    Raises:
        ModelError: quantised as well, or tensors are missing or contradict each other; names the linear.
    """
    if compression(read_config(directory)).get("config_groups"):
        raise ModelError(f"{directory}: quantised; expected floating-point weights in one of {', '.join(COMPRESSED)}")
    model = skeleton(directory)
    with checkpoint_tensors(directory) as files:
        stored = files.stored
    # The stored tensors of each linear, under the name that its weight has in the dense checkpoint.
    parts: dict[str, list[str]] = {}
    for linear in (name.removesuffix(".compressed") for name in stored if name.endswith(".compressed")):
        tensors = ("compressed", "bitmask", "shape", "row_offsets")
        parts[f"{linear}.weight"] = list(tensors if f"{linear}.row_offsets" in stored else tensors[:3])
    taken = {f"{weight.removesuffix('.weight')}.{part}" for weight, names in parts.items() for part in names}
    if both := sorted(parts.keys() & stored.keys()):
        raise ModelError(f"{directory}: {shown_name(both[0])} is stored packed and dense")
    dense = {name: entry for name, entry in stored.items() if name not in taken}
    with checkpoint_tensors(directory) as files:
        for weight in parts:
            linear = weight.removesuffix(".weight")
            shape = _shape(f"{directory}: {shown_name(linear)}", files.get(f"{linear}.shape"))
            dense[weight] = Stored(stored[f"{linear}.compressed"].dtype, shape)
    blocks = list(by_block(Naming(model, dense), dense))

    def contents() -> Iterator[dict[str, Packed | Tensor]]:
        with checkpoint_tensors(directory) as files:
            for _, names in blocks:
                found: dict[str, Packed | Tensor] = {}
                for name in names:
                    if name in parts:
                        linear = name.removesuffix(".weight")
                        tensors = {part: files.get(f"{linear}.{part}") for part in parts[name]}
                        found[linear] = _rebuild(f"{directory}: {shown_name(linear)}", dense[name].shape, tensors)
                    else:
                        found[name] = files.get(name)
                yield found

    return Contents(directory, {name.removesuffix(".weight") for name in parts}, dense, contents())


def _shape(where: str, stored: Tensor) -> tuple[int, int]:
    sides = stored.flatten().tolist()
    if stored.is_floating_point() or len(sides) != 2 or min(sides) < 1:
        raise ModelError(f"{where}: expected a shape of two positive numbers, got {sides[:4]}")
    return (int(sides[0]), int(sides[1]))


def _rebuild(linear: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Packed:
    values, mask = tensors["compressed"], tensors["bitmask"]
    rows, columns = shape
    if values.dtype not in _FLOATS:
        raise ModelError(f"{linear}: expected floating-point values, got {values.dtype}")
    if mask.dtype != torch.uint8 or mask.shape != (rows, -(-columns // 8)):
        raise ModelError(f"{linear}: the bitmask of a weight {shape} has shape {tuple(mask.shape)}, {mask.dtype}")
    kept = unpack_mask(mask, columns)
    if columns % 8:
        mask[:, -1] &= (1 << columns % 8) - 1
    if "row_offsets" not in tensors:
        if columns % 4 or values.shape != (rows, columns // 2) or not (kept.reshape(-1, 4).sum(1) == 2).all():
            raise ModelError(f"{linear}: the values or the bitmask are not 2 of every 4 of a weight {shape}")
        return _checked(linear, PackedNM, shape, values, mask, 2, 4)
    counts = kept.sum(1)
    if values.numel() != int(counts.sum()):
        raise ModelError(f"{linear}: {values.numel()} values, but the bitmask has {int(counts.sum())}")
    return _checked(linear, PackedBitmask, shape, values.flatten(), mask, tensors["row_offsets"].flatten())


def _checked(linear: str, kind: type[Packed], *fields) -> Packed:
    try:
        packed = kind(*fields)
        packed.check()
    except ValueError as error:
        raise ModelError(f"{linear}: {error}") from error
    return packed
