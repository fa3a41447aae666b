"""The command line: exit codes that mean something, messages on one line, help for everything."""

import pytest
from tiny import tiny_flags, tiny_run

from ijepa_hf import cli, training
from ijepa_hf.training import NonFiniteLossError


def test_help_lists_the_commands_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"ijepa-hf {command}" in capsys.readouterr().out


def test_no_or_an_unknown_command_is_a_usage_error(capsys):
    for argv in ([], ["dance"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        assert exit_.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    for argv in (
        ["pretrain", "digits", "--sed", "1"],
        ["pretrain", "digitz"],
        ["pretrain", *tiny_flags(tmp_path / "run", image_size=30)],
        ["convert", str(tmp_path / "nowhere.pth.tar"), str(tmp_path / "out")],
    ):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"ijepa-hf {argv[0]}: ")
        assert len(error.splitlines()) == 1
        assert "Traceback" not in error


def test_a_non_finite_loss_is_exit_code_3_and_an_interruption_130(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise NonFiniteLossError("stopped at step 5")

    def interrupt(*_):
        raise KeyboardInterrupt

    for function, code in ((stop, 3), (interrupt, 130)):
        monkeypatch.setattr(training, "pretrain", function)
        assert cli.main(["pretrain", *tiny_flags(tmp_path / "run")]) == code
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_pretrain_and_convert_do_their_work_with_exit_code_0(tmp_path, golden, capsys):
    tiny_run(tmp_path / "run", max_train_steps=3)  # so that the command below prints its report and ends
    assert cli.main(["pretrain", *tiny_flags(tmp_path / "run", max_train_steps=3)]) == 0
    assert "finished" in capsys.readouterr().out
    argv = [
        "convert",
        str(golden / "official_checkpoint.pth.tar"),
        str(tmp_path / "out"),
        "--num_attention_heads",
        "4",
    ]
    assert cli.main(argv) == 0
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_command_flags_are_those_of_the_parsers():
    flags = cli.command_flags()
    assert "--num_attention_heads" in flags["convert"]
    assert {"--seed", "--resume_from_checkpoint", "--image_size"} <= flags["pretrain"]
