"""Everything that a recipe's methods are fed, read and checked before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from losa.algorithm.schedule import sequences_per_round
from losa.data.sequences import PackedData
from losa.data.tokens import calibration_tokens, evaluation_tokens, training_sequences
from losa.distributed.processes import check_agreement, is_main, process_count
from losa.distributed.watch import progress
from losa.errors import DataError
from losa.evaluation.perplexity import evaluation_windows, perplexity, warn_of_missing_start, window_start
from losa.model.block_calls import Call
from losa.model.limits import check_ids, check_length
from losa.recipe.sections import Recipe
from losa.run.fingerprint import CALIBRATION, EVALUATION, TRAINING, tensor_digest

logger = logging.getLogger("losa")

Evaluator = Callable[[nn.Module], float | None]


@dataclass
class Inputs:
    """What every method gets: tokens on the host and a way to measure perplexity.

    ``calibration``: (samples, length) int64. ``fingerprint``: digests of all that the results depend on apart from
    the recipe, by what it is of; a resume state belongs to it. ``calls``: what the model's blocks are called with
    (``BlockStream``), the same for all methods. ``protocol``: how perplexity is measured, for the record; None without
    a text to measure on.
    """

    calibration: Tensor
    training: PackedData | None
    evaluate: Evaluator
    fingerprint: dict[str, str] = field(default_factory=dict)
    calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)
    protocol: dict | None = None


def read_inputs(recipe: Recipe, model: nn.Module, tokenizer) -> Inputs:
    """Tokenize the recipe's texts. Warns of settings that ask for more than there is. All processes call it together.

    Raises:
        DataError: a source cannot be read or holds too little, or the samples to compare are all the same.
        ModelError: the texts do not suit the model.
        OutputError: the processes read other texts.
    """
    c, t, e = recipe.calibration, recipe.train, recipe.evaluate
    progress("reading calibration.data")
    calibration = calibration_tokens(c.data, tokenizer, c.samples, c.length, recipe.seed)
    training = None
    if t is not None:
        progress("reading train.data")
        training = training_sequences(t.data, tokenizer, t.length, recipe.seed, t.train_on, t.max_tokens)
    fingerprint = {CALIBRATION: tensor_digest(calibration)}
    if training is not None:
        fingerprint[TRAINING] = tensor_digest(training.input_ids, training.labels)
    tokens = None
    if e is not None:
        progress("reading evaluate.data")
        tokens = evaluation_tokens(e.data, tokenizer)
        fingerprint[EVALUATION] = tensor_digest(tokens)
    # What follows may run the model, which the processes must do alike.
    for what, digest in fingerprint.items():
        check_agreement(what, digest)
    if e is None or tokens is None:
        check_inputs(model, recipe, calibration, training, None)
        return Inputs(calibration, training, lambda model: None, fingerprint)
    bos = window_start(tokenizer, "evaluate.bos_per_window") if e.bos_per_window else None
    windows = evaluation_windows(tokens, e.length, e.max_windows, bos)
    check_inputs(model, recipe, calibration, training, windows)
    if bos is None:
        progress("looking at the start of windows")
        warn_of_missing_start(model, tokenizer, tokens, e.length)
    text = len(windows) * (e.length - (bos is not None))
    protocol = {"data": e.data.model_dump(), "length": e.length, "windows": len(windows), "tokens": text}
    if bos is not None:
        protocol["bos_per_window"] = True

    def evaluate(model: nn.Module) -> float:
        return perplexity(model, tokens, e.length, e.batch_size, e.max_windows, bos=bos).value

    return Inputs(calibration, training, evaluate, fingerprint, protocol=protocol)


def check_inputs(
    model: nn.Module, recipe: Recipe, calibration: Tensor, training: PackedData | None, windows: Tensor | None
) -> None:
    """Whether the texts suit the model, before any forward pass: ``calibration`` (samples, length), training sequences
    and evaluation ``windows`` (windows, length). Warns of settings that ask for more than there is.

    Raises:
        ModelError: too few positions or embeddings.
        DataError: samples that are to be compared are all the same.
    """
    sequences = None if training is None else training.input_ids
    for section, ids in (("calibration", calibration), ("train", sequences), ("evaluate", windows)):
        if ids is not None:
            check_length(model, ids.shape[1], f"{section}.length")
            check_ids(model, ids, f"{section}.data")
    compared = calibration[: recipe.calibration.cka_samples]
    if recipe.compares_samples and bool((compared == compared[0]).all()):
        raise DataError(
            f"calibration.data: all {len(compared)} samples are the same text, so that allocation.rates "
            f"{recipe.allocation.rates!r} has nothing to compare; give other text, or set allocation.rates: uniform"
        )
    if is_main():
        for line in _more_than_there_is(recipe, training, windows):
            logger.warning(line)


def _more_than_there_is(recipe: Recipe, training: PackedData | None, windows: Tensor | None) -> Iterator[str]:
    c, t, e, rounds = recipe.calibration, recipe.train, recipe.evaluate, recipe.rounds
    # Only a setting that the recipe states is worth a warning: nobody wished for a default.
    if recipe.compares_samples and "cka_samples" in c.model_fields_set and c.cka_samples > c.samples:
        yield f"calibration.cka_samples: {c.cka_samples}, but there are {c.samples} samples; all of them are compared"
    batches, processes = -(-c.samples // c.batch_size), process_count()
    if batches < processes:
        yield (
            f"calibration.batch_size: {c.batch_size} makes {batches} batches of {c.samples} samples; "
            f"{processes - batches} of {processes} processes have none to run"
        )
    elif c.batch_size > c.samples:
        yield f"calibration.batch_size: {c.batch_size}, but there are {c.samples} samples; all are one batch"
    if training is not None and t is not None:
        count, step = len(training), t.batch_size * t.gradient_accumulation
        if count < step:
            yield (
                f"train.batch_size: {t.batch_size} x gradient_accumulation {t.gradient_accumulation} are {step} "
                f"sequences a step, but there are {count}; steps are smaller"
            )
        if rounds.schedule != "oneshot" and any(method.dynamic for method in recipe.methods.values()):
            idle = sequences_per_round(rounds.count, count, t.round_share).count(0)
            if idle:
                yield f"rounds.count: {rounds.count}, but there are {count} sequences; the first {idle} train on none"
            elif t.round_share * rounds.count > 1 + 1e-9:
                yield (
                    f"train.round_share: {rounds.count} rounds of {t.round_share:g} are more than all the data; "
                    f"each gets 1/{rounds.count}"
                )
    if windows is not None and e is not None and e.max_windows is not None and e.max_windows > len(windows):
        yield f"evaluate.max_windows: {e.max_windows}, but the text has {len(windows)}"
