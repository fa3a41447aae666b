"""The two-part folder: what is in it, that it is read back, and that a half-written one is noticed."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import scrambled_model

from ijepa_hf import IJepaForPretraining
from ijepa_hf.export import export_model, exported_step, image_processor_fields, write_atomically

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.fixture(scope="module")
def model():
    return scrambled_model()


@pytest.fixture
def folder(model, tmp_path):
    export_model(model, tmp_path / "run", step=7, image_mean=MEAN, image_std=STD)
    return tmp_path / "run"


def test_files_hold_the_same_names_and_tensors_as_transformers_own_saving(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(folder / "pretraining" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    root = load_file(folder / "model.safetensors")
    assert root.keys() == {name for name in theirs if name.startswith("ijepa.")}
    assert all(torch.equal(root[name], theirs[name]) for name in root)


def test_root_loads_as_a_stock_encoder_and_the_rest_is_found_without_being_told(model, folder):
    encoder = transformers.AutoModel.from_pretrained(folder)
    assert type(encoder) is transformers.IJepaModel
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).last_hidden_state, model.target_encoder(pixels).last_hidden_state)
    for cls in (IJepaForPretraining, transformers.AutoModelForPreTraining):
        loaded = cls.from_pretrained(folder)
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_a_root_of_another_dtype_does_not_change_the_full_models(model, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert transformers.AutoModelForPreTraining.from_pretrained(folder).dtype == torch.float32


def test_image_processor_is_the_runs_own(folder):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(folder)
    assert (list(processor.image_mean), list(processor.image_std)) == (MEAN, STD)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)


def test_image_processor_of_a_rectangle_says_height_and_width(model):
    fields = image_processor_fields((32, 64), MEAN, STD)
    assert fields["size"] == {"height": 32, "width": 64}


def test_both_weight_files_carry_the_step(folder):
    for part in ("", "pretraining"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "step": "7"}
    assert exported_step(folder) == 7


def test_a_missing_damaged_or_older_half_means_no_complete_export(model, folder, tmp_path):
    assert exported_step(tmp_path / "nowhere") is None
    root, inner = folder / "model.safetensors", folder / "pretraining" / "model.safetensors"
    whole = inner.read_bytes()
    inner.write_bytes(whole[:50])
    assert exported_step(folder) is None
    inner.unlink()
    assert exported_step(folder) is None
    export_model(model, tmp_path / "later", step=8, image_mean=MEAN, image_std=STD)
    inner.write_bytes(whole)
    root.write_bytes((tmp_path / "later" / "model.safetensors").read_bytes())
    assert exported_step(folder) is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        partial.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
