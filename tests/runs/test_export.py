"""The two-part folder: what is in it, that it is read back, and that a half-written one is noticed."""

import errno
import json
import shutil

import pytest
import torch
import transformers
from faults import every_moment, in_fork, limit_file_size
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import scrambled_model, tiny_batch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ijepa_hf import IJepaForPretraining
from ijepa_hf.files import SaveError, file_bytes
from ijepa_hf.runs import export
from ijepa_hf.runs.export import CODE_FILES, export_model, exported_step, image_processor_fields

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


def bits(path):
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tensors_that_were_gathered_are_written_in_place_of_the_models_own(model, folder, tmp_path):
    other = scrambled_model(5)
    state = {name: tensor.detach() for name, tensor in other.state_dict().items()}
    export_model(model, tmp_path / "one", step=1, image_mean=MEAN, image_std=STD, state=state)
    export_model(other, tmp_path / "two", step=1, image_mean=MEAN, image_std=STD)
    for part in ("model.safetensors", "pretraining/model.safetensors"):
        assert same(bits(tmp_path / "one" / part), bits(tmp_path / "two" / part))
    with pytest.raises(StopIteration):  # nothing gathered is not the same as not given
        export_model(model, tmp_path / "three", step=1, image_mean=MEAN, image_std=STD, state={})


def test_weights_may_be_read_by_those_who_may_read_the_rest(folder):
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_what_a_killed_process_left_beside_a_weight_file_is_in_nobodys_way(model, folder):
    (folder / ".model.safetensors.partial").write_bytes(b"half")  # a file, or a folder with anything in it
    hidden = folder / "pretraining" / ".model.safetensors.partial"
    hidden.mkdir()
    (hidden / ".tmpA1b2C3").write_bytes(b"half")
    export_model(model, folder, step=8, image_mean=MEAN, image_std=STD)
    assert exported_step(folder) == 8
    assert not list(folder.rglob(".*"))


# -- a disk that fails -----------------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_is_one_clear_error_and_each_file_is_as_it_was(folder):
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def write():
        limit_file_size(100_000)
        with pytest.raises(SaveError, match="run could not be written: File too large") as caught:
            export_model(scrambled_model(5), folder, step=8, image_mean=MEAN, image_std=STD)
        assert caught.value.errno == errno.EFBIG

    assert in_fork(write) == 0
    assert exported_step(folder) == 7
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_too_little_space_is_found_before_anything_is_written(model, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1234, 1234))
    monkeypatch.setattr(export, "write_atomically", None)
    with pytest.raises(SaveError, match=r"run could not be written: No space left.*bytes are needed, 1,234 free"):
        export_model(model, folder, step=8, image_mean=MEAN, image_std=STD)
    assert exported_step(folder) == 7


def test_a_folder_that_has_gone_is_not_made_anew_where_that_was_asked_for(model, tmp_path):
    with pytest.raises(SaveError, match="gone could not be written: No such file or directory"):
        export_model(model, tmp_path / "gone", step=8, image_mean=MEAN, image_std=STD, must_exist=True)
    assert not list(tmp_path.iterdir())


def test_the_bytes_of_a_file_are_foretold(model, folder):
    foretold = file_bytes(model.state_dict().values())
    assert 0 < foretold - (folder / "pretraining" / "model.safetensors").stat().st_size < 100_000


def test_killed_at_any_moment_of_an_export_each_file_is_the_old_or_the_new_one(model, folder, tmp_path):
    parts = ("model.safetensors", "pretraining/model.safetensors")
    other = scrambled_model(5)
    for name in CODE_FILES:  # of an older version: equal ones are not written again
        (folder / name).write_text("older = True\n")
    export_model(other, tmp_path / "new", step=8, image_mean=MEAN, image_std=STD)
    old, new = [bits(folder / part) for part in parts], [bits(tmp_path / "new" / part) for part in parts]
    steps = []

    def check(run):
        steps.append(exported_step(run))
        for part, before, after in zip(parts, old, new, strict=True):
            assert same(bits(run / part), before) or same(bits(run / part), after)
        for name in ("config.json", "pretraining/config.json", "preprocessor_config.json"):
            json.loads((run / name).read_text())
        for name in CODE_FILES:
            assert (run / name).read_text() in ("older = True\n", (tmp_path / "new" / name).read_text())
        if steps[-1] is not None:
            expected = old if steps[-1] == 7 else new
            assert all(same(bits(run / part), tensors) for part, tensors in zip(parts, expected, strict=True))

    moments = every_moment(
        folder,
        tmp_path / "copy",
        lambda run: export_model(other, run, step=8, image_mean=MEAN, image_std=STD),
        check,
    )
    assert moments >= 40
    order = {7: 0, None: 1, 8: 2}
    assert [order[step] for step in steps] == sorted(order[step] for step in steps)
    assert set(steps) == {7, None, 8}


def test_a_folder_written_with_three_code_files_loads_by_its_own_code_and_by_ours(model, folder):
    masking, sizes = (folder / name for name in ("masking.py", "block_sizes.py"))
    before, rest = masking.read_text().split("from .block_sizes import")
    # as folders had it before: sizes of blocks in the same file
    body = sizes.read_text().replace("from __future__ import annotations\n", "")
    masking.write_text(before + body + rest.split(")\n", 1)[1])
    sizes.unlink()
    theirs = get_class_from_dynamic_module("modeling_ijepa.IJepaForPretraining", str(folder))
    assert theirs is not IJepaForPretraining
    batch = tiny_batch(model.config)
    with torch.no_grad():
        losses = [cls.from_pretrained(folder).eval()(**batch).loss for cls in (theirs, IJepaForPretraining)]
        assert losses == [model.eval()(**batch).loss] * 2
        assert torch.isfinite(theirs.from_pretrained(folder)(batch["pixel_values"]).loss)  # draws masks itself
