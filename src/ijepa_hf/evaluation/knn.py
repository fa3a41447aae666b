"""Weighted k-nearest-neighbour accuracy of frozen features: no training, no choice to tune, seconds to run.

The similarities of all pairs are never in memory together. A float32 product of one block finds more candidates than
are needed; their similarities are then computed again in float64, and the candidates ranked. Where float32 cannot tell
whether a candidate was missed, the row is compared with every training image in float64.
"""

import numpy as np
import torch
from torch import Tensor

from ijepa_hf.evaluation.splits import check_classes, check_features, check_test_labels, in_pieces, share_correct

NEIGHBOURS = 20  # of the papers' two usual numbers, 20 and 200, the one that fits small sets

_TEST_BLOCK, _TRAIN_BLOCK = 512, 16384  # 34 MB of float32 similarities
_NUMBERS_AT_ONCE = 2**22  # of every other temporary array; 34 MB in float64
_SPARE_CANDIDATES = 16
_FLOAT32_ERROR = 1e-5  # of a similarity; measured below 1e-6 for 5120 columns
_DECIMALS = 9  # similarities that agree to so many are equal


def predict_knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    k: int = NEIGHBOURS,
    temperature: float = 0.07,
) -> np.ndarray:
    """The label that wins the vote of each test image's k nearest training images.

    Nearness is cosine similarity s; each neighbour votes for its label with weight exp(s / temperature). Ties are
    decided, not left to chance: similarities that agree to 9 decimals are equal, and of equally near training images
    the first in order are taken; of labels with equal votes the lowest wins. A row of zeros has similarity 0 to
    everything. So an image's label does not depend on the other test images, and depends on the order of the training
    images only where they tie.

    Besides one float32 copy of each of the two arrays, temporary arrays take some 200 MB at most, however many images
    there are.

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
    train_x, test_x = np.asarray(train_x), np.asarray(test_x)
    similarities, neighbours = _nearest(train_x, test_x, k)
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
    k: int = NEIGHBOURS,
    temperature: float = 0.07,
) -> float:
    """Share of test images whose label wins the vote of their k nearest training images: see `predict_knn`.

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


def _nearest(train: np.ndarray, test: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded similarities [n_test, k], falling, and rows of the training images, equal ones in rising order."""
    wanted = min(k + max(k // 4, _SPARE_CANDIDATES), len(train))
    lengths = _lengths(train), _lengths(test)
    train_unit, test_unit = _unit(train, lengths[0]), _unit(test, lengths[1])
    similarities, neighbours = np.empty((len(test), k)), np.empty((len(test), k), dtype=np.int64)
    for start in range(0, len(test), _TEST_BLOCK):
        rough, candidates = _candidates(train_unit, test_unit[start : start + _TEST_BLOCK], wanted)
        # A training image that is no candidate is at most as near as the last one, give or take the error.
        certain = rough[:, k - 1] - rough[:, -1] > 2 * _FLOAT32_ERROR if wanted < len(train) else rough[:, 0] > -2
        for rows, exact in ((np.flatnonzero(certain), False), (np.flatnonzero(~certain), True)):
            width = len(train) if exact else wanted * train.shape[1]
            for some in np.array_split(rows, max(1, -(-len(rows) * width // _NUMBERS_AT_ONCE))):
                if len(some) == 0:
                    continue
                at = start + some
                queries = _divide(test[at], lengths[1][at])
                if exact:
                    cosine, near = _all_cosines(train, lengths[0], queries), None
                else:
                    near = np.sort(candidates[some], axis=1)  # so that a stable order is that of the training images
                    cosine = np.einsum("qd,qnd->qn", queries, train[near].astype(np.float64)) / lengths[0][near]
                cosine = cosine.round(_DECIMALS)
                order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
                similarities[at] = np.take_along_axis(cosine, order, axis=1)
                neighbours[at] = order if near is None else np.take_along_axis(near, order, axis=1)
    return similarities, neighbours


def _candidates(train_unit: Tensor, test_unit: Tensor, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 similarities of the `wanted` nearest, falling, and their rows, merged block by block."""
    best = test_unit.new_empty((len(test_unit), 0))
    rows = torch.empty((len(test_unit), 0), dtype=torch.int64)
    for start in range(0, len(train_unit), _TRAIN_BLOCK):
        block = test_unit @ train_unit[start : start + _TRAIN_BLOCK].T
        near, at = block.topk(min(wanted, block.shape[1]), dim=1)
        best, rows = torch.cat([best, near], dim=1), torch.cat([rows, at + start], dim=1)
        best, order = best.topk(min(wanted, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best.numpy(), rows.numpy()


def _all_cosines(train: np.ndarray, lengths: np.ndarray, queries: np.ndarray) -> np.ndarray:
    pieces = [queries @ _divide(train[rows], lengths[rows]).T for rows in in_pieces(train, _NUMBERS_AT_ONCE)]
    return np.concatenate(pieces, axis=1)


def _lengths(x: np.ndarray) -> np.ndarray:
    """Float64 norms of the rows, 1 for a row of zeros, which then has cosine 0 with everything."""
    norms = [np.linalg.norm(x[rows].astype(np.float64), axis=1) for rows in in_pieces(x, _NUMBERS_AT_ONCE)]
    lengths = np.concatenate(norms)
    return np.where(lengths == 0, 1, lengths)


def _divide(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows.astype(np.float64) / lengths[..., None]


def _unit(x: np.ndarray, lengths: np.ndarray) -> Tensor:
    unit = np.empty(x.shape, dtype=np.float32)
    for rows in in_pieces(x, _NUMBERS_AT_ONCE):
        unit[rows] = _divide(x[rows], lengths[rows])
    return torch.from_numpy(unit)
