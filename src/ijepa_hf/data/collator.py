"""Makes a batch with masks from images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.order import SampleKey
from ijepa_hf.data.reading import UnreadableImage
from ijepa_hf.data.transforms import (
    CROP_NUMBERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalize,
    random_resized_crop,
    stack_images,
)
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.masking import Masks, draw_masks
from ijepa_hf.randomness import DRAW_MASKS, keyed_generator


class IJepaDataCollator:
    """Makes a batch of rows: pixels, and the masks drawn for them.

    Works alone in any `DataLoader` and in `transformers.Trainer` (with `remove_unused_columns=False`): rows are
    those of a data set with an image column (cropped here), or hold ready `pixel_values`. Rows of
    `PretrainingImages` carry their `SampleKey`, which the masks then depend on; for other rows the draws come from
    torch's global generator, which a `DataLoader` seeds in each worker.

    Args:
        config: Says the image size, the grid and how masks are drawn.
        normalize: Give normalised floats (default), or pixels as they are, to be normalised on the device.
        image_mean: Mean of each channel, of pixels in [0, 1]; ImageNet's if not given.
        image_std: Standard deviation of each channel, above 0; ImageNet's if not given.
        min_crop_scale: For rows with images: least share of the image that a random crop covers; 1 means no cropping.
        image_column_name: For rows with images: their column; `image` or `img` if not given.
        seed: For rows with a `SampleKey`: the run's seed.
        global_batch_size: For rows with a `SampleKey`: images in an optimiser step, over all ranks and micro-batches.

    Raises:
        ValueError: If mean or std do not fit the number of channels.
    """

    def __init__(
        self,
        config: IJepaConfig,
        normalize: bool = True,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        min_crop_scale: float = 0.3,
        image_column_name: str | None = None,
        seed: int = 0,
        global_batch_size: int | None = None,
    ) -> None:
        self.config = config
        self.settings = config.mask_settings()
        self.normalize = normalize
        self.image_mean = tuple(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = tuple(IMAGENET_STD if image_std is None else image_std)
        self.min_crop_scale = min_crop_scale
        self.image_column_name = image_column_name
        self.seed = seed
        self.global_batch_size = global_batch_size
        for name in ("image_mean", "image_std"):
            if normalize and len(getattr(self, name)) != config.num_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, but num_channels={config.num_channels}; give one "
                    "for each channel."
                )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: B rows.

        Returns:
            `pixel_values` `[B, num_channels, height, width]` (float32, or as the rows have them with
            `normalize=False`), `context_indices` int64 `[B, K]` or `[B, S, K]`, `target_indices` int64 `[B, M, P]`.

        Raises:
            ValueError: If a row has neither `pixel_values` nor an image column.
        """
        keys = [row["sample_key"] for row in rows if "sample_key" in row]
        if keys:
            masks = self._masks_of_step(keys)
            pixels = stack_images([row["pixel_values"] for row in rows])
        else:
            generator = np.random.Generator(np.random.Philox(int(torch.randint(2**62, ()))))
            masks = draw_masks(self.settings, len(rows), generator)
            pixels = stack_images([self._pixels_of(row, generator) for row in rows])
        if self.normalize:
            pixels = normalize(pixels, self.image_mean, self.image_std)
        return {
            "pixel_values": pixels,
            "context_indices": masks.context_indices,
            "target_indices": masks.target_indices,
        }

    def _masks_of_step(self, keys: list[SampleKey]) -> Masks:
        """Draws the masks of the whole optimiser step and takes this micro-batch's slots."""
        first = keys[0]
        if [(key.step, key.slot) for key in keys] != [(first.step, first.slot + i) for i in range(len(keys))]:
            raise ValueError(
                "rows of a batch must have consecutive slots of one step, as StepBatchSampler gives them."
            )
        size = self.global_batch_size or len(keys)
        slots = slice(first.slot, first.slot + len(keys))
        return draw_masks(self.settings, size, keyed_generator(self.seed, DRAW_MASKS, first.step), slots)

    def _pixels_of(self, row: dict[str, Any], generator: np.random.Generator) -> Tensor:
        if "pixel_values" in row:
            return torch.as_tensor(row["pixel_values"])
        image = decode_image(row[self._image_column(row)], self.config.num_channels)
        return random_resized_crop(
            image, self.config.image_shape, self.min_crop_scale, generator.random(CROP_NUMBERS).tolist()
        )

    def _image_column(self, row: dict[str, Any]) -> str:
        column = self.image_column_name or next((name for name in ("image", "img") if name in row), None)
        if column is None or column not in row:
            raise ValueError(
                f"rows have the columns {', '.join(map(repr, row))}, no pixel_values and no image column; give "
                "image_column_name, and with transformers.Trainer set remove_unused_columns=False."
            )
        return column


class Batch(NamedTuple):
    """Holds one batch of a run: the model's inputs, and the images that were skipped."""

    inputs: dict[str, Tensor]
    unreadable: list[UnreadableImage]


class BatchMaker:
    """Makes a `Batch` of rows as `CropReader` gives them.

    Args:
        collator: Makes the inputs.
    """

    def __init__(self, collator: IJepaDataCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Returns the batch of some rows."""
        return Batch(self.collator(rows), [image for row in rows for image in row["unreadable"]])
