"""Computes numbers that show whether representations have collapsed; no labels are needed.

Rows are images (pooled features) or patches. Three kinds of failure, and the numbers that show them:

- *complete*: every row is the same vector. `mean_pairwise_cosine` goes to 1, `normalized_std` and `feature_std` to 0.
- *dimensional*: rows differ, but along few directions. `rankme`, `effective_rank`, `lidar` and the stable rank go
  to 1, the slope of the spectrum grows, `dead_dimensions` counts. `measure_matrix` gives all that one matrix has.
- *positional*: patches encode where they are and not what they show. `position_share` goes to 1 and `cross_image_gap`
  to 0; all numbers above stay as in a healthy run, since places differ from each other in many directions.

Spectra are taken from the smaller of the two Gram matrices, [n, n] or [D, D], in float64: the squares of singular
values cost half the digits, which float64 can spare.
"""

import torch

# The paper's epsilon, fit for float32. It keeps the logarithm finite, and lifts the result above its limit of 1 a
# little: by less than 0.2 % where min(n, D) is about a thousand.
_EPSILON = 1e-7
_LIDAR_DELTA = 1e-4  # the paper's, added to the within-image covariance; of its mean variance here, so scale-free
_RELATIVE_ZERO = 1e-12  # an eigenvalue below this share of the largest is rounding
_DEAD_SHARE = 0.01  # of the root mean square of all dimensions' standard deviations


# -- complete collapse -----------------------------------------------------------------------------------------------


def mean_pairwise_cosine(features: torch.Tensor) -> float:
    """Computes the mean cosine between two different rows.

    Limits: 1 when all rows point the same way (complete collapse); 0 for independent rows in many dimensions, and
    -1 / (n - 1), the least there is, for rows that cancel out. A common offset raises it: 0.9 can be a healthy
    encoder's. If all rows are zero, they count as equal; single zero rows have the cosine 0 to all others.

    Args:
        features: [n, D], any floating dtype, n at least 2; computed in float32 (float64 stays float64).

    Returns:
        The mean of n (n - 1) cosines, -1 to 1.

    Raises:
        ValueError: not a floating [n, D] matrix, fewer than two rows, or values that are not finite.

    Source: the mean off-diagonal cosine, the usual sign of representations that degenerate into a cone; Ethayarajh
        2019 (arXiv 1909.00512), section 4.1.
    """
    features = _checked(features, least_rows=2)
    count = len(features)
    if not features.any():
        return 1.0
    units = torch.nn.functional.normalize(features, dim=1)
    itself = units.square().sum()  # n, less the rows that are zero
    return float((units.sum(dim=0).square().sum() - itself) / (count * (count - 1)))


def normalized_std(features: torch.Tensor) -> float:
    """Computes the mean over D dimensions of the standard deviation over rows of unit length, times sqrt(D).

    Limits: 0 when all rows are equal; about 1 for rows that point in all directions alike, and never more than 1.

    Args:
        features: [n, D], any floating dtype, n and D at least 1; computed in float32 (float64 stays float64).

    Returns:
        0 to 1.

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: Chen and He, "SimSiam" (arXiv 2011.10566), section 4.1.
    """
    units = torch.nn.functional.normalize(_checked(features), dim=1)
    return float(units.std(dim=0, correction=0).mean() * units.shape[1] ** 0.5)


def feature_std(features: torch.Tensor) -> float:
    """Computes the mean over D dimensions of the standard deviation over the n rows.

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


# -- dimensional collapse --------------------------------------------------------------------------------------------


def rankme(features: torch.Tensor) -> float:
    """Computes the effective rank of features: the exponential of the entropy of their normalised singular values.

    Features are **not centred**, as in the paper: a common offset counts as one direction. So features that differ
    little from a large common vector score near 1, even where the small differences fill every direction.

    Limits: 1 when all rows are multiples of one vector (also when all are zero); min(n, D) when all singular values
    are equal, for example for orthonormal rows. Compare values at one n and D only, with n well above D.

    Args:
        features: [n, D], any floating dtype, n and D at least 1.

    Returns:
        The effective rank, from 1 to min(n, D) (a little more by rounding).

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: Garrido et al., "RankMe" (arXiv 2210.02885), its definition with its epsilon of 1e-7; the measure itself
        is the effective rank of Roy and Vetterli (EUSIPCO 2007).
    """
    return _exponential_entropy(spectrum(features, center=False).sqrt())


def effective_rank(features: torch.Tensor) -> float:
    """Computes `rankme` of centred features: the number of directions in which rows differ.

    Limits: 1 when rows differ along one line only (also when they do not differ at all); min(n - 1, D) when they
    differ in all directions alike.

    Args:
        features: [n, D], any floating dtype, n and D at least 1.

    Returns:
        The effective rank, from 1.

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007), of the centred matrix.
    """
    return _exponential_entropy(spectrum(features).sqrt())


def lidar(views: torch.Tensor) -> float:
    """Computes the rank of what differs between images and stays under other masks of the same image.

    RankMe counts every direction; LiDAR counts those that vary more between images than between views of one image.

    Limits: 1 when images differ along one direction (or none); min(n - 1, D) when images differ in all directions
    alike. Where views of an image are all equal, it is the effective rank of the images' variances. Compare values at
    one n, V and D only.

    Args:
        views: [n, V, D], any floating dtype: V features of each of n images; n and V at least 2.

    Returns:
        The effective rank of the linear discriminant analysis whose classes are the images, from 1.

    Raises:
        ValueError: not a floating [n, V, D], fewer than two images or views, or values that are not finite.

    Source: Thilak et al., "LiDAR" (arXiv 2312.04000), section 4, with its delta of 1e-4 taken relative to the mean
        variance within images.
    """
    if views.ndim != 3 or min(views.shape[:2]) < 2:
        raise ValueError(f"views of shape {tuple(views.shape)} must be [n, V, D] with at least 2 images and 2 views.")
    _checked(views.flatten(0, 1))
    views = _in_float64(views.detach())
    centers = views.mean(dim=1)
    within = (views - centers[:, None]).flatten(0, 1)
    centers = centers - centers.mean(dim=0)
    covariance = within.T @ within / len(within)
    delta = _LIDAR_DELTA * covariance.diagonal().mean()
    if delta <= _RELATIVE_ZERO * centers.square().mean():  # views do not differ
        return _exponential_entropy(_gram_eigenvalues(centers))
    values, vectors = torch.linalg.eigh(covariance)
    whitened = centers @ vectors / (values.clamp_min(0) + delta).sqrt()
    return _exponential_entropy(_gram_eigenvalues(whitened))


def dead_dimensions(features: torch.Tensor) -> int:
    """Counts dimensions that do not vary: their standard deviation is below 1 % of the root mean square of all.

    Limits: 0 when all vary; D when no row differs from another.

    Args:
        features: [n, D], any floating dtype, n and D at least 1; computed in float32 (float64 stays float64).

    Returns:
        0 to D.

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.

    Source: counting constant dimensions is the plainest sign of dimensional collapse, as in Jing et al.
        (arXiv 2110.09348), section 3; the 1 % is this project's.
    """
    deviations = _checked(features).std(dim=0, correction=0)
    typical = deviations.square().mean().sqrt()
    return int((deviations < _DEAD_SHARE * typical).sum()) if typical > 0 else len(deviations)


# -- positional collapse ---------------------------------------------------------------------------------------------


def position_share(features: torch.Tensor, positions: torch.Tensor) -> float:
    """Computes the share of the patches' variance that their position alone explains.

    Limits: 0 when position explains nothing; 1 when patches at one place are equal in all images. The estimate has no
    bias from the number of images, so it can fall a little below 0. Where patches do not vary at all it is 0.

    Args:
        features: [n, D], a row a patch, any floating dtype.
        positions: int64 [n], the patches' places; some place must occur twice.

    Returns:
        About 0 to 1.

    Raises:
        ValueError: not a floating [n, D] matrix, values that are not finite, positions of another shape, or no place
            that occurs twice.

    Source: omega squared of a one-way analysis of variance (Hays, "Statistics", 1963), summed over the D dimensions;
        the failure is named in Darcet et al., "CAPI" (arXiv 2502.08769).
    """
    features = _in_float64(_checked(features))
    if positions.shape != (len(features),) or positions.dtype != torch.int64:
        raise ValueError(
            f"positions of shape {tuple(positions.shape)} and dtype {positions.dtype} must be int64 "
            f"[{len(features)}], one for each row of features."
        )
    places, groups, counts = positions.to(features.device).unique(return_inverse=True, return_counts=True)
    degrees = len(features) - len(places)
    if degrees < 1:
        raise ValueError(
            "no position occurs twice, so its share of the variance cannot be estimated; give more images."
        )
    features = features - features.mean(dim=0)
    sums = torch.zeros(len(places), features.shape[1], dtype=features.dtype, device=features.device)
    sums.index_add_(0, groups, features)
    total = features.square().sum()
    between = (sums.square().sum(dim=1) / counts).sum()
    within = (total - between).clamp_min(0) / degrees
    return float((between - (len(places) - 1) * within) / (total + within)) if total > 0 else 0.0


def cross_image_gap(predictions: torch.Tensor, targets: torch.Tensor, others: torch.Tensor) -> float:
    """Computes how much nearer predictions are to their own targets than to another image's at the same place.

    Limits: 0 when predictions do not depend on the image, however near to the targets they are; 1 - cos(targets,
    others) when they are perfect. Predictions that exaggerate the difference of two images have more.

    Args:
        predictions: [n, D], a row a predicted patch, any floating dtype.
        targets: [n, D], the patches' targets.
        others: [n, D], the targets of other images at the same places.

    Returns:
        Mean of cos(prediction, own target) - cos(prediction, other target), -2 to 2.

    Raises:
        ValueError: matrices that are not floating, of one shape, and finite.

    Source: this project; no loss, deviation or rank shows the same.
    """
    _check_same_shape(predictions, targets, others)
    predictions, targets, others = (_checked(matrix) for matrix in (predictions, targets, others))
    own = torch.nn.functional.cosine_similarity(predictions, targets, dim=1)
    other = torch.nn.functional.cosine_similarity(predictions, others, dim=1)
    return float((own - other).mean())


def residual_ratio(predictions: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor) -> float:
    """Computes how much predictions vary inside groups, relative to their targets.

    With places as groups, 0 means predictions that ignore the image; with images as groups, predictions that ignore
    the place. Good predictions have less than 1, since they leave out what cannot be predicted. Where targets do not
    vary inside groups it is 0.

    Args:
        predictions: [n, D], a row a predicted patch, any floating dtype.
        targets: [n, D], the patches' targets.
        groups: int64 [n], the group of each row.

    Returns:
        Root of the ratio of both sums of squared distances to the mean row of the group, 0 or more.

    Raises:
        ValueError: matrices that are not floating, of one shape, and finite, or groups of another shape.

    Source: this project; the sums are the residuals of a one-way analysis of variance.
    """
    _check_same_shape(predictions, targets)
    if groups.shape != (len(predictions),):
        raise ValueError(f"groups of shape {tuple(groups.shape)} must be [{len(predictions)}], one for each row.")
    _, codes, counts = groups.to(predictions.device).unique(return_inverse=True, return_counts=True)
    sums = []
    for features in (_checked(predictions), _checked(targets)):
        means = torch.zeros(len(counts), features.shape[1], dtype=features.dtype, device=features.device)
        means = means.index_add_(0, codes, features) / counts[:, None]
        sums.append((features - means[codes]).square().sum())
    return float((sums[0] / sums[1]).sqrt()) if sums[1] > 0 else 0.0


def prediction_skill(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    """Computes the share of the targets' variance that predictions explain, as R2 of a regression.

    Limits: 1 for perfect predictions; 0 for predicting the mean of all targets every time; below 0 for worse. Where
    targets do not vary it is 0.

    Args:
        predictions: [n, D], a row a predicted patch, any floating dtype.
        targets: [n, D], the patches' targets.

    Returns:
        1 or less.

    Raises:
        ValueError: matrices that are not floating, of one shape, and finite.

    Source: the coefficient of determination, its sums over rows and dimensions together.
    """
    _check_same_shape(predictions, targets)
    predictions, targets = _checked(predictions), _checked(targets)
    total = (targets - targets.mean(dim=0)).square().sum()
    return float(1 - (predictions - targets).square().sum() / total) if total > 0 else 0.0


# -- all of a matrix -------------------------------------------------------------------------------------------------


def measure_matrix(features: torch.Tensor) -> dict[str, float]:
    """Computes all numbers of a single matrix.

    Args:
        features: [n, D], any floating dtype, n at least 2.

    Returns:
        `cosine` (`mean_pairwise_cosine`), `normalized_std`, `rankme`, `effective_rank` and `dead_dimensions`, and of
        the centred rows: `stable_rank`, the total variance over the largest along one direction, from 1 (rows differ
        along one line, or not at all) to min(n - 1, D); `spectrum_slope`, alpha in variance_i ~ i ** -alpha, fitted
        through all variances above rounding: 0 for a flat spectrum, about 1 in the networks that generalise best.

    Raises:
        ValueError: not a floating [n, D] matrix, fewer than two rows, or values that are not finite.

    Source: stable rank: Rudelson and Vershynin 2007 (arXiv math/0503442), of the centred matrix. Slope: Agrawal et
        al., "alpha-ReQ" (arXiv 2202.05808), section 3; the law is Stringer et al. 2019's.
    """
    centred = spectrum(features)
    return {
        "cosine": mean_pairwise_cosine(features),
        "normalized_std": normalized_std(features),
        "rankme": rankme(features),
        "effective_rank": _exponential_entropy(centred.sqrt()),
        "stable_rank": _stable_rank(centred),
        "spectrum_slope": _slope(centred),
        "dead_dimensions": dead_dimensions(features),
    }


# -- inside ----------------------------------------------------------------------------------------------------------


def spectrum(features: torch.Tensor, *, center: bool = True) -> torch.Tensor:
    """Computes squared singular values of features, largest first; of centred features, n times the variances.

    Args:
        features: [n, D], any floating dtype, n and D at least 1.
        center: whether to subtract the mean row first.

    Returns:
        float64 [min(n, D)], 0 or more.

    Raises:
        ValueError: not a floating [n, D] matrix, empty, or with values that are not finite.
    """
    features = _in_float64(_checked(features))
    return _gram_eigenvalues(features - features.mean(dim=0) if center else features)


def _gram_eigenvalues(features: torch.Tensor) -> torch.Tensor:
    gram = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def _stable_rank(values: torch.Tensor) -> float:
    return float(values.sum() / values[0]) if values[0] > 0 else 1.0


def _slope(values: torch.Tensor) -> float:
    values = values[values > _RELATIVE_ZERO * values[0]]
    if len(values) < 2:
        return 0.0
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).log()
    heights = values.log()
    places, heights = places - places.mean(), heights - heights.mean()
    return float(-(places @ heights) / (places @ places))


def _exponential_entropy(values: torch.Tensor) -> float:
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total + _EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def _in_float64(features: torch.Tensor) -> torch.Tensor:
    # Apple's GPUs have no float64
    return (features.cpu() if features.device.type == "mps" else features).double()


def _check_same_shape(*matrices: torch.Tensor) -> None:
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if len(set(shapes)) > 1:
        raise ValueError(f"predictions and targets of shapes {shapes} must have one shape, [n, D].")


def _checked(features: torch.Tensor, least_rows: int = 1) -> torch.Tensor:
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"features of shape {tuple(features.shape)} and dtype {features.dtype} must be a floating matrix [n, D] "
            "with at least one row: flatten images and patches first, features.flatten(0, -2)."
        )
    if len(features) < least_rows:
        raise ValueError(f"features of shape {tuple(features.shape)} must have at least {least_rows} rows.")
    features = features.detach()
    features = features if features.dtype == torch.float64 else features.float()
    finite = torch.isfinite(features)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {features.numel()} features are NaN or infinite.")
    return features
