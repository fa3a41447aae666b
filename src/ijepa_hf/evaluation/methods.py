"""Describes each evaluation method in one record: what it needs, its metric, how it runs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ijepa_hf import __version__
from ijepa_hf.data.labelled import LabelledSplits, choose_labelled
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.targets import TargetSplits
from ijepa_hf.evaluation.arguments import EvaluationArguments
from ijepa_hf.evaluation.backbones import Backbone, raw_patches, raw_pixels
from ijepa_hf.evaluation.feature_store import store_features
from ijepa_hf.evaluation.features import iterate_features
from ijepa_hf.evaluation.intervals import bootstrap_interval, mean_interval
from ijepa_hf.evaluation.probes.attentive import predict_attentive
from ijepa_hf.evaluation.probes.dense import box_iou, confusion_counts, predict_boxes, predict_segmentation
from ijepa_hf.evaluation.probes.knn import predict_knn
from ijepa_hf.evaluation.probes.linear import predict_linear, predict_linear_sgd
from ijepa_hf.evaluation.probes.ridge import numbers_as_classes, predict_ridge
from ijepa_hf.evaluation.results import RAW_PIXELS, UNTRAINED, Score
from ijepa_hf.model.vision_models import ImageSettings

FEATURES_FOLDER = "features"

_IGNORED = 255  # class of pixels that do not count, in maps of classes

_PACKAGES = ("torch", "transformers", "numpy", "pillow", "scikit-learn")


class _Subject(NamedTuple):
    """The model that is evaluated: its commit on the Hub, what its images are like, and which weights it has."""

    commit: str | None
    settings: ImageSettings
    fingerprint: dict[str, Any]


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


def _versions() -> dict[str, str]:
    return {**{name: version(name) for name in _PACKAGES}, "ijepa-hf": __version__}


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


_METHODS: dict[str, Callable[[_Features, str], list[Score]]] = {
    **dict.fromkeys(("knn", "linear", "linear_sgd", "attentive"), _classify),
    "low_shot": _classify_with_few_labels,
    "regression": _regress,
    "segmentation": _segment,
    "localization": _localize,
}


def _pooled_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    return {"pooling": arguments.pooling, "layers": arguments.layers}


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
