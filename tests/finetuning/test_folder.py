"""Whose a fine-tuning's folder is, and which of its checkpoints can be gone on from."""

import pytest
import torch
from safetensors.torch import save_file

from ijepa_hf.files import write_json_atomically
from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.folder import check_output_dir, delete_run, find_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "classifier"


def told(folder, **changes):
    values = {"model": "me/base", "dataset_name": "digits", "output_dir": str(folder), **changes}
    return FinetuningArguments(**values)


def begin(folder):
    """What a fine-tuning leaves that was stopped at step 6."""
    folder.mkdir()
    write_json_atomically(folder / "finetune_arguments.json", vars(told(folder)))
    for step in (3, 6):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({"state": torch.zeros(9)}, checkpoint / name)
        save_file({"weight": torch.zeros(9)}, checkpoint / "model.safetensors")
        write_json_atomically(checkpoint / "trainer_state.json", {"global_step": step})


class Harm:
    """Something that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_checkpoint_that_is_half_written_or_damaged_is_skipped(name, folder, caplog):
    begin(folder)
    newest, arguments = folder / "checkpoint-6", told(folder, resume_from_checkpoint="latest")
    assert find_checkpoint(folder, arguments) == newest
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    assert find_checkpoint(folder, arguments) == folder / "checkpoint-3"
    assert "checkpoint-6, which is incomplete or damaged" in caplog.text
    with pytest.raises(FileNotFoundError, match="checkpoint-6': there is no complete and undamaged checkpoint"):
        find_checkpoint(folder, told(folder, resume_from_checkpoint=str(newest)))


def test_a_checkpoint_that_holds_code_is_skipped_and_the_code_not_run(folder, tmp_path):
    begin(folder)
    torch.save({"state": Harm(str(tmp_path / "harm"))}, folder / "checkpoint-6" / "optimizer.pt")
    assert find_checkpoint(folder, told(folder, resume_from_checkpoint="latest")) == folder / "checkpoint-3"
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_another_fine_tuning_is_refused(folder, tmp_path):
    begin(folder)
    asked = {"resume_from_checkpoint": str(folder / "checkpoint-3")}
    assert find_checkpoint(tmp_path / "new", told(tmp_path / "new", **asked)) == folder / "checkpoint-3"
    with pytest.raises(ValueError, match="another fine-tuning: seed is 0 there, 1 here"):
        find_checkpoint(tmp_path / "new", told(tmp_path / "new", seed=1, **asked))


def test_a_folder_that_holds_something_else_is_refused(folder):
    check_output_dir(folder, told(folder))
    folder.mkdir()
    (folder / "model.safetensors").write_text("somebody's")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no fine-tuning of ijepa-hf"):
            check_output_dir(folder, told(folder, overwrite_output_dir=overwrite))


def test_another_fine_tuning_is_refused_naming_what_differs(folder):
    begin(folder)
    for free in ({"dataloader_num_workers": 3}, {"overwrite_output_dir": True, "seed": 1}):
        check_output_dir(folder, told(folder, **{"resume_from_checkpoint": "latest", **free}))
    with pytest.raises(ValueError, match="another fine-tuning: learning_rate is 0.001 there, 0.005 here"):
        check_output_dir(folder, told(folder, learning_rate=5e-3))
    with pytest.raises(ValueError, match="unfinished. Add --resume_from_checkpoint latest"):
        check_output_dir(folder, told(folder))
    (folder / "finetune_arguments.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_output_dir(folder, told(folder))


@pytest.mark.parametrize("name", ["model", "resume_from_checkpoint"])
def test_what_is_read_is_not_overwritten(name, folder):
    begin(folder)
    with pytest.raises(ValueError, match=f"overwrite_output_dir would delete {name}="):
        check_output_dir(folder, told(folder, overwrite_output_dir=True, **{name: str(folder / "checkpoint-3")}))


def test_what_a_fine_tuning_wrote_is_deleted_and_nothing_else(folder):
    begin(folder)
    (folder / "figures").mkdir()
    (folder / "notes.txt").write_text("mine")
    delete_run(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
