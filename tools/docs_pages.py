"""Parts of the documentation that are made when it is built (a hook of mkdocs.yml).

A page asks for a part by a line ``<!-- made: NAME -->``; ``PARTS`` says which there are. So the tables of recipe keys,
commands and environment variables come from the code, and the notebook's results from this very build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tiny_model.ipynb"
PLANNING = ROOT / "docs" / "guide" / "planning.md"
MARKER = re.compile(r"^<!-- made: (.+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page. Raises KeyError for a part that is not known."""
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def recipe_keys() -> str:
    """A table of keys for every section of a recipe."""
    from losa.recipe import DataSource, Recipe

    found = [("The recipe itself", "", Recipe)]
    found += [(f"`{name}`", f"{name}.", model) for name, model in sections(Recipe)]
    found.append(("A data source", "", DataSource))
    parts = []
    for title, prefix, model in found:
        fields = {name: field for name, field in model.model_fields.items() if section_of(field.annotation) is None}
        rows = [
            [f"`{prefix}{name}`", f"`{values(field)}`", default(field), field.description or ""]
            for name, field in fields.items()
        ]
        about = " ".join((model.__doc__ or "").split()).replace("``", "`")
        parts.append(f"### {title}\n\n{about}\n\n{table(['key', 'values', 'default', ''], rows)}")
    return "\n\n".join(parts)


def methods() -> str:
    """The methods that a recipe may name."""
    from losa.recipe import METHODS

    rows = [
        [f"`{name}`", method.label, method.sentence, "yes" if method.mergeable else "no"]
        for name, method in METHODS.items()
    ]
    return table(["`method`, `compare`", "in tables", "what is run", "mergeable"], rows)


def sections(model: type) -> Iterator[tuple[str, type]]:
    for name, field in model.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield name, section


def section_of(annotation: Any) -> type | None:
    """The section's class where a field is a section or an optional one."""
    from typing import get_args

    from losa.recipe import DataSource, Recipe

    base = Recipe.__base__
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, base) and kind is not DataSource:
            return kind
    return None


def values(field: Any) -> str:
    """A field's type and bounds, as a reader of YAML names them."""
    text = kinds(field.annotation)
    bounds = {"Gt": "> {.gt}", "Ge": ">= {.ge}", "Lt": "< {.lt}", "Le": "<= {.le}"}
    limits = [m for m in field.metadata if getattr(m, "le", 0) < 2**31 - 1 and getattr(m, "lt", 0) < 2**63]
    said = [bounds[type(m).__name__].format(m) for m in limits if type(m).__name__ in bounds]
    return f"{text} {', '.join(said)}".strip()


def kinds(annotation: Any) -> str:
    from types import NoneType, UnionType
    from typing import Annotated, Literal, Union, get_args, get_origin

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kinds(arguments[0])
    if origin is Literal:
        return ", ".join(arguments)
    if origin in (Union, UnionType):
        return " or ".join(kinds(a) for a in arguments if a is not NoneType)
    if origin is list:
        return f"list of {kinds(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path"}
    return names.get(annotation, "source" if annotation.__name__ == "DataSource" else annotation.__name__)


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands() -> str:
    """Every command of ``losa`` with its arguments and options."""
    import click
    import typer.main

    from losa.cli.app import app

    group = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"losa {name}")
        usage = re.sub(r"[{}]", "", " ".join(command.collect_usage_pieces(context)))
        rows = [row for parameter in command.params if (row := option(parameter))]
        parts.append(f"## losa {name}\n\n{command.help}\n\n```\nlosa {name} {usage}\n```\n\n{table(OPTION, rows)}")
    return "\n\n".join(parts)


OPTION = ["", "default", ""]


def option(parameter: Any) -> list[str] | None:
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
        return [f"`{names}`", "required" if parameter.required else "", parameter.help or ""]
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = parameter.default
    shown = "" if parameter.is_flag or value in (None, [], ()) or callable(value) else f"`{value}`"
    return [f"`{names}`", "required" if parameter.required else shown, parameter.help or ""]


def settings() -> str:
    """The environment variables of ``losa_kernels.settings``."""
    from losa_kernels.settings import TABLE

    rows = [[f"`{s.name}`", s.expected, s.default_text, s.about, s.read] for s in TABLE]
    return table(["variable", "values", "default", "what it does", "read"], rows)


def rooms(package: str) -> str:
    """The folders and files directly in a package: their docstrings, what is in them, and what they import of it."""
    rows = []
    for path in sorted((ROOT / package).iterdir()):
        if (path / "__init__.py").is_file():
            files = sorted(path.rglob("*.py"))
            inside = ", ".join(f"`{f.relative_to(path).with_suffix('')}`" for f in files if f.stem != "__init__")
            rows.append([f"`{path.name}/`", summary(path / "__init__.py"), inside, imported(package, path.name, files)])
        elif path.suffix == ".py" and path.stem not in ("__init__", "__main__"):
            rows.append([f"`{path.name}`", summary(path), "", imported(package, path.stem, [path])])
    return table(["room", "what lives there", "modules", f"imports of `{package}`"], rows)


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return text.partition(". ")[0].removesuffix(".").replace("``", "`")


def imported(package: str, room: str, files: list[Path]) -> str:
    """The rooms of ``package`` that these files import, where the import is written out."""
    names = [name.split(".") for file in files for name in imports_in(ast.parse(file.read_text()), file)]
    found = {name[1] for name in names if name[0] == package and len(name) > 1}
    known = {path.stem for path in (ROOT / package).iterdir() if path.is_dir() or path.suffix == ".py"}
    return ", ".join(f"`{name}`" for name in sorted(found & known - {room}))


def imports_in(tree: ast.AST, file: Path) -> set[str]:
    """Dotted names of what a file of this repository imports, wherever in ``tree`` the import is."""
    here = file.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def notebook() -> str:
    """The notebook, executed: its text, its code, and what each cell printed."""
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    document = nbformat.read(NOTEBOOK, as_version=4)
    # Local sockets: the kernel warns of TCP, which is not encrypted.
    config = Config(KernelManager={"transport": "ipc"})
    NotebookClient(document, timeout=300, kernel_name="python3", config=config).execute()
    parts = []
    for cell in document.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [f"```text\n{text.rstrip()}\n```" for output in cell.outputs if (text := printed(output))]
    return "\n\n".join(parts)


def printed(output: Any) -> str:
    """What a cell printed or its last value; not what libraries say on stderr."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.data.get("text/plain", "")


def shown_configuration() -> str:
    """The config.json that the page about planning shows."""
    return re.findall(r"^```json\n(.*?)^```$", PLANNING.read_text(), re.MULTILINE | re.DOTALL)[0]


def plan(gpus: int) -> str:
    """What the page's command for so many GPUs prints, next to a model directory with that configuration alone."""
    from contextlib import chdir
    from tempfile import TemporaryDirectory

    from typer.testing import CliRunner

    from losa.cli.app import app

    command = re.findall(rf"^losa (plan .* --gpus {gpus} .*)$", PLANNING.read_text(), re.MULTILINE)[0]
    with TemporaryDirectory() as directory, chdir(directory):
        Path("examples").symlink_to(ROOT / "examples")
        Path("llama-2-70b").mkdir()
        Path("llama-2-70b/config.json").write_text(shown_configuration())
        done = CliRunner().invoke(app, command.split())
    if done.exit_code:
        raise RuntimeError(f"losa {command}: {done.output}") from done.exception
    return done.stdout


PARTS: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_keys,
    "methods": methods,
    "commands": commands,
    "settings": settings,
    "rooms of losa": lambda: rooms("losa"),
    "rooms of losa_kernels": lambda: rooms("losa_kernels"),
    "notebook": notebook,
    "plan on 8 GPUs": lambda: plan(8),
    "plan on 64 GPUs": lambda: plan(64),
}
