"""The weights that wrapped linears were given, where pruning replaces them: what the dense model is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from losa.distributed.sharding import on_host, sharding_of, whole
from losa.errors import LosaError
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode


class Originals:
    """The given weights of one block's linears, by name within the block.

    They are references, not copies, until a pruner first replaces a weight. Then the original moves to host memory, of
    a sharded weight each process's rows. That frees the device's memory once nobody else holds it. The original of a
    weight that a dense adapter's mask is written into stays where it is.

    Args:
        linears: of the block.
        keeps: False for a run that never needs what pruning replaces.
        stay: originals stay on the device, because every training step reads them.
    """

    def __init__(self, linears: Mapping[str, MaskedLoRALinear], *, keeps: bool = True, stay: bool = False):
        self._linears = linears
        self._keeps = keeps
        self._stay = stay
        # A sharded weight is another parameter once it was replaced; a plain one has other data.
        self._kept: dict[str, Tensor] = {
            name: m.weight.data if sharding_of(m) is None else m.weight for name, m in linears.items() if keeps
        }
        # Sharded originals that are the present weights, noted while the block is whole.
        self._noted: set[str] | None = None

    def __deepcopy__(self, memo: dict) -> Originals:
        """Itself: FSDP2 runs a copy of the model, whose dense weights are the model's."""
        return self

    @property
    def _present(self) -> set[str]:
        if self._noted is not None:
            return self._noted
        return {name for name, original in self._kept.items() if _same(original, self._linears[name].weight)}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Enter it before the block's parameters become whole: it notes which originals are the present weights."""
        self._noted = self._present
        try:
            yield
        finally:
            self._noted = None

    def whole(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Whole original weights, those alone that may differ from the present weights. All processes call it
        together.

        Args:
            names: of the linears that matter; default: all.

        Raises:
            LosaError: a weight was replaced, and its original was not kept; names the linear.
        """
        wanted = self._linears.keys() if names is None else names
        lost = [name for name in wanted if not (self._keeps or self._linears[name].weight_is_given)]
        if lost:
            raise LosaError(f"{lost[0]}: expected the dense model's weight to be kept, but pruning has replaced it")
        present = self._present
        return {name: whole(self._kept[name]) for name in wanted if name in self._kept and name not in present}

    @contextmanager
    def in_place(self, block: nn.Module) -> Iterator[None]:
        """Within the context the linears of ``block``, or of a copy of it, have the original weights. All processes
        enter together. Raises what ``whole`` raises."""
        with weights_in_place(block, self.whole()):
            yield

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


def _same(original: Tensor, weight: Tensor) -> bool:
    if original is weight:
        return True
    # A plain parameter's data is a new tensor each time that it is asked for.
    plain = type(original) is Tensor and original.device == weight.device and not original.is_meta
    return plain and original.data_ptr() == weight.data_ptr()


@contextmanager
def weights_in_place(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context linears of ``module``, by name within it, have other frozen weights, on their own device."""
    before: list[tuple[dict[str, nn.Parameter | None], nn.Parameter | None]] = []
    try:
        for name, weight in weights.items():
            parameters = module.get_submodule(name)._parameters
            present = parameters["weight"]
            assert present is not None
            parameters["weight"] = nn.Parameter(weight.to(present.device), requires_grad=False)
            before.append((parameters, present))
        yield
    finally:
        for parameters, present in before:
            parameters["weight"] = present


@contextmanager
def dense_passes(model: nn.Module, originals: Mapping[str, Originals]) -> Iterator[None]:
    """Within the context passes of the whole model are passes of the dense model, in which no gradient of a weight is
    taken.

    Args:
        model: wrapped, or the copy of it that FSDP2 trains.
        originals: by the block's full name. Where processes hold the model together, each block's originals become
            whole while the block runs, so that all processes make the same passes.

    A pass raises LosaError where the dense model's weights were not kept.
    """
    with dense_mode(model), ExitStack() as stack:
        for name, own in originals.items():
            _swap_while_it_runs(model.get_submodule(name), own, stack)
        yield


def _swap_while_it_runs(block: nn.Module, originals: Originals, stack: ExitStack) -> None:
    put_back = stack.enter_context(ExitStack())

    def enter(module, args):
        put_back.close()  # of a call that failed
        put_back.enter_context(originals.in_place(module))

    def leave(module, args, output):
        put_back.close()

    # FSDP2's hooks make the block whole before this one, and shard it anew after this one.
    stack.callback(block.register_forward_pre_hook(enter).remove)
    stack.callback(block.register_forward_hook(leave, prepend=True, always_call=True).remove)
