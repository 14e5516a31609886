"""The command line: run, prune, eval, inspect, plan, and what cli_sparse and cli_info add. Heavy imports wait until
needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from losa.cli import info, sparse
from losa.cli.errors import DEBUG, Commands, debugging, set_up_messages
from losa.errors import LosaError, RecipeError

if TYPE_CHECKING:
    from losa.recipe.sections import Recipe


app = typer.Typer(
    cls=Commands,
    help="Prune a language model round by round while LoRA fine-tunes it under the same mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Console entry point."""
    app(prog_name="losa")


def _version(value: bool) -> None:
    if value:
        from losa import __version__

        typer.echo(f"losa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Tracebacks, and what losa logs (also {DEBUG}=1). Before the command.")
    ] = False,
) -> None:
    if not sys.stderr.isatty():
        # Progress bars, our libraries' too, are for terminals: log files would get a line each time they move.
        os.environ.setdefault("TQDM_DISABLE", "1")
    set_up_messages(debugging(debug))


def parse_settings(settings: list[str]) -> dict:
    """``["prune.sparsity=0.5"]`` -> ``{"prune.sparsity": 0.5}``; values are YAML. Raises RecipeError."""
    import yaml

    from losa.recipe.reading import read_yaml

    overrides = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {setting!r}: expected key=value, for instance prune.sparsity=0.5")
        try:
            overrides[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is not YAML") from error
    return overrides


def _load(path: Path, settings: list[str] | None, data: Path | None = None, output: Path | None = None) -> Recipe:
    """The recipe with the command line's changes: --output and --data go before --set."""
    from losa.recipe.reading import override, parse_recipe, read_settings
    from losa.recipe.sections import output_path

    recipe, overrides = read_settings(path), parse_settings(settings or [])
    if output is not None:
        recipe["output"] = str(output)
    target = overrides.get("output", recipe.get("output"))
    if data is not None and target:
        try:
            place = output_path(Path(str(target)))
        except ValueError as error:
            raise RecipeError(f"output: {error}") from error
        override(recipe, _own_text(recipe | overrides, data, place))
    return parse_recipe(override(recipe, overrides), where=str(path))


def _own_text(recipe: dict, data: Path, output: Path) -> dict:
    """Settings that make ``data`` the text of every section that the recipe has (`--set evaluate=` drops one)."""
    from losa.data.splitting import named_parts, split
    from losa.distributed import is_main

    sections = {"calibration": "calibration", "train": "train", "heldout": "evaluate"}
    wanted = [part for part, section in sections.items() if part == "calibration" or recipe.get(section) is not None]
    parts = named_parts(data)
    if not parts:
        parts, message = split(data, output.with_name(f"{output.name}.data"))
        if is_main():
            typer.echo(message)
    if missing := [part for part in wanted if part not in parts]:
        there = ", ".join(path.name for path in parts.values())
        raise RecipeError(f"--data {data}: {' and '.join(missing)} text is missing (files or directories); has {there}")
    return {f"{sections[part]}.data": {"path": str(parts[part])} for part in wanted}


RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see examples/.", metavar="RECIPE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, such as prune.sparsity=0.5; may be repeated."),
]
Model = Annotated[str, typer.Argument(help="Hugging Face id, local directory, .gguf file or package:NAME.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last finished round.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output that losa wrote; drop unfinished work.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output whoever wrote it.")]


@app.command()
def run(
    recipe: RecipeFile,
    set_: Settings = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text of your own in place of the recipe's: a directory with calibration.*, train.* and heldout.* "
            "(files or directories); any other file or directory is split by rows, 15 % calibration, 60 % training and "
            "25 % held out, into OUTPUT.data. Kinds: .jsonl, .json, .parquet, .txt, .raw."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="In place of the recipe's output directory.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force: Force = False,
) -> None:
    """Run a recipe: prune, fine-tune, compare, export a checked sparse checkpoint."""
    loaded = _load(recipe, set_, data, output)
    from losa.run.pipeline import run_recipe

    run_recipe(loaded, resume=resume, overwrite=overwrite, force=force)


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[str, typer.Option(help="Calibration text: a file, a directory or a data set's name.")],
    pruner: Annotated[str, typer.Option(help="wanda, sparsegpt or magnitude.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove, above 0, at most 0.95.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead: N:M, N weights kept of every M, such as 2:4.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a sample.")] = 2048,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure perplexity on, before and after.")] = None,
    eval_length: Annotated[int, typer.Option(help="Window length of the perplexity, in tokens.")] = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Draws the calibration samples.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force: Force = False,
) -> None:
    """Prune at once, without training."""
    from losa.recipe.reading import parse_recipe

    settings = {
        "model": model,
        "output": str(output),
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "method": "prune_only",
        "prune": {"pruner": pruner, "sparsity": sparsity, "pattern": pattern},
        "calibration": {"data": data, "samples": samples, "length": length},
    }
    if eval_data is not None:
        settings["evaluate"] = {"data": eval_data, "length": eval_length}
    recipe = parse_recipe(settings, where="prune")
    from losa.run.pipeline import run_recipe

    run_recipe(recipe, resume=resume, overwrite=overwrite, force=force)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Text to measure perplexity on: file, directory, data set.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a data set, such as wikitext-2-raw-v1.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "test",
    length: Annotated[int, typer.Option(min=2, help="Window length in tokens.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    task_path: Annotated[list[Path] | None, typer.Option(help="Directory with task files of your own.")] = None,
    bos: Annotated[
        bool,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each window with the beginning-of-text token: for models that need it (Gemma). Papers do not.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Perplexity (non-overlapping windows) and zero-shot tasks of any causal model, and its sparsity where it is told
    (blocks of nn.Linear)."""
    if data is None and tasks is None:
        raise LosaError("eval: nothing to measure; give --data, --tasks or both")
    from losa.data.tokens import evaluation_tokens
    from losa.evaluation.perplexity import perplexity, warn_of_missing_start, window_start
    from losa.evaluation.tasks import evaluate_tasks
    from losa.packed.directory import load_any
    from losa.recipe.reading import data_source
    from losa.storage.files import write_json

    source = None if data is None else data_source(data, where="eval --data", subset=subset, split=split)
    loaded, tokenizer = load_any(model, dtype=dtype, device=device)
    zeros, prunable, reason = _count_zeros(loaded)
    share = None if reason else zeros / prunable
    numbers: dict = {"model": model, "zeros": zeros, "prunable": prunable, "sparsity": share}
    if reason:
        typer.echo(f"{model}: sparsity: not counted: {reason}")
    else:
        typer.echo(f"{model}: {zeros:,} of {prunable:,} block weights are zero ({share:.2%})")
    if source is not None:
        tokens = evaluation_tokens(source, tokenizer)
        start = window_start(tokenizer, "--bos") if bos else None
        progress = sys.stderr.isatty()
        found = perplexity(loaded, tokens, length, batch_size, max_windows, progress=progress, bos=start)
        if start is None:
            warn_of_missing_start(loaded, tokenizer, tokens, length)
        if max_windows is not None and found.windows < max_windows:
            typer.echo(f"losa: --max-windows: {max_windows}, but the text has {found.windows}", err=True)
        numbers["perplexity"] = vars(found) | {"data": source.model_dump(), "bos_per_window": bos}
        begun = " that begin with the beginning-of-text token" if bos else ""
        protocol = f"{found.windows} non-overlapping windows of {length} tokens{begun}, {found.tokens:,} in all"
        typer.echo(f"perplexity {found.value:.3f} on {data} ({protocol})")
    if tasks is not None:
        names = [name for task in tasks.split(",") if (name := task.strip())]
        numbers["tasks"] = evaluate_tasks(loaded, tokenizer, names, task_path or [])
        for task, metrics in numbers["tasks"].items():
            typer.echo(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if json_file is not None:
        write_json(json_file, numbers)


def _count_zeros(model) -> tuple[int | None, int | None, str]:
    """(zeros, prunable weights, ""), or (None, None, the reason why a model's zeros cannot be counted)."""
    from losa.errors import ModelError
    from losa.model.wrapping import sparsity_of

    try:
        zeros, prunable = sparsity_of(model)
    except ModelError as error:
        return None, None, str(error).removeprefix("model: ")
    return (zeros, prunable, "") if prunable else (None, None, "no linear of its blocks can be pruned")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, losa's or any other with safetensors.")],
    figures: Annotated[Path | None, typer.Option(help="Also write figures and their numbers to this folder.")] = None,
) -> None:
    """Tables of a checkpoint: zeros per block, and of one that losa wrote its rounds, ranks and results."""
    from rich.console import Console

    from losa.output import tables as report
    from losa.output.figures import write_figures
    from losa.output.inspection import inspect_directory

    found = inspect_directory(directory)
    console = Console()
    report.show_table(report.zeros_table(found), console)
    if found.record is not None:
        for table in (report.blocks_table, report.rounds_table, report.results_table):
            report.show_table(table(found.record), console)
    if figures is not None:
        if found.record is None:
            raise LosaError(f"{directory}: no {report.RECORD}, so there is nothing to draw")
        written = write_figures(found.record, figures)
        typer.echo(f"wrote {len(written)} files to {figures}")


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Settings = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time matrix products on this machine, for about a second.")
    ] = True,
) -> None:
    """Estimate a recipe's memory and time from the model's configuration, without loading weights.

    To plan for a GPU on a machine without one: --set device=cuda --no-probe.
    """
    loaded = _load(recipe, set_)
    from rich.console import Console

    from losa.output.tables import show_table
    from losa.run.estimate import estimate
    from losa.run.estimate_tables import estimate_tables

    console = Console()
    for table in estimate_tables(estimate(loaded, probe=probe)):
        show_table(table, console)


sparse.register(app)
info.register(app)
