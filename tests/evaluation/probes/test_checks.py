"""What the probes refuse, and the part of train that choices are made on."""

import numpy as np
import pytest

from ijepa_hf.evaluation.probes.checks import (
    ProbeTraining,
    check_classes,
    check_features,
    check_test_labels,
    hold_out,
    in_pieces,
)


def test_a_fifth_is_held_out_in_the_proportion_of_the_classes():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    fit, held_out = hold_out(100, seed=0, labels=labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), np.arange(100))
    for seed in range(5):
        np.testing.assert_array_equal(np.bincount(labels[hold_out(100, seed=seed, labels=labels)[1]]), [10, 6, 4])
    np.testing.assert_array_equal(held_out, np.sort(held_out))
    np.testing.assert_array_equal(hold_out(100, seed=0, labels=labels)[1], held_out)
    assert not np.array_equal(hold_out(100, seed=1, labels=labels)[1], held_out)


@pytest.mark.parametrize("labels", [np.repeat([0, 1], [99, 1]), np.repeat(np.arange(50), 2), None])
def test_classes_are_ignored_where_they_cannot_all_be_in_both_parts(labels):
    fit, held_out = hold_out(100, seed=0, labels=labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), np.arange(100))
    assert len(held_out) == 20


def test_a_single_image_cannot_be_split():
    with pytest.raises(ValueError, match="1 training image cannot be split to choose a setting: take at least 2"):
        hold_out(1, seed=0)


@pytest.mark.parametrize(("shape", "numbers"), [((10, 3), 7), ((10, 3), 1), ((10,), 4), ((3, 2, 2), 1000)])
def test_pieces_cover_all_rows_in_order_and_are_no_larger_than_asked(shape: tuple[int, ...], numbers: int):
    array = np.arange(np.prod(shape)).reshape(shape)
    pieces = [array[rows] for rows in in_pieces(array, numbers)]
    np.testing.assert_array_equal(np.concatenate(pieces), array)
    assert max(piece.size for piece in pieces) <= max(numbers, array[0].size)


def test_what_is_not_finite_is_found_in_the_last_row_of_many_and_in_half_precision():
    features = np.zeros((300_000, 16), dtype=np.float16)
    features[-1, -1] = np.inf
    good = np.zeros((2, 16))
    with pytest.raises(ValueError, match="train_x holds NaN or infinity"):
        check_features(features, np.zeros(300_000), good)
    with pytest.raises(ValueError, match="test_x holds NaN or infinity"):
        check_features(good, np.zeros(2), features)


@pytest.mark.parametrize(
    ("train_x", "train_y", "test_x", "message"),
    [
        (np.zeros((4, 2, 3)), np.zeros(4), np.zeros((4, 3, 3)), "train_x has 2 x 3 N x D and test_x has 3 x 3"),
        (np.zeros((4, 3)), np.zeros(4), np.zeros((4, 2, 3)), r"train_x of shape \(4, 3\) must be \[n, N, D\]"),
        (np.zeros((4, 2, 0)), np.zeros(4), np.zeros((4, 2, 0)), "no axis empty"),
        (np.full((4, 2, 3), "a"), np.zeros(4), np.zeros((4, 2, 3)), "train_x of dtype <U1 must hold real numbers"),
        (np.zeros((4, 2, 3)), np.float64(0), np.zeros((4, 2, 3)), "must have the same n"),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(train_x, train_y, test_x, message: str):
    with pytest.raises(ValueError, match=message):
        check_features(train_x, train_y, test_x, layout="n, N, D")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((3, 1)), r"train_y of shape \(3, 1\) must be \[n\]: one label for each image"),
        (np.array([0.0, 1.0, np.nan]), "train_y holds NaN or infinity: every training image needs a label"),
        (np.array(["a", "a"]), "2 labels of 1 classes: a probe needs at least 5 labels of at least 2 classes"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        check_classes(labels, 5)


def test_test_labels_must_be_as_many_as_test_images():
    check_test_labels(np.zeros((3, 2)), np.zeros(3))
    for wrong in (np.zeros(2), np.zeros((3, 1))):
        with pytest.raises(ValueError, match="must have the same n, and test_y one axis"):
            check_test_labels(np.zeros((3, 2)), wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0 and batch_size=64 must be at least 1"),
        ({"learning_rates": (-1.0,)}, r"learning_rates=\(-1.0,\) must hold one or more numbers above 0"),
        ({"learning_rates": ()}, r"learning_rates=\(\) must hold"),
        ({"weight_decays": (-0.1,)}, r"weight_decays=\(-0.1,\) must hold one or more numbers of 0 or more"),
    ],
)
def test_a_training_that_cannot_be_is_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ProbeTraining(**{"epochs": 20, "batch_size": 64, "learning_rates": (1e-3,), **change})
