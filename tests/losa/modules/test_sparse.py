"""A packed layer and its state dict."""

from __future__ import annotations

import copy

import torch

from losa.modules.sparse import SparseLinear
from losa.packed.weights import pack_weight


def test_state_dict_of_a_packed_layer_loads():
    weight = torch.randn(8, 16) * (torch.rand(8, 16) > 0.5)
    layer = SparseLinear(pack_weight(weight, "bitmask"), torch.randn(8))
    other = copy.deepcopy(layer)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(other(x), layer(x)) and "sparsity=0." in repr(other)
