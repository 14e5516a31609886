"""The commands run, prune, eval, inspect and plan; ``sparse`` and ``info`` add theirs. Heavy imports wait until a
command needs them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from losa.cli import info, sparse
from losa.cli.errors import DEBUG, RESUMABLE, Commands, debugging, set_up_messages, told_to_all
from losa.cli.options import Device, Dtype, ForceRun, JsonFile, Yes
from losa.cli.recipes import recipe_from
from losa.errors import LosaError

logger = logging.getLogger("losa")

app = typer.Typer(
    cls=Commands,
    help="Prune a language model round by round while LoRA fine-tunes it under the same mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Console entry point."""
    try:
        app(prog_name="losa")
    except SystemExit as end:
        if _has_joined():
            _leave_others(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException:  # --debug lets everything through
        if _has_joined():
            traceback.print_exc()
            _leave_others(1)
        raise


def _has_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_others(code: int) -> None:
    """End a process that has joined others at once: threads of gloo that are torn down with the interpreter abort it
    now and then, which would replace its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _version(value: bool) -> None:
    if value:
        from losa import __version__

        typer.echo(f"losa {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
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
    processes = os.environ.get("WORLD_SIZE", "").strip()
    first = os.environ.get("RANK", "0").strip() == "0"
    if processes not in ("", "1") and first and context.invoked_subcommand not in RESUMABLE:
        message = "losa %s works in one process; it was started %s times, and each does all of it"
        logger.warning(message, context.invoked_subcommand, processes)


RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe; see examples/.", metavar="RECIPE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, such as prune.sparsity=0.5; may be repeated."),
]
Model = Annotated[str, typer.Argument(help="Hugging Face id, local directory, .gguf file or package:NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with unfinished work; begin where there is none.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output that losa wrote; drop unfinished work.")
]


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
    force: ForceRun = False,
    yes: Yes = False,
) -> None:
    """Run a recipe: prune, fine-tune, compare, export a checked sparse checkpoint."""
    with told_to_all():
        loaded = recipe_from(recipe, [*(set_ or []), *["prune.partly=true"] * yes], data, output)
    from losa.run.pipeline import run_recipe

    run_recipe(loaded, resume=resume, overwrite=overwrite, force=force)


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[str, typer.Option(help="Calibration text: a file, a directory or a data set's name.")],
    pruner: Annotated[str, typer.Option(help="wanda, sparsegpt, alps, pruner_zero, magnitude or wanda_sp.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove, above 0, at most 0.95.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead: N:M, N weights kept of every M, such as 2:4.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a sample.")] = 2048,
    statistics_gb: Annotated[
        float, typer.Option(help="Hessians of a block beyond so many GB take several passes over it.")
    ] = 8,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure perplexity on, before and after.")] = None,
    eval_length: Annotated[int, typer.Option(help="Window length of the perplexity, in tokens.")] = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Draws the calibration samples.")] = 0,
    offload: Annotated[
        Literal["disk"] | None,
        typer.Option(help="disk: one decoder block in memory at a time, for a model larger than memory."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force: ForceRun = False,
    yes: Yes = False,
) -> None:
    """Prune at once, without training."""
    from losa.recipe.reading import parse_recipe

    settings = {
        "model": model,
        "output": str(output),
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "offload": offload,
        "method": "prune_only",
        "prune": {"pruner": pruner, "sparsity": sparsity, "pattern": pattern, "partly": yes},
        "calibration": {"data": data, "samples": samples, "length": length, "statistics_gb": statistics_gb},
    }
    if eval_data is not None:
        settings["evaluate"] = {"data": eval_data, "length": eval_length}
    with told_to_all():
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
    json_file: JsonFile = None,
) -> None:
    """Perplexity (non-overlapping windows) and zero-shot tasks of any causal model, and the share of zeros, where its
    blocks are found: of the weights that losa could prune, and of all in the blocks' matrices."""
    if data is None and tasks is None:
        raise LosaError("eval: nothing to measure; give --data, --tasks or both")
    from losa.evaluation.measure import count_zeros, text_perplexity
    from losa.evaluation.tasks import evaluate_tasks
    from losa.packed.directory import load_any
    from losa.recipe.reading import data_source
    from losa.storage.files import write_json

    source = None if data is None else data_source(data, where="eval --data", subset=subset, split=split)
    loaded, tokenizer = load_any(model, dtype=dtype, device=device)
    found = count_zeros(loaded)
    numbers: dict = {"model": model, "zeros": found.zeros, "prunable": found.prunable, "sparsity": found.sparsity}
    numbers |= {"unprunable": found.others, "sparsity_of_blocks": found.sparsity_of_blocks}
    if found.reason:
        typer.echo(f"{model}: sparsity: not counted: {found.reason}")
    else:
        counted = f"{found.zeros:,} of {found.prunable:,} weights that can be pruned are zero ({found.sparsity:.2%})"
        rest = (
            f", {found.sparsity_of_blocks:.2%} with the {found.others:,} others of the blocks" if found.others else ""
        )
        typer.echo(f"{model}: {counted}{rest}")
    if source is not None:
        measured = text_perplexity(
            loaded,
            tokenizer,
            source,
            length=length,
            max_windows=max_windows,
            batch_size=batch_size,
            bos=bos,
            progress=sys.stderr.isatty(),
        )
        if max_windows is not None and measured.windows < max_windows:
            typer.echo(f"losa: --max-windows: {max_windows}, but the text has {measured.windows}", err=True)
        numbers["perplexity"] = vars(measured) | {"data": source.model_dump(), "bos_per_window": bos}
        begun = " that begin with the beginning-of-text token" if bos else ""
        protocol = f"{measured.windows} non-overlapping windows of {length} tokens{begun}, {measured.tokens:,} in all"
        typer.echo(f"perplexity {measured.value:.3f} on {data} ({protocol})")
    if tasks is not None:
        names = [name for task in tasks.split(",") if (name := task.strip())]
        numbers["tasks"] = evaluate_tasks(loaded, tokenizer, names, task_path or [])
        for task, metrics in numbers["tasks"].items():
            typer.echo(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if json_file is not None:
        write_json(json_file, numbers)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, losa's or any other with safetensors.")],
    figures: Annotated[Path | None, typer.Option(help="Also write figures and their numbers to this folder.")] = None,
) -> None:
    """Tables of a checkpoint: zeros per block, and of one that losa wrote its rounds, ranks and results."""
    from rich.console import Console

    from losa.output import tables
    from losa.output.figures import write_figures
    from losa.output.inspection import inspect_directory
    from losa.storage.files import RECORD

    found = inspect_directory(directory)
    console = Console()
    tables.show_table(tables.zeros_table(found), console)
    if found.record is not None:
        for table in (tables.blocks_table, tables.rounds_table, tables.results_table):
            tables.show_table(table(found.record), console)
    if figures is not None:
        if found.record is None:
            raise LosaError(f"{directory}: no {RECORD}, so there is nothing to draw")
        written = write_figures(found.record, figures)
        typer.echo(f"wrote {len(written)} files to {figures}")


@app.command()
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    set_: Settings = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="Without --gpus: time matrix products on this machine, for about a second."
        ),
    ] = True,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Plan for this many GPUs, with one process each. No GPU needs to be here."),
    ] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="Memory of each GPU, in GB of 10^9 bytes.")] = 80,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine.")] = 8,
    host_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="Memory of each machine, in GB. Without it host memory is not judged."),
    ] = None,
    tflops: Annotated[
        float,
        typer.Option(
            min=0.001, help="TFLOP/s that a GPU's products reach. The default is 0.4 of an H100's data sheet."
        ),
    ] = 395.6,
    bandwidth: Annotated[
        float,
        typer.Option(min=0.001, help="GB/s that a GPU takes in from other machines. The default is a 400 Gb/s card."),
    ] = 50,
) -> None:
    """Estimate a recipe's memory and time from the model's configuration, without loading weights.

    Without --gpus: one process on this machine (for a GPU that it lacks: --set device=cuda --no-probe). With --gpus,
    also --gpus 1: what each GPU holds, computes and takes in, at the rates that the options assume; nothing is timed
    here.
    """
    loaded = recipe_from(recipe, set_)
    from rich.console import Console

    from losa.output.tables import show_table
    from losa.run.cluster import Cluster
    from losa.run.cluster_tables import cluster_tables
    from losa.run.estimate import estimate
    from losa.run.estimate_cluster import estimate_cluster
    from losa.run.estimate_tables import estimate_tables

    if gpus is None:
        for name in ("memory", "gpus_per_node", "host_memory", "tflops", "bandwidth"):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                option = f"--{name.replace('_', '-')}"
                raise typer.BadParameter("describes a cluster, and needs --gpus", param_hint=option)
        tables = estimate_tables(estimate(loaded, probe=probe))
    else:
        rates = {"memory": memory * 1e9, "rate": tflops * 1e12, "between": bandwidth * 1e9}
        host = None if host_memory is None else host_memory * 1e9
        tables = cluster_tables(estimate_cluster(loaded, Cluster(gpus, gpus_per_node, **rates, host_memory=host)))
    console = Console()
    for table in tables:
        show_table(table, console)


sparse.register(app)
info.register(app)
