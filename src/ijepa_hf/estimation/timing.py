"""Estimates how long a training step takes: on named hardware by its peak, on the machine at hand by real steps.

On named hardware that is FLOPs over a stated share of its peak, and the bytes of an update over its bandwidth. Here it
is measured on shallow models of the same widths, since the time of a step grows by the same amount with each block.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ijepa_hf.estimation.cost import draw_sizes, model_work
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.mask_audit import trial_masks
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.recipes.arguments import PretrainingArguments
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import set_up_model

MEASURING_ROUNDS = 4
SHALLOW, LESS_SHALLOW = 2, 4  # blocks of the models that are timed; 2, so that a first and a last one can differ
SECONDS_OF_A_STEP = 0.8  # at most, of a timed step; batches that would take longer are measured in part


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of an optimiser step.

    Args:
        seconds: The estimate.
        low: Lower quartile of the measured rounds; as `seconds` where nothing was measured.
        high: Upper quartile.
    """

    seconds: float
    low: float
    high: float


# -- named hardware --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """Describes an accelerator.

    Args:
        bf16: Peak of dense matrix products in bfloat16 with float32 sums, FLOP/s; `None` if it has no such units.
        fp32: Peak in float32 without TF32, which torch leaves off, FLOP/s.
        memory: Bytes.
        bandwidth: Of the memory, bytes/s.
    """

    bf16: float | None
    fp32: float
    memory: float
    bandwidth: float


# Sources: NVIDIA's data sheets of each (the sparse figures there are twice the dense ones here), for the RTX 4090 the
# white paper "NVIDIA Ada GPU architecture", appendix A. The T4's tensor cores know float16 only.
HARDWARE = {
    "a100-80gb": Hardware(312e12, 19.5e12, 80e9, 2039e9),
    "h100-sxm": Hardware(989e12, 67e12, 80e9, 3350e9),
    "h200-sxm": Hardware(989e12, 67e12, 141e9, 4800e9),
    "l4": Hardware(121e12, 30.3e12, 24e9, 300e9),
    "l40s": Hardware(362e12, 91.6e12, 48e9, 864e9),
    "rtx4090": Hardware(165.2e12, 82.6e12, 24e9, 1008e9),
    "t4": Hardware(None, 8.1e12, 16e9, 320e9),
}


def step_time_on(
    hardware: Hardware, flops: float, moved_bytes: float, *, bf16: bool, utilization: float
) -> StepTime | None:
    """Estimates the time of an optimiser step on named hardware.

    Args:
        hardware: From `HARDWARE`.
        flops: Of all images that one device works on in a step.
        moved_bytes: From `update_bytes`.
        bf16: Whether the run computes in bfloat16.
        utilization: Share of the peak, 0 to 1.

    Returns:
        The time, or `None` if the hardware has no bfloat16.
    """
    peak = hardware.bf16 if bf16 else hardware.fp32
    if peak is None:
        return None
    seconds = flops / (peak * utilization) + moved_bytes / hardware.bandwidth
    return StepTime(seconds, seconds, seconds)


# -- the machine at hand ---------------------------------------------------------------------------------------------


class _TimedModel:
    """Times steps of a shallow model, with its optimiser and a batch."""

    def __init__(
        self,
        config: IJepaConfig,
        run: PretrainingArguments,
        accelerator: Accelerator,
        micro_batches: list[dict[str, torch.Tensor]],
        attn_implementation: str | None,
    ) -> None:
        self.ready = set_up_model(new_model(config, run.seed), run, accelerator, attn_implementation)
        self.micro_batches = micro_batches
        self.values = StepValues(run.final_learning_rate, run.weight_decay, run.ema_momentum)

    def step(self) -> None:
        """Takes a training step."""
        self.ready.step(self.micro_batches, self.values)

    def _update(self) -> None:
        self.ready.optimizer.step()
        self.ready.model.update_target_encoder(self.values.ema_momentum)

    def _seconds(self, action: Callable[[], None]) -> float:
        begin = time.perf_counter()
        action()
        if self.ready.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def time(self) -> tuple[float, float]:
        """Returns the seconds of a step, and of its part that does not depend on the number of images."""
        return self._seconds(self.step), self._seconds(self._update)


def measure_step_time(
    config: IJepaConfig,
    run: PretrainingArguments,
    accelerator: Accelerator,
    *,
    attn_implementation: str | None = None,
    seconds: float,
) -> StepTime:
    """Measures how long an optimiser step takes here, without building the model.

    Models of the same widths and of 2 and 4 blocks take real training steps in turn; a step of the whole depth takes
    as much more as it has more blocks. Where a step takes long, it is measured with fewer images, and the part that
    grows with them is scaled. Networks of up to 4 blocks are measured themselves.

    Args:
        config: The model's.
        run: Batch, accumulation, checkpointing, optimiser.
        accelerator: Says device and precision.
        attn_implementation: As in the run.
        seconds: To go on for, at least, and for at least `MEASURING_ROUNDS` rounds.

    Returns:
        The time by the medians of all rounds, and the middle half of what single rounds say.
    """
    depth, narrow_depth = config.num_hidden_layers, config.predictor_num_hidden_layers
    low, narrow_low = min(SHALLOW, depth), min(SHALLOW, narrow_depth)
    high, narrow_high = min(LESS_SHALLOW, depth), min(LESS_SHALLOW, narrow_depth)

    def shallow(layers: int, narrow_layers: int, images: int) -> _TimedModel:
        changed = config.replace(num_hidden_layers=layers, predictor_num_hidden_layers=narrow_layers)
        inputs = {name: value[:images] for name, value in batch.items()}
        return _TimedModel(changed, run, accelerator, [inputs], attn_implementation)

    full = run.per_device_train_batch_size
    batch = _typical_batch(config, full, accelerator.device)
    probe = shallow(low, narrow_low, 1)
    probe.time()
    images = max(1, min(full, int(SECONDS_OF_A_STEP / probe.time()[0])))
    del probe
    corner = (low, narrow_low)
    models = {
        depths: shallow(*depths, images) for depths in dict.fromkeys([corner, (high, narrow_low), (low, narrow_high)])
    }
    # blocks beyond the shallowest model's, in units of what the others have more than it
    more = (depth - low) / (high - low) if high > low else 0.0
    narrow_more = (narrow_depth - narrow_low) / (narrow_high - narrow_low) if narrow_high > narrow_low else 0.0
    for model in models.values():
        model.time()  # caches, allocators and lazy initialisation
    micro_batches = full * run.gradient_accumulation_steps / images

    def whole(times: dict[tuple[int, int], tuple[float, float]]) -> float:
        """Seconds of a step of the whole model, from seconds of step and update of the shallow ones."""
        first, deeper, narrow_deeper = times[corner], times[high, narrow_low], times[low, narrow_high]
        step, update = (
            first[part] + more * (deeper[part] - first[part]) + narrow_more * (narrow_deeper[part] - first[part])
            for part in (0, 1)
        )
        return step + (micro_batches - 1) * (step - update)

    rounds: list[dict[tuple[int, int], tuple[float, float]]] = []
    begin = time.perf_counter()
    while len(rounds) < MEASURING_ROUNDS or time.perf_counter() - begin < seconds:
        rounds.append({depths: model.time() for depths, model in models.items()})
    # medians of each model, so that a disturbance of one of them in a round does not count many times
    medians = {
        depths: (
            statistics.median(times[depths][0] for times in rounds),
            statistics.median(times[depths][1] for times in rounds),
        )
        for depths in models
    }
    lower, _, upper = statistics.quantiles(map(whole, rounds), n=4, method="inclusive")
    middle = whole(medians)
    return StepTime(middle, min(lower, middle), max(upper, middle))


def _typical_batch(config: IJepaConfig, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Makes a batch of noise with the masks of the step whose work is nearest to the mean."""
    drawn = draw_sizes(config, batch_size)
    work = [sum(part.total for part in model_work(config, [sizes]).values()) for sizes in drawn]
    mean = statistics.mean(work)
    step = min(range(len(work)), key=lambda number: abs(work[number] - mean))
    masks = trial_masks(config.mask_settings(), batch_size)[step]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(batch_size, config.num_channels, *config.image_shape, generator=generator),
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }
    return {name: value.to(device) for name, value in inputs.items()}
