"""Extracts frozen features: by default one vector for each image, the mean over the patches of the last layer.

The mean is how the paper evaluates ("average-pooled patches"), and what the stock classification head does.
`extract_features` takes pixels that are in memory. `iterate_features` takes images as they lie on disk, and reads the
next batches in threads while the model works.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from ijepa_hf.data.transforms import normalize, resize, stack_images
from ijepa_hf.model.vision_models import ImageSettings

_BATCHES_AHEAD = 2
_MOST_READERS = 16  # threads


class Images(Protocol):
    """Describes decoded images by number, as `data.ImageRows` has them."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def __getitem__(self, index: int) -> Any:
        """Returns an image of `image_transforms.decode_image`; one that cannot be read is a `ValueError`."""


def iterate_features(
    images: Images,
    parts: Sequence[range],
    encode: Callable[[torch.Tensor], torch.Tensor],
    settings: ImageSettings,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    description: str = "",
) -> Iterator[np.ndarray]:
    """Reads, resizes and normalises images, and runs a function over them, part by part.

    No batch holds images of two parts, so the features of a part do not depend on which other parts are asked for.
    Memory holds one part's features and the pixels of three batches. A progress bar is drawn on a terminal.

    Args:
        images: The images.
        parts: Ranges of them.
        encode: Takes float32 `[B, C, height, width]`, normalised, on `device`, and returns `[B, ...]`.
        settings: The size that each whole image is resized to, and the mean and deviation of its channels.
        batch_size: Images in a forward pass, 1 or more.
        device: Where pixels are normalised and `encode` works.
        description: Of the progress bar.

    Yields:
        float32 `[len(part), ...]` for each part.

    Raises:
        ValueError: If an image cannot be read, naming it, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")

    def read(indices: range) -> list[torch.Tensor]:
        return [read_one(index) for index in indices]

    def read_one(index: int) -> torch.Tensor:
        try:
            return resize(images[index], settings.shape)
        except ValueError as error:
            raise ValueError(
                f"{error} No image is skipped: mend or remove it, or let `ijepa-hf prepare` write the set without "
                "those that cannot be read."
            ) from error

    batches = [
        (number, part[start : start + batch_size])
        for number, part in enumerate(parts)
        for start in range(0, len(part), batch_size)
    ]
    num_readers = min(_MOST_READERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_readers, "read-images")
    with tqdm(total=sum(map(len, parts)), desc=description, unit=" images", disable=None) as bar:
        try:
            waiting: deque[list[Future[list[torch.Tensor]]]] = deque()
            done: list[np.ndarray] = []
            upcoming = iter(batches)
            for number, batch in batches:
                while len(waiting) <= _BATCHES_AHEAD and (following := next(upcoming, None)) is not None:
                    # a stretch for each thread: handing over single small images costs as much as decoding them
                    step = -(-len(following[1]) // num_readers)
                    stretches = [following[1][start : start + step] for start in range(0, len(following[1]), step)]
                    waiting.append([pool.submit(read, stretch) for stretch in stretches])
                pixels = stack_images([image for future in waiting.popleft() for image in future.result()])
                done.append(encode(normalize(pixels.to(device), settings.mean, settings.std)).float().cpu().numpy())
                bar.update(len(batch))
                if batch.stop == parts[number].stop:
                    yield np.concatenate(done)
                    done.clear()
        finally:
            pool.shutdown(cancel_futures=True)
