"""Describes the machine and the code that a result file was measured with.

``python -m benchmarks._machine`` prints both as JSON, and whether the native code runs on this machine's GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from losa_kernels import __version__, native

ROOT = Path(__file__).parents[1]
# Writing a committed result file does not change the code that the next benchmark measures.
CODE = (".", ":(exclude)benchmarks/results")


def machine(device: str) -> dict:
    """Hardware and versions, as every result file has them under "machine".

    ``capability`` is the CPU instruction set that torch selects, ``losa_cpu`` the one that losa's own kernels select.
    """
    cpu = cpu_name()
    described = {
        "device": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "losa_cpu": native.cpu_isa(),
        "triton": version_of("triton"),
    }
    if device.startswith("cuda"):
        gpu = {"device": torch.cuda.get_device_name(device), "cpu": cpu}
        described |= gpu | {"driver": driver(), "cuda": torch.version.cuda}
    return described


def cpu_name() -> str:
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def origin(earlier: dict | None = None) -> dict:
    """Code and time of a measurement, as every result file has them under "origin".

    ``commit`` is missing where neither git nor a file COMMIT tells it. ``earlier`` is the origin of rows that the file
    keeps from an earlier run ({} where the file does not state it): the commits of that run are named first.
    """
    commits = [commit()] if earlier is None else [*earlier.get("commit", "unknown").split(", "), commit()]
    known = ", ".join(dict.fromkeys(name for name in commits if name))
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"losa": __version__, **({"commit": known} if known else {}), "date": date}


def commit(root: Path = ROOT) -> str | None:
    """The checkout's short hash, with "+changes" where tracked files of the code differ from the commit.

    A copy without git may have a file COMMIT that says the hash. None: neither is there.
    """
    git = ("git", "-C", str(root))
    found = _output(*git, "rev-parse", "--show-toplevel", "--short=10", "HEAD")
    if found is not None and Path(found.splitlines()[0]) == root.resolve():
        changes = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return found.splitlines()[1] + ("+changes" if changes else "")
    file = root / "COMMIT"
    return (file.read_text().strip() or None) if file.exists() else None


def differences(old: dict, new: dict) -> list[str]:
    """What two descriptions of machines do not agree on, as "torch 2.11.0 / 2.13.0". A field that only one of them has
    is no difference: older files have fewer fields."""
    common = [key for key in old if old[key] is not None and new.get(key) is not None]
    return [f"{key} {old[key]} / {new[key]}" for key in common if old[key] != new[key]]


def describe(document: dict) -> str:
    """One line about the machine and the code of a result file, which may be an older one with fewer fields."""
    machine, origin = document.get("machine", {}), document.get("origin", {})
    known = {
        "driver": machine.get("driver"),
        "CUDA": machine.get("cuda"),
        "instruction set": machine.get("losa_cpu"),
        "torch": machine.get("torch"),
        "Triton": machine.get("triton"),
        "Python": machine.get("python"),
        "losa": origin.get("losa"),
        "commit": origin.get("commit") or document.get("kernels_of", "unknown"),
        "measured": origin.get("date"),
    }
    return f"{machine.get('device', 'unknown')}: " + ", ".join(
        f"{key} {value}" for key, value in known.items() if value
    )


def has_kernels(device: str) -> bool:
    """Whether losa's native code for that kind of device is loaded."""
    return native.missing(torch.device(device).type) is None


def built_in_place() -> bool:
    """Whether the libraries in losa_kernels are no older than the sources."""
    built = [file.stat().st_mtime for file in native.LIBRARY_FOLDER.glob("*.so")]
    sources = [file.stat().st_mtime for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    return max(built, default=0) >= max(sources, default=0)


def card_name(device: str = "cuda") -> str:
    """The GPU's name as part of a path: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What the command prints; None where it is missing, fails or takes too long."""
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
        runs = has_kernels("cuda") and native.built_for(capability) and built_in_place()
        found |= {"card": card_name(), "capability": capability, "runs": runs}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
