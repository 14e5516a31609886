"""All microbenchmarks on this machine's GPU, into one file named after the card."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import tempfile
from pathlib import Path

import torch

from benchmarks._timing import machine, write_rows

MICROBENCHMARKS = ("bitmask", "masked_lora", "cka")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for <card>.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: no CUDA device here")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MICROBENCHMARKS:
            file = Path(folder) / f"{name}.json"
            flags = ["--device", "cuda", "--json", str(file), *(["--quick"] if args.quick else [])]
            importlib.import_module(f"benchmarks.{name}").main(flags)
            results[name] = json.loads(file.read_text())["rows"]
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    write_rows(args.out / f"{card}.json", {"machine": machine("cuda"), "benchmarks": results})
    return 0
