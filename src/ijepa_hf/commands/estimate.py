"""Runs `ijepa-hf estimate`: estimates parameters, FLOPs, memory, steps and hours of a run before it is started."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_hf.estimation.estimate import DEFAULT_UTILIZATION, estimate_run, render_estimate
from ijepa_hf.estimation.timing import HARDWARE
from ijepa_hf.files import write_json_atomically
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.recipes.parsing import CommandParser, parse_arguments, parse_flags
from ijepa_hf.recipes.parsing import build_parser as build_pretrain_parser
from ijepa_hf.recipes.recipe_files import load_recipe


def build_parser() -> CommandParser:
    """Returns the parser of the command: its own flags, and all of `ijepa-hf pretrain`."""
    parser = build_pretrain_parser("estimate")
    parser.description = (
        "Print what a run takes: parameters, FLOPs, memory, steps and hours. No image is read and nothing is "
        "downloaded. The flags are those of ijepa-hf pretrain, and the following."
    )
    _add_flags(parser.add_argument_group("flags of estimate alone"))
    return parser


def _add_flags(parser: Any) -> None:
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"One of {', '.join(HARDWARE)}; or this: the machine at hand, measured for some seconds; or cpu: only "
        "its CPU. All named hardware if not given.",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        help="Share of the peak FLOP/s of named hardware that a run reaches, above 0 and at most 1; "
        f"{DEFAULT_UTILIZATION} if not given.",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="Devices that share a step.")
    parser.add_argument(
        "--num_images", type=int, help="Images of the data set; needed for a set whose size is not known by its name."
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="Also write the numbers to this JSON file; without FILE, print them as JSON in place of the table.",
    )


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf estimate`: a recipe, flags of `ijepa-hf pretrain`, and those of its own.

    Returns:
        The exit code.

    Raises:
        FileNotFoundError: If the recipe, or the folder of the JSON file, does not exist.
        ValueError: If a flag or value is bad, or weights to start from are not on this disk.
    """
    named, arguments = _parse(argv)
    found = estimate_run(
        *arguments,
        hardware=named.hardware,
        utilization=named.utilization,
        num_processes=named.num_processes,
        num_images=named.num_images,
    )
    if named.json not in (None, "-"):
        write_json_atomically(Path(named.json), found)
    print(json.dumps(found, indent=2) if named.json == "-" else render_estimate(found))
    return 0


def _parse(
    argv: Sequence[str],
) -> tuple[argparse.Namespace, tuple[ModelArguments, DataArguments, PretrainingArguments]]:
    """Parses the command's own flags and the run's arguments, which need no data set and no learning rate here."""
    named = parse_flags(build_parser(), argv)
    own = argparse.ArgumentParser(prog="ijepa-hf estimate", add_help=False, allow_abbrev=False)
    _add_flags(own)
    rest = own.parse_known_args(argv)[1]
    if named.recipe is not None and rest[0] != named.recipe:
        raise ValueError(
            f"{named.recipe!r} stands after a flag; the recipe comes first: ijepa-hf estimate {named.recipe} ..."
        )
    if named.json not in (None, "-"):
        path = Path(named.json)
        if path.suffix != ".json":
            raise ValueError(f"json={named.json!r} must end in .json, for example --json estimate.json.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"json={named.json!r}: there is no folder {str(path.parent)!r}; make it first.")
    recipe = {} if named.recipe is None else load_recipe(named.recipe)
    if named.dataset_name is None and recipe.get("dataset_name") is None:
        rest += ["--dataset_name", "not named"]
    rates = ("learning_rate", "base_learning_rate")
    if all(getattr(named, rate) is None and rate not in recipe for rate in rates):
        rest += ["--learning_rate", "0"]
    return named, parse_arguments(rest)
