"""The card: metadata that the Hub's library reads, the numbers of the run and no others; none committed is stale."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries

from ijepa_hf.recipes.arguments import ModelArguments, argument_values
from ijepa_hf.runs.cards import read_license, render_eval_results, render_run_card, verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(scored_run):
    return json.loads((scored_run / "report.json").read_text())


def configuration(report):
    names = argument_values(ModelArguments())
    return ModelArguments(**{name: report["arguments"][name] for name in names}).to_config()


def committed_report(name):
    results = ROOT / "benchmarks" / "results"
    if name == "cifar10-vit-micro":
        return json.loads((results / "cifar10_vit_micro.json").read_text())["runs"]["map-style"]["report"]
    return json.loads((results / f"{name}_report.json").read_text())


def test_the_runs_card_is_the_rendered_one_and_says_what_was_measured(scored_run, report):
    text = (scored_run / "README.md").read_text("utf-8")
    assert text == render_run_card(report, configuration(report))
    for needed in (
        "# digits-tiny",
        "1,437 images" if report["arguments"]["num_train_images"] == 1437 else "64 images",
        f"{report['log']['loss_last']:.4f}",
        f"| trained encoder | {100 * report['scores'][0]['knn']:.1f} |",
        f"{report['log']['target_rankme_first']:.1f} at step 1",
        "6 optimiser steps (0.75 epochs) of 8 images",
        report["machine"]["device"],
        "images a second in the median",
        "max_train_steps: 6",
        "ijepa-hf finetune",
        "--model_name_or_path",
    ):
        assert needed in text, needed


def test_the_hubs_library_reads_the_metadata_and_the_same_scores(scored_run, report):
    data = ModelCard.load(scored_run / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert (data.license, data.datasets) == (None, None)
    assert "self-supervised-learning" in data.tags
    trained = report["scores"][0]
    assert {result.metric_name.split(",")[1]: result.metric_value for result in data.eval_results} == {
        " 20 nearest neighbours of frozen mean-pooled features": round(trained["knn"], 4),
        " logistic regression on frozen mean-pooled features": round(trained["linear"], 4),
    }
    assert {result.dataset_split for result in data.eval_results} == {"test"}
    assert metadata_load(scored_run / "README.md")["model-index"][0]["name"] == "digits-tiny"


def test_scores_on_data_of_the_hub_are_written_in_the_hubs_newer_form_too(report):
    assert render_eval_results(report) == {}  # digits are no data set of the Hub
    on_hub = {**report, "hub_dataset": "me/pictures"}
    files = render_eval_results(on_hub)
    assert list(files) == ["pictures.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files["pictures.yaml"]))
    trained = report["scores"][0]
    assert [(entry.dataset_id, entry.value) for entry in entries] == [
        ("me/pictures", round(trained["knn"], 4)),
        ("me/pictures", round(trained["linear"], 4)),
    ]
    assert "80 images" in entries[0].notes
    assert render_eval_results({**on_hub, "scores": []}) == {}


def test_without_scores_a_log_or_a_licence_the_card_says_so_and_invents_nothing(report):
    bare = copy.deepcopy(report)
    bare.update(scores=[], log=None, num_eval_images=0)
    text = render_run_card(bare, configuration(report))
    assert "model-index" not in text
    assert "kNN" not in text
    assert "Loss" not in text
    assert "no score was measured" in text
    assert "has not stated a licence" in text


def test_a_learning_rate_of_zero_is_a_learning_rate(report):
    changed = copy.deepcopy(report)
    changed["arguments"]["learning_rate"] = 0.0
    assert "| 0.0 after" in render_run_card(changed, configuration(report))
    changed["arguments"].update(learning_rate=None, base_learning_rate=0.032)
    assert "| 0.001 after" in render_run_card(changed, configuration(report))  # times 8 / 256


def test_metadata_that_cannot_be_read_is_an_error_and_no_missing_licence(tmp_path):
    card = tmp_path / "README.md"
    assert read_license(None) is None
    for text, licence in (("# none", None), ("---\nlicense: mit\n---\n", "mit"), ("---\ntags: [a]\n---\n", None)):
        card.write_text(text)
        assert read_license(card) == licence
    card.write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(
        ValueError, match=r"README.md: the metadata in front cannot be read, so its licence is not known"
    ):
        read_license(card)


def test_licence_base_model_and_repository_come_from_the_run(report):
    changed = copy.deepcopy(report)
    changed["arguments"].update(
        license="cc-by-nc-4.0", model_name_or_path="you/ijepa", hub_model_id="me/adapted", predictor_warmup_steps=3
    )
    changed["hub_base_model"] = "you/ijepa"
    text = render_run_card(changed, configuration(report))
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "you/ijepa")
    assert 'model_id = "me/adapted"' in text
    assert "starting from `you/ijepa`" in text
    assert "first 3 trained the predictor alone" in text
    assert "under `cc-by-nc-4.0`" in text


def test_the_verdict_says_who_wins_in_points():
    def row(features, knn, linear):
        return {"features": features, "knn": knn, "linear": linear, "rankme": 1.0}

    scores = [
        row("trained encoder", 0.5, 0.8),
        row("the weights it started from", 0.45, 0.9),
        row("untrained, patch_init_std 1/sqrt(inputs)", 0.2, 0.8),
        row("untrained, patch_init_std 0.02", 0.3, 0.1),
        row("raw pixels", 0.6, 0.1),
    ]
    assert verdict(scores) == [
        "kNN-20: trained is 20.0 points above the better untrained network. "
        "It is 5.0 points above the weights it started from. Raw pixels win, by 10.0.",
        "linear: trained is equal to the better untrained network. "
        "It is 10.0 points below the weights it started from.",
    ]
    assert verdict([scores[0], *scores[2:]])[1] == "linear: trained is equal to the better untrained network."


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda path: path.name)
def test_the_committed_card_is_what_the_committed_numbers_give(folder):
    committed = committed_report(folder.name)
    fields = {
        name: committed["arguments"].get(name, value) for name, value in argument_values(ModelArguments()).items()
    }
    text = render_run_card(committed, ModelArguments(**fields).to_config())
    assert text + "\n" == (folder / "README.md").read_text("utf-8")
    assert (folder / "figures" / "curves.png").is_file()
    assert ModelCard(text).data.eval_results[0].metric_value == round(committed["scores"][0]["knn"], 4)
