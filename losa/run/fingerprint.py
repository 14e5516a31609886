"""What a run's results depend on apart from its recipe: digests of the model's weights and of every token."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

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
    host one tensor per thread.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            tensors[name] = tensor
    # A weight under two names is read once.
    first = {id_: name for name, id_ in reversed([(n, _place(t)) for n, t in tensors.items()])}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(first.values(), pool.map(lambda n: tensor_digest(tensors[n]), first.values()), strict=True))
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {digests[first[_place(tensor)]]}\n".encode())
    return whole.hexdigest()


def _place(tensor: Tensor) -> tuple:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
