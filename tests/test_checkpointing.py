"""Checkpoints: complete, checked before use, pruned, and never half loaded."""

import json
import os

import pytest
import torch
from tiny import scrambled_model, tiny_batch

from ijepa_hf.arguments import PretrainingArguments
from ijepa_hf.checkpointing import (
    DamagedCheckpointError,
    config_fields,
    delete_checkpoints_after,
    find_latest,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from ijepa_hf.training import make_optimizer

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
    model, optimizer = pair
    return save_checkpoint(
        folder, step, model, optimizer, config=config_fields(model.config), arguments={"seed": 0}, total_limit=limit
    )


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


def test_only_the_newest_are_kept(tmp_path):
    pair = stepped()
    for step in (1, 2, 9, 10):
        save(tmp_path, step, pair, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert find_latest(tmp_path).step == 10


def test_a_checkpoint_just_written_is_never_pruned_and_later_ones_can_be_deleted(tmp_path):
    pair = stepped()
    for step in (5, 6):
        save(tmp_path, step, pair, limit=2)
    assert save(tmp_path, 3, pair, limit=1).is_dir()  # an older step, as after resuming from step 2
    delete_checkpoints_after(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_skipped_and_never_read(tmp_path, caplog, name, damage):
    pair = stepped()
    save(tmp_path, 1, pair)
    file = save(tmp_path, 2, pair) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF if name != "checkpoint.json" else 0x80
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="checkpoint-2"):
        read_checkpoint(tmp_path / "checkpoint-2")
    assert find_latest(tmp_path).step == 1
    assert "checkpoint-2" in caplog.text


def test_a_save_that_is_interrupted_leaves_the_previous_checkpoint_and_no_new_one(tmp_path, monkeypatch):
    pair = stepped()
    save(tmp_path, 1, pair)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, pair)
    monkeypatch.undo()
    assert find_latest(tmp_path).step == 1
    save(tmp_path, 2, pair)  # what was left over is in nobody's way
    assert find_latest(tmp_path).step == 2
    assert not list(tmp_path.glob(".*"))


def test_another_models_state_is_refused_naming_the_fields_and_changes_nothing(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path, 1, stepped()))
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


def test_the_manifest_is_plain_json_with_sizes_and_digests(tmp_path):
    manifest = json.loads((save(tmp_path, 3, stepped()) / "checkpoint.json").read_text())
    assert manifest["step"] == 3
    assert manifest["config"]["hidden_size"] == 32
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
