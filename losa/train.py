"""The fine-tuning loop: lean, on accelerate; one optimiser and one learning-rate cycle per round, or one cycle for all."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from losa.data import IGNORED, PackedData
from losa.errors import LosaError, NumericsError
from losa.recipe import TrainConfig


@dataclass(frozen=True)
class TrainOutcome:
    """``loss``: mean over the round's label tokens; ``tokens``: input tokens over all processes."""

    steps: int
    tokens: int
    loss: float
    seconds: float


class Trainer:
    """Trains what requires a gradient (the adapters), round after round.

    Args:
        model: causal LM on its device.
        config: the recipe's train section.
        output_dir: takes metrics.jsonl (and TensorBoard files).
        total_sequences: of all rounds, for the global learning-rate cycle.

    Raises:
        LosaError: under DeepSpeed ZeRO-3, which shards what pruning must see whole.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        seed: int,
        output_dir: Path | None,
        total_sequences: int,
        device: torch.device,
    ):
        self.model = model
        self.config = config
        self.seed = seed
        self.device = device
        self.global_step = 0
        precision = "bf16" if _uses_bf16(config, model, device) else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        plugin = self.accelerator.state.deepspeed_plugin
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3:
            raise LosaError("DeepSpeed ZeRO-3 is not supported: pruning needs whole weights; use DDP")
        self.processes = self.accelerator.num_processes
        self.total_steps = self._steps(total_sequences)
        self.metrics = Metrics(output_dir if self.accelerator.is_main_process else None, config.tensorboard)

    def _steps(self, sequences: int) -> int:
        per_step = self.config.batch_size * self.config.gradient_accumulation * self.processes
        return math.ceil(sequences / per_step)

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up over the first ``warmup`` share of ``steps``, then linear decay that ends one step after the
        last; ``step`` counts from 0."""
        warm = max(1, round(self.config.warmup * steps)) if self.config.warmup > 0 else 0
        if step < warm:
            return self.config.learning_rate * (step + 1) / (warm + 1)
        return self.config.learning_rate * (steps - step) / (steps - warm)

    def train(self, data: PackedData, *, round_index: int, stage_name: str = "round") -> TrainOutcome:
        """One pass over ``data`` in its own order (it is shuffled already); a last partial batch is used.

        Raises:
            NumericsError: non-finite loss or gradient, before the weights are touched; names round and step.
        """
        config, accelerator = self.config, self.accelerator
        start = time.perf_counter()
        torch.manual_seed(self.seed * 1000 + round_index)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        loader = DataLoader(TensorDataset(data.input_ids, data.labels), batch_size=config.batch_size)
        model, optimizer, loader = accelerator.prepare(self.model, optimizer, loader)
        steps = self._steps(len(data))
        losses = Average()
        model.train()
        with self._checkpointing():
            groups = list(_groups(loader, config.gradient_accumulation))
            bar = tqdm(groups, desc=stage_name, leave=False, disable=None if accelerator.is_main_process else True)
            for step, group in enumerate(bar):
                began = time.perf_counter()
                if config.lr_schedule == "global":
                    rate = self.learning_rate(self.global_step, max(self.total_steps, self.global_step + 1))
                else:
                    rate = self.learning_rate(step, steps)
                for settings in optimizer.param_groups:
                    settings["lr"] = rate
                where = f"round {round_index}, step {step + 1}"
                loss, labels, norm = self._step(model, optimizer, parameters, group, where)
                self.global_step += 1
                losses.add(loss, labels)
                tokens = sum(ids.numel() for ids, _ in group) * self.processes
                bar.set_postfix(loss=f"{loss:.3f}")
                self.metrics.write(
                    step=self.global_step,
                    round=round_index,
                    loss=loss,
                    lr=rate,
                    grad_norm=norm,
                    tokens=tokens,
                    tokens_per_s=tokens / (time.perf_counter() - began),
                )
        self.model = accelerator.unwrap_model(model)
        self.model.eval()
        accelerator.free_memory()
        return TrainOutcome(steps, data.input_ids.numel(), losses.value, time.perf_counter() - start)

    def _step(self, model, optimizer, parameters, group, where: str) -> tuple[float, int, float]:
        """One optimiser step over the batches of ``group``, each label token of all processes weighing the same."""
        accelerator = self.accelerator
        labels = torch.tensor(sum(int((y[:, 1:] != IGNORED).sum()) for _, y in group), device=self.device)
        everywhere = int(accelerator.reduce(labels, "sum"))
        optimizer.zero_grad(set_to_none=True)
        if everywhere == 0:
            return 0.0, 0, 0.0
        total = torch.zeros((), device=self.device)
        for position, (ids, targets) in enumerate(group):
            last = position == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():
                    summed = _summed_loss(model, ids, targets)
                # DDP averages gradients over processes; the sum over all tokens is wanted.
                accelerator.backward(summed * (self.processes / everywhere))
                total += summed.detach()
        loss = float(accelerator.reduce(total, "sum")) / everywhere
        if not math.isfinite(loss):
            raise NumericsError(f"training: loss is {loss} in {where}; lower train.learning_rate")
        norm = float(accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError(f"training: gradient norm is {norm} in {where}; lower train.learning_rate")
        optimizer.step()
        return loss, everywhere, norm

    @contextlib.contextmanager
    def _checkpointing(self):
        if not self.config.activation_checkpointing:
            yield
            return
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()


def _uses_bf16(config: TrainConfig, model: nn.Module, device: torch.device) -> bool:
    if config.precision != "auto":
        return config.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _groups(loader, size: int):
    group = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _summed_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Sum of the next-token loss over label tokens, in fp32."""
    wanted = labels[:, 1:]
    # Positions that predict no label token in any row of the batch need no logits.
    columns = (wanted != IGNORED).any(0).nonzero().flatten()
    logits = model(input_ids, use_cache=False, logits_to_keep=columns).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), wanted[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


class Average:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.total += value * count
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class Metrics:
    """metrics.jsonl, a line per step, and TensorBoard scalars where asked for. Without a directory: nothing."""

    def __init__(self, directory: Path | None, tensorboard: bool):
        self.path = None
        self.writer = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise LosaError("train.tensorboard: not installed; pip install 'losa[tensorboard]'") from error
            self.writer = SummaryWriter(directory / "tensorboard")

    def write(self, step: int, **values) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
