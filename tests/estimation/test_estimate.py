"""What a run takes, said beforehand: the command, from flags to the table."""

import json
import time

import pytest
from accelerate.state import AcceleratorState, PartialState
from tiny import tiny_config, tiny_flags, tiny_model

from ijepa_hf.commands import estimate as command
from ijepa_hf.commands import main
from ijepa_hf.data.sources.builtin import SHAPES_SPLITS, load_digits
from ijepa_hf.estimation import estimate
from ijepa_hf.estimation.cost import StepSettings, count_parameters, draw_sizes, estimate_memory
from ijepa_hf.estimation.estimate import KNOWN_SIZES, estimate_run
from ijepa_hf.estimation.timing import HARDWARE
from ijepa_hf.recipes.parsing import build_parser, flag_names, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names
from ijepa_hf.runs.export import export_model


def run_json(capsys, *argv):
    assert main.main(["estimate", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_estimated_in_no_time_and_without_its_images(recipe, capsys):
    begin = time.process_time()
    has_images = load_recipe(recipe).get("dataset_name") is not None
    found = run_json(capsys, recipe, *([] if has_images else ["--num_images", "14000000"]))
    assert time.process_time() - begin < 2.0
    assert found["parameters"]["total"] > 200_000
    assert [row["name"] for row in found["hardware"]] == list(HARDWARE)
    for row in found["hardware"]:
        if row["hours"] is not None:
            assert row["hours"] == pytest.approx(found["run"]["steps"] * row["seconds_per_step"] / 3600)
            assert row["images_per_second"] == pytest.approx(
                found["run"]["global_batch_size"] / row["seconds_per_step"]
            )


def test_flags_override_the_recipe_and_name_hardware(capsys):
    small = run_json(capsys, "cifar10-vit-tiny", "--hardware", "l4")
    wide = run_json(
        capsys, "--hardware", "l4", "cifar10-vit-tiny", "--hidden_size", "384", "--mixed_precision", "bf16"
    )
    assert wide["parameters"]["target_encoder"] > 3.8 * small["parameters"]["target_encoder"]
    assert [row["name"] for row in wide["hardware"]] == ["l4"]
    assert wide["hardware"][0]["seconds_per_step"] < small["hardware"][0]["seconds_per_step"]


def test_a_lower_utilization_takes_longer_and_more_processes_a_larger_batch(capsys):
    base = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm")
    slow = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm", "--utilization", "0.175")
    many = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm", "--num_processes", "16")
    assert (
        1.9 < slow["hardware"][0]["hours"] / base["hardware"][0]["hours"] < 2.0
    )  # the update takes as long as before
    assert many["run"]["global_batch_size"] == 16 * base["run"]["global_batch_size"] == 2048
    assert many["hardware"][0]["hours"] == pytest.approx(base["hardware"][0]["hours"] / 16, rel=1e-3)
    assert many["hardware"][0]["largest_batch"] < base["hardware"][0]["largest_batch"]


def test_checkpointing_needs_less_memory_and_more_flops(capsys):
    kept = run_json(capsys, "in1k-vitb16")
    again = run_json(capsys, "in1k-vitb16", "--gradient_checkpointing")
    assert again["memory"]["peak"] < 0.6 * kept["memory"]["peak"]
    # a third of the trained parts' work, less the MLP's second layer
    trained = sum(sum(kept["flops_per_image"][part].values()) for part in ("context_encoder", "predictor"))
    more = again["flops_per_image"]["total"] - kept["flops_per_image"]["total"]
    assert 0.2 < more / trained < 1 / 3


def test_memory_is_that_of_the_masks_that_need_most(capsys):
    found = run_json(capsys, "in1k-vitb16")
    model, _, run = parse_arguments(["in1k-vitb16"])
    config, images = model.to_config(), run.per_device_train_batch_size
    parameters = count_parameters(config)
    peaks = [
        estimate_memory(config, sizes, parameters, images, StepSettings(bf16=True)).peak
        for sizes in draw_sizes(config, images)
    ]
    assert min(peaks) < max(peaks) == found["memory"]["peak"]


def test_the_length_of_a_run_is_that_of_its_plan_or_said_to_be_unknown(capsys):
    assert run_json(capsys, "digits")["run"]["steps"] == 40 * (1437 // 16)
    assert run_json(capsys, "digits", "--max_train_samples", "160")["run"]["steps"] == 400
    assert run_json(capsys, "in22k-vitg16")["run"]["steps"] is None
    assert run_json(capsys, "in22k-vitg16", "--num_images", "1600")["run"]["steps"] == 44 * 100
    stopped = run_json(capsys, "in22k-vitg16", "--max_train_steps", "10")
    assert (stopped["run"]["steps"], stopped["run"]["epochs"], stopped["run"]["images"]) == (10, None, 160)
    assert main.main(["estimate", "in22k-vitg16"]) == 0
    assert "give it with --num_images" in capsys.readouterr().out
    assert main.main(["estimate", "--hidden_size", "96"]) == 0  # no recipe, no images, no learning rate


def test_the_known_number_of_images_is_the_right_one():
    assert KNOWN_SIZES["digits"] == len(load_digits("train"))
    assert KNOWN_SIZES["shapes"] == SHAPES_SPLITS["train"][1]


def test_the_machine_at_hand_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "MEASURING_SECONDS", 0.0)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    found = run_json(capsys, "digits", "--hardware", "cpu", "--per_device_train_batch_size", "4")
    (row,) = found["hardware"]
    low, high = row["seconds_per_step_range"]
    assert 0 < low <= row["seconds_per_step"] <= high < 1
    assert row["utilization"] is None
    assert row["largest_batch"] > 1000
    assert main.main(["estimate", "digits", "--hardware", "cpu", "--per_device_train_batch_size", "4"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_the_table_has_the_numbers_of_the_json_file(tmp_path, capsys):
    assert main.main(["estimate", "in1k-vitl16", "--json", str(tmp_path / "vitl.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "vitl.json").read_text())
    arguments = parse_arguments(["in1k-vitl16"])
    assert found == json.loads(json.dumps(estimate_run(*arguments)))
    assert f"{found['parameters']['context_encoder']:,}" in text
    assert f"{found['hardware'][0]['hours']:,.0f}" in text
    assert all(name in text for name in HARDWARE)
    assert "t4 has no bfloat16" in text
    assert max(map(len, text.splitlines())) < 120


def test_weights_to_start_from_give_the_model_where_they_are_on_this_disk(tmp_path, capsys):
    export_model(tiny_model(), tmp_path, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    found = run_json(capsys, "adapt", "--model_name_or_path", str(tmp_path))
    assert found["parameters"]["total"] == count_parameters(tiny_config()).total
    assert main.main(["estimate", "adapt", "--model_name_or_path", "me/my-ijepa"]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digitz"], "Did you mean 'digits'"),
        (["digits", "--hardwar", "l4"], "did you mean '--hardware'"),
        (["digits", "--hardware", "H100"], "did you mean 'h100-sxm'"),
        (["digits", "--utilization", "35"], "must be in (0, 1]"),
        (["digits", "--utilization", "0.5", "--hardware", "cpu"], "which is measured"),
        (["digits", "--num_processes", "0"], "num_processes=0 must be at least 1"),
        (["digits", "--num_images", "0"], "num_images=0 must be at least 1"),
        (["digits", "--num_images", "3"], "3"),
        (["--hidden_size", "64", "digits"], "the recipe comes first: ijepa-hf estimate digits"),
        (["digits", "--json", "digits"], "must end in .json"),
        (["digits", "--json", "nowhere/x.json"], "there is no folder 'nowhere'"),
        (["digits", "--hidden_size", "65"], "hidden_size=65"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main.main(["estimate", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ijepa-hf estimate: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_flags_are_those_of_pretrain_and_its_own():
    own = {"--hardware", "--utilization", "--num_processes", "--num_images", "--json"}
    assert flag_names(command.build_parser()) == flag_names(build_parser()) | own


def test_a_run_that_is_estimated_can_be_run_with_the_same_flags(tmp_path, capsys):
    found = run_json(capsys, *tiny_flags(tmp_path / "run"))
    assert found["run"]["steps"] == 6
    assert not (tmp_path / "run").exists()
