"""What is pushed, and what a repository holds, without a Hub; test_uploader.py pushes."""

import json
import os

import pytest
from tiny import tiny_run

from ijepa_hf.hub.contents import RepositoryContents, StagedFolder
from ijepa_hf.recipes.arguments import argument_defaults

ARGUMENTS = {**argument_defaults(), "output_dir": "run", "dataset_name": "digits"}


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path / "run", license="mit")


def holding(**texts):
    names = {name.replace("__", "/") + ".json": text for name, text in texts.items()}
    return RepositoryContents("me/x", sorted(names), names)


def test_a_repository_is_this_runs_another_runs_or_no_runs_at_all():
    same = json.dumps({"arguments": ARGUMENTS})
    assert holding(run=same).other_than(ARGUMENTS) is None
    assert RepositoryContents("me/x", ["README.md", "LICENSE"]).other_than(ARGUMENTS) is None
    assert "seed is 0 there, 1 here" in holding(run=same).other_than({**ARGUMENTS, "seed": 1})
    assert "cannot be read" in holding(run="{").other_than(ARGUMENTS)
    for weights in ("model.safetensors", "onnx/model.onnx", "pytorch_model.bin"):
        assert weights in RepositoryContents("me/x", [weights]).other_than(ARGUMENTS)


def test_how_far_a_repository_is_comes_from_its_checkpoint_and_its_report():
    held = holding(**{"last-checkpoint__checkpoint": '{"step": 40}', "report": '{"step": 60}'})
    assert (held.checkpoint_step, held.report_step) == (40, 60)
    empty = holding(report="not json")
    assert (empty.checkpoint_step, empty.report_step) == (-1, -1)


def test_weights_are_linked_and_what_grows_is_copied_up_to_its_last_whole_line(run):
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    staged = StagedFolder.of(run, "x", run / "checkpoint-6")
    try:
        for name, source in (
            ("model.safetensors", run / "model.safetensors"),
            ("last-checkpoint/optimizer.safetensors", run / "checkpoint-6" / "optimizer.safetensors"),
        ):
            assert os.path.samefile(staged.path / name, source)
        lines = (staged.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert not os.path.samefile(staged.path / "metrics.jsonl", run / "metrics.jsonl")
        staged.address("me/x", "dev")
        card = (staged.path / "README.md").read_text()
        assert 'model_id = "me/x"  # its branch dev\n' in card
        assert "MODEL=me/x  # its branch dev\n" in card
        assert f'model_id = "{run}"  # `ijepa-hf push`' in (run / "README.md").read_text()
    finally:
        staged.remove()
    assert not staged.path.exists()


def test_a_folder_that_cannot_be_pushed_leaves_nothing_behind(run):
    before = sorted(run.iterdir())
    with pytest.raises(ValueError, match="model of step 6, but its newest checkpoint is checkpoint-4"):
        StagedFolder.of(run, "x", run / "checkpoint-4")
    assert sorted(run.iterdir()) == before
