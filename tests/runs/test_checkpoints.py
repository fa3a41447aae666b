"""Checkpoints: complete, checked before use, pruned, never half loaded, and whole whatever happens while saving."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from faults import every_moment, in_fork, limit_file_size, on_small_disk, without_privileges
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import scrambled_model, tiny_batch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ijepa_hf import files
from ijepa_hf.files import SaveError
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.runs import checkpoints
from ijepa_hf.runs.checkpoints import (
    DamagedCheckpointError,
    adopt_checkpoint,
    collect_state,
    config_fields,
    delete_checkpoints_after,
    find_latest,
    read_checkpoint,
    remove_leftovers,
    restore,
    save_checkpoint,
)
from ijepa_hf.training.step import make_optimizer

RUN = PretrainingArguments(learning_rate=1e-3)


def stepped(seed=0, **changes):
    model = scrambled_model(seed, **changes).train()
    optimizer = make_optimizer(model, RUN)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    model(**tiny_batch(model.config, seed=seed)).loss.backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, pair, limit=2):
    tensors, config = collect_state(*pair), config_fields(pair[0].config)
    return save_checkpoint(folder, step, tensors, config=config, arguments={"seed": 0}, total_limit=limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pair():
    return stepped()


@pytest.fixture(scope="module")
def one(tmp_path_factory, pair):
    """A folder with a checkpoint of step 1; tests copy it."""
    folder = tmp_path_factory.mktemp("one")
    save(folder, 1, pair)
    return folder


@pytest.fixture
def run(one, tmp_path):
    return shutil.copytree(one, tmp_path / "run")


def test_restoring_gives_back_every_bit_of_weights_and_optimiser_state(tmp_path):
    source, target = stepped(0), stepped(1)
    path = save(tmp_path, 5, source)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.arguments) == (5, {"seed": 0})
    restore(checkpoint, *target, config_fields(target[0].config))
    for one, other in zip(source[0].state_dict().values(), target[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(source[0].parameters(), target[0].parameters(), strict=True):
        ours, theirs = source[1].state.get(one, {}), target[1].state.get(other, {})
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_the_newest_are_kept(tmp_path, pair):
    for step in (1, 2, 9, 10):
        save(tmp_path, step, pair, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert find_latest(tmp_path).step == 10


def test_a_checkpoint_just_written_is_never_pruned_and_later_ones_can_be_deleted(tmp_path, pair):
    for step in (5, 6):
        save(tmp_path, step, pair, limit=2)
    assert save(tmp_path, 3, pair, limit=1).is_dir()  # an older step, as after resuming from step 2
    delete_checkpoints_after(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_a_checkpoint_that_lacks_a_file_is_named_and_skipped_and_never_read(run, pair, caplog, name):
    (save(run, 2, pair) / name).unlink()
    with pytest.raises(DamagedCheckpointError, match="checkpoint-2"):
        read_checkpoint(run / "checkpoint-2")
    assert find_latest(run).step == 1
    assert "checkpoint-2" in caplog.text


def test_a_save_that_is_interrupted_leaves_the_previous_checkpoint_and_no_new_one(run, pair, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save(run, 2, pair)
    monkeypatch.undo()
    assert find_latest(run).step == 1
    save(run, 2, pair)  # leftovers do no harm
    assert find_latest(run).step == 2
    assert not list(run.glob(".*"))


def test_another_models_state_is_refused_naming_the_fields_and_changes_nothing(one):
    checkpoint = read_checkpoint(one / "checkpoint-1")
    other = stepped(hidden_size=64, loss_type="mse")
    before = {name: value.clone() for name, value in other[0].state_dict().items()}
    with pytest.raises(ValueError, match=r"another model's: hidden_size is 32 there, 64 here; loss_type"):
        restore(checkpoint, *other, config_fields(other[0].config))
    assert all(torch.equal(value, before[name]) for name, value in other[0].state_dict().items())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model, optimizer = stepped()
    save(tmp_path, 1, (model, optimizer))
    with torch.no_grad():
        model.predictor.embed.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 2: predictor\.embed\.weight"):
        save(tmp_path, 2, (model, optimizer))
    assert find_latest(tmp_path).step == 1


def test_a_missing_folder_is_an_error_and_an_empty_one_holds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_checkpoint(tmp_path / "checkpoint-3")
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "nowhere") is None


def test_the_manifest_is_plain_json_with_sizes_and_digests(one):
    manifest = json.loads((one / "checkpoint-1" / "checkpoint.json").read_text())
    assert manifest["step"] == 1
    assert manifest["config"]["hidden_size"] == 32
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
    assert len(manifest["sha256"]) == 64


# -- what was written ------------------------------------------------------------------------------------------------


@given(st.sampled_from(["model.safetensors", "optimizer.safetensors", "checkpoint.json"]), st.data())
def test_any_byte_that_changed_and_any_end_that_is_missing_is_found(one, name, data):
    file = one / "checkpoint-1" / name
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1), label="place")
    damaged = bytearray(whole)
    if data.draw(st.booleans(), label="cut"):
        damaged = damaged[:place]
    else:
        damaged[place] ^= data.draw(st.integers(1, 255), label="bits")
    try:
        file.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=re.escape(name)):
            read_checkpoint(one / "checkpoint-1")
    finally:
        file.write_bytes(whole)
    assert read_checkpoint(one / "checkpoint-1").step == 1


def test_a_change_of_any_byte_of_the_manifest_is_found(run):
    file = run / "checkpoint-1" / "checkpoint.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        bits = 0x20 if place % 3 == 0 else 0x01  # another case, another digit: text that may still be JSON
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        assert find_latest(run) is None, (place, bits)
    file.write_bytes(whole)
    assert find_latest(run).step == 1


def test_a_manifest_of_before_it_had_a_digest_of_its_own_is_read(run):
    file = run / "checkpoint-1" / "checkpoint.json"
    record = json.loads(file.read_text())
    del record["sha256"]
    file.write_text(json.dumps(record))
    assert find_latest(run).step == 1
    file.write_text(json.dumps({**record, "files": {}}))  # and it has to have what there is to check
    assert find_latest(run) is None


def test_what_a_damaged_checkpoint_costs_is_said_and_an_explicit_one_points_to_the_newest_whole(run, pair, caplog):
    for step in (5, 9):
        save(run, step, pair, limit=3)
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    assert find_latest(run).step == 1
    assert "checkpoint-9: model.safetensors is missing" in caplog.text
    assert "checkpoint-5: model.safetensors is missing" in caplog.text
    assert "the newest whole checkpoint is" in caplog.text
    assert "checkpoint-1, of step 1, 8 before the damaged one of step 9" in caplog.text
    advice = re.escape(f"of step 1: use '{run / 'checkpoint-1'}' instead")
    with pytest.raises(DamagedCheckpointError, match=f"checkpoint-9: model.safetensors is missing.*{advice}"):
        read_checkpoint(run / "checkpoint-9")
    with pytest.raises(FileNotFoundError, match=f"no such folder.*{advice}"):
        read_checkpoint(run / "checkpoint-7")
    shutil.rmtree(run / "checkpoint-1")
    caplog.clear()
    assert find_latest(run) is None
    assert f"no whole checkpoint is left in {run}" in caplog.text


def test_a_disk_that_does_not_answer_is_no_damage(run, monkeypatch):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoints, "_fingerprint", refuse)
    for number in (
        errno.ESTALE,
        errno.EACCES,
        errno.ETIMEDOUT,
    ):  # the run may not fall back, and delete what it missed
        with pytest.raises(OSError, match=os.strerror(number)):
            find_latest(run)
    number = errno.EIO
    assert find_latest(run) is None


# -- putting it in place ---------------------------------------------------------------------------------------------


def rewritten(folder, name, change):
    """A checkpoint whose manifest is right about a file that is not."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    change(tensors)
    save_file(tensors, folder / name)
    record = json.loads((folder / "checkpoint.json").read_text())
    del record["sha256"]
    record["files"][name] = checkpoints._fingerprint(folder / name)
    (folder / "checkpoint.json").write_text(checkpoints._sealed(record))
    return read_checkpoint(folder)


def lacks(key):
    return lambda tensors: tensors.pop(key)


def has(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("model.safetensors", lacks("predictor.embed.weight"), "predictor.embed.weight is missing"),
        ("model.safetensors", has("extra", 2), "extra is not of this model"),
        ("model.safetensors", has("predictor.embed.bias", 3), r"predictor.embed.bias is \[3\], expected \[16\]"),
        ("optimizer.safetensors", lacks("predictor.embed.bias/step"), "predictor.embed.bias/step is missing"),
        ("optimizer.safetensors", has("ijepa.x/exp_avg", 2), "ijepa.x/exp_avg is not of this optimiser"),
        ("optimizer.safetensors", has("predictor.embed.bias/exp_avg", 3), r"exp_avg is \[3\], expected \[16\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_naming_the_tensor_and_changes_nothing(run, name, change, match):
    checkpoint = rewritten(run / "checkpoint-1", name, change)
    model, optimizer = stepped(1)
    before = collect_state(model, optimizer)
    before = [{key: tensor.clone() for key, tensor in part.items()} for part in (before.model, before.optimizer)]
    with pytest.raises(DamagedCheckpointError, match=f"{name} does not fit the model: .*{match}"):
        restore(checkpoint, model, optimizer, config_fields(model.config))
    after = collect_state(model, optimizer)
    for part, kept in zip((after.model, after.optimizer), before, strict=True):
        assert part.keys() == kept.keys()
        assert all(torch.equal(part[key], kept[key]) for key in kept)


def test_a_network_that_was_frozen_so_far_has_no_state_and_all_of_it_is_restored(tmp_path):
    model, optimizer = stepped()
    for parameter in model.context_encoder.parameters():
        optimizer.state.pop(parameter, None)
    checkpoint = read_checkpoint(save(tmp_path, 1, (model, optimizer)))
    other = scrambled_model(1)
    restored = make_optimizer(other, RUN)
    restore(checkpoint, other, restored, config_fields(other.config))
    state = collect_state(other, restored).optimizer
    assert state.keys() == {key for key in state if key.startswith("predictor.")}
    assert len(state) == 3 * len(list(other.predictor.parameters()))


def test_gathering_copies_nothing_on_a_cpu_and_keeps_nothing_where_it_is_told_so():
    model, optimizer = stepped()
    tensors = collect_state(model, optimizer)
    for name, tensor in model.state_dict().items():
        assert tensors.model[name].data_ptr() == tensor.data_ptr()
    assert tensors.optimizer["predictor.embed.bias/exp_avg"].data_ptr() == (
        optimizer.state[model.predictor.embed.bias]["exp_avg"].data_ptr()
    )
    nothing = collect_state(model, optimizer, keep=False)
    assert (nothing.model, nothing.optimizer) == ({}, {})


def test_each_process_of_a_sharded_model_gets_its_part_without_a_message(run):
    whole = load_file(run / "checkpoint-1" / "model.safetensors")
    moments = load_file(run / "checkpoint-1" / "optimizer.safetensors")

    def second_of_two():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        model = scrambled_model(1)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                placement = Shard(0) if parameter.ndim else Replicate()
                part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
                module.register_parameter(name, torch.nn.Parameter(part, requires_grad=parameter.requires_grad))
        optimizer = make_optimizer(model, RUN)
        restore(read_checkpoint(run / "checkpoint-1"), model, optimizer, config_fields(model.config))
        for name, parameter in model.named_parameters():
            rows = torch.chunk(whole[name], 2)
            mine = rows[1] if len(rows) == 2 else rows[0][:0]  # of a single row, this process has none
            assert torch.equal(parameter.to_local(), mine), name
            if parameter.requires_grad:
                state = optimizer.state[parameter]
                assert float(state["step"]) == 1
                rows = torch.chunk(moments[f"{name}/exp_avg_sq"], 2)
                assert torch.equal(state["exp_avg_sq"].to_local(), rows[1] if len(rows) == 2 else rows[0][:0]), name

    assert in_fork(second_of_two) == 0


# -- a disk that fails while saving ----------------------------------------------------------------------------------


def assert_as_before(run, one):
    """The earlier checkpoint is whole, with its bits, and nothing of the new one is left."""
    assert names(run) == ["checkpoint-1"]
    for file in (one / "checkpoint-1").iterdir():
        assert (run / "checkpoint-1" / file.name).read_bytes() == file.read_bytes()
    assert find_latest(run).step == 1


def test_too_little_space_is_found_before_anything_is_written(run, one, pair, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1234, 1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "mkdir", None)
    with pytest.raises(SaveError, match=r"checkpoint-2 could not be written: No space left.*1,234 free") as caught:
        save(run, 2, pair)
    assert caught.value.errno == errno.ENOSPC
    needed = int(re.search(r"([\d,]+) bytes are needed", str(caught.value))[1].replace(",", ""))
    monkeypatch.undo()
    taken = sum(file.stat().st_size for file in (run / "checkpoint-1").iterdir())
    assert taken < needed < taken + 150_000
    assert "--on_save_error continue" in str(caught.value)
    assert_as_before(run, one)


def test_a_file_that_may_not_grow_is_one_clear_error_and_the_earlier_checkpoint_is_whole(run, one, pair):
    def write():
        limit_file_size(100_000)
        with pytest.raises(SaveError, match="checkpoint-2 could not be written: File too large") as caught:
            save(run, 2, pair)
        assert caught.value.errno == errno.EFBIG

    assert in_fork(write) == 0
    assert_as_before(run, one)


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoint_is_whole(one, pair, tmp_path, is_checked):
    disk = tmp_path / "disk"
    disk.mkdir()

    def write():
        shutil.copytree(one / "checkpoint-1", disk / "checkpoint-1")
        if not is_checked:  # as where a quota ends before the disk does
            plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)
            shutil.disk_usage = lambda _: plenty
        with pytest.raises(SaveError, match="checkpoint-2 could not be written: No space left on device"):
            save(disk, 2, pair)
        assert_as_before(disk, one)
        assert (disk / "checkpoint-1").stat().st_dev != tmp_path.stat().st_dev
        shutil.rmtree(disk / "checkpoint-1")  # room is made, and the next try succeeds
        save(disk, 2, pair)
        assert find_latest(disk).step == 2

    assert on_small_disk(disk, "700k", write) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("place", ["mkdir", "save_file", "write_text", "fsync", "replace"])
def test_whatever_the_disk_refuses_is_one_clear_error_and_leaves_nothing(run, one, pair, monkeypatch, place, number):
    def refuse(*arguments, **_):
        if place == "save_file":
            arguments[1].write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    owner = {"save_file": files, "write_text": type(run)}.get(place, os)
    monkeypatch.setattr(owner, place, refuse)
    with pytest.raises(SaveError, match=f"checkpoint-2 could not be written: {os.strerror(number)}") as caught:
        save(run, 2, pair)
    assert caught.value.errno == number
    monkeypatch.undo()
    assert_as_before(run, one)


def test_a_folder_that_may_only_be_read_is_one_clear_error(run, one, pair):
    def write():
        with pytest.raises(SaveError, match="checkpoint-2 could not be written: Permission denied"):
            save(run, 2, pair)

    run.chmod(0o500)
    try:
        assert without_privileges(write) == 0
    finally:
        run.chmod(0o700)
    assert_as_before(run, one)


def test_a_folder_that_has_gone_is_not_made_anew_where_its_disk_was(run, pair):
    shutil.rmtree(run)
    with pytest.raises(SaveError, match="checkpoint-2 could not be written: No such file or directory"):
        save(run, 2, pair)
    assert not run.exists()


def test_an_older_checkpoint_that_cannot_be_removed_is_a_warning(run, pair, monkeypatch, caplog):
    def refuse(_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(checkpoints, "_delete", refuse)
    save(run, 2, pair, limit=1)
    assert find_latest(run).step == 2
    assert "checkpoint-1 is beyond checkpoints_total_limit and could not be removed" in caplog.text


def test_a_replacement_that_cannot_take_its_place_leaves_what_was_there(run, one, monkeypatch):
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveError, match="Input/output error"):
        save(run, 1, stepped(3))
    monkeypatch.undo()
    assert_as_before(run, one)


# -- a process that is killed while saving ---------------------------------------------------------------------------


def contents(checkpoint):
    return checkpoint.step, json.loads((checkpoint.path / "checkpoint.json").read_text())["files"]


@pytest.mark.parametrize(("step", "least"), [(3, 15), (2, 15)], ids=["the oldest goes", "one is replaced"])
def test_killed_at_any_moment_of_a_save_the_old_or_the_new_one_is_whole(one, pair, tmp_path, caplog, step, least):
    template = shutil.copytree(one, tmp_path / "template")
    save(template, 2, stepped(2))
    old, new = contents(find_latest(template)), contents(find_latest(shutil.copytree(template, tmp_path / "new")))
    save(tmp_path / "new", step, pair)
    new = contents(find_latest(tmp_path / "new"))
    assert old != new
    found = []

    def check(folder):
        found.append(contents(find_latest(folder)))
        remove_leftovers(folder)
        assert contents(find_latest(folder)) == found[-1]
        assert not [name for name in names(folder) if name.startswith(".")]
        assert contents(find_latest(folder.rename(tmp_path / "moved"))) == found[-1]
        save(tmp_path / "moved", 4, pair)  # and the next life saves as if nothing had been
        assert find_latest(tmp_path / "moved").step == 4
        shutil.rmtree(tmp_path / "moved")

    moments = every_moment(template, tmp_path / "run", lambda folder: save(folder, step, pair), check)
    assert moments >= least
    assert found[0] == old
    assert found[-1] == new
    assert found == sorted(found, key=lambda one: one == new), "once the new one is there, it stays"
    assert "damaged" not in caplog.text


def test_killed_at_any_moment_of_taking_a_checkpoint_over_there_is_one_or_none_but_never_half(one, tmp_path, caplog):
    source = read_checkpoint(one / "checkpoint-1")
    empty = tmp_path / "empty"
    empty.mkdir()
    found = []
    moments = every_moment(
        empty,
        tmp_path / "run",
        lambda folder: adopt_checkpoint(source, folder),
        lambda folder: found.append(find_latest(folder)),
    )
    assert moments >= 8
    assert found[0] is None
    assert contents(found[-1]) == contents(source)
    assert "damaged" not in caplog.text


def test_killed_at_any_moment_of_deleting_later_ones_none_is_half_there(one, pair, tmp_path, caplog):
    template = shutil.copytree(one, tmp_path / "template")
    for step in (2, 3):
        save(template, step, pair, limit=3)
    found = []
    moments = every_moment(
        template,
        tmp_path / "run",
        lambda folder: delete_checkpoints_after(folder, 1),
        lambda folder: found.append(find_latest(folder).step),
    )
    assert moments >= 10
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
    assert "damaged" not in caplog.text
