"""Generation at its edges: both loops alike, streamed text, settings, prompts, weights and models that fail."""

from __future__ import annotations

import logging
import math
import time

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from losa.errors import LosaError, ModelError, NumericsError
from losa.inference import generation
from losa.inference.decoding import Unsupported
from losa.inference.generation import generate
from losa.inference.sampling import choose
from losa.inference.sparsify import sparsify
from tests.helpers.command_line import invoke
from tests.helpers.decoders import LLAMA_KIND, build
from tests.helpers.logs import said
from tests.helpers.other_models import OTHERS, halved, likeliest, llama, other, save, scaled
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(params=["lean", "transformers"])
def loop(request, monkeypatch):
    """Both loops, for models that the lean one serves."""
    if request.param == "transformers":

        def refuse(*_):
            raise Unsupported("generate: as the test wants it")

        monkeypatch.setattr(generation, "take_decoder", refuse)
    return request.param


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_stream_their_text(name, caplog):
    model, tokenizer, pieces = other(name), tiny_tokenizer(), []
    prompt = "the old mill"
    found = generate(model, tokenizer, prompt, max_new_tokens=20, stop_at_eos=False, on_text=pieces.append)
    ids = tokenizer(prompt).input_ids
    assert found.tokens == likeliest(model, ids, 20) and len(set(found.tokens)) > 1
    assert "".join(pieces) == found.text and len(pieces) > 5
    assert prompt + found.text == tokenizer.decode(ids + found.tokens, skip_special_tokens=True)
    assert found.fallback and not found.fallback.startswith("generate")
    assert found.prefill_seconds > 0 and found.decode_seconds > 0 and found.tokens_per_second > 0
    assert generate(model, tokenizer, prompt, max_new_tokens=20, stop_at_eos=False).text == found.text
    assert not said(caplog)


def test_both_loops_draw_the_same(loop):
    found = generate(llama(), tiny_tokenizer(), "hi", max_new_tokens=20, temperature=0.9, top_p=0.8, seed=5)
    assert found.fallback == (None if loop == "lean" else "as the test wants it")
    alone = torch.Generator().manual_seed(5)
    model, ids = llama(), tiny_tokenizer()("hi").input_ids
    for token in found.tokens:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert int(choose(logits, 0.9, 0.8, alone)) == token
        ids.append(token)


def test_settings_of_the_checkpoint(loop, caplog):
    """Its end tokens count, in both loops; what else it says is named once, and changes nothing."""
    model, tokenizer = llama(), tiny_tokenizer()
    plain = generate(model, tokenizer, "hello there", max_new_tokens=30, stop_at_eos=False)
    stated = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "suppress_tokens": plain.tokens}
    stated |= {"max_length": 3, "no_repeat_ngram_size": 1, "min_length": 90, "num_beams": 1, "top_k": 50, "our_own": 7}
    model.generation_config = transformers.GenerationConfig(**stated)
    with caplog.at_level(logging.WARNING, logger="losa"):
        for _ in range(2):
            again = generate(model, tokenizer, "hello there", max_new_tokens=30, stop_at_eos=False)
            assert again.tokens == plain.tokens
    (record,) = said(caplog)
    for name in ("repetition_penalty=9.0", "suppress_tokens=[", "no_repeat_ngram_size=1", "min_length=90", "our_own=7"):
        assert name in record
    assert not any(name in record for name in ("num_beams", "do_sample", "max_length", "temperature", "top_k"))
    end = plain.tokens[7]
    model.generation_config.eos_token_id = [96, end]
    stopped = generate(model, tokenizer, "hello there", max_new_tokens=30)
    assert stopped.tokens == plain.tokens[: plain.tokens.index(end) + 1]
    assert model.generation_config.repetition_penalty == 9.0


def test_settings_of_draws_are_named_for_draws(caplog):
    model = llama()
    model.generation_config = transformers.GenerationConfig(top_k=50, min_p=0.1)
    generate(model, tiny_tokenizer(), "hi", max_new_tokens=2)
    assert not said(caplog)
    generate(model, tiny_tokenizer(), "hi", max_new_tokens=2, temperature=0.5)
    assert said(caplog) == ["generate: settings of the checkpoint that are not applied: top_k=50, min_p=0.1"]


@pytest.mark.parametrize("name", ["learned positions", "no blocks of linears"])
def test_a_table_of_positions_ends(name, caplog):
    model, tokenizer = other(name), tiny_tokenizer()
    with pytest.raises(ModelError, match="generate: prompt: 65 tokens are more than the 64 positions"):
        generate(model, tokenizer, "a" * 65)
    assert generate(model, tokenizer, "a" * 44, max_new_tokens=21, stop_at_eos=False).tokens and not said(caplog)
    for prompt, made in ((60, 5), (64, 1)):
        caplog.clear()
        found = generate(model, tokenizer, "a" * prompt, max_new_tokens=100, stop_at_eos=False)
        assert found.tokens == likeliest(model, tokenizer("a" * prompt).input_ids, made)
        (record,) = said(caplog)
        assert record.startswith(f"generate: {made} new tokens instead of 100: the model has 64 positions")


def test_rotary_positions_go_on_with_a_warning(loop, caplog):
    model = llama()
    model.config.max_position_embeddings = 16
    for _ in range(2):
        assert len(generate(model, tiny_tokenizer(), "hello", max_new_tokens=30, stop_at_eos=False).tokens) == 30
    (record,) = said(caplog)
    assert "34 tokens are more than the 16 positions" in record


def test_tokens_without_embeddings(loop):
    model, tokenizer = llama(), tiny_tokenizer("{{ messages[0]['content'] }}<new>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    for prompt in ("hi<new>", [{"role": "user", "content": "hi"}]):
        with pytest.raises(ModelError, match="generate: prompt: the tokenizer gives token 98, but the model has 98"):
            generate(model, tokenizer, prompt)


TEMPLATES = {
    None: "has no chat template",
    "{{ raise_exception('system roles only') }}": r"refuses the messages \(system roles only\)",
    "{% for m in %}": "refuses the messages",
    "{{ messages[3].content.nothing }}": "refuses the messages",
    "{{ 1 / 0 }}": r"refuses the messages \(division by zero\)",
    "{# nothing #}": "the prompt is empty",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_fail(template, tmp_path):
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(LosaError, match=TEMPLATES[template]):
        generate(llama(), tiny_tokenizer(template), message)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -0.1},
        {"top_p": math.nan},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**30},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_settings_out_of_range(settings, tmp_path):
    with pytest.raises(LosaError, match="generate: (expected max_new_tokens|seed: expected)"):
        generate(llama(), tiny_tokenizer(), "hi", **settings)


def test_settings_at_their_ends(loop):
    model, tokenizer = llama(), tiny_tokenizer()
    first = generate(model, tokenizer, "hi", max_new_tokens=5, stop_at_eos=False).tokens
    cold = generate(model, tokenizer, "hi", max_new_tokens=5, stop_at_eos=False, temperature=1e-300, seed=2**64 - 1)
    assert cold.tokens == first
    hot = generate(model, tokenizer, "hi", max_new_tokens=40, stop_at_eos=False, temperature=1e300)
    assert len(set(hot.tokens)) > 20
    assert len(generate(model, tokenizer, "hi", max_new_tokens=3, top_p=1e-300, temperature=1.0).tokens) == 3


def test_a_cache_that_does_not_fit(monkeypatch):
    with pytest.raises(LosaError, match="the cache for 2,147,483,649 tokens does not fit into memory"):
        generate(tiny_llama(layers=40, hidden=64), tiny_tokenizer(), "hi", max_new_tokens=2**31 - 1)


def test_prompts_that_are_odd(tmp_path):
    model, tokenizer = llama(), tiny_tokenizer("{{ messages[0]['content'] }}")
    for prompt in ("ab\udcff", [{"role": "user", "content": "ab\udcff"}]):
        with pytest.raises(LosaError, match=r"the prompt is not Unicode text \('\\udcff' at character 2"):
            generate(model, tokenizer, prompt)
    found = generate(model, tokenizer, "<eos><eos>", max_new_tokens=4, stop_at_eos=False)
    assert found.text == tokenizer.decode(found.tokens, skip_special_tokens=True) and found.prompt_tokens == 2
    source = save(model, tokenizer, tmp_path)
    for arguments in (("ab\udcff",), ("hi", "--seed", -1), ("hi", "--max-new-tokens", 2**31)):
        done = invoke("generate", source, "--dense", "--prompt", *arguments)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and "losa: generate: " in done.output


def test_text_that_a_tokenizer_cannot_encode(loop):
    plain = Tokenizer(models.WordLevel({"h": 0, "i": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    for prompt in ("ho", "hi there"):
        with pytest.raises(LosaError, match="the tokenizer cannot encode the prompt .*Missing"):
            generate(llama(), tokenizer, prompt)


def test_the_time_of_a_prompt_is_its_passes(monkeypatch):
    taken = generation.take_decoder

    def slow(*arguments):
        time.sleep(0.5)
        return taken(*arguments)

    monkeypatch.setattr(generation, "take_decoder", slow)
    for model in (llama(), other("recurrent")):
        assert generate(model, tiny_tokenizer(), "hi", max_new_tokens=1).prefill_seconds < 0.5


def byte_tokenizer():
    """One token a byte, as SentencePiece's for what it has no word for."""
    tokens = {"<unk>": 0, "<eos>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)} | {"\u2581a": 258}
    plain = Tokenizer(models.BPE(tokens, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    plain.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>")


def test_what_is_shown_is_what_is_returned(loop, monkeypatch):
    """Half of a character at the end is shown too."""
    model, tokenizer, pieces = scaled(tiny_llama(layers=1)), byte_tokenizer(), []
    model.resize_token_embeddings(259)
    script = [2 + byte for byte in "\u2581".encode()] + [258] + [2 + byte for byte in "\U0001f600".encode()[:3]]
    taken = iter(script)
    monkeypatch.setattr(generation, "choose", lambda *_: torch.tensor([next(taken)]))
    options = {"temperature": 1.0, "stop_at_eos": False, "max_new_tokens": len(script)}
    found = generate(model, tokenizer, "a", on_text=pieces.append, **options)
    assert "".join(pieces) == found.text and found.text.endswith("\u2581 a" + "\ufffd" * 3)


def spoiled(name, value):
    model = halved(llama())
    weight = model.get_parameter(name)
    weight.view(-1)[weight.numel() // 2 + 1] = value
    return model


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(name, value, temperature):
    for model in (spoiled(name, value), sparsify(spoiled(name, value))):
        with pytest.raises(NumericsError, match=f"logits are not finite \\({name} holds values that are not"):
            generate(model, tiny_tokenizer(), "hello", temperature=temperature)
    with pytest.raises(NumericsError, match="lm_head.weight"):
        model = other("recurrent", tie_word_embeddings=False)
        model.lm_head.weight[5, 3] = value
        generate(model, tiny_tokenizer(), "hello", temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_stop_being_finite(loop, temperature):
    model, pieces = llama(), []

    def spoil(text):
        pieces.append(text)
        if len(pieces) == 3:
            model.model.layers[0].self_attn.v_proj.weight[:] = math.nan

    with pytest.raises(NumericsError, match="v_proj.weight holds values that are not"):
        generate(model, tiny_tokenizer(), "abc", stop_at_eos=False, temperature=temperature, on_text=spoil)


def test_half_precision_that_overflows(loop):
    model = llama().half()
    model.model.norm.weight[:] = 6e4
    with pytest.raises(NumericsError, match=r"all weights are; torch.float\d\d may be too narrow"):
        generate(model, tiny_tokenizer(), "hello")


def test_choosing_from_what_is_not_finite():
    generator = torch.Generator().manual_seed(0)
    for value in (math.nan, math.inf):
        for top_p in (1.0, 0.5):
            assert choose(torch.tensor([0.0, value, 1.0]), 1.0, top_p, generator).tolist() == [-1]
    # A model may rule tokens out.
    drawn = {int(choose(torch.tensor([0.0, -math.inf, 0.5]), 1e300, 1.0, generator)) for _ in range(40)}
    assert drawn == {0, 2}


def test_a_models_own_errors(loop):
    model = llama()
    model.model.norm.forward = lambda x: 1 / 0 if x.shape[1] == 5 else x
    with pytest.raises(ModelError, match=r"LlamaForCausalLM fails in transformers \(ZeroDivisionError: division"):
        generate(model, tiny_tokenizer(), "hello")


@pytest.mark.parametrize("name", ["windows", "learned positions"])
def test_errors_of_the_listener_pass(name):
    def stop(text):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generate(other(name), tiny_tokenizer(), "hello", max_new_tokens=30, on_text=stop)


def test_choosing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.0, 3.0, 2.0, -5.0])
    assert choose(scores, 0.0, 1.0, generator) == 1
    assert {int(choose(scores, 1.0, 0.5, generator)) for _ in range(50)} == {1}
    drawn = torch.tensor([choose(scores, 1.0, 1.0, generator) for _ in range(4000)])
    expected = scores.softmax(0)
    counted = torch.bincount(drawn, minlength=4) / 4000
    # Five standard deviations of a count.
    assert ((counted - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1 / 4000).all()


def test_messages_sampling_and_bad_settings():
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer("{{ messages[0]['content'] }}")
    said = generate(model, tokenizer, [{"role": "user", "content": "hi"}], max_new_tokens=3)
    assert said.tokens == generate(model, tokenizer, "hi", max_new_tokens=3).tokens
    drawn = [generate(model, tokenizer, "hi", max_new_tokens=12, temperature=2.0, seed=s).tokens for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for settings in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}):
        with pytest.raises(LosaError, match="generate: expected max_new_tokens"):
            generate(model, tokenizer, "hi", **settings)
    with pytest.raises(LosaError, match="prompt is empty"):
        generate(model, tokenizer, "")


def test_generation_stops_at_the_end_token():
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()
    first = generate(model, tokenizer, "abc", max_new_tokens=5, stop_at_eos=False).tokens
    model.generation_config.eos_token_id = [first[2]]
    stopped = generate(model, tokenizer, "abc", max_new_tokens=5).tokens
    assert stopped == first[: first.index(first[2]) + 1]
