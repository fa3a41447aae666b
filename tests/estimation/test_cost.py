"""The cost of a step by formula: compared with torch's own counting and with what a real step holds."""

import gc

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tiny import sizes_of, tiny_batch, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from ijepa_hf.estimation import timing
from ijepa_hf.estimation.cost import (
    Parameters,
    Sizes,
    StepSettings,
    count_parameters,
    draw_sizes,
    estimate_memory,
    largest_batch,
    model_work,
    update_bytes,
)
from ijepa_hf.model.mask_audit import TRIALS
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.activation_checkpointing import enable_gradient_checkpointing

BATCH = 4
SHAPES = {
    "small": {},
    "one layer each": {"num_hidden_layers": 1, "predictor_num_hidden_layers": 1},
    "wide and deep, two context sets": {
        "num_context_sets": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "predictor_hidden_size": 48,
        "num_hidden_layers": 5,
        "predictor_num_hidden_layers": 3,
        "predictor_num_attention_heads": 4,
    },
    "more rows of targets than patches": {"num_target_blocks": 8, "context_keep_ratio": 0.1},
    "pixels are predicted": {"target_type": "pixels"},
    "no square, two channels": {"image_size": (32, 48), "num_channels": 2, "context_keep_ratio": 0.4},
}
ROOMY = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "intermediate_size": 512,
    "predictor_hidden_size": 64,
    "predictor_num_hidden_layers": 3,
}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# -- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_flops_are_those_that_torch_counts_in_a_real_step(changes, checkpointing):
    config = tiny_config(**changes)
    batch = tiny_batch(config, BATCH)
    model = tiny_model(**changes).train()
    model.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    if checkpointing:
        enable_gradient_checkpointing(model)
    ours = sum(
        part.total for part in model_work(config, [sizes_of(config, batch)], checkpointing=checkpointing).values()
    )
    assert counted(lambda: model(**batch).loss.backward()) == BATCH * ours


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_flops_of_each_part_are_those_that_torch_counts_in_its_forward_pass(changes):
    config = tiny_config(**changes)
    batch = tiny_batch(config, BATCH)
    model = tiny_model(**changes)
    model.set_attn_implementation("eager")
    work = model_work(config, [sizes_of(config, batch)])
    pixels, context, target = batch.values()
    seen = model.context_encoder(pixels, context_indices=context).last_hidden_state
    parts = {
        "target_encoder": lambda: model.encode_targets(pixels, target),
        "context_encoder": lambda: model.context_encoder(pixels, context_indices=context),
        "predictor": lambda: model.predict(seen, context, target),
    }
    for name, forward in parts.items():
        assert counted(forward) == BATCH * work[name].forward, name
    assert work["target_encoder"].backward == 0


def test_selective_checkpointing_repeats_no_product():
    config = tiny_config()
    batch = tiny_batch(config, BATCH)
    found = []
    for selective in (None, False, True):
        model = IJepaForPretraining(config).train()
        if selective is not None:
            enable_gradient_checkpointing(model, selective=selective)
        found.append(counted(lambda model=model: model(**batch).loss.backward()))
    assert found[2] == found[0] < found[1]


def test_flops_are_the_mean_over_draws_of_the_masks():
    config = tiny_config()
    drawn = [Sizes(64, 1, 16, 4, 9), Sizes(64, 1, 16, 4, 12)]
    both = model_work(config, drawn)
    for name in both:
        one, other = (model_work(config, [sizes])[name].total for sizes in drawn)
        assert both[name].total == (one + other) / 2


def test_sizes_are_those_of_drawn_masks():
    config = tiny_config()
    drawn = draw_sizes(config, 8)
    assert len(drawn) == TRIALS
    assert {sizes.context for sizes in drawn} == {config.mask_settings().num_context_patches}
    assert len({sizes.target for sizes in drawn}) > 1  # a new size at each step
    masks = draw_masks(config.mask_settings(), 8, keyed_generator(3))
    assert (drawn[3].blocks, drawn[3].target) == masks.target_indices.shape[1:]


def test_the_published_masks_get_smaller_with_the_batch():
    config = tiny_config(masking_strategy="multi_block_official", official_min_keep=4)
    few, many = (sum(sizes.context for sizes in draw_sizes(config, batch)) for batch in (2, 128))
    assert many < few


def test_an_update_moves_each_float32_number_as_often_as_it_is_read_or_written():
    # trained: weight, gradient and moments are read, three of them written, gradients read for their norm
    assert update_bytes(Parameters(context_encoder=10, target_encoder=10, predictor=5)) == 4 * (15 * 8 + 10 * 3)


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "millions"),  # as the Hub says of the published files
    [("in1k-vith14", 631), ("in1k-vith16-448", 632), ("in22k-vitg16", 1011)],
)
def test_parameters_are_those_of_the_stock_encoder_and_of_the_published_sizes(recipe, millions):
    values = {**load_recipe(recipe), "dataset_name": "x", "output_dir": "x"}
    config = parse_arguments(as_flags(values))[0].to_config()
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    stock = transformers.IJepaConfig(**{name: getattr(config, name) for name in names})
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in transformers.IJepaModel(stock).parameters())
    ours = count_parameters(config)
    table = config.num_patches * config.hidden_size  # a parameter there, fixed here
    assert ours.context_encoder == ours.target_encoder == theirs - table
    assert round(theirs / 1e6) == millions


def test_parameters_are_those_of_a_real_model():
    model = tiny_model()
    ours = count_parameters(tiny_config())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert ours.trained == sum(parameter.numel() for parameter in trained)
    assert ours.total == sum(parameter.numel() for parameter in model.parameters())


# -- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(config, batch, *, bf16=False, checkpointing=False, eager=False):
    """What torch keeps for the backward pass of a real forward pass: storages that are no parameter."""
    model = IJepaForPretraining(config).train()
    model.set_attn_implementation("eager" if eager else "sdpa")
    if checkpointing:
        enable_gradient_checkpointing(model)
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(**batch)
    assert output.loss is not None
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("changes", [SHAPES["small"], SHAPES["wide and deep, two context sets"], ROOMY])
@pytest.mark.parametrize(
    "how",
    [{}, {"bf16": True}, {"checkpointing": True}, {"eager": True}, {"eager": True, "bf16": True}],
    ids=lambda how: " ".join(how) or "float32",
)
def test_activations_are_the_storages_that_torch_keeps(changes, how):
    config = tiny_config(**changes)
    batch = tiny_batch(config, BATCH)
    ours = estimate_memory(config, sizes_of(config, batch), count_parameters(config), BATCH, StepSettings(**how))
    assert ours.activations + ours.weight_copies == pytest.approx(kept_bytes(config, batch, **how), rel=0.02)


def peak_of_a_step(config, batch, run, micro_batches):
    """Bytes above those at its start that a real optimiser step holds, by torch's record of its allocations."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    timed = timing._TimedModel(config, run, Accelerator(cpu=True), [batch] * micro_batches, None)
    timed.step()
    gc.collect()  # what is given back later would be taken off
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        timed.step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("how", ["kept", "checkpointing", "selective"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("images", [2, 12])
def test_the_peak_is_that_of_a_real_step(images, micro_batches, how):
    config = tiny_config(**ROOMY)
    batch = tiny_batch(config, images)
    checkpointing, selective = how == "checkpointing", how == "selective"
    run = PretrainingArguments(
        learning_rate=1e-3, gradient_checkpointing=checkpointing, selective_checkpointing=selective
    )
    ours = estimate_memory(
        config,
        sizes_of(config, batch),
        count_parameters(config),
        images,
        StepSettings(checkpointing=checkpointing, selective=selective, accumulates=micro_batches > 1),
    )
    there = ours.weights + ours.optimizer + ours.batch
    assert ours.peak == pytest.approx(there + peak_of_a_step(config, batch, run, micro_batches), rel=0.15)


def test_several_processes_hold_what_they_exchange():
    config = tiny_config()
    parameters = count_parameters(config)
    one, many = (
        estimate_memory(config, draw_sizes(config, 2)[0], parameters, 2, StepSettings(is_distributed=distributed))
        for distributed in (False, True)
    )
    assert many.peak - one.peak == many.buckets == 4 * parameters.trained


@pytest.mark.parametrize(
    ("memory", "most"), [(99, 0), (100, 0), (107, 1), (113.9, 1), (114, 2), (800, 100), (1e6, 142842)]
)
def test_the_largest_batch_fits_and_one_image_more_does_not(memory, most):
    assert largest_batch(lambda images: 100 + 7 * images, memory) == most
