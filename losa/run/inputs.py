"""Whether a recipe's data suits its model, before anything is computed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor, nn

from losa.errors import DataError

if TYPE_CHECKING:
    from losa.data.sequences import PackedData
    from losa.recipe.sections import Recipe
from losa.model.limits import check_ids, check_length
from losa.recipe.rates import compares_samples

logger = logging.getLogger("losa")


def check_inputs(
    model: nn.Module, recipe: Recipe, calibration: Tensor, training: PackedData | None, windows: Tensor | None
) -> None:
    """Everything that a run feeds to its model, before any forward pass: ``calibration`` (samples, length), training
    sequences and evaluation ``windows`` (windows, length). Warns of settings that ask for more than there is.

    Raises:
        ModelError: too few positions or embeddings.
        DataError: samples that are to be compared are all the same.
    """
    sequences = None if training is None else training.input_ids
    for section, ids in (("calibration", calibration), ("train", sequences), ("evaluate", windows)):
        if ids is not None:
            check_length(model, ids.shape[1], f"{section}.length")
            check_ids(model, ids, f"{section}.data")
    compares = "losa" in (recipe.method, *recipe.compare) and compares_samples(recipe.allocation.rates)
    compared = calibration[: recipe.calibration.cka_samples]
    if compares and bool((compared == compared[0]).all()):
        raise DataError(
            f"calibration.data: all {len(compared)} samples are the same text, so that allocation.rates "
            f"{recipe.allocation.rates!r} has nothing to compare; give other text, or set allocation.rates: uniform"
        )
    for line in _more_than_there_is(recipe, compares, training, windows):
        logger.warning(line)


def _more_than_there_is(recipe: Recipe, compares: bool, training: PackedData | None, windows: Tensor | None):
    from losa.algorithm.schedule import sequences_per_round

    c, t, e, rounds = recipe.calibration, recipe.train, recipe.evaluate, recipe.rounds
    # Defaults are nobody's wish.
    if compares and "cka_samples" in c.model_fields_set and c.cka_samples > c.samples:
        yield f"calibration.cka_samples: {c.cka_samples}, but there are {c.samples} samples; all of them are compared"
    if c.batch_size > c.samples:
        yield f"calibration.batch_size: {c.batch_size}, but there are {c.samples} samples; all are one batch"
    if training is not None:
        count, step = len(training), t.batch_size * t.gradient_accumulation
        if count < step:
            yield (
                f"train.batch_size: {t.batch_size} x gradient_accumulation {t.gradient_accumulation} are {step} "
                f"sequences a step, but there are {count}; steps are smaller"
            )
        if rounds.schedule != "oneshot" and "losa" in (recipe.method, *recipe.compare):
            idle = sequences_per_round(rounds.count, count, t.round_share).count(0)
            if idle:
                yield f"rounds.count: {rounds.count}, but there are {count} sequences; the first {idle} train on none"
            elif t.round_share * rounds.count > 1 + 1e-9:
                yield (
                    f"train.round_share: {rounds.count} rounds of {t.round_share:g} are more than all the data; "
                    f"each gets 1/{rounds.count}"
                )
    if windows is not None and e.max_windows is not None and e.max_windows > len(windows):
        yield f"evaluate.max_windows: {e.max_windows}, but the text has {len(windows)}"
