"""The fine-tuning loop, on accelerate. Each round has a fresh optimiser."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from losa.data.sequences import IGNORED, PackedData
from losa.distributed.collectives import sum_over_processes
from losa.distributed.launch import check_kind
from losa.distributed.processes import is_main, process_count, process_index
from losa.recipe.sections import TrainConfig
from losa.training.loss import TokenLoss, label_positions
from losa.training.metrics import Metrics
from losa.training.precision import autocast_dtype
from losa.training.steps import Step, StepLog, moment

# Makes the module that a round trains, from the model and autocast's dtype or None. The model is a submodule of it. It
# takes what TokenLoss takes and returns the loss summed over the labels, a scalar.
LossFactory = Callable[[nn.Module, torch.dtype | None], nn.Module]

# Input tokens, and where they predict which label tokens.
Batch = tuple[Tensor, Tensor, Tensor]

# Steps on a GPU whose numbers are read together. Reading waits until the GPU has done all its work, and the GPU then
# stands idle until it gets more.
STEPS_A_READING = 10


@dataclass(frozen=True)
class TrainOutcome:
    """``steps``: optimiser steps; ``tokens``: input tokens over all processes; ``loss``: mean over the round's label
    tokens in nats, None without any; ``seconds``: wall time."""

    steps: int
    tokens: int
    loss: float | None
    seconds: float


class Trainer:
    """Trains the parameters that require a gradient (the adapters), round after round.

    Several processes under ``accelerate launch`` (DDP) share out the sequences; ``batch_size`` counts the sequences of
    one process.

    ``global_step`` counts optimiser steps over all rounds; set it to go on after a resume state.

    On a GPU the host waits for the numbers of ``steps_a_reading`` steps at a time; a step in between waits for nothing.

    Args:
        model: causal LM, left on its device (with several processes: moved to this process's device).
        config: the recipe's train section.
        seed: for dropout.
        output_dir: takes metrics.jsonl, a line per step, and TensorBoard files; None: no files.
        total_sequences: of all rounds; sets the length of the global learning-rate cycle.
        device: where the model is.
        loss_factory: makes the loss module of a round; default: the next-token loss.

    Raises:
        LosaError: under DeepSpeed or FSDP, or TensorBoard is asked for and missing.
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
    ):
        self.model = model
        self.config = config
        self.seed = seed
        self.loss_factory = loss_factory
        # accelerate deals out data and synchronises gradients. Device and precision are set here: its own settings
        # belong to the process and cannot differ between two trainers.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        check_kind(self.accelerator.distributed_type)
        self.processes = process_count()
        self.device = torch.device(device) if self.processes == 1 else self.accelerator.device
        self.autocast = autocast_dtype(config.precision, self.device)
        self.fused = self.device.type in ("cpu", "cuda")
        self.steps_a_reading = STEPS_A_READING if self.device.type == "cuda" else 1
        self.global_step = 0
        self.total_steps = self._steps(total_sequences)
        self._metrics = Metrics(output_dir if is_main() else None, config.tensorboard)

    def train(self, data: PackedData, *, round_index: int, stage_name: str = "round") -> TrainOutcome:
        """One pass over ``data``, in its order; a last, smaller batch is used too. Leaves the model in evaluation mode.

        A step's loss is the mean over the label tokens of all its batches and processes, each token weighing the same.
        Steps without any label token change nothing.

        Args:
            round_index: from 1; names the round in messages and metrics, and seeds dropout.
            stage_name: of the progress bar.

        Raises:
            NumericsError: non-finite loss or gradient norm; names round and step. The weights are as the step before
                left them.
            OutputError: metrics cannot be written (disk full); names the file.
        """
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * self.seed + 1_009 * round_index + process_index())
        self.model.to(self.device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=self.fused,
        )
        loss_module = self.loss_factory(self.model.eval(), self.autocast)
        loader = DataLoader(self._padded(data), batch_size=self.config.batch_size, collate_fn=_collate)
        count = self._steps(len(data))
        try:
            self.model.train()
            with _checkpointing(self.model, self.config.activation_checkpointing), self._metrics.open(self.global_step):
                prepared, loader = self.accelerator.prepare(loss_module, loader)
                bar = tqdm(range(count), desc=stage_name, leave=False, disable=None if is_main() else True)
                with StepLog(round_index, self._metrics, bar, self.steps_a_reading) as log:
                    self._round(prepared, optimizer, parameters, loader, data, log)
        finally:
            # DDP's wrapper goes with this list and the local names; the model itself was never replaced.
            self.accelerator.free_memory()
            self.model.eval()
        return TrainOutcome(log.steps, data.input_ids.numel(), log.mean_loss, time.perf_counter() - start)

    def _round(
        self,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        loader: DataLoader,
        data: PackedData,
        log: StepLog,
    ) -> None:
        """Every step of one pass over ``data``; ``log`` gets the steps that had a label token."""
        config, per_step, count = self.config, self._sequences_per_step(), self._steps(len(data))
        # Every process has all of the data, and counts the labels of all processes on the host.
        labels = (data.labels[:, 1:] != IGNORED).sum(1).split(per_step)
        batches = iter(loader)
        broken = torch.zeros((), device=self.device)
        for step in log.bar:
            began = moment(self.device)
            group = list(itertools.islice(batches, config.gradient_accumulation))
            rate = self._learning_rate(step, count)
            for settings in optimizer.param_groups:
                settings["lr"] = rate
            self.global_step += 1
            here = int(labels[step].sum())
            if here == 0:
                continue
            loss, norm = self._step(loss_module, optimizer, parameters, group, here, broken)
            where = f"round {log.round_index}, step {step + 1} of {count}"
            tokens = min(per_step, len(data) - step * per_step) * data.input_ids.shape[1]
            log.add(Step(self.global_step, where, here, tokens, rate, loss, norm, began, moment(self.device)))

    def _step(
        self,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        group: list[Batch],
        labels: int,
        broken: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step over the batches of ``group``. On a CPU and on CUDA it reads no number of the device.

        Args:
            labels: label tokens of the step, over all processes.
            broken: scalar fp32 on the device. It becomes 1 with the first step whose loss or gradient is not finite;
                from then on no step changes a weight.

        Returns:
            scalar tensors: the loss summed over label tokens and processes, and the gradient's norm.
        """
        optimizer.zero_grad(set_to_none=True)
        summed: Tensor | float = 0.0
        for position, batch in enumerate(group):
            ids, positions, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            last = position == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(loss_module):
                part = loss_module(ids, positions, targets)
                # DDP takes the mean of the processes' gradients, where the sum is wanted.
                (part * (self.processes / labels)).backward()
            summed = summed + part.detach()
        loss = sum_over_processes(cast(Tensor, summed))
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        broken.masked_fill_(~(loss.isfinite() & norm.isfinite()), 1.0)
        if self.fused:
            # AMP's switch: where this tensor is 1, the step leaves weights and moments as they are.
            optimizer.found_inf = broken  # type: ignore[attr-defined]
        elif broken:
            return loss, norm
        optimizer.step()
        return loss, norm

    def _learning_rate(self, step: int, steps: int) -> float:
        """The rate in ``step`` (from 0) of a round of ``steps``."""
        config = self.config
        if config.lr_schedule == "global":
            # Rounds end with smaller steps, so there may be a few more than planned: they keep the last rate.
            step, steps = min(self.global_step, self.total_steps - 1), self.total_steps
        return lr_factor(step, steps, config.warmup) * config.learning_rate

    def _sequences_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation * self.processes

    def _steps(self, sequences: int) -> int:
        return math.ceil(sequences / self._sequences_per_step())

    def _padded(self, data: PackedData) -> TensorDataset:
        """With several processes, sequences without labels fill up the last batches: accelerate would repeat some."""
        missing = -len(data) % (self.config.batch_size * self.processes) if self.processes > 1 else 0
        ids, labels = data.input_ids, data.labels
        if missing:
            ids = torch.cat([ids, ids[:1].expand(missing, -1)])
            labels = torch.cat([labels, labels.new_full((missing, labels.shape[1]), IGNORED)])
        return TensorDataset(ids, labels)


def _collate(sequences: list[tuple[Tensor, Tensor]]) -> Batch:
    ids, labels = (torch.stack(tensors) for tensors in zip(*sequences, strict=True))
    return ids, *label_positions(labels)


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate in ``step`` (from 0) of ``steps``.

    Linear warm-up over the first round(warmup * steps) steps, the full rate at the next step, then linear decay that
    would reach zero one step after the last: no step is wasted on a rate of zero.
    """
    warm = min(round(warmup * steps), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return (steps - step) / (steps - warm)


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
