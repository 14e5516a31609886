"""Masked-LoRA layers: what they compute, what they share, what they survive (resizing, loading, copying)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels import pack_mask
from tests.helpers.layers import IN, OUT, RANK, SCALING, assert_close_to_plain, effective, inputs, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_masked_formula(dtype, bias):
    layer, _ = make(dtype=dtype, bias=bias)
    x = inputs(dtype=dtype)
    offset = layer.bias.double() if bias else None
    truth = F.linear(x.double(), effective(layer), offset)
    plain = F.linear(x, effective(layer, torch.float32).to(dtype), layer.bias)
    y = layer(x)
    assert y.dtype == dtype
    assert_close_to_plain(y, plain, truth)


def test_only_the_adapter_gets_gradients():
    layer, _ = make()
    x = inputs()
    (layer(x) * torch.arange(OUT)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and layer.mask.grad is None

    def gradients(dtype):
        a, b = (p.detach().to(dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B))
        weight = (layer.weight.to(dtype) + SCALING * b @ a) * layer.mask_bool()
        (F.linear(x.to(dtype), weight) * torch.arange(OUT)).sum().backward()
        return a.grad, b.grad

    for name, plain, truth in zip(
        ("lora_A", "lora_B"), gradients(torch.float32), gradients(torch.float64), strict=True
    ):
        assert_close_to_plain(getattr(layer, name).grad, plain, truth)


def test_parameters_are_direct_and_frozen_but_for_the_adapter():
    layer, linear = make()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"weight", "bias", "mask", "lora_A", "lora_B"}
    assert {n for n, p in parameters.items() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not list(layer.children()) and not list(layer.buffers())
    assert layer.mask.dtype == torch.uint8 and layer.mask.shape == (OUT, 6)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_weight_and_bias_keep_their_storage_but_not_their_parameter():
    layer, linear = make()
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    before = linear.weight.detach().clone()
    layer.weight.data = torch.zeros_like(layer.weight)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("in_features", [24, 31, 32, 33, 43])
def test_default_mask_keeps_everything(in_features):
    layer = MaskedLoRALinear.from_linear(nn.Linear(in_features, OUT), RANK)
    assert torch.equal(layer.mask, pack_mask(torch.ones(OUT, in_features, dtype=torch.bool)))
    assert layer.sparsity == 0.0


def test_initialisation():
    def generator():
        return torch.Generator().manual_seed(3)

    linear = nn.Linear(1000, 200)
    layer = MaskedLoRALinear.from_linear(linear, 100, generator=generator())
    again = MaskedLoRALinear.from_linear(linear, 100, generator=generator())
    assert torch.equal(layer.lora_A, again.lora_A)
    assert not layer.lora_B.any()
    # 1e5 draws: the sample deviation lies within 1 % of the true one (4.5 sigma).
    assert layer.lora_A.std().item() == pytest.approx((3 * 1000) ** -0.5, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": OUT + 1}, "rank"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"dropout_p": -0.1}, "dropout_p"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        MaskedLoRALinear.from_linear(nn.Linear(IN, OUT), **settings)


def test_rank_has_the_kernels_limit():
    with pytest.raises(ValueError, match=r"^rank: expected 1\.\.128"):
        MaskedLoRALinear.from_linear(nn.Linear(300, 200), 129)


def test_integer_weight_is_refused():
    with pytest.raises(ValueError, match="^weight: expected floating point"):
        MaskedLoRALinear(torch.zeros(8, 8, dtype=torch.int8), rank=2)


def test_set_mask_takes_bool_or_packed_and_keeps_the_parameter():
    layer, _ = make(masked=False)
    parameter, mask = layer.mask, torch.rand(OUT, IN) < 0.3
    layer.set_mask(mask)
    assert torch.equal(layer.mask_bool(), mask) and layer.mask is parameter
    assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
    layer.set_mask(pack_mask(~mask))
    assert torch.equal(layer.mask_bool(), ~mask) and layer.mask is parameter


def test_empty_rows_give_the_bias():
    layer, _ = make()
    mask = layer.mask_bool()
    mask[3] = False
    layer.set_mask(mask)
    assert torch.equal(layer(inputs())[..., 3], layer.bias[3].expand(2, 5))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(OUT, IN + 1, dtype=torch.bool),
        torch.ones(IN, OUT, dtype=torch.bool),
        torch.ones(OUT, IN),
        torch.zeros(OUT, IN, dtype=torch.uint8),
        torch.full((OUT, 6), 255, dtype=torch.uint8),
    ],
    ids=["shape", "transposed", "float", "unpacked uint8", "padding bits"],
)
def test_bad_masks_are_refused_and_leave_the_old_one(mask):
    layer, _ = make()
    before = layer.mask.clone()
    with pytest.raises(ValueError, match="^mask:"):
        layer.set_mask(mask)
    assert torch.equal(layer.mask, before)


def test_growing_keeps_the_function():
    layer, _ = make()
    with torch.no_grad():  # small integers: sums of their products are exact in any order
        layer.lora_A.copy_(torch.randint(-3, 4, layer.lora_A.shape))
        layer.lora_B.copy_(torch.randint(-3, 4, layer.lora_B.shape))
    a, b, product = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.dense_weight()
    layer.set_rank(7, generator=torch.Generator().manual_seed(1))
    assert layer.rank == 7 and layer.lora_A.shape == (7, IN) and layer.lora_B.shape == (OUT, 7)
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert torch.equal(layer.lora_A[:RANK], a) and torch.equal(layer.lora_B[:, :RANK], b)
    assert layer.lora_A[RANK:].ne(0).all() and not layer.lora_B[:, RANK:].any()
    assert torch.equal(layer.dense_weight(), product)
    other, _ = make()
    other.set_rank(7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other.lora_A[RANK:], layer.lora_A[RANK:])


def test_shrinking_drops_the_smallest_components():
    layer, _ = make()
    with torch.no_grad():
        layer.lora_A.copy_(F.normalize(layer.lora_A, dim=1) * torch.tensor([0.1, 1.0, 3.0, 5.0])[:, None])
        layer.lora_B.copy_(F.normalize(layer.lora_B, dim=0) * torch.tensor([9.0, 0.5, 1.0, 0.1]))
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    layer.set_rank(2)  # sizes 0.9, 0.5, 3, 0.5
    assert torch.equal(layer.lora_A, a[[0, 2]]) and torch.equal(layer.lora_B, b[:, [0, 2]])
    assert layer.lora_A.untyped_storage().nbytes() == 2 * IN * 4
    assert layer.lora_B.is_contiguous() and layer.lora_B.untyped_storage().nbytes() == 2 * OUT * 4


def test_shrinking_an_untrained_adapter_keeps_the_first_rows():
    layer = MaskedLoRALinear.from_linear(nn.Linear(IN, OUT), 6)
    a = layer.lora_A.detach().clone()
    layer.set_rank(4)
    assert torch.equal(layer.lora_A, a[:4])
    parameter = layer.lora_A
    layer.set_rank(4)
    assert layer.lora_A is parameter


@pytest.mark.parametrize("rank", [0, OUT + 1])
def test_set_rank_checks_its_argument(rank):
    layer, _ = make()
    with pytest.raises(ValueError, match="^rank: expected 1..24"):
        layer.set_rank(rank)
    assert layer.rank == RANK


def test_dense_weight_is_fp32_and_unmasked():
    layer, linear = make(dtype=torch.bfloat16)
    dense = layer.dense_weight()
    plain = linear.weight.float() + SCALING * (layer.lora_B @ layer.lora_A)
    truth = layer.weight.double() + SCALING * layer.lora_B.double() @ layer.lora_A.double()
    assert dense.dtype == torch.float32 and not dense.requires_grad
    assert_close_to_plain(dense, plain.detach(), truth.detach())


def test_merged_linear_computes_the_same():
    layer, _ = make()
    x = inputs()
    truth = F.linear(x.double(), effective(layer), layer.bias.double())
    plain = F.linear(x, effective(layer, torch.float32), layer.bias)
    assert_close_to_plain(layer.merge()(x), plain, truth)


def test_unwrap_gives_the_original_bits():
    layer, linear = make()
    back = layer.unwrap()
    assert type(back) is nn.Linear
    assert back.weight.data_ptr() == linear.weight.data_ptr() and torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)


def test_replacing_the_weight_leaves_the_wrapped_linear():
    layer, linear = make(dtype=torch.bfloat16)
    before, new = linear.weight.detach().clone(), torch.randn(OUT, IN)
    assert not layer.weight_replaced
    layer.replace_weight(new)
    assert layer.weight_replaced and layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad
    assert torch.equal(layer.unwrap().weight, new.bfloat16()) and torch.equal(linear.weight, before)
    with pytest.raises(ValueError, match=r"^weight: expected \(24, 43\), got \(43, 24\)"):
        layer.replace_weight(new.T)
    assert torch.equal(layer.weight, new.bfloat16())


def test_training_flag_follows():
    linear = nn.Linear(IN, OUT).eval()
    layer = MaskedLoRALinear.from_linear(linear, RANK)
    assert not layer.training and not layer.merge().training and not layer.unwrap().training
    assert layer.train().merge().training


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored_rank", [2, RANK, 9])
def test_state_dict_of_any_rank_loads(stored_rank, assign):
    stored, _ = make(seed=1)
    stored.set_rank(stored_rank)
    layer, _ = make(seed=2)
    source, target = nn.Sequential(stored), nn.Sequential(layer)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert layer.rank == stored_rank and layer.lora_A.requires_grad and not layer.weight.requires_grad
    for name, value in stored.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    assert torch.equal(target(inputs()), source(inputs()))


def test_loading_does_not_reach_the_wrapped_linear():
    layer, linear = make(seed=1)
    before, stored = copy.deepcopy(linear.state_dict()), make(seed=2)[0].state_dict()
    layer.load_state_dict({"lora_A": stored["lora_A"]}, strict=False)
    layer.load_state_dict(stored)
    assert not torch.equal(layer.weight, linear.weight)
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())


def test_adapter_alone_loads_without_strict():
    stored, _ = make(seed=1)
    stored.set_rank(9)
    layer, linear = make(seed=2)
    adapter = {k: v for k, v in stored.state_dict().items() if k.startswith("lora_")}
    missing, unexpected = layer.load_state_dict(adapter, strict=False)
    assert set(missing) == {"weight", "bias", "mask"} and not unexpected
    assert torch.equal(layer.lora_B, stored.lora_B) and layer.weight.data_ptr() == linear.weight.data_ptr()


def test_state_dict_of_another_shape_is_refused():
    layer, _ = make()
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(make(in_features=48)[0].state_dict())
    state = layer.state_dict()
    state["lora_A"] = torch.zeros(6, IN)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(state)
    assert layer.rank == RANK


def test_dtype_conversion_leaves_the_mask():
    layer, _ = make()
    mask = layer.mask.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.lora_A.dtype == torch.bfloat16 and torch.equal(layer.mask, mask)
    layer.set_rank(6)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    assert layer(inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device():
    with torch.device("meta"):
        linear = nn.Linear(IN, OUT)
    layer = MaskedLoRALinear.from_linear(linear, RANK)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(make()[0].state_dict())
    assert torch.equal(layer(inputs()), make()[0](inputs()))


def test_repr_says_what_it_is():
    assert repr(make()[0]) == "MaskedLoRALinear(in_features=43, out_features=24, rank=4, scaling=2, bias=True)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_moves():
    layer, _ = make()
    expected = layer(inputs())
    layer.cuda()
    assert {p.device.type for p in layer.parameters()} == {"cuda"}
    truth = F.linear(inputs().double(), effective(layer.cpu()), layer.bias.double())
    assert_close_to_plain(layer.cuda()(inputs().cuda()).cpu(), expected, truth)
    layer.set_rank(8, generator=torch.Generator().manual_seed(0))
    layer.set_mask(torch.ones(OUT, IN, dtype=torch.bool))
    assert layer.lora_A.is_cuda and layer.sparsity == 0.0
