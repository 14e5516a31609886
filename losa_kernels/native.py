"""Loads the compiled halves of the package and says what is missing.

``losa_cpu`` defines the schema of every native op and implements them for the CPU. ``losa_cuda`` adds CUDA kernels to
these schemas, so it is loaded second, and only into a torch that was built with CUDA. ``losa_kernels`` can be imported
without either.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from losa_kernels import settings

logger = logging.getLogger("losa_kernels")

LIBRARY_FOLDER = Path(__file__).parent
LIBRARIES = {"cpu": "losa_cpu.so", "cuda": "losa_cuda.so"}
SCHEMAS = LIBRARY_FOLDER.parent / "csrc" / "schemas.cpp"  # in a checkout
OLDEST_TORCH = (2, 11)

_missing: dict[str, str | None] = {}


def _load(backend: str) -> str | None:
    """Load one library; None on success, else the reason."""
    path = LIBRARY_FOLDER / LIBRARIES[backend]
    if backend == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if _missing["cpu"]:
            return f"{LIBRARIES['cuda']} needs the op schemas of {LIBRARIES['cpu']}: {_missing['cpu']}"
    if not path.exists():
        reasons = "LOSA_NO_EXT=1, or build_ext has not run" + (", or there was no nvcc" if backend == "cuda" else "")
        return f"{path.name} is not built ({reasons})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"{path.name} needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}; this is torch {torch.__version__}"
    if _outdated():
        reason = f"{path.name} was built with other operators than csrc/schemas.cpp has: run build_ext again"
        logger.warning(reason)
        return reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        logger.warning("%s exists but cannot be loaded: %s", path.name, error)
        return f"{path.name} cannot be loaded: {error}"
    return None


def _outdated() -> bool:
    """Whether the libraries lie in a checkout whose operators are not the libraries' operators."""
    if not SCHEMAS.exists():
        return False
    built = _extension()
    return built is None or built.schemas != hashlib.sha256(SCHEMAS.read_bytes()).hexdigest()


def _extension() -> Any:
    """The module that tells about the build; None when it is not built."""
    try:
        from . import _build_info
    except ImportError:
        return None
    return _build_info


for _backend in LIBRARIES:
    _missing[_backend] = _load(_backend)


def missing(backend: str) -> str | None:
    """Why the native ``backend`` ("cpu" or "cuda") is not loaded in this process; None when it is."""
    return _missing[backend]


def build_info() -> dict | None:
    """What the extension was compiled with; None when it is not built.

    Keys: version, torch_headers, torch_target, compiler, cuda (compiler version or None), cuda_archs, cuda_built,
    cpu_isa_compiled.
    """
    built = _extension()
    if built is None:
        return None
    return {
        "version": built.version,
        "torch_headers": built.torch_headers,
        "torch_target": built.torch_target,
        "compiler": built.compiler,
        "cuda": built.cuda,
        "cuda_archs": list(built.cuda_archs),
        "cuda_built": built.cuda_built,
        "cpu_isa_compiled": list(built.cpu_isa_compiled),
    }


def cpu_isa() -> str | None:
    """The instruction set that native CPU code takes now; None when the extension is not built.

    Raises:
        SettingError: ``LOSA_CPU_ISA`` has a value that is not allowed.
    """
    built = _extension()
    if built is None:
        return None
    settings.CPU_ISA()  # a bad value is this error, not one of native code
    return built.cpu_isa_selected()


def built_for(capability: tuple[int, int]) -> bool:
    """Whether losa_cuda was built with code for GPUs of that compute capability.

    Code of an architecture runs on the same major number from its minor number on; code for one architecture alone
    ("90a") runs on exactly that one.
    """
    for arch in (build_info() or {}).get("cuda_archs", ()):
        digits = arch.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if (major, minor) == tuple(capability) or (digits == arch and major == capability[0] and minor < capability[1]):
            return True
    return False


def status() -> dict[str, str]:
    """One line per native library: "loaded (...)" or "not loaded: why".

    A bad ``LOSA_CPU_ISA`` is shown, not raised.
    """
    info = build_info() or {}
    try:
        isa = f"instruction set {cpu_isa()}"
    except settings.SettingError as error:
        isa = str(error)
    details = {
        "cpu": isa,
        "cuda": f"CUDA {info.get('cuda')}, archs {', '.join(info.get('cuda_archs', ()))}",
    }
    return {
        Path(name).stem: f"not loaded: {_missing[backend]}" if _missing[backend] else f"loaded ({details[backend]})"
        for backend, name in LIBRARIES.items()
    }


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself. A CPU that does not emulates it, many times slower than fp32."""
    return any(getattr(torch.cpu, check, bool)() for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` run on this CPU: fp32 where the CPU would emulate them, 5 to 40 times
    slower."""
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if dtype == torch.bfloat16 and cpu_has_bf16() else torch.float32
