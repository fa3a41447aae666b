"""Makes the expected band of a recipe from finished runs, and compares each run with the band of the others.

    for seed in 0 1 2 3 4; do ijepa-hf pretrain digits --seed $seed --output_dir runs/digits-$seed; done
    python scripts/record_band.py digits runs/digits-*

The runs may differ in their seed only. The band is written to `src/ijepa_hf/recipes/bands/<recipe>.json`, which is
shipped. Each run is then compared with the band of the other runs; it should be inside.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_hf.files import read_json
from ijepa_hf.recipes.arguments import argument_defaults, argument_values, differing_arguments
from ijepa_hf.recipes.expected_band import (
    KEYS,
    NOT_COMPARED,
    WORDS,
    BandCurve,
    BandWatch,
    ExpectedBand,
    LossWindows,
    RunRows,
)
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.recipes.recipe_files import recipe_names
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, EVALUATIONS_FILE, METRICS_FILE, REPORT_FILE
from ijepa_hf.runs.rows import read_rows

BANDS = Path(__file__).resolve().parent.parent / "src" / "ijepa_hf" / "recipes" / "bands"
LEAST_SEEDS = 3
WIDENED_BY = 1.0  # times the range of the seeds, below the lowest and above the highest of them
NEIGHBOURS = 2  # steps before and after one, whose ranges count too
WINDOWS = 20  # of the loss in a run, at most
ROWS_IN_WINDOW = 4  # at least
_LIMITS = {"loss": (0.0, math.inf), "rankme": (1.0, math.inf), "knn": (0.0, 1.0)}


def read_finished_run(folder: Path, recipe: str) -> tuple[RunRows, dict[str, Any]]:
    """Reads the logs of a finished run and the machine that it ran on.

    Args:
        folder: Of the run.
        recipe: Name of the recipe that the run must have followed.

    Returns:
        The rows, and the machine as in `report.json`.

    Raises:
        ValueError: If the run is not finished, has collapsed, or has followed another recipe.
    """
    report = read_json(folder / REPORT_FILE)
    if report is None:
        raise ValueError(f"{folder} holds no finished run: there is no {REPORT_FILE}.")
    found = report["collapse_verdict"]
    if found is not None and found["is_failure"]:
        raise ValueError(f"{folder}: {found['name']}; a band is made of healthy runs.")
    differing = recipe_differences(recipe, report["arguments"])
    if differing:
        raise ValueError(f"{folder} is no run of {recipe}: {'; '.join(differing)}.")
    files = (METRICS_FILE, DIAGNOSTICS_FILE, EVALUATIONS_FILE)
    return RunRows(report["arguments"], *(read_rows(folder / name) for name in files)), report["machine"]


def recipe_differences(recipe: str, arguments: Mapping[str, Any]) -> list[str]:
    """Names the arguments in which a run differs from a recipe, so that no band can be made of it.

    Args:
        recipe: Name of a shipped recipe.
        arguments: All arguments of the run, or those that its band keeps.

    Returns:
        A phrase for each argument that differs and changes a curve.
    """
    model, data, run = parse_arguments([recipe])
    there = argument_values(model.resolved(model.to_config()), data, run)
    here = {**argument_defaults(), **arguments}
    return differing_arguments(there, {name: here[name] for name in there}, NOT_COMPARED)


def _compared(arguments: Mapping[str, Any]) -> dict[str, Any]:
    left_out = set(NOT_COMPARED)
    if arguments.get("masking_strategy") == "multi_block_official":  # its context depends on the batch of each device
        left_out.discard("per_device_train_batch_size")
    return {name: value for name, value in arguments.items() if name not in left_out}


def make_band(recipe: str, runs: Sequence[RunRows], machines: Sequence[Mapping[str, Any]]) -> ExpectedBand:
    """Makes a band from runs that differ in their seed.

    At each step the band goes from the lowest value of the runs to the highest, widened on both sides by `WIDENED_BY`
    times their range: a new run leaves the plain range of n others with probability 2/(n + 1), at each step. The
    range is the largest of the step's own and of `NEIGHBOURS` steps before and after it, since that of a few runs is
    small by chance somewhere. Loss and RankMe are widened in proportion (on a logarithmic scale), kNN by points. No
    bound leaves what the number can be.

    Args:
        recipe: Name of the recipe.
        runs: At least `LEAST_SEEDS` finished ones.
        machines: The machines of the runs, each once.

    Returns:
        The band.

    Raises:
        ValueError: If the runs are too few, their seeds or other arguments are not what they have to be, or they have
            logged at different steps.
    """
    seeds = tuple(run.arguments["seed"] for run in runs)
    if not LEAST_SEEDS <= len(runs) == len(set(seeds)):
        raise ValueError(f"runs have the seeds {seeds}; give at least {LEAST_SEEDS} runs, each with its own --seed.")
    arguments, num_steps = _compared(runs[0].arguments), runs[0].metrics[-1]["step"]
    for run in runs[1:]:
        differing = [name for name, value in _compared(run.arguments).items() if value != arguments.get(name)]
        if differing:
            raise ValueError(
                f"the run of seed {run.arguments['seed']} differs from that of seed {seeds[0]} in "
                f"{', '.join(differing)}; make all with the same recipe."
            )
    window = loss_window(num_steps, max(run.arguments["logging_steps"] for run in runs))
    means = [LossWindows(window, num_steps).of(run.metrics) for run in runs]
    values = {"loss": [{end: mean for end, mean, _ in closed} for closed in means]}
    for curve in ("rankme", "knn"):
        rows = [[row for row in run.of(curve) if row.get(KEYS[curve]) is not None] for run in runs]
        values[curve] = [{row["step"]: row[KEYS[curve]] for row in part} for part in rows]
    for curve, found in values.items():
        if any(part.keys() != found[0].keys() for part in found):
            raise ValueError(f"the runs have rows of {WORDS[curve]} at different steps; make all with the same flags.")
    return ExpectedBand(
        recipe=recipe,
        seeds=seeds,
        machines=list(machines),
        loss_window=window,
        loss_rows=min(rows for closed in means for _, _, rows in closed),
        curves={curve: _widen(curve, found) for curve, found in values.items() if found[0]},
        arguments=arguments,
    )


def loss_window(num_steps: int, logging_steps: int) -> int:
    """Returns the number of optimiser steps in a window of the loss: a multiple of the steps between two rows.

    Args:
        num_steps: Of the run.
        logging_steps: Between two rows.

    Returns:
        A length with at most `WINDOWS` windows in a run, and at least `ROWS_IN_WINDOW` rows in each.
    """
    return logging_steps * max(ROWS_IN_WINDOW, math.ceil(num_steps / WINDOWS / logging_steps))


def _widen(curve: str, runs: Sequence[Mapping[int, float]]) -> BandCurve:
    """Makes the band of a curve from the values of each run by step (see `make_band`)."""
    steps = sorted(runs[0])
    values = np.array([[run[step] for step in steps] for run in runs], dtype=np.float64)
    values = values if curve == "knn" else np.log(values)
    least, largest = values.min(0), values.max(0)
    ranges = np.pad(largest - least, NEIGHBOURS, mode="edge")
    margin = WIDENED_BY * np.lib.stride_tricks.sliding_window_view(ranges, 2 * NEIGHBOURS + 1).max(1)
    lower, upper = least - margin, largest + margin
    if curve != "knn":
        lower, upper = np.exp(lower), np.exp(upper)
    lower, upper = np.clip(lower, *_LIMITS[curve]), np.clip(upper, *_LIMITS[curve])
    return BandCurve(tuple(steps), tuple(map(float, lower)), tuple(map(float, upper)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: The words after the script's name; those of the process if not given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=recipe_names(), metavar="RECIPE", help="Name of a shipped recipe.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a finished run of it.")
    parser.add_argument("--output", type=Path, help="File to write; the recipe's own in the source if not given.")
    asked = parser.parse_args(argv)
    try:
        found = [read_finished_run(folder, asked.recipe) for folder in asked.runs]
        runs, machines = [rows for rows, _ in found], [machine for _, machine in found]
        machines = [machine for number, machine in enumerate(machines) if machine not in machines[:number]]
        band = make_band(asked.recipe, runs, machines)
    except ValueError as error:
        parser.error(str(error))
    output = asked.output or BANDS / f"{asked.recipe}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(band.as_json(), "utf-8")
    print(f"{output}: {', '.join(f'{name} at {len(curve.steps)} steps' for name, curve in band.curves.items())}")
    if len(runs) <= LEAST_SEEDS:
        print(f"With {len(runs)} runs it was not tried how often a healthy run is outside; give more.")
        return
    for run in runs:
        others = make_band(asked.recipe, [other for other in runs if other is not run], machines)
        print(f"seed {run.arguments['seed']} beside the others: {BandWatch(others, run).verdict()}")


if __name__ == "__main__":
    main()
