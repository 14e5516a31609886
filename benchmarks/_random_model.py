"""Decode speed of a randomly initialised LLaMA, dense and packed: for a GPU without a checkpoint."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks._problems import wrong_kernel
from benchmarks._sparse import kept_mask
from benchmarks._timing import host_seconds
from losa.inference.decoding import LeanDecoder
from losa.inference.speed import bytes_per_token, seconds_per_token
from losa.model.blocks import block_linears, find_blocks
from losa.model.grouping import group_linears, join_linears
from losa.modules.sparse import SparseLinear
from losa.packed.weights import pack_weight
from losa_kernels.timing import copy_bandwidth

# hidden, intermediate, layers, heads, key heads, vocabulary
SIZES = {
    "tiny": (64, 160, 2, 4, 2, 98),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
}
# As a share of the logits' norm. Both sides round every layer's results to 8 bits, each in another order. A wrong
# function is off by about 1.
ALLOWED = 0.1
SMALL = 4e-6  # seconds; a kernel that takes less does little beside the products


@torch.inference_mode()
def rows(args: argparse.Namespace) -> Iterator[dict]:
    """A row for each pattern ("50%", "2:4") and way to hold the weights.

    Raises SystemExit: packed and dense logits differ.
    """
    dense = random_llama(args.random, args.layers, args.device)
    packed = random_llama(args.random, args.layers, args.device, like=dense)
    bandwidth = copy_bandwidth(args.device, 128)
    for pattern in patterns(args.sparsity):
        fill(dense, pattern)
        pack(dense, packed)
        prompt = torch.arange(3, 11, device=args.device)
        decoders = {
            name: LeanDecoder(model, len(prompt) + max(args.tokens, 8))
            for name, model in (("losa, dense", dense), ("losa, packed", packed))
        }
        compare(decoders, prompt)
        times: dict[str, list[float]] = {name: [] for name in decoders}
        for repetition in range(-1, args.repetitions):
            for name, decoder in decoders.items():
                seconds = seconds_per_token(decoder, prompt, args.tokens)
                if repetition >= 0:
                    times[name].append(seconds)
        base = statistics.median(times["losa, dense"])
        for name, model in (("losa, dense", dense), ("losa, packed", packed)):
            seconds, moved = statistics.median(times[name]), bytes_per_token(model)
            yield {
                "op": "decode",
                "model": args.random,
                "layers": len(decoders[name].blocks),
                "pattern": pattern,
                "implementation": name,
                "tokens_per_s": 1 / seconds,
                "median_ms": 1e3 * seconds,
                "min_ms": 1e3 * min(times[name]),
                "speedup_over_losa, dense": base / seconds,
                "bytes_per_token": moved,
                "fraction_of_copy_bandwidth": moved / seconds / bandwidth,
                **(token_on_gpu(decoders[name], prompt, args.device) if args.device.startswith("cuda") else {}),
            }  # fmt: skip
        del decoders


def token_on_gpu(decoder: LeanDecoder, prompt: torch.Tensor, device: str) -> dict:
    """Fields of a row about one token.

    ``host_ms``: the host's time to launch it. ``kernels_ms``, ``kernels``: the time of its kernels without gaps, and
    their number. ``small_kernels_ms``, ``small_kernels``: time and number of the kernels that take less than ``SMALL``
    on average.
    """
    decoder.reset()
    token = decoder(prompt).argmax(-1, keepdim=True)
    for _ in range(3):
        token = decoder.likeliest(token)
    row = {"host_ms": 1e3 * host_seconds(lambda _: decoder.likeliest(token), device, 3)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.likeliest(token)
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    small = [e for e in events if e.self_device_time_total / e.count < 1e6 * SMALL]
    for name, part in (("kernels", events), ("small_kernels", small)):
        row |= {name: sum(e.count for e in part), f"{name}_ms": sum(e.self_device_time_total for e in part) / 1e3}
    return row


def patterns(text: str) -> list[str]:
    """ "0.5,2:4" -> ["50%", "2:4"]."""
    return [part if ":" in part else f"{100 * float(part):g}%" for part in text.split(",")]


def random_llama(size: str, layers: int | None, device: str, like: nn.Module | None = None) -> nn.Module:
    """A LLaMA in bf16 whose blocks have linears that are not initialised. With ``like`` these linears stay on the meta
    device, and all other parameters are shared with ``like``."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, all_layers, heads, key_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_hidden_layers=layers or all_layers, num_key_value_heads=key_heads, max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config).eval()
    linears = {f"{name}.weight" for name in block_linears(model)}
    others = {} if like is None else dict(like.named_parameters())
    for name, parameter in list(model.named_parameters()):
        if like is not None and name in linears:
            continue
        value = others.get(name)
        if value is None:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if name not in linears:
                value = value.fill_(1) if value.ndim == 1 else value.normal_(std=0.02)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if like is None:
        for block in find_blocks(model):
            join_linears(block)
    return model


def fill(model: nn.Module, pattern: str) -> None:
    """Gives the blocks' linears new random weights, of which the pattern prunes a share."""
    for linear in block_linears(model).values():
        weight = linear.weight
        weight.normal_(std=weight.shape[1] ** -0.5).masked_fill_(
            ~kept_mask(tuple(weight.shape), pattern, weight.device), 0
        )


def pack(dense: nn.Module, packed: nn.Module) -> None:
    for source, block in zip(find_blocks(dense), find_blocks(packed), strict=True):
        for name, linear in source.named_modules():
            if type(linear) is nn.Linear:
                block.set_submodule(name, SparseLinear(pack_weight(linear.weight)))
        group_linears(block)


def compare(decoders: dict[str, LeanDecoder], prompt: torch.Tensor) -> None:
    """Compares the logits of a prompt and of three single tokens, of which a GPU runs the last as a graph.

    Raises SystemExit: the logits of a decoder differ from the logits of dense weights.
    """
    logits = {}
    for name, decoder in decoders.items():
        decoder.reset()
        found = [decoder(prompt), *(decoder(prompt[i : i + 1]) for i in range(3))]
        logits[name] = torch.stack([part.float().clone() for part in found])
    expected = logits["losa, dense"]
    for name, found in logits.items():
        error = float((found - expected).norm() / expected.norm())
        if not error <= ALLOWED:
            raise wrong_kernel("decode", f"{name} is off by {error:.2g} of dense logits")
