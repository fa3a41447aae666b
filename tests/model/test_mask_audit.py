"""What an audit measures, against masks made by hand, closed forms and the published numbers; and what it says.

Random numbers have fixed keys and are compared as in `test_masking.py`.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ijepa_hf.model import mask_audit
from ijepa_hf.model.mask_audit import MaskAudit, Spread, audit_masks, audit_notes, render_audit
from ijepa_hf.model.masking import Masks, MaskSettings

FALSE_ALARM = 1e-5


def official(side, min_keep=None):
    min_keep = (4 if side == 8 else 10) if min_keep is None else min_keep
    return MaskSettings((side, side), "multi_block_official", official_min_keep=min_keep)


def assert_probabilities(found, expected, num_images):
    """Shares of independent images equal probabilities, at a level that Bonferroni sets for all of them together."""
    found, expected = np.asarray(found), np.broadcast_to(expected, np.shape(found))
    standard_error = np.sqrt(expected * (1 - expected) / num_images)
    np.testing.assert_array_equal(found[standard_error == 0], expected[standard_error == 0])
    limit = stats.norm.isf(FALSE_ALARM / 2 / found.size)
    assert (np.abs(found - expected) <= limit * standard_error).all()


# Masks made by hand


def by_hand(monkeypatch, steps):
    """Lets the audit of steps of two images draw these masks; batches of other sizes have a context of the batch."""

    def draw(settings, batch_size, generator):
        number = len(drawn)
        drawn.append(batch_size)
        if batch_size != 2:
            return Masks(torch.arange(batch_size).expand(batch_size, -1), torch.zeros(batch_size, 1, 1).long(), 0.0)
        context, targets, rate = steps[number % len(steps)]
        return Masks(torch.tensor(context), torch.tensor(targets), rate)

    drawn: list[int] = []
    monkeypatch.setattr(mask_audit, "draw_masks", draw)


#  0  1  2  3
#  4  5  6  7
#  8  9 10 11
TWO_STEPS = [
    # Targets of 1x2; in the second image both lie on one place. One of two images was redrawn.
    ([[0, 4, 11], [2, 8, 10]], [[[5, 6], [6, 7]], [[0, 1], [0, 1]]], 0.5),
    # Targets of 2x1; in the second image the context has patch 3, which is a target.
    ([[0, 3, 6], [3, 4, 8]], [[[1, 5], [2, 6]], [[3, 7], [7, 11]]], 0.0),
]


def audit_by_hand(monkeypatch, **changes):
    by_hand(monkeypatch, TWO_STEPS)
    arguments = {"batch_size": 2, "num_steps": 2, "batch_sizes": (2, 4), **changes}
    return audit_masks(MaskSettings((3, 4), num_target_blocks=2, context_scale=(1, 1)), **arguments)


def test_every_number_of_an_audit_is_as_counted_by_hand(monkeypatch):
    audit = audit_by_hand(monkeypatch)
    np.testing.assert_array_equal(audit.context_map * 4, [[2, 0, 1, 2], [2, 0, 1, 0], [2, 0, 1, 1]])
    np.testing.assert_array_equal(audit.target_map * 4, [[1, 2, 1, 1], [0, 2, 2, 2], [0, 0, 0, 1]])
    # Target patches: 5 6 7, 0 1, 1 2 5 6, 3 7 11; in two targets: 6, 0 1, none, 7. Context inside: none, none, 6, 3.
    assert audit.target_overlap == pytest.approx(4 / 12)
    assert audit.context_overlap == pytest.approx(2 / 12)
    assert audit.block_sizes == {(1, 2): 0.5, (2, 1): 0.5}
    assert audit.block_patches == Spread(2, 2, 2)
    # Pieces: 0 4 and 11; 2 and 8 and 10; 0 and 3 and 6; 3 and 4 8.
    assert audit.context_pieces == (2 + 3 + 3 + 2) / 4
    assert audit.redraw_rate == 0.25
    assert audit.context_share == {2: Spread(3 / 12, 3 / 12, 3 / 12), 4: Spread(4 / 12, 4 / 12, 4 / 12)}
    assert (audit.num_images, audit.num_never_seen, audit.num_never_targeted) == (4, 4, 4)
    assert (audit.batch_size, audit.num_steps, audit.seed) == (2, 2, 0)


def test_context_sets_count_each_and_average_in_the_map(monkeypatch):
    by_hand(monkeypatch, [([[[0, 1], [1, 3]], [[0, 3], [0, 1]]], [[[3]], [[2]]], 0.0)])
    settings = MaskSettings((2, 2), num_context_sets=2, num_target_blocks=1, allow_overlap=True)
    audit = audit_masks(settings, batch_size=2, num_steps=1, batch_sizes=(2,))
    np.testing.assert_array_equal(audit.context_map, [[0.75, 0.75], [0, 0.5]])
    assert audit.context_overlap == 1 / 8  # of the eight context patches only 3 in the second set of the first image
    assert audit.context_pieces == (1 + 1 + 2 + 1) / 4  # only 0 and 3 share no side
    assert audit.context_share == {2: Spread(0.5, 0.5, 0.5)}


def test_spreads_are_mean_least_and_most_over_the_steps(monkeypatch):
    steps = [([list(range(n))] * 2, [[list(range(n))]] * 2, 0.0) for n in (2, 3, 7)]
    by_hand(monkeypatch, steps)
    settings = MaskSettings((3, 4), "random", mask_ratio=0.5)
    audit = audit_masks(settings, batch_size=2, num_steps=3, batch_sizes=(2,))
    assert audit.block_patches == Spread(4.0, 2.0, 7.0)
    assert audit.context_share[2] == pytest.approx((4 / 12, 2 / 12, 7 / 12))
    assert audit.block_sizes == {}


# Closed forms


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.6), ((3, 8), 0.25)])
def test_random_patches_are_context_with_what_the_mask_ratio_leaves(grid, ratio):
    audit = audit_masks(MaskSettings(grid, "random", mask_ratio=ratio), seed=1)
    num_patches = grid[0] * grid[1]
    share = math.floor(ratio * num_patches + 0.5) / num_patches
    assert_probabilities(audit.context_map, 1 - share, audit.num_images)
    np.testing.assert_allclose(audit.context_map + audit.target_map, 1)
    assert audit.context_share[1] == pytest.approx((1 - share,) * 3)
    assert audit.block_patches == Spread(*[share * num_patches] * 3)
    assert (audit.target_overlap, audit.context_overlap, audit.redraw_rate) == (0, 0, 0)


def test_rasterized_patches_are_context_in_a_quarter_of_the_images():
    audit = audit_masks(MaskSettings((6, 10), "rasterized"), seed=2)
    quadrants = audit.context_map[::3, ::5]
    np.testing.assert_array_equal(audit.context_map, np.kron(quadrants, np.ones((3, 5))))
    assert_probabilities(quadrants, 0.25, audit.num_images)
    np.testing.assert_allclose(audit.target_map, 1 - audit.context_map)
    assert audit.block_sizes == {(3, 5): 1.0}
    assert audit.context_pieces == 1
    assert audit.target_overlap == 0


def chance_to_be_covered(side, length):
    """For each row of a grid, that a stretch of this length, equally likely anywhere, covers it."""
    starts = range(side - length + 1)
    return np.array([np.mean([start <= row < start + length for start in starts]) for row in range(side)])


def test_block_covers_each_patch_as_often_as_its_places_do():
    settings = MaskSettings((14, 8), "block", mask_ratio=54 / 112, target_aspect_ratio=(1.5, 1.5))
    audit = audit_masks(settings, seed=3)
    assert audit.block_sizes == {(9, 6): 1.0}
    covered = np.outer(chance_to_be_covered(14, 9), chance_to_be_covered(8, 6))
    assert_probabilities(audit.target_map, covered, audit.num_images)
    # Rows 5 to 8 and columns 2 to 5 (from 0) lie in every block.
    assert audit.num_never_seen == 4 * 4
    assert audit_notes(audit) == [f"Never context in {audit.num_images} images: 16 patches."]


def test_multi_block_targets_and_their_overlap_follow_from_independent_places():
    settings = MaskSettings(
        (8, 8),
        num_target_blocks=3,
        target_scale=(12 / 64, 12 / 64),
        target_aspect_ratio=(4 / 3, 4 / 3),
        allow_overlap=True,  # nothing is redrawn
    )
    audit = audit_masks(settings, seed=4)
    assert audit.block_sizes == {(4, 3): 1.0}
    covered = np.outer(chance_to_be_covered(8, 4), chance_to_be_covered(8, 3))
    once_or_more = 1 - (1 - covered) ** 3
    assert_probabilities(audit.target_map, once_or_more, audit.num_images)
    exactly_once = 3 * covered * (1 - covered) ** 2
    expected = 1 - exactly_once.sum() / once_or_more.sum()
    assert audit.target_overlap == pytest.approx(expected, abs=0.01)  # over ten standard errors of 4096 images
    # The context does not avoid the targets. Its block hides at most a row and a column, and a quarter is kept.
    assert audit.context_overlap > 0.3
    assert audit.redraw_rate == 0


# The published code, as measured on it


GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden" / "mask_stats.json").read_text())
PUBLISHED = {golden["grid"]: golden for golden in GOLDEN["grids"]}


@pytest.mark.parametrize(("side", "batch_size"), [(8, 1), (8, 128), (14, 1), (14, 16), (14, 128)])
def test_official_context_has_the_published_share_at_each_batch_size(side, batch_size):
    published = PUBLISHED[side]["context_size_after_trim_by_batch_size"][str(batch_size)]
    audit = audit_masks(official(side), batch_size=1, num_steps=200, seed=7, batch_sizes=(batch_size,))
    found, patches = audit.context_share[batch_size], side * side
    standard_error = published["std"] * math.sqrt(1 / 200 + 1 / published["n"])
    assert abs(found.mean * patches - published["mean"]) < 4 * standard_error
    assert found.least < found.mean < found.most


@pytest.mark.parametrize("side", [8, 14])
@pytest.mark.parametrize(
    ("batch_size", "name"), [(1, "patch_freq_in_context_before_trim"), (8, "patch_freq_in_context")]
)
def test_official_context_leans_upwards_as_the_published_one_does(side, batch_size, name):
    published = np.array(PUBLISHED[side][name]).reshape(side, side)
    audit = audit_masks(official(side), batch_size=batch_size, num_steps=400, seed=8, batch_sizes=(1,))
    upper, left = mask_audit._leaning(audit.context_map)
    assert upper == pytest.approx(published[: side // 2].sum() / published.sum(), abs=0.015)
    assert left == pytest.approx(published[:, : side // 2].sum() / published.sum(), abs=0.015)
    assert (upper > 0.6) == (batch_size > 1)


def test_official_never_uses_the_last_row_and_column_and_loses_context_with_the_batch():
    audit = audit_masks(official(14))
    for probabilities in (audit.context_map, audit.target_map):
        np.testing.assert_array_equal(np.argwhere(probabilities == 0), [
            [row, column] for row in range(14) for column in range(14) if row == 13 or column == 13
        ])  # fmt: skip
    means = [share.mean for share in audit.context_share.values()]
    assert list(audit.context_share) == [1, 8, 64, 256]
    assert means == sorted(means, reverse=True)
    notes = audit_notes(audit)
    assert [re.sub(r"\d+\.\d %", "x", note) for note in notes] == [
        "Never context in 4096 images: the last row and column.",
        "Never target in 4096 images: the last row and column.",
        "The context's share of the grid falls from x at batch 1 to x at batch 256: "
        "another batch size is another task.",
        "x of the context lies in the upper half of the image (batch 64).",
        "x of the context lies in the left half of the image (batch 64).",
    ]


def test_multi_block_context_has_one_share_at_every_batch_size_and_leans_nowhere():
    audit = audit_masks(MaskSettings((14, 14)))
    assert set(audit.context_share.values()) == {Spread(0.25, 0.25, 0.25)}
    assert (audit.num_never_seen, audit.num_never_targeted) == (0, 0)
    assert mask_audit._leaning(audit.context_map) == pytest.approx((0.5, 0.5), abs=0.03)
    assert audit.redraw_rate == pytest.approx(0.0074, abs=0.004)
    assert audit.context_pieces == pytest.approx(1.6, abs=0.1)
    assert audit_notes(audit) == []


# Any settings


@st.composite
def settings_of_any_strategy(draw):
    strategy = draw(st.sampled_from(["multi_block", "multi_block_official", "block", "rasterized", "random"]))
    grid = draw(st.tuples(st.integers(2, 8), st.integers(2, 8)).map(lambda half: (2 * half[0], 2 * half[1])))
    own = {"official_min_keep": 0} if strategy == "multi_block_official" else {}
    if strategy.startswith("multi_block"):
        own |= {"num_context_sets": draw(st.integers(1, 2)), "allow_overlap": draw(st.booleans())}
    return MaskSettings(grid, strategy, **own)


@given(settings_of_any_strategy(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_the_parts_of_any_audit_agree_with_each_other(settings, batch_size, num_steps, seed):
    audit = audit_masks(settings, batch_size=batch_size, num_steps=num_steps, seed=seed, batch_sizes=(batch_size, 7))
    assert audit.context_map.shape == audit.target_map.shape == settings.grid_size
    assert audit.context_map.mean() == pytest.approx(audit.context_share[batch_size].mean)
    # A target patch that k targets cover counts k times in M x P and once in the map.
    patches = settings.num_targets * audit.block_patches.mean
    assert audit.target_map.sum() <= patches + 1e-9
    assert (audit.target_overlap == 0) == (audit.target_map.sum() == pytest.approx(patches))
    if settings.masking_strategy != "random":
        assert sum(audit.block_sizes.values()) == pytest.approx(1)
        mean = sum(height * width * share for (height, width), share in audit.block_sizes.items())
        assert mean == pytest.approx(audit.block_patches.mean)
        assert list(audit.block_sizes.values()) == sorted(audit.block_sizes.values(), reverse=True)
    for share in (audit.redraw_rate, audit.target_overlap, audit.context_overlap):
        assert 0 <= share <= 1
    if settings.masking_strategy == "multi_block" and not settings.allow_overlap:
        assert audit.context_overlap == 0
    again = audit_masks(settings, batch_size=batch_size, num_steps=num_steps, seed=seed, batch_sizes=(batch_size, 7))
    assert render_audit(audit) == render_audit(again)
    np.testing.assert_array_equal(audit.context_map, again.context_map)


def test_another_seed_gives_other_masks_and_more_steps_begin_with_the_same():
    settings = MaskSettings((8, 8))
    one, more, other = (audit_masks(settings, num_steps=steps, seed=seed) for steps, seed in ((1, 5), (2, 5), (1, 6)))
    assert (one.context_map != other.context_map).any()
    assert set(one.block_sizes) <= set(more.block_sizes)
    second = 2 * more.context_map - one.context_map
    assert (second > -1e-9).all()
    assert (second < 1 + 1e-9).all()


# Notes


@pytest.mark.parametrize(
    "settings",
    [
        *(MaskSettings(grid) for grid in ((4, 4), (4, 16), (5, 5), (16, 16))),
        MaskSettings((14, 14), num_context_sets=2),
        MaskSettings((2, 2), "rasterized"),
        MaskSettings((4, 4), "random"),
    ],
    ids=lambda settings: f"{settings.masking_strategy}-{settings.grid_size}-{settings.num_context_sets}",
)
def test_unbiased_masks_have_no_notes(settings):
    audit = audit_masks(settings, seed=10, batch_sizes=(1, 16))
    assert audit_notes(audit) == []
    assert render_audit(audit).endswith("\n\nNotes: none; every patch is reached and no side is favoured.")


def unbiased(**changes) -> MaskAudit:
    """An audit with nothing to say, on a grid of 4x5 patches, with some changes."""
    fixed = {
        "settings": MaskSettings((4, 5)),
        "batch_size": 10,
        "num_steps": 400,
        "seed": 0,
        "context_map": np.full((4, 5), 0.25),
        "target_map": np.full((4, 5), 0.5),
        "context_share": {1: Spread(0.25, 0.2, 0.3), 64: Spread(0.25, 0.2, 0.3)},
        "redraw_rate": 0.0,
        "target_overlap": 0.0,
        "context_overlap": 0.0,
        "block_sizes": {(2, 3): 1.0},
        "block_patches": Spread(6.0, 6.0, 6.0),
        "context_pieces": 1.5,
    }
    return MaskAudit(**{**fixed, **changes})


def without(rows=(), columns=(), patches=()):
    probabilities = np.full((4, 5), 0.25)
    probabilities[list(rows)] = 0
    probabilities[:, list(columns)] = 0
    for patch in patches:
        probabilities[patch] = 0
    return probabilities


def leaning(axis, share):
    """Maps of which this share lies in the first half, a middle line counting half to each side."""
    rest = 1 - share
    weights = np.array([share, share, rest, rest])[:, None] if axis == 0 else np.array([share, share, 0.5, rest, rest])
    return np.broadcast_to(weights, (4, 5))


SHARES = {1: Spread(0.25, 0.2, 0.3), 64: Spread(0.2601, 0.2, 0.3), 8: Spread(0.9, 0.9, 0.9)}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"target_map": without(rows=[3])}, "Never target in 4000 images: the last row."),
        ({"target_map": without(rows=[3], columns=[4])}, "Never target in 4000 images: the last row and column."),
        ({"context_map": without(patches=[(1, 2), (2, 2)])}, "Never context in 4000 images: 2 patches."),
        (
            {"target_map": without(rows=[3], columns=[0, 4], patches=[(1, 2), (0, 2)])},
            "Never target in 4000 images: the last row and columns 1, 5 and 2 other patches.",
        ),
        (
            {"target_map": without(patches=[(0, 0)]), "num_steps": 7},
            "Not once target: 1 patch; of 70 images that may be chance: draw 80 or more, "
            "with a larger batch or more steps.",
        ),
        ({"target_map": without(patches=[(0, 0)]), "num_steps": 8}, "Never target in 80 images: 1 patch."),
        (
            {"context_share": SHARES},
            "The context's share of the grid rises from 25.0 % at batch 1 to 26.0 % at batch 64: "
            "another batch size is another task.",
        ),
        (
            {"context_share": {64: SHARES[1], 1: SHARES[64]}},
            "The context's share of the grid falls from 26.0 % at batch 1 to 25.0 % at batch 64: "
            "another batch size is another task.",
        ),
        ({"context_map": leaning(0, 0.54)}, "54.0 % of the context lies in the upper half of the image (batch 10)."),
        ({"context_map": leaning(0, 0.46)}, "54.0 % of the context lies in the lower half of the image (batch 10)."),
        ({"context_map": leaning(1, 0.55)}, "54.0 % of the context lies in the left half of the image (batch 10)."),
        ({"context_map": leaning(1, 0.45)}, "54.0 % of the context lies in the right half of the image (batch 10)."),
        (
            {"context_overlap": 1e-5},
            "under 0.1 % of the context patches lie inside targets, whose content is then seen.",
        ),
        ({"context_pieces": 4.1}, "The context is scattered: 4.1 pieces an image on average."),
        (
            {"redraw_rate": 0.11},
            "11.0 % of the images are redrawn for want of context, which makes their targets overlap more; a smaller "
            "context_keep_ratio, target_scale or num_target_blocks gives room.",
        ),
        (
            {"redraw_rate": 0.11, "settings": MaskSettings((4, 5), "multi_block_official", official_min_keep=1)},
            "11.0 % of the images are redrawn for want of context, which moves their context to where there are fewer "
            "targets; a smaller official_min_keep, target_scale or num_target_blocks gives room.",
        ),
    ],
)
def test_each_bias_has_its_note_and_no_other(changes, note):
    assert audit_notes(unbiased(**changes)) == [note]
    assert render_audit(unbiased(**changes)).endswith(f"\n\nNotes\n  - {note}")


@pytest.mark.parametrize(
    "changes",
    [
        {"context_share": {1: Spread(0.25, 0.2, 0.3), 64: Spread(0.2599, 0.2, 0.3)}},
        {"context_map": leaning(0, 0.529)},
        {"context_map": leaning(1, 0.471)},
        {"context_map": leaning(0, 0.64), "num_steps": 10},  # three standard errors of 100 images are 0.15
        {"context_pieces": 4.0},
        {"redraw_rate": 0.1},
        {"target_overlap": 0.9},
    ],
)
def test_what_is_not_notable_has_no_note(changes):
    assert audit_notes(unbiased(**changes)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (MaskSettings((14, 14), "random"), ["scattered"]),
        (MaskSettings((8, 8), "block"), ["Never context"]),
        (MaskSettings((8, 8), allow_overlap=True, context_keep_ratio=0.6), ["inside targets"]),
        (MaskSettings((4, 4), context_scale=(1, 1), context_keep_ratio=0.6), ["redrawn .* context_keep_ratio"]),
        (official(8, 8), ["Never context", "Never target", "falls", "upper", "left", "inside targets"]),
    ],
)
def test_biased_settings_have_just_the_notes_that_are_due(settings, words):
    notes = audit_notes(audit_masks(settings, batch_sizes=(1, 64)))
    assert len(notes) == len(words), notes
    for note, word in zip(notes, words, strict=True):
        assert re.search(word, note)


def test_few_images_are_not_blamed_on_the_sampler():
    """Of 64 images some corner is often in no target, which says nothing."""
    audits = [audit_masks(MaskSettings((16, 16)), batch_size=1, seed=seed, batch_sizes=(1,)) for seed in range(4)]
    missing = [audit for audit in audits if audit.num_never_targeted]
    assert missing
    for audit in missing:
        (note,) = [note for note in audit_notes(audit) if "target" in note]
        assert re.match(f"Not once target: {audit.num_never_targeted} patch.* of 64 images .* draw 1024 or more", note)
    enough = audit_masks(MaskSettings((16, 16)), batch_size=16, seed=missing[0].seed, batch_sizes=(1,))
    assert audit_notes(enough) == []


# The text


def test_the_text_has_a_line_for_each_number(monkeypatch):
    audit = replace(audit_by_hand(monkeypatch), block_patches=Spread(2.5, 2, 3))
    assert render_audit(audit) == (
        "multi_block on a grid of 3x4 patches: 4 images, 2 steps of 2, seed 0\n"
        "\n"
        "  context at batch 2             25.0 % of the grid (25.0 to 25.0)\n"
        "  context at batch 4             33.3 % of the grid (33.3 to 33.3)\n"
        "  a patch is context             0.0 % to 50.0 % of the time\n"
        "  a patch is target              0.0 % to 50.0 % of the time\n"
        # rows have 5, 3 and 4 of 12, columns 6, 0, 3 and 3
        "  context in upper, left half    54.2 % and 50.0 %\n"
        "  pieces of the context          2.5\n"
        "  context inside targets         16.7 % of the context\n"
        "  targets                        2 of 2 to 3 (mean 2.5) patches\n"
        "  target sizes, height x width   1x2 50 %, 2x1 50 %\n"
        "  in more than one target        33.3 % of the target patches\n"
        "  patches never context, target  4 and 4 of 12\n"
        "  images redrawn                 25.0 %\n"
        "\n"
        "Notes\n"
        "  - Not once context: column 2 and 1 other patch; of 4 images that may be chance: draw 48 or more, "
        "with a larger batch or more steps.\n"
        "  - Not once target: 4 patches; of 4 images that may be chance: draw 48 or more, "
        "with a larger batch or more steps.\n"
        "  - The context's share of the grid rises from 25.0 % at batch 2 to 33.3 % at batch 4: another batch size is "
        "another task.\n"
        "  - 16.7 % of the context patches lie inside targets, whose content is then seen.\n"
        "  - 25.0 % of the images are redrawn for want of context, which makes their targets overlap more; a smaller "
        "context_keep_ratio, target_scale or num_target_blocks gives room."
    )


def test_rare_sizes_are_counted_and_scattered_patches_have_none():
    sizes = {
        (height, 2): share for height, share in zip(range(1, 8), (0.3, 0.2, 0.2, 0.1, 0.1, 0.06, 0.04), strict=True)
    }
    text = render_audit(unbiased(block_sizes=sizes))
    assert "target sizes, height x width   1x2 30 %, 2x2 20 %, 3x2 20 %, 4x2 10 %, 5x2 10 %, 2 more\n" in text
    text = render_audit(unbiased(settings=MaskSettings((4, 5), "random"), block_sizes={}))
    assert "target sizes, height x width   no rectangles\n" in text
    assert "targets                        1 of 6 patches\n" in text


# Refusals


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"num_steps": True},
        {"seed": -1},
        {"batch_sizes": ()},
        {"batch_sizes": (8, 0)},
    ],
)
def test_numbers_that_cannot_be_audited_are_refused_with_one_that_works(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be")) as caught:
        audit_masks(MaskSettings((4, 4)), **bad)
    ((proposed, works),) = re.findall(r"for example (\w+)=(\d+|\(.*\))", str(caught.value))
    assert proposed == name
    quick = {"batch_size": 2, "num_steps": 1, "batch_sizes": (1,)}
    audit_masks(MaskSettings((4, 4)), **{**quick, name: eval(works)})
