"""For ``tests/losa/algorithm/test_on_processes.py``: rounds of pruning by one process and by several, which hold the
model whole or in shards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tests.helpers.own_pruners  # noqa: F401  registers what the cases name
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round
from losa.algorithm.statistics import InputNorms, collect
from losa.algorithm.stream import BlockStream
from losa.distributed import sharding
from losa.distributed.processes import from_everyone, process_count, process_index
from losa.distributed.sharding import gathered, make_sharding, shard_module, sharding_of, whole
from losa.distributed.stop import heeding_signals
from losa.evaluation.perplexity import perplexity
from losa.model.blocks import find_blocks
from losa.model.wrapping import merge_model, replace_layers, sparsity_of, wrap_model, wrapped_linears
from losa.modules.gated_lora import SoRALinear
from losa.modules.lora import LoRALinear
from losa.modules.masked_linear import MaskedLinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa.recipe.training import ReconstructConfig
from tests.helpers.processes import finish, start_worker
from tests.helpers.tiny import tiny_llama

IDS = torch.arange(8 * 20).reshape(8, 20).mul(7).remainder(89)
TOKENS = torch.arange(203).mul(31).remainder(89)
LAYERS = 2


# By name: settings of prune, of allocation, and samples and batch size.
CASES: dict[str, tuple[dict, dict, int, int]] = {
    "wanda": ({"sparsity": 0.5}, {}, 8, 3),
    "2:4": ({"pattern": "2:4"}, {"rates": "uniform"}, 8, 1),
    "sparsegpt": ({"sparsity": 0.5, "pruner": "sparsegpt"}, {}, 8, 2),
    "regrow": (
        {"sparsity": 0.5, "pruner": "sparsegpt", "regrow": True},
        {"rates": "uniform", "error": "frobenius"},
        8,
        2,
    ),
    "gradients": (
        {"sparsity": 0.5, "pruner": "pruner_zero", "regrow": True, "regrow_by": "gradient"},
        {"rates": "uniform"},
        8,
        1,
    ),
    "one batch": ({"sparsity": 0.5}, {}, 4, 8),
    "whole blocks": ({"sparsity": 0.5, "pruner": "by-maxima"}, {"rates": "uniform"}, 8, 1),
    # Of three processes one has no sample. A step takes three: two together and one by itself, where one process can.
    "reconstructed": ({"sparsity": 0.5}, {"rates": "uniform"}, 4, 2),
    "scores": ({"sparsity": 0.5}, {"rates": "owl", "per": "linear"}, 8, 2),
    "tokens": ({"sparsity": 0.5}, {"rates": "cka_normalised"}, 8, 1),
    "cosines": ({"sparsity": 0.5}, {"rates": "update"}, 8, 1),
    "losses": ({"sparsity": 0.5}, {"rates": "atp"}, 8, 1),
    "expected losses": ({"sparsity": 0.5}, {"rates": "fisher", "per": "linear"}, 8, 1),
    "rows": ({"sparsity": 0.5}, {"rates": "fisher", "per": "row"}, 8, 1),
}
# Cases that are no part of the comparison with one process.
OTHERS: dict[str, tuple[dict, dict, int, int]] = {
    "failing": ({"sparsity": 0.5, "pruner": "failing"}, {"rates": "uniform"}, 8, 1),
    "unsummed": ({"sparsity": 0.5, "pruner": "unsummed"}, {"rates": "uniform"}, 8, 1),
    "norms": ({"sparsity": 0.5}, {"rates": "norms"}, 8, 1),
    "single samples": ({"sparsity": 0.5}, {}, 8, 1),
}


def build(
    case: str, shard_size: int | None, layer: type[MaskedLoRALinear] = MaskedLoRALinear
) -> tuple[nn.Module, Engine]:
    prune, allocation, samples, batch_size = (CASES | OTHERS)[case]
    model = tiny_llama(layers=LAYERS).requires_grad_(False)
    if shard_size is not None:
        shard_module(model, make_sharding(torch.device("cpu"), shard_size))
    wrap_model(model, layer=layer, rank=4, scaling=2.0)
    engine = Engine(
        model,
        IDS[:samples],
        PruneConfig(**prune),
        AllocationConfig(**({"mean_rank": 4, "rank_max": 12} | allocation)),
        CalibrationConfig(data="unused", samples=samples, length=20, cka_samples=5, batch_size=batch_size),
        loss=lambda ids: perplexity(model, ids.flatten(), 20, batch_size).nll,
        reconstruct=ReconstructConfig(steps=4, batch_size=3) if case == "reconstructed" else None,
    )
    return model, engine


def prune_twice(case: str, shard_size: int | None = None) -> dict[str, Any]:
    """Two rounds with something like training in between: all that came out."""
    model, engine = build(case, shard_size)
    layers = wrapped_linears(model)
    records = []
    for index, (sparsity, rank) in enumerate(((0.25, 4), (0.5, 6)), start=1):
        record = engine.run_round(Round(index, sparsity, rank, 0))
        records.append({key: value for key, value in vars(record).items() if key != "seconds"})
        generator = torch.Generator().manual_seed(index)
        with gathered(model), torch.no_grad():
            for layer in layers.values():
                layer.lora_B.normal_(std=0.02, generator=generator)
    sharded = {sharding_of(module) is not None for module in (model, *layers.values())}
    assert sharded == {shard_size is not None}, "what was sharded stays so"
    state = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
    counts = sparsity_of(model)
    found = perplexity(model, TOKENS, 20, batch_size=4)
    merge_model(model)
    merged = {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}
    again = perplexity(model, TOKENS, 20, batch_size=4)
    return {
        "records": records,
        "state": state,
        "counts": counts,
        "perplexity": found,
        "merged": merged,
        "merged counts": sparsity_of(model),
        "merged perplexity": again,
    }


def compare(ours: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """How several processes' outcome differs from one process's."""
    masks = [(ours["state"][n] ^ m, m) for n, m in truth["state"].items() if n.endswith("mask")]
    flipped = sum(bin(byte).count("1") for changed, _ in masks for byte in changed.flatten().tolist())
    weights = [(ours["merged"][n], w) for n, w in truth["merged"].items()]
    numbers = ("errors", "importance", "sparsity", "loss_pruned", "loss_reconstructed")
    return {
        "exact": all(torch.equal(ours["state"][n], p) for n, p in truth["state"].items()),
        "flipped": flipped / sum(mask.numel() * 8 for _, mask in masks),
        "counts": [ours[key] == truth[key] for key in ("counts", "merged counts")],
        "weights": max(float((a - b).norm() / b.norm()) for a, b in weights),
        "ranks": [a["ranks"] == b["ranks"] for a, b in zip(ours["records"], truth["records"], strict=True)],
        "damping": [a["damping"] == b["damping"] for a, b in zip(ours["records"], truth["records"], strict=True)],
        "perplexity": max(abs(ours[k].nll / truth[k].nll - 1) for k in ("perplexity", "merged perplexity")),
        "numbers": {
            key: max(
                abs(x - y) / max(abs(y), 1e-30)
                for a, b in zip(ours["records"], truth["records"], strict=True)
                for x, y in zip(a[key] or (), b[key] or (), strict=True)
            )
            for key in numbers
            if truth["records"][0][key] is not None
        },
    }


def alike(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two outcomes are the same to the bit."""
    parts = all(torch.equal(ours[k][n], p) for k in ("state", "merged") for n, p in other[k].items())
    return parts and all(ours[key] == other[key] for key in ours if key not in ("state", "merged"))


def message_of(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def costs() -> dict[str, int]:
    """Of one round, a sample at a time: how often this process runs the last block; the bytes that it gives to all
    processes or is given by one, of masks and of all else; and how many weights have masks."""
    model, engine = build("single samples", None)
    engine._calls.update(engine._stream(engine.input_ids)._calls)  # what is found out once does not count
    counts = dict.fromkeys(("calls", "masks", "else"), 0)

    def called(*_):
        counts["calls"] += 1

    def broadcast(tensor, *args, real=dist.broadcast):
        counts["masks" if tensor.dtype == torch.uint8 else "else"] += tensor.nbytes
        return real(tensor, *args)

    engine.blocks[-1].module.register_forward_hook(called)
    dist.broadcast, real = broadcast, dist.broadcast
    engine.run_round(Round(1, 0.5, 4, 0))
    dist.broadcast = real
    return counts | {"weights": sum(layer.weight.numel() for layer in wrapped_linears(model).values())}


def linears_alone(fed: Callable[[dict[str, nn.Linear]], object]) -> dict[str, list[float]]:
    """``collect`` on linears whose inputs are ``fed``: statistics by name, with this process's owned alone."""
    linears = {name: nn.Linear(4, 2) for name in "abcd"}

    def owners(groups):
        assert from_everyone(groups) == [groups] * process_count()
        return {name: number % process_count() for number, group in enumerate(groups) for name in group}

    seen = collect(linears, InputNorms, "block", lambda: "sample 0", lambda: fed(linears), owners)  # type: ignore[arg-type]
    found = seen.statistics
    assert set(found) == {name for name, owner in seen.owners.items() if owner == process_index()}
    return {name: value.square().tolist() for name, value in found.items()}


def experts(linears: dict[str, nn.Linear]) -> None:
    """The last process alone feeds c; nobody feeds d; b is fed what a is fed."""
    x = torch.full((2, 4), float(process_index() + 1))
    linears["a"](x)
    linears["b"](x)
    if process_index() == process_count() - 1:
        linears["c"](x.clone())


def disagreeing(linears: dict[str, nn.Linear]) -> None:
    x = torch.ones(1, 4)
    linears["a"](x)
    linears["b"](x if process_index() else x.clone())


def not_finite(linears: dict[str, nn.Linear]) -> None:
    linears["a"](torch.full((1, 4), float("nan") if process_index() == process_count() - 1 else 1.0))


def failures(shard_size: int | None) -> dict[str, str]:
    """What each process says of failures in one of them."""
    found = {
        case: message_of(lambda case=case: build(case, shard_size)[1].run_round(Round(1, 0.5, 4, 0)))
        for case in ("failing", "unsummed")
    }
    model, engine = build("2:4", shard_size)
    found["forward pass"] = message_of(lambda: perplexity(running_out_of_memory(model), TOKENS[:120], 20, 2))
    model, engine = build("2:4", shard_size)
    with gathered(model):
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.clone()
        model.model.embed_tokens.weight.data[int(IDS[7, 19])] = float("nan")
    found["round"] = message_of(lambda: engine.run_round(Round(1, 0.5, 4, 0)))
    found["stopped"] = stopped_by_one(shard_size)
    found["perplexity"] = message_of(lambda: perplexity(model, TOKENS[:120], 20, 2))
    found["gradients"] = message_of(lambda: build("gradients", shard_size))
    found["rates"] = message_of(lambda: build("expected losses", shard_size))
    found["disagreeing"] = message_of(lambda: linears_alone(disagreeing))
    found["not finite"] = message_of(lambda: linears_alone(not_finite))
    return found


def running_out_of_memory(model: nn.Module) -> nn.Module:
    """Every process says so of itself, after a batch has passed all blocks."""

    def fail(module, args, output):
        if output.shape[1] == 20:
            raise RuntimeError(f"process {process_index()} has no memory left")

    model.model.norm.register_forward_hook(fail)  # type: ignore[operator, union-attr]
    return model


def other_layers(shard_size: int) -> list[str]:
    """The layers that, pruned and merged in shards, do not give what a whole model gives."""
    wrong = []
    for layer, trained, merge in (
        (LoRALinear, "lora_B", LoRALinear.merge_dense),
        (SoRALinear, "lora_B", SoRALinear.merge_dense),
        (MaskedLinear, "delta", MaskedLinear.merge),
    ):
        found = []
        for size in (None, shard_size):
            model, engine = build("2:4", size, layer)
            engine.run_round(Round(1, 0.5, 4, 0))
            generator = torch.Generator().manual_seed(0)
            with gathered(model), torch.no_grad():
                for linear in wrapped_linears(model).values():
                    getattr(linear, trained).normal_(std=0.02, generator=generator)
            replace_layers(model, merge)
            assert (sharding_of(model) is None) == (size is None)
            found.append({name: whole(parameter) for name, parameter in model.named_parameters()})
        if found[0].keys() != found[1].keys() or not all(torch.equal(p, found[1][n]) for n, p in found[0].items()):
            wrong.append(layer.__name__)
    return wrong


def own_importance(shard_size: int) -> float:
    """How far an importance that is made of sharded parameters is from that of whole ones."""
    ours, plain = (build("norms", size)[1].rates.decide(Round(1, 0.5, 4, 0)).importance for size in (shard_size, None))
    assert ours is not None and plain is not None and type(ours) is torch.Tensor
    return float((ours / plain - 1).abs().max())


def made_whole_for_ranks(shard_size: int) -> list[str]:
    """Which parameters are gathered to change ranks, by the last component of their names."""
    model, engine = build("2:4", shard_size)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    seen: set[str] = set()

    def wholes(tensors, real=sharding._wholes):
        seen.update(names[id(tensor)] for tensor in tensors)
        return real(tensors)

    sharding._wholes, real = wholes, sharding._wholes
    engine._set_ranks(Round(1, 0.5, 6, 0), [3, 9])
    sharding._wholes = real
    assert [layer.rank for layer in wrapped_linears(model).values()] == [3] * 7 + [9] * 7
    assert all(sharding_of(layer) is not None for layer in wrapped_linears(model).values())
    return sorted(seen)


def grams_of() -> tuple[torch.Tensor, int]:
    """The Gram of five samples in slices of 61 features; on three processes one has no sample. And how many features of
    all samples a process is sent at a time."""
    model, _ = build("wanda", None)
    stream = BlockStream(model, find_blocks(model), IDS[:5], batch_size=3)
    received = [0]

    def exchange(found, *args, real=dist.all_to_all_single):
        received.append(len(found) // 5)
        return real(found, *args)

    dist.all_to_all_single, real = exchange, dist.all_to_all_single
    with torch.no_grad():
        gram = stream.gram(slice_features=3 * 61)
    dist.all_to_all_single = real
    return gram, max(received)


def stopped_by_one(shard_size: int | None) -> str:
    """What each process says when the last one alone gets a signal while a block runs."""
    model, engine = build("wanda", shard_size)
    if process_index() == process_count() - 1:
        engine.blocks[0].module.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    with heeding_signals():
        return message_of(lambda: engine.run_round(Round(1, 0.5, 4, 0)))


def several(truth: dict[str, Any], cases: Iterable[str], shard_size: int, sharded: Iterable[str]) -> dict[str, Any]:
    """What several processes find: of all ``cases`` with the model whole, of the cases ``sharded`` also in shards."""
    outcomes = {case: prune_twice(case) for case in cases}
    gram, received = grams_of()
    found: dict[str, Any] = {
        "cases": {case: compare(outcome, truth["cases"][case]) for case, outcome in outcomes.items()},
        "sharded alike": {case: alike(prune_twice(case, shard_size), outcomes[case]) for case in sharded},
        "other layers": other_layers(shard_size),
        "costs": costs(),
        "experts": linears_alone(experts),
        "gram": float((gram - truth["gram"]).abs().max() / truth["gram"].abs().max()),
        "received": received,
        "own importance": own_importance(shard_size),
        "made whole for ranks": made_whole_for_ranks(shard_size),
    }
    if process_count() < 4:
        found["failures"] = failures(shard_size if process_count() == 2 else None)
    return found


def one() -> dict[str, Any]:
    return {"cases": {case: prune_twice(case) for case in CASES}, "costs": costs(), "gram": grams_of()[0]}


# By number of processes: the cases, and how many processes hold the model together in which of them.
PLANS: dict[int, tuple[list[str], int, list[str]]] = {
    2: (["wanda", "regrow"], 2, ["wanda", "regrow"]),
    3: (list(CASES), 3, ["sparsegpt", "2:4", "whole blocks", "reconstructed", "scores", "losses"]),
    4: (["wanda"], 2, ["wanda"]),
}


def main(directory: str) -> None:
    start_worker()
    alone = Path(directory) / "alone.pt"
    if process_count() == 1:
        results = one()
        torch.save(results, alone)
        finish(results["costs"])
    finish(several(torch.load(alone, weights_only=False), *PLANS[process_count()]))
