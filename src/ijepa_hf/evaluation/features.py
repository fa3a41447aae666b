"""Frozen features: one vector an image, the mean over its patches of the encoder's last layer.

This is how the paper evaluates ("average-pooled patches"), and what the stock classification head does.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def extract_features(model: nn.Module, pixel_values: torch.Tensor, *, batch_size: int = 256) -> np.ndarray:
    """Run a frozen vision backbone over images and average its last layer over the patches.

    The model runs in eval mode, without gradients, on its own device and in its own dtype; the mode of each of its
    modules is then put back.

    Args:
        model: a transformers vision backbone, whose output has `last_hidden_state` [B, N, D] (a class token counts as
            a patch) or [B, D, rows, columns].
        pixel_values: [n, C, height, width], floating point and normalised, on any device; n at least 1.
        batch_size: images a forward pass, 1 or more.

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
            "[n, C, height, width] with n at least 1: pass them through image_transforms.normalize first."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    parameter = next(model.parameters())
    pooled = []
    with _evaluating(model), torch.no_grad():
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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while. Module by module, because parts of a model may be frozen in eval mode for good."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
