"""Computes features, predictions and errors of images with the networks: without gradients, in eval mode."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining, distance


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode without gradients for a while, then each module back in its own mode.

    Args:
        model: The model; parts of it may be frozen in eval mode for good.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode_patches(encoder: IJepaModel, pixel_values: Tensor, *, batch_size: int = 64) -> Tensor:
    """Computes the features of the last layer, patch by patch and in their places.

    Args:
        encoder: An I-JEPA encoder; for other vision backbones there is `evaluation.backbones`.
        pixel_values: float `[n, C, height, width]`, normalised.
        batch_size: Images in a forward pass.

    Returns:
        float32 `[n, rows, columns, D]` on the CPU.
    """
    parameter = next(encoder.parameters())
    with evaluating(encoder):
        parts = [
            encoder(images.to(parameter.device, parameter.dtype)).last_hidden_state.float().cpu()
            for images in pixel_values.split(batch_size)
        ]
    return torch.cat(parts).unflatten(1, encoder.config.grid_size)


def prediction_errors(
    model: IJepaForPretraining, pixel_values: Tensor, context_indices: Tensor, target_indices: Tensor
) -> Tensor:
    """Computes the model's loss at each target patch of each block: their mean is the loss of the batch.

    Args:
        model: The model.
        pixel_values: float `[B, C, height, width]`, normalised.
        context_indices: int64 `[B, K]` or `[B, S, K]`; errors are means over the S context sets.
        target_indices: int64 `[B, M, P]`.

    Returns:
        float32 `[B, M, P]` on the CPU.
    """
    predictions, targets = predict_targets(model, pixel_values, context_indices, target_indices)
    errors = distance(predictions, targets[:, None].expand_as(predictions), model.config.loss_type, reduction="none")
    return errors.mean(dim=-1).mean(dim=1).cpu()


def target_features(model: IJepaForPretraining, pixel_values: Tensor) -> Tensor:
    """Computes the target encoder's representations of every patch, normalised as the loss compares them.

    Args:
        model: The model.
        pixel_values: float `[b, C, height, width]`, normalised.

    Returns:
        `[b, N, D]` in the model's dtype, on its device.
    """
    parameter = next(model.parameters())
    with evaluating(model):
        return model.represent(pixel_values.to(parameter.device, parameter.dtype))


def predict_targets(
    model: IJepaForPretraining, pixel_values: Tensor, context_indices: Tensor, target_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Predicts target blocks.

    Args:
        model: The model.
        pixel_values: float `[B, C, height, width]`, normalised.
        context_indices: int64 `[B, K]` or `[B, S, K]`.
        target_indices: int64 `[B, M, P]`.

    Returns:
        Predictions `[B, S, M, P, D]` and targets `[B, M, P, D]`, float32, on the model's device.
    """
    parameter = next(model.parameters())
    sets = context_indices if context_indices.ndim == 3 else context_indices[:, None]
    with evaluating(model):
        output = model(
            pixel_values.to(parameter.device, parameter.dtype),
            context_indices=sets.to(parameter.device),
            target_indices=target_indices.to(parameter.device),
            return_loss=False,
        )
    return output.predictions.float(), output.targets.float()


def extract_features(model: nn.Module, pixel_values: torch.Tensor, *, batch_size: int = 256) -> np.ndarray:
    """Runs a frozen vision backbone over images and averages its last layer over the patches.

    The model runs in eval mode, without gradients, on its own device and in its own dtype; the mode of each of its
    modules is then put back.

    Args:
        model: a transformers vision backbone, whose output has `last_hidden_state` [B, N, D] (a class token counts as
            a patch) or [B, D, rows, columns].
        pixel_values: [n, C, height, width], floating point and normalised, on any device; n at least 1.
        batch_size: images in a forward pass, 1 or more.

    Returns:
        float32 [n, D], averaged in float32.

    Raises:
        ValueError: pixels that are not a floating [n, C, height, width] tensor, a batch size below 1, or a model
            without `last_hidden_state` (for an `IJepaForPretraining`, pass its `target_encoder`).

    Source: I-JEPA (arXiv 2301.08243), appendix A.2: the target encoder's patches of the last layer, average-pooled.
    """
    if pixel_values.ndim != 4 or len(pixel_values) == 0 or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype} must be floating point "
            "[n, C, height, width] with n at least 1: pass them through ijepa_hf.data.transforms.normalize first."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    parameter = next(model.parameters())
    pooled = []
    with evaluating(model):
        for images in pixel_values.split(batch_size):
            output = model(pixel_values=images.to(parameter.device, parameter.dtype))
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                raise ValueError(
                    f"the output of {type(model).__name__} has no last_hidden_state: pass an encoder, such as "
                    "AutoModel.from_pretrained(...) or the target_encoder of an IJepaForPretraining."
                )
            patches = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
            pooled.append(patches.float().mean(dim=1).cpu())
    return torch.cat(pooled).numpy()
