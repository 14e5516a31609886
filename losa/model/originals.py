"""The weights that wrapped linears were given, where pruning replaces them: what the dense model is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from losa.distributed.sharding import on_host, sharding_of, whole
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode


class Originals:
    """The given weights of one block's linears, by name within the block.

    They are references, not copies, until a weight is first replaced. Then the original moves to host memory, of a
    sharded weight each process's rows. That frees the device's memory once nobody else holds it.

    Args:
        linears: of the block; none for a run that never needs what pruning replaces.
        stay: originals stay on the device, because every training step reads them.
    """

    def __init__(self, linears: Mapping[str, MaskedLoRALinear], *, stay: bool = False):
        self._linears = linears
        self._stay = stay
        # A sharded weight is another parameter once it was replaced; a plain one has other data.
        self._kept: dict[str, Tensor] = {
            name: m.weight.data if sharding_of(m) is None else m.weight for name, m in linears.items()
        }
        # Sharded originals that are the present weights, noted while the block is whole.
        self._noted: set[str] | None = None

    def __deepcopy__(self, memo: dict) -> Originals:
        """Itself: FSDP2 runs a copy of the model, whose dense weights are the model's."""
        return self

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def _present(self) -> set[str]:
        if self._noted is not None:
            return self._noted
        return {name for name, original in self._kept.items() if original is self._linears[name].weight}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Enter it before the block's parameters become whole: it notes which originals are the present weights."""
        self._noted = self._present
        try:
            yield
        finally:
            self._noted = None

    def whole(self) -> dict[str, Tensor]:
        """Whole original weights, those alone that may differ from the present weights. All processes call it
        together."""
        present = self._present
        return {name: whole(original) for name, original in self._kept.items() if name not in present}

    def replaced(self, name: str) -> None:
        """The linear has another weight now."""
        if self._noted is not None:
            self._noted.discard(name)
        if name in self._kept and not self._stay:
            self._kept[name] = on_host(self._kept[name])

    def move(self) -> None:
        """Move the originals of weights that were replaced to host memory, unless they stay."""
        for name, layer in self._linears.items():
            if layer.weight_replaced:
                self.replaced(name)


@contextmanager
def dense_passes(model: nn.Module, originals: Mapping[str, Originals]) -> Iterator[None]:
    """Within the context passes of the whole model are passes of the dense model, in which no gradient is taken.

    Args:
        model: wrapped, or the copy of it that FSDP2 trains.
        originals: by the block's full name. Where processes hold the model together, each block's originals become
            whole while the block runs, so that all processes make the same passes.
    """
    with dense_mode(model), ExitStack() as stack:
        for name, own in originals.items():
            if own:
                _swap_while_it_runs(model.get_submodule(name), own, stack)
        yield


def _swap_while_it_runs(block: nn.Module, originals: Originals, stack: ExitStack) -> None:
    put_back = stack.enter_context(ExitStack())

    def enter(module, args):
        put_back.close()  # of a call that failed
        for name, weight in originals.whole().items():
            parameters = module.get_submodule(name)._parameters
            present = parameters["weight"]
            assert present is not None
            put_back.callback(parameters.__setitem__, "weight", present)
            parameters["weight"] = nn.Parameter(weight.to(present.device), requires_grad=False)

    def leave(module, args, output):
        put_back.close()

    # FSDP2's hooks make the block whole before this one, and shard it anew after this one.
    stack.callback(block.register_forward_pre_hook(enter).remove)
    stack.callback(block.register_forward_hook(leave, prepend=True, always_call=True).remove)
