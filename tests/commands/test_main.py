"""The command line: exit codes that mean something, messages on one line, help for everything."""

import subprocess

import pytest
import torch
from PIL import Image
from tiny import tiny_flags, tiny_run
from warm_python import warm_python

from ijepa_hf.commands import main
from ijepa_hf.evaluation import evaluate
from ijepa_hf.hub.uploader import UploadIncompleteError
from ijepa_hf.training import pretrain
from ijepa_hf.training.step import NonFiniteLossError
from ijepa_hf.weights.official_checkpoint import read_official_checkpoint
from ijepa_hf_command import COMMANDS


def test_importing_the_package_registers_the_model_and_only_the_collator_waits(child_environment):
    code = (
        "import sys, ijepa_hf\n"
        "from transformers import AutoModelForPreTraining, IJepaConfig\n"
        "assert 'ijepa_hf.data.collator' not in sys.modules\n"
        "known = AutoModelForPreTraining._model_mapping\n"
        "assert known[IJepaConfig] is known[ijepa_hf.IJepaConfig] is ijepa_hf.IJepaForPretraining\n"
        "assert set(ijepa_hf.__all__) <= set(dir(ijepa_hf))\n"
        "from ijepa_hf import *\n"
        "assert IJepaDataCollator is sys.modules['ijepa_hf.data.collator'].IJepaDataCollator\n"
        "try:\n    ijepa_hf.IJepaDataColator\nexcept AttributeError as error:\n    print(error)\n"
    )
    command = [*warm_python(package=False), "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, env=child_environment, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "module 'ijepa_hf' has no attribute 'IJepaDataColator'\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"ijepa-hf {command}" in capsys.readouterr().out


def test_the_console_command_lists_the_commands_that_there_are(capsys):
    assert list(COMMANDS) == list(main.COMMANDS)
    for argv in ([], ["dance"]):  # without the console command in front, which refuses them by itself
        assert main.main(argv) == 2
    assert "'dance' is no command" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    for argv in (
        ["pretrain", "digits", "--sed", "1"],
        ["pretrain", "digitz"],
        ["pretrain", *tiny_flags(tmp_path / "run", image_size=30)],
        ["convert", str(tmp_path / "nowhere.pth.tar"), str(tmp_path / "out")],
        ["convert", "a", "b.pth.tar", "--to", "official", "--num_attention_heads", "3"],
        ["push", str(tmp_path / "nowhere"), "me/x"],
        ["finetune", "somewhere", "--dataset_nam", "digits"],
    ):
        assert main.main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"ijepa-hf {argv[0]}: ")
        assert len(error.splitlines()) == 1
        assert "Traceback" not in error


def test_a_non_finite_loss_is_exit_code_3_a_lost_upload_4_and_an_interruption_130(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise NonFiniteLossError("stopped at step 5")

    def lose(*_):
        raise UploadIncompleteError("step 6 did not arrive")

    def interrupt(*_):
        raise KeyboardInterrupt

    for function, code in ((stop, 3), (lose, 4), (interrupt, 130)):
        monkeypatch.setattr(pretrain, "pretrain", function)
        assert main.main(["pretrain", *tiny_flags(tmp_path / "run")]) == code
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "evaluate_model", interrupt)
    assert main.main(["evaluate", "somewhere", "--dataset_name", "digits"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command goes on.\n"


def test_pretrain_and_convert_do_their_work_with_exit_code_0(tmp_path, golden, capsys):
    tiny_run(tmp_path / "run", max_train_steps=3)  # so that the command below prints its report and ends
    assert main.main(["pretrain", *tiny_flags(tmp_path / "run", max_train_steps=3)]) == 0
    assert "finished" in capsys.readouterr().out
    argv = [
        "convert",
        str(golden / "official_checkpoint.pth.tar"),
        str(tmp_path / "out"),
        "--num_attention_heads",
        "4",
    ]
    assert main.main(argv) == 0
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert main.main(["convert", str(tmp_path / "out"), str(tmp_path / "back.pth.tar"), "--to", "official"]) == 0
    one, other = (read_official_checkpoint(path) for path in (golden / argv[1], tmp_path / "back.pth.tar"))
    for part, tensors in one.items():
        assert tensors.keys() == other[part].keys()
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in tensors.items())


def size_of(figure):
    with Image.open(figure) as picture:
        return picture.size


def test_the_masks_of_a_recipe_are_measured_and_drawn_without_any_images(tmp_path, capsys):
    figure = tmp_path / "audit.png"
    argv = ["visualize", "--masks", "in1k-vith14", "--audit", "--output", str(figure)]
    assert main.main(argv) == 0
    text = capsys.readouterr().out
    assert "multi_block_official on a grid of 16x16 patches" in text
    assert "he last row and column" in text
    assert text.strip().endswith(f"figure: {figure}")
    assert size_of(figure)[0] > 500
    # a flag over the recipe; what only the recipe's own strategy needs goes with it
    assert main.main([*argv, "--masking_strategy", "rasterized"]) == 0
    assert "rasterized on a grid of 16x16 patches" in capsys.readouterr().out


@pytest.mark.figures
def test_masks_are_drawn_over_training_images(tmp_path, capsys):
    figure = tmp_path / "masks.png"
    for flags in (["digits"], ["digits", "--masking_strategy", "random"]):
        assert main.main(["visualize", "--masks", *flags, "--output", str(figure)]) == 0
        assert size_of(figure)[0] > 500


def test_mistakes_of_visualize_are_one_line(tmp_path, capsys):
    for argv, message in (
        (["--masks", "digitz"], "Did you mean 'digits'"),
        (["--masks", "digits", "--output", "masks.jpg"], "must end in .png"),
        (["--masks", "digits", "--output", str(tmp_path / "nowhere" / "masks.png")], "there is no folder"),
        (["--masks", "digits", "--auditt"], "--audit"),
    ):
        assert main.main(["visualize", *argv]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1


def test_prepared_images_are_what_pretrain_streams(tmp_path, capsys):
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (90, 60), (20 * number, 0, 99)).save(tmp_path / "photos" / f"{number}.jpg")
    argv = ["prepare", str(tmp_path / "photos"), str(tmp_path / "out"), "--shortest_side", "40", "--shard_size", "2KB"]
    assert main.main(argv) == 0
    text = capsys.readouterr().out
    assert "12 images of split 'train'" in text
    assert f"ijepa-hf pretrain RECIPE --dataset_name {tmp_path / 'out'} --streaming" in text
    assert len(list((tmp_path / "out").rglob("train-*.parquet"))) > 1
    flags = tiny_flags(tmp_path / "run", dataset_name=tmp_path / "out", streaming=True, max_train_steps=2)
    assert main.main(["pretrain", *flags, "--warmup_epochs", "0"]) == 0
