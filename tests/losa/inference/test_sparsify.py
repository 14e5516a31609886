"""Packed models: surgery there and back, grouped rows, loaded values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from losa.errors import ModelError
from losa.inference.decoding import LeanDecoder
from losa.inference.generation import generate
from losa.inference.sparsify import densify, sparsify
from losa.model.wrapping import sparsity_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear
from losa_kernels.tensors import as_bits
from tests.helpers.tiny import assert_same_function, logits, tiny_llama, tiny_tokenizer, wrap


def test_sparsify_and_back(merged):
    dense, expected, zeros = copy.deepcopy(merged), logits(merged), sparsity_of(merged)
    sparsify(merged)
    packed = [m for m in merged.modules() if isinstance(m, SparseLinear)]
    assert len(packed) == 14 and not any(isinstance(m, nn.Linear) for m in merged.model.modules())
    assert_same_function(logits(merged), expected)
    assert sparsity_of(merged) == zeros
    densify(merged)
    for (name, ours), theirs in zip(merged.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(as_bits(ours), as_bits(theirs)), name


def test_groups_share_memory_and_moving_unshares(merged):
    sparsify(merged)
    attention = merged.model.layers[0].self_attn
    group = attention.q_proj.group
    assert group is attention.k_proj.group is attention.v_proj.group and attention.o_proj.group is None
    x = torch.randn(3, 32)
    together = nn.functional.linear(x, group.unpack())
    apart = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    assert (together - apart).abs().max() <= 64 * torch.finfo(torch.float32).eps * apart.abs().max()
    storage = attention.q_proj.packed.values.untyped_storage().data_ptr()
    assert storage == attention.v_proj.packed.values.untyped_storage().data_ptr() == group.values.data_ptr()
    merged.to(torch.bfloat16)
    assert attention.q_proj.group is None and attention.q_proj.packed.dtype == torch.bfloat16
    assert attention.q_proj(x.bfloat16()).dtype == torch.bfloat16


def test_dense_and_wrapped_models_are_refused(merged):
    with pytest.raises(ModelError, match="none of 14 linears has 20% zeros"):
        sparsify(tiny_llama(layers=2))
    model = tiny_llama(layers=2)
    wrap(model)
    with pytest.raises(ModelError, match="merge_model first"):
        sparsify(model)
    last = merged.model.layers[-1].mlp
    last.down_proj = MaskedLoRALinear.from_linear(last.down_proj, rank=1)
    with pytest.raises(ModelError, match="mlp.down_proj is a MaskedLoRALinear"):
        sparsify(merged)
    assert not any(isinstance(module, SparseLinear) for module in merged.modules())


def test_a_loaded_weight_is_another_object(merged):
    """What kernels hang on a packed weight was made from the values before, though they were copied in place."""
    model = sparsify(merged)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.model.layers[0].self_attn.q_proj
    before, values = layer.packed, layer.values
    assert layer.group is not None
    ids = generate(model, tiny_tokenizer(), "hello", max_new_tokens=4, stop_at_eos=False).tokens
    layer.load_state_dict({}, strict=False)
    assert layer.packed is before and layer.group is not None
    model.load_state_dict(state)
    assert layer.values is values and layer.packed is not before and layer.group is None
    LeanDecoder(model, 4)  # puts them together again, in memory that can be loaded into
    assert layer.group is not None and not layer.values.is_inference()
    model.load_state_dict(state)
    assert generate(model, tiny_tokenizer(), "hello", max_new_tokens=4, stop_at_eos=False).tokens == ids
