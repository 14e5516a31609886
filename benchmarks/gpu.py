"""All microbenchmarks on this machine's GPU, into one file named after the card."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks._machine import card_name, machine, origin
from benchmarks._results import plain_parser, write_document

DECODED = ["--shapes", "4096x4096,11008x4096,4096x11008,576x1536"]
PRUNED = ["--shape", "4096x4096", "--repetitions", "5"]
# The flags of each: always, and without --quick. The longest are last, because the file is written after each.
MICROBENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "bitmask": ([], []),
    "cka": ([], []),
    "selection": ([], PRUNED),
    "column_sweep": ([], PRUNED),
    "packing": ([], DECODED),
    "sparse_linear": ([], DECODED),
    "masked_lora": ([], []),
    "experts": ([], []),
    "hessian": (["--tokens", "2048"], ["--width", "4096", "--repetitions", "5"]),
    "decoder_step": ([], []),
    "decode": (["--random", "llama2-7b"], ["--sparsity", "0.5,0.6,0.7,2:4"]),
}


def main(argv: list[str]) -> int:
    parser = plain_parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for CARD.json")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: no CUDA device here")
    document = {"machine": machine("cuda"), "origin": origin(), "benchmarks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (always, whole) in MICROBENCHMARKS.items():
            file, start = Path(folder) / f"{name}.json", time.monotonic()
            flags = ["--device", "cuda", "--json", str(file), *always, *(["--quick"] if args.quick else whole)]
            importlib.import_module(f"benchmarks.{name}").main(flags)
            document["benchmarks"][name] = json.loads(file.read_text())["rows"]
            write_document(args.out / f"{card_name()}.json", document)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0
