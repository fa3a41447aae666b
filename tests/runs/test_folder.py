"""A run's folder: whose it is, what stays of it when a run goes on, and that no damage to a log stops it."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from faults import every_moment, in_fork, limit_file_size
from tiny import scrambled_model

from ijepa_hf.files import SaveError
from ijepa_hf.recipes.arguments import PretrainingArguments, argument_values, differing_arguments
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.runs.checkpoints import (
    Checkpoint,
    collect_state,
    config_fields,
    find_latest,
    read_checkpoint,
    save_checkpoint,
)
from ijepa_hf.runs.export import export_model
from ijepa_hf.runs.folder import (
    bytes_to_come,
    check_begun,
    check_output_dir,
    check_space,
    check_still_there,
    is_finished,
    prepare_output_dir,
    read_run,
)
from ijepa_hf.runs.lock import lock_output_dir
from ijepa_hf.runs.rows import append_rows, read_rows

ARGUMENTS = {"masking_strategy": "multi_block", "seed": 0, "max_broken_share": 0.05, "per_device_train_batch_size": 8}


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
        "per_device_train_batch_size": 4,
        "seed": 1,
    }
    assert differing_arguments(ARGUMENTS, other) == ["seed is 0 there, 1 here"]
    kept = [{**ARGUMENTS, "keep_images_in_memory": keep} for keep in ("auto", "no")]  # decides how crops are resized
    assert differing_arguments(*kept) == ["keep_images_in_memory is 'auto' there, 'no' here"]
    official = {**ARGUMENTS, "masking_strategy": "multi_block_official"}
    named = differing_arguments(official, {**official, "per_device_train_batch_size": 4})
    assert named == ["per_device_train_batch_size is 8 there, 4 here"]


def test_overwriting_never_deletes_what_the_run_starts_from(finished_run, tmp_path):
    weights = finished_run
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


def test_a_folder_of_a_run_from_other_weights_is_named_before_any_weights_are_opened(finished_run, tmp_path):
    run = PretrainingArguments(model_name_or_path="you/weights", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="holds another run: model_name_or_path is None there, 'you/weights' here"):
        check_begun(finished_run, run)
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


# -- a folder that was damaged, or left by a process that was killed -------------------------------------------------

RESUMES = PretrainingArguments(learning_rate=1e-3, resume_from_checkpoint="latest")
OVERWRITES = PretrainingArguments(learning_rate=1e-3, overwrite_output_dir=True)


def save(folder, step, seed=0, arguments=None):
    model = scrambled_model(seed)
    tensors = collect_state(model, torch.optim.AdamW(model.named_parameters()))
    arguments = {"output_dir": str(folder), **ARGUMENTS} if arguments is None else arguments
    config = config_fields(model.config)
    return save_checkpoint(folder, step, tensors, config=config, arguments=arguments, total_limit=9)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of a run with checkpoints of steps 2 and 4, and lines of six steps; tests copy it."""
    folder = tmp_path_factory.mktemp("two")
    arguments = {"output_dir": str(folder), **ARGUMENTS}
    prepare_output_dir(folder, arguments, config_fields(scrambled_model().config), OVERWRITES, None)
    for step in (2, 4):
        save(folder, step, seed=step)
    append_rows(folder / "metrics.jsonl", [{"step": step, "loss": 1 / step} for step in range(1, 7)])
    return folder


@pytest.fixture
def run(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


def stored_arguments(folder):
    return json.loads((folder / "run.json").read_text())["arguments"]


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x80  # no UTF-8 any more
    path.write_bytes(content)


def test_a_damaged_record_is_taken_from_the_newest_whole_checkpoint_where_the_run_goes_on(run, caplog):
    arguments = stored_arguments(run)
    flip(run / "run.json")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_run(run)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        check_begun(run, PretrainingArguments(learning_rate=1e-3))
    check_begun(run, RESUMES)
    check_output_dir(run, arguments, RESUMES)
    assert "run.json is damaged" in caplog.text
    assert f"the record in {run / 'checkpoint-4'} is taken instead" in caplog.text
    assert read_run(run, RESUMES) == {"arguments": arguments, "config": find_latest(run).config}
    with pytest.raises(ValueError, match="holds another run: seed is 0 there, 1 here"):
        check_output_dir(run, {**arguments, "seed": 1}, RESUMES)
    prepare_output_dir(run, arguments, {}, RESUMES, find_latest(run))
    assert stored_arguments(run) == arguments  # written again
    flip(run / "run.json")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):  # nobody knows any more
        check_begun(run, RESUMES)


@pytest.mark.parametrize("damage", ["cut", "flipped", "list", "no step"])
def test_a_damaged_report_means_unfinished_with_a_warning(run, caplog, damage):
    report = run / "report.json"
    export_model(scrambled_model(), run, step=4, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    report.write_text(json.dumps({"step": 4, "scores": {}}))
    assert is_finished(run, RESUMES)
    if damage == "flipped":
        flip(report)
    else:
        report.write_text({"cut": '{"step": 4, "sco', "list": "[4]", "no step": "{}"}[damage])
    assert not is_finished(run, RESUMES)
    assert "report.json is damaged" in caplog.text
    assert "counts as unfinished" in caplog.text


def test_damaged_lines_are_moved_aside_when_a_run_goes_on_and_named_to_who_reads_them(run, caplog):
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = [lines[0][:9] + b"\n", lines[2].replace(b"l", b"\xec"), b"[1]\n", b'{"loss": 1}\n']
    log.write_bytes(damaged[0] + lines[1] + damaged[1] + lines[3] + damaged[2] + damaged[3] + lines[4])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is damaged .*remove that line"):
        read_rows(log)
    prepare_output_dir(run, stored_arguments(run), {}, RESUMES, find_latest(run))
    assert [row["step"] for row in read_rows(log)] == [2, 4]
    assert (run / "metrics.jsonl.damaged").read_bytes() == b"".join(damaged)
    assert f"4 damaged lines of {log} are moved to {log}.damaged" in caplog.text
    log.write_bytes(damaged[0] + log.read_bytes())
    prepare_output_dir(run, stored_arguments(run), {}, RESUMES, find_latest(run))
    assert (run / "metrics.jsonl.damaged").read_bytes() == b"".join([*damaged, damaged[0]])
    prepare_output_dir(run, stored_arguments(run), {}, OVERWRITES, None)
    assert not (run / "metrics.jsonl.damaged").exists()


def test_what_killed_processes_left_goes_and_what_is_not_ours_stays(run):
    ours = [
        ".run.json.partial", ".metrics.jsonl.partial", ".model.safetensors.partial/.tmpA1b2C3", ".report.json.partial",
        "pretraining/.config.json.partial", "pretraining/.model.safetensors.partial/model.safetensors",
        ".checkpoint-6.partial/model.safetensors", ".checkpoint-2.replaced/x", ".checkpoint-1.deleted/checkpoint.json",
    ]  # fmt: skip
    others = [".push-4.partial/model.safetensors", ".notes.txt.partial", "notes.txt", ".checkpoint-x.partial/y"]
    for name in (*ours, *others):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    (run / "checkpoint-4").rename(run / ".checkpoint-4.replaced")  # the state that was about to be replaced
    checkpoint = find_latest(run)
    assert checkpoint.step == 4
    prepare_output_dir(run, stored_arguments(run), {}, RESUMES, checkpoint)
    assert not [name for name in ours if (run / name).exists() or ((run / name).parent.name.startswith(".")
                and (run / name).parent.exists())]  # fmt: skip
    assert all((run / name).exists() for name in others)
    assert find_latest(run).path == run / "checkpoint-4"


def test_a_folder_with_nothing_but_a_lock_and_leftovers_is_empty(tmp_path):
    with lock_output_dir(tmp_path / "run"):
        (tmp_path / "run" / ".checkpoint-3.deleted").mkdir()
        (tmp_path / "run" / ".run.json.partial").touch()
        check_output_dir(tmp_path / "run", ARGUMENTS, RESUMES)
        (tmp_path / "run" / "photo.png").touch()
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            check_output_dir(tmp_path / "run", ARGUMENTS, RESUMES)


def test_killed_at_any_moment_of_preparing_the_run_goes_on_from_a_whole_checkpoint(run, tmp_path, caplog):
    arguments = stored_arguments(run)
    sums = {checkpoint.step: checkpoint.path for checkpoint in map(read_checkpoint, run.glob("checkpoint-*"))}
    sums = {step: json.loads((path / "checkpoint.json").read_text())["files"] for step, path in sums.items()}

    def prepare(folder):
        prepare_output_dir(folder, arguments, {}, RESUMES, read_checkpoint(folder / "checkpoint-2"))

    steps = []

    def check(folder):
        checkpoint = find_latest(folder)
        assert json.loads((checkpoint.path / "checkpoint.json").read_text())["files"] == sums[checkpoint.step]
        check_output_dir(folder, arguments, RESUMES)
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")][:2] == [1, 2]
        steps.append(checkpoint.step)
        prepare_output_dir(folder, arguments, {}, RESUMES, checkpoint)  # the next life
        assert not list(folder.glob(".*"))

    moments = every_moment(run, tmp_path / "copy", prepare, check)
    assert moments >= 15
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == {4, 2}
    assert "damaged" not in caplog.text


def test_killed_at_any_moment_of_taking_over_another_runs_checkpoint_there_is_a_whole_one(two, run, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    other_source = read_checkpoint(save(other, 3, seed=3, arguments=stored_arguments(run)))
    arguments = stored_arguments(run)
    steps = []
    moments = every_moment(
        run,
        tmp_path / "copy",
        lambda folder: prepare_output_dir(folder, arguments, {}, RESUMES, other_source),
        lambda folder: steps.append(find_latest(folder).step),
    )
    assert moments >= 20
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == {4, 3}
    assert "damaged" not in caplog.text


def test_killed_at_any_moment_of_overwriting_the_same_command_overwrites_again(run, tmp_path):
    export_model(scrambled_model(), run, step=4, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (run / "notes.txt").write_text("mine")
    arguments = {**stored_arguments(run), "seed": 1}

    def check(folder):
        check_output_dir(folder, arguments, OVERWRITES)
        assert (folder / "notes.txt").read_text() == "mine"
        prepare_output_dir(folder, arguments, {}, OVERWRITES, None)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["metrics.jsonl", "notes.txt", "recipe.yaml", "run.json"]

    moments = every_moment(run, tmp_path / "copy", lambda folder: prepare_output_dir(
        folder, arguments, {}, OVERWRITES, None), check)  # fmt: skip
    assert moments >= 30


# -- a disk that fails -----------------------------------------------------------------------------------------------


def test_lines_that_do_not_fit_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1, "loss": 0.5}])
    before = path.read_bytes()

    def write():
        limit_file_size(100)
        with pytest.raises(SaveError, match=r"metrics\.jsonl could not be written: File too large") as caught:
            append_rows(path, [{"step": 2, "text": "x" * 200}])
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == before
        append_rows(path, [{"step": 3}])  # what fits is written

    assert in_fork(write) == 0
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_half_a_line_that_was_written_when_the_disk_was_full_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1}])
    real = os.write

    def write(descriptor, content):
        if len(content) < 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[:5])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(SaveError, match="No space left on device"):
        append_rows(path, [{"step": 2}, {"step": 3}])
    assert path.read_text() == '{"step": 1}\n'
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:5]))
    append_rows(path, [{"step": 2}, {"step": 3}])  # in pieces, but all of it
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_line_that_a_crash_cut_short_is_not_read_and_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    append_rows(path, [{"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_text('{"st')
    append_rows(path, [{"step": 4}])
    assert path.read_text() == '{"step": 4}\n'


def test_lines_of_a_folder_that_has_gone_are_an_error_and_the_folder_is_not_made_anew(tmp_path):
    with pytest.raises(SaveError, match="No such file or directory"):
        append_rows(tmp_path / "gone" / "metrics.jsonl", [{"step": 1}])
    assert not (tmp_path / "gone").exists()


def test_an_empty_mount_point_is_not_the_runs_folder(run):
    check_still_there(run)
    for entry in run.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with pytest.raises(SaveError, match=f"{re.escape(str(run))} holds no run.json any more.*Mount the disk again"):
        check_still_there(run)


def test_a_disk_without_room_for_a_run_is_refused_before_it_starts(tmp_path, monkeypatch):
    check_space(tmp_path / "run", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    check_space(tmp_path / "run", 5000)
    with pytest.raises(ValueError, match=f"output_dir='{tmp_path / 'run'}' .* need 5,001 bytes there, and 5,000 are"):
        check_space(tmp_path / "run", 5001)


def test_the_space_that_a_run_takes_is_foretold_and_less_is_to_come_of_one_that_has_begun(tmp_path):
    model = scrambled_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer = torch.optim.AdamW(
        [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    )
    optimizer.step()
    foretold = bytes_to_come(model, tmp_path, total_limit=2)
    for step in (1, 2, 3):  # one more than are kept, as while the third is written
        save_checkpoint(tmp_path, step, collect_state(model, optimizer), config={}, arguments={}, total_limit=3)
    export_model(model, tmp_path, step=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    again = (tmp_path / "pretraining" / "model.safetensors").stat().st_size  # beside itself, while it is replaced
    assert taken + again < foretold < 1.5 * (taken + again)
    left = bytes_to_come(model, tmp_path, total_limit=2)
    assert left < foretold / 2
    assert left >= (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size
