"""Predicts quantities from frozen features by ridge regression, and cuts quantities into bins.

Low-level properties (how many objects, how far the nearest one) are the paper's second use of a frozen encoder. Its
table is of accuracies: the number of objects is taken as a class, the distance is cut into six. So
`predict_linear(train_x, to_bins(distances, distance_bins(distances)), test_x)` is its kind of number, and
`predict_ridge`, judged by R2, is the number without the cutting.
"""

import logging

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ijepa_hf.evaluation.probes.checks import check_features, hold_out

logger = logging.getLogger(__name__)

# Penalties per training image, from strong to weak: scikit-learn's alpha is this times the number of images.
_PENALTIES = tuple(10.0**power for power in range(2, -7, -1))
_LEAST_IMAGES = 5  # four to fit and one to choose on
_MOST_COUNTS = 20  # different whole numbers that are classes of their own


def predict_ridge(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Predicts quantities of test images by a ridge regression on frozen features.

    Features are standardised with the deviation of the images that are fitted. The penalty of each target is chosen,
    by squared error, on a fifth of the *training* images (the strongest wins a tie); the regression is then fitted
    again on all of them. Targets do not influence each other. All is float64; where there are more columns than
    images, scikit-learn solves through the images' inner products.

    Memory: float64 copies of both arrays and a square matrix of min(n_train, D) rows.

    Args:
        train_x: [n_train, D] features, finite; n_train at least 5.
        train_y: [n_train] or [n_train, T] quantities, finite.
        test_x: [n_test, D] features, finite.
        seed: of the split that chooses the penalty.

    Returns:
        float64 [n_test] or [n_test, T], not cut to the range of the training quantities.

    Raises:
        ValueError: fewer than five training images, quantities that are no finite numbers, shapes that do not agree,
            or features that are not finite.

    Source: ridge regression as of Hoerl and Kennard (Technometrics 12, 1970).
    """
    check_features(train_x, train_y, test_x)
    targets = _quantities("train_y", train_y, axes=(1, 2))
    if len(targets) < _LEAST_IMAGES:
        raise ValueError(f"train_y has {len(targets)} values: a ridge regression needs at least {_LEAST_IMAGES}.")
    columns = targets.reshape(len(targets), -1)
    features = np.asarray(train_x, dtype=np.float64)
    fit, held_out = hold_out(len(features), seed=seed)
    scaler = StandardScaler().fit(features[fit])
    fit_x, held_x = scaler.transform(features[fit]), scaler.transform(features[held_out])
    candidates = [Ridge(alpha=penalty * len(fit)).fit(fit_x, columns[fit]) for penalty in _PENALTIES]
    predictions = [each.predict(held_x).reshape(-1, columns.shape[1]) for each in candidates]
    errors = [((each - columns[held_out]) ** 2).mean(axis=0) for each in predictions]
    chosen = np.argmin(errors, axis=0)  # [T], the first of equals
    logger.info(
        "ridge regression: penalties per image %s were chosen on %d training images",
        [_PENALTIES[each] for each in chosen], len(held_out),
    )  # fmt: skip
    alphas = len(columns) * np.array(_PENALTIES)[chosen]
    probe = make_pipeline(StandardScaler(), Ridge(alpha=alphas)).fit(features, columns)
    return probe.predict(np.asarray(test_x, dtype=np.float64)).reshape(len(test_x), *targets.shape[1:])


def distance_bins(train_values: np.ndarray, num_bins: int = 6) -> np.ndarray:
    """Computes edges that cut a quantity into bins with the same number of training images, as far as ties allow.

    Args:
        train_values: [n] finite quantities of the training images.
        num_bins: 2 or more. VTAB, and the paper with it, cuts Clevr's distance into six.

    Returns:
        float64 [num_bins - 1], rising: the quantiles between the bins; the outer bins have no outer edge.

    Raises:
        ValueError: fewer than two bins, values that are no finite numbers, or so few different values that two edges
            would be equal.

    Source: the task of VTAB (arXiv 1910.04867), appendix A. Its edges are fixed for Clevr's own distances; quantiles
        of the training images take their place for other scenes.
    """
    values = _quantities("train_values", train_values, axes=(1,))
    if num_bins < 2:
        raise ValueError(f"num_bins={num_bins} must be at least 2.")
    edges = np.quantile(values, np.arange(1, num_bins) / num_bins)
    if np.any(np.diff(edges) <= 0) or edges[0] <= values.min():
        raise ValueError(
            f"train_values has {len(np.unique(values))} different values, too few or too unevenly spread for "
            f"num_bins={num_bins} bins: give fewer bins, or take the values themselves as classes."
        )
    return edges


def to_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Finds the bin of each quantity: the number of edges that it reaches.

    Args:
        values: quantities, finite, of any shape.
        edges: [num_bins - 1], rising, from `distance_bins`.

    Returns:
        int64, of the shape of `values`: 0 below the first edge, up to num_bins - 1 from the last edge on.

    Raises:
        ValueError: values or edges that are no finite numbers, or edges that do not rise.
    """
    values = _quantities("values", values, axes=None)
    edges = _quantities("edges", edges, axes=(1,))
    if np.any(np.diff(edges) <= 0):
        raise ValueError(f"edges={edges.tolist()} must rise: take them from distance_bins.")
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def numbers_as_classes(train_y: np.ndarray, test_y: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Turns numbers into classes: few whole ones are their own (test numbers are rounded), others are cut into bins.

    Args:
        train_y: [n] numbers of the training images.
        test_y: [m] numbers of the held-out images.

    Returns:
        Classes of both, int64, and a description of what a class is.

    Raises:
        ValueError: As `distance_bins`.
    """
    if (train_y == train_y.round()).all() and len(np.unique(train_y)) <= _MOST_COUNTS:
        return train_y.astype(np.int64), test_y.round().astype(np.int64), "its values"
    edges = distance_bins(train_y)
    return to_bins(train_y, edges), to_bins(test_y, edges), f"{len(edges) + 1} bins"


def _quantities(name: str, values: np.ndarray, *, axes: tuple[int, ...] | None) -> np.ndarray:
    """Returns quantities as float64; refuses what is not finite or has another number of axes."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.size == 0 or (axes is not None and array.ndim not in axes):
        raise ValueError(
            f"{name} of dtype {array.dtype} and shape {array.shape} must hold numbers"
            + (f" on {' or '.join(map(str, axes))} axes, at least one." if axes else ", at least one.")
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: leave these images out, or mend their values.")
    return array.astype(np.float64)
