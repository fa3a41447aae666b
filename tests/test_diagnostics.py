"""Collapse metrics against numpy in float64, and at their limits."""

import math

import numpy as np
import pytest
import torch

from ijepa_hf.diagnostics import feature_std, rankme


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


@pytest.mark.parametrize("metric", [rankme, feature_std])
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
