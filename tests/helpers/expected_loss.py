"""A tiny model, calibration samples, and an engine whose rates make the expected loss least."""

from __future__ import annotations

import torch

from losa.algorithm.engine import Engine
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from tests.helpers.tiny import tiny_llama, wrap

IDS = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(1))
LAYERS = 3
COMPARED = 3


def build(prune=None, **allocation):
    model = tiny_llama(layers=LAYERS)
    wrap(model)
    return model, engine_of(model, prune, **allocation)


def engine_of(model, prune=None, **allocation):
    allocation = AllocationConfig(**({"mean_rank": 4, "rank_max": 12, "rates": "fisher"} | allocation))
    calibration = CalibrationConfig(data="unused", samples=4, length=24, cka_samples=COMPARED, batch_size=2)
    return Engine(model, IDS, PruneConfig(**(prune or {"sparsity": 0.5})), allocation, calibration)
