"""Computes what a training step costs: sizes of masks, parameters, FLOPs, bytes that it holds, the largest batch.

Parameters are counted on the meta device, where weights have shapes and no numbers. FLOPs and bytes come from closed
formulas, one small function for each part of the model; no step is taken and no clock is read. Letters as in
modeling_ijepa.py: N patches, K context patches, M target blocks of P patches, S context sets, widths D and E.

Why formulas, and not torch's own counters on the meta device. FLOPs: `FlopCounterMode` gives exactly the same numbers
(tests/estimation/test_cost.py), but took 7 s for the 14 sizes of a ViT-g's masks on models of one and two layers, and
gradient checkpointing needs a second count. Bytes: autocast does not exist on the meta device, so what is kept in
bfloat16 cannot be counted there; selective checkpointing keeps tensors where `saved_tensors_hooks` does not see them;
and what is held beside the kept tensors, which decides the largest batch, is no saved tensor.
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
    """Holds the numbers of patches of one image in one step.

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
    """Draws masks as a run does, and returns their sizes.

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
    """Holds the numbers of parameters of each part; the target encoder's are not trained."""

    context_encoder: int
    target_encoder: int
    predictor: int

    @property
    def trained(self) -> int:
        """Parameters that have gradients and an optimiser's state."""
        return self.context_encoder + self.predictor

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trained + self.target_encoder


def meta_model(config: IJepaConfig) -> IJepaForPretraining:
    """Returns a model on the meta device: shapes without numbers, which take no memory."""
    with torch.device("meta"):
        return IJepaForPretraining(config)


def count_parameters(config: IJepaConfig) -> Parameters:
    """Counts the parameters of a model; the fixed position tables are not parameters.

    Args:
        config: The model's.

    Returns:
        Their numbers.
    """
    model = meta_model(config)
    parts = (model.context_encoder, model.target_encoder, model.predictor)
    return Parameters(*(sum(parameter.numel() for parameter in part.parameters()) for part in parts))


# -- FLOPs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Holds the FLOPs of one image: 2 for a multiplication with its addition; only matrix products count, as usual.

    Args:
        forward: In the forward pass.
        backward: In the backward pass: as many for the gradient of the weights, and again for that of the input.
        recomputed: In the forward passes that gradient checkpointing repeats.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all three."""
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: "Work") -> "Work":
        return Work(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> "Work":
        return Work(self.forward * times, self.backward * times, self.recomputed * times)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _layer(rows: int, width: int, intermediate: int, outputs: int) -> int:
    """Computes the forward FLOPs of a layer on `rows` that attend to each other; `outputs` of them enter the MLP."""
    projections, scores_and_sums = 4 * _linear(rows, width, width), 4 * rows * rows * width
    return projections + scores_and_sums + 2 * _linear(outputs, width, intermediate)


def _trained_layers(
    count: int, rows: int, width: int, intermediate: int, *, outputs: int | None = None, checkpointing: bool
) -> Work:
    """Computes the FLOPs of a stack of layers; the MLP of the last one gets `outputs` rows, all if not given."""
    forward = repeated = 0
    for come_out, times in ((rows, count - 1), (rows if outputs is None else outputs, 1)):
        layer = _layer(rows, width, intermediate, come_out)
        forward += times * layer
        # torch ends the repetition when it has what the backward pass needs: before the MLP's second product
        repeated += times * (layer - _linear(come_out, intermediate, width))
    return Work(forward, 2 * forward, repeated if checkpointing else 0)


def _target_encoder(config: IJepaConfig, sizes: Sizes) -> Work:
    """Computes FLOPs of the full image, without backward; the last MLP gets the target patches, if fewer than all."""
    if config.target_type == "pixels":
        return Work(0)
    patches, width, intermediate = sizes.patches, config.hidden_size, config.intermediate_size
    targets = min(sizes.blocks * sizes.target, patches)  # blocks overlap
    layers = (config.num_hidden_layers - 1) * _layer(patches, width, intermediate, patches)
    last = _layer(patches, width, intermediate, targets)
    return Work(_linear(patches, config.pixels_per_patch, width) + layers + last)


def _context_encoder(config: IJepaConfig, sizes: Sizes, checkpointing: bool) -> Work:
    """Computes the FLOPs of K patches of each context set.

    Pixels need no gradient, so the backward pass of the embedding costs only as much as its forward pass.
    """
    embed = _linear(sizes.context, config.pixels_per_patch, config.hidden_size)
    shape = (config.num_hidden_layers, sizes.context, config.hidden_size, config.intermediate_size)
    return (Work(embed, embed) + _trained_layers(*shape, checkpointing=checkpointing)) * sizes.sets


def _predictor(config: IJepaConfig, sizes: Sizes, checkpointing: bool) -> Work:
    """Computes FLOPs of each target block with its context, K + P rows; the last MLP gets only the target's rows."""
    width, rows = config.predictor_hidden_size, sizes.context + sizes.target
    embed = _linear(sizes.context, config.hidden_size, width)
    project = _linear(sizes.target, width, config.target_size)
    layers = _trained_layers(
        config.predictor_num_hidden_layers, rows, width, 4 * width, outputs=sizes.target, checkpointing=checkpointing
    )
    return (Work(embed, 2 * embed) + (Work(project, 2 * project) + layers) * sizes.blocks) * sizes.sets


def model_work(config: IJepaConfig, drawn: Sequence[Sizes], *, checkpointing: bool = False) -> dict[str, Work]:
    """Returns the FLOPs of one image in each part, the mean over draws of its masks.

    Args:
        config: The model's.
        drawn: From `draw_sizes`; not empty.
        checkpointing: Whether layers are computed again in the backward pass (a run's `gradient_checkpointing`).

    Returns:
        `context_encoder`, `predictor` and `target_encoder`.
    """
    parts: dict[str, Callable[[Sizes], Work]] = {
        "context_encoder": lambda sizes: _context_encoder(config, sizes, checkpointing),
        "predictor": lambda sizes: _predictor(config, sizes, checkpointing),
        "target_encoder": lambda sizes: _target_encoder(config, sizes),
    }
    return {name: sum((part(sizes) for sizes in drawn), Work(0.0)) * (1 / len(drawn)) for name, part in parts.items()}


def update_bytes(parameters: Parameters) -> int:
    """Returns the bytes that an optimiser step moves to and from memory, whatever the batch.

    AdamW reads weight, gradient and both moments and writes all but the gradient; the clipping norm reads gradients;
    the moving average reads two weights and writes one.
    """
    return 4 * (8 * parameters.trained + 3 * parameters.target_encoder)


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Holds the bytes that one process needs at the moment of a step with the highest use of memory.

    Args:
        weights: float32, of both encoders and the predictor.
        optimizer: AdamW's two moments.
        gradients: float32, of the trained weights; not all of them are there while activations are.
        weight_copies: bfloat16 copies of the trained weights, which the backward pass needs.
        buckets: Copies of the gradients that are exchanged between processes.
        batch: Pixels and indices of a micro-batch.
        activations: What is kept for the backward pass, of a micro-batch.
        working: What is there beside the kept activations at the fullest moment.
        peak: The total at that moment; less than the sum of all, because not everything is there at once.
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


@dataclass(frozen=True)
class StepSettings:
    """Holds the settings of a run on which its use of memory depends.

    Args:
        bf16: Whether products are computed in bfloat16; weights stay float32.
        checkpointing: Whether layers keep their input only, and are computed again.
        selective: Whether layers keep their input and the results of products and attention.
        eager: Whether attention is eager, which keeps its weights; else fused.
        accumulates: Whether a step has several micro-batches, so that gradients wait while activations are there.
        is_distributed: Whether gradients are exchanged with other processes.
    """

    bf16: bool = False
    checkpointing: bool = False
    selective: bool = False
    eager: bool = False
    accumulates: bool = False
    is_distributed: bool = False

    @property
    def element(self) -> int:
        """Returns the bytes of each number in the result of a product."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class _Layers:
    """Describes the layers of a trained part: `rows` of one image in sequences of `length`, `outputs` of the last."""

    depth: int
    rows: int
    length: int
    width: int
    intermediate: int
    heads: int
    outputs: int

    def _layer_bytes(self, settings: StepSettings, outputs: int) -> int:
        """Computes the bytes that a layer keeps for its backward pass.

        The half with attention: the norm's input and output, queries, keys, values, attention's result (6 widths).
        The half with the MLP: the norm's input and output, the activation's input and output (2 widths, 2 MLP widths).
        For each row also two moments of each norm and a log-sum of each head, or with eager attention all its weights.
        In bfloat16 these take half the bytes, except the norms' inputs (the sums that go from layer to layer).
        """
        element, width = settings.element, self.width
        attends, has_mlp = 4 * width + 5 * element * width, 4 * width + element * (width + 2 * self.intermediate)
        picked = 0 if outputs == self.rows else 4 * self.rows * width  # what the rows that leave are picked from
        # of eager attention, weights in float32, and their copy in bfloat16
        scores = self.heads * self.length * (6 if settings.bf16 else 4) if settings.eager else 4 * self.heads
        return self.rows * (attends + scores + 8) + picked + outputs * (has_mlp + 8)

    def kept_and_working(self, settings: StepSettings) -> tuple[int, int]:
        """Returns the bytes kept for the backward pass, and the further bytes during one layer's backward pass."""
        element, rows, width = settings.element, self.rows, self.width
        layer = self._layer_bytes(settings, rows)
        if not (settings.checkpointing or settings.selective):
            kept = (self.depth - 1) * layer + self._layer_bytes(settings, self.outputs)
            # gradients, in the last layer, which goes first; what they replace is given back meanwhile
            return kept, self.outputs * (element * self.intermediate + 4 * 2 * width)
        kept = 4 * self.depth * rows * width
        working = layer + rows * (element * self.intermediate + 4 * width)  # one layer has again all that is its own
        if settings.selective:  # queries, keys, values, attention's result, its projection, the MLP's inner rows
            products = rows * (5 * element * width + 4 * self.heads)
            inner_rows = (self.depth - 1) * rows + self.outputs
            kept += self.depth * products + inner_rows * element * self.intermediate
            working -= products + rows * element * self.intermediate
        return kept, working


def estimate_memory(
    config: IJepaConfig,
    sizes: Sizes,
    parameters: Parameters,
    batch_size: int,
    settings: StepSettings = StepSettings(),
) -> Memory:
    """Estimates the memory of a process.

    Args:
        config: The model's.
        sizes: Of the masks.
        parameters: From `count_parameters`.
        batch_size: Images of a micro-batch on one device.
        settings: How steps are taken.

    Returns:
        The bytes.
    """
    element, width, narrow = settings.element, config.hidden_size, config.predictor_hidden_size
    heads, length = config.num_attention_heads, sizes.context + sizes.target
    rows, predicted = sizes.sets * sizes.context, sizes.sets * sizes.blocks * sizes.target
    encoder_layers = _Layers(
        config.num_hidden_layers, rows, sizes.context, width, config.intermediate_size, heads, rows
    )
    predictor_layers = _Layers(
        config.predictor_num_hidden_layers,
        sizes.sets * sizes.blocks * length,
        length,
        narrow,
        4 * narrow,
        config.predictor_num_attention_heads or heads,
        predicted,
    )
    # of one image
    kept, working = encoder_layers.kept_and_working(settings)
    narrow_kept, narrow_working = predictor_layers.kept_and_working(settings)
    target_working = sizes.patches * (element * 2 * config.intermediate_size + 4 * 2 * width)
    # beside the layers: visible pixels and the last norm; the predictor's norm and output; what the loss compares
    pixels = config.num_channels * math.prod(config.image_shape)
    kept += rows * (element * (pixels // sizes.patches + width) + 4 * width)
    narrow_kept += predicted * (element + 4) * narrow + 4 * width * (predicted + sizes.blocks * sizes.target)
    images = 4 * pixels + 8 * (rows + sizes.blocks * sizes.target)

    gradients = 4 * parameters.trained
    waiting = gradients if settings.accumulates else 0
    # gradients, activations and working memory at the moments at which a process may be fullest: targets; the backward
    # pass begins; it has left the predictor, whose gradients are small beside its activations; it ends
    moments = [
        (waiting, 0, batch_size * target_working),
        (waiting, batch_size * (kept + narrow_kept), batch_size * narrow_working),
        (waiting, batch_size * kept, batch_size * working),
        (gradients, 0, 0),
    ]
    always = {
        "weights": 4 * parameters.total,
        "optimizer": 8 * parameters.trained,
        "weight_copies": 2 * parameters.trained if settings.bf16 else 0,
        "buckets": gradients if settings.is_distributed else 0,
        "batch": batch_size * images,
    }
    fullest = max(moments, key=sum)
    return Memory(
        **always,
        gradients=gradients,
        activations=batch_size * (kept + narrow_kept),
        working=fullest[2],
        peak=sum(always.values()) + sum(fullest),
    )


def largest_batch(peak: Callable[[int], float], memory: float) -> int:
    """Returns the largest number of images whose peak fits into memory.

    Args:
        peak: Gives the bytes for a number of images; grows with it.
        memory: Available bytes.

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
