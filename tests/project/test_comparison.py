"""examples/comparison: objectives are their formulas, families train their encoder, results stand in a table."""

import copy
import dataclasses
import importlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional

from ijepa_hf.evaluation.scorecard import ScoredImages
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.step import make_optimizer

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comparison"
sys.path.insert(0, str(FOLDER))
compare, contrastive, family, losses, masked, pretext, results, self_distillation, training, views = (
    importlib.import_module(name)
    for name in (
        "compare", "contrastive", "family", "losses", "masked", "pretext", "results", "self_distillation", "training",
        "views",
    )
)  # fmt: skip
sys.path.remove(str(FOLDER))

TRAINED = [name for name in compare.FAMILIES if name != "untrained"]
AVERAGED = ["ijepa", "moco", "dino", "ibot"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def some_pixels(count, size=32, seed=0):
    return torch.randint(256, (count, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_nt_xent_is_the_formula_of_simclr():
    first, second = normal(5, 7), normal(5, 7, seed=1)
    rows = torch.cat([first, second]).numpy()
    total = 0.0
    for i in range(10):
        cosines = [rows[i] @ row / np.linalg.norm(rows[i]) / np.linalg.norm(row) for row in rows]
        others = sum(math.exp(cosines[k] / 0.3) for k in range(10) if k != i)
        total -= math.log(math.exp(cosines[(i + 5) % 10] / 0.3) / others)
    assert losses.nt_xent(first, second, 0.3).item() == pytest.approx(total / 10, rel=1e-12)


def test_nt_xent_has_its_closed_forms():
    same = torch.ones(6, 4, dtype=torch.float64)
    assert losses.nt_xent(same, 3 * same, 0.5).item() == pytest.approx(math.log(11))
    apart = torch.eye(6, dtype=torch.float64)  # views of an image agree, images are at right angles
    assert losses.nt_xent(apart, apart, 0.5).item() == pytest.approx(math.log(math.exp(2) + 10) - 2)


def test_info_nce_is_cross_entropy_over_the_key_and_the_queue_and_gives_keys_no_gradient():
    queries, keys = normal(4, 6).requires_grad_(), normal(4, 6, seed=1).requires_grad_()
    queue = functional.normalize(normal(9, 6, seed=2), dim=1)
    loss = losses.info_nce(queries, keys, queue, 0.2)
    expected = 0.0
    for query, key in zip(queries, keys, strict=True):
        logits = torch.stack([functional.cosine_similarity(query, row, dim=0) for row in [key, *queue]]) / 0.2
        expected += functional.cross_entropy(logits[None], torch.tensor([0])).item() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert keys.grad is None
    assert queries.grad.abs().sum() > 0


def test_a_teacher_is_centred_and_sharpened_and_has_no_gradient():
    logits, centre = normal(3, 5).requires_grad_(), normal(5, seed=1)
    found = losses.sharpened(logits, centre, 0.04)
    expected = [softmax((row - centre.numpy()) / 0.04) for row in logits.detach().numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    assert not found.requires_grad


def test_dino_loss_is_the_mean_cross_entropy_of_different_views():
    student, teacher = normal(4, 3, 6), losses.sharpened(normal(2, 3, 6, seed=1), torch.zeros(6), 0.5)
    terms = [
        -(teacher[t, b].numpy() * np.log(softmax(student[v, b].numpy() / 0.1))).sum()
        for t in range(2)
        for v in range(4)
        if v != t
        for b in range(3)
    ]
    assert losses.dino_loss(student, teacher, 0.1).item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_ibot_patch_loss_is_the_mean_over_hidden_patches_then_over_images():
    student, teacher = normal(3, 4, 5), losses.sharpened(normal(3, 4, 5, seed=1), torch.zeros(5), 0.5)
    hidden = torch.tensor([[True, False, False, True], [False] * 4, [False, True, True, True]])
    of_images = [0.0, 0.0, 0.0]
    for image, patch in hidden.nonzero().tolist():
        logs = np.log(softmax(student[image, patch].numpy() / 0.1))
        of_images[image] -= (teacher[image, patch].numpy() * logs).sum() / hidden[image].sum().item()
    assert losses.ibot_patch_loss(student, teacher, hidden, 0.1).item() == pytest.approx(np.mean(of_images), rel=1e-12)


def test_the_centre_is_a_moving_average_with_momentum_09():
    centre = torch.zeros(3)
    for _ in range(4):
        self_distillation.follow(centre, torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    torch.testing.assert_close(centre, torch.full((3,), 2 * (1 - 0.9**4)))


# ---- what families are made of --------------------------------------------------------------------------------------


def test_the_queue_of_moco_replaces_its_oldest_keys():
    moco = compare.new_family("moco", "digits", 0, 10)
    moco.queue = torch.zeros(5, 64)
    keys = functional.normalize(torch.randn(8, 64, generator=seeded()), dim=1)
    for batch in (keys[:2], 3 * keys[2:4], keys[4:6]):
        moco.enqueue(batch)
    torch.testing.assert_close(moco.queue, keys[[5, 1, 2, 3, 4]])
    moco.enqueue(keys[6:])
    torch.testing.assert_close(moco.queue, keys[[5, 6, 7, 3, 4]])


def test_moco_compares_with_the_queue_as_it_was_and_then_keeps_the_keys_of_the_second_view():
    moco, pixels = compare.new_family("moco", "digits", 0, 10), some_pixels(4)
    before = moco.queue.clone()
    loss = moco.loss(pixels, torch.zeros(4), seeded(5))
    draws = seeded(5)
    first, second = (views.make_views(pixels, moco.views, draws) for _ in range(2))
    queries, keys = (moco.head(family.pooled(moco.encoder, images)) for images in (first, second))
    torch.testing.assert_close(loss, losses.info_nce(queries, keys, before, 0.2))
    torch.testing.assert_close(moco.queue[:4], functional.normalize(keys, dim=1).detach())
    torch.testing.assert_close(moco.queue[4:], before[4:])


def test_rotations_are_quarter_turns_with_their_number_as_label():
    image = torch.zeros(2, 1, 3, 3)
    image[:, 0, 0, 2] = 1  # top right goes to top left, bottom left, bottom right
    turned, labels = pretext.rotations(image)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    places = {int(label): tuple(each[0].nonzero()[0].tolist()) for each, label in zip(turned, labels, strict=True)}
    assert places == {0: (0, 2), 1: (0, 0), 2: (2, 0), 3: (2, 2)}


def test_permutations_of_the_jigsaw_are_distinct_and_farther_apart_than_random_ones():
    chosen = compare.new_family("jigsaw", "digits", 3, 10).permutations.numpy()
    assert chosen.shape == (64, 9)
    assert (np.sort(chosen, axis=1) == np.arange(9)).all()
    distances = (chosen[:, None] != chosen).sum(2)[~np.eye(64, dtype=bool)]
    assert distances.min() >= 6  # of 64 random ones some two differ in 4 places or fewer
    np.testing.assert_array_equal(chosen, compare.new_family("jigsaw", "digits", 4, 10).permutations.numpy())


def test_tiles_lie_in_their_cells_in_reading_order_and_are_cut_whole():
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([rows, columns]).expand(50, -1, -1, -1)
    tiles = pretext.cut_tiles(images, 8, seeded())
    assert tiles.shape == (50, 9, 2, 8, 8)
    corners = tiles[..., 0, 0]
    torch.testing.assert_close(tiles[:, :, 0] - corners[:, :, :1, None], rows[:8, :8].expand(50, 9, -1, -1))
    torch.testing.assert_close(tiles[:, :, 1] - corners[:, :, 1:, None], columns[:8, :8].expand(50, 9, -1, -1))
    cells = torch.tensor([[10.0 * (number // 3), 10.0 * (number % 3)] for number in range(9)])
    shifts = corners - cells
    assert sorted(set(shifts.flatten().tolist())) == [0, 1, 2]  # all places that leave a tile in its cell


def test_a_permuted_tile_stands_where_its_permutation_says():
    tiles = torch.arange(6).view(2, 3, 1) * 10
    permutations = torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert pretext.permuted(tiles, permutations).squeeze(2).tolist() == [[20, 0, 10], [30, 50, 40]]


def test_half_of_the_masks_of_ibot_are_empty_and_the_others_are_rectangles_of_their_share():
    hidden = self_distillation.draw_masked_patches(4000, (8, 8), seeded()).view(4000, 8, 8)
    counts = hidden.flatten(1).sum(1)
    assert (counts == 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    some = hidden[counts > 0]
    heights, widths = some.any(2).sum(1), some.any(1).sum(1)
    assert torch.equal(heights * widths, some.flatten(1).sum(1))
    assert (counts[counts > 0] / 64).mean().item() == pytest.approx(0.3, abs=0.02)
    middle = some[:, 3:5, 3:5].float().mean()
    assert middle > some[:, ::7, ::7].float().mean() > 0  # everywhere, and most in the middle


def test_ibot_hides_patches_behind_a_token_and_is_the_encoder_where_none_is_hidden():
    ibot = compare.new_family("ibot", "digits", 0, 10).eval()
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    nothing, first = torch.zeros(2, 64, dtype=torch.bool), torch.arange(64).expand(2, -1) == 0
    torch.testing.assert_close(ibot.encode_masked(images, nothing), family.patches(ibot.encoder, images))
    other = images.clone()
    other[:, :, :4, :4] += 1
    torch.testing.assert_close(ibot.encode_masked(other, first), ibot.encode_masked(images, first), rtol=0, atol=0)
    assert (ibot.encode_masked(other, nothing) - ibot.encode_masked(images, nothing)).abs().max() > 1e-3


def test_features_of_mae_are_all_patches_in_their_places():
    mae = compare.new_family("mae", "digits", 0, 10).eval()
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    found = mae.patch_features(images)
    assert mae.model.config.mask_ratio == 0.75
    vit = copy.deepcopy(mae.model.vit)
    vit.config.mask_ratio = 0.0
    shuffled = vit(images, noise=torch.rand(2, 64, generator=seeded(1)))
    order = shuffled.ids_restore[..., None].expand(-1, -1, 64)
    torch.testing.assert_close(found, shuffled.last_hidden_state[:, 1:].gather(1, order), rtol=1e-4, atol=1e-5)


def test_the_encoder_of_mae_has_the_layers_of_the_others_and_a_class_token_more():
    sizes = {
        name: sorted(value.numel() for value in compare.new_family(name, "digits", 0, 10).encoder.parameters())
        for name in ("ijepa", "mae")
    }
    # its fixed position table is a parameter there, with a row for the class token
    assert sizes["mae"] == sorted([*sizes["ijepa"], 64, 65 * 64])


# ---- views ----------------------------------------------------------------------------------------------------------


def test_boxes_lie_inside_and_have_the_asked_areas_and_ratios():
    top, left, height, width = views.draw_boxes(5000, (0.4, 1.0), seeded()).unbind(1)
    for start, length in ((top, height), (left, width)):
        assert start.min() >= 0
        assert (start + length).max() <= 1 + 1e-6
    whole = (height < 1) & (width < 1)  # not cut to the image
    area, ratio = (height * width)[whole], (height / width)[whole]
    assert 0.4 <= area.min() < 0.41
    assert area.max() <= 1
    assert 0.7499 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3 + 1e-4
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.01)


def test_a_crop_of_the_same_scale_is_the_slice_and_its_mirror_image():
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.5]]).expand(2, -1)
    slices = images[:, :, 4:12, 8:16]
    found = views.crop_and_resize(images, boxes, 8, torch.tensor([False, True]))
    torch.testing.assert_close(found[0], slices[0])
    torch.testing.assert_close(found[1], slices[1].flip(2))


def test_an_enlarged_image_is_that_of_torchs_bilinear_resizing():
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, -1)
    expected = functional.interpolate(images, size=12, mode="bilinear", align_corners=False)
    torch.testing.assert_close(views.crop_and_resize(images, boxes, 12), expected)


def as_picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("name", "change"), [("Brightness", 0), ("Contrast", 1), ("Color", 2)])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_colours_change_as_those_of_pillow(name, change, factor):
    images = torch.rand(2, 3, 6, 6, generator=seeded())
    factors = [torch.ones(2), torch.ones(2), torch.ones(2)]
    factors[change] = torch.full((2,), factor)
    found = views.recolour(images, *factors, torch.zeros(2))
    for image, changed in zip(images, found, strict=True):
        expected = np.asarray(getattr(ImageEnhance, name)(as_picture(image)).enhance(factor), dtype=float)
        assert np.abs(changed.permute(1, 2, 0).numpy() * 255 - expected).max() < 2.6  # of 255; Pillow rounds twice


def test_a_turn_of_hue_keeps_the_luma_and_three_thirds_give_the_image_back():
    grey = torch.rand(1, 1, 6, 6, generator=seeded()) * 0.2 + 0.4
    images = grey + 0.1 * torch.rand(1, 3, 6, 6, generator=seeded(1))  # nothing is cut off
    one = torch.ones(1)
    turned = views.recolour(images, one, one, one, one / 3)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close((turned * luma).sum(1), (images * luma).sum(1), rtol=0, atol=2e-3)
    assert (turned - images).abs().max() > 0.02
    for _ in range(2):
        turned = views.recolour(turned, one, one, one, one / 3)
    torch.testing.assert_close(turned, images)


def test_views_are_a_function_of_the_generator_and_mirrored_and_grey_as_often_as_asked():
    settings = views.ViewSettings(
        size=8, mean=(0.0,) * 3, std=(1.0,) * 3, view_scale=(0.9, 1.0), flip=True, brightness=0.3, grey_share=0.25
    )
    pixels = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, :, :4] = 255  # the left half is red
    found = views.make_views(pixels, settings, seeded())
    assert torch.equal(found, views.make_views(pixels, settings, seeded()))
    assert not torch.equal(found, views.make_views(pixels, settings, seeded(1)))
    red_left = found[:, 0, :, 0].mean(1) > found[:, 0, :, -1].mean(1)
    assert red_left.float().mean().item() == pytest.approx(0.5, abs=0.06)
    is_grey = (found[:, 0] - found[:, 1]).abs().flatten(1).max(1).values < 1e-3
    assert is_grey.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_views_of_digits_are_never_mirrored_and_stay_grey():
    settings = compare.DATASETS["digits"]["views"]
    pixels = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, :, 16:] = 255
    found = views.make_views(pixels, settings, seeded())
    assert (found[:, 0, :, -2:].mean((1, 2)) > found[:, 0, :, :2].mean((1, 2))).all()
    torch.testing.assert_close(found[:, 0], found[:, 2], rtol=0, atol=0.02)


def test_images_without_views_are_whole_on_digits_and_large_crops_on_shapes():
    whole, cropped = (compare.DATASETS[name]["views"] for name in ("digits", "shapes"))
    pixels = some_pixels(3)
    expected = (pixels.float() / 255 - 0.3) / 0.38
    torch.testing.assert_close(views.plain_images(pixels, whole, seeded()), expected)
    ramp = torch.arange(48.0).mul(5).byte().expand(400, 3, 48, -1)
    found = views.plain_images(ramp, cropped, seeded()) * torch.tensor(cropped.std).view(3, 1, 1)
    seen = (found[:, 0, 0, -1] - found[:, 0, 0, 0]) * 255 / 5 / 47  # share of the width
    assert 0.55 < seen.min() < 0.65  # sqrt(0.5 * 3 / 4) is 0.61
    assert seen.max() > 0.97


# ---- families -------------------------------------------------------------------------------------------------------


def one_step(found, *, momentum, seed=0, count=4):
    pixels = some_pixels(count, found.views.size)
    labels = torch.arange(count) % 10
    optimizer = training.make_optimizer(found.train())
    return training.training_step(found, optimizer, pixels, labels, seeded(seed), 1e-3, 0.04, momentum)


def weights(module):
    return torch.cat([value.detach().flatten().clone() for value in module.parameters()])


@pytest.mark.parametrize("dataset_name", list(compare.DATASETS))
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_changes_the_encoder_and_only_the_momentum_moves_the_average(name, dataset_name):
    found = compare.new_family(name, dataset_name, 0, 10)
    trained, scored = weights(found.encoder), weights(found.scored_encoder())
    assert math.isfinite(one_step(found, momentum=1.0))
    assert not torch.equal(weights(found.encoder), trained)
    if name not in AVERAGED:
        assert found.scored_encoder() is found.encoder
        return
    assert torch.equal(weights(found.scored_encoder()), scored)
    assert not any(value.requires_grad for value in found.scored_encoder().parameters())
    one_step(found, momentum=0.0)
    torch.testing.assert_close(weights(found.scored_encoder()), weights(found.encoder))


@pytest.mark.parametrize("name", ["moco", "dino", "ibot"])
def test_the_head_of_the_teacher_follows_and_has_no_gradient(name):
    found = compare.new_family(name, "digits", 0, 10)
    one_step(found, momentum=1.0)
    assert not torch.equal(weights(found.average_head), weights(found.head))
    assert not any(value.requires_grad for value in found.average_head.parameters())
    before, head = weights(found.average_head), weights(found.head)
    found.update_average(0.75)
    torch.testing.assert_close(weights(found.average_head), 0.75 * before + 0.25 * head)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_is_a_function_of_its_seed(name):
    settings = dataclasses.replace(compare.training_settings(), batch_size=4)

    def trained(seed):
        found = compare.new_family(name, "digits", seed, 10)
        training.train(found, some_pixels(8), torch.arange(8), 2, settings, seed)
        return weights(found)

    state = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_supervised_bound_looks_at_labels(name):
    found = [one_step_with_labels(name, labels) for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4))]
    assert (found[0] == found[1]) == (name != "supervised")


def one_step_with_labels(name, labels):
    return compare.new_family(name, "digits", 0, 10).loss(some_pixels(4), labels, seeded()).item()


def test_all_families_begin_with_the_encoder_that_an_ijepa_run_begins_with():
    from ijepa_hf.model.modeling_ijepa import new_model

    expected = weights(new_model(compare.encoder_config("digits"), 5).ijepa)
    for name in compare.FAMILIES:
        same = (
            torch.equal(weights(compare.new_family(name, "digits", 5, 10).encoder), expected) if name != "mae" else 1
        )
        assert same, name


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_optimiser_has_the_groups_of_the_package():
    ijepa = compare.new_family("ijepa", "digits", 0, 10)
    _, _, run = parse_arguments(["digits", "--output_dir", "runs/unused"])
    ours, packages = training.make_optimizer(ijepa), make_optimizer(ijepa.model, run)
    for group, expected in zip(ours.param_groups, packages.param_groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected["params"]))
        assert group["decays"] == expected["decays"]
        assert {name: group[name] for name in ("betas", "eps")} == {name: expected[name] for name in ("betas", "eps")}


def test_schedules_begin_and_end_where_the_recipe_says():
    settings, recipe = compare.training_settings(), load_recipe("digits")
    first, top, last = (training.step_values(step, 200, settings) for step in (1, 10, 200))
    assert first[0] == pytest.approx(1e-4 + 0.1 * 9e-4)  # a tenth of 10 steps of warm-up
    assert top[0] == recipe["learning_rate"] == 1e-3
    assert last[:2] == (pytest.approx(1e-6), pytest.approx(0.4))
    assert first[1] == pytest.approx(0.04, abs=1e-4)
    assert first[2] == 0.996
    assert last[2] == pytest.approx(1 - 0.004 / 200)


class Recorder(family.Family):
    """Trains one number, and writes down which images it was shown."""

    def __init__(self, loss=1.0):
        torch.nn.Module.__init__(self)
        self.number, self.value = torch.nn.Parameter(torch.ones(())), loss
        self.batches, self.momenta, self.draws = [], [], []

    def loss(self, pixels, labels, generator):
        assert torch.equal(pixels[:, 0, 0, 0].long(), labels)
        self.batches.append(labels.tolist())
        self.draws.append(torch.rand((), generator=generator).item())
        return self.number * self.value

    def update_average(self, momentum):
        self.momenta.append(momentum)


def test_every_epoch_visits_other_images_in_another_order_and_none_twice():
    recorder, settings = Recorder(), compare.training_settings()
    pixels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(-1, 3, 2, 2)
    found = training.train(recorder, pixels, torch.arange(40), 5, settings, 0)
    assert found.num_steps == len(recorder.batches) == 5
    assert [len(batch) for batch in recorder.batches] == [16] * 5
    for epoch in (recorder.batches[:2], recorder.batches[2:4]):
        assert len({number for batch in epoch for number in batch}) == 32
    assert recorder.batches[:2] != recorder.batches[2:4]
    assert recorder.momenta == pytest.approx([0.996 + 0.004 * step / 5 for step in range(5)])
    assert found.seconds > 0


def test_steps_are_timed_side_by_side_and_families_are_left_as_they_are(monkeypatch):
    now, order = [0.0], []
    lengths = {1.0: iter([900.0, 900.0, 5.0, 7.0, 6.0]), 2.0: iter([900.0, 900.0, 1.0, 90.0, 2.0])}

    def step(family, *_):
        order.append(family.value)
        now[0] += next(lengths[family.value])
        family.number.data += 1

    monkeypatch.setattr(training, "training_step", step)
    monkeypatch.setattr(training, "clock", lambda device: now[0])
    families = {"slow": Recorder(loss=1.0), "fast": Recorder(loss=2.0)}
    pixels = torch.zeros(20, 3, 2, 2, dtype=torch.uint8)
    found = training.step_times(families, pixels, torch.arange(20), compare.training_settings(), rounds=3)
    assert found == {"slow": 6.0, "fast": 2.0}  # medians, without the two rounds of warming up
    assert order == [1.0, 2.0] * 5
    assert all(family.number.item() == 1 for family in families.values())


def test_the_order_of_images_and_the_draws_of_a_step_are_those_of_the_seed():
    pixels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(-1, 3, 2, 2)
    recorders = [Recorder() for _ in range(3)]
    for recorder, seed in zip(recorders, (0, 0, 1), strict=True):
        training.train(recorder, pixels, torch.arange(40), 2, compare.training_settings(), seed)
    first, same, other = ((recorder.batches, recorder.draws) for recorder in recorders)
    assert first == same
    assert first[0] != other[0]
    assert set(first[1]).isdisjoint(other[1])


def test_a_training_refuses_too_few_images_and_a_loss_that_is_no_number():
    settings, pixels = compare.training_settings(), torch.zeros(16, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="batch_size=16 must be at most 15"):
        training.train(Recorder(), pixels[:15], torch.zeros(15), 1, settings, 0)
    with pytest.raises(ArithmeticError, match="the loss of Recorder is nan in step 1"):
        training.train(Recorder(math.nan), pixels, torch.zeros(16, dtype=torch.int64), 3, settings, 0)


def test_peak_memory_counts_what_is_alive_at_one_time():
    values = torch.randn(500, 1000)  # 2 MB

    def work():
        doubled = values * 2
        shifted = doubled + 1
        del doubled
        return (shifted * 3).sum()

    assert training.peak_of(work, torch.device("cpu")) == pytest.approx(4e6, rel=0.001)


def test_peak_memory_of_a_family_holds_its_weights_and_leaves_it_alone():
    found, settings = compare.new_family("dino", "digits", 0, 10), compare.training_settings()
    before, centre = weights(found), found.centre.clone()
    pixels, labels = some_pixels(16), torch.zeros(16, dtype=torch.int64)
    peak = training.peak_memory_bytes(found, pixels, labels, settings)
    assert torch.equal(weights(found), before)
    assert torch.equal(found.centre, centre)
    trained = sum(value.numel() for value in found.parameters() if value.requires_grad)
    # weights and averages, two moments, gradients; and of two views 3 layers' queries, keys, values and MLP at least
    at_least = 4 * (weights(found).numel() + 3 * trained) + 4 * 2 * 16 * 64 * 3 * (3 * 64 + 2 * 128)
    assert at_least < peak < 6 * at_least


# ---- the command ----------------------------------------------------------------------------------------------------


def few_images(count=120):
    digits = np.arange(count) % 10
    pixels = some_pixels(count) // 4
    for number, digit in enumerate(digits):
        pixels[number, :, 3 * digit : 3 * digit + 3] += 150
    return ScoredImages(pixels, pixels[:40], digits.astype(np.int64), digits[:40].astype(np.int64), {})


@pytest.fixture
def few(monkeypatch):
    """Few images, and scores that cost nothing."""
    monkeypatch.setattr(compare, "load_scored_images", lambda *_, **__: few_images())
    monkeypatch.setattr(compare, "score", lambda *_: {"knn": 0.5, "linear": 0.75, "low_shot": 0.25, "rankme": 3.0})


@pytest.fixture
def trained(few, monkeypatch):
    """The names of the families that would have been trained; nothing is."""
    names = []

    def record(name, *_):
        names.append(name)
        return {
            "num_steps": 1,
            "seconds": 1.0,
            "peak_memory_bytes": 1,
            "scores": {"knn": 1.0},
        }

    monkeypatch.setattr(compare, "run", record)
    monkeypatch.setattr(compare, "step_times", lambda families, *_: dict.fromkeys(families, 0.5) | {"jigsaw": 0.1})
    monkeypatch.setattr(compare, "draw_figure", lambda *_: None)
    return names


FLAGS = ["--num_train_epochs", "1", "--seeds", "0", "--families"]


def test_a_run_is_scored_on_the_mean_of_patches_of_the_moving_average(monkeypatch):
    given = []
    monkeypatch.setattr(compare, "score_features", lambda *values: given.append(values) or {"knn": 0.5})
    images, found = few_images(), compare.new_family("moco", "digits", 0, 10)
    with torch.no_grad():
        for value in found.encoder.parameters():  # the trained encoder has no part in it
            value.zero_()
    assert compare.score(found, images, torch.device("cpu")) == {"knn": 0.5}
    ((train_x, test_x, scored),) = given
    assert scored is images
    for features, pixels in ((train_x, images.train_pixels), (test_x, images.test_pixels)):
        with torch.no_grad():
            patches = found.average_encoder((pixels.float() / 255 - 0.3) / 0.38).last_hidden_state
        torch.testing.assert_close(torch.from_numpy(features), patches.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_writes_a_file_for_each_run_a_table_and_a_figure(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "step_times", partial(training.step_times, rounds=1))
    compare.main([*FLAGS, "simclr", "ijepa", "untrained", "--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits-ijepa-seed0.json", "digits-simclr-seed0.json", "digits-untrained-seed0.json",
        "digits-step-times.json", "digits.md", "digits.png",
    }  # fmt: skip
    ijepa, simclr = (json.loads((tmp_path / f"digits-{name}-seed0.json").read_text()) for name in ("ijepa", "simclr"))
    assert ijepa["equal_epochs"]["num_steps"] == 120 // 16
    assert ijepa["equal_time"] == ijepa["equal_epochs"]
    seconds = json.loads((tmp_path / "digits-step-times.json").read_text())["seconds"]
    assert set(seconds) == set(compare.FAMILIES) - {"untrained"}
    assert simclr["seconds_per_step"] == seconds["simclr"]
    assert simclr["equal_time"]["num_steps"] == max(1, round(7 * seconds["ijepa"] / seconds["simclr"]))
    assert simclr["settings"]["constants"] == {"temperature": 0.5, "embedding_size": 64}
    assert simclr["equal_epochs"]["peak_memory_bytes"] > ijepa["equal_epochs"]["peak_memory_bytes"] > 1e6
    table = (tmp_path / "digits.md").read_text("utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows == 2 * ["family", "---", *results.TITLES.values()]
    assert "| MAE | 0 | missing |" in table
    assert "| SimCLR | 1 | 2 |" in table
    assert table in capsys.readouterr().out


def test_what_is_there_is_not_trained_again_unless_settings_differ(trained, tmp_path, monkeypatch):
    flags = [*FLAGS, "rotation", "ijepa", "--output_dir", str(tmp_path)]
    compare.main(flags)
    assert trained == ["ijepa", "rotation"]  # in the same time they make the same one step
    trained.clear()
    compare.main(flags)
    assert trained == []
    monkeypatch.setattr(pretext.Rotation, "constants", {"turns": 4})
    compare.main(flags)
    assert trained == ["rotation"]
    compare.main([*flags, "--seeds", "0", "1"])
    assert trained == ["rotation", "ijepa", "rotation"]
    trained.clear()
    compare.main([*flags, "--num_train_epochs", "2"])
    assert trained == ["ijepa", "rotation"]


def test_at_equal_wall_clock_a_family_five_times_as_fast_makes_five_times_the_steps(trained, tmp_path, monkeypatch):
    steps = []

    def record(*values):
        steps.append(values[3])
        return {"num_steps": values[3], "seconds": 1.0, "peak_memory_bytes": 1, "scores": {"knn": 1.0}}

    monkeypatch.setattr(compare, "run", record)
    compare.main([*FLAGS, "jigsaw", "--output_dir", str(tmp_path)])
    assert steps == [7, 35]


def test_steps_are_timed_once_for_all_seeds(trained, tmp_path, monkeypatch):
    flags = [*FLAGS, "jigsaw", "--output_dir", str(tmp_path)]
    compare.main(flags)
    monkeypatch.setattr(compare, "step_times", lambda *_: pytest.fail("timed again"))
    compare.main([*flags, "--seeds", "1"])
    records = [json.loads((tmp_path / f"digits-jigsaw-seed{seed}.json").read_text()) for seed in (0, 1)]
    assert [record["seconds_per_step"] for record in records] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--families", "byol"], "invalid choice: 'byol'"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 must be at least 1"),
        (["--seeds", "1", "-1"], "--seeds -1 must be 0 or more"),
    ],
)
def test_wrong_flags_are_refused_with_their_rule(flags, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse(flags)
    assert message in capsys.readouterr().err


# ---- table and figure -----------------------------------------------------------------------------------------------


def made_up(name, seed, knn, dataset_name="digits", epochs=40, time_knn=None):
    run = {"num_steps": 100, "seconds": 20.0, "peak_memory_bytes": 12_000_000}
    record = {
        "settings": {"family": name, "seed": seed, "dataset_name": dataset_name, "num_train_epochs": epochs},
        "equal_epochs": {**run, "scores": {"knn": knn, "rankme": 7.0}},
        "views_per_image": 2,
        "steps_per_epoch": 10,
        "seconds_per_step": 0.2,
    }
    if time_knn is not None:
        record["equal_time"] = {**run, "num_steps": 50, "scores": {"knn": time_knn, "rankme": 6.0}}
    return record


def test_tables_hold_means_and_deviations_in_the_order_of_the_families():
    records = [made_up("mae", 0, 0.9), made_up("ijepa", 0, 0.7, time_knn=0.6), made_up("ijepa", 1, 0.8)]
    lines = results.render_tables(records).splitlines()
    assert lines[0] == "## digits, 40 epochs of each family"
    assert lines[2] == "| family | seeds | views an image | seconds an epoch | memory, MB | kNN-20 | RankMe |"
    assert lines[6] == "| I-JEPA | 2 | 2 | 2.0 | 12 | 75.0 ± 7.1 | 7.0 ± 0.0 |"
    assert lines[7] == "| MAE | 1 | 2 | 2.0 | 12 | 90.0 | 7.0 |"
    assert lines[8] == "| SimCLR | 0 | missing | missing | missing | missing | missing |"
    assert lines[15] == "## digits, the time that I-JEPA takes for 40 epochs"
    assert lines[17] == "| family | seeds | epochs | kNN-20 | RankMe |"
    assert lines[21] == "| I-JEPA | 1 | 5 | 60.0 | 6.0 |"


def test_results_of_different_settings_stand_in_no_table():
    records = [made_up("mae", 0, 0.9), made_up("ijepa", 1, 0.7, epochs=20)]
    with pytest.raises(ValueError, match="digits: mae seed 0 and ijepa seed 1 differ in num_train_epochs"):
        results.render_tables(records)
    assert results.render_tables([records[0], made_up("ijepa", 1, 0.7, "shapes", 20)]).count("## ") == 4


def test_the_figure_has_a_dot_for_each_mean_and_a_line_for_its_seeds(tmp_path):
    records = [
        made_up("untrained", 0, 0.5),
        made_up("ijepa", 0, 0.7, time_knn=0.6),
        made_up("ijepa", 1, 0.8),
        made_up("jigsaw", 0, 0.4),
    ]
    figure = results.draw_figure(records, tmp_path / "figure.png")
    lines = figure.axes[0].get_lines()
    dots = [line.get_xydata().tolist() for line in lines if line.get_marker() == "o"]
    assert dots[0] == [
        pytest.approx([50, 0 - 0.16]), pytest.approx([75, 2 - 0.16]), pytest.approx([40, 9 - 0.16])
    ]  # fmt: skip
    assert dots[1] == [pytest.approx([60, 2 + 0.16])]
    spans = [line.get_xdata() for line in lines if line.get_marker() != "o" and line.get_linestyle() == "-"]
    assert [70, 80] in [pytest.approx(span) for span in spans]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_folders_are_collected_into_one_file_one_figure_and_the_tables(tmp_path):
    for number, record in enumerate([made_up("mae", 0, 0.9, time_knn=0.8), made_up("ijepa", 0, 0.7, "shapes")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        compare.write_record(
            compare.path_of(folder, record["settings"]["dataset_name"], record["settings"]["family"], 0), record
        )
    written = tmp_path / "comparison.json", tmp_path / "comparison.png"
    tables = compare.collect([tmp_path / "0", tmp_path / "1"], *written)
    runs = json.loads(written[0].read_text())["runs"]
    assert [run["equal_epochs"]["scores"]["knn"] for run in runs] == [0.9, 0.7]
    assert tables == results.render_tables(runs)
    assert written[1].exists()
    again = tmp_path / "again.json"
    assert compare.collect([written[0]], again, written[1]) == tables
    assert again.read_text() == written[0].read_text()
    with pytest.raises(FileNotFoundError):
        compare.collect([tmp_path / "missing.json"], *written)
    with pytest.raises(ValueError, match="is another result of digits mae 0"):
        compare.collect([tmp_path / "0", tmp_path / "0"], *written)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds no file like digits-ijepa-seed0.json"):
        compare.collect([tmp_path / "empty"], *written)


def test_the_table_has_a_name_for_each_family_in_the_order_of_the_command():
    assert list(results.TITLES) == list(compare.FAMILIES)
    assert tuple(results.BUDGETS) == compare.BUDGETS


def test_the_tables_of_the_page_are_what_the_committed_results_give():
    root = FOLDER.parent.parent
    runs = json.loads((root / "benchmarks" / "results" / "comparison.json").read_text("utf-8"))["runs"]
    tables = results.render_tables(runs).replace("## ", "### ").strip()
    assert tables in (root / "docs" / "comparison.md").read_text("utf-8")
