"""Centred Grams and CKA against fp64 and against the pairwise definition."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import cka_similarity, gram


def pairwise_cka(f, g):
    """Eq. 6 as written, on centred features in fp64."""
    f, g = f.double() - f.double().mean(0), g.double() - g.double().mean(0)
    return (f.T @ g).norm() ** 2 / ((f.T @ f).norm() * (g.T @ g).norm())


@pytest.mark.parametrize("samples, columns", [(2, 1), (5, 7), (64, 300), (256, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gram_against_fp64(samples, columns, dtype):
    torch.manual_seed(0)
    features = torch.randn(3, samples, columns).to(dtype)
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
    torch.manual_seed(0)
    features = torch.randn(2, 9, 100)
    whole = gram(features)
    out = None
    for part in features.split(33, dim=2):
        returned = gram(part, out=out)
        assert out is None or returned is out
        out = returned
    assert (out - whole).abs().max() <= 8 * torch.finfo(torch.float32).eps * whole.abs().max()


def test_strided_features():
    features = torch.randn(40, 12).T
    dense = gram(features.contiguous())
    assert (gram(features) - dense).abs().max() <= 52 * torch.finfo(torch.float32).eps * dense.abs().max()


@pytest.mark.parametrize("common", [0.0, 1.0, 100.0])
def test_similarity_is_the_pairwise_definition(common):
    """A component shared by all samples, 100 x the deviation, as massive activations are: error below 1e-6."""
    torch.manual_seed(0)
    features = [torch.randn(16, 200) + common * torch.randn(1, 200) for _ in range(4)]
    features.append(features[0] @ torch.linalg.qr(torch.randn(200, 200)).Q)
    got = cka_similarity(torch.stack([gram(f) for f in features]))
    expected = torch.tensor([[pairwise_cka(f, g) for g in features] for f in features], dtype=torch.float64)
    # The rotated copy carries the fp32 rounding of its own making, relative to the common component.
    assert (got[:4, :4] - expected[:4, :4]).abs().max() < 1e-6
    assert (got - expected).abs().max() < 1e-5
    assert torch.equal(got, got.T) and bool((got.diagonal() == 1).all())
    assert got[0, 4] > 0.999, "CKA is invariant to rotation"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gram(torch.randn(5)), "features: expected"),
        (lambda: gram(torch.ones(5, 3, dtype=torch.int64)), "features: expected"),
        (lambda: gram(torch.randn(1, 5)), "features: expected 2..256"),
        (lambda: gram(torch.randn(257, 5)), "features: expected 2..256"),
        (lambda: gram(torch.tensor([[1.0, float("nan")], [0.0, 1.0]])), "features: expected finite"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(5, 5)), "out: expected"),
        (lambda: gram(torch.randn(4, 5), out=torch.zeros(4, 4).double()), "out: expected"),
        (lambda: cka_similarity(torch.randn(4, 4)), "grams: expected"),
        (lambda: cka_similarity(torch.stack([torch.eye(3), torch.zeros(3, 3)])), "Gram 1 is zero"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
