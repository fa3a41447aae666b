"""Published checkpoints in and out: every bit carried over, and nothing written for a file that is not one."""

import copy
import hashlib
import json
import re
import shutil
import zipfile

import plain_ijepa
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from plain_ijepa import TRAINING, same_bits, trained_networks, write_checkpoint, write_run
from safetensors.torch import load_file, save_file
from tiny import scrambled_model, tiny_batch, tiny_run

from ijepa_hf import IJepaForPretraining
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.runs.checkpoints import config_fields, find_latest, read_checkpoint, restore
from ijepa_hf.runs.export import export_model
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import ReadyModel, make_optimizer
from ijepa_hf.weights.convert import convert
from ijepa_hf.weights.convert_back import convert_to_official
from ijepa_hf.weights.official_checkpoint import model_from_official, read_official_checkpoint
from ijepa_hf.weights.official_names import PARTS, translate

HEADS = plain_ijepa.SMALL["heads"]


@pytest.fixture
def official(golden):
    return golden / "official_checkpoint.pth.tar"


@pytest.fixture
def contents(official):
    return read_official_checkpoint(official)


def plain_step(networks, optimizer, step):
    return plain_ijepa.train_step(networks, optimizer, plain_ijepa.make_batch(step), **TRAINING)


# -- published -> ours -----------------------------------------------------------------------------------------------


def test_converted_folder_is_what_stock_transformers_and_this_package_read(official, contents, tmp_path):
    message = convert(official, tmp_path / "out", num_attention_heads=4)
    assert "width 64, depth 3, 4 heads" in message
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(encoder) is transformers.IJepaModel
    table = contents["target_encoder"]["blocks.2.mlp.fc2.weight"]
    assert torch.equal(encoder.layers[2].mlp.fc2.weight.detach(), table)  # the target's, not the context's
    assert not torch.equal(table, contents["encoder"]["blocks.2.mlp.fc2.weight"])
    assert encoder.config.layer_norm_eps == 1e-6
    whole = IJepaForPretraining.from_pretrained(tmp_path / "out")
    assert torch.equal(whole.predictor.mask_token.detach(), contents["predictor"]["mask_token"])
    assert not any(parameter.requires_grad for parameter in whole.ijepa.parameters())
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert processor["image_std"] == [0.229, 0.224, 0.225]
    assert not list(tmp_path.glob(".*"))


def test_the_report_names_the_file_and_every_tensor_of_both_sides(official, contents, tmp_path):
    convert(official, tmp_path / "out", num_attention_heads=4)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    data = official.read_bytes()
    assert report["source"] == {"name": official.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files = {
        name: load_file(tmp_path / "out" / name) for name in ("model.safetensors", "pretraining/model.safetensors")
    }
    assert report["bit_equal"] == {name: {"tensors": len(tensors)} for name, tensors in files.items()}
    stated = {pair["published"]: pair["shape"] for pair in report["tensors"]}
    assert stated == {
        f"{part}.module.{name}": list(tensor.shape) for part in PARTS for name, tensor in contents[part].items()
    }
    ours = {name: shape for pair in report["tensors"] for name, shape in pair["ours"].items()}
    state = model_from_official(contents, num_attention_heads=4).state_dict()
    assert ours == {name: list(tensor.shape) for name, tensor in state.items()}
    numbers = sum(tensor.numel() for part in PARTS for tensor in contents[part].values())
    assert report["published"] == {"tensors": len(stated), "parameters": numbers}
    assert report["ours"] == {"tensors": len(ours), "parameters": numbers}
    assert sum(tensor.numel() for tensor in files["pretraining/model.safetensors"].values()) == numbers
    assert report["entries"]["epoch"] == 1


def test_the_card_has_the_licence_and_code_that_runs(tmp_path, monkeypatch):
    convert(write_checkpoint(tmp_path / "small.pth.tar"), tmp_path / "encoder", num_attention_heads=HEADS)
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card.split("---")[1]
    assert "MODEL=encoder  # " in card
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    found = {"image": Image.new("RGB", (40, 50), "red")}
    for block in blocks:
        exec(block, found)
    assert found["features"].shape == (1, 32)
    assert found["classifier"].classifier.out_features == 10


def test_files_of_the_old_format_are_converted_too(tmp_path):
    source = write_checkpoint(tmp_path / "old.pth.tar", legacy=True)
    assert not zipfile.is_zipfile(source)
    convert(source, tmp_path / "out", num_attention_heads=HEADS)
    write_checkpoint(tmp_path / "new.pth.tar")
    convert(tmp_path / "new.pth.tar", tmp_path / "other", num_attention_heads=HEADS)
    old, new = (load_file(tmp_path / name / "pretraining" / "model.safetensors") for name in ("out", "other"))
    assert same_bits(dict(sorted(old.items())), dict(sorted(new.items())))


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(path, tmp_path, match, **options):
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "out", **{"num_attention_heads": HEADS, **options})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_written_for_a_file_that_cannot_be_read_or_does_not_fit(tmp_path):
    path = write_checkpoint(tmp_path / "in.pth.tar", lambda saved: saved["encoder"].pop("module.norm.bias"))
    refused(path, tmp_path, r"context_encoder\.layernorm\.bias is missing")
    refused(write_checkpoint(path), tmp_path, "hidden_size=32 must be a multiple", num_attention_heads=5)
    path.write_bytes(path.read_bytes()[:100_000])
    refused(path, tmp_path, "cannot be read")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "nowhere.pth.tar", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.pth.tar"]


def test_nothing_is_written_for_an_optimiser_state_that_does_not_fit_and_the_weights_alone_are_converted(tmp_path):
    path = write_run(tmp_path / "run.pth.tar", lambda saved: saved["opt"]["state"].pop(3))
    refused(path, tmp_path, "has no state", with_optimizer=True)
    convert(path, tmp_path / "out", num_attention_heads=HEADS)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_used(official, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(official, tmp_path / "out", num_attention_heads=4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert(official, tmp_path / "empty", num_attention_heads=4)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_what_the_disk_gives_back_is_compared_and_nothing_is_left_if_it_differs(official, tmp_path, monkeypatch):
    from ijepa_hf.weights import convert as conversion

    def export_wrong(model, folder, **options):
        export_model(model, folder, **options)
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors["ijepa.layernorm.bias"].view(torch.int32)[5] ^= 1  # the last bit of one number
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(conversion, "export_model", export_wrong)
    with pytest.raises(OSError, match=r"model.safetensors is not what was written.*ijepa\.layernorm\.bias"):
        convert(official, tmp_path / "out", num_attention_heads=4)
    assert list(tmp_path.iterdir()) == []


# -- the optimiser ---------------------------------------------------------------------------------------------------


def goes_on(folder, step):
    """Model and optimiser of ours, restored from a checkpoint, then one more step."""
    config = IJepaForPretraining.config_class.from_pretrained(folder / "pretraining")
    model = IJepaForPretraining(config).train()
    optimizer = make_optimizer(model, PretrainingArguments(learning_rate=1e-3))
    restore(read_checkpoint(folder / f"checkpoint-{step}"), model, optimizer, config_fields(config))
    before = copy.deepcopy(optimizer.state_dict())
    values = StepValues(TRAINING["learning_rate"], TRAINING["weight_decay"], TRAINING["momentum"])
    batches = [plain_ijepa.make_batch(step)]
    AcceleratorState._reset_state(True)  # a test before may have left one that computes in bfloat16
    PartialState._reset_state()
    loss = ReadyModel(Accelerator(cpu=True), model, model, optimizer).step(batches, values).loss
    return model, optimizer, before, loss


def test_a_published_run_goes_on_in_ours_as_it_would_have_in_the_published_code(tmp_path):
    message = convert(
        write_run(tmp_path / "run.pth.tar"), tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True
    )
    assert "checkpoint-4" in message
    checkpoint = read_checkpoint(tmp_path / "out" / "checkpoint-4")
    assert checkpoint.arguments["learning_rate"] == 0.001
    assert checkpoint.arguments["global_batch_size"] == 8
    # what holds for every published file, for the run that goes on
    assert checkpoint.arguments["license"] == "cc-by-nc-4.0"
    assert checkpoint.arguments["image_mean"] == [0.485, 0.456, 0.406]
    assert checkpoint.arguments["image_std"] == [0.229, 0.224, 0.225]
    model, optimizer, before, loss = goes_on(tmp_path / "out", 4)
    assert {float(entry["step"]) for entry in before["state"].values()} == {4.0}

    networks, plain_optimizer = trained_networks(4)
    plain_loss = plain_step(networks, plain_optimizer, 4)
    assert loss == pytest.approx(plain_loss, abs=1e-7)
    state = model.state_dict()
    moments = {
        name: optimizer.state[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for (part, (ours, names)), network in zip(PARTS.items(), networks, strict=True):
        for name, value in network.named_parameters():
            keys = [f"{ours}.{key}" for key in translate(name, names)]
            pairs = [(torch.cat([state[key] for key in keys]), value)]
            if value in plain_optimizer.state:
                for slot in ("exp_avg", "exp_avg_sq"):
                    moment = torch.cat([moments[key][slot] for key in keys])
                    pairs.append((moment, plain_optimizer.state[value][slot]))
                assert {float(moments[key]["step"]) for key in keys} == {5.0}
            for mine, theirs in pairs:
                # the key third of a qkv bias has a gradient of rounding noise, which Adam blows up to whole steps
                kept = (
                    slice(None)
                    if not name.endswith("qkv.bias")
                    else [*range(value.shape[0] // 3), *range(2 * value.shape[0] // 3, value.shape[0])]
                )
                torch.testing.assert_close(mine[kept], theirs[kept], atol=2e-6, rtol=1e-4, msg=f"{part}.{name}")


def test_the_command_goes_on_from_a_converted_checkpoint(tmp_path):
    convert(write_run(tmp_path / "run.pth.tar"), tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    folder = tiny_run(
        tmp_path / "on", resume_from_checkpoint=tmp_path / "out" / "checkpoint-4", max_train_steps=6,
        patch_init_std=0.02, intermediate_size=128, predictor_num_attention_heads=None,
    )  # fmt: skip
    assert find_latest(folder).step == 6
    state = load_file(find_latest(folder).path / "optimizer.safetensors")
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {6.0}


def test_steps_that_are_no_whole_number_of_epochs_are_said(tmp_path):
    path = write_checkpoint(tmp_path / "run.pth.tar", steps=5, epoch=2)
    message = convert(path, tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    assert "step 5 is no multiple of the 2 epochs" in message


# -- ours -> published, and round trips ------------------------------------------------------------------------------


def flat(value, name=""):
    """All that is in a file, tensor by tensor."""
    if isinstance(value, dict):
        return {key: it for entry in value for key, it in flat(value[entry], f"{name}/{entry}").items()}
    if isinstance(value, list | tuple):
        return {key: it for place, entry in enumerate(value) for key, it in flat(entry, f"{name}/{place}").items()}
    return {name: value}


def assert_same_file(one, other):
    one, other = (flat(torch.load(path, weights_only=True)) for path in (one, other))
    assert list(one) == list(other)
    tensors = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
    assert same_bits(tensors, {name: other[name] for name in tensors})
    return {name: (value, other[name]) for name, value in one.items() if name not in tensors and value != other[name]}


@pytest.mark.parametrize("which", ["golden", "small"])
def test_published_to_ours_to_published_gives_every_bit_back(which, official, tmp_path):
    source = official if which == "golden" else write_checkpoint(tmp_path / "in.pth.tar")
    convert(source, tmp_path / "out", num_attention_heads=4 if which == "golden" else HEADS)
    message = convert_to_official(tmp_path / "out", tmp_path / "back.pth.tar")
    assert "heads: whoever loads it must know" in message
    without = dict(torch.load(source, weights_only=True), opt=None)
    torch.save(without, tmp_path / "without.pth.tar")
    assert assert_same_file(tmp_path / "without.pth.tar", tmp_path / "back.pth.tar") == {}
    assert not list(tmp_path.glob(".*"))


def test_published_to_ours_to_published_gives_the_optimisers_bits_back_too(tmp_path):
    write_run(tmp_path / "in.pth.tar")
    convert(tmp_path / "in.pth.tar", tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    message = convert_to_official(tmp_path / "out", tmp_path / "back.pth.tar", with_optimizer=True)
    assert "optimiser state of step 4, epoch 2" in message
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pth.tar", "back.pth.tar"))
    assert list(one["opt"]["state"]) == list(other["opt"]["state"])
    assert same_bits(flat(one["opt"]["state"]), flat(other["opt"]["state"]))
    assert [group["params"] for group in one["opt"]["param_groups"]] == [
        group["params"] for group in other["opt"]["param_groups"]
    ]
    assert all(same_bits(one[part], other[part]) for part in PARTS)
    assert [one[name] for name in ("epoch", "loss", "lr")] == [other[name] for name in ("epoch", "loss", "lr")]

    # and the plain code goes on from it as if nothing had happened
    networks, optimizer = trained_networks(4)
    fresh = plain_ijepa.make_networks(seed=5)
    fresh_optimizer = plain_ijepa.make_adamw(*fresh[:2])
    for network, part in zip(fresh, PARTS, strict=True):
        network.load_state_dict({key.removeprefix("module."): value for key, value in other[part].items()})
    fresh_optimizer.load_state_dict(other["opt"])
    assert plain_step(networks, optimizer, 4) == plain_step(fresh, fresh_optimizer, 4)
    assert all(same_bits(a.state_dict(), b.state_dict()) for a, b in zip(networks, fresh, strict=True))


def official_like(seed=0):
    return scrambled_model(seed, intermediate_size=128)


def export(model, folder, step=0):
    export_model(model, folder, step=step, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return folder


def test_ours_to_published_to_ours_gives_every_bit_back_and_the_plain_code_loads_it(tmp_path):
    model = official_like(3)
    export(model, tmp_path / "ours")
    convert_to_official(tmp_path / "ours", tmp_path / "file.pth.tar")
    convert(tmp_path / "file.pth.tar", tmp_path / "again", num_attention_heads=2)
    for name in ("model.safetensors", "pretraining/model.safetensors"):
        assert same_bits(load_file(tmp_path / "ours" / name), load_file(tmp_path / "again" / name))
    saved = torch.load(tmp_path / "file.pth.tar", weights_only=True)
    assert list(saved) == list(plain_ijepa.checkpoint_contents(plain_ijepa.make_networks()))
    assert saved["opt"] is None
    assert saved["epoch"] is None
    encoder, predictor, target = plain_ijepa.make_networks()
    for network, part in ((encoder, "encoder"), (predictor, "predictor"), (target, "target_encoder")):
        network.load_state_dict({key.removeprefix("module."): value for key, value in saved[part].items()})
    batch = tiny_batch(model.config)
    masks, blocks = [batch["context_indices"]], list(batch["target_indices"].unbind(1))
    with torch.no_grad():
        output = model(**batch)
        rows = predictor(encoder(batch["pixel_values"], masks), masks, blocks)
        features = model.ijepa(batch["pixel_values"]).last_hidden_state
        torch.testing.assert_close(target(batch["pixel_values"]), features, atol=1e-5, rtol=0)
    predictions = output.predictions.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(rows, predictions, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def run_of_six_steps(tmp_path_factory):
    """A run of ours that has not finished its first epoch: 64 images in batches of 8 are eight steps."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    return tiny_run(folder, predictor_num_attention_heads=None, intermediate_size=128)


def test_a_run_of_ours_goes_on_in_the_published_code(run_of_six_steps, tmp_path):
    run = run_of_six_steps
    message = convert_to_official(run, tmp_path / "run.pth.tar", with_optimizer=True)
    assert "step 6, epoch 0" in message
    saved = torch.load(tmp_path / "run.pth.tar", weights_only=True)
    assert (saved["batch_size"], saved["world_size"], saved["lr"]) == (8, 1, 1e-3)
    assert torch.amp.GradScaler("cpu").state_dict() == saved["scaler"]
    networks = plain_ijepa.make_networks()
    optimizer = plain_ijepa.make_adamw(*networks[:2])
    for network, part in zip(networks, PARTS, strict=True):
        network.load_state_dict({key.removeprefix("module."): value for key, value in saved[part].items()})
    optimizer.load_state_dict(saved["opt"])
    assert plain_step(networks, optimizer, 6) > 0
    assert optimizer.state[networks[1].mask_token]["step"] == 7
    assert not optimizer.state.get(networks[0].pos_embed)
    convert_to_official(run, tmp_path / "weights.pth.tar")
    assert torch.load(tmp_path / "weights.pth.tar", weights_only=True)["lr"] == 1e-3


def test_a_run_that_is_not_at_an_epochs_end_goes_out_with_its_epoch_rounded_down_and_comes_back(
    run_of_six_steps, tmp_path
):
    run = run_of_six_steps
    message = convert_to_official(run, tmp_path / "run.pth.tar", with_optimizer=True)
    assert "the epoch is rounded down: 6 of the 8 steps" in message
    assert torch.load(tmp_path / "run.pth.tar", weights_only=True)["epoch"] == 0
    message = convert(tmp_path / "run.pth.tar", tmp_path / "again", num_attention_heads=2, with_optimizer=True)
    assert "no epoch is done in the file; step 6 lies in the first" in message
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, again = (load_file(folder / "checkpoint-6" / name) for folder in (run, tmp_path / "again"))
        assert same_bits(dict(sorted(ours.items())), dict(sorted(again.items())))


def test_nothing_is_said_of_a_run_at_the_end_of_an_epoch(run_of_six_steps, tmp_path):
    folder = with_arguments(run_of_six_steps, tmp_path / "run", num_train_images=24)  # three steps an epoch
    message = convert_to_official(folder, tmp_path / "run.pth.tar", with_optimizer=True)
    assert "step 6, epoch 2" in message
    assert "rounded" not in message


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"learning_rate": 0.0, "base_learning_rate": None}, 0.0),
        ({"learning_rate": None, "base_learning_rate": 0.32}, 0.01),  # times 8 / 256
        ({"learning_rate": None, "base_learning_rate": 0.0}, 0.0),
    ],
)
def test_the_learning_rate_of_a_run_is_in_the_file_and_in_its_optimiser_also_where_it_is_zero(
    run_of_six_steps, tmp_path, changes, rate
):
    folder = with_arguments(run_of_six_steps, tmp_path / "run", **changes)
    convert_to_official(folder, tmp_path / "weights.pth.tar")
    convert_to_official(folder, tmp_path / "run.pth.tar", with_optimizer=True)
    saved = torch.load(tmp_path / "run.pth.tar", weights_only=True)
    rates = [torch.load(tmp_path / "weights.pth.tar", weights_only=True)["lr"], saved["lr"]]
    assert rates == pytest.approx([rate, rate])
    assert [group["lr"] for group in saved["opt"]["param_groups"]] == pytest.approx([rate] * 4)


def with_arguments(run, folder, **changes):
    """A copy of a run whose record and checkpoints say other arguments."""
    shutil.copytree(run, folder)
    for path in (folder / "run.json", *folder.glob("checkpoint-*/checkpoint.json")):
        record = json.loads(path.read_text())
        record["arguments"] |= changes
        record.pop("sha256", None)  # a manifest of before there were digests of their own
        path.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"predictor_num_attention_heads": 4}, "predictor_num_attention_heads=4 are not the encoder's 2"),
        ({"image_size": [32, 48]}, "are not square"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12 is not 1e-06"),
        ({"num_channels": 1}, "num_channels=1 is not 3"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not 'gelu'"),
        ({"target_type": "pixels"}, "target_type='pixels' is not 'representation'"),
    ],
)
def test_a_model_that_the_published_code_cannot_be_is_refused(tmp_path, changes, match):
    export(scrambled_model(**{"predictor_num_attention_heads": None, **changes}), tmp_path / "ours")
    with pytest.raises(ValueError, match=match):
        convert_to_official(tmp_path / "ours", tmp_path / "file.pth.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_existing_file_is_never_overwritten_and_a_folder_without_what_is_needed_is_named(tmp_path):
    (tmp_path / "file.pth.tar").write_text("precious")
    folder = export(scrambled_model(), tmp_path / "ours")
    with pytest.raises(ValueError, match="exists already"):
        convert_to_official(folder, tmp_path / "file.pth.tar")
    assert (tmp_path / "file.pth.tar").read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="holds no usable checkpoint"):
        convert_to_official(folder, tmp_path / "new.pth.tar", with_optimizer=True)
    with pytest.raises(FileNotFoundError, match="holds no model with both encoders"):
        convert_to_official(tmp_path, tmp_path / "new.pth.tar")
    weights = folder / "pretraining" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors["stray"] = tensors.pop("predictor.mask_token")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"(?s)predictor\.mask_token is missing.*'stray' is unexpected"):
        convert_to_official(folder, tmp_path / "new.pth.tar")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        convert_to_official(folder, tmp_path / "new.pth.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth.tar", "ours"]


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    folder = export(official_like(), tmp_path / "ours")
    save = torch.save

    def save_wrong(contents, path):
        contents["encoder"]["module.norm.bias"] = contents["encoder"]["module.norm.bias"] + 1
        save(contents, path)

    monkeypatch.setattr(torch, "save", save_wrong)
    with pytest.raises(OSError, match="encoder.module.norm.bias"):
        convert_to_official(folder, tmp_path / "file.pth.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
