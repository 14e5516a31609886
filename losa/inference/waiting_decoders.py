"""Decoders that wait for the next call of ``generate`` on the same model."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from torch import nn

from losa.inference.decoding import LeanDecoder, Unsupported, hooked
from losa.modules.sparse import SparseLinear

# Decoders wait here between two texts, without a cache, each with the looks of its model. They refer to parts of the
# model, never to the model itself, which would then never be freed.
_waiting: WeakKeyDictionary[nn.Module, tuple[list, LeanDecoder]] = WeakKeyDictionary()


def take_decoder(model: nn.Module, max_length: int) -> tuple[list | None, LeanDecoder]:
    """(looks of the model, its decoder): the waiting decoder if the model has not changed, else a new one.

    A waiting decoder is taken out, so that two threads never share a cache.
    """
    waiting = _waiting.pop(model, None)
    if waiting is None or waiting[0] != _looks(model):
        decoder = LeanDecoder(model, max_length)
        return _looks(model), decoder  # after building: it may move weights and biases
    before, decoder = waiting
    try:
        decoder.resize(max_length)
    except Unsupported:  # too long for this model; a shorter text may follow
        _waiting[model] = before, decoder
        raise
    return before, decoder


def keep_decoder(model: nn.Module, looks: list | None, decoder: LeanDecoder) -> None:
    if looks is not None:
        decoder.resize(0)
        _waiting[model] = looks, decoder


def forget_decoder(model: nn.Module) -> None:
    """Free a waiting decoder and the linears that it refers to, before the linears are replaced."""
    _waiting.pop(model, None)


def _looks(model: nn.Module) -> list | None:
    """Everything that a decoder depends on: the modules, their settings, and the places of their tensors in memory.
    None: the model has hooks, whose effects cannot be compared."""
    if hooked(model):
        return None
    seen: list = []
    for name, module in model.named_modules():
        seen += name, ref(module)
        seen += [(key, value) for key, value in vars(module).items() if isinstance(value, int | float | str)]
        if isinstance(module, SparseLinear):
            seen.append(ref(module.packed))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen.append((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device))
    return seen
