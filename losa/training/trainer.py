"""The fine-tuning loop: one process, DDP, or FSDP2 for a sharded model. Each round has a fresh optimiser."""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from losa.data.sequences import IGNORED, PackedData
from losa.distributed.collectives import from_rank_zero, sum_over_processes
from losa.distributed.launch import start_processes
from losa.distributed.processes import is_main, joined, process_count
from losa.distributed.sharding import gathered_calls, sharding_of
from losa.distributed.watch import progress
from losa.errors import LosaError
from losa.model.blocks import expert_lists, find_blocks
from losa.modules.linear_experts import lay_experts_together
from losa.recipe.learning_rate import lr_factor
from losa.recipe.machines import DistributedConfig
from losa.recipe.training import TrainConfig
from losa.training.clipping import clip_gradients
from losa.training.dealing import Batch, deal, seed_of
from losa.training.extension import Extension
from losa.training.groups import parameter_groups
from losa.training.loss import TokenLoss
from losa.training.metrics import Metrics
from losa.training.position import AfterStep, StepDone, TrainState, moments_of, put_moments
from losa.training.precision import autocast_dtype
from losa.training.shell import make_shell
from losa.training.steps import Step, StepLog, moment
from losa.training.throughput import Throughput

# Makes the module that a round trains, from the model and autocast's dtype or None. The model is a submodule of it. It
# takes and returns what TokenLoss does, with train.distill what DistillationLoss does. A sharded model is trained in a
# copy of this module: there it must reach the model through its submodules alone.
LossFactory = Callable[[nn.Module, torch.dtype | None], nn.Module]

# Steps on a GPU whose numbers are read together. Reading waits until the GPU has done all its work, and the GPU then
# stands idle until it gets more.
STEPS_A_READING = 10

# Newer versions of torch deprecate the setting's old name, and torch 2.11 lacks the new one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


@dataclass(frozen=True)
class TrainOutcome:
    """``steps``: optimiser steps; ``tokens``: input tokens over all processes; ``loss``: mean over the round's label
    tokens in nats, None without any (with ``train.distill`` the mixed loss, and steps weigh by their input tokens);
    ``seconds``: wall time; ``label_loss``: mean over the label tokens, with ``train.distill`` alone."""

    steps: int
    tokens: int
    loss: float | None
    seconds: float
    label_loss: float | None = None


class Trainer:
    """Trains the parameters that require a gradient (adapters, and norms if they are), round after round.

    Several processes share out the sequences of each optimiser step; ``batch_size`` counts the sequences of one
    process. Every process has all of the data, and the same model. A whole model is trained by DDP, a sharded model by
    FSDP2 (and by HSDP, where it is sharded on a mesh of two dimensions).

    To go on after a resume state, set ``global_step``, the optimiser steps over all rounds, and ``sequences_per_step``.
    With the sequences per step that a run began with, another number of processes takes the same steps, but for dropout
    where there are more processes than batches of ``batch_size`` in a step.

    On a GPU the host waits for the numbers of ``steps_a_reading`` steps at a time; a step in between waits for nothing.

    Args:
        model: causal LM; a whole one is moved to ``device``.
        config: the recipe's train section.
        seed: for dropout.
        output_dir: takes metrics.jsonl, a line per step, and TensorBoard files; None: no files.
        total_sequences: of all rounds; sets the length of the global learning-rate cycle.
        device: where the model computes; of several processes each names its own.
        loss_factory: makes the loss module of a round; default: the next-token loss. With ``config.distill`` the module
            is called with two arguments more (``losa.training.distillation.DistillationLoss``).
        distributed: the recipe's section; it counts for a sharded model.
        extension: what a method adds to each step. On a GPU the host then waits for each step's update.

    Raises:
        LosaError: a launch that is not supported, processes that cannot join, TensorBoard is asked for and missing, or
            ``config.distill`` with the next-token loss.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        seed: int,
        output_dir: Path | None,
        total_sequences: int,
        device: torch.device | str,
        loss_factory: LossFactory = TokenLoss,
        distributed: DistributedConfig | None = None,
        extension: Extension | None = None,
    ):
        if config.distill is not None and loss_factory is TokenLoss:
            raise LosaError("loss_factory: expected one of DistillationLoss, as train.distill asks for; got TokenLoss")
        self.model = model
        self.config = config
        self.seed = seed
        self.loss_factory = loss_factory
        self.distributed = distributed or DistributedConfig()
        self.extension = extension
        self.device = torch.device(device)
        if not joined():
            start_processes(self.device.type)
        self.processes = process_count()
        self.autocast = autocast_dtype(config.precision, self.device)
        # The CPU's fused step rounds the last numbers of a tensor differently, and so those of each process's rows.
        self.fused = self.device.type == "cuda"
        self.steps_a_reading = STEPS_A_READING if self.device.type == "cuda" else 1
        self.global_step = 0
        self.sequences_per_step = config.batch_size * config.gradient_accumulation * self.processes
        self.total_sequences = total_sequences
        self._metrics = Metrics(output_dir if is_main() else None, config.tensorboard)

    def train(
        self,
        data: PackedData,
        *,
        round_index: int,
        stage_name: str = "round",
        start: TrainState | None = None,
        after_step: AfterStep | None = None,
    ) -> TrainOutcome:
        """One pass over ``data``, in its order; a last, smaller batch is used too. Leaves the model in evaluation mode.

        A step's loss is the mean over the label tokens of all its batches and processes, each token weighing the same.
        Steps without any label token change nothing, but with ``train.distill``, which learns from every token and so
        takes the mean over all of them. All processes make the same call.

        Args:
            data: of the whole round, also with ``start``.
            round_index: from 1; names the round in messages and metrics; dropout depends on it, the step and the batch.
            stage_name: of the progress bar.
            start: where to go on in the middle of the round. The caller has put back the parameters of that moment, and
                has set ``global_step`` and ``sequences_per_step``.
            after_step: called after each step.

        Raises:
            NumericsError: non-finite loss or gradient norm; names round and step. The weights are as the step before
                left them.
            OutputError: metrics cannot be written (disk full); names the file.
            LosaError: the loss has trained parameters of its own beside a sharded model.
        """
        began = time.perf_counter() - (0.0 if start is None else start.position.seconds)
        sharded = sharding_of(self.model) is not None
        if not sharded:
            self.model.to(self.device)
            lay_experts_together(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameter_groups(
                self.model,
                lora_plus=self.config.lora_plus,
                norms=self.config.norms,
                weight_decay=self.config.weight_decay,
            ),
            lr=self.config.learning_rate,
            fused=self.fused,
        )
        if start is not None:
            put_moments(self.model, optimizer, start.moments, self.fused)
        first, count = 0 if start is None else start.position.step, self._steps(len(data))
        if self.extension is not None:
            self.extension.begin(count, {} if start is None else start.moments)

        def state_after(step: int, log: StepLog) -> TrainState:
            kept = {} if self.extension is None else self.extension.state()
            moments = moments_of(self.model, optimizer) | kept
            return TrainState(log.position(step, time.perf_counter() - began), moments)

        def step_done(step: int, log: StepLog) -> None:
            if after_step is not None:
                after_step(StepDone(self.global_step, lambda: state_after(step, log)))

        try:
            with self._loss_module() as loss_module, self._metrics.open(self.global_step):
                hidden = None if is_main() else True
                bar = tqdm(range(first, count), stage_name, count, initial=first, leave=False, disable=hidden)
                distills = self.config.distill is not None
                throughput = Throughput.of(self.model, data.input_ids.shape[1], self.device, self.autocast, distills)
                with StepLog(round_index, self._metrics, bar, self.steps_a_reading, throughput) as log:
                    if start is not None:
                        log.go_on(start.position)
                    self._round(loss_module, optimizer, parameters, data, log, step_done)
                del loss_module
        finally:
            self.model.eval()
            # What is drawn after the round does not depend on which of its batches this process had.
            torch.manual_seed(seed_of(self.seed, round_index))
            if sharded:
                # The shell refers to itself, and would keep the rows of masks and adapters that the next round changes.
                gc.collect()
        seconds = time.perf_counter() - began
        return TrainOutcome(log.steps, data.input_ids.numel(), log.mean_loss, seconds, log.mean_label_loss)

    @contextmanager
    def _loss_module(self) -> Iterator[nn.Module]:
        """The module that a round runs, in training mode: the loss module itself, DDP's, or the shell."""
        checkpoints = self.config.activation_checkpointing
        if sharding_of(self.model) is None:
            module, model = self.loss_factory(self.model.eval(), self.autocast), self.model
        else:
            with gathered_calls(self.model, find_blocks(self.model)):
                module = self.loss_factory(self.model.eval(), self.autocast)
            module, model = make_shell(module, self.model, reshard_after_forward=self.distributed.reshard_after_forward)
            if self.distributed.activation_checkpointing is not None:
                checkpoints = self.distributed.activation_checkpointing
        model.train()
        with _checkpointing(model, checkpoints):
            if model is self.model and self.processes > 1:
                # Adapters begin as random numbers, and GPUs of two kinds round differently.
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.copy_(from_rank_zero(parameter.data))
                module = DistributedDataParallel(
                    module,
                    [self.device] if self.device.type == "cuda" else None,
                    # It would send the frozen weights too, which all processes have read.
                    init_sync=False,
                    # Some experts of a mixture may be reached by no token of a process.
                    find_unused_parameters=any(map(expert_lists, find_blocks(model))),
                    **_OWN_BUFFERS,
                )
            yield module

    def _round(
        self,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        data: PackedData,
        log: StepLog,
        step_done: Callable[[int, StepLog], None],
    ) -> None:
        """The steps of ``log.bar``; ``log`` gets those that had a token to learn from."""
        per_step, count = self.sequences_per_step, self._steps(len(data))
        # Every process has all of the data, and counts the labels of all processes on the host.
        labels = (data.labels[:, 1:] != IGNORED).sum(1).split(per_step)
        broken = torch.zeros((), device=self.device)
        for step in log.bar:
            where = f"round {log.round_index}, step {step + 1} of {count}"
            progress(where)
            began = moment(self.device)
            sequences = range(step * per_step, min((step + 1) * per_step, len(data)))
            rate = self._learning_rate(step, count)
            for settings in optimizer.param_groups:
                settings["lr"] = settings["rate"] * rate
            self.global_step += 1
            here, tokens = int(labels[step].sum()), len(sequences) * data.input_ids.shape[1]
            weight = here if self.config.distill is None else tokens
            if weight:
                group = deal(data, sequences, self.config.batch_size, (self.seed, log.round_index, step))
                losses, norm = self._step(loss_module, optimizer, parameters, group, (here, tokens), broken)
                if self.extension is not None and not broken:
                    self.extension.after_update(step + 1, rate)
                ended = moment(self.device)
                log.add(Step(self.global_step, where, weight, here, tokens, rate, losses, norm, began, ended))
            step_done(step + 1, log)

    def _step(
        self,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        group: list[Batch],
        counts: tuple[int, int],
        broken: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step over the batches of ``group``. On a CPU and on CUDA it reads no number of the device,
        unless rows are offloaded.

        Args:
            counts: label tokens and input tokens of the step, over all processes.
            broken: scalar fp32 on the device. It becomes 1 with the first step whose loss or gradient is not finite;
                from then on no step changes a weight.

        Returns:
            ``losses`` and ``norm`` of ``Step``.
        """
        optimizer.zero_grad(set_to_none=True)
        labels, tokens = counts
        distills = self.config.distill is not None
        weight = tokens if distills else labels
        summed: Tensor | float = 0.0
        for batch in group:
            # Dropout does not depend on what this process ran before, so that a run that goes on is the same.
            torch.manual_seed(batch.seed)
            with _summing(loss_module, batch is group[-1]):
                weights = (tokens / labels if labels else 0.0, float(batch.counts)) if distills else ()
                found = loss_module(*batch.to(self.device), *weights)
                loss, *told = found if distills else (found,)
                # DDP and FSDP2 take the mean of the processes' gradients, where the sum is wanted.
                (loss * (self.processes / weight)).backward()
            summed = summed + torch.stack([loss.detach(), *told])
        losses = sum_over_processes(cast(Tensor, summed))
        for parameter in parameters:
            if parameter.grad is None:
                # An expert that no token reaches: FSDP2 has zeros there, with which AdamW takes a step too.
                parameter.grad = torch.zeros_like(parameter)
        penalty = None if self.extension is None else self.extension.penalty()
        if penalty is not None:
            # Not by backward(): DDP would wait for the gradients of all parameters.
            gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = cast(Tensor, parameter.grad) + gradient
        norm = clip_gradients(parameters, self.config.max_grad_norm)
        broken.masked_fill_(~(losses[0].isfinite() & norm.isfinite()), 1.0)
        if self.fused:
            # AMP's switch: where this tensor is 1, the step leaves weights and moments as they are. Offloaded rows are
            # stepped on the host, which must have read the tensor by then.
            optimizer.found_inf = broken.to(parameters[0].device)  # type: ignore[attr-defined]
        elif broken:
            return losses, norm
        optimizer.step()
        return losses, norm

    def _learning_rate(self, step: int, steps: int) -> float:
        """The rate in ``step`` (from 0) of a round of ``steps``."""
        config = self.config
        if config.lr_schedule == "global":
            # Rounds end with smaller steps, so there may be a few more than planned: they keep the last rate.
            steps = self._steps(self.total_sequences)
            step = min(self.global_step, steps - 1)
        return lr_factor(step, steps, config.warmup) * config.learning_rate

    def _steps(self, sequences: int) -> int:
        return math.ceil(sequences / self.sequences_per_step)


def _summing(loss_module: nn.Module, last: bool) -> AbstractContextManager:
    """Of a step's passes, gradients are summed over the processes in the last one alone."""
    if isinstance(loss_module, FSDPModule):
        loss_module.set_requires_gradient_sync(last)
    if isinstance(loss_module, DistributedDataParallel) and not last:
        return loss_module.no_sync()
    return nullcontext()


@contextmanager
def _checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Activations recomputed in the backward pass, within the context."""
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
