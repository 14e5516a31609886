"""What a run's results depend on apart from its recipe: digests of the model's weights and of every token."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.sharding import sharding_of
from losa.distributed.turns import by_turns

WEIGHTS, CALIBRATION, TRAINING, EVALUATION = (
    "model weights",
    "calibration tokens",
    "training tokens",
    "evaluation tokens",
)


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        if values.numel():
            stored: Any = values.view(torch.uint8).numpy()
            digest.update(stored)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 of the names and ``tensor_digest`` of all parameters and stored buffers, every byte of them.

    Hashing runs in several threads: a model of 14 GB takes some seconds on a few cores. Weights on a GPU come to the
    host one tensor per thread. A model that is held in shards has the digest of the whole model; all processes call
    this together and share the work, one tensor after the other. Of a whole model each process hashes its own copy,
    so that a copy that differs shows.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            tensors[name] = tensor
    # A weight under two names is read once.
    first = {place: name for name, place in reversed([(n, _place(t)) for n, t in tensors.items()])}
    once = {name: tensors[name] for name in first.values()}
    if sharding_of(model) is None:
        digests = tensor_digests(once)
    else:
        digests = by_turns(once, lambda _, tensor: tensor_digest(tensor))
    return joined_digest({name: digests[first[_place(tensor)]] for name, tensor in tensors.items()})


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``tensor_digest`` of each tensor, by name, taken in several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))


def joined_digest(digests: Mapping[str, str]) -> str:
    """``model_digest`` of a model from the ``tensor_digest`` of each of its tensors, by name."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _place(tensor: Tensor) -> tuple:
    if isinstance(tensor, DTensor):  # a process without rows of it has no place for it
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
