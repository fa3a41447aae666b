"""Contrastive methods: two views of an image are near each other, and far from views of other images."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from family import AveragedFamily, Family, both_views, mlp, pooled
from losses import info_nce, nt_xent
from torch import Generator, Tensor
from torch.nn import functional
from views import ViewSettings, make_views

from ijepa_hf import IJepaConfig

EMBEDDING_SIZE = 64
SIMCLR_TEMPERATURE = 0.5
MOCO_TEMPERATURE = 0.2
QUEUE_SIZE = 512


class SimClr(Family):
    """Negatives are the other images of the batch.

    Source: Chen et al., arXiv 2002.05709: a head of two layers that is thrown away afterwards (section 4.2), a
    temperature of 0.5 as on CIFAR-10 (appendix B.9).
    """

    views_per_image = 2
    constants: ClassVar[Mapping[str, Any]] = {"temperature": SIMCLR_TEMPERATURE, "embedding_size": EMBEDDING_SIZE}

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        self.head = mlp([config.hidden_size, config.hidden_size, EMBEDDING_SIZE])

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        first, second = self.head(pooled(self.encoder, both_views(pixels, self.views, generator))).chunk(2)
        return nt_xent(first, second, SIMCLR_TEMPERATURE)


class MoCo(AveragedFamily):
    """MoCo v2: negatives are the keys of earlier batches, kept in a queue; keys come from the moving average.

    Source: He et al., arXiv 1911.05722 (queue and moving average); Chen et al., arXiv 2003.04297 (head of two layers,
    temperature 0.2).
    """

    views_per_image = 2
    constants: ClassVar[Mapping[str, Any]] = {
        "temperature": MOCO_TEMPERATURE, "embedding_size": EMBEDDING_SIZE, "queue_size": QUEUE_SIZE,
    }  # fmt: skip
    queue: Tensor

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed, mlp([config.hidden_size, config.hidden_size, EMBEDDING_SIZE]))
        self.register_buffer("queue", functional.normalize(torch.randn(QUEUE_SIZE, EMBEDDING_SIZE), dim=1))
        self.next_place = 0

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        queries = self.head(pooled(self.encoder, make_views(pixels, self.views, generator)))
        with torch.no_grad():
            keys = self.average_head(pooled(self.average_encoder, make_views(pixels, self.views, generator)))
        loss = info_nce(queries, keys, self.queue.clone(), MOCO_TEMPERATURE)  # the backward pass needs it as it was
        self.enqueue(keys)
        return loss

    def enqueue(self, keys: Tensor) -> None:
        """Puts keys in the places of the oldest ones.

        Args:
            keys: `[B, D]`; their length is made 1.
        """
        places = (self.next_place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = functional.normalize(keys, dim=1)
        self.next_place = (self.next_place + len(keys)) % len(self.queue)
