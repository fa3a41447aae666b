"""Predicts from frozen patch features where things are: masks of classes, and the box of the largest object."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ijepa_hf.evaluation.probes.checks import ProbeTraining, check_features, hold_out, in_pieces
from ijepa_hf.evaluation.probes.ridge import predict_ridge

logger = logging.getLogger(__name__)

IGNORED = 255  # label of pixels that do not count
TRAINING = ProbeTraining(20, 16, (1e-3, 1e-2, 1e-1))

_LAYOUT = "n, rows, columns, D"
_LEAST_IMAGES = 5  # four to fit and one to choose on
_BOX_CELLS = 4  # a side


def predict_segmentation(
    train_patches: np.ndarray,
    train_masks: np.ndarray,
    test_patches: np.ndarray,
    *,
    num_classes: int,
    mask_shape: tuple[int, ...],
    seed: int = 0,
    training: ProbeTraining = TRAINING,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Predicts the class of each pixel by a linear layer on frozen patch features.

    Features are standardised with the mean and deviation of the training images' patches. A linear layer gives each
    patch its logits; these are resized bilinearly to the mask's size, so that the borders of grid and mask agree; the
    loss is the cross-entropy of the pixels. Adam, half a cosine down towards 0. The learning rate is the one with the
    highest mean IoU on a fifth of the *training* images (the first of equals); the layer is then trained again on all
    of them. The problem is convex, and the weights start at 0. Images without a pixel to learn from are left out.

    Only batches are read and turned into float32, so memory-mapped and float16 features stay as they are. A batch's
    logits take batch_size x num_classes x height x width x 4 bytes for each learning rate.

    Args:
        train_patches: [n_train, rows, columns, D] patch features, finite; n_train at least 5.
        train_masks: integers [n_train, height, width], 0 to num_classes - 1, or 255 for a pixel that does not count.
        test_patches: [n_test, rows, columns, D] patch features, finite.
        num_classes: 2 to 255, the background included.
        mask_shape: (height, width) of the predicted masks, usually that of `train_masks`.
        seed: of the split and of the order of the images.
        training: how the layer is trained; without weight decay.
        device: where torch trains.

    Returns:
        int64 [n_test, height, width], 0 to num_classes - 1. On a CPU the same arguments always give the same masks.

    Raises:
        ValueError: a setting outside its range, masks that are no integers, of other images or with other labels, no
            pixel to learn from, shapes that do not agree, features that are not finite, or training that diverged with
            every learning rate.

    Source: the linear protocol for segmentation of DINOv2 (arXiv 2304.07193), section 7.4, without its augmentations;
        the settings of the optimiser are ours.
    """
    if len(mask_shape) != 2 or min(mask_shape) < 1:
        raise ValueError(f"mask_shape={mask_shape} must be (height, width), 1 or more.")
    rows = _learnable_images(train_patches, train_masks, test_patches, num_classes)
    learning_rates = training.learning_rates
    probe = _SegmentationProbe(train_patches, train_masks, num_classes, training, seed, torch.device(device))
    fit, held_out = (rows[part] for part in hold_out(len(rows), seed=seed))
    scores = [probe.score(layer, held_out) for layer in probe.train(fit, learning_rates)]
    best = int(np.argmax(scores))
    logger.info(
        "segmentation: learning rate %g was chosen, mean IoU %.4f on %d training images",
        learning_rates[best], scores[best], len(held_out),
    )  # fmt: skip
    (layer,) = probe.train(rows, [learning_rates[best]])
    if scores[best] < 0 or not _is_finite(layer):
        raise ValueError(f"the segmentation probe diverged with learning_rates={learning_rates}: give lower ones.")
    predicted = np.empty((len(test_patches), *mask_shape), dtype=np.int64)
    for batch, patches in probe.batches(test_patches, np.arange(len(test_patches))):
        predicted[batch] = _resized_logits(layer, patches, mask_shape).argmax(dim=1).cpu().numpy()
    return predicted


def _learnable_images(
    train_patches: np.ndarray, train_masks: np.ndarray, test_patches: np.ndarray, num_classes: int
) -> np.ndarray:
    """Checks the arrays; returns the numbers of the training images that have a pixel to learn from."""
    check_features(
        train_patches,
        train_masks,
        test_patches,
        layout=_LAYOUT,
        names=("train_patches", "train_masks", "test_patches"),
    )
    if num_classes < 2 or len(train_patches) < _LEAST_IMAGES:
        raise ValueError(
            f"num_classes={num_classes} must be at least 2, and the {len(train_patches)} training images at least "
            f"{_LEAST_IMAGES}."
        )
    if np.ndim(train_masks) != 3:
        raise ValueError(f"train_masks of shape {np.shape(train_masks)} must be [n, height, width].")
    _check_masks("train_masks", train_masks, num_classes, IGNORED)
    learnable = [index for index, mask in enumerate(train_masks) if np.any(mask != IGNORED)]
    if len(learnable) < _LEAST_IMAGES:
        raise ValueError(
            f"train_masks has {len(learnable)} images with a pixel that is not {IGNORED} (does not count): take at "
            f"least {_LEAST_IMAGES}."
        )
    return np.array(learnable)


def _is_finite(layer: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in layer.parameters())


@dataclass(frozen=True)
class _SegmentationProbe:
    """Trains and scores linear layers on standardised patches of the training images; see `predict_segmentation`."""

    patches: np.ndarray
    masks: np.ndarray
    num_classes: int
    training: ProbeTraining
    seed: int
    device: torch.device

    @functools.cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and deviation of the training images' patches."""
        return _patch_statistics(self.patches)

    def batches(self, patches: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Numbers of images and their standardised patches, a batch at a time."""
        mean, deviation = self.statistics
        batch_size = self.training.batch_size
        for start in range(0, len(rows), batch_size):
            batch = np.sort(rows[start : start + batch_size])  # in the order of a memory-mapped file
            standardised = (np.asarray(patches[batch], dtype=np.float32) - mean) / deviation
            yield batch, torch.as_tensor(standardised, device=self.device)

    def train(self, rows: np.ndarray, rates: Sequence[float]) -> nn.ModuleList:
        """Trains a layer for each learning rate, on the same batches."""
        width = self.patches.shape[-1]
        layers = nn.ModuleList()
        for _ in rates:
            layer = nn.utils.skip_init(nn.Linear, width, self.num_classes, device=self.device)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            layers.append(layer)
        groups = [
            {"params": layer.parameters(), "lr": rate, "initial_lr": rate}
            for layer, rate in zip(layers, rates, strict=True)
        ]
        optimizer = torch.optim.Adam(groups)
        steps = self.training.epochs * -(-len(rows) // self.training.batch_size)
        # The cosine starts at its second step and ends one step late: a step with a rate of 0 would be idle.
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, steps + 1, last_epoch=0)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in tqdm(
            range(self.training.epochs), desc=f"segmentation, {len(rates)} at once", unit="epoch", disable=None
        ):
            order = rows[torch.randperm(len(rows), generator=generator).numpy()]
            for batch, patches in self.batches(self.patches, order):
                masks = torch.as_tensor(np.asarray(self.masks[batch], dtype=np.int64), device=patches.device)
                optimizer.zero_grad()
                losses = [_pixel_loss(layer, patches, masks) for layer in layers]
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
        return layers.requires_grad_(False)

    def score(self, layer: nn.Module, rows: np.ndarray) -> float:
        """Computes the mean IoU on some training images; -1 for a layer that diverged."""
        if not _is_finite(layer):
            return -1.0
        counts = []
        for batch, patches in self.batches(self.patches, rows):
            masks = np.asarray(self.masks[batch])
            predicted = _resized_logits(layer, patches, masks.shape[1:]).argmax(dim=1).cpu().numpy()
            counts.append(confusion_counts(predicted, masks, self.num_classes))
        return mean_iou(*(np.concatenate(parts) for parts in zip(*counts, strict=True)))


def confusion_counts(
    predicted: np.ndarray, truth: np.ndarray, num_classes: int, ignore_index: int = IGNORED
) -> tuple[np.ndarray, np.ndarray]:
    """Counts for each image and class the pixels that prediction and truth share, and those that either has.

    Kept by image, so that the mean IoU of any selection of images can be computed from them.

    Args:
        predicted: integers [m, height, width], 0 to num_classes - 1.
        truth: integers of the same shape, or `ignore_index` where a pixel does not count.
        num_classes: C, 1 or more.
        ignore_index: label of pixels that do not count, outside 0 to C - 1.

    Returns:
        Intersections and unions, int64 [m, C] each.

    Raises:
        ValueError: other shapes, or labels outside their range.
    """
    if np.ndim(predicted) != 3 or np.shape(predicted) != np.shape(truth):
        raise ValueError(
            f"predicted of shape {np.shape(predicted)} and truth of shape {np.shape(truth)} must be "
            "[m, height, width] of one size."
        )
    _check_masks("predicted", predicted, num_classes, None)
    _check_masks("truth", truth, num_classes, ignore_index)
    intersections = np.empty((len(truth), num_classes), dtype=np.int64)
    unions = np.empty_like(intersections)
    for image, (guess, mask) in enumerate(zip(np.asarray(predicted), np.asarray(truth), strict=True)):
        counted = mask != ignore_index
        guess, mask = guess[counted].astype(np.int64), mask[counted].astype(np.int64)
        guessed = np.bincount(guess, minlength=num_classes)
        there = np.bincount(mask, minlength=num_classes)
        intersections[image] = np.bincount(mask[guess == mask], minlength=num_classes)
        unions[image] = guessed + there - intersections[image]
    return intersections, unions


def mean_iou(intersections: np.ndarray, unions: np.ndarray) -> float:
    """Computes the mean over classes of intersection over union, pixels of all images taken together.

    A class that occurs neither in the truth nor in the predictions has no IoU and is left out.

    Args:
        intersections: [m, C] pixels, from `confusion_counts`.
        unions: [m, C] pixels.

    Returns:
        0 (nothing right) to 1 (all pixels right).

    Raises:
        ValueError: other shapes, or no class that occurs.

    Source: the Jaccard index, as PASCAL VOC averages it (Everingham et al., IJCV 2015, section 4.2).
    """
    if np.ndim(intersections) != 2 or np.shape(intersections) != np.shape(unions):
        raise ValueError(
            f"intersections of shape {np.shape(intersections)} and unions of shape {np.shape(unions)} must be [m, C]."
        )
    shared, either = np.sum(intersections, axis=0), np.sum(unions, axis=0)
    occurs = either > 0
    if not occurs.any():
        raise ValueError("no class occurs in these images: every pixel is ignored, so there is no mean IoU.")
    return float(np.mean(shared[occurs] / either[occurs]))


def predict_boxes(
    train_patches: np.ndarray, train_boxes: np.ndarray, test_patches: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Predicts the box of the largest object of each image, by ridge regression on coarse cells of patch features.

    The patches are averaged in at most 4 x 4 cells, as equal as the grid allows; the four edges of the box are each
    regressed on all cells' features side by side (`predict_ridge`, with its choice of the penalty on train). Cells
    keep where something is, which the mean over all patches loses, at a number of columns that does not grow with the
    image. What comes out is then made a box: left and right, top and bottom are put in order, and edges beyond the
    picture are moved onto its border.

    Args:
        train_patches: [n_train, rows, columns, D] patch features, finite; n_train at least 5.
        train_boxes: [n_train, 4]: left, top, right, bottom as shares of the picture, 0 to 1, left below right and top
            below bottom.
        test_patches: [n_test, rows, columns, D] patch features, finite.
        seed: of the split that chooses the penalties.

    Returns:
        float64 [n_test, 4]: left, top, right, bottom, 0 to 1; a box may be empty where the regression failed.

    Raises:
        ValueError: boxes that are no such shares, fewer than five training images, shapes that do not agree, or
            features that are not finite.

    Source: the task of locating a single object, as in ILSVRC (Russakovsky et al., arXiv 1409.0575, section 4.2); the
        read-out is ours.
    """
    check_features(
        train_patches,
        train_boxes,
        test_patches,
        layout=_LAYOUT,
        names=("train_patches", "train_boxes", "test_patches"),
    )
    _check_boxes("train_boxes", train_boxes)
    if len(train_boxes) < _LEAST_IMAGES:
        raise ValueError(f"train_boxes has {len(train_boxes)} boxes: give at least {_LEAST_IMAGES}.")
    edges = predict_ridge(_cells(train_patches), np.asarray(train_boxes), _cells(test_patches), seed=seed)
    edges = edges.clip(0, 1)
    return np.concatenate([np.minimum(edges[:, :2], edges[:, 2:]), np.maximum(edges[:, :2], edges[:, 2:])], axis=1)


def box_iou(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Computes the intersection over union of two boxes for each image.

    Args:
        predicted: [m, 4] left, top, right, bottom, in order; it may be empty, which gives 0.
        truth: [m, 4] shares of the picture, 0 to 1, left below right and top below bottom.

    Returns:
        float64 [m], 0 (apart) to 1 (equal). An image counts as located from 0.5 on, by ILSVRC's rule.

    Raises:
        ValueError: other shapes, numbers that are not finite, a predicted box whose edges are out of order, or a true
            box that is none.
    """
    _check_boxes("truth", truth)
    boxes, wanted = np.asarray(predicted, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if boxes.shape != wanted.shape:
        raise ValueError(f"predicted of shape {boxes.shape} must have the shape of truth, {wanted.shape}.")
    if not np.isfinite(boxes).all() or np.any(boxes[:, :2] > boxes[:, 2:]):
        raise ValueError("predicted must hold finite left, top, right, bottom with left <= right and top <= bottom.")
    sides = np.minimum(boxes[:, 2:], wanted[:, 2:]) - np.maximum(boxes[:, :2], wanted[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (boxes, wanted)]
    return shared / (areas[0] + areas[1] - shared)


def _check_masks(name: str, masks: np.ndarray, num_classes: int, ignore_index: int | None) -> None:
    """Refuses masks that hold something else than 0 to num_classes - 1 and `ignore_index`."""
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index={ignore_index} must be none of the classes, 0 to {num_classes - 1}.")
    if np.asarray(masks).dtype.kind not in "iub":
        raise ValueError(f"{name} of dtype {np.asarray(masks).dtype} must hold integers.")
    for rows in in_pieces(masks):
        labels = np.unique(masks[rows])
        strange = labels[(labels < 0) | (labels >= num_classes)]
        strange = strange[strange != ignore_index] if ignore_index is not None else strange
        if len(strange):
            raise ValueError(
                f"{name} holds {strange[0]}: labels must be 0 to num_classes - 1 = {num_classes - 1}"
                + ("." if ignore_index is None else f", or ignore_index={ignore_index}.")
            )


def _check_boxes(name: str, boxes: np.ndarray) -> None:
    """Refuses boxes that are no left, top, right, bottom in [0, 1] with something inside."""
    array = np.asarray(boxes)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError(f"{name} of dtype {array.dtype} and shape {array.shape} must hold finite numbers [n, 4].")
    wrong = np.any((array < 0) | (array > 1), axis=1) | np.any(array[:, :2] >= array[:, 2:], axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{name}[{row}]={array[row].tolist()} must be left, top, right, bottom as shares of the picture, 0 to 1, "
            "left below right and top below bottom: divide pixels by the width and the height."
        )


def _patch_statistics(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes float32 mean and deviation [D] over all patches, in pieces; a constant column has deviation 1."""
    count, total = 0, np.zeros(patches.shape[-1])
    for rows in in_pieces(patches):
        piece = patches[rows].reshape(-1, patches.shape[-1])
        count, total = count + len(piece), total + piece.sum(axis=0, dtype=np.float64)
    mean, squares = total / count, np.zeros(patches.shape[-1])
    for rows in in_pieces(patches):
        squares += ((patches[rows] - mean) ** 2).reshape(-1, patches.shape[-1]).sum(axis=0)
    deviation = np.sqrt(squares / count)
    # Below float32's precision there is only the rounding of a constant.
    constant = deviation <= 1e-6 * np.abs(mean)
    return mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32)


def _resized_logits(layer: nn.Module, patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Computes logits of patches [B, rows, columns, D], and resizes them to [B, classes, height, width]."""
    return nn.functional.interpolate(layer(patches).permute(0, 3, 1, 2), size=shape, mode="bilinear")


def _pixel_loss(layer: nn.Module, patches: Tensor, masks: Tensor) -> Tensor:
    logits = _resized_logits(layer, patches, masks.shape[1:])
    return nn.functional.cross_entropy(logits, masks, ignore_index=IGNORED)


def _cells(patches: np.ndarray) -> np.ndarray:
    """Averages patches in at most 4 x 4 cells, left to right and top to bottom: float32 [n, cells * D]."""
    shape = tuple(min(_BOX_CELLS, side) for side in patches.shape[1:3])
    pieces = []
    for rows in in_pieces(patches):
        features = torch.as_tensor(np.asarray(patches[rows], dtype=np.float32)).permute(0, 3, 1, 2)
        pooled = nn.functional.adaptive_avg_pool2d(features, shape)
        pieces.append(pooled.permute(0, 2, 3, 1).flatten(1).numpy())
    return np.concatenate(pieces)
