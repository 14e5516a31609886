"""Decoding speed of a model, dense and packed, by transformers and by the lean loop, with the bytes that a token
reads."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from losa.errors import LosaError, ModelError
from losa.inference.decoding import LeanDecoder, Unsupported
from losa.inference.sparsify import densify, sparsify
from losa.inference.transformers_loop import failure, with_settings
from losa.model.blocks import find_blocks, weight_count
from losa.model.grouping import join_linears
from losa.model.limits import check_length
from losa.modules.sparse import SparseLinear
from losa_kernels.timing import copy_bandwidth, wait

logger = logging.getLogger("losa")


@dataclass(frozen=True)
class DecodeSpeed:
    """Speed of one way to decode.

    bytes_per_token: bytes of weights that one token reads (block linears and output layer).
    fraction_of_limit: the time to move these bytes at the speed of a large copy, over the time taken.
    """

    name: str
    tokens_per_second: float
    bytes_per_token: int
    fraction_of_limit: float


# Names of what is measured: the loop that decodes, and the weights. bfloat16 is left out where the weights are in it.
LOOPS = ("transformers", "losa")
WEIGHTS = ("dense", "packed", "packed bfloat16", "dense bfloat16")


@torch.inference_mode()
def decode_speeds(
    model: Any, *, tokens: int = 64, repetitions: int = 3, only: Collection[str] | None = None
) -> list[DecodeSpeed]:
    """Measure greedy decoding of one sequence by transformers' ``generate`` and by the lean loop, in turns.

    If the lean loop does not compute the model, a warning says why, and only transformers is measured. A measurement
    that fails in transformers is left out with a warning.

    Args:
        model: a pruned, merged model, dense or packed; it is not changed.
        tokens: new tokens per measurement, at least 2, since the first one comes with the prompt.
        repetitions: how often everything is measured; the median counts.
        only: names "LOOP, WEIGHTS" of what to measure; None measures everything.

    Raises:
        ModelError: the model is not pruned, has a table of too few positions, or nothing can be measured.
        LosaError: fewer than 2 tokens are asked for.
    """
    if tokens < 2:
        raise LosaError(f"bench: tokens: expected at least 2, got {tokens}")
    dense: Any = densify(copy.deepcopy(model))
    device = dense.get_input_embeddings().weight.device
    prompt = torch.arange(8, device=device) % dense.get_input_embeddings().weight.shape[0]
    check_length(dense, len(prompt) + tokens - 1, "bench: tokens")
    runs: dict[str, tuple[int, Callable[[], float]]] = {}
    warned = False
    for weights in WEIGHTS[:2] if dense.dtype == torch.bfloat16 else WEIGHTS:
        names = [f"{loop}, {weights}" for loop in LOOPS]
        names = [name for name in names if only is None or name in only]
        if not names:
            continue
        variant = copy.deepcopy(dense)
        if "bfloat16" in weights:
            variant.bfloat16()
        if "packed" in weights:
            sparsify(variant)
        else:  # dense weights are multiplied in the same groups as packed ones
            for block in find_blocks(variant):
                join_linears(block)
        moved = bytes_per_token(variant)
        for name in names:
            if name.startswith("losa"):
                try:
                    decoder = LeanDecoder(variant, len(prompt) + tokens)
                    runs[name] = moved, partial(seconds_per_token, decoder, prompt, tokens)
                    continue
                except Unsupported as error:
                    if not warned:
                        reason = str(error).removeprefix("generate: ")
                        logger.warning("bench: through transformers only: %s", reason)
                    warned, name = True, f"{LOOPS[0]}, {weights}"
            runs[name] = moved, partial(_transformers, variant, prompt, tokens)
    del dense
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(-1, repetitions):
        for name in list(seconds):
            try:
                taken = runs[name][1]()
            except ModelError as error:
                logger.warning("%s, not measured: %s", name, error)
                del seconds[name]
                continue
            if repetition >= 0:
                seconds[name].append(taken)
    if not seconds:
        raise ModelError("bench: the model generates neither through transformers nor by losa's own loop")
    bandwidth = copy_bandwidth(device, 128)
    found = []
    for name, times in seconds.items():
        moved, per_token = runs[name][0], statistics.median(times)
        found.append(DecodeSpeed(name, 1 / per_token, moved, moved / bandwidth / per_token))
    return found


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that one decoded token reads: linears of blocks as they are stored, and the output layer. Of a
    mixture all experts count, though a token reads a few."""
    head = model.get_output_embeddings()
    total = head.weight.nbytes if head is not None else 0
    for block in find_blocks(model):
        for module in block.modules():
            if isinstance(module, SparseLinear):
                total += module.packed.nbytes
            elif count := weight_count(module):
                total += count * next(module.parameters()).element_size()
    return total


def seconds_per_token(decoder: LeanDecoder, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds a token of greedy decoding, for ``tokens`` tokens after ``prompt`` (tokens,). The pass over the prompt
    does not count. The host reads every token, as if to show it."""
    decoder.reset()
    token = decoder(prompt).argmax(-1, keepdim=True)
    wait(prompt.device)
    start = time.perf_counter()
    for _ in range(tokens - 1):
        token = decoder.likeliest(token)
        int(token)
    return (time.perf_counter() - start) / (tokens - 1)


def _transformers(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds a token of transformers' ``generate``, from the first new token to the last. Raises ModelError if the
    model's own code fails."""
    times = []

    def clock(ids, scores, **_):
        wait(prompt.device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = prompt[None]
    plain: Any = with_settings(model, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    try:
        plain.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock])
    except Exception as error:
        raise ModelError(failure("bench", model, error)) from error
    return (times[-1] - times[0]) / (len(times) - 1)
