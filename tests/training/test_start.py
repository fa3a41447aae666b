"""What a run begins with: weights, its own record, a checkpoint here or on the Hub."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, final_weights, tiny_flags, tiny_run
from transformers import IJepaConfig as StockConfig
from transformers import IJepaModel as StockModel

from ijepa_hf import IJepaForPretraining
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.runs.checkpoints import config_fields, read_checkpoint
from ijepa_hf.training import start as run_start
from ijepa_hf.training.start import find_start, load_starting_encoder
from ijepa_hf.weights.starting_weights import open_starting_weights

# neither recipe nor flags say what the model is
FREE = dict.fromkeys([*TINY, "predictor_num_attention_heads"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("weights") / "first", context_keep_ratio=0.4, license="cc-by-4.0")


@pytest.fixture
def encoder_only(tmp_path):
    torch.manual_seed(3)
    config = StockConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    StockModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def parse(output_dir, **changes):
    return parse_arguments(tiny_flags(output_dir, **{**FREE, **changes}))


def start(output_dir, **changes):
    return find_start(*parse(output_dir, **changes), output_dir)


def test_a_run_from_weights_takes_the_whole_model_and_its_licence_from_them(weights, tmp_path):
    found = start(tmp_path / "run", model_name_or_path=weights)
    assert found.weights is not None
    assert not found.has_new_predictor
    original = IJepaForPretraining.from_pretrained(weights)
    assert config_fields(found.config) == config_fields(original.config)
    assert found.run.license == "cc-by-4.0"
    model, _ = found.build_model()
    state = original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.context_encoder.parameters())


def test_pixels_are_normalised_as_the_weights_are_used_to_unless_told_otherwise(tmp_path):
    means = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    weights = tiny_run(tmp_path / "weights", **means)
    data = start(tmp_path / "run", model_name_or_path=weights).data
    assert (data.image_mean, data.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    data = start(tmp_path / "run", model_name_or_path=weights, image_mean=(0.7, 0.8, 0.9)).data
    assert (data.image_mean, data.image_std) == ([0.7, 0.8, 0.9], [0.4, 0.5, 0.6])


def test_what_a_flag_sets_wins_where_weights_can_follow_and_is_refused_where_they_cannot(weights, tmp_path):
    found = start(tmp_path / "run", model_name_or_path=weights, image_size=48, context_keep_ratio=0.3)
    assert (found.config.grid_size, found.config.context_keep_ratio) == ((12, 12), 0.3)
    with pytest.raises(ValueError, match="hidden_size"):
        start(tmp_path / "run", model_name_or_path=weights, hidden_size=64)
    with pytest.raises(ValueError, match="predictor_hidden_size"):
        start(tmp_path / "run", model_name_or_path=weights, predictor_hidden_size=32)
    asked = {"predictor_hidden_size": 32, "new_predictor": True}
    assert start(tmp_path / "run", model_name_or_path=weights, **asked).has_new_predictor
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start(tmp_path / "run", model_name_or_path=tmp_path / "nowhere")


def test_an_encoder_brings_a_new_predictor_which_is_warmed_up_with_frozen_encoders(encoder_only, tmp_path, capsys):
    changes = {**FREE, "predictor_hidden_size": 16, "predictor_num_hidden_layers": 1}
    run = tiny_run(
        tmp_path / "run", **changes, model_name_or_path=encoder_only, max_train_steps=40, warmup_epochs=0,
        checkpointing_steps=2, checkpoints_total_limit=40,
    )  # fmt: skip
    assert "predictor warm-up       2 steps with frozen encoders" in capsys.readouterr().out
    recorded = json.loads((run / "run.json").read_text())["arguments"]
    assert recorded["predictor_warmup_steps"] == 2
    assert (recorded["hidden_size"], recorded["patch_size"]) == (32, [4])
    stock = StockModel.from_pretrained(encoder_only, add_pooling_layer=False).state_dict()
    after_two, after_four = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    for part in ("ijepa", "context_encoder"):
        for name, tensor in stock.items():
            if "position_embeddings" not in name:
                assert torch.equal(after_two[f"{part}.{name}"], tensor), name
    assert not torch.equal(after_four["context_encoder.layers.0.mlp.fc1.weight"], stock["layers.0.mlp.fc1.weight"])
    assert not torch.equal(after_two["predictor.embed.weight"], after_four["predictor.embed.weight"])


def test_a_run_with_a_predictor_warm_up_resumes_to_the_same_bits_also_when_the_weights_have_gone(
    encoder_only, tmp_path
):
    changes = {**FREE, "predictor_hidden_size": 16, "predictor_num_hidden_layers": 1, "warmup_epochs": 0,
               "model_name_or_path": encoder_only, "predictor_warmup_steps": 3, "logging_steps": 2}  # fmt: skip
    whole = tiny_run(tmp_path / "whole", **changes)
    for kept in (2, 4):  # inside the warm-up, and after it
        cut = tmp_path / f"cut-{kept}"
        tiny_run(cut, **changes, checkpoints_total_limit=9)
        for step in (2, 4, 6):
            if step > kept:
                shutil.rmtree(cut / f"checkpoint-{step}")
        (cut / "report.json").unlink()
    shutil.rmtree(encoder_only)
    for kept in (2, 4):
        resumed = tiny_run(
            tmp_path / f"cut-{kept}", **changes, checkpoints_total_limit=9, resume_from_checkpoint="latest"
        )
        expected = final_weights(whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in final_weights(resumed).items())
    # and the finished run still prints its report
    tiny_run(tmp_path / "cut-4", **changes, checkpoints_total_limit=9, resume_from_checkpoint="latest")


def test_the_weights_before_training_can_be_scored_later_unless_they_have_gone(weights, tmp_path, caplog):
    _, _, run = parse(tmp_path / "run", model_name_or_path=weights)
    config = IJepaForPretraining.from_pretrained(weights).config
    encoder = load_starting_encoder(run, config)
    expected = IJepaForPretraining.from_pretrained(weights).target_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())
    run.model_name_or_path = str(tmp_path / "gone")
    assert load_starting_encoder(run, config) is None
    assert "cannot be scored again" in caplog.text
    run.model_name_or_path = None
    assert load_starting_encoder(run, config) is None


def test_scores_of_an_adapted_model_stand_beside_those_of_the_weights_it_started_from(weights, tmp_path):
    run = tiny_run(
        tmp_path / "run", **FREE, model_name_or_path=weights, eval_split_name="test", eval_steps=3, warmup_epochs=0
    )
    report = json.loads((run / "report.json").read_text())
    assert report["scores"][1]["features"] == "the weights it started from"
    before = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    assert before["step"] == 0
    assert before["knn"] == report["scores"][1]["knn"]  # scored before the first step and again at the end
    card = (run / "README.md").read_text()
    assert f"starting from `{weights}`" in card
    assert "license: cc-by-4.0" in card


@pytest.fixture
def two_places(tmp_path, monkeypatch):
    """A run's folder with checkpoints 2 and 4, and a Hub whose last checkpoint can be chosen."""
    run = tiny_run(tmp_path / "run", checkpoints_total_limit=9)
    remote = tmp_path / "hub"
    shutil.copytree(run, remote)
    shutil.rmtree(run / "checkpoint-6")
    (run / "report.json").unlink()

    def serve(step):
        path = None if step is None else remote / f"checkpoint-{step}"
        monkeypatch.setattr(run_start, "fetch_checkpoint", lambda repo_id, **_: path)

    return run, serve


def test_resuming_from_the_hub_takes_the_newer_of_hub_and_folder_and_says_so(two_places, tmp_path, caplog):
    run, serve = two_places
    flags = {"resume_from_checkpoint": "hub", "hub_model_id": "me/x", **TINY}
    serve(6)
    assert start(run, **flags).checkpoint.step == 6
    serve(2)
    assert start(run, **flags).checkpoint.path == run / "checkpoint-4"
    assert "me/x is at step 2" in caplog.text
    serve(None)
    assert start(run, **flags).checkpoint.step == 4
    assert "me/x has no checkpoint" in caplog.text
    assert start(tmp_path / "new", **flags).checkpoint is None
    assert "me/x holds no checkpoint" in caplog.text
    serve(4)
    assert start(tmp_path / "new", **flags).checkpoint.step == 4


def test_a_checkpoint_from_elsewhere_becomes_the_runs_own_so_that_latest_goes_on_from_it(two_places, tmp_path):
    run, _ = two_places
    tiny_run(tmp_path / "new", resume_from_checkpoint=run / "checkpoint-4", max_train_steps=6, checkpointing_steps=100)
    assert sorted(path.name for path in (tmp_path / "new").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    taken = read_checkpoint(tmp_path / "new" / "checkpoint-4")  # checks every file
    assert taken.arguments == read_checkpoint(run / "checkpoint-4").arguments


def test_the_licence_stays_with_a_run_that_goes_on_elsewhere_without_naming_the_weights(weights, tmp_path):
    model, data, run = parse_arguments(
        tiny_flags(tmp_path / "run", context_keep_ratio=0.4, resume_from_checkpoint=weights / "checkpoint-4")
    )
    assert find_start(model, data, run, tmp_path / "run").run.license == "cc-by-4.0"


def test_weights_of_the_hub_are_those_of_one_commit_however_the_branch_moves_on(weights, tmp_path, monkeypatch):
    asked = []

    def pinned(name, *, revision=None, num_attention_heads=None):
        asked.append(revision)
        found = open_starting_weights(name, num_attention_heads=num_attention_heads)
        return dataclasses.replace(found, commit="1" * 40)

    monkeypatch.setattr(run_start, "open_starting_weights", pinned)
    run = tiny_run(tmp_path / "run", **FREE, model_name_or_path=weights, eval_split_name="test")
    assert asked == [None, "1" * 40]  # at the start, and to score the same weights at the end
    assert json.loads((run / "run.json").read_text())["arguments"]["model_revision"] == "1" * 40
    # killed before its first checkpoint, it starts again from the same commit
    for path in (*run.glob("checkpoint-*"), run / "report.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    start(run, model_name_or_path=weights, resume_from_checkpoint="latest", eval_split_name="test")
    assert asked[-1] == "1" * 40


def test_a_checkpoint_from_beyond_the_end_of_the_run_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="is at step 6, but this run ends at step 5; train for longer"):
        tiny_run(
            tmp_path / "run", max_train_steps=5, context_keep_ratio=0.4,
            resume_from_checkpoint=weights / "checkpoint-6",
        )  # fmt: skip
    assert read_checkpoint(weights / "checkpoint-6").step == 6
    assert not (tmp_path / "run").exists()
