"""What all families have in common: an encoder that is trained and scored, a loss, and perhaps a moving average."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from views import ViewSettings, make_views

from ijepa_hf import IJepaConfig, IJepaModel
from ijepa_hf.model.modeling_ijepa import new_model


class Family(nn.Module):
    """A way to train an encoder. What has `requires_grad` is trained; moving averages have none.

    Args:
        config: Of the encoder, and of I-JEPA's predictor and masks.
        views: What images of the data set may be turned into.
        seed: Of the encoder's initial weights, the same ones for all families but MAE. Weights of heads come from
            torch's global generator.

    Attributes:
        views_per_image: Pictures that are made of an image in a step.
        constants: What the family alone has: temperatures, sizes; written down with its results.
        encoder: What is trained.
    """

    views_per_image: ClassVar[int]
    constants: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__()
        self.config, self.views = config, views
        self.encoder: nn.Module = new_encoder(config, seed)

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """The loss of a batch.

        Args:
            pixels: uint8 `[B, 3, size, size]`.
            labels: int64 `[B]`; only the supervised bound looks at them.
            generator: The source of all draws of the step.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    def update_average(self, momentum: float) -> None:
        """Lets moving averages follow, after an optimiser step; families without one do nothing.

        Args:
            momentum: Share of the average that stays, in [0, 1].
        """

    def scored_encoder(self) -> nn.Module:
        """The encoder whose features are scored: the moving average where there is one, else the trained one."""
        return self.encoder

    def patch_features(self, images: Tensor) -> Tensor:
        """Features of whole images.

        Args:
            images: float `[B, 3, size, size]`, normalised.

        Returns:
            `[B, N, D]`, one row a patch, of `scored_encoder`.
        """
        return patches(self.scored_encoder(), images)


class AveragedFamily(Family):
    """A family with a moving average of its encoder and head: no gradient, scored in the encoder's place.

    Args:
        config: As for `Family`.
        views: As for `Family`.
        seed: As for `Family`.
        head: On the encoder's features.
    """

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int, head: nn.Module) -> None:
        super().__init__(config, views, seed)
        self.head = head
        self.average_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.average_head = copy.deepcopy(head).requires_grad_(False)

    @torch.no_grad()
    def update_average(self, momentum: float) -> None:  # noqa: D102 (as in Family)
        for average, trained in ((self.average_encoder, self.encoder), (self.average_head, self.head)):
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - momentum)

    def scored_encoder(self) -> nn.Module:  # noqa: D102 (as in Family)
        return self.average_encoder


def new_encoder(config: IJepaConfig, seed: int) -> IJepaModel:
    """The encoder with the weights that an I-JEPA run of this seed begins with.

    Args:
        config: The configuration.
        seed: The seed.

    Returns:
        The encoder, trainable.
    """
    return new_model(config, seed).context_encoder.train()


def patches(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features of all patches; images smaller than the encoder's get a smaller position table.

    Args:
        encoder: An `IJepaModel`.
        images: float `[B, 3, s, s]`, normalised.

    Returns:
        `[B, n, D]`.
    """
    return encoder(images, interpolate_pos_encoding=True).last_hidden_state


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """The mean over patches, an image's feature: `[B, D]`."""
    return patches(encoder, images).mean(dim=1)


def both_views(pixels: Tensor, views: ViewSettings, generator: Generator) -> Tensor:
    """Two views of each image, `[2 * B, 3, size, size]`: all first ones, then all second ones."""
    return torch.cat([make_views(pixels, views, generator) for _ in range(2)])


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with GELU between them.

    Biases begin at 0: pooled features of a new encoder are much alike, and a bias makes them more so.
    """
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layer = nn.Linear(width, following)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.GELU()]
    return nn.Sequential(*layers[:-1])


def numpy_generator(generator: Generator) -> np.random.Generator:
    """A generator of numpy that is keyed by the next draw of one of torch."""
    return np.random.Generator(np.random.Philox(int(torch.randint(2**62, (), generator=generator))))
