"""Forward passes of a whole model, however it is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from losa.distributed.sharding import gathered_calls, sharding_of
from losa.model.blocks import find_blocks


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Within the context the model can run without gradients. Processes that hold it in shards make the same calls:
    each decoder block is whole while it runs (``gathered_calls``). A model that is whole runs even if its blocks cannot
    be found."""
    if sharding_of(model) is None:
        yield
        return
    with gathered_calls(model, find_blocks(model)):
        yield
