"""How good an encoder is, by any of several methods, beside the two rows that keep a score honest.

Features of the model, of the same network untrained, and raw pixels are judged alike. A method sees training images,
their labels and test images, and returns what it predicts; test labels are used once, to count. Every score has the
95 % interval of `intervals`, with the same draws of test images in every row, also in those of `finetune`.

    output_dir/
      evaluation.json       all scores, also those of earlier calls on the same model and images
      features/<hash>/      see `feature_store`
      finetune/<row>-.../   the classifiers of `--method finetune`: from the model, and from new weights
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub.constants import REPOCARD_NAME
from threadpoolctl import threadpool_limits
from transformers import AutoConfig

from ijepa_hf.data.labelled import LabelledSplits, load_labelled_splits
from ijepa_hf.data.targets import SegmentationMaps, TargetSplits, load_target_splits
from ijepa_hf.evaluation.arguments import OF_CLASSES, OF_PATCHES, OF_POOLED, EvaluationArguments
from ijepa_hf.evaluation.backbones import Backbone, load_backbone, untrained_twin
from ijepa_hf.evaluation.feature_store import fingerprint_images, fingerprint_model
from ijepa_hf.evaluation.intervals import RESAMPLES, bootstrap_interval, mean_interval
from ijepa_hf.evaluation.methods import (
    _IGNORED,
    _METHODS,
    _Data,
    _device,
    _draws,
    _Features,
    _Masks,
    _Subject,
    _to_classes,
    _versions,
)
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
from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.classifier import load_classifier, parameter_groups
from ijepa_hf.finetuning.finetune import finetune
from ijepa_hf.finetuning.folder import ARGUMENTS_FILE, differences_from
from ijepa_hf.model.vision_models import ImageSettings, check_model_name, commit_of, read_image_settings

FINETUNE_FOLDER = "finetune"

logger = logging.getLogger(__name__)

_LEAST_LABELS = 5  # of a linear probe: four to fit and one to choose on
_ENOUGH_NUMBERS = 10  # that differ: one draw in 10^9 holds one of them alone


def evaluate_model(arguments: EvaluationArguments) -> str:
    """Scores a model by the methods that were asked for, and writes the folder that the module's docstring lists.

    Args:
        arguments: See `EvaluationArguments`.

    Returns:
        What is to be printed: a table of the scores of this call.

    Raises:
        FileNotFoundError: If the data set or a local model does not exist.
        OSError: If the model cannot be loaded.
        ValueError: If a value is bad, the data or the model are not what a method needs, `output_dir` holds scores of
            another model or of other images, or features are no numbers.
    """
    arguments.check()
    if arguments.num_cpu_threads is not None:
        torch.set_num_threads(arguments.num_cpu_threads)
    with threadpool_limits(arguments.num_cpu_threads):
        subject = _open_model(arguments)
        data = _load_data(arguments, subject.settings)
        backbone = _load_row(MODEL, subject, arguments)
        _check_model(backbone, arguments)
        _check_labels(data, arguments)
        if "finetune" in arguments.method:
            _check_finetunings(arguments, subject, data)
        output_dir = arguments.folder()
        path = output_dir / EVALUATION_FILE
        model = {"name": arguments.model, **subject.fingerprint}
        images = data.describe(arguments, subject.settings)
        read_scores(path, model, images)
        output_dir.mkdir(parents=True, exist_ok=True)
        scores: list[Score] = []
        for new in _scores(arguments, subject, data, backbone):
            scores += new
            write_scores(path, model, images, merged(read_scores(path, model, images), new), _versions())
    if arguments.update_card:
        name = str(arguments.dataset_name)
        on_hub = {"name": Path(name).name, "type": name if not Path(name).exists() else Path(name).name}
        card = Path(arguments.model) / REPOCARD_NAME
        update_card(card, Path(arguments.model).resolve().name, {**on_hub, "split": arguments.eval_split_name}, scores)
    return _render(arguments, images, scores, path)


def _render(arguments: EvaluationArguments, images: Mapping[str, Any], scores: Sequence[Score], path: Path) -> str:
    return "\n".join(
        [
            f"{arguments.model} on {arguments.dataset_name}: {images['num_train_images']} training and "
            f"{images['num_eval_images']} test images",
            "",
            render_scores(scores),
            "",
            "The interval is that of the test images alone, not of other seeds or other training images.",
            f"scores: {path}",
        ]
    )


# -- the model -------------------------------------------------------------------------------------------------------


def _open_model(arguments: EvaluationArguments) -> _Subject:
    check_model_name(arguments.model, arguments.model_revision)
    if Path(arguments.model).is_dir() and not (Path(arguments.model) / "config.json").is_file():
        raise FileNotFoundError(f"model={arguments.model!r}: the folder holds no config.json; is the run finished?")
    commit = commit_of(arguments.model, arguments.model_revision)
    config = AutoConfig.from_pretrained(arguments.model, revision=commit, trust_remote_code=False)
    settings = read_image_settings(arguments.model, config, revision=commit)
    return _Subject(commit, settings, fingerprint_model(arguments.model, commit))


def _load_row(row: str, subject: _Subject, arguments: EvaluationArguments) -> Backbone:
    options: dict[str, Any] = {
        "layers": arguments.layers, "revision": subject.commit, "device": _device(arguments),
    }  # fmt: skip
    if row == MODEL:
        return load_backbone(arguments.model, subject.settings.shape, **options)
    return untrained_twin(arguments.model, subject.settings.shape, arguments.seed, **options)


def _check_model(backbone: Backbone, arguments: EvaluationArguments) -> None:
    if any(name in OF_POOLED for name in arguments.method):
        backbone.check_pooling(arguments.pooling)
    for name in arguments.method:
        if name in OF_PATCHES:
            backbone.check_patches(name)


# -- the data --------------------------------------------------------------------------------------------------------


def _load_data(arguments: EvaluationArguments, settings: ImageSettings) -> _Data:
    methods, num_channels = set(arguments.method), len(settings.mean)

    def targets(method: str, columns: Sequence[str], kind: Any) -> TargetSplits | None:
        return load_target_splits(arguments.labelled, num_channels, columns, kind) if method in methods else None

    classes = load_labelled_splits(arguments.labelled, num_channels) if methods & set(OF_CLASSES) else None
    numbers = targets("regression", arguments.numbers(), "number")
    maps = targets("segmentation", [arguments.mask_column_name], "mask")
    boxes = targets("localization", [arguments.boxes_column_name], "boxes")
    splits = next(part for part in (classes, numbers, maps, boxes) if part is not None)
    fingerprints = {"train": fingerprint_images(splits.train), "test": fingerprint_images(splits.test)}
    masks = None if maps is None else _read_masks(maps, settings.shape, arguments)
    return _Data(splits.train, splits.test, fingerprints, classes, numbers, masks, boxes)


def _read_masks(maps: TargetSplits, shape: tuple[int, int], arguments: EvaluationArguments) -> _Masks:
    train, test = (_resized_maps(part, shape) for part in (maps.train_targets, maps.test_targets))
    classes, others = (np.setdiff1d(part, [_IGNORED]) for part in (train, test))
    unknown = np.setdiff1d(others, np.arange(classes.max(initial=0) + 1))
    if len(unknown):
        raise ValueError(
            f"the split {arguments.eval_split_name!r} has pixels of class {unknown[0]} in "
            f"{arguments.mask_column_name!r}, above {classes.max(initial=0)}, the highest of the training split."
        )
    if len(classes) < 2:
        raise ValueError(
            f"train_split_name={arguments.train_split_name!r} has pixels of one class only in "
            f"{arguments.mask_column_name!r}; a segmentation needs at least two."
        )
    return _Masks(train, test, int(classes.max()) + 1)


def _resized_maps(maps: SegmentationMaps, shape: tuple[int, int]) -> np.ndarray:
    resized = np.empty((len(maps), *shape), np.uint8)
    for index in range(len(maps)):
        pixels = maps[index]
        if pixels.max(initial=0) > _IGNORED:
            raise ValueError(
                f"{maps.part.name_row(index)}: {maps.column!r} has the class {pixels.max()}; classes are 0 to "
                f"{_IGNORED - 1}, and {_IGNORED} is for pixels that do not count."
            )
        picture = PIL.Image.fromarray(pixels.astype(np.uint8))
        resized[index] = np.asarray(picture.resize(shape[::-1], PIL.Image.Resampling.NEAREST))
    return resized


def _check_labels(data: _Data, arguments: EvaluationArguments) -> None:
    """What is wrong with the numbers of images is said before features are extracted."""
    number = len(data.train)
    if "knn" in arguments.method and arguments.k > number:
        raise ValueError(f"k={arguments.k}, but there are {number} training images; use --k {number} or less.")
    if number < _LEAST_LABELS and set(arguments.method) - {"knn", "finetune"}:
        raise ValueError(
            f"there are {number} training images; a probe needs at least {_LEAST_LABELS}: use more "
            "(--max_train_samples), or --method knn."
        )
    if data.numbers is not None:
        _check_numbers(data.numbers, arguments)
    if "low_shot" in arguments.method:
        assert data.classes is not None
        for draw in _draws(data.classes, arguments):
            if len(draw) < _LEAST_LABELS:
                raise ValueError(
                    f"low_shot would be fitted to {len(draw)} labelled images, and a probe needs at least "
                    f"{_LEAST_LABELS}: use a larger --samples_per_class or --label_fraction."
                )


def _check_numbers(numbers: TargetSplits, arguments: EvaluationArguments) -> None:
    """R2 is a share of how much the test numbers vary, so they must, in every draw of the interval."""
    for place, column in enumerate(arguments.numbers()):
        train_y, test_y = numbers.train_targets[:, place], numbers.test_targets[:, place]
        for split, values in ((arguments.train_split_name, train_y), (arguments.eval_split_name, test_y)):
            if np.ptp(values) == 0:
                raise ValueError(
                    f"{column!r} is {values[0]:g} in each of the {len(values)} images of the split {split!r}: there "
                    f"is nothing to predict. Leave it out of --target_columns, or use more images ({_ENOUGH_NUMBERS} "
                    "whose numbers differ are enough)."
                )
        _to_classes(column, train_y, test_y)

        def of_draws(weights: np.ndarray, test_y: np.ndarray = test_y) -> np.ndarray:
            low, high = (np.where(weights > 0, test_y, end) for end in (np.inf, -np.inf))
            spread = high.max(axis=1) - low.min(axis=1)
            return np.where(spread > 0, spread, np.nan)

        try:
            bootstrap_interval(of_draws, len(test_y), arguments.seed)
        except ValueError as error:
            raise ValueError(
                f"R2 of {column!r} can have no interval: among {RESAMPLES} draws of the {len(test_y)} test images are "
                f"such with equal numbers only. Use at least {_ENOUGH_NUMBERS} test images (--max_eval_samples) whose "
                "numbers differ."
            ) from error


# -- features --------------------------------------------------------------------------------------------------------


# -- methods ---------------------------------------------------------------------------------------------------------


def _scores(
    arguments: EvaluationArguments, subject: _Subject, data: _Data, backbone: Backbone
) -> Iterator[list[Score]]:
    """Scores row by row and method by method, as they are made."""
    methods = [name for name in dict.fromkeys(arguments.method) if name != "finetune"]
    for row in ROWS if methods else ():
        if row == UNTRAINED:
            backbone = _load_row(UNTRAINED, subject, arguments)
        features = _Features(row, backbone, arguments, subject, data)
        for method in methods:
            yield _METHODS[method](features, method)
    if "finetune" in arguments.method:
        for row in (MODEL, UNTRAINED):
            yield [_finetuned(row, arguments, subject, data)]


def _finetuning(
    row: str, arguments: EvaluationArguments, subject: _Subject, classes: LabelledSplits
) -> FinetuningArguments:
    """What a fine-tuning is told. Another label, length or seed is another folder, so that none is in the way."""
    label = re.sub(r"[^\w.-]+", "-", classes.label_column)
    name = f"{row}-{label}-{arguments.num_train_epochs:.10g}-epochs-seed-{arguments.seed}"
    return FinetuningArguments(
        model=arguments.model,
        model_revision=subject.commit,
        output_dir=str(arguments.folder() / FINETUNE_FOLDER / name),
        from_scratch=row == UNTRAINED,
        num_train_epochs=arguments.num_train_epochs,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in _DATA_FLAGS},
    )


def _check_finetunings(arguments: EvaluationArguments, subject: _Subject, data: _Data) -> None:
    """Whether the model can be fine-tuned, and both folders are free or hold this very fine-tuning."""
    assert data.classes is not None
    told = _finetuning(MODEL, arguments, subject, data.classes)
    try:
        model = load_classifier(told, data.classes.names)
        parameter_groups(model, told.learning_rate, told.layer_decay, told.weight_decay)
    except ValueError as error:
        raise ValueError(
            f"method='finetune' is ijepa-hf finetune with its defaults, and model={arguments.model!r} does not fit: "
            f"{error} Use that command with its own flags, and leave finetune out of --method."
        ) from error
    for row in (MODEL, UNTRAINED):
        told = _finetuning(row, arguments, subject, data.classes)
        folder = Path(str(told.output_dir))
        if not folder.exists() or not any(folder.iterdir()):
            continue
        if not (folder / ARGUMENTS_FILE).is_file():
            raise ValueError(
                f"{folder} is not empty and holds no fine-tuning of ijepa-hf; move it away, or choose another "
                "--output_dir."
            )
        differing = differences_from(folder, dataclasses.asdict(told))
        if differing:
            raise ValueError(
                f"{folder} holds another fine-tuning: {'; '.join(differing)}. Delete the folder, or choose another "
                "--output_dir."
            )


def _finetuned(row: str, arguments: EvaluationArguments, subject: _Subject, data: _Data) -> Score:
    assert data.classes is not None
    told = _finetuning(row, arguments, subject, data.classes)
    folder = Path(str(told.output_dir))
    is_begun = (folder / ARGUMENTS_FILE).is_file()
    finetune(dataclasses.replace(told, resume_from_checkpoint="latest" if is_begun else None))
    result = json.loads((folder / "finetune.json").read_text("utf-8"))
    right = ~np.isin(np.arange(result["num_eval_images"]), result["wrong_images"])
    return Score(
        method="finetune",
        features=row,
        target=data.classes.label_column,
        metric="top-1",
        value=result["accuracy"],
        interval=mean_interval(right, arguments.seed),
        num_train_images=result["num_train_images"],
        num_eval_images=result["num_eval_images"],
        settings={"num_train_epochs": arguments.num_train_epochs, "seed": arguments.seed},
    )


_DATA_FLAGS = (
    "dataset_name", "dataset_config_name", "train_split_name", "eval_split_name", "image_column_name",
    "label_column_name", "max_train_samples", "max_eval_samples",
)  # fmt: skip


# -- scores ----------------------------------------------------------------------------------------------------------
