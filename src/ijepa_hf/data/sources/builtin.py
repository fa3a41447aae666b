"""Makes the built-in data sets `digits` and `shapes`."""

import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from datasets.fingerprint import Hasher

from ijepa_hf.data.sources import shapes

DIGITS_TEST_SHARE = 0.2

SHAPES_SPLITS = {"train": (0, 5000), "test": (1, 1000)}  # seed and number of scenes


@functools.cache
def load_digits(split: str) -> datasets.Dataset:
    """Loads scikit-learn's 1,797 scanned digits (UCI): 8x8 grayscale, enlarged to 32x32 (bilinear); works offline.

    They are drawn once in a process: the result is shared, so do not change its format in place.

    Args:
        split: `train` (1,437 images) or `test` (360), a stratified split that never changes.

    Returns:
        Columns `image` (8-bit grayscale) and `label` (0 .. 9).

    Raises:
        ValueError: For another split.
    """
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}; it has 'train' and 'test'.")
    scans = load_scans()
    indices = np.arange(len(scans.target))
    halves = train_test_split(indices, test_size=DIGITS_TEST_SHARE, random_state=0, stratify=scans.target)
    chosen = np.sort(halves[0] if split == "train" else halves[1])
    # scans hold 0 .. 16
    pixels = np.rint(scans.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [PIL.Image.fromarray(scan).resize((32, 32), PIL.Image.Resampling.BILINEAR) for scan in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": scans.target[chosen].tolist()}, features=features)


def load_shapes(split: str) -> datasets.Dataset:
    """Draws 96x96 scenes of a few coloured shapes (see `draw_shape_scene`); works offline.

    They are drawn once, about 2 ms each on one CPU core, and kept in the cache of `datasets`, 7 MB per 1,000.

    Args:
        split: `train` (5,000 scenes) or `test` (1,000, of another seed), which never change.

    Returns:
        Columns `image` (RGB), `label` (kind of the object of which most is visible), `count` (objects, 2 .. 6),
        `nearest_distance` (pixels between the two nearest centres), `boxes` (left, top, right, bottom of the visible
        part of each object, in pixels), `box_classes` (their kinds), and `segmentation` (picture of mode L: 0 for the
        background, else 1 + kind).

    Raises:
        ValueError: For another split.
    """
    if split not in SHAPES_SPLITS:
        raise ValueError(f"shapes has no split {split!r}; it has 'train' and 'test'.")
    seed, count = SHAPES_SPLITS[split]
    kinds = datasets.ClassLabel(names=list(shapes.SHAPE_KINDS))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": kinds,
            "count": datasets.Value("int32"),
            "nearest_distance": datasets.Value("float32"),
            "boxes": datasets.List(datasets.List(datasets.Value("int32"), length=4)),
            "box_classes": datasets.List(kinds),
            "segmentation": datasets.Image(),
        }
    )
    # a change of this code gives another entry in the cache
    key = (Path(shapes.__file__).read_text("utf-8"), PIL.__version__, np.__version__)
    arguments = {"seed": seed, "count": count, "key": Hasher.hash(key)}
    return datasets.Dataset.from_generator(_shapes_rows, features=features, gen_kwargs=arguments)


def _shapes_rows(seed: int, count: int, key: str) -> Iterator[dict[str, Any]]:
    del key
    for index in range(count):
        scene = shapes.draw_shape_scene(seed, index)
        yield {
            "image": {"bytes": _to_png(scene.image)},
            "label": scene.label,
            "count": scene.count,
            "nearest_distance": scene.nearest_distance,
            "boxes": scene.boxes.tolist(),
            "box_classes": scene.box_classes.tolist(),
            "segmentation": {"bytes": _to_png(PIL.Image.fromarray(scene.segmentation))},
        }


def _to_png(image: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


BUILT_IN: dict[str, Callable[[str], datasets.Dataset]] = {"digits": load_digits, "shapes": load_shapes}
