"""Zero-shot tasks through lm-eval."""

from __future__ import annotations

import json
import sys

import pytest

from losa.errors import LosaError
from losa.evaluation.tasks import _metrics, evaluate_tasks
from tests.helpers.tiny import tiny_llama, tiny_tokenizer


def test_tasks_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LosaError, match=r"pip install 'losa\[eval\]'"):
        evaluate_tasks(tiny_llama(layers=1), tiny_tokenizer(), ["piqa"])


def test_metrics_are_plain_accuracy():
    found = {
        "alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": "N/A",
        "exact_match,strict": 1, "sample_len": 20,
    }  # fmt: skip
    assert _metrics(found) == {"acc": 0.5, "acc_stderr": 0.1, "exact_match,strict": 1.0}


def test_local_task_through_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.huggingface")
    rows = [{"q": f"item {i} is", "choices": ["big", "small and red"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "losa_local", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    model, tokenizer = tiny_llama(layers=1), tiny_tokenizer()
    # Untrained, the model finds the shorter continuation likelier everywhere.
    found = evaluate_tasks(model, tokenizer, ["losa_local"], [tmp_path / "tasks"])
    assert found == {"losa_local": {"acc": 0.5, "acc_stderr": pytest.approx(0.05**0.5)}}  # the variance 0.3 over 6
    with pytest.raises(LosaError, match="lm-eval knows no nope"):
        evaluate_tasks(model, tokenizer, ["nope"])
    with pytest.raises(LosaError, match="no such directory"):
        evaluate_tasks(model, tokenizer, ["losa_local"], [tmp_path / "none"])
