"""YAML as recipes are written in."""

from __future__ import annotations

import re

import yaml

# Levels of sections and lists. A recipe has four; Python's own limit on recursion is no fixed number of levels.
_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 2:4 and 2026-01-01 as text and 1e-3 as a number, unlike YAML 1.1 (124, a date and text), and
    refuses repeated keys. Numbers that Python does not read stay text, so that their key is named."""

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
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of values that their !!tag does not fit
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error
