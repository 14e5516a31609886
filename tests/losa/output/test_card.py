"""The model card."""

from __future__ import annotations

import yaml

from losa.output.card import model_card
from tests.helpers.records import make_record


def test_model_card():
    record = make_record()
    text = model_card(record)
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "maker/small-1b" and front["library_name"] == "transformers"
    assert "# small-1b, 70 % sparse (LoSA)" in body
    assert "700 of 1,000 weights in 1 matrices are pruned (70.00 %)" in body
    assert "wikitext wikitext-2-raw-v1 test, 48 non-overlapping windows of 512 tokens (24,576 in all)" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == {key: value for key, value in record.recipe.items() if key != "output"}
    lines = body.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("|--"))
    assert lines[rule].count("|") == lines[rule - 1].count("|") == lines[rule + 1].count("|")
    assert all(cell in body for cell in ("104.75", "22.75", "113.25 (merged: 240.50)", "2.875"))
    assert "secret-place" not in text and "## Limits" in body and "## Licence" in body
    assert "other matrices" not in body
    record.unmasked = 1000
    text = model_card(record)
    assert "have 1,000 weights in other matrices; of all of them 35.00 % are pruned." in text
    assert "# small-1b, 70 % sparse where it is pruned, 35.00 % of the weights in its blocks (LoSA)" in text
    record.unmasked = 10
    assert "# small-1b, 70 % sparse (LoSA)" in model_card(record) and "10 weights in other" in model_card(record)


def test_model_card_of_a_pattern_and_a_local_model(tmp_path):
    record = make_record(method="prune_only", model=str(tmp_path))
    record.recipe["prune"] = {"pruner": "wanda", "sparsity": None, "pattern": "2:4"}
    text = model_card(record)
    assert "base_model" not in text and f"# {tmp_path.name}, 2:4 (kept:of) sparse (pruned only)" in text
    assert "without any training" in text
