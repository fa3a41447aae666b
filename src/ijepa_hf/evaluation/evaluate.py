"""Scores an encoder by one or more methods, beside its untrained twin and raw pixels.

Features of the model, of the same network untrained, and raw pixels are scored alike, by the records of `methods`.
Every score has the 95 % interval of `intervals`, with the same draws of test images in every row, also in those of
`finetune`.

    output_dir/
      evaluation.json       all scores, also those of earlier calls on the same model and images
      features/<hash>/      see `feature_store`
      finetune/<row>-.../   the classifiers of `--method finetune`: from the model, and from new weights
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub.constants import REPOCARD_NAME
from threadpoolctl import threadpool_limits

from ijepa_hf.data.labelled import load_labelled_splits
from ijepa_hf.data.targets import SegmentationMaps, load_target_splits
from ijepa_hf.evaluation.arguments import EvaluationArguments
from ijepa_hf.evaluation.backbones import Backbone
from ijepa_hf.evaluation.methods import METHODS, METRICS, Inputs, Method, Prediction, Targets, predict
from ijepa_hf.evaluation.probes.dense import IGNORED
from ijepa_hf.evaluation.results import (
    EVALUATION_FILE,
    MODEL,
    ROWS,
    UNTRAINED,
    Score,
    merged,
    read_scores,
    render_scores,
    update_card,
    write_scores,
)
from ijepa_hf.evaluation.rows import (
    Images,
    RowFeatures,
    Subject,
    choose_device,
    load_row,
    open_subject,
    package_versions,
)
from ijepa_hf.files import read_json
from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.classifier import load_classifier, parameter_groups
from ijepa_hf.finetuning.finetune import finetune
from ijepa_hf.finetuning.folder import check_same_run, holds_a_run
from ijepa_hf.model.vision_models import ImageSettings
from ijepa_hf.runs.folder import FINETUNING_FILE

FINETUNE_FOLDER = "finetune"
_LABELLED_FLAGS = (
    "dataset_name", "dataset_config_name", "train_split_name", "eval_split_name", "image_column_name",
    "label_column_name", "max_train_samples", "max_eval_samples",
)  # fmt: skip


def evaluate_model(arguments: EvaluationArguments) -> str:
    """Scores a model by the methods that were asked for, and writes the folder that the module's docstring lists.

    Args:
        arguments: See `EvaluationArguments`.

    Returns:
        The text to print: a table of the scores of this call.

    Raises:
        FileNotFoundError: If the data set or a local model does not exist.
        OSError: If the model cannot be loaded.
        ValueError: If a value is bad, the data or the model are not what a method needs, `output_dir` holds scores of
            another model or of other images, or features are NaN or infinite.
    """
    arguments.check()
    if arguments.num_cpu_threads is not None:
        torch.set_num_threads(arguments.num_cpu_threads)
    methods = {name: METHODS[name] for name in dict.fromkeys(arguments.method)}
    with threadpool_limits(arguments.num_cpu_threads):
        subject = open_subject(arguments)
        images, targets = _load_data(methods, arguments, subject.settings)
        backbone = load_row(MODEL, subject, arguments)
        for name, method in methods.items():
            _check(name, method, targets[method.targets], backbone, arguments)
        if "finetune" in methods:
            _check_finetunings(arguments, subject, targets["classes"])
        path = arguments.folder() / EVALUATION_FILE
        model, data = {"name": arguments.model, **subject.fingerprint}, _describe(images, arguments, subject)
        read_scores(path, model, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores: list[Score] = []
        for new in _scores(methods, arguments, subject, images, targets, backbone):
            scores += new
            write_scores(path, model, data, merged(read_scores(path, model, data), new), package_versions())
    if arguments.update_card:
        name = str(arguments.dataset_name)
        on_hub = {"name": Path(name).name, "type": name if not Path(name).exists() else Path(name).name}
        card = Path(arguments.model) / REPOCARD_NAME
        update_card(card, Path(arguments.model).resolve().name, {**on_hub, "split": arguments.eval_split_name}, scores)
    return "\n".join(
        [
            f"{arguments.model} on {arguments.dataset_name}: {len(images.train)} training and {len(images.test)} test "
            "images",
            "",
            render_scores(scores),
            "",
            "The intervals cover other test images, not other seeds or other training images.",
            f"scores: {path}",
        ]
    )


def _describe(images: Images, arguments: EvaluationArguments, subject: Subject) -> dict[str, Any]:
    return {
        "dataset_name": arguments.dataset_name,
        "train_split_name": arguments.train_split_name,
        "eval_split_name": arguments.eval_split_name,
        "num_train_images": len(images.train),
        "num_eval_images": len(images.test),
        "train_sha256": images.train_sha256,
        "test_sha256": images.test_sha256,
        "transform": subject.transform(),
    }


# -- the data --------------------------------------------------------------------------------------------------------


def _load_data(
    methods: Mapping[str, Method], arguments: EvaluationArguments, settings: ImageSettings
) -> tuple[Images, dict[str, Targets]]:
    """Loads the images, and the targets of each kind that a method needs."""
    splits = (arguments.train_split_name, arguments.eval_split_name)
    loaded: list[Any] = []
    targets: dict[str, Targets] = {}
    for kind in dict.fromkeys(method.targets for method in methods.values()):
        if kind == "classes":
            found = load_labelled_splits(arguments.labelled, len(settings.mean))
            columns, train, test = [found.label_column], found.train_labels, found.test_labels
            targets[kind] = Targets(columns, train, test, found.names, splits)
            loaded.append(found)
            continue
        if kind == "numbers":
            columns = arguments.target_columns
        else:
            columns = [arguments.mask_column_name if kind == "maps" else arguments.boxes_column_name]
        reader: Any = {"numbers": "number", "maps": "mask", "boxes": "boxes"}[kind]
        parts = load_target_splits(arguments.labelled, len(settings.mean), columns, reader)
        train, test = parts.train_targets, parts.test_targets
        if kind == "maps":
            train, test = (_resized_maps(maps, settings.shape) for maps in (train, test))
            _check_maps(columns[0], train, test, splits)
        targets[kind] = Targets(columns, train, test, splits=splits)
        loaded.append(parts)
    return Images.of(loaded[0]), targets


def _resized_maps(maps: SegmentationMaps, shape: tuple[int, int]) -> np.ndarray:
    resized = np.empty((len(maps), *shape), np.uint8)
    for index in range(len(maps)):
        pixels = maps[index]
        if pixels.max(initial=0) > IGNORED:
            raise ValueError(
                f"{maps.part.name_row(index)}: {maps.column!r} has the class {pixels.max()}; classes are 0 to "
                f"{IGNORED - 1}, and {IGNORED} is for pixels that do not count."
            )
        picture = PIL.Image.fromarray(pixels.astype(np.uint8))
        resized[index] = np.asarray(picture.resize(shape[::-1], PIL.Image.Resampling.NEAREST))
    return resized


def _check_maps(column: str, train: np.ndarray, test: np.ndarray, splits: tuple[str, str]) -> None:
    classes, others = (np.setdiff1d(part, [IGNORED]) for part in (train, test))
    unknown = np.setdiff1d(others, np.arange(classes.max(initial=0) + 1))
    if len(unknown):
        raise ValueError(
            f"the split {splits[1]!r} has pixels of class {unknown[0]} in {column!r}, above {classes.max(initial=0)}, "
            "the highest of the training split."
        )
    if len(classes) < 2:
        raise ValueError(
            f"train_split_name={splits[0]!r} has pixels of one class only in {column!r}; a segmentation needs at "
            "least two."
        )


def _check(name: str, method: Method, targets: Targets, backbone: Backbone, arguments: EvaluationArguments) -> None:
    """Refuses a model or targets that a method cannot use, before features are extracted."""
    if method.features == "pooled":
        backbone.check_pooling(arguments.pooling)
    if method.features == "patches":
        backbone.check_patches(name)
    if method.check is not None:
        method.check(targets, _settings(method, arguments))


# -- scores ----------------------------------------------------------------------------------------------------------


def _settings(method: Method, arguments: EvaluationArguments) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in (*method.settings, "seed")}


def _scores(
    methods: Mapping[str, Method],
    arguments: EvaluationArguments,
    subject: Subject,
    images: Images,
    targets: Mapping[str, Targets],
    backbone: Backbone,
) -> Iterator[list[Score]]:
    """Scores row by row and method by method, as they are made; fine-tunings, which take longest, come last."""
    frozen = {name: method for name, method in methods.items() if method.run is not None}
    device = choose_device(arguments.device)
    for row in ROWS if frozen else ():
        if row == UNTRAINED:
            backbone = load_row(UNTRAINED, subject, arguments)
        features = RowFeatures(row, backbone, arguments, subject, images)
        for name, method in frozen.items():
            assert method.features is not None
            settings = _settings(method, arguments)
            given = Inputs(*features.of(method.features), targets[method.targets], settings, device)
            yield [_score(name, row, each, settings, len(images.train)) for each in predict(name, given)]
    if "finetune" in methods:
        for row in (MODEL, UNTRAINED):
            wanted = _finetuning(row, arguments, subject, targets["classes"].columns[0])
            predicted, num_train = _finetuned(wanted, targets["classes"])
            yield [_score("finetune", row, predicted, _settings(methods["finetune"], arguments), num_train)]


def _score(method: str, row: str, prediction: Prediction, settings: Mapping[str, Any], num_train_images: int) -> Score:
    metric, predicted, truth = METRICS[prediction.metric], prediction.predicted, prediction.truth
    has_draws = prediction.num_train_images is not None
    return Score(
        method=method,
        features=row,
        target=prediction.target,
        metric=prediction.metric,
        value=metric.value(predicted, truth),
        interval=metric.interval(predicted, truth, settings["seed"]),
        num_train_images=prediction.num_train_images or num_train_images,
        num_eval_images=len(truth),
        settings={**prediction.settings, **settings},
        draws=[metric.value(draw, truth) for draw in predicted] if has_draws else [],
    )


# -- fine-tuning -----------------------------------------------------------------------------------------------------


def _finetuning(row: str, arguments: EvaluationArguments, subject: Subject, label_column: str) -> FinetuningArguments:
    """Makes the arguments of a fine-tuning; each label column, length and seed has a folder of its own."""
    label = re.sub(r"[^\w.-]+", "-", label_column)
    name = f"{row}-{label}-{arguments.num_train_epochs:.10g}-epochs-seed-{arguments.seed}"
    return FinetuningArguments(
        model=arguments.model,
        model_revision=subject.commit,
        output_dir=str(arguments.folder() / FINETUNE_FOLDER / name),
        from_scratch=row == UNTRAINED,
        num_train_epochs=arguments.num_train_epochs,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in _LABELLED_FLAGS},
    )


def _check_finetunings(arguments: EvaluationArguments, subject: Subject, classes: Targets) -> None:
    """Refuses a model that cannot be fine-tuned, and folders that hold anything else than this fine-tuning."""
    column = classes.columns[0]
    both = [_finetuning(row, arguments, subject, column) for row in (MODEL, UNTRAINED)]
    try:
        model = load_classifier(both[0], classes.names)
        parameter_groups(model, both[0].learning_rate, both[0].layer_decay, both[0].weight_decay)
    except ValueError as error:
        raise ValueError(
            f"method='finetune' is ijepa-hf finetune with its defaults, and model={arguments.model!r} does not fit: "
            f"{error} Use that command with its own flags, and leave finetune out of --method."
        ) from error
    for wanted in both:
        folder = Path(str(wanted.output_dir))
        if holds_a_run(folder):
            check_same_run(folder, wanted, "Delete the folder, or choose another --output_dir.")


def _finetuned(wanted: FinetuningArguments, classes: Targets) -> tuple[Prediction, int]:
    """Fine-tunes, or resumes; returns 1 (right) or 0 for each test image, and the number of training images."""
    folder = Path(str(wanted.output_dir))
    finetune(dataclasses.replace(wanted, resume_from_checkpoint="latest" if holds_a_run(folder) else None))
    result = read_json(folder / FINETUNING_FILE)
    assert result is not None
    right = ~np.isin(np.arange(result["num_eval_images"]), result["wrong_images"])
    return Prediction(classes.columns[0], "top-1", right, np.ones_like(right)), result["num_train_images"]
