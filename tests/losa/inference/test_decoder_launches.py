"""A block of the decoder is at most nine launches for a token."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losa.errors import LosaError
from losa.inference import token_graphs
from losa.inference.decoder_blocks import join, joined
from losa.inference.decoding import LeanDecoder
from losa.model.blocks import find_blocks
from losa.model.grouping import join_linears
from losa_kernels.decoder_step import Operations, reference
from tests.helpers.decoders import LLAMA_KIND, build, thin
from tests.helpers.tiny import EPS

VIEWS = ("view", "select", "slice", "t", "transpose", "expand", "unsqueeze", "alias", "as_strided", "split", "detach")


class Launches(TorchDispatchMode):
    """Names of the operators that are called, less views; within ``quietly`` none."""

    def __init__(self):
        super().__init__()
        self.names, self.quiet = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.quiet and name.lstrip("_").removeprefix("unsafe_") not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def quietly(self):
        self.quiet = True
        yield
        self.quiet = False

    def kernel(self, name):
        """The reference of an op that has a kernel on a GPU, as one launch."""

        def run(*arguments):
            self.names.append(name)
            with self.quietly():
                return getattr(reference, name)(*arguments)

        return run


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_nine_launches_a_block(name, packed):
    model = build(*LLAMA_KIND[name])
    if packed:
        thin(model)
    for block in find_blocks(model):
        join_linears(block)
    ids = torch.randint(2, 90, (12,))
    decoder, expected = LeanDecoder(model, 16), LeanDecoder(model, 16)(ids)
    decoder(ids[:-1])
    launches, position = Launches(), torch.tensor([11])
    decoder._run = Operations(*(launches.kernel(name) for name in Operations._fields))
    with torch.inference_mode(), launches:
        found = decoder.step(ids[-1:], position, 16)
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()
    product = "sparse_linear" if packed else "linear"
    attention = ["add_rms_norm", product, "rotate_and_store", "attend_cache", product]
    block = [*attention, "add_rms_norm", product, "gated_silu", product]
    names = ["linear" if name in ("mm", "addmm") else name for name in launches.names]
    assert names == ["embedding", *block * len(decoder.blocks), "add_rms_norm", "linear"]


@pytest.mark.parametrize("name", LLAMA_KIND)
def test_tokens_without_a_graph_go_by_steps(name, monkeypatch):
    """As on a GPU; also through places that are fewer than a graph's."""
    model, ids = build(*LLAMA_KIND[name]), torch.randint(2, 90, (30,))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    decoder = LeanDecoder(model, 30)
    decoder._steps = True
    monkeypatch.setattr(token_graphs, "BUCKET", 16)
    found = [decoder(part) for part in ids.split([5, *[1] * 11, 3, *[1] * 11])]
    rows = [4, *range(5, 16), 18, *range(19, 30)]
    for logits, row in zip(found, rows, strict=True):
        assert (logits - expected[row]).abs().max() <= 64 * EPS * expected[row].abs().max()
    with pytest.raises(LosaError, match="31 tokens are more"):
        decoder(ids[:1])


@pytest.mark.parametrize("part", ["attention_norm", "mlp_norm", "q_norm", "activation"])
def test_parts_that_no_kernel_has(part):
    """Other norms and activations go through their modules."""
    settings = dict(LLAMA_KIND["qwen3"][1]) | ({"hidden_act": "gelu"} if part == "activation" else {})
    model, ids = build(LLAMA_KIND["qwen3"][0], settings), torch.randint(2, 90, (12,))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0, -1]
    decoder = LeanDecoder(model, 12)
    for block in decoder.blocks:
        if part != "activation":
            getattr(block, part).eps = None
    decoder._steps = True
    for piece in ids.split([3, *[1] * 9]):
        found = decoder(piece)
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_nine_kernels_a_block_on_gpu(name, monkeypatch):
    """Of a replayed graph, as the profiler sees it."""
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")  # one kernel, whatever is faster
    model = thin(build(*LLAMA_KIND[name])).to("cuda", torch.bfloat16)
    decoder = LeanDecoder(model, 16)
    for token in torch.arange(3, 8, device="cuda"):
        decoder(token[None])  # the first is read step by step, the second captured
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder(torch.tensor([9], device="cuda"))
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [event.name for event in profile.events() if event.device_type == device]
    ours = ("add_rms_norm", "rotate_and_store", "attend", "gated_silu")
    blocks = len(decoder.blocks)
    assert [sum(f"{one}_kernel" in kernel for kernel in kernels) for one in ours] == [
        2 * blocks + 1,
        blocks,
        blocks,
        blocks,
    ]
    # Besides: the token's copy, its embedding, the output layer, the likeliest token and what is left for the next one.
    assert len(kernels) <= 9 * blocks + 12, kernels


def test_rows_of_one_tensor_are_still_the_models_parameters():
    model = build(*LLAMA_KIND["llama"]).requires_grad_(True)
    with torch.no_grad():
        expected = model(torch.arange(9)[None], use_cache=False).logits
    mlp = model.model.layers[0].mlp
    pair, before = [mlp.gate_proj, mlp.up_proj], [mlp.gate_proj.weight, mlp.up_proj.weight]
    assert joined([weight.detach() for weight in before]) is None
    for _ in range(2):
        join(pair, "weight")
        weight = joined([linear.weight.detach() for linear in pair])
        assert torch.equal(weight, torch.cat(before)) and weight.data_ptr() == before[0].data_ptr()
        assert all(linear.weight is one and one.requires_grad for linear, one in zip(pair, before, strict=True))
    logits = model(torch.arange(9)[None], use_cache=False).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert mlp.up_proj.weight.grad.shape == mlp.up_proj.weight.shape
    join([mlp.gate_proj, mlp.down_proj], "weight")
    assert joined([mlp.gate_proj.weight.detach(), mlp.down_proj.weight.detach()]) is None


def test_biases_lie_together_and_stay_the_models():
    model = build(*LLAMA_KIND["qwen2"])
    ids = torch.randint(2, 90, (9,))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0, -1]
    before = [parameter.clone() for parameter in model.parameters()]
    for block in find_blocks(model):
        join_linears(block)
    decoder = LeanDecoder(model, 9)
    assert all(map(torch.equal, before, model.parameters()))
    assert (decoder(ids) - expected).abs().max() <= 64 * EPS * expected.abs().max()
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.bias, attention.k_proj.bias
    assert k.data_ptr() == q.data_ptr() + q.nbytes and k.requires_grad is q.requires_grad is False
    # A second decoder leaves them where the first reads them, and both see a change in place.
    place = q.data_ptr()
    again = LeanDecoder(model, 9)
    assert attention.q_proj.bias.data_ptr() == place
    with torch.no_grad():
        k.add_(1.0)
        changed = model(ids[None], use_cache=False).logits[0, -1]
    decoder.reset()
    for one in (decoder, again):
        assert (one(ids) - changed).abs().max() <= 64 * EPS * changed.abs().max()
