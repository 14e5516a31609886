"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="Go on where less than half of the blocks' weights can be pruned (prune.partly).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output whoever wrote it.")]
ForceRun = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an existing output whoever wrote it; go on where memory is too small by `losa plan`."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]
