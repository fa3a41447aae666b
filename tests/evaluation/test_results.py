"""evaluation.json that grows and never mixes, the printed table, and a card that loses nothing."""

import json

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from ijepa_hf.evaluation.results import (
    MODEL,
    RAW_PIXELS,
    UNTRAINED,
    Score,
    merged,
    read_scores,
    render_scores,
    update_card,
    write_scores,
)

OF_MODEL = {"name": "runs/a", "sha256": {"model.safetensors": "a"}}
OF_DATA = {"dataset_name": "digits", "train_sha256": "t", "num_train_images": 7}
DATASET = {"name": "digits", "type": "me/digits", "split": "test"}


def score(value: float = 0.5, **changes) -> Score:
    values = {
        "method": "knn", "features": MODEL, "target": "label", "metric": "top-1", "value": value,
        "interval": (value - 0.1, value + 0.1), "num_train_images": 7, "num_eval_images": 5, "settings": {"k": 3},
    }  # fmt: skip
    return Score(**{**values, **changes})


def write(path, scores, model=OF_MODEL, data=OF_DATA):
    write_scores(path, model, data, scores, {"torch": "1"})


def test_scores_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "evaluation.json"
    assert read_scores(path, OF_MODEL, OF_DATA) == []
    scores = [score(), score(0.25, method="low_shot", draws=[0.2, 0.3], settings={})]
    write(path, scores)
    assert read_scores(path, OF_MODEL, OF_DATA) == scores
    assert read_scores(path, {**OF_MODEL, "name": "another/path"}, {**OF_DATA, "dataset_name": "x"}) == scores
    assert json.loads(path.read_text())["versions"] == {"torch": "1"}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"sha256": {"model.safetensors": "b"}}, OF_DATA, r"model.sha256.model.safetensors is 'a' there, 'b' here"),
        (OF_MODEL, {**OF_DATA, "train_sha256": "u"}, "data.train_sha256 is 't' there, 'u' here"),
    ],
)
def test_scores_of_another_model_or_of_other_images_are_never_mixed_in(tmp_path, model, data, message):
    write(tmp_path / "evaluation.json", [score()])
    with pytest.raises(ValueError, match=f"holds scores of another model or of other images: {message}"):
        read_scores(tmp_path / "evaluation.json", model, data)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}, "data": {}, "scores": [{"value": 1}]}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation.json (is damaged|holds no JSON object)"):
        read_scores(tmp_path / "evaluation.json", OF_MODEL, OF_DATA)


def test_a_score_made_again_takes_the_place_of_the_old_one_and_others_stay():
    old = [score(0.1), score(0.2, features=UNTRAINED), score(0.3, settings={"k": 5})]
    new = [score(0.9), score(0.4, method="linear", settings={})]
    assert merged(old, new) == [new[0], old[1], old[2], new[1]]


def test_the_table_has_a_heading_for_a_method_and_a_line_for_a_row():
    scores = [
        score(0.975), score(0.5, features=UNTRAINED), score(0.25, features=RAW_PIXELS),
        score(-0.25, method="regression", target="count", metric="R2", settings={"k": None}, draws=[-0.5, 0.0]),
    ]  # fmt: skip
    assert render_scores(scores[::-1]) == (
        "regression of count, R2 (7 training images)\n"
        "    model  -0.250  95 %: -0.350 to -0.150  2 draws: -0.500 to 0.000\n"
        "\n"
        "knn of label, top-1 (7 training images, k 3)\n"
        "    model       97.5  95 %: 87.5 to 107.5\n"
        "    untrained   50.0  95 %: 40.0 to 60.0\n"
        "    raw pixels  25.0  95 %: 15.0 to 35.0"
    )


# -- the card --------------------------------------------------------------------------------------------------------

CARD = """---
license: cc-by-4.0
tags:
- vision
my_own: [1, {a: b}]
model-index:
- name: birds
  results:
  - task: {type: image-classification}
    dataset: {type: me/digits, name: digits, split: test}
    metrics:
    - {type: accuracy, value: 0.3, name: "top-1, knn of label with k 3"}
    source: {url: "https://example.org", name: mine}
  - task: {type: image-classification, name: Birds}
    dataset: {type: me/digits, name: digits, split: test}
    metrics:
    - {type: accuracy, value: 0.1, name: "top-1, knn of label with k 3"}
    - {type: accuracy, value: 0.2, name: "by hand", verified: false}
- name: second
  results: []
---

# Birds

Text --- with dashes.
"""


def metadata(path):
    return huggingface_hub.metadata_load(path)


def test_scores_become_entries_of_the_cards_model_index_and_nothing_is_lost(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    before = metadata(path)
    others = [score(method="linear"), score(method="regression", target="count", metric="R2")]
    update_card(path, "unused", DATASET, [score(0.123456), score(features=UNTRAINED), *others])
    after = metadata(path)
    assert path.read_text().endswith("---\n\n# Birds\n\nText --- with dashes.\n")
    assert {name: after[name] for name in before if name != "model-index"} == {
        name: before[name] for name in before if name != "model-index"
    }
    (birds, second), (old, _) = after["model-index"], before["model-index"]
    assert second == {"name": "second", "results": []}
    assert birds["name"] == "birds"
    foreign, entry, counted = birds["results"]
    assert foreign == old["results"][0]
    assert entry["task"] == old["results"][1]["task"]
    assert entry["metrics"][1] == old["results"][1]["metrics"][1]
    assert entry["metrics"][0] == {
        "type": "accuracy",
        "value": 0.1235,
        "name": "top-1, knn of label with k 3",
        "args": {"interval_95": [0.0235, 0.2235], "k": 3},
    }
    assert [metric["name"] for metric in entry["metrics"][2:]] == ["top-1, linear of label with k 3"]
    assert counted["task"] == {"type": "image-feature-extraction", "name": "Image feature extraction"}
    update_card(path, "unused", DATASET, [score(0.123456), *others])
    assert metadata(path) == after


@pytest.mark.parametrize("text", ["# No metadata\n", "---\nlicense: mit\n---\n# None yet\n"])
def test_a_card_without_entries_gets_them_in_the_hubs_form(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    update_card(path, "birds", DATASET, [score(), score(metric="R2", method="regression", target="count")])
    data = ModelCard.load(path).data
    assert data.model_name == "birds"
    assert [(result.metric_type, result.metric_value, result.task_type) for result in data.eval_results] == [
        ("accuracy", 0.5, "image-classification"),
        ("r2", 0.5, "image-feature-extraction"),
    ]
    assert path.read_text().endswith(text.split("---\n")[-1])


def test_scores_of_other_rows_change_no_card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    update_card(path, "birds", DATASET, [score(features=UNTRAINED), score(features=RAW_PIXELS)])
    assert path.read_text() == CARD


def test_a_card_that_cannot_be_read_is_left_as_it_is(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match="the metadata in front cannot be read"):
        update_card(path, "birds", DATASET, [score()])
    assert path.read_text() == "---\na: [\n---\n"
