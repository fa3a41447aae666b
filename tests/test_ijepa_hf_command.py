"""The console command, which answers before the package and torch are imported."""

import subprocess
import sys

import pytest

import ijepa_hf_command

WITHOUT_ANYTHING_HEAVY = """
import sys
for name in ("torch", "transformers", "numpy", "ijepa_hf"):
    sys.modules[name] = None  # importing it is an error
from ijepa_hf_command import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("argv", "code", "said"), [(["--help"], 0, "pretrain"), ([], 2, "COMMAND"), (["dance", "--help"], 2, "dance")]
)
def test_help_and_a_wrong_command_are_answered_without_torch(child_environment, argv, code, said):
    command = [sys.executable, "-c", WITHOUT_ANYTHING_HEAVY, *argv]
    answer = subprocess.run(command, capture_output=True, text=True, env=child_environment, check=False)
    assert answer.returncode == code, answer.stderr
    assert said in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_console_command_hands_a_command_to_the_package(capsys):
    assert ijepa_hf_command.main(["pretrain", "digitz"]) == 2
    assert "Did you mean 'digits'" in capsys.readouterr().err
