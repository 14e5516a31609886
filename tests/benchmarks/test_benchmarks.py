"""Benchmarks run, gate on correctness, and write rows that say where they were measured."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import __main__ as entry
from benchmarks import _pruning_baselines as baselines
from benchmarks import (
    _random_model,
    _sparse,
    _timing,
    bitmask,
    cka,
    column_sweep,
    decode,
    decoder_step,
    experts,
    hessian,
    interrupted,
    masked_lora,
    packing,
    prune,
    selection,
    sparse_linear,
    training_step,
)
from losa.inference.generation import generate
from losa_kernels import masked_lora_linear, native


def test_names_are_listed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert entry.main() == 2
    assert "bitmask" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    assert entry.main() == 0
    assert "  compare        Two result files side by side\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmarks", "nothing"])
    assert entry.main() == 2
    assert "no benchmark 'nothing'" in capsys.readouterr().err


def test_benchmarks_of_kernels_do_not_import_losa():
    folder = Path(entry.__file__).parent
    found = {file.stem for file in folder.glob("*.py") if re.search(r"^ *(from|import) losa\b", file.read_text(), re.M)}
    own = {"decode", "experts", "interrupted", "offload", "paper", "prune", "quality", "training_step"}
    shared = {"_loading", "_models", "_random_model"}
    assert found == own | shared | {"_harness", "_jobs", "_paper_tables", "_store", "_zero_shot"}


def test_an_interrupted_run_that_is_not_as_claimed_fails():
    kill = {"process": 0, "steps": 4, "exit codes of the others": [76], "they ended after s": 7.0}
    kill["they said"] = ["losa: process 0 (host a, pid 7) has not been heard for 6 s"]
    found = {"same steps": True, "largest relative difference of a loss": 3e-6, "kills": [kill]}
    found["weights that are zero in one alone"] = 0
    assert interrupted.failures(found) == []
    wrong = [{"same steps": False}, {"largest relative difference of a loss": 2e-4}]
    wrong += [{"weights that are zero in one alone": 2}]
    wrong += [{"kills": [kill | change]} for change in ({"exit codes of the others": [76, 1]}, {"they said": []})]
    for change in wrong:
        assert len(interrupted.failures(found | change)) == 1, change


def test_what_processes_printed_is_readable():
    text = "a\nframe #0: f + 0x9d\n<omitting python frames>\na\nb\nframe 1\n"
    assert interrupted._readable(text) == "a\nb\nframe 1\n"


def test_weights_that_are_zero_in_one_model_alone(tmp_path):
    weight = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0]])
    for name, other in (("one", weight), ("many", weight.flip(0))):
        (tmp_path / name).mkdir()
        save_file({"a.weight": other.clone(), "b.weight": weight}, tmp_path / name / "model.safetensors")
    # In columns 2 and 3 of both rows.
    assert interrupted._differing_zeros(tmp_path / "one", tmp_path / "many", ["a", "b"]) == 4


def test_bitmask_rows(tmp_path):
    bitmask.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    document = json.loads((tmp_path / "rows.json").read_text())
    assert document["machine"]["torch"] and {r["op"] for r in document["rows"]} == {"pack", "unpack"}
    assert all(r["median_ms"] >= r["min_ms"] > 0 for r in document["rows"])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bitmask, "unpack_mask", lambda packed, n: packed.new_zeros(packed.shape[0], n).bool())
    with pytest.raises(SystemExit, match="wrong kernel"):
        bitmask.main(["--quick", "--device", "cpu"])


TINY = ["--quick", "--device", "cpu", "--shapes", "48x64", "--patterns", "70%,2:4"]


def test_packing_rows(tmp_path):
    packing.main([*TINY, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(r["op"], r["pattern"]) for r in rows} == {(o, p) for o in ("pack", "unpack") for p in ("70%", "2:4")}
    assert all(r["median_ms"] > 0 and r["fraction_of_copy_bandwidth"] > 0 for r in rows)


def test_sparse_linear_rows(tmp_path):
    sparse_linear.main([*TINY, "--batches", "1,16", "--repetitions", "2", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    ways = {r["implementation"] for r in rows}
    assert {"dense fp32", "dense bf16", "MKL CSR", "losa fp32", "losa bf16", "losa bf16, as bitmask"} <= ways
    assert {(r["pattern"], r["batch"]) for r in rows} == {(p, b) for p in ("70%", "2:4") for b in (1, 16)}
    for row in rows:
        assert row["fraction_of_read_bandwidth"] > 0 and row["speedup_over_dense bf16"] > 0
        assert row["implementation"] != "MKL CSR" or row["speedup_over_MKL CSR"] == 1


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (packing, "pack", lambda weight, kept, pattern: _sparse.pack(weight * 2, kept, pattern)),
        (sparse_linear, "sparse_linear", lambda x, packed: x.new_zeros(x.shape[0], packed.shape[0])),
    ],
)
def test_a_wrong_sparse_kernel_is_not_timed(monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(SystemExit, match="wrong kernel"):
        module.main(TINY)


@pytest.fixture
def pruned_directory(tmp_path):
    from losa.model.blocks import block_linears
    from tests.helpers.tiny import tiny_llama, tiny_tokenizer

    model = tiny_llama(layers=2).requires_grad_(False)
    for linear in block_linears(model).values():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape) < 0.6, 0)
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_decode_document(pruned_directory, tmp_path, monkeypatch):
    file = tmp_path / "decode.json"
    args = ["--quick", "--device", "cpu", "--json", str(file), str(pruned_directory)]
    decode.main([*args, "--only", "speed"])
    rows = json.loads(file.read_text())["speed"]["rows"]
    assert len(rows) == 8 and all(r["speedup_over_transformers, dense"] > 0 for r in rows)
    decode.main([*args, "--only", "text"])
    document = json.loads(file.read_text())
    assert document["speed"]["rows"] == rows and document["text"]["same_as_dense"] and document["machine"]["torch"]

    def wrong(*given, max_new_tokens, **settings):
        made = generate(*given, max_new_tokens=max_new_tokens, **settings)
        return replace(made, tokens=[*made.tokens[:-1], made.tokens[-1] + 1])

    monkeypatch.setattr(decode, "generate", wrong)
    with pytest.raises(SystemExit, match="losa, packed gives another text than dense weights after 31 tokens"):
        decode.main([*args, "--only", "text"])


def test_decode_of_random_weights(tmp_path, monkeypatch):
    rows = rows_of(decode, tmp_path, "--random", "tiny", "--sparsity", "0.5,2:4")
    assert [(r["pattern"], r["implementation"]) for r in rows] == [
        (pattern, f"losa, {weights}") for pattern in ("50%", "2:4") for weights in ("dense", "packed")
    ]
    assert all(r["tokens_per_s"] > 0 and r["layers"] == 2 for r in rows)
    dense, packed = (r["bytes_per_token"] for r in rows[2:])
    assert packed < 0.7 * dense
    flags = ["--quick", "--device", "cpu", "--random", "tiny", "--layers", "1"]
    monkeypatch.setattr(_random_model, "pack_weight", lambda weight: _sparse.pack(1.2 * weight, weight != 0, "50%"))
    with pytest.raises(SystemExit, match="losa, packed is off by .* wrong kernel"):
        decode.main(flags)
    with pytest.raises(SystemExit):
        decode.main(["--quick"])


def test_slices_go_on_where_they_stopped(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    args = ["--device", "cpu", "--shapes", "48x64,16x64", "--batches", "1", "--repetitions", "1", "--json", str(file)]
    sparse_linear.main([*args, "--patterns", "70%"])
    first = json.loads(file.read_text())["rows"]
    sparse_linear.main([*args, "--patterns", "70%,2:4", "--resume"])
    rows = json.loads(file.read_text())["rows"]
    assert rows[: len(first)] == first and {r["pattern"] for r in rows[len(first) :]} == {"2:4"}
    sparse_linear.main([*args, "--patterns", "50%", "--resume", "--seconds", "-1"])
    assert json.loads(file.read_text())["rows"] == rows
    monkeypatch.setattr(_sparse, "machine", lambda device: {"device": "another"})
    with pytest.raises(SystemExit, match="were measured on"):
        sparse_linear.main([*args, "--resume"])


@pytest.mark.parametrize("pattern", _sparse.PATTERNS)
def test_masks_have_the_density_they_say(pattern):
    kept = _sparse.kept_mask((512, 64), pattern, "cpu")
    if pattern.endswith("%"):
        assert abs(float(kept.float().mean()) - (1 - int(pattern[:-1]) / 100)) < 0.02
    else:
        keep_n, m = (int(part) for part in pattern.split(":"))
        assert bool((kept.reshape(-1, m).sum(1) == keep_n).all())


def test_copies_exceed_the_cache(monkeypatch):
    weight = torch.ones(1 << 20)
    held = _sparse.copies(weight, 1000)
    assert sum(t.nbytes for t in held) >= _timing.beyond_cache("cpu") and len(_sparse.copies(weight, 3)) == 4
    assert len({t.data_ptr() for t in held}) == len(held)
    # A GPU runs short kernels in bursts, and has a cache of its own size.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=60 << 20))
    assert _timing.rotation(32 << 20, "cuda", 5) == 8 and _timing.rotation(1 << 10, "cuda", 5) == 6 * 20


@pytest.fixture
def tiny_directory(tmp_path):
    from tests.helpers.tiny import tiny_llama, tiny_tokenizer

    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows_of(benchmark, tmp_path, *flags):
    file = tmp_path / "rows.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--json", str(file), *flags]) == 0
    return json.loads(file.read_text())["rows"]


def test_masked_lora_rows(tmp_path):
    rows = rows_of(masked_lora, tmp_path, "--shape", "48x32x16", "--rank", "4", "--repetitions", "1")
    assert {r["op"] for r in rows} == {"forward", "forward+backward"}
    ours = next(r for r in rows if r["implementation"] == "losa")
    assert ours["losa_speedup"] == 1 and {r["implementation"] for r in rows} >= {"eager_losa", "three_products"}


def test_masked_lora_on_a_gpu_takes_minutes():
    """Compilers and PEFT start once."""
    grid = masked_lora._grid(argparse.Namespace(device="cuda", quick=False, shape=None, rank=None))
    assert len(grid) == len(set(grid)) == 8 and sum(baselines for *_, baselines in grid) == 1


@pytest.mark.parametrize("wrong", ["lora_A", "lora_B", "x"])
def test_wrong_gradients_of_masked_lora_are_not_timed(monkeypatch, wrong):
    def scaled(p):
        x, A, B = (t * 1 if name != wrong else 1.001 * t - (0.001 * t).detach() for name, t in named(p))
        return masked_lora_linear(x, p.weight, p.mask, A, B, p.scaling)

    def named(p):
        return zip(("x", "lora_A", "lora_B"), p.leaves, strict=True)

    monkeypatch.setattr(masked_lora, "losa", scaled)
    with pytest.raises(SystemExit, match=f"of {wrong}; not timing a wrong kernel"):
        masked_lora.main(["--quick", "--device", "cpu", "--shape", "48x32x16"])


def test_a_wrong_masked_lora_is_not_timed(monkeypatch):
    monkeypatch.setattr(masked_lora, "losa", lambda p: 1.001 * (p.x @ p.weight.T))
    with pytest.raises(SystemExit, match="wrong kernel"):
        masked_lora.main(["--quick", "--device", "cpu", "--shape", "48x32x16"])


def test_cka_rows(tmp_path):
    rows = rows_of(cka, tmp_path, "--layers", "3", "--samples", "4", "--features", "500")
    assert {r["op"] for r in rows} == {"all_pairs", "grams"}
    assert {r["pairs_timed"] for r in rows if r["op"] == "all_pairs"} == {9}
    assert next(r["cka_error"] for r in rows if r["implementation"] == "losa") < 1e-6


def test_decoder_step_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_step, "MODELS", {"tiny": (64, 160, 4, 2, 16)})
    monkeypatch.setattr(decoder_step, "PLACES", (40,))
    rows = rows_of(decoder_step, tmp_path)
    assert len(rows) == 8 and {r["implementation"] for r in rows} == {"plain", "losa"}
    assert all(r["median_ms"] > 0 and r["fraction_of_copy_bandwidth"] > 0 for r in rows)
    monkeypatch.setattr(decoder_step.decoder_step, "gated_silu", lambda x: 1.01 * x.chunk(2, -1)[1])
    with pytest.raises(SystemExit, match="gated_silu differs .* wrong kernel"):
        decoder_step.main(["--quick", "--device", "cpu"])


def test_column_sweep_rows(tmp_path):
    rows = rows_of(column_sweep, tmp_path, "--shape", "24x64", "--repetitions", "1")
    assert {r["op"] for r in rows} >= {"sparsegpt, whole", "sparsegpt, selection and columns", "wanda mask"}
    if native.missing("cpu") is None:
        assert [r["shape"] for r in rows if r["op"] == "sweep block"] == ["24x64", "24x64"]
        parts = [(r["op"], r["pattern"]) for r in rows if "part:" in r["op"]]
        assert [(op.rpartition(" ")[2], pattern) for op, pattern in parts] == [
            ("selection", "50 %"),
            ("columns", "50 %"),
            ("columns", "2:4"),
        ]
    assert all(r["host_ms"] > 0 and r["loss_error"] < 5e-3 for r in rows if r["op"] == "sparsegpt, whole")
    assert all(r["agreement"] > 0.99 for r in rows if r.get("agreement") is not None)


def test_a_wrong_sweep_is_not_timed(monkeypatch):
    run = column_sweep.sparsegpt_prune

    def wrong(weight, hessian, **settings):
        found = run(weight, hessian, **settings)
        return found if weight.dtype == torch.float64 else found._replace(loss=1.01 * found.loss)

    monkeypatch.setattr(column_sweep, "sparsegpt_prune", wrong)
    weight, hessian = baselines.problem(16, 64, "cpu")
    with pytest.raises(SystemExit, match="loss off by .*wrong kernel"):
        column_sweep.sparsegpt(weight, hessian, "50 %", (0.5, None, None), 1, SimpleNamespace(device="cpu"))


@pytest.mark.parametrize("columns", [128, 256, 300, 1100])
def test_trailing_products_are_those_of_a_sweep(columns, monkeypatch):
    """By panels or by blocks: each column gets the errors of all blocks before its own."""
    factor = torch.ones(columns, columns)
    for panel in (128, 512):
        work = torch.zeros(2, columns)
        monkeypatch.setattr(torch.Tensor, "clone", lambda self, work=work: work)
        baselines.trailing_products(work, factor, 128, panel)
        monkeypatch.undo()
        expected = -(torch.arange(columns) // 128 * 128.0)
        assert torch.equal(work, expected.expand(2, -1)), panel


def test_selection_rows(tmp_path):
    rows = rows_of(selection, tmp_path, "--shape", "24x64", "--shape", "5x160", "--repetitions", "1")
    expected = {("wanda mask", "50 %"), ("wanda mask", "2:4")}
    if native.missing("cpu") is None:
        expected.add(("column block", "50 %"))
    assert {(r["op"], r["pattern"]) for r in rows} == expected
    assert all(r["losa_ms"] > 0 and r["speedup"] > 0 for r in rows)


def test_hessian_rows(tmp_path):
    rows = rows_of(hessian, tmp_path, "--width", "40", "--tokens", "64", "--repetitions", "1")
    assert [(r["op"], r["dtype"]) for r in rows] == [
        ("accumulate", "float32"),
        ("accumulate", "bfloat16"),
        ("inverse factor", "float32"),
    ]
    assert all(r["error"] <= 2 * r["official_error"] + 2**-23 for r in rows)


def test_a_wrong_hessian_is_not_timed(monkeypatch):
    monkeypatch.setattr(hessian, "inverse_factor", lambda h, d: (1.01 * baselines.official_factor(h), d))
    with pytest.raises(SystemExit, match="wrong kernel"):
        hessian.factor(40, 1, "cpu")


def test_official_baselines_prune_what_they_should():
    weight, hessian = baselines.problem(16, 64, "cpu")
    for sparsity, keep_n, m in ((0.5, None, None), (None, 2, 4)):
        swept = baselines.official_sweep(weight, baselines.official_factor(hessian), sparsity, keep_n, m)
        assert abs(float((swept == 0).float().mean()) - 0.5) < 0.01
        kept = baselines.official_wanda(weight, hessian.diagonal().sqrt(), sparsity, keep_n, m)
        assert float(kept.float().mean()) == 0.5


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_prune_rows(tmp_path, tiny_directory, pruner):
    flags = ["--model", str(tiny_directory), "--samples", "4", "--length", "8", "--pruner", pruner]
    rows = rows_of(prune, tmp_path, *flags)
    assert {r["implementation"] for r in rows} == {"losa", "official manner"}
    assert {"whole", "forward", "engine: prune", "rates"} <= {r["stage"] for r in rows}


def test_training_step_rows(tmp_path, tiny_directory):
    rows = rows_of(training_step, tmp_path, "--model", str(tiny_directory), "--length", "8", "--repetitions", "1")
    assert {r["implementation"] for r in rows} >= {"losa", "plain", "eager_losa", "eager_losa_checkpointed"}
    assert all(r["tokens_per_s"] > 0 for r in rows)


def test_experts_rows(tmp_path):
    flags = ["--shape", "4x2x32x16", "--tokens", "40", "--sparsity", "0.7", "--repetitions", "1"]
    rows = rows_of(experts, tmp_path, *flags)
    assert {r["implementation"] for r in rows} == {"losa", "losa, one by one", "transformers", "transformers, frozen"}
    (dense,) = (r for r in rows if r["implementation"] == "transformers")
    assert dense["times_trained"] == 1 and all(r["median_ms"] > 0 and r["times_frozen"] > 0 for r in rows)


def test_experts_that_differ_are_not_timed(monkeypatch):
    made = experts.build((4, 2, 32, 16), 0.7, torch.float32, "cpu")
    for layer in made["losa, one by one"].modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data += 1
    with pytest.raises(SystemExit, match="experts: outputs of one call and of many differ"):
        experts.check(made, torch.randn(1, 40, 32))
