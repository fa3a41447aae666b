"""FSDP2: two processes that each hold a part of the model train it as one that holds it whole."""

import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from forked_runs import run_ranks
from safetensors.torch import load_file
from sharded_processes import RUN, SAVED_AT, STEPS, WAYS, fresh_model, one_pass, share_a_model, take_steps
from tiny import NETWORKS, differences, scrambled_model, tiny_batch, tiny_model

from ijepa_hf.model.encoder_ijepa import IJepaLayer
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.model.sharding import is_sharded, make_fsdp_plugin, whole_model, whole_tensor
from ijepa_hf.runs.checkpoints import collect_state, config_fields, read_checkpoint, restore, save_checkpoint
from ijepa_hf.training.step import make_optimizer

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: its model, optimiser and results after twenty steps, and its checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("alone")
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = tiny_model().train()
    optimizer = make_optimizer(model, RUN)
    results = take_steps(accelerator, model, model, optimizer, range(SAVED_AT))
    tensors = collect_state(model, optimizer)
    path = save_checkpoint(folder, SAVED_AT, tensors, config=config_fields(model.config), arguments={}, total_limit=1)
    results += take_steps(accelerator, model, model, optimizer, range(SAVED_AT, STEPS))
    return accelerator, model, results, path


@pytest.fixture(scope="module")
def shared(alone, tmp_path_factory):
    """The folder in which two processes left what they did."""
    folder = tmp_path_factory.mktemp("shared")
    run_ranks(2, partial(share_a_model, folder, alone[3]), folder / "log")
    return folder


def notes(folder, rank=0):
    return json.loads((folder / f"rank{rank}.json").read_text())


def test_each_process_holds_a_part_and_layers_are_units_of_their_own(shared):
    for rank in (0, 1):
        said = notes(shared, rank)
        assert said["ranks"] == 2
        assert said["is_sharded"]
        assert said["share"] == pytest.approx(0.5, abs=0.01)
        layers = [f"{part}.layers.{number}" for part in NETWORKS for number in (0, 1)]
        assert sorted(said["units"]) == sorted(["", *layers])


@pytest.mark.parametrize("way", ["torch", "accelerate"])
def test_twenty_steps_on_two_processes_that_share_the_model_equal_one_process(alone, shared, way):
    largest = differences(load_file(shared / f"{way}.safetensors"), alone[1].state_dict())
    print(way, largest)
    assert max(largest.values()) < TOLERANCE, largest


def test_the_steps_moved_all_three_networks_far_more_than_the_tolerance(alone):
    moved = differences(alone[1].state_dict(), tiny_model().state_dict())
    assert min(moved.values()) > 1000 * TOLERANCE, moved


def test_losses_and_gradient_norms_are_those_of_one_process(alone, shared):
    ours, theirs = torch.tensor(notes(shared)["results"]), torch.tensor(alone[2])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert notes(shared)["results"] == notes(shared, rank=1)["results"]


def test_a_checkpoint_of_parts_is_restored_by_one_process_which_goes_on_with_it(alone, shared):
    accelerator, whole, _, path = alone
    model = tiny_model(seed=5).train()
    optimizer = make_optimizer(model, RUN)
    checkpoint = read_checkpoint(shared / f"checkpoint-{SAVED_AT}")
    restore(checkpoint, model, optimizer, config_fields(model.config))
    written = load_file(checkpoint.path / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    restored, stored = collect_state(model, optimizer).optimizer, load_file(checkpoint.path / "optimizer.safetensors")
    assert restored.keys() == stored.keys() == load_file(path / "optimizer.safetensors").keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in restored.items())
    take_steps(accelerator, model, model, optimizer, range(SAVED_AT, STEPS))
    assert max(differences(model.state_dict(), whole.state_dict()).values()) < TOLERANCE


def test_a_checkpoint_of_one_process_is_restored_in_parts_to_the_bit_and_goes_on(alone, shared):
    for kind in ("model", "optimizer"):
        restored = load_file(shared / f"restored_{kind}.safetensors")
        written = load_file(alone[3] / f"{kind}.safetensors")
        assert restored.keys() == written.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in restored.items())
    largest = differences(load_file(shared / "continued.safetensors"), alone[1].state_dict())
    assert max(largest.values()) < TOLERANCE, largest


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_of_a_shared_model_are_those_of_a_whole_one(shared, way):
    passed, expected = load_file(shared / f"{way}.safetensors"), one_pass(fresh_model(way), way)
    assert passed.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in expected.items() if name != "loss")
    assert largest > 1e-3
    # the weights' gradients are sums in bf16 there, of four images and of eight
    tolerance = 0.01 * largest if way == "bf16" else 2e-6 * max(1.0, largest)
    for name, tensor in expected.items():
        torch.testing.assert_close(passed[name], tensor, rtol=0, atol=tolerance, msg=name)


def test_the_whole_of_a_shared_model_is_in_one_process_and_gives_its_features(alone, shared):
    assert notes(shared, 0)["whole"] == [False, True, False]  # not sharded, in train mode, its target encoder not
    assert notes(shared, 1)["whole"] is None
    model = tiny_model(seed=5)
    model.load_state_dict(load_file(shared / "torch.safetensors"))
    with torch.no_grad():
        features = model.target_encoder(tiny_batch(model.config)["pixel_values"]).last_hidden_state
    assert torch.equal(load_file(shared / "features.safetensors")["features"], features)


def test_a_model_that_is_not_sharded_is_its_own_whole():
    model = scrambled_model()
    assert not is_sharded(model)
    assert whole_model(model, keep=True) is model
    assert whole_model(model, keep=False) is model
    weight = model.predictor.project.weight
    assert whole_tensor(weight).data_ptr() == weight.data_ptr()
    assert not whole_tensor(weight).requires_grad


# -- through accelerate ----------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Sets what `accelerate launch` sets from fsdp2_1_node_8_gpus.yaml."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    return monkeypatch


def test_accelerate_shards_in_place_and_makes_our_units_and_some_of_its_own(shared):
    said = notes(shared)
    assert said["in_place"]
    assert set(said["accelerate_units"]) - set(said["units"]) <= {
        "ijepa.embeddings.patch_embeddings",
        "ijepa.layernorm",
    }
    assert set(said["units"]) <= set(said["accelerate_units"])


def test_accelerates_policy_picks_the_transformer_layers(launched):
    plugin, model = make_fsdp_plugin(), tiny_model()
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    picked = [module for module in model.modules() if policy(module)]
    assert len(picked) == 6
    assert all(type(module) is IJepaLayer for module in picked)


def test_the_classes_that_transformers_keeps_together_exist_and_hold_the_layers():
    names = {type(module).__name__ for module in tiny_model().modules()}
    assert IJepaLayer.__name__ in IJepaForPretraining._no_split_modules
    assert set(IJepaForPretraining._no_split_modules) <= names


def test_nothing_is_sharded_where_the_launcher_does_not_ask_for_it(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert make_fsdp_plugin() is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_stay_float32_when_they_are_gathered_in_either_precision(launched, precision):
    plugin = make_fsdp_plugin()
    if precision == "bf16":
        plugin.set_mixed_precision(precision)  # what accelerate does with a plugin
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version=1 .* write fsdp_version: 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing=true .* --gradient_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "True", "fsdp_offload_params=true .* write fsdp_offload_params: false"),
    ],
)
def test_what_a_sharded_run_cannot_do_is_refused_before_it_starts(launched, variable, value, message):
    launched.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        make_fsdp_plugin()


def test_a_step_computes_in_bf16_although_accelerate_puts_no_autocast_around_a_sharded_model():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    accelerator, model, seen = Accelerator(cpu=True, mixed_precision="bf16"), tiny_model().train(), []
    model.predictor.project.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    take_steps(accelerator, model, model, make_optimizer(model, RUN), range(1))  # not prepared, as FSDP2 leaves it
    assert seen == [torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
