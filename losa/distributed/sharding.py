"""A model that several processes hold together: each holds some rows of every parameter, as DTensors.

Whoever needs whole parameters enters ``gathered`` for a module, such as a decoder block, or ``gathered_calls`` for
forward passes of the whole model. Both do nothing to a model that is whole in memory, so that nobody has to ask. Blocks
that are offloaded (``losa.distributed.offloading``) come into memory by them too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from losa.distributed.joining import as_patient
from losa.distributed.offloading import is_offloaded, offloaded_from, onloaded
from losa.distributed.processes import process_count
from losa.distributed.watch import waiting

# Bytes to which tensors of any dtype are aligned.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Sharding:
    """How parameters are held: by rows (dimension 0) along the last dimension of ``mesh``, and alike along a first
    dimension, where there is one. ``offload``: the rows wait in host memory and are whole on the mesh's device only.

    Rows are dealt out as ``torch.chunk`` deals them: all processes get the same number but for the last ones, which may
    get fewer or none.
    """

    mesh: DeviceMesh
    offload: bool = False

    @classmethod
    def of(cls, parameter: DTensor) -> Sharding:
        """The sharding of a parameter."""
        mesh = parameter.device_mesh
        return cls(mesh, offload=parameter.to_local().device.type != mesh.device_type)

    @property
    def device(self) -> torch.device:
        """Where whole parameters are."""
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def shards(self) -> int:
        """Processes that hold one copy together."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def placements(self) -> list[Replicate | Shard]:
        return [*[Replicate()] * (self.mesh.ndim - 1), Shard(0)]

    def rows(self, count: int) -> range:
        """Which of ``count`` rows this process holds."""
        chunk = -(-count // self.shards)
        first = self.mesh.get_local_rank(self.mesh.ndim - 1) * chunk
        return range(min(first, count), min(first + chunk, count))

    def from_rows(self, rows: Tensor, shape: torch.Size, pin: bool = True) -> DTensor:
        """The tensor of ``shape`` of which this process holds ``rows``, which are contiguous. ``pin``: whether rows
        that wait in host memory are page-locked, as FSDP2 wants what it runs; torch never gives such memory back."""
        if not rows.is_meta:
            rows = rows.to("cpu" if self.offload else self.device)
            if pin and self.offload and self.mesh.device_type == "cuda":
                # FSDP2 would pin a copy, and everyone else who shares the rows would keep them too.
                rows = rows.pin_memory()
        return self._of_rows(rows, shape)

    def _of_rows(self, rows: Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        spec = DTensorSpec(self.mesh, tuple(self.placements), TensorMeta(shape, stride, rows.dtype))
        # DTensor.from_local would move rows that wait in host memory to the mesh's device.
        return DTensor(rows, spec, requires_grad=False)

    def shard(self, whole: Tensor, pin: bool = True) -> DTensor:
        """This process's rows, copied, of a tensor that every process has. ``pin``: as ``from_rows``."""
        rows = self.rows(len(whole))
        return self.from_rows(whole.detach()[rows.start : rows.stop].clone(), whole.shape, pin)


def make_sharding(device: torch.device, shard_size: int | None = None, offload: bool = False) -> Sharding:
    """The sharding of all processes that have joined.

    Args:
        device: what the processes compute on.
        shard_size: processes that hold one copy of the model together; it divides the number of processes. Default:
            all of them.
    """
    size = shard_size or process_count()
    copies = process_count() // size
    shape, names = ((copies, size), ("replicate", "shard")) if copies > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        as_patient(group)
    return Sharding(mesh, offload)


def sharding_of(module: nn.Module) -> Sharding | None:
    """How a module's parameters are held; None: every process has them whole."""
    first = next((p for p in module.parameters() if isinstance(p, DTensor)), None)
    return None if first is None else Sharding.of(first)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on."""
    sharding = sharding_of(module)
    if sharding is not None:
        return sharding.device
    return offloaded_from(module) or next(module.parameters()).device


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, on the device of its sharding; a tensor that is not sharded is returned as it is.
    All processes call it together."""
    return _wholes([tensor])[0] if isinstance(tensor, DTensor) else tensor


def _wholes(tensors: Sequence[DTensor]) -> list[Tensor]:
    """``whole`` of tensors of one sharding, by one collective call: a decoder block has dozens of parameters."""
    sharding = Sharding.of(tensors[0])
    shards = sharding.shards
    # Bytes that each process sends of a tensor: as many as the first one holds.
    sizes = [-(-t.shape[0] // shards) * t.shape[1:].numel() * t.dtype.itemsize for t in tensors]
    places = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    sent = torch.empty(places.pop(), dtype=torch.uint8, device=sharding.device)
    for tensor, place in zip(tensors, places, strict=True):
        rows = tensor.to_local().detach().contiguous().view(-1).view(torch.uint8)
        sent[place : place + len(rows)].copy_(rows)
    shared: Any = DTensor.from_local(sent, sharding.mesh, sharding.placements, run_check=False)
    with waiting():
        found = shared.full_tensor().view(shards, -1)
    wholes = []
    for tensor, place, size in zip(tensors, places, sizes, strict=True):
        # The last processes may have sent fewer rows, and of a stack of few experts most may have sent none.
        rows = torch.empty(tensor.shape.numel() * tensor.dtype.itemsize, dtype=torch.uint8, device=sharding.device)
        full = len(rows) // size if size else 0
        rows[: full * size].view(full, size).copy_(found[:full, place : place + size])
        if rest := len(rows) - full * size:
            rows[full * size :].copy_(found[full, place : place + rest])
        wholes.append(rows.view(tensor.dtype).view(tensor.shape))
    return wholes


def on_host(tensor: Tensor) -> Tensor:
    """A tensor in host memory: the rows that this process holds of a sharded one, which stays sharded."""
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu")
    # New rows are not pinned: pinned memory is rounded up to powers of two, and never given back.
    return Sharding.of(tensor)._of_rows(tensor.to_local().detach().to("cpu"), tensor.shape)


def sum_over_rows(tensor: Tensor, count: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of ``count`` over all rows of a tensor, from its value for the rows of each process.

    Args:
        count: gives a tensor of one shape and dtype, for any number of rows.
    """
    if not isinstance(tensor, DTensor):
        return count(tensor)
    sharding = Sharding.of(tensor)
    # Counting on the host takes minutes for the rows that wait there.
    part = count(tensor.to_local().to(sharding.device))
    placements = [*[Replicate()] * (sharding.mesh.ndim - 1), Partial()]
    return DTensor.from_local(part, sharding.mesh, placements, run_check=False).full_tensor()


def shard_module(module: nn.Module, sharding: Sharding, pin: bool = True) -> None:
    """Give every process its rows of all parameters of ``module``, which it has whole, in place. ``pin``: as
    ``Sharding.from_rows``."""
    _put_rows(list(module.modules()), sharding, {}, pin)


@contextmanager
def gathered(module: nn.Module, only: Container[str] | None = None) -> Iterator[None]:
    """Within the context all parameters of ``module`` are whole, or ``only`` those of these names in their modules. All
    processes enter and leave it together.

    At the end each process keeps its rows of whatever parameters ``module`` then has: changed and new ones too. Rows
    are copied only of memory that is new, or that was written to by an operation that autograd counts (which excludes
    operations on a parameter's ``.data``). The parameters of an offloaded module are dropped at the end, as they are.
    """
    with onloaded(module), _gathered(list(module.modules()), only):
        yield


def is_whole(model: nn.Module) -> bool:
    """Whether all parameters are in this process's memory, so that the model runs as it is."""
    return sharding_of(model) is None and not is_offloaded(model)


@contextmanager
def gathered_calls(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context ``model`` can run without gradients: each of ``blocks`` is whole while it runs, and all
    parameters outside of them are whole throughout. All processes make the same calls."""
    if is_whole(model):
        yield
        return
    blocks = list(blocks)
    inside = {id(module) for block in blocks for module in block.modules()}
    with ExitStack() as stack:
        stack.enter_context(_gathered([module for module in model.modules() if id(module) not in inside]))
        for block in blocks:
            held = stack.enter_context(ExitStack())

            def enter(module, args, held=held):
                held.close()  # of a call that failed
                held.enter_context(gathered(module))

            def leave(module, args, output, held=held):
                held.close()

            stack.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


@dataclass(frozen=True)
class _Whole:
    """A whole parameter, the sharded one in whose place it stands, what it held at first, and written how often.
    ``first`` keeps that memory: no other parameter may come to lie there."""

    parameter: nn.Parameter
    sharded: nn.Parameter
    first: Tensor
    version: int

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter``, this one or another, has the values that were gathered, in the same memory."""
        own = self.parameter
        same = parameter is own or (parameter.shape, parameter.dtype) == (own.shape, own.dtype)
        return same and (parameter.data_ptr(), parameter._version) == (self.first.data_ptr(), self.version)


@contextmanager
def _gathered(modules: list[nn.Module], only: Container[str] | None = None) -> Iterator[None]:
    found: list[tuple[nn.Module, str, Any]] = [
        (m, name, p)
        for m in modules
        for name, p in m._parameters.items()
        if isinstance(p, DTensor) and (only is None or name in only)
    ]
    if not found:
        yield
        return
    sharding = Sharding.of(found[0][2])
    shards: dict[int, Any] = {id(p): p for _, _, p in found}
    wholes: dict[int, _Whole] = {}
    for sharded, values in zip(shards.values(), _wholes(list(shards.values())), strict=True):
        parameter = nn.Parameter(values, requires_grad=sharded.requires_grad)
        wholes[id(sharded)] = _Whole(parameter, sharded, parameter.detach(), parameter._version)
    for module, name, sharded in found:
        module._parameters[name] = wholes[id(sharded)].parameter
    try:
        yield
    finally:
        # New modules inside of the old ones are seen too.
        now = dict.fromkeys(inner for module in modules for inner in (module, *module.children()))
        _put_rows(list(now), sharding, {_address(known.parameter, known.first): known for known in wholes.values()})


def _put_rows(modules: list[nn.Module], sharding: Sharding, wholes: dict[int, _Whole], pin: bool = True) -> None:
    """Put sharded parameters in the places of whole ones. ``wholes``, by their place in memory: what was gathered."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _sharded(parameter, sharding, wholes.get(_address(parameter, parameter)), pin)
            module._parameters[name] = made[id(parameter)]


def _address(parameter: nn.Parameter, memory: Tensor) -> int:
    """Where a parameter's memory is; of an empty one, which has none, which object it is."""
    return memory.data_ptr() or id(parameter)


def _sharded(parameter: nn.Parameter, sharding: Sharding, known: _Whole | None, pin: bool) -> nn.Parameter:
    if known is None or not known.holds(parameter):
        return nn.Parameter(sharding.shard(parameter, pin), requires_grad=parameter.requires_grad)
    if known.parameter is parameter:
        return known.sharded
    # Another parameter over gathered memory, as when a linear is wrapped: it shares the rows too.
    return nn.Parameter(known.sharded.detach(), requires_grad=parameter.requires_grad)
