"""The command line on data and models that do not fit each other, and `losa eval` on models of all kinds."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from losa.data.tokens import evaluation_tokens
from losa.recipe.sources import DataSource
from tests.helpers.command_line import fail, invoke, succeed
from tests.helpers.tiny import CHARACTERS, tiny_llama, tiny_tokenizer

VOCABULARY = len(CHARACTERS) + 2
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1}
LINE = "the small river runs past the old mill and on to the sea"


@pytest.fixture(autouse=True)
def no_trace_in_the_environment(monkeypatch):
    """The command line sets this one when nobody watches; put back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


def saved(model, directory, tokenizer=None):
    torch.manual_seed(0)
    model.save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {LINE}"}) + "\n" for i in range(12)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny_llama(layers=2), tmp_path_factory.mktemp("llama"))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=48, vocab_size=VOCABULARY, **SPECIAL))


def two_stacks():
    """Blocks of two lists take turns."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return HrmTextForCausalLM(HrmTextConfig(num_hidden_layers=2, vocab_size=VOCABULARY, **sizes, **SPECIAL))


def gpt_neo():
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    attention = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    return GPTNeoForCausalLM(GPTNeoConfig(max_position_embeddings=48, **sizes, **attention, **SPECIAL))


def mamba():
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4))


@pytest.mark.parametrize(
    "build, counted", [(two_stacks, False), (gpt2, True), (gpt_neo, True), (mamba, True), (tiny_llama, True)]
)
def test_eval_of_any_causal_model(build, counted, text, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    source = saved(model, tmp_path / "model")
    out = succeed("eval", source, "--data", text, "--length", 32, "--json", tmp_path / "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    if counted:
        assert f"0 of {numbers['prunable']:,} weights that can be pruned are zero (0.00%)" in out
        assert numbers["sparsity"] == numbers["sparsity_of_blocks"] == 0
        assert (f", 0.00% with the {numbers['unprunable']:,} others of the blocks" in out) == (build is mamba)
    else:
        assert "sparsity: not counted: " in out and "cannot tell which list" in out
        assert numbers["zeros"] is numbers["prunable"] is numbers["sparsity"] is None
    tokens = evaluation_tokens(DataSource(path=str(text)), tiny_tokenizer())
    windows = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    # Sums of some 16 terms in fp32 through two blocks.
    assert numbers["perplexity"]["nll"] == pytest.approx(nll.item(), rel=200 * torch.finfo(torch.float32).eps)
    assert numbers["perplexity"]["windows"] == len(windows)


def test_eval_with_a_token_in_front_of_each_window(llama, text, tmp_path):
    assert "--bos: the tokenizer has no beginning-of-text token" in fail("eval", llama, "--data", text, "--bos")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    source = saved(tiny_llama(layers=1), tmp_path / "model", tokenizer)
    arguments = ["--data", text, "--length", 33, "--json", tmp_path / "n.json", "--max-windows", 1000]
    out = succeed("eval", source, "--bos", *arguments)
    numbers = json.loads((tmp_path / "n.json").read_text())["perplexity"]
    tokens = evaluation_tokens(DataSource(path=str(text)), tokenizer)
    assert numbers["bos_per_window"] and numbers["windows"] == len(tokens) // 32
    assert numbers["tokens"] == 32 * numbers["windows"]
    assert "windows of 33 tokens that begin with the beginning-of-text token" in out
    result = invoke("eval", source, *arguments)
    assert f"--max-windows: 1000, but the text has {len(tokens) // 33}" in result.stderr


@pytest.mark.parametrize("build", [gpt2, gpt_neo])
def test_positions_exceeded(build, text, tmp_path):
    source = saved(build(), tmp_path / "model")
    said = "64 tokens are more than the 48 positions"
    assert f"evaluate.length: {said}" in fail("eval", source, "--data", text, "--length", 64)
    if build is gpt_neo:
        prune = ["prune", source, "--data", text, "--sparsity", 0.5, "--samples", 4, "--output", tmp_path / "out"]
        assert f"calibration.length: {said}" in fail(*prune, "--length", 64)
        evaluated = ["--eval-data", text, "--eval-length", 64]
        assert f"evaluate.length: {said}" in fail(*prune, "--length", 16, *evaluated)
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["river", "mill"])
    source = saved(tiny_llama(layers=2), tmp_path / "model", tokenizer)
    data = tmp_path / "text.txt"
    data.write_text(f"{LINE}\n" * 20)
    said = f"token {VOCABULARY + 1}, but the model has {VOCABULARY} embeddings"
    assert said in fail("eval", source, "--data", data, "--length", 32)
    prune = ["prune", source, "--data", data, "--sparsity", 0.5, "--samples", 4, "--length", 32]
    assert f"calibration.data: the tokenizer gives {said}" in fail(*prune, "--output", tmp_path / "out")


def test_text_cut_within_a_character(llama, text, tmp_path):
    data = tmp_path / "cut.jsonl"
    data.write_text(text.read_text() + '{"text": "a cut \\udc12 b"}\n{"text": "c", "\\ud801": 1}\n')
    prune = ["prune", llama, "--data", data, "--sparsity", 0.5, "--samples", 4, "--length", 32]
    succeed(*prune, "--output", tmp_path / "out")
    succeed("eval", llama, "--data", data, "--length", 32)


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "~no_such_user/x.txt", "\udcff.jsonl"])
def test_data_that_no_file_is_named(llama, name):
    message = fail("eval", llama, "--data", name, "--length", 32)
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize("device", ["meta", "no_such_device", "cuda:77"])
def test_devices_that_do_not_compute(llama, text, device):
    if device.startswith("cuda") and torch.cuda.device_count() > 77:
        pytest.skip("there is such a device")
    assert f"device {device!r}: not available here" in fail("eval", llama, "--data", text, "--device", device)


def test_output_names_with_data_of_ones_own(text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: m\noutput: "."\nprune: {sparsity: 0.5}\ncalibration: {data: c.txt}\nmethod: prune_only\n')
    assert "output: not a directory's name: '.'" in fail("run", recipe, "--data", text)
    assert "output: File name too long" in fail("run", recipe, "--data", text, "--output", "x" * 300)
    deep = "seed=" + "[" * 600 + "]" * 600
    assert "the value is not YAML" in fail("run", recipe, "--set", deep)
    assert "seed: " in fail("run", recipe, "--output", tmp_path / "out", "--set", "seed=" + "7" * 5000)
