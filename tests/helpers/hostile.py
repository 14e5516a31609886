"""What fuzz tests share: random arguments, right ones and ones that are wrong in every way that a caller may get them;
and how results of two implementations are compared."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from losa_kernels.tensors import as_bits

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40)
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-40, 3e4)
NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 127, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, -(2**63), -(2**80), 10**400)
OTHERS = (0.5, -0.25, 1.0, 1e-9, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "4", "x", [1])
TYPES = (np.int64, np.int32, np.uint8, np.float64, np.float32, np.bool_, Fraction, torch.tensor, complex, str, float)


def size(r: random.Random) -> int:
    return 0 if r.random() < 0.04 else r.choice(SIZES)


def normal(r: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of any layout: dense, transposed, with gaps, or rows that are one row."""
    layout = r.random()
    if len(shape) == 2 and layout < 0.1:
        return torch.randn(*shape[::-1]).to(dtype).T
    if layout < 0.2:
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2]
    if len(shape) == 2 and layout < 0.25:
        return torch.randn(1, shape[1]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


def with_special(r: random.Random, tensor: Tensor, values=SPECIAL) -> Tensor:
    """The same with a few values that are not finite, or extreme."""
    tensor = tensor.clone()
    for _ in range(r.choice((1, 1, 2, 5)) if tensor.numel() else 0):
        tensor[tuple(r.randrange(n) for n in tensor.shape)] = r.choice(values)
    return tensor


def _resized(r: random.Random, t: Tensor) -> Tensor:
    dim = r.randrange(t.dim()) if t.dim() else None
    if dim is None:
        return t.reshape(1)
    change = r.choice(("shorter", "longer", "nothing", "more", "fewer", "flat", "turned"))
    if change == "shorter":
        return t.narrow(dim, 0, max(0, t.shape[dim] - 1))
    if change == "longer":
        return torch.cat([t, t.narrow(dim, 0, min(1, t.shape[dim]))], dim)
    if change == "nothing":
        return t.narrow(dim, 0, 0)
    if change == "more":
        return t.unsqueeze(dim)
    if change == "fewer":
        return t.select(dim, 0) if t.shape[dim] else t.sum(dim)
    return t.flatten() if change == "flat" else t.transpose(0, -1)


def _restrided(r: random.Random, t: Tensor) -> Tensor:
    """Other memory; of some the values change too."""
    change = r.choice(("gaps", "gaps", "expanded", "offset", "order"))
    if t.dim() == 0:
        return t
    if change == "gaps":
        return torch.stack([t, t], -1)[..., 0]
    if change == "expanded":
        dim = r.randrange(t.dim())
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape) if t.shape[dim] else t
    if change == "offset":
        return torch.cat([t.flatten()[:1], t.flatten()])[1 if t.numel() else 0 :].view(t.shape)
    order = list(range(t.dim()))
    r.shuffle(order)
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


def hostile_tensor(r: random.Random, t: Tensor) -> object:
    kind = r.choice(("shape", "shape", "dtype", "stride", "stride", "values", "values", "values", "rare"))
    if kind == "shape":
        return _resized(r, t)
    if kind == "dtype":
        return t.to(r.choice(DTYPES))
    if kind == "stride":
        return _restrided(r, t)
    if kind == "values" and t.is_floating_point() and t.element_size() > 1:
        return with_special(r, t)
    if kind == "values" and t.dtype in (torch.uint8, torch.int16, torch.int64):
        return with_special(r, t, (0, 1, 2, 127) if t.dtype == torch.uint8 else (0, -1, 1, 2, 127))
    return r.choice(
        (
            lambda: t.to("meta"),
            lambda: t.to(torch.float32 if t.is_floating_point() else t.dtype).to_sparse(),
            lambda: t.double().tolist(),
            lambda: t.double().numpy(),
            lambda: None,
            lambda: "tensor",
            lambda: r.choice(NUMBERS),
            lambda: torch.nn.Parameter(t, requires_grad=False),
        )
    )()


def hostile_number(r: random.Random, value: object) -> object:
    choice = r.random()
    if choice < 0.45:
        return r.choice(NUMBERS)
    if choice < 0.75:
        return r.choice(OTHERS)
    try:
        return r.choice(TYPES)(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return r.choice(OTHERS)


def hostile(r: random.Random, value: object) -> object:
    if isinstance(value, list):
        return _hostile_list(r, value)
    return hostile_tensor(r, value) if isinstance(value, Tensor) else hostile_number(r, value)


def _hostile_list(r: random.Random, values: list) -> object:
    """One of the values changed, or another number of them."""
    if not values or r.random() < 0.2:
        return r.choice((values[1:], [*values, *values[:1]], None, [None], 3))
    at = r.randrange(len(values))
    return [*values[:at], hostile(r, values[at]), *values[at + 1 :]]


def spoilt(r: random.Random, arguments: dict, share: float = 0.6) -> dict:
    """The arguments, in a ``share`` of all calls with one or two of them changed."""
    if r.random() < share:
        for name in r.sample(list(arguments), min(len(arguments), r.choice((1, 1, 1, 2)))):
            if arguments[name] is not None or r.random() < 0.2:
                arguments[name] = hostile(r, arguments[name])
    return arguments


def same_bits(expected, found):
    pairs = zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]
    for one, other in pairs:
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.is_meta or torch.equal(as_bits(one), as_bits(other))


def assert_near(expected, found, bound, roundings, terms, must=None, may=None, dtype=None):
    """Apart by so many roundings of ``bound`` (sums of magnitudes), and by those of fp32 sums of so many ``terms``.

    ``must``: where both are not finite. ``may``: where either may be.
    """
    assert expected.dtype == found.dtype and expected.shape == found.shape
    if expected.is_meta or not expected.numel():
        return
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    eps = max(torch.finfo(t).eps for t in (expected.dtype, dtype or expected.dtype))
    smallest = max(torch.finfo(t).tiny for t in (expected.dtype, dtype or expected.dtype))
    largest = min(torch.finfo(t).max for t in (expected.dtype, dtype or expected.dtype))
    bound = bound.nan_to_num(torch.inf, torch.inf)
    allowed = (roundings * eps + 2 * terms * torch.finfo(wide).eps) * bound + smallest
    must = torch.zeros(expected.shape, dtype=torch.bool) if must is None else must
    may = (must if may is None else may | must) | (bound > largest / 4)
    one, other = expected.double(), found.double()
    finite = one.isfinite(), other.isfinite()
    assert not (must & (bound <= largest / 4) & (finite[0] | finite[1])).any(), "finite"
    assert (may | finite[0] & finite[1]).all(), "not finite"
    both = finite[0] & finite[1]
    assert ((one - other).abs() <= allowed)[both].all(), float(((one - other).abs() / allowed)[both].max())
