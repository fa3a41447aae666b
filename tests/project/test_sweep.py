"""`scripts/sweep.py`: what it reads, runs once, and says of an order."""

import json
import math
import sys
from pathlib import Path

import pytest
from scipy import stats
from warm_python import warm_executable

from ijepa_hf.recipes.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import sweep as sweeps  # noqa: E402

ABLATIONS = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
BASES = sorted((ROOT / "recipes" / "ablations" / "bases").glob("*.yaml"))
TINY_BASE = """
dataset_name: digits
image_size: 32
patch_size: 8
hidden_size: 16
num_hidden_layers: 1
num_attention_heads: 2
predictor_hidden_size: 8
predictor_num_hidden_layers: 1
masking_strategy: random
max_train_samples: 64
per_device_train_batch_size: 16
max_train_steps: 3
learning_rate: 1.0e-3
num_cpu_threads: 1
min_crop_scale: 1.0
diagnostics_steps: 0
"""
TINY_SWEEP = """
title: Shares that are target
source: made up
settings:
  - {name: most, flags: {}, paper: 3}
  - {name: half, flags: {mask_ratio: 0.5}, paper: 2}
  - {name: squared, flags: {loss_type: mse}}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.yaml").write_text(TINY_BASE)
    (tmp_path / "shares.yaml").write_text(TINY_SWEEP)
    return tmp_path


def command(files, *more):
    return [
        str(files / "shares.yaml"), "--base", str(files / "base.yaml"), "--output_dir", str(files / "out"),
        "--max_probe_samples", "400", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_shipped_ablation_is_a_run_that_pretrain_takes(path, base):
    sweep = sweeps.read_sweep(path)
    sweeps.check_settings(sweep, str(base))
    assert sweep.settings[0].flags == {}  # the reference is the base itself


def test_the_papers_figures_are_those_of_its_tables():
    figures = {path.stem: [each.paper for each in sweeps.read_sweep(path).settings] for path in ABLATIONS}
    assert figures["masking"] == [54.2, 20.2, 17.6, 15.5]
    assert figures["targets"] == [66.9, 40.7]
    assert figures["target_scale"] == [54.2, 42.4, 39.2, 38.9, 33.6, 19.2]
    assert figures["context_scale"] == [54.2, 49.3, 47.1, 31.2]
    assert figures["num_targets"] == [54.2, 9.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x", "keys title, source and settings"),
        ("title: x\nsource: y\nsettings: [{name: a, flags: {}}]", "at least two"),
        ("title: x\nsource: y\nsettings: [{name: a}, {name: b, flags: {}}]", "must have name and flags"),
        ("title: x\nsource: y\nsettings: [{name: a, flags: {}}, {name: b, flags: {}}]", "the same flags"),
        ("title: [", "cannot be read"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_and_says_why(files, capsys, text, message):
    (files / "shares.yaml").write_text(text)
    assert sweeps.main(command(files)) == 2
    assert message in capsys.readouterr().err
    assert not (files / "out").exists()


def test_a_flag_that_pretrain_refuses_is_found_before_any_run(files, capsys):
    (files / "shares.yaml").write_text(TINY_SWEEP.replace("mask_ratio: 0.5", "mask_ratoi: 0.5"))
    assert sweeps.main(command(files)) == 2
    assert "'half'" in (said := capsys.readouterr().err)
    assert "mask_ratio" in said  # the nearest name
    assert not (files / "out").exists()


def test_a_sweep_trains_and_scores_each_setting_and_finishes_what_is_missing(files, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_executable(files))
    assert sweeps.main(command(files, "--seeds", "1", "--jobs", "2")) == 0
    first = capsys.readouterr().out
    results = files / "out" / "results"
    assert sorted(path.name for path in results.iterdir()) == sorted(
        f"{name}-seed-1.json" for name in ("base", "mask_ratio=0.5", "loss_type=mse", "untrained")
    )
    row = json.loads((results / "mask_ratio=0.5-seed-1.json").read_text())
    assert row["arguments"]["mask_ratio"] == 0.5
    assert row["arguments"]["seed"] == 1
    assert row["step"] == 3
    assert all(0 <= row["scores"][name] <= 1 for name in ("knn", "linear", "low_shot"))
    for name in ("most", "half", "squared", "untrained"):
        assert f"| {name} | " in first
    assert (files / "out" / "shares.md").read_text() in first
    times = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    missing = results / "mask_ratio=0.5-seed-1.json"
    missing.unlink()
    assert sweeps.main(command(files, "--seeds", "1")) == 0
    assert capsys.readouterr().out == first  # the run itself was finished: its scores are found again
    assert json.loads(missing.read_text())["scores"] == row["scores"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != missing)


def put_results(files, names=("base", "mask_ratio=0.5", "loss_type=mse", "untrained"), seeds=(0, 1)):
    """Results as a sweep writes them; kNN is the seed's alone."""
    flags = {"mask_ratio=0.5": {"mask_ratio": 0.5}, "loss_type=mse": {"loss_type": "mse"}}
    (files / "kept").mkdir()
    for name in names:
        for seed in seeds:
            told = {**load_recipe(str(files / "base.yaml")), **flags.get(name, {}), "seed": seed}
            row = {"name": name, "arguments": told, "scores": {"knn": 0.25 + 0.5 * seed, "rankme": 3.0}}
            (files / "kept" / f"{name}-seed-{seed}.json").write_text(json.dumps(row))
    return ["--results_dir", str(files / "kept")]


def test_results_that_are_there_are_taken_as_they_are_and_nothing_is_trained(files, capsys):
    assert sweeps.main(command(files, "--seeds", "0", "1", *put_results(files))) == 0
    printed = capsys.readouterr().out
    _, half = sweeps.interval_of_mean([0.25, 0.75])
    for name in ("most", "half", "squared", "untrained"):
        assert f"| {name} | 50.0 ± {100 * half:.1f} | 3.00 ± 0.00 | " in printed
    assert "- knn: undecided most > half" in printed
    assert [path.name for path in (files / "out").iterdir()] == ["shares.md"]


def test_results_of_other_arguments_are_not_taken_for_these(files, capsys):
    told = put_results(files)
    (files / "base.yaml").write_text(TINY_BASE.replace("hidden_size: 16", "hidden_size: 32"))
    assert sweeps.main(command(files, "--seeds", "0", *told)) == 2
    assert "hidden_size" in capsys.readouterr().err


def test_a_run_that_fails_is_said_and_keeps_no_other_from_its_place(files, capsys):
    (files / "out" / "mask_ratio=0.5").mkdir(parents=True)
    (files / "out" / "mask_ratio=0.5" / "seed-0").write_text("in the way")
    told = put_results(files, names=("base", "loss_type=mse", "untrained"))
    assert sweeps.main(command(files, "--seeds", "0", *told)) == 1
    said = capsys.readouterr()
    assert "mask_ratio=0.5" in said.err
    assert "| half | not measured |" in said.out
    assert "| squared | 25.0 one seed |" in said.out


def test_the_interval_is_students_and_of_one_seed_there_is_none():
    values = [0.71, 0.78, 0.75]
    mean, half = sweeps.interval_of_mean(values)
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert sweeps.interval_of_mean([0.5]) == (0.5, math.inf)


def test_an_order_agrees_disagrees_or_is_undecided_where_intervals_overlap():
    sweep = sweeps.Sweep(
        "made up", "", "",
        [sweeps.Setting("a", {}, 50.0), sweeps.Setting("b", {"x": 1}, 40.0), sweeps.Setting("c", {"x": 2}, 30.0),
         sweeps.Setting("d", {"x": 3}, None)],
    )  # fmt: skip
    scores = {"a": [0.9, 0.901, 0.902], "b": [0.7, 0.5, 0.9], "c": [0.95, 0.951, 0.952], "d": [0.1, 0.1, 0.1]}
    assert sweeps.order_of(sweep, scores) == {
        "agrees": [], "disagrees": ["a > c"], "undecided": ["a > b", "b > c"],
    }  # fmt: skip
    scores["c"] = [0.1, 0.101, 0.102]
    assert sweeps.order_of(sweep, scores)["agrees"] == ["a > c", "b > c"]
    assert sweeps.order_of(sweep, {name: values[:1] for name, values in scores.items()})["agrees"] == []


def test_without_figures_of_the_paper_settings_are_told_beside_the_first():
    sweep = sweeps.Sweep("made up", "", "", [sweeps.Setting(name, {"x": name}, None) for name in "abcd"])
    rows = {
        "a": [0.5, 0.501, 0.502], "b": [0.7, 0.71, 0.72], "c": [0.1, 0.11, 0.12], "d": [0.2, 0.5, 0.8],
    }  # fmt: skip
    assert sweeps.beside_the_first(sweep, rows) == {"better": ["b"], "worse": ["c"], "undecided": ["d"]}
    assert sweeps.beside_the_first(sweep, {"b": rows["b"]}) == {"better": [], "worse": [], "undecided": []}
    results = {name: [{"scores": {"knn": value, "rankme": 1.0}} for value in values] for name, values in rows.items()}
    lines = sweeps.render_table(sweep, "digits", results).splitlines()
    assert lines[-3:] == [
        "Beside a; undecided where intervals overlap:", "", "- knn: better b; worse c; undecided d",
    ]  # fmt: skip


def test_untrained_results_of_other_arguments_are_not_taken_for_these(files, capsys):
    results = files / "out" / "results"
    results.mkdir(parents=True)
    (results / "untrained-seed-0.json").write_text('{"arguments": {"hidden_size": 64}, "scores": {}}')
    assert sweeps.main(command(files, "--seeds", "0")) == 2
    assert "untrained-seed-0.json is of a run with other values of" in capsys.readouterr().err


KEPT_RESULTS = ROOT / "benchmarks" / "results" / "ablations"
PAGE = (ROOT / "docs" / "ablations.md").read_text("utf-8")
MEASURED = [
    ("digits", "0 1 2", ("masking", "targets", "num_targets", "moving_average", "beyond")),
    ("digits", "0 1 2 3 4", ("vicreg",)),
    ("shapes", "0 1 2", ("masking", "targets", "num_targets", "moving_average")),
]
LEFT_OUT = {
    "base": "base",
    "surplus dropped at random": "context_surplus=random",
    "SIGReg 0.01": "sigreg_weight=0.01",
    "tanh of 0.5 times the targets": "normalize_targets=False,target_tanh_scale=0.5",
    "StoP 0.25": "mask_position_noise=0.25",
}


@pytest.mark.parametrize(("base", "seeds", "names"), MEASURED)
def test_the_tables_of_the_page_are_what_the_committed_results_give(base, seeds, names, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "load_scored_images", lambda *_, **__: None)
    monkeypatch.setattr(sweeps, "_train", lambda *_: pytest.fail("a result is missing"))
    recipes = ROOT / "recipes" / "ablations"
    told = ["--base", str(recipes / "bases" / f"{base}.yaml"), "--output_dir", str(tmp_path)]
    told += ["--results_dir", str(KEPT_RESULTS / base), "--seeds", *seeds.split()]
    assert sweeps.main([*(str(recipes / f"{name}.yaml") for name in names), *told]) == 0
    for name in names:
        assert (tmp_path / f"{name}.md").read_text("utf-8") in PAGE


def test_what_was_left_out_stands_on_the_page_as_it_was_measured():
    sweep = sweeps.Sweep(
        "left_out", "Measured, and left out of the package again", "each at one value, 3 seeds",
        [sweeps.Setting(title, {"x": folder}, None) for title, folder in LEFT_OUT.items()],
    )  # fmt: skip
    results = {
        title: [json.loads((KEPT_RESULTS / "digits" / f"{name}-seed-{seed}.json").read_text()) for seed in range(3)]
        for title, name in [*LEFT_OUT.items(), (sweeps.UNTRAINED, sweeps.UNTRAINED)]
    }
    assert sweeps.render_table(sweep, "digits", results) in PAGE
