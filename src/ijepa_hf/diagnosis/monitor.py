"""Measures a model on one fixed batch, so that rows of different steps can be compared.

A row holds every number of `diagnosis.measures` for the target encoder, the context encoder and the predictor, on
pooled and on patch features, and how far the target encoder has moved. Numbers are taken in eval mode, without
gradients and without a random draw, so that measuring never changes a run.

A new sign of collapse is a number that `measure_features` puts into the row, and one line in a list of
`diagnosis.verdict`, which table and picture follow: `SIGNS_OF_PARTS` if each part has the number, else `SINGLE_SIGNS`.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijepa_hf.diagnosis.measures import (
    cross_image_gap,
    lidar,
    measure_matrix,
    position_share,
    prediction_skill,
    residual_ratio,
)
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import gather_patches
from ijepa_hf.model.features import evaluating, target_features
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.randomness import DRAW_VIEWS, keyed_generator

MONITOR_IMAGES = 48  # with 8x8 patches 3,072 rows, and 48 images a position
LIDAR_VIEWS = 4  # masks of an image; the paper takes 10, at 2.5 times the cost
SPECTRUM_ROWS = 1024  # patches whose spectrum is taken
_SAMPLED_WEIGHTS = 65_536


@dataclass(frozen=True)
class MonitorBatch:
    """Holds the fixed images and masks that are measured.

    Args:
        pixel_values: Floating `[B, C, height, width]`, normalised; B at least 2.
        views: V tensors int64 `[B, K]`, the patches that the context encoder sees; the first goes to the predictor.
        target_indices: int64 `[B, M, P]`.
    """

    pixel_values: Tensor
    views: tuple[Tensor, ...]
    target_indices: Tensor


def make_monitor_batch(config: IJepaConfig, pixel_values: Tensor) -> MonitorBatch:
    """Draws the masks of the fixed images.

    Args:
        config: The model's; the masks of one configuration are the same with any seed of a run.
        pixel_values: Floating `[B, C, height, width]`, normalised.

    Returns:
        The batch, on the device of the images.

    Raises:
        ValueError: For fewer than two images.
    """
    if len(pixel_values) < 2:
        raise ValueError(
            f"{len(pixel_values)} image is too few to recognise a collapse; give at least 2, better {MONITOR_IMAGES}."
        )
    masks = [
        draw_masks(config.mask_settings(), len(pixel_values), keyed_generator(DRAW_VIEWS, view))
        for view in range(LIDAR_VIEWS)
    ]
    device = pixel_values.device
    views = tuple(_first_set(drawn.context_indices).to(device) for drawn in masks)
    return MonitorBatch(pixel_values, views, masks[0].target_indices.to(device))


def _first_set(context_indices: Tensor) -> Tensor:
    return context_indices if context_indices.ndim == 2 else context_indices[:, 0]


class CollapseMonitor:
    """Measures the same model again and again.

    Args:
        batch: The images and masks, on the model's device.
        chunk_size: Images in a forward pass.
    """

    def __init__(self, batch: MonitorBatch, chunk_size: int = MONITOR_IMAGES) -> None:
        self.batch, self.chunk_size = batch, chunk_size
        self._fingerprint = sha256(batch.pixel_values.float().cpu().numpy().tobytes()).hexdigest()[:12]
        self._last_target: Tensor | None = None

    def measure(self, model: IJepaForPretraining) -> dict[str, Any]:
        """Takes a row of numbers.

        Args:
            model: In any mode, which it keeps.

        Returns:
            `batch`, a hash of the images, and the `loss` on them; for each of `target`, `context` and
            `prediction`, and each of `pooled` and `patch`, the numbers of `measures.measure_matrix` under names such
            as `target_patch_rankme`; `..._position_share` of each; `context_lidar` (None without several views);
            `cross_image_gap` and `perfect_gap`, what perfect predictions would have; `prediction_skill`;
            `prediction_image_ratio` and `prediction_place_ratio` (see `residual_ratio`); `target_distance`, of both
            encoders' weights, relative to the context encoder's; `target_moved`, the share of that distance that
            the target encoder has moved since the last row (None in the first).

        Raises:
            ValueError: If features are NaN or infinite.
        """
        with evaluating(model):
            parts = [self._forward(model, start) for start in range(0, len(self.batch.pixel_values), self.chunk_size)]
        features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = float(model.compute_loss(features["prediction"], features["block"]))
        if model.config.target_type != "representation":  # predictions are of another kind than features
            del features["prediction"], features["block"]
        return {
            "batch": self._fingerprint,
            "loss": loss,
            **measure_features(features, self.batch.target_indices),
            **self._measure_weights(model),
        }

    def _forward(self, model: IJepaForPretraining, start: int) -> dict[str, Tensor]:
        chunk = slice(start, start + self.chunk_size)
        pixels, blocks = self.batch.pixel_values[chunk].to(model.dtype), self.batch.target_indices[chunk]
        target, of_features = target_features(model, pixels).float(), model.config.target_type == "representation"
        seen = [model.context_encoder(pixels, context_indices=view[chunk]).last_hidden_state
                for view in self.batch.views]  # fmt: skip
        return {
            "target": target,
            "context": model.context_encoder(pixels).last_hidden_state.float(),
            "views": torch.stack([view.float().mean(dim=1) for view in seen], dim=1),
            "block": gather_patches(target, blocks) if of_features else model.encode_targets(pixels, blocks).float(),
            "prediction": model.predict(seen[0], self.batch.views[0][chunk], blocks).float(),
        }

    def _measure_weights(self, model: IJepaForPretraining) -> dict[str, float | None]:
        target, context = _sampled_weights(model.target_encoder), _sampled_weights(model.context_encoder)
        last, self._last_target = self._last_target, target
        moved = None
        if last is not None:
            way = (context - last).norm()
            moved = float((target - last).norm() / way) if way > 0 else None
        return {"target_distance": float((target - context).norm() / context.norm()), "target_moved": moved}


def measure_features(features: dict[str, Tensor], target_indices: Tensor) -> dict[str, Any]:
    """Computes the numbers of a row that come from features.

    Args:
        features: `target` `[B, N, D]`, of the whole image, as the loss has them; `context` `[B, N, D]`, of the whole
            image; `views` `[B, V, D]`, pooled, of what the context encoder sees; `block` and `prediction`
            `[B, M, P, D]`. All but `target` can be missing.
        target_indices: int64 `[B, M, P]`.

    Returns:
        See `CollapseMonitor.measure`; without the numbers of missing features.
    """
    row: dict[str, Any] = {}
    count, patches, _ = features["target"].shape
    device = features["target"].device
    everywhere = torch.arange(patches, device=device).repeat(count)
    places = target_indices.flatten()
    for name in ("target", "context", "prediction"):
        if name not in features:
            continue
        matrices = features[name].flatten(1, -2)  # [B, patches, D]
        rows = matrices.flatten(0, 1)
        for kind, matrix in (("pooled", matrices.mean(dim=1)), ("patch", _spread(rows))):
            row |= {f"{name}_{kind}_{metric}": value for metric, value in measure_matrix(matrix).items()}
        row[f"{name}_position_share"] = position_share(rows, places if name == "prediction" else everywhere)
    if "views" in features:
        views = features["views"]
        row["context_lidar"] = lidar(views) if views.shape[1] > 1 else None
    if "prediction" in features:
        row |= _measure_predictions(features, target_indices)
    return row


def _measure_predictions(features: dict[str, Tensor], target_indices: Tensor) -> dict[str, float]:
    count = len(target_indices)
    predictions, targets = features["prediction"].flatten(0, 2), features["block"].flatten(0, 2)
    others = gather_patches(features["target"].roll(1, dims=0), target_indices).flatten(0, 2)
    images = torch.arange(count, device=target_indices.device).repeat_interleave(target_indices[0].numel())
    return {
        "cross_image_gap": cross_image_gap(predictions, targets, others),
        "perfect_gap": cross_image_gap(targets, targets, others),
        "prediction_skill": prediction_skill(predictions, targets),
        "prediction_image_ratio": residual_ratio(predictions, targets, target_indices.flatten()),
        "prediction_place_ratio": residual_ratio(predictions, targets, images),
    }


def _spread(rows: Tensor) -> Tensor:
    """Chooses at most `SPECTRUM_ROWS` rows, spread evenly."""
    if len(rows) <= SPECTRUM_ROWS:
        return rows
    return rows[torch.from_numpy(np.linspace(0, len(rows) - 1, SPECTRUM_ROWS).round().astype(np.int64))]


def _sampled_weights(encoder: nn.Module) -> Tensor:
    parameters = list(encoder.parameters())
    stride = max(1, sum(parameter.numel() for parameter in parameters) // _SAMPLED_WEIGHTS)
    return torch.cat([parameter.detach().flatten()[::stride].float() for parameter in parameters]).cpu()
