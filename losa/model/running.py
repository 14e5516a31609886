"""Forward passes of a whole model, however it is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from losa.distributed.sharding import gathered_calls, is_whole
from losa.model.blocks import find_blocks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Within the context the model can run without gradients. Of a model that is in shards or offloaded, each decoder
    block is whole while it runs (``gathered_calls``), and processes that hold it in shards make the same calls. A model
    that is whole runs even if its blocks cannot be found."""
    if is_whole(model):
        yield
        return
    with gathered_calls(model, find_blocks(model)):
        yield
