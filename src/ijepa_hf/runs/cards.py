"""Renders all model cards: of a run, of a fine-tuned classifier, of a converted file.

Each card is one template in this folder (`run_card.md`, `classifier_card.md`, `converted_card.md`); `encoder_usage.md`
is the part that the cards of encoders share. Everything on the card of a run comes from its `report.json` and its
configuration, so that a card can be rendered again from committed numbers and compared.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml, metadata_load
from huggingface_hub.constants import REPOCARD_NAME

from ijepa_hf.escaping import code_span, markdown_text, on_one_line, python_string
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.runs.folder import CONVERSION_FILE

NEIGHBOURS = 20  # of kNN scores: of the papers' two usual numbers, 20 and 200, the one that fits small sets
STARTING_WEIGHTS = "the weights it started from"  # name of that row among the scores

_TAGS = ["ijepa", "jepa", "self-supervised-learning", "vision"]
_ADDRESS_MARK = "  # `ijepa-hf push` writes the repository's name here"
# The name of each metric in machine-readable scores, by its key in `report.json`, which is also the Hub's `task_id`.
_METRICS = {
    "knn": f"top-1, {NEIGHBOURS} nearest neighbours of frozen mean-pooled features",
    "linear": "top-1, logistic regression on frozen mean-pooled features",
}
_LOAD_ENCODER = (
    "from transformers import AutoImageProcessor, AutoModel",
    "processor, model = AutoImageProcessor.from_pretrained({0}), AutoModel.from_pretrained({0})",
    'features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(1)',
)
_LOAD_CLASSIFIER = (
    "from transformers import pipeline",
    'classify = pipeline("image-classification", model={0})',
    'classify("picture.png")',
)


# -- the cards -------------------------------------------------------------------------------------------------------


def render_run_card(report: Mapping[str, Any], config: IJepaConfig) -> str:
    """Renders the model card of a finished run.

    Args:
        report: As in `report.json`.
        config: The model's.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    arguments, scores = report["arguments"], report["scores"]
    reference = arguments.get("hub_model_id") or arguments["output_dir"]
    return _render(
        "run_card.md",
        _run_metadata(report, reference),
        reference,
        config=config,
        report=report,
        run=arguments,
        hours=_hours(report),
        scores="\n".join(_markdown_table(scores)),
        verdict=" ".join(verdict(scores)) if scores else "",
        neighbours=NEIGHBOURS,
    )


def render_classifier_card(result: Mapping[str, Any]) -> str:
    """Renders the model card of a fine-tuned classifier.

    Args:
        result: As in `finetune.json`.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    arguments = result["arguments"]
    dataset = Path(arguments["dataset_name"]).name
    base = None if Path(arguments["model"]).exists() else arguments["model"]  # a folder cannot be linked to
    score = EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=arguments["eval_split_name"],
        metric_type="accuracy",
        metric_value=result["accuracy"],
    )
    data = ModelCardData(
        license=result["license"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ijepa", "vision"],
        base_model=base,
        model_name=Path(arguments["output_dir"]).name,
        eval_results=[score],
    )
    return _render(
        "classifier_card.md",
        data,
        arguments["output_dir"],
        result=result,
        run=arguments,
        base=base or Path(arguments["model"]).name,
        dataset=dataset,
        summary=classifier_summary(result),
        license_note=license_note(result),
    )


def render_converted_card(config: IJepaConfig, report: Mapping[str, Any], name: str, license: str) -> str:
    """Renders the model card of a converted checkpoint.

    Args:
        config: The model's.
        report: As in `conversion.json`.
        name: A folder or a repository's name.
        license: Of the published weights, as the Hub writes it, such as "cc-by-nc-4.0".

    Returns:
        Markdown with the Hub's metadata in front.
    """
    data = ModelCardData(
        license=license, library_name="transformers", pipeline_tag="image-feature-extraction", tags=_TAGS
    )
    return _render("converted_card.md", data, name, config=config, report=report, record=CONVERSION_FILE)


def _render(template: str, data: ModelCardData, reference: str, **values: Any) -> str:
    """Fills a template; what follows is what every card has."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ijepa_hf.runs", "."))
    first, *rest = _LOAD_CLASSIFIER if template == "classifier_card.md" else _LOAD_ENCODER
    return environment.get_template(template).render(
        card_data=data.to_yaml(),
        name=Path(reference).name,
        address=address_line(reference),
        shell_address=address_line(reference, shell=True),
        loading="\n".join([first, "", address_line(reference), *(line.format("model_id") for line in rest)]),
        arguments="\n".join(_argument_lines(values["run"])) if "run" in values else "",
        license=data.license,
        words=markdown_text,
        code=code_span,
        **values,
    )


def _run_metadata(report: Mapping[str, Any], reference: str) -> ModelCardData:
    arguments, dataset, base = report["arguments"], report.get("hub_dataset"), report.get("hub_base_model")
    results = None
    if report["scores"]:
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image classification on frozen features",
                dataset_type=dataset or Path(arguments["dataset_name"]).name,
                dataset_name=Path(arguments["dataset_name"]).name,
                dataset_split=arguments["eval_split_name"],
                metric_type="accuracy",
                metric_name=text,
                metric_value=_rounded(report["scores"][0][key]),
            )
            for key, text in _METRICS.items()
        ]
    return ModelCardData(
        license=arguments.get("license"),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=_TAGS,
        datasets=None if dataset is None else [dataset],
        base_model=base,
        model_name=None if results is None else Path(reference).name,
        eval_results=results,
    )


def _hours(report: Mapping[str, Any]) -> str | None:
    seconds = (report["log"] or {}).get("seconds")
    if seconds is None:  # the log was lost, or an earlier version wrote it
        return None
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def _markdown_table(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    if not scores:
        return []
    header, *rows = score_rows(scores)
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _argument_lines(arguments: Mapping[str, Any]) -> list[str]:
    return [
        f"{on_one_line(name)}: {on_one_line(value)}" for name, value in sorted(arguments.items()) if value is not None
    ]


# -- what cards and the text on the screen share ---------------------------------------------------------------------


def loading_lines(reference: str, *, classifier: bool = False) -> list[str]:
    """Returns three lines of Python that load a model and use it.

    Args:
        reference: A folder or a repository's name.
        classifier: The model is a classifier instead of an encoder.

    Returns:
        The lines.
    """
    lines = _LOAD_CLASSIFIER if classifier else _LOAD_ENCODER
    return [line.format(python_string(reference)) for line in lines]


def address_line(reference: str, *, shell: bool = False) -> str:
    """Returns the line of code on a card that holds the model's address; `with_address` replaces it.

    Args:
        reference: A folder or a repository's name.
        shell: Write shell code instead of Python.

    Returns:
        A line that sets `model_id` (`MODEL` in a shell), with a comment that marks it.
    """
    return _assignment(reference, shell) + _ADDRESS_MARK


def with_address(card: str, repo_id: str, revision: str | None) -> str:
    """Replaces the lines of `address_line` on a card by the model's address on the Hub; changes no other line.

    Args:
        card: Markdown.
        repo_id: The repository, with its owner.
        revision: The branch; `None` is `main`.

    Returns:
        Markdown.
    """
    branch = "" if revision in (None, "main") else f"  # its branch {on_one_line(revision)}"
    lines = [
        _assignment(repo_id, line.startswith("MODEL=")) + branch if line.endswith(_ADDRESS_MARK) else line
        for line in card.split("\n")
    ]
    return "\n".join(lines)


def _assignment(reference: str, shell: bool) -> str:
    return f"MODEL={shlex.quote(on_one_line(reference))}" if shell else f"model_id = {python_string(reference)}"


def read_license(card: Path | None) -> str | None:
    """Reads the licence that a model card names.

    Args:
        card: A README.md; `None` if the model has none.

    Returns:
        Such as "cc-by-nc-4.0"; `None` if the card names none.

    Raises:
        ValueError: If the metadata of the card cannot be read.
    """
    if card is None:
        return None
    try:
        named = (metadata_load(card) or {}).get("license")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{card}: the metadata in front cannot be read, so its licence is not known: {reason}"
        ) from None
    return named if isinstance(named, str) else None


def license_note(result: Mapping[str, Any]) -> str:
    """Says that the licence of the weights that a fine-tuning started from is not known.

    Args:
        result: As in `finetune.json`.

    Returns:
        The end of a sentence; empty where the licence is known.
    """
    if result.get("license_is_known", True):
        return ""
    model = code_span(result["arguments"]["model"])
    return f"that of {model} could not be read; look it up, and set `license` at the top of the card ({REPOCARD_NAME})"


def classifier_summary(result: Mapping[str, Any]) -> str:
    """Says the accuracy of a fine-tuned classifier in one phrase.

    Args:
        result: As in `finetune.json`.

    Returns:
        The accuracy, its interval, the numbers of images and classes, and what the training started from.
    """
    low, high = (100 * value for value in result["accuracy_interval"])
    start = "new weights" if result["arguments"]["from_scratch"] else "pretrained weights"
    head = ", the encoder frozen" if result["arguments"]["freeze_encoder"] else ""
    return (
        f"top-1 {100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f}, 95 % interval) of "
        f"{result['num_eval_images']} held-out images, from {start}{head}, with {result['num_train_images']} labelled "
        f"images of {len(result['classes'])} classes"
    )


# -- scores ----------------------------------------------------------------------------------------------------------


def score_rows(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the scores as the cells of a table.

    Args:
        scores: As in `report.json`.

    Returns:
        A header, and a row for each score: name of the features, kNN and linear in percent, RankMe.
    """
    rows = [["features", f"kNN-{NEIGHBOURS}", "linear", "RankMe"]]
    for score in scores:
        knn, linear, rankme = 100 * score["knn"], 100 * score["linear"], score["rankme"]
        rows.append([score["features"], f"{knn:.1f}", f"{linear:.1f}", f"{rankme:.1f}"])
    return rows


def verdict(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compares the trained encoder with its baselines in words.

    Args:
        scores: As in `report.json`: the trained encoder first, raw pixels last.

    Returns:
        A line for each metric.
    """
    trained, pixels = scores[0], scores[-1]
    before = [row for row in scores if row["features"] == STARTING_WEIGHTS]
    untrained = [row for row in scores[1:-1] if row["features"] != STARTING_WEIGHTS]
    lines = []
    for metric, name in (("knn", f"kNN-{NEIGHBOURS}"), ("linear", "linear")):
        line = f"{name}: trained {_compared(trained[metric], max(row[metric] for row in untrained))} the better "
        line += "untrained network."
        if before:
            line += f" It {_compared(trained[metric], before[0][metric])} {STARTING_WEIGHTS}."
        if pixels[metric] > trained[metric]:
            line += f" Raw pixels win, by {100 * (pixels[metric] - trained[metric]):.1f}."
        lines.append(line)
    return lines


def _compared(mine: float, other: float) -> str:
    if mine == other:
        return "is equal to"
    return f"is {100 * abs(mine - other):.1f} points {'above' if mine > other else 'below'}"


def render_eval_results(report: Mapping[str, Any]) -> dict[str, str]:
    """Writes the scores as YAML that the Hub reads from `.eval_results/*.yaml`.

    Args:
        report: As in `report.json`.

    Returns:
        YAML by file name; empty where there are no scores, or the data set is not on the Hub.
    """
    dataset = report.get("hub_dataset")
    if not report["scores"] or dataset is None:
        return {}
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=f"{key}_{report['arguments']['eval_split_name']}",
            value=_rounded(report["scores"][0][key]),
            notes=f"{text}; {report['num_eval_images']} images",
        )
        for key, text in _METRICS.items()
    ]
    return {f"{Path(dataset).name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)}


def _rounded(share: float) -> float:
    return round(share, 4)
