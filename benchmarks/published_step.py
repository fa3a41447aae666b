"""The other side of the training rows: the published networks, or a restatement of them in plain PyTorch.

`IJEPA_OFFICIAL` names a checkout of github.com/facebookresearch/ijepa, which is not part of this project (its licence
is CC BY-NC); its networks are then imported from there. Without one, `tests/plain_ijepa.py` stands for it: the same
method, written by us. In both cases the step around the networks is that file's: targets, context, predictor, loss,
AdamW as `torch.optim.AdamW` comes, and the moving average parameter by parameter. The published loop also collects
statistics of gradients in every step; that is left out, to its advantage.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_hf.model.configuration_ijepa import IJepaConfig

TESTS = Path(__file__).resolve().parent.parent / "tests"


def reference_name(checkout: Path | None) -> str:
    """What the other side is called in the table."""
    return "published code" if checkout else "plain PyTorch"


class PublishedStep:
    """The published networks at the size of a configuration, and one training step of them.

    Args:
        config: Square images and patches, three channels.
        checkout: A checkout of the published code; `None` takes the restatement.
        device: Where the networks are.
        autocast_dtype: Computes in it under autocast, as the published code does in bf16; `None` is float32.
    """

    def __init__(
        self,
        config: IJepaConfig,
        checkout: Path | None,
        *,
        device: str = "cpu",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        networks = _networks_module(checkout)
        norm = partial(nn.LayerNorm, eps=config.layer_norm_eps)
        shared = {"qkv_bias": True, "norm_layer": norm}
        narrow = config.predictor_config()
        side = config.image_shape[0]

        def encoder() -> nn.Module:
            return networks.VisionTransformer(
                img_size=[side],
                patch_size=config.patch_shape[0],
                embed_dim=config.hidden_size,
                depth=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                mlp_ratio=config.intermediate_size / config.hidden_size,
                **shared,
            )

        predictor = networks.VisionTransformerPredictor(
            num_patches=config.num_patches,
            embed_dim=config.hidden_size,
            predictor_embed_dim=narrow.hidden_size,
            depth=narrow.num_hidden_layers,
            num_heads=narrow.num_attention_heads,
            mlp_ratio=narrow.intermediate_size / narrow.hidden_size,
            **shared,
        )
        self.networks = [encoder().to(device), predictor.to(device), encoder().to(device)]
        self.networks[2].load_state_dict(self.networks[0].state_dict())
        self.networks[2].requires_grad_(False)
        self.optimizer = _plain_module().make_adamw(*self.networks[:2])
        self.device_type = torch.device(device).type
        self.autocast_dtype = autocast_dtype

    def __call__(self, batch: dict[str, Tensor], *, learning_rate: float = 1e-4) -> float:
        """One step on normalised `pixel_values` and the indices of one context set; returns the loss."""
        return _plain_module().train_step(
            self.networks,
            self.optimizer,
            batch,
            learning_rate=learning_rate,
            weight_decay=0.04,
            momentum=0.996,
            autocast=self._autocast,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)


def _networks_module(checkout: Path | None) -> Any:
    if checkout is None:
        return _plain_module()
    with _importing_from(checkout.resolve()):
        import src.models.vision_transformer as networks  # type: ignore[import-not-found]
    return networks


def _plain_module() -> Any:
    with _importing_from(TESTS):
        import plain_ijepa  # type: ignore[import-not-found]
    return plain_ijepa


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
