"""Memory of a CUDA device."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """What is free on a CUDA device, what torch's allocator has in store included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
