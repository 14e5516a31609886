"""All microbenchmarks on this machine's GPU, into one file named after the card."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import tempfile
import time
from pathlib import Path

import torch

from benchmarks._timing import machine, origin, write_rows

DECODED = ["--shapes", "4096x4096,11008x4096,4096x11008,576x1536"]
PRUNED = ["--shape", "4096x4096", "--repetitions", "5"]
# What each is called with: always, and if not --quick. The longest last, since the file is written after each.
MICROBENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "bitmask": ([], []),
    "cka": ([], []),
    "selection": ([], PRUNED),
    "column_sweep": ([], PRUNED),
    "packing": ([], DECODED),
    "sparse_linear": ([], DECODED),
    "masked_lora": ([], []),
    "hessian": (["--tokens", "2048"], ["--width", "4096", "--repetitions", "5"]),
    "decoder_step": ([], []),
    "decode": (["--random", "llama2-7b"], ["--sparsity", "0.5,0.6,0.7,2:4"]),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for <card>.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: no CUDA device here")
    card = file_name(torch.cuda.get_device_name())
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (always, whole) in MICROBENCHMARKS.items():
            file, start = Path(folder) / f"{name}.json", time.monotonic()
            flags = ["--device", "cuda", "--json", str(file), *always, *(["--quick"] if args.quick else whole)]
            importlib.import_module(f"benchmarks.{name}").main(flags)
            results[name] = json.loads(file.read_text())["rows"]
            write_rows(
                args.out / f"{card}.json", {"machine": machine("cuda"), "origin": origin(), "benchmarks": results}
            )
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


def file_name(card: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
