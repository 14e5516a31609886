"""The next-token loss mixed with what the dense model says: its next-token distribution, and its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from losa.data.sequences import IGNORED
from losa.model.block_calls import hidden_of
from losa.model.blocks import find_blocks
from losa.model.originals import Originals, dense_passes
from losa.model.running import evaluating
from losa.recipe.training import DistillConfig
from losa.training.loss import TokenLoss, chunk_rows, wide


class DistillationLoss(TokenLoss):
    """(1 - w) CE + w T² KL(p || q) + h E, where the dense model inside of the trained one is the teacher.

    CE is the mean of the next-token loss over the label tokens. KL is the mean over all positions, prompts among them,
    of the divergence of the model's next-token distribution q from the teacher's p, over the whole vocabulary, both at
    temperature T (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). E is the mean over
    positions and decoder blocks of ||s - t||² / ||t||², s and t being the block's outputs for a token in the model and
    in the teacher: no token with a few huge activations decides.

    The teacher's last hidden states are kept, and each block's where they are compared. Logits of both models are taken
    in chunks of tokens, together with the gradient, where ``TokenLoss`` would; else all of them at once.

    Args:
        model: of ``TokenLoss``.
        autocast: of ``TokenLoss``.
        config: w, T and h.
        originals: of ``losa.model.originals.dense_passes``.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        *,
        config: DistillConfig,
        originals: Mapping[str, Originals],
    ):
        super().__init__(model, autocast)
        self.config = config
        self.originals = originals
        # No submodules of this module: they are the model's.
        self._blocks = tuple(find_blocks(model)) if config.hidden else ()

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, label_weight: float, token_weight: float
    ) -> tuple[Tensor, Tensor]:
        """The loss times the step's positions, so that divided by them it is the mean; and, to be told, the next-token
        loss summed over the label tokens, which has no gradient. Scalars, in nats.

        Args:
            input_ids: (batch, length) int64.
            positions: (labels,) int64, of ``label_positions``.
            targets: (labels,) int64, of ``label_positions``.
            label_weight: positions over label tokens of the whole step; 0 without label tokens.
            token_weight: 1; 0 for sequences that do not count.
        """
        chunks = self._takes_chunks(self._head())
        with self._region(input_ids), torch.no_grad(), self._teaching(), _outputs(self._blocks) as given:
            teacher = self._last(input_ids, chunks)
        with self._region(input_ids), _outputs(self._blocks) as found:
            if weight := self.config.weight:
                student = self._last(input_ids, chunks)
                mix = _Mix(label_weight * (1 - weight), token_weight * weight, self.config.temperature)
                mixed = self._chunked if chunks else _of_logits
                loss, labels = mixed(student, teacher, positions, targets, mix)
            else:
                labels = super().forward(input_ids, positions, targets)
                loss = label_weight * labels
        if found:
            errors = torch.stack([_relative_error(s, t) for s, t in zip(found, given, strict=True)])
            loss = loss + self.config.hidden * token_weight * errors.mean()
        return loss, labels.detach()

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """The dense model, without dropout."""
        with evaluating(self.model), dense_passes(self.model, self.originals):
            yield

    def _chunked(
        self, student: Tensor, teacher: Tensor, positions: Tensor, targets: Tensor, mix: _Mix
    ) -> tuple[Tensor, Tensor]:
        head = self._head()
        wanted = targets.new_full((len(student),), IGNORED).index_copy_(0, positions, targets)
        return _ChunkedMix.apply(*self._cast(student, teacher, head.weight, head.bias), wanted, mix)


def _of_logits(
    student: Tensor, teacher: Tensor, positions: Tensor, targets: Tensor, mix: _Mix
) -> tuple[Tensor, Tensor]:
    student, teacher = wide(student), wide(teacher)
    labels = F.cross_entropy(student.index_select(0, positions), targets, reduction="sum")
    log_q, log_p = (F.log_softmax(logits / mix.temperature, 1) for logits in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return mix.labels * labels + mix.teacher * mix.temperature**2 * divergence, labels


@contextmanager
def _outputs(blocks: tuple[nn.Module, ...]) -> Iterator[list[Tensor]]:
    """Within the context the list gets each block's output, in the order of their calls."""
    found: list[Tensor] = []

    def keep(module, args, output):
        # A block may work in its input's memory. Activation checkpointing allows no product here: it runs the block
        # again, without this hook, and expects as many tensors as the first time.
        found.append(hidden_of(output).clone())

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        yield found


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||² / ||t||², summed over tokens, of hidden states (batch, length, in)."""
    expected = wide(teacher)
    size = expected.square().sum(-1)
    distance = (wide(student) - expected).square().sum(-1)
    return (distance / size.clamp_min(torch.finfo(size.dtype).tiny)).sum()


@dataclass(frozen=True)
class _Mix:
    """Factors of the summed label loss, and of the summed T² KL."""

    labels: float
    teacher: float
    temperature: float


class _ChunkedMix(torch.autograd.Function):
    """The mixed loss of hidden (n, in) under a frozen output layer, beside the teacher's hidden (n, in); and the label
    loss in it, which has no gradient. The mixed loss's gradient is made along with it. No number of the device is
    read."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, mix: _Mix
    ) -> tuple[Tensor, Tensor]:
        gradient: Any = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        labels = torch.zeros_like(total)
        # Logits of both at a time.
        rows = max(1, chunk_rows(hidden.device.type, weight.shape[0]) // 2)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                student = wide(F.linear(hidden[part], weight, bias))
                given = wide(F.linear(teacher[part], weight, bias))
                loss, label_loss, slope = _loss_and_slope(student, given, wanted[part, None], mix)
                total += loss
                labels += label_loss
                torch.mm(slope.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(labels)
        return total, labels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None, None


def _loss_and_slope(student: Tensor, teacher: Tensor, wanted: Tensor, mix: _Mix) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of some tokens, the label loss in it, and the loss's gradient by the student's logits. It works in the
    memory of both logits.

    Args:
        student, teacher: (n, vocabulary) logits; ``wanted``: (n, 1) labels.
    """
    labelled = (wanted != IGNORED).to(student.dtype)
    target = wanted.clamp_min(0)
    share, log_sum = _softmax(student)
    labels = ((log_sum - student.gather(1, target)) * labelled).sum()
    labelled = mix.labels * labelled
    slope = (share * labelled).scatter_add_(1, target, -labelled)
    if mix.temperature != 1:
        share, log_sum = _softmax(student.div_(mix.temperature))
    given, given_log_sum = _softmax(teacher.div_(mix.temperature))
    # The sum of p (log p - log q), from logits without their largest and the logarithms of their normalisers.
    divergence = teacher.sub_(student).mul_(given).sum() + (log_sum - given_log_sum).sum()
    loss = mix.labels * labels + mix.teacher * mix.temperature**2 * divergence
    return loss, labels, slope.add_(share.sub_(given), alpha=mix.teacher * mix.temperature)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax (n, vocabulary) and the logarithm of its normaliser (n, 1) once the largest logit, in place, is 0."""
    share = logits.sub_(logits.amax(1, keepdim=True)).exp()
    total = share.sum(1, keepdim=True)
    return share.div_(total), total.log()
