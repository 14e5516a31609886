"""Conversations: the assistant's turns have labels, as the template renders them in place, and nothing else has."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from losa.data.answers import answer_spans
from losa.data.rendering import Renderer
from losa.data.sources import Row
from losa.data.tokens import IGNORED, calibration_tokens, training_sequences
from losa.errors import DataError
from losa.recipe.sections import DataSource
from tests.helpers.tiny import tiny_tokenizer

SOURCE = DataSource(path="x")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A thinking block in answers after the last question only; tool results are part of the user's turn.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system's message goes into the last question, wherever that is.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if system is defined and loop.index0 >= messages | length - 2 %}{{ system }}\n\n{% endif %}"
    "{{ m.content.strip() }}[/INST]{% else %} {{ m.content.strip() }}<eos>{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# DeepSeek-R1's: thoughts are dropped from history, and an answer is opened with one.
DROPS_THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>{% else %}<U>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
REVERSES = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MERGES = (
    "{% for r in ['user', 'assistant'] %}<{{ r }}>{% for m in messages if m.role == r %}{{ m.content }} {% endfor %}"
    "{% endfor %}"
)
REPEATS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<again>{{ messages[1].content }}"
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% for m in messages if m.role == 'system' %}<rule>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*contents, system=None):
    turns = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def learnt(template, messages, tokenizer=None, **fields):
    """Text with labels, a list of its pieces; None: the row is skipped."""
    tokenizer = tokenizer or tiny_tokenizer(template)
    rendered = Renderer(tokenizer, "response")(Row("row", {"messages": messages} | fields), SOURCE)
    if rendered is None:
        return None
    ids, labels = rendered
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    pieces, inside = [], False
    for label in labels:
        if label != IGNORED:
            if not inside:
                pieces.append([])
            pieces[-1].append(label)
        inside = label != IGNORED
    return [tokenizer.decode(piece) for piece in pieces]


TWO = chat("FIRST", "one", "SECOND", "two")


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


def test_rows_that_cannot_be_told_are_skipped_and_counted(tmp_path, caplog):
    # Three messages are reversed, one exchange is not.
    template = "{% if messages | length > 2 %}" + REVERSES + "{% else %}" + CHATML + "{% endif %}"
    rows = [{"messages": TWO}] * 3 + [{"messages": chat("HELLO", "learn me " * 9)}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer(template)
    with caplog.at_level(logging.WARNING, "losa"):
        data = training_sequences([DataSource(path=str(path))], tokenizer, 16, 0)
    assert (
        "train.data: in 3 of 4 rows" in caplog.text and "skipped" in caplog.text and "chat.jsonl', line" in caplog.text
    )
    text = tokenizer.decode(data.input_ids.flatten())
    assert "FIRST" not in text and "HELLO" in text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    with pytest.raises(DataError, match="in 3 of 3 rows the chat template does not show"):
        training_sequences([DataSource(path=str(path))], tokenizer, 16, 0)
    # Where everything is learnt, nothing has to be told apart.
    assert len(training_sequences([DataSource(path=str(path))], tokenizer, 16, 0, train_on="all"))


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


CALL = {"type": "function", "id": "call00001", "function": {"name": "find_mill", "arguments": {"by": "river"}}}
AGENT = [
    {"role": "user", "content": "WHERE?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "BY THE RIVER", "tool_call_id": "call00001", "name": "find_mill"},
    {"role": "assistant", "content": "by the river"},
]
TOOLS = [{"type": "function", "function": {"name": "find_mill", "parameters": {}}}]
# Renders a call in place of a content, and what it was told of tools.
CALLS = (
    "{% for t in tools or [] %}TOOL {{ t.function.name }};{% endfor %}{% for m in messages %}<{{ m.role }}"
    "{% if m.tool_call_id is defined %} {{ m.tool_call_id }} {{ m.name }}{% endif %}>"
    "{% if not m.content %}{% for c in m.tool_calls %}call {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tool_calls_are_learnt_and_tools_told():
    call = '<tool_call>\n{"name": "find_mill", "arguments": {"by": "river"}}\n</tool_call><|im_end|>\n'
    with_empty = [AGENT[0], AGENT[1] | {"content": ""}, *AGENT[2:]]
    assert learnt(QWEN3, with_empty) == [call, "<think>\n\n</think>\n\nby the river<|im_end|>\n"]
    tokenizer = tiny_tokenizer(CALLS)
    expected = ['call find_mill {"by": "river"}<end>', "by the river<end>"]
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert learnt(None, AGENT, tokenizer, tools=tools) == expected
        ids, _ = Renderer(tokenizer, "all")(Row("row", {"messages": AGENT, "tools": tools}), SOURCE)
        assert tokenizer.decode(ids).startswith("TOOL find_mill;<user>WHERE?")
        assert "<tool call00001 find_mill>BY THE RIVER<end>" in tokenizer.decode(ids)
    assert learnt(None, AGENT, tokenizer) == expected and learnt(None, AGENT, tokenizer, tools=[]) == expected


def test_markup_before_a_tool_call_is_learnt_without_an_opening():
    """Mistral's: answers have no opening, and the tools stand before the last question."""
    template = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}"
        "[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
        "{% elif m.tool_calls %}[CALLS] {{ m.tool_calls[0].function | tojson }}<eos>"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    messages = [*chat("A"), call, {"role": "tool", "content": "7"}, *chat("X", "seven", "B", "two")[1:]]
    found = learnt(template, messages, tools=[{"type": "function", "function": {"name": "add"}}])
    assert found == ['[CALLS] {"name": "add"}<eos>', " seven<eos>", " two<eos>"]


def test_null_is_not_written_as_a_word():
    prints = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]"
        "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learnt(prints, AGENT) == ["[find_mill]<end>", "by the river<end>"]
    says_none = [{"role": "user", "content": "None"}, *AGENT[1:]]
    assert learnt(prints, says_none) == ["[find_mill]<end>", "by the river<end>"]


def test_fields_of_null_are_left_out():
    """Parquet files have every message's fields in every other one."""
    checks = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls is defined %}{{ m.tool_calls[0] }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    messages = [message | {"tool_calls": None, "name": None} for message in chat("A", "one")]
    assert learnt(checks, messages) == ["<assistant>one"], "a template without an opening of answers"


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]
    assert learnt(CHATML, chat("A", parts)) == ["one<|im_end|>\n"]


@pytest.mark.parametrize(
    "message, said",
    [
        ("hello", r"messages\[1\]: expected an object with role and content, got 'hello'"),
        ({"content": "x"}, r"messages\[1\].role: expected text, got null"),
        ({"role": 3, "content": "x"}, r"messages\[1\].role: expected text, got int"),
        ({"role": "assistant"}, r"messages\[1\].content: expected text, got null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[1\].content: expected text, got null"),
        ({"role": "assistant", "content": {"a": 1}}, r"messages\[1\].content: expected text, got dict"),
        (
            {"role": "assistant", "content": [{"type": "image"}]},
            r"messages\[1\].content\[0\]: expected a part of type text",
        ),
        ({"role": "assistant", "content": ["x"]}, r"messages\[1\].content\[0\]: .*got 'x'"),
        ({"role": "assistant", "content": None, "tool_calls": "f()"}, r"messages\[1\].tool_calls: expected a list"),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, r"messages\[1\].tool_calls: .*does not render"),
    ],
)
def test_malformed_messages_are_named(message, said):
    with pytest.raises(DataError, match=f"row 7: {said}"):
        Renderer(tiny_tokenizer(CHATML), "all")(Row("row 7", {"messages": [*chat("A"), message]}), SOURCE)


def test_malformed_tools_are_named():
    for tools, said in (
        ("[{", "not JSON"),
        ("7", "expected a list"),
        ([3], "expected a list"),
        ({"a": 1}, "expected a"),
    ):
        with pytest.raises(DataError, match=f"row 7: field 'tools': {said}"):
            Renderer(tiny_tokenizer(CHATML), "all")(Row("row 7", {"messages": TWO, "tools": tools}), SOURCE)


def test_tool_calls_need_a_template():
    with pytest.raises(DataError, match=r"messages\[1\].tool_calls: .*no chat template"):
        Renderer(tiny_tokenizer(), "all")(Row("row", {"messages": AGENT}), SOURCE)


def test_blank_rows_are_no_documents(tmp_path):
    rows = [{"text": text} for text in ("", " = title = \n", "", "\n", "words of a document\n", "  ")]
    path = tmp_path / "wiki.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    data = training_sequences([DataSource(path=str(path))], tokenizer, 4, 0)
    stream = data.input_ids.flatten()
    assert (stream == tokenizer.eos_token_id).sum() <= 2
    assert not ((stream[1:] == tokenizer.eos_token_id) & (stream[:-1] == tokenizer.eos_token_id)).any()
    path.write_text('{"text": ""}\n{"text": " \\n"}\n')
    for read in (
        lambda: training_sequences([DataSource(path=str(path))], tokenizer, 4, 0),
        lambda: calibration_tokens([DataSource(path=str(path))], tokenizer, 1, 4, 0),
    ):
        with pytest.raises(DataError, match="the text of all 2 rows is blank"):
            read()
