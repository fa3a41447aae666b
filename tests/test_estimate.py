"""What a run takes, said beforehand: compared with torch's own counting and with what a real step holds."""

import json
import time
from typing import ClassVar

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tiny import tiny_batch, tiny_config, tiny_flags, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from ijepa_hf import cli, estimate
from ijepa_hf.arguments import PretrainingArguments, as_flags, load_recipe, parse_arguments, recipe_names
from ijepa_hf.data import keyed_generator
from ijepa_hf.estimate import (
    DRAWS,
    HARDWARE,
    KNOWN_SIZES,
    Hardware,
    Parameters,
    Sizes,
    StepTime,
    count_parameters,
    draw_sizes,
    estimate_memory,
    estimate_run,
    largest_batch,
    measure_step_time,
    model_work,
    step_time_on,
    update_bytes,
)
from ijepa_hf.export import export_model
from ijepa_hf.masking import draw_masks
from ijepa_hf.modeling_ijepa import IJepaForPretraining, enable_gradient_checkpointing
from ijepa_hf.sources import SHAPES_SPLITS, load_digits

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
    "no square, two channels": {"image_size": (32, 48), "num_channels": 2, "context_keep_ratio": 0.4},
}
ROOMY = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "intermediate_size": 512,
    "predictor_hidden_size": 64,
    "predictor_num_hidden_layers": 3,
}


def sizes_of(config, batch):
    blocks, target = batch["target_indices"].shape[1:]
    return Sizes(config.num_patches, config.num_context_sets, batch["context_indices"].shape[-1], blocks, target)


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
    assert len(drawn) == DRAWS
    assert {sizes.context for sizes in drawn} == {config.mask_settings().num_context_patches}
    assert len({sizes.target for sizes in drawn}) > 1  # a new size at each step
    masks = draw_masks(config.mask_settings(), 8, keyed_generator(3))
    assert (drawn[3].blocks, drawn[3].target) == masks.target_indices.shape[1:]


def test_the_published_masks_get_smaller_with_the_batch():
    config = tiny_config(masking_strategy="multi_block_official", official_min_keep=4)
    few, many = (sum(sizes.context for sizes in draw_sizes(config, batch)) for batch in (2, 128))
    assert many < few


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
    ours = estimate_memory(config, sizes_of(config, batch), count_parameters(config), BATCH, on_cpu=True, **how)
    assert ours.activations + ours.weight_copies == pytest.approx(kept_bytes(config, batch, **how), rel=0.02)


@pytest.mark.parametrize("changes", [SHAPES["small"], SHAPES["wide and deep, two context sets"]])
def test_norms_in_float32_as_on_a_gpu_keep_more_in_bfloat16(changes, monkeypatch):
    norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *rest, **named: norm(x.float(), *rest, **named))
    config = tiny_config(**changes)
    batch = tiny_batch(config, BATCH)
    ours = estimate_memory(config, sizes_of(config, batch), count_parameters(config), BATCH, bf16=True)
    assert ours.activations + ours.weight_copies == pytest.approx(kept_bytes(config, batch, bf16=True), rel=0.02)


def peak_of_a_step(config, batch, run, micro_batches):
    """Bytes above those at its start that a real optimiser step holds, by torch's record of its allocations."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    timed = estimate._TimedModel(config, run, Accelerator(cpu=True), [batch] * micro_batches, None)
    timed.step()
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
        checkpointing=checkpointing,
        selective=selective,
        accumulates=micro_batches > 1,
    )
    there = ours.weights + ours.optimizer + ours.batch
    assert ours.peak == pytest.approx(there + peak_of_a_step(config, batch, run, micro_batches), rel=0.1)


def test_several_processes_hold_what_they_exchange():
    config = tiny_config()
    parameters = count_parameters(config)
    one, many = (
        estimate_memory(config, draw_sizes(config, 2)[0], parameters, 2, is_distributed=distributed)
        for distributed in (False, True)
    )
    assert many.peak - one.peak == many.buckets == 4 * parameters.trained


@pytest.mark.parametrize(
    ("memory", "most"), [(99, 0), (100, 0), (107, 1), (113.9, 1), (114, 2), (800, 100), (1e6, 142842)]
)
def test_the_largest_batch_fits_and_one_image_more_does_not(memory, most):
    assert largest_batch(lambda images: 100 + 7 * images, memory) == most


# -- time ------------------------------------------------------------------------------------------------------------


def test_time_on_named_hardware_is_flops_over_the_reached_peak_and_bytes_over_the_bandwidth():
    hardware = Hardware(bf16=100e12, fp32=20e12, memory=1e9, bandwidth=1e12)
    assert step_time_on(hardware, 50e12, 2e12, bf16=True, utilization=0.5) == StepTime(3.0, 3.0, 3.0)
    assert step_time_on(hardware, 50e12, 2e12, bf16=False, utilization=0.5).seconds == pytest.approx(7.0)
    assert step_time_on(HARDWARE["t4"], 1e12, 0, bf16=True, utilization=0.5) is None


def test_an_update_moves_each_float32_number_as_often_as_it_is_read_or_written():
    # trained: weight, gradient and moments are read, three of them written, gradients read for their norm
    assert update_bytes(Parameters(context_encoder=10, target_encoder=10, predictor=5)) == 4 * (15 * 8 + 10 * 3)


class Clockwork:
    """In place of a model: its steps take as long as is made up here."""

    made: ClassVar[list] = []

    def __init__(self, config, run, accelerator, micro_batches, attn_implementation):
        (batch,) = micro_batches
        self.depth, self.narrow_depth = config.num_hidden_layers, config.predictor_num_hidden_layers
        self.images = len(batch["pixel_values"])
        self.made.append((self.depth, self.narrow_depth, self.images))

    def time(self):
        update = 0.01 + 0.002 * self.depth + 0.001 * self.narrow_depth
        return update + self.images * self.each, update

    @property
    def each(self):
        return 0.001 + 0.01 * self.depth + 0.004 * self.narrow_depth


@pytest.mark.parametrize(
    ("depth", "narrow_depth", "images", "timed"),
    [
        (12, 6, 2, {(2, 2, 2), (4, 2, 2), (2, 4, 2)}),
        (12, 6, 200, {(2, 2, 17), (4, 2, 17), (2, 4, 17)}),  # a step of one image takes 45 ms
        (1, 1, 4, {(1, 1, 4)}),
        (3, 2, 4, {(2, 2, 4), (3, 2, 4)}),
        (4, 3, 4, {(2, 2, 4), (4, 2, 4), (2, 3, 4)}),
    ],
)
def test_the_time_of_a_step_grows_by_as_much_with_each_block_image_and_micro_batch(
    monkeypatch, depth, narrow_depth, images, timed
):
    monkeypatch.setattr(estimate, "_TimedModel", Clockwork)
    monkeypatch.setattr(Clockwork, "made", [])
    config = tiny_config(num_hidden_layers=depth, predictor_num_hidden_layers=narrow_depth)
    run = PretrainingArguments(learning_rate=1e-3, per_device_train_batch_size=images, gradient_accumulation_steps=3)
    found = measure_step_time(config, run, Accelerator(cpu=True), seconds=0.0)
    expected = 0.01 + 0.002 * depth + 0.001 * narrow_depth
    expected += 3 * images * (0.001 + 0.01 * depth + 0.004 * narrow_depth)
    assert found.seconds == pytest.approx(expected)
    assert found.low == pytest.approx(found.high)
    assert set(Clockwork.made[1:]) == timed


def test_the_masks_that_are_timed_are_of_the_whole_batch_and_of_mean_work():
    config = tiny_config()
    batch = estimate._typical_batch(config, 8, torch.device("cpu"))
    assert batch["pixel_values"].shape == (8, 3, 32, 32)
    work = [sum(part.total for part in model_work(config, [sizes]).values()) for sizes in draw_sizes(config, 8)]
    mean = sum(work) / len(work)
    chosen = sum(part.total for part in model_work(config, [sizes_of(config, batch)]).values())
    assert abs(chosen - mean) == min(abs(one - mean) for one in work)


# -- the command -----------------------------------------------------------------------------------------------------


def run_json(capsys, *argv):
    assert cli.main(["estimate", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_estimated_in_no_time_and_without_its_images(recipe, capsys):
    begin = time.process_time()
    has_images = load_recipe(recipe).get("dataset_name") is not None
    found = run_json(capsys, recipe, *([] if has_images else ["--num_images", "14000000"]))
    assert time.process_time() - begin < 2.0
    assert found["parameters"]["total"] > 200_000
    assert [row["name"] for row in found["hardware"]] == list(HARDWARE)
    for row in found["hardware"]:
        if row["hours"] is not None:
            assert row["hours"] == pytest.approx(found["run"]["steps"] * row["seconds_per_step"] / 3600)
            assert row["images_per_second"] == pytest.approx(
                found["run"]["global_batch_size"] / row["seconds_per_step"]
            )


def test_flags_override_the_recipe_and_name_hardware(capsys):
    small = run_json(capsys, "cifar10-vit-tiny", "--hardware", "l4")
    wide = run_json(
        capsys, "--hardware", "l4", "cifar10-vit-tiny", "--hidden_size", "384", "--mixed_precision", "bf16"
    )
    assert wide["parameters"]["target_encoder"] > 3.8 * small["parameters"]["target_encoder"]
    assert [row["name"] for row in wide["hardware"]] == ["l4"]
    assert wide["hardware"][0]["seconds_per_step"] < small["hardware"][0]["seconds_per_step"]


def test_a_lower_utilization_takes_longer_and_more_processes_a_larger_batch(capsys):
    base = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm")
    slow = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm", "--utilization", "0.175")
    many = run_json(capsys, "in1k-vith14", "--hardware", "h100-sxm", "--num_processes", "16")
    assert (
        1.9 < slow["hardware"][0]["hours"] / base["hardware"][0]["hours"] < 2.0
    )  # the update takes as long as before
    assert many["run"]["global_batch_size"] == 16 * base["run"]["global_batch_size"] == 2048
    assert many["hardware"][0]["hours"] == pytest.approx(base["hardware"][0]["hours"] / 16, rel=1e-3)
    assert many["hardware"][0]["largest_batch"] < base["hardware"][0]["largest_batch"]


def test_checkpointing_needs_less_memory_and_more_flops(capsys):
    kept = run_json(capsys, "in1k-vitb16")
    again = run_json(capsys, "in1k-vitb16", "--gradient_checkpointing")
    assert again["memory"]["peak"] < 0.6 * kept["memory"]["peak"]
    # a third of the trained parts' work, less the MLP's second layer
    trained = sum(sum(kept["flops_per_image"][part].values()) for part in ("context_encoder", "predictor"))
    more = again["flops_per_image"]["total"] - kept["flops_per_image"]["total"]
    assert 0.2 < more / trained < 1 / 3


def test_memory_is_that_of_the_masks_that_need_most(capsys):
    found = run_json(capsys, "in1k-vitb16")
    model, _, run = parse_arguments(["in1k-vitb16"])
    config, images = model.to_config(), run.per_device_train_batch_size
    parameters = count_parameters(config)
    peaks = [
        estimate_memory(config, sizes, parameters, images, bf16=True).peak for sizes in draw_sizes(config, images)
    ]
    assert min(peaks) < max(peaks) == found["memory"]["peak"]


def test_the_length_of_a_run_is_that_of_its_plan_or_said_to_be_unknown(capsys):
    assert run_json(capsys, "digits")["run"]["steps"] == 40 * (1437 // 16)
    assert run_json(capsys, "digits", "--max_train_samples", "160")["run"]["steps"] == 400
    assert run_json(capsys, "in22k-vitg16")["run"]["steps"] is None
    assert run_json(capsys, "in22k-vitg16", "--num_images", "1600")["run"]["steps"] == 44 * 100
    stopped = run_json(capsys, "in22k-vitg16", "--max_train_steps", "10")
    assert (stopped["run"]["steps"], stopped["run"]["epochs"], stopped["run"]["images"]) == (10, None, 160)
    assert cli.main(["estimate", "in22k-vitg16"]) == 0
    assert "write --num_images" in capsys.readouterr().out
    assert cli.main(["estimate", "--hidden_size", "96"]) == 0  # no recipe, no images, no learning rate


def test_the_known_number_of_images_is_the_right_one():
    assert KNOWN_SIZES["digits"] == len(load_digits("train"))
    assert KNOWN_SIZES["shapes"] == SHAPES_SPLITS["train"][1]


def test_the_machine_at_hand_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "MEASURING_SECONDS", 0.0)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    found = run_json(capsys, "digits", "--hardware", "cpu", "--per_device_train_batch_size", "4")
    (row,) = found["hardware"]
    low, high = row["seconds_per_step_range"]
    assert 0 < low <= row["seconds_per_step"] <= high < 1
    assert row["utilization"] is None
    assert row["largest_batch"] > 1000
    assert cli.main(["estimate", "digits", "--hardware", "cpu", "--per_device_train_batch_size", "4"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_the_table_has_the_numbers_of_the_json_file(tmp_path, capsys):
    assert cli.main(["estimate", "in1k-vitl16", "--json", str(tmp_path / "vitl.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "vitl.json").read_text())
    arguments = parse_arguments(["in1k-vitl16"])
    assert found == json.loads(json.dumps(estimate_run(*arguments)))
    assert f"{found['parameters']['context_encoder']:,}" in text
    assert f"{found['hardware'][0]['hours']:,.0f}" in text
    assert all(name in text for name in HARDWARE)
    assert "has no bfloat16" in text
    assert max(map(len, text.splitlines())) < 120


def test_weights_to_start_from_give_the_model_where_they_are_on_this_disk(tmp_path, capsys):
    export_model(tiny_model(), tmp_path, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    found = run_json(capsys, "adapt", "--model_name_or_path", str(tmp_path))
    assert found["parameters"]["total"] == count_parameters(tiny_config()).total
    assert cli.main(["estimate", "adapt", "--model_name_or_path", "me/my-ijepa"]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digitz"], "Did you mean 'digits'"),
        (["digits", "--hardwar", "l4"], "did you mean '--hardware'"),
        (["digits", "--hardware", "H100"], "did you mean 'h100-sxm'"),
        (["digits", "--utilization", "35"], "must be in (0, 1]"),
        (["digits", "--utilization", "0.5", "--hardware", "cpu"], "which is measured"),
        (["digits", "--num_processes", "0"], "num_processes=0 must be at least 1"),
        (["digits", "--num_images", "0"], "num_images=0 must be at least 1"),
        (["digits", "--num_images", "3"], "3"),
        (["--hidden_size", "64", "digits"], "the recipe comes first: ijepa-hf estimate digits"),
        (["digits", "--json", "digits"], "must end in .json"),
        (["digits", "--json", "nowhere/x.json"], "there is no folder 'nowhere'"),
        (["digits", "--hidden_size", "65"], "hidden_size=65"),
        (
            ["digits", "--masking_strategy", "regions", "--regions_column_name", "x", "--context_keep_ratio", "0.25"],
            "--masking_strategy multi_block",
        ),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert cli.main(["estimate", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ijepa-hf estimate: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_flags_are_those_of_pretrain_and_its_own():
    flags = cli.command_flags()
    own = {"--hardware", "--utilization", "--num_processes", "--num_images", "--json"}
    assert flags["estimate"] == flags["pretrain"] | own


def test_a_run_that_is_estimated_can_be_run_with_the_same_flags(tmp_path, capsys):
    found = run_json(capsys, *tiny_flags(tmp_path / "run"))
    assert found["run"]["steps"] == 6
    assert not (tmp_path / "run").exists()
