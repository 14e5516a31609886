"""A mixture's block of experts with masked-LoRA layers, forward and backward, against transformers' own experts.

Implementations: "losa" (all experts' linears of one kind in one call), "losa, one by one" (a call for each linear),
"transformers" (dense, all weights of the experts trained), "transformers, frozen" (dense, nothing but the gradient of
the hidden states). fp32 on a CPU, bf16 on a GPU. times_trained, times_frozen: ours over transformers' time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks._problems import ONLY_THESE_SHAPES, dtype_name, sizes, wrong_kernel
from benchmarks._results import parser, report
from benchmarks._timing import interleaved, medians
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.linear_experts import LinearExperts

RANK = 8
# Experts, experts of a token, hidden size, and inner size of an expert. On a GPU these are Mixtral 8x7B and
# Qwen3-30B-A3B.
SHAPES = {
    "cpu": [(8, 2, 512, 1024), (64, 8, 512, 256)],
    "cuda": [(8, 2, 4096, 14336), (128, 8, 2048, 768)],
}
TOKENS = {"cpu": [256, 1024], "cuda": [4096, 16384]}


def main(argv: list[str]) -> int:
    arguments = parser("experts", __doc__)
    arguments.add_argument("--shape", type=sizes(4), metavar="EXPERTSxCHOSENxHIDDENxINNER", **ONLY_THESE_SHAPES)
    arguments.add_argument("--tokens", type=int, action="append", help="measure only so many; may be repeated")
    arguments.add_argument("--sparsity", type=float, action="append", help="zeros of the experts; default 0.7 and 0.5")
    args = arguments.parse_args(argv)
    kind = torch.device(args.device).type
    shapes, tokens = args.shape or SHAPES[kind], args.tokens or TOKENS[kind]
    sparsities = args.sparsity or [0.7, 0.5]
    if args.quick:
        tokens, sparsities = tokens[:1], sparsities[:1]
    results = [
        row
        for shape, sparsity in itertools.product(shapes, sparsities)
        for row in measure(shape, sparsity, tokens, args)
    ]
    report("experts", results, args.json, args.device)
    return 0


def measure(shape: tuple[int, ...], sparsity: float, tokens: list[int], args: argparse.Namespace) -> list[dict]:
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    blocks = build(shape, sparsity, dtype, args.device)
    return [
        row
        for count in tokens
        for row in rows(
            blocks, shape, sparsity, count, dtype, args.repetitions or (3 if args.quick else 9), args.device
        )
    ]


def build(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The block of each implementation, from the same weights."""
    experts, chosen, hidden, inner = shape
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=8,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    trained = copy.deepcopy(model.model.layers[0].mlp)
    wrap_model(model, rank=RANK, scaling=2.0)
    generator = torch.Generator(device).manual_seed(0)
    for layer in wrapped_linears(model).values():
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator, device=device) >= sparsity)
    ours = model.model.layers[0].mlp
    return {
        "losa": ours,
        "losa, one by one": watched(copy.deepcopy(ours)),
        "transformers": trained,
        "transformers, frozen": copy.deepcopy(trained).requires_grad_(False),
    }


def watched(block: nn.Module) -> nn.Module:
    """Hooks that do nothing: a linear that someone watches is called by itself."""
    for experts in block.modules():
        if isinstance(experts, LinearExperts):
            for linear in (linear for expert in experts for linear in expert.children()):
                linear.register_forward_hook(lambda *_: None)
    return block


def rows(
    blocks: dict[str, nn.Module],
    shape: tuple[int, ...],
    sparsity: float,
    tokens: int,
    dtype: torch.dtype,
    repetitions: int,
    device: str,
) -> list[dict]:
    x = torch.randn(1, tokens, shape[2], device=device).to(dtype)
    check(blocks, x)
    times = interleaved({name: step(block, x) for name, block in blocks.items()}, repetitions, device)
    taken = medians(times)
    return [
        {
            "op": "experts",
            "shape": f"{shape[0]} experts of {shape[2]}x{shape[3]}, {shape[1]} a token",
            "tokens": tokens,
            "dtype": dtype_name(dtype),
            "sparsity": sparsity,
            "implementation": name,
            "median_ms": 1e3 * taken[name],
            "min_ms": 1e3 * min(times[name]),
            "times_trained": taken[name] / taken["transformers"],
            "times_frozen": taken[name] / taken["transformers, frozen"],
        }
        for name in blocks
    ]


def check(blocks: dict[str, nn.Module], x: Tensor) -> None:
    with torch.no_grad():
        one, other = (blocks[name](x) for name in ("losa", "losa, one by one"))
    error, largest = float((one - other).abs().max()), float(other.abs().max())
    if not error <= 16 * torch.finfo(x.dtype).eps * largest:
        raise wrong_kernel("experts", f"outputs of one call and of many differ by {error:g} of {largest:g}")


def step(block: nn.Module, x: Tensor) -> Callable[[int], None]:
    parameters = [p for p in block.parameters() if p.requires_grad]

    def run(_: int) -> None:
        hidden = x.detach().requires_grad_()
        found = block(hidden)
        y = found if isinstance(found, Tensor) else found[0]
        y.backward(x)
        for parameter in parameters:
            parameter.grad = None

    return run
