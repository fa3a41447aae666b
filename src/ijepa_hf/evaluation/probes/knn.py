"""Classifies by the weighted vote of the nearest neighbours: no training, no choice to tune, seconds to run."""

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from ijepa_hf.evaluation.probes.checks import check_classes, check_features, check_test_labels, share_correct


def predict_knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Predicts the label that wins the vote of each test image's k nearest training images.

    Nearness is cosine similarity s; each neighbour votes for its label with weight exp(s / temperature), and of labels
    with equal votes the lowest wins. A row of zeros has similarity 0 to all but other rows of zeros. Of training
    images that are equally near, as copies of one image are, scikit-learn decides which count. Similarities are
    computed in blocks: those of all pairs are never in memory together.

    float64 features are compared in float64. Others are brought to length 1 in float32, so that similarities closer
    than about 1e-7 (of an encoder that has all but collapsed) are not told apart: pass float64 there.

    Args:
        train_x: [n_train, D] features, finite.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        k: number of neighbours, 1 to n_train. The default suits small sets; papers on ImageNet use 20 or 200.
        temperature: above 0; towards 0 only the nearest counts, towards infinity all k count alike.

    Returns:
        [n_test] labels, of `train_y`'s dtype.

    Raises:
        ValueError: `k` outside 1 to n_train, `temperature` not above 0, a single class, shapes that do not agree, or
            features that are not finite.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978),
        section 3.4, with its temperature of 0.07.
    """
    check_features(train_x, train_y, test_x)
    check_classes(train_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(
            f"k={k} must be from 1 to the number of training images, {len(train_x)}: give a smaller k or more images."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0, for example 0.07.")
    labels, codes = np.unique(train_y, return_inverse=True)
    nearest = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(_unit(train_x))
    distances, neighbours = nearest.kneighbors(_unit(test_x))
    similarities = 1 - np.square(distances, dtype=np.float64) / 2
    # Relative to the nearest: the same winner, and exp() cannot overflow at a small temperature.
    weights = np.exp((similarities - similarities[:, :1]) / temperature)
    votes = np.zeros((len(test_x), len(labels)))
    np.add.at(votes, (np.arange(len(test_x))[:, None], codes[neighbours]), weights)
    return labels[votes.argmax(axis=1)]


def knn_accuracy(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Computes the share of test images that `predict_knn` gets right.

    Args:
        train_x: [n_train, D] features, finite.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        test_y: [n_test] labels; one that `train_y` lacks counts as wrong.
        k: number of neighbours, 1 to n_train.
        temperature: above 0.

    Returns:
        Top-1 accuracy, 0 to 1.

    Raises:
        ValueError: as `predict_knn`, and for test labels of another number than test images.
    """
    check_test_labels(test_x, test_y)
    return share_correct(predict_knn(train_x, train_y, test_x, k=k, temperature=temperature), test_y)


def _unit(x: np.ndarray) -> np.ndarray:
    """Returns rows of length 1; a further column keeps rows of zeros apart from all but each other."""
    array = np.asarray(x)
    unit = np.zeros((len(array), array.shape[1] + 1), np.float64 if array.dtype == np.float64 else np.float32)
    unit[:, :-1] = array
    normalize(unit, copy=False)
    unit[~unit.any(axis=1), -1] = 1
    return unit
