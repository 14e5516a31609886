"""The methods that one harness compares: LoSA and its baselines, as rounds on the same engine and trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from losa.algorithm.engine import Engine
from losa.algorithm.schedule import Round, make_schedule
from losa.data.sequences import PackedData
from losa.distributed import check_agreement, on_main, process_count
from losa.errors import OutputError, RecipeError
from losa.model.block_calls import Call
from losa.model.wrapping import merge_model, sparsity_of, wrap_model, wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.sections import AllocationConfig, Method, Recipe
from losa.record import MethodResult, RoundRecord
from losa.run.fingerprint import tensor_digest
from losa.run.resume import CHECKPOINTS, load_checkpoint, save_checkpoint
from losa.training.trainer import Trainer

Evaluator = Callable[[nn.Module], float | None]


@dataclass
class Inputs:
    """What every method gets: tokens on the host and a way to measure perplexity. ``fingerprint``: digests of all that
    the results depend on besides the recipe, by what it is of; a checkpoint belongs to it. ``calls``: what the model's
    blocks are called with (``BlockStream``), the same for all methods."""

    calibration: Tensor
    training: PackedData | None
    evaluate: Evaluator
    fingerprint: dict[str, str] = field(default_factory=dict)
    calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)


@dataclass
class Outcome:
    """A merged model (the one passed in, changed in place), its packed masks by linear name, and what was measured."""

    result: MethodResult
    rounds: list[RoundRecord] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)


class MethodRun:
    """One method on one model. ``work_dir`` takes metrics and, for resuming, a checkpoint per round.

    ``lora`` trains a dense adapter on the pruned model: it cannot be merged without either losing the zeros or
    changing the function, so both values are reported. ``sparse_lora`` is LoSA with one round, uniform rates and
    ranks. ``finetune_then_prune`` trains a dense adapter on the dense model and prunes afterwards.
    """

    def __init__(self, method: Method, model: nn.Module, recipe: Recipe, inputs: Inputs, work_dir: Path, log=print):
        self.method = method
        self.model = model
        self.recipe = recipe
        self.inputs = inputs
        self.work_dir = work_dir / method
        self.log = log
        self.dynamic = method == "losa"
        self.trains = method != "prune_only"

    def run(self, *, resume: bool = False) -> Outcome:
        start = time.perf_counter()
        recipe, method = self.recipe, self.method
        if method == "finetune_then_prune":
            tokens, trained = self._finetune_dense()
        else:
            tokens, trained = 0, 0
        self._wrap(LoRALinear if method == "lora" else MaskedLoRALinear)
        engine = Engine(
            self.model,
            self.inputs.calibration,
            recipe.prune,
            self._allocation(),
            recipe.calibration,
            measure_errors=self.dynamic,
            seed=recipe.seed,
            calls=self.inputs.calls,
        )
        rounds = self._rounds(engine, resume)
        unmerged = None
        if method == "lora":
            unmerged = rounds[-1].perplexity
            if unmerged is None:
                unmerged = self.inputs.evaluate(self.model)
        layers = wrapped_linears(self.model)
        masks = {name: layer.mask.data.cpu() for name, layer in layers.items()}
        if method in ("losa", "lora", "sparse_lora"):
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        merge_model(self.model)
        perplexity = self.inputs.evaluate(self.model)
        zeros, prunable = sparsity_of(self.model)
        result = MethodResult(
            method=method,
            perplexity=perplexity,
            sparsity=1
            - sum(_kept(layer) for layer in layers.values()) / sum(m.weight.numel() for m in layers.values()),
            zeros=zeros,
            prunable=prunable,
            seconds=time.perf_counter() - start,
            mergeable=method != "lora",
            perplexity_unmerged=unmerged,
            train_tokens=tokens + sum(r.train_tokens for r in rounds),
            parameters_trained=trained,
        )
        return Outcome(result, rounds, masks)

    def _allocation(self) -> AllocationConfig:
        if self.dynamic:
            return self.recipe.allocation
        return self.recipe.allocation.model_copy(update={"rates": "uniform", "ranks": "uniform"})

    def _plans(self) -> list[Round]:
        recipe = self.recipe
        sequences = len(self.inputs.training) if self.trains and self.inputs.training is not None else 0
        rounds = recipe.rounds if self.dynamic else recipe.rounds.model_copy(update={"schedule": "oneshot"})
        share = recipe.train.round_share if recipe.train is not None else 1.0
        plans = make_schedule(rounds, recipe.allocation, recipe.prune.final_sparsity, sequences, share)
        if not self.dynamic:
            plans = [replace(plan, mean_rank=recipe.lora.rank) for plan in plans]
        return plans

    def _wrap(self, layer: type[MaskedLoRALinear]) -> None:
        recipe = self.recipe
        highest, key = recipe.lora.rank, "lora.rank"
        if self.dynamic:
            highest, key = recipe.allocation.rank_max, "allocation.rank_max"
        wrapped = wrap_model(
            self.model,
            layer=layer,
            rank=recipe.allocation.mean_rank if self.dynamic else recipe.lora.rank,
            scaling=recipe.lora.scaling,
            dropout_p=recipe.lora.dropout,
            targets=recipe.prune.targets,
            seed=recipe.seed,
        )
        limit = min(min(m.in_features, m.out_features) for m in wrapped.values())
        if highest > limit:
            raise RecipeError(f"{key}: expected at most {limit}, the smallest side of a pruned linear, got {highest}")

    def _trainer(self) -> Trainer:
        return Trainer(
            self.model,
            self.recipe.train,
            seed=self.recipe.seed,
            output_dir=self.work_dir,
            total_sequences=len(self.inputs.training),
            device=next(self.model.parameters()).device,
        )

    def _finetune_dense(self) -> tuple[int, int]:
        self._wrap(LoRALinear)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        outcome = self._trainer().train(self.inputs.training, round_index=1, stage_name="dense fine-tuning")
        for name, layer in wrapped_linears(self.model).items():
            self.model.set_submodule(name, layer.merge_dense())
        return outcome.tokens, trained

    def _rounds(self, engine: Engine, resume: bool) -> list[RoundRecord]:
        recipe = self.recipe
        trains = self.trains and self.method != "finetune_then_prune"
        trainer = self._trainer() if trains else None
        plans = self._plans()
        done: list[RoundRecord] = []
        checkpoints = self.work_dir / CHECKPOINTS
        # A single round of a method that is compared is followed by its result's file. The main method's is not, and
        # its export may fail. Fine-tuning before the wrapping is no part of a checkpoint, and is repeated anyway.
        keep = len(plans) > 1 or (self.method == recipe.method and self.method != "finetune_then_prune")
        if resume:
            state = load_checkpoint(checkpoints, self.model, recipe, self.method, self.inputs.fingerprint)
            if state is not None:
                try:
                    done = [RoundRecord(**r) for r in state["rounds"]]
                    step = state["global_step"]
                except (KeyError, TypeError) as error:
                    message = "was written by another version of losa; go on with that one, or --overwrite"
                    raise OutputError(f"checkpoints in {checkpoints}: {message}") from error
                if trainer is not None:
                    trainer.global_step = step
                self.log(f"{self.method}: resuming after round {len(done)} of {len(plans)}")
            if process_count() > 1:
                check_agreement(f"{self.method}: the newest checkpoint", self._standing(done))
        first = sum(plan.sequences for plan in plans[: len(done)])
        for plan in plans[len(done) :]:
            record = engine.run_round(plan)
            if trainer is not None and plan.sequences > 0:
                data = self.inputs.training.slice(first, first + plan.sequences)
                outcome = trainer.train(data, round_index=plan.index, stage_name=f"{self.method} round {plan.index}")
                record.train_steps, record.train_tokens = outcome.steps, outcome.tokens
                record.train_loss, record.seconds["train"] = outcome.loss, outcome.seconds
            first += plan.sequences
            if recipe.evaluate is not None and recipe.evaluate.each_round and len(plans) > 1:
                began = time.perf_counter()
                record.perplexity = self.inputs.evaluate(self.model)
                record.seconds["evaluate"] = time.perf_counter() - began
            done.append(record)
            self.log(_round_line(self.method, record, len(plans)))
            if keep:
                step = trainer.global_step if trainer is not None else 0
                state = {"rounds": [vars(r) for r in done], "global_step": step}
                on_main(partial(self._save, checkpoints, plan.index, state))
        return done

    def _save(self, checkpoints: Path, completed: int, state: dict) -> None:
        save_checkpoint(
            checkpoints,
            self.model,
            recipe=self.recipe,
            completed_round=completed,
            state=state,
            method=self.method,
            inputs=self.inputs.fingerprint,
        )

    def _standing(self, done: list[RoundRecord]) -> str:
        """What this process goes on from."""
        if not done:
            return "none"
        layers = wrapped_linears(self.model).values()
        digest = tensor_digest(*(getattr(m, part) for m in layers for part in ("weight", "mask", "lora_A", "lora_B")))
        return f"round {len(done)} ({digest[:16]})"


def _kept(layer: MaskedLoRALinear) -> int:
    return int(layer.mask_bool().sum())


def _round_line(method: str, record: RoundRecord, total: int) -> str:
    parts = [f"{method} round {record.index}/{total}: sparsity {record.target_sparsity:.3f}"]
    if len(set(record.sparsity)) > 1:
        parts.append(f"blocks {min(record.sparsity):.3f}..{max(record.sparsity):.3f}")
    if record.train_steps:
        parts.append(f"ranks {min(record.ranks)}..{max(record.ranks)}, loss {record.train_loss:.3f}")
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity:.2f}")
    parts.append(f"{sum(record.seconds.values()):.0f} s")
    return ", ".join(parts)
