"""The bounds: the encoder as it begins, and the same encoder trained with all labels."""

from family import Family, pooled
from torch import Generator, Tensor, nn
from torch.nn import functional
from views import ViewSettings, make_views

from ijepa_hf import IJepaConfig


class Untrained(Family):
    """The initial weights; there is nothing to train."""

    views_per_image = 0


class Supervised(Family):
    """A linear classifier on the mean of patches, trained together with the encoder on augmented views.

    Args:
        config: As for `Family`.
        views: As for `Family`.
        seed: As for `Family`.
        num_classes: Number of labels.
    """

    views_per_image = 1

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int, num_classes: int) -> None:
        super().__init__(config, views, seed)
        self.classifier = nn.Linear(config.hidden_size, num_classes)

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        logits = self.classifier(pooled(self.encoder, make_views(pixels, self.views, generator)))
        return functional.cross_entropy(logits, labels)
