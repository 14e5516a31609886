"""Records, written and read back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from losa.errors import OutputError
from losa.output.figures import write_figures
from losa.output.inspection import inspect_directory
from losa.output.tables import blocks_table, plain_text, results_table, rounds_table
from losa.record import RunRecord
from tests.helpers.records import BLOCKS, make_record


def at(path, value):
    """An edit of a record's dict: ``path`` set to ``value``."""

    def edit(data):
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return data

    return edit


WRONG_RECORDS = {
    "a list": lambda data: [data],
    "no model": lambda data: {key: value for key, value in data.items() if key != "model"},
    "unknown": lambda data: data | {"colour": "red"},
    "recipe": at(["recipe"], None),
    "allocation": at(["recipe", "allocation"], [1]),
    "error's name": at(["recipe", "allocation", "error"], ["relative"]),
    "blocks": at(["blocks"], "model.layers.0"),
    "no blocks": at(["blocks"], []),
    "rounds": at(["rounds"], {"1": 2}),
    "round": at(["rounds", 1], 7),
    "seconds": at(["rounds", 0, "seconds"], None),
    "a second": at(["rounds", 0, "seconds"], {"train": "1"}),
    "sparsity": at(["rounds", 0, "sparsity"], []),
    "ranks": at(["rounds", 1, "ranks"], []),
    "ranks of text": at(["rounds", 1, "ranks"], ["8"] * BLOCKS),
    "ranks of fractions": at(["rounds", 1, "ranks"], [8.5] * BLOCKS),
    "errors": at(["rounds", 2, "errors"], [0.1]),
    "losses": at(["rounds", 2, "loss_reconstructed"], [0.1]),
    "keep_n": at(["rounds", 2, "keep_n"], [2]),
    "keep_n without m": at(["rounds", 2, "keep_n"], [2] * BLOCKS),
    "similarity": at(["rounds", 0, "similarity"], "high"),
    "a row of similarity": at(["rounds", 0, "similarity", 1], [1.0]),
    "importance": at(["rounds", 0, "importance"], [None] * BLOCKS),
    "perplexity": at(["rounds", 0, "perplexity"], "22"),
    "perplexity of a result": at(["results", 1, "perplexity"], [22.0]),
    "zeros": at(["results", 1, "zeros"], 3.5),
    "truth": at(["results", 1, "prunable"], True),
    "mask": at(["masks"], {"x": {"sha256": "", "shape": [4], "kept": 3}}),
    "evaluation": at(["evaluation"], {}),
    "evaluation's number": at(["evaluation"], 3),
    "evaluation's data": at(["evaluation", "data"], {"path": 3}),
    "windows": at(["evaluation", "windows"], "48"),
    "time": at(["seconds"], None),
    "huge": at(["results", 1, "zeros"], 10**400),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_record_that_is_wrong_is_named(name, tmp_path):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(20, 50)}, tmp_path / "model.safetensors")
    data = json.loads(json.dumps(make_record().to_dict()))
    (tmp_path / "losa_config.json").write_text(json.dumps(WRONG_RECORDS[name](data)))
    with pytest.raises(OutputError, match="losa_config.json: damaged"):
        inspect_directory(tmp_path)


def test_records_of_any_method_are_read_back(tmp_path):
    pruned = make_record(method="prune_only", evaluation=None, masks={})
    for r in pruned.rounds:
        r.ranks, r.errors, r.similarity, r.importance, r.train_loss = [], None, None, None, None
        r.keep_n, r.m, r.perplexity = [2] * BLOCKS, 4, float("inf")
    for record in (make_record(), pruned, make_record(rounds=0)):
        read = RunRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        assert read == record
        for table in (blocks_table, rounds_table, results_table):
            plain_text(table(read))
    assert write_figures(RunRecord.from_dict(pruned.to_dict()), tmp_path / "figures")
