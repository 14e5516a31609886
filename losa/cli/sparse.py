"""Commands on sparse checkpoints: pack, unpack, generate, bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from losa.cli.options import Device, Dtype, Force, JsonFile
from losa.errors import LosaError
from losa.packed.formats import help_text

Directory = Annotated[Path, typer.Argument(help="A checkpoint that losa wrote, or any pruned one with safetensors.")]
Output = Annotated[Path, typer.Option(help="Directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output that losa wrote.")]

# What ``bench --short`` measures.
SHORT = ("transformers, dense", "losa, packed", "losa, packed bfloat16")


def register(app: typer.Typer) -> None:
    for command in (pack, unpack, generate, bench):
        app.command()(command)


def pack(
    directory: Directory,
    output: Output,
    format: Annotated[
        str,
        typer.Option(help=help_text()),
    ] = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    force: Force = False,
) -> None:
    """Store a pruned checkpoint without its zeros; losa.load and the commands here read it."""
    from losa.packed.directory import pack_directory

    done = pack_directory(directory, output, format=format, dtype=_dtype(dtype), overwrite=overwrite, force=force)
    typer.echo(
        f"{output}: {done.packed} linears packed, {done.dense} left dense; "
        f"{done.packed_bytes:,} bytes of {done.dense_bytes:,} ({done.packed_bytes / done.dense_bytes:.2f})"
    )


def unpack(directory: Directory, output: Output, overwrite: Overwrite = False, force: Force = False) -> None:
    """The ordinary, dense checkpoint of a packed one."""
    from losa.packed.directory import unpack_directory

    unpack_directory(directory, output, overwrite=overwrite, force=force)
    typer.echo(f"wrote {output}")


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat the user's message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of probability to draw from.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Keep the weights dense, to compare.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Continue a prompt on sparse weights and say how fast."""
    from losa.inference.generation import generate as continue_prompt
    from losa.inference.loading import load_sparse

    model, tokenizer = load_sparse(directory, dtype, device, dense)
    message = [{"role": "user", "content": prompt}] if chat else prompt
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"top_p": top_p, "seed": seed}
    waiting = ["" if chat else prompt]  # until it is known that the model takes it

    def show(text: str) -> None:
        _show("".join(waiting) + text)
        waiting.clear()

    try:
        made = continue_prompt(model, tokenizer, message, on_text=show, **settings)
        show("")
    finally:
        if not waiting:
            typer.echo()
    if made.fallback is not None:
        typer.echo(f"through transformers: {made.fallback}", err=True)
    typer.echo(
        f"{len(made.tokens)} tokens, {made.tokens_per_second:.1f} tokens/s; prompt of {made.prompt_tokens} tokens in "
        f"{made.prefill_seconds:.2f} s",
        err=True,
    )


def _show(text: str) -> None:
    """On stdout, at once, with "?" for what its encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), nl=False)


def bench(
    directory: Directory,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per measurement.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each; the median counts.")] = 3,
    short: Annotated[
        bool, typer.Option("--short", help="One line: transformers on dense weights, losa on packed.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Decode speed, dense and packed side by side: tokens/s, bytes a token reads, share of the memory's speed.

    Models that losa's own loop does not serve are measured through transformers only.
    """
    from rich.console import Console
    from rich.table import Table

    from losa.inference.loading import load_sparse
    from losa.inference.speed import decode_speeds
    from losa.storage.files import write_json

    model, _ = load_sparse(directory, dtype, device, dense=True)
    found = decode_speeds(model, tokens=tokens, repetitions=repetitions, only=SHORT if short else None)
    if short:
        base = found[0].tokens_per_second
        rest = "; ".join(f"{s.name} {s.tokens_per_second:.1f} ({s.tokens_per_second / base:.1f} x)" for s in found[1:])
        typer.echo(f"decoding, tokens/s: {found[0].name} {base:.1f}; {rest}")
    else:
        table = Table("decoding", "tokens/s", "MB a token", "of copy speed")
        for s in found:
            table.add_row(
                s.name, f"{s.tokens_per_second:.1f}", f"{s.bytes_per_token / 1e6:.1f}", f"{s.fraction_of_limit:.0%}"
            )
        Console().print(table)
    if json_file is not None:
        import torch

        setup = {"directory": str(directory), "tokens": tokens, "torch": torch.__version__}
        setup["threads"] = torch.get_num_threads()
        write_json(json_file, setup | {"rows": [vars(s) for s in found]})


def _dtype(name: str):
    import torch

    names = ("float32", "bfloat16", "float16")
    if name != "auto" and name not in names:
        raise LosaError(f"dtype: expected auto, {', '.join(names)}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)
