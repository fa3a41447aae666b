"""`scripts/compare_with_published_code.py`: what differs from a checkout of the published code is an error."""

import json
import sys
from pathlib import Path

import plain_ijepa
import pytest
from plain_ijepa import write_checkout, write_checkpoint
from warm_python import warm_executable

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import compare_with_published_code as script

HEADS = plain_ijepa.SMALL["heads"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_executable(tmp_path, package=False))
    return write_checkpoint(tmp_path / "small.pth.tar")


def test_values_are_compared_with_the_code_in_a_checkout_in_another_process(source, tmp_path, capsys, monkeypatch):
    added = "import os\nprint('imported')\nassert 'MY_TOKEN' not in os.environ\n"
    checkout = write_checkout(tmp_path / "code", ("import copy\n", f"import copy\n{added}"))
    monkeypatch.setenv("MY_TOKEN", "secret")
    script.main([str(source), str(checkout), "--num_attention_heads", str(HEADS)])
    printed = capsys.readouterr().out
    assert "imported" not in printed  # not by this process
    compared = json.loads(printed)
    assert (compared["images"], compared["dtype"]) == ([2, 3, 32, 32], "float32")
    assert set(compared["outputs"]) == {"encoder", "encoder_of_context", "target_encoder", "predictor"}
    for output in compared["outputs"].values():
        assert 0 <= output["largest_difference"] < 1e-5 < output["largest_value"]
        assert output["tolerance"] == pytest.approx(1e-4 * max(1.0, output["largest_value"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("functional.gelu(", "functional.relu("), r"other values than ours: encoder by"),
        (("import copy\n", "import os; os._exit(7)\n"), "could not be run .*exit status 7.*it said nothing"),
    ],
)
def test_other_values_or_code_that_fails_are_errors(source, tmp_path, change, match):
    checkout = write_checkout(tmp_path / "code", change)
    with pytest.raises(ValueError, match=match):
        script.compare(source, checkout, num_attention_heads=HEADS)


def test_wrong_heads_are_found_by_the_published_code(source, tmp_path):
    checkout = write_checkout(tmp_path / "code", ("self.heads = heads", "self.heads = 2"))
    with pytest.raises(ValueError, match="Are num_attention_heads=4 those"):
        script.compare(source, checkout, num_attention_heads=4)


def test_a_folder_without_the_networks_is_no_checkout(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no src/models/vision_transformer\.py"):
        script.compare(source, tmp_path)
