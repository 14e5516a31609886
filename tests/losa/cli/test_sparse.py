"""pack, unpack, generate and bench as commands."""

from __future__ import annotations

import json

import pytest

from losa.inference.generation import generate
from tests.helpers.command_line import invoke
from tests.helpers.other_models import halved, llama, other, save
from tests.helpers.tiny import tiny_tokenizer


def test_commands(saved, tmp_path):
    _, directory = saved
    for source in (directory, tmp_path / "packed"):
        if source != directory:
            done = invoke("pack", directory, "--output", source, "--dtype", "bfloat16")
            assert done.exit_code == 0 and "packed, 0 left dense" in done.output, done.output
        said = invoke("generate", source, "--prompt", "hello", "--max-new-tokens", 4)
        assert said.exit_code == 0 and "4 tokens, " in said.output, said.output
    done = invoke("unpack", tmp_path / "packed", "--output", tmp_path / "dense")
    assert done.exit_code == 0 and (tmp_path / "dense" / "model.safetensors.index.json").exists()
    refused = invoke("pack", directory, "--output", tmp_path / "packed")
    assert refused.exit_code == 1 and "exists" in refused.output
    assert invoke("pack", directory, "--output", tmp_path / "x", "--format", "csr").exit_code == 1


def test_bench_command(saved, tmp_path):
    _, directory = saved
    done = invoke("bench", directory, "--tokens", 3, "--repetitions", 1, "--json", tmp_path / "speed.json")
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "speed.json").read_text())["rows"]}
    assert set(rows) == {
        f"{who}, {what}"
        for who in ("transformers", "losa")
        for what in ("dense", "packed", "packed bfloat16", "dense bfloat16")
    }
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["losa, packed"]["bytes_per_token"] < rows["losa, dense"]["bytes_per_token"]
    short = invoke("bench", directory, "--tokens", 3, "--repetitions", 1, "--short")
    assert short.exit_code == 0 and "decoding, tokens/s: transformers, dense " in short.output
    assert "; losa, packed bfloat16 " in short.output and short.output.count(" x)") == 2


def test_chat_without_a_template_on_the_command_line(tmp_path):
    source = save(llama(), tiny_tokenizer(), tmp_path)
    done = invoke("generate", source, "--dense", "--chat", "--prompt", "hi")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and "no chat template" in done.output


@pytest.mark.parametrize("name", ["learned positions", "windows"])
def test_the_command_prints_what_other_models_generate(name, tmp_path):
    model, tokenizer = halved(other(name)), tiny_tokenizer()
    source = save(model, tokenizer, tmp_path)
    expected = generate(model, tokenizer, "the old mill", max_new_tokens=12)
    done = invoke("generate", source, "--prompt", "the old mill", "--max-new-tokens", 12)
    assert done.exit_code == 0 and f"the old mill{expected.text}\n" in done.stdout
    assert f"through transformers: {expected.fallback}\n" in done.stderr and "tokens/s; prompt of 12" in done.stderr


def test_the_command_shows_no_prompt_that_it_refuses(tmp_path):
    source = save(other("learned positions"), tiny_tokenizer(), tmp_path)
    done = invoke("generate", source, "--dense", "--prompt", "the old mill " * 9)
    assert done.exit_code == 1 and done.stdout == "" and "117 tokens are more than the 64" in done.output


def test_bench_of_other_models(tmp_path):
    source = save(halved(other("learned positions")), tiny_tokenizer(), tmp_path / "model")
    done = invoke("bench", source, "--tokens", 3, "--repetitions", 1, "--json", tmp_path / "speed.json")
    assert done.exit_code == 0, done.output
    rows = [row["name"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]]
    assert rows == [f"transformers, {what}" for what in ("dense", "packed", "packed bfloat16", "dense bfloat16")]
    short = invoke("bench", source, "--tokens", 3, "--repetitions", 1, "--short")
    assert (
        short.exit_code == 0 and "; transformers, packed bfloat16 " in short.output and short.output.count(" x)") == 2
    )
