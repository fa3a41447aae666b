"""Pretrains I-JEPA: a context encoder, a target encoder (its moving average) and a narrow predictor.

Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", CVPR
2023, arXiv 2301.08243. The picture of section 3 is `IJepaForPretraining.forward`: `encode_targets` (full image, no
gradient), `encode_context` (visible patches only), `predict` (each target block by itself), `compute_loss`.

Shape letters used everywhere:

    B images in the batch      N patches of an image       K context patches kept     M target blocks
    P patches in a block       D encoder width             E predictor width          S context sets per image

The encoder itself is in `encoder_ijepa.py`.
"""

import copy
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, ModelOutput, cached_file, logging
from transformers.utils.generic import can_return_tuple

from .configuration_ijepa import IJepaConfig  # relative: these files are shipped with models, see runs/export.py
from .encoder_ijepa import (
    IJepaModel,
    IJepaPreTrainedModel,
    check_indices,
    check_pixels,
    from_file_name,
    gather_patches,
    make_layers,
)
from .masking import draw_masks

PRETRAINING_SUBFOLDER = "pretraining"
TARGET_NORM_EPS = 1e-5  # of the layer norm without affine over the targets; the encoders' own is `layer_norm_eps`

logger = logging.get_logger("transformers.ijepa_hf")

_DOWNLOAD_KEYWORDS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@dataclass
class IJepaForPretrainingOutput(ModelOutput):
    """Holds what `IJepaForPretraining` returns.

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
        self.layers = make_layers(self.config)
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
    """Combines both encoders and the predictor with the loss.

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
        """Returns the moving average of the context encoder, which is evaluated and published."""
        return self.ijepa

    @torch.no_grad()
    def encode_targets(self, pixel_values: Tensor, target_indices: Tensor) -> Tensor:
        """Computes the targets of the predictions; no gradient.

        They are the representations of the target blocks, from the target encoder seeing the *full* image; with
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
        rows = target_indices.flatten(1)  # blocks may overlap: with more rows than patches nothing is saved
        if rows.shape[1] >= self.config.num_patches:
            return gather_patches(self.represent(pixel_values), target_indices)
        return self.represent(pixel_values, output_indices=rows).unflatten(1, target_indices.shape[1:])

    @torch.no_grad()
    def represent(self, pixel_values: Tensor, *, output_indices: Tensor | None = None) -> Tensor:
        """Computes the target encoder's representations of whole images, normalised as targets; no gradient.

        Args:
            pixel_values: float `[B, num_channels, height, width]`.
            output_indices: int64 `[B, T]`, the patches to return; `None` means all.

        Returns:
            `[B, N, D]` or `[B, T, D]`.
        """
        return self._normalize(self.ijepa(pixel_values, output_indices=output_indices).last_hidden_state)

    def _normalize(self, targets: Tensor) -> Tensor:
        if not self.config.normalize_targets:
            return targets
        return nn.functional.layer_norm(targets, targets.shape[-1:], eps=TARGET_NORM_EPS)

    def predict(self, context: Tensor, context_indices: Tensor, target_indices: Tensor) -> Tensor:
        """Predicts the target blocks, each by itself.

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
        """Computes the distance between predictions and targets, in at least float32.

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
        return distance(predictions, targets, self.config.loss_type)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        context_indices: Tensor | None = None,
        target_indices: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> IJepaForPretrainingOutput:
        """Computes one I-JEPA step: targets, context, predictions, loss.

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
        check_pixels(pixel_values)
        if (context_indices is None) != (target_indices is None):
            given, missing = ("context", "target") if target_indices is None else ("target", "context")
            raise ValueError(f"{given}_indices were given without {missing}_indices; pass both, or neither.")
        if context_indices is None or target_indices is None:
            context_indices, target_indices = self._draw_indices(len(pixel_values), pixel_values.device)
        check_indices("context_indices", context_indices, len(pixel_values), ndims=(2, 3))
        check_indices("target_indices", target_indices, len(pixel_values), ndims=(3,))

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
        """Moves each target parameter to momentum * target + (1 - momentum) * context; once per *optimiser* step.

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
        """Sets the mode as in torch; the target encoder stays in eval mode (dropout would make its targets noisy)."""
        super().train(mode)
        self.ijepa.eval()
        return self

    def _freeze_target_encoder(self) -> None:
        self.ijepa.requires_grad_(False).eval()

    # -- transformers ------------------------------------------------------------------------------------------------

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switches as in transformers; reaches the predictor on the oldest supported version too."""
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

        A repo or folder whose root holds an encoder and which has `pretraining/` loads the latter.
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


def distance(predictions: Tensor, targets: Tensor, loss_type: str, reduction: str = "mean") -> Tensor:
    """Measures how far predictions are from targets, as the loss does, in at least float32.

    Args:
        predictions: Float, of any shape.
        targets: Float, of the same shape.
        loss_type: "smooth_l1" (beta 1) or "mse".
        reduction: "mean" for one number, "none" for one of each element.

    Returns:
        A scalar, or a tensor of the shape of the predictions.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    measure = nn.functional.smooth_l1_loss if loss_type == "smooth_l1" else nn.functional.mse_loss
    return measure(predictions.to(dtype), targets.to(dtype), reduction=reduction)


def variance_and_covariance(features: Tensor) -> Tensor:
    """Computes VICReg's two terms against collapse: 25 times the variance hinge, plus the covariance.

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
    """Makes a model whose initial weights depend on the seed alone; torch's global generator stays as it was.

    Args:
        config: The model's configuration.
        seed: The run's seed.

    Returns:
        The model, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return IJepaForPretraining(config)


def _full_model_subfolder(class_name: str, source: Any, download: Mapping[str, Any]) -> str | None:
    """Finds the subfolder that holds the full model ('' is the root); None if there is none."""
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
                raise ValueError(f"architectures={architectures!r} does not name the model")
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{posixpath.join(str(source), subfolder, CONFIG_NAME)} is damaged: {error}") from error
        if class_name in architectures:
            return subfolder
    return None


@contextmanager
def _naming(source: Any, subfolder: str | None) -> Iterator[None]:
    """Adds the name of the weights file to errors of loading, which do not name it."""
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
