"""Has the representation collapsed? Two numbers, each a pure function of a matrix of features.

Both take features [n, D], one row an image (or a patch), and need no labels. They see different failures:
`feature_std` falls to 0 when every row is the same vector; `rankme` falls to 1 when rows differ along one direction
only, however far. Neither sees an encoder that writes down *where* a patch is instead of what it shows; rows averaged
over an image's patches are safer there than rows of single patches.
"""

import torch

# The paper's epsilon, fit for float32. It keeps the logarithm finite, and lifts the result above its limit of 1 a
# little: by less than 0.2 % where min(n, D) is about a thousand.
_EPSILON = 1e-7


def rankme(features: torch.Tensor) -> float:
    """Effective rank of a feature matrix: the exponential of the entropy of its normalised singular values.

    Features are **not centred**, as in the paper: a common offset counts as one direction. So features that differ
    little from a large common vector score near 1, even where the small differences fill every direction.

    Limits: 1 when all rows are multiples of one vector (also when all are zero); min(n, D) when all singular values
    are equal, for example for orthonormal rows. Compare values at one n and D only, with n well above D.

    Args:
        features: [n, D], any floating dtype, n and D at least 1; computed in float32 (float64 stays float64).

    Returns:
        The effective rank, from 1 to min(n, D) (a little more by rounding).

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: Garrido et al., "RankMe" (arXiv 2210.02885), its definition with its epsilon of 1e-7; the measure itself
        is the effective rank of Roy and Vetterli (EUSIPCO 2007).
    """
    singular_values = torch.linalg.svdvals(_checked(features))
    total = singular_values.sum()
    if total == 0:
        return 1.0
    shares = singular_values / total + _EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: torch.Tensor) -> float:
    """Mean over the D dimensions of the standard deviation over the n rows.

    Limits: 0 when all rows are equal (complete collapse). Independent rows, each layer-normalised without affine, give
    about 1, and such rows can never give more.

    Args:
        features: [n, D], any floating dtype, n and D at least 1; computed in float32 (float64 stays float64).

    Returns:
        The mean standard deviation (over n, not n - 1), in the unit of the features.

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: Chen and He, "SimSiam" (arXiv 2011.10566), section 4.1, where 1 / sqrt(D) is the reference for unit-length
        rows; layer-normalised rows are longer by sqrt(D).
    """
    return float(_checked(features).std(dim=0, correction=0).mean())


def _checked(features: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"features of shape {tuple(features.shape)} and dtype {features.dtype} must be a floating matrix [n, D] "
            "with at least one row: flatten images and patches first, features.flatten(0, -2)."
        )
    features = features.detach()
    features = features if features.dtype == torch.float64 else features.float()
    finite = torch.isfinite(features)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {features.numel()} features are NaN or infinite.")
    return features
