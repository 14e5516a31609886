"""Training sequences, calibration samples and evaluation text: what goes in comes out token by token."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.data.sequences import IGNORED
from losa.data.tokens import calibration_tokens, evaluation_tokens, training_sequences
from losa.errors import DataError
from losa.recipe.sources import DataSource
from tests.helpers.conversations import CHATML, REVERSES, TWO, chat
from tests.helpers.rows import ALPACA, DIALOGUE, TEMPLATE, bpe_tokenizer, write
from tests.helpers.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "row, form, message",
    [
        ({"question": "x"}, "auto", r"line 2: unknown format.*\['question'\]"),
        ({"instruction": "x"}, "alpaca", "line 2: a row in alpaca format needs 'output'"),
        ({"text": "x"}, "messages", "line 2: a row in messages format needs 'messages'"),
        ({"text": None}, "auto", "line 2: field 'text': expected text, got null"),
        ({"instruction": "x", "output": 3}, "auto", "line 2: field 'output': expected text, got int"),
        ({"messages": "x"}, "auto", "line 2: field 'messages': expected a list"),
        ({"messages": [{"role": "user"}]}, "auto", r"line 2: messages\[0\].content: expected text, got null"),
        ({"messages": [{"role": "user", "content": "x"}]}, "auto", "expected an assistant's message, got none"),
    ],
)
@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_bad_rows_are_named(tmp_path, row, form, message, use):
    good = {"auto": {"text": "fine"}, "alpaca": ALPACA, "messages": DIALOGUE}[form]
    source = write(tmp_path / "a.jsonl", [good, row]).model_copy(update={"format": form})
    with pytest.raises(DataError, match=message):
        if use == "train":
            training_sequences([source], tiny_tokenizer(), 8, 0)
        else:
            evaluation_tokens(source, tiny_tokenizer())


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text("abc ", min_size=0, max_size=30), min_size=1, max_size=6), length=st.integers(2, 9))
def test_packing_keeps_every_token_in_order(tmp_path_factory, texts, length):
    tokenizer = tiny_tokenizer()
    source = write(tmp_path_factory.mktemp("pack") / "a.jsonl", [{"text": t} for t in texts])
    texts = [t for t in texts if t.strip()]
    stream = sorted(f"{t}<eos>" for t in texts)
    total = sum(len(t) + 1 for t in texts)
    if not texts:
        with pytest.raises(DataError, match="rows is blank"):
            training_sequences([source], tokenizer, length, 3)
        return
    if total < length:
        with pytest.raises(DataError, match=f"{total} tokens are less than one sequence"):
            training_sequences([source], tokenizer, length, 3)
        return
    data = training_sequences([source], tokenizer, length, 3)
    assert len(data) == total // length and data.input_ids.shape == data.labels.shape == (len(data), length)
    assert data.input_ids.dtype == data.labels.dtype == torch.int64
    assert (data.labels[:, 0] == IGNORED).all() and torch.equal(data.labels[:, 1:], data.input_ids[:, 1:])
    decoded = tokenizer.decode(data.input_ids.flatten())
    if total % length == 0:
        assert sorted(f"{t}<eos>" for t in decoded.split("<eos>")[:-1]) == stream
    else:
        assert all(f"{t}<eos>" in stream for t in decoded.split("<eos>")[:-1])


def test_max_tokens_seed_and_slices(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    first = write(tmp_path / "a.jsonl", [{"text": f"a{i:03}"} for i in range(40)])
    second = write(tmp_path / "b.jsonl", [{"text": f"b{i:03}"} for i in range(40)])
    whole = training_sequences([first, second], tokenizer, 10, 0)
    assert len(whole) == 40
    with caplog.at_level(logging.WARNING, "losa"):
        capped = training_sequences([first, second], tokenizer, 10, 0, max_tokens=119)
        assert not caplog.records
        assert training_sequences([first, second], tokenizer, 10, 0, max_tokens=4000).input_ids.equal(whole.input_ids)
    assert len(caplog.records) == 1 and "40 sequences" in caplog.text and "400 that" in caplog.text
    assert capped.input_ids.equal(whole.input_ids[:11]) and capped.labels.equal(whole.labels[:11])
    text = tokenizer.decode(whole.input_ids[:11].flatten())
    assert "a" in text and "b" in text, "sources are shuffled together"
    other = training_sequences([first, second], tokenizer, 10, 1)
    assert not other.input_ids.equal(whole.input_ids)
    part = whole.slice(5, 8)
    assert len(part) == 3 and part.input_ids.data_ptr() == whole.input_ids[5:].data_ptr()
    with pytest.raises(DataError, match="max_tokens: expected at least train.length, 10, got 9"):
        training_sequences([first], tokenizer, 10, 0, max_tokens=9)


def test_nothing_to_learn_is_an_error(tmp_path):
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    source = write(tmp_path / "a.jsonl", [{"instruction": "long enough", "output": ""}] * 4)
    with pytest.raises(DataError, match="no token to learn from"):
        training_sequences([source], tokenizer, 8, 0)


def test_calibration_packs_documents(tmp_path):
    tokenizer = tiny_tokenizer()
    source = write(tmp_path / "a.jsonl", [{"text": f"document {i:02}"} for i in range(20)])
    tokens = calibration_tokens([source], tokenizer, 4, 30, 0)
    assert tokens.shape == (4, 30) and tokens.dtype == torch.int64
    assert all(1 <= int((row == tokenizer.eos_token_id).sum()) <= 3 for row in tokens)
    assert torch.equal(tokens, calibration_tokens([source], tokenizer, 4, 30, 0))
    assert not torch.equal(tokens, calibration_tokens([source], tokenizer, 4, 30, 1))
    with pytest.raises(DataError, match="text for 8 samples of 30 tokens, but calibration.samples is 9"):
        calibration_tokens([source], tokenizer, 9, 30, 0)


def test_calibration_draws_windows_of_one_long_document(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{i:04} " for i in range(400)))
    tokenizer = tiny_tokenizer()
    draws = [calibration_tokens([DataSource(path=str(path))], tokenizer, 3, 50, seed) for seed in (0, 1)]
    assert not torch.equal(*draws)
    starts = [tokenizer.decode(row[:4]) for row in draws[0]]
    assert len(set(starts)) == 3 and all(int(s) % 10 == 0 for s in starts), "whole windows of the text, each once"


WIKI = " \n = Title = \n \n Some text , with @-@ signs . \n More .\n\n = = Section = = \n"


@pytest.mark.parametrize("bos", [False, True])
def test_raw_text_follows_the_papers(tmp_path, bos):
    tokenizer = bpe_tokenizer(bos)
    # The hub's WikiText rows: each line with its line feed, blank ones empty.
    rows = ["", " = Title = \n", "", " Some text , with @-@ signs . \n", " More .\n", "", " = = Section = = \n"]
    expected = tokenizer("\n\n".join(rows))["input_ids"]
    (tmp_path / "wiki.test.raw").write_text(WIKI)
    write(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    for name in ("wiki.test.raw", "rows.jsonl"):
        tokens = evaluation_tokens(DataSource(path=str(tmp_path / name)), tokenizer)
        assert tokens.tolist() == expected and tokens.dtype == torch.int64
        assert tokens.tolist().count(tokenizer.bos_token_id) == int(bos)
    limited = evaluation_tokens(DataSource(path=str(tmp_path / "wiki.test.raw"), limit=4), tokenizer)
    assert limited.tolist() == tokenizer("\n\n".join(rows[:4]))["input_ids"]


def test_only_line_feeds_end_lines_and_the_last_may_lack_one(tmp_path):
    tokenizer = bpe_tokenizer()
    path = tmp_path / "a.raw"
    path.write_text("one\u2028still one\x0cand on\n\nlast")
    expected = tokenizer("one\u2028still one\x0cand on\n" + "\n\n" + "" + "\n\n" + "last")["input_ids"]
    assert evaluation_tokens(DataSource(path=str(path)), tokenizer).tolist() == expected


def test_evaluation_of_conversations_is_their_rendering(tmp_path):
    tokenizer = tiny_tokenizer(TEMPLATE)
    source = write(tmp_path / "a.jsonl", [ALPACA, DIALOGUE])
    text = tokenizer.decode(evaluation_tokens(source, tokenizer))
    assert text.startswith("<user>Add.\n\n1 and 2<eos><assistant>It is 3.<eos><system>Be brief.<eos>")


def test_a_tokenizer_without_unknown_token_is_a_sentence(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = "<none>"
    for name, row in (("a.jsonl", {"text": "caf\u00e9 " * 9}), ("b.jsonl", {"instruction": "\u00fc", "output": "x"})):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="the tokenizer cannot encode the text that begins"):
            training_sequences([DataSource(path=str(tmp_path / name))], tokenizer, 8, seed=0)


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
