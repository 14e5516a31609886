"""Rows to tokens and labels: layouts, tool calls, null and parts of text; malformed rows are named."""

from __future__ import annotations

import json

import pytest

from losa.data.rendering import Renderer
from losa.data.row_files import Row
from losa.data.sequences import IGNORED
from losa.errors import DataError
from losa.recipe.sources import DataSource
from tests.helpers.conversations import CHATML, QWEN3, SOURCE, TWO, chat, learnt
from tests.helpers.rows import ALPACA, DIALOGUE, TEMPLATE, bpe_tokenizer
from tests.helpers.tiny import tiny_tokenizer


def learnt_text(tokenizer, ids, labels):
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), bpe_tokenizer(), bpe_tokenizer(bos=True)])
def test_plain_layout(tokenizer):
    source = DataSource(path="x")
    ids, labels = Renderer(tokenizer, "response")(Row("row", ALPACA), source)
    text = "### Instruction:\nAdd.\n\n1 and 2\n\n### Response:\nIt is 3."
    assert tokenizer.decode(ids).removeprefix("<bos>").strip() == f"{text}<eos>"
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    answer = "It is 3.<eos>"
    assert learnt_text(tokenizer, ids, labels).endswith(answer)
    # One token may hold the prompt's end and the answer's first letters; no further token of the prompt is learnt.
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert answer.endswith(tokenizer.decode(ids[first + 1 :]))
    assert Renderer(tokenizer, "all")(Row("row", ALPACA), source) == (ids, ids)


def test_chat_template_and_several_answers():
    tokenizer = tiny_tokenizer(TEMPLATE)
    render = Renderer(tokenizer, "response")
    ids, labels = render(Row("row", ALPACA), DataSource(path="x"))
    assert tokenizer.decode(ids) == "<user>Add.\n\n1 and 2<eos><assistant>It is 3.<eos>"
    assert learnt_text(tokenizer, ids, labels) == "It is 3.<eos>"
    ids, labels = render(Row("row", DIALOGUE), DataSource(path="x"))
    assert learnt_text(tokenizer, ids, labels) == "Hello<eos>See you<eos>"
    trailing = {"messages": [*DIALOGUE["messages"], {"role": "user", "content": "?"}]}
    assert learnt_text(tokenizer, *render(Row("row", trailing), DataSource(path="x"))) == "Hello<eos>See you<eos>"


def test_alpaca_without_input_and_text_rows():
    tokenizer = tiny_tokenizer(TEMPLATE)
    render = Renderer(tokenizer, "response")
    for empty in ({"input": ""}, {"input": None}, {}):
        row = {"instruction": "Go", "output": "Gone"} | empty
        assert tokenizer.decode(render(Row("row", row), DataSource(path="x"))[0]).startswith("<user>Go<eos>")
    ids, labels = render(Row("row", {"body": "words"}), DataSource(path="x", text_field="body"))
    assert tokenizer.decode(ids) == "words<eos>" and labels == ids


def test_template_that_refuses_a_row():
    tokenizer = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="row 7: .*refuses.*roles must alternate"):
        Renderer(tokenizer, "response")(Row("row 7", ALPACA), DataSource(path="x"))


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
