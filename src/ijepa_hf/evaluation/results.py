"""Keeps the scores of an evaluation, with their intervals: `evaluation.json`, the printed table, the card's entries.

`evaluation.json` grows: a later call on the same model and images adds its scores, and takes the place of those that
it made again with the same settings. It never holds scores of two models or of two sets of images.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, metadata_load
from huggingface_hub.repocard import metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

from ijepa_hf.escaping import on_one_line, text_table
from ijepa_hf.evaluation.feature_store import differences
from ijepa_hf.evaluation.methods import METHODS, METRICS
from ijepa_hf.files import read_json, write_atomically, write_json_atomically

EVALUATION_FILE = "evaluation.json"
MODEL, UNTRAINED, RAW_PIXELS = "model", "untrained", "raw pixels"
ROWS = (MODEL, UNTRAINED, RAW_PIXELS)
_HUB_DIGITS = 4


@dataclass(frozen=True)
class Score:
    """Holds one score and all that is needed to understand it.

    Args:
        method: Name of the method, such as `knn`.
        features: Whose features were scored: one of `ROWS`.
        target: Column that was predicted.
        metric: One of `METRICS`.
        value: The score; higher is better.
        interval: Its 95 % interval over test images.
        num_train_images: Images that were fitted to.
        num_eval_images: Images that were scored.
        settings: Settings of the method, such as `k`.
        draws: Scores of single draws of labels, where there were several; `value` is their mean.
    """

    method: str
    features: str
    target: str
    metric: str
    value: float
    interval: tuple[float, float]
    num_train_images: int
    num_eval_images: int
    settings: dict[str, Any] = field(default_factory=dict)
    draws: list[float] = field(default_factory=list)

    def place(self) -> str:
        """Returns what a later score must share with this one to replace it: all but the numbers."""
        return json.dumps([self.method, self.features, self.target, self.metric, self.settings], sort_keys=True)


def read_scores(path: Path, model: Mapping[str, Any], data: Mapping[str, Any]) -> list[Score]:
    """Reads the scores of earlier calls.

    Args:
        path: An `evaluation.json`, which may be missing.
        model: Values that identify the model; all except its `name` must agree.
        data: Values that identify the images; all except their `dataset_name` must agree.

    Returns:
        The scores, none where there is no file.

    Raises:
        ValueError: If the file is damaged, or of another model or of other images; names what differs.
    """
    stored = read_json(path)
    if stored is None:
        return []
    try:
        theirs = {"model": dict(stored["model"]), "data": dict(stored["data"])}
        scores = [Score(**{**row, "interval": tuple(row["interval"])}) for row in stored["scores"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete it, or choose another --output_dir.") from error
    mine: dict[str, dict[str, Any]] = {"model": dict(model), "data": dict(data)}
    for part, name in (("model", "name"), ("data", "dataset_name")):
        mine[part].pop(name, None)
        theirs[part].pop(name, None)
    differing = differences(json.loads(json.dumps(mine)), theirs)
    if differing:
        raise ValueError(
            f"{path} holds scores of another model or of other images: {'; '.join(differing)}. Choose another "
            "--output_dir, or delete the file."
        )
    return scores


def merged(old: Sequence[Score], new: Sequence[Score]) -> list[Score]:
    """Merges old scores with new ones, which take their places or follow them.

    Args:
        old: Of earlier calls.
        new: Of this one.

    Returns:
        One score for each method, row, target, metric and settings.
    """
    scores = {score.place(): score for score in (*old, *new)}
    return list(scores.values())


def write_scores(
    path: Path,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    scores: Sequence[Score],
    versions: Mapping[str, str],
) -> None:
    """Writes `evaluation.json`, so that a reader never sees half of it.

    Args:
        path: The file; its folder must exist.
        model: See `read_scores`.
        data: See `read_scores`.
        scores: All of them.
        versions: Of the packages.
    """
    rows = [dataclasses.asdict(score) for score in scores]
    values = {"model": dict(model), "data": dict(data), "versions": dict(versions), "scores": rows}
    write_json_atomically(path, values)


# -- text ------------------------------------------------------------------------------------------------------------


def render_scores(scores: Sequence[Score]) -> str:
    """Renders scores as text for the screen.

    Args:
        scores: At least one.

    Returns:
        For each method and target a heading with its settings and a line for each row; of several draws of labels
        also the lowest and the highest.
    """
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(_group(score), []).append(score)
    lines = []
    for group in groups.values():
        settings = [f"{name} {on_one_line(value)}" for name, value in group[0].settings.items() if value is not None]
        target = on_one_line(group[0].target)  # a column's name, which the data set's author has chosen
        images = f"{group[0].num_train_images} training images"
        lines.append(f"{group[0].method} of {target}, {group[0].metric} ({', '.join([images, *settings])})")
        rows = []
        for score in sorted(group, key=lambda score: ROWS.index(score.features)):
            low, high = (_number(score, value) for value in score.interval)
            rows.append([score.features, _number(score, score.value), f"95 %: {low} to {high}", _spread(score)])
        lines += text_table(rows, align="<><", indent="    ")
        lines.append("")
    return "\n".join(lines[:-1])


def _group(score: Score) -> str:
    return json.dumps([score.method, score.target, score.metric, score.settings], sort_keys=True)


def _number(score: Score, value: float) -> str:
    metric = METRICS[score.metric]
    return f"{metric.factor * value:.{metric.digits}f}"


def _spread(score: Score) -> str:
    if not score.draws:
        return ""
    low, high = (_number(score, value) for value in (min(score.draws), max(score.draws)))
    return f"{len(score.draws)} draws: {low} to {high}"


# -- the card --------------------------------------------------------------------------------------------------------


def update_card(card: Path, model_name: str, dataset: Mapping[str, str], scores: Sequence[Score]) -> None:
    """Adds the model's own scores to the `model-index` of a card; everything else in it stays.

    A metric with the same name, on the same task, data and split, is replaced, unless its entry names a source.

    Args:
        card: A README.md.
        model_name: Of the model, where the card names none yet.
        dataset: Its `name`, `type` (the Hub id, or again the name) and `split`.
        scores: Those of other rows than `MODEL` are left out.

    Raises:
        ValueError: If the metadata of the card cannot be read.
    """
    try:
        metadata = metadata_load(card) or {}
    except Exception as error:  # yaml's own, whose package is not ours to name
        raise ValueError(f"{card}: the metadata in front cannot be read: {' '.join(str(error).split())}") from error
    results = [_eval_result(score, dataset) for score in scores if score.features == MODEL]
    if not results:
        return
    index = metadata.setdefault("model-index", [])
    if not index:
        index.append({"name": model_name, "results": []})
    entries = index[0].setdefault("results", [])
    for new in eval_results_to_model_index(model_name, results)[0]["results"]:
        _add_entry(entries, new)

    def write(partial: Path) -> None:
        shutil.copyfile(card, partial)
        metadata_save(partial, metadata)

    write_atomically(card, write)


def _eval_result(score: Score, dataset: Mapping[str, str]) -> EvalResult:
    settings = ", ".join(f"{name} {value}" for name, value in score.settings.items() if value is not None)
    # the Hub keeps all scores of one task and one data set together, so that the method is in the metric's name
    task = METHODS[score.method].task
    return EvalResult(
        task_type=task,
        task_name=task.replace("-", " ").capitalize(),
        dataset_type=dataset["type"],
        dataset_name=dataset["name"],
        dataset_split=dataset["split"],
        metric_type=METRICS[score.metric].hub_name,
        metric_name=f"{score.metric}, {score.method} of {score.target}{' with ' if settings else ''}{settings}",
        metric_value=round(score.value, _HUB_DIGITS),
        metric_args={"interval_95": [round(end, _HUB_DIGITS) for end in score.interval], **score.settings},
    )


def _add_entry(entries: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Puts the metrics of a result into a card's results: in the place of the same ones, else beside them."""
    for entry in entries:
        # entries with a source are other people's measurements and stay
        if _subject(entry) == _subject(new) and "source" not in entry:
            metrics = entry.setdefault("metrics", [])
            for metric in new["metrics"]:
                names = [(old.get("type"), old.get("name")) for old in metrics]
                if (metric["type"], metric["name"]) in names:
                    metrics[names.index((metric["type"], metric["name"]))] = metric
                else:
                    metrics.append(metric)
            return
    entries.append(new)


def _subject(entry: Mapping[str, Any]) -> list[Any]:
    """Returns the subject of a result: the kind of task, and the data."""
    data = entry.get("dataset") or {}
    return [
        (entry.get("task") or {}).get("type"),
        *(data.get(part) for part in ("type", "config", "split", "revision")),
    ]
