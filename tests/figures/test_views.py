"""What pictures show of a model, compared with features that were planted, and with the model's own loss."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from tiny import scrambled_model, tiny_batch, tiny_config
from torch import nn

from ijepa_hf.figures.views import (
    box_to_patches,
    cosine_map,
    differing_patches,
    error_map,
    expect_patches,
    find_nearest_images,
    find_nearest_patches,
    patch_colors,
)
from ijepa_hf.model.features import encode_patches, evaluating, prediction_errors, target_features
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.randomness import keyed_generator


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- features -------------------------------------------------------------------------------------------------------


def test_patches_are_those_of_the_encoder_in_their_places():
    model = scrambled_model(image_size=[16, 32])
    pixels = random(5, 3, 16, 32)
    with torch.no_grad():
        expected = model.target_encoder(pixels).last_hidden_state
    features = encode_patches(model.target_encoder, pixels, batch_size=2)
    assert features.shape == (5, 4, 8, 32)
    torch.testing.assert_close(features[3, 2, 5], expected[3, 2 * 8 + 5])


def test_colours_are_the_planted_directions_up_to_sign_stretched_to_their_percentiles():
    n, rows, columns, width = 4, 6, 7, 12
    basis = torch.linalg.qr(random(width, width).double())[0][:3]
    weights = random(n * rows * columns, 3, seed=1).double() * torch.tensor([9.0, 3.0, 1.0])
    # without a component in common, so that the principal components are the planted ones exactly
    weights = torch.linalg.qr(weights - weights.mean(dim=0))[0] * torch.tensor([9.0, 3.0, 1.0])
    features = (weights @ basis + random(width, seed=2)).reshape(n, rows, columns, width)
    colors = patch_colors(features)
    for component in range(3):
        planted = weights[:, component].numpy()
        low, high = np.percentile(planted, [1, 99])
        stretched = ((planted - low) / (high - low)).clip(0, 1)
        shown = colors.colors[..., component].ravel()
        assert min(np.abs(shown - stretched).max(), np.abs(shown - (1 - stretched)).max()) < 1e-8
    np.testing.assert_allclose(colors.explained, np.array([81, 9, 1]) / 91, atol=1e-12)


@pytest.mark.parametrize("width", [4, 200])
def test_colours_do_not_depend_on_which_of_two_algorithms_fits_the_shape(width: int):
    features = random(2, 5, 5, width).double()
    centred = features.flatten(0, 2) - features.flatten(0, 2).mean(dim=0)
    scores = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][:3].T).numpy()
    shown = patch_colors(features).colors.reshape(-1, 3)
    for component in range(3):
        assert abs(np.corrcoef(shown[:, component], scores[:, component])[0, 1]) > 0.99  # but for the cut percentiles


def test_one_basis_serves_all_images_so_equal_patches_have_equal_colours():
    features = random(3, 4, 4, 8)
    features[2, 3, 1] = features[0, 1, 2]
    colors = patch_colors(features).colors
    np.testing.assert_allclose(colors[2, 3, 1], colors[0, 1, 2], atol=1e-12)


def test_equal_patches_are_gray_and_too_few_or_broken_ones_are_refused():
    colors = patch_colors(torch.ones(1, 2, 2, 5))
    assert (colors.colors == 0.5).all()
    assert (colors.explained == 0).all()
    with pytest.raises(ValueError, match="at least 3 patches and 3 dimensions"):
        patch_colors(random(1, 1, 2, 8))
    broken = random(1, 3, 3, 4)
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 36 features are NaN"):
        patch_colors(broken)


def test_the_cosine_of_a_patch_to_itself_is_1_and_to_others_that_of_scikit_learn():
    features = random(5, 4, 16)
    features[3, 2] = -2 * features[1, 3]
    cosines = cosine_map(features, 1, 3)
    assert cosines[1, 3] == pytest.approx(1, abs=1e-12)
    assert cosines[3, 2] == pytest.approx(-1, abs=1e-12)
    expected = cosine_similarity(features.flatten(0, 1).double().numpy(), features[1, 3][None].double().numpy())
    np.testing.assert_allclose(cosines.ravel(), expected[:, 0], atol=1e-12)
    features[4, 0, 0] = math.nan  # of another patch than the one that is looked at
    with pytest.raises(ValueError, match="1 of 320 features are NaN"):
        cosine_map(features, 1, 3)


def test_differing_patches_are_one_of_each_kind():
    directions = torch.eye(3)
    kinds = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2]])
    features = directions[kinds] + 0.01 * random(3, 4, 3)
    chosen = differing_patches(features, 3, first=0)
    assert chosen[0] == (0, 0)
    assert sorted(int(kinds[place]) for place in chosen) == [0, 1, 2]
    everything = differing_patches(features, 12, first=5)
    assert len(set(everything)) == 12


def test_nearest_images_are_those_of_a_full_matrix():
    gallery, queries = random(30, 6).numpy(), random(4, 6, seed=1).numpy()
    queries[2] = 5 * gallery[17]
    found, cosines = find_nearest_images(queries, gallery, 3)
    matrix = cosine_similarity(queries, gallery)
    np.testing.assert_array_equal(found, np.argsort(-matrix, axis=1)[:, :3])
    np.testing.assert_allclose(cosines, -np.sort(-matrix, axis=1)[:, :3], atol=1e-6)
    assert found[2, 0] == 17
    assert cosines[2, 0] == pytest.approx(1, abs=1e-6)
    for k in (0, 31):
        with pytest.raises(ValueError, match="k must be 1 to 30"):
            find_nearest_images(queries, gallery, k)
    gallery[2, 1], queries[0, 0] = np.inf, np.nan
    for first, second in ((random(4, 6).numpy(), gallery), (queries, random(30, 6).numpy())):
        with pytest.raises(ValueError, match=r"1 of \d+ features are NaN or infinite: the weights are damaged"):
            find_nearest_images(first, second, 3)


# ---- boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "shape", "grid", "rows", "columns", "snapped"),
    [
        ((8, 4, 4, 4), (32, 32), (8, 8), (1, 2), (2, 3), (8, 4, 4, 4)),  # a patch exactly
        ((9, 5, 10, 12), (32, 32), (8, 8), (1, 5), (2, 5), (8, 4, 12, 16)),
        ((7, 4, 2, 1), (32, 32), (8, 8), (1, 2), (1, 3), (4, 4, 8, 4)),  # over a patch's edge
        ((0, 0, 1, 1), (32, 32), (8, 8), (0, 1), (0, 1), (0, 0, 4, 4)),
        ((31, 31, 1, 1), (32, 32), (8, 8), (7, 8), (7, 8), (28, 28, 4, 4)),
        (
            (100, 30, 60, 31),
            (90, 200),
            (4, 6),
            (1, 3),
            (3, 5),
            (100, 22.5, 200 / 3, 45),
        ),  # another size than the model
        ((1, 0, 1, 3), (3, 3), (14, 14), (0, 14), (4, 10), (12 / 14, 0, 18 / 14, 3)),  # patches below a pixel
    ],
)
def test_a_box_is_snapped_outward_to_the_patches_that_it_touches(box, shape, grid, rows, columns, snapped):
    positions, filled = box_to_patches(box, shape, grid)
    expected = [row * grid[1] + column for row in range(*rows) for column in range(*columns)]
    assert positions.tolist() == expected
    assert filled == pytest.approx(snapped)
    # the definition, pixel by pixel
    left, top, width, height = box
    xs = (np.arange(16 * left, 16 * (left + width)) + 0.5) / 16
    ys = (np.arange(16 * top, 16 * (top + height)) + 0.5) / 16
    touched = {int(y * grid[0] / shape[0]) * grid[1] + int(x * grid[1] / shape[1]) for y in ys for x in xs}
    assert touched == set(expected)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 0, 4), "box=0,0,0,4 is empty"),
        ((0, 0, 4, -1), "is empty"),
        ((-1, 0, 4, 4), "leaves the image, which is 40 pixels wide and 20 high"),
        ((30, 0, 11, 4), r"x \+ w can be at most 40"),
        ((0, 18, 4, 3), r"y \+ h at most 20"),
        ((0, 0, 40, 20), "touches all 8x8 patches"),
        ((4, 2, 32, 17), "touches all 8x8 patches"),
    ],
)
def test_boxes_that_show_nothing_are_refused(box, message: str):
    with pytest.raises(ValueError, match=message):
        box_to_patches(box, (20, 40), (8, 8))


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_the_mean_error_is_the_models_loss_and_each_block_its_own():
    model = scrambled_model(loss_type="mse")
    batch = tiny_batch(model.config)
    errors = prediction_errors(model, **batch)
    with torch.no_grad():
        output = model(**batch)
    assert float(errors.mean()) == pytest.approx(float(output.loss), rel=1e-6)
    alone = model.compute_loss(output.predictions[2:3, 1:2], output.targets[2:3, 1:2])
    assert float(errors[2, 1].mean()) == pytest.approx(float(alone), rel=1e-6)


def test_errors_are_means_over_the_context_sets():
    model = scrambled_model(masking_strategy="multi_block_official", num_context_sets=3, official_min_keep=1)
    batch = tiny_batch(model.config)
    assert batch["context_indices"].ndim == 3
    with torch.no_grad():
        assert float(prediction_errors(model, **batch).mean()) == pytest.approx(float(model(**batch).loss), rel=1e-6)


def test_the_heat_maps_mean_is_the_loss_where_blocks_do_not_overlap():
    model = scrambled_model()
    batch = tiny_batch(model.config, size=1)
    batch["target_indices"] = torch.tensor([[[0, 1, 8, 9], [20, 21, 28, 29], [62, 63, 54, 55]]])
    errors = prediction_errors(model, **batch)
    shown = error_map(errors[0], batch["target_indices"][0], (8, 8))
    with torch.no_grad():
        assert np.nanmean(shown) == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert np.isnan(shown).sum() == 64 - 12
    assert shown[2, 5] == pytest.approx(float(errors[0, 1, 1]))


def test_a_patch_of_several_blocks_has_their_mean_error():
    shown = error_map(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0, 3], [3, 1]]), (2, 2))
    np.testing.assert_array_equal(shown, [[1.0, 8.0], [np.nan, 3.0]])


# ---- nearest patches ------------------------------------------------------------------------------------------------


def brute_force(queries: torch.Tensor, gallery: torch.Tensor) -> np.ndarray:
    flat = gallery.flatten(0, 1).double().numpy()
    return cosine_similarity(queries.double().numpy(), flat)


@pytest.mark.parametrize(("part", "limit"), [(3, 2**24), (7, 10)])
def test_nearest_patches_are_those_of_a_full_matrix_however_the_gallery_is_cut(monkeypatch, part: int, limit: int):
    monkeypatch.setattr("ijepa_hf.figures.views._MOST_SIMILARITIES", limit)
    queries, gallery = random(11, 6), random(7, 5, 6, seed=1)
    found = find_nearest_patches(queries, gallery.split(part))
    matrix = brute_force(queries, gallery)
    np.testing.assert_array_equal(found.images * 5 + found.positions, matrix.argmax(axis=1))
    np.testing.assert_allclose(found.similarity, matrix.max(axis=1), atol=1e-6)


def test_an_image_is_not_searched_for_its_own_patches():
    gallery = random(4, 5, 6)
    queries = gallery.flatten(0, 1)
    own = torch.arange(4).repeat_interleave(5)
    everywhere = find_nearest_patches(queries, gallery.split(2))
    assert everywhere.images.tolist() == own.tolist()
    assert everywhere.positions.tolist() == list(range(5)) * 4
    torch.testing.assert_close(everywhere.similarity, torch.ones(20))
    others = find_nearest_patches(queries, gallery.split(2), own_images=own)
    matrix = brute_force(queries, gallery).reshape(20, 4, 5)
    matrix[np.arange(20), own] = -9
    np.testing.assert_array_equal(others.images * 5 + others.positions, matrix.reshape(20, -1).argmax(axis=1))
    none = find_nearest_patches(queries, gallery.split(2), own_images=torch.full((20,), -1))
    assert none.images.tolist() == everywhere.images.tolist()


def test_an_empty_gallery_or_broken_features_are_refused():
    for gallery, own in (([], None), ([random(1, 5, 6)], torch.zeros(2, dtype=torch.int64))):
        with pytest.raises(ValueError, match="at least one more"):
            find_nearest_patches(random(2, 6), gallery, own_images=own)
    with pytest.raises(ValueError, match="diverged"):
        find_nearest_patches(random(2, 6) * math.nan, [random(1, 5, 6)])
    with pytest.raises(ValueError, match="diverged"):
        find_nearest_patches(random(2, 6), [random(1, 5, 6) / 0])


@pytest.mark.parametrize("normalize_targets", [True, False])
def test_target_features_are_the_targets_of_the_loss_at_every_patch(normalize_targets: bool):
    model = scrambled_model(normalize_targets=normalize_targets)
    batch = tiny_batch(model.config)
    features = target_features(model, batch["pixel_values"])
    targets = model.encode_targets(batch["pixel_values"], batch["target_indices"])
    for b in range(4):
        torch.testing.assert_close(features[b][batch["target_indices"][b]], targets[b])


def test_a_model_that_predicts_pixels_has_no_representations_to_expect():
    model = scrambled_model(target_type="pixels")
    batch = tiny_batch(model.config)
    gallery = [target_features(model, batch["pixel_values"])]
    with pytest.raises(ValueError, match="target_type='pixels'"):
        expect_patches(model, **batch, gallery=gallery)


class Oracle(nn.Module):
    """A predictor that knows the targets, and adds an offset that must not matter to a cosine."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, context, context_indices, target_indices):
        rows = [own[indices] for own, indices in zip(self.answers, target_indices, strict=True)]
        return 3 * torch.stack(rows)[:, None].expand(-1, context_indices.shape[1], -1, -1, -1)


def test_with_a_predictor_that_knows_expected_are_the_very_patches_planted_in_the_gallery():
    model = scrambled_model()
    batch = tiny_batch(model.config, size=2)
    model.predictor = Oracle(target_features(model, batch["pixel_values"]))
    others = random(5, 3, 32, 32, seed=9)
    # the whole images are planted, since a patch's target depends on its surroundings
    gallery_pixels = torch.cat([others[:2], batch["pixel_values"][1:], others[2:], batch["pixel_values"][:1]])
    gallery = (target_features(model, part) for part in gallery_pixels.split(3))
    found = expect_patches(model, **batch, gallery=gallery)
    assert found.expected.positions.shape == batch["target_indices"].shape
    for matches in (found.expected, found.nearest_to_truth):
        assert matches.positions.tolist() == batch["target_indices"].tolist()
        assert (matches.images[0] == 6).all()
        assert (matches.images[1] == 2).all()
        torch.testing.assert_close(matches.similarity, torch.ones_like(matches.similarity))
    torch.testing.assert_close(found.truth_similarity, torch.ones_like(found.truth_similarity))


def test_expectations_follow_the_prediction_and_not_the_truth():
    model = scrambled_model()
    batch = tiny_batch(model.config, size=1)
    wrong = random(1, 3, 32, 32, seed=5)
    model.predictor = Oracle(target_features(model, wrong))
    pixels = torch.cat([wrong, batch["pixel_values"], random(2, 3, 32, 32, seed=6)])
    found = expect_patches(model, **batch, gallery=[target_features(model, pixels)])
    assert (found.expected.images == 0).all()
    assert (found.nearest_to_truth.images == 1).all()
    assert found.truth_similarity.max() < 0.999
    without = expect_patches(model, **batch, gallery=[target_features(model, pixels)], own_images=torch.tensor([1]))
    assert (without.nearest_to_truth.images != 1).all()


def test_of_several_context_sets_the_first_counts():
    model = scrambled_model(masking_strategy="multi_block_official", num_context_sets=3, official_min_keep=1)
    batch = tiny_batch(model.config, size=2)
    gallery = target_features(model, random(3, 3, 32, 32, seed=2))
    found = expect_patches(model, **batch, gallery=[gallery])
    batch["context_indices"] = batch["context_indices"][:, 0]
    alone = expect_patches(model, **batch, gallery=[gallery])
    torch.testing.assert_close(found.truth_similarity, alone.truth_similarity)


# ---- the model is left as it was ------------------------------------------------------------------------------------


def test_each_module_has_its_own_mode_again_also_after_an_error():
    model = scrambled_model().train()
    model.predictor.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.append((any(module.training for module in model.modules()), torch.is_grad_enabled()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_dropout_is_off_and_no_random_number_is_drawn():
    model = scrambled_model(hidden_dropout_prob=0.5).train()
    masks = draw_masks(tiny_config().mask_settings(), 2, keyed_generator(0))
    pixels = random(2, 3, 32, 32)
    state = torch.get_rng_state()
    first, second = (prediction_errors(model, pixels, masks.context_indices, masks.target_indices) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
