"""A published file is read whole or not at all: each tensor and number of it is known, or the file is refused."""

import io
import pickle
import tarfile
import zipfile

import plain_ijepa
import pytest
import torch
from plain_ijepa import same_bits, trained_networks, write_checkpoint, write_run

from ijepa_hf import IJepaForPretraining
from ijepa_hf.weights.official_checkpoint import (
    config_from_official,
    model_from_official,
    networks_of,
    read_contents,
    read_official_checkpoint,
    read_scalars,
)
from ijepa_hf.weights.official_names import PARTS, official_names, our_names, translate
from ijepa_hf.weights.official_optimizer import read_optimizer_state

HEADS = plain_ijepa.SMALL["heads"]
HUGE = {"image_size": 224, "patch_size": 14, "width": 1280, "depth": 32, "heads": 16}
HUGE_PREDICTOR = {"width": 384, "depth": 12}


@pytest.fixture
def contents(golden):
    return read_official_checkpoint(golden / "official_checkpoint.pth.tar")


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


def test_our_names_are_those_in_the_whole_model():
    assert our_names("target_encoder", "norm.bias") == ["ijepa.layernorm.bias"]
    assert our_names("encoder", "blocks.7.attn.qkv.weight") == [
        f"context_encoder.layers.7.attention.{each}_proj.weight" for each in "qkv"
    ]
    assert our_names("predictor", "predictor_proj.weight") == ["predictor.project.weight"]
    assert our_names("predictor", "norm.bias") == []


@pytest.mark.parametrize(
    "name",
    ["blocks.*.norm1.weight", "blocks.x.norm1.weight", "norm", "blocks.1.2.norm1.weight", "pos_embed.weight", ""],
)
def test_a_name_that_is_not_in_the_table_has_no_translation(name):
    assert translate(name, PARTS["encoder"][1]) is None


# -- reading a file --------------------------------------------------------------------------------------------------


def test_files_of_the_old_format_and_names_without_the_prefix_give_the_same_bits(tmp_path):
    new = read_official_checkpoint(write_checkpoint(tmp_path / "new.pth.tar"))
    old = read_official_checkpoint(write_checkpoint(tmp_path / "old.pth.tar", legacy=True))
    bare = read_official_checkpoint(write_checkpoint(tmp_path / "bare.pth.tar", prefix=""))
    assert not zipfile.is_zipfile(tmp_path / "old.pth.tar")
    assert all(same_bits(new[part], old[part]) and same_bits(new[part], bare[part]) for part in PARTS)


def test_the_numbers_beside_the_networks_are_read_and_what_is_none_is_none(tmp_path):
    def change(saved):
        saved["loss"] = float("nan")
        saved["lr"] = "fast"

    saved = read_contents(write_checkpoint(tmp_path / "small.pth.tar", change, epoch=7))
    assert read_scalars(saved) == {"epoch": 7, "loss": None, "batch_size": 4, "world_size": 2, "lr": None}
    del saved["epoch"]
    assert read_scalars(saved)["epoch"] is None


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def pack(path, contents):
    path.write_bytes(contents)
    return path


def broken_files(folder):
    """Files that cannot be read, and what is said of them."""
    good = write_checkpoint(folder / "good.pth.tar")
    data = good.read_bytes()
    yield pack(folder / "cut.pth.tar", data[:100_000]), "cannot be read"
    yield pack(folder / "empty.pth.tar", b""), "cannot be read"
    yield pack(folder / "text.pth.tar", b"hello"), "cannot be read"
    old = write_checkpoint(folder / "old.pth.tar", legacy=True).read_bytes()
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
    write_checkpoint(folder / "beside.pth.tar", lambda saved: saved.update(loss=Hostile()))
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


def test_damaged_foreign_and_hostile_files_are_refused_without_running_code(tmp_path, capsys):
    cases = list(broken_files(tmp_path))
    assert len(cases) == 15
    for path, message in cases:
        refused(path, message)
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_official_checkpoint(tmp_path / "nowhere.pth.tar")


def test_any_byte_of_the_pickle_may_be_wrong_and_the_answer_is_still_an_error_or_a_sound_model(tmp_path):
    good = write_checkpoint(tmp_path / "good.pth.tar")
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


# -- the model -------------------------------------------------------------------------------------------------------


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


def refused(path, match):
    with pytest.raises(ValueError, match=match):
        model_from_official(read_official_checkpoint(path), num_attention_heads=HEADS)


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
def test_a_file_that_does_not_fit_is_refused_naming_what_is_wrong(case, tmp_path):
    change, match = REFUSED[case]
    refused(write_checkpoint(tmp_path / "bad.pth.tar", change), match)


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    def change(saved):
        del saved["encoder"]["module.norm.bias"]
        saved["encoder"]["module.cls_token"] = torch.zeros(3)
        saved["predictor"]["module.mask_token"] = torch.zeros(5)

    path = write_checkpoint(tmp_path / "bad.pth.tar", change)
    refused(path, r"(?s)cls_token' is unexpected.*layernorm\.bias is missing.*mask_token has shape \[5\]")
    path = write_checkpoint(tmp_path / "worse.pth.tar", lambda saved: saved.update(encoder={"stray": torch.zeros(3)}))
    refused(path, r"(?s)stray' is unexpected.*context_encoder\.layernorm\.bias is missing$")
    strays = {f"stray{number}": torch.zeros(1) for number in range(60)}
    path = write_checkpoint(tmp_path / "worst.pth.tar", lambda saved: saved["encoder"].update(strays))
    refused(path, r"(?s)stray39' is unexpected\n  and 20 more$")


# -- the optimiser's state -------------------------------------------------------------------------------------------


def read_state(path):
    contents = read_contents(path)
    networks = networks_of(contents, path)
    return read_optimizer_state(contents, networks, config_from_official(networks, num_attention_heads=HEADS), path)


def test_each_trained_tensor_gets_the_moments_that_plain_training_left_it(tmp_path):
    state = read_state(write_run(tmp_path / "run.pth.tar"))
    (encoder, predictor, _), optimizer = trained_networks(4)
    used = set()
    for part, network in (("encoder", encoder), ("predictor", predictor)):
        ours, names = PARTS[part]
        for name, parameter in network.named_parameters():
            keys = [f"{ours}.{key}" for key in translate(name, names)]
            if not parameter.requires_grad:
                assert not state.tensors.keys() & set(keys)
                continue
            for slot in ("exp_avg", "exp_avg_sq"):
                moment = torch.cat([state.tensors[key][slot] for key in keys])
                assert torch.equal(moment, optimizer.state[parameter][slot]), f"{part}.{name}"
            used |= set(keys)
    assert used == set(state.tensors)
    assert {float(slots["step"]) for slots in state.tensors.values()} == {4.0}


def test_what_the_file_says_of_the_run_has_our_names(tmp_path):
    arguments = read_state(write_run(tmp_path / "run.pth.tar")).arguments
    assert (arguments["hidden_size"], arguments["predictor_hidden_size"], arguments["num_attention_heads"]) == (
        32,
        16,
        HEADS,
    )
    assert (arguments["per_device_train_batch_size"], arguments["global_batch_size"]) == (4, 8)
    assert (arguments["learning_rate"], arguments["adam_beta1"], arguments["adam_epsilon"]) == (0.001, 0.9, 1e-8)
    assert "given" not in arguments
    silent = write_run(tmp_path / "silent.pth.tar", lambda saved: saved.update(world_size=None, lr=None))
    assert not {"global_batch_size", "learning_rate"} & read_state(silent).arguments.keys()


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
    "negative epoch": (lambda saved: saved.update(epoch=-1), "says epoch=-1"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_an_optimiser_state_that_does_not_fit_is_refused_and_the_weights_alone_are_fine(case, tmp_path):
    change, match = BAD_STATES[case]
    path = write_run(tmp_path / "bad.pth.tar", change)
    with pytest.raises(ValueError, match=match):
        read_state(path)
    model_from_official(read_official_checkpoint(path), num_attention_heads=HEADS)


def test_steps_of_an_epoch_are_known_where_they_are_a_whole_number(tmp_path):
    for steps, epoch, expected in ((4, 2, 2), (5, 2, None), (3, 0, None)):  # 0: before the first epoch's end
        state = read_state(write_checkpoint(tmp_path / "run.pth.tar", steps=steps, epoch=epoch))
        assert (state.step, state.steps_per_epoch) == (steps, expected)


def test_steps_counted_by_whole_numbers_as_older_torch_did_are_understood(tmp_path):
    def change(saved):
        for entry in saved["opt"]["state"].values():
            entry["step"] = 4

    state = read_state(write_run(tmp_path / "run.pth.tar", change))
    assert state.step == 4
    assert all(torch.equal(slots["step"], torch.tensor(4.0)) for slots in state.tensors.values())
