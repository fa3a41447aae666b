"""Expected bands: made as the formula says, left and entered again, and asked for the recipe's own runs only."""

import dataclasses
import fnmatch
import functools
import json
import math
import runpy
import signal
import tomllib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from tiny import signal_in_step, tiny_flags, tiny_run

from ijepa_hf.figures.curves import draw_curves_figure
from ijepa_hf.recipes import expected_band
from ijepa_hf.recipes.arguments import argument_names, argument_values, differing_arguments
from ijepa_hf.recipes.expected_band import (
    NOT_COMPARED,
    BandCurve,
    BandWatch,
    ExpectedBand,
    RunRows,
    band_notice,
    find_band,
    load_band,
    read_band,
)
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names
from ijepa_hf.training.report import render_report
from ijepa_hf.training.signals import StoppedBySignal

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "record_band.py"))
make_band, loss_window, recipe_differences = (
    SCRIPT[name] for name in ("make_band", "loss_window", "recipe_differences")
)
BANDS = ROOT / "src" / "ijepa_hf" / "recipes" / "bands"


@functools.cache
def recipe_arguments():
    model, data, run = parse_arguments(["digits"])
    return argument_values(model.resolved(model.to_config()), data, run)


def arguments_of(**changes):
    return {**recipe_arguments(), "global_batch_size": 16, "num_train_images": 1437, **changes}


def run_of(seed=0, *, loss=None, rankme=None, knn=None, **changes):
    """Rows of a run that was never trained: values by step."""
    return RunRows(
        arguments_of(seed=seed, **changes),
        [{"step": step, "loss": value} for step, value in (loss or {}).items()],
        [{"step": step, "loss": 9.0, "target_patch_rankme": value} for step, value in (rankme or {}).items()],
        [{"step": step, "knn": value, "rankme": 99.0} for step, value in (knn or {}).items()],
    )


def constant_losses(value, num_steps=400, every=50):
    return {1: 1e6, **dict.fromkeys(range(every, num_steps + 1, every), value)}


def band_of(curves, **changes):
    fields = {"recipe": "digits", "seeds": (0, 1, 2), "machines": [], "loss_window": 10, "loss_rows": 2}
    return ExpectedBand(**{**fields, "curves": curves, "arguments": {}, **changes})


LOSS_CURVE = BandCurve((10, 20, 30, 40, 50), (1.0,) * 5, (2.0,) * 5)


def watch_losses(means, curve=LOSS_CURVE, **changes):
    """A run whose windows of ten steps have the given means, and the lines that it says."""
    watch = BandWatch(band_of({"loss": curve}, **changes), run_of())
    lines = []
    for number, mean in enumerate(means):
        lines += watch.add("loss", {"step": 10 * number + 5, "loss": mean - 0.25})
        lines += watch.add("loss", {"step": 10 * number + 10, "loss": mean + 0.25})
    return watch, lines


# -- making ----------------------------------------------------------------------------------------------------------


def test_losses_and_ranks_are_widened_by_their_ratio_and_knn_by_its_range():
    runs = [
        run_of(seed, loss=constant_losses(loss), rankme={0: rank, 400: rank}, knn={0: knn, 400: knn})
        for seed, loss, rank, knn in [(0, 1.0, 4.0, 0.5), (1, 2.0, 8.0, 0.6), (2, 3.0, 6.0, 0.55)]
    ]
    band = make_band("digits", runs, [{"device": "a CPU"}])
    assert (band.seeds, band.loss_window, band.loss_rows) == ((0, 1, 2), 200, 4)
    assert {name: curve.steps for name, curve in band.curves.items()} == {
        "loss": (200, 400), "rankme": (0, 400), "knn": (0, 400),
    }  # fmt: skip
    expected = {"loss": (1 / 3, 3 * 3), "rankme": (4 / 2, 8 * 2), "knn": (0.5 - 0.1, 0.6 + 0.1)}
    for name, (lower, upper) in expected.items():
        assert band.curves[name].lower == pytest.approx((lower, lower)), name
        assert band.curves[name].upper == pytest.approx((upper, upper)), name


def test_a_step_at_which_seeds_agree_by_chance_is_as_wide_as_two_steps_around_it():
    values = [(0.5,) * 6, (0.5, 0.5, 0.5, 0.7, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5, 0.6, 0.5)]
    runs = [
        run_of(seed, loss=constant_losses(1.0), knn=dict(zip(range(0, 600, 100), knn, strict=True)))
        for seed, knn in enumerate(values)
    ]
    curve = make_band("digits", runs, []).curves["knn"]
    assert curve.lower == pytest.approx((0.5, 0.3, 0.3, 0.3, 0.3, 0.3))
    assert curve.upper == pytest.approx((0.5, 0.7, 0.7, 0.9, 0.8, 0.7))


def test_no_bound_leaves_what_a_number_can_be():
    runs = [
        run_of(seed, loss=constant_losses(1.0), rankme={0: rank}, knn={0: knn})
        for seed, rank, knn in [(0, 1.5, 0.1), (1, 3.0, 0.9), (2, 3.0, 0.9)]
    ]
    curves = make_band("digits", runs, []).curves
    assert curves["rankme"].lower == (1.0,)  # 1.5 / 2 is no effective rank
    assert (curves["knn"].lower, curves["knn"].upper) == ((0.0,), (1.0,))


def test_losses_are_means_of_windows_without_the_row_of_the_first_step():
    losses = {1: 1000.0, **{step: float(step) for step in range(50, 501, 50)}}
    band = make_band("digits", [run_of(seed, loss=losses) for seed in range(3)], [])
    # 500 steps hold two windows of 200; what is left over goes to the last
    assert band.curves["loss"].steps == (200, 500)
    assert band.curves["loss"].lower == pytest.approx((125.0, 375.0))
    assert band.curves["loss"].upper == pytest.approx((125.0, 375.0))
    assert band.loss_rows == 4


def drawn_run(seed, generator):
    """Curves as long as those of the digits recipe: normal values, each correlated with the one before."""
    curves = []
    for length, correlation in ((18, 0.3), (11, 0.9), (9, 0.9)):
        noise = generator.normal(size=length)
        for step in range(1, length):
            noise[step] = correlation * noise[step - 1] + math.sqrt(1 - correlation**2) * noise[step]
        curves.append(noise)
    losses = {200 * number + 200: math.exp(0.1 * value) for number, value in enumerate(curves[0])}
    ranks = {400 * number: math.exp(2 + 0.2 * value) for number, value in enumerate(curves[1])}
    knn = {450 * number: 0.5 + 0.05 * value for number, value in enumerate(curves[2])}
    return run_of(seed, loss=losses, rankme=ranks, knn=knn, logging_steps=50)


@pytest.mark.parametrize(("widened_by", "least", "most"), [(1.0, 0.01, 0.1), (0.0, 0.9, 1.0)])
def test_a_healthy_run_is_rarely_outside_five_others_and_nearly_always_outside_their_plain_range(
    monkeypatch, widened_by, least, most
):
    monkeypatch.setitem(make_band.__globals__, "WIDENED_BY", widened_by)
    generator = np.random.default_rng(0)
    left = 0
    for _ in range(400):
        *others, new = [drawn_run(seed, generator) for seed in range(6)]
        left += BandWatch(make_band("digits", others, []), new).verdict().startswith("outside")
    assert least < left / 400 <= most


@pytest.mark.parametrize(
    ("num_steps", "logging_steps", "window"),
    [(3560, 50, 200), (100, 50, 200), (100_000, 10, 5000), (100_001, 10, 5010), (40, 1, 4)],
)
def test_a_window_is_a_twentieth_of_the_run_or_four_rows(num_steps, logging_steps, window):
    assert loss_window(num_steps, logging_steps) == window


def test_runs_of_two_seeds_of_one_seed_twice_or_of_two_recipes_make_no_band():
    runs = [run_of(seed, loss=constant_losses(1.0)) for seed in range(3)]
    with pytest.raises(ValueError, match=r"seeds \(0, 1\); give at least 3 runs"):
        make_band("digits", runs[:2], [])
    with pytest.raises(ValueError, match=r"seeds \(0, 1, 2, 0\)"):
        make_band("digits", [*runs, runs[0]], [])
    other = run_of(5, loss=constant_losses(1.0), context_keep_ratio=0.25)
    with pytest.raises(ValueError, match="seed 5 differs from that of seed 0 in context_keep_ratio"):
        make_band("digits", [*runs, other], [])


def test_runs_with_rows_at_different_steps_make_no_band():
    runs = [run_of(seed, loss=constant_losses(1.0), knn={100 + seed: 0.5}) for seed in range(3)]
    with pytest.raises(ValueError, match="rows of kNN at different steps"):
        make_band("digits", runs, [])


def test_what_a_file_holds_is_the_band_again():
    runs = [run_of(seed, loss=constant_losses(1.0 + seed), knn={0: 0.5}) for seed in range(3)]
    band = make_band("digits", runs, [{"device": "a CPU", "torch": "2"}])
    assert read_band(band.as_json()) == band


# -- comparing -------------------------------------------------------------------------------------------------------


def test_a_curve_that_leaves_and_comes_back_says_so_once_each():
    watch, lines = watch_losses([1.5, 3.0, 4.0, 3.5, 1.5])
    assert lines == [
        "step 30 loss 4 (mean since step 21) is outside the expected band of digits: 1 to 2",
        "step 50 loss 1.5 (mean since step 41) is back inside the expected band of digits: 1 to 2",
    ]
    assert watch.verdict() == (
        "outside the expected band of digits (3 seeds): "
        "loss from step 20 until step 50 (4 at step 30, expected 1 to 2)"
    )
    (excursion,) = watch.excursions("loss")
    assert (excursion.first.step, excursion.farthest.step, excursion.back.step) == (20, 30, 50)


def test_one_point_outside_is_let_pass_unless_it_is_the_last():
    watch, lines = watch_losses([1.5, 3.0, 1.5, 0.5, 1.5])
    assert (lines, watch.verdict()) == ([], "inside the expected band of digits (3 seeds): loss")
    watch, lines = watch_losses([1.5, 1.5, 1.5, 1.5, 0.5])
    assert lines == ["step 50 loss 0.5 (mean since step 41) is outside the expected band of digits: 1 to 2"]
    assert watch.verdict().endswith("loss from step 50 on (0.5 at step 50, expected 1 to 2)")


def test_a_curve_that_leaves_twice_is_said_to_have_left_twice():
    watch, lines = watch_losses([3.0, 3.0, 1.5, 3.0, 3.0])
    assert [line.split("(")[0] for line in lines] == ["step 20 loss 3 ", "step 30 loss 1.5 ", "step 50 loss 3 "]
    assert "from step 10 until step 30 (3 at step 10, expected 1 to 2) and from step 40 on" in watch.verdict()


def test_bounds_belong_to_the_band_and_are_interpolated_between_its_steps():
    curve = BandCurve((0, 100), (1.0, 2.0), (3.0, 6.0))
    assert curve.at(50) == (1.5, 4.5)
    assert (curve.at(0), curve.at(100), curve.at(101), curve.at(-1)) == ((1.0, 3.0), (2.0, 6.0), None, None)
    watch = BandWatch(band_of({"loss": LOSS_CURVE, "rankme": curve}), run_of())
    for step, value in ((0, 3.0), (50, 1.5), (100, 6.0), (101, 99.0)):
        assert watch.add("rankme", {"step": step, "target_patch_rankme": value}) == []
    assert [point.step for point in watch.points["rankme"]] == [0, 50, 100]


def test_a_run_that_logs_oftener_is_compared_over_the_same_windows():
    watch = BandWatch(band_of({"loss": LOSS_CURVE}), run_of(loss={step: step / 20 for step in range(1, 51)}))
    # the mean of steps 11 to 20 is 15.5, and so on; step 1 is left out
    assert [point.step for point in watch.points["loss"]] == [10, 20, 30, 40, 50]
    assert [20 * point.value for point in watch.points["loss"]] == pytest.approx([6.0, 15.5, 25.5, 35.5, 45.5])


def test_a_window_closes_at_its_last_step_or_with_the_first_row_after_it():
    watch = BandWatch(band_of({"loss": LOSS_CURVE}), run_of())
    for step in (3, 6, 9):
        watch.add("loss", {"step": step, "loss": 1.5})
    assert watch.points["loss"] == []
    watch.add("loss", {"step": 12, "loss": 9.0})
    assert [(point.step, point.value) for point in watch.points["loss"]] == [(10, 1.5)]


def test_a_run_that_logged_too_seldom_or_not_at_all_is_not_said_to_be_inside():
    band = band_of({"loss": LOSS_CURVE, "knn": BandCurve((0, 50), (0.1, 0.2), (0.5, 0.6))}, loss_rows=4)
    watch = BandWatch(band, run_of(loss=dict.fromkeys(range(10, 51, 10), 1.5), knn={0: 0.2, 50: 0.3}))
    assert watch.verdict() == ("inside the expected band of digits (3 seeds): kNN; too few rows to compare: loss")
    watch = BandWatch(band, run_of(loss=dict.fromkeys(range(5, 51, 5), 1.5)))
    assert watch.verdict() == "inside the expected band of digits (3 seeds): loss; too few rows to compare: kNN"
    assert "inside" not in BandWatch(band, run_of()).verdict()


def test_curves_are_told_apart_and_written_as_people_read_them():
    flat = {name: BandCurve((0, 50, 100), (low,) * 3, (high,) * 3) for name, low, high in [
        ("loss", 0.1, 0.2), ("rankme", 5.0, 9.0), ("knn", 0.5, 0.75),
    ]}  # fmt: skip
    run = run_of(
        loss=dict.fromkeys(range(5, 101, 5), 0.15), rankme=dict.fromkeys((0, 50, 100), 3.0), knn={0: 0.6, 100: 0.251}
    )
    verdict = BandWatch(band_of(flat), run).verdict()
    assert verdict == (
        "outside the expected band of digits (3 seeds): RankMe from step 0 on (3.0 at step 0, expected 5.0 to 9.0); "
        "kNN from step 100 on (25.1 at step 100, expected 50.0 to 75.0); inside: loss"
    )


def test_going_on_after_any_row_says_what_an_uninterrupted_run_says():
    generator = np.random.default_rng(3)
    means = generator.uniform(0.2, 3.0, 24)
    curve = BandCurve(tuple(range(10, 241, 10)), (1.0,) * 24, (2.0,) * 24)
    rows = [{"step": step, "loss": means[(step - 1) // 10]} for step in range(5, 241, 5)]
    band = band_of({"loss": curve})
    whole = BandWatch(band, run_of())
    lines = [whole.add("loss", row) for row in rows]
    assert sum(map(len, lines)) > 5
    for done in range(len(rows)):
        resumed = BandWatch(band, dataclasses.replace(run_of(), metrics=rows[:done]))
        assert [resumed.add("loss", row) for row in rows[done:]] == lines[done:]
        assert (resumed.verdict(), resumed.as_dict()) == (whole.verdict(), whole.as_dict())


# -- which runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch):
    """A band of the digits recipe in place of those that are shipped."""
    arguments = {name: value for name, value in arguments_of().items() if name not in NOT_COMPARED}
    band = band_of({"loss": LOSS_CURVE}, arguments=arguments)
    monkeypatch.setattr(expected_band, "_shipped_bands", lambda: [band])
    return band


def another(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value}-not"


def test_a_run_is_compared_whatever_leaves_the_curves_alone_and_no_other(shipped):
    arguments = arguments_of()
    for name in sorted(argument_names() | {"global_batch_size", "num_train_images"}):
        changed = {**arguments, name: another(arguments[name])}
        if name in NOT_COMPARED:
            assert find_band(changed) == shipped, name
        else:
            assert find_band(changed) is None, name
            assert differing_arguments(shipped.arguments, changed, NOT_COMPARED) == [
                f"{name} is {arguments[name]!r} there, {changed[name]!r} here"
            ]
    assert argument_names("place", "speed") | {"seed", "logging_steps", "on_collapse"} < NOT_COMPARED
    assert not NOT_COMPARED & {"eval_split_name", "label_column_name", "max_eval_samples", "learning_rate"}


def test_the_batch_of_a_device_counts_where_the_published_masks_depend_on_it():
    arguments = arguments_of(masking_strategy="multi_block_official")
    run = RunRows(arguments, [{"step": step, "loss": 1.0} for step in range(1, 401)])
    runs = [dataclasses.replace(run, arguments={**arguments, "seed": seed}) for seed in range(3)]
    band = make_band("digits", runs, [])
    assert differing_arguments(band.arguments, arguments, NOT_COMPARED) == []
    assert differing_arguments(band.arguments, {**arguments, "per_device_train_batch_size": 8}, NOT_COMPARED) == [
        "per_device_train_batch_size is 16 there, 8 here"
    ]


def test_a_band_from_before_an_argument_was_there_compares_with_its_default(shipped):
    old = {name: value for name, value in shipped.arguments.items() if name not in ("loss_type", "learning_rate")}
    assert differing_arguments(old, arguments_of(learning_rate=None), NOT_COMPARED) == []
    assert differing_arguments(old, arguments_of(loss_type="mse", learning_rate=None), NOT_COMPARED) == [
        "loss_type is 'smooth_l1' there, 'mse' here"
    ]


def test_a_start_says_what_it_is_compared_with_or_what_keeps_the_recipe_from_it(shipped):
    given = set(load_recipe("digits"))
    assert band_notice(arguments_of(), given) == "digits (3 seeds): loss"
    changed = arguments_of(context_keep_ratio=0.3)
    assert band_notice(changed, {*given, "context_keep_ratio"}) == (
        "not compared with digits's: context_keep_ratio is 0.4 there, 0.3 here"
    )
    assert band_notice({**changed, "dataset_name": "shapes"}, given) is None
    assert band_notice(changed, given - {"patch_size"}) is None  # not started from the recipe
    assert band_notice(changed, set()) is None


# -- shipped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(BANDS.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_band_is_of_its_recipe_as_it_is_now(path):
    band = load_band(path.stem)
    assert band is not None
    assert band.recipe == path.stem
    assert recipe_differences(path.stem, band.arguments) == []
    assert len(set(band.seeds)) >= SCRIPT["LEAST_SEEDS"]
    assert band.machines
    for name, curve in band.curves.items():
        assert len(curve.steps) == len(curve.lower) == len(curve.upper) > 5, name
        assert list(curve.steps) == sorted(set(curve.steps))
        assert all(lower < upper for lower, upper in zip(curve.lower, curve.upper, strict=True)), name


def test_digits_ships_a_band_of_three_curves_and_a_recipe_that_was_not_measured_none():
    band = load_band("digits")
    assert band is not None
    assert set(band.curves) == {"loss", "rankme", "knn"}
    assert load_band("in22k-vitg16") is None
    assert {path.stem for path in BANDS.glob("*.json")} <= set(recipe_names())


def test_bands_and_templates_of_cards_are_packed_into_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ijepa_hf"]
    package = BANDS.parents[1]
    found = [*package.rglob("*.json"), *package.rglob("*.md")]
    assert {"digits.json", "run_card.md", "classifier_card.md"} <= {path.name for path in found}
    for path in (path.relative_to(package).as_posix() for path in found):
        # a pattern's star does not cross a folder
        assert any(fnmatch.fnmatch(path, each) and path.count("/") == each.count("/") for each in patterns), path


# -- the script ------------------------------------------------------------------------------------------------------


def write_run(folder, seed, *, loss, verdict=None, **changes):
    folder.mkdir()
    run = run_of(seed, loss=constant_losses(loss), **changes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.metrics))
    report = {"arguments": run.arguments, "machine": {"device": "a CPU"}, "collapse_verdict": verdict}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def record(*words):
    SCRIPT["main"]([str(word) for word in words])


def test_the_script_writes_a_band_and_holds_each_run_against_the_others(tmp_path, capsys):
    losses = {0: 1.0, 1: 2.0, 2: 1.5, 3: 100.0}
    folders = [write_run(tmp_path / str(seed), seed, loss=loss) for seed, loss in losses.items()]
    record("digits", *folders, "--output", tmp_path / "band.json")
    band = read_band((tmp_path / "band.json").read_text())
    assert (band.seeds, band.machines) == ((0, 1, 2, 3), [{"device": "a CPU"}])
    assert band.curves["loss"].upper == pytest.approx((1e4, 1e4))
    said = capsys.readouterr().out.splitlines()
    assert "loss at 2 steps" in said[0]
    assert [line.split(":")[0] for line in said[1:]] == [f"seed {seed} beside the others" for seed in losses]
    assert "outside" in said[4]
    assert "from step 200 on (100 at step 200, expected 0.5 to 4)" in said[4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "is no run of digits: learning_rate is 0.001 there, 0.1 here"),
        (
            {"verdict": {"name": "complete collapse", "is_failure": True}},
            "complete collapse; a band is made of healthy",
        ),
    ],
)
def test_the_script_refuses_runs_that_a_band_cannot_be_made_of(tmp_path, capsys, changes, message):
    folders = [write_run(tmp_path / str(seed), seed, loss=1.0) for seed in range(2)]
    folders.append(write_run(tmp_path / "2", 2, loss=1.0, **changes))
    with pytest.raises(SystemExit):
        record("digits", *folders, "--output", tmp_path / "band.json")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "band.json").exists()
    (tmp_path / "2" / "report.json").unlink()
    with pytest.raises(SystemExit):
        record("digits", *folders)
    assert "holds no finished run" in capsys.readouterr().err


# -- runs ------------------------------------------------------------------------------------------------------------

TINY = {"max_train_steps": 12, "checkpointing_steps": 12, "seed": 1}
SCORED = {**TINY, "eval_split_name": "test", "eval_steps": 6, "max_eval_samples": 40}


def ship_tiny_band(monkeypatch, flags, **curves):
    """Makes tiny runs with some flags runs of a recipe that has a band, which holds what is not said otherwise."""
    model, data, run = parse_arguments(tiny_flags("runs/tiny", **flags))
    arguments = argument_values(model.resolved(model.to_config()), data, run)
    arguments = {**arguments, "global_batch_size": 8, "num_train_images": 64}
    held = {
        "loss": BandCurve((4, 8, 12), (0.0,) * 3, (9.0,) * 3),
        "rankme": BandCurve((0, 12), (1.0, 1.0), (32.0, 32.0)),
        "knn": BandCurve((0, 12), (0.0, 0.0), (1.0, 1.0)),
    }
    compared = {name: value for name, value in arguments.items() if name not in NOT_COMPARED}
    band = band_of({**held, **curves}, loss_window=4, loss_rows=4, arguments=compared)
    monkeypatch.setattr(expected_band, "_shipped_bands", lambda: [band])


def lines_on_bands(text):
    return [line for line in text.replace("\r", "\n").splitlines() if "expected band of" in line]


def test_a_run_of_the_recipe_says_at_once_what_leaves_and_at_its_end_what_is_inside(tmp_path, monkeypatch, capsys):
    knn, rankme = BandCurve((0, 12), (0.0, 2.0), (1.0, 3.0)), BandCurve((0, 12), (1.0, 80.0), (32.0, 99.0))
    ship_tiny_band(monkeypatch, SCORED, knn=knn, rankme=rankme)
    path = tiny_run(tmp_path / "run", **SCORED, logging_steps=2, diagnostics_steps=6)
    said = capsys.readouterr().out
    assert "  expected band           digits (3 seeds): loss, RankMe, kNN\n" in said
    lines = lines_on_bands(said)
    evaluations = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    diagnostics = [json.loads(line) for line in (path / "diagnostics.jsonl").read_text().splitlines()]
    values = f"{100 * evaluations[-1]['knn']:.1f}", f"{diagnostics[-1]['target_patch_rankme']:.1f}"
    assert lines[:2] == [
        f"step 12 kNN {values[0]} is outside the expected band of digits: 200.0 to 300.0",
        f"step 12 RankMe {values[1]} is outside the expected band of digits: 80.0 to 99.0",
    ]
    assert len(lines) == 3
    assert lines[2].startswith("outside the expected band of digits (3 seeds): RankMe from step 6 on (")
    assert lines[2].endswith("; inside: loss")
    found = json.loads((path / "report.json").read_text())["expected_band"]
    assert {name: curve["points"] for name, curve in found["curves"].items()} == {"loss": 3, "rankme": 3, "knn": 3}
    assert found["verdict"] == lines[2]


def test_a_run_with_other_arguments_says_nothing(tmp_path, monkeypatch, capsys):
    ship_tiny_band(monkeypatch, TINY)
    path = tiny_run(tmp_path / "run", **TINY, weight_decay=0.05)
    assert "band" not in capsys.readouterr().out
    assert json.loads((path / "report.json").read_text())["expected_band"] is None


def test_a_stopped_run_that_goes_on_says_what_an_uninterrupted_one_says(tmp_path, monkeypatch, capsys):
    ship_tiny_band(monkeypatch, TINY, loss=BandCurve((4, 8, 12), (100.0, 100.0, 0.0), (101.0, 101.0, 9.0)))
    whole = tiny_run(tmp_path / "whole", **TINY)
    expected = lines_on_bands(capsys.readouterr().out)
    # the second window takes rows from before the stop and from after it
    assert expected[0].startswith("step 8 loss ")
    assert "(mean since step 5) is outside the expected band of digits: 100 to 101" in expected[0]
    assert "(mean since step 9) is back inside the expected band of digits: 0 to 9" in expected[1]
    assert expected[2].startswith("outside the expected band of digits (3 seeds): loss from step 4 until step 12 (")
    assert expected[2].endswith("; too few rows to compare: RankMe, kNN")
    assert len(expected) == 3
    with monkeypatch.context() as patch:
        signal_in_step(patch, 7, signal.SIGTERM)  # within the second window
        with pytest.raises(StoppedBySignal):
            tiny_run(tmp_path / "run", **TINY)
    first = lines_on_bands(capsys.readouterr().out)
    path = tiny_run(tmp_path / "run", **TINY, resume_from_checkpoint="latest")
    assert first + lines_on_bands(capsys.readouterr().out) == expected
    reports = [json.loads((folder / "report.json").read_text())["expected_band"] for folder in (whole, path)]
    assert reports[0] == reports[1]
    assert reports[0]["verdict"] in render_report(path)


def test_a_band_is_shaded_where_it_is_and_what_is_compared_is_dotted(tmp_path):
    curves = {
        "loss": LOSS_CURVE,
        "rankme": BandCurve((0, 50), (5.0, 6.0), (9.0, 8.0)),
        "knn": BandCurve((0, 50), (0.25, 0.5), (0.5, 0.75)),
    }
    run = run_of(loss=dict.fromkeys(range(5, 51, 5), 1.5), rankme={0: 7.0, 50: 7.0}, knn={0: 0.3, 50: 0.6})
    rows = [{**row, "target_rankme": 7.5} for row in run.metrics]
    watch = BandWatch(band_of(curves), run)
    figure = draw_curves_figure(rows, tmp_path / "curves.png", run.evaluations, expected=watch)
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    corners = {
        "Loss": {(5.0, 1.0), (45.0, 1.0), (5.0, 2.0), (45.0, 2.0)},  # at the middle of the windows
        "RankMe of the targets": {(0.0, 5.0), (50.0, 6.0), (50.0, 8.0), (0.0, 9.0)},
        "kNN of the target encoder": {(0.0, 25.0), (50.0, 50.0), (50.0, 75.0), (0.0, 50.0)},
    }
    for title, expected in corners.items():
        (area,) = panels[title].collections
        drawn = {(float(x), float(y)) for x, y in area.get_paths()[0].vertices}
        assert expected <= drawn, title
        assert tuple(area.get_facecolor()[0]) == to_rgba("#999999", 0.3)
        assert "expected, 3 seeds" in [text.get_text() for text in panels[title].get_legend().get_texts()]
    dots = panels["Loss"].lines[1]
    assert dots.get_xdata().tolist() == [5, 15, 25, 35, 45]
    assert dots.get_ydata().tolist() == [1.5] * 5
    assert panels["RankMe of the targets"].lines[1].get_ydata().tolist() == [7.0, 7.0]
