"""Makes the parsers of all commands, and turns command line and recipe of a pretraining into checked arguments."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ijepa_hf.recipes.arguments import (
    ARGUMENT_CLASSES,
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    argument_names,
    argument_values,
    nearest_name,
)
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names

_LARGEST_WHOLE = 2**63 - 1


class CommandParser(HfArgumentParser):
    """Parses as `HfArgumentParser` does, and ignores `changes` in the metadata of a field."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds an argument, as argparse does.

        Args:
            *names: Of the argument.
            **options: Those of argparse, and `changes`, which is dropped.

        Returns:
            The action.
        """
        options.pop("changes", None)
        return super().add_argument(*names, **options)


def command_parser(command: str, text: str, groups: Any = (), epilog: str | None = None) -> CommandParser:
    """Makes the parser of a command.

    Args:
        command: Its name, such as "finetune".
        text: Its purpose, for `--help`.
        groups: A dataclass of flags, or several.
        epilog: The last paragraph of `--help`.

    Returns:
        A parser that takes no abbreviations and shows each flag's default.
    """
    return CommandParser(
        groups,
        prog=f"ijepa-hf {command}",
        description=text,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def model_parser(command: str, text: str, flags: Any) -> CommandParser:
    """Makes the parser of a command that takes a MODEL, then the flags of a dataclass.

    Args:
        command: Its name.
        text: Its purpose, for `--help`.
        flags: The dataclass.

    Returns:
        The parser.
    """
    parser = command_parser(command, text, flags)
    parser.add_argument("model", metavar="MODEL", help="A run's folder, or the Hub id or folder of a vision model.")
    return parser


def build_parser(prog: str = "pretrain") -> CommandParser:
    """Returns the parser of `ijepa-hf pretrain`: an optional recipe, then a flag for each argument."""
    text = "Pretrain an I-JEPA model. A recipe sets the arguments, flags override it."
    parser = command_parser(prog, text, ARGUMENT_CLASSES)
    # argparse takes -0.5 for a value and -1e-3 for a flag
    parser._negative_number_matcher = re.compile(
        r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE
    )
    parser.add_argument(
        "recipe", nargs="?", help=f"One of {', '.join(recipe_names())}, or the path of a YAML file.", default=None
    )
    return parser


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Turns a command line into checked arguments.

    Args:
        argv: The words after `ijepa-hf pretrain`: a recipe (optional, first), then flags.

    Returns:
        The three groups; `output_dir` is filled in.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If a flag or recipe key is unknown (the nearest is named), or a value is bad.
    """
    parser = build_parser()
    recipe, flags = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else (None, list(argv))
    positional = [] if recipe is None else [recipe]
    named, unknown = parser.parse_known_args([*positional, *flags])
    if named.recipe != recipe:
        raise ValueError(
            f"{named.recipe!r} stands after a flag; the recipe comes first: ijepa-hf pretrain {named.recipe} ..."
        )
    if any(word.split("=")[0] == "--hub_token" for word in unknown):  # the message must not repeat the value
        raise ValueError(
            "--hub_token would show the token to everyone who can list processes; log in once with `hf auth login`, "
            "or set the environment variable HF_TOKEN."
        )
    if unknown:
        known = {f"--{name}" for name in argument_names()}
        raise ValueError(
            f"{unknown[0]!r} is no flag of ijepa-hf pretrain{nearest_name(unknown[0].split('=')[0], known)}"
        )
    # Recipe values go through the same parser as flags, so that they get the same types and errors.
    values = load_recipe(recipe) if recipe is not None else {}
    for given, other in (("learning_rate", "base_learning_rate"), ("base_learning_rate", "learning_rate")):
        if any(flag.split("=")[0] == f"--{given}" for flag in flags):
            values.pop(other, None)  # both set the learning rate: the flag overrides the recipe
    defaults = as_flags(values)
    model, data, run, _ = parser.parse_args_into_dataclasses(
        args=[*positional, *defaults, *flags],
        look_for_args_file=False,  # else a file `ijepa-hf.args` beside the command would add flags
    )
    model.given = frozenset(name for name, value in values.items() if value is not None) | {
        word[2:].split("=")[0] for word in flags if word.startswith("--")
    }
    if run.output_dir is None:
        run.output_dir = str(Path("runs") / (Path(recipe).stem if recipe else "ijepa"))
    _check(model, data, run)
    return model, data, run


def _check(model: ModelArguments, data: DataArguments, run: PretrainingArguments) -> None:
    for group in (model, data, run):
        _check_values(group)
    if run.model_name_or_path is None:  # else the data are checked once the weights are known
        data.check(model)
    run.check()
    if run.eval_steps is not None and data.eval_split_name is None:
        raise ValueError(
            f"eval_steps={run.eval_steps} needs labelled images to score with; name their split, for example "
            "--eval_split_name test."
        )
    if model.vicreg_weight and run.per_device_train_batch_size < 2:
        raise ValueError(
            f"vicreg_weight={model.vicreg_weight} needs a variance over images, which "
            f"per_device_train_batch_size={run.per_device_train_batch_size} has not; write 2 or more."
        )


def as_flags(values: dict[str, Any]) -> list[str]:
    """Writes argument values as flags of a command line.

    Args:
        values: Names and values; `None` and empty lists are left out.

    Returns:
        Flags and words.
    """
    flags: list[str] = []
    for name, value in values.items():
        if value is None or value == []:
            continue
        # `=` before a single value, because it may begin with a dash
        flags += [f"--{name}", *(str(item) for item in value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses the flags of a command.

    Args:
        parser: Of the command; `prog` is its name, such as "ijepa-hf finetune".
        argv: The words after the command.

    Returns:
        Names and values.

    Raises:
        ValueError: If a flag is unknown; names the nearest.
    """
    named, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = nearest_name(unknown[0].split("=")[0], flag_names(parser))
        raise ValueError(f"{unknown[0]!r} is no flag of {parser.prog}{nearest}")
    return named


def flag_names(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the flags of a parser, such as `--seed`; only the spelling with `_` of those that have two."""
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    return {flag for flag in flags if "-" not in flag[2:] or f"--{flag[2:].replace('-', '_')}" not in flags}


def _check_values(group: Any) -> None:
    """Refuses NaN (no comparison with a limit finds it), infinity, whole numbers beyond 64 bits, and empty words."""
    for name, value in argument_values(group).items():
        for number in value if isinstance(value, list) else [value]:
            if number == "":
                raise ValueError(f"{name}={value!r} is empty; give it a value, or leave it out.")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}={value} must be finite.")
            if isinstance(number, int) and abs(number) > _LARGEST_WHOLE:
                raise ValueError(f"{name}={value} must be at most {_LARGEST_WHOLE}.")
