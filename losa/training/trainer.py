"""The fine-tuning loop: lean, on accelerate; a fresh optimiser each round."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from losa.data.sequences import IGNORED, PackedData
from losa.distributed import check_kind
from losa.errors import NumericsError
from losa.recipe.sections import TrainConfig
from losa.training.loss import TokenLoss
from losa.training.metrics import Metrics
from losa.training.precision import autocast_dtype


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

    One process, or several under ``accelerate launch`` (DDP): sequences are then dealt out to the processes, and
    ``batch_size`` counts each process's.

    ``global_step`` counts optimiser steps over all rounds; set it to go on after a checkpoint.

    Args:
        model: causal LM, left on its device (with several processes: moved to this process's device).
        config: the recipe's train section.
        seed: for dropout.
        output_dir: takes metrics.jsonl, a line per step, and TensorBoard files; None: neither.
        total_sequences: of all rounds, the length of the global learning-rate cycle.
        device: the model's.

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
    ):
        self.model = model
        self.config = config
        self.seed = seed
        # accelerate deals out data and synchronises gradients. Device and precision are set here: its own settings
        # belong to the process and cannot differ between two trainers.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        check_kind(self.accelerator.distributed_type)
        self.processes = self.accelerator.num_processes
        self.device = torch.device(device) if self.processes == 1 else self.accelerator.device
        self.autocast = autocast_dtype(config.precision, self.device)
        self.global_step = 0
        self.total_steps = self._steps(total_sequences)
        self._metrics = Metrics(output_dir if self.accelerator.is_main_process else None, config.tensorboard)

    def train(self, data: PackedData, *, round_index: int, stage_name: str = "round") -> TrainOutcome:
        """One pass over ``data``, in its order; a last, smaller batch is used too. Leaves the model in evaluation mode.

        A step's loss is the mean over the label tokens of all its batches and processes, each token weighing the same.
        Steps without any label token change nothing.

        Args:
            round_index: from 1; names the round in messages and metrics, and seeds dropout.
            stage_name: the progress bar's.

        Raises:
            NumericsError: non-finite loss or gradient norm, before the weights are touched; names round and step.
            OutputError: metrics cannot be written (disk full); names the file.
        """
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * self.seed + 1_009 * round_index + self.accelerator.process_index)
        self.model.to(self.device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        loss_module = TokenLoss(self.model.eval(), self.autocast)
        loader = DataLoader(self._padded(data), batch_size=self.config.batch_size)
        try:
            self.model.train()
            with _checkpointing(self.model, self.config.activation_checkpointing), self._metrics.open(self.global_step):
                prepared, loader = self.accelerator.prepare(loss_module, loader)
                steps, loss = self._round(prepared, optimizer, parameters, loader, data, round_index, stage_name)
        finally:
            # DDP's wrapper goes with this list and the local names; the model itself was never replaced.
            self.accelerator.free_memory()
            self.model.eval()
        return TrainOutcome(steps, data.input_ids.numel(), loss, time.perf_counter() - start)

    def _round(
        self, loss_module, optimizer, parameters, loader, data: PackedData, round_index: int, stage_name: str
    ) -> tuple[int, float | None]:
        config = self.config
        count = self._steps(len(data))
        per_step = self._sequences_per_step()
        batches = iter(loader)
        total_loss, total_labels, taken = 0.0, 0, 0
        show = None if self.accelerator.is_main_process else True
        bar = tqdm(range(count), desc=stage_name, leave=False, disable=show)
        for step in bar:
            began = time.perf_counter()
            group = list(itertools.islice(batches, config.gradient_accumulation))
            if config.lr_schedule == "global":
                # Rounds end with smaller steps, so there may be a few more than planned: they keep the last rate.
                factor = lr_factor(min(self.global_step, self.total_steps - 1), self.total_steps, config.warmup)
            else:
                factor = lr_factor(step, count, config.warmup)
            for settings in optimizer.param_groups:
                settings["lr"] = factor * config.learning_rate
            where = f"round {round_index}, step {step + 1} of {count}"
            loss, labels, norm = self._step(loss_module, optimizer, parameters, group, where)
            self.global_step += 1
            if labels == 0:
                continue
            taken += 1
            total_loss += loss * labels
            total_labels += labels
            tokens = min(per_step, len(data) - step * per_step) * data.input_ids.shape[1]
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._metrics.write(
                step=self.global_step,
                round=round_index,
                loss=loss,
                lr=factor * config.learning_rate,
                grad_norm=norm,
                tokens=tokens,
                tokens_per_s=tokens / (time.perf_counter() - began),
            )
        return taken, total_loss / total_labels if total_labels else None

    def _step(self, loss_module, optimizer, parameters, group: list, where: str) -> tuple[float, int, float]:
        """One optimiser step over the batches of ``group``: (mean loss, label tokens, gradient norm) over processes."""
        accelerator = self.accelerator
        own = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in group)
        labels = int(accelerator.reduce(torch.tensor(own, device=self.device), "sum"))
        if labels == 0:
            return 0.0, 0, 0.0
        optimizer.zero_grad(set_to_none=True)
        summed = 0.0
        for position, batch in enumerate(group):
            ids, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            last = position == len(group) - 1
            with nullcontext() if last else accelerator.no_sync(loss_module):
                part = loss_module(ids, targets)
                # DDP takes the mean of the processes' gradients, where the sum is wanted.
                (part * (self.processes / labels)).backward()
            summed = summed + part.detach()
        loss = float(accelerator.reduce(summed, "sum")) / labels
        if not math.isfinite(loss):
            raise NumericsError(f"training: the loss is {loss} in {where}; lower train.learning_rate")
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError(f"training: the gradient norm is {norm} in {where}; lower train.learning_rate")
        optimizer.step()
        return loss, labels, norm

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


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate in ``step`` (from 0) of ``steps``.

    Linear warm-up over the first round(warmup * steps) steps, full at the step after them, then linear decay that would
    reach zero one step after the last: no step is wasted on a rate of zero.
    """
    warm = min(round(warmup * steps), steps - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return (steps - step) / (steps - warm)


@contextmanager
def _checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Activations recomputed in the backward pass, within the context."""
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
