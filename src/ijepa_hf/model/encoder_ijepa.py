"""Encodes images: transformers' own `IJepaModel`, able to see only some of the patches of an image.

It differs in two things: its position table is the fixed 2-D sin-cos one, a buffer under the stock parameter's name
(so files are interchangeable), and it can be given the positions of the patches that it may see. Without those it
computes what the stock class computes, bit for bit. Shape letters are those of `modeling_ijepa.py`.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.ijepa import modeling_ijepa as stock

from .configuration_ijepa import IJepaConfig  # relative: these files are shipped with models, see runs/export.py

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
    """Translates a parameter's name in the model to that in files, which every supported transformers reads."""
    for ours, theirs in _NAMES_AND_FILE_NAMES:
        name = name.replace(ours, theirs)
    return name


def from_file_name(name: str) -> str:
    """Translates a parameter's name in a file to that in the model; takes either kind of name."""
    for ours, theirs in _NAMES_AND_FILE_NAMES:
        name = name.replace(theirs, ours)
    return name


def sincos_position_table(width: int, grid_size: tuple[int, int]) -> Tensor:
    """Computes the fixed 2-D sin-cos position table.

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


class IJepaEmbeddings(stock.IJepaEmbeddings):
    """Embeds patches and adds the fixed position table; with positions given, only of those patches."""

    def __init__(self, config: IJepaConfig) -> None:
        super().__init__(config)
        shape = self.position_embeddings.shape
        del self.position_embeddings
        # Filled by `_init_weights`, or from the file: loading happens on the meta device, so not here.
        self.register_buffer("position_embeddings", torch.empty(shape, dtype=torch.float32))
        self.grid_size = config.grid_size
        self.patch_shape = config.patch_shape

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Resizes the position table for images of another size: bicubic, as in the stock class, to any grid."""
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
        """Cuts images into rows of pixels, one for each patch: `[B, N, num_channels * patch height * patch width]`."""
        rows, columns = self.patch_shape
        cut = pixel_values.unflatten(2, (-1, rows)).unflatten(4, (-1, columns))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _project_patches(self, patches: Tensor) -> Tensor:
        """Projects patches by a product of matrices: only visible patches cost, a third of the convolution."""
        projection = self.patch_embeddings.projection
        return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


class IJepaLayer(stock.IJepaLayer):
    """Computes a layer of transformers with less work and the same values. Adds no parameter.

    Under autocast query, key and value share one copy of their input in the lower precision, where three would be made
    and kept for the backward pass. The last layer of a stack skips the MLP, two thirds of its multiplications, for
    rows that are not in `output_indices`; attention still covers all rows.

    Args:
        config: The stack's configuration.
        is_last: Whether this layer applies `output_indices`.
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


def make_layers(config: IJepaConfig) -> nn.ModuleList:
    """Makes the layers of an encoder or of the predictor.

    Args:
        config: The configuration of that part.

    Returns:
        `num_hidden_layers` layers, the last of which applies `output_indices`.
    """
    count = config.num_hidden_layers
    return nn.ModuleList([IJepaLayer(config, is_last=number == count - 1) for number in range(count)])


class IJepaPreTrainedModel(stock.IJepaPreTrainedModel):
    """Defines initial weights and rules of loading for the encoder, the predictor and the whole model."""

    config: IJepaConfig
    config_class = IJepaConfig
    _keep_in_fp32_modules_strict = ["position_embeddings"]  # noqa: RUF012 (transformers' own convention)
    _no_split_modules = ["IJepaEmbeddings", "IJepaLayer"]  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(IJepaConfig.from_stock(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws weights from truncated normals (absolute bounds -2 .. 2) and sets biases to 0.

        The patch embedding has its own standard deviation.
        """
        grid_size = getattr(module, "grid_size", None)
        if grid_size is not None:  # our embeddings, or the predictor, which has a mask token too
            table = cast(Tensor, module.position_embeddings)
            init.copy_(table, sincos_position_table(table.shape[-1], grid_size))
            if getattr(module, "mask_token", None) is not None:
                init.trunc_normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):  # the patch embedding, the only convolution
            init.trunc_normal_(module.weight, std=self.config.resolved_patch_init_std)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class IJepaModel(IJepaPreTrainedModel, stock.IJepaModel):
    """Encodes images: `transformers.IJepaModel`, able to see only some of the patches. Adds no parameter.

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
        self.layers = make_layers(config)
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
            output_indices: int64 `[B, T]`, the rows to return, in this order: the last layer skips work on the others.
                `None` means all.
            **kwargs: As in the stock class: `interpolate_pos_encoding`, `attention_mask`, `output_hidden_states`,
                `output_attentions`, `return_dict`.

        Returns:
            `BaseModelOutputWithPooling`; `last_hidden_state` is `[B, N, D]`, `[B, K, D]`, or, with S context sets,
            `[B*S, K, D]`, all sets of the first image first; with `output_indices`, `[B, T, D]`.

        Raises:
            ValueError: For integer pixels, indices of a wrong type or shape, or attention maps asked of a backend that
                has none.
        """
        check_pixels(pixel_values)
        if "bool_masked_pos" in kwargs:
            raise ValueError(
                "bool_masked_pos is not used by this model: hidden patches are left out, not replaced; pass the "
                "positions of the visible ones as context_indices."
            )
        if context_indices is not None:
            check_indices("context_indices", context_indices, len(pixel_values), ndims=(2, 3))
        if output_indices is not None:
            rows = len(pixel_values) if context_indices is None else context_indices[..., 0].numel()
            check_indices("output_indices", output_indices, rows, ndims=(2,))
            kwargs["output_indices"] = output_indices  # passed to every layer; the last one applies it
        self._check_attention_backend(kwargs.get("output_attentions"))
        return super().forward(pixel_values, bool_masked_pos=context_indices, **kwargs)

    def _check_attention_backend(self, output_attentions: bool | None) -> None:
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        backend = self.config._attn_implementation
        if asked and backend not in (None, "eager"):
            raise ValueError(
                f"output_attentions=True: the attention backend {backend!r} computes no attention maps; load the "
                'model with attn_implementation="eager", or call model.set_attn_implementation("eager").'
            )


def check_pixels(pixel_values: Tensor) -> None:
    """Refuses images that are not floating point with a `ValueError`."""
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values have dtype {pixel_values.dtype}; the model needs normalised floats. Use the image "
            "processor, IJepaDataCollator(config), or ijepa_hf.data.transforms.normalize."
        )


def check_indices(name: str, indices: Tensor, batch: int, ndims: tuple[int, ...]) -> None:
    """Refuses positions of patches of a wrong type or shape with a `ValueError`.

    Args:
        name: The argument that they were given as.
        indices: The positions.
        batch: Images, or sequences, that they must be for.
        ndims: Numbers of axes that are allowed, of 2 and 3.
    """
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
