"""Sources, rendering, packing: what goes in comes out token by token, and bad data is named."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from losa.data import corpus
from losa.data.sources import Row
from losa.data.splitting import named_parts, split
from losa.data.tokens import IGNORED, Renderer, calibration_tokens, evaluation_tokens, read_rows, training_sequences
from losa.errors import DataError
from losa.recipe.sections import DataSource
from tests.helpers.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "It is 3."}
DIALOGUE = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
}


def bpe_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose merges cross the border between a prompt and its answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["### Response:\nIt is 3. = Title = \n\n\n the cat sat on the mat\n"] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def learnt(tokenizer, ids, labels):
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"text": "one"}, {"text": "two\nlines"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert read_rows(DataSource(path=str(tmp_path / name))) == rows, name
    (tmp_path / "e.txt").write_text("plain\n\ntext")
    (tmp_path / "readme.md").write_text("no data")
    (tmp_path / ".hidden.txt").write_text("no data")
    everything = read_rows(DataSource(path=str(tmp_path)))
    assert everything == rows * 4 + [{"text": "plain\n\ntext"}]
    assert read_rows(DataSource(path=str(tmp_path), limit=3)) == everything[:3]


def test_builtin_text_is_split_without_overlap():
    def grams(texts, n=13):
        words = [text.split() for text in texts]
        return {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}

    parts = {part: read_rows(DataSource(path=f"builtin:pydoc/{part}")) for part in corpus.SHARES}
    sizes = {part: sum(len(row["text"]) for row in rows) for part, rows in parts.items()}
    for part, share in corpus.SHARES.items():
        assert sizes[part] / sum(sizes.values()) == pytest.approx(share, abs=0.02)
        assert len(parts[part]) >= 5
    names = [name for dealt in corpus.split().values() for name in dealt]
    assert len(names) == len(set(names))
    seen = {part: grams(row["text"] for row in rows) for part, rows in parts.items()}
    assert not seen["heldout"] & (seen["train"] | seen["calibration"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl', line 2: not JSON"),
        ("a.jsonl", "\n[1]\n", "a.jsonl', line 2: expected an object"),
        ("a.jsonl", "", "no rows"),
        ("a.json", "[1, 2]", "row 1: expected an object"),
        ("a.json", '{"text": ', "a.json', line 1: not JSON"),
        ("a.txt", " \n\n", "no rows"),
        ("a.parquet", "not parquet", "a.parquet': not a Parquet file"),
        ("a.csv", "x,y", "expected a file ending in"),
        ("a.txt", b"\xff\xfe\x00", "a.txt': not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "a.jsonl', line 2: not UTF-8 text"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y", "z": ' + "[" * 200_000 + "]" * 200_000 + "}",
            "line 2: JSON that is nested too",
        ),
        (
            "a.json",
            '[{"text": "x"}, {"z": ' + "[" * 200_000 + "]" * 200_000 + "}]",
            "a.json', row 2: JSON that is nested too",
        ),
        ("a.jsonl", '{"text": "x", "unread": ' + "7" * 5000 + "}", "a.jsonl', line 1: an integer of too many digits"),
        ("a.json", '[{"text": "x"},\n{"n": -' + "7" * 5000 + "}]", "a.json', row 2: an integer of too many digits"),
        ("a.json", '{"text": "x"}\n{"n": ' + "7" * 5000 + "}", "a.json', line 2: an integer of too many digits"),
        ("a.json", "[]", "no rows"),
        ("a.parquet", b"PAR1" + bytes(64) + b"PAR1", "a.parquet': "),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_rows(DataSource(path=str(path)))
    assert message in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_unusual_json_is_read(tmp_path, name):
    lines = [
        '{"text": "nul \\u0000 and \\ud83d\\ude00", "x": NaN, "y": -Infinity}',
        '{"te\\ud83dxt": [{"a": "\\udc00b"}], "text": "cut \\uD83D", "path": "C:\\\\ud800"}',
    ]
    text = "[" + ",\n".join(lines) + "]" if name == "a.json" else "\r\n".join(lines)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_rows(DataSource(path=str(tmp_path / name)))
    assert first["text"] == "nul \0 and \U0001f600"
    assert second == {"te\ufffdxt": [{"a": "\ufffdb"}], "text": "cut \ufffd", "path": "C:\\ud800"}


def test_half_of_a_pair_is_pointed_out_once(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + '{"text": "\\udfff"}\n' * 3)
    with caplog.at_level(logging.WARNING, "losa"):
        rows = read_rows(DataSource(path=str(tmp_path / "a.jsonl")))
    assert [row["text"] for row in rows] == ["x"] + ["\ufffd"] * 3
    assert len(caplog.records) == 1 and "a.jsonl', line 2: half of a surrogate pair" in caplog.text


def test_parquet_values_that_python_has_no_object_for(tmp_path):
    times = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet', row 2: cannot be read"):
        read_rows(DataSource(path=str(tmp_path / "a.parquet")))
    texts = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet', row 2: cannot be read .*utf-8"):
        read_rows(DataSource(path=str(tmp_path / "b.parquet")))


@pytest.mark.parametrize(
    "path",
    ["x" * 300 + ".txt", "/" + "x" * 300, "a\0b.jsonl", "/a\0b", "~no_such_user/x.txt", "\ud83d.txt", "/dev/null"],
)
def test_names_that_no_file_has(path):
    with pytest.raises(DataError, match="data '"):
        read_rows(DataSource(path=path))


@pytest.mark.parametrize("name", ["x" * 300, "/" + "y" * 300 + "/z", "a\0b"])
def test_parts_of_names_that_no_file_has(name):
    with pytest.raises(DataError, match="--data "):
        named_parts(Path(name))


def test_rows_of_all_kinds_can_be_dealt_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {i} \\ud83d", "x": NaN}}\n' for i in range(20)))
    parts, _ = split(tmp_path / "a.jsonl", tmp_path / "parts")
    assert sum(len(read_rows(DataSource(path=str(path)))) for path in parts.values()) == 20
    deep = '{"text": "x", "deep": ' + "[" * 950 + "]" * 950 + "}\n"
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n' + deep * 3)

    def at_depth(n):
        """Writing JSON needs more of Python's stack than reading it: somewhere the row is read and not written."""
        return at_depth(n - 1) if n else split(tmp_path / "b.jsonl", tmp_path / "parts")

    for depth in range(0, 60, 4):
        with suppress(DataError):
            at_depth(depth)


def test_a_limit_beyond_the_rows_is_pointed_out(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with caplog.at_level(logging.WARNING, "losa"):
        assert len(read_rows(source.model_copy(update={"limit": 3}))) == 3
        assert not caplog.records
        assert len(read_rows(source.model_copy(update={"limit": 5}))) == 3
    assert "limit is 5, but there are 3 rows" in caplog.text


@pytest.mark.parametrize("path", ["missing.jsonl", "/no/where", "./no/where", "a/b/c", "builtin:pydoc/all", " "])
def test_missing_sources_are_named(path):
    with pytest.raises(DataError, match="data '"):
        read_rows(DataSource(path=path))


def test_directory_without_data(tmp_path):
    with pytest.raises(DataError, match=r"no \.json"):
        read_rows(DataSource(path=str(tmp_path)))


def test_hub_data_set(monkeypatch):
    calls = []

    def load_dataset(path, name, split, streaming=False):
        calls.append((path, name, split, streaming))
        if streaming and path == "cached/only":
            raise ConnectionError("offline")
        if path == "not/there":
            raise ConnectionError("offline\ndetails")
        return iter([{"text": str(i)} for i in range(4)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(read_rows(DataSource(path="some/data", subset="en", split="test"))) == 4
    assert len(read_rows(DataSource(path="some/data", limit=2))) == 2
    assert len(read_rows(DataSource(path="cached/only", limit=2))) == 2
    assert calls == [
        ("some/data", "en", "test", False),
        ("some/data", None, "train", True),
        ("cached/only", None, "train", True),
        ("cached/only", None, "train", False),
    ]
    with pytest.raises(DataError, match=r"'not/there'.*hub \(offline\).*subset.*give the local file"):
        read_rows(DataSource(path="not/there"))


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


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), bpe_tokenizer(), bpe_tokenizer(bos=True)])
def test_plain_layout(tokenizer):
    source = DataSource(path="x")
    ids, labels = Renderer(tokenizer, "response")(Row("row", ALPACA), source)
    text = "### Instruction:\nAdd.\n\n1 and 2\n\n### Response:\nIt is 3."
    assert tokenizer.decode(ids).removeprefix("<bos>").strip() == f"{text}<eos>"
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    answer = "It is 3.<eos>"
    assert learnt(tokenizer, ids, labels).endswith(answer)
    # One token may hold the prompt's end and the answer's first letters; no further token of the prompt is learnt.
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert answer.endswith(tokenizer.decode(ids[first + 1 :]))
    assert Renderer(tokenizer, "all")(Row("row", ALPACA), source) == (ids, ids)


def test_chat_template_and_several_answers():
    tokenizer = tiny_tokenizer(TEMPLATE)
    render = Renderer(tokenizer, "response")
    ids, labels = render(Row("row", ALPACA), DataSource(path="x"))
    assert tokenizer.decode(ids) == "<user>Add.\n\n1 and 2<eos><assistant>It is 3.<eos>"
    assert learnt(tokenizer, ids, labels) == "It is 3.<eos>"
    ids, labels = render(Row("row", DIALOGUE), DataSource(path="x"))
    assert learnt(tokenizer, ids, labels) == "Hello<eos>See you<eos>"
    trailing = {"messages": [*DIALOGUE["messages"], {"role": "user", "content": "?"}]}
    assert learnt(tokenizer, *render(Row("row", trailing), DataSource(path="x"))) == "Hello<eos>See you<eos>"


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
