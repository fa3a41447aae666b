"""YAML as people mean it in a recipe: the plain values of version 1.2, read and written alike.

In YAML 1.1, which PyYAML reads, `mixed_precision: no` is false, `seed: 010` is eight, 1e-3 is a word, and of a key
that stands twice the last one counts, unsaid. No tag makes an object of Python: the safe loader is below.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

# What PyYAML raises: its own, and what Python does with a tag that its value does not fit, or with lists in lists in
# lists.
_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def read_yaml(text: str) -> Any:
    """Reads a document.

    Args:
        text: YAML.

    Returns:
        Its values; `no`, `on` and 2026-01-31 are words, 1e-3 is a number. `None` for an empty document.

    Raises:
        ValueError: If it is none, or a key stands twice; says where, on one line.
    """
    try:
        return _Loader(text).get_single_data()
    except _ERRORS as error:
        raise ValueError(" ".join(str(error).split())) from error


def write_yaml(values: Mapping[str, Any]) -> str:
    """Writes values so that `read_yaml` gives them back: words that it would read as numbers are in quotes.

    Args:
        values: Words, numbers, truth values, lists of them, or `None`, by name.

    Returns:
        YAML, a line for each name, in their order.
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice; PyYAML's own method."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quotes words with Unicode's line breaks, which PyYAML would write as they are and read as others."""
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"0|-?[1-9][0-9]*", list("-0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
