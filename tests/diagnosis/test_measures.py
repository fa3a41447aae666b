"""Collapse metrics against numpy in float64, and at their limits."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.metrics import r2_score

from ijepa_hf.diagnosis.measures import (
    cross_image_gap,
    dead_dimensions,
    effective_rank,
    feature_std,
    lidar,
    mean_pairwise_cosine,
    measure_matrix,
    normalized_std,
    position_share,
    prediction_skill,
    rankme,
    residual_ratio,
    spectrum,
)


def gaussian(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, width)))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rankme_equals_its_definition(shape: tuple[int, int], dtype: torch.dtype):
    features = gaussian(*shape) * torch.logspace(0, -3, shape[1], dtype=torch.float64) + 0.3
    gram = features.numpy().T @ features.numpy()
    singular_values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = singular_values / singular_values.sum()
    shares = shares[shares > 1e-9]
    expected = math.exp(-(shares * np.log(shares)).sum())  # Roy and Vetterli's, without the epsilon
    assert rankme(features.to(dtype)) == pytest.approx(expected, rel=2e-5)


def test_rankme_is_one_when_rows_are_multiples_of_one_vector():
    direction = gaussian(1, 64)
    assert rankme(gaussian(100, 1) * direction) == pytest.approx(1, abs=2e-4)
    assert rankme(torch.ones(100, 64)) == pytest.approx(1, abs=2e-4)
    assert rankme(torch.zeros(100, 64)) == 1


@pytest.mark.parametrize(("n", "width"), [(64, 16), (16, 64), (1, 5), (5, 1)])
def test_rankme_is_the_smaller_side_when_all_directions_are_equal(n: int, width: int):
    orthonormal = torch.linalg.qr(gaussian(max(n, width), min(n, width)))[0]
    features = orthonormal if n >= width else orthonormal.T
    assert rankme(features) == pytest.approx(min(n, width), rel=1e-5)


def test_rankme_of_two_unequal_directions_is_the_closed_form():
    features = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rankme(features) == pytest.approx(expected, rel=1e-5)


def test_rankme_does_not_centre_nor_depend_on_scale_or_order():
    features = gaussian(200, 16)
    assert rankme(features) > 15
    assert rankme(features + 1000) < 1.1
    assert rankme(features * 1e4) == pytest.approx(rankme(features), rel=1e-9)
    assert rankme(features.flip(0)) == pytest.approx(rankme(features), rel=1e-9)


def test_feature_std_equals_numpy():
    features = gaussian(37, 5) * torch.arange(1, 6) + 7
    assert feature_std(features) == pytest.approx(features.numpy().std(axis=0).mean(), rel=1e-12)
    assert feature_std(features.bfloat16()) == pytest.approx(features.numpy().std(axis=0).mean(), rel=1e-2)


def test_feature_std_is_zero_on_collapse_and_one_for_independent_normalised_rows():
    assert feature_std(gaussian(1, 8).expand(20, 8)) == pytest.approx(0, abs=1e-12)
    assert feature_std(gaussian(1, 8)) == 0
    normalised = torch.nn.functional.layer_norm(gaussian(4000, 32), (32,))
    assert feature_std(normalised) == pytest.approx(1, abs=0.02)


def test_features_with_gradients_give_plain_floats():
    features = gaussian(9, 4).requires_grad_()
    assert isinstance(rankme(features), float)
    assert isinstance(feature_std(features), float)
    assert features.grad is None


# ---- complete collapse ----------------------------------------------------------------------------------------------


def test_mean_pairwise_cosine_is_the_mean_over_pairs():
    features = gaussian(13, 5) + 0.5
    rows = features.numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(rows, 2)]
    assert mean_pairwise_cosine(features) == pytest.approx(np.mean(cosines), rel=1e-9)
    assert mean_pairwise_cosine(features * 1e-3) == pytest.approx(np.mean(cosines), rel=1e-9)


def test_mean_pairwise_cosine_is_one_on_collapse_and_least_for_rows_that_cancel_out():
    assert mean_pairwise_cosine(gaussian(1, 8).expand(20, 8)) == pytest.approx(1, rel=1e-9)
    assert mean_pairwise_cosine(torch.zeros(3, 4)) == 1
    corners = torch.eye(4) - 0.25  # the corners of a regular simplex
    assert mean_pairwise_cosine(corners) == pytest.approx(-1 / 3, rel=1e-5)
    assert mean_pairwise_cosine(torch.eye(4)) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_pairwise_cosine(torch.ones(1, 4))


def test_normalized_std_is_zero_on_collapse_one_for_all_directions_and_has_no_scale():
    features = gaussian(3000, 24)
    assert normalized_std(gaussian(1, 8).expand(20, 8)) == pytest.approx(0, abs=1e-12)
    assert normalized_std(features) == pytest.approx(1, abs=0.01)
    assert normalized_std(7 * features) == pytest.approx(normalized_std(features), rel=1e-12)
    units = (features / features.norm(dim=1, keepdim=True)).numpy()
    assert normalized_std(features) == pytest.approx(units.std(axis=0).mean() * math.sqrt(24), rel=1e-12)


# ---- dimensional collapse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 7), (7, 60)])
def test_the_spectrum_and_ranks_of_centred_features_equal_those_of_an_svd(shape: tuple[int, int]):
    features = gaussian(*shape) * torch.logspace(0, -1, shape[1], dtype=torch.float64) + 5
    centred = features.numpy() - features.numpy().mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert spectrum(features).numpy() == pytest.approx(values**2, rel=1e-9, abs=1e-9)
    shares = values[values > 1e-9] / values.sum()
    assert effective_rank(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=2e-5)
    assert measure_matrix(features)["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)


def test_ranks_are_one_along_a_line_and_full_in_all_directions_alike_wherever_the_middle_is():
    line = gaussian(50, 1) * gaussian(1, 6, seed=1) + 3
    everywhere = torch.cat([torch.eye(6), -torch.eye(6)]) + 3
    for rank in ("effective_rank", "stable_rank"):
        assert measure_matrix(line)[rank] == pytest.approx(1, abs=1e-4)
        assert measure_matrix(everywhere)[rank] == pytest.approx(6, rel=1e-5)
        assert measure_matrix(torch.full((5, 6), 2.0))[rank] == 1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_the_spectrum_slope_is_the_exponent_of_a_power_law(alpha: float):
    directions = 40
    basis = torch.linalg.qr(torch.cat([torch.ones(200, 1), gaussian(200, directions)], dim=1))[0][:, 1:]  # centred
    scales = torch.arange(1, directions + 1, dtype=torch.float64) ** (-alpha / 2)
    turned = torch.linalg.qr(gaussian(directions, directions, seed=2))[0]
    assert measure_matrix(basis * scales @ turned)["spectrum_slope"] == pytest.approx(alpha, abs=1e-6)


def test_the_spectrum_slope_leaves_out_what_is_rounding():
    features = gaussian(100, 3) @ gaussian(3, 50, seed=1)
    square = gaussian(100, 3) @ torch.linalg.cholesky(gaussian(3, 50, seed=1) @ gaussian(3, 50, seed=1).T)
    slope, same, none = (measure_matrix(one)["spectrum_slope"] for one in (features, square, torch.ones(4, 4)))
    assert slope == pytest.approx(same, rel=1e-6)
    assert none == 0


def test_lidar_equals_the_generalised_eigenvalues_of_the_two_covariances():
    views = gaussian(30, 5)[:, None] * 2 + gaussian(90, 5, seed=1).reshape(30, 3, 5) * torch.logspace(
        0, -1, 5, dtype=torch.float64
    )
    centers = views.mean(dim=1).numpy()
    within = (views.numpy() - centers[:, None]).reshape(-1, 5)
    within = within.T @ within / len(within)
    centers = centers - centers.mean(axis=0)
    delta = 1e-4 * np.trace(within) / 5
    values = scipy.linalg.eigh(centers.T @ centers, within + delta * np.eye(5), eigvals_only=True)
    shares = values / values.sum()
    assert lidar(views) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def effective_rank_of_variances(features: torch.Tensor) -> float:
    variances = np.linalg.eigvalsh(np.cov(features.numpy().T))
    shares = variances / variances.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def test_all_numbers_of_a_matrix_are_those_of_the_single_functions():
    features = gaussian(40, 6) + 1
    measured = measure_matrix(features)
    assert measured == {
        "cosine": mean_pairwise_cosine(features),
        "normalized_std": normalized_std(features),
        "rankme": rankme(features),
        "effective_rank": effective_rank(features),
        "stable_rank": measured["stable_rank"],
        "spectrum_slope": measured["spectrum_slope"],
        "dead_dimensions": dead_dimensions(features),
    }


def test_lidar_counts_what_tells_images_apart_and_rankme_counts_all():
    images = torch.zeros(200, 1, 8, dtype=torch.float64)
    images[:, 0, :2] = gaussian(200, 2) * 10  # two directions of images, eight of views
    views = images + gaussian(800, 8, seed=1).reshape(200, 4, 8)
    noise = gaussian(800, 8, seed=1).reshape(200, 4, 8)
    assert 1.9 < lidar(views) < 3
    assert lidar(noise) > 6
    assert rankme(views.flatten(0, 1)) > 4
    assert lidar(torch.ones(5, 2, 3)) == 1
    alone = gaussian(30, 4)
    assert lidar(alone[:, None].repeat(1, 3, 1)) == pytest.approx(effective_rank_of_variances(alone), rel=1e-5)
    with pytest.raises(ValueError, match=r"at least 2 images and 2 views"):
        lidar(torch.ones(5, 1, 3))


def test_dead_dimensions_are_those_that_hardly_vary_beside_the_others():
    features = gaussian(100, 6) * torch.tensor([1, 1, 0.005, 0, 1, 1e-6]) + 4
    assert dead_dimensions(features) == 3
    assert dead_dimensions(features * 1e-6) == 3
    assert dead_dimensions(gaussian(100, 6)) == 0
    assert dead_dimensions(torch.ones(5, 6)) == 6


# ---- positional collapse --------------------------------------------------------------------------------------------


def test_position_share_is_omega_squared_of_a_one_way_analysis_of_variance():
    positions = torch.arange(7).repeat(9)[:60]  # groups of unequal size
    values = gaussian(60, 1) + positions[:, None] * 0.3
    groups = [values[positions == place, 0].numpy() for place in range(7)]
    statistic = scipy.stats.f_oneway(*groups).statistic
    assert position_share(values, positions) == pytest.approx(6 * (statistic - 1) / (6 * (statistic - 1) + 60))


def test_position_share_is_one_when_patches_only_know_their_place_and_nothing_when_place_says_nothing():
    positions = torch.arange(16).repeat(8)
    where, what = gaussian(16, 12)[positions], gaussian(128, 12, seed=1)
    assert position_share(where, positions) == pytest.approx(1, abs=1e-9)
    estimates = [position_share(gaussian(128, 12, seed=seed), positions) for seed in range(20)]
    assert np.mean(estimates) == pytest.approx(0, abs=0.01)  # without a bias, though there are 8 images only
    assert position_share(where + what, positions) == pytest.approx(0.5, abs=0.1)
    assert position_share(torch.ones(128, 12), positions) == 0


def test_ranks_do_not_see_what_position_share_sees():
    positions = torch.arange(64).repeat(16)
    where = gaussian(64, 12)[positions]
    assert rankme(where) > 11
    assert feature_std(where) > 0.9


@pytest.mark.parametrize("positions", [torch.arange(5), torch.arange(6.0), torch.zeros(2, 3, dtype=torch.int64)])
def test_positions_that_do_not_fit_the_rows_are_refused(positions: torch.Tensor):
    with pytest.raises(ValueError, match=r"must be int64 \[6\]"):
        position_share(gaussian(6, 2), positions)


def test_position_share_needs_a_place_that_occurs_twice():
    with pytest.raises(ValueError, match="no position occurs twice"):
        position_share(gaussian(6, 2), torch.arange(6))


def test_the_cross_image_gap_is_zero_without_the_image_and_its_most_for_perfect_predictions():
    where, own, other = gaussian(40, 8), gaussian(40, 8, seed=1), gaussian(40, 8, seed=2)
    targets, others = where + own, where + other
    products = (targets * others).sum(dim=1) / targets.norm(dim=1) / others.norm(dim=1)
    assert cross_image_gap(targets, targets, others) == pytest.approx(1 - float(products.mean()), rel=1e-6)
    assert cross_image_gap(where, targets, others) == pytest.approx(0, abs=0.08)
    corner, side = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    exaggerated = cross_image_gap(corner - side, corner, side)
    assert exaggerated == pytest.approx(math.sqrt(2))  # more than that of perfect predictions
    assert cross_image_gap(corner, corner, side) == pytest.approx(1)
    halfway = cross_image_gap(where + 0.5 * own, targets, others)
    assert 0.1 < halfway < cross_image_gap(targets, targets, others)


def test_prediction_skill_is_r2_weighted_by_variance():
    targets, noise = gaussian(50, 4) * torch.tensor([1.0, 2, 3, 4]), gaussian(50, 4, seed=1)
    expected = r2_score(targets.numpy(), (targets + noise).numpy(), multioutput="variance_weighted")
    assert prediction_skill(targets + noise, targets) == pytest.approx(expected, rel=1e-9)
    assert prediction_skill(targets, targets) == 1
    assert prediction_skill(targets.mean(dim=0).expand_as(targets), targets) == pytest.approx(0, abs=1e-12)
    assert prediction_skill(noise, torch.ones(50, 4, dtype=torch.float64)) == 0


def test_the_residual_ratio_is_what_is_left_inside_groups():
    groups = torch.tensor([3, 3, 3, 8, 8, 8, 8])
    targets, predictions = gaussian(7, 3), gaussian(7, 3, seed=1)

    def inside(matrix: torch.Tensor) -> float:
        return sum(float((matrix[groups == g] - matrix[groups == g].mean(dim=0)).square().sum()) for g in (3, 8))

    expected = math.sqrt(inside(predictions) / inside(targets))
    assert residual_ratio(predictions, targets, groups) == pytest.approx(expected, rel=1e-9)
    assert residual_ratio(groups[:, None] * torch.ones(7, 3), targets.float(), groups) == 0
    assert residual_ratio(targets / 2, targets, groups) == pytest.approx(0.5)


@pytest.mark.parametrize("compare", [prediction_skill, lambda a, b: cross_image_gap(a, b, b)])
def test_predictions_and_targets_of_two_shapes_are_refused(compare: Callable[..., float]):
    with pytest.raises(ValueError, match=r"must have one shape"):
        compare(gaussian(3, 4), gaussian(4, 4))


# ---- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [rankme, feature_std, normalized_std, effective_rank, dead_dimensions])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, 3, 4), r"shape \(2, 3, 4\) and dtype torch.float32 must be a floating matrix"),
        (torch.zeros(0, 4), "at least one row"),
        (torch.zeros(3, 4, dtype=torch.int64), "dtype torch.int64 must be a floating matrix"),
        (torch.tensor([[1.0, math.nan, math.inf]]), "2 of 3 features are NaN or infinite"),
    ],
)
def test_what_is_no_feature_matrix_is_refused(metric, features: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        metric(features)
