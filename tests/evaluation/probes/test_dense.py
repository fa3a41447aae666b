"""Segmentation and boxes on planted problems; their measures against scikit-learn and counting by hand."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score

from ijepa_hf.evaluation.probes import dense
from ijepa_hf.evaluation.probes.dense import (
    TRAINING,
    box_iou,
    confusion_counts,
    mean_iou,
    predict_boxes,
    predict_segmentation,
)
from ijepa_hf.evaluation.probes.ridge import predict_ridge


def scenes(n: int, *, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A rectangle of one of two classes on a 8 x 6 grid: features [n, 8, 6, 5], masks of 16 x 12 pixels, boxes."""
    generator = np.random.default_rng(seed)
    masks, boxes = np.zeros((n, 16, 12), dtype=np.int64), np.empty((n, 4))
    for image in range(n):
        height, width = generator.integers(3, 6, 2)
        top, left = generator.integers(0, 9 - height), generator.integers(0, 7 - width)
        masks[image, 2 * top : 2 * (top + height), 2 * left : 2 * (left + width)] = generator.integers(1, 3)
        boxes[image] = left / 6, top / 8, (left + width) / 6, (top + height) / 8
    classes = masks[:, ::2, ::2]
    directions = np.array([[0, 0, 0, 0, 5], [3, 0, 0, 0, 5], [0, 3, 0, 0, 5]])
    features = directions[classes] + noise * generator.normal(size=(n, 8, 6, 5)) * [1, 1, 1, 1, 0]
    return features.astype(np.float32), masks, boxes


def trained(**changes) -> dict:
    """The defaults of segmentation with changes, as an argument."""
    return {"training": replace(TRAINING, **changes)}


SHAPE = {"num_classes": 3, "mask_shape": (16, 12)}


def iou_of(predicted: np.ndarray, masks: np.ndarray) -> float:
    return mean_iou(*confusion_counts(predicted, masks, 3))


# ---- segmentation ---------------------------------------------------------------------------------------------------


def test_planted_objects_are_segmented_and_shuffled_masks_give_what_background_alone_gives():
    x, masks, _ = scenes(120)
    predicted = predict_segmentation(x[:60], masks[:60], x[60:], **SHAPE)
    assert predicted.dtype == np.int64
    assert predicted.shape == (60, 16, 12)
    assert iou_of(predicted, masks[60:]) > 0.85
    shuffled = predict_segmentation(x[:60], np.random.default_rng(1).permutation(masks[:60]), x[60:], **SHAPE)
    background = iou_of(np.zeros_like(predicted), masks[60:])
    assert iou_of(shuffled, masks[60:]) < background + 0.1


def test_a_long_run_at_patch_resolution_is_logistic_regression_of_the_patches():
    """Masks as large as the grid are not resized, and overlapping classes keep the minimum finite."""
    x, masks, _ = scenes(40, noise=3.0)
    small = masks[:, ::2, ::2]
    settings = trained(epochs=400, batch_size=40, learning_rates=(0.05,))
    predicted = predict_segmentation(x[:20], small[:20], x[20:], num_classes=3, mask_shape=(8, 6), **settings)
    rows = x[:20].reshape(-1, 5)[:, :4]
    direct = LogisticRegression(C=1e6, max_iter=1000).fit(rows, small[:20].ravel())
    theirs = direct.predict(x[20:].reshape(-1, 5)[:, :4]).reshape(20, 8, 6)
    assert np.mean(predicted == theirs) > 0.99


def test_logits_are_resized_so_that_borders_of_grid_and_mask_agree():
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    ramp = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1)
    resized = dense._resized_logits(layer, ramp, (1, 4))
    torch.testing.assert_close(resized, torch.tensor([0.0, 1.0, 3.0, 4.0]).reshape(1, 1, 1, 4))


def test_rows_and_columns_are_not_mixed_up():
    x, masks, _ = scenes(60)
    turned = predict_segmentation(
        x[:40].transpose(0, 2, 1, 3), masks[:40].transpose(0, 2, 1), x[40:].transpose(0, 2, 1, 3),
        num_classes=3, mask_shape=(12, 16),
    )  # fmt: skip
    straight = predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE)
    assert np.mean(turned.transpose(0, 2, 1) == straight) > 0.999


def test_ignored_pixels_teach_nothing():
    """The left half of each mask is wrong but ignored; an image without any other pixel is left out."""
    x, masks, _ = scenes(120)
    wrong = (masks + 1) % 3
    wrong[:, :, 6:] = masks[:, :, 6:]
    ignored = wrong.copy()
    ignored[:, :, :6] = 255
    ignored[3] = 255
    right = predict_segmentation(x[:60], ignored[:60], x[60:], **SHAPE)
    misled = predict_segmentation(x[:60], wrong[:60], x[60:], **SHAPE)
    assert iou_of(right, masks[60:]) > 0.85
    assert iou_of(misled, masks[60:]) < 0.7


def test_the_learning_rate_that_does_best_on_held_out_training_images_is_chosen(caplog):
    caplog.set_level(logging.INFO)
    x, masks, _ = scenes(60)
    chosen = predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE, **trained(learning_rates=(1e-5, 3e37, 0.05)))
    assert "learning rate 0.05 was chosen" in caplog.text
    alone = predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE, **trained(learning_rates=(0.05,)))
    np.testing.assert_array_equal(chosen, alone)
    with pytest.raises(ValueError, match=r"diverged with learning_rates=\(3e\+37,\): give lower ones"):
        predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE, **trained(learning_rates=(3e37,)))


def test_scale_and_offset_of_the_columns_do_not_count():
    x, masks, _ = scenes(60)
    x = x.astype(np.float64)
    moved = x * np.logspace(-3, 3, 5) + 7
    straight = predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE)
    assert np.mean(predict_segmentation(moved[:40], masks[:40], moved[40:], **SHAPE) == straight) > 0.999


def test_memory_mapped_half_precision_gives_the_same_masks_and_each_image_is_judged_by_itself(tmp_path: Path):
    x, masks, _ = scenes(60)
    x = x.astype(np.float16)
    np.save(tmp_path / "patches.npy", x)
    mapped = np.load(tmp_path / "patches.npy", mmap_mode="r")
    plain = predict_segmentation(x[:40].astype(np.float32), masks[:40], x[40:].astype(np.float32), **SHAPE)
    np.testing.assert_array_equal(predict_segmentation(mapped[:40], masks[:40], mapped[40:], **SHAPE), plain)
    np.testing.assert_array_equal(predict_segmentation(x[:40], masks[:40], x[45:46], **SHAPE), plain[5:6])


def test_masks_are_a_function_of_the_seed_alone():
    x, masks, _ = scenes(60, noise=3.0)
    state = torch.get_rng_state()
    results = [
        predict_segmentation(x[:40], masks[:40], x[40:], **SHAPE, seed=seed, **trained(epochs=2)) for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_mean_and_deviation_are_those_of_all_patches(monkeypatch):
    x = np.random.default_rng(0).normal(3, 2, size=(50, 4, 3, 6)).astype(np.float16)
    x[..., 2] = 0.1
    monkeypatch.setattr(dense, "in_pieces", lambda array: (slice(i, i + 7) for i in range(0, len(array), 7)))
    mean, deviation = dense._patch_statistics(x)
    rows = x.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation[[0, 1, 3, 4, 5]], rows.std(axis=0)[[0, 1, 3, 4, 5]], rtol=1e-6)
    assert deviation[2] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"num_classes": 2}, "train_masks holds 2: labels must be 0 to num_classes - 1 = 1, or ignore_index=255"),
        ({"mask_shape": (0, 4)}, r"mask_shape=\(0, 4\) must be \(height, width\)"),
        ({"train_masks": np.zeros((20, 4, 4))}, "train_masks of dtype float64 must hold integers"),
        (
            {"train_masks": np.zeros((20, 4), dtype=int)},
            r"train_masks of shape \(20, 4\) must be \[n, height, width\]",
        ),
        ({"train_masks": np.full((20, 4, 4), 255)}, "0 images with a pixel that is not 255"),
        ({"train_masks": np.zeros((19, 4, 4), dtype=int)}, r"train_masks of shape \(19, 4, 4\) must have the same n"),
        (
            {"test_patches": np.zeros((2, 48, 5))},
            r"test_patches of shape \(2, 48, 5\) must be \[n, rows, columns, D\]",
        ),
        ({"test_patches": np.full((2, 8, 6, 5), np.nan)}, "test_patches holds NaN"),
    ],
)
def test_impossible_arguments_of_segmentation_are_named(change: dict, message: str):
    x, masks, _ = scenes(20)
    with pytest.raises(ValueError, match=message):
        predict_segmentation(**{"train_patches": x, "train_masks": masks, "test_patches": x, **SHAPE, **change})


# ---- the measure of segmentation ------------------------------------------------------------------------------------


def test_counts_by_hand():
    truth = np.array([[[0, 0, 1], [1, 255, 255]], [[2, 2, 2], [2, 2, 2]]])
    predicted = np.array([[[0, 1, 1], [0, 1, 2]], [[2, 2, 2], [2, 2, 0]]])
    intersections, unions = confusion_counts(predicted, truth, 4)
    np.testing.assert_array_equal(intersections, [[1, 1, 0, 0], [0, 0, 5, 0]])
    np.testing.assert_array_equal(unions, [[3, 3, 0, 0], [1, 0, 6, 0]])
    assert mean_iou(intersections, unions) == pytest.approx((1 / 4 + 1 / 3 + 5 / 6) / 3)
    assert mean_iou(intersections[:1], unions[:1]) == pytest.approx((1 / 3 + 1 / 3) / 2)


def test_counts_and_mean_equal_scikit_learns():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, (2, 7, 9, 11))
    truth[generator.random(truth.shape) < 0.1] = 9
    intersections, unions = confusion_counts(predicted, truth.astype(np.uint8), 4, ignore_index=9)
    for image in range(7):
        counted = truth[image] != 9
        matrix = confusion_matrix(truth[image][counted], predicted[image][counted], labels=range(4))
        np.testing.assert_array_equal(intersections[image], np.diag(matrix))
        np.testing.assert_array_equal(unions[image], matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    counted = truth != 9
    expected = jaccard_score(truth[counted], predicted[counted], average="macro")
    assert mean_iou(intersections, unions) == pytest.approx(expected, rel=1e-12)


def test_mean_iou_has_its_limits():
    truth = np.random.default_rng(0).integers(0, 3, (2, 5, 5))
    assert mean_iou(*confusion_counts(truth, truth, 3)) == 1
    assert mean_iou(*confusion_counts((truth + 1) % 3, truth, 3)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: confusion_counts(m, m[:, :1], 3), "must be .m, height, width. of one size"),
        (lambda m: confusion_counts(m + 3, m, 3), "predicted holds 3: labels must be 0 to num_classes - 1 = 2."),
        (lambda m: confusion_counts(m, m, 3, ignore_index=2), "ignore_index=2 must be none of the classes, 0 to 2"),
        (lambda m: confusion_counts(m, m - 1, 3), "truth holds -1: labels must be"),
        (lambda m: confusion_counts(m, m + 0.0, 3), "truth of dtype float64 must hold integers"),
        (lambda m: mean_iou(*confusion_counts(m, m + 255, 3)), "no class occurs in these images"),
        (lambda m: mean_iou(np.zeros(3), np.zeros(3)), r"must be \[m, C\]"),
    ],
)
def test_impossible_masks_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 3, 4), dtype=np.int64))


# ---- boxes ----------------------------------------------------------------------------------------------------------


def test_planted_boxes_are_found_and_shuffled_boxes_give_what_the_mean_box_gives():
    x, _, boxes = scenes(1000)
    predicted = predict_boxes(x[:600], boxes[:600], x[600:])
    assert predicted.dtype == np.float64
    mean_box = np.tile(boxes[:600].mean(axis=0), (400, 1))
    baseline = box_iou(mean_box, boxes[600:]).mean()
    assert box_iou(predicted, boxes[600:]).mean() > baseline + 0.2
    shuffled = predict_boxes(x[:600], np.random.default_rng(1).permutation(boxes[:600]), x[600:])
    assert box_iou(shuffled, boxes[600:]).mean() < baseline + 0.03


def test_it_is_ridge_regression_on_means_of_cells_put_in_order_and_cut_to_the_picture():
    x, _, boxes = scenes(60)
    x = x[:, :, :, :2]
    # 8 x 6 patches in 4 x 4 cells: rows in pairs; columns 0-1, 1-2, 3-4, 4-5 (a middle one is shared).
    cells = np.stack(
        [
            x[:, 2 * row : 2 * row + 2, columns].mean(axis=(1, 2))
            for row in range(4)
            for columns in (slice(0, 2), slice(1, 3), slice(3, 5), slice(4, 6))
        ],
        axis=1,
    ).reshape(60, -1)
    edges = predict_ridge(cells[:40], boxes[:40], cells[40:], seed=3)
    expected = np.clip(
        np.stack(
            [
                np.minimum(edges[:, 0], edges[:, 2]),
                np.minimum(edges[:, 1], edges[:, 3]),
                np.maximum(edges[:, 0], edges[:, 2]),
                np.maximum(edges[:, 1], edges[:, 3]),
            ],
            1,
        ),
        0,
        1,
    )
    np.testing.assert_allclose(predict_boxes(x[:40], boxes[:40], x[40:], seed=3), expected, atol=1e-5)


def test_regressions_that_leave_the_picture_or_turn_round_become_boxes(monkeypatch):
    x, _, boxes = scenes(10)
    monkeypatch.setattr(dense, "predict_ridge", lambda *_, **__: np.array([[-0.5, 0.9, 1.5, 0.2], [0.6, -2, 0.4, -1]]))
    np.testing.assert_array_equal(predict_boxes(x, boxes, x[:2]), [[0, 0.2, 1, 0.9], [0.4, 0, 0.6, 0]])


def test_a_grid_smaller_than_four_cells_a_side_is_taken_as_it_is():
    x, _, boxes = scenes(30)
    small = x[:, :3, :2]
    np.testing.assert_array_equal(dense._cells(small), small.reshape(30, -1))
    assert predict_boxes(small, boxes, small).shape == (30, 4)


def test_boxes_of_half_precision_and_of_single_images_are_the_same():
    x, _, boxes = scenes(60)
    x = x.astype(np.float16)
    together = predict_boxes(x[:40], boxes[:40], x[40:])
    np.testing.assert_array_equal(together, predict_boxes(x[:40].astype(np.float32), boxes[:40], x[40:]))
    np.testing.assert_allclose(predict_boxes(x[:40], boxes[:40], x[50:51]), together[10:11], rtol=1e-9)


def test_iou_of_boxes_by_hand():
    truth = np.tile([0.2, 0.2, 0.6, 0.6], (6, 1))
    predicted = np.array(
        [
            [0.2, 0.2, 0.6, 0.6],  # equal
            [0.4, 0.2, 0.8, 0.6],  # half of each
            [0.3, 0.3, 0.5, 0.5],  # inside, a quarter
            [0.6, 0.2, 0.9, 0.6],  # side by side
            [0.7, 0.7, 0.9, 0.9],  # apart in both directions
            [0.4, 0.4, 0.4, 0.4],  # empty
        ]
    )
    np.testing.assert_allclose(box_iou(predicted, truth), [1, 1 / 3, 1 / 4, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(box_iou(truth[:3], predicted[:3]), [1, 1 / 3, 1 / 4], atol=1e-12)


def test_iou_of_boxes_equals_counting_pixels():
    generator = np.random.default_rng(0)
    corners = np.sort(generator.integers(0, 21, (2, 50, 2, 2)), axis=2).reshape(2, 50, 4)
    corners[..., 2:] += 1
    predicted, truth = corners / 21.0 * 21 / 22
    masks = np.zeros((2, 50, 22, 22), dtype=np.int64)
    for side in (0, 1):
        for image, (left, top, right, bottom) in enumerate(corners[side]):
            masks[side, image, top:bottom, left:right] = 1
    intersections, unions = confusion_counts(masks[0], masks[1], 2)
    np.testing.assert_allclose(box_iou(predicted, truth), intersections[:, 1] / unions[:, 1], rtol=1e-9)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([10, 10, 50, 50], r"train_boxes\[2\]=\[10.0, 10.0, 50.0, 50.0\] must be .* divide pixels by the width"),
        ([0.5, 0.1, 0.5, 0.3], r"left below right and top below bottom"),
        ([0.1, 0.5, 0.3, 0.4], r"left below right and top below bottom"),
        ([np.nan, 0.5, 0.3, 0.7], r"must hold finite numbers \[n, 4\]"),
    ],
)
def test_impossible_boxes_are_named(box: list, message: str):
    x, _, boxes = scenes(20)
    boxes[2] = box
    with pytest.raises(ValueError, match=message):
        predict_boxes(x, boxes, x)
    with pytest.raises(ValueError, match=message.replace("train_boxes", "truth")):
        box_iou(boxes, boxes)


def test_predicted_boxes_must_be_in_order_and_as_many_as_the_true_ones():
    truth = np.array([[0.1, 0.1, 0.5, 0.5]])
    with pytest.raises(ValueError, match="left <= right and top <= bottom"):
        box_iou(truth[:, [2, 1, 0, 3]], truth)
    with pytest.raises(ValueError, match=r"predicted of shape \(2, 4\) must have the shape of truth, \(1, 4\)"):
        box_iou(np.tile(truth, (2, 1)), truth)
    with pytest.raises(ValueError, match="train_boxes has 4 boxes: give at least 5"):
        predict_boxes(np.zeros((4, 2, 2, 3)), np.tile(truth, (4, 1)), np.zeros((2, 2, 2, 3)))
    with pytest.raises(ValueError, match=r"must hold finite numbers \[n, 4\]"):
        predict_boxes(np.zeros((20, 2, 2, 3)), np.zeros((20, 5)), np.zeros((2, 2, 2, 3)))
