"""A run's folder: whose it is, and what stays of it when a run goes on."""

import json

import pytest
from tiny import tiny_run

from ijepa_hf.arguments import PretrainingArguments, argument_values, parse_arguments
from ijepa_hf.checkpointing import Checkpoint
from ijepa_hf.run_folder import (
    append_rows,
    check_begun,
    check_output_dir,
    differing_arguments,
    prepare_output_dir,
    read_rows,
)

ARGUMENTS = {"masking_strategy": "multi_block", "seed": 0, "max_broken_share": 0.05, "per_device_train_batch_size": 8}


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert read_rows(tmp_path / "nowhere.jsonl") == []


def test_rows_are_added_at_the_end_and_read_up_to_a_step(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    append_rows(path, [{"step": 0, "knn": 0.1}])
    append_rows(path, [{"step": 5, "knn": 0.2}, {"step": 9, "knn": 0.3}])
    assert read_rows(path, up_to_step=5) == [{"step": 0, "knn": 0.1}, {"step": 5, "knn": 0.2}]


def test_a_run_that_goes_on_keeps_the_lines_up_to_its_step_and_drops_later_ones(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name in ("metrics.jsonl", "evaluations.jsonl", "unreadable_images.jsonl"):
        append_rows(old / name, [{"step": step, "file": name} for step in (1, 4, 7)])
    (old / "checkpoint-4").mkdir()
    (old / "checkpoint-4" / "checkpoint.json").write_text("{}")
    new.mkdir()
    append_rows(new / "unreadable_images.jsonl", [{"step": 1, "file": "of another life"}])
    run = PretrainingArguments(learning_rate=1e-3)
    prepare_output_dir(new, ARGUMENTS, {"hidden_size": 32}, run, Checkpoint(old / "checkpoint-4", 4, {}, ARGUMENTS))
    for name in ("metrics.jsonl", "evaluations.jsonl", "unreadable_images.jsonl"):
        assert read_rows(new / name) == [{"step": step, "file": name} for step in (1, 4)]
    assert json.loads((new / "run.json").read_text()) == {"arguments": ARGUMENTS, "config": {"hidden_size": 32}}
    assert (new / "checkpoint-4" / "checkpoint.json").read_text() == "{}"  # its own now: it can be resumed from here
    # from the start, nothing of an earlier life stays
    prepare_output_dir(new, ARGUMENTS, {}, run, None)
    assert read_rows(new / "metrics.jsonl") == []
    assert not (new / "unreadable_images.jsonl").exists()


def test_arguments_that_change_no_weight_may_differ_and_others_are_named():
    other = {
        **ARGUMENTS,
        "max_broken_share": 0.5,
        "keep_images_in_memory": "no",
        "per_device_train_batch_size": 4,
        "seed": 1,
    }
    assert differing_arguments(ARGUMENTS, other) == ["seed is 0 there, 1 here"]
    official = {**ARGUMENTS, "masking_strategy": "multi_block_official"}
    named = differing_arguments(official, {**official, "per_device_train_batch_size": 4})
    assert named == ["per_device_train_batch_size is 8 there, 4 here"]


def test_overwriting_never_deletes_what_the_run_starts_from(tmp_path):
    weights = tmp_path / "weights"
    tiny_run(weights)
    for changes in (
        {"model_name_or_path": str(weights)},
        {"model_name_or_path": str(weights / "pretraining")},
        {"resume_from_checkpoint": str(weights / "checkpoint-6")},
    ):
        run = PretrainingArguments(learning_rate=1e-3, overwrite_output_dir=True, **changes)
        with pytest.raises(ValueError, match=f"overwrite_output_dir would delete {next(iter(changes))}="):
            check_output_dir(weights, ARGUMENTS, run)
    # words that are no paths, and weights elsewhere
    for changes in ({"resume_from_checkpoint": "hub"}, {"model_name_or_path": str(tmp_path / "others")}):
        check_output_dir(weights, ARGUMENTS, PretrainingArguments(overwrite_output_dir=True, **changes))


def test_a_folder_of_a_run_from_other_weights_is_named_before_any_weights_are_opened(tmp_path):
    tiny_run(tmp_path / "run")
    run = PretrainingArguments(model_name_or_path="you/weights", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="holds another run: model_name_or_path is None there, 'you/weights' here"):
        check_begun(tmp_path / "run", run)
    check_begun(tmp_path / "nowhere", run)


def test_an_argument_that_an_older_run_lacks_counts_as_its_default():
    old = {name: value for name, value in ARGUMENTS.items() if name != "seed"}
    assert differing_arguments(old, ARGUMENTS) == []
    assert differing_arguments(old, {**ARGUMENTS, "seed": 1}) == ["seed is 0 there, 1 here"]


def test_the_recipe_in_the_folder_gives_the_arguments_of_the_run(tmp_path):
    flags = ["digits", "--learning_rate", "0.002", "--image_mean", "0.1", "0.2", "0.3", "--hub_model_id", "me/x"]
    model, data, run = parse_arguments([*flags, "--output_dir", str(tmp_path / "run"), "--push_to_hub"])
    prepare_output_dir(tmp_path / "run", argument_values(model, data, run), {}, run, None)
    again = parse_arguments([str(tmp_path / "run" / "recipe.yaml")])
    expected = argument_values(model, data, run)
    changed = {name for name, value in argument_values(*again).items() if value != expected[name]}
    assert changed == {"output_dir", "push_to_hub", "hub_model_id"}
