"""Published checkpoints in: every tensor carried over, and nothing written for a file that is not one."""

import io
import pickle

import pytest
import torch
import transformers

from ijepa_hf import IJepaForPretraining
from ijepa_hf.conversion import (
    PARTS,
    config_from_official,
    convert,
    model_from_official,
    read_official_checkpoint,
    translate,
)


@pytest.fixture
def official(golden):
    return golden / "official_checkpoint.pth.tar"


@pytest.fixture
def contents(official):
    return read_official_checkpoint(official)


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
    with pytest.raises(ValueError, match="width 64 is no published size.*--num_attention_heads"):
        config_from_official(contents)


def test_converted_folder_is_what_stock_transformers_and_this_package_read(official, contents, tmp_path):
    message = convert(official, tmp_path / "out", num_attention_heads=4)
    assert "width 64, depth 3, 4 heads" in message
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(encoder) is transformers.IJepaModel
    table = contents["target_encoder"]["blocks.2.mlp.fc2.weight"]
    assert torch.equal(encoder.layers[2].mlp.fc2.weight.detach(), table)  # the target's, not the context's
    assert not torch.equal(table, contents["encoder"]["blocks.2.mlp.fc2.weight"])
    whole = IJepaForPretraining.from_pretrained(tmp_path / "out")
    assert torch.equal(whole.predictor.mask_token.detach(), contents["predictor"]["mask_token"])
    assert not any(parameter.requires_grad for parameter in whole.ijepa.parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    processor = (tmp_path / "out" / "preprocessor_config.json").read_text()
    assert "0.485" in processor
    assert "0.229" in processor


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "table"])
def test_a_checkpoint_that_does_not_fit_is_refused_naming_the_tensor(contents, change):
    encoder = contents["encoder"]
    if change == "missing":
        del encoder["blocks.1.norm2.bias"]
    elif change == "unexpected":
        encoder["cls_token"] = torch.zeros(1, 1, 64)
    elif change == "shape":
        encoder["norm.weight"] = torch.ones(32)
    else:
        encoder["pos_embed"] = encoder["pos_embed"].flip(1)
    expected = {
        "missing": r"context_encoder\.layers\.1\.layernorm_after\.bias is missing",
        "unexpected": r"encoder\.cls_token is unexpected",
        "shape": r"context_encoder\.layernorm\.weight has shape \[32\], expected \[64\]",
        "table": r"context_encoder\.embeddings\.position_embeddings is not the fixed sin-cos table of a 8x8 grid",
    }[change]
    with pytest.raises(ValueError, match=expected):
        model_from_official(contents, num_attention_heads=4)


class Hostile:
    def __reduce__(self):
        return (print, ("code was run",))


def test_damaged_foreign_and_hostile_files_are_refused_without_running_code_or_writing(official, tmp_path, capsys):
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(official.read_bytes()[:100_000])
    foreign = tmp_path / "foreign.pth.tar"
    torch.save({"model": {}}, foreign)
    hostile = tmp_path / "hostile.pth.tar"
    torch.save({"encoder": Hostile()}, hostile)
    legacy = tmp_path / "legacy.pth.tar"
    legacy.write_bytes(pickle.dumps({"encoder": Hostile()}, protocol=2))
    text = tmp_path / "text.pth.tar"
    text.write_text("hello")
    for path, message in (
        (cut, "cannot be read"),
        (foreign, "lacks target_encoder, encoder, predictor; it holds .*'model'"),
        (hostile, "cannot be read .* code"),
        (legacy, "cannot be read .* code"),
        (text, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "nowhere.pth.tar", tmp_path / "out")


def test_a_folder_in_use_is_left_alone(official, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(official, tmp_path / "out", num_attention_heads=4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_names_without_the_distributed_prefix_are_understood_too(contents, tmp_path):
    buffer = io.BytesIO()
    torch.save({part: dict(contents[part]) for part in PARTS}, buffer)
    (tmp_path / "plain.pth.tar").write_bytes(buffer.getvalue())
    again = read_official_checkpoint(tmp_path / "plain.pth.tar")
    assert all(again[part].keys() == contents[part].keys() for part in PARTS)
