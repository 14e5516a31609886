"""The methods that one harness compares: LoSA and its baselines, as rounds on the same engine and trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.algorithm.engine import Engine
from losa.data.sequences import PackedData
from losa.distributed.processes import process_count
from losa.distributed.sharding import device_of, gathered
from losa.distributed.stop import check
from losa.errors import RecipeError
from losa.evaluation.perplexity import perplexity
from losa.model.norms import train_norms
from losa.model.originals import Originals
from losa.model.wrapping import (
    RankError,
    count_kept,
    merge_model,
    replace_layers,
    sparsity_of,
    wrap_model,
    wrapped_linears,
)
from losa.modules.gated_lora import AdaLoRALinear, SoRALinear
from losa.modules.lora import LoRALinear
from losa.modules.masked_linear import MaskedLinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.pruned_linear import PrunedLinear
from losa.recipe.methods import METHODS, Adapter, MethodName
from losa.recipe.sections import Recipe
from losa.record import MethodResult, RoundRecord
from losa.run.documents import belonging
from losa.run.inputs import Inputs
from losa.run.rounds import first_rank, rounds_of
from losa.run.saving import Resumed, Saver
from losa.run.share import check_share
from losa.run.states import CHECKPOINTS, Point, Stage
from losa.training.adalora import RankBudget
from losa.training.distillation import DistillationLoss
from losa.training.extension import Extension
from losa.training.loss import TokenLoss
from losa.training.position import AfterStep, TrainState
from losa.training.sora import GatePenalty
from losa.training.trainer import LossFactory, Trainer

# The layer of each kind of adapter.
LAYERS: dict[Adapter, type[MaskedLoRALinear]] = {
    "masked": MaskedLoRALinear,
    "dense": LoRALinear,
    "weights": MaskedLinear,
    "gated": SoRALinear,
    "budgeted": AdaLoRALinear,
}
# What training such an adapter adds to each step.
EXTENSIONS: dict[Adapter, Callable[[nn.Module, Recipe], Extension]] = {
    "gated": lambda model, recipe: GatePenalty(model, recipe.lora.gate_penalty),
    "budgeted": lambda model, recipe: RankBudget(model, recipe.lora.rank),
}


@dataclass
class Outcome:
    """A merged model (the one passed in, changed in place), its packed masks by linear name, and what was measured."""

    result: MethodResult
    rounds: list[RoundRecord] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)


class MethodRun:
    """One method of ``losa.recipe.METHODS`` on one model.

    A dense adapter on a pruned model cannot be merged without either losing the zeros or changing the function. A
    method that trains one reports the perplexity of the unmerged model as well.

    Args:
        name: the method's.
        model: dense; merged and pruned in place.
        work_dir: takes metrics and resume states, in a directory of the method's name.
        processes: with which the run began; default: that there are now. An optimiser step keeps its sequences.
        log: gets a line after each round.
    """

    def __init__(
        self,
        name: MethodName,
        model: nn.Module,
        recipe: Recipe,
        inputs: Inputs,
        work_dir: Path,
        processes: int | None = None,
        log: Callable[[str], None] = print,
    ):
        self.name = name
        self.method = METHODS[name]
        self.model = model
        self.recipe = recipe
        self.inputs = inputs
        self.work_dir = work_dir / name
        self.processes = processes or process_count()
        self.log = log
        self._seconds_before = 0.0  # of earlier processes

    def run(self, *, resume: bool = False) -> Outcome:
        """Prune, train and merge.

        Args:
            resume: go on with the newest state that was saved.

        Raises:
            Stopped: a signal asks for it, at a training step, after saving; before a block is compared or pruned;
                between batches of an evaluation; at a round's end.
            LosaError: settings that do not fit the model, failed numerics, a file that cannot be written, or a resume
                state of another recipe, model or data.
        """
        start = time.perf_counter()
        method = self.method
        tokens = trained = 0
        if method.training == "before":
            tokens, trained = self._finetune_dense(resume)
            resume = False  # no later state is kept
        in_rounds = method.training == "rounds"
        self._wrap(LAYERS[method.adapter or "masked"] if in_rounds else PrunedLinear, trains=in_rounds)
        at_first = self._trained_parameters()
        rounds = self._run_rounds(self._engine(), resume)
        unmerged = None if method.mergeable else self._unmerged_perplexity(rounds[-1])
        masks, sparsity = self._masks()
        if in_rounds:
            # Ranks of a dynamic method grow; gates that close drop parameters at the end.
            trained = self._trained_parameters() if method.dynamic else at_first
        merge_model(self.model)
        perplexity = self.inputs.evaluate(self.model)
        zeros, prunable = sparsity_of(self.model)
        result = MethodResult(
            method=self.name,
            perplexity=perplexity,
            sparsity=sparsity,
            zeros=zeros,
            prunable=prunable,
            seconds=time.perf_counter() - start + self._seconds_before,
            mergeable=method.mergeable,
            perplexity_unmerged=unmerged,
            train_tokens=tokens + sum(r.train_tokens for r in rounds),
            parameters_trained=trained,
        )
        return Outcome(result, rounds, masks)

    def _masks(self) -> tuple[dict[str, Tensor], float]:
        """Packed masks by linear name, and the share of weights that they prune. The layers are not kept: merging would
        hold their weights beside the merged ones."""
        layers = wrapped_linears(self.model)
        masks = {name: _as_held(layer.mask.detach()) for name, layer in layers.items()}
        weights = sum(layer.weight.numel() for layer in layers.values())
        kept = sum(count_kept(layer) for layer in layers.values())
        return masks, 1 - kept / weights

    def _engine(self) -> Engine:
        recipe = self.recipe
        return Engine(
            self.model,
            self.inputs.calibration,
            recipe.prune,
            recipe.allocation_of(self.name),
            recipe.calibration,
            measure_errors=self.method.dynamic,
            seed=recipe.seed,
            distills=recipe.distills(self.name),
            calls=self.inputs.calls,
            loss=lambda ids: perplexity(self.model, ids.flatten(), ids.shape[1], recipe.calibration.batch_size).nll,
            reconstruct=recipe.reconstruct if self.method.reconstructs else None,
            train=recipe.train,
        )

    def _wrap(self, layer: type[MaskedLoRALinear], trains: bool) -> None:
        recipe = self.recipe
        first = highest = first_rank(self.name, recipe)
        key = "lora.rank"
        if self.method.dynamic:
            highest, key = recipe.allocation.rank_max, "allocation.rank_max"
        try:
            wrapped = wrap_model(
                self.model,
                layer=layer,
                rank=first,
                highest_rank=highest,
                scaling=recipe.lora.scaling,
                dropout_p=recipe.lora.dropout,
                targets=recipe.prune.targets,
                seed=recipe.seed,
            )
        except RankError as error:
            raise RecipeError(f"{key}: {error}") from error
        # Again: linears that the model does not call, or that compute something else, show only now.
        check_share(recipe.prune, self.model, wrapped.values())
        if trains and recipe.train is not None and recipe.train.norms is not None:
            train_norms(self.model)

    def _trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _unmerged_perplexity(self, last: RoundRecord) -> float | None:
        return self.inputs.evaluate(self.model) if last.perplexity is None else last.perplexity

    @property
    def _data(self) -> PackedData:
        """The training text of a method that trains."""
        assert self.inputs.training is not None
        return self.inputs.training

    def _trainer(self, originals: Mapping[str, Originals]) -> Trainer:
        """``originals``: the dense model's weights, by block, where pruning replaces them."""
        train = self.recipe.train
        assert train is not None
        loss: LossFactory = TokenLoss
        if not self.recipe.distills(self.name):
            train = train.model_copy(update={"distill": None})
        elif train.distill is not None:
            loss = partial(DistillationLoss, config=train.distill, originals=originals)
        extension = None if self.method.adapter is None else EXTENSIONS.get(self.method.adapter)
        trainer = Trainer(
            self.model,
            train,
            seed=self.recipe.seed,
            output_dir=self.work_dir,
            total_sequences=len(self._data),
            device=device_of(self.model),
            loss_factory=loss,
            distributed=self.recipe.distributed,
            extension=None if extension is None else extension(self.model, self.recipe),
        )
        trainer.sequences_per_step = train.batch_size * train.gradient_accumulation * self.processes
        return trainer

    def _saver(self, trainer: Trainer | None, measured_once: dict[str, Tensor] | None = None) -> Saver:
        owner = belonging(self.recipe, self.name, self.inputs.fingerprint)
        return Saver(
            self.name, self.work_dir / CHECKPOINTS, self.model, trainer, owner, self.recipe.checkpoint, measured_once
        )

    def _resume(self, saver: Saver, rounds: int) -> Resumed:
        resumed = saver.resume()
        self._seconds_before = resumed.seconds
        if resumed.point is not None:
            self.log(_resume_line(self.name, resumed.point, rounds))
        return resumed

    def _finetune_dense(self, resume: bool) -> tuple[int, int]:
        """Train dense adapters and merge them into the dense weights: (tokens seen, parameters trained). It is saved
        like a round."""
        self._wrap(LoRALinear, trains=True)
        trained = self._trained_parameters()
        trainer = self._trainer({})
        saver = self._saver(trainer)
        with saver.waiting():
            resumed = self._resume(saver, 1) if resume else Resumed()
            record = resumed.pruned or next(iter(resumed.done), RoundRecord(1, 0.0, None, [], []))
            if resumed.point is None:
                saver.save(Stage.PRUNED, [record])
            if not resumed.done:
                after_step = partial(saver.after_step, records=[record])
                self._train(trainer, self._data, record, resumed.start, after_step, "dense fine-tuning")
                saver.save(Stage.DONE, [record])
        replace_layers(self.model, LoRALinear.merge_dense)
        return record.train_tokens, trained

    def _run_rounds(self, engine: Engine, resume: bool) -> list[RoundRecord]:
        """The records of all rounds, with the rounds of an interrupted run among them."""
        rounds = rounds_of(self.name, self.recipe, 0 if self.inputs.training is None else len(self.inputs.training))
        trainer = self._trainer(engine.originals) if self.method.training == "rounds" else None
        saver = self._saver(trainer, engine.measured_once)
        with saver.waiting():
            resumed = self._resume(saver, len(rounds)) if resume else Resumed()
            done, pruned, start = resumed.done, resumed.pruned, resumed.start
            del resumed  # it would keep AdamW's moments in memory
            engine.move_originals()
            if self._measures(len(rounds)) and done and pruned is None and done[-1].perplexity is None:
                self._end_round(done[-1], len(rounds))
            first = sum(each.sequences for each in rounds[: len(done)])
            for each in rounds[len(done) :]:
                record = pruned or engine.run_round(each)
                done.append(record)
                if trainer is not None and each.sequences > 0:
                    if pruned is None:
                        saver.save(Stage.PRUNED, done)
                    data = self._data.slice(first, first + each.sequences)
                    self._train(trainer, data, record, start, partial(saver.after_step, records=done))
                    self._drop_closed(record, engine)
                pruned = start = None
                first += each.sequences
                if self._keeps_states():
                    saver.save(Stage.DONE, done)
                self._end_round(record, len(rounds))
                check()
        return done

    def _drop_closed(self, record: RoundRecord, engine: Engine) -> None:
        """Drop the components that training has closed, and record the ranks that stay: means over a block's linears,
        rounded."""
        if not any(isinstance(linear, SoRALinear) for block in engine.blocks for linear in block.linears.values()):
            return
        ranks = []
        for block in engine.blocks:
            with gathered(block.module, only=SoRALinear.adapter_parts):
                for linear in block.linears.values():
                    if isinstance(linear, SoRALinear):
                        linear.drop_closed()
            ranks.append([linear.rank for linear in block.linears.values()])
        record.ranks = [round(sum(own) / len(own)) for own in ranks]
        record.mean_rank = sum(map(sum, ranks)) / sum(map(len, ranks))

    def _measures(self, rounds: int) -> bool:
        return self.recipe.evaluate is not None and self.recipe.evaluate.each_round and rounds > 1

    def _end_round(self, record: RoundRecord, rounds: int) -> None:
        """The perplexity after a round, if it is wanted, and the round's line. The round's last state was saved before:
        a run that ends here repeats the evaluation, and no training."""
        if self._measures(rounds):
            began = time.perf_counter()
            record.perplexity = self.inputs.evaluate(self.model)
            record.seconds["evaluate"] = time.perf_counter() - began
        self.log(round_line(self.name, record, rounds, self.method.ranked))

    def _keeps_states(self) -> bool:
        """Whether a round's end is saved. A method without training that is compared, or that trains before it prunes,
        has one short round: its result's file follows, or the round is repeated."""
        return self.method.training == "rounds" or (
            self.name == self.recipe.method and self.method.training != "before"
        )

    def _train(
        self,
        trainer: Trainer,
        data: PackedData,
        record: RoundRecord,
        start: TrainState | None,
        after_step: AfterStep,
        stage_name: str | None = None,
    ) -> None:
        outcome = trainer.train(
            data,
            round_index=record.index,
            stage_name=stage_name or f"{self.name} round {record.index}",
            start=start,
            after_step=after_step,
        )
        record.train_steps, record.train_tokens = outcome.steps, outcome.tokens
        record.train_loss, record.train_label_loss = outcome.loss, outcome.label_loss
        record.seconds["train"] = outcome.seconds


def _as_held(mask: Tensor) -> Tensor:
    return mask if isinstance(mask, DTensor) else mask.cpu()


def _resume_line(method: str, point: Point, total: int) -> str:
    if point.stage is Stage.DONE:
        return f"{method}: resuming after round {point.round} of {total}"
    where = "its pruning" if point.stage is Stage.PRUNED else f"training step {point.step}"
    return f"{method}: resuming in round {point.round} of {total}, after {where}"


def round_line(method: str, record: RoundRecord, total: int, ranked: bool) -> str:
    """What is told of a round. ``ranked``: whether its ranks mean something."""
    parts = [f"{method} round {record.index}/{total}: sparsity {record.target_sparsity:.3f}"]
    if len(set(record.sparsity)) > 1:
        parts.append(f"blocks {min(record.sparsity):.3f}..{max(record.sparsity):.3f}")
    if record.train_steps:
        ranks = f"ranks {min(record.ranks)}..{max(record.ranks)}, " if ranked else ""
        parts.append(f"{ranks}loss {record.train_loss:.3f}")
        if record.train_label_loss is not None:
            parts.append(f"label loss {record.train_label_loss:.3f}")
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity:.2f}")
    parts.append(f"{sum(record.seconds.values()):.0f} s")
    return ", ".join(parts)
