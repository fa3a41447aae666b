"""Numbers in the README and the documents are those of committed results: rows of tables are made anew from them."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


def document(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def assert_rows(name: str, rows: list[list[str]]) -> None:
    """Each row stands in a table of the document; bold type does not count, nor what stands in cells behind."""
    lines = [line.replace("**", "") for line in document(name).splitlines() if line.startswith("|")]
    for row in rows:
        start = "| " + " | ".join(row) + " |"
        assert any(line.startswith(start) for line in lines), f"{name} has no row {start}"


def scores_of(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {score["features"]: score for score in run["scores"]}


UNTRAINED = ("untrained, patch_init_std 1/sqrt(inputs)", "untrained, patch_init_std 0.02")
IN_WORDS = dict(
    zip(UNTRAINED, ("untrained, `patch_init_std` 1/sqrt(inputs)", "untrained, `patch_init_std` 0.02"), strict=True)
)


def test_the_readmes_table_is_that_of_the_committed_runs_on_digits() -> None:
    runs = [scores_of(run) for run in result("digits.json")["runs"].values()]
    assert len(runs) == 3

    def row(title: str, pick: Any) -> list[str]:
        return [title, *(", ".join(percent(pick(run, name)) for run in runs) for name in ("knn", "linear"))]

    raw = runs[0]["raw pixels"]
    assert_rows(
        "README.md",
        [
            row("trained encoder", lambda run, name: run["trained encoder"][name]),
            row(
                "same network untrained, the better of two initial weights",
                lambda run, name: max(run[kind][name] for kind in UNTRAINED),
            ),
            ["raw pixels", percent(raw["knn"]), percent(raw["linear"])],
        ],
    )


def test_the_page_on_digits_has_every_score_of_the_committed_runs() -> None:
    rows = []
    for seed, run in result("digits.json")["runs"].items():
        scores = scores_of(run)
        rows += [
            [seed, IN_WORDS.get(name, name), *(percent(scores[name][key]) for key in ("knn", "linear")),
             f"{scores[name]['rankme']:.1f}"]
            for name in ("trained encoder", *UNTRAINED)
        ]  # fmt: skip
        raw = scores["raw pixels"]
        rows.append(["all", "raw pixels", percent(raw["knn"]), percent(raw["linear"]), f"{raw['rankme']:.1f}"])
    assert_rows("docs/digits.md", rows)


def test_the_page_on_cifar10_has_the_scores_of_both_committed_runs() -> None:
    both = [scores_of(run["report"]) for run in result("cifar10_vit_micro.json")["runs"].values()]
    names = ("trained encoder", *UNTRAINED, "raw pixels")
    assert_rows(
        "docs/cifar10.md",
        [
            [IN_WORDS.get(name, name), *(percent(run[name][key]) for run in both for key in ("knn", "linear"))]
            for name in names
        ],
    )
    trained, untrained = both[0]["trained encoder"], [both[0][name] for name in UNTRAINED]
    sentence = "kNN-20 {} against {} untrained, linear {} against {}".format(
        percent(trained["knn"]), percent(max(row["knn"] for row in untrained)),
        percent(trained["linear"]), percent(max(row["linear"] for row in untrained)),
    )  # fmt: skip
    assert sentence in document("README.md")
    short = f"kNN-20 {percent(trained['knn'])}, linear {percent(trained['linear'])} ([CIFAR-10](cifar10.md))"
    assert short in document("docs/small_scale.md")


def test_the_page_on_cifar10_has_the_committed_trials() -> None:
    rows = result("cifar10_trials.json")["rows"]
    lines = document("docs/cifar10.md").replace("**", "")
    for row in rows:
        cells = f"| {row['knn']} | {row['linear']} | {row['rank_pooled']:.1f} | {row['positional']:.2f} |"
        assert cells in lines, row["run"]


IN_THE_TABLE = {
    "digits, 10 labels a class": "digits, 10 a class",
    "digits, 10 labels a class, initializer_range 0.06": "digits, 10 a class, today's recipe",
    "digits, all 1,437 labels": "digits, all 1,437",
    "CIFAR-10, 1 % of the labels (50 a class)": "CIFAR-10, 50 a class (1 %)",
    "CIFAR-10, 100 labels a class": "CIFAR-10, 100 a class",
}


def test_the_page_on_finetuning_has_the_committed_accuracies_with_their_intervals() -> None:
    found = {(row["task"], row["start"]): row for row in result("finetune.json")["rows"]}

    def cell(row: dict[str, Any]) -> str:
        low, high = row["interval"]
        return f"{percent(row['accuracy'])} ({percent(low)} to {percent(high)})"

    assert_rows(
        "docs/finetune.md",
        [
            [title, *(cell(found[task, start]) for start in ("pretrained", "new weights"))]
            for task, title in IN_THE_TABLE.items()
        ],
    )


METHODS = {
    "knn": "kNN-20, top-1",
    "linear": "linear, top-1",
    "linear_sgd": "linear, published SGD, top-1",
    "attentive": "attentive, top-1",
    "finetune": "fine-tuning, top-1",
    "segmentation": "segmentation, mIoU",
    "localization": "largest object's box, IoU",
}


@pytest.mark.parametrize("name", ["digits", "shapes", "cifar10"])
def test_the_page_on_evaluation_has_the_committed_scores_with_their_intervals(name: str) -> None:
    found: dict[str, dict[str, str]] = {}
    for score in result(f"evaluation_{name}.json")["scores"]:
        title = METHODS.get(score["method"])
        if title is None:
            continue
        low, high = score["interval"]
        cells = found.setdefault(title, {})
        cells[score["features"]] = f"{percent(score['value'])} ({percent(low)} to {percent(high)})"
    assert len(found) >= 2
    assert_rows(
        "docs/evaluation.md",
        [
            [title, *(cells.get(features, "-") for features in ("model", "untrained", "raw pixels"))]
            for title, cells in found.items()
        ],
    )
