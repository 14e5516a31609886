"""What pages say of the tree is true: paths, names, commands, environment variables, the demonstration's figures."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import interrupted
from benchmarks.__main__ import modules as benchmark_modules
from losa.distributed.launch import _PATIENCE
from losa.distributed.stop import _ONE_REQUEST, Stopped
from losa.distributed.watch import LOST_EXIT_CODE, Limits, ProcessLost
from losa.errors import LosaError
from losa.recipe.machines import DistributedConfig
from losa.recipe.reading import load_recipe
from losa_kernels import settings

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")
PAGES = {name: (ROOT / name).read_text() for name in TOP}
PAGES |= {str(page.relative_to(ROOT)): page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))}
# The op that "Add an op" makes, and the folder that `make gpu` names after a card.
MADE_UP = ("kept_counts", "/CARD")
# Of the command line: wrong arguments, as typer ends; Ctrl-C, as losa.cli.errors says.
USAGE, INTERRUPTED = 2, 130

pages = pytest.mark.parametrize("page", PAGES)


def code(page: str) -> list[str]:
    """Code in the running text of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL))


def commands(page: str, program: str) -> list[list[str]]:
    """The words of each command of a page that starts ``program``, in fences and in the running text."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    fences = [text for kind, text in blocks if kind in ("", "bash")]
    lines = [line for text in fences for line in text.replace("\\\n", " ").splitlines()]
    # A launcher may stand before the program.
    found = [re.search(rf"(?:^|-m |--no.python ){program} (.*)", line) for line in (*lines, *code(page))]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pages
def test_paths_exist(page):
    folders = "losa|losa_kernels|csrc|tests|benchmarks|docs|examples|tools"
    for text in code(page):
        if re.fullmatch(rf"({folders})/[\w./-]+", text) and not any(name in text for name in MADE_UP):
            assert (ROOT / text).exists(), text
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pages
def test_names_exist(page):
    """Dotted names of the two packages."""
    for text in code(page):
        if found := re.match(r"(losa|losa_kernels)((\.\w+)+)(?=$|[(])", text):
            pkgutil.resolve_name(found[0])


@pages
def test_commands_have_their_options(page):
    pytest.importorskip("typer")
    from typer.main import get_command

    from losa.cli.app import app

    group = get_command(app)
    for words in commands(page, "losa"):
        name = next((word for word in words if not word.startswith("-")), "--help")
        if not name.islower():  # a placeholder
            continue
        command = group.commands[name] if name != "--help" else group
        known = {opt for part in (*group.params, *command.params) for opt in (*part.opts, *part.secondary_opts)}
        flags = {re.sub(r"=.*", "", word.strip("[]")) for word in words if word.strip("[]").startswith("--")}
        assert flags <= known | {"--help"}, (words, flags - known)
        recipes = [word for word in words if word.startswith("examples/") and word.endswith(".yaml")]
        assert all((ROOT / recipe).is_file() for recipe in recipes), words


@pages
def test_benchmarks_and_targets_exist(page):
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for words in commands(page, "benchmarks"):
        assert words[0].strip(";") in {*benchmark_modules(), "NAME"}, words
        assert all(f'"{word}"' in sources for word in words if word.startswith("--") and word != "--help"), words
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[0] for words in commands(page, "make")} <= targets


@pages
def test_environment_variables_take_the_values(page):
    rows = {setting.name: setting for setting in settings.TABLE}
    for name, values in re.findall(r"\b(LOSA_\w+)=([\w|.;\"]+)", PAGES[page]):
        for value in re.split(r"\||\.\.", values.strip('".;')):
            assert rows[name]._parse(value) is not None, f"{name}={value}"


def test_messages_that_the_clusters_page_explains_are_losas():
    files = [*(ROOT / "losa").rglob("*.py"), ROOT / "examples/slurm/losa.sbatch"]
    # A message may be written as several strings.
    sources = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    table = PAGES["docs/guide/clusters.md"].split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| (?:losa.sbatch: )?`([^`]+)`", table, re.MULTILINE)
    assert messages
    for message in messages:
        # Numbers, one-letter names and dots stand for what differs.
        parts = re.split(r"\.\.\.|\b[A-Z]\b|\d+", message)
        assert re.search(r'[^"\n]*'.join(map(re.escape, parts)), sources), message


def test_the_clusters_page_has_the_seconds_of_the_code():
    page = " ".join(PAGES["docs/guide/clusters.md"].split())
    limits = Limits(DistributedConfig().timeout)
    table = page.split("| what happened | noticed after |")[1].split("The clock of the last row")[0]
    noticed = [float(seconds) for seconds in re.findall(r"(\d+) s\b", table)]
    assert noticed == [limits.broken, limits.silent, limits.broken + limits.grace, limits.progress]
    assert f"reports every {limits.period:g} s" in page
    assert f"`has not been heard for {limits.silent:g} s` ({limits.broken:g} s where a connection broke)" in page
    assert f"wait {settings.JOIN_TIMEOUT.default:g} s for each other" in page
    assert {2: "gives up after twice `distributed.timeout`"}[_PATIENCE] in page
    for other in (page, " ".join(PAGES["docs/guide/runs.md"].split())):
        assert f"second SIGTERM, more than {_ONE_REQUEST:g} s after the first" in other


def test_exit_codes_are_those_of_losa():
    """The table stands on one page."""
    row = re.compile(r"^\| (\d+) \| ", re.MULTILINE)
    assert [page for page in PAGES if "| exit code |" in PAGES[page]] == ["docs/guide/command-line.md"]
    table = PAGES["docs/guide/command-line.md"].split("## Exit codes")[1]
    errors = {LosaError.exit_code, Stopped.exit_code, ProcessLost.exit_code}
    assert {int(code) for code in row.findall(table)} == {0, *errors, USAGE, INTERRUPTED}
    script = (ROOT / "examples/slurm/losa.sbatch").read_text()
    again = {int(code) for code in re.findall(r'"\$code" -eq (\d+)', script)}
    assert again == errors - {LosaError.exit_code}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/results.md"])
def test_the_demonstration_is_as_measured(page):
    document = json.loads((ROOT / "benchmarks/results/demo-smollm2.json").read_text())
    labels = {"dense": "dense", "prune_only": "pruned only", "lora": "pruned + LoRA", "losa": "**LoSA**"}
    assert [row["method"] for row in document["results"]] == list(labels)
    for row in document["results"]:
        perplexity = f"{row['perplexity']:.1f}"
        if row["perplexity_unmerged"] is not None:
            perplexity = f"{row['perplexity_unmerged']:.1f} ({perplexity} once merged under the mask)"
        if row["method"] == "losa":
            perplexity = f"**{perplexity}**"
        mergeable = "" if row["method"] in ("dense", "prune_only") else f" {'yes' if row['mergeable'] else 'no'}"
        assert (
            f"| {labels[row['method']]} | {perplexity} | {row['sparsity']:.2%}".replace("%", " %")
            + (f" |{mergeable} |")
            in PAGES[page]
        )


def test_the_paper_s_recipe_is_as_measured():
    document = json.loads((ROOT / "benchmarks/results/demo-smollm2-paper.json").read_text())
    assert load_recipe(ROOT / "examples/smollm2-cpu.yaml").model_dump(mode="json") == document["recipe"]
    found = {row["method"]: f"{row['perplexity_unmerged'] or row['perplexity']:.1f}" for row in document["results"]}
    assert f"LoSA gives {found['losa']} here" in PAGES["README.md"]
    assert f"gives {found['losa']} on the same text, and LoRA with it {found['lora']}\n" in PAGES["docs/results.md"]


def test_the_interrupted_run_is_as_measured():
    found = json.loads((ROOT / "benchmarks/results/interrupted-smollm2.json").read_text())
    assert interrupted.failures(found) == []
    page = PAGES["docs/results.md"]
    assert f"| steps | {found['steps']} | {found['steps']} |" in page
    assert f"relative difference of a step's loss | | {found['largest relative difference of a loss']:.1e} |" in page
    assert "| zeros | {:,} | {:,} |".format(*found["zeros"]) in page
    assert f"in one of the models alone | | {found['weights that are zero in one alone']} |" in page
    assert "| perplexity | {:.2f} | {:.2f} |".format(*found["perplexity"]) in page
    after = [f"{kill['they ended after s']:.1f} s" for kill in found["kills"]]
    steps = [f"after {kill['steps']}" for kill in found["kills"]]
    assert all(text in page for text in (*after, *steps, f"exit code {LOST_EXIT_CODE}"))
