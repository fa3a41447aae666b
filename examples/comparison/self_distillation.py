"""Self-distillation: a student learns to say of a view what its moving average, the teacher, says of another one."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from family import AveragedFamily, both_views, mlp, patches, pooled
from losses import dino_loss, ibot_patch_loss, sharpened
from torch import Generator, Tensor, nn
from torch.nn import functional
from views import ViewSettings

from ijepa_hf import IJepaConfig

NUM_PROTOTYPES = 256
BOTTLENECK = 64
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.04
CENTRE_MOMENTUM = 0.9
MASKED_SHARE = (0.1, 0.5)  # of an image of which patches are hidden
MASKED_ASPECT_RATIO = (0.3, 1 / 0.3)


class PrototypeHead(nn.Module):
    """Three layers, then cosines with prototypes.

    Args:
        width: Of the features.

    Source: Caron et al., DINO, arXiv 2104.14294, section 3.2, "Network architecture"; prototypes of length 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = mlp([width, 2 * width, 2 * width, BOTTLENECK])
        self.prototypes = nn.Parameter(torch.randn(NUM_PROTOTYPES, BOTTLENECK))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[..., K]` of features `[..., D]`."""
        return functional.normalize(self.mlp(features), dim=-1) @ functional.normalize(self.prototypes, dim=-1).T


class Dino(AveragedFamily):
    """DINO with two large views and no small ones; an image's feature is the mean over its patches.

    Source: Caron et al., arXiv 2104.14294: temperatures 0.1 and 0.04, momentum of the centre 0.9.
    """

    views_per_image = 2
    constants: ClassVar[Mapping[str, Any]] = {
        "num_prototypes": NUM_PROTOTYPES, "bottleneck": BOTTLENECK, "student_temperature": STUDENT_TEMPERATURE,
        "teacher_temperature": TEACHER_TEMPERATURE, "centre_momentum": CENTRE_MOMENTUM,
    }  # fmt: skip
    centre: Tensor

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed, PrototypeHead(config.hidden_size))
        self.register_buffer("centre", torch.zeros(NUM_PROTOTYPES))

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        images = both_views(pixels, self.views, generator)
        with torch.no_grad():
            teacher = self.average_head(pooled(self.average_encoder, images))
        student = self.head(pooled(self.encoder, images))
        loss = self.loss_between_views(student, teacher)
        follow(self.centre, teacher)
        return loss

    def loss_between_views(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The DINO loss of logits `[2 * B, K]`, all first views before all second ones."""
        probabilities = sharpened(teacher, self.centre, TEACHER_TEMPERATURE)
        return dino_loss(student.unflatten(0, (2, -1)), probabilities.unflatten(0, (2, -1)), STUDENT_TEMPERATURE)


class IBot(Dino):
    """iBOT: DINO, and the student says of patches hidden from it what the teacher says of them; one head for both.

    Half of the views keep all patches; of the others one rectangle is hidden.

    Source: Zhou et al., arXiv 2111.07832, section 3.2 (both losses, summed; shared head), appendix (masks).
    """

    constants: ClassVar[Mapping[str, Any]] = {
        **Dino.constants, "masked_share": MASKED_SHARE, "masked_aspect_ratio": MASKED_ASPECT_RATIO,
    }  # fmt: skip
    patch_centre: Tensor

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, config.hidden_size))
        self.register_buffer("patch_centre", torch.zeros(NUM_PROTOTYPES))

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        images = both_views(pixels, self.views, generator)
        masked = draw_masked_patches(len(images), self.config.grid_size, generator).to(pixels.device)
        with torch.no_grad():
            seen = patches(self.average_encoder, images)
            teacher, teacher_patches = self.average_head(seen.mean(1)), self.average_head(seen)
        hidden = self.encode_masked(images, masked)
        probabilities = sharpened(teacher_patches, self.patch_centre, TEACHER_TEMPERATURE)
        loss = self.loss_between_views(self.head(hidden.mean(1)), teacher)
        loss = loss + ibot_patch_loss(self.head(hidden), probabilities, masked, STUDENT_TEMPERATURE)
        follow(self.centre, teacher)
        follow(self.patch_centre, teacher_patches.flatten(0, 1))
        return loss

    def encode_masked(self, images: Tensor, masked: Tensor) -> Tensor:
        """Features of images with a learned token in place of the hidden patches.

        Args:
            images: float `[B, 3, size, size]`, normalised.
            masked: bool `[B, N]`.

        Returns:
            `[B, N, D]`.
        """
        embeddings = self.encoder.embeddings
        rows = torch.where(masked[..., None], self.mask_token, embeddings.patch_embeddings(images))
        rows = rows + embeddings.position_embeddings
        for layer in self.encoder.layers:
            rows = layer(rows)
        return self.encoder.layernorm(rows)


def draw_masked_patches(count: int, grid_size: tuple[int, int], generator: Generator) -> Tensor:
    """A rectangle of hidden patches in half of the images, on average; none in the others.

    Args:
        count: Number of images.
        grid_size: Rows and columns of the patch grid.
        generator: The source of all draws.

    Returns:
        bool `[count, N]`.
    """
    is_masked, share, ratio, top, left = torch.rand(5, count, generator=generator)
    share = MASKED_SHARE[0] + (MASKED_SHARE[1] - MASKED_SHARE[0]) * share
    low, high = torch.tensor(MASKED_ASPECT_RATIO).log()
    ratio = torch.exp(low + (high - low) * ratio)
    inside = []
    for side, place, patches_wide in zip((share * ratio, share / ratio), (top, left), grid_size, strict=True):
        length = (side.sqrt() * patches_wide).round().clamp(1, patches_wide)
        first = (place * (patches_wide - length + 1)).floor()
        steps = torch.arange(patches_wide) - first[:, None]
        inside.append((steps >= 0) & (steps < length[:, None]))
    rectangles = inside[0][:, :, None] & inside[1][:, None, :] & (is_masked < 0.5)[:, None, None]
    return rectangles.flatten(1)


def follow(centre: Tensor, logits: Tensor) -> None:
    """Moves a centre towards the mean of a batch of the teacher's logits `[n, K]`, in place.

    Source: DINO, arXiv 2104.14294, equation 4.
    """
    centre.lerp_(logits.mean(0), 1 - CENTRE_MOMENTUM)
