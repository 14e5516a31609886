"""Recipes from YAML: read, changed by overrides, validated, with a message for every problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from losa.errors import RecipeError, shown
from losa.recipe.sections import Recipe
from losa.recipe.sources import DataSource, Section

_S = TypeVar("_S", bound=Section)
# What messages quote: characters of a key, and problems.
MAX_KEY, MAX_PROBLEMS = 60, 20


def load_recipe(path: str | Path, overrides: dict | None = None) -> Recipe:
    """Read and validate a YAML recipe.

    Args:
        path: the YAML file; paths in it are relative to the current directory.
        overrides: values that replace the file's, keyed by dotted name (``{"prune.sparsity": 0.5}``).

    Raises:
        RecipeError: missing file, broken YAML, unknown key or bad value; the message names each key.
    """
    return parse_recipe(override(read_settings(path), overrides or {}), where=str(path))


def read_settings(path: str | Path) -> dict:
    """A recipe file's mapping, not validated yet. Raises RecipeError: missing file, broken YAML."""
    path = Path(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {str(path)!r}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {str(path)!r}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {str(path)!r}: expected a mapping of settings, got {type(data).__name__}")
    return data


def override(data: dict, overrides: dict) -> dict:
    """``data`` with values set by dotted name, in place; absent sections are made. Raises RecipeError."""
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        section = data
        for name in parents:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise RecipeError(f"override {dotted!r}: {name!r} is not a section")
        section[leaf] = value
    return data


def parse_recipe(data: dict, where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises RecipeError, which names each offending key, what was expected and what it got."""
    return _validated(Recipe, data, where)


def data_source(path: str, where: str, **settings) -> DataSource:
    """The source of text at ``path``, with other keys of a data source. ``where``: for messages. Raises RecipeError."""
    return _validated(DataSource, {"path": path} | settings, where)


def _validated(section: type[_S], data: dict, where: str) -> _S:
    try:
        return section.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"{where}: {len(problems)} problem(s)"]
        # A check across sections has no location: its message names the keys.
        lines += ["  " + ": ".join([*_location(item), _reason(item)]) for item in problems[:MAX_PROBLEMS]]
        lines += ["  ..."] * (len(problems) > MAX_PROBLEMS)
        raise RecipeError("\n".join(lines)) from error


def _location(item: ErrorDetails) -> list[str]:
    return [".".join(map(_key, item["loc"]))] if item["loc"] else []


def _key(part) -> str:
    name = part if isinstance(part, str) else shown(part)
    return name if len(name) <= MAX_KEY else f"{name[:MAX_KEY]}..."


def _reason(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        near = _nearest([_key(part) for part in item["loc"]])
        return f"unknown key; did you mean {near}?" if near else "unknown key"
    if item["type"] == "missing":
        return "missing"
    if item["type"] == "model_type":
        return f"expected a section of settings (key: value), got {shown(item['input'])}"
    if item["type"] == "path_type":
        return f"expected a directory's name, got {shown(item['input'])}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{item['msg']}, got {shown(item['input'])}"


def _nearest(location: list[str]) -> str | None:
    """The key that was probably meant: spelt alike in the same section, or the same name in another one."""
    section = ".".join(location[:-1])
    keys = list(_keys(Recipe))
    here = [key for key in keys if key.rpartition(".")[0] == section]
    alike = difflib.get_close_matches(".".join(location), here, n=1, cutoff=0.8)
    elsewhere = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    return next(iter(alike or elsewhere), None)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _keys(kind, f"{prefix}{name}.")


# Levels of sections and lists. A recipe has four. Python's own limit on recursion is not a fixed number of levels.
_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """Safe YAML, with three differences. 2:4 and 2026-01-01 are text and 1e-3 is a number, where YAML 1.1 reads 124, a
    date and text. Repeated keys are refused. A number that Python does not read stays text, so that its key is named.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"repeated key {key.value!r}", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _number(self, node):
        read = self.construct_yaml_int if node.tag == _INT else self.construct_yaml_float
        try:
            return read(node)
        except ValueError:
            return node.value


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    _FLOAT: (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
    _Loader.add_constructor(_tag, _Loader._number)


def read_yaml(text: str):
    """One YAML document, as recipes are read. Raises yaml.YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError("nested too deep")
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a value that does not fit its !!tag
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error
