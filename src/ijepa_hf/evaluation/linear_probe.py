"""Linear probe: logistic regression on frozen features, its one choice made without the test half."""

import math

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ijepa_hf.evaluation.knn import check_split

# Inverse strengths of the L2 penalty (scikit-learn's C). On digits, raw or encoded, the best is 0.1 or 1.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_VALIDATION_SHARE = 0.2
_MAX_ITERATIONS = 5000


def linear_accuracy(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, seed: int = 0
) -> float:
    """Share of test images that a linear classifier, trained on frozen features, gets right.

    Features are standardised with the training images' mean and deviation. The L2 penalty is chosen from six strengths
    on a fifth of the *training* images (drawn by class where every class has two or more; the strongest penalty wins a
    tie); the classifier is then fitted again on all of them. Test features and labels are used for counting only. The
    fits run to convergence in float64; should one not converge, scikit-learn's ConvergenceWarning reaches the caller.

    Args:
        train_x: [n_train, D] features, finite; n_train at least 5.
        train_y: [n_train] labels of two classes or more.
        test_x: [n_test, D] features, finite.
        test_y: [n_test] labels; one that `train_y` lacks counts as wrong.
        seed: of the split that chooses the penalty.

    Returns:
        Top-1 accuracy, 0 to 1.

    Raises:
        ValueError: fewer than five training images or two classes, shapes that do not agree, or features that are not
            finite.

    Source: the linear protocol of the paper (arXiv 2301.08243), appendix A.2, with a convex solver in place of SGD.
    """
    check_split(train_x, train_y, test_x, test_y)
    labels, counts = np.unique(train_y, return_counts=True)
    if len(train_x) < 5 or len(labels) < 2:
        raise ValueError(
            f"train_y has {len(train_x)} labels of {len(labels)} classes: a linear probe needs at least 5 labels of "
            "at least 2 classes."
        )
    train_x, test_x = np.asarray(train_x, dtype=np.float64), np.asarray(test_x, dtype=np.float64)
    by_class = counts.min() >= 2 and math.ceil(_VALIDATION_SHARE * len(train_x)) >= len(labels)
    fit_x, validation_x, fit_y, validation_y = train_test_split(
        train_x,
        train_y,
        test_size=_VALIDATION_SHARE,
        random_state=seed,
        stratify=train_y if by_class else None,
    )
    # max() keeps the first of equals, and the penalties run from strong to weak.
    best = max(_PENALTIES, key=lambda penalty: _probe(penalty).fit(fit_x, fit_y).score(validation_x, validation_y))
    return float(_probe(best).fit(train_x, train_y).score(test_x, test_y))


def _probe(inverse_penalty: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=_MAX_ITERATIONS))
