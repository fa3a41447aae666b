"""Weighted k-nearest-neighbour accuracy of frozen features: no training, no choice to tune, seconds to run."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 20  # of the papers' two usual numbers, 20 and 200, the one that fits small sets


def knn_accuracy(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    k: int = NEIGHBOURS,
    temperature: float = 0.07,
) -> float:
    """Share of test images whose label wins the vote of their k nearest training images.

    Nearness is cosine similarity s; each neighbour votes for its label with weight exp(s / temperature). A tie of
    votes goes to the lowest label. Where training images tie for the k-th place, scikit-learn's selection decides (the
    same data in the same order always give the same answer).

    Args:
        train_x: [n_train, D] features, finite.
        train_y: [n_train] labels.
        test_x: [n_test, D] features, finite.
        test_y: [n_test] labels; one that `train_y` lacks counts as wrong.
        k: number of neighbours, 1 to n_train. The default suits small sets; papers on ImageNet use 20 or 200.
        temperature: above 0; towards 0 only the nearest counts, towards infinity all k count alike.

    Returns:
        Top-1 accuracy, 0 to 1.

    Raises:
        ValueError: `k` outside 1 to n_train, `temperature` not above 0, shapes that do not agree, or features that are
            not finite.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978),
        section 3.4, with its temperature of 0.07.
    """
    check_split(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k={k} must be from 1 to the number of training images, {len(train_x)}.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0, for example 0.07.")
    labels, train_codes = np.unique(train_y, return_inverse=True)
    distances, neighbours = NearestNeighbors(n_neighbors=k, metric="cosine").fit(train_x).kneighbors(test_x)
    # Relative to the nearest: the same winner, and exp() cannot overflow at a small temperature.
    weights = np.exp((distances[:, :1] - distances) / temperature)
    votes = np.zeros((len(test_x), len(labels)))
    np.add.at(votes, (np.arange(len(test_x))[:, None], train_codes[neighbours]), weights)
    return float(np.mean(labels[votes.argmax(axis=1)] == np.asarray(test_y)))


def check_split(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> None:
    """Refuse features and labels that do not belong together, and features that are not finite.

    Args:
        train_x: [n_train, D] features.
        train_y: [n_train] labels.
        test_x: [n_test, D] features.
        test_y: [n_test] labels.

    Raises:
        ValueError: an empty half, a number of labels other than that of its rows, NaN or infinity, or two widths D.
    """
    for name, features, labels in (("train", train_x, train_y), ("test", test_x, test_y)):
        if np.ndim(features) != 2 or len(features) == 0 or np.shape(labels) != (len(features),):
            raise ValueError(
                f"{name}_x of shape {np.shape(features)} and {name}_y of shape {np.shape(labels)} must be [n, D] and "
                "[n], with n at least 1."
            )
        if not np.isfinite(features).all():
            raise ValueError(f"{name}_x holds NaN or infinity: the encoder's output is broken, or its input was.")
    if np.shape(train_x)[1] != np.shape(test_x)[1]:
        raise ValueError(
            f"train_x has {np.shape(train_x)[1]} columns and test_x has {np.shape(test_x)[1]}: they must come from "
            "the same encoder."
        )
