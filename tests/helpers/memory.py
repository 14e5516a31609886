"""How much memory this process takes."""

from __future__ import annotations

from pathlib import Path


def peak() -> int:
    """The most resident memory since the last call, in bytes, and start to count anew (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024
