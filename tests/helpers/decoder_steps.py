"""Operations of a decode step beside their reference."""

from __future__ import annotations

import torch

from losa_kernels.decoder_step import reference


def assert_close(found, plain, exact):
    """Twice the error of torch's operations in that dtype, and one rounding more."""
    assert found.dtype == plain.dtype and found.shape == exact.shape
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def wide(*arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def compare(run, name, *arguments):
    """The op's result, compared with the reference in its dtype and in fp64."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    exact, plain = getattr(reference, name)(*wide(*arguments)), getattr(reference, name)(*copies)
    found = getattr(run, name)(*arguments)
    assert_close(found, plain, exact)
    return found
