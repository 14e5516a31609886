"""Streaming calibration: block by block, with the hidden states of one block in memory and nothing else.

A stream's memory is bounded by ``BlockStream.nbytes`` (samples x length x hidden x bytes), whatever the number of
blocks. The hidden states stay on a GPU if they take at most a quarter of the memory that is free there when the
stream begins. Otherwise they wait on the host, where torch pins the next power of two.
Statistics live for one block; Grams take L n^2 floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from losa.algorithm.grams import gram_of_all
from losa.algorithm.stream_storage import StreamStorage
from losa.distributed.collectives import share_of
from losa.distributed.processes import from_everyone, process_count, process_index
from losa.distributed.sharding import device_of, gathered, gathered_calls, is_whole, sharding_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import LosaError, ModelError
from losa.model.block_calls import Call, hidden_of, same, split_call
from losa.model.blocks import Blocks
from losa.model.call_recording import CallsOfTokens, recorded, with_hidden
from losa_kernels import gram

# Tokens that ``gram_of_tokens`` takes.
COMPARED_TOKENS = 256


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


# Errors of a model's own code become a ModelError; these errors say what is wrong already, and stay as they are.
_PASSED_ON = (LosaError, _Stop, MemoryError, torch.OutOfMemoryError)


def _forward(model: nn.Module, batch: Tensor) -> None:
    try:
        model.base_model(batch, use_cache=False)  # type: ignore[operator]
    except _PASSED_ON:
        raise
    except Exception as error:
        raise ModelError(f"model: its forward pass fails on calibration tokens ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class BlockStream:
    """Hidden states of calibration samples between two blocks of the model.

    Several processes make a stream together, and share its batches out: each holds the hidden states of its own
    samples, ``samples``, perhaps of none. ``run`` and ``advance`` need the block whole (``gathered``).

    Args:
        model: a causal LM; ``blocks``: its decoder blocks.
        input_ids: (samples, length) int64, of all processes.
        batch_size: samples per block call.
        storage: device where hidden states wait between blocks; default: the GPU that the model is on, while they fit,
            else host memory (``losa.algorithm.stream_storage``).
        calls: what blocks are called with, by batch shape. It takes a whole forward pass to find out, so the caller
            keeps it between streams of one model. While it is empty, a stream of two batches is compared with whole
            forward passes first.
        other_sizes: further batch sizes that ``run_on`` is to take, each of them at most the number of samples.
        within: a context for all that the stream runs of the model but ``run``, ``advance`` and ``run_on``.

    Raises:
        Stopped: between passes, or between blocks that are run by themselves, if a signal asks for it.
        ModelError: the blocks cannot be replayed one after the other: a block is never called, or something else
            passes between blocks; or the first block's other arguments depend on the tokens, in a model in shards.
            Names the first such block.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        input_ids: Tensor,
        batch_size: int = 1,
        storage: torch.device | str | None = None,
        calls: dict[tuple[int, int], list[Call]] | None = None,
        other_sizes: Collection[int] = (),
        within: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.blocks = blocks.modules
        self.names = blocks.names
        self.device = device_of(blocks.modules)
        self.storage = torch.device("cpu" if storage is None else storage)
        self.hidden: list[Tensor] = []
        self.position = ""
        self._batch_size = batch_size
        self._calls = {} if calls is None else calls
        self._shapes: list[tuple[int, int]] = []
        # By batch: what its blocks are called with, where that depends on its tokens.
        self._own: list[CallsOfTokens | None] = []
        self._held: StreamStorage | None = None
        self._within = within
        shares = [share_of(len(input_ids), batch_size, index) for index in range(process_count())]
        self.samples = shares[process_index()]
        # How many samples each process has.
        self._counts = [len(share) for share in shares]
        with torch.no_grad(), gathered_calls(model, blocks), within():
            if not self._calls:
                self._check_replay(model, input_ids[:batch_size])
            # Of all processes' batches: a whole pass through a sharded model takes all processes.
            for batch in (*input_ids.split(batch_size), *(input_ids[:size] for size in other_sizes)):
                if _shape(batch) not in self._calls:
                    self._calls[_shape(batch)] = self._whole_pass(model, batch)[0]
            if storage is None and _keeps_streams(self.device):
                self._held = StreamStorage(self.device, len(self.samples))
            mine = input_ids[self.samples.start : self.samples.stop].split(batch_size) if self.samples else ()
            together(partial(self._add_all, model, mine))

    def _add_all(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            self._add(model, batch)

    def _add(self, model: nn.Module, batch: Tensor) -> None:
        hidden, first = self._capture_first(model, batch)
        known = self._calls[_shape(batch)]
        alike = same(first.args, known[0].args) and same(first.kwargs, known[0].kwargs)
        self.hidden.append(self._stored(sum(map(len, self.hidden)), hidden))
        self._shapes.append(_shape(batch))
        self._own.append(None if alike else self._calls_of(model, batch, known))

    def _calls_of(self, model: nn.Module, batch: Tensor, known: list[Call]) -> CallsOfTokens:
        """What the blocks are called with for these very tokens. ``known``: for others of the same shape."""
        if sharding_of(model) is not None:
            raise ModelError(
                f"{self.names[0]}: its arguments besides hidden states depend on the tokens; expected a model that is "
                "whole in each process, got one in shards"
            )
        # No reference to the stream itself: it would keep its hidden states in memory.
        device, within = self.device, self._within

        def run() -> None:
            with torch.no_grad(), within():
                _forward(model, batch.to(device))

        return CallsOfTokens(partial(recorded, self.blocks, self.names, [call.returned for call in known], run))

    def _stored(self, first: int, hidden: Tensor) -> Tensor:
        """Hidden states of the samples from ``first`` on, where they wait for the next block."""
        return hidden.to(self.storage) if self._held is None else self._held.write(first, hidden)

    def _check_replay(self, model: nn.Module, batch: Tensor) -> None:
        """Stream two batches and compare with what whole forward passes give.

        Blocks are called with the arguments of the first batch's pass. The second batch, the same tokens backwards,
        shows arguments that depend on the tokens: each batch then has its own. Two batches in turn show what a block
        leaves behind for the next one.
        Several processes make the same check.
        """
        batches = [batch, batch.flip(0, 1)]
        self._calls[_shape(batch)], first = self._whole_pass(model, batch)
        expected = [first[-1], self._whole_pass(model, batches[1])[1][-1]]
        self._add_all(model, batches)
        for index in range(len(self.blocks)):
            self._replay(index)
        near = all(self._near(s, e) for s, e in zip(self.hidden, expected, strict=True))
        if not all(from_everyone(near)):
            self._find_difference(model, batches, expected)
        self._forget()

    def _forget(self) -> None:
        self.hidden, self._shapes, self._own = [], [], []

    def _replay(self, index: int) -> None:
        progress(f"running {self.names[index]} by itself")
        check()
        with gathered(self.blocks[index]):
            together(partial(self._replay_alone, index))

    def _replay_alone(self, index: int) -> None:
        try:
            self.advance(index)
        except _PASSED_ON:
            raise
        except Exception as error:  # a model's own code, called in a way that it may not expect
            message = f"{self.names[index]}: cannot be run by itself, as calibration does"
            raise ModelError(f"{message} ({_reason(error)})") from error

    def _find_difference(self, model: nn.Module, batches: list[Tensor], expected: list[Tensor]) -> None:
        """Replay once more, compare with the outputs of all blocks, and name the first block that differs by more than
        twice as much as the model's own passes differ from each other: atomic sums on GPUs come in any order."""
        outputs = [self._whole_pass(model, batch, every=True)[1] for batch in batches]
        noise = max(_distance(again[-1], last) for again, last in zip(outputs, expected, strict=True))
        self._forget()
        self._add_all(model, batches)
        for index in range(len(self.blocks)):
            self._replay(index)
            near = all(self._near(s, o[index], noise) for s, o in zip(self.hidden, outputs, strict=True))
            if not all(from_everyone(near)):
                raise ModelError(
                    f"{self.names[index]}: calibration runs blocks one by one, and this one then gives another output "
                    "than in a whole forward pass: its arguments depend on the tokens, or the model passes more than "
                    "hidden states from block to block, or changes them in between; losa cannot prune this model"
                )

    def _near(self, streamed: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
        """Whether two outputs of the same kernels on the same shapes are equal: a block may add a rounding or two, and
        roundings add up like a random walk."""
        if streamed.shape != expected.shape:
            return False
        if torch.equal(streamed, expected) or not torch.isfinite(expected).all():
            return True  # values that are not finite are reported later, with the linear that meets them first
        bound = 2 * torch.finfo(streamed.dtype).eps * len(self.blocks) ** 0.5
        return _distance(streamed, expected) <= bound + 2 * noise

    def _whole_pass(self, model: nn.Module, batch: Tensor, every: bool = False) -> tuple[list[Call], list[Tensor]]:
        """What each block is called with (a sliding-window model gives each block its own mask), and the output of the
        last block, or of ``every`` block, on the device where hidden states wait. All processes call it together."""
        progress("a pass of the whole model over calibration tokens")
        check()
        count = len(self.blocks)
        calls: dict[int, Call] = {}
        outputs: dict[int, Tensor] = {}

        def before(index):
            def hook(_module, args, kwargs):
                calls[index] = split_call(args, kwargs)[1]

            return hook

        def after(index):
            def hook(_module, _args, output):
                hidden = hidden_of(output)
                calls[index] = replace(calls[index], returned=with_hidden(output, hidden.new_empty(0)))
                if every or index == count - 1:
                    outputs[index] = hidden.to(self.storage, copy=True)

            return hook

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after(index)).remove)
            _forward(model, batch.to(self.device))
        missing = [i for i in range(count) if i not in calls]
        if missing:
            raise ModelError(f"blocks {missing} are not reached by a forward pass")
        return [calls[i] for i in range(count)], [outputs[i] for i in sorted(outputs)]

    def _capture_first(self, model, batch: Tensor) -> tuple[Tensor, Call]:
        """What the first block is called with."""
        seen = []

        def hook(_module, args, kwargs):
            seen.append(split_call(args, kwargs))
            raise _Stop

        # Before the hook that makes a block whole: processes capture different numbers of batches.
        first = not is_whole(self.blocks[0])
        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        try:
            _forward(model, batch.to(self.device))
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0]

    @property
    def nbytes(self) -> int:
        """Bytes of hidden states that this process holds."""
        return sum(h.numel() * h.element_size() for h in self.hidden)

    def __len__(self) -> int:
        return len(self.hidden)

    def run(self, index: int) -> Iterator[Tensor]:
        """Yield block ``index``'s output for each of this process's batches, (batch, length, hidden), on the model's
        device. No collective call is made."""
        start = self.samples.start
        for hidden, shape, own in zip(self.hidden, self._shapes, self._own, strict=True):
            call = (own or self._calls[shape])[index]
            self.position = f"samples {start}..{start + len(hidden) - 1}"
            start += len(hidden)
            # A copy always: a block may work in its input's memory, and a stream is read more than once.
            yield call.run(self.blocks[index], hidden.to(self.device, non_blocking=True, copy=True))

    def advance(self, index: int, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Replace every hidden state by block ``index``'s output, batch by batch, as ``run`` gives it. Before that,
        ``see`` gets a batch's hidden states, where they wait, and the output."""
        first = 0
        for position, output in enumerate(self.run(index)):
            if see is not None:
                see(self.hidden[position], output)
            self.hidden[position] = self._stored(first, output)
            first += len(output)

    def take(self, samples: Sequence[int]) -> Tensor:
        """Present hidden states of some of this process's samples, by their numbers among all samples: a new tensor
        (batch, length, hidden) on the model's device."""
        places = (divmod(sample - self.samples.start, self._batch_size) for sample in samples)
        rows = [self.hidden[batch][row].to(self.device, non_blocking=True) for batch, row in places]
        return torch.stack(rows)

    def run_on(self, index: int, hidden: Tensor) -> Tensor:
        """Block ``index``'s output for hidden states (batch, length, hidden) on the model's device, in whose memory the
        block may work. ``batch``: the stream's own batch size, or one of ``other_sizes``. Gradients are taken where the
        caller enables them. No collective call is made. Raises ModelError for blocks whose arguments depend on the
        tokens, which these hidden states may not belong to."""
        if any(self._own):
            raise ModelError(
                f"{self.names[index]}: its arguments besides hidden states depend on the tokens; it cannot be run on "
                "samples in another order, as reconstruction does"
            )
        return self._calls[_shape(hidden)][index].run(self.blocks[index], hidden)

    def gram(self, slice_features: int = 1 << 22) -> Tensor:
        """Centred Gram (samples, samples) fp32 of the present hidden states of all processes, a sample's features being
        all its positions and channels (Eq. 6). All processes call it together.

        Args:
            slice_features: numbers that are brought together at a time: of all samples in one process, of the process
                with most samples where there are several.

        Raises:
            ValueError: in every process, when hidden states are not finite.
        """
        if process_count() > 1:
            return self._gram_of_all(slice_features)
        out: Tensor | None = None
        if self._held is not None:
            for features in self._held.features():
                out = gram(features, out=out)
            assert out is not None
            return out
        columns, samples = self.hidden[0][0].numel(), self._counts[0]
        width = max(1, slice_features // samples)
        for start in range(0, columns, width):
            out = gram(self._features(start, start + width), out=out)
        assert out is not None
        return out

    def _gram_of_all(self, slice_features: int) -> Tensor:
        own = (self.hidden[0][0].numel(), self.hidden[0].dtype) if self.hidden else None
        columns, dtype = next(found for found in from_everyone(own) if found is not None)

        def features(start: int, end: int) -> Tensor:
            if not self.hidden:
                return torch.empty(0, end - start, dtype=dtype, device=self.device)
            return self._features(start, end) if self._held is None else self._held.columns(start, end)

        return gram_of_all(features, self._counts, columns, max(1, slice_features // max(self._counts)))

    def gram_of_tokens(self, most: int = COMPARED_TOKENS) -> Tensor:
        """Centred Gram (tokens, tokens) fp32 of the present hidden states of single tokens, each divided by its root
        mean square. The tokens lie evenly in the samples of all processes, which call it together.

        Args:
            most: how many tokens there are at most; no fewer than the samples.

        Raises:
            ValueError: in every process, when hidden states are not finite.
        """
        own = self.hidden[0].shape[1:] if self.hidden else None
        length, hidden = next(shape for shape in from_everyone(own) if shape is not None)
        each = min(length, most // sum(self._counts))
        # The middles of equal parts: the first token often has a size of its own.
        positions = (2 * torch.arange(each) + 1) * length // (2 * each)
        tokens = [h[:, positions.to(h.device)].flatten(0, 1).to(self.device).float() for h in self.hidden]
        mine = torch.cat(tokens) if tokens else torch.empty(0, hidden, device=self.device)
        size = mine.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(mine.dtype).tiny)
        mine = mine / size
        rows = [each * count for count in self._counts]
        return gram_of_all(lambda start, end: mine[:, start:end], rows, hidden, hidden)

    def _features(self, start: int, end: int) -> Tensor:
        """Columns of the features of this process's samples, brought together on the device."""
        return torch.cat([h.flatten(1)[:, start:end] for h in self.hidden]).to(self.device)


def _shape(batch: Tensor) -> tuple[int, int]:
    return len(batch), batch.shape[1]


def _keeps_streams(device: torch.device) -> bool:
    """Whether hidden states may stay on the model's device, or wait in pinned memory."""
    return device.type == "cuda"


def _distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinity where it is not a finite number."""
    distance = (torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())).item()
    return distance if math.isfinite(distance) else math.inf
