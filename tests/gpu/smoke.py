"""``python tests/gpu/smoke.py [--json FILE]``: every case of checks.py on this machine's GPU, a line for each.

It waits for the GPU after each case and goes on after a failure. After an error that the CUDA context does not survive
nothing can run in this process: the remaining cases are named. Exit status: 0, 1 after a failure, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import losa_kernels
from tests.gpu import checks

ROOT = Path(__file__).parents[2]
NO_GPU = 3
BY_BLOCK = {"select_block", "sweep_block", "pruned_per_block", "factor_panel"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results, again after each case")
    parser.add_argument(
        "--profile", action="store_true", help="instead: a case of each operator at a LLaMA shape, for a profiler"
    )
    parser.add_argument("--kernels", action="store_true", help="instead: print a pattern of our kernels' names")
    args = parser.parse_args(argv)
    if args.kernels:
        print("|".join(sorted(cuda_kernels() | set(triton_kernels()))))
        return 0
    if not torch.cuda.is_available():
        print("no GPU")
        return NO_GPU
    os.environ.setdefault("LOSA_AUTOTUNE", "0")  # what the tables choose; the tests try every tile
    if args.profile:
        return profile()
    cases = list(checks.cases(checks.LLAMA, "cuda"))
    rows = run(cases, args.json)
    if not any(row["status"] == "not run" for row in rows):
        rows += [failed(name, "has no case") for name in sorted(registered() - {op for c in cases for op in c.runs})]
        rows += [failed(name, "was not launched") for name, kernel in triton_kernels().items() if not launched(kernel)]
        write(args.json, rows)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("PASS", "FAIL", "not run")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["PASS"] < len(rows))


def run(cases: Iterable[checks.Case], file: Path | None = None) -> list[dict]:
    """name, status ("PASS", "FAIL", "not run"), error, allowed, seconds, message of each."""
    rows, lost = [], None
    for case in cases:
        start = time.monotonic()
        row = {"name": case.label, "status": "not run", "message": lost}
        if lost is None:
            row = verdict(case) | {"seconds": round(time.monotonic() - start, 3)}
            if device_is_lost():
                lost = f"the CUDA context was lost in: {case.label}"
                row |= {"status": "FAIL"}
        rows.append(row)
        show(row)
        write(file, rows)
    return rows


def profile() -> int:
    """One case for each set of operators, and for one row of x another: the last, which is the largest. Once to
    compile, and once between cudaProfilerStart and cudaProfilerStop. What a sweep launches for every column block has
    two of them."""
    whole, two_blocks = (
        {(case.runs, case.label.endswith(" 1")): case for case in checks.cases(sizes, "cuda") if case.runs}
        for sizes in (checks.LLAMA, checks.LLAMA._replace(square=(4096, 256)))
    )
    for key, case in whole.items():
        case = two_blocks[key] if BY_BLOCK & set(case.runs) else case
        print(case.label, flush=True)
        if verdict(case)["status"] == "PASS":
            torch.cuda.profiler.start()
            verdict(case)
            torch.cuda.profiler.stop()
    return 0


def verdict(case: checks.Case) -> dict:
    torch.manual_seed(0)
    try:
        error, allowed = case.verdict()
        synchronize()
    except Exception as failure:
        first = (str(failure).strip().splitlines() or [""])[0]
        return failed(case.label, f"{type(failure).__name__}: {first}")
    status = "PASS" if error <= allowed else "FAIL"  # NaN fails
    return {"name": case.label, "status": status, "error": error, "allowed": allowed}


def failed(name: str, message: str) -> dict:
    return {"name": name, "status": "FAIL", "message": message}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_is_lost() -> bool:
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def registered() -> set[str]:
    """Names of the operators that losa_cuda.so registers."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return {name.removeprefix("losa::").partition(".")[0] for name in names if name.startswith("losa::")}


def triton_kernels() -> dict[str, object]:
    """Every kernel of losa_kernels by name, as ``triton.jit`` made it."""
    from triton.runtime.jit import JITFunction

    found = {}
    for file in sorted(Path(losa_kernels.__file__).parent.rglob("*.py")):
        if "@triton.jit" in file.read_text():
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for name, value in vars(importlib.import_module(module)).items():
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    found[name] = value
    return found


def cuda_kernels() -> set[str]:
    """Names of the kernels in csrc/cuda."""
    found: set[str] = set()
    for file in (ROOT / "csrc" / "cuda").rglob("*"):
        if file.suffix in (".cu", ".h"):
            found |= set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", file.read_text()))
    return found


def launched(kernel) -> bool:
    return any(cache[0] for cache in kernel.device_caches.values())


def show(row: dict) -> None:
    detail = row.get("message")
    if detail is None:
        detail = f"error {row['error']:.2g}, allowed {row['allowed']:.2g}"
    print(f"{row['status']:<8}{row['name']:<64}{detail}", flush=True)


def write(file: Path | None, rows: list[dict]) -> None:
    if file is not None:
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(rows, indent=1))
        partial.replace(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
