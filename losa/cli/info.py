"""The command ``losa info``: what was built and loaded, the GPU, and what is chosen by measurement on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from losa.errors import LosaError

Directory = Annotated[
    Path | None,
    typer.Argument(help="With --gpu: a packed or pruned checkpoint to run the shapes of."),
]


def register(app: typer.Typer) -> None:
    app.command()(info)


def info(
    directory: Directory = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Also run a model's shapes and show which kernels were chosen, and the times.")
    ] = False,
) -> None:
    """What was built and loaded or why not, the GPUs, and every LOSA_* environment variable with its value."""
    import torch

    for line in _described():
        typer.echo(line)
    if directory is not None and not gpu:
        raise LosaError("info: a directory is for --gpu, which runs its shapes")
    if not gpu:
        return
    if not torch.cuda.is_available():
        raise LosaError("info --gpu: torch sees no GPU here, so there is nothing to choose by measurement")
    from losa.inference import choices

    if directory is None:
        choices.decode_shapes("cuda")
        choices.train_shapes("cuda")
    else:
        from losa.inference.loading import load_sparse

        model, _ = load_sparse(directory, dtype="auto", device="cuda", dense=False)
        typer.echo(f"{directory}: {choices.decode_model(model)} kinds of packed linears")
    for line in choices.lines():
        typer.echo(line)


def _described() -> list[str]:
    import importlib.metadata

    import torch

    from losa import __version__
    from losa_kernels import native

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    line = f"losa {__version__}, torch {torch.__version__}, Triton {version('triton')}, "
    lines = [f"{line}transformers {version('transformers')}, Python {platform.python_version()}"]
    lines += [f"{library}: {status}" for library, status in native.status().items()]
    if built := native.build_info():
        lines.append(f"built by {built['compiler']} against torch {built['torch_headers']}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card: Any = torch.cuda.get_device_properties(index)
            capability = (card.major, card.minor)
            line = f"GPU {index}: {card.name}, compute capability {card.major}.{card.minor}, "
            line += f"{card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors, "
            line += f"{card.shared_memory_per_block_optin / 1024:.0f} KiB of shared memory a block"
            if native.missing("cuda") is None and not native.built_for(capability):
                line += f"; losa_cuda has no code for it: build with LOSA_CUDA_ARCHS={card.major}{card.minor}"
            lines.append(line)
    else:
        lines.append("GPU: none that torch sees")
    return [*lines, *_settings()]


def _settings() -> list[str]:
    """A line for every environment variable: its value, whether it is set, and who reads it where the package does not.
    A bad value is shown, not raised."""
    from losa_kernels import settings

    rows = []
    for setting in settings.TABLE:
        try:
            row = f"{setting.name}={setting.value_text()}"
        except settings.SettingError as error:
            row = str(error)
        notes = ["set"] if setting.is_set else []
        if setting.read in settings.BY_OTHERS:
            notes.append(f"read {setting.read}")
        rows.append(f"  {row} ({', '.join(notes)})" if notes else f"  {row}")
    known = {setting.name for setting in settings.TABLE}
    unknown = sorted(name for name in os.environ if name.startswith("LOSA_") and name not in known)
    rows += [f"  {name}: set, but nothing reads a variable of this name" for name in unknown]
    return ["settings:", *rows]
