"""How much memory it takes to load a packed checkpoint, in a new process: python -m benchmarks._loading DIR."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def loading_memory(directory: Path) -> dict:
    """``measure`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks._loading", str(Path(directory).resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"loading {directory} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: Path) -> dict:
    """Bytes of loading ``directory``.

    ``file``: all safetensors. ``peak`` and ``held``: the resident memory above what the process had when everything was
    imported, the tokenizer read and the model built once without weights, which costs the same for any weights.
    ``linears``: the packed linears in memory. ``linears_dense_bf16``: the same linears unpacked.
    """
    from transformers import AutoTokenizer

    from losa.model.skeleton import empty_model
    from losa.modules.sparse import SparseLinear
    from losa.packed.directory import load

    empty_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    model, tokenizer = load(directory)
    peak = status("VmHWM") - before
    gc.collect()
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in sparse for t in m.buffers()}
    return {
        "file": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        "peak": peak,
        "held": status("VmRSS") - before,
        "linears": sum(storages.values()),
        "linears_dense_bf16": 2 * sum(m.in_features * m.out_features for m in sparse),
    }


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
