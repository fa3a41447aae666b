"""I-JEPA for pretraining: a context encoder, a target encoder (its moving average) and a narrow predictor.

Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", CVPR
2023, arXiv 2301.08243. The picture of section 3 is `IJepaForPretraining.forward`: `encode_targets` (full image, no
gradient), `encode_context` (visible patches only), `predict` (each target block by itself), `compute_loss`.

Shape letters used everywhere:

    B images in the batch      N patches of an image       K context patches kept     M target blocks
    P patches in a block       D encoder width             E predictor width          S context sets per image

The encoder is transformers' own `IJepaModel` with two differences: its position table is the fixed 2-D sin-cos one, a
buffer under the stock parameter's name (so files are interchangeable), and it can be given the positions of the
patches that it may see. Without those it computes what the stock class computes, bit for bit.
"""

import copy
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.ijepa import modeling_ijepa as stock
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging
from transformers.utils.generic import can_return_tuple

from .configuration_ijepa import IJepaConfig  # relative: these files are shipped with models, see export.py
from .masking import draw_masks

PRETRAINING_SUBFOLDER = "pretraining"
TARGET_NORM_EPS = 1e-5  # of the layer norm without affine over the targets; the encoders' own is `layer_norm_eps`

logger = logging.get_logger("transformers.ijepa_hf")

_DOWNLOAD_KEYWORDS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")

# Files hold transformers' 4.x parameter names (which 5.x writes too, so that both read them). `from_pretrained`
# renames them; `Trainer` resumes by putting the file straight into `load_state_dict(strict=False)`, which would skip
# them.
_NAMES_AND_FILE_NAMES = (
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def to_file_name(name: str) -> str:
    """A parameter's name in the files that every supported transformers reads, from its name in the model."""
    for ours, theirs in _NAMES_AND_FILE_NAMES:
        name = name.replace(ours, theirs)
    return name


def from_file_name(name: str) -> str:
    """A parameter's name in the model, from its name in a file (either kind of name is understood)."""
    for ours, theirs in _NAMES_AND_FILE_NAMES:
        name = name.replace(theirs, ours)
    return name


def sincos_position_table(width: int, grid_size: tuple[int, int]) -> Tensor:
    """The fixed 2-D sin-cos position table.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of the
    coordinate times 1 / 10000^(i / (width / 4)), i = 0 .. width/4 - 1.

    Args:
        width: Channels, a multiple of 4.
        grid_size: Rows and columns of the patch grid.

    Returns:
        float32 `[1, N, width]`, rows in row-major order of the grid, computed in float64.

    Source: Vaswani et al. 2017, section 3.5, per axis; arXiv 2301.08243, appendix A.1.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid_size)
    row_angles = torch.outer(rows.repeat_interleave(grid_size[1]), frequencies)
    column_angles = torch.outer(columns.repeat(grid_size[0]), frequencies)
    table = torch.cat([column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()], dim=1)
    return table.float()[None]


def gather_patches(features: Tensor, indices: Tensor) -> Tensor:
    """Picks patches.

    Args:
        features: `[B, N, D]`.
        indices: int64 `[B, ...]`, patch positions in 0 .. N-1.

    Returns:
        `[B, ..., D]`.
    """
    flat = indices.flatten(1)
    picked = features.gather(1, flat[..., None].expand(-1, -1, features.shape[-1]))
    return picked.unflatten(1, indices.shape[1:])


@dataclass
class IJepaForPretrainingOutput(ModelOutput):
    """What `IJepaForPretraining` returns.

    Args:
        loss: float scalar, or `None` with `return_loss=False`.
        predictions: `[B, M, P, D]`, or `[B, S, M, P, D]` where context sets were given or drawn.
        targets: `[B, M, P, D]`, without gradient.
        context_indices: int64 `[B, K]` or `[B, S, K]`: the ones given, or drawn.
        target_indices: int64 `[B, M, P]`: the ones given, or drawn.
        hidden_states: Of the context encoder, each `[B*S, K, D]`, where asked for.
        attentions: Of the context encoder, each `[B*S, heads, K, K]`, where asked for.
    """

    loss: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    targets: torch.FloatTensor | None = None
    context_indices: torch.LongTensor | None = None
    target_indices: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class IJepaEmbeddings(stock.IJepaEmbeddings):
    """Patch embedding plus the fixed position table; with positions given, keeps only those patches."""

    def __init__(self, config: IJepaConfig) -> None:
        super().__init__(config)
        shape = self.position_embeddings.shape
        del self.position_embeddings
        # Filled by `_init_weights`, or from the file: loading happens on the meta device, so not here.
        self.register_buffer("position_embeddings", torch.empty(shape, dtype=torch.float32))
        self.grid_size = config.grid_size
        self.patch_shape = config.patch_shape

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The position table for images of another size: bicubic, as in the stock class, for rectangular grids too."""
        rows, columns = height // self.patch_shape[0], width // self.patch_shape[1]
        if (rows, columns) == self.grid_size:
            return self.position_embeddings
        table = self.position_embeddings.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).flatten(1, 2)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """Embeds patches and adds their positions.

        Args:
            pixel_values: float `[B, num_channels, height, width]`, normalised.
            bool_masked_pos: int64 context indices `[B, K]` or `[B, S, K]`, or `None` for all patches. The name is the
                stock encoder's, which hands this argument through untouched.
            interpolate_pos_encoding: Resize the position table to images of another size.

        Returns:
            `[B, N, D]`, `[B, K, D]` or `[B*S, K, D]`.

        Raises:
            ValueError: If the images have another size than the model and the table may not be resized.
        """
        height, width = pixel_values.shape[-2:]
        if interpolate_pos_encoding:
            position = self.interpolate_pos_encoding(pixel_values, height, width)
        elif (height, width) != tuple(self.image_size):
            raise ValueError(
                f"pixel_values are {height}x{width} pixels, the model was made for {self.image_size[0]}x"
                f"{self.image_size[1]}; resize the images, or pass interpolate_pos_encoding=True."
            )
        else:
            position = self.position_embeddings
        # in the weights' type and not the product's: under autocast the sums that go from layer to layer stay float32
        position = position.to(self.patch_embeddings.projection.weight.dtype)
        if bool_masked_pos is None:
            return self.dropout(self.patch_embeddings(pixel_values) + position)
        embeddings = self._project_patches(gather_patches(self.cut_patches(pixel_values), bool_masked_pos))
        embeddings = embeddings + gather_patches(position.expand(len(pixel_values), -1, -1), bool_masked_pos)
        if embeddings.dim() == 4:  # [B, S, K, D]: each context set is a sequence of its own
            embeddings = embeddings.flatten(0, 1)
        return self.dropout(embeddings)

    def cut_patches(self, pixel_values: Tensor) -> Tensor:
        """Images as rows of pixels, one for each patch: `[B, N, num_channels * patch height * patch width]`."""
        rows, columns = self.patch_shape
        cut = pixel_values.unflatten(2, (-1, rows)).unflatten(4, (-1, columns))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _project_patches(self, patches: Tensor) -> Tensor:
        """The patch projection, as a product of matrices: only visible patches pay, a third of the convolution."""
        projection = self.patch_embeddings.projection
        return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


class IJepaLayer(stock.IJepaLayer):
    """A layer of transformers that does less for the same values. Adds no parameter.

    Under autocast query, key and value share one copy of their input in the lower precision, where three would be made
    and kept for the backward pass. The last layer of a stack spares the MLP, two thirds of its multiplications, for
    rows that nobody asks for; every row attends and is attended to, as ever.

    Args:
        config: The stack's configuration.
        is_last: Whether this layer is the one that heeds `output_indices`.
    """

    def __init__(self, config: IJepaConfig, *, is_last: bool = False) -> None:
        super().__init__(config)
        self.is_last = is_last

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns all rows `[B, n, D]`; the last layer those at `output_indices`, int64 `[B, T]`: `[B, T, D]`."""
        device_type = hidden_states.device.type
        normed = self.layernorm_before(hidden_states)
        if torch.is_autocast_enabled(device_type):
            normed = normed.to(torch.get_autocast_dtype(device_type))
        attended, _ = self.attention(normed, attention_mask, **kwargs)
        rows = self.dropout(attended) + hidden_states
        if self.is_last and output_indices is not None:
            rows = gather_patches(rows, output_indices)
        return self.dropout(self.mlp(self.layernorm_after(rows))) + rows


def _make_layers(config: IJepaConfig) -> nn.ModuleList:
    count = config.num_hidden_layers
    return nn.ModuleList([IJepaLayer(config, is_last=number == count - 1) for number in range(count)])


class IJepaPreTrainedModel(stock.IJepaPreTrainedModel):
    """Initial weights and the rules of loading, shared by the encoder, the predictor and the whole."""

    config: IJepaConfig
    config_class = IJepaConfig
    _keep_in_fp32_modules_strict = ["position_embeddings"]  # noqa: RUF012 (transformers' own convention)
    _no_split_modules = ["IJepaEmbeddings", "IJepaLayer"]  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(IJepaConfig.from_stock(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals (bounds -2 .. 2, absolute) and zero biases; the patch embedding has a width of its own."""
        if isinstance(module, IJepaEmbeddings | IJepaPredictor):
            table = sincos_position_table(module.position_embeddings.shape[-1], module.grid_size)
            init.copy_(module.position_embeddings, table)
            if isinstance(module, IJepaPredictor):
                init.trunc_normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):  # the patch embedding, the only convolution
            init.trunc_normal_(module.weight, std=self.config.resolved_patch_init_std)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class IJepaModel(IJepaPreTrainedModel, stock.IJepaModel):
    """The encoder: `transformers.IJepaModel`, able to see only some of the patches. Adds no parameter.

    Args:
        config: An `IJepaConfig` of this package, or a stock one (converted).
        add_pooling_layer: As in the stock class.
    """

    # a file of the full model holds the encoder too
    _keys_to_ignore_on_load_unexpected = [r"^context_encoder\.", r"^predictor\."]  # noqa: RUF012

    def __init__(self, config: Any, add_pooling_layer: bool = False) -> None:
        config = IJepaConfig.from_stock(config)
        super().__init__(config, add_pooling_layer)
        self.embeddings = IJepaEmbeddings(config)
        self.layers = _make_layers(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        *,
        context_indices: Tensor | None = None,
        output_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encodes whole images, or only some of their patches.

        Args:
            pixel_values: float `[B, num_channels, height, width]`, normalised as the image processor does.
            context_indices: int64 `[B, K]` or `[B, S, K]`, row-major positions of the patches that enter the
                transformer; the others have no influence. `None` means all.
            output_indices: int64 `[B, T]`, which rows of the result are wanted, in this order: the last layer spares
                work on the others. `None` means all.
            **kwargs: As in the stock class: `interpolate_pos_encoding`, `attention_mask`, `output_hidden_states`,
                `output_attentions`, `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`; `last_hidden_state` is `[B, N, D]`, `[B, K, D]`, or, with S context sets,
            `[B*S, K, D]`, all sets of the first image first; with `output_indices`, `[B, T, D]`.

        Raises:
            ValueError: For integer pixels, indices of a wrong type or shape, or attention maps asked of a backend that
                has none.
        """
        _check_pixels(pixel_values)
        if "bool_masked_pos" in kwargs:
            raise ValueError(
                "bool_masked_pos is not used by this model: hidden patches are left out, not replaced; pass the "
                "positions of the visible ones as context_indices."
            )
        if context_indices is not None:
            _check_indices("context_indices", context_indices, len(pixel_values), ndims=(2, 3))
        if output_indices is not None:
            rows = len(pixel_values) if context_indices is None else context_indices[..., 0].numel()
            _check_indices("output_indices", output_indices, rows, ndims=(2,))
            kwargs["output_indices"] = output_indices  # handed on to every layer; the last one heeds it
        self._check_attention_backend(kwargs.get("output_attentions"))
        return super().forward(pixel_values, bool_masked_pos=context_indices, **kwargs)

    def _check_attention_backend(self, output_attentions: bool | None) -> None:
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        backend = self.config._attn_implementation
        if asked and backend not in (None, "eager"):
            raise ValueError(
                f"output_attentions=True: the attention backend {backend!r} computes no attention maps; load "
                "the model "
                'with attn_implementation="eager", or call model.set_attn_implementation("eager").'
            )


class IJepaPredictor(IJepaPreTrainedModel):
    """Predicts the target representations of each block from the context's: a shallow, narrow ViT.

    A `PreTrainedModel` with a configuration of its own, so that switching the attention backend and gradient
    checkpointing reach it.

    Args:
        config: The full model's configuration.

    Source: arXiv 2301.08243, section 3, "Prediction".
    """

    def __init__(self, config: Any) -> None:
        config = IJepaConfig.from_stock(config)
        super().__init__(config.predictor_config())
        width = self.config.hidden_size
        self.grid_size = config.grid_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # 3-D, so weight decay applies, as published
        self.register_buffer("position_embeddings", torch.empty(1, config.num_patches, width, dtype=torch.float32))
        self.layers = _make_layers(self.config)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.project = nn.Linear(width, config.target_size)
        self.post_init()

    def forward(self, context: Tensor, context_indices: Tensor, target_indices: Tensor) -> Tensor:
        """Predicts each target block by itself: its rows see the context and each other, no other block.

        Args:
            context: `[B, S, K, D]`, from the context encoder.
            context_indices: int64 `[B, S, K]`.
            target_indices: int64 `[B, M, P]`.

        Returns:
            `[B, S, M, P, D]`; of pixels, `target_size` numbers in place of D.
        """
        batch, sets, _ = context_indices.shape
        blocks, patches = target_indices.shape[1:]
        # in the weights' type: float32 under autocast, as in the encoder
        position = self.position_embeddings.to(self.mask_token.dtype).expand(batch, -1, -1)
        visible = self.embed(context) + gather_patches(position, context_indices)  # [B, S, K, E]
        queries = self.mask_token + gather_patches(position, target_indices)  # [B, M, P, E]
        rows = torch.cat(
            [
                visible[:, :, None].expand(-1, -1, blocks, -1, -1),
                queries[:, None].expand(-1, sets, -1, -1, -1),
            ],
            dim=3,
        ).flatten(0, 2)  # [B*S*M, K+P, E]
        predicted = torch.arange(rows.shape[1] - patches, rows.shape[1], device=rows.device).expand(len(rows), -1)
        for layer in self.layers:
            rows = layer(rows, None, output_indices=predicted)
        rows = self.project(self.layernorm(rows))
        return rows.unflatten(0, (batch, sets, blocks))


class IJepaForPretraining(IJepaPreTrainedModel):
    """Both encoders and the predictor, with the loss.

    `ijepa` is the target encoder: what is evaluated and published, under the name that stock heads look for; also
    called `target_encoder`. It is always in eval mode, never has gradients, and starts as a copy of `context_encoder`.

    Args:
        config: An `IJepaConfig` of this package, or a stock one (converted).

    Example:
    ```python
    model = IJepaForPretraining(IJepaConfig(image_size=32, patch_size=4))
    model(pixel_values).loss.backward()  # draws masks by itself where none are given
    optimizer.step()
    model.update_target_encoder(momentum=0.996)
    ```
    """

    accepts_loss_kwargs = False  # tells `Trainer` to divide the loss by its accumulation steps

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.ijepa = IJepaModel(self.config)
        self.context_encoder = IJepaModel(self.config)
        self.predictor = IJepaPredictor(self.config)
        self.post_init()
        self.register_load_state_dict_pre_hook(_accept_file_names)
        if self.device.type != "meta":
            self.ijepa.load_state_dict(self.context_encoder.state_dict())
        self._freeze_target_encoder()

    # -- the picture of the paper ------------------------------------------------------------------------------------

    @property
    def target_encoder(self) -> IJepaModel:
        """The moving average of the context encoder: what is evaluated and published."""
        return self.ijepa

    @torch.no_grad()
    def encode_targets(self, pixel_values: Tensor, target_indices: Tensor) -> Tensor:
        """What the loss compares predictions with; no gradient.

        Representations of the target blocks, from the target encoder seeing the *full* image; with
        `target_type="pixels"`, their pixels.

        Args:
            pixel_values: float `[B, num_channels, height, width]`.
            target_indices: int64 `[B, M, P]`.

        Returns:
            `[B, M, P, D]`, layer-normalised over D without affine (eps 1e-5) unless `normalize_targets=False`; of
            pixels, `target_size` numbers in place of D, each patch normalised by itself.
        """
        if self.config.target_type == "pixels":
            return self._normalize(gather_patches(self.ijepa.embeddings.cut_patches(pixel_values), target_indices))
        rows = target_indices.flatten(1)  # blocks may overlap: more rows than patches spare nothing
        if rows.shape[1] >= self.config.num_patches:
            return gather_patches(self.represent(pixel_values), target_indices)
        return self.represent(pixel_values, output_indices=rows).unflatten(1, target_indices.shape[1:])

    @torch.no_grad()
    def represent(self, pixel_values: Tensor, *, output_indices: Tensor | None = None) -> Tensor:
        """The target encoder's representations of whole images, normalised as targets are; no gradient.

        Args:
            pixel_values: float `[B, num_channels, height, width]`.
            output_indices: int64 `[B, T]`, which patches are wanted; `None` means all.

        Returns:
            `[B, N, D]` or `[B, T, D]`.
        """
        return self._normalize(self.ijepa(pixel_values, output_indices=output_indices).last_hidden_state)

    def _normalize(self, targets: Tensor) -> Tensor:
        if not self.config.normalize_targets:
            return targets
        return nn.functional.layer_norm(targets, targets.shape[-1:], eps=TARGET_NORM_EPS)

    def predict(self, context: Tensor, context_indices: Tensor, target_indices: Tensor) -> Tensor:
        """Predictions of the target blocks, each by itself.

        Args:
            context: `[B, K, D]`, or `[B*S, K, D]` with S context sets: `last_hidden_state` of the context encoder.
            context_indices: int64 `[B, K]` or `[B, S, K]`.
            target_indices: int64 `[B, M, P]`.

        Returns:
            `[B, M, P, D]`, or `[B, S, M, P, D]` where `context_indices` has sets.
        """
        sets = context_indices if context_indices.dim() == 3 else context_indices[:, None]
        predictions = self.predictor(context.unflatten(0, sets.shape[:2]), sets, target_indices)
        return predictions if context_indices.dim() == 3 else predictions.squeeze(1)

    def compute_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Distance between predictions and targets, in at least float32.

        `smooth_l1` (published code): beta 1. `mse` (paper): squared L2. Both are *means* over images, context sets,
        blocks, patches and channels. The paper's figure sums over a block's P patches and D channels and averages over
        blocks: it is P*D times this `mse`, a factor that Adam's steps do not depend on.

        Args:
            predictions: `[B, M, P, D]` or `[B, S, M, P, D]`.
            targets: `[B, M, P, D]`.

        Returns:
            A scalar.
        """
        if predictions.dim() == targets.dim() + 1:
            targets = targets[:, None].expand_as(predictions)
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        distance = nn.functional.smooth_l1_loss if self.config.loss_type == "smooth_l1" else nn.functional.mse_loss
        return distance(predictions.to(dtype), targets.to(dtype))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        context_indices: Tensor | None = None,
        target_indices: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> IJepaForPretrainingOutput:
        """One I-JEPA step: targets, context, predictions, loss.

        Args:
            pixel_values: float `[B, num_channels, height, width]`, normalised.
            context_indices: int64 `[B, K]` or `[B, S, K]`, what the context encoder sees. Given together with
                `target_indices`; where both are `None` they are drawn by the configuration's strategy, from torch's
                global generator.
            target_indices: int64 `[B, M, P]`.
            return_loss: Whether to compute the loss.
            **kwargs: `output_hidden_states`, `output_attentions` (of the context encoder), `return_dict`.

        Returns:
            `IJepaForPretrainingOutput`, or a tuple of its parts with `return_dict=False`.

        Raises:
            ValueError: For integer pixels, or indices of which only one is given or whose shape or type is wrong.
        """
        _check_pixels(pixel_values)
        if (context_indices is None) != (target_indices is None):
            given, missing = ("context", "target") if target_indices is None else ("target", "context")
            raise ValueError(f"{given}_indices were given without {missing}_indices; pass both, or neither.")
        if context_indices is None or target_indices is None:
            context_indices, target_indices = self._draw_indices(len(pixel_values), pixel_values.device)
        _check_indices("context_indices", context_indices, len(pixel_values), ndims=(2, 3))
        _check_indices("target_indices", target_indices, len(pixel_values), ndims=(3,))

        targets = self.encode_targets(pixel_values, target_indices)
        context = self.context_encoder(pixel_values, context_indices=context_indices, **kwargs)
        predictions = self.predict(context.last_hidden_state, context_indices, target_indices)
        loss = self.compute_loss(predictions, targets) if return_loss else None
        if loss is not None and self.config.vicreg_weight:
            pooled = context.last_hidden_state.float().mean(dim=1)
            loss = loss + self.config.vicreg_weight * variance_and_covariance(pooled)
        return IJepaForPretrainingOutput(
            loss=cast(Any, loss),
            predictions=cast(Any, predictions),
            targets=cast(Any, targets),
            context_indices=cast(Any, context_indices),
            target_indices=cast(Any, target_indices),
            hidden_states=context.hidden_states,
            attentions=context.attentions,
        )

    def _draw_indices(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, ()))
        masks = draw_masks(self.config.mask_settings(), batch, np.random.Generator(np.random.Philox(seed)))
        return masks.context_indices.to(device), masks.target_indices.to(device)

    # -- the moving average ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_target_encoder(self, momentum: float) -> None:
        """Target = momentum * target + (1 - momentum) * context, over all parameters; once per *optimiser* step.

        Args:
            momentum: In [0, 1]; the published runs go from 0.996 to 1.

        Raises:
            ValueError: If `momentum` is outside [0, 1].

        Source: arXiv 2301.08243, section 3, "Targets".
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum={momentum} must be between 0 and 1; the published runs go from 0.996 to 1.")
        targets, contexts = list(self.ijepa.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(targets, contexts, 1.0 - momentum)

    def train(self, mode: bool = True) -> "IJepaForPretraining":
        """As in torch; the target encoder stays in eval mode (dropout would make its targets noise)."""
        super().train(mode)
        self.ijepa.eval()
        return self

    def _freeze_target_encoder(self) -> None:
        self.ijepa.requires_grad_(False).eval()

    # -- transformers ------------------------------------------------------------------------------------------------

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; reaches the predictor on the oldest supported version too."""
        super().set_attn_implementation(*args, **kwargs)
        # transformers 5.9 skips a sub-model whose configuration has the same class as its parent's
        for part in (self.ijepa, self.context_encoder, self.predictor):
            part.set_attn_implementation(*args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a full model, or starts one from an encoder.

        A repo or folder whose root holds an encoder and which has `pretraining/` loads the latter without being told.
        Where there is an encoder only, it becomes both encoders and the predictor is new, which is logged as a
        warning.

        Args:
            pretrained_model_name_or_path: Hub id or local folder.
            *args: As in transformers.
            config: As in transformers.
            output_loading_info: As in transformers.
            **kwargs: As in transformers (`dtype`, `device_map`, `revision`, `subfolder`, fields of the config, ...).

        Returns:
            The model in eval mode, its target encoder frozen; with `output_loading_info`, also the loading info.

        Raises:
            OSError: If there is no such repo, folder or file.
            ValueError: If a file is damaged, or a full model's lacks tensors or has others; names it. Transformers
                itself would begin with random numbers in their place, and a warning.
        """
        source = pretrained_model_name_or_path
        download = {name: kwargs[name] for name in _DOWNLOAD_KEYWORDS if kwargs.get(name) is not None}
        subfolder = None if source is None else _full_model_subfolder(cls.__name__, source, download)
        if subfolder is not None:
            if config is not None and subfolder != (kwargs.get("subfolder") or ""):
                # an Auto class read this configuration from the encoder at the root, whose dtype may differ
                config = copy.deepcopy(config)
                config.dtype = None
            kwargs["subfolder"] = subfolder
        elif source is not None:
            config, kwargs = cls._start_from_encoder(source, config, download, kwargs)
            source = None
        with _naming(pretrained_model_name_or_path, subfolder):
            model, info = super().from_pretrained(source, *args, config=config, output_loading_info=True, **kwargs)
            if subfolder is not None and not kwargs.get("state_dict"):
                _refuse_others("lacks", info["missing_keys"])
                _refuse_others("has beside those of the model", info["unexpected_keys"])
        model._freeze_target_encoder()  # transformers 5 makes every loaded parameter trainable
        return (model, info) if output_loading_info else model

    @classmethod
    def _start_from_encoder(
        cls, source: Any, config: Any, download: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Puts the encoder's weights into both encoders, as a `state_dict` keyword."""
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        with _naming(source, download.get("subfolder")):
            encoder, info = IJepaModel.from_pretrained(
                source, config=config, dtype="auto", output_loading_info=True, **download
            )
            _refuse_others("lacks", {name for name in info["missing_keys"] if not name.startswith("pooler.")})
        state = {
            f"{part}.{name}": value
            for part in ("ijepa", "context_encoder")
            for name, value in encoder.state_dict().items()
        }
        logger.warning(
            f"{source} holds an encoder only: it starts both encoders, and the predictor is new (untrained)."
        )
        kwargs = {name: value for name, value in kwargs.items() if name not in _DOWNLOAD_KEYWORDS}
        return config, {**kwargs, "state_dict": state}


def variance_and_covariance(features: Tensor) -> Tensor:
    """VICReg's two terms against collapse, in its proportion: 25 times the variance hinge, plus the covariance.

    Args:
        features: float `[B, D]`.

    Returns:
        A scalar.

    Raises:
        ValueError: For one row, which has no variance.

    Source: Bardes et al., arXiv 2105.04906, section 4.1; for I-JEPA, arXiv 2410.19560.
    """
    if len(features) < 2:
        raise ValueError("vicreg_weight needs at least 2 images in a micro-batch; one has no variance.")
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred / (len(features) - 1)
    hinge = torch.relu(1 - torch.sqrt(covariance.diagonal() + 1e-4)).mean()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return 25 * hinge + off_diagonal / features.shape[1]


def new_model(config: IJepaConfig, seed: int) -> IJepaForPretraining:
    """A model with initial weights that are a function of the seed; torch's global generator is left as it was.

    Args:
        config: The configuration.
        seed: The run's seed.

    Returns:
        The model, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IJepaForPretraining(config)


def enable_gradient_checkpointing(model: IJepaForPretraining, *, selective: bool = False) -> None:
    """Recompute activations in the backward pass, in the context encoder and the predictor.

    Args:
        model: The model; the target encoder has no backward pass.
        selective: Recompute only what is cheap (layer norms, the activation function, sums); keep what products of
            matrices and attention gave.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
    # transformers renamed it on the way to version 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


_PRODUCTS = ("mm", "addmm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def _keep_what_is_dear(_context: Any, operator: Any, *arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    """Of a layer: query, key, value, what attention gave, and the MLP's inner rows before their activation."""
    name = str(operator).split(".")[1]  # such as "aten.addmm.default"
    keep = name in _ATTENTION
    if name in _PRODUCTS:
        rows, weight = arguments[-2:]
        keep = weight.shape[1] >= rows.shape[1]  # the MLP's narrowing product is not needed: its input is
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _full_model_subfolder(class_name: str, source: Any, download: Mapping[str, Any]) -> str | None:
    """The subfolder of a repo or folder that holds the full model ('' is its root), or None where there is none."""
    root = download.get("subfolder") or ""
    for subfolder in (root, posixpath.join(root, PRETRAINING_SUBFOLDER)):
        here = {**download, "subfolder": subfolder}
        if cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **here) is None:
            if (Path(source) / subfolder / SAFE_WEIGHTS_NAME).exists():
                raise OSError(f"{Path(source) / subfolder} has weights, but its {CONFIG_NAME} is missing.")
            continue
        try:
            fields, _ = IJepaConfig.get_config_dict(source, **here)
            architectures = fields.get("architectures") or []
            if not isinstance(architectures, list):
                raise TypeError(f"architectures={architectures!r} is no list")
            if subfolder != root and not architectures:
                raise ValueError(f"architectures={architectures!r} does not say what it is of")
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{posixpath.join(str(source), subfolder, CONFIG_NAME)} is damaged: {error}") from error
        if class_name in architectures:
            return subfolder
    return None


@contextmanager
def _naming(source: Any, subfolder: str | None) -> Iterator[None]:
    """Says which weights it is that cannot be loaded; what is raised inside does not."""
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{posixpath.join(str(source), subfolder or '', SAFE_WEIGHTS_NAME)}: {error}") from error


def _refuse_others(how: str, names: Any) -> None:
    if names:
        listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(f"it {how}: {listed}; it is damaged, or of another configuration.")


def _accept_file_names(_module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    for key in list(state_dict):
        name = from_file_name(key)
        if name != key:
            state_dict[name] = state_dict.pop(key)


def _check_pixels(pixel_values: Tensor) -> None:
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values have dtype {pixel_values.dtype}; the model needs normalised floats. Use the image "
            "processor, IJepaDataCollator(config), or ijepa_hf.image_transforms.normalize."
        )


def _check_indices(name: str, indices: Tensor, batch: int, ndims: tuple[int, ...]) -> None:
    shapes = {2: "[B, T]" if name == "output_indices" else "[B, K]"}
    shapes[3] = "[B, M, P]" if name == "target_indices" else "[B, S, K]"
    expected = " or ".join(shapes[n] for n in ndims)
    if indices.dtype != torch.int64:
        hint = "; a boolean mask is turned into positions by mask.nonzero()" if indices.dtype == torch.bool else ""
        raise ValueError(f"{name} have dtype {indices.dtype}; they must be int64 patch positions {expected}{hint}.")
    if indices.dim() not in ndims or indices.shape[0] != batch or indices.shape[-1] == 0:
        raise ValueError(
            f"{name} have shape {list(indices.shape)}; for {batch} images they must be {expected}, with B={batch}, "
            "and not empty."
        )


# Files hold transformers' 4.x parameter names; without this its renaming skips classes that it does not ship. Here and
# not in `__init__.py`, because this file also runs without the package, as the code of a downloaded model.
for _name in ("IJepaModel", "IJepaForPretraining"):
    register_checkpoint_conversion_mapping(_name, get_checkpoint_conversion_mapping("IJepaModel"), overwrite=True)
