"""The next-token loss without a logits tensor over all positions and the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from losa.data.sequences import IGNORED
from losa.training.packing_check import Shape, packing_checked_once

# Bytes of fp32 logits at a time. Each chunk reads the whole output layer, so small chunks are slow.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a batch predicts label tokens, and the tokens: labels on a GPU make the host wait for their number.

    Args:
        labels: (batch, length) int64, aligned with the input tokens; -100: no label.

    Returns:
        (labels,) int64 each: places in the flattened batch whose logits predict a label, and the label.
    """
    following = labels[:, 1:]
    rows, columns = (following != IGNORED).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, following[rows, columns]


class TokenLoss(nn.Module):
    """Summed next-token loss of a causal LM over its label tokens, by logits at label positions only.

    Where the model's logits are exactly what its frozen output layer returns, the loss and its gradient are taken in
    chunks of tokens: memory for logits is ``CHUNK_BYTES``, whatever the batch. A run of the model on two tokens shows
    whether it is such a model. A model that does more (soft-capping, scaling), or whose output layer is trained, still
    runs the output layer on label positions only. A model without a separate output layer returns all logits.

    Args:
        model: Hugging Face causal LM; a submodule here, so that DDP on this module finds its parameters.
        autocast: dtype of autocast regions around the forward pass, or None.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.plain = head_gives_logits(model)
        self._one_text_a_row: set[Shape] = set()

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """The sum in nats: a scalar, fp32 (fp64 for an fp64 model).

        Args:
            input_ids: (batch, length) int64.
            positions, targets: (labels,) int64, of ``label_positions``.
        """
        with self._region(input_ids):
            head = self._head()
            if self._takes_chunks(head):
                hidden = self._hidden(head, input_ids).flatten(0, 1).index_select(0, positions)
                return _ChunkedLoss.apply(*self._cast(hidden, head.weight, head.bias), targets)
            logits = self._logits(head, input_ids, positions)
            return F.cross_entropy(wide(logits), targets, reduction="sum")

    @torch.no_grad()
    def drawn_labels(self, input_ids: Tensor, generator: torch.Generator) -> Tensor:
        """Labels as the model itself would have them: each drawn from its distribution behind the tokens before it.

        Args:
            input_ids: (batch, length) int64.
            generator: of the same device.

        Returns:
            (batch, length) int64, aligned with the input tokens; -100 in the first column.
        """
        with self._region(input_ids):
            head = self._head()
            takes_chunks = self._takes_chunks(head)
            last = self._last(input_ids, takes_chunks)
            chunks: Iterable[Tensor] = [last]
            if takes_chunks:
                hidden, weight, bias = self._cast(last, head.weight, head.bias)
                parts = hidden.split(chunk_rows(input_ids.device.type, len(weight)))
                chunks = (F.linear(part, weight, bias) for part in parts)
            # Where logits are not finite any token is drawn: its loss tells, and multinomial would end a CUDA context.
            shares = (wide(logits).softmax(1).nan_to_num(1.0) for logits in chunks)
            drawn = [torch.multinomial(share, 1, generator=generator) for share in shares]
        following = torch.cat(drawn).view_as(input_ids)
        return torch.cat([torch.full_like(input_ids[:, :1], IGNORED), following[:, :-1]], 1)

    def _region(self, input_ids: Tensor) -> AbstractContextManager:
        return nullcontext() if self.autocast is None else torch.autocast(input_ids.device.type, self.autocast)

    def _head(self) -> Any:
        transformer: Any = self.model
        return transformer.get_output_embeddings()

    def _takes_chunks(self, head: nn.Module) -> bool:
        return self.plain and not (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))

    def _cast(self, *tensors: Any) -> list[Any]:
        """As autocast computes with them, once for all chunks: it caches casts of trained parameters only."""
        if self.autocast is None:
            return list(tensors)
        return [None if tensor is None else tensor.to(self.autocast) for tensor in tensors]

    def _run(self, input_ids: Tensor) -> Any:
        with packing_checked_once(self._one_text_a_row):
            return self.model(input_ids, use_cache=False)

    def _last(self, input_ids: Tensor, chunks: bool) -> Tensor:
        """(batch * length, in) the output layer's inputs, or (batch * length, vocabulary) logits."""
        head = self._head()
        if chunks:
            return self._hidden(head, input_ids).flatten(0, 1)
        every = torch.arange(input_ids.numel(), device=input_ids.device)
        return self._logits(head, input_ids, every)

    def _hidden(self, head: nn.Module, input_ids: Tensor) -> Tensor:
        """The output layer's input; the layer itself runs on no token."""
        kept = []

        def keep(module, args):
            kept.append(args[0])
            return (args[0][:, :0],)

        handle = head.register_forward_pre_hook(keep)
        try:
            self._run(input_ids)
        finally:
            handle.remove()
        return kept[0]

    def _logits(self, head: nn.Module | None, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(positions, vocabulary) logits as the model returns them. Its output layer runs on these positions alone."""

        def gather(module, args):
            if not args or args[0].shape[:2] != input_ids.shape:
                return None
            return (args[0].flatten(0, 1).index_select(0, positions)[None],)

        handle = None if head is None else head.register_forward_pre_hook(gather)
        try:
            logits = self._run(input_ids).logits
        finally:
            if handle is not None:
                handle.remove()
        if logits.shape[:2] == input_ids.shape:
            return logits.flatten(0, 1).index_select(0, positions)
        return logits[0]


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy sum of hidden (n, in) under a frozen output layer. The gradient is made along with the loss: no
    chunk's logits are computed twice or kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        gradient: Any = torch.empty_like(hidden) if needs_grad else None
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows = chunk_rows(hidden.device.type, weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                target = targets[part, None]
                logits = wide(F.linear(hidden[part], weight, bias))
                chosen = logits.gather(1, target)
                largest = logits.amax(1, keepdim=True)
                share = logits.sub_(largest).exp_()
                normaliser = share.sum(1, keepdim=True)
                total += (normaliser.log() + largest - chosen).sum()
                if needs_grad:
                    share.div_(normaliser).scatter_add_(1, target, share.new_full(target.shape, -1.0))
                    torch.mm(share.to(weight.dtype), weight, out=gradient[part])
        if needs_grad:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def chunk_rows(device: str, vocabulary: int) -> int:
    """Tokens whose fp32 logits take ``CHUNK_BYTES``."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * max(1, vocabulary)))


def wide(logits: Tensor) -> Tensor:
    """In fp32, or in fp64 if they are: softmax needs the range."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def head_gives_logits(model: Any) -> bool:
    """Does the model return its output layer's result as it is? A model on the meta device is asked too; one that reads
    numbers of its tensors on the way raises RuntimeError there."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    seen = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append((args, output, output._version)))
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
        with packing_checked_once({(tuple(ids.shape), ids.device)}):
            logits = model(ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        return False
    args, output, version = seen[0]
    return logits is output and output._version == version and len(args) == 1 and args[0].shape[:2] == ids.shape
