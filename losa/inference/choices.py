"""What the kernels choose by measurement on this machine's GPU, for the shapes of a model.

``python -m losa.inference.choices`` prints it as ``losa info --gpu`` does. It needs no package of the command line.
"""

from __future__ import annotations

import torch
from torch import nn

from losa.modules.sparse import SparseLinear
from losa_kernels import masked_lora_linear, measured, pack_bitmask, pack_mask, sparse_linear

# Weights (out, in) of LLaMA-2-7B in decoding, where q, k and v are one product, and so are gate and up.
SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
ZEROS = (0.5, 0.7)
BATCHES = (1, 4, 8, 16)
TOKENS, RANK = 4096, 8  # rows of x and rank of the adapter in a training step


@torch.no_grad()
def decode_shapes(device: str, shapes=SHAPES) -> None:
    """Run a product with random packed bf16 weights for every shape, share of zeros and batch."""
    for shape in shapes:
        weight = torch.randn(shape, device=device).bfloat16()
        for zeros in ZEROS:
            packed = pack_bitmask(weight, pack_mask(torch.rand(shape, device=device) >= zeros))
            for batch in BATCHES:
                sparse_linear(torch.randn(batch, shape[1], device=device).bfloat16(), packed)


def train_shapes(device: str, shapes=SHAPES[1:2], tokens: int = TOKENS) -> None:
    """Run a training step of a masked-LoRA layer of every shape, in bf16, without dropout and with dropout."""
    for out_features, in_features in shapes:
        x = torch.randn(tokens, in_features, device=device).bfloat16().requires_grad_()
        weight = torch.randn(out_features, in_features, device=device).bfloat16()
        mask = pack_mask(torch.rand(out_features, in_features, device=device) >= 0.5)
        lora_A = torch.randn(RANK, in_features, device=device).requires_grad_()
        lora_B = torch.randn(out_features, RANK, device=device).requires_grad_()
        for dropout in (0.0, 0.1):
            y = masked_lora_linear(x, weight, mask, lora_A, lora_B, 1.0, dropout_p=dropout)
            y.backward(torch.ones_like(y))


@torch.no_grad()
def decode_model(model: nn.Module) -> int:
    """Run a product with the packed weights of the model, including groups of linears that are one product in decoding.
    Weights of equal shape, format, dtype and tenths of zeros run once for each batch. Returns how many weights ran."""
    seen = set()
    for module in model.modules():
        if not isinstance(module, SparseLinear):
            continue
        for weight in (module.packed, module.group):
            if weight is None:
                continue
            tenths = round(10 * weight.values.numel() / (weight.shape[0] * weight.shape[1]))
            key = (type(weight), weight.shape, weight.dtype, tenths)
            if key in seen:
                continue
            seen.add(key)
            for batch in BATCHES:
                x = torch.randn(batch, weight.shape[1], device=weight.device).to(weight.dtype)
                sparse_linear(x, weight)
    return len(seen)


def lines() -> list[str]:
    """A line for each measurement of this process: what was measured, what was chosen, and milliseconds of each way."""
    found = []
    for choice in measured.choices():
        times = ", ".join(f"{name} {time:.4f}" for name, time in choice.times.items())
        found.append(f"{choice.op} {' '.join(map(str, choice.key))}: {choice.chosen} (ms: {times})")
    return found or ["nothing was measured: LOSA_AUTOTUNE=0, torch's deterministic mode, or one way only"]


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU")
        return 1
    decode_shapes("cuda")
    train_shapes("cuda")
    print(*lines(), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
