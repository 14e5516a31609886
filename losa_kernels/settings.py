"""Every environment variable that this project reads: one table, one dialect, one form of error.

A value is read without the spaces around it and, where it is not a path or a list, in any case. An empty value is the
same as an unset variable. A value that is not allowed raises :class:`SettingError`.

    settings.BACKEND()                   # the value now: "auto" where LOSA_BACKEND is not set
    for setting in settings.TABLE: ...   # for listings: name, expected, default_text, read, about, value_text()

This file imports the standard library alone: ``setup.py`` and ``tools/gpu.py`` run it where the package, or torch, is
not installed. Settings that native code reads (csrc/common/settings.h) have their row here for the listings; native
code checks them by the same rules.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")

EVERY_CALL = "at every call; in a graph of torch.compile, when it is compiled"
FIRST_CALL = "once, at the first call that it concerns"
# Who reads what the package itself does not.
SETUP, GPU_COMMAND, TESTS = BY_OTHERS = "by setup.py", "by tools/gpu.py", "by the tests"
ON, OFF = ("1", "on", "true", "yes"), ("0", "off", "false", "no")


class SettingError(ValueError):
    """An environment variable has a value that is not allowed."""


@dataclass(frozen=True)
class Setting(ABC, Generic[Value]):
    """One environment variable.

    Attributes:
        name: of the variable.
        default: the value where the variable is not set.
        about: what it does, as a sentence.
        read: when it is read.
    """

    name: str
    default: Value
    about: str
    read: str = EVERY_CALL

    def __call__(self) -> Value:
        """The value now. SettingError where it is not allowed."""
        text = os.environ.get(self.name)
        if text is None or not (stripped := text.strip()):
            return self.default
        value = self._parse(stripped)
        if value is None:
            raise SettingError(f"{self.name}: expected {self.expected}, got {text!r}")
        return value

    @property
    def is_set(self) -> bool:
        return bool(os.environ.get(self.name, "").strip())

    @property
    @abstractmethod
    def expected(self) -> str:
        """The allowed values, in words."""

    @property
    def default_text(self) -> str:
        return self._text(self.default)

    def value_text(self) -> str:
        """The value now as a user would write it. SettingError where it is not allowed."""
        return self._text(self())

    @abstractmethod
    def _parse(self, text: str) -> Value | None:
        """The value of a text without spaces around it; None where it is not allowed."""

    def _text(self, value: Value) -> str:
        return str(value)


@dataclass(frozen=True)
class Choice(Setting[str]):
    """One of some words."""

    values: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        return f"{', '.join(self.values[:-1])} or {self.values[-1]}"

    def _parse(self, text: str) -> str | None:
        text = text.lower()
        return text if text in self.values else None


@dataclass(frozen=True)
class Switch(Setting[bool]):
    """0 or 1; off and on, false and true, no and yes are the same."""

    @property
    def expected(self) -> str:
        return "0 or 1"

    def _parse(self, text: str) -> bool | None:
        text = text.lower()
        return True if text in ON else False if text in OFF else None

    def _text(self, value: bool) -> str:
        return str(int(value))


@dataclass(frozen=True)
class Number(Setting[float]):
    """A finite number above 0."""

    @property
    def expected(self) -> str:
        return "a number above 0"

    def _parse(self, text: str) -> float | None:
        try:
            value = float(text)
        except ValueError:
            return None
        return value if 0 < value < math.inf else None

    def _text(self, value: float) -> str:
        return f"{value:g}"


@dataclass(frozen=True)
class Text(Setting[str]):
    """Any text, as it is."""

    kind: str = "a text"

    @property
    def expected(self) -> str:
        return self.kind

    def _parse(self, text: str) -> str | None:
        return text


BACKEND = Choice(
    "LOSA_BACKEND",
    "auto",
    "Which implementation runs first; an operator that does not have it for the device takes the next best. "
    "`reference` is plain PyTorch.",
    values=("auto", "reference", "triton", "cuda", "cpu"),
)
CPU_ISA = Choice(
    "LOSA_CPU_ISA",
    "auto",
    "The highest instruction set that native CPU code may use; `auto` is the best that the CPU has.",
    "at every call, by native code",
    values=("auto", "scalar", "avx2", "avx512"),
)
AUTOTUNE = Switch(
    "LOSA_AUTOTUNE",
    True,
    "Whether the first call of a shape on a GPU times the alternatives and later calls take the fastest. With 0, and "
    "in torch's deterministic mode, tables decide.",
)
MASKED_LORA = Choice(
    "LOSA_MASKED_LORA",
    "auto",
    "Where a GPU forms the effective weight of a masked-LoRA linear: in registers (`fused`), or in memory for the "
    "vendor's product (`compose`). `auto` takes the faster.",
    values=("auto", "fused", "compose"),
)
TRITON_FP32 = Choice(
    "LOSA_TRITON_FP32",
    "ieee",
    "How Triton kernels multiply fp32 operands: exactly, or by three products in TF32 on tensor cores, which keep "
    "about 21 bits.",
    values=("ieee", "tf32x3"),
)
SPARSE_LINEAR = Choice(
    "LOSA_SPARSE_LINEAR",
    "auto",
    "How a GPU multiplies up to 16 rows of x by a packed 16-bit weight: from the weight as it is (`window`), from a "
    "copy in tiles (`tiles`), or from the dense weight (`unpack`). `auto` takes the fastest.",
    values=("auto", "window", "tiles", "unpack"),
)
WEIGHTS_24 = Choice(
    "LOSA_24",
    "unpack",
    "How a GPU multiplies by 2:4 weights: from the dense weight, or by torch's semi-structured product (`cutlass`), "
    "which torch has for GPUs of compute capability 8.x alone.",
    values=("unpack", "cutlass"),
)
FACTOR = Choice(
    "LOSA_FACTOR",
    "auto",
    "How a GPU factors a Hessian: by torch's Cholesky, by column blocks (`blocked`), or in 1.25 times its "
    "memory (`in_place`). `auto` takes the faster of the first two, and the last beyond 1 GiB.",
    values=("auto", "torch", "blocked", "in_place"),
)
TRAILING = Choice(
    "LOSA_TRAILING",
    "auto",
    "How a GPU computes the products that follow a column block in SparseGPT: in fp32, or by three products in TF32. "
    "`auto` takes the faster.",
    values=("auto", "fp32", "3xtf32"),
)
SWEEP_GRAPH = Switch(
    "LOSA_SWEEP_GRAPH",
    True,
    "Whether the loop over column blocks of SparseGPT becomes a CUDA graph from its second call on.",
)
DECODE_GRAPH = Switch(
    "LOSA_DECODE_GRAPH",
    True,
    "Whether `losa.generate` replays each token of a LLaMA-kind model as a CUDA graph.",
    "when a decoder is made",
)
WINDOW_LOT = Choice(
    "LOSA_WINDOW_LOT",
    "auto",
    "How many rows the kernel of `LOSA_SPARSE_LINEAR=window` takes between two barriers; for comparisons on a GPU.",
    FIRST_CALL,
    values=("auto", "1", "2", "3", "4"),
)
DEPENDENT_LAUNCH = Choice(
    "LOSA_DEPENDENT_LAUNCH",
    "auto",
    "Whether a CUDA kernel may start while the kernel before it ends: `auto` inside CUDA graphs, `0` never, `always` "
    "everywhere; for comparisons on a GPU.",
    FIRST_CALL,
    values=("auto", "0", "always"),
)
DEBUG = Switch(
    "LOSA_DEBUG",
    False,
    "Whether the command line shows tracebacks and logs what it does, as with `--debug`.",
    "when a command starts or fails",
)
JOIN_TIMEOUT = Number(
    "LOSA_JOIN_TIMEOUT",
    300,
    "Seconds that the processes of a run wait for each other at the start.",
    "when a run starts",
)
NO_EXT = Switch("LOSA_NO_EXT", False, "Whether to install without native code: Python and Triton alone.", SETUP)
CUDA = Switch("LOSA_CUDA", True, "Whether to build the CUDA half where a CUDA compiler is found.", SETUP)
CUDA_ARCHS = Text(
    "LOSA_CUDA_ARCHS",
    "",
    "The GPU architectures to build for. Where it is not set, TORCH_CUDA_ARCH_LIST decides, and without that 80;90a.",
    SETUP,
    kind='a list such as "80;90a"',
)
GPU_MINUTES = Number("LOSA_GPU_MINUTES", 8, "How long all steps of `make gpu` together may take.", GPU_COMMAND)
FAILED_TESTS = Text(
    "LOSA_FAILED_TESTS",
    "",
    "A file that gets the names of failed tests while the other tests still run.",
    TESTS,
    kind="a path",
)
TEST_RUN = Text(
    "LOSA_TEST_RUN",
    "",
    "The folder that the processes of one test run share; the tests set it themselves.",
    TESTS,
    kind="a path",
)

TABLE: tuple[Setting, ...] = tuple(value for value in globals().values() if isinstance(value, Setting))
