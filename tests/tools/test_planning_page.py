"""docs/guide/planning.md: its arithmetic is right, and is the plan's."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from losa.cli.recipes import recipe_from
from losa.run.cluster import Cluster
from losa.run.estimate import estimate
from losa.run.estimate_cluster import ClusterEstimate, estimate_cluster
from losa.run.estimate_wire import Wires
from tests.helpers.llama import configuration
from tests.helpers.tools import ROOT, tool

PAGE = (ROOT / "docs/guide/planning.md").read_text()
NUMBER = r"[\d,]+"


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a table whose last cell is a number."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return [row for row in cells if re.fullmatch(NUMBER, row[-1])]


def value(expression: str) -> Fraction:
    """Of "2 x 1,024 / 8"."""
    assert re.fullmatch(r"[\d,x+/() -]+", expression), expression
    plain = re.sub(r"\d+", r"Fraction(\g<0>)", expression.replace(",", "").replace("x", "*"))
    return eval(plain)


@pytest.fixture(scope="module", params=[8, 64])
def plan(request, tmp_path_factory) -> ClusterEstimate:
    """Of the page's command."""
    (command,) = re.findall(rf"^losa plan (.* --gpus {request.param} .*)$", PAGE, re.M)
    words = shlex.split(command)
    model = configuration(tmp_path_factory.mktemp("llama-2-70b"))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    settings = [f"model={model}" if setting.startswith("model=") else setting for setting in settings]
    assert words[words.index("--memory") + 1] == "80"
    return estimate_cluster(recipe_from(ROOT / Path(words[0]), settings), Cluster(request.param))


def test_every_row_is_counted_right():
    found = rows(PAGE)
    assert len(found) > 30
    for *_, expression, result in found:
        assert value(expression) == int(result.replace(",", "")), expression


def test_sizes_are_those_of_the_plan(plan):
    section = PAGE.split(f"## On {plan.cluster.gpus} GPUs")[1].split("\n## ")[0]
    found = ((phases.split(", "), what, int(size.replace(",", ""))) for phases, what, _, size in rows(section))
    shown = {(phase, what): size for phases, what, size in found for phase in phases}
    held = {(h.phase, h.what): h.size for h in plan.holdings}
    assert shown == {key: held[key] for key in shown}
    if plan.cluster.gpus == 8:
        counted = {"throughout", "calibration", "pruning", "training"}
        assert {key for key in held if key[0] in counted} - set(shown) == {("training", "state to be written")}


def test_the_numbers_of_the_text_are_those_of_the_plan(plan):
    shape, gpus = plan.planned.shape, plan.cluster.gpus
    numbers = {row[0]: int(row[-1].replace(",", "")) for row in rows(PAGE)}
    assert numbers["prunable weights"] == shape.prunable
    assert numbers["parameters, with two norms in each block"] == plan.parameters
    assert f"{shape.weight_bytes:,} bytes of weights" in " ".join(PAGE.split())
    wires = Wires(plan.planned.recipe, shape, plan.planned.rounds, plan.cluster, plan.placement)
    once = list(wires.gathered(1, 1, ""))
    assert sum(t.received for t in once) == numbers[f"taken in, of {gpus} GPUs"]
    if gpus == 64:
        assert sum(t.network for t in once) == numbers["by the network card of one of 64 GPUs, 8 in a machine"]
        (training,) = [traffic for stage, traffic in plan.stages if stage.kind == "training"]
        (gradients,) = [t for t in training if t.what == "gradients"]
        assert gradients.received == numbers["gradients of a step, of 64 GPUs"] * 35
    stages = {stage.kind: stage for stage, _ in plan.stages if stage.method == "losa"}
    per_token = numbers["training, 1,024 tokens a sequence"]
    tokens = stages["training"].flops / per_token
    # Sequences of five rounds, in steps of one a GPU.
    assert tokens == 1024 * sum(-(-sequences // gpus) for sequences in (195, 195, 195, 195, 1173))
    samples = 128 // gpus
    # Two streams, statistics, and the compared samples; before them two samples, whole and block by block.
    passes = 5 * (3 * samples + 64 // gpus) + 2 * 2
    calibration = numbers["calibration, 2,048 tokens a sample"]
    assert stages["pruning"].flops == passes * 2048 * calibration


def hardware(page: str) -> dict[str, Cluster]:
    """What each recipe of a page's table needs by that table, by the recipe's name."""
    row = r"^\|[^|\n]*?([\w-]+)(?:\.yaml)?[`\]].*\| (one|eight) (\d+) GB GPUs?\b(?:(?: and|,) (\d+) GB of host memory)?"
    found = re.findall(row, (ROOT / page).read_text(), re.MULTILINE)
    counts = {"one": 1, "eight": 8}
    return {
        name: Cluster(counts[count], memory=1e9 * int(memory), host_memory=1e9 * int(host) if host else None)
        for name, count, memory, host in found
    }


CLUSTERS = hardware("docs/guide/clusters.md")


@pytest.mark.parametrize("name", CLUSTERS)
def test_recipes_fit_the_hardware_that_the_pages_name(name, tmp_path):
    cluster = CLUSTERS[name]
    assert hardware("examples/README.md")[name] == cluster
    recipe = recipe_from(ROOT / f"examples/{name}.yaml", None)
    recipe = recipe.model_copy(update={"model": str(configuration(tmp_path, recipe.model))})
    plan = estimate_cluster(recipe, cluster)
    assert plan.fits, plan.remedies
    # The verdict can fail: of a quarter of what is scarce.
    less = {"memory": cluster.memory / 4} if cluster.host_memory is None else {"host_memory": cluster.host_memory / 4}
    assert not estimate_cluster(recipe, replace(cluster, **less)).fits


def test_every_recipe_for_clusters_has_its_row():
    assert len(CLUSTERS) == 3


def test_a_plan_of_one_process_leaves_offloaded_rows_in_host_memory(tmp_path):
    recipe = recipe_from(ROOT / "examples/llama2-70b-prune-one-gpu.yaml", ["device=cuda"])
    recipe = recipe.model_copy(update={"model": str(configuration(tmp_path, recipe.model))})
    alone, plan = estimate(recipe, probe=False), estimate_cluster(recipe, Cluster(1))
    held = [h for h in alone.holdings if h.phase == "throughout"]
    assert held == [h for h in plan.holdings if h.phase == "throughout"]
    assert {h.what for h in held if h.place == "host"} >= {"weights", "masks"}
    assert alone.peak("device")[0] < 80e9


def test_the_page_is_made_of_what_its_commands_print():
    made = tool("docs_pages").on_page_markdown(PAGE)
    assert "<!-- made" not in made
    for text in ("8 GPUs of 80 GB in 1 machine: all hold", "64 GPUs of 80 GB in 8 machines: all hold", "Assumed"):
        assert text in made
    assert re.search(r"\| throughout +\| GPU +\| weights +\| 17\.2 GB \|", made)
