"""Makes the expected band of a recipe from finished runs of it, and says how often a run is outside the others' band.

    for seed in 0 1 2 3 4; do ijepa-hf pretrain digits --seed $seed --output_dir runs/digits-$seed; done
    python scripts/record_band.py digits runs/digits-*

Runs differ in their seed only. The band goes to `src/ijepa_hf/recipes/bands/<recipe>.json`, from where it is shipped.
Each run is then compared with the band that the others make: a run of the recipe should be inside.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_hf.arguments import recipe_names
from ijepa_hf.expected_band import LEAST_SEEDS, BandWatch, RunRows, make_band, recipe_differences
from ijepa_hf.run_folder import DIAGNOSTICS_FILE, EVALUATIONS_FILE, METRICS_FILE, REPORT_FILE, read_rows

BANDS = Path(__file__).resolve().parent.parent / "src" / "ijepa_hf" / "recipes" / "bands"


def read_finished_run(folder: Path, recipe: str) -> tuple[RunRows, dict[str, Any]]:
    """What a run has logged, and what it ran on.

    Args:
        folder: Of the run.
        recipe: That it has to be of.

    Returns:
        Its rows and its machine.

    Raises:
        ValueError: If it is not finished, collapsed, or is not a run of the recipe.
    """
    if not (folder / REPORT_FILE).is_file():
        raise ValueError(f"{folder} holds no finished run: there is no {REPORT_FILE}.")
    report = json.loads((folder / REPORT_FILE).read_text("utf-8"))
    found = report["collapse_verdict"]
    if found is not None and found["is_failure"]:
        raise ValueError(f"{folder}: {found['name']}; a band is made of healthy runs.")
    differing = recipe_differences(recipe, report["arguments"])
    if differing:
        raise ValueError(f"{folder} is no run of {recipe}: {'; '.join(differing)}.")
    files = (METRICS_FILE, DIAGNOSTICS_FILE, EVALUATIONS_FILE)
    return RunRows(report["arguments"], *(read_rows(folder / name) for name in files)), report["machine"]


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
