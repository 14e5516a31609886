"""Which machine and which code; ``python -m benchmarks._machine`` prints both as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from losa_kernels import __version__, native

ROOT = Path(__file__).parents[1]


def machine(device: str) -> dict:
    cpu = platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), cpu
        )
    described = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "losa_cpu": (native.build_info() or {}).get("cpu_isa_selected"),
    }
    if device.startswith("cuda"):
        described |= {"driver": driver(), "cuda": torch.version.cuda, "triton": version_of("triton")}
    return described


def origin() -> dict:
    """Which code was measured, and when."""
    return {"losa": __version__, "commit": commit(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


def commit() -> str:
    """Of the checkout, "+" for changes in it; where there is no git what the file COMMIT says, or "unknown"."""
    found = _output("git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*")
    if found is None and (file := ROOT / "COMMIT").exists():
        found = file.read_text().strip()
    return found or "unknown"


def built_in_place() -> bool:
    """Whether the libraries beside losa_kernels' Python files are no older than the sources."""
    built = [file.stat().st_mtime for file in native.LIBRARY_FOLDER.glob("*.so")]
    sources = [file.stat().st_mtime for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    return max(built, default=0) >= max(sources, default=0)


def driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    gpu = torch.cuda.is_available()
    found = {"gpu": gpu, "machine": machine("cuda" if gpu else "cpu"), "origin": origin(), "native": native.status()}
    if gpu:
        capability = torch.cuda.get_device_capability()
        runs = native.missing("cuda") is None and native.built_for(capability) and built_in_place()
        found |= {"capability": capability, "runs": runs}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
