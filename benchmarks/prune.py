"""One pruning round of a whole model (rates, masks, errors, ranks) by stage, against the same in the official manner.

forward: the model's own block calls and nothing else, timed apart: as many passes as the round makes, of plain dense
weights and without hooks. The official manner, in our own words: one sample at a time, the features of all blocks kept,
both Gram matrices anew for every pair, full sorts, a Python loop over columns.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks._models import add_model_option, load
from benchmarks._pruning_baselines import official_cka, official_factor, official_sweep, official_wanda
from benchmarks._results import parser, report
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round
from losa.algorithm.stream import BlockStream
from losa.model.blocks import Blocks, find_blocks, find_linears
from losa.model.wrapping import unwrap_model, wrap_model
from losa.modules.masked_lora import dense_mode
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig

SPARSITY = 0.5
BATCH = 4  # samples per block call


def main(argv: list[str]) -> int:
    arguments = parser("prune", __doc__)
    add_model_option(arguments)
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--pruner", action="append", choices=("wanda", "sparsegpt"))
    arguments.add_argument("--no-official", action="store_true", help="time ours only")
    args = arguments.parse_args(argv)
    model = load(args.model, args.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.samples, args.length), generator=generator)
    repetitions = args.repetitions or (1 if args.quick else 3)
    results = []
    for pruner in args.pruner or ("wanda", "sparsegpt"):
        results += ours(model, ids, pruner, repetitions)
        if not args.no_official:
            results += official(model, ids, pruner)
    report("prune", results, args.json, args.device)
    return 0


def ours(model: nn.Module, ids: Tensor, pruner: str, repetitions: int) -> list[dict]:
    _round(model, ids[:BATCH], pruner)  # warms up
    stages = [_round(model, ids, pruner) for _ in range(repetitions)]
    medians = {name: statistics.median(s[name] for s in stages) for name in stages[0]}
    return [_row(pruner, "losa", name, value, medians["whole"]) for name, value in medians.items()]


def _round(model: nn.Module, ids: Tensor, pruner: str) -> dict[str, float]:
    """Seconds by stage."""
    wrap_model(model, rank=8, scaling=2.0)
    config = PruneConfig(pruner=pruner, sparsity=SPARSITY)
    calibration = CalibrationConfig(
        data="unused", samples=len(ids), length=ids.shape[1], cka_samples=len(ids), batch_size=BATCH
    )
    engine = Engine(model, ids, config, AllocationConfig(), calibration)
    start = time.perf_counter()
    record = engine.run_round(Round(1, SPARSITY, 6, 1))
    whole = time.perf_counter() - start
    passes = _pure_forward(engine, ids)
    unwrap_model(model)
    return {"whole": whole, "forward": passes, **{f"engine: {k}": v for k, v in record.seconds.items()}}


@torch.no_grad()
def _pure_forward(engine: Engine, ids: Tensor) -> float:
    """Seconds of the block calls of a round: features for rates, the dense stream, statistics, the sparse stream."""

    def once() -> None:
        stream = BlockStream(engine.model, engine.decoder, ids, engine.calibration.batch_size, calls=engine._calls)
        for index in range(len(engine.blocks)):
            stream.advance(index)

    start = time.perf_counter()
    with dense_mode(engine.model):
        for _ in range(4):
            once()
    return time.perf_counter() - start


@torch.no_grad()
def official(model: nn.Module, ids: Tensor, pruner: str) -> list[dict]:
    seconds = {"forward": 0.0, "rates": 0.0, "prune": 0.0}
    began = time.perf_counter()
    blocks = find_blocks(model)
    kept = {linear: linear.weight.data for linear in blocks.linears().values()}
    start = time.perf_counter()
    features = torch.stack([torch.stack(samples) for samples in _features(model, blocks, ids)])
    seconds["forward"] += time.perf_counter() - start
    start = time.perf_counter()
    official_cka(features.flatten(2))
    seconds["rates"] = time.perf_counter() - start
    dense, sparse = (BlockStream(model, blocks, ids, 1) for _ in range(2))
    for index, block in enumerate(blocks):
        linears = find_linears(block)
        start = time.perf_counter()
        dense.advance(index)
        statistic = {name: None for name in linears}
        with ExitStack() as stack:
            for name, linear in linears.items():
                stack.callback(linear.register_forward_hook(_gather(statistic, name, pruner)).remove)
            for _ in sparse.run(index):
                pass
        seconds["forward"] += time.perf_counter() - start
        start = time.perf_counter()
        for name, linear in linears.items():
            weight = linear.weight.data
            if pruner == "wanda":
                mask = official_wanda(weight, statistic[name].sqrt(), SPARSITY, None, None)
                linear.weight.data = weight * mask
            else:
                linear.weight.data = official_sweep(weight, official_factor(statistic[name]), SPARSITY, None, None)
        seconds["prune"] += time.perf_counter() - start
        start = time.perf_counter()
        sparse.advance(index)
        seconds["forward"] += time.perf_counter() - start
    seconds["whole"] = time.perf_counter() - began
    for linear, weight in kept.items():
        linear.weight.data = weight
    return [_row(pruner, "official manner", name, value, seconds["whole"]) for name, value in seconds.items()]


def _features(model: nn.Module, blocks: Blocks, ids: Tensor) -> list[list[Tensor]]:
    """Block outputs, by block and sample."""
    found: list[list[Tensor]] = [[] for _ in blocks]
    with ExitStack() as stack:
        for index, block in enumerate(blocks):

            def hook(_module, _args, output, index=index):
                found[index].append((output if isinstance(output, Tensor) else output[0])[0])

            stack.callback(block.register_forward_hook(hook).remove)
        for sample in ids:
            model(sample[None].to(next(model.parameters()).device), use_cache=False)
    return [list(samples) for samples in found]


def _gather(statistic: dict, name: str, pruner: str):
    def hook(_module, args, _output):
        x = args[0].flatten(0, -2).float()
        new = x.square().sum(0) if pruner == "wanda" else x.T @ x
        statistic[name] = new if statistic[name] is None else statistic[name] + new

    return hook


def _row(pruner: str, who: str, stage: str, value: float, whole: float) -> dict:
    return {"op": pruner, "implementation": who, "stage": stage, "seconds": value, "share": value / whole}
