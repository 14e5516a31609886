"""Decoders that wait for the next call of ``generate`` on the same model."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from torch import nn

from losa.inference.decoding import LeanDecoder, Unsupported, hooked
from losa.modules.sparse import SparseLinear

# Decoders wait here between two texts, without a cache, each with what its model looked like. They refer to parts of
# the model, never to the model, which would otherwise live for ever.
_waiting: WeakKeyDictionary[nn.Module, tuple[list, LeanDecoder]] = WeakKeyDictionary()


def take_decoder(model: nn.Module, max_length: int) -> tuple[list | None, LeanDecoder]:
    """(what the model looks like, its decoder): the one that waits if nothing has changed since, else a new one.

    Taken out, so that two threads never share a cache.
    """
    waiting = _waiting.pop(model, None)
    if waiting is None or waiting[0] != _looks(model):
        decoder = LeanDecoder(model, max_length)
        return _looks(model), decoder  # only now: it may lay weights and biases together
    before, decoder = waiting
    try:
        decoder.resize(max_length)
    except Unsupported:  # this length; a shorter text may come
        _waiting[model] = before, decoder
        raise
    return before, decoder


def keep_decoder(model: nn.Module, looks: list | None, decoder: LeanDecoder) -> None:
    if looks is not None:
        decoder.resize(0)
        _waiting[model] = looks, decoder


def forget_decoder(model: nn.Module) -> None:
    """Let go of the linears that a waiting decoder holds on to, before they are replaced."""
    _waiting.pop(model, None)


def _looks(model: nn.Module) -> list | None:
    """What a decoder depends on: which modules there are, their numbers, and where their tensors lie. None: that cannot
    be told."""
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
