"""The table and the figure of a comparison, from the records that `compare.py` writes."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ijepa_hf.figures.panels import DPI, FAINT_COLOR, LINE_COLORS, TEXT_COLOR, plain_frame

# families in the order of the tables, with the names that they have there
TITLES = {
    "untrained": "untrained",
    "supervised": "supervised",
    "ijepa": "I-JEPA",
    "mae": "MAE",
    "simclr": "SimCLR",
    "moco": "MoCo v2",
    "dino": "DINO",
    "ibot": "iBOT",
    "rotation": "rotation",
    "jigsaw": "jigsaw",
}
SCORES = {
    "knn": "kNN-20",
    "linear": "linear",
    "low_shot": "low-shot",
    "count": "count",
    "nearest_distance": "distance",
    "rankme": "RankMe",
}
COSTS = {"seconds": "seconds an epoch", "memory": "memory, MB"}
BUDGETS = {"equal_epochs": "equal epochs", "equal_time": "equal wall-clock"}

Record = dict[str, Any]


def check_records(records: Sequence[Record]) -> None:
    """Refuses records that cannot stand in one table.

    Args:
        records: What `compare.py` wrote.

    Raises:
        ValueError: If records of one data set differ in a setting that all families share.
    """
    first: dict[str, Record] = {}
    for record in records:
        settings = record["settings"]
        other = first.setdefault(settings["dataset_name"], settings)
        names = sorted((settings.keys() | other.keys()) - {"family", "seed", "constants"})
        differing = [name for name in names if settings.get(name) != other.get(name)]
        if differing:
            who = [f"{each['family']} seed {each['seed']}" for each in (other, settings)]
            raise ValueError(
                f"{settings['dataset_name']}: {who[0]} and {who[1]} differ in {', '.join(differing)}; train one of "
                "them again with the other's, or in a folder of its own."
            )


def render_tables(records: Sequence[Record]) -> str:
    """Markdown: for each data set a table at equal epochs and one at equal wall-clock.

    Args:
        records: What `compare.py` wrote.

    Returns:
        Tables with a row for each family in the order of `TITLES`; one without records is `missing`. Scores are means
        over seeds, with the standard deviation where there are several; top-1 in percent.

    Raises:
        ValueError: As `check_records`.
    """
    check_records(records)
    lines = []
    for dataset_name in dict.fromkeys(record["settings"]["dataset_name"] for record in records):
        of_data = [record for record in records if record["settings"]["dataset_name"] == dataset_name]
        epochs = of_data[0]["settings"]["num_train_epochs"]
        lines += [f"## {dataset_name}, {epochs} epochs of each family", "", *_epochs_table(of_data), ""]
        lines += [f"## {dataset_name}, the time that I-JEPA takes for {epochs} epochs", "", *_time_table(of_data), ""]
    return "\n".join(lines)


def _epochs_table(records: Sequence[Record]) -> list[str]:
    names = _scores_of(records)
    head = ["family", "seeds", "views an image", *COSTS.values(), *(SCORES[name] for name in names)]
    rows = []
    for family, runs in _by_family(records, "equal_epochs"):
        if not runs:
            rows.append([TITLES[family], "0", *["missing"] * (len(head) - 2)])
            continue
        seconds, memory = (_value(runs[0], "equal_epochs", name) for name in COSTS)
        costs = [str(runs[0]["views_per_image"]), f"{seconds:.1f}", f"{memory:.0f}"]
        if not runs[0]["equal_epochs"]["num_steps"]:
            costs = ["0", "0", "0"]
        rows.append([TITLES[family], str(len(runs)), *costs, *_score_cells(runs, "equal_epochs", names)])
    return _table(head, rows)


def _time_table(records: Sequence[Record]) -> list[str]:
    names = _scores_of(records)
    head = ["family", "seeds", "epochs", *(SCORES[name] for name in names)]
    rows = []
    for family, runs in _by_family(records, "equal_time"):
        if not runs:
            rows.append([TITLES[family], "0", *["missing"] * (len(head) - 2)])
            continue
        epochs = [run["equal_time"]["num_steps"] / run["steps_per_epoch"] for run in runs]
        rows.append(
            [
                TITLES[family],
                str(len(runs)),
                f"{statistics.fmean(epochs):.0f}",
                *_score_cells(runs, "equal_time", names),
            ]
        )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def _score_cells(runs: Sequence[Record], budget: str, names: Sequence[str]) -> list[str]:
    return [_spread([_value(run, budget, name) for run in runs], 1) for name in names]


def _value(run: Record, budget: str, name: str) -> float:
    """A score or a cost in the unit in which it is shown."""
    found = run[budget]
    if name == "seconds":
        return run["seconds_per_step"] * run["steps_per_epoch"]
    if name == "memory":
        return found["peak_memory_bytes"] / 1e6
    return found["scores"][name] * (1 if name == "rankme" else 100)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _scores_of(records: Sequence[Record]) -> list[str]:
    known = {name for record in records for budget in BUDGETS if budget in record for name in record[budget]["scores"]}
    return [name for name in SCORES if name in known]


def _by_family(records: Sequence[Record], budget: str) -> list[tuple[str, list[Record]]]:
    finished = [record for record in records if budget in record]
    return [(family, [run for run in finished if run["settings"]["family"] == family]) for family in TITLES]


def draw_figure(records: Sequence[Record], path: Path) -> Figure:
    """Draws all scores and costs: a row of panels for each data set, a line for each family.

    Args:
        records: What `compare.py` wrote.
        path: PNG to write; its folder must exist.

    Returns:
        The figure.

    Raises:
        ValueError: As `check_records`.
    """
    check_records(records)
    names_of_data: dict[str, list[str]] = {}
    for record in records:
        dataset_name = record["settings"]["dataset_name"]
        of_data = [other for other in records if other["settings"]["dataset_name"] == dataset_name]
        names_of_data.setdefault(dataset_name, [*_scores_of(of_data), *COSTS])
    columns = max(map(len, names_of_data.values()))
    figure = Figure(
        figsize=(1.75 * columns + 1.2, 3.2 * len(names_of_data) + 0.4), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(len(names_of_data), columns, squeeze=False)
    for row, (dataset_name, names) in zip(axes, names_of_data.items(), strict=True):
        of_data = [record for record in records if record["settings"]["dataset_name"] == dataset_name]
        for axis, name in zip(row, names, strict=False):
            _draw_panel(axis, of_data, name)
            title = (SCORES | COSTS)[name] if axis is not row[0] else f"{dataset_name}: {SCORES[name]}"
            axis.set_title(title, fontsize=9, loc="left", color=TEXT_COLOR)
        for axis in row[len(names) :]:
            axis.set_visible(False)
        for axis in row[1:]:
            axis.set_yticklabels([])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI)
    return figure


def _draw_panel(axis: Axes, records: Sequence[Record], name: str) -> None:
    """Means of all families as dots, their least and largest seed as a line; filled is equal epochs."""
    budgets = BUDGETS if name in SCORES else ["equal_epochs"]
    for budget, offset, color, filled in zip(budgets, (-0.16, 0.16), LINE_COLORS, (True, False), strict=False):
        places, means = [], []
        for place, (_, runs) in enumerate(_by_family(records, budget)):
            values = [_value(run, budget, name) for run in runs]
            if values:
                places.append(place + offset)
                means.append(statistics.fmean(values))
                axis.plot([min(values), max(values)], [place + offset] * 2, color=color, linewidth=1.2)
        axis.plot(
            means, places, "o", color=color, markersize=5, markerfacecolor=color if filled else "white",
            label=BUDGETS[budget],
        )  # fmt: skip
        if (
            budget == "equal_epochs" and name in SCORES and places and places[0] < 0
        ):  # the first family is the untrained one
            axis.axvline(means[0], color=FAINT_COLOR, linewidth=0.8, linestyle="--", zorder=0, label="untrained")
    axis.set_yticks(range(len(TITLES)), list(TITLES.values()), fontsize=8)
    axis.set_ylim(len(TITLES) - 0.5, -0.5)
    missing = [place for place, (_, runs) in enumerate(_by_family(records, "equal_epochs")) if not runs]
    for place in missing:
        axis.annotate(
            "missing", (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=7
        )
    units = {"rankme": "effective rank", "seconds": "seconds", "memory": "MB"}
    axis.set_xlabel(units.get(name, "top-1, %"), fontsize=8, color=FAINT_COLOR)
    if name in COSTS:
        axis.set_xlim(left=0)
    plain_frame(axis)
