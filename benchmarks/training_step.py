"""One training step of a whole model with masked-LoRA layers, against plain, PEFT and eager LoSA layers.

Forward, loss and backward of 4 sequences in fp32 (a CPU) or bf16 autocast (a GPU), without the optimiser, which sees
the adapters only and costs the same everywhere. losa_speedup: how many times faster than this row ours is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks._lora_baselines import eager_losa_linear
from benchmarks._models import add_model_option, load
from benchmarks._problems import dtype_name
from benchmarks._results import parser, report
from benchmarks._timing import interleaved, medians
from losa.model.blocks import block_linears
from losa.model.wrapping import wrap_model
from losa.training.loss import TokenLoss, label_positions
from losa.training.precision import autocast_dtype

BATCH, RANK, SPARSITY = 4, 8, 0.7


class EagerLoSALinear(nn.Module):
    def __init__(self, linear: nn.Linear, recompute: bool):
        super().__init__()
        self.weight, self.recompute = linear.weight, recompute
        self.lora_A = nn.Parameter(torch.randn(RANK, linear.in_features, device=linear.weight.device) * 0.02)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, RANK, device=linear.weight.device) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return eager_losa_linear(x, self.weight, self.lora_A, self.lora_B, 2.0, 0.0, self.recompute)


def main(argv: list[str]) -> int:
    arguments = parser("training_step", __doc__)
    add_model_option(arguments)
    arguments.add_argument("--length", action="append", type=int, help="tokens a sequence; default 128 and 256")
    args = arguments.parse_args(argv)
    builders = {
        "losa": _losa,
        "plain": lambda model: model,
        "peft": _peft,
        "eager_losa": lambda model: _eager(model, False),
        "eager_losa_checkpointed": lambda model: _eager(model, True),
    }
    autocast = autocast_dtype("auto", torch.device(args.device))
    losses = {}
    for name, build in builders.items():
        model = build(_pruned(args.model, args.device))
        if model is not None:
            losses[name] = (TokenLoss(model.eval(), autocast), [p for p in model.parameters() if p.requires_grad])
    results = [
        row
        for length in args.length or ([128] if args.quick else [128, 256])
        for row in measure(losses, length, args.repetitions or (3 if args.quick else 7), autocast, args.device)
    ]
    report("training_step", results, args.json, args.device)
    return 0


def measure(losses: dict, length: int, repetitions: int, autocast: torch.dtype | None, device: str) -> list[dict]:
    vocabulary = next(iter(losses.values()))[0].model.config.vocab_size
    ids = torch.randint(vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(0))
    batch = [tensor.to(device) for tensor in (ids, *label_positions(ids))]

    def step(name: str) -> None:
        loss, parameters = losses[name]
        # The plain model trains nothing: its step is a forward and a backward pass down to the embeddings.
        total = loss(*batch)
        total.backward()
        for parameter in parameters:
            parameter.grad = None

    times = interleaved({name: (lambda _, name=name: step(name)) for name in losses}, repetitions, device)
    taken = medians(times)
    return [
        {
            "op": "training_step",
            "batch": f"{BATCH}x{length}",
            "dtype": dtype_name(autocast or torch.float32),
            "implementation": name,
            "median_s": taken[name],
            "min_s": min(times[name]),
            "tokens_per_s": BATCH * length / taken[name],
            "times_plain": taken[name] / taken["plain"],
            "losa_speedup": taken[name] / taken["losa"],
        }
        for name in losses
    ]


def _pruned(name: str, device: str) -> nn.Module:
    """The model with random zeros in its blocks' linears; only the embeddings' output asks for a gradient."""
    model = load(name, device)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for linear in block_linears(model).values():
            weight = linear.weight
            weight.mul_(torch.rand(weight.shape, generator=generator, device=device) >= SPARSITY)
    return model


def _losa(model: nn.Module) -> nn.Module:
    for layer in wrap_model(model, rank=RANK, scaling=2.0).values():
        layer.set_mask(layer.weight != 0)
    return model


def _eager(model: nn.Module, recompute: bool) -> nn.Module:
    for name, linear in block_linears(model).items():
        model.set_submodule(name, EagerLoSALinear(linear, recompute))
    return model


def _peft(model: nn.Module) -> nn.Module | None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    targets = sorted(block_linears(model))
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)).base_model.model
