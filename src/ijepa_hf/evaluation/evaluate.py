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
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from accelerate.utils import parse_flag_from_env
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import AutoConfig

from ijepa_hf import __version__
from ijepa_hf.data.labelled import LabelledSplits, choose_labelled, load_labelled_splits
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.targets import SegmentationMaps, TargetSplits, load_target_splits
from ijepa_hf.evaluation.attentive_probe import predict_attentive
from ijepa_hf.evaluation.backbones import Backbone, load_backbone, raw_patches, raw_pixels, untrained_twin
from ijepa_hf.evaluation.dense_probe import box_iou, confusion_counts, predict_boxes, predict_segmentation
from ijepa_hf.evaluation.evaluate_arguments import OF_CLASSES, OF_PATCHES, OF_POOLED, EvaluationArguments
from ijepa_hf.evaluation.feature_store import fingerprint_images, fingerprint_model, store_features
from ijepa_hf.evaluation.features import iterate_features
from ijepa_hf.evaluation.intervals import RESAMPLES, bootstrap_interval, mean_interval
from ijepa_hf.evaluation.knn import predict_knn
from ijepa_hf.evaluation.linear_probe import predict_linear, predict_linear_sgd
from ijepa_hf.evaluation.regression_probe import numbers_as_classes, predict_ridge
from ijepa_hf.evaluation.results import (
    EVALUATION_FILE,
    MODEL,
    RAW_PIXELS,
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
from ijepa_hf.finetuning.folder import ARGUMENTS_FILE, differing_arguments
from ijepa_hf.model.vision_models import ImageSettings, check_model_name, commit_of, read_image_settings

FEATURES_FOLDER = "features"
FINETUNE_FOLDER = "finetune"

logger = logging.getLogger(__name__)

_LEAST_LABELS = 5  # of a linear probe: four to fit and one to choose on
_ENOUGH_NUMBERS = 10  # that differ: one draw in 10^9 holds one of them alone
_IGNORED = 255  # class of pixels that do not count, in maps of classes
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "scikit-learn")


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
        card = Path(arguments.model) / "README.md"
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


class _Subject(NamedTuple):
    """The model that is evaluated: its commit on the Hub, what its images are like, and which weights it has."""

    commit: str | None
    settings: ImageSettings
    fingerprint: dict[str, Any]


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


def _device(arguments: EvaluationArguments) -> torch.device:
    if arguments.device is not None:
        try:
            device = torch.device(arguments.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={arguments.device!r} cannot be used; write cpu or cuda: {reason}") from error
        return device
    has_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.device("cuda" if has_gpu else "cpu")


def _check_model(backbone: Backbone, arguments: EvaluationArguments) -> None:
    if any(name in OF_POOLED for name in arguments.method):
        backbone.check_pooling(arguments.pooling)
    for name in arguments.method:
        if name in OF_PATCHES:
            backbone.check_patches(name)


def _versions() -> dict[str, str]:
    return {**{name: version(name) for name in _PACKAGES}, "ijepa-hf": __version__}


# -- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """The images with the targets of each kind that a method asks for, and the fingerprints of both splits."""

    train: ImageRows
    test: ImageRows
    fingerprints: dict[str, str]
    classes: LabelledSplits | None
    numbers: TargetSplits | None
    masks: "_Masks | None"
    boxes: TargetSplits | None

    def describe(self, arguments: EvaluationArguments, settings: ImageSettings) -> dict[str, Any]:
        """What says which images they are, and what becomes of them."""
        return {
            "dataset_name": arguments.dataset_name,
            "train_split_name": arguments.train_split_name,
            "eval_split_name": arguments.eval_split_name,
            "num_train_images": len(self.train),
            "num_eval_images": len(self.test),
            "train_sha256": self.fingerprints["train"],
            "test_sha256": self.fingerprints["test"],
            "transform": _transform(settings),
        }


def _transform(settings: ImageSettings) -> dict[str, Any]:
    shape, mean, std = settings
    return {"size": shape, "mean": mean, "std": std, "resize": "whole image, bilinear, antialias"}


class _Masks(NamedTuple):
    """Maps of classes, resized as the images are: uint8 `[n, height, width]`, 255 where a pixel does not count."""

    train: np.ndarray
    test: np.ndarray
    num_classes: int


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


def _to_classes(column: str, train_y: np.ndarray, test_y: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        return numbers_as_classes(train_y, test_y)
    except ValueError as error:
        raise ValueError(
            f"{column!r} cannot be cut into bins with as many training images each: it has {len(np.unique(train_y))} "
            f"different values in {len(train_y)} images. Leave it out of --target_columns, or use more images."
        ) from error


def _draws(classes: LabelledSplits, arguments: EvaluationArguments) -> list[np.ndarray]:
    samples, fraction = arguments.few_labels()
    return [
        choose_labelled(classes.train_labels, samples, fraction, arguments.seed + number, names=classes.names)
        for number in range(arguments.num_label_draws)
    ]


# -- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Features:
    """The features of one row, given from the disk and extracted where they are not there yet.

    Args:
        row: One of `ROWS`.
        backbone: Of the row; of raw pixels the model's, whose grid says what a patch is.
        arguments: What was asked for.
        subject: The model.
        data: The images.
    """

    row: str
    backbone: Backbone
    arguments: EvaluationArguments
    subject: _Subject
    data: _Data

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Float32 `[n, D]` of training and of test images, in memory."""
        pooling = self.arguments.pooling
        if self.row == RAW_PIXELS:
            train, test = self._both("pixels", raw_pixels, {})
        else:
            encode = functools.partial(self.backbone.pooled, pooling=pooling)
            train, test = self._both("pooled", encode, {"pooling": pooling, **self._of_network()})
        return np.array(train), np.array(test)

    def patches(self) -> tuple[np.ndarray, np.ndarray]:
        """Float32 `[n, rows, columns, D]` of training and of test images, mapped from the disk."""
        grid = self.backbone.grid_size
        if self.row == RAW_PIXELS:
            return self._both("patches of pixels", lambda pixels: raw_patches(pixels, grid), {"grid": grid})
        return self._both("patches", lambda pixels: self.backbone.tokens(pixels).patches, self._of_network())

    def _of_network(self) -> dict[str, Any]:
        seed = {"seed": self.arguments.seed} if self.row == UNTRAINED else {}
        return {"layers": self.arguments.layers, "model": self.subject.fingerprint, **seed}

    def _both(
        self, kind: str, encode: Callable[[Tensor], Tensor], depends_on: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        settings, device = self.subject.settings, _device(self.arguments)
        trial = encode(torch.zeros(1, len(settings.mean), *settings.shape, device=device))
        found = []
        for split, images in (("train", self.data.train), ("test", self.data.test)):
            identity = {
                "features": self.row,
                "kind": kind,
                **depends_on,
                "images": {"sha256": self.data.fingerprints[split], "column": images.images.column},
                "transform": _transform(settings),
                "dtype": "float32",
                "device": device.type,
                "versions": _versions(),
            }
            compute = functools.partial(
                iterate_features, images, encode=encode, settings=settings,
                batch_size=self.arguments.batch_size, device=device, description=f"{self.row}, {split}",
            )  # fmt: skip
            root = self.arguments.folder() / FEATURES_FOLDER
            found.append(store_features(root, identity, len(images), tuple(trial.shape[1:]), compute).whole())
        return found[0], found[1]


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


def _classify(features: _Features, method: str) -> list[Score]:
    arguments, classes = features.arguments, features.data.classes
    assert classes is not None
    train_y = classes.train_labels
    if method == "attentive":
        train_patches, test_patches = (x.reshape(len(x), -1, x.shape[-1]) for x in features.patches())
        device = _device(arguments)
        predicted = predict_attentive(train_patches, train_y, test_patches, seed=arguments.seed, device=device)
        settings: dict[str, Any] = {"layers": arguments.layers}
    else:
        train_x, test_x = features.pooled()
        settings = _pooled_settings(arguments)
        if method == "knn":
            settings = {"k": arguments.k, "temperature": arguments.temperature, **settings}
            predicted = predict_knn(train_x, train_y, test_x, k=arguments.k, temperature=arguments.temperature)
        elif method == "linear":
            predicted = predict_linear(train_x, train_y, test_x, seed=arguments.seed)
        else:
            predicted = predict_linear_sgd(train_x, train_y, test_x, seed=arguments.seed, device=_device(arguments))
    return [_top_1(features, method, classes.label_column, settings, predicted, classes.test_labels)]


def _classify_with_few_labels(features: _Features, method: str) -> list[Score]:
    """The mean over draws of labelled images; the interval is of that mean, over test images."""
    arguments, classes = features.arguments, features.data.classes
    assert classes is not None
    train_x, test_x = features.pooled()
    right, draws = [], _draws(classes, arguments)
    for chosen in draws:
        predicted = predict_linear(train_x[chosen], classes.train_labels[chosen], test_x, seed=arguments.seed)
        right.append(predicted == classes.test_labels)
    samples, fraction = arguments.few_labels()
    return [
        Score(
            method=method,
            features=features.row,
            target=classes.label_column,
            metric="top-1",
            value=float(np.mean(right)),
            interval=mean_interval(np.mean(right, axis=0), arguments.seed),
            num_train_images=len(draws[0]),
            num_eval_images=len(test_x),
            settings={
                "samples_per_class": samples, "label_fraction": fraction, "num_label_draws": arguments.num_label_draws,
                **_pooled_settings(arguments), "seed": arguments.seed,
            },
            draws=[float(np.mean(of_draw)) for of_draw in right],
        )
    ]  # fmt: skip


def _regress(features: _Features, method: str) -> list[Score]:
    """R2 of a ridge regression, and as in the paper's table the top-1 of the numbers as classes.

    A column of few different whole numbers is its own classes (test numbers are rounded to whole ones); others are cut
    into bins with as many training images each.
    """
    arguments, numbers = features.arguments, features.data.numbers
    assert numbers is not None
    train_x, test_x = features.pooled()
    settings = _pooled_settings(arguments)
    quantities = predict_ridge(train_x, numbers.train_targets, test_x, seed=arguments.seed)
    scores = []
    for place, column in enumerate(arguments.numbers()):
        train_y, test_y = numbers.train_targets[:, place], numbers.test_targets[:, place]
        scores.append(_r2(features, method, column, settings, quantities[:, place], test_y))
        train_classes, test_classes, classes = _to_classes(column, train_y, test_y)
        predicted = predict_linear(train_x, train_classes, test_x, seed=arguments.seed)
        scores.append(_top_1(features, method, column, {"classes": classes, **settings}, predicted, test_classes))
    return scores


def _segment(features: _Features, method: str) -> list[Score]:
    from ijepa_hf.evaluation.metrics import MeanIoU, new_metric

    arguments, masks = features.arguments, features.data.masks
    assert masks is not None
    train_patches, test_patches = features.patches()
    predicted = predict_segmentation(
        train_patches,
        masks.train,
        test_patches,
        num_classes=masks.num_classes,
        mask_shape=features.subject.settings.shape,
        seed=arguments.seed,
        ignore_index=_IGNORED,
        device=_device(arguments),
    )
    counted = masks.test != _IGNORED
    with new_metric(MeanIoU) as metric:
        value = metric.compute(predictions=predicted[counted], references=masks.test[counted])["mIoU"]
    intersections, unions = confusion_counts(predicted, masks.test, masks.num_classes, _IGNORED)

    def of_draws(weights: np.ndarray) -> np.ndarray:
        shared, either = weights @ intersections, weights @ unions
        shares = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
        return shares.sum(axis=1) / (either > 0).sum(axis=1)

    interval = bootstrap_interval(of_draws, len(masks.test), arguments.seed)
    settings = {"layers": arguments.layers}
    column = arguments.mask_column_name
    return [_score(features, method, column, "mIoU", value, interval, settings, len(masks.test))]


def _localize(features: _Features, method: str) -> list[Score]:
    from ijepa_hf.evaluation.metrics import BoxIoU, new_metric

    arguments, boxes = features.arguments, features.data.boxes
    assert boxes is not None
    train_patches, test_patches = features.patches()
    predicted = predict_boxes(train_patches, boxes.train_targets, test_patches, seed=arguments.seed)
    with new_metric(BoxIoU) as metric:
        value = metric.compute(predictions=predicted, references=boxes.test_targets)["IoU"]
    interval = mean_interval(box_iou(predicted, boxes.test_targets), arguments.seed)
    settings = {"layers": arguments.layers}
    column = arguments.boxes_column_name
    return [_score(features, method, column, "IoU", value, interval, settings, len(predicted))]


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
        differing = differing_arguments(folder, dataclasses.asdict(told))
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
_METHODS: dict[str, Callable[[_Features, str], list[Score]]] = {
    **dict.fromkeys(("knn", "linear", "linear_sgd", "attentive"), _classify),
    "low_shot": _classify_with_few_labels,
    "regression": _regress,
    "segmentation": _segment,
    "localization": _localize,
}


def _pooled_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    return {"pooling": arguments.pooling, "layers": arguments.layers}


# -- scores ----------------------------------------------------------------------------------------------------------


def _top_1(
    features: _Features, method: str, target: str, settings: dict[str, Any], predicted: np.ndarray, truth: np.ndarray
) -> Score:
    from ijepa_hf.evaluation.metrics import Top1, new_metric  # takes seconds

    with new_metric(Top1) as metric:
        value = metric.compute(predictions=predicted, references=truth)["top-1"]
    interval = mean_interval(predicted == truth, features.arguments.seed)
    return _score(features, method, target, "top-1", value, interval, settings, len(truth))


def _r2(
    features: _Features, method: str, target: str, settings: dict[str, Any], predicted: np.ndarray, truth: np.ndarray
) -> Score:
    from ijepa_hf.evaluation.metrics import R2, new_metric

    with new_metric(R2) as metric:
        value = metric.compute(predictions=predicted, references=truth)["R2"]
    centred = truth - truth.mean()

    def of_draws(weights: np.ndarray) -> np.ndarray:
        variation = weights @ centred**2 - (weights @ centred) ** 2 / len(truth)
        return 1 - weights @ (predicted - truth) ** 2 / variation

    interval = bootstrap_interval(of_draws, len(truth), features.arguments.seed)
    return _score(features, method, target, "R2", value, interval, settings, len(truth))


def _score(
    features: _Features,
    method: str,
    target: str,
    metric: str,
    value: float,
    interval: tuple[float, float],
    settings: dict[str, Any],
    num_eval_images: int,
) -> Score:
    number = len(features.data.train)
    settings = {**settings, "seed": features.arguments.seed}
    return Score(method, features.row, target, metric, value, interval, number, num_eval_images, settings)
