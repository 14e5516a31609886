"""What a recipe will cost, from the model's configuration alone: parameters, peak memory by part, FLOPs and time.

An estimate: it counts tensors that losa itself holds and matrix products; allocator slack, attention scores and the
data pipeline come on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.table import Table

from losa.errors import ModelError
from losa.model import find_blocks, find_linears
from losa.pruners import get_pruner
from losa.recipe import Recipe
from losa.schedule import RoundPlan, plan_rounds

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """``device``, ``host``: bytes by part. ``flops``: by stage, over all rounds. ``rate``: FLOP/s, or None."""

    parameters: int
    prunable: int
    blocks: int
    dtype: str
    rounds: list[RoundPlan]
    train_length: int
    device: dict[str, int]
    host: dict[str, int]
    flops: dict[str, float]
    rate: float | None

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None else sum(self.flops.values()) / self.rate


def make_plan(recipe: Recipe, probe: bool = True) -> Plan:
    """Estimate a recipe without loading weights.

    Raises:
        ModelError: the model's configuration cannot be had.
    """
    model, dtype = _skeleton(recipe)
    _, blocks = find_blocks(model)
    linears = [list(find_linears(block, recipe.prune.targets).values()) for block in blocks]
    flat = [linear for block in linears for linear in block]
    parameters = sum(p.numel() for p in model.parameters())
    prunable = sum(linear.weight.numel() for linear in flat)
    head = model.get_output_embeddings().weight.numel()
    hidden = model.config.get_text_config().hidden_size
    size = BYTES[dtype]
    calibration, train = recipe.calibration, recipe.train
    sequences = 0
    if train is not None and train.max_tokens is not None:
        sequences = train.max_tokens // train.length
    share = train.round_share if train is not None else 1.0
    rounds = plan_rounds(recipe.rounds, recipe.allocation, recipe.prune.final_sparsity, sequences, share)

    rank = max(r.mean_rank for r in rounds)
    adapters = sum(rank * (linear.in_features + linear.out_features) for linear in flat)
    device = {
        "weights": parameters * size,
        "masks (1 bit a weight)": sum(linear.out_features * -(-linear.in_features // 8) for linear in flat),
        "adapters, fp32": 4 * adapters,
    }
    widest = max((linear.weight.numel() for linear in flat), default=0)
    statistic = get_pruner(recipe.prune).statistic
    pruning = 4 * 3 * widest
    if statistic == "hessian":
        # One Hessian per distinct input of a block, and the factor's copies for the widest.
        inputs = {linear.in_features for linear in linears[0]}
        pruning += 4 * (sum(n * n for n in inputs) + 2 * max(inputs) ** 2)
    if train is not None:
        tokens = train.batch_size * train.length
        saved = sum(linear.in_features for linear in flat) + 6 * hidden * len(blocks)
        if train.activation_checkpointing:
            saved = hidden * len(blocks) + saved // len(blocks)
        training = tokens * saved * size + 4 * tokens * 2 * head // hidden + 4 * 3 * adapters
        device["training: gradients, AdamW states, activations, logits"] = training
        device["composed weight and G of one linear, transient"] = 2 * 4 * widest
    device["pruning one linear, transient"] = pruning
    stream = calibration.samples * calibration.length * hidden * size
    host = {"calibration streams, dense and sparse": 2 * stream, "Grams": 4 * len(blocks) * calibration.cka_samples**2}
    if get_pruner(recipe.prune).updates_weight:
        host["original weights (the pruner replaces them)"] = prunable * size

    tokens = calibration.samples * calibration.length
    cka = min(calibration.cka_samples, calibration.samples) * calibration.length
    passes = 3 * tokens + (cka if recipe.allocation.rates == "cka" else 0)
    flops = {"calibration": 2.0 * prunable * passes * len(rounds)}
    if train is not None:
        # Y, dX and G of every linear; logits and their gradient.
        flops["training"] = (6.0 * prunable + 4.0 * head) * sequences * train.length
    rate = _matrix_rate(dtype) if probe else None
    length = train.length if train is not None else 0
    return Plan(parameters, prunable, len(blocks), dtype, rounds, length, device, host, flops, rate)


def _skeleton(recipe: Recipe):
    """The model on the meta device, and its dtype's name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from losa.model import _locate

    source, gguf_file = _locate(recipe.model, recipe.gguf_file)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=recipe.trust_remote_code, **extra)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # transformers raises errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model {recipe.model!r}: cannot read its configuration ({reason})") from error
    dtype = recipe.dtype
    if dtype == "auto":
        stored = config.get_text_config().dtype if gguf_file is None else None
        dtype = str(stored or torch.float32).removeprefix("torch.")
    return model, dtype


def _matrix_rate(dtype: str) -> float:
    """FLOP/s of a square product on the device that a run would use; about a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    kind = getattr(torch, dtype) if device == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=kind)
    best = float("inf")
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB" if amount >= 1e7 else f"{amount / 1e6:.2f} MB"


def plan_tables(plan: Plan) -> list[Table]:
    """The plan as tables: memory, rounds, time."""
    memory = Table(
        "where",
        "what",
        "size",
        title=f"{plan.parameters:,} parameters ({plan.dtype}), {plan.prunable:,} prunable in {plan.blocks} blocks",
    )
    for where, parts in (("device", plan.device), ("host", plan.host)):
        for name, amount in parts.items():
            memory.add_row(where, name, _gigabytes(amount))
        memory.add_row(where, "sum", _gigabytes(sum(parts.values())), end_section=True)
    rounds = Table("round", "sparsity", "mean rank", "sequences", "tokens", title="rounds")
    for r in plan.rounds:
        tokens = f"{r.sequences * plan.train_length:,}"
        rounds.add_row(str(r.index), f"{r.sparsity:.3f}", str(r.mean_rank), str(r.sequences), tokens)
    duration = Table("stage", "FLOP", "time at the measured rate", title="time (matrix products alone: a lower bound)")
    for stage, amount in plan.flops.items():
        duration.add_row(stage, f"{amount:.3g}", "-" if plan.rate is None else f"{amount / plan.rate / 60:.1f} min")
    return [memory, rounds, duration]
