"""What a training step costs, by formula: sizes of masks, parameters, FLOPs, bytes that it holds, the largest batch.

Parameters are counted on the meta device, where weights have shapes and no numbers. FLOPs and bytes come from closed
formulas, one small function for each part of the model, over the sizes that masks are drawn with. Nothing here takes a
step or reads a clock.

Letters as in modeling_ijepa.py: N patches, K context patches, M target blocks of P patches, S context sets, widths D
and E.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.mask_audit import trial_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining

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
        The sizes of each step of `mask_audit.trial_masks`.
    """
    found = []
    for masks in trial_masks(config.mask_settings(), batch_size):
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


def meta_model(config: IJepaConfig) -> IJepaForPretraining:
    """A model on the meta device: shapes without numbers, at no cost."""
    with torch.device("meta"):
        return IJepaForPretraining(config)


def count_parameters(config: IJepaConfig) -> Parameters:
    """Counts the parameters of a model on the meta device; the fixed position tables are none.

    Args:
        config: The model's.

    Returns:
        The numbers.
    """
    model = meta_model(config)
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
    return linear_flops(patches, config.pixels_per_patch, config.hidden_size)


def target_encoder_work(config: IJepaConfig, sizes: Sizes) -> Work:
    """FLOPs of the target encoder: the full image, without a backward pass.

    Args:
        config: The model's.
        sizes: Of its masks.

    Returns:
        The work; the last block's MLP sees the targets only, where those are fewer than all patches. None where
        pixels are predicted.
    """
    if config.target_type == "pixels":
        return Work(0)
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
    project = linear_flops(sizes.target, width, config.target_size)
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
    *,
    bf16: bool,
    outputs: int | None = None,
    eager: bool = False,
) -> int:
    """What one block keeps of some rows, in sequences of some length, for its backward pass.

    The half that attends: the norm's input and output, queries, keys, values, and what attention gives (6 widths).
    The half with the MLP: the norm's input and output, the activation's input and output (2 widths, 2 MLP widths).
    Per row also two moments of each norm and a log-sum of each head, or with eager attention all its weights. In
    bfloat16 all take half the bytes but the norms' inputs, the sums that go from block to block.
    """
    element = 2 if bf16 else 4
    attends, has_mlp = 4 * width + 5 * element * width, 4 * width + element * (width + 2 * intermediate)
    come_out = rows if outputs is None else outputs
    picked = 0 if outputs is None else 4 * rows * width  # what the rows that come out are picked from
    # of eager attention, weights in float32, and their copy in bfloat16
    scores = heads * length * (6 if bf16 else 4) if eager else 4 * heads
    return rows * (attends + scores + 8) + picked + come_out * (has_mlp + 8)


def estimate_memory(
    config: IJepaConfig,
    sizes: Sizes,
    parameters: Parameters,
    batch_size: int,
    *,
    bf16: bool = False,
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
        checkpointing: Whether blocks keep their input only.
        selective: Whether they keep that and what products and attention gave.
        eager: Whether attention is eager, which keeps its weights, else fused.
        accumulates: Whether there are several micro-batches a step, so that gradients wait.
        is_distributed: Whether gradients are exchanged with other processes.

    Returns:
        The bytes.
    """
    element = 2 if bf16 else 4
    width, hidden, narrow = config.hidden_size, config.intermediate_size, config.predictor_hidden_size
    heads, narrow_heads = (
        config.num_attention_heads,
        config.predictor_num_attention_heads or config.num_attention_heads,
    )
    rows, narrow_rows = sizes.sets * sizes.context, sizes.sets * sizes.blocks * (sizes.context + sizes.target)
    predicted = sizes.sets * sizes.blocks * sizes.target

    # one image: what blocks keep, and what is there while one of them is worked on backwards
    length, narrow_hidden = sizes.context + sizes.target, 4 * narrow
    block = _block_bytes(rows, sizes.context, width, hidden, heads, bf16=bf16, eager=eager)
    of_narrow = (narrow_rows, length, narrow, narrow_hidden, narrow_heads)
    narrow_block = _block_bytes(*of_narrow, bf16=bf16, eager=eager)
    narrow_last = _block_bytes(*of_narrow, bf16=bf16, outputs=predicted, eager=eager)
    depth, narrow_others = config.num_hidden_layers, config.predictor_num_hidden_layers - 1
    kept, narrow_kept = depth * block, narrow_others * narrow_block + narrow_last
    working = rows * (element * hidden + 4 * 2 * width)  # gradients; what they replace is given back meanwhile
    narrow_working = predicted * (element * narrow_hidden + 4 * 2 * narrow)  # of the last block, which goes first
    if checkpointing or selective:  # one block at a time has all that is its own again
        kept = 4 * depth * rows * width
        narrow_kept = 4 * (narrow_others + 1) * narrow_rows * narrow
        working += block - 4 * rows * width
        narrow_working = narrow_block + narrow_rows * (element * narrow_hidden + 4 * narrow)
    if selective:  # besides inputs: queries, keys, values, what attention gave, its projection, the MLP's inner rows
        products, narrow_products = 5 * element * width + 4 * heads, 5 * element * narrow + 4 * narrow_heads
        kept += depth * rows * (products + element * hidden)
        narrow_kept += (narrow_others + 1) * narrow_rows * narrow_products
        narrow_kept += element * narrow_hidden * (narrow_others * narrow_rows + predicted)
        working -= rows * (products + element * hidden)
        narrow_working -= narrow_rows * (narrow_products + element * narrow_hidden)
    full_working = sizes.patches * (element * 2 * hidden + 4 * 2 * width)  # of the target encoder
    # beside the blocks: visible pixels and the last norm; the predictor's norm and output; what the loss compares
    pixels = config.num_channels * math.prod(config.image_shape)
    beside = rows * (element * (pixels // sizes.patches + width) + 4 * width)
    narrow_beside = predicted * (element + 4) * narrow
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
