"""A few numbers that say how good features are, for comparing many encoders on the same labelled images.

What `ijepa-hf evaluate` does for one model with intervals, files and baselines, this does in memory, in seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_hf.data import ImageRows
from ijepa_hf.diagnostics import rankme
from ijepa_hf.evaluation.knn import NEIGHBOURS, knn_accuracy
from ijepa_hf.evaluation.labelled_data import choose_labelled
from ijepa_hf.evaluation.linear_probe import linear_accuracy, predict_linear
from ijepa_hf.evaluation.regression_probe import numbers_as_classes, predict_ridge
from ijepa_hf.evaluation.splits import share_correct
from ijepa_hf.image_transforms import resize, stack_images
from ijepa_hf.sources import ImageSource, at_most, find_image_column, find_label_column, load_split

LOW_SHOT_SAMPLES = 10  # labelled images of each class
LOW_SHOT_DRAWS = 5
NUMBERS = ("count", "nearest_distance")  # of `shapes`: the questions of the paper's table 4


@dataclass(frozen=True)
class ScoredImages:
    """Labelled images on which encoders are compared.

    Args:
        train_pixels: uint8 `[n, C, height, width]`.
        test_pixels: uint8 `[m, C, height, width]`.
        train_labels: int64 `[n]`.
        test_labels: int64 `[m]`.
        numbers: For each of `NUMBERS` that the data have, the values of the training and of the test images.
    """

    train_pixels: Tensor
    test_pixels: Tensor
    train_labels: np.ndarray
    test_labels: np.ndarray
    numbers: Mapping[str, tuple[np.ndarray, np.ndarray]]


def load_scored_images(
    dataset_name: str,
    image_shape: tuple[int, int],
    *,
    num_channels: int = 3,
    train_split_name: str = "train",
    eval_split_name: str = "test",
    max_train: int | None = None,
    max_test: int | None = None,
) -> ScoredImages:
    """Reads labelled images whole, resized as the image processor of an exported model does.

    Args:
        dataset_name: As for `ijepa-hf pretrain`.
        image_shape: Height and width, pixels.
        num_channels: Channels of an image.
        train_split_name: Split that probes are fitted to.
        eval_split_name: Held-out split.
        max_train: Use at most so many images to fit probes.
        max_test: Use at most so many held-out images.

    Returns:
        The images.

    Raises:
        ValueError: If there is no such split, or it has no labels.
    """
    source = ImageSource(dataset_name)
    pixels, labels = [], []
    numbers: dict[str, list[np.ndarray]] = {}
    for split, most in ((train_split_name, max_train), (eval_split_name, max_test)):
        dataset = at_most(load_split(source, split), most)
        column = find_label_column(dataset)
        if column is None:
            raise ValueError(
                f"dataset_name={dataset_name!r}: the split {split!r} has no labels (its columns are "
                f"{', '.join(dataset.features)}); scores need them."
            )
        images = ImageRows(dataset, find_image_column(dataset), num_channels)
        pixels.append(stack_images([resize(images[index], image_shape) for index in range(len(images))]))
        labels.append(np.asarray(dataset[column], np.int64))
        for name in NUMBERS:
            if name in dataset.features:
                numbers.setdefault(name, []).append(np.asarray(dataset[name], np.float64))
    pairs = {name: (train, test) for name, (train, test) in numbers.items()}
    return ScoredImages(pixels[0], pixels[1], labels[0], labels[1], pairs)


def pooled_features(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, prepare: Callable[[Tensor], Tensor], *, batch_size: int = 256
) -> np.ndarray:
    """Features of images, a batch at a time, without gradients.

    Args:
        encode: Normalised images, float `[B, C, height, width]`, to one vector each, `[B, D]`.
        pixels: uint8 `[n, C, height, width]`.
        prepare: Pixels of a batch to normalised images, on the encoder's device.
        batch_size: Images at once.

    Returns:
        float32 `[n, D]`.
    """
    with torch.inference_mode():
        return np.concatenate([encode(prepare(part)).float().cpu().numpy() for part in pixels.split(batch_size)])


def score_features(
    train_x: np.ndarray, test_x: np.ndarray, images: ScoredImages, *, seed: int = 0
) -> dict[str, float]:
    """Scores of frozen features. Nothing is chosen on test labels.

    Args:
        train_x: `[n, D]`, of `images.train_pixels`.
        test_x: `[m, D]`, of `images.test_pixels`.
        images: Whose labels count.
        seed: Of the draws of labelled images and of the split on which penalties are chosen.

    Returns:
        Top-1 in [0, 1]: `knn` (20 neighbours), `linear`, `low_shot` (`LOW_SHOT_SAMPLES` labels of each class, mean of
        `LOW_SHOT_DRAWS` draws); for each of `images.numbers` its name (top-1 of the number as a class, as in the
        paper's table 4) and its name with `_r2` (of a ridge regression); `rankme` of the test features.
    """
    labelled = (train_x, images.train_labels, test_x, images.test_labels)
    scores = {
        "knn": knn_accuracy(*labelled, k=min(NEIGHBOURS, len(train_x))),
        "linear": linear_accuracy(*labelled, seed=seed),
    }
    right = []
    for number in range(LOW_SHOT_DRAWS):
        chosen = choose_labelled(images.train_labels, LOW_SHOT_SAMPLES, None, seed + number)
        predicted = predict_linear(train_x[chosen], images.train_labels[chosen], test_x, seed=seed)
        right.append(share_correct(predicted, images.test_labels))
    scores["low_shot"] = float(np.mean(right))
    for name, (train_y, test_y) in images.numbers.items():
        train_classes, test_classes, _ = numbers_as_classes(train_y, test_y)
        predicted = predict_linear(train_x, train_classes, test_x, seed=seed)
        scores[name] = share_correct(predicted, test_classes)
        quantities = predict_ridge(train_x, train_y[:, None], test_x, seed=seed)[:, 0]
        scores[f"{name}_r2"] = float(
            1 - np.square(quantities - test_y).sum() / np.square(test_y - test_y.mean()).sum()
        )
    scores["rankme"] = rankme(torch.from_numpy(test_x))
    return scores
