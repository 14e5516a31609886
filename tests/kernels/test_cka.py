"""Centred Grams and CKA against fp64 and against the pairwise definition."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import cka_similarity, gram
from losa_kernels.cka import reference


def pairwise_cka(f, g):
    """Eq. 6 as written, on centred features in fp64."""
    f, g = f.double() - f.double().mean(0), g.double() - g.double().mean(0)
    return (f.T @ g).norm() ** 2 / ((f.T @ f).norm() * (g.T @ g).norm())


@pytest.mark.parametrize("samples, columns", [(2, 1), (5, 7), (64, 300), (256, 33), (3, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gram_against_fp64(samples, columns, dtype, device):
    features = torch.randn(3, samples, columns, device=device).to(dtype)
    centred = features.double() - features.double().mean(1, keepdim=True)
    expected = centred @ centred.transpose(1, 2)
    got = gram(features)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == (3, samples, samples)
    # Recursive summation in the product and the mean: at most (columns + samples) roundings of the largest entry.
    bound = (columns + samples) * torch.finfo(wide).eps * expected.abs().max()
    assert (got.double() - expected).abs().max() <= bound
    assert torch.equal(gram(features[1]), got[1])


def test_slices_accumulate_into_out():
    features = torch.randn(2, 9, 100)
    whole = gram(features)
    out = None
    for part in features.split(33, dim=2):
        returned = gram(part, out=out)
        assert out is None or returned is out
        out = returned
    assert (out - whole).abs().max() <= 8 * torch.finfo(torch.float32).eps * whole.abs().max()


def test_out_may_be_a_view():
    features = torch.randn(9, 100)
    store = torch.zeros(9, 12)
    assert gram(features, out=store[:, 1:10]).data_ptr() == store[:, 1:10].data_ptr()
    assert torch.equal(store[:, 1:10], gram(features))
    assert bool((store[:, :1] == 0).all()) and bool((store[:, 10:] == 0).all())


def test_chunks_are_summed_in_fp64(monkeypatch):
    """10,000 chunks of one column each: fp32 sums over them would be off by some 1e-5."""
    monkeypatch.setattr(reference, "CHUNK", 1)
    features = torch.randn(2, 10_000) + 1
    centred = features.double() - features.double().mean(0)
    expected = centred @ centred.T
    assert (gram(features).double() - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_no_gradient_no_autocast_nothing_written_to():
    features = torch.randn(6, 50, requires_grad=True)
    before, expected = features.detach().clone(), gram(features.detach())
    with torch.autocast("cpu", torch.bfloat16):
        got = gram(features)
        similarity = cka_similarity(got[None])
    assert torch.equal(got, expected) and not got.requires_grad
    assert torch.equal(features, before)
    assert similarity.dtype == torch.float64


def test_strided_features():
    features = torch.randn(40, 12).T
    dense = gram(features.contiguous())
    assert (gram(features) - dense).abs().max() <= 52 * torch.finfo(torch.float32).eps * dense.abs().max()


@pytest.mark.parametrize("samples", [16, 64, 256])
@pytest.mark.parametrize("common", [0.0, 1.0, 100.0])
def test_similarity_is_the_pairwise_definition(common, samples, device):
    """A component shared by all samples, 100 x the deviation, as massive activations are: error below 1e-6."""
    shape = (samples, 200)
    features = [torch.randn(shape, device=device) + common * torch.randn(1, 200, device=device) for _ in range(4)]
    got = cka_similarity(torch.stack([gram(f) for f in features])).cpu()
    expected = torch.tensor([[pairwise_cka(f, g) for g in features] for f in features], dtype=torch.float64)
    assert (got - expected).abs().max() < 1e-6
    assert torch.equal(got, got.T) and bool((got.diagonal() == 1).all())
    assert bool((got >= 0).all()) and bool((got <= 1).all())


def test_similarity_is_invariant_to_rotation_scale_and_shift():
    features = torch.randn(16, 40, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    others = [features @ rotation, 1e-120 * features, 1e60 * features, features + torch.randn(40, dtype=torch.float64)]
    got = cka_similarity(torch.stack([gram(f) for f in [features, *others]]))
    assert (got - 1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_without_variation_are_found(dtype):
    """0.1 in 7 samples: a rounded mean would leave noise that CKA takes for a signal."""
    constant = gram(torch.full((7, 30), 0.1, dtype=dtype))
    assert bool((constant == 0).all())
    with pytest.raises(ValueError, match="Gram 1 is zero"):
        cka_similarity(torch.stack([gram(torch.randn(7, 30).to(dtype)), constant]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gram(torch.randn(5)), "features: expected"),
        (lambda: gram(torch.ones(5, 3, dtype=torch.int64)), "features: expected"),
        (lambda: gram(torch.randn(1, 5)), "features: expected 2..256"),
        (lambda: gram(torch.randn(257, 5)), "features: expected 2..256"),
        (lambda: gram(torch.tensor([[0.0, 1.0], [1.0, float("nan")]])), "finite values, got nan in sample 1, column 1"),
        (lambda: gram(torch.eye(3)[None] / torch.tensor(0.0)), "got inf in layer 0, sample 0, column 0"),
        (lambda: gram(torch.tensor([[1e30], [-1e30]])), "features: too large"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(5, 5)), "out: expected"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(4, 4).double()), "out: expected"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(1, 4, 4)), "out: expected"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(4, 4, device="meta")), "out: expected"),
        (lambda: cka_similarity(torch.randn(4, 4)), "grams: expected"),
        (lambda: cka_similarity(torch.randn(2, 4, 5)), "grams: expected"),
        (lambda: cka_similarity(torch.ones(1, 4, 4, dtype=torch.int64)), "grams: expected"),
        (lambda: cka_similarity(torch.full((2, 3, 3), float("nan"))), "finite values, got nan in Gram 0"),
        (lambda: cka_similarity(torch.stack([torch.eye(3), torch.zeros(3, 3)])), "Gram 1 is zero"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
