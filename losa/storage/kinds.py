"""The kind of checkpoint that a directory holds: dense, packed, or an adapter alone."""

from __future__ import annotations

from pathlib import Path

from losa.errors import ModelError, shown
from losa.storage.files import MANIFEST
from losa.storage.json_files import read_json

ADAPTER = "adapter_config.json"
# Sparse formats of compressed-tensors 0.12.2, and the keys of config.json that name them; older versions wrote the
# second key.
BITMASK, BITMASK_24 = COMPRESSED = ("sparse-bitmask", "sparse-24-bitmask")
COMPRESSED_KEYS = ("quantization_config", "compression_config")
PEFT_ADVICE = (
    "a PEFT adapter lies beside the model; merge it (PEFT's merge_and_unload, then save_pretrained) or move it away"
)


def read_config(directory: Path) -> dict:
    """config.json. Raises ModelError."""
    path = directory / "config.json"
    if not path.is_file():
        adapter = " (but an adapter's adapter_config.json)" if (directory / ADAPTER).is_file() else ""
        raise ModelError(f"{directory}: no config.json{adapter}; expected a Hugging Face checkpoint")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected an object, got {shown(config)}")
    return config


def is_packed(directory: Path) -> bool:
    """Whether ``losa.load`` reads the directory: packed by losa, or in a sparse format of compressed-tensors."""
    return (Path(directory) / MANIFEST).is_file() or is_compressed(Path(directory))


def is_compressed(directory: Path) -> bool:
    """Whether config.json states one of ``COMPRESSED``."""
    return (directory / "config.json").is_file() and compressed_format(read_config(directory)) in COMPRESSED


def compression(config: dict) -> dict:
    """The entry of config.json on compression; {} where there is none."""
    entry: object = next((config[key] for key in COMPRESSED_KEYS if config.get(key)), {})
    return entry if isinstance(entry, dict) else {}


def compressed_format(config: dict) -> object:
    """The sparse format that config.json states, or None."""
    settings = compression(config).get("sparsity_config")
    return settings.get("format") if isinstance(settings, dict) else None


def refuse_adapter(directory: Path) -> None:
    """Raises ModelError if a PEFT adapter lies in the directory: transformers would load it over the model unasked."""
    if not (directory / ADAPTER).is_file():
        return
    if (directory / "config.json").is_file():
        raise ModelError(f"{directory / ADAPTER}: {PEFT_ADVICE}")
    raise ModelError(
        f"{directory}: holds a PEFT adapter alone ({ADAPTER}), no model; merge it into its base model with PEFT "
        "(merge_and_unload, save_pretrained) and give that directory"
    )
