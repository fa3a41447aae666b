"""A classifier out of an encoder: learning rates by layer, new weights, and weights that would stay random."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import scrambled_model
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.classifier import load_classifier, parameter_groups
from ijepa_hf.model.encoder_ijepa import IJepaModel, sincos_position_table
from ijepa_hf.runs.export import export_model

NAMES = [str(digit) for digit in range(10)]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a model of two layers."""
    folder = tmp_path_factory.mktemp("pretrained")
    export_model(scrambled_model(), folder, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return folder


def classifier(folder, **changes):
    return load_classifier(
        FinetuningArguments(model=str(folder), dataset_name="digits", output_dir="unused", **changes), NAMES
    )


def rates_and_decays(model):
    groups = parameter_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.05)
    of_parameter = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    found = {name: of_parameter.get(id(parameter)) for name, parameter in model.named_parameters()}
    return found, groups


def test_layer_l_of_L_learns_with_decay_to_the_power_of_L_plus_1_minus_l_and_vectors_do_not_decay(pretrained):
    model = classifier(pretrained)  # two layers
    found, groups = rates_and_decays(model)
    expected_rates = {"embeddings": 1 / 8, "layers.0": 1 / 4, "layers.1": 1 / 2, "ijepa.layernorm": 1, "classifier": 1}
    assert found.pop("ijepa.embeddings.position_embeddings") is None
    for name, parameter in model.named_parameters():
        if name in found:
            rate = next(rate for part, rate in expected_rates.items() if part in name)
            assert found[name] == (rate, 0.05 if parameter.ndim > 1 else 0.0), name
    assert groups[0]["lr"] == 1.0  # the one that Trainer logs


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_other_vision_transformers_have_the_same_rule(kind):
    model = {
        "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, intermediate_size=64)),
        "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE, mlp_ratio=2)),
    }[kind]()
    rates = {name: rate for name, (rate, _) in rates_and_decays(model)[0].items()}
    assert {rates[name] for name in rates if ".embeddings." in name} == {1 / 16}
    for layer, rate in enumerate((1 / 8, 1 / 4, 1 / 2)):
        of_layer = {rates[name] for name in rates if f"layer.{layer}." in name or f"layers.{layer}." in name}
        assert of_layer == {rate}
    assert rates["classifier.weight"] == 1


def test_a_model_that_is_no_stack_of_layers_is_refused_unless_layer_decay_is_off(pretrained):
    model = classifier(pretrained)
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="layer_decay=0.5: IJepaForImageClassification is no plain stack"):
        parameter_groups(model, 1.0, 0.5, 0.0)
    assert {group["lr"] for group in parameter_groups(model, 1.0, 1.0, 0.0)} == {1.0}


def test_from_scratch_is_the_network_that_a_pretraining_starts_from(pretrained):
    model = classifier(pretrained, from_scratch=True)
    table = model.ijepa.embeddings.position_embeddings
    assert not table.requires_grad
    assert torch.equal(table.data, sincos_position_table(32, (8, 8)))
    kernel = model.ijepa.embeddings.patch_embeddings.projection.weight
    before = load_file(pretrained / "model.safetensors")["ijepa.embeddings.patch_embeddings.projection.weight"]
    assert not torch.equal(kernel.data, before)
    assert 0.9 < kernel.std().item() * math.sqrt(4 * 4 * 3) < 1.1  # patch_init_std 1/sqrt(inputs), as configured
    again = classifier(pretrained, from_scratch=True).state_dict()
    other = classifier(pretrained, from_scratch=True, seed=1).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(kernel, other["ijepa.embeddings.patch_embeddings.projection.weight"])


def test_an_encoder_whose_weights_would_stay_random_is_refused(pretrained, tmp_path):
    model = IJepaModel.from_pretrained(pretrained)
    model.config.save_pretrained(tmp_path)
    state = {f"ijepa.{name}": tensor for name, tensor in model.state_dict().items() if ".layers.1." not in f".{name}"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold 16 weights of .*encoder \(the first is ijepa\.layers\.1"):
        classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model=.* is damaged or not whole .* copy it again"):
        classifier(tmp_path)
