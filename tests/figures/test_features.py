"""Pictures of features and predictions, read back: from the figure's panels, and from the PNG."""

import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from pictures import patch_centres, patches_of_one_colour
from PIL import Image
from tiny import scrambled_model, tiny_batch

from ijepa_hf.diagnosis.figures import draw_spectrum_figure, draw_training_figures
from ijepa_hf.diagnosis.measures import rankme
from ijepa_hf.figures.features import (
    cut_patches,
    draw_cosine_figure,
    draw_errors_figure,
    draw_expectation_figure,
    draw_pca_figure,
    draw_retrieval_figure,
)
from ijepa_hf.figures.panels import to_pictures
from ijepa_hf.figures.views import Expectation, PatchColors, PatchMatches
from ijepa_hf.model.features import encode_patches

GRID, PATCH = (3, 4), (8, 6)


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 24, 24, 3] whose patches are each of one colour; also these colours, [n, rows, columns, 3] uint8."""
    images, colors = patches_of_one_colour(count, 3, GRID, PATCH, seed)
    return to_pictures(images), colors


def check_png(path: Path) -> None:
    """Many colours, and no panel's text cut off at the edge."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def panels_with_images(figure) -> list[int]:
    return [number for number, axis in enumerate(figure.axes) if axis.images]


def test_components_stand_beside_their_image_two_pairs_a_row(tmp_path):
    shown, colors = pictures(3)
    components = np.random.default_rng(1).random((3, *GRID, 3))
    path = tmp_path / "pca.png"
    figure = draw_pca_figure(shown, PatchColors(components, np.array([0.5, 0.25, 0.125])), path)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "components"] * 2
    for number, panel in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(patch_centres(figure, path, panel, GRID), colors[number])
        expected = np.round(255 * components[number])
        assert np.abs(patch_centres(figure, path, panel + 1, GRID) - expected).max() <= 1
    assert figure.texts[0].get_text() == "red, green, blue: 50 %, 25 %, 12 % of the variance"
    assert panels_with_images(figure) == [0, 1, 2, 3, 4, 5]
    check_png(path)


def test_cosine_maps_have_one_scale_and_mark_their_patch_on_map_and_image(tmp_path):
    shown, _ = pictures(2)
    features = torch.randn(2, *GRID, 5, generator=torch.Generator().manual_seed(0))
    places = [[(0, 1), (2, 3)], [(1, 0), (2, 2)]]
    figure = draw_cosine_figure(shown, features, places, tmp_path / "cosine.png")
    for row in range(2):
        image, *maps = figure.axes[3 * row : 3 * row + 3]
        assert len(image.collections[1].get_segments()) == 2 * 4
        for axis, (r, c) in zip(maps, places[row], strict=True):
            (heat,) = axis.images
            values = heat.get_array()
            assert values[r, c] == pytest.approx(1)
            assert heat.get_clim() == (pytest.approx(heat.norm.vmin), 1)
            assert values.min() >= heat.norm.vmin
            edges = np.concatenate(axis.collections[1].get_segments())
            assert edges.min(axis=0).tolist() == [6 * c, 8 * r]
            assert edges.max(axis=0).tolist() == [6 * (c + 1), 8 * (r + 1)]
    assert len({axis.images[0].get_clim() for axis in figure.axes[1:3] + figure.axes[4:6]}) == 1
    assert figure.axes[-1].get_ylabel() == "cosine to the marked patch"
    check_png(tmp_path / "cosine.png")


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[3, 7], [0, 4]]), torch.tensor([[[0, 1], [8, 9]], [[2, 3], [6, 7]]])


def test_the_errors_are_where_their_patches_are_with_each_blocks_mean_below(tmp_path):
    shown, colors = pictures(2)
    context, targets = masks()
    errors = torch.tensor([[[0.1, 0.3], [0.5, 0.7]], [[0.2, 0.2], [0.0, 1.0]]])
    path = tmp_path / "error.png"
    figure = draw_errors_figure(shown, context, targets, errors, PATCH, path)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "context", "error"]
    viridis = matplotlib.colormaps["viridis"]
    for b in range(2):
        expected = np.full((12, 3), 204)
        for position, error in zip(targets[b].flatten().tolist(), errors[b].flatten().tolist(), strict=True):
            expected[position] = viridis(error, bytes=True)[:3]
        seen = patch_centres(figure, path, 3 * b + 2, GRID).astype(int).reshape(12, 3)
        assert np.abs(seen - expected).max() <= 1
        visible = patch_centres(figure, path, 3 * b + 1, GRID).reshape(12, 3)
        np.testing.assert_array_equal(visible[context[b]], colors[b].reshape(12, 3)[context[b]])
        hidden = np.setdiff1d(np.arange(12), context[b])
        assert (visible[hidden] == 204).all()
        written = [text.get_text() for text in figure.axes[3 * b + 2].texts if text.get_text() != "\u25a0"]
        assert written == [f"{mean:.3f}" for mean in errors[b].mean(dim=-1).tolist()]
    assert [text.get_color() for text in figure.axes[2].texts][::2] == ["#E69F00", "#56B4E9"]
    assert figure.axes[-1].get_ylabel() == "loss at the patch"
    check_png(path)


def matches(targets: torch.Tensor, images: list[int], similarity: float) -> PatchMatches:
    numbers = torch.tensor(images).view(-1, 1, 1).expand(targets.shape)
    return PatchMatches(numbers, targets, torch.full(targets.shape, similarity))


def test_expected_patches_are_tiled_in_the_place_of_the_targets(tmp_path):
    shown, _ = pictures(2)
    gallery, gallery_colors = pictures(3, seed=5)
    context, targets = masks()
    expectation = Expectation(
        matches(targets, [2, 1], 0.75), matches(targets, [0, 2], 0.95), torch.full(targets.shape, 0.5)
    )
    tiles = tuple(cut_patches(gallery, found, PATCH) for found in (expectation.expected, expectation.nearest_to_truth))
    path = tmp_path / "expectation.png"
    figure = draw_expectation_figure(shown, context, targets, expectation, tiles, PATCH, path)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "context", "expected", "nearest to truth"]
    for b, (mine, best) in enumerate([(2, 0), (1, 2)]):
        for panel, image in ((2, mine), (3, best)):
            seen = patch_centres(figure, path, 4 * b + panel, GRID).reshape(12, 3)
            indices = targets[b].flatten()
            np.testing.assert_array_equal(seen[indices], gallery_colors[image].reshape(12, 3)[indices])
            others = np.setdiff1d(np.arange(12), indices)
            faded = np.round(255 * (0.35 * shown[b, 4::8, 3::6] + 0.65 * 0.8)).reshape(12, 3)
            assert np.abs(seen[others].astype(int) - faded[others]).max() <= 1
        assert [text.get_text() for text in figure.axes[4 * b + 2].texts] == ["cosine 0.75\nto the truth 0.50"]
        assert [text.get_text() for text in figure.axes[4 * b + 3].texts] == ["cosine 0.95"]
    check_png(path)


def test_where_blocks_share_a_patch_the_first_is_drawn(tmp_path):
    shown, _ = pictures(1)
    targets = torch.tensor([[[5, 6], [6, 7]]])
    tiles = np.zeros((1, 2, 2, *PATCH, 3))
    tiles[0, 0] = 1.0
    found = matches(targets, [0], 1.0)
    expectation = Expectation(found, found, found.similarity)
    path = tmp_path / "a.png"
    figure = draw_expectation_figure(shown, torch.tensor([[0]]), targets, expectation, (tiles, tiles), PATCH, path)
    seen = patch_centres(figure, path, 2, GRID).reshape(12, 3)
    assert (seen[[5, 6]] == 255).all()
    assert (seen[7] == 0).all()


def test_patches_are_cut_from_their_image_and_place():
    gallery, colors = pictures(3)
    found = PatchMatches(torch.tensor([[2, 0]]), torch.tensor([[11, 5]]), torch.ones(1, 2))
    cut = cut_patches(gallery, found, PATCH)
    assert cut.shape == (1, 2, 8, 6, 3)
    np.testing.assert_allclose(cut[0, 0], np.broadcast_to(colors[2, 2, 3] / 255, (8, 6, 3)))
    np.testing.assert_allclose(cut[0, 1], np.broadcast_to(colors[0, 1, 1] / 255, (8, 6, 3)))


def test_neighbours_stand_in_a_row_behind_their_image_with_name_and_cosine(tmp_path):
    queries, colors = pictures(2)
    gallery, gallery_colors = pictures(4, seed=3)
    numbers = np.array([[3, 1, 0], [2, 3, 1]])
    names = [[f"class {n}" for n in row] for row in numbers]
    cosines = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])
    path = tmp_path / "retrieval.png"
    figure = draw_retrieval_figure(queries, ["cat", ""], gallery[numbers], names, cosines, path)
    for row in range(2):
        np.testing.assert_array_equal(patch_centres(figure, path, 4 * row, GRID), colors[row])
        for place in range(3):
            panel = 4 * row + 1 + place
            seen = patch_centres(figure, path, panel, GRID)
            np.testing.assert_array_equal(seen, gallery_colors[numbers[row, place]])
            text = figure.axes[panel].texts[0].get_text()
            assert text == f"class {numbers[row, place]}\ncosine {cosines[row, place]:.2f}"
    assert figure.axes[0].texts[0].get_text() == "cat"
    check_png(path)
    long = draw_retrieval_figure(queries, ["W" * 30, "x" * 24], gallery[numbers], names, cosines, path)
    assert [long.axes[panel].texts[0].get_text() for panel in (0, 4)] == ["W" * 23 + "\u2026", "x" * 24]
    unnamed = draw_retrieval_figure(queries, ["", ""], gallery[numbers], [[""] * 3] * 2, cosines, path)
    assert unnamed.axes[1].texts[0].get_text() == "cosine 0.90"


def test_the_spectrum_has_the_planted_singular_values_and_rankme_in_the_legend(tmp_path):
    planted = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    features = {"images": left * planted, "patches": left}
    figure = draw_spectrum_figure(features, tmp_path / "spectrum.png")
    (axis,) = figure.axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(axis.lines[1].get_ydata(), np.ones(4))
    assert axis.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [f"images: RankMe {rankme(features['images']):.1f} of 4", "patches: RankMe 4.0 of 4"]
    assert axis.get_xlabel() == "number of the singular value"
    assert len({line.get_linestyle() for line in axis.lines}) == 2
    check_png(tmp_path / "spectrum.png")


def test_a_collapsed_spectrum_is_drawn_too(tmp_path):
    features = {"equal": torch.ones(20, 6), "zero": torch.zeros(20, 6)}
    figure = draw_spectrum_figure(features, tmp_path / "spectrum.png")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["equal: RankMe 1.0 of 6", "zero: RankMe 1.0 of 6"]
    assert len(figure.axes[0].lines[1].get_ydata()) == 0


def test_what_does_not_belong_together_is_refused_and_nothing_is_written(tmp_path):
    shown, _ = pictures(2)
    context, targets = masks()
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="'pictures': 2, 'colors': 1"):
        draw_pca_figure(shown, PatchColors(np.zeros((1, *GRID, 3)), np.zeros(3)), path)
    with pytest.raises(ValueError, match="'errors': 1"):
        draw_errors_figure(shown, context, targets, torch.zeros(1, 2, 2), PATCH, path)
    with pytest.raises(ValueError, match="at least one"):
        draw_cosine_figure(shown[:0], torch.zeros(0, *GRID, 2), [], path)
    with pytest.raises(ValueError, match="features is empty"):
        draw_spectrum_figure({}, path)
    with pytest.raises(ValueError, match="NaN"):
        draw_spectrum_figure({"broken": torch.full((4, 4), math.nan)}, path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        draw_spectrum_figure({"images": torch.ones(3, 3)}, tmp_path / "nowhere" / "a.png")


# ---- a batch of a run -----------------------------------------------------------------------------------------------


def test_a_batch_of_a_run_gives_three_pictures_and_leaves_the_model_and_all_draws_as_they_were(tmp_path):
    model = scrambled_model(hidden_dropout_prob=0.1).train()
    model.predictor.layers[0].eval()
    batch = tiny_batch(model.config, size=3)
    model(**batch).loss.backward()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    paths = draw_training_figures(model, **batch, output_dir=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert copies[name] is None or torch.equal(parameter.grad, copies[name])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.is_grad_enabled()
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "run/figures/pca.png", "run/figures/predictions.png", "run/figures/spectrum.png",
    ]  # fmt: skip
    for path in paths:
        check_png(path)
    assert matplotlib.pyplot.get_fignums() == []


def test_several_context_sets_and_many_blocks_are_drawn_too(tmp_path):
    model = scrambled_model(
        masking_strategy="multi_block_official", num_context_sets=2, num_target_blocks=7, official_min_keep=1
    )
    for path in draw_training_figures(model, **tiny_batch(model.config, size=2), output_dir=tmp_path):
        check_png(path)


def test_the_target_encoder_is_what_is_looked_at(tmp_path, monkeypatch):
    model = scrambled_model()
    batch = tiny_batch(model.config, size=3)
    drawn = {}
    monkeypatch.setattr(
        "ijepa_hf.diagnosis.figures.draw_spectrum_figure", lambda features, path: drawn.update(features)
    )
    draw_training_figures(model, **batch, output_dir=tmp_path)
    features = encode_patches(model.target_encoder, batch["pixel_values"])
    torch.testing.assert_close(drawn["images"], features.mean(dim=(1, 2)))
    torch.testing.assert_close(drawn["patches"], features.flatten(0, 2))


def test_one_image_has_no_others_to_look_in(tmp_path):
    model = scrambled_model()
    with pytest.raises(ValueError, match="at least 2 images"):
        draw_training_figures(model, **tiny_batch(model.config, size=1), output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
