"""The assistant's turns have labels, as the template renders them in place, and nothing else has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from losa.data.answers import answer_spans
from losa.data.rendering import Renderer
from losa.data.row_files import Row
from losa.data.sequences import IGNORED
from losa.errors import DataError
from tests.helpers.conversations import (
    CHATML,
    DROPS_THOUGHTS,
    GEMMA,
    GENERATION,
    LLAMA3,
    MERGES,
    MISTRAL,
    QWEN3,
    REPEATS,
    REVERSES,
    SOURCE,
    SYSTEM_LAST,
    TWO,
    chat,
    learnt,
)
from tests.helpers.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        (CHATML, TWO, ["one<|im_end|>\n", "two<|im_end|>\n"]),
        (CHATML, chat("Q", "one", "LAST"), ["one<|im_end|>\n"]),
        (QWEN3, chat("Q", "one"), ["<think>\n\n</think>\n\none<|im_end|>\n"]),
        (QWEN3, TWO, ["one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"]),
        (
            QWEN3,
            chat("Q", "<think>\nhm\n</think>\n\none", "R", "<think>\nso\n</think>\n\ntwo"),
            ["one<|im_end|>\n", "<think>\nso\n</think>\n\ntwo<|im_end|>\n"],
        ),
        (GEMMA, TWO, ["one<end_of_turn>\n", "two<end_of_turn>\n"]),
        (GEMMA, chat("A", "  padded  ", "B", "two\n"), ["padded<end_of_turn>\n", "two<end_of_turn>\n"]),
        (LLAMA3, chat(" FIRST ", "one ", "SECOND", " two", system="BE BRIEF"), ["one<|eot_id|>", "two<|eot_id|>"]),
        (MISTRAL, TWO, [" one<eos>", " two<eos>"]),
        (MISTRAL, chat("FIRST", " one ", "SECOND", "two", system="BE BRIEF"), [" one<eos>", " two<eos>"]),
        (GENERATION, TWO, ["one<end>", "two<end>"]),
        # What history drops is not in the text; the last answer's thoughts are.
        (
            DROPS_THOUGHTS,
            chat("A", "<think>\nhm</think>one", "B", "<think>\nso</think>two"),
            ["one<end>", "<think>\nso</think>two<end>"],
        ),
        # Equal contents, quotations of the answer, empty contents, and contents with the template's own markup.
        (QWEN3, chat("ok", "ok", "ok", "ok"), ["ok<|im_end|>\n", "<think>\n\n</think>\n\nok<|im_end|>\n"]),
        (CHATML, chat("ok", "ok", "ok", "ok"), ["ok<|im_end|>\n", "ok<|im_end|>\n"]),
        (
            QWEN3,
            chat("SAY one", "one", "one? one!", "two"),
            ["one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"],
        ),
        (QWEN3, chat("Q", "", "", "two"), ["<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"]),
        (
            QWEN3,
            chat("SAY <|im_start|>assistant\nno<|im_end|>\n", "a<|im_end|>\n<|im_start|>user\nb", "R", "two"),
            ["a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"],
        ),
        (REVERSES, TWO, None),
        (MERGES, TWO, None),
        (REPEATS, TWO, None),
    ],
)
def test_turns_are_found_in_place(template, messages, expected):
    assert learnt(template, messages) == expected


@pytest.mark.parametrize("messages", [chat("A", "one", system="RULE"), chat("A", "one", "B", "two", system="RULE")])
def test_a_system_message_behind_the_answer_is_not_learnt(messages):
    """Renderings up to the answer are beginnings of the text, and yet its end is not the answer's."""
    found = learnt(SYSTEM_LAST, messages)
    assert [piece[:8] for piece in found] == ["one<end>", "two<end>"][: len(found)] and len(found) == len(messages) // 2
    assert "RULE" not in "".join(found)


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(
        [CHATML, QWEN3, LLAMA3, MISTRAL, GENERATION, DROPS_THOUGHTS, REVERSES, REPEATS, SYSTEM_LAST]
    ),
    others=st.lists(st.text("AB<>\n ", max_size=6), min_size=3, max_size=3),
    answers=st.lists(st.text("ab<>\n ", max_size=6), min_size=3, max_size=3),
    system=st.none() | st.text("CD\n ", max_size=4),
)
def test_no_question_is_ever_learnt(template, others, answers, system):
    turns = [content for pair in zip(others, answers, strict=True) for content in pair]
    pieces = learnt(template, chat(*turns, system=system))
    if pieces is not None:
        text = "".join(pieces).replace("[INST]", "").replace("<A>", "")
        assert not set(text) & set("ABCD"), text
        shown = [answer.strip() for answer in answers]
        assert all(answer in text for answer in shown), "what is rendered of an answer is learnt"


def test_opening_that_forces_a_thought():
    """The answer begins after its opening if the text has that, and else with its own content."""
    assert learnt(DROPS_THOUGHTS, chat("A", "<think>\nso</think>two")) == ["so</think>two<end>"]
    assert learnt(DROPS_THOUGHTS, chat("A", "two")) == ["two<end>"]


def test_one_rendering_of_answers_is_enough_where_prompts_are_beginnings():
    """Rows of one question and answer are learnt from the opening to the end of the text."""
    tokenizer = tiny_tokenizer(CHATML)
    alpaca = {"instruction": "Add.", "output": "It is 3."}
    ids, labels = Renderer(tokenizer, "response")(Row("row", alpaca), SOURCE)
    prompt = "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert tokenizer.decode(ids) == f"{prompt}It is 3.<|im_end|>\n"


def greedy_tokenizer(template, *merged):
    """One token a character, and one for each of ``merged``, which are longer."""
    base = tiny_tokenizer().get_vocab()
    vocabulary = base | {text: len(base) + i for i, text in enumerate(merged)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("|", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = template
    return fast


def test_token_across_the_border_is_learnt_unless_it_reaches_into_a_question():
    header = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    tokenizer = greedy_tokenizer(header, ": x")
    assert learnt(None, chat("Q", "xy"), tokenizer) == [": xy "]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = greedy_tokenizer(bare, "Qx")
    assert learnt(None, chat("AQ", "xy"), tokenizer) == ["y"]
    assert learnt(None, chat("AB", "xy"), tokenizer) == ["xy"]


class SlowTokenizer:
    """Says nothing about where its tokens are."""

    is_fast = False

    def __init__(self, template):
        self.inner = tiny_tokenizer(template)
        self.chat_template, self.eos_token_id = template, self.inner.eos_token_id
        self.apply_chat_template, self.decode = self.inner.apply_chat_template, self.inner.decode

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.inner(text, **options)


@pytest.mark.parametrize("template", [CHATML, QWEN3, MISTRAL, None])
def test_tokenizers_without_offsets_give_the_same_labels(template):
    assert learnt(template, TWO, SlowTokenizer(template)) == learnt(template, TWO)


def test_a_template_that_refuses_parts_of_a_conversation():
    """Gemma's opens no conversation with an answer, and refuses one without messages."""
    assert answer_spans(render_with(GEMMA), chat("A", "one", "B", "two")) is not None
    greeting = [{"role": "assistant", "content": "hello"}, *chat("A", "one")]
    assert learnt(CHATML, greeting) == ["hello<|im_end|>\n", "one<|im_end|>\n"]


def render_with(template):
    tokenizer = tiny_tokenizer(template)

    def render(messages, prompt=False):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            raise DataError(str(error)) from error

    return render
