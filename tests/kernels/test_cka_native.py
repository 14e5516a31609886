"""The CPU's Gram on every instruction set, and what torch.compile makes of the operators."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import cka_similarity, gram, native

EPS = torch.finfo(torch.float32).eps


def truth(features):
    features = features.double() - features.double().mean(-2, keepdim=True)
    return features @ features.mT


# Tiles cut short, panels and slices cut short, several slices, more slices than are kept apart.
SHAPES = [(2, 1), (3, 17), (4, 500), (6, 9000), (63, 1023), (64, 5000), (65, 1025), (256, 700), (200, 33_000)]


@pytest.mark.parametrize("samples, columns", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_fp64(isa, samples, columns, dtype):
    layers = 1 if columns > 10_000 else 3
    features = torch.randn(layers, samples, columns).to(dtype)
    expected = truth(features)
    # Chains of 128 products in fp32, then the mean's own rounding; fp64 beyond.
    bound = (128 + samples) * EPS * expected.diagonal(dim1=1, dim2=2).amax()
    got = gram(features)
    assert (got.double() - expected).abs().max() <= bound
    assert torch.equal(got, got.mT)
    for layer in range(layers):
        assert torch.equal(gram(features[layer]), got[layer])


def test_every_half_is_widened_exactly(isa):
    """All bit patterns of both 16-bit types that are finite numbers, subnormals and both zeros among them."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        values = values[values.isfinite() & (values.abs().float() < 2.0**60)]
        features = torch.stack([torch.zeros_like(values), values])
        assert torch.equal(gram(features), gram(features.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_found(isa, dtype, value):
    features = torch.zeros(2, 5, 40, dtype=dtype)
    features[1, 3, 39] = value
    with pytest.raises(ValueError, match="in layer 1, sample 3, column 39"):
        gram(features)


def test_any_strides(isa):
    store = torch.randn(3, 7, 100, 2)
    for features in (
        store[..., 0],
        store.permute(3, 1, 0, 2)[0],
        store[:, :, :, 1].mT,
        store[:1, ..., 0].expand(4, 7, 100),
    ):
        assert torch.equal(gram(features), gram(features.contiguous()))


def test_number_of_threads_changes_nothing(isa):
    features, before = torch.randn(5, 20, 30_000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gram(features))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_empty(isa):
    assert gram(torch.empty(0, 4, 9)).shape == (0, 4, 4)
    assert bool((gram(torch.empty(2, 4, 0)) == 0).all())


def test_opcheck():
    features, out = torch.randn(2, 6, 50), torch.zeros(2, 6, 6)
    check, ops = torch.library.opcheck, torch.ops.losa
    if native.missing("cpu") is None:
        check(ops.gram.default, (features,))
    check(ops.checked_gram.default, (features, None))
    check(ops.checked_gram.default, (features[0], out[0]))
    check(ops.checked_gram.default, (features.double(), None))
    check(ops.cka_similarity.default, (gram(features),))


def test_compiled_whole():
    def similarity(features, out):
        return cka_similarity(gram(features)), gram(features[0], out)

    compiled = torch.compile(similarity, fullgraph=True, backend="aot_eager")
    features = torch.randn(3, 6, 50)
    outs = torch.zeros(2, 6, 6)
    for got, expected in zip(compiled(features, outs[0]), similarity(features, outs[1]), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(outs[0], outs[1]) and bool(outs[0].any())
    with pytest.raises(ValueError, match="got nan in layer 2, sample 0, column 0"):
        compiled(torch.cat([features[:2], features[:1] * float("nan")]), outs[0])
