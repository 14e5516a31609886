"""When the host waits for the device: a step that writes nothing down waits for nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import masking_utils

from losa.data.sequences import IGNORED, PackedData
from losa.errors import NumericsError
from losa.recipe.training import TrainConfig
from losa.training.loss import TokenLoss
from losa.training.metrics import Metrics
from losa.training.packing_check import packing_checked_once
from losa.training.steps import Step, StepLog, moment
from losa.training.trainer import Trainer
from tests.helpers.training import LENGTH, adapters, break_training, lines, sequences, trainer, untimed, wrapped_llama

# Operators whose result the host must see before it goes on, and methods that copy a tensor to the host.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
COPYING = ("tolist", "cpu", "numpy")


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for its GPU. On a CPU the same operators run."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in COPYING:
            self.patch.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def noting(self, name, method):
        def noted(*arguments, **options):
            self.seen.append(name)
            return method(*arguments, **options)

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.removeprefix("aten::").startswith(WAITING) or indexed:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def train(monkeypatch, directory, steps_a_reading: int, **settings):
    """12 steps of 2 sequences, watched: (waits by step, outcome, model)."""
    waits: list[list[str]] = []
    step = Trainer._step

    def watched(*arguments):
        with Waits() as watch:
            found = step(*arguments)
        waits.append(watch.seen)
        return found

    monkeypatch.setattr(Trainer, "_step", watched)
    model = wrapped_llama()
    run = trainer(model, directory, total=24, batch_size=2, learning_rate=1e-2, max_grad_norm=0.5, **settings)
    run.fused, run.steps_a_reading = True, steps_a_reading  # as on a GPU
    return waits, run.train(sequences(24), round_index=1), model


@pytest.mark.parametrize("accumulation", [1, 3])
def test_no_step_waits(monkeypatch, tmp_path, accumulation):
    waits, outcome, _ = train(monkeypatch, tmp_path, 5, gradient_accumulation=accumulation)
    # transformers looks at the positions of each new shape.
    assert outcome.steps == len(waits) == 12 // accumulation and len(waits[0]) <= 1
    assert not any(waits[1:])
    assert masking_utils.find_packed_sequence_indices.__name__ == "find_packed_sequence_indices"


ALONE, PACKED = torch.arange(5)[None], torch.tensor([[0, 1, 2, 0, 1]])


def look(position_ids):
    found = masking_utils.find_packed_sequence_indices(position_ids)
    return None if found is None else found.tolist()


def test_positions_that_start_anew_are_still_found():
    """Only the answer that nothing starts anew is kept, for its shape and for the context's own thread."""
    known = set()
    with packing_checked_once(known):
        assert look(PACKED) == look(PACKED) == [[0, 0, 0, 1, 1]] and not known
        assert look(ALONE) is look(ALONE) is None and len(known) == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(look, PACKED).result() == [[0, 0, 0, 1, 1]]
    assert look(PACKED) == [[0, 0, 0, 1, 1]]


def test_contexts_may_end_in_any_order(monkeypatch):
    own = masking_utils.find_packed_sequence_indices
    first, second = packing_checked_once(set()), packing_checked_once(set())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert masking_utils.find_packed_sequence_indices is own
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with packing_checked_once(set()):
        assert not hasattr(masking_utils, "find_packed_sequence_indices")


def test_a_loss_of_ones_own_may_number_positions_anew():
    """What TokenLoss has seen of a shape is not the answer to position ids that a loss gives itself."""
    seen = []

    class Numbered(nn.Module):
        def __init__(self, model, autocast):
            super().__init__()
            self.tokens = TokenLoss(model, autocast)

        def forward(self, input_ids, positions, targets):
            loss = self.tokens(input_ids, positions, targets)
            seen.append(look(torch.arange(input_ids.shape[1]).remainder(7).expand_as(input_ids)))
            return loss

    config = TrainConfig(data="unused", length=LENGTH, batch_size=4)
    data = sequences(8)
    model = wrapped_llama()
    Trainer(model, config, seed=0, output_dir=None, total_sequences=8, device="cpu", loss_factory=Numbered).train(
        data, round_index=1
    )
    assert seen == [[[0] * 7 + [1] * (LENGTH - 7)] * 4] * 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: float(t.sum()),
        lambda t: bool(t.any()),
        lambda t: t[0].item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t + 1),
    ],
)
def test_the_watch_sees_what_waits(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.seen


def test_steps_that_are_read_together_are_written_as_if_read_one_by_one(monkeypatch, tmp_path):
    found = {}
    for together in (1, 5, 100):
        with monkeypatch.context() as patch:
            _, outcome, model = train(patch, tmp_path / str(together), together)
        written = untimed(tmp_path / str(together))
        found[together] = (written, outcome.loss, outcome.steps, [p.tolist() for p in adapters(model)])
        assert [line["step"] for line in written] == list(range(1, 13))
    assert found[1] == found[5] == found[100]


class Event:
    """A CUDA event on a stream whose clock is set by hand, in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "the device's stream"
        self.at = Event.now

    def elapsed_time(self, later):
        return later.at - self.at


def test_steps_that_are_read_together_have_a_time_each(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the device's stream")
    metrics = Metrics(tmp_path, tensorboard=False)
    with metrics.open(0), StepLog(1, metrics, tqdm(disable=True), together=3) as log:
        for index, milliseconds in enumerate((20, 50, 40, 10), 1):
            began = moment(torch.device("cuda"))
            Event.now += milliseconds
            ended = moment(torch.device("cuda"))
            log.add(Step(index, "", 5, 5, 100, 0.1, torch.ones(1), torch.tensor(1.0), began, ended))
            Event.now += 7
    assert [line["tokens_per_s"] for line in lines(tmp_path)] == pytest.approx([5000, 2000, 2500, 10000])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory"), NumericsError("worse")])
def test_steps_before_an_error_are_written_down(monkeypatch, tmp_path, error):
    step = Trainer._step
    run = trainer(wrapped_llama(), tmp_path, total=24, batch_size=2)
    run.fused, run.steps_a_reading = True, 10  # as on a GPU

    def fails(*arguments):
        if run.global_step == 4:
            raise error
        return step(*arguments)

    monkeypatch.setattr(Trainer, "_step", fails)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        run.train(sequences(24), round_index=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_numbers_are_read_so_many_steps_at_a_time(monkeypatch, tmp_path):
    together = []
    read = StepLog.read

    def spy(log):
        if log._unread:
            together.append(len(log._unread))
        read(log)

    monkeypatch.setattr(StepLog, "read", spy)
    train(monkeypatch, tmp_path, 5)
    assert together == [5, 5, 2]


@pytest.mark.parametrize("broken", ["loss", "gradient norm"])
def test_a_broken_step_changes_nothing_though_it_is_read_later(tmp_path, broken):
    """Step 4 is broken; steps 5 and 6 are taken before anyone reads it."""
    data = sequences(16)
    data = PackedData(data.input_ids, data.input_ids.clone())
    whole = wrapped_llama()
    first_three = trainer(whole, total=16, batch_size=2, lr_schedule="global")
    first_three.fused = True
    first_three.train(data.slice(0, 6), round_index=1)

    model = wrapped_llama()
    break_training(model, data, broken, row=6, backward=4)
    run = trainer(model, tmp_path, total=16, batch_size=2, lr_schedule="global")
    run.fused, run.steps_a_reading = True, 6  # as on a GPU
    with pytest.raises(NumericsError, match=rf"the {broken} is (nan|inf) in round 1, step 4 of 8; lower train"):
        run.train(data, round_index=1)
    assert run.global_step == 6 and [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    for ours, expected in zip(adapters(model), adapters(whole), strict=True):
        assert torch.equal(ours, expected)


def test_no_state_is_made_of_a_broken_step(tmp_path):
    """To make a state reads the steps that nobody has read, and those without labels count in its position."""
    data = sequences(16)
    data = PackedData(data.input_ids, data.input_ids.clone())
    data.labels[2:4] = IGNORED
    model = wrapped_llama()
    break_training(model, data, "loss", row=6, backward=4)
    run = trainer(model, tmp_path, total=16, batch_size=2)
    run.fused, run.steps_a_reading = True, 10  # as on a GPU
    positions = []
    with pytest.raises(NumericsError, match="round 1, step 4 of 8"):
        run.train(data, round_index=1, after_step=lambda done: positions.append(done.state().position))
    assert [(p.step, p.steps) for p in positions] == [(1, 1), (2, 1), (3, 2)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 3] and run.global_step == 4


def test_steps_without_labels_at_the_end_do_not_lose_the_numbers_before(tmp_path):
    data = sequences(12)
    data.labels[8:] = IGNORED
    run = trainer(wrapped_llama(), tmp_path)
    run.fused, run.steps_a_reading = True, 3  # as on a GPU
    outcome = run.train(data, round_index=1)
    assert outcome.steps == 2 and [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_loss_of_ones_own(tmp_path):
    """It is made anew each round, from the model and autocast's dtype, and trains the adapters."""
    made = []

    class Doubled(nn.Module):
        def __init__(self, model, autocast):
            super().__init__()
            self.tokens = TokenLoss(model, autocast)
            made.append(autocast)

        def forward(self, input_ids, positions, targets):
            assert len(positions) == len(targets) and int(positions.max()) < input_ids.numel()
            return 2 * self.tokens(input_ids, positions, targets)

    settings = {"batch_size": 16, "max_grad_norm": 1e9}
    config = TrainConfig(data="unused", length=LENGTH, **settings)
    results = []
    for factory in (TokenLoss, Doubled):
        model = wrapped_llama()
        run = Trainer(model, config, seed=0, output_dir=None, total_sequences=16, device="cpu", loss_factory=factory)
        losses = [run.train(sequences(16), round_index=1).loss]
        results.append((losses, [p.grad for p in adapters(model)]))
    assert made == [None]
    assert results[1][0][0] == pytest.approx(2 * results[0][0][0], rel=1e-6)
    for doubled, plain in zip(results[1][1], results[0][1], strict=True):
        assert torch.allclose(doubled, 2 * plain, rtol=1e-4, atol=1e-7)
