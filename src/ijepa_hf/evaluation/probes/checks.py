"""Checks the arrays and settings of probes, and splits off the training images on which settings are chosen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

HELD_OUT_SHARE = 0.2
_NUMBERS_AT_ONCE = 2**22  # 32 MB in float64


@dataclass(frozen=True)
class ProbeTraining:
    """Holds the settings for training a probe by gradient descent.

    Args:
        epochs: passes over the training images, 1 or more.
        batch_size: images a step, 1 or more; the last step of an epoch may have fewer.
        learning_rates: to choose from, each above 0.
        weight_decays: to choose from, each 0 or more.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int
    batch_size: int
    learning_rates: Sequence[float]
    weight_decays: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs={self.epochs} and batch_size={self.batch_size} must be at least 1.")
        if not self.learning_rates or not all(0 < rate < np.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates} must hold one or more numbers above 0.")
        if not self.weight_decays or not all(0 <= decay < np.inf for decay in self.weight_decays):
            raise ValueError(f"weight_decays={self.weight_decays} must hold one or more numbers of 0 or more.")


def check_features(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    layout: str = "n, D",
    names: tuple[str, str, str] = ("train_x", "train_y", "test_x"),
) -> None:
    """Refuses features that a probe cannot work with: no labels for them, NaN, or test features of another kind.

    Reads each array once, some rows at a time, so that a memory-mapped one stays on disk.

    Args:
        train_x: training features, n_train first, real numbers.
        train_y: [n_train, ...] what is to be predicted.
        test_x: test features, n_test first.
        layout: names of the features' axes, with commas; all but the first must agree between train and test.
        names: what the caller calls the three arrays, for the messages.

    Raises:
        ValueError: an array of another number of axes, or empty; `train_y` of another length than `train_x`; train and
            test features of different sizes; features that are no real numbers, or not finite.
    """
    train_name, target_name, test_name = names
    for name, features in ((train_name, train_x), (test_name, test_x)):
        if np.ndim(features) != len(layout.split(", ")) or 0 in np.shape(features):
            raise ValueError(
                f"{name} of shape {np.shape(features)} must be [{layout}], with n at least 1 and no axis empty."
            )
        if np.asarray(features).dtype.kind not in "fiub":
            raise ValueError(f"{name} of dtype {np.asarray(features).dtype} must hold real numbers.")
    if np.ndim(train_y) == 0 or len(train_y) != len(train_x):
        raise ValueError(
            f"{train_name} of shape {np.shape(train_x)} and {target_name} of shape {np.shape(train_y)} must have the "
            "same n."
        )
    if np.shape(train_x)[1:] != np.shape(test_x)[1:]:
        axes = "columns" if layout == "n, D" else layout.removeprefix("n, ").replace(", ", " x ")
        train_size, test_size = (" x ".join(map(str, np.shape(x)[1:])) for x in (train_x, test_x))
        raise ValueError(
            f"{train_name} has {train_size} {axes} and {test_name} has {test_size}: they must come from the same "
            "encoder and from images of one size."
        )
    for name, features in ((train_name, train_x), (test_name, test_x)):
        for rows in in_pieces(features):
            if not np.isfinite(features[rows]).all():
                raise ValueError(f"{name} holds NaN or infinity: the encoder's output is broken, or its input was.")


def check_classes(train_y: np.ndarray, least: int = 1) -> None:
    """Refuses labels that are no classification.

    Args:
        train_y: labels, whole numbers or words.
        least: number of labels that the probe needs.

    Raises:
        ValueError: labels that are not [n], are not finite, are fewer than `least`, or of a single class.
    """
    if np.ndim(train_y) != 1:
        raise ValueError(f"train_y of shape {np.shape(train_y)} must be [n]: one label for each image.")
    labels = np.asarray(train_y)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("train_y holds NaN or infinity: every training image needs a label.")
    classes = np.unique(labels)
    if len(labels) < least or len(classes) < 2:
        raise ValueError(
            f"train_y has {len(labels)} labels of {len(classes)} classes: a probe needs at least {max(least, 2)} "
            "labels of at least 2 classes. Take more images, or check which column holds the labels."
        )


def share_correct(predicted: np.ndarray, test_y: np.ndarray) -> float:
    """Computes the top-1 accuracy.

    Args:
        predicted: [n_test] predicted labels.
        test_y: [n_test] true labels; one that was never predicted counts as wrong.

    Returns:
        Share of equal ones, 0 to 1.
    """
    return float(np.mean(predicted == np.asarray(test_y)))


def check_test_labels(test_x: np.ndarray, test_y: np.ndarray) -> None:
    """Refuses test labels of another number than the test images, before any work.

    Args:
        test_x: [n_test, ...] features.
        test_y: [n_test] labels.

    Raises:
        ValueError: other shapes.
    """
    if np.ndim(test_x) == 0 or np.shape(test_y) != (len(test_x),):
        raise ValueError(
            f"test_x of shape {np.shape(test_x)} and test_y of shape {np.shape(test_y)} must have the same n, and "
            "test_y one axis."
        )


def hold_out(count: int, *, seed: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Splits the training images in two, to choose a setting on the second part.

    Args:
        count: number of training images, 2 or more.
        seed: of the draw, 0 or more.
        labels: [count] classes; each is then split in the same proportion, provided that every class has two images or
            more and the smaller part has room for all of them. Otherwise the draw ignores the classes.

    Returns:
        Rows to fit on and the fifth (rounded up) to choose on: int64, ascending, disjoint, together all.

    Raises:
        ValueError: fewer than two images.
    """
    if count < 2:
        raise ValueError(f"{count} training image cannot be split to choose a setting: take at least 2.")
    strata = None
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        room = math.ceil(HELD_OUT_SHARE * count)
        strata = labels if counts.min() >= 2 and room >= len(counts) else None
    fit, held_out = train_test_split(np.arange(count), test_size=HELD_OUT_SHARE, random_state=seed, stratify=strata)
    return np.sort(fit), np.sort(held_out)


def in_pieces(array: np.ndarray, numbers: int = _NUMBERS_AT_ONCE) -> Iterator[slice]:
    """Cuts an array along its first axis into pieces of bounded size.

    Args:
        array: [n, ...], possibly memory-mapped.
        numbers: most numbers in a piece; a piece has at least one row.

    Yields:
        Slices of rows, in order.
    """
    rows = max(1, numbers // max(1, math.prod(np.shape(array)[1:])))
    for start in range(0, len(array), rows):
        yield slice(start, min(start + rows, len(array)))
