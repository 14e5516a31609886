"""Linears whose weight a model reads itself, instead of calling the linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from losa.errors import ModelError
from losa.model.blocks import is_linear
from losa.modules.sparse import SparseLinear


def read_directly(model: Any, *, training: bool = False) -> set[str]:
    """Names of linears whose ``weight`` the model reads itself when it runs: some models compute with the weight and
    never call the linear. The model runs on a few tokens to find them, while packed linears give their dense weight.

    Args:
        model: a causal LM of transformers, whose blocks are whole while they run.
        training: in training mode, where a model may hand its weights to another kernel.

    Raises:
        ModelError: the model does not run, or its logits are not finite.
    """
    found: set[str] = set()
    watched = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear) or _is_dense(m)}
    names = {id(module): name for name, module in watched.items()}
    kinds = {name: type(module) for name, module in watched.items()}

    class Dense(nn.Linear):
        @property
        def weight(self) -> Any:  # type: ignore[override]
            found.add(names[id(self)])
            return self._parameters["weight"]

        def forward(self, x: Tensor) -> Tensor:
            weight: Any = self._parameters["weight"]
            return functional.linear(x, weight, self.bias)

    class Sparse(SparseLinear):
        @property
        def weight(self) -> Tensor:
            found.add(names[id(self)])
            return self.packed.unpack()

    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(min(8, embeddings.shape[0]), device=embeddings.device)[None]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, module in watched.items():
            module.__class__ = Sparse if issubclass(kinds[name], SparseLinear) else Dense
        # Dropout must not move the generators on.
        with torch.no_grad(), torch.random.fork_rng([embeddings.device] if embeddings.is_cuda else []):
            logits = model.train(training)(input_ids=ids, use_cache=False).logits
    except Exception as error:  # a model may raise any error
        raise ModelError(f"the model does not run ({type(error).__name__}: {error})") from error
    finally:
        for name, module in watched.items():
            module.__class__ = kinds[name]
        for module, mode in modes:
            module.training = mode
    if not bool(logits.isfinite().all()):
        raise ModelError(f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}")
    return found


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_linear(module)
