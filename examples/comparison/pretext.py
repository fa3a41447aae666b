"""Pretext tasks: a question about an image whose answer is known without labels."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from family import Family, mlp, pooled
from torch import Generator, Tensor, nn
from torch.nn import functional
from views import ViewSettings, plain_images

from ijepa_hf import IJepaConfig

TILES = 3  # in each direction
NUM_PERMUTATIONS = 64
CANDIDATES = 5000  # permutations among which the most different ones are chosen
PERMUTATION_SEED = 0


class Rotation(Family):
    """Each image is shown in all four rotations, and the encoder has to say by how much it is turned.

    Source: Gidaris et al., RotNet, arXiv 1803.07728, section 3 (all four at once).
    """

    views_per_image = 4

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        self.classifier = nn.Linear(config.hidden_size, 4)

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        turned, turns = rotations(plain_images(pixels, self.views, generator))
        return functional.cross_entropy(self.classifier(pooled(self.encoder, turned)), turns)


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """All four rotations of square images.

    Args:
        images: `[B, C, side, side]`.

    Returns:
        `[4 * B, C, side, side]`, and int64 `[4 * B]`, quarter turns against the clock, 0 to 3.
    """
    turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


class Jigsaw(Family):
    """Nine tiles of an image, each encoded by itself, are shuffled; a head has to say by which permutation.

    Tiles are cut with a gap of random width between them, so that their edges do not fit together.

    Source: Noroozi and Favaro, arXiv 1603.09246, section 3 (tiles apart from each other, permutations that differ in
    many places, features of the tiles joined in a head).
    """

    views_per_image = 1
    constants: ClassVar[Mapping[str, Any]] = {"tiles": TILES**2, "num_permutations": NUM_PERMUTATIONS}

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        width = config.hidden_size
        permutations = far_permutations(TILES**2, NUM_PERMUTATIONS, np.random.default_rng(PERMUTATION_SEED))
        self.register_buffer("permutations", torch.from_numpy(permutations))
        self.head = mlp([TILES**2 * width, 2 * width, NUM_PERMUTATIONS])

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        patch = self.config.patch_shape[0]
        side = pixels.shape[-1] // TILES // patch * patch  # the largest whole number of patches
        tiles = cut_tiles(plain_images(pixels, self.views, generator), side, generator)
        answers = torch.randint(NUM_PERMUTATIONS, (len(pixels),), generator=generator).to(pixels.device)
        tiles = permuted(tiles, self.permutations[answers])
        features = pooled(self.encoder, tiles.flatten(0, 1)).view(len(pixels), -1)
        return functional.cross_entropy(self.head(features), answers)


def cut_tiles(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Cuts `TILES` x `TILES` cells and out of each, at a random place, a smaller tile.

    Args:
        images: `[B, C, height, height]`.
        side: Of a tile, pixels; at most a `TILES`th of the image's.
        generator: The source of all draws.

    Returns:
        `[B, TILES * TILES, C, side, side]`, row by row.
    """
    batch, channels, height, _ = images.shape
    cell = height // TILES
    places = torch.randint(cell - side + 1, (2, batch, TILES, TILES), generator=generator)
    starts = cell * torch.arange(TILES)
    rows = (places[0] + starts[:, None])[..., None] + torch.arange(side)  # [B, TILES, TILES, side]
    columns = (places[1] + starts)[..., None] + torch.arange(side)
    flat = (rows[..., :, None] * height + columns[..., None, :]).view(batch, 1, -1).to(images.device)
    picked = images.flatten(2).gather(2, flat.expand(-1, channels, -1))
    return picked.view(batch, channels, TILES**2, side, side).transpose(1, 2)


def permuted(tiles: Tensor, permutations: Tensor) -> Tensor:
    """Tiles in another order.

    Args:
        tiles: `[B, T, ...]`.
        permutations: int64 `[B, T]`: at place t stands the tile of number `permutations[b, t]`.

    Returns:
        `[B, T, ...]`.
    """
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], permutations]


def far_permutations(length: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Permutations that differ from each other in many places, chosen one by one from random candidates.

    Args:
        length: Number of things that are permuted.
        count: How many permutations.
        generator: The source of the candidates.

    Returns:
        int64 `[count, length]`, all different.

    Source: Noroozi and Favaro, arXiv 1603.09246, algorithm 1 (largest Hamming distance, here the least of the
    distances to those chosen).
    """
    candidates = generator.permuted(np.tile(np.arange(length), (CANDIDATES, 1)), axis=1)
    chosen = [0]
    distance = np.full(CANDIDATES, length)
    for _ in range(count - 1):
        distance = np.minimum(distance, (candidates != candidates[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen]
