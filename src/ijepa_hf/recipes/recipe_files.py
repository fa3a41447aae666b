"""Reads and writes recipes: flat YAML files of argument names and values, shipped in the package or given by path.

Values are read by the rules of YAML 1.2, and written so that they are read back. PyYAML follows YAML 1.1, where
`mixed_precision: no` is false, `seed: 010` is eight and 1e-3 is a word; it also takes the last of two equal keys
without an error. The loader is a safe one: no tag creates a Python object.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ijepa_hf.recipes.arguments import ARGUMENT_CLASSES, argument_defaults, argument_names, nearest_name

# PyYAML raises its own errors, and those of Python for values that do not fit their tag and for deep nesting.
_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def recipe_names() -> list[str]:
    """Returns the names of the recipes shipped with the package."""
    folder = resources.files("ijepa_hf.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(recipe: str) -> dict[str, Any]:
    """Reads a recipe.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file.

    Returns:
        Argument names and values.

    Raises:
        FileNotFoundError: If there is no such recipe or file; the message lists the recipes.
        ValueError: If the file is not a flat mapping, or a key is not an argument; the message names the nearest one.
    """
    if recipe in recipe_names():
        text = (resources.files("ijepa_hf.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {recipe!r} is no text in UTF-8: {error}") from error
    else:
        nearest = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise FileNotFoundError(
            f"recipe {recipe!r} is neither shipped ({', '.join(recipe_names())}) nor the path of a YAML file.{hint}"
        )
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"recipe {recipe!r} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(
            f"recipe {recipe!r} must be a flat mapping of argument names to values, e.g. 'patch_size: 16'."
        )
    known = argument_names()
    for key in values:
        if key == "regions_column_name":  # of recipes written before the strategy was taken out
            raise ValueError(
                f"recipe {recipe!r} has the key {key!r}, which is gone; take it out, write masking_strategy: "
                "multi_block, and pass the patches of your own regions to the model (docs/masks.md shows how)."
            )
        if key not in known:
            raise ValueError(
                f"recipe {recipe!r} has the key {key!r}, which is no argument{nearest_name(str(key), known)}"
            )
    kinds = {entry.name: str(entry.type) for cls in ARGUMENT_CLASSES for entry in dataclasses.fields(cls)}
    for key, value in values.items():
        _check_recipe_value(recipe, key, value, kinds[key])
    return values


def _check_recipe_value(recipe: str, key: str, value: Any, kind: str) -> None:
    """Refuses values that the parser would read differently from how the file has them."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float | bool | None):
            raise ValueError(
                f"recipe {recipe!r}: {key} holds a {type(item).__name__}; write a number, a word or a list."
            )
        if "str" in kind and isinstance(item, bool | float):
            raise ValueError(f"recipe {recipe!r}: {key}={item!r} is no text; write it in quotes: {key}: '...'.")
    if value == [] and argument_defaults()[key] != []:
        raise ValueError(f"recipe {recipe!r}: {key} is an empty list; give it values, or leave it out.")
    if isinstance(value, list) and not kind.startswith("list"):
        raise ValueError(f"recipe {recipe!r}: {key}={value!r} is a list; {key} takes one value.")


def as_recipe(arguments: Mapping[str, Any]) -> str:
    """Writes the arguments of a run as a recipe that starts the same run in any folder.

    Args:
        arguments: Names and values; names that are not arguments, or that concern the folder only, are left out.

    Returns:
        YAML.
    """
    names = argument_names() - argument_names("place")
    kept = {name: value for name, value in arguments.items() if name in names and value not in (None, [])}
    return write_yaml(kept)


def read_yaml(text: str) -> Any:
    """Reads a YAML document.

    Args:
        text: YAML.

    Returns:
        Its values; `no`, `on` and 2026-01-31 are words, 1e-3 is a number. `None` for an empty document.

    Raises:
        ValueError: If it is not YAML, or has a key twice; the message says where, on one line.
    """
    try:
        return _Loader(text).get_single_data()
    except _ERRORS as error:
        raise ValueError(" ".join(str(error).split())) from error


def write_yaml(values: Mapping[str, Any]) -> str:
    """Writes values so that `read_yaml` returns them; quotes words that it would read as numbers.

    Args:
        values: Words, numbers, booleans, lists of them, or `None`, by name.

    Returns:
        YAML, a line for each name, in their order.
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's interface)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice; called by PyYAML."""
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
        """Quotes words with Unicode line breaks, which PyYAML would not read back as written."""
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
