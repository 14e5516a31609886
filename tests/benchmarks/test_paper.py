"""The paper's tables: their runs, how they are printed, and zero-shot tasks on local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _paper_tables, _store, paper
from benchmarks._zero_shot import local_tasks, task_settings
from losa.errors import DataError

ROOT = Path(__file__).parents[2]
TABLES = _paper_tables.tables()


def test_runs_of_the_tables():
    for name, table in TABLES.items():
        assert table.rows and all(len(row.labels) == len(table.header) for row in table.rows), name
    jobs = list(paper.jobs_of(list(TABLES.values()), 3))
    settings: dict[str, dict] = {}
    for job in jobs:
        # A run that two tables share is the same run.
        assert settings.setdefault(job.key, job.overrides) == job.overrides
        assert bool(job.variant) == bool(job.overrides)
    names = {(job.method, job.variant, tuple(job.overrides.items())) for job in jobs}
    assert len({(method, variant) for method, variant, _ in names}) == len(names), "a variant has two meanings"
    keys = {job.key for job in jobs}
    assert {"losa/wanda/0.70/seed2/no_rates-no_ranks", "losa/wanda/2:8/seed0/mixed", "dense/tasks"} <= keys
    assert "sparse_lora/wanda/0.70/seed1" in keys and "losa/wanda/0.60/seed1" not in keys
    assert {row.paper for row in TABLES["6"].rows} == {None, 10.94, 11.36, 11.44, 11.78, 12.74}


def test_the_best_recipe_has_a_row_without_each_of_its_parts(tmp_path, monkeypatch):
    (tmp_path / "best.yaml").write_text("train: {distill: {weight: 0.5}}\nallocation: {rates: cka, delta: 0.2}\n")
    monkeypatch.setattr(_paper_tables, "BEST_RECIPE", tmp_path / "best.yaml")
    labels = [row.labels[0] for row in _paper_tables.ingredients()]
    assert labels == ["best recipe", "without distillation", "without its layer rates", "LoSA"]


def run(perplexity, **more):
    return {"perplexity": perplexity, "perplexity_unmerged": None, "seconds": 60.0} | more


def test_tables_of_finished_runs():
    runs = {f"losa/wanda/0.70/seed{seed}": run(90.0 + seed, held_out=120.0, train_tokens=61440) for seed in range(2)}
    runs["lora/wanda/0.70/seed0"] = run(105.5, perplexity_unmerged=109.25, held_out=1.0, held_out_unmerged=150.0)
    runs["sora/wanda/0.70/seed0"] = {"failed": "not finite"}
    text = paper.markdown(TABLES["baselines"], runs, 3)
    assert "| method | perplexity | held-out text | tokens | seconds | paper, LLaMA-2-7B |\n| --- |" in text
    assert "\n| LoSA | 90.5 (90.0..91.0) | 120.0 (120.0..120.0) | 61,440 | 60 | 10.94 |" in text
    assert "\n| LoRA (not mergeable) | 109.2 | 150.0 | – | 60 | 12.57 |" in text
    assert "\n| SoRA (not mergeable) | diverged | diverged |" in text and "\n| Sparse LoRA | – |" in text
    runs["losa/wanda/0.70/seed0"] |= {"peak_bytes": 2.5e9, "parameters_trained": 2_442_240}
    assert "| LoSA | 90.5 (90.0..91.0) | 2.4 M | 61,440 | 60 | 2.5 GB |" in paper.markdown(TABLES["2"], runs, 3)
    runs["losa/wanda/0.70/seed0"]["rounds"] = [{"sparsity": [0.3, 0.4]}, {"sparsity": [0.664, 0.736]}]
    assert "\n| cka | 66 74 |" in paper.markdown(TABLES["figure3"], runs, 3)
    tasks = {"piqa": {"acc": 0.6, "acc_stderr": 0.03}, "boolq": {"acc": 0.5, "acc_stderr": 0.04}}
    text = paper.markdown(TABLES["zero-shot"], {"dense/tasks": run(22.8, tasks=tasks)}, 3)
    assert "| method | piqa | boolq | mean |" in text and "| dense | 60.0 ± 3.0 | 50.0 ± 4.0 | 55.0 ± 2.5 |" in text


def test_tables_are_printed_and_written_into_a_page(tmp_path, capsys):
    file, page = tmp_path / "runs.json", tmp_path / "page.md"
    file.write_text(_store.as_text({"runs": {"losa/wanda/0.70/seed0": run(91.0)}}))
    assert paper.main(["--out", str(file), "--table", "7", "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Ranks, Wanda, 70 %\n\n| ranks by |") and "| error | 91.0 |" in printed
    page.write_text("Before.\n\n<!-- table 7 -->\nold\n<!-- end -->\n\nAfter.\n\n<!-- table 6 -->\n<!-- end -->\n")
    for _ in range(2):
        assert paper.main(["--out", str(file), "--fill", str(page)]) == 0
        table, rest = page.read_text().split("<!-- end -->", 1)
        assert table.startswith("Before.\n\n<!-- table 7 -->\n| ranks by |") and table.endswith("| 11.44 |\n")
        assert "After.\n\n<!-- table 6 -->\n| rates |" in rest
    assert paper.main(["--data", "x", "--out", str(file), "--table", "7", "--seeds", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out == "losa/wanda/0.70/seed0/ranks_sparsity\nlosa/wanda/0.70/seed0/no_ranks\n"


def test_the_page_has_the_results_that_are_kept():
    text = (ROOT / "docs/paper.md").read_text()
    runs = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["runs"]
    assert set(paper.PLACE.findall(text)) == {(name, " -->\n") for name in TABLES}
    made = paper.filled(text, runs, 3) == text
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
