"""The time of a step: named hardware by hand, the measurement with a made-up clockwork in place of models."""

from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from tiny import sizes_of, tiny_config

from ijepa_hf.estimation import timing
from ijepa_hf.estimation.cost import draw_sizes, model_work
from ijepa_hf.estimation.timing import HARDWARE, Hardware, StepTime, measure_step_time, step_time_on
from ijepa_hf.recipes.arguments import PretrainingArguments


def test_time_on_named_hardware_is_flops_over_the_reached_peak_and_bytes_over_the_bandwidth():
    hardware = Hardware(bf16=100e12, fp32=20e12, memory=1e9, bandwidth=1e12)
    assert step_time_on(hardware, 50e12, 2e12, bf16=True, utilization=0.5) == StepTime(3.0, 3.0, 3.0)
    assert step_time_on(hardware, 50e12, 2e12, bf16=False, utilization=0.5).seconds == pytest.approx(7.0)
    assert step_time_on(HARDWARE["t4"], 1e12, 0, bf16=True, utilization=0.5) is None


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
    monkeypatch.setattr(timing, "_TimedModel", Clockwork)
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
    batch = timing._typical_batch(config, 8, torch.device("cpu"))
    assert batch["pixel_values"].shape == (8, 3, 32, 32)
    work = [sum(part.total for part in model_work(config, [sizes]).values()) for sizes in draw_sizes(config, 8)]
    mean = sum(work) / len(work)
    chosen = sum(part.total for part in model_work(config, [sizes_of(config, batch)]).values())
    assert abs(chosen - mean) == min(abs(one - mean) for one in work)
