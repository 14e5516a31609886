"""Decoding with a pruned checkpoint: tokens/s dense and packed, bytes that a token reads, memory, and equal texts.

With --random: the speeds of a model of that size with random weights, in bf16 and by the lean loop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks import _random_model
from benchmarks._loading import loading_memory
from benchmarks._machine import differences, machine, origin
from benchmarks._problems import dtype_name
from benchmarks._results import parser, read_document, report, write_document
from losa.inference.generation import generate
from losa.inference.speed import decode_speeds
from losa.model.loading import load_model
from losa.packed.directory import load, pack_directory

PARTS = ("text", "memory", "speed")
PROMPTS = ("The sky is", "def fibonacci(n):", "Once upon a time there was a miller who")


def main(argv: list[str]) -> int:
    options = parser("decode", __doc__)
    options.add_argument("directory", type=Path, nargs="?", help="a merged, pruned checkpoint, e.g. of make demo")
    options.add_argument("--random", choices=_random_model.SIZES, help="instead: random weights of that model's size")
    options.add_argument("--sparsity", default="0.5,0.6,0.7", metavar="S,...", help="of --random; 2:4 keeps 2 of 4")
    options.add_argument("--layers", type=int, help="of --random, instead of all")
    options.add_argument(
        "--only",
        metavar="P,...",
        default=",".join(PARTS),
        help=f"of {', '.join(PARTS)}; the other parts stay as --json has them",
    )
    options.add_argument("--tokens", type=int, default=48, help="new tokens per measurement")
    options.set_defaults(repetitions=3)
    options.add_argument("--text-tokens", type=int, default=200, help="length of the texts that must agree")
    args = options.parse_args(argv)
    if args.quick:
        args.tokens, args.repetitions, args.text_tokens = 8, 1, 32
    if (args.random is None) == (args.directory is None):
        options.error("expected a directory or --random")
    if args.tokens < 2:
        options.error(f"--tokens: expected at least 2, got {args.tokens}")
    if args.random is not None:
        report("decode", _random_model.rows(args), args.json, args.device)
        return 0
    document = {
        "benchmark": "decode",
        "machine": machine(args.device),
        "origin": origin(),
        "directory": args.directory.name,
    }
    if args.json is not None and args.json.exists():
        before = read_document("decode", args.json)
        kept = {key: before[key] for key in PARTS if key in before}
        if kept and "machine" in before and not differences(before["machine"], document["machine"]):
            document |= {"origin": origin(before.get("origin", {})), **kept}
    for part in args.only.split(","):
        document[part] = {"text": text, "memory": memory, "speed": speed}[part](args)
        print(part, json.dumps(document[part], indent=1))
        if args.json is not None:
            write_document(args.json, document)
    return 0


@torch.inference_mode()
def text(args: argparse.Namespace) -> dict:
    """Whether greedy texts are equal: the dense model in fp32 by transformers, and the packed model by both loops."""
    count = args.text_tokens
    dense, tokenizer = load_model(str(args.directory), dtype="float32", device=args.device)
    with tempfile.TemporaryDirectory() as work:
        pack_directory(args.directory, Path(work) / "packed", dtype=torch.float32)
        packed, _ = load(Path(work) / "packed", args.device)
    for prompt in PROMPTS:
        found = {"losa, packed": generate(packed, tokenizer, prompt, max_new_tokens=count, stop_at_eos=False).tokens}
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(args.device)
        for name, model in {"transformers, dense": dense, "transformers, packed": packed}.items():
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
            found[name] = output[0, ids.shape[1] :].tolist()
        expected = found["transformers, dense"]
        for name, tokens in found.items():
            if tokens != expected:
                place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
                raise SystemExit(
                    f"decode: {name} gives another text than dense weights after {place} tokens: {prompt!r}"
                )
    return {"dtype": "float32", "prompts": len(PROMPTS), "tokens": count, "same_as_dense": True}


def memory(args: argparse.Namespace) -> dict:
    """What ``_loading.measure`` finds, by the type of the packed values."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for dtype in (torch.float32, torch.bfloat16):
            name = dtype_name(dtype)
            pack_directory(args.directory, Path(work) / name, dtype=dtype)
            measured = loading_memory(Path(work) / name)
            measured["peak_over_file"] = measured["peak"] / measured["file"]
            measured["linears_over_dense_bf16"] = measured["linears"] / measured["linears_dense_bf16"]
            found[name] = measured
    return found


def speed(args: argparse.Namespace) -> dict:
    model, _ = load_model(str(args.directory), device=args.device)
    rows = [vars(s) for s in decode_speeds(model, tokens=args.tokens, repetitions=args.repetitions)]
    by_name = {row["name"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        for base in ("transformers, dense", "transformers, dense bfloat16"):
            if base in by_name:
                row[f"speedup_over_{base}"] = row["tokens_per_second"] / by_name[base]
    return {"tokens": args.tokens, "repetitions": args.repetitions, "rows": rows}
