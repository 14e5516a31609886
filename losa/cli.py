"""The command line: run, prune, eval, inspect, plan. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from losa.errors import LosaError, RecipeError

app = typer.Typer(
    help="Prune a language model round by round while LoRA fine-tunes it under the same mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DEBUG = "LOSA_DEBUG"


def main() -> None:
    """Console entry point: a LosaError becomes one message and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except LosaError as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        print(f"losa: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("losa: interrupted", file=sys.stderr)
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        from losa import __version__

        print(f"losa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also {DEBUG}=1).")] = False,
) -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if debug:
        os.environ[DEBUG] = "1"


def parse_settings(settings: list[str]) -> dict:
    """``["prune.sparsity=0.5"]`` -> ``{"prune.sparsity": 0.5}``; values are YAML. Raises RecipeError."""
    overrides = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {setting!r}: expected key=value, for instance prune.sparsity=0.5")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is not YAML") from error
    return overrides


def data_overrides(data: Path) -> dict:
    """Recipe settings that take all text from ``data``: a directory with calibration, train and heldout (files of any
    known kind, or subdirectories). Raises RecipeError."""
    overrides = {}
    if not data.is_dir():
        raise RecipeError(f"--data {data}: expected a directory with calibration, train and heldout text")
    for part, key in (("calibration", "calibration.data"), ("train", "train.data"), ("heldout", "evaluate.data")):
        found = sorted(p for p in data.iterdir() if p.stem == part)
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise RecipeError(f"--data {data}: expected one file or directory named {part}.*, found {names}")
        overrides[key] = str(found[0])
    return overrides


RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see examples/.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, replacing a recipe's setting.")]


@app.command()
def run(
    recipe: RecipeFile,
    set_: Settings = None,
    data: Annotated[Path | None, typer.Option(help="Directory with calibration, train and heldout text.")] = None,
    output: Annotated[Path | None, typer.Option(help="Instead of the recipe's output directory.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on after the last finished round.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Run a recipe: prune, fine-tune, compare, export a checked sparse checkpoint."""
    from losa.recipe import load_recipe

    overrides = parse_settings(set_ or [])
    if data is not None:
        overrides |= data_overrides(data)
    if output is not None:
        overrides["output"] = str(output)
    loaded = load_recipe(recipe, overrides)
    from losa.run import run_recipe

    run_recipe(loaded, resume=resume, overwrite=overwrite)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local directory or package:NAME.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[str, typer.Option(help="Calibration text: a file, directory or data set.")],
    pruner: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove.")] = None,
    pattern: Annotated[str | None, typer.Option(help="keep_n:m, for instance 2:4.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 2048,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    eval_length: Annotated[int, typer.Option(help="Window length of the perplexity.")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Prune once, without any training."""
    from losa.recipe import parse_recipe

    settings = {
        "model": model,
        "output": str(output),
        "method": "prune_only",
        "prune": {"pruner": pruner, "sparsity": sparsity, "pattern": pattern},
        "calibration": {"data": data, "samples": samples, "length": length},
    }
    if eval_data is not None:
        settings["evaluate"] = {"data": eval_data, "length": eval_length}
    recipe = parse_recipe(settings, where="prune")
    from losa.run import run_recipe

    run_recipe(recipe, overwrite=overwrite)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory, Hugging Face id or package:NAME.")],
    data: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Window length in tokens.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated.")] = None,
    task_path: Annotated[list[Path] | None, typer.Option(help="Directory with task files of your own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Perplexity (non-overlapping windows) and zero-shot tasks of any causal model."""
    if data is None and tasks is None:
        raise LosaError("eval: nothing to measure; give --data, --tasks or both")
    from losa.data import evaluation_tokens
    from losa.evaluate import evaluate_tasks, perplexity
    from losa.files import write_json
    from losa.model import load_model, sparsity_of
    from losa.recipe import DataSource

    loaded, tokenizer = load_model(model)
    zeros, prunable = sparsity_of(loaded)
    numbers: dict = {"model": model, "zeros": zeros, "prunable": prunable, "sparsity": zeros / prunable}
    print(f"{model}: {zeros:,} of {prunable:,} block weights are zero ({zeros / prunable:.2%})")
    if data is not None:
        tokens = evaluation_tokens(DataSource(path=data), tokenizer)
        found = perplexity(loaded, tokens, length, batch_size, max_windows, progress=sys.stderr.isatty())
        numbers["perplexity"] = vars(found) | {"data": data}
        protocol = f"length {length}, {found.windows} windows, {found.tokens:,} tokens"
        print(f"perplexity {found.value:.3f} on {data} ({protocol})")
    if tasks is not None:
        numbers["tasks"] = evaluate_tasks(loaded, tokenizer, tasks.split(","), [str(p) for p in task_path or []])
        for task, metrics in numbers["tasks"].items():
            print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if json_file is not None:
        write_json(json_file, numbers)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory, losa's or any other.")],
    figures: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Tables of a checkpoint: zeros per block, rounds, ranks, results."""
    from rich.console import Console

    from losa import report
    from losa.figures import write_figures

    found = report.inspect_directory(directory)
    console = Console()
    console.print(report.zeros_table(found))
    if found.record is not None:
        for table in (report.blocks_table, report.rounds_table, report.results_table):
            console.print(table(found.record))
    if figures is not None:
        if found.record is None:
            raise LosaError(f"{directory}: no losa_config.json, so there is nothing to draw")
        written = write_figures(found.record, figures)
        console.print(f"wrote {len(written)} files to {figures}")


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Settings = None,
    probe: Annotated[bool, typer.Option(help="Measure this machine's matrix rate for the time estimate.")] = True,
) -> None:
    """Memory and time estimate of a recipe, without loading weights."""
    from rich.console import Console

    from losa.plan import make_plan, plan_tables
    from losa.recipe import load_recipe

    made = make_plan(load_recipe(recipe, parse_settings(set_ or [])), probe=probe)
    for table in plan_tables(made):
        Console().print(table)
