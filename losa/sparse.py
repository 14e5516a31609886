"""Inference from the zeros: packed linears in the place of a merged model's dense ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from losa.errors import ModelError
from losa.generation import forget_decoder
from losa.model import find_blocks, find_linears
from losa.modules import SparseLinear, share_rows
from losa.saving import guard_saving
from losa_kernels import pack_bitmask, pack_mask, pack_nm
from losa_kernels.packing import Packed

logger = logging.getLogger("losa")

FORMATS = ("auto", "bitmask", "nm")
# Below this share of zeros packing saves too little to pay for the decoding; a quarter (3:4) still pays.
MIN_SPARSITY = 0.2
# N:M with more than this share of padding in its values is stored as a bitmask.
MAX_PADDING = 0.02
# Linears that read the same input, by their names' last components: their rows lie together in memory.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pack_weight(weight: Tensor, format: str = "auto") -> Packed:
    """Pack what is not zero. Zeros of either sign are dropped and come back as +0.0: models that were pruned by a
    product with a mask are full of -0.0.

    Args:
        weight: (out, in) floating point.
        format: "bitmask"; "nm": the smallest N of every 8 (or of every 4) that holds the weight; "auto": N:M where it
            wastes nearly nothing, else a bitmask.

    Raises:
        ValueError: an unknown format, or "nm" for a width that is no multiple of 4.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    kept = weight != 0
    mask = pack_mask(kept)
    if format == "bitmask":
        return pack_bitmask(weight, mask)
    pattern = _pattern(kept)
    if format == "nm":
        if pattern is None:
            raise ValueError(f"format: nm needs a width that is a multiple of 4, got {weight.shape[1]}")
        return pack_nm(weight, mask, *pattern)
    if pattern is not None:
        keep_n, m = pattern
        stored = keep_n / m * kept.numel()
        if stored > 0 and stored - int(kept.sum()) <= MAX_PADDING * stored:
            return pack_nm(weight, mask, keep_n, m)
    return pack_bitmask(weight, mask)


def _pattern(kept: Tensor) -> tuple[int, int] | None:
    """The densest group decides: (keep_n, m) with the fewest stored values, 4 before 8 where they are equal."""
    found = []
    for m in (4, 8):
        if kept.numel() and kept.shape[1] % m == 0:
            keep_n = max(1, int(kept.reshape(-1, m).sum(1, dtype=torch.int32).max()))
            found.append((keep_n, m))
    return min(found, key=lambda pattern: pattern[0] / pattern[1], default=None)


@torch.no_grad()
def sparsify(model: nn.Module, format: str = "auto", min_sparsity: float = MIN_SPARSITY) -> nn.Module:
    """Replace the block linears of a merged model by packed ones, in place; one layer's dense weight goes at a time.

    The model runs on a few tokens first: linears whose weight it reads itself stay dense. ``save_pretrained`` writes
    the model dense afterwards.

    Args:
        model: decoder with plain linears (``merge_model`` first).
        format: see ``pack_weight``.
        min_sparsity: linears with a smaller share of zeros stay dense.

    Returns:
        the model, for inference only.

    Raises:
        ModelError: adapters are left, or no linear has zeros enough.
    """
    prefix, found = find_blocks(model)
    blocks = [(block, list(find_linears(block))) for block in found]
    for block, names in blocks:  # all of them before the first is replaced
        for name in names:
            if type(linear := block.get_submodule(name)) is not nn.Linear:
                raise ModelError(f"sparsify: {name} is a {type(linear).__name__}; merge_model first")
    forget_decoder(model)
    replaced, considered = 0, sum(len(names) for _, names in blocks)
    try:
        leave = read_directly(model)
    except ModelError as error:
        logger.info("sparsify: %s", error)
        leave = set()
    for index, (block, names) in enumerate(blocks):
        for name in names:
            linear = block.get_submodule(name)
            if f"{prefix}.{index}.{name}" not in leave and zero_share(linear.weight) >= min_sparsity:
                packed = pack_weight(linear.weight.detach(), format)
                block.set_submodule(name, SparseLinear(packed, linear.bias).train(linear.training))
                replaced += 1
        group_linears(block)
    if considered and not replaced:
        raise ModelError(f"sparsify: none of {considered} linears has {min_sparsity:.0%} zeros; is the model pruned?")
    logger.info("sparsify: %d of %d linears packed", replaced, considered)
    guard_saving(model)
    return model


def read_directly(model: nn.Module) -> set[str]:
    """Names of linears whose ``weight`` the model reads itself when it runs: some models compute with it and never call
    the linear. Found by running a few tokens; packed linears give their dense weight for that time.

    Raises:
        ModelError: the model does not run, or its logits are not finite.
    """
    found: set[str] = set()
    watched = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, SparseLinear)}
    names = {id(module): name for name, module in watched.items()}
    kinds = {name: type(module) for name, module in watched.items()}

    class Dense(nn.Linear):
        @property
        def weight(self) -> Tensor:
            found.add(names[id(self)])
            return self._parameters["weight"]

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self._parameters["weight"], self.bias)

    class Sparse(SparseLinear):
        @property
        def weight(self) -> Tensor:
            found.add(names[id(self)])
            return self.packed.unpack()

    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(min(8, embeddings.shape[0]), device=embeddings.device)[None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for name, module in watched.items():
            module.__class__ = Dense if kinds[name] is nn.Linear else Sparse
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # models raise errors of many kinds
        raise ModelError(f"the model does not run ({type(error).__name__}: {error})") from error
    finally:
        for name, module in watched.items():
            module.__class__ = kinds[name]
        for module, mode in modes:
            module.training = mode
    if not bool(logits.isfinite().all()):
        raise ModelError(f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}")
    return found


def zero_share(weight: Tensor) -> float:
    """Share of zeros, 0..1."""
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """The inverse of ``sparsify``, in place."""
    forget_decoder(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            model.set_submodule(name, module.to_linear())
    return model


def group_linears(block: nn.Module) -> None:
    """Put linears of a block that read the same input (``TOGETHER``) into one packed weight that they share."""
    for members in sparse_groups(block):
        share_rows(members)


def join_linears(block: nn.Module) -> None:
    """The same for dense linears: their weights become rows of one, and frozen."""
    for members in _groups(block, nn.Linear):
        weights = [member.weight.detach() for member in members]
        if len({(w.shape[1], w.dtype, w.device) for w in weights}) == 1:
            parts = torch.cat(weights).split([len(w) for w in weights])
            for member, part in zip(members, parts, strict=True):
                member.weight = nn.Parameter(part, requires_grad=False)


def sparse_groups(block: nn.Module) -> Iterator[Sequence[SparseLinear]]:
    """The complete groups of ``TOGETHER`` among siblings, where all members are packed."""
    return _groups(block, SparseLinear)


def _groups(block: nn.Module, kind: type[nn.Module]) -> Iterator[Sequence[nn.Module]]:
    for parent in block.modules():
        for names in TOGETHER:
            members = [getattr(parent, name, None) for name in names]
            if all(type(member) is kind for member in members):
                yield members
