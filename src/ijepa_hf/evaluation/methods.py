"""Describes each evaluation method in one record: what it needs, its settings, how it predicts; and each metric.

A method sees features of training images, their targets and features of test images, and returns what it predicts of
the test images. Test targets go beside its predictions into a metric, and nowhere else. To add a method, add a record
to `METHODS`; what it needs of the command line is a field of `evaluation.arguments.EvaluationFlags`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import r2_score

from ijepa_hf.data.labelled import choose_labelled
from ijepa_hf.evaluation.intervals import RESAMPLES, bootstrap_interval, mean_interval
from ijepa_hf.evaluation.probes.attentive import predict_attentive
from ijepa_hf.evaluation.probes.checks import share_correct
from ijepa_hf.evaluation.probes.dense import (
    IGNORED,
    box_iou,
    confusion_counts,
    mean_iou,
    predict_boxes,
    predict_segmentation,
)
from ijepa_hf.evaluation.probes.knn import predict_knn
from ijepa_hf.evaluation.probes.linear import predict_linear, predict_linear_sgd
from ijepa_hf.evaluation.probes.ridge import numbers_as_classes, predict_ridge

_LEAST_LABELS = 5  # of a linear probe: four to fit and one to choose on
_ENOUGH_NUMBERS = 10  # that differ: one draw in 10^9 holds one of them alone


# -- metrics ----------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """Describes a measure of predictions; higher is better.

    Args:
        value: Computes the score from predictions and truth, as a method returns them.
        interval: Computes the score's 95 % interval over test images from predictions, truth and a seed.
        hub_name: The metric's type on the Hub.
        factor: Factor from the score to the unit that is shown, such as 100 for percent.
        digits: Digits after the decimal point, in that unit.
    """

    value: Callable[[np.ndarray, np.ndarray], float]
    interval: Callable[[np.ndarray, np.ndarray, int], tuple[float, float]]
    hub_name: str
    factor: int
    digits: int


def _r2_interval(predicted: np.ndarray, truth: np.ndarray, seed: int) -> tuple[float, float]:
    centred = truth - truth.mean()

    def of_draws(weights: np.ndarray) -> np.ndarray:
        variation = weights @ centred**2 - (weights @ centred) ** 2 / len(truth)
        return 1 - weights @ (predicted - truth) ** 2 / variation

    return bootstrap_interval(of_draws, len(truth), seed)


def _pixel_counts(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    classes = np.setdiff1d(truth, [IGNORED])
    return confusion_counts(predicted, truth, int(max(predicted.max(), classes.max(initial=0))) + 1)


def _mean_iou_interval(predicted: np.ndarray, truth: np.ndarray, seed: int) -> tuple[float, float]:
    intersections, unions = _pixel_counts(predicted, truth)

    def of_draws(weights: np.ndarray) -> np.ndarray:
        shared, either = weights @ intersections, weights @ unions
        shares = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
        return shares.sum(axis=1) / (either > 0).sum(axis=1)

    return bootstrap_interval(of_draws, len(truth), seed)


METRICS = {
    "top-1": Metric(
        share_correct,
        # of several draws of labels, [draws, m], the interval is of their mean
        lambda predicted, truth, seed: mean_interval(np.atleast_2d(predicted == truth).mean(axis=0), seed),
        hub_name="accuracy",
        factor=100,
        digits=1,
    ),
    "R2": Metric(lambda predicted, truth: float(r2_score(truth, predicted)), _r2_interval, "r2", 1, 3),
    "mIoU": Metric(
        lambda predicted, truth: mean_iou(*_pixel_counts(predicted, truth)), _mean_iou_interval, "mean_iou", 100, 1
    ),
    "IoU": Metric(
        lambda predicted, truth: float(box_iou(predicted, truth).mean()),
        lambda predicted, truth, seed: mean_interval(box_iou(predicted, truth), seed),
        "iou",
        100,
        1,
    ),
}


# -- what a method is given, and what it gives ------------------------------------------------------------------------


class Targets(NamedTuple):
    """Holds the values to predict for n training and m test images.

    Args:
        columns: Names of the columns that the targets are from.
        train: Classes int64 `[n]`, numbers float64 `[n, len(columns)]`, maps of classes uint8 `[n, height, width]`
            (255 where a pixel does not count), or boxes float64 `[n, 4]`.
        test: The same of the test images.
        names: Of the classes, where the targets are classes.
        splits: Names of both splits, for errors.
    """

    columns: Sequence[str]
    train: np.ndarray
    test: np.ndarray
    names: Sequence[str] = ()
    splits: tuple[str, str] = ("train", "test")


class Inputs(NamedTuple):
    """Holds the inputs of a method.

    Args:
        train: Features of n training images: float32 `[n, D]`, or of their patches `[n, rows, columns, D]`.
        test: Features of m test images.
        targets: What is to be predicted.
        settings: The flags that the method's record names, and `seed`.
        device: Where torch trains.
    """

    train: np.ndarray
    test: np.ndarray
    targets: Targets
    settings: Mapping[str, Any]
    device: torch.device | str = "cpu"

    def labelled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what most probes take first: training features, training targets and test features."""
        return self.train, self.targets.train, self.test


@dataclass(frozen=True)
class Prediction:
    """Holds a method's predictions of one target of the test images.

    Args:
        target: The column.
        metric: One of `METRICS`.
        predicted: As the metric takes it; of several draws of labels `[draws, m]`.
        truth: The same of the test images.
        settings: What the method has decided, beside what it was given.
        num_train_images: Images that it was fitted to, where they are not all of them.
    """

    target: str
    metric: str
    predicted: np.ndarray
    truth: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_train_images: int | None = None


# -- methods ----------------------------------------------------------------------------------------------------------


def _knn(given: Inputs) -> np.ndarray:
    settings = given.settings
    return predict_knn(*given.labelled(), k=settings["k"], temperature=settings["temperature"])


def _linear(given: Inputs) -> np.ndarray:
    return predict_linear(*given.labelled(), seed=given.settings["seed"])


def _linear_sgd(given: Inputs) -> np.ndarray:
    return predict_linear_sgd(*given.labelled(), seed=given.settings["seed"], device=given.device)


def _attentive(given: Inputs) -> np.ndarray:
    train, test = (patches.reshape(len(patches), -1, patches.shape[-1]) for patches in (given.train, given.test))
    return predict_attentive(train, given.targets.train, test, seed=given.settings["seed"], device=given.device)


def _segmentation(given: Inputs) -> np.ndarray:
    train, masks, test = given.labelled()
    num_classes = int(masks[masks != IGNORED].max()) + 1
    return predict_segmentation(
        train, masks, test, num_classes=num_classes, mask_shape=masks.shape[1:], seed=given.settings["seed"],
        device=given.device,
    )  # fmt: skip


def _boxes(given: Inputs) -> np.ndarray:
    return predict_boxes(*given.labelled(), seed=given.settings["seed"])


def _of_one_target(predict: Callable[[Inputs], np.ndarray], metric: str) -> Callable[[Inputs], list[Prediction]]:
    def run(given: Inputs) -> list[Prediction]:
        targets = given.targets
        return [Prediction(targets.columns[0], metric, predict(given), targets.test)]

    return run


def _few_labels(targets: Targets, settings: Mapping[str, Any]) -> list[np.ndarray]:
    """Draws the labelled images of each draw of `low_shot`."""
    few = (settings["samples_per_class"], settings["label_fraction"])
    return [
        choose_labelled(targets.train, *few, settings["seed"] + number, names=targets.names)
        for number in range(settings["num_label_draws"])
    ]


def _low_shot(given: Inputs) -> list[Prediction]:
    train, labels, test = given.labelled()
    draws = _few_labels(given.targets, given.settings)
    predicted = [predict_linear(train[rows], labels[rows], test, seed=given.settings["seed"]) for rows in draws]
    targets = given.targets
    return [
        Prediction(
            targets.columns[0], "top-1", np.stack(predicted), targets.test, num_train_images=len(draws[0])
        )
    ]  # fmt: skip


def _regression(given: Inputs) -> list[Prediction]:
    """Predicts numbers by ridge regression, and as in the paper's table the same numbers as classes."""
    targets, seed = given.targets, given.settings["seed"]
    quantities = predict_ridge(*given.labelled(), seed=seed)
    found = []
    for place, column in enumerate(targets.columns):
        train_y, test_y = targets.train[:, place], targets.test[:, place]
        found.append(Prediction(column, "R2", quantities[:, place], test_y))
        train_classes, test_classes, classes = numbers_as_classes(train_y, test_y)
        predicted = predict_linear(given.train, train_classes, given.test, seed=seed)
        found.append(Prediction(column, "top-1", predicted, test_classes, {"classes": classes}))
    return found


# -- what is refused before features are extracted --------------------------------------------------------------------


def _check_k(targets: Targets, settings: Mapping[str, Any]) -> None:
    number = len(targets.train)
    if settings["k"] > number:
        raise ValueError(f"k={settings['k']}, but there are {number} training images; use --k {number} or less.")


def _check_enough(targets: Targets, settings: Mapping[str, Any]) -> None:
    number = len(targets.train)
    if number < _LEAST_LABELS:
        raise ValueError(
            f"there are {number} training images; a probe needs at least {_LEAST_LABELS}: use more "
            "(--max_train_samples), or --method knn."
        )


def _check_few_labels(targets: Targets, settings: Mapping[str, Any]) -> None:
    _check_enough(targets, settings)
    for draw in _few_labels(targets, settings):
        if len(draw) < _LEAST_LABELS:
            raise ValueError(
                f"low_shot would be fitted to {len(draw)} labelled images, and a probe needs at least "
                f"{_LEAST_LABELS}: use a larger --samples_per_class or --label_fraction."
            )


def _check_numbers(targets: Targets, settings: Mapping[str, Any]) -> None:
    """Refuses numbers without an R2: test numbers must vary, also in every draw of the interval."""
    _check_enough(targets, settings)
    for place, column in enumerate(targets.columns):
        train_y, test_y = targets.train[:, place], targets.test[:, place]
        for split, values in zip(targets.splits, (train_y, test_y), strict=True):
            if np.ptp(values) == 0:
                raise ValueError(
                    f"{column!r} is {values[0]:g} in each of the {len(values)} images of the split {split!r}: there "
                    f"is nothing to predict. Leave it out of --target_columns, or use more images ({_ENOUGH_NUMBERS} "
                    "whose numbers differ are enough)."
                )
        try:
            numbers_as_classes(train_y, test_y)
        except ValueError as error:
            raise ValueError(
                f"{column!r} cannot be cut into bins with as many training images each: it has "
                f"{len(np.unique(train_y))} different values in {len(train_y)} images. Leave it out of "
                "--target_columns, or use more images."
            ) from error

        def spread(weights: np.ndarray, test_y: np.ndarray = test_y) -> np.ndarray:
            low, high = (np.where(weights > 0, test_y, end) for end in (np.inf, -np.inf))
            found = high.max(axis=1) - low.min(axis=1)
            return np.where(found > 0, found, np.nan)

        try:
            bootstrap_interval(spread, len(test_y), settings["seed"])
        except ValueError as error:
            raise ValueError(
                f"R2 of {column!r} can have no interval: in some of {RESAMPLES} draws of the {len(test_y)} test "
                f"images all numbers are equal. Use at least {_ENOUGH_NUMBERS} test images (--max_eval_samples) whose "
                "numbers differ."
            ) from error


@dataclass(frozen=True)
class Method:
    """Describes an evaluation method.

    Args:
        features: What it needs of an image: `pooled` (one vector), `patches` (one vector for each patch), or `None`:
            it trains the network itself, which `evaluate` does.
        targets: What it predicts: `classes`, `numbers`, `maps` or `boxes`.
        settings: Flags that change its scores; `seed` always does.
        run: Predicts.
        check: Raises `ValueError` where the targets are not what the method needs.
        task: What the Hub calls such a task.
    """

    features: str | None
    targets: str
    settings: tuple[str, ...]
    run: Callable[[Inputs], list[Prediction]] | None
    check: Callable[[Targets, Mapping[str, Any]], None] | None = _check_enough
    task: str = "image-classification"


_POOLED = ("pooling", "layers")
METHODS = {
    "knn": Method("pooled", "classes", ("k", "temperature", *_POOLED), _of_one_target(_knn, "top-1"), _check_k),
    "linear": Method("pooled", "classes", _POOLED, _of_one_target(_linear, "top-1")),
    "linear_sgd": Method("pooled", "classes", _POOLED, _of_one_target(_linear_sgd, "top-1")),
    "attentive": Method("patches", "classes", ("layers",), _of_one_target(_attentive, "top-1")),
    "low_shot": Method(
        "pooled", "classes", ("samples_per_class", "label_fraction", "num_label_draws", *_POOLED), _low_shot,
        _check_few_labels,
    ),
    "regression": Method("pooled", "numbers", _POOLED, _regression, _check_numbers, "image-feature-extraction"),
    "segmentation": Method(
        "patches", "maps", ("layers",), _of_one_target(_segmentation, "mIoU"), task="image-segmentation"
    ),
    "localization": Method("patches", "boxes", ("layers",), _of_one_target(_boxes, "IoU"), task="object-detection"),
    "finetune": Method(None, "classes", ("num_train_epochs",), None, None),
}  # fmt: skip


def predict(name: str, given: Inputs) -> list[Prediction]:
    """Runs a method on frozen features.

    Args:
        name: One of `METHODS` that works on features.
        given: What the method needs.

    Returns:
        A prediction for each target and metric.
    """
    run = METHODS[name].run
    assert run is not None, f"{name} trains the network itself"
    return run(given)
