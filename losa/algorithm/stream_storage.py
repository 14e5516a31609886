"""Where a stream's hidden states wait between blocks, if the model is on a GPU: there, or in pinned host memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losa_kernels.cuda_memory import free_bytes

DEVICE_SHARE = 0.25  # of the device's free memory that the hidden states of one stream may take
SLICE_BYTES = 128 << 20  # of features that are brought to the device at a time for a Gram


def fits_on_device(size: int, free: int) -> bool:
    """Whether hidden states of ``size`` bytes stay on a device with ``free`` bytes left."""
    return size <= DEVICE_SHARE * free


class StreamStorage:
    """Hidden states of all samples, (samples, length, hidden), in one piece, so that nothing has to bring them together
    later. On the device while they fit (``fits_on_device`` when the first batch comes), else in pinned host memory."""

    def __init__(self, device: torch.device, samples: int):
        self._device, self._samples = device, samples
        self._whole: Tensor | None = None

    def write(self, first: int, hidden: Tensor) -> Tensor:
        """Keep ``hidden`` (batch, length, hidden) of the samples from ``first`` on; returns where."""
        shape = (self._samples, *hidden.shape[1:])
        whole = self._whole
        if whole is None or whole.shape != shape or whole.dtype != hidden.dtype:
            # A block may change the dtype. Batches that wait in the old dtype keep their memory.
            self._whole = whole = self._allocate(shape, hidden.dtype)
        return whole[first : first + len(hidden)].copy_(hidden)

    def features(self) -> Iterator[Tensor]:
        """The positions and channels of all samples in slices (samples, columns) on the device: one slice of all
        columns if the hidden states are on the device already."""
        flat = self._flat()
        width = flat.shape[1]
        if flat.device != self._device:
            width = max(1, SLICE_BYTES // (len(flat) * flat.element_size()))
        for start in range(0, flat.shape[1], width):
            yield self.columns(start, min(start + width, flat.shape[1]))

    def _flat(self) -> Tensor:
        assert self._whole is not None, "nothing is written yet"
        return self._whole.flatten(1)

    def columns(self, start: int, end: int) -> Tensor:
        """The features from ``start`` up to ``end`` of all samples held here: (samples, end - start), on the device."""
        flat = self._flat()
        if flat.device == self._device:
            return flat[:, start:end]
        # Row by row: a contiguous piece of pinned memory is sent without a copy on the host.
        features = torch.empty(len(flat), end - start, dtype=flat.dtype, device=self._device)
        for row, sample in zip(features, flat, strict=True):
            row.copy_(sample[start:end], non_blocking=True)
        return features

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._stays(torch.Size(shape).numel() * dtype.itemsize):
            return torch.empty(shape, dtype=dtype, device=self._device)
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system pins no more
            return torch.empty(shape, dtype=dtype)

    def _stays(self, size: int) -> bool:
        return fits_on_device(size, free_bytes(self._device))
