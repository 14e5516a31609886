"""Text generation in a lean loop: a static key-value cache and a handful of calls per block, no framework's hundreds.

Reads the blocks of a transformers decoder of the LLaMA kind (RMS norms, rotary positions, grouped-query attention,
gated MLP), dense or packed. Whether a model is of that kind is not decided by its name: the loop's logits are compared
with the model's own on a few tokens, and other models generate through transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.errors import LosaError
from losa.model import find_blocks
from losa_kernels import sparse_linear

# Scaled rotary positions whose frequencies do not depend on the length that is reached.
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class Unsupported(LosaError):
    """The model's blocks are not of the kind that the lean loop computes."""


@dataclass(frozen=True)
class Generated:
    """``tokens``: new token ids. ``decode_seconds``: of all new tokens but the first, which the prompt's pass gives."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


@dataclass(frozen=True)
class _Block:
    attention_norm: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Tensor]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    scaling: float


class LeanDecoder:
    """One sequence at a time through a decoder of the LLaMA kind.

    Args:
        model: a transformers causal LM, dense or ``losa.sparsify``-ed; used as it is, not copied.
        max_length: tokens of prompt and continuation that the cache has room for.

    Raises:
        Unsupported: another kind of model; says what differs.
    """

    def __init__(self, model: nn.Module, max_length: int):
        decoder = model.get_decoder()
        self.embeddings, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        first = self.embeddings.weight
        self.device, self.dtype = first.device, first.dtype
        try:
            _, blocks = find_blocks(model)
            attention = blocks[0].self_attn
            self.head_dim = attention.head_dim
            self.key_heads = attention.k_proj.out_features // self.head_dim
            self.query_heads = attention.q_proj.out_features // self.head_dim
            self.blocks = [self._read(block) for block in blocks]
            self.norm, self.rotary = _norm(decoder.norm), decoder.rotary_emb
        except AttributeError as error:
            raise Unsupported(f"generate: {type(model).__name__} is built differently ({error})") from error
        if getattr(self.rotary, "rope_type", "default") not in FIXED_ROPE:
            raise Unsupported(f"generate: rotary positions of type {self.rotary.rope_type} depend on the length")
        self._check(model)
        self.resize(max_length)

    def resize(self, max_length: int) -> None:
        """Forget what was read, and make room for so many tokens; 0 frees the cache."""
        positions = torch.arange(max_length, device=self.device)[None]
        cos, sin = self.rotary(torch.empty(1, 1, 1, dtype=self.dtype, device=self.device), positions)
        if cos.shape[-1] != self.head_dim:
            raise Unsupported("generate: rotary positions cover a part of each head only")
        half = self.head_dim // 2
        # rotate_half(x) * sin = roll(x) * (-sin, sin): one operation fewer.
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        shape = (len(self.blocks), 2, 1, self.key_heads, max_length, self.head_dim)
        self.cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.max_length, self.length = max_length, 0

    def _read(self, block: nn.Module) -> _Block:
        attention, mlp = block.self_attn, block.mlp
        if getattr(attention, "sliding_window", None):
            raise Unsupported("generate: attention in a sliding window")
        return _Block(
            attention_norm=_norm(block.input_layernorm),
            mlp_norm=_norm(block.post_attention_layernorm),
            qkv=_together([attention.q_proj, attention.k_proj, attention.v_proj]),
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            out=attention.o_proj,
            gate_up=_together([mlp.gate_proj, mlp.up_proj]),
            activation=mlp.act_fn,
            down=mlp.down_proj,
            scaling=attention.scaling,
        )

    def reset(self) -> None:
        self.length = 0

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (tokens,) that follow what was read before -> logits (vocabulary,) of the last one.

        Raises:
            LosaError: the cache is full.
        """
        return self._logits(ids, last=True)[-1]

    def _logits(self, ids: Tensor, last: bool) -> Tensor:
        start, stop = self.length, self.length + len(ids)
        if stop > self.max_length:
            raise LosaError(f"generate: {stop} tokens are more than max_length, {self.max_length}")
        x = self.embeddings(ids[None])
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x = x + block.out(self._attention(block, block.attention_norm(x), cache, cos, sin, start, stop))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, -1)
            x = x + block.down(block.activation(gate) * up)
        self.length = stop
        return self.head(self.norm(x[0, -1:] if last else x[0]))

    def _attention(
        self, block: _Block, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, start: int, stop: int
    ) -> Tensor:
        tokens, queries, keys = x.shape[1], self.query_heads, self.key_heads
        heads = block.qkv(x).view(1, tokens, queries + 2 * keys, self.head_dim)
        if block.q_norm is not None:
            q, k, v = heads.split((queries, keys, keys), 2)
            heads = torch.cat([block.q_norm(q), block.k_norm(k), v], 2)
        heads = heads.transpose(1, 2)
        turned = heads[:, : queries + keys]
        turned = turned * cos + turned.roll(self.head_dim // 2, -1) * sin
        cache[0, :, :, start:stop] = turned[:, queries:]
        cache[1, :, :, start:stop] = heads[:, queries + keys :]
        q, k, v = turned[:, :queries], cache[0, :, :, :stop], cache[1, :, :, :stop]
        if tokens == 1:
            # Queries that share a key head are its rows: no key is repeated, and nothing is masked.
            grouped = q.reshape(1, keys, queries // keys, self.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, scale=block.scaling).reshape(1, 1, -1)
        mask = None
        if start:
            mask = torch.ones(tokens, stop, dtype=torch.bool, device=q.device).tril(start)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=block.scaling, enable_gqa=queries != keys
        )
        return attended.transpose(1, 2).reshape(1, tokens, -1)

    @torch.inference_mode()
    def _check(self, model: nn.Module) -> None:
        """The loop computes what the model computes, read at once and token by token, or it is not used."""
        self.resize(6)
        ids = torch.arange(3, 9, device=self.device) % self.embeddings.weight.shape[0]
        expected = model(ids[None], use_cache=False).logits[0].float()
        found = [self._logits(ids[:-2], last=False), self._logits(ids[-2:-1], last=False)]
        found = torch.cat([*found, self._logits(ids[-1:], last=False)]).float()
        allowed = 64 * torch.finfo(self.dtype).eps * expected.abs().max()
        if found.shape != expected.shape or not (found - expected).abs().max() <= allowed:
            raise Unsupported(f"generate: {type(model).__name__} computes something else than a plain LLaMA block")


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """transformers' RMS norms take six calls where torch has one."""
    eps = getattr(module, "variance_epsilon", None)
    if eps is None:
        return module
    weight = module.weight
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _together(linears: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """All of them on one input, outputs side by side: one product where their rows lie together in memory."""
    group = getattr(linears[0], "group", None)
    if group is None or any(getattr(linear, "group", None) is not group for linear in linears):
        return lambda x: torch.cat([linear(x) for linear in linears], -1)
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return lambda x: sparse_linear(x, group)
    zeros = [torch.zeros(linear.out_features, dtype=group.dtype, device=group.device) for linear in linears]
    parts = [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
    return lambda x: sparse_linear(x, group, torch.cat(parts))


# Decoders wait here between two texts, without a cache, each with what its model looked like. They refer to parts of
# the model, never to the model, which would otherwise live for ever.
_waiting: WeakKeyDictionary[nn.Module, tuple[list, LeanDecoder]] = WeakKeyDictionary()


def _take_decoder(model: nn.Module, max_length: int) -> tuple[list | None, LeanDecoder]:
    """(what the model looks like, its decoder): the one that waits if nothing has changed since, else a new one.

    Taken out, so that two threads never share a cache.
    """
    now = _looks(model)
    before, decoder = _waiting.pop(model, (None, None))
    if decoder is None or before != now:
        return now, LeanDecoder(model, max_length)
    decoder.resize(max_length)
    return now, decoder


def _keep_decoder(model: nn.Module, looks: list | None, decoder: LeanDecoder) -> None:
    if looks is not None:
        decoder.resize(0)
        _waiting[model] = looks, decoder


def forget_decoder(model: nn.Module) -> None:
    """Let go of the linears that a waiting decoder holds on to, before they are replaced."""
    _waiting.pop(model, None)


def _looks(model: nn.Module) -> list | None:
    """What a decoder depends on: which modules there are and where their tensors lie. None if forward methods were
    replaced or hooks hung onto modules: what those do can change unseen."""
    seen: list = []
    for name, module in model.named_modules():
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return None
        seen += name, ref(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen.append((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device))
    return seen


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[dict],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model, tokenizer: of ``losa.load`` or of transformers; the lean loop serves models of the LLaMA kind, others go
            through ``model.generate``.
        prompt: text, or messages ({"role", "content"}) for the tokenizer's chat template.
        temperature: 0 takes the likeliest token.
        top_p: draws from the smallest set of tokens with this share of probability.
        on_text: called with each new piece of text (lean loop only).

    Raises:
        LosaError: an empty prompt, or settings out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise LosaError(
            "generate: expected max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) == 0:
        raise LosaError("generate: the prompt is empty")
    ids = ids.to(model.get_input_embeddings().weight.device)
    stops = _end_tokens(model, tokenizer) if stop_at_eos else set()
    try:
        looks, decoder = _take_decoder(model, len(ids) + max_new_tokens)
    except Unsupported:
        return _through_transformers(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stops)
    generator = torch.Generator(ids.device).manual_seed(seed)
    start = time.perf_counter()
    token = choose(decoder(ids), temperature, top_p, generator)
    first = time.perf_counter()
    tokens, shown = [token], 0
    while True:
        if on_text is not None:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character
                on_text(text[shown:])
                shown = len(text)
        if token in stops or len(tokens) == max_new_tokens:
            break
        token = choose(decoder(ids.new_tensor([token])), temperature, top_p, generator)
        tokens.append(token)
    end = time.perf_counter()
    _keep_decoder(model, looks, decoder)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generated(text, tokens, len(ids), first - start, end - first)


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """logits (vocabulary,) -> a token id."""
    if temperature == 0:
        return int(logits.argmax())
    probability = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probability.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probability, 1, generator=generator))


def _end_tokens(model: nn.Module, tokenizer) -> set[int]:
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    return {token for token in (*stated, tokenizer.eos_token_id) if token is not None}


def _through_transformers(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stops) -> Generated:
    torch.manual_seed(seed)
    options: dict = {"do_sample": temperature > 0, "eos_token_id": sorted(stops) or None}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    start = time.perf_counter()
    output = model.generate(ids[None], max_new_tokens=max_new_tokens, **options)[0]
    tokens = output[len(ids) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generated(text, tokens, len(ids), 0.0, time.perf_counter() - start)
