"""Models started from weights that exist: everything taken bit for bit, every change said, nothing loaded in part."""

import hashlib
import http.server
import json
import pickle
import re
import shutil
import threading
import time

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import scrambled_model, tiny_batch

from ijepa_hf import IJepaForPretraining
from ijepa_hf.model.encoder_ijepa import sincos_position_table
from ijepa_hf.runs.checkpoints import collect_state, config_fields, save_checkpoint
from ijepa_hf.runs.export import export_model
from ijepa_hf.weights.official_checkpoint import model_from_official, read_official_checkpoint
from ijepa_hf.weights.start import adapt_channels, check_fits, start_model
from ijepa_hf.weights.starting_weights import open_starting_weights

# every field that changes what the same weights compute is away from its default
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-2,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 32,
}
SMALL_PREDICTOR = {"predictor_hidden_size": 16, "predictor_num_hidden_layers": 2}
NORMALISATION = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


def scramble(model, seed=0):
    """Random values in all parameters, so that nothing is equal by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def stock_encoder(table=True, **changes):
    model = scramble(transformers.IJepaModel(transformers.IJepaConfig(**{**SIZES, **changes})))
    if table:
        with torch.no_grad():
            model.embeddings.position_embeddings.copy_(plain_table(model.config.hidden_size, 4, 4))
    return model


def vit_encoder(cls=transformers.ViTModel, changes=None, **kwargs):
    return scramble(cls(transformers.ViTConfig(**SIZES, **(changes or {})), **kwargs))


def mae_encoder(cls):
    return scramble(cls(transformers.ViTMAEConfig(**SIZES, **DECODER)))


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return str(folder)


def two_parts(folder, **changes):
    model = scrambled_model(**changes)
    export_model(model, folder, step=3, **NORMALISATION)
    return model


def small_config(weights, **changes):
    return weights.config.replace(**{**SMALL_PREDICTOR, **changes})


def started(source, seed=0, **changes):
    weights = open_starting_weights(source)
    config = weights.config.replace(**({} if weights.has_predictor else SMALL_PREDICTOR), **changes)
    return start_model(weights, config, seed)


def plain_table(width, rows, columns):
    """The position table written out number by number."""
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(width // 4):
                speed = 1 / 10000 ** (i / (width / 4))
                for block, angle in enumerate((column * speed, column * speed, row * speed, row * speed)):
                    table[row * columns + column, block * width // 4 + i] = (np.sin, np.cos)[block % 2](angle)
    return torch.tensor(table, dtype=torch.float32)[None]


def pixels(config, seed=5):
    shape = (2, config.num_channels, *config.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(encoder, images):
    with torch.no_grad():
        return encoder(images).last_hidden_state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edited(folder, change, name="model.safetensors"):
    """Rewrites a weight file after a change of its table of tensors."""
    path = folder / name
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_config(folder, **changes):
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


# ---- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["two parts", "the inner part", "one part"])
def test_both_encoders_and_the_trained_predictor_of_our_own_model_are_taken_bit_for_bit(tmp_path, where):
    source = two_parts(tmp_path / "run")
    if where == "one part":
        source.save_pretrained(tmp_path / "whole")
    folder = {"two parts": "run", "the inner part": "run/pretraining", "one part": "whole"}[where]
    weights = open_starting_weights(str(tmp_path / folder))
    assert (weights.kind, weights.has_predictor) == ("I-JEPA encoders and predictor", True)
    assert config_fields(weights.config) == config_fields(source.config)
    model, notes = start_model(weights, weights.config, seed=0)
    assert same(model.state_dict(), source.state_dict())
    assert not torch.equal(model.ijepa.layernorm.weight, model.context_encoder.layernorm.weight)
    assert notes == []


def test_a_stock_encoder_starts_both_encoders_whose_features_are_those_of_the_stock_class(tmp_path):
    stock = stock_encoder()
    model, notes = started(saved(stock, tmp_path / "stock"))
    images = pixels(model.config)
    expected = features(stock, images)
    model.eval()
    assert torch.equal(features(model.ijepa, images), expected)
    assert torch.equal(features(model.context_encoder, images), expected)
    assert [note.split(":")[0].split(" of ")[0] for note in notes] == [
        "The I-JEPA encoder",
        "layer_norm_eps=0.01 is kept as its encoder has it (published I-JEPA training",
        "The predictor is new (the source has none)",
    ]
    # and all the way round: what a run would publish
    export_model(model, tmp_path / "out", step=0, **NORMALISATION)
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(again) is transformers.IJepaModel
    assert torch.equal(features(again.eval(), images), expected)


def test_a_drifted_position_table_is_replaced_and_how_far_it_was_is_said(tmp_path):
    stock = stock_encoder()
    with torch.no_grad():
        stock.embeddings.position_embeddings[0, 3, 7] += 0.25
    model, notes = started(saved(stock, tmp_path))
    assert any("position table" in note and "up to 0.25, 0.00049 on average" in note for note in notes)  # 0.25 / 512
    with torch.no_grad():
        stock.embeddings.position_embeddings.copy_(plain_table(32, 4, 4))
    images = pixels(model.config)
    assert torch.equal(features(model.eval().ijepa, images), features(stock, images))


def test_an_encoder_of_ours_without_its_second_part_keeps_its_configuration_and_gets_a_new_predictor(tmp_path):
    source = two_parts(tmp_path, loss_type="mse", num_target_blocks=3)
    shutil.rmtree(tmp_path / "pretraining")
    weights = open_starting_weights(str(tmp_path))
    assert (weights.kind, weights.has_predictor) == ("I-JEPA encoder", False)
    assert config_fields(weights.config) == config_fields(source.config)
    model, _ = start_model(weights, weights.config, seed=0)
    assert same(model.ijepa.state_dict(), source.ijepa.state_dict())
    assert same(model.context_encoder.state_dict(), source.ijepa.state_dict())
    assert not torch.equal(model.predictor.embed.weight, source.predictor.embed.weight)


VITS = {
    "ViTModel": (lambda: vit_encoder(), {"class token", "pooler"}),
    "ViTModel with a mask token": (
        lambda: vit_encoder(use_mask_token=True, add_pooling_layer=False),
        {"class token", "mask token"},
    ),
    "ViTModel without biases": (
        lambda: vit_encoder(changes={"qkv_bias": False}, add_pooling_layer=False),
        {"class token"},
    ),
    "ViTForImageClassification": (
        lambda: vit_encoder(transformers.ViTForImageClassification),
        {"class token", "classifier"},
    ),
    "ViTForMaskedImageModeling": (
        lambda: vit_encoder(transformers.ViTForMaskedImageModeling, {"encoder_stride": 8}),
        {"class token", "mask token", "decoder"},
    ),
    "ViTMAEModel": (lambda: mae_encoder(transformers.ViTMAEModel), {"class token"}),
    "ViTMAEForPreTraining": (lambda: mae_encoder(transformers.ViTMAEForPreTraining), {"class token", "decoder"}),
}


@pytest.mark.parametrize("name", VITS)
def test_a_started_vit_computes_its_own_layers_over_patches_alone_with_the_fixed_table(tmp_path, name):
    make, dropped = VITS[name]
    source = make()
    weights = open_starting_weights(saved(source, tmp_path))
    model, notes = start_model(weights, small_config(weights), seed=0)
    vit = getattr(source, "vit", source)
    images = pixels(model.config)
    with torch.no_grad():  # the ViT by hand: no class token, the fixed table
        rows = vit.embeddings.patch_embeddings(images) + plain_table(32, 4, 4)
        for layer in vit.layers:
            rows = layer(rows)
        expected = vit.layernorm(rows)
    model.eval()
    assert torch.allclose(features(model.ijepa, images), expected, atol=1e-6, rtol=0)
    assert torch.equal(features(model.context_encoder, images), features(model.ijepa, images))
    assert (weights.kind, weights.has_predictor) == ("ViT-MAE encoder" if "MAE" in name else "ViT encoder", False)
    assert {match[1] for note in notes if (match := re.match(r"Its ([a-z ]+) is dropped", note))} == dropped
    assert any(note.startswith("The position table of its encoder is replaced") for note in notes)
    carried = config_fields(model.config)
    assert {name: carried[name] for name in SIZES} == SIZES
    assert carried["qkv_bias"] == source.config.qkv_bias


def test_every_tensor_of_a_vit_is_taken_or_named_as_dropped(tmp_path):
    source = vit_encoder(transformers.ViTForImageClassification)
    model, _ = started(saved(source, tmp_path))
    ours = model.context_encoder.state_dict()
    theirs = {name.removeprefix("vit."): value for name, value in source.state_dict().items()}
    assert theirs.keys() - ours.keys() == {"embeddings.cls_token", "classifier.weight", "classifier.bias"}
    assert ours.keys() <= theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == ["embeddings.position_embeddings"]


def test_the_table_of_an_mae_is_the_fixed_one_already_up_to_rounding(tmp_path):
    source = mae_encoder(transformers.ViTMAEModel)
    source.embeddings.patch_embeddings.projection._is_hf_initialized = False  # or it would keep what it has
    source.embeddings.position_embeddings._is_hf_initialized = False
    source.embeddings.initialize_weights()
    table = source.embeddings.position_embeddings[:, 1:].detach()
    model, notes = started(saved(source, tmp_path))
    assert table.std() > 0.5
    assert (model.ijepa.embeddings.position_embeddings - table).abs().max() < 1e-6
    said = [re.search(r"up to ([\d.e-]+),", note) for note in notes if "position table" in note]
    assert all(float(match[1]) < 1e-6 for match in said)


def test_a_published_checkpoint_gives_both_encoders_and_the_predictor(golden):
    path = golden / "official_checkpoint.pth.tar"
    weights = open_starting_weights(str(path), num_attention_heads=4)
    assert (weights.kind, weights.has_predictor) == ("published I-JEPA checkpoint", True)
    model, notes = start_model(weights, weights.config, seed=0)
    expected = model_from_official(read_official_checkpoint(path), num_attention_heads=4).state_dict()
    tables = [name for name in expected if name.endswith("position_embeddings")]
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert (
            torch.allclose(tensor, expected[name], atol=1e-6, rtol=0)
            if name in tables
            else torch.equal(tensor, expected[name])
        )
    assert all("position table" in note for note in notes)
    with pytest.raises(ValueError, match="^model_name_or_path=.*no published size.*num_attention_heads"):
        open_starting_weights(str(path))


def test_a_started_model_is_ready_to_train(tmp_path):
    model, _ = started(saved(vit_encoder(), tmp_path), image_size=64)
    assert model.training
    assert not model.ijepa.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    model(**tiny_batch(model.config)).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.ijepa.parameters())
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in trained)
    assert all(parameter.grad is not None for parameter in trained)
    before = model.ijepa.layernorm.weight.clone()
    with torch.no_grad():  # the two encoders share no memory
        model.context_encoder.layernorm.weight.add_(1)
    assert torch.equal(model.ijepa.layernorm.weight, before)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_a_started_model_does_not_depend_on_its_files_any_more(tmp_path):
    model, _ = started(saved(stock_encoder(), tmp_path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # overwritten in place, which a memory map would show
        file.write(b"\x7f" * path.stat().st_size)
    assert same(model.state_dict(), before)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_shards_and_the_old_torch_format_give_the_same_model_as_one_file(tmp_path):
    source = vit_encoder()
    expected, notes = started(saved(source, tmp_path / "one"))
    saved(source, tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "old")
    torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    for name in ("shards", "old"):
        model, said = started(str(tmp_path / name))
        assert same(model.state_dict(), expected.state_dict())
        assert said[1:] == notes[1:]  # the first names the folder


def test_todays_names_of_parameters_are_understood_as_well_as_those_in_files(tmp_path):
    source = vit_encoder()
    expected, _ = started(saved(source, tmp_path / "old"))
    saved(source, tmp_path / "new")
    save_file(dict(source.state_dict()), tmp_path / "new" / "model.safetensors")
    assert "layers.0.mlp.fc1.weight" in source.state_dict()
    assert same(started(str(tmp_path / "new"))[0].state_dict(), expected.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_on_disk_become_float32_and_that_is_said(tmp_path, dtype):
    source = vit_encoder().to(dtype)
    weights = open_starting_weights(saved(source, tmp_path))
    model, notes = start_model(weights, small_config(weights), seed=0)
    name = str(dtype).removeprefix("torch.")
    assert weights.dtypes == (name,)
    assert any(note.startswith(f"The weights are {name} on disk; they are trained in float32") for note in notes)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    kernel = source.layers[1].mlp.fc1.weight.detach().float()
    assert torch.equal(model.ijepa.layers[1].mlp.fc1.weight, kernel)


def test_licence_and_normalisation_come_from_the_files_beside_the_weights(tmp_path, golden):
    bare = open_starting_weights(saved(vit_encoder(), tmp_path / "vit"))
    assert (bare.license, bare.image_mean, bare.image_std) == (None, None, None)
    (tmp_path / "vit" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A ViT\n")
    processor = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = open_starting_weights(str(tmp_path / "vit"))
    assert (weights.license, weights.image_mean, weights.image_std) == (
        "apache-2.0", (0.5, 0.4, 0.3), (0.1, 0.2, 0.3),
    )  # fmt: skip
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    assert open_starting_weights(str(tmp_path / "vit")).image_mean is None
    published = open_starting_weights(str(golden / "official_checkpoint.pth.tar"), num_attention_heads=4)
    assert published.license == "cc-by-nc-4.0"
    assert published.image_mean == (0.485, 0.456, 0.406)


def edit(change):
    return lambda folder: edited(folder, change)


def drop_first_shard(folder):
    next(folder.glob("*-00001-*.safetensors")).unlink()


def change_index(**changes):
    def change(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"].update(changes)
        path.write_text(json.dumps({**index, "weight_map": {k: v for k, v in index["weight_map"].items() if v}}))

    return change


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_nan(tensors):
    tensors["layernorm.weight"][3] = float("nan")


DAMAGE = {
    "missing": (edit(lambda t: t.pop("layernorm.bias")), r"layernorm\.bias is missing"),
    "missing class token": (edit(lambda t: t.pop("embeddings.cls_token")), r"embeddings\.cls_token is missing"),
    "unexpected": (
        edit(lambda t: t.update({"encoder.layer.0.lambda1": torch.ones(32)})),
        r"layers\.0\.lambda1 is unexpected",
    ),
    "deeper": (
        edit(lambda t: t.update({k.replace(".1.", ".2."): v.clone() for k, v in t.items() if "layer.1." in k})),
        r"layers\.2\.attention\.k_proj\.bias is unexpected",
    ),
    "shape": (
        edit(lambda t: t.update({"layernorm.bias": torch.zeros(16)})),
        r"layernorm\.bias has shape \[16\], expected \[32\]",
    ),
    "integers": (
        edit(lambda t: t.update({"layernorm.bias": torch.zeros(32, dtype=torch.int8)})),
        r"layernorm\.bias is stored as I8, which is no plain float",
    ),
    "twice": (
        edit(lambda t: t.update({"vit.layernorm.bias": torch.zeros(32)})),
        r"holds layernorm\.bias twice",
    ),
    "cut": (cut, r"model\.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights beside it"),
    "config of another width": (lambda f: with_config(f, hidden_size=64), r"expected \[64"),
    "config that is wrong": (lambda f: with_config(f, hidden_size="32"), r"config\.json cannot be used"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json.*Usable are"),
    "no model_type": (lambda f: with_config(f, model_type=...), "names no model_type.*Usable are"),
    "quantized": (lambda f: with_config(f, quantization_config={"bits": 8}), "is quantized"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_unfitting_checkpoint_is_refused_when_it_is_opened_naming_what_is_wrong(tmp_path, name):
    damage, message = DAMAGE[name]
    source = saved(vit_encoder(), tmp_path)
    open_starting_weights(source)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)^model_name_or_path={source!r}.*{message}"):
        open_starting_weights(source)


SHARD_DAMAGE = {
    "missing shard": (drop_first_shard, FileNotFoundError, r"model-00001-of-\d+\.safetensors is missing"),
    "not in the index": (change_index(**{"layernorm.bias": None}), ValueError, r"differ in layernorm\.bias"),
    "not in a shard": (change_index(extra="model-00001-of-00009.safetensors"), (ValueError, OSError), "extra|missing"),
    "elsewhere": (change_index(extra="../model.safetensors"), ValueError, "outside its folder"),
    "absolute": (change_index(extra="/etc/passwd"), ValueError, "outside its folder"),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_shards_have_to_be_what_their_index_says(tmp_path, name):
    damage, kind, message = SHARD_DAMAGE[name]
    source = saved(vit_encoder(), tmp_path, max_shard_size="10KB")
    open_starting_weights(source)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        open_starting_weights(source)


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_the_second_part_of_our_folder_is_never_passed_over_when_it_is_incomplete(tmp_path, part):
    two_parts(tmp_path)
    key = "predictor.mask_token" if part == "predictor" else "context_encoder.layernorm.bias"
    edited(tmp_path / "pretraining", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=rf"{re.escape(key)} is missing"):
        open_starting_weights(str(tmp_path))
    (tmp_path / "pretraining" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pretraining/config\.json, but no weights"):
        open_starting_weights(str(tmp_path))
    with_config(tmp_path / "pretraining", architectures=["IJepaModel"])
    with pytest.raises(ValueError, match=r"pretraining/config\.json is not that of an IJepaForPretraining"):
        open_starting_weights(str(tmp_path))


def test_values_that_are_not_finite_are_refused(tmp_path):
    source = saved(vit_encoder(), tmp_path)
    edited(tmp_path, set_nan)
    weights = open_starting_weights(source)
    with pytest.raises(ValueError, match=r"layernorm\.weight holds NaN or infinite"):
        start_model(weights, small_config(weights), seed=0)


def test_a_file_that_changes_between_opening_and_reading_is_refused(tmp_path):
    weights = open_starting_weights(saved(vit_encoder(), tmp_path))
    edited(tmp_path, lambda tensors: tensors.pop("layernorm.bias"))
    with pytest.raises(ValueError, match="is not what it was when opened"):
        start_model(weights, small_config(weights), seed=0)


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def test_no_file_runs_code(tmp_path, capsys):
    source = saved(vit_encoder(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for write in (
        lambda path: torch.save({"layernorm.bias": Hostile()}, path),
        lambda path: path.write_bytes(pickle.dumps({"layernorm.bias": Hostile()}, protocol=2)),
        lambda path: torch.save({"layernorm.bias": 3}, path),
    ):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (cannot be read .* code|holds something else)"):
            open_starting_weights(source)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.ResNetConfig(), r"'resnet' model .*Usable are"),
        (transformers.BertConfig(architectures=["BertModel"]), r"'bert' model \(BertModel\), another architecture"),
        (transformers.Dinov2Config(architectures=["Dinov2Model"]), r"'dinov2' model \(Dinov2Model\), another arch"),
        (transformers.DeiTConfig(), "'deit' model"),
    ],
)
def test_other_architectures_are_refused_by_name_with_what_can_be_used(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_starting_weights(str(tmp_path))


def test_what_is_no_model_is_told_apart(tmp_path, monkeypatch):
    saved(vit_encoder(), tmp_path / "vit")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "nowhere.pth.tar", "~/nowhere/at-all"):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(repr(name))}: there is no such folder or file"):
            open_starting_weights(name)
    with pytest.raises(FileNotFoundError, match="no such folder or file on this disk, and it is no repo's id"):
        open_starting_weights("not a repo?")
    with pytest.raises(ValueError, match="is one file; give the folder that it lies in"):
        open_starting_weights(str(tmp_path / "vit" / "model.safetensors"))
    with pytest.raises(ValueError, match="revision='main' is for Hub repos"):
        open_starting_weights(str(tmp_path / "vit"), revision="main")
    with pytest.raises(ValueError, match="num_attention_heads=8: .* says that it has 4"):
        open_starting_weights(str(tmp_path / "vit"), num_attention_heads=8)
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": {}}, foreign)
    with pytest.raises(ValueError, match=f"^model_name_or_path={str(foreign)!r} cannot be used: .*lacks"):
        open_starting_weights(str(foreign))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_starting_weights("~/vit").source == "~/vit"


def test_a_checkpoint_inside_a_run_points_to_the_run(tmp_path):
    model = scrambled_model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    folder = save_checkpoint(tmp_path, 4, collect_state(model, optimizer), config={}, arguments={}, total_limit=1)
    with pytest.raises(ValueError, match=f"give the run's folder '{tmp_path}'.*--resume_from_checkpoint"):
        open_starting_weights(str(folder))


def test_stock_defaults_fill_in_what_a_stock_configuration_leaves_out(tmp_path):
    model = scramble(transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "layer_norm_eps": 1e-12})))
    source = saved(model, tmp_path)
    with_config(tmp_path, layer_norm_eps=..., qkv_bias=..., num_channels=...)
    assert open_starting_weights(source).config.layer_norm_eps == 1e-12  # the stock default, not ours


def test_heads_that_do_not_divide_the_predictors_width_do_not_stand_in_the_way(tmp_path):
    model = scramble(
        transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "hidden_size": 40, "num_attention_heads": 5}))
    )
    weights = open_starting_weights(saved(model, tmp_path))
    assert weights.config.predictor_config().num_attention_heads == 12
    assert weights.config.num_attention_heads == 5


# ---- what may differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "vit"])
@pytest.mark.parametrize("image_size", [64, [48, 80]])
def test_another_grid_has_tables_of_its_own_and_all_else_is_taken(tmp_path, kind, image_size):
    if kind == "whole":
        source = two_parts(tmp_path, patch_size=8)
        expected = source.state_dict()
    else:
        source = stock_encoder()
        saved(source, tmp_path)
        expected = {f"{part}.{k}": v for part in ("ijepa", "context_encoder") for k, v in source.state_dict().items()}
    model, notes = started(str(tmp_path), image_size=image_size)
    rows, columns = model.config.grid_size
    for name, tensor in model.state_dict().items():
        if name.endswith("position_embeddings"):
            assert torch.allclose(tensor, plain_table(tensor.shape[-1], rows, columns), atol=1e-6, rtol=0), name
        elif name in expected:
            assert torch.equal(tensor, expected[name]), name
    assert any(f"grid of {rows}x{columns} patches (before: 4x4), computed, not stretched" in note for note in notes)
    assert torch.isfinite(model(**tiny_batch(model.config)).loss)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (3, 12), (1, 3), (3, 2), (4, 3)])
def test_content_alike_in_all_channels_gives_the_same_response_with_any_number_of_channels(tmp_path, old, new):
    source = stock_encoder(num_channels=old)
    model, notes = started(saved(source, tmp_path), num_channels=new)
    gray = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = features(source, gray.expand(-1, old, -1, -1))
    got = features(model.eval().ijepa, gray.expand(-1, new, -1, -1))
    assert expected.std() > 0.1
    assert torch.allclose(got, expected, atol=1e-4, rtol=0)
    kernels = model.ijepa.embeddings.patch_embeddings.projection.weight
    assert torch.allclose(kernels[:, -1], source.embeddings.patch_embeddings.projection.weight.sum(1) / new, atol=1e-6)
    assert torch.equal(kernels, model.context_encoder.embeddings.patch_embeddings.projection.weight)
    assert any(f"times {old}/{new}" in note for note in notes)


def test_the_same_number_of_channels_changes_nothing():
    kernels = torch.randn(8, 3, 4, 4)
    assert adapt_channels(kernels, 3) is kernels
    assert adapt_channels(kernels.double(), 5).dtype == torch.float64


def test_masks_loss_and_dropout_may_change(tmp_path):
    source = two_parts(tmp_path)
    weights = open_starting_weights(str(tmp_path))
    config = weights.config.replace(
        loss_type="mse", masking_strategy="random", mask_ratio=0.5, hidden_dropout_prob=0.1
    )
    model, notes = start_model(weights, config, seed=0)
    assert same(model.state_dict(), source.state_dict())
    assert notes == []
    assert (model.config.loss_type, model.config.masking_strategy) == ("mse", "random")
    assert model.context_encoder.layers[0].dropout.p == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 16},
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},
        {"intermediate_size": 64},
        {"hidden_act": "gelu"},
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-6},
    ],
)
def test_what_cannot_change_is_named_with_both_values_and_what_to_write(tmp_path, changes):
    weights = open_starting_weights(saved(vit_encoder(), tmp_path))
    (name, value), had = next(iter(changes.items())), getattr(weights.config, next(iter(changes)))
    config = small_config(weights, **changes)
    message = f"  {name}={value!r}: the encoder has {had!r}, which cannot change; write {name}={had!r}"
    with pytest.raises(ValueError, match=f"ViT encoder.*\n{re.escape(message)}$"):
        check_fits(weights, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        start_model(weights, config, seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"predictor_hidden_size": 32},
        {"predictor_num_hidden_layers": 1},
        {"predictor_num_attention_heads": 4},
    ],
)
def test_a_trained_predictor_of_another_shape_is_left_only_when_a_new_one_is_asked_for(tmp_path, changes):
    source = two_parts(tmp_path)
    weights = open_starting_weights(str(tmp_path))
    config = weights.config.replace(**changes)
    (name, value) = next(iter(changes.items()))
    with pytest.raises(ValueError, match=rf"{name}={value}: the trained predictor has \d+.*new_predictor=True"):
        start_model(weights, config, seed=0)
    check_fits(weights, config, new_predictor=True)
    model, notes = start_model(weights, config, seed=0, new_predictor=True)
    assert same(model.context_encoder.state_dict(), source.context_encoder.state_dict())
    assert same(model.ijepa.state_dict(), source.ijepa.state_dict())
    assert [note for note in notes if note.startswith("The predictor is new (new_predictor was asked for)")]


def test_a_new_predictor_is_made_where_one_is_asked_for_although_the_trained_one_fits(tmp_path):
    source = two_parts(tmp_path)
    weights = open_starting_weights(str(tmp_path))
    model, _ = start_model(weights, weights.config, seed=0, new_predictor=True)
    assert not torch.equal(model.predictor.embed.weight, source.predictor.embed.weight)


def test_a_new_predictor_is_a_function_of_the_seed_and_leaves_torchs_generator_alone(tmp_path):
    source = saved(vit_encoder(), tmp_path)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, again, other = (started(source, seed=seed)[0].predictor.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, again)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    # freshly drawn as in a new model: truncated normals of the configured width, no bias
    weight = one["layers.1.mlp.fc1.weight"]
    assert 0.015 < weight.std() < 0.025
    assert not one["layers.1.mlp.fc1.bias"].any()
    assert torch.equal(one["position_embeddings"], sincos_position_table(16, (4, 4)))


# ---- the Hub --------------------------------------------------------------------------------------------------------


COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as `huggingface_hub` lays it out, which is all that there is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(repo, source, *, commit=COMMIT, ref="main"):
        folder = tmp_path / "cache" / ("models--" + repo.replace("/", "--"))
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        shutil.copytree(source, folder / "snapshots" / commit)
        return folder

    return add


def test_a_repo_is_read_from_the_cache_and_its_commit_is_kept(tmp_path, cache):
    source = two_parts(tmp_path / "run")
    cache("someone/birds", tmp_path / "run")
    older = two_parts(tmp_path / "older", seed=7)
    cache("someone/birds", tmp_path / "older", commit=OLDER, ref="v1")
    weights = open_starting_weights("someone/birds")
    assert (weights.source, weights.commit, weights.has_predictor) == ("someone/birds", COMMIT, True)
    assert same(start_model(weights, weights.config, seed=0)[0].state_dict(), source.state_dict())
    weights = open_starting_weights("someone/birds", revision="v1")
    assert weights.commit == OLDER
    assert same(start_model(weights, weights.config, seed=0)[0].state_dict(), older.state_dict())


def test_offline_what_is_not_in_the_cache_is_an_error_and_never_taken_for_absent(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="no such folder on this disk, and .* not in the cache"):
        open_starting_weights("someone/nothing")
    two_parts(tmp_path / "run")
    folder = cache("someone/birds", tmp_path / "run")
    shutil.rmtree(folder / "snapshots" / COMMIT / "pretraining")
    with pytest.raises(FileNotFoundError, match=r"cache does not hold its pretraining/config\.json"):
        open_starting_weights("someone/birds")
    (folder / ".no_exist" / COMMIT / "pretraining").mkdir(parents=True)
    (folder / ".no_exist" / COMMIT / "pretraining" / "config.json").touch()  # the Hub was asked: it has none
    assert open_starting_weights("someone/birds").kind == "I-JEPA encoder"
    (folder / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights beside it \(none in the cache"):
        open_starting_weights("someone/birds")


def test_offline_a_card_that_is_not_in_the_cache_is_said_to_be_unknown_and_not_taken_for_absent(
    tmp_path, cache, caplog
):
    two_parts(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    folder = cache("someone/birds", tmp_path / "run")
    weights = open_starting_weights("someone/birds")
    assert (weights.license, weights.license_is_known) == ("cc-by-nc-4.0", True)
    (folder / "snapshots" / COMMIT / "README.md").unlink()
    weights = open_starting_weights("someone/birds")
    assert (weights.license, weights.license_is_known) == (None, False)
    said = r"The licence of someone/birds is not known: its README\.md is not in the cache.*set --license to it"
    assert re.search(said, caplog.text)
    (note,) = start_model(weights, weights.config, seed=0)[1]
    assert re.match(said, note)
    caplog.clear()
    (folder / ".no_exist" / COMMIT).mkdir(parents=True)
    (folder / ".no_exist" / COMMIT / "README.md").touch()  # the Hub was asked: it has none
    weights = open_starting_weights("someone/birds")
    assert (weights.license, weights.license_is_known) == (None, True)
    assert start_model(weights, weights.config, seed=0)[1] == []
    assert caplog.text == ""


def test_offline_an_image_processor_that_is_not_in_the_cache_is_an_error_that_says_what_to_do(tmp_path, cache):
    two_parts(tmp_path / "run")
    folder = cache("someone/birds", tmp_path / "run")
    assert open_starting_weights("someone/birds").image_mean == (0.5, 0.5, 0.5)
    (folder / "snapshots" / COMMIT / "preprocessor_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"not known how its images are normalised\. Run `hf download someone/birds preproc"
    ):
        open_starting_weights("someone/birds")
    (folder / ".no_exist" / COMMIT).mkdir(parents=True)
    (folder / ".no_exist" / COMMIT / "preprocessor_config.json").touch()
    assert open_starting_weights("someone/birds").image_mean is None


def test_a_revision_of_what_is_on_this_disk_is_refused_by_the_name_of_its_flag(tmp_path):
    two_parts(tmp_path)
    with pytest.raises(ValueError, match="^model_revision='v1' is for Hub repos, and model_name_or_path="):
        open_starting_weights(str(tmp_path), revision="v1")


class Files(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for single files: of one public repo, a gated one, and one whose server fails."""

    folder = None
    asked = None

    def do_GET(self):
        repo, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.asked.append((repo, revision, name))
        path = self.folder / name
        if repo == "someone/gated":
            self.answer(403, error="GatedRepo")
        elif repo == "someone/failing":
            self.answer(500)
        elif repo != "someone/birds":
            self.answer(404, error="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.answer(404, error="RevisionNotFound")
        elif not path.is_file():
            self.answer(404, error="EntryNotFound")
        else:
            self.answer(200, path.read_bytes())

    do_HEAD = do_GET

    def answer(self, status, content=b"", error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A Hub on this machine, with the folder `run` of the test as a repo."""
    handler = type("Handler", (Files,), {"folder": tmp_path / "run", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants = huggingface_hub.constants
    for name, value in (("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler.asked
    server.shutdown()
    server.server_close()


def test_a_repo_is_downloaded_all_of_one_commit(tmp_path, online):
    source = two_parts(tmp_path / "run")
    weights = open_starting_weights("someone/birds")
    assert (weights.commit, weights.has_predictor) == (COMMIT, True)
    assert same(start_model(weights, weights.config, seed=0)[0].state_dict(), source.state_dict())
    assert {revision for _, revision, name in online if name != "config.json"} == {COMMIT}
    assert {name for _, _, name in online} == {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "pretraining/config.json",
        "pretraining/model.safetensors",
    }


def test_a_repo_without_a_second_part_is_an_encoder(tmp_path, online, monkeypatch):
    two_parts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretraining")
    assert open_starting_weights("someone/birds").kind == "I-JEPA encoder"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_starting_weights("someone/birds").kind == "I-JEPA encoder"  # the cache remembers that there is none


def test_what_the_hub_answers_is_said_in_words(tmp_path, online, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between retries
    two_parts(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no such folder on this disk, and no such repo on the Hub"):
        open_starting_weights("someone/nothing")
    with pytest.raises(FileNotFoundError, match="'someone/birds' has no model_revision='v9'; write a branch"):
        open_starting_weights("someone/birds", revision="v9")
    with pytest.raises(PermissionError, match="'someone/gated' is gated: accept its terms"):
        open_starting_weights("someone/gated")
    with pytest.raises(ConnectionError, match="'someone/failing'"):
        open_starting_weights("someone/failing")
    (tmp_path / "run" / "pretraining" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pretraining/config\.json, but no weights beside it"):
        open_starting_weights("someone/birds")


def test_a_connection_that_fails_is_not_taken_for_a_missing_second_part(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between retries
    two_parts(tmp_path / "run")
    folder = cache("someone/birds", tmp_path / "run")
    shutil.rmtree(folder / "snapshots" / COMMIT / "pretraining")
    constants = huggingface_hub.constants
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"  # nobody listens
    for name, value in (("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"pretraining/config\.json is not in the cache, and the Hub cannot be"):
        open_starting_weights("someone/birds")


def test_started_and_loaded_by_from_pretrained_agree_where_both_apply(tmp_path):
    two_parts(tmp_path)
    model, _ = started(str(tmp_path))
    assert same(model.state_dict(), IJepaForPretraining.from_pretrained(tmp_path).state_dict())
