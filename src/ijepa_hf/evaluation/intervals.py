"""Computes the 95 % interval of a score, by the bootstrap over test images.

Test images are drawn again, with replacement, many times; the score of each draw is computed, and the middle 95 % of
these scores is the interval. It shows how much the score would change with other test images of the same kind. It does
not show how much it would change with another training seed or other training images.

A draw is a row of weights: how often each image was drawn. So any score that is a function of sums over images, such
as an accuracy, an R2 or a mean IoU, is computed for many draws by one matrix product.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
_LEVELS = (2.5, 97.5)  # percent
_WEIGHTS_AT_ONCE = 2**22  # 32 MiB


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], num_images: int, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Computes the 95 % percentile bootstrap interval of a score over test images.

    Two scores with one `num_images` and `seed` are given the same draws, so their intervals can be compared.

    Args:
        statistic: The score, for many draws at once: takes float64 `[R, num_images]`, how often each image was drawn
            (each row sums to `num_images`), and returns `[R]`.
        num_images: Test images, at least 1. With one image the interval is a point.
        seed: Of the draws, at least 0.
        resamples: Draws, at least 40, so that 2.5 % of them is one.

    Returns:
        Lower and upper end, in the unit of the score.

    Raises:
        ValueError: If a number is too small, or the score of a draw is not finite.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; Efron and Tibshirani 1993, "An
        introduction to the bootstrap", chapter 13 (percentile interval).
    """
    for name, value, least in (("num_images", num_images, 1), ("seed", seed, 0), ("resamples", resamples, 40)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, num_images])))
    scores: list[np.ndarray] = []
    for start in range(0, resamples, step := max(1, _WEIGHTS_AT_ONCE // num_images)):
        draws = min(step, resamples - start)
        weights = np.empty((draws, num_images))
        for row in weights:
            row[:] = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        found = np.asarray(statistic(weights), dtype=np.float64)
        if found.shape != (draws,) or not np.isfinite(found).all():
            raise ValueError(
                f"statistic gave an array of shape {found.shape} with {int((~np.isfinite(found)).sum())} values that "
                f"are not finite; it must give {draws} finite scores. Are there too few test images for it?"
            )
        scores.append(found)
    low, high = np.percentile(np.concatenate(scores), _LEVELS)
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Computes the 95 % interval of a mean over test images, such as an accuracy or a mean IoU of boxes.

    Args:
        values: `[n]`, one number (or truth value) an image, finite; n at least 1.
        seed: See `bootstrap_interval`.
        resamples: See `bootstrap_interval`.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: If `values` is no vector of finite numbers.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape} must be [n] and finite, one for each test image.")
    return bootstrap_interval(lambda weights: weights @ values / len(values), len(values), seed, resamples)
