"""The paper's tables: their runs, how they are printed, and zero-shot tasks on local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _jobs, _paper_tables, _store, paper, quality
from benchmarks._harness import Setting, recipe_of
from benchmarks._jobs import Job
from benchmarks._zero_shot import local_tasks, task_settings
from losa.errors import DataError

ROOT = Path(__file__).parents[2]
TABLES = _paper_tables.tables()


def test_runs_of_the_tables():
    for name, table in TABLES.items():
        assert (table.rows or table.kind == "tuning") and all(
            len(row.labels) == len(table.header) for row in table.rows
        ), name
    jobs = list(paper.jobs_of(list(TABLES.values()), 3))
    settings: dict[str, dict] = {}
    for job in jobs:
        # A run that two tables share is the same run.
        assert settings.setdefault(job.key, job.overrides) == job.overrides
        assert bool(job.variant) == bool(job.overrides)
    names = {(job.method, job.variant, tuple(job.overrides.items())) for job in jobs}
    assert len({(method, variant) for method, variant, _ in names}) == len(names), "a variant has two meanings"
    keys = {job.key for job in jobs}
    short = "losa/wanda/0.70/seed2/no_rates-no_ranks/short"
    assert {short, "losa/wanda/2:8/seed0/mixed/short", "dense", "sparse_lora/wanda/0.70/seed1"} <= keys
    assert "losa/wanda/0.60/seed1" not in keys and "best/wanda/0.60/seed2" in keys
    assert {row.paper for row in TABLES["6"].rows} == {None, 10.94, 11.36, 11.44, 11.78, 12.74}
    assert {job.key for job in quality.final_jobs()} <= keys, "a run of the comparison is in no table"


def test_recipes_of_the_tables(tmp_path, monkeypatch):
    """Every run's recipe is one, with the best recipe as it is and with one that has every ingredient."""

    def check():
        jobs = paper.jobs_of(list(_paper_tables.tables().values()), 1)
        return {job.key: recipe_of(job, 0.01, Setting("model", tmp_path)) for job in jobs}

    plain = check()
    assert plain["losa/wanda/0.70/seed0/short"].train.max_tokens == 20_480
    (tmp_path / "best.yaml").write_text(
        "method: losa\nprune: {regrow: true, regrow_by: gradient}\nreconstruct: {steps: 5}\nrounds: {count: 4}\n"
        "allocation: {rates: fisher, fill: curves, delta: 0.1, per: row, mean_rank: 8}\nlora: {scaling: 1}\n"
        "calibration: {cka_samples: 16}\n"
        "train: {distill: {weight: 0.5}, norms: 0.1, lora_plus: 4, max_grad_norm: 1}\n"
    )
    monkeypatch.setattr(_paper_tables, "BEST_RECIPE", tmp_path / "best.yaml")
    monkeypatch.setattr(_jobs, "BEST_RECIPE", tmp_path / "best.yaml")
    every = check()
    without = {key for key in every if key.startswith("best/wanda/0.70/seed0/no_")}
    assert len(without) == len(_paper_tables.INGREDIENTS)
    assert (
        len(
            {every[key].model_dump_json() for key in without} | {every["best/wanda/0.70/seed0/short"].model_dump_json()}
        )
        == len(without) + 1
    )


def test_every_setting_of_the_best_recipe_is_of_a_part():
    """Else the best recipe has an ingredient without a row of its own."""
    best = recipe_of(Job("best"), 0.01, Setting("model", ROOT)).model_dump()
    plain = recipe_of(Job("losa"), 0.01, Setting("model", ROOT)).model_dump()
    parts = {key for settings in _paper_tables.INGREDIENTS.values() for key in settings}

    def differing(ours, others, name=""):
        for key, value in ours.items():
            if f"{name}{key}" not in parts and value != others[key]:
                inside = isinstance(value, dict) and isinstance(others[key], dict)
                yield from differing(value, others[key], f"{name}{key}.") if inside else [f"{name}{key}"]

    assert list(differing(best, plain)) == []


def test_the_best_recipe_has_a_row_without_each_of_its_parts(tmp_path, monkeypatch):
    (tmp_path / "best.yaml").write_text("train: {distill: {weight: 0.5}}\nallocation: {rates: cka, delta: 0.2}\n")
    monkeypatch.setattr(_paper_tables, "BEST_RECIPE", tmp_path / "best.yaml")
    labels = [row.labels[0] for row in _paper_tables.ingredients()]
    without = ["distillation", "label loss", "its layer rates"]
    assert labels == ["best recipe", *(f"without {part}" for part in without), "LoSA"]


def run(perplexity, **more):
    return {"perplexity": perplexity, "perplexity_unmerged": None, "seconds": 60.0} | more


def test_tables_of_finished_runs():
    runs = {f"losa/wanda/0.70/seed{seed}": run(90.0 + seed, held_out=120.0, train_tokens=61440) for seed in range(2)}
    runs["lora/wanda/0.70/seed0"] = run(105.5, perplexity_unmerged=109.25, held_out=150.0)
    runs["sora/wanda/0.70/seed0"] = {"failed": "not finite"}
    text = paper.markdown(TABLES["baselines"], runs)
    assert (
        "| method | perplexity | held-out text | tokens | seconds | CPU seconds | paper, LLaMA-2-7B |\n| --- |" in text
    )
    assert "\n| LoSA | 90.5 (90.0..91.0) | 120.0 (120.0..120.0) | 61,440 | 60 | – | 10.94 |" in text
    assert "\n| LoRA (not mergeable) | 109.2 | 150.0 | – | 60 | – | 12.57 |" in text
    assert "\n| LoRA, merged under the mask | 105.5 | – | – | 60 | – |  |" in text
    order = "Pairs in the paper's order: 2 of 3; reversed: SoRA (not mergeable) after LoRA (not mergeable)."
    assert text.endswith(f"\n\n{order} On the held-out text 1 of 1.")
    assert "\n| SoRA (not mergeable) | diverged | diverged |" in text and "\n| Sparse LoRA | – |" in text
    runs["losa/wanda/0.70/seed0"] |= {"peak_bytes": 2.5e9, "parameters_trained": 2_442_240}
    assert "| LoSA | 90.5 (90.0..91.0) | 2.4 M | 61,440 | 60 | – | 2.5 GB |" in paper.markdown(TABLES["2"], runs)
    runs["losa/wanda/0.70/seed0/short"] = run(99.0)
    runs["losa/wanda/0.70/seed0/short"]["rounds"] = [{"sparsity": [0.3, 0.4]}, {"sparsity": [0.664, 0.736]}]
    assert "\n| cka | 66 74 |" in paper.markdown(TABLES["figure3"], runs)
    tasks = {"piqa": {"acc": 0.6, "acc_stderr": 0.03}, "boolq": {"acc": 0.5, "acc_stderr": 0.04}}
    text = paper.markdown(TABLES["zero-shot"], {"dense": run(22.8, tasks=tasks)})
    assert "| method | piqa | boolq | mean |" in text and "| dense | 60.0 ± 3.0 | 50.0 ± 4.0 | 55.0 ± 2.5 |" in text
    assert not text.endswith(".")
    runs = {"dense": run(22.8, tasks=tasks, task_limit=250), "losa/wanda/0.50/seed0": run(30.0, task_limit=None)}
    assert paper.markdown(TABLES["zero-shot"], runs).endswith("\n\nExamples of each task: the first 250, all.")


def test_all_pairs_of_the_parts_are_compared():
    short = {"no_rates": 100.0, "no_ranks": 104.0, "no_rounds": 130.0}
    runs = {f"losa/wanda/0.70/seed0/{name}/short": run(value) for name, value in short.items()}
    runs |= {"sparse_lora/wanda/0.70/seed0/short": run(110.0), "losa/wanda/0.70/seed0/short": run(102.0)}
    found = paper.markdown(TABLES["6"], runs)
    assert "Pairs in the paper's order: 8 of 10; reversed: rates (LSR) ranks (SRA) rounds (DSA) after ranks" in found
    assert found.endswith("ranks (SRA) rounds (DSA), rates (LSR) ranks (SRA) after none.")


def test_tables_are_printed_and_written_into_a_page(tmp_path, capsys):
    file, page = tmp_path / "runs.json", tmp_path / "page.md"
    short = {f"losa/wanda/0.70/seed{seed}/short": run(91.0 + seed, train_tokens=2048) for seed in range(2)}
    file.write_text(_store.as_text({"runs": short}))
    assert paper.main(["--out", str(file), "--table", "7", "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Ranks, Wanda, 70 %\n\n| ranks by |") and "| error | 91.5 (91.0..92.0) |" in printed
    page.write_text("Before.\n\n<!-- table 7 -->\nold\n<!-- end -->\n\nAfter.\n\n<!-- table 6 -->\n<!-- end -->\n")
    for _ in range(2):
        assert paper.main(["--out", str(file), "--fill", str(page)]) == 0
        table, rest = page.read_text().split("<!-- end -->", 1)
        assert table.startswith("Before.\n\n<!-- table 7 -->\n| ranks by |") and table.endswith(
            "| 11.44 |\n\nRuns that train have 2,048 tokens.\n"
        )
        assert "After.\n\n<!-- table 6 -->\n| rates (LSR) |" in rest
    assert paper.main(["--data", "x", "--out", str(file), "--table", "7", "--seeds", "1", "--dry-run"]) == 0
    names = ["tune", "ranks_sparsity/short", "no_ranks/short"]
    assert capsys.readouterr().out == "".join(f"losa/wanda/0.70/seed0/{name}\n" for name in names)
    before = page.read_text()
    with pytest.raises(SystemExit, match="No such file"):
        paper.main(["--out", str(tmp_path / "other.json"), "--fill", str(page)])
    assert page.read_text() == before


def test_the_page_has_the_results_that_are_kept():
    text = (ROOT / "docs/paper.md").read_text()
    runs = quality.current(_store.Store(ROOT / "benchmarks/results/quality.json", "paper"))
    assert set(paper.PLACE.findall(text)) == {(name, " -->\n") for name in TABLES}
    made = paper.filled(text, runs) == text
    assert made, "run: python -m benchmarks paper --out benchmarks/results/quality.json --fill docs/paper.md"


CHOICES = {"id": "piqa-0", "query": "Question: How?\nAnswer:", "choices": ["so", "or so"], "gold": 1}
CONTEXTS = {"query": "A beat B so", "contexts": ["A", "B"], "continuation": " won.", "choices": ["x", "y"], "gold": 0}


def test_local_tasks_are_told_to_lm_eval(tmp_path):
    """A choice follows the query and a space; a continuation with its own space follows each context."""
    for name, row in (("piqa", CHOICES), ("winogrande", CONTEXTS)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    choices, contexts = (task_settings(tmp_path / f"{name}.jsonl") for name in ("piqa", "winogrande"))
    keys = ("task", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter")
    assert [choices[key] for key in keys] == ["local_piqa", "query", "choices", "gold", " "]
    assert [contexts[key] for key in keys] == ["local_winogrande", "gold", "contexts", "continuation", ""]
    assert choices["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "piqa.jsonl")}}
    for wrong in ("", "[1]", '{"query": "x"}', "no JSON"):
        (tmp_path / "odd.jsonl").write_text(wrong)
        with pytest.raises(DataError, match="odd.jsonl: expected"):
            task_settings(tmp_path / "odd.jsonl")
    with pytest.raises(DataError, match="found none"):
        local_tasks(None, None, tmp_path / "none")


def test_local_tasks_through_lm_eval(tmp_path):
    """Which of two texts is likelier, computed here and by lm-eval."""
    pytest.importorskip("lm_eval.models.huggingface")
    import torch

    from tests.helpers.tiny import tiny_llama, tiny_tokenizer

    model, tokenizer = tiny_llama(layers=1), tiny_tokenizer()
    plain = [CHOICES | {"query": f"Item {i}", "choices": ["big", "hot"], "gold": i % 2} for i in range(9)]
    partial = [CONTEXTS | {"contexts": [f"A{i} so", f"B{i} so"], "gold": i % 2} for i in range(9)]

    @torch.no_grad()
    def log_likelihood(context, continuation):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        return float(log_p.gather(1, ids[0, 1:, None])[-len(continuation) :].sum())

    right = {"plain": [], "partial": []}
    for row in plain:
        scores = [log_likelihood(row["query"], f" {choice}") for choice in row["choices"]]
        right["plain"].append(scores.index(max(scores)) == row["gold"])
    for row in partial:
        scores = [log_likelihood(context, row["continuation"]) for context in row["contexts"]]
        right["partial"].append(scores.index(max(scores)) == row["gold"])
    for name, rows in (("plain", plain), ("partial", partial)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = local_tasks(model, tokenizer, tmp_path)
    for name, hits in right.items():
        share = sum(hits) / 9
        assert found[name] == {
            "acc": pytest.approx(share),
            "acc_stderr": pytest.approx((share * (1 - share) / 8) ** 0.5),
        }
    assert local_tasks(model, tokenizer, tmp_path, limit=3)["plain"]["acc"] == pytest.approx(
        sum(right["plain"][:3]) / 3
    )
