"""What the cases of checks.py and checks_decode.py are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Verdict = tuple[float, float]


class Sizes(NamedTuple):
    """(out, in) unless said otherwise. ``odd``: no whole tile anywhere; ``groups``: the same with columns in groups of
    16; ``tokens``: of the large masked-LoRA problem; ``features``: of one sample of a Gram."""

    odd: tuple[int, int]
    groups: tuple[int, int]
    square: tuple[int, int]
    wide: tuple[int, int]
    tall: tuple[int, int]
    tokens: int
    features: int
    samples: tuple[int, ...]


LLAMA = Sizes((37, 301), (45, 176), (4096, 4096), (4096, 11008), (11008, 4096), 512, 1 << 17, (37, 64, 128, 256))
SMALL = Sizes((5, 37), (6, 48), (16, 64), (8, 80), (24, 32), 6, 300, (3, 8))  # for a check of the checks on a CPU


class Case(NamedTuple):
    label: str
    runs: tuple[str, ...]  # operators of torch.ops.losa, and Triton kernels
    verdict: Callable[[], Verdict]


def text(thing) -> str:
    if isinstance(thing, tuple):
        return "x".join(map(str, thing))
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get(thing, str(thing).removeprefix("torch."))


def goal_text(goal: tuple) -> str:
    return f"{goal[1]}:{goal[2]}" if goal[2] else f"{100 * goal[0]:g}%"


def differing(found: Tensor, expected: Tensor) -> Verdict:
    """How many entries differ; none may."""
    if found.shape != expected.shape:
        return float("inf"), 0.0
    return float((found != expected).sum()), 0.0


def worst(verdicts: list[Verdict]) -> Verdict:
    return max(verdicts, key=lambda v: float("inf") if v[0] != v[0] else v[0] - v[1])


def bounded(ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> Verdict:
    """Of the largest value: at most twice plain torch's error in the same precision, and one rounding."""
    size = float(truth.abs().max())
    allowed = 2 * float((plain.double() - truth).abs().max()) + torch.finfo(dtype).eps * size
    return float((ours.double() - truth).abs().max()) / size, allowed / size


def kept_at_half(shape: tuple[int, int], device: str) -> Tensor:
    return torch.rand(shape, device=device) < 0.5


def kept_groups(shape: tuple[int, int], keep_n: int, m: int, device: str) -> Tensor:
    scores = torch.rand(shape, device=device).reshape(-1, m)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(keep_n, 1).indices, True).reshape(shape)
