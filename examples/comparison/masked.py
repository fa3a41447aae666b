"""Methods that hide patches and take the image as it is: I-JEPA predicts representations of them, MAE their pixels."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from family import Family, numpy_generator
from torch import Generator, Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from views import ViewSettings, plain_images

from ijepa_hf import IJepaConfig
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import new_model

MAE_MASK_RATIO = 0.75


class IJepa(Family):
    """This package's `IJepaForPretraining` with its masks.

    Source: Assran et al., arXiv 2301.08243.
    """

    views_per_image = 1

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        self.model = new_model(config, seed).train()
        self.encoder = self.model.context_encoder

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        masks = draw_masks(self.config.mask_settings(), len(pixels), numpy_generator(generator))
        indices = (indices.to(pixels.device) for indices in (masks.context_indices, masks.target_indices))
        return self.model(plain_images(pixels, self.views, generator), *indices).loss

    def update_average(self, momentum: float) -> None:  # noqa: D102 (as in Family)
        self.model.update_target_encoder(momentum)

    def scored_encoder(self) -> nn.Module:  # noqa: D102 (as in Family)
        return self.model.target_encoder


class Mae(Family):
    """transformers' `ViTMAEForPreTraining`, its decoder as wide and deep as I-JEPA's predictor.

    The encoder has a class token and initial weights of its own; features are the mean over its patches.

    Source: He et al., arXiv 2111.06377: 75 % hidden (figure 5), targets normalised by patch (table 1d).
    """

    views_per_image = 1
    constants: ClassVar[Mapping[str, Any]] = {"mask_ratio": MAE_MASK_RATIO, "norm_pix_loss": True}

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed)
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                num_channels=config.num_channels,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                layer_norm_eps=config.layer_norm_eps,
                decoder_hidden_size=config.predictor_hidden_size,
                decoder_num_hidden_layers=config.predictor_num_hidden_layers,
                decoder_num_attention_heads=config.predictor_num_attention_heads or config.num_attention_heads,
                decoder_intermediate_size=4 * config.predictor_hidden_size,
                mask_ratio=MAE_MASK_RATIO,
                norm_pix_loss=True,
            )
        ).train()
        self.encoder = self.model.vit

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        noise = torch.rand(len(pixels), self.config.num_patches, generator=generator).to(pixels.device)
        return self.model(plain_images(pixels, self.views, generator), noise=noise).loss

    def patch_features(self, images: Tensor) -> Tensor:  # noqa: D102 (as in Family)
        # patches are kept in the order of their noise: with none hidden, rising noise leaves them in place
        noise = torch.arange(self.config.num_patches, device=images.device).expand(len(images), -1)
        self.model.config.mask_ratio = 0.0
        try:
            return self.model.vit(images, noise=noise).last_hidden_state[:, 1:]
        finally:
            self.model.config.mask_ratio = MAE_MASK_RATIO
