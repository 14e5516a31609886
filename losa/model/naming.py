"""Names of tensors on disk and in the model, and transformers' own rules between the two.

A checkpoint keeps the names that its publisher chose. transformers renames tensors when it loads them, and makes some
tensors from several stored ones (stacked experts, split projections). ``Naming`` says which stored tensor goes where.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError, reason, shown_name
from losa.model.blocks import Blocks, find_blocks
from losa.model.finite import rounded
from losa.model.forms import Place, has_views, places, rows_of, tensors_of
from losa.storage.tensor_files import Stored, TensorFiles, checkpoint_tensors

logger = logging.getLogger("losa")


def check_names(directory: Path, model: nn.Module) -> Naming:
    """Where the tensors of a dense directory go in ``model``, of ``skeleton``.

    Raises:
        ModelError: names the directory and the first tensor that is missing or does not fit.
    """
    with checkpoint_tensors(directory) as files:
        stored = files.stored
    return checked_naming(model, stored, directory)


def checked_naming(model: nn.Module, stored: dict[str, Stored], where: Path) -> Naming:
    """``check_names`` for tensors of known types and shapes; ``where``: the file or directory that lists them."""
    try:
        naming = Naming(model, stored)
        naming.check(stored)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    try:
        blocks = naming.blocks
    except ModelError:  # the model has no structure that could be pruned, but the tensors fit
        return naming
    for name, target in naming.unused.items():
        index = blocks.index_of(target)
        if index is not None and index >= len(blocks) and not naming.ignored(target):
            raise ModelError(f"{where}: {shown_name(name)}: config.json says that there are {len(blocks)} blocks")
    return naming


class Naming:
    """Where each tensor of a checkpoint goes in ``model``.

    ``renamed``: name on disk -> name in the model, for tensors that the model takes as they are stored.
    ``made``: name in the model -> names on disk of the tensors that transformers makes it from. It may make further
    tensors of the model from the same ones.
    ``unused``: name on disk -> the name that the tensor would have in the model, for tensors that the model has no
    place for; transformers ignores them as well.

    Args:
        model: a transformers model on any device, such as meta.
        names: names of all stored tensors.
        expected: the model's tensors by name, where its linears have been replaced since; default: as they are.

    Raises:
        ModelError: a name that no tensor can have.
    """

    def __init__(self, model: Any, names: Iterable[str], expected: dict[str, Tensor] | None = None):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model = model
        self.expected: dict[str, Tensor] = model.state_dict() if expected is None else expected
        self.renamed: dict[str, str] = {}
        self.made: dict[str, list[str]] = {}
        self.unused: dict[str, str] = {}
        self._patterns: dict[str, str] = {}
        self._mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, taken = model.base_model_prefix, set()

        def order(name: str) -> list:
            try:
                return dot_natural_key(name)
            except ValueError as error:
                raise ModelError(f"{shown_name(name)}: no model has a tensor of that name") from error

        for name in sorted(names, key=order):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.expected)
            if target not in self.expected and name in self.expected:
                target, pattern = rename_source_key(name, [], [], prefix, self.expected)
            if target not in self.expected or (pattern is None and target in taken):
                self.unused[name] = target
            elif pattern is None:
                self.renamed[name] = target
                taken.add(target)
            else:
                self.made.setdefault(target, []).append(name)
                self._patterns[name] = pattern

    @cached_property
    def blocks(self) -> Blocks:
        """The model's decoder blocks. Raises ModelError as ``find_blocks``."""
        return find_blocks(self.model)

    def targets(self) -> dict[str, str]:
        """Name on disk -> name in the model; the first one where transformers makes several of a tensor."""
        made = {source: target for target, sources in self.made.items() for source in sources}
        return self.renamed | made | self.unused

    def stacked(self, target: str) -> list[tuple[str, ...]] | None:
        """Of which stored tensors transformers makes each row of a tensor of ``made``, where a row is made of its own
        ones alone: an expert of a stack. None for other tensors."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        sources: dict[str, list[str]] = {}
        for source in self.made[target]:
            sources.setdefault(self._patterns[source], []).append(source)
        first, *more = self._converters[next(iter(sources))].operations
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return None
        if not all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in more):
            return None
        if any(len(each) != len(self.expected[target]) for each in sources.values()):
            return None
        return list(zip(*sources.values(), strict=True))

    @cached_property
    def experts(self) -> dict[str, str]:
        """Name on disk -> name of the linear, as ``losa.model.forms.views`` has it, whose weight a stored tensor is as
        it is stored: one matrix of one expert, which transformers puts into a stack."""
        found: dict[str, str] = {}
        for module, count, names, rows in self._stacks_of_experts():
            for expert, sources in enumerate(rows[:count]):
                order = list(self._converters[self._patterns[sources[0]]].source_patterns)
                ordered = sorted(sources, key=lambda source: order.index(self._patterns[source]))
                if len(ordered) == len(names):
                    parts = (f"{module}.{expert}.{name}" for name in names)
                    found |= dict(zip(ordered, parts, strict=True))
        return found

    @cached_property
    def unread(self) -> set[str]:
        """Names on disk of tensors that transformers puts into rows of a stack which are no expert's."""
        return {
            source for _, count, _, rows in self._stacks_of_experts() for sources in rows[count:] for source in sources
        }

    def _stacks_of_experts(self) -> Iterator[tuple[str, int, tuple[str, ...], list[tuple[str, ...]]]]:
        """Of each stack that is made row by row: the module's name, ``losa.model.forms.rows_of``, and ``stacked``."""
        for target in self.made:
            module, _, parameter = target.rpartition(".")
            if (rows := rows_of(self.model.get_submodule(module), parameter)) is not None:
                yield module, *rows, self.stacked(target) or []

    @cached_property
    def parts(self) -> dict[str, dict[str, Place]]:
        """Name on disk of a tensor that the model takes as it is stored, and that holds weights or biases of linears in
        another form (``losa.model.forms``) -> where each of them lies in it, by its name as ``views`` has it."""
        found: dict[str, dict[str, Place]] = {}
        of_module: dict[str, dict[str, dict[str, Place]]] = {}
        for name, target in self.renamed.items():
            if (module := self.holder(target)) is None:
                continue
            if module not in of_module:
                of_module[module] = places(self.model.get_submodule(module))
            of_tensor = of_module[module].get(target.removeprefix(f"{module}."), {})
            if of_tensor:
                found[name] = {f"{module}.{part}": place for part, place in of_tensor.items()}
        return found

    def holder(self, target: str) -> str | None:
        """The name of the module of another form (``losa.model.forms``) that holds a tensor of the model; None: there
        is none."""
        return self._holders.get(target)

    @cached_property
    def _holders(self) -> dict[str, str]:
        return {
            f"{name}.{tensor}": name
            for name, module in self.model.named_modules()
            if has_views(module)
            for tensor in tensors_of(module)
        }

    def linear_of(self, name: str) -> str | None:
        """The linear, by its name in the model, whose weight a stored tensor is; None where it is no whole weight."""
        if name in self.experts:
            return self.experts[name]
        module, _, kind = self.renamed.get(name, "").rpartition(".")
        return module if kind == "weight" and name.endswith(".weight") else None

    def make(self, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that transformers makes from the stored tensors of ``made[target]``, by name in the model. From
        the stored tensors of some rows (``stacked``) it makes these rows.

        Raises:
            ModelError: they do not fit together; names the first.
        """
        sources = [source for source in self.made[target] if source in tensors]
        converter: Any = deepcopy(self._converters[self._patterns[sources[0]]])
        for source in sources:
            converter.add_tensor(target, source, self._patterns[source], tensors[source])
        try:
            made = converter.convert(target, model=_AsExpected(self.model, self.expected), config=self.model.config)
        except Exception as error:  # transformers' operations raise errors of many kinds
            raise ModelError(
                f"{shown_name(sources[0])}: {len(sources)} tensors do not make {target} ({reason(error)})"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def read(
        self, files: TensorFiles, wanted: Container[str], where: str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors of these names, as transformers loads them: name, and the tensor in the type in which
        users get it. One after the other, but for those that are made of the same stored tensors; a stack is filled row
        by row. Names that the files do not fill are left out.

        Args:
            where: for the message about a tensor that is not finite; None: no tensor is looked at.

        Raises:
            ModelError: as ``make`` and ``TensorFiles.get``; a tensor is not finite.
        """
        dtypes = self.dtypes()

        def typed(name: str, tensor: Tensor) -> Tensor:
            dtype = dtypes.get(name)
            if where is not None:
                return rounded(f"{where}: {name}", tensor, dtype)
            return tensor if dtype is None else tensor.to(dtype)

        for source, target in self.renamed.items():
            if target in wanted:
                yield target, typed(target, files.get(source))
        for target, sources in self.made.items():
            if target not in wanted:
                continue
            if (rows := self.stacked(target)) is None:
                for name, tensor in self.make(target, {source: files.get(source) for source in sources}).items():
                    yield name, typed(name, tensor)
                continue
            whole = torch.empty(self.expected[target].shape, dtype=dtypes[target])
            for row, own in zip(whole, rows, strict=True):
                row.copy_(typed(target, self.make(target, {source: files.get(source) for source in own})[target][0]))
            yield target, whole
            del whole

    def missing(self, loaded: Iterable[str]) -> list[str]:
        """Names of the model's tensors that are not ``loaded``, in model order. Of tied weights, one is enough."""
        absent = self.expected.keys() - set(loaded)
        # Weights that are tied to each other are one family, and all its members refer to one set.
        family: dict[str, set[str]] = {}
        for one, other in getattr(self.model, "all_tied_weights_keys", {}).items():
            joined = family.get(one, {one}) | family.get(other, {other})
            family |= dict.fromkeys(joined, joined)
        ignored = self._model_says("_keys_to_ignore_on_load_missing")
        return [
            name
            for name in self.expected
            if name in absent and not family.get(name, set()) - absent and not (ignored and ignored.search(name))
        ]

    def ignored(self, target: str) -> bool:
        """Whether the model states that it does not use a stored tensor of this name."""
        pattern = self._model_says("_keys_to_ignore_on_load_unexpected")
        old_buffers = re.search(r"rotary_emb\.inv_freq|(^|\.)position_ids$", target)
        return old_buffers is not None or (pattern is not None and pattern.search(target) is not None)

    def _model_says(self, attribute: str) -> re.Pattern | None:
        patterns = getattr(self.model, attribute, None)
        return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None

    def filled(self, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors of the model that a checkpoint's tensors fill, by name in the model, from the files' headers.

        Raises:
            ModelError: names the first tensor that does not fit, and what was expected.
        """
        found: dict[str, Stored] = {target: stored[name] for name, target in self.renamed.items()}
        names = {target: name for name, target in self.renamed.items()}
        for target, sources in self.made.items():
            tensors = {s: torch.empty(stored[s].shape, dtype=stored[s].dtype, device="meta") for s in sources}
            for name, tensor in self.make(target, tensors).items():
                found[name], names[name] = Stored(tensor.dtype, tuple(tensor.shape)), sources[0]
        for target, (dtype, shape) in found.items():
            expected, name = self.expected.get(target), shown_name(names[target])
            if expected is None:
                raise ModelError(f"{name}: makes {shown_name(target)}, which the model has not")
            if tuple(expected.shape) != shape:
                raise ModelError(f"{name}: expected shape {list(expected.shape)}, the file has {list(shape)}")
            if expected.is_floating_point() and not dtype.is_floating_point:
                raise ModelError(f"{name}: expected floating-point weights, the file has {dtype}")
        return found

    def check(self, stored: Mapping[str, Stored]) -> None:
        """Compare a checkpoint's headers with the model: every tensor is there, in the model's shape.

        Raises:
            ModelError: names the first tensor that does not fit, and what was expected.
        """
        if absent := self.missing(self.filled(stored)):
            more = f" and {len(absent) - 3} others" if len(absent) > 3 else ""
            raise ModelError(f"tensors are missing: {', '.join(absent[:3])}{more}")

    def warn_of_unused(self, where: Path) -> None:
        """Warn of stored tensors that the model has no place for, unless it states that it does not use them."""
        unused = [name for name, target in self.unused.items() if not self.ignored(target)]
        if unused:
            others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
            logger.warning("%s: the model has no place for %s%s", where, shown_name(unused[0]), others)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type in which transformers keeps each floating-point tensor of the model: the model's type, or fp32 for
        tensors that the model asks to keep in fp32."""
        from transformers.core_model_loading import build_glob_alternation

        kept = {name: t.dtype for name, t in self.expected.items() if t.is_floating_point()}
        plan = self.model._get_dtype_plan(self.model.dtype)
        if plan:
            pattern, plans, _ = build_glob_alternation(list(plan))
            for name in kept:
                if (match := pattern.search(name)) and match.lastgroup:
                    kept[name] = plan[plans[match.lastgroup]]
        return kept

    def remember(self) -> None:
        """Make ``save_pretrained`` write the names of this checkpoint, as it does after loading by transformers."""
        self.model._weight_conversions = [entry for entry in self._mapping if entry.was_used()]


class _AsExpected:
    """A model for transformers' operations, which look up the shape of what they make: its tensors are there though its
    linears have been replaced."""

    def __init__(self, model: Any, expected: Mapping[str, Tensor]):
        self._model, self._expected = model, expected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return self._expected[name] if name in self._expected else self._model.get_parameter(name)


def saved_names(model: Any) -> list[str]:
    """Names in ``model`` of the tensors that ``save_pretrained`` writes: of tied ones the one that it keeps."""
    uses: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in (model._keys_to_ignore_on_save or ()):
            uses.setdefault(id(tensor), []).append(name)
    tied = getattr(model, "all_tied_weights_keys", {})
    return [next((name for name in names if name not in tied), names[0]) for names in uses.values()]


def as_stored(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``model``, by their names in it, as ``save_pretrained`` writes them: by names on disk, and with a
    tensor that transformers made from several ones taken apart again. ``tensors`` holds all of what belongs together,
    such as a decoder block."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: Any = _AsExpected(model, tensors)
    return revert_weight_conversion(seen, dict(tensors))
