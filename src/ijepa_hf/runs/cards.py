"""The model card of a run: what it says, and the machine-readable scores beside it.

Everything on a card comes from the run's `report.json` and its configuration, so that a card can be rendered again
from committed numbers and compared. Scores appear only where the report has them.
"""

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    metadata_load,
)
from huggingface_hub.constants import REPOCARD_NAME

from ijepa_hf.escaping import code_span, markdown_text, on_one_line, python_string
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.runs.folder import CONVERSION_FILE

TAGS = ["ijepa", "jepa", "self-supervised-learning", "vision"]
_ADDRESS_MARK = "  # `ijepa-hf push` writes the repository's name here"
STARTING_WEIGHTS = "the weights it started from"  # name of that row among the scores

NEIGHBOURS = 20  # of kNN scores: of the papers' two usual numbers, 20 and 200, the one that fits small sets

# What is said of a score where a machine reads it; `task_id` of `.eval_results` is the key.
_METRICS = {
    "knn": f"top-1, {NEIGHBOURS} nearest neighbours of frozen mean-pooled features",
    "linear": "top-1, logistic regression on frozen mean-pooled features",
}


def render_card(report: Mapping[str, Any], config: IJepaConfig) -> str:
    """The model card of a finished run.

    Args:
        report: As in `report.json`.
        config: The model's.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    arguments = report["arguments"]
    reference = arguments.get("hub_model_id") or arguments["output_dir"]
    scores = report["scores"]
    template = resources.files("ijepa_hf.runs") / "run_card.md"
    with resources.as_file(template) as path:
        card = ModelCard.from_template(
            _metadata(report, reference),
            template_path=str(path),
            name=Path(reference).name,
            config=config,
            report=report,
            run=arguments,
            hours=_hours(report),
            address=address_line(reference),
            shell_address=address_line(reference, shell=True),
            scores="\n".join(_markdown_table(scores)),
            verdict=" ".join(verdict(scores)) if scores else "",
            neighbours=NEIGHBOURS,
            arguments="\n".join(argument_lines(arguments)),
            words=markdown_text,
            code=code_span,
        )
    return str(card)


def render_eval_results(report: Mapping[str, Any]) -> dict[str, str]:
    """The scores in the form that the Hub reads from `.eval_results/*.yaml`.

    Args:
        report: As in `report.json`.

    Returns:
        File names and their YAML; none where there are no scores, or the data are not on the Hub.
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


def read_license(card: Path | None) -> str | None:
    """The licence that a model card names, so that whatever is made of the weights can carry it on.

    Args:
        card: A README.md, or `None` where there is none.

    Returns:
        Such as "cc-by-nc-4.0"; `None` where none is named.

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
    """Says in words who wins, so that nobody has to hope.

    Args:
        scores: As in `report.json`: the trained encoder first, raw pixels last.

    Returns:
        A sentence or more for each metric.
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


def loading_lines(reference: str) -> list[str]:
    """Three lines of Python that load the encoder and use it.

    Args:
        reference: A folder or a repository's name.

    Returns:
        Indented lines.
    """
    name = python_string(reference)
    return [
        "    from transformers import AutoImageProcessor, AutoModel",
        f"    processor, model = AutoImageProcessor.from_pretrained({name}), AutoModel.from_pretrained({name})",
        '    features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(1)',
    ]


def address_line(reference: str, *, shell: bool = False) -> str:
    """Returns the line of a block of code on a card that says where the model is; `with_address` finds it again.

    Args:
        reference: A folder or a repository's name.
        shell: The block is one of commands, and not of Python.

    Returns:
        A line that sets `MODEL` or `model_id`, with a comment that marks it.
    """
    return _assignment(reference, shell) + _ADDRESS_MARK


def with_address(card: str, repo_id: str, revision: str | None) -> str:
    """Returns a card that says where in the Hub the model is; changes no lines but those of `address_line`.

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
    return f"MODEL={shell_word(reference)}" if shell else f"model_id = {python_string(reference)}"


def argument_lines(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as lines of a block of code, which none of them can end.

    Args:
        arguments: Values by name.

    Returns:
        A line for each that is set, by name.
    """
    return [
        f"{on_one_line(name)}: {on_one_line(value)}" for name, value in sorted(arguments.items()) if value is not None
    ]


def shell_word(text: str) -> str:
    """Quotes a name as one word of a command.

    Args:
        text: The name.

    Returns:
        It, between quotes where a shell would not read it as one word.
    """
    return shlex.quote(on_one_line(text))


def _compared(mine: float, other: float) -> str:
    if mine == other:
        return "is equal to"
    return f"is {100 * abs(mine - other):.1f} points {'above' if mine > other else 'below'}"


def _metadata(report: Mapping[str, Any], reference: str) -> ModelCardData:
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
        tags=TAGS,
        datasets=None if dataset is None else [dataset],
        base_model=base,
        model_name=None if results is None else Path(reference).name,
        eval_results=results,
    )


def _rounded(share: float) -> float:
    return round(share, 4)


def _hours(report: Mapping[str, Any]) -> str | None:
    seconds = (report["log"] or {}).get("seconds")
    if seconds is None:  # a log that was lost, or one of before this was kept
        return None
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def _markdown_table(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    if not scores:
        return []
    header, *rows = score_rows(scores)
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _summary(result: Mapping[str, Any]) -> str:
    low, high = (100 * value for value in result["accuracy_interval"])
    start = "new weights" if result["arguments"]["from_scratch"] else "pretrained weights"
    head = ", the encoder frozen" if result["arguments"]["freeze_encoder"] else ""
    return (
        f"top-1 {100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f}, 95 % interval) of "
        f"{result['num_eval_images']} held-out images, from {start}{head}, with {result['num_train_images']} labelled "
        f"images of {len(result['classes'])} classes"
    )


def _unknown_license_lines(result: Mapping[str, Any]) -> list[str]:
    if result.get("license_is_known", True):
        return []
    model = code_span(result["arguments"]["model"])
    return [
        f"that of {model} could not be read; look it up, and set `license` at the top of the card ({REPOCARD_NAME})"
    ]


def _loading_lines(name: str) -> list[str]:
    return [
        "from transformers import pipeline",
        f'classify = pipeline("image-classification", model={python_string(name)})',
        'classify("picture.png")',
    ]


def render_finetuning_card(result: Mapping[str, Any]) -> str:
    """Renders the model card of a fine-tuned model.

    Args:
        result: As in `finetune.json`.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    arguments = result["arguments"]
    dataset = Path(arguments["dataset_name"]).name
    base = None if Path(arguments["model"]).exists() else arguments["model"]  # a folder is nothing to link to
    data = ModelCardData(
        license=result["license"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ijepa", "vision"],
        base_model=base,
        model_name=Path(arguments["output_dir"]).name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=arguments["eval_split_name"],
                metric_type="accuracy",
                metric_value=result["accuracy"],
            )
        ],
    )
    start = (
        "A network with new weights" if arguments["from_scratch"] else code_span(base or Path(arguments["model"]).name)
    )
    if not arguments["from_scratch"] and result.get("model_commit") is not None:
        start += f" (commit `{result['model_commit']}`)"
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {markdown_text(Path(arguments['output_dir']).name)}",
        "",
        f"{start}, fine-tuned on {code_span(dataset)} with `ijepa-hf finetune`.",
        "",
        f"{_summary(result)[0].upper()}{_summary(result)[1:]}. It is the last epoch's; nothing was chosen on the "
        "held-out images. The interval is that of the images alone, not of other seeds.",
        "",
        *(f"Licence: {line}.\n" for line in _unknown_license_lines(result)),
        "```python",
        "from transformers import pipeline",
        "",
        address_line(arguments["output_dir"]),
        'classify = pipeline("image-classification", model=model_id)',
        'classify("picture.png")',
        "```",
        "",
        "![Training loss and held-out accuracy](figures/curves.png)",
        "",
        "```",
        *argument_lines(arguments),
        "```",
        "",
    ]
    return str(ModelCard("\n".join(lines)))


def render_converted_card(config: IJepaConfig, report: Mapping[str, Any], name: str, license: str) -> str:
    """The model card of a converted checkpoint, as Markdown with the Hub's metadata in front."""
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=TAGS,
    )
    height, width = config.image_shape
    text = f"""---
{data.to_yaml()}
---

# I-JEPA, converted from {code_span(report["source"]["name"])}

The weights of a checkpoint published with [I-JEPA](https://arxiv.org/abs/2301.08243), every bit compared: the target
encoder at the root, both encoders and the predictor in `pretraining/`. `{CONVERSION_FILE}` has the SHA-256 of the
file and lists each tensor.

- {config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads
- images of {height}x{width} pixels, patches of {config.patch_shape[0]}x{config.patch_shape[1]}
- ImageNet mean and standard deviation

The weights keep the licence of the original, CC BY-NC 4.0.

## Features of an image

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

{address_line(name)}
processor = AutoImageProcessor.from_pretrained(model_id)
model = AutoModel.from_pretrained(model_id)
with torch.no_grad():
    patches = model(**processor(Image.open("image.jpg").convert("RGB"), return_tensors="pt")).last_hidden_state
features = patches.mean(dim=1)  # [1, {config.hidden_size}], as evaluated in the paper
```

## Fine-tune a classifier

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(model_id, num_labels=10)  # only the last layer is new
```

## Go on pretraining, on your own images

```bash
pip install ijepa-hf
{address_line(name, shell=True)}
ijepa-hf pretrain adapt --model_name_or_path "$MODEL" --dataset_name path/to/images
```
"""
    return str(ModelCard(text))
