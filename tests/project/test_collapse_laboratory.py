"""The collapse laboratory: its objectives are the papers' formulas, gradients flow where it says, collapse happens."""

import dataclasses
import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_hf.diagnosis.verdict import COMPLETE, DIMENSIONAL
from ijepa_hf.evaluation.scorecard import ScoredImages, load_scored_images

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = ROOT / "examples" / "comparison"
RESULTS = ROOT / "benchmarks" / "results" / "collapse_laboratory.json"


@pytest.fixture(scope="module")
def laboratory():
    sys.path.insert(0, str(COMPARISON))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("collapse_laboratory")
    torch.set_num_threads(threads)
    sys.path.remove(str(COMPARISON))


@pytest.fixture(scope="module")
def digits():
    return load_scored_images("digits", (32, 32))


@pytest.fixture(scope="module")
def few_digits(digits):
    train, test = slice(0, 96), slice(0, 64)
    return ScoredImages(
        digits.train_pixels[train], digits.test_pixels[test], digits.train_labels[train], digits.test_labels[test], {}
    )


@pytest.fixture
def short(laboratory, monkeypatch):
    monkeypatch.setattr(laboratory, "NUM_ROWS", 2)
    monkeypatch.setattr(laboratory, "SETTINGS", dataclasses.replace(laboratory.SETTINGS, batch_size=16))


@pytest.fixture
def two_views():
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return first, 0.4 * first + torch.randn(6, 5, generator=generator, dtype=torch.float64)


# ---- objectives, beside loops over their formulas -------------------------------------------------------------------


def test_squared_distance_is_the_mean_over_images_and_dimensions(laboratory, two_views):
    first, second = (view.tolist() for view in two_views)
    total = sum((a - b) ** 2 for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert laboratory.squared_distance(*two_views).item() == pytest.approx(total / 30)


def loop_hinge(features):
    hinges = []
    for column in np.asarray(features).T:
        variance = sum((value - column.mean()) ** 2 for value in column) / (len(column) - 1)
        hinges.append(max(0.0, 1 - math.sqrt(variance + 1e-4)))
    return sum(hinges) / len(hinges)


def loop_covariance(features):
    rows = np.asarray(features) - np.asarray(features).mean(axis=0)
    total = 0.0
    for one in range(rows.shape[1]):
        for other in range(rows.shape[1]):
            if one != other:
                total += (sum(row[one] * row[other] for row in rows) / (len(rows) - 1)) ** 2
    return total / rows.shape[1]


def test_variance_hinge_is_vicregs_and_counts_only_dimensions_below_one(laboratory, two_views):
    features = two_views[0] * torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0], dtype=torch.float64)
    assert laboratory.variance_hinge(features).item() == pytest.approx(loop_hinge(features))
    assert laboratory.variance_hinge(features[:, 3:]).item() == 0
    repeated = features[:, 4:].expand(-1, 7)  # one direction, seven times: the term is content
    assert laboratory.variance_hinge(repeated).item() == 0
    assert laboratory.covariance_penalty(repeated).item() > 1


def test_covariance_penalty_is_vicregs(laboratory, two_views):
    assert laboratory.covariance_penalty(two_views[1]).item() == pytest.approx(loop_covariance(two_views[1]))


def test_the_weighted_objectives_are_sums_of_their_terms(laboratory, two_views):
    agreement = 25 * float((two_views[0] - two_views[1]).square().mean())
    variance = 25 * sum(map(loop_hinge, two_views))
    covariance = laboratory.COVARIANCE_WEIGHT * sum(map(loop_covariance, two_views))
    assert laboratory.variance_objective(*two_views).item() == pytest.approx(agreement + variance)
    assert laboratory.vicreg_objective(*two_views).item() == pytest.approx(agreement + variance + covariance)


def test_unit_distance_is_the_squared_distance_of_vectors_of_length_one(laboratory, two_views):
    total = 0.0
    for one, other in zip(*(view.numpy() for view in two_views), strict=True):
        total += ((one / math.hypot(*one) - other / math.hypot(*other)) ** 2).sum()
    assert laboratory.unit_distance(*two_views).item() == pytest.approx(total / 6)


def test_each_view_predicts_the_target_of_the_other_one(laboratory, two_views):
    projections, targets = torch.cat(two_views), torch.cat(two_views).flip(1)
    predictor = torch.nn.Linear(5, 5, dtype=torch.float64)
    predicted = (projections @ predictor.weight.T + predictor.bias).detach()
    crossed = [
        laboratory.unit_distance(predicted[:6], targets[6:]),
        laboratory.unit_distance(predicted[6:], targets[:6]),
    ]
    loss = laboratory.crossed_distance(predictor, projections, targets)
    assert loss.item() == pytest.approx(float(sum(crossed)) / 2)


def test_negatives_cost_the_logarithm_of_all_other_views_where_all_vectors_are_equal(laboratory):
    objective = laboratory.ARMS["negatives"].make.keywords["objective"]
    assert objective(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(math.log(7))


# ---- gradients ------------------------------------------------------------------------------------------------------


def loss_of(family, images):
    with torch.random.fork_rng(devices=[]):
        return family.loss(images.train_pixels[:16], None, torch.Generator().manual_seed(5))


@pytest.fixture  # float32 would be too coarse for differences
def in_float64(laboratory, monkeypatch):
    for name in ("both_views", "plain_images"):
        function = getattr(laboratory, name)
        monkeypatch.setattr(laboratory, name, lambda *given, function=function: function(*given).double())
    monkeypatch.setattr(sys.modules["masked"], "plain_images", laboratory.plain_images)


@pytest.mark.parametrize(
    ("name", "follows"),
    [("byol", False), ("byol_gradient", True), ("ijepa", False), ("ijepa_gradient", True), ("agreement", True)],
)
def test_the_gradient_has_the_targets_part_where_the_arm_says_so_and_no_other(
    laboratory, few_digits, in_float64, name, follows
):
    family = laboratory.new_family(name, 0).double().train()
    trained = family.encoder.layers[0].mlp.fc1.weight
    loss_of(family, few_digits).backward()
    with torch.no_grad():
        direction = torch.randn(trained.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        slopes = []
        for sign in (1, -1):
            trained += sign * 1e-5 * direction
            slopes.append(loss_of(family, few_digits).item())
            trained -= sign * 1e-5 * direction
        slope = (slopes[0] - slopes[1]) / 2e-5
    # targets of a moving average stand still while the trained encoder moves; others move along, and are in the slope
    assert (trained.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)
    averages = [value for value in family.parameters() if not value.requires_grad]
    assert all(value.grad is None for value in averages)
    assert bool(averages) == (name != "agreement")
    if not follows:  # and the loss does depend on the averages, so that the slope had no part of them
        parts = [family.model.target_encoder] if name == "ijepa" else [family.average_encoder, family.average_head]
        before = loss_of(family, few_digits).item()
        for part in parts:
            with torch.no_grad():
                first = next(part.parameters())
                first.add_(0.1 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0)))
            assert loss_of(family, few_digits).item() != before
            before = loss_of(family, few_digits).item()


@pytest.mark.parametrize("pair", [("byol", "byol_gradient"), ("ijepa", "ijepa_gradient")])
def test_the_two_arms_of_a_pair_begin_with_the_same_loss_and_other_gradients(laboratory, few_digits, pair):
    families = [laboratory.new_family(name, 0).train() for name in pair]
    losses = [loss_of(family, few_digits) for family in families]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [family.encoder.layers[0].mlp.fc1.weight.grad for family in families]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


@pytest.mark.parametrize("name", ["byol_gradient", "ijepa_gradient"])
def test_what_is_measured_of_an_arm_with_gradient_is_what_is_trained(laboratory, name):
    family = laboratory.new_family(name, 0)
    with torch.no_grad():
        for parameter in family.encoder.parameters():
            parameter.add_(0.1)
    family.update_average(0.98)
    assert all(map(torch.equal, family.scored_encoder().parameters(), family.encoder.parameters()))


def test_all_arms_begin_with_the_same_encoder_and_leave_torchs_generator_alone(laboratory):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    encoders = [laboratory.new_family(name, 4).scored_encoder().state_dict() for name in laboratory.ARMS]
    assert torch.equal(torch.rand(1), expected)
    for encoder in encoders[1:]:
        assert all(torch.equal(value, encoder[key]) for key, value in encoders[0].items())


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_deviations_are_those_along_the_principal_axes_of_rows_of_unit_length(laboratory, two_views):
    units = (two_views[0] / two_views[0].norm(dim=1, keepdim=True)).numpy()
    centred = units - units.mean(axis=0)
    expected = np.sqrt(np.linalg.eigvalsh(centred.T @ centred / 6)[::-1])
    np.testing.assert_allclose(laboratory.deviations(two_views[0]), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("deviation", "rank", "expected"),
    [(0.019, 20.0, COMPLETE), (0.019, 1.0, COMPLETE), (0.021, 3.9, DIMENSIONAL), (0.021, 4.0, "no collapse")],
)
def test_what_happened_is_read_off_deviation_and_rank(laboratory, deviation, rank, expected):
    before = {"embedding_normalized_std": 0.2, "embedding_effective_rank": 9.0}
    after = {"embedding_normalized_std": deviation, "embedding_effective_rank": rank}
    assert laboratory.what_happened(after, before) == expected


def test_embeddings_are_byols_projections_and_elsewhere_the_features(laboratory, few_digits):
    for name in ("byol", "byol_gradient", "vicreg", "ijepa"):
        family = laboratory.new_family(name, 0)
        meter = laboratory.Meter(few_digits.test_pixels, 10)
        embeddings = meter.measure(family, 0, None, None)
        features = family.patch_features(meter.images).mean(dim=1)
        if name.startswith("byol"):
            features = family.head(features)
        torch.testing.assert_close(embeddings, features.detach())
        row = meter.rows[0]
        units = features.detach() / features.detach().norm(dim=1, keepdim=True)
        assert row["embedding_normalized_std"] == pytest.approx(
            8 * units.std(dim=0, correction=0).mean().item(), rel=1e-5
        )


def test_measuring_does_not_change_a_training(laboratory, few_digits, short, monkeypatch):
    losses = []
    for rows in (4, 1):
        monkeypatch.setattr(laboratory, "NUM_ROWS", rows)
        found = laboratory.run_arm("byol", few_digits, 4, 0)
        assert found["rows"]["step"] == ([0, 1, 2, 3, 4] if rows == 4 else [0, 4])
        losses.append((found["rows"]["loss"][-1], found["deviations"]))
    assert losses[0] == losses[1]


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_run_writes_table_numbers_and_picture_and_is_a_function_of_the_seed(
    laboratory, few_digits, short, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(laboratory, "load_scored_images", lambda *given: few_digits)
    found = []
    for folder, flags in (("all", []), ("some", ["--seed", "0", "1", "--arms", "vicreg", "byol"])):
        laboratory.main(["--steps", "2", "--output_dir", str(tmp_path / folder), *flags])
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
            f"collapse_laboratory.{suffix}" for suffix in ("json", "md", "png")
        ]
        results = json.loads((tmp_path / folder / "collapse_laboratory.json").read_text("utf-8"))
        for run in results["runs"]:
            assert run.pop("seconds") > 0
        found.append({(run["arm"], run["seed"]): run for run in results["runs"]})
    table = (tmp_path / "all" / "collapse_laboratory.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [
        f"| {arm.title}" for arm in laboratory.ARMS.values()
    ]
    every, some = found
    assert list(every) == [(name, 0) for name in laboratory.ARMS]
    for name in ("vicreg", "byol"):
        assert every[name, 0] == some[name, 0]
        assert every[name, 0]["rows"]["loss"][-1] != some[name, 1]["rows"]["loss"][-1]
    with Image.open(tmp_path / "all" / "collapse_laboratory.png") as picture:
        assert min(picture.size) > 1000


def test_names_of_lines_stay_in_order_and_apart(laboratory):
    places = [-0.3, 0.1, 0.11, 0.115, 0.9, 0.99, 1.2]
    moved = laboratory._spread_apart(places, 0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved[0] >= 0
    assert moved[-1] <= 1
    assert laboratory._spread_apart([0.2, 0.5], 0.06) == [0.2, 0.5]


@pytest.mark.parametrize(
    ("flags", "message"), [(["--steps", "0"], "--steps 0 must be"), (["--seed", "1", "1"], "--seed 1 1 must be")]
)
def test_wrong_flags_are_refused_by_name(laboratory, capsys, flags, message):
    with pytest.raises(SystemExit):
        laboratory.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_agreement_alone_collapses_and_negatives_prevent_it(laboratory, few_digits, short):
    ratios = {}
    for name in ("agreement", "negatives"):
        deviations = laboratory.run_arm(name, few_digits, 50, 0)["rows"]["embedding_normalized_std"]
        ratios[name] = deviations[-1] / deviations[0]
    assert ratios["agreement"] < 0.1
    assert ratios["negatives"] > 1


@pytest.mark.slow
def test_each_arm_ends_as_the_document_says(laboratory, digits):
    written = {run["arm"]: run["happened"] for run in json.loads(RESULTS.read_text("utf-8"))["runs"]}
    happened = {name: laboratory.run_arm(name, digits, 400, 0)["happened"] for name in laboratory.ARMS}
    assert happened == written


def test_the_table_of_the_document_is_that_of_the_results(laboratory):
    results = json.loads(RESULTS.read_text("utf-8"))
    assert laboratory.render_table(results["runs"]) in (ROOT / "docs" / "collapse.md").read_text("utf-8")
    assert results["command"] in (ROOT / "docs" / "collapse.md").read_text("utf-8")
