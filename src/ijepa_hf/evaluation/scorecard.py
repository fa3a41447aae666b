"""Scores features in a few numbers: those of a run and its report, and of many encoders side by side.

`ijepa-hf evaluate` scores one model with intervals, files and baselines; this module scores in memory, in seconds. The
report of a run compares the trained encoder with baselines: the weights that it started from, if any; the same network
untrained, with both usual initial values of its patch embedding; and the raw pixels.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijepa_hf.data.labelled import (
    LabelledReading,
    LabelledSource,
    LabelledSplits,
    load_labelled_splits,
)
from ijepa_hf.data.reading import ImageRows, resized_pixels
from ijepa_hf.data.retrying import RetryPolicy
from ijepa_hf.data.sources.opening import load_split
from ijepa_hf.data.targets import load_target_splits
from ijepa_hf.data.transforms import resize, stack_images
from ijepa_hf.diagnosis.measures import rankme
from ijepa_hf.evaluation.backbones import raw_pixels
from ijepa_hf.evaluation.methods import METRICS, Inputs, Targets, predict
from ijepa_hf.evaluation.probes.knn import knn_accuracy
from ijepa_hf.evaluation.probes.linear import linear_accuracy
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.features import extract_features
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, new_model
from ijepa_hf.recipes.arguments import DataArguments
from ijepa_hf.runs.cards import NEIGHBOURS, STARTING_WEIGHTS
from ijepa_hf.weights.official_names import PUBLISHED_PATCH_INIT_STD

LOW_SHOT_SAMPLES = 10  # labelled images of each class
LOW_SHOT_DRAWS = 5
NUMBERS = ("count", "nearest_distance")  # of `shapes`: the questions of the paper's table 4
PIXELS_AT_ONCE = 512  # images

_RUN_ARGUMENTS = (
    "dataset_name", "dataset_config_name", "train_split_name", "eval_split_name", "image_column_name",
    "label_column_name",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredImages:
    """Holds labelled images on which encoders are compared.

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
        max_train: Most images to fit probes with.
        max_test: Most held-out images.

    Returns:
        The images.

    Raises:
        ValueError: If there is no such split, or it has no labels.
    """
    labelled = LabelledSource(
        dataset_name=dataset_name,
        train_split_name=train_split_name,
        eval_split_name=eval_split_name,
        max_train_samples=max_train,
        max_eval_samples=max_test,
    )
    splits = load_labelled_splits(labelled, num_channels)
    train, test = (
        stack_images([resize(images[index], image_shape) for index in range(len(images))])
        for images in (splits.train, splits.test)
    )
    columns = [name for name in NUMBERS if name in load_split(labelled.images, eval_split_name).features]
    numbers = {}
    if columns:
        targets = load_target_splits(labelled, num_channels, columns, "number")
        numbers = {
            name: (targets.train_targets[:, place], targets.test_targets[:, place])
            for place, name in enumerate(columns)
        }
    return ScoredImages(train, test, splits.train_labels, splits.test_labels, numbers)


def pooled_features(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, prepare: Callable[[Tensor], Tensor], *, batch_size: int = 256
) -> np.ndarray:
    """Computes features of images, a batch at a time, without gradients.

    Args:
        encode: Turns normalised images, float `[B, C, height, width]`, into one vector each, `[B, D]`.
        pixels: uint8 `[n, C, height, width]`.
        prepare: Turns the pixels of a batch into normalised images, on the encoder's device.
        batch_size: Images at once.

    Returns:
        float32 `[n, D]`.
    """
    with torch.inference_mode():
        return np.concatenate([encode(prepare(part)).float().cpu().numpy() for part in pixels.split(batch_size)])


def score_classes(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    with_linear: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Scores frozen features by the classes of their images.

    Args:
        train_x: `[n, D]`.
        train_y: int64 `[n]`.
        test_x: `[m, D]`.
        test_y: int64 `[m]`.
        with_linear: Whether to fit the linear probe too, which takes minutes where the others take seconds.
        seed: Of the split on which the linear probe's penalty is chosen.

    Returns:
        `knn` (20 neighbours) and `linear` (top-1 in [0, 1]), and `rankme` of the test features.
    """
    labelled = (train_x, train_y, test_x, test_y)
    scores = {"knn": knn_accuracy(*labelled, k=min(NEIGHBOURS, len(train_x)))}
    if with_linear:
        scores["linear"] = linear_accuracy(*labelled, seed=seed)
    return {**scores, "rankme": rankme(torch.from_numpy(test_x))}


def score_features(
    train_x: np.ndarray, test_x: np.ndarray, images: ScoredImages, *, seed: int = 0
) -> dict[str, float]:
    """Scores frozen features by classes, few labels and numbers. Nothing is chosen on test labels.

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
    scores = score_classes(train_x, images.train_labels, test_x, images.test_labels, seed=seed)
    few = {"samples_per_class": LOW_SHOT_SAMPLES, "label_fraction": None, "num_label_draws": LOW_SHOT_DRAWS}
    classes = Targets(["low_shot"], images.train_labels, images.test_labels)
    found = predict("low_shot", Inputs(train_x, test_x, classes, {**few, "seed": seed}))
    if images.numbers:
        train_y, test_y = (np.stack(part, axis=1) for part in zip(*images.numbers.values(), strict=True))
        found += predict(
            "regression", Inputs(train_x, test_x, Targets([*images.numbers], train_y, test_y), {"seed": seed})
        )
    for each in found:
        name = f"{each.target}_r2" if each.metric == "R2" else each.target
        scores[name] = METRICS[each.metric].value(each.predicted, each.truth)
    return scores


# -- the scores of a run ----------------------------------------------------------------------------------------------


def load_evaluation_sets(data: DataArguments, config: IJepaConfig) -> LabelledSplits | None:
    """Loads the labelled images that `data.eval_split_name` asks for.

    Args:
        data: The images of a run; of each split at most `max_eval_samples` are taken.
        config: Says the number of channels.

    Returns:
        Both splits, or `None` if no evaluation split was named.

    Raises:
        ValueError: If the split or its labels are missing, or there are too few images.
    """
    if data.eval_split_name is None:
        return None
    labelled = LabelledSource(
        **{name: getattr(data, name) for name in _RUN_ARGUMENTS},
        max_train_samples=data.max_eval_samples,
        max_eval_samples=data.max_eval_samples,
    )
    retries = RetryPolicy(data.data_retry_seconds, data.data_timeout_seconds)
    reading = LabelledReading(streaming=data.streaming, retries=retries, allow_new_classes=True)
    try:
        splits = load_labelled_splits(labelled, config.num_channels, reading=reading)
        if len(splits.train) < 5:
            raise ValueError(f"the split {data.train_split_name!r} has {len(splits.train)} images, and 5 are needed.")
    except ValueError as error:
        raise ValueError(
            f"eval_split_name={data.eval_split_name!r} asks for scores, but {error} Leave out --eval_split_name to "
            "train without scores."
        ) from error
    return splits


def evaluate_encoder(
    encoder: nn.Module, evaluation: LabelledSplits, config: IJepaConfig, arguments: Mapping[str, Any]
) -> dict[str, float]:
    """Scores an encoder while a run goes on: in seconds, where `score_encoder` with its linear probes takes minutes.

    Args:
        encoder: A target encoder.
        evaluation: Labelled sets.
        config: The model's.
        arguments: The run's `image_mean` and `image_std`.

    Returns:
        `knn` (top-1 in [0, 1]) and `rankme` of the held-out images' pooled features.
    """
    mean, std = arguments["image_mean"], arguments["image_std"]
    train, train_kept = _all_features({"": encoder}, evaluation.train, config, mean, std)
    test, test_kept = _all_features({"": encoder}, evaluation.test, config, mean, std)
    labels = evaluation.train_labels[train_kept], evaluation.test_labels[test_kept]
    return score_classes(train[""], labels[0], test[""], labels[1], with_linear=False)


def score_encoder(
    model: IJepaForPretraining,
    evaluation: LabelledSplits,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    *,
    starting_encoder: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Scores the target encoder, what it began as, and raw pixels by kNN, a linear probe and RankMe.

    Args:
        model: The trained model.
        evaluation: Labelled sets.
        mean: Of each channel.
        std: Of each channel.
        seed: The run's seed; the untrained network with the run's `patch_init_std` is the one that it started from.
        starting_encoder: The encoder before the first step, where it was a trained one.

    Returns:
        A row for each: `features` (its name), `knn`, `linear` (top-1 in [0, 1]), `rankme` (of the held-out images).
    """
    encoders: dict[str, nn.Module | None] = {"trained encoder": model.target_encoder}
    if starting_encoder is not None:
        encoders[STARTING_WEIGHTS] = starting_encoder.to(model.device)
    for value, name in ((None, "1/sqrt(inputs)"), (PUBLISHED_PATCH_INIT_STD, f"{PUBLISHED_PATCH_INIT_STD}")):
        untrained = new_model(model.config.replace(patch_init_std=value), seed).target_encoder
        encoders[f"untrained, patch_init_std {name}"] = untrained.to(model.device)
    encoders["raw pixels"] = None
    train, train_kept = _all_features(encoders, evaluation.train, model.config, mean, std)
    test, test_kept = _all_features(encoders, evaluation.test, model.config, mean, std)
    rows: list[dict[str, Any]] = []
    for name in encoders:
        labelled = (train[name], evaluation.train_labels[train_kept], test[name], evaluation.test_labels[test_kept])
        rows.append({"features": name, **score_classes(*labelled)})
    return rows


def _all_features(
    encoders: Mapping[str, nn.Module | None],
    images: ImageRows,
    config: IJepaConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Computes features `[n, D]` under each name, and the numbers of their images; leaves out unreadable images.

    Reads a part of the images at a time, so that not all pixels are in memory.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    kept: list[int] = []
    for start in range(0, len(images), PIXELS_AT_ONCE):
        readable = _readable(images, range(start, min(start + PIXELS_AT_ONCE, len(images))))
        if not readable:
            continue
        kept += readable
        pixels = resized_pixels(readable.values(), config, mean, std)
        for name, encoder in encoders.items():
            found = raw_pixels(pixels).numpy() if encoder is None else extract_features(encoder, pixels)
            parts[name].append(found)
    return {name: np.concatenate(part) for name, part in parts.items()}, kept


def first_readable_pixels(
    images: ImageRows, config: IJepaConfig, mean: Sequence[float], std: Sequence[float], limit: int
) -> Tensor:
    """Reads some whole images, spread evenly over a split; those that cannot be read are left out.

    Args:
        images: A split.
        config: Says the size.
        mean: Of each channel.
        std: Of each channel.
        limit: Images wanted.

    Returns:
        float32 `[n, num_channels, height, width]`, n at most `limit`.
    """
    chosen = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    readable = _readable(images, map(int, chosen))
    if not readable:
        return torch.empty(0, config.num_channels, *config.image_shape)
    return resized_pixels(readable.values(), config, mean, std)


def _readable(images: ImageRows, indices: Iterable[int]) -> dict[int, Any]:
    found = {}
    for index in indices:
        try:
            found[index] = images[index]
        except ValueError as error:  # one damaged image must not prevent all scores
            logger.warning("not scored: %s", error)
    return found
