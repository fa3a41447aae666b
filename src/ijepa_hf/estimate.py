"""What a run will take, before it is started: parameters, FLOPs, memory, steps and hours.

Parameters are counted on the meta device, where weights have shapes and no numbers. FLOPs and bytes come from closed
formulas, one small function for each part of the model, over the sizes that masks are drawn with. Two kinds of time:
of hardware that is named, FLOPs over a stated share of its peak; of the machine at hand, measured on shallow models of
the same widths, since the time of a step grows by the same amount with each block.

What is not in it: reading images, talking between processes, evaluations, uploads.

Letters as in modeling_ijepa.py: N patches, K context patches, M target blocks of P patches, S context sets, widths D
and E.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import HfArgumentParser

from ijepa_hf.arguments import (
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    build_parser,
    load_recipe,
    parse_arguments,
    parse_flags,
)
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import keyed_generator
from ijepa_hf.export import write_atomically
from ijepa_hf.masking import draw_masks
from ijepa_hf.modeling_ijepa import IJepaForPretraining, enable_gradient_checkpointing, new_model
from ijepa_hf.plan import StepValues, make_plan
from ijepa_hf.training import make_optimizer, set_attention, training_step
from ijepa_hf.warm_start import open_starting_weights

DRAWS = 16  # steps whose masks are drawn, as many as a run draws to announce what its masks are like
DEFAULT_UTILIZATION = 0.35  # of the peak; docs/performance.md says what is known of it
MEASURING_SECONDS = 4.0  # at least, on the machine at hand
MEASURING_ROUNDS = 4
SHALLOW, LESS_SHALLOW = 2, 4  # blocks of the models that are timed; 2, so that a first and a last one can differ
SECONDS_OF_A_STEP = 0.8  # at most, of a timed step; batches that would take longer are measured in part
# Of a GPU's memory that no formula here is about: CUDA's own, and what the allocator cannot use.
RESERVED_BYTES, RESERVED_SHARE = 1e9, 0.05
CPU_SHARE = (
    0.7  # of a machine's memory: an allocator wastes up to a fifth (benchmarks/estimate_check.py), others want some
)

# Images of the training split of sets that are known by name; of others --num_images says it. Nothing is downloaded.
KNOWN_SIZES = {"digits": 1437, "shapes": 5000, "uoft-cs/cifar10": 50_000, "ILSVRC/imagenet-1k": 1_281_167}


@dataclass(frozen=True)
class Hardware:
    """An accelerator.

    Args:
        bf16: Peak of dense matrix products in bfloat16 with float32 sums, FLOP/s; `None` where it has no such units.
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
MEASURED = ("this", "cpu")  # the machine at hand; and its CPU, also where it has a GPU


# -- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What one image is cut into in one step.

    Args:
        patches: N.
        sets: S.
        context: K.
        blocks: M.
        target: P.
    """

    patches: int
    sets: int
    context: int
    blocks: int
    target: int


def draw_sizes(config: IJepaConfig, batch_size: int) -> list[Sizes]:
    """Draws masks as a run does and returns their sizes.

    Args:
        config: The model's, with its masks.
        batch_size: Images of a device's micro-batch, on which the context of `multi_block_official` depends.

    Returns:
        The sizes of `DRAWS` steps.

    Raises:
        ValueError: With masking_strategy `regions`, whose sizes are the data's.
    """
    if config.masking_strategy == "regions":
        raise ValueError(
            "masking_strategy='regions' takes the sizes of its masks from the data, which are not read here; estimate "
            "with --masking_strategy multi_block, and --num_target_blocks as many as an image has regions."
        )
    settings = config.mask_settings()
    found = []
    for step in range(DRAWS):
        masks = draw_masks(settings, batch_size, keyed_generator(step))
        context, (blocks, target) = masks.context_indices.shape[-1], masks.target_indices.shape[1:]
        found.append(Sizes(config.num_patches, config.num_context_sets, context, blocks, target))
    return found


# -- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Parameters of each part; the target encoder's are not trained."""

    context_encoder: int
    target_encoder: int
    predictor: int

    @property
    def trained(self) -> int:
        """Those that have gradients and an optimiser's state."""
        return self.context_encoder + self.predictor

    @property
    def total(self) -> int:
        """All."""
        return self.trained + self.target_encoder


def count_parameters(config: IJepaConfig) -> Parameters:
    """Counts the parameters of a model on the meta device; the fixed position tables are none.

    Args:
        config: The model's.

    Returns:
        The numbers.
    """
    with torch.device("meta"):
        model = IJepaForPretraining(config)
    parts = (model.context_encoder, model.target_encoder, model.predictor)
    return Parameters(*(sum(parameter.numel() for parameter in part.parameters()) for part in parts))


# -- FLOPs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """FLOPs of one image; a multiplication and an addition are two. Only matrix products count, as is usual.

    Args:
        forward: Of the forward pass.
        backward: Of the backward pass: as much for the gradient of the weights, and again for that of the input.
        recomputed: Of the forward passes that gradient checkpointing repeats.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> "Work":
        return Work(self.forward * times, self.backward * times, self.recomputed * times)


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of a linear layer on some rows, forward."""
    return 2 * rows * inputs * outputs


def block_flops(rows: int, width: int, intermediate: int, *, outputs: int | None = None) -> int:
    """FLOPs of a transformer block, forward.

    Args:
        rows: That attend to each other.
        width: Of the rows.
        intermediate: Of the MLP.
        outputs: Rows that come out, in a last block that spares the MLP on the others; all if not given.

    Returns:
        Queries, keys, values and output; scores and weighted sum; both layers of the MLP.
    """
    attention = 4 * linear_flops(rows, width, width) + 4 * rows * rows * width
    return attention + 2 * linear_flops(rows if outputs is None else outputs, width, intermediate)


def _trained_blocks(
    count: int, rows: int, width: int, intermediate: int, *, outputs: int | None = None, checkpointing: bool
) -> Work:
    """A stack of blocks; `outputs` is about the last one."""
    forward = repeated = 0
    for come_out, times in ((rows, count - 1), (rows if outputs is None else outputs, 1)):
        block = block_flops(rows, width, intermediate, outputs=come_out)
        forward += times * block
        # torch ends the repetition when it has what the backward pass needs: before the MLP's second layer
        repeated += times * (block - linear_flops(come_out, intermediate, width))
    return Work(forward, 2 * forward, repeated if checkpointing else 0)


def _patch_flops(config: IJepaConfig, patches: int) -> int:
    return linear_flops(patches, config.num_channels * math.prod(config.patch_shape), config.hidden_size)


def target_encoder_work(config: IJepaConfig, sizes: Sizes) -> Work:
    """FLOPs of the target encoder: the full image, without a backward pass.

    Args:
        config: The model's.
        sizes: Of its masks.

    Returns:
        The work; the last block's MLP sees the targets only, where those are fewer than all patches.
    """
    width, intermediate = config.hidden_size, config.intermediate_size
    blocks = (config.num_hidden_layers - 1) * block_flops(sizes.patches, width, intermediate)
    targets = min(sizes.blocks * sizes.target, sizes.patches)  # blocks overlap
    last = block_flops(sizes.patches, width, intermediate, outputs=targets)
    return Work(_patch_flops(config, sizes.patches) + blocks + last)


def context_encoder_work(config: IJepaConfig, sizes: Sizes, *, checkpointing: bool = False) -> Work:
    """FLOPs of the context encoder: K patches of each context set, from their pixels on.

    Args:
        config: The model's.
        sizes: Of its masks.
        checkpointing: Whether blocks are computed again in the backward pass.

    Returns:
        The work. Nobody needs a gradient of the pixels: backwards, the patch embedding takes as long as forwards.
    """
    patches = _patch_flops(config, sizes.context)
    blocks = _trained_blocks(
        config.num_hidden_layers,
        sizes.context,
        config.hidden_size,
        config.intermediate_size,
        checkpointing=checkpointing,
    )
    return (Work(patches, patches) + blocks) * sizes.sets


def predictor_work(config: IJepaConfig, sizes: Sizes, *, checkpointing: bool = False) -> Work:
    """FLOPs of the predictor: each target block by itself, with the whole context: K + P rows.

    Args:
        config: The model's.
        sizes: Of its masks.
        checkpointing: Whether blocks are computed again in the backward pass.

    Returns:
        The work of all context sets and target blocks; the last layer's MLP sees the target's rows only.
    """
    width = config.predictor_hidden_size
    embed = linear_flops(sizes.context, config.hidden_size, width)
    project = linear_flops(sizes.target, width, config.hidden_size)
    layers = _trained_blocks(
        config.predictor_num_hidden_layers,
        sizes.context + sizes.target,
        width,
        4 * width,
        outputs=sizes.target,
        checkpointing=checkpointing,
    )
    return (Work(embed, 2 * embed) + (Work(project, 2 * project) + layers) * sizes.blocks) * sizes.sets


def model_work(config: IJepaConfig, drawn: Sequence[Sizes], *, checkpointing: bool = False) -> dict[str, Work]:
    """FLOPs of one image by part, the mean over draws of its masks.

    Args:
        config: The model's.
        drawn: From `draw_sizes`.
        checkpointing: As in a run's `gradient_checkpointing`.

    Returns:
        `context_encoder`, `predictor` and `target_encoder`.
    """
    parts: dict[str, Callable[[Sizes], Work]] = {
        "context_encoder": lambda sizes: context_encoder_work(config, sizes, checkpointing=checkpointing),
        "predictor": lambda sizes: predictor_work(config, sizes, checkpointing=checkpointing),
        "target_encoder": lambda sizes: target_encoder_work(config, sizes),
    }
    return {name: sum((part(sizes) for sizes in drawn), Work(0.0)) * (1 / len(drawn)) for name, part in parts.items()}


def update_bytes(parameters: Parameters) -> int:
    """Bytes that move once per optimiser step: AdamW reads weight, gradient and both moments and writes all but the
    gradient; the clipping norm reads gradients; the moving average reads two weights and writes one.
    """  # noqa: D205
    return 4 * (8 * parameters.trained + 3 * parameters.target_encoder)


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds at the fullest moment of a step.

    Args:
        weights: float32, of both encoders and the predictor.
        optimizer: AdamW's two moments.
        gradients: float32, of what is trained; not all of them are there while activations are.
        weight_copies: bfloat16 copies of the trained weights, which the backward pass needs.
        buckets: What processes exchange gradients in.
        batch: Pixels and indices of a micro-batch.
        activations: Kept for the backward pass, of a micro-batch.
        working: Beside them, at the fullest moment.
        peak: At that moment; less than the sum, because not everything is there at once.
    """

    weights: float
    optimizer: float
    gradients: float
    weight_copies: float
    buckets: float
    batch: float
    activations: float
    working: float
    peak: float


def _block_bytes(
    rows: int,
    length: int,
    width: int,
    intermediate: int,
    heads: int,
    kind: str,
    *,
    outputs: int | None = None,
    eager: bool = False,
) -> int:
    """What one block keeps of some rows, in sequences of some length, for its backward pass.

    The half that attends: the norm's input and output, queries, keys, values, and what attention gives (6 widths).
    The half with the MLP: the norm's input and output, the activation's input and output (2 widths, 2 MLP widths).
    Per row also two moments of each norm and a log-sum of each head, or with eager attention all its weights. In
    bfloat16 a CPU keeps the same in half the bytes; on a GPU norms are computed in float32 from a copy, and the first
    one's output is cast for queries, keys and values one by one.
    """
    element = 4 if kind == "fp32" else 2
    attends, has_mlp = 6 * element * width, element * (2 * width + 2 * intermediate)
    if kind == "bf16_cuda":  # copies for the norms instead of their inputs; three casts instead of one output
        attends, has_mlp = attends + 2 * width + 2 * 2 * width, has_mlp + 2 * width
    come_out = rows if outputs is None else outputs
    picked = 0 if outputs is None else element * rows * width  # what the rows that come out are picked from
    # of eager attention, weights in float32, and their copy in bfloat16
    scores = heads * length * (4 if kind == "fp32" else 6) if eager else 4 * heads
    return rows * (attends + scores + 8) + picked + come_out * (has_mlp + 8)


def estimate_memory(
    config: IJepaConfig,
    sizes: Sizes,
    parameters: Parameters,
    batch_size: int,
    *,
    bf16: bool = False,
    on_cpu: bool = False,
    checkpointing: bool = False,
    selective: bool = False,
    eager: bool = False,
    accumulates: bool = False,
    is_distributed: bool = False,
) -> Memory:
    """Works out what a process holds.

    Args:
        config: The model's.
        sizes: Of the masks.
        parameters: From `count_parameters`.
        batch_size: Images of a micro-batch on one device.
        bf16: Whether the run computes in bfloat16 (weights stay float32).
        on_cpu: Whether on a CPU, which keeps less in bfloat16.
        checkpointing: Whether blocks keep their input only.
        selective: Whether they keep that and what products and attention gave.
        eager: Whether attention is eager, which keeps its weights, else fused.
        accumulates: Whether there are several micro-batches a step, so that gradients wait.
        is_distributed: Whether gradients are exchanged with other processes.

    Returns:
        The bytes.
    """
    element = 2 if bf16 else 4
    kind = ("bf16_cpu" if on_cpu else "bf16_cuda") if bf16 else "fp32"
    width, hidden, narrow = config.hidden_size, config.intermediate_size, config.predictor_hidden_size
    heads, narrow_heads = (
        config.num_attention_heads,
        config.predictor_num_attention_heads or config.num_attention_heads,
    )
    rows, narrow_rows = sizes.sets * sizes.context, sizes.sets * sizes.blocks * (sizes.context + sizes.target)
    predicted = sizes.sets * sizes.blocks * sizes.target

    # one image: what blocks keep, and what is there while one of them is worked on backwards
    length, narrow_hidden = sizes.context + sizes.target, 4 * narrow
    block = _block_bytes(rows, sizes.context, width, hidden, heads, kind, eager=eager)
    of_narrow = (narrow_rows, length, narrow, narrow_hidden, narrow_heads, kind)
    narrow_block = _block_bytes(*of_narrow, eager=eager)
    narrow_last = _block_bytes(*of_narrow, outputs=predicted, eager=eager)
    depth, narrow_others = config.num_hidden_layers, config.predictor_num_hidden_layers - 1
    kept, narrow_kept = depth * block, narrow_others * narrow_block + narrow_last
    working = element * rows * (hidden + 2 * width)  # gradients; what they replace is given back meanwhile
    narrow_working = element * predicted * (narrow_hidden + 2 * narrow)  # of the last block, which goes first
    if checkpointing or selective:  # one block at a time has all that is its own again
        kept = element * depth * rows * width
        narrow_kept = element * (narrow_others + 1) * narrow_rows * narrow
        working += block - element * rows * width
        narrow_working = narrow_block + element * narrow_rows * (narrow_hidden + narrow)
    if selective:  # besides inputs: queries, keys, values, what attention gave, its projection, the MLP's inner rows
        products, narrow_products = 5 * element * width + 4 * heads, 5 * element * narrow + 4 * narrow_heads
        kept += depth * rows * (products + element * hidden)
        narrow_kept += (narrow_others + 1) * narrow_rows * narrow_products
        narrow_kept += element * narrow_hidden * (narrow_others * narrow_rows + predicted)
        working -= rows * (products + element * hidden)
        narrow_working -= narrow_rows * (narrow_products + element * narrow_hidden)
    full_working = element * sizes.patches * (2 * hidden + 2 * width)  # of the target encoder
    # beside the blocks: visible pixels and the last norm; the predictor's norm and output; what the loss compares
    pixels = config.num_channels * math.prod(config.image_shape)
    beside = element * rows * (pixels // sizes.patches + 2 * width)
    narrow_beside = element * 2 * predicted * narrow
    loss = 4 * width * (predicted + sizes.blocks * sizes.target)
    images = 4 * pixels + 8 * (rows + sizes.blocks * sizes.target)

    encoder = batch_size * (kept + beside)
    predictor = batch_size * (narrow_kept + narrow_beside + loss)
    gradients = 4 * parameters.trained
    waiting = gradients if accumulates else 0
    # the moments at which it may be fullest: targets; the backward pass begins; it is through the predictor; it ends
    moments = [
        (waiting, 0, batch_size * full_working),
        (waiting, encoder + predictor, batch_size * narrow_working),
        (waiting, encoder, batch_size * working),  # the predictor's gradients are small beside its activations
        (gradients, 0, 0),
    ]
    always = {
        "weights": 4 * parameters.total,
        "optimizer": 8 * parameters.trained,
        "weight_copies": 2 * parameters.trained if bf16 else 0,
        "buckets": gradients if is_distributed else 0,
        "batch": batch_size * images,
    }
    fullest = max(moments, key=sum)
    return Memory(
        **always,
        gradients=gradients,
        activations=encoder + predictor,
        working=fullest[2],
        peak=sum(always.values()) + sum(fullest),
    )


def largest_batch(peak: Callable[[int], float], memory: float) -> int:
    """The most images whose peak fits.

    Args:
        peak: Bytes for a number of images; grows with it.
        memory: Bytes there are.

    Returns:
        0 where not even one image fits.
    """
    fits, too_many = 0, 1
    while peak(too_many) <= memory:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if peak(middle) <= memory else (fits, middle)
    return fits


# -- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step.

    Args:
        seconds: The estimate.
        low: Quarter of the measured rounds that are below; as `seconds` where nothing was measured.
        high: Likewise, above.
    """

    seconds: float
    low: float
    high: float


def step_time_on(
    hardware: Hardware, flops: float, moved_bytes: float, *, bf16: bool, utilization: float
) -> StepTime | None:
    """The time of an optimiser step on named hardware.

    Args:
        hardware: From `HARDWARE`.
        flops: Of all images that one device works on in a step.
        moved_bytes: From `update_bytes`.
        bf16: Whether the run computes in bfloat16.
        utilization: Share of the peak, 0 to 1.

    Returns:
        The time, or `None` where the hardware has no bfloat16.
    """
    peak = hardware.bf16 if bf16 else hardware.fp32
    if peak is None:
        return None
    seconds = flops / (peak * utilization) + moved_bytes / hardware.bandwidth
    return StepTime(seconds, seconds, seconds)


class _TimedModel:
    """A model of some depth, with its optimiser and a batch, whose steps are timed."""

    def __init__(
        self,
        config: IJepaConfig,
        run: PretrainingArguments,
        accelerator: Accelerator,
        micro_batches: list[dict[str, torch.Tensor]],
        attn_implementation: str | None,
    ) -> None:
        self.model = new_model(config, run.seed)
        set_attention(self.model, attn_implementation, accelerator)
        if run.gradient_checkpointing or run.selective_checkpointing:
            enable_gradient_checkpointing(self.model, selective=run.selective_checkpointing)
        self.optimizer = make_optimizer(self.model, run)
        self.prepared = accelerator.prepare(self.model)
        self.model.train()
        self.accelerator, self.micro_batches, self.max_grad_norm = accelerator, micro_batches, run.max_grad_norm
        self.values = StepValues(run.final_learning_rate, run.weight_decay, run.ema_momentum)

    def step(self) -> None:
        """Takes a training step."""
        training_step(
            self.accelerator,
            self.prepared,
            self.model,
            self.optimizer,
            self.micro_batches,
            self.values,
            max_grad_norm=self.max_grad_norm,
        )

    def _update(self) -> None:
        self.optimizer.step()
        self.model.update_target_encoder(self.values.ema_momentum)

    def _seconds(self, action: Callable[[], None]) -> float:
        begin = time.perf_counter()
        action()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def time(self) -> tuple[float, float]:
        """Seconds of a step, and of what in a step does not depend on the number of images."""
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
    """Noise as pixels, and the masks of the step whose work is nearest to the mean."""
    drawn = draw_sizes(config, batch_size)
    work = [sum(part.total for part in model_work(config, [sizes]).values()) for sizes in drawn]
    mean = statistics.mean(work)
    step = min(range(DRAWS), key=lambda number: abs(work[number] - mean))
    masks = draw_masks(config.mask_settings(), batch_size, keyed_generator(step))
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(batch_size, config.num_channels, *config.image_shape, generator=generator),
        "context_indices": masks.context_indices,
        "target_indices": masks.target_indices,
    }
    return {name: value.to(device) for name, value in inputs.items()}


# -- the command -----------------------------------------------------------------------------------------------------


def build_estimate_parser() -> HfArgumentParser:
    """Returns the parser of `ijepa-hf estimate`: its own flags, and all of `ijepa-hf pretrain`."""
    parser = build_parser("ijepa-hf estimate")
    parser.description = (
        "Say what a run takes: parameters, FLOPs, memory, steps and hours. Flags as for pretrain, and:"
    )
    _add_flags(parser.add_argument_group("of estimate alone"))
    return parser


def _add_flags(parser: Any) -> None:
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"{', '.join(HARDWARE)}; this: the machine at hand, measured in seconds; cpu: its CPU. All but the last "
        "two if not given.",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        help=f"Share of named hardware's peak that is reached, 0 to 1; {DEFAULT_UTILIZATION} if not given.",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="Devices that share a step.")
    parser.add_argument("--num_images", type=int, help="Images of the data set, which is not opened.")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="Also write it as JSON; without a name, on the screen."
    )


def estimate(argv: Sequence[str]) -> str:
    """Says what a run takes.

    Args:
        argv: What follows `ijepa-hf estimate`: a recipe, flags of `ijepa-hf pretrain`, and those of its own.

    Returns:
        What to print: a table, or JSON.

    Raises:
        ValueError: If a flag or value is bad, masks come from the data, or weights to start from are not on this disk.
        FileNotFoundError: If the recipe, or the folder of a JSON file, does not exist.
    """
    named, arguments = _parse(argv)
    found = estimate_run(
        *arguments,
        hardware=named.hardware,
        utilization=named.utilization,
        num_processes=named.num_processes,
        num_images=named.num_images,
    )
    text = json.dumps(found, indent=2) + "\n"
    if named.json == "-":
        return text.rstrip("\n")
    if named.json is not None:
        write_atomically(Path(named.json), lambda partial: partial.write_text(text, encoding="utf-8"))
    return render_estimate(found)


def estimate_run(
    model_arguments: ModelArguments,
    data: DataArguments,
    run: PretrainingArguments,
    *,
    hardware: str | None = None,
    utilization: float | None = None,
    num_processes: int = 1,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Works out what a run takes.

    Args:
        model_arguments: The model.
        data: Names the images, which are not opened.
        run: Everything else.
        hardware: A key of `HARDWARE`, `this` or `cpu`; all of `HARDWARE` if not given.
        utilization: Share of the peak of named hardware, 0 to 1.
        num_processes: Devices.
        num_images: Of the data set; the known number of a known set if not given.

    Returns:
        `masks`, `parameters`, `flops_per_image`, `run`, `memory` and `hardware`, of numbers, as in the JSON file.
        Lengths of time are seconds and hours, memory is bytes; what is not known is `None`.

    Raises:
        ValueError: As `estimate`.
    """
    _check(hardware, utilization, num_processes, num_images)
    config = _config(model_arguments, run)
    drawn = draw_sizes(config, run.per_device_train_batch_size)
    parameters = count_parameters(config)
    work = model_work(config, drawn, checkpointing=run.gradient_checkpointing)
    flops = sum(part.total for part in work.values())
    length = _length(data, run, num_processes, num_images)
    accelerator = None
    if hardware in MEASURED:
        if run.num_cpu_threads is not None:
            torch.set_num_threads(run.num_cpu_threads)
        accelerator = Accelerator(mixed_precision=run.mixed_precision, cpu=hardware == "cpu")
    on_cpu = accelerator is not None and accelerator.device.type == "cpu"
    attention = model_arguments.attn_implementation
    eager = attention == "eager" or (attention is None and on_cpu and run.mixed_precision == "bf16")  # set_attention

    def memory(images: int) -> Memory:
        """Of the masks that need most."""
        found = (
            estimate_memory(
                config,
                sizes,
                parameters,
                images,
                bf16=run.mixed_precision == "bf16",
                on_cpu=on_cpu,
                checkpointing=run.gradient_checkpointing,
                selective=run.selective_checkpointing,
                eager=eager,
                accumulates=run.gradient_accumulation_steps > 1,
                is_distributed=num_processes > 1,
            )
            for sizes in drawn
        )
        return max(found, key=lambda one: one.peak)

    images_of_device = run.per_device_train_batch_size * run.gradient_accumulation_steps
    rows = []
    for name in [hardware] if hardware is not None else list(HARDWARE):
        share: float | None = None
        if accelerator is not None:
            time_of_step: StepTime | None = measure_step_time(
                config,
                run,
                accelerator,
                attn_implementation=model_arguments.attn_implementation,
                seconds=MEASURING_SECONDS,
            )
            total_memory = _memory_here(accelerator.device)
        else:
            share = DEFAULT_UTILIZATION if utilization is None else utilization
            kind = HARDWARE[name]
            total_memory = kind.memory
            time_of_step = step_time_on(
                kind,
                flops * images_of_device,
                update_bytes(parameters),
                bf16=run.mixed_precision == "bf16",
                utilization=share,
            )
        usable = CPU_SHARE * total_memory if on_cpu else (1 - RESERVED_SHARE) * total_memory - RESERVED_BYTES
        rows.append(
            {
                "name": name,
                "utilization": share,
                "memory_bytes": total_memory,
                "largest_batch": largest_batch(lambda images: memory(images).peak, usable),
                **_times(time_of_step, length, flops * images_of_device),
            }
        )
    contexts, targets = [sizes.context for sizes in drawn], [sizes.target for sizes in drawn]
    return {
        "masks": {
            "patches": config.num_patches,
            "grid": list(config.grid_size),
            "context_sets": config.num_context_sets,
            "context_patches": statistics.mean(contexts),
            "context_patches_range": [min(contexts), max(contexts)],
            "target_blocks": drawn[0].blocks,
            "target_patches": statistics.mean(targets),
            "target_patches_range": [min(targets), max(targets)],
        },
        "parameters": {
            **dataclasses.asdict(parameters),
            "trained": parameters.trained,
            "total": parameters.total,
        },
        "flops_per_image": {**{name: dataclasses.asdict(part) for name, part in work.items()}, "total": flops},
        "run": {
            "per_device_train_batch_size": run.per_device_train_batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "num_processes": num_processes,
            "mixed_precision": run.mixed_precision,
            "gradient_checkpointing": run.gradient_checkpointing,
            "selective_checkpointing": run.selective_checkpointing,
            **dataclasses.asdict(length),
            "flops": None if length.images is None else flops * length.images,
        },
        "memory": dataclasses.asdict(memory(run.per_device_train_batch_size)),
        "hardware": rows,
    }


def render_estimate(found: dict[str, Any]) -> str:
    """The numbers of `estimate_run` as text.

    Args:
        found: From `estimate_run`.

    Returns:
        Several lines.
    """
    masks, run, memory = found["masks"], found["run"], found["memory"]
    sets = f"{masks['context_sets']} x " if masks["context_sets"] > 1 else ""
    context, target = (
        f"{masks[name]:.0f} ({masks[f'{name}_range'][0]}-{masks[f'{name}_range'][1]})"
        for name in ("context_patches", "target_patches")
    )
    lines = [
        f"masks      {sets}{context} context patches of {masks['grid'][0]}x{masks['grid'][1]}, "
        f"{masks['target_blocks']} targets of {target}",
        f"batch      {run['global_batch_size']} images a step = {run['per_device_train_batch_size']} x "
        f"{run['gradient_accumulation_steps']} micro-batches x {run['num_processes']} processes",
        _length_line(run),
        "",
        f"{'':<18}{'parameters':>15}{'GFLOP an image:':>18}{'forward':>10}{'backward':>10}{'recomputed':>12}",
    ]
    for name in ("context_encoder", "predictor", "target_encoder"):
        part = found["flops_per_image"][name]
        figures = [part["forward"], part["backward"], part["recomputed"]]
        lines.append(
            f"{name.replace('_', ' '):<18}{found['parameters'][name]:>15,}{sum(figures) / 1e9:>18.4g}"
            + "".join(f"{figure / 1e9:>{size}.4g}" for figure, size in zip(figures, (10, 10, 12), strict=True))
        )
    lines += [
        f"{'together':<18}{found['parameters']['total']:>15,}{found['flops_per_image']['total'] / 1e9:>18.4g}",
        f"{'trained':<18}{found['parameters']['trained']:>15,}",
        "",
        f"memory of a process, micro-batches of {run['per_device_train_batch_size']} images, not all of it at once",
    ]
    for name, title in (
        ("weights", "weights, float32"),
        ("weight_copies", "their bfloat16 copies"),
        ("optimizer", "AdamW's moments"),
        ("gradients", "gradients"),
        ("buckets", "exchange buckets"),
        ("activations", "activations"),
        ("working", "beside them"),
        ("batch", "batch"),
        ("peak", "at the peak"),
    ):
        if memory[name]:
            lines.append(f"  {title:<24}{_bytes(memory[name]):>10}")
    lines += ["", f"{'hardware':<18}{'largest batch':>15}{'seconds a step':>18}{'images/s':>10}{'hours':>10}"]
    for row in found["hardware"]:
        if row["seconds_per_step"] is None:
            lines.append(f"{row['name']:<18}{row['largest_batch']:>15}   has no bfloat16: --mixed_precision no")
            continue
        hours = "" if row["hours"] is None else f"{row['hours']:,.{0 if row['hours'] >= 100 else 2}f}"
        speed = f"{row['images_per_second']:,.0f}"
        line = f"{row['name']:<18}{row['largest_batch']:>15}{row['seconds_per_step']:>18.3g}{speed:>10}{hours:>10}"
        if row["utilization"] is None:
            low, high = row["seconds_per_step_range"]
            line += f"   ({low:.3g}-{high:.3g} s, {row['flops_per_second'] / 1e9:.3g} GFLOP/s)"
        lines.append(line)
    shares = {row["utilization"] for row in found["hardware"]} - {None}
    basis = f"at {100 * shares.pop():.3g} % of the peak, an assumption (--utilization)" if shares else "measured here"
    return "\n".join([*lines, "", f"{basis}; without reading images, exchange between processes, evaluations."])


def _length_line(run: dict[str, Any]) -> str:
    if run["steps"] is None:
        return "length     not known, since the number of images is not: write --num_images"
    epochs = "" if run["epochs"] is None else f", {run['epochs']:.4g} epochs"
    return f"length     {run['steps']:,} steps{epochs}, {run['images']:,} images, {run['flops']:.3g} FLOP"


@dataclass(frozen=True)
class _Length:
    global_batch_size: int
    steps: int | None
    epochs: float | None
    images: int | None


def _length(data: DataArguments, run: PretrainingArguments, num_processes: int, num_images: int | None) -> _Length:
    """How long the run is, as far as that is known without its images."""
    if num_images is None and data.train_split_name == "train":
        num_images = KNOWN_SIZES.get(str(data.dataset_name))
    if data.max_train_samples is not None:
        num_images = min(num_images or data.max_train_samples, data.max_train_samples)
    batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * num_processes
    if num_images is not None:
        plan = make_plan(run, num_images, num_processes)
        return _Length(batch, plan.num_steps, plan.num_steps / plan.steps_per_epoch, plan.num_steps * batch)
    steps = run.max_train_steps
    return _Length(batch, steps, None, None if steps is None else steps * batch)


def _times(time_of_step: StepTime | None, length: _Length, flops: float) -> dict[str, Any]:
    if time_of_step is None:
        names = ("seconds_per_step", "seconds_per_step_range", "images_per_second", "flops_per_second", "hours")
        return dict.fromkeys(names)
    seconds = time_of_step.seconds
    return {
        "seconds_per_step": seconds,
        "seconds_per_step_range": [time_of_step.low, time_of_step.high],
        "images_per_second": length.global_batch_size / seconds,
        "flops_per_second": flops / seconds,
        "hours": None if length.steps is None else length.steps * seconds / 3600,
    }


def _bytes(number: float) -> str:
    unit, size = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
    return f"{number / size:,.3g} {unit}" if number < 1e12 else f"{number / size:,.0f} {unit}"


def _memory_here(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _config(model_arguments: ModelArguments, run: PretrainingArguments) -> IJepaConfig:
    if run.model_name_or_path is None:
        return model_arguments.to_config()
    if not Path(run.model_name_or_path).exists():
        raise ValueError(
            f"model_name_or_path={run.model_name_or_path!r} is not on this disk, and nothing is downloaded for an "
            "estimate; name a folder or file, or leave it out and give the model's sizes (--hidden_size, ...)."
        )
    heads = model_arguments.num_attention_heads if "num_attention_heads" in model_arguments.given else None
    return model_arguments.to_config(open_starting_weights(run.model_name_or_path, num_attention_heads=heads).config)


def _parse(
    argv: Sequence[str],
) -> tuple[argparse.Namespace, tuple[ModelArguments, DataArguments, PretrainingArguments]]:
    """Flags of its own, and the arguments of the run; images need no name here."""
    named = parse_flags(build_estimate_parser(), argv)
    own = argparse.ArgumentParser(prog="ijepa-hf estimate", add_help=False, allow_abbrev=False)
    _add_flags(own)
    rest = own.parse_known_args(argv)[1]
    if named.recipe is not None and rest[0] != named.recipe:
        raise ValueError(
            f"{named.recipe!r} stands after a flag; the recipe comes first: ijepa-hf estimate {named.recipe} ..."
        )
    if named.json not in (None, "-"):
        path = Path(named.json)
        if path.suffix != ".json":
            raise ValueError(f"json={named.json!r} must end in .json, for example --json estimate.json.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"json={named.json!r}: there is no folder {str(path.parent)!r}; make it first.")
    recipe = {} if named.recipe is None else load_recipe(named.recipe)
    if named.dataset_name is None and recipe.get("dataset_name") is None:
        rest += ["--dataset_name", "not named"]
    if all(value is None for value in (named.learning_rate, named.base_learning_rate)) and not (
        recipe.keys() & {"learning_rate", "base_learning_rate"}
    ):
        rest += ["--learning_rate", "0"]
    return named, parse_arguments(rest)


def _check(hardware: str | None, utilization: float | None, num_processes: int, num_images: int | None) -> None:
    names = [*HARDWARE, *MEASURED]
    if hardware is not None and hardware not in names:
        nearest = difflib.get_close_matches(hardware.lower(), names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"hardware={hardware!r} must be one of {', '.join(names)}{hint}")
    if utilization is not None:
        if not 0.0 < utilization <= 1.0:
            raise ValueError(f"utilization={utilization} must be in (0, 1]; {DEFAULT_UTILIZATION} if not given.")
        if hardware in MEASURED:
            raise ValueError(f"utilization={utilization} is not used with hardware={hardware!r}, which is measured.")
    for name, value in (("num_processes", num_processes), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
