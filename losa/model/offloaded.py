"""Loading a model whose decoder blocks stay in its files: each block is read when it is needed, and dropped again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.distributed.offloading import offload
from losa.distributed.processes import is_main
from losa.distributed.watch import progress
from losa.errors import ModelError
from losa.model.blocks import Blocks, parameter_uses
from losa.model.forms import Place, places, tensors_of
from losa.model.hub_files import local_directory
from losa.model.loading import torch_device
from losa.model.naming import Naming, as_stored, saved_names
from losa.model.part_loading import empty_of, locate_files, names_of, put_parameters, tie
from losa.model.replacing import replaced_forms, restore_tensors
from losa.model.skeleton import move_buffers
from losa.modules.masked_lora import MaskedLoRALinear
from losa.storage.tensor_files import TensorFiles, checkpoint_tensors


def load_offloaded(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    held: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[nn.Module, object, OffloadedBlocks]:
    """Load a causal language model but its decoder blocks, and its tokenizer, in evaluation mode. The parameters of the
    blocks are on meta but within ``losa.distributed.sharding.gathered``; everything else is on the device.

    Args:
        model: Hugging Face id or local directory, with safetensors files.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (cuda if there is one, else cpu) or a torch device: the one that the model computes on.
        held: given the name of a tensor that stays in memory and the tensor as it is read, the tensor on the device
            that is taken; default: the one that was read.

    Returns:
        (model, tokenizer, where its blocks are)

    Raises:
        ModelError: as ``losa.model.loading.load_model``, but for weights of blocks that are not finite, which are named
            when the block is first read; or a GGUF file, weights in another format than safetensors, or blocks that
            share a weight.
    """
    # With its number, as tensors there say it.
    target = torch.empty(0, device=torch_device(device)).device
    source = locate_files(model, None, dtype, "read block by block", "offload: null")
    directory = local_directory(model, source, trust_remote_code)
    loaded, tokenizer = empty_of(model, directory, dtype, trust_remote_code)
    where = f"model {model!r}"
    with ExitStack() as stack:
        files = stack.enter_context(checkpoint_tensors(directory))
        naming, found = names_of(model, directory, loaded, files)
        tie(naming, files, found, range)
        _check_apart(naming.blocks, where)
        _fill_rest(naming, files, found, held or (lambda _, tensor: tensor.to(target)), where)
        move_buffers(loaded, target)
        if is_main():
            naming.warn_of_unused(directory)
        naming.remember()
        return loaded.eval(), tokenizer, OffloadedBlocks(naming, files, stack.pop_all(), target, where)


class OffloadedBlocks:
    """Where a model's blocks are read from: at first all of them from its files. The linears may be wrapped meanwhile,
    by layers that train nothing.

    Args:
        naming: of the model, before anything in it was replaced, and of all stored tensors.
        files: the model's, which stay open as long as this object lives: what takes their names meanwhile is not read.
        opened: closes them.
        device: that the model computes on.
        where: for messages.
    """

    def __init__(self, naming: Naming, files: TensorFiles, opened: ExitStack, device: torch.device, where: str):
        self.model = naming.model
        self.blocks = naming.blocks
        self.device = device
        self._where = where
        self._saved = set(saved_names(self.model))
        self._parameters = [
            {f"{name}.{part}" for part, _ in block.named_parameters()}
            for name, block in zip(self.blocks.names, self.blocks, strict=True)
        ]
        self._naming = naming
        self._files = files
        weakref.finalize(self, opened.close)
        self._written: dict[int, Path] = {}
        for index, block in enumerate(self.blocks):
            offload(block, device, partial(self._load, index), partial(self._release, index))

    def read_from(self, index: int, path: Path) -> None:
        """From now on read a block from a file that holds what ``stored`` gave."""
        self._written[index] = path

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a block, as they are read from its file: name in the model before anything was replaced,
        and the tensor on the host.

        Raises:
            ModelError: as ``Naming.read``; the file lacks a tensor, or was written to since it was opened.
        """
        path = self._written.get(index)
        if path is None:
            self._files.check_unchanged()
            yield from self._read(index, self._files, self._naming)
            self._files.check_unchanged()
            return
        with TensorFiles([path]) as files:
            yield from self._read(index, files, Naming(self.model, files.names, self._naming.expected))

    def _read(self, index: int, files: TensorFiles, naming: Naming) -> Iterator[tuple[str, Tensor]]:
        absent = set(self._parameters[index])
        for target, tensor in naming.read(files, self._parameters[index], self._where):
            progress(f"reading {target}")
            absent.discard(target)
            yield target, tensor
            del tensor  # before the next one is read
        if absent:
            what = f"{len(absent)} tensors of {self.blocks.names[index]} are missing: {min(absent)}"
            raise ModelError(f"{self._where}: {what}")

    def merged(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block that is in memory, by name in the model before anything was replaced. M * W takes the
        place of W in wrapped linears, whose memory is that of these tensors then."""
        name, block = self.blocks.names[index], self.blocks.modules[index]
        for layer in block.modules():
            if isinstance(layer, MaskedLoRALinear):
                layer.replace_weight(layer.effective_weight())
        found = {
            f"{name}.{part}": tensor
            for part, tensor in block.state_dict().items()
            if not isinstance(block.get_submodule(part.rpartition(".")[0]), MaskedLoRALinear)
            or part.rpartition(".")[2] in ("weight", "bias")
        }
        for place, form in replaced_forms(self.model).items():
            if place.startswith(f"{name}."):
                restore_tensors(form, place, found)
                for leaf, parts in places(form).items():
                    self._set_parts(place, parts, found[f"{place}.{leaf}"])
        return found

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of ``merged`` on the host, as ``save_pretrained`` writes them."""
        return as_stored(self.model, {name: tensor.cpu() for name, tensor in tensors.items() if name in self._saved})

    def _load(self, index: int) -> None:
        for name, tensor in self.tensors(index):
            self._put(name, tensor.to(self.device))
        for layer in self.blocks.modules[index].modules():
            if isinstance(layer, MaskedLoRALinear):
                layer.keep_all()

    def _put(self, name: str, tensor: Tensor) -> None:
        for place, form in replaced_forms(self.model).items():
            if name.startswith(f"{place}.") and (leaf := name.removeprefix(f"{place}.")) in tensors_of(form):
                self._set_parts(place, places(form)[leaf], tensor)
                return
        place, _, leaf = name.rpartition(".")
        _set(self.model.get_submodule(place), leaf, tensor)

    def _set_parts(self, place: str, parts: dict[str, Place], tensor: Tensor) -> None:
        """Give the linears in the place of another form their parts of its tensor; a part is a view where it can be."""
        for part, within in parts.items():
            linear, _, kind = part.rpartition(".")
            module = self.model.get_submodule(f"{place}.{linear}".rstrip("."))
            _set(module, kind, within.of(tensor).contiguous())

    def _release(self, index: int) -> None:
        for module in self.blocks.modules[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    _set(module, name, torch.empty_like(parameter, device="meta"))


def _set(module: Any, name: str, tensor: Tensor) -> None:
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _check_apart(blocks: Blocks, where: str) -> None:
    uses = parameter_uses(blocks.model)
    shared = [name for name, p in blocks.modules.named_parameters(prefix=blocks.prefix) if uses[id(p)] > 1]
    if shared:
        raise ModelError(
            f"{where}: {shared[0]} is a weight of several modules, so that its block cannot be read by itself; "
            "offload: null holds the model in memory"
        )


def _fill_rest(
    naming: Naming, files: TensorFiles, found: set[str], held: Callable[[str, Tensor], Tensor], where: str
) -> None:
    """Put everything into the model but the parameters of its blocks."""
    model, blocks = naming.model, naming.blocks
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name for name in found if name not in parameters or blocks.index_of(name) is None}
    new: dict[int, nn.Parameter] = {}
    for name, tensor in naming.read(files, wanted, where):
        progress(f"loading {name}")
        if name in parameters:
            new[id(parameters[name])] = nn.Parameter(held(name, tensor), requires_grad=False)
        else:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = held(name, tensor)
        del tensor  # where another one is held, this one goes before the next one is read
    put_parameters(model, new)
    rest = ((name, t) for name, t in model.named_parameters() if blocks.index_of(name) is None)
    if absent := [name for name, tensor in rest if tensor.device.type == "meta"]:
        raise ModelError(f"{where}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")
