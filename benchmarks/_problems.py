"""Shapes, dtypes and checks that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch

# (out, in) of the linears in a block of the model.
SHAPES = {
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama2-7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Keywords of an argument that several benchmarks take.
ONLY_THESE_SHAPES = {"action": "append", "help": "measure only this shape; may be repeated"}


def sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    """A type for argparse: "4096x11008" -> (4096, 11008), with ``count`` sizes."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != count or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(f"expected {count} positive sizes joined by x, got {text!r}")
        return tuple(map(int, parts))

    return parse


def shape_name(shape: Iterable[int]) -> str:
    """(4096, 11008) -> "4096x11008"."""
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def wrong_kernel(benchmark: str, what: str) -> SystemExit:
    """To raise where a result is wrong: the speed of a wrong kernel says nothing."""
    return SystemExit(f"{benchmark}: {what}; not timing a wrong kernel")
