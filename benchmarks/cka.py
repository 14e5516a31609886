"""CKA of all pairs of blocks: ours, one Gram matrix for each block in plain PyTorch, and two for each pair as in the
official code.

fraction_of_limit of Gram matrices: the time to read the features once at the speed of a copy, over the time taken.

cka_error: the largest difference from fp64, on features whose common component is 100 times their deviation.

gram_error: the largest difference from fp64 of the Gram matrices that are timed, as a share of the largest entry.

pairs_timed: on a GPU the official manner is timed for the pairs of two blocks, and its time is scaled to all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks._problems import dtype_name, wrong_kernel
from benchmarks._pruning_baselines import official_cka
from benchmarks._results import parser, report, rows
from benchmarks._timing import interleaved
from losa_kernels import cka_similarity, gram
from losa_kernels.timing import copy_bandwidth


def main(argv: list[str]) -> int:
    arguments = parser("cka", __doc__)
    arguments.add_argument("--layers", type=int, default=30, help="blocks; default: %(default)s")
    arguments.add_argument("--samples", type=int, default=64, help="default: %(default)s")
    arguments.add_argument("--features", type=int, help="of one sample; default: 73728 (128 tokens x 576)")
    args = arguments.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    count = args.features or (2048 * 4096 if on_gpu else 73_728) // (16 if args.quick else 1)
    few = 4 if on_gpu and not args.features else 8 if args.quick else args.layers
    layers = min(args.layers, few)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    results = measure(layers, args.samples, count, dtype, args)
    report("cka", results, args.json, args.device)
    return 0


def measure(layers: int, samples: int, count: int, dtype: torch.dtype, args) -> list[dict]:
    generator = torch.Generator(args.device).manual_seed(0)
    shape = (layers, samples, count)
    features = torch.randn(shape, generator=generator, device=args.device).to(dtype)
    hard = torch.randn(layers, samples, min(count, 1 << 16), generator=generator, device=args.device)
    hard += 100 * torch.randn(layers, 1, hard.shape[2], generator=generator, device=args.device)
    hard = hard.to(dtype)
    truth = official_cka(hard.double())
    similarities = {"losa": ours, "gram_once": gram_once, "per_pair": official_cka}
    errors = {name: float((run(hard).double() - truth).abs().max()) for name, run in similarities.items()}
    if not errors["losa"] < 1e-6:
        raise wrong_kernel("cka", f"error {errors['losa']:.2e}")
    gram_error = relative(gram(features), exact_grams(features))
    if not gram_error < 1e-5:
        raise wrong_kernel("cka", f"relative error {gram_error:.2e} of the Grams")
    # A copy moves each byte twice, reading moves it once.
    limit = features.numel() * dtype.itemsize / copy_bandwidth(args.device)
    found = []
    fields = {"layers": layers, "samples": samples, "features": count, "dtype": dtype_name(dtype)}
    on_gpu = args.device.startswith("cuda")
    repetitions = args.repetitions or (3 if args.quick or not on_gpu else 5)
    timed = features[: 2 if on_gpu else layers]
    whole = {name: (lambda _, run=run: run(features)) for name, run in similarities.items()}
    whole["per_pair"] = lambda _: official_cka(timed)
    times = interleaved(whole, repetitions, args.device)
    times["per_pair"] = [layers**2 / len(timed) ** 2 * value for value in times["per_pair"]]
    for row in rows(times, "per_pair", op="all_pairs", **fields):
        pairs = len(timed) ** 2 if row["implementation"] == "per_pair" else layers**2
        found.append(row | {"cka_error": errors[row["implementation"]], "pairs_timed": pairs})
    alone = {"losa": lambda _: gram(features), "gram_once": lambda _: grams(features)}
    for row in rows(interleaved(alone, 3 * repetitions, args.device), "gram_once", op="grams", **fields):
        row |= {"fraction_of_limit": limit / (row["median_ms"] / 1e3)}
        found.append(row | ({"gram_error": gram_error} if row["implementation"] == "losa" else {}))
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


def exact_grams(features: Tensor, width: int = 1 << 18) -> Tensor:
    """Gram matrices (layers, samples, samples) in fp64, of centred features (layers, samples, features), which are read
    in slices of ``width``."""
    layers, samples, _ = features.shape
    total = torch.zeros(layers, samples, samples, dtype=torch.float64, device=features.device)
    for part in features.split(width, dim=2):
        centred = part.double() - part.double().mean(1, keepdim=True)
        total += centred @ centred.mT
    return total


def ours(features: Tensor) -> Tensor:
    return cka_similarity(gram(features))


def grams(features: Tensor) -> Tensor:
    centred = features.float() - features.float().mean(1, keepdim=True)
    return centred @ centred.mT


def gram_once(features: Tensor) -> Tensor:
    flat = grams(features).flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    return flat @ flat.T
