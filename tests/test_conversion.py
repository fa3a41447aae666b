"""Published checkpoints in and out: every bit carried over, and nothing written for a file that is not one."""

import copy
import functools
import hashlib
import io
import json
import pickle
import re
import tarfile
import zipfile

import plain_ijepa
import pytest
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import scrambled_model, tiny_batch, tiny_config, tiny_run

from ijepa_hf import IJepaForPretraining
from ijepa_hf.arguments import PretrainingArguments
from ijepa_hf.checkpointing import config_fields, find_latest, read_checkpoint, restore
from ijepa_hf.conversion import (
    PARTS,
    config_from_official,
    convert,
    convert_to_official,
    model_from_official,
    official_names,
    read_official_checkpoint,
    translate,
)
from ijepa_hf.export import export_model
from ijepa_hf.training import StepValues, make_optimizer, training_step

HEADS = plain_ijepa.SMALL["heads"]
HUGE = {"image_size": 224, "patch_size": 14, "width": 1280, "depth": 32, "heads": 16}
HUGE_PREDICTOR = {"width": 384, "depth": 12}


@pytest.fixture
def official(golden):
    return golden / "official_checkpoint.pth.tar"


@pytest.fixture
def contents(official):
    return read_official_checkpoint(official)


def published_file(path, change=None, *, legacy=False, **options):
    """A small file of the published kind, not made by this package; `change` is called with what goes into it."""
    saved = plain_ijepa.checkpoint_contents(plain_ijepa.make_networks(), **options)
    if change is not None:
        change(saved)
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    return path


def trained_networks(steps):
    """The plain networks and their AdamW after a few steps of plain training."""
    return copy.deepcopy(train_plain(steps))


@functools.cache
def train_plain(steps):
    networks = plain_ijepa.make_networks()
    optimizer = plain_ijepa.make_adamw(*networks[:2])
    for step in range(steps):
        plain_step(networks, optimizer, step)
    return networks, optimizer


VALUES = StepValues(learning_rate=2e-3, weight_decay=0.05, ema_momentum=0.9)


def plain_step(networks, optimizer, step):
    batch = tiny_batch(tiny_config(), seed=step)
    settings = {"learning_rate": VALUES.learning_rate, "weight_decay": VALUES.weight_decay}
    return plain_ijepa.train_step(networks, optimizer, batch, **settings, momentum=VALUES.ema_momentum)


def trained_file(path, steps=4, epoch=2, change=None):
    networks, optimizer = trained_networks(steps)
    saved = plain_ijepa.checkpoint_contents(networks, optimizer, epoch=epoch)
    if change is not None:
        change(saved)
    torch.save(saved, path)
    return path


def same_bits(one, other):
    assert list(one) == list(other)
    return all(
        one[name].dtype == other[name].dtype == torch.float32
        and torch.equal(one[name].reshape(-1).view(torch.int32), other[name].reshape(-1).view(torch.int32))
        for name in one
    )


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["golden", "huge-14"])
def test_table_names_each_tensor_of_both_sides_exactly_once_and_in_the_published_order(which, contents):
    networks = contents
    if which == "huge-14":  # the architecture's names and shapes, from modules that know nothing of the table
        made = plain_ijepa.make_networks(encoder=HUGE, predictor=HUGE_PREDICTOR, device="meta")
        networks = {name: it.state_dict() for name, it in zip(PARTS, made, strict=True)}
        assert sum(map(len, networks.values())) == 2 * 389 + 152
    config = config_from_official(networks, num_attention_heads=4 if which == "golden" else None)
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in IJepaForPretraining(config).state_dict().items()}
    assert official_names(config) == {part: list(networks[part]) for part in PARTS}
    used = {}
    for part, (prefix, names) in PARTS.items():
        for name, tensor in networks[part].items():
            keys = [f"{prefix}.{key}" for key in translate(name, names)]
            for key in keys:
                assert key not in used
                used[key] = (
                    torch.Size([tensor.shape[0] // len(keys), *tensor.shape[1:]]) if len(keys) > 1 else tensor.shape
                )
    assert used == ours


@pytest.mark.parametrize(
    "name",
    ["blocks.*.norm1.weight", "blocks.x.norm1.weight", "norm", "blocks.1.2.norm1.weight", "pos_embed.weight", ""],
)
def test_a_name_that_is_not_in_the_table_has_no_translation(name):
    assert translate(name, PARTS["encoder"][1]) is None


# -- published -> ours -----------------------------------------------------------------------------------------------


def test_every_tensor_of_the_checkpoint_is_carried_over_bit_for_bit_and_none_is_made_up(contents):
    state = model_from_official(contents, num_attention_heads=4).state_dict()
    used = []
    for part, (ours, names) in PARTS.items():
        for name, tensor in contents[part].items():
            keys = [f"{ours}.{key}" for key in translate(name, names)]
            assert torch.equal(torch.cat([state[key] for key in keys]), tensor), name
            used += keys
    assert sorted(used) == sorted(state)


def test_architecture_is_read_off_the_shapes(contents):
    config = config_from_official(contents, num_attention_heads=4)
    assert (config.image_size, config.patch_size, config.num_channels) == (32, 4, 3)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 3, 256)
    assert (config.predictor_hidden_size, config.predictor_num_hidden_layers) == (32, 2)
    assert (config.layer_norm_eps, config.patch_init_std) == (1e-6, 0.02)
    with pytest.raises(ValueError, match="width 64 is no published size.*--num_attention_heads"):
        config_from_official(contents)
    with pytest.raises(ValueError, match="num_attention_heads=0 must be at least 1"):
        config_from_official(contents, num_attention_heads=0)
    with pytest.raises(ValueError, match="hidden_size=64 must be a multiple of 4 and of num_attention_heads=5"):
        config_from_official(contents, num_attention_heads=5)


def test_masks_are_the_published_ones_where_the_grid_has_room_for_them(contents):
    # at 8x8 the published sampler never returns (at least ten patches are kept of a target of nine)
    assert config_from_official(contents, num_attention_heads=4).masking_strategy == "multi_block"
    made = plain_ijepa.make_networks(encoder=HUGE, predictor=HUGE_PREDICTOR, device="meta")
    config = config_from_official({name: it.state_dict() for name, it in zip(PARTS, made, strict=True)})
    assert config.masking_strategy == "multi_block_official"
    assert (config.grid_size, config.num_attention_heads, config.official_min_keep) == ((16, 16), 16, 10)


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
    convert(published_file(tmp_path / "small.pth.tar"), tmp_path / "encoder", num_attention_heads=HEADS)
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card.split("---")[1]
    assert "ijepa-hf pretrain adapt --model_name_or_path encoder" in card
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50), "red").save("image.jpg")
    found = {}
    for block in blocks:
        exec(block, found)
    assert found["features"].shape == (1, 32)
    assert found["model"].classifier.out_features == 10


def test_files_of_the_old_format_and_names_without_the_prefix_give_the_same_bits(tmp_path):
    new = read_official_checkpoint(published_file(tmp_path / "new.pth.tar"))
    old = read_official_checkpoint(published_file(tmp_path / "old.pth.tar", legacy=True))
    bare = read_official_checkpoint(published_file(tmp_path / "bare.pth.tar", prefix=""))
    assert not zipfile.is_zipfile(tmp_path / "old.pth.tar")
    assert all(same_bits(new[part], old[part]) and same_bits(new[part], bare[part]) for part in PARTS)
    convert(tmp_path / "old.pth.tar", tmp_path / "out", num_attention_heads=HEADS)


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(path, tmp_path, match, **options):
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "out", **{"num_attention_heads": HEADS, **options})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def put(part, name, make):
    def change(saved):
        key = f"module.{name}"
        saved[part][key] = make(saved[part].get(key))

    return change


def drop(part, name):
    return lambda saved: saved[part].pop(f"module.{name}")


def other_encoder(saved):
    """The target encoder of a wider model beside the context encoder of this one."""
    wide = plain_ijepa.make_networks(encoder={**plain_ijepa.SMALL, "width": 64})
    saved["target_encoder"] = plain_ijepa.checkpoint_contents(wide)["target_encoder"]


def other_predictor(saved):
    wide = plain_ijepa.make_networks(encoder={**plain_ijepa.SMALL, "width": 64})
    saved["predictor"] = plain_ijepa.checkpoint_contents(wide)["predictor"]


def other_grid(saved):
    fine = plain_ijepa.make_networks(encoder={**plain_ijepa.SMALL, "image_size": 16})
    saved["predictor"] = plain_ijepa.checkpoint_contents(fine)["predictor"]


def deeper(saved):
    deep = plain_ijepa.make_networks(encoder={**plain_ijepa.SMALL, "depth": 3})
    saved["encoder"] = plain_ijepa.checkpoint_contents(deep)["encoder"]


def filled(value):
    def fill(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return fill


REFUSED = {
    "missing": (
        drop("encoder", "blocks.1.norm2.bias"),
        r"context_encoder\.layers\.1\.layernorm_after\.bias is missing",
    ),
    "missing network": (lambda saved: saved.pop("predictor"), "lacks predictor; it holds 'encoder', 'target_encoder'"),
    "missing layer": (
        lambda saved: [
            saved["target_encoder"].pop(key) for key in list(saved["target_encoder"]) if "blocks.0." in key
        ],
        "lacks target_encoder.blocks.0.mlp.fc1.weight",
    ),
    "gap": (
        lambda saved: saved["predictor"].update({"module.predictor_blocks.7.norm1.bias": torch.zeros(16)}),
        "predictor_blocks are numbered with gaps: 3 of them, but no 2",
    ),
    "unexpected": (put("encoder", "cls_token", lambda _: torch.zeros(1, 1, 32)), "encoder.'cls_token' is unexpected"),
    "unexpected network": (
        lambda saved: saved.update(classifier={"weight": torch.zeros(3)}),
        "'classifier' is unexpected",
    ),
    "twice": (
        lambda saved: saved["encoder"].update({"norm.weight": torch.zeros(32)}),
        "encoder.'norm.weight' is there twice",
    ),
    "shape": (
        put("encoder", "norm.weight", lambda _: torch.ones(16)),
        r"context_encoder\.layernorm\.weight has shape \[16\], expected \[32\]",
    ),
    "no thirds": (
        put("encoder", "blocks.0.attn.qkv.bias", lambda _: torch.ones(95)),
        r"layers\.0\.attention\.v_proj\.bias has shape \[31\], expected \[32\]",
    ),
    "scalar": (put("encoder", "blocks.0.attn.qkv.bias", lambda _: torch.ones(())), r"q_proj\.bias has shape \[\]"),
    "table": (
        put("encoder", "pos_embed", lambda table: table.flip(1).contiguous()),
        r"context_encoder\.embeddings\.position_embeddings is not the fixed sin-cos table of a 8x8 grid",
    ),
    "mixed encoders": (other_encoder, r"context_encoder\.layernorm\.weight has shape \[32\], expected \[64\]"),
    "mixed predictor": (other_predictor, r"predictor\.embed\.weight has shape \[16, 64\], expected \[16, 32\]"),
    "mixed grid": (other_grid, r"predictor\.position_embeddings has shape \[1, 16, 16\], expected \[1, 64, 16\]"),
    "mixed depth": (deeper, r"encoder\.'blocks\.2\.norm1\.weight' is unexpected"),
    "NaN": (
        put("encoder", "norm.bias", filled(float("nan"))),
        r"context_encoder\.layernorm\.bias has NaN or infinite",
    ),
    "infinite": (
        put("predictor", "predictor_blocks.1.attn.qkv.weight", filled(float("inf"))),
        r"predictor\.layers\.1\.attention\.v_proj\.weight has NaN or infinite",
    ),
    "NaN in a table": (put("encoder", "pos_embed", filled(float("nan"))), "position_embeddings has NaN or infinite"),
    "half": (put("encoder", "norm.bias", lambda it: it.half()), "encoder.'norm.bias' has dtype torch.float16"),
    "bf16": (put("encoder", "norm.bias", lambda it: it.bfloat16()), "has dtype torch.bfloat16; published weights are"),
    "integers": (put("predictor", "mask_token", lambda it: it.int()), "predictor.'mask_token' has dtype torch.int32"),
    "no tensor": (put("encoder", "norm.bias", lambda _: [1.0] * 32), "encoder.'norm.bias' is a list, no tensor"),
    "no name": (lambda saved: saved["encoder"].update({3: torch.zeros(3)}), "encoder.\"<class 'int'>\" is unexpected"),
    "no network": (lambda saved: saved.update(encoder=[1, 2]), "lacks encoder; it holds"),
    "expanded": (
        put("encoder", "norm.bias", lambda _: torch.zeros(1).expand(32)),
        r"not contiguous in memory: shape \[32\], strides \[0\]",
    ),
    "huge": (
        put("encoder", "pos_embed", lambda _: torch.zeros(1).expand(1, 10**12, 32)),
        r"not contiguous in memory: shape \[1, 1000000000000, 32\]",
    ),
    "sparse": (put("encoder", "norm.bias", lambda it: it.to_sparse()), "encoder.'norm.bias' is no plain tensor"),
    "nowhere": (
        put("encoder", "norm.bias", lambda it: it.to("meta")),
        "is no plain tensor|cannot be read as a published",
    ),
    "shared": (
        lambda saved: saved["encoder"].update({"module.norm.bias": saved["target_encoder"]["module.norm.bias"]}),
        "target_encoder.'norm.bias' shares its memory with encoder.norm.bias",
    ),
    "empty": (put("target_encoder", "pos_embed", lambda _: torch.zeros(1, 0, 32)), r"has shape \[1, 0, 32\]"),
    "flat": (put("predictor", "predictor_embed.weight", lambda it: it.view(-1)), "it needs 2 dimensions"),
    "oblong": (put("target_encoder", "pos_embed", lambda it: it[:, :60].clone()), "60 patches of 4x4 pixels"),
    "grey": (
        put("target_encoder", "patch_embed.proj.weight", lambda it: it[:, :1].clone()),
        "for images of 1 channels; published code reads 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused_naming_what_is_wrong_and_nothing_is_written(case, tmp_path):
    change, match = REFUSED[case]
    refused(published_file(tmp_path / "bad.pth.tar", change), tmp_path, match)


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    def change(saved):
        del saved["encoder"]["module.norm.bias"]
        saved["encoder"]["module.cls_token"] = torch.zeros(3)
        saved["predictor"]["module.mask_token"] = torch.zeros(5)

    path = published_file(tmp_path / "bad.pth.tar", change)
    refused(path, tmp_path, r"(?s)cls_token' is unexpected.*layernorm\.bias is missing.*mask_token has shape \[5\]")
    path = published_file(tmp_path / "worse.pth.tar", lambda saved: saved.update(encoder={"stray": torch.zeros(3)}))
    refused(path, tmp_path, r"(?s)stray' is unexpected.*context_encoder\.layernorm\.bias is missing$")
    strays = {f"stray{number}": torch.zeros(1) for number in range(60)}
    path = published_file(tmp_path / "worst.pth.tar", lambda saved: saved["encoder"].update(strays))
    refused(path, tmp_path, r"(?s)stray39' is unexpected\n  and 20 more$")


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def pack(path, contents):
    path.write_bytes(contents)
    return path


def broken_files(folder):
    """Files that cannot be read, and what is said of them."""
    good = published_file(folder / "good.pth.tar")
    data = good.read_bytes()
    yield pack(folder / "cut.pth.tar", data[:100_000]), "cannot be read"
    yield pack(folder / "empty.pth.tar", b""), "cannot be read"
    yield pack(folder / "text.pth.tar", b"hello"), "cannot be read"
    old = published_file(folder / "old.pth.tar", legacy=True).read_bytes()
    yield pack(folder / "cut_old.pth.tar", old[:100_000]), "cannot be read"
    # a weight changed on the way: nothing but the checksum says so
    place = data.index(
        torch.load(good, weights_only=True)["encoder"]["module.blocks.0.mlp.fc1.weight"].numpy().tobytes()
    )
    yield (
        pack(folder / "flipped.pth.tar", data[:place] + b"\0\0\0\0" + data[place + 4 :]),
        "the checksum of its record",
    )
    torch.save({"encoder": Hostile()}, folder / "hostile.pth.tar")
    yield folder / "hostile.pth.tar", "cannot be read .* code"
    published_file(folder / "beside.pth.tar", lambda saved: saved.update(loss=Hostile()))
    yield folder / "beside.pth.tar", "cannot be read .* code"
    yield (
        pack(folder / "legacy.pth.tar", pickle.dumps({"encoder": Hostile()}, protocol=2)),
        "cannot be read .* code",
    )
    torch.save({"model": {}}, folder / "foreign.pth.tar")
    yield folder / "foreign.pth.tar", "lacks encoder, predictor, target_encoder; it holds 'model'"
    torch.save([torch.zeros(3)], folder / "list.pth.tar")
    yield folder / "list.pth.tar", "holds a list, no dictionary"
    with tarfile.open(folder / "tar.pth.tar", "w") as archive:
        archive.add(good, "good.pth")
    yield folder / "tar.pth.tar", "cannot be read"
    with (
        zipfile.ZipFile(good) as archive,
        zipfile.ZipFile(folder / "deflated.pth.tar", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for record in archive.namelist():
            other.writestr(record, archive.read(record))
    yield folder / "deflated.pth.tar", "records are compressed"
    yield pack(folder / "grown.pth.tar", grown(good)), "cannot be read .* not resizable"
    longer = old.replace(b"K \x85q", b"J\x80\x96\x98\0\x85q", 1)  # 10 million numbers, where 32 are in the file
    yield pack(folder / "grown_old.pth.tar", longer), "cannot be read .* wrong byte size"
    overlapping = folder / "overlapping.pth.tar"
    overlapping.write_bytes(data)
    with zipfile.ZipFile(overlapping, "a") as archive:
        archive.writestr("end", "")
        archive.filelist += archive.filelist  # twice in the list, once in the file
    yield overlapping, "its records overlap"


def grown(path):
    """A file whose pickle says that a tensor of 32 numbers has 33."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w") as other:
        for record in archive.infolist():
            content = archive.read(record)
            if record.filename.endswith("data.pkl"):
                shape = b"K \x85q"  # the tuple (32,)
                assert shape in content
                content = content.replace(shape, b"K!\x85q", 1)
            other.writestr(record, content)
    return packed.getvalue()


def test_damaged_foreign_and_hostile_files_are_refused_without_running_code_or_writing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    cases = list(broken_files(tmp_path / "in"))
    assert len(cases) == 15
    for path, message in cases:
        refused(path, tmp_path, message)
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "nowhere.pth.tar", tmp_path / "out")


def test_any_byte_of_the_pickle_may_be_wrong_and_the_answer_is_still_an_error_or_a_sound_model(tmp_path):
    good = published_file(tmp_path / "good.pth.tar")
    with zipfile.ZipFile(good) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        pickled = bytearray(records[name])
        place, value = (int(torch.randint(high, (), generator=generator)) for high in (len(pickled), 256))
        pickled[place] = value
        with zipfile.ZipFile(tmp_path / "bad.pth.tar", "w") as archive:
            for record, content in records.items():
                archive.writestr(record, bytes(pickled) if record == name else content)
        try:
            model = model_from_official(read_official_checkpoint(tmp_path / "bad.pth.tar"), num_attention_heads=HEADS)
        except ValueError:
            continue
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


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
    from ijepa_hf import conversion

    def export_wrong(model, folder, **options):
        export_model(model, folder, **options)
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors["ijepa.layernorm.bias"].view(torch.int32)[5] ^= 1  # the last bit of one number
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(conversion, "export_model", export_wrong)
    with pytest.raises(OSError, match=r"model.safetensors is not what was written.*ijepa\.layernorm\.bias"):
        convert(official, tmp_path / "out", num_attention_heads=4)
    assert list(tmp_path.iterdir()) == []


# -- beside the published code ---------------------------------------------------------------------------------------


def test_values_are_compared_with_the_code_in_a_checkout_in_another_process(tmp_path, capsys, monkeypatch):
    path = published_file(tmp_path / "small.pth.tar")
    added = "import os\nprint('imported')\nassert 'MY_TOKEN' not in os.environ\n"
    checkout = plain_ijepa.write_checkout(tmp_path / "code", ("import copy\n", f"import copy\n{added}"))
    monkeypatch.setenv("MY_TOKEN", "secret")
    message = convert(path, tmp_path / "out", num_attention_heads=HEADS, published_code=checkout)
    assert "published code computes the same" in message
    compared = json.loads((tmp_path / "out" / "conversion.json").read_text())["published_code"]
    assert set(compared["outputs"]) == {"encoder", "encoder_of_context", "target_encoder", "predictor"}
    for output in compared["outputs"].values():
        assert 0 <= output["largest_difference"] < 1e-5 < output["largest_value"]
    assert "imported" not in capsys.readouterr().out  # not by this process


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("functional.gelu(", "functional.relu("), r"other values than ours: encoder by"),
        (("import copy\n", "import os; os._exit(7)\n"), "could not be run .*exit status 7.*it said nothing"),
    ],
)
def test_other_values_or_code_that_fails_are_errors_and_nothing_is_written(tmp_path, change, match):
    path = published_file(tmp_path / "small.pth.tar")
    checkout = plain_ijepa.write_checkout(tmp_path / "code", change)
    refused(path, tmp_path, match, published_code=checkout)


def test_wrong_heads_are_found_by_the_published_code(tmp_path, monkeypatch):
    path = published_file(tmp_path / "small.pth.tar")
    checkout = plain_ijepa.write_checkout(tmp_path / "code", ("self.heads = heads", "self.heads = 2"))
    refused(path, tmp_path, "Are num_attention_heads=4 those", published_code=checkout, num_attention_heads=4)
    with pytest.raises(FileNotFoundError, match="no src/models/vision_transformer.py"):
        convert(path, tmp_path / "out", num_attention_heads=2, published_code=tmp_path)


# -- the optimiser ---------------------------------------------------------------------------------------------------


def goes_on(folder, step):
    """Model and optimiser of ours, restored from a checkpoint, then one more step."""
    config = IJepaForPretraining.config_class.from_pretrained(folder / "pretraining")
    model = IJepaForPretraining(config).train()
    optimizer = make_optimizer(model, PretrainingArguments(learning_rate=1e-3))
    restore(read_checkpoint(folder / f"checkpoint-{step}"), model, optimizer, config_fields(config))
    before = copy.deepcopy(optimizer.state_dict())
    loss = training_step(Accelerator(cpu=True), model, model, optimizer, [tiny_batch(config, seed=step)], VALUES).loss
    return model, optimizer, before, loss


def test_a_published_run_goes_on_in_ours_as_it_would_have_in_the_published_code(tmp_path):
    message = convert(
        trained_file(tmp_path / "run.pth.tar"), tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True
    )
    assert "checkpoint-4" in message
    checkpoint = read_checkpoint(tmp_path / "out" / "checkpoint-4")
    assert checkpoint.arguments["learning_rate"] == 0.001
    assert checkpoint.arguments["global_batch_size"] == 8
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
    convert(trained_file(tmp_path / "run.pth.tar"), tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    folder = tiny_run(
        tmp_path / "on", resume_from_checkpoint=tmp_path / "out" / "checkpoint-4", max_train_steps=6,
        patch_init_std=0.02, intermediate_size=128, predictor_num_attention_heads=None,
    )  # fmt: skip
    assert find_latest(folder).step == 6
    state = load_file(find_latest(folder).path / "optimizer.safetensors")
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {6.0}


def swap(saved):
    """Two tensors of one shape change places: only their order says whose state is whose."""
    items = list(saved["encoder"].items())
    first, second = (place for place, (key, _) in enumerate(items) if key.endswith("attn.proj.weight"))
    items[first], items[second] = items[second], items[first]
    saved["encoder"] = dict(items)


def entry(saved, number=3):
    return saved["opt"]["state"][number]


BAD_STATES = {
    "none": (lambda saved: saved.update(opt=None), "holds no state of an optimiser"),
    "fresh": (lambda saved: saved["opt"].update(state={}), "holds no state of an optimiser"),
    "one lacks": (lambda saved: saved["opt"]["state"].pop(3), r"encoder\.blocks\.0\.attn\.proj\.weight: has no state"),
    "another step": (lambda saved: entry(saved).update(step=torch.tensor(3.0)), "is at step 3; .* is at step 4"),
    "half a step": (lambda saved: entry(saved).update(step=torch.tensor(3.5)), "step is no positive whole number"),
    "NaN step": (lambda saved: entry(saved).update(step=float("nan")), "step is no positive whole number"),
    "amsgrad": (lambda saved: entry(saved).update(max_exp_avg_sq=torch.zeros(3)), "max_exp_avg_sq, where AdamW keeps"),
    "shape": (
        lambda saved: entry(saved).update(exp_avg=torch.zeros(3)),
        r"exp_avg has shape \[3\], the weight \[32, 32\]",
    ),
    "NaN": (lambda saved: entry(saved)["exp_avg"].fill_(float("nan")), "exp_avg has NaN"),
    "negative": (lambda saved: entry(saved)["exp_avg_sq"].fill_(-1.0), "exp_avg_sq has NaN, infinite or impossible"),
    "half": (
        lambda saved: entry(saved).update(exp_avg=entry(saved)["exp_avg"].half()),
        "exp_avg has dtype torch.float16",
    ),
    "frozen": (
        lambda saved: saved["opt"]["state"].update({0: {}}),
        "encoder.pos_embed has a state, but is never trained",
    ),
    "too many": (lambda saved: saved["opt"]["state"].update({999: {}}), "state 999 belongs to no tensor"),
    "groups": (lambda saved: saved["opt"]["param_groups"].reverse(), "does not have the published groups"),
    "one group": (lambda saved: saved["opt"]["param_groups"].pop(), "does not have the published groups"),
    "order": (swap, "not in the order in which published code writes them"),
    "epoch": (lambda saved: saved.update(epoch=5), "says epoch=5, but its optimiser is at step 4"),
    "no epoch": (lambda saved: saved.update(epoch=None), "says epoch=None"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_an_optimiser_state_that_does_not_fit_is_refused_and_nothing_is_written(case, tmp_path):
    change, match = BAD_STATES[case]
    path = trained_file(tmp_path / "bad.pth.tar", change=change)
    refused(path, tmp_path, match, with_optimizer=True)
    if case in ("none", "groups", "order"):
        convert(path, tmp_path / "weights", num_attention_heads=HEADS)  # the weights alone are fine


def test_steps_that_are_no_whole_number_of_epochs_are_said(tmp_path):
    path = trained_file(tmp_path / "run.pth.tar", steps=5, epoch=2)
    message = convert(path, tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    assert "step 5 is no multiple of the 2 epochs" in message


def test_steps_counted_by_whole_numbers_as_older_torch_did_are_understood(tmp_path):
    def change(saved):
        for entry in saved["opt"]["state"].values():
            entry["step"] = 4

    path = trained_file(tmp_path / "run.pth.tar", change=change)
    convert(path, tmp_path / "out", num_attention_heads=HEADS, with_optimizer=True)
    assert read_checkpoint(tmp_path / "out" / "checkpoint-4").step == 4


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
    source = official if which == "golden" else published_file(tmp_path / "in.pth.tar")
    convert(source, tmp_path / "out", num_attention_heads=4 if which == "golden" else HEADS)
    message = convert_to_official(tmp_path / "out", tmp_path / "back.pth.tar")
    assert "heads: whoever loads it must know" in message
    without = dict(torch.load(source, weights_only=True), opt=None)
    torch.save(without, tmp_path / "without.pth.tar")
    assert assert_same_file(tmp_path / "without.pth.tar", tmp_path / "back.pth.tar") == {}
    assert not list(tmp_path.glob(".*"))


def test_published_to_ours_to_published_gives_the_optimisers_bits_back_too(tmp_path):
    trained_file(tmp_path / "in.pth.tar")
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


def test_a_run_of_ours_goes_on_in_the_published_code(tmp_path):
    run = tiny_run(tmp_path / "run", predictor_num_attention_heads=None, intermediate_size=128)
    message = convert_to_official(run, tmp_path / "run.pth.tar", with_optimizer=True)
    assert "step 6, epoch 0" in message  # 64 images in batches of 8: eight steps an epoch
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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"predictor_num_attention_heads": 4}, "predictor_num_attention_heads=4 are not the encoder's 2"),
        ({"image_size": [32, 48]}, "are not square"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12 is not 1e-06"),
        ({"num_channels": 1}, "num_channels=1 is not 3"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not 'gelu'"),
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
