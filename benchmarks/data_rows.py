"""The rows of the table about the data path: pictures to batches, small images in memory, masks.

    python benchmarks/data_rows.py --images path/to/jpegs --cifar path/to/cifar10 --checkout path/to/ijepa

What stands beside ours is the published pipeline, restated here with Pillow and torch: decode in full, convert to RGB,
cut the box out, resize, float tensor in [0, 1], normalise image by image, stack. Its boxes are ours, drawn beforehand
and free of charge. All is done by one thread, timed with the process's own clock, and neither side draws masks.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from mask_speed import our_sampler, published_options, published_sampler
from PIL import Image
from side_by_side import Row, ratios, render_table, scaled, take_turns

from ijepa_hf.data.memory_images import MemoryCrops, decode_all
from ijepa_hf.data.order import SampleKey
from ijepa_hf.data.prepare.prepare import PrepareSettings, prepare
from ijepa_hf.data.reading import CropReader, ImageRows, PretrainingImages, crop_numbers
from ijepa_hf.data.sources.opening import ImageSource, find_image_column, load_split
from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, crop_box, normalize, stack_images
from ijepa_hf.model.masking import MaskSettings

MIN_CROP_SCALE = 0.3
IMAGES = 64  # of a batch of photographs
SIZE = (224, 224)
PREPARED_SIDE = 256
SMALL_IMAGES, SMALL_BATCH = 4096, 256  # of an epoch and of a batch
MASK_CASES = (((14, 14), 64), ((16, 16), 256))
OUR_BATCHES, THEIR_BATCHES = 50, 2  # of masks, in a round

Box = tuple[int, int, int, int]


# -- the published pipeline ------------------------------------------------------------------------------------------


def published_crop(picture: Image.Image, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """One image as the published pipeline makes it: float32 [3, height, width], normalised."""
    top, left, height, width = box
    picture = picture.convert("RGB")
    picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)


def published_batch(files: Sequence[Path], boxes: Sequence[Box], size: tuple[int, int]) -> torch.Tensor:
    """A batch of pictures in files."""
    images = []
    for file, box in zip(files, boxes, strict=True):
        with file.open("rb") as opened:
            images.append(published_crop(Image.open(opened), box, size))
    return torch.stack(images)


# -- photographs -----------------------------------------------------------------------------------------------------


def synthetic_photographs(folder: Path, count: int) -> None:
    """Writes JPEGs of about 500x375: smooth shading, edges and grain, about 100 kB each as those of ImageNet."""
    for number in range(count):
        generator = np.random.default_rng(number)
        width, height = int(generator.integers(400, 520)), int(generator.integers(330, 400))
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        fine = generator.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        smooth, edges = (
            np.asarray(Image.fromarray(part).resize((width, height), how), dtype=np.float32)
            for part, how in ((coarse, Image.Resampling.BICUBIC), (fine, Image.Resampling.NEAREST))
        )
        pixels = 0.8 * smooth + 0.2 * edges + generator.normal(0, 6, smooth.shape)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=92)


def _opened(folder: Path) -> PretrainingImages:
    dataset = load_split(ImageSource(str(folder)), "train")
    rows = ImageRows(dataset, find_image_column(dataset), 3)
    return PretrainingImages(rows, CropReader(rows.images, SIZE, MIN_CROP_SCALE, seed=0))


def _prepared(photographs: Path, folder: Path, image_format: str) -> PretrainingImages:
    prepare(str(photographs), folder, PrepareSettings(shortest_side=PREPARED_SIDE, image_format=image_format))
    return _opened(folder)


def _boxes(sizes: Sequence[tuple[int, int]], keys: Sequence[SampleKey], size: tuple[int, int]) -> list[Box]:
    """The boxes that ours draws; `sizes` are widths and heights."""
    return [
        crop_box(height, width, size, MIN_CROP_SCALE, numbers)
        for (width, height), numbers in zip(sizes, crop_numbers(0, keys), strict=True)
    ]


def image_pipeline_rows(rounds: int, images_folder: Path | None = None) -> list[Row]:
    """Photographs to batches, as they are and prepared.

    Args:
        rounds: Timed rounds, at least 2.
        images_folder: A folder of JPEGs, at least 2; drawn by `synthetic_photographs` if not given.

    Returns:
        For both: the loader's part (pixels leave as bytes, to be normalised on the device), and with normalising on
        the same core. Prepared images are held against the published pipeline on the photographs they were made of.
    """
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        photographs = images_folder
        if photographs is None:
            photographs = Path(temporary) / "photographs"
            photographs.mkdir()
            synthetic_photographs(photographs, IMAGES)
        images = _opened(photographs)
        prepared, uncompressed = (
            _prepared(photographs, Path(temporary) / image_format, image_format) for image_format in ("keep", "bmp")
        )
        count = min(IMAGES, len(images))
        order = np.random.default_rng(0).permutation(len(images))[:count].tolist()
        keys = [SampleKey(0, 0, slot, image) for slot, image in enumerate(order)]
        rows = images.images.raw_rows(order)
        files = [Path(next(iter(row.values()))["path"]) for row in rows]
        encoded = [file.read_bytes() for file in files]
        boxes = _boxes([Image.open(file).size for file in files], keys, SIZE)
        small, smallest = (
            [next(iter(row.values()))["bytes"] for row in source.images.raw_rows(order)]
            for source in (prepared, uncompressed)
        )
        small_boxes = _boxes([Image.open(io.BytesIO(data)).size for data in small], keys, SIZE)
        small_files = [Path(temporary) / f"{slot}.jpg" for slot in range(count)]
        for file, data in zip(small_files, small, strict=True):
            file.write_bytes(data)

        def ours(source: PretrainingImages) -> torch.Tensor:
            return stack_images([row["pixel_values"] for row in source.__getitems__(keys)])

        times = take_turns(
            {
                "published": lambda: published_batch(files, boxes, SIZE),
                "published, prepared": lambda: published_batch(small_files, small_boxes, SIZE),
                "ours": lambda: ours(images),
                "ours, normalised": lambda: normalize(ours(images), IMAGENET_MEAN, IMAGENET_STD),
                "prepared": lambda: ours(prepared),
                "prepared, normalised": lambda: normalize(ours(prepared), IMAGENET_MEAN, IMAGENET_STD),
                "uncompressed": lambda: ours(uncompressed),
                "uncompressed, normalised": lambda: normalize(ours(uncompressed), IMAGENET_MEAN, IMAGENET_STD),
                "bare": lambda: [Image.open(io.BytesIO(data)).load() for data in encoded],
                "bare, prepared": lambda: [Image.open(io.BytesIO(data)).load() for data in small],
                "bare, uncompressed": lambda: [Image.open(io.BytesIO(data)).load() for data in smallest],
            },
            rounds,
            clock=time.process_time,
        )
    sizes = [f"{np.mean([len(data) for data in part]) / 1e3:.0f} kB" for part in (encoded, small, smallest)]
    what = "synthetic JPEGs" if images_folder is None else "JPEGs"
    note = f"{count} {what} to {SIZE[0]}x{SIZE[1]}, ms an image; an image has {sizes[0]}"
    note += f", prepared {sizes[1]}, prepared uncompressed {sizes[2]}"

    def row(name: str, ours: str, published: str, bare: str, goal: float | None, stretch: float | None) -> Row:
        return Row(
            name=name,
            goal=goal,
            stretch=stretch,
            ours=scaled(times[ours], 1e3 / count),
            reference=scaled(times[published], 1e3 / count),
            reference_name="published pipeline" + (" on prepared images" if published != "published" else ""),
            ratio=ratios(times[published], times[ours]),
            limit=scaled(times[bare], 1e3 / count),
            limit_name="decoding alone",
            share_of_limit=ratios(times[bare], times[ours]),
            note=note,
        )

    prepared_bare, flat_bare, same = "bare, prepared", "bare, uncompressed", "normalised on the same core"
    flat = "prepared with --image_format bmp"
    return [
        row("photographs a core, normalised on the device", "ours", "published", "bare", 1.3, 1.6),
        row(f"photographs a core, {same}", "ours, normalised", "published", "bare", None, None),
        row("prepared images a core, normalised on the device", "prepared", "published", prepared_bare, 3.0, 5.0),
        row(f"prepared images a core, {same}", "prepared, normalised", "published", prepared_bare, None, None),
        row("prepared images, both sides", "prepared", "published, prepared", prepared_bare, None, None),
        row(f"{flat}, normalised on the device", "uncompressed", "published", flat_bare, 3.0, 5.0),
        row(f"{flat}, {same}", "uncompressed, normalised", "published", flat_bare, None, None),
    ]


# -- small images ----------------------------------------------------------------------------------------------------


def small_images_rows(rounds: int, cifar_folder: Path | None = None, count: int = SMALL_IMAGES) -> list[Row]:
    """Images of 32x32 to batches, both sides with decoded pixels in memory; one round is an epoch.

    Args:
        rounds: Timed rounds, at least 2.
        cifar_folder: CIFAR-10 as parquet shards; noise of the same size if not given.
        count: Images, at least one batch.

    Returns:
        Ours with normalising on the same core, as the published pipeline does it, and without.
    """
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    if cifar_folder is None:
        noise = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        features = datasets.Features({"image": datasets.Image()})
        dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels) for pixels in noise]}, features)
    else:
        loaded = load_split(ImageSource(str(cifar_folder)), "train")
        dataset = loaded.select(range(min(count, len(loaded))))
    rows = ImageRows(dataset, find_image_column(dataset), 3)
    size = (32, 32)
    memory = MemoryCrops(decode_all(rows, None, limit=None), CropReader(rows.images, size, MIN_CROP_SCALE, seed=0))
    arrays = memory.images.pixels.permute(0, 2, 3, 1).contiguous().numpy()  # [n, height, width, 3], as loaders hold it
    turns = {name: itertools.count() for name in ("published", "ours", "ours, normalised", "bare")}
    epochs: dict[int, tuple[list[list[SampleKey]], list[Box]]] = {}

    def batches(name: str) -> tuple[list[list[SampleKey]], list[Box]]:
        """The order of another epoch at each call, the same for all sides."""
        return epochs[next(turns[name])]

    for epoch in range(rounds + 1):
        order = np.random.default_rng(epoch).permutation(len(memory))
        keys = [SampleKey(epoch, epoch, slot, int(image)) for slot, image in enumerate(order)]
        whole = len(keys) // SMALL_BATCH * SMALL_BATCH or len(keys)
        boxes = _boxes([(32, 32)] * whole, keys[:whole], size)
        epochs[epoch] = ([keys[start : start + SMALL_BATCH] for start in range(0, whole, SMALL_BATCH)], boxes)

    def published() -> None:
        parts, boxes = batches("published")
        drawn = iter(boxes)
        for keys in parts:
            torch.stack([published_crop(Image.fromarray(arrays[key.image]), next(drawn), size) for key in keys])

    def ours(name: str, *, normalised: bool) -> None:
        for keys in batches(name)[0]:
            pixels = stack_images([row["pixel_values"] for row in memory.__getitems__(keys)])
            if normalised:
                normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)

    def bare() -> None:
        for keys in batches("bare")[0]:
            pixels = memory.images.pixels.index_select(0, torch.tensor([key.image for key in keys]))
            normalize(pixels.transpose(1, 2), IMAGENET_MEAN, IMAGENET_STD)

    times = take_turns(
        {
            "published": published,
            "ours": lambda: ours("ours", normalised=False),
            "ours, normalised": lambda: ours("ours, normalised", normalised=True),
            "bare": bare,
        },
        rounds,
        clock=time.process_time,
    )
    read = sum(len(part) for part in epochs[0][0])
    what = "synthetic images" if cifar_folder is None else "images of CIFAR-10"
    note = (
        f"{read} {what} an epoch, batches of {SMALL_BATCH}, us an image; decoding once, before the first epoch, is "
        "counted on neither side, drawing the boxes on ours"
    )

    def row(name: str, side: str, goal: float | None, stretch: float | None) -> Row:
        return Row(
            name=name,
            goal=goal,
            stretch=stretch,
            unit="us",
            ours=scaled(times[side], 1e6 / read),
            reference=scaled(times["published"], 1e6 / read),
            reference_name="published pipeline on arrays in memory",
            ratio=ratios(times["published"], times[side]),
            limit=scaled(times["bare"], 1e6 / read),
            limit_name="gathered and normalised, not cropped",
            share_of_limit=ratios(times["bare"], times[side]),
            note=note,
        )

    return [
        row("32x32 images in memory, normalised on the same core", "ours, normalised", 5.0, 10.0),
        row("32x32 images in memory, normalised on the device", "ours", None, None),
    ]


# -- masks -----------------------------------------------------------------------------------------------------------


def mask_rows(rounds: int, checkout: Path | None = None) -> list[Row]:
    """A batch of masks beside the published collator and that of lightly.

    Args:
        rounds: Timed rounds, at least 2.
        checkout: A checkout of github.com/facebookresearch/ijepa; its row is not measured if not given.

    Returns:
        For each case a row for each of the two.
    """
    torch.set_num_threads(1)
    rows = []
    for grid_size, batch_size in MASK_CASES:
        settings = MaskSettings(grid_size, masking_strategy="multi_block_official")
        others: dict[str, Callable[[int], object] | str] = {
            "published collator": "needs a checkout of github.com/facebookresearch/ijepa",
            "collator of lightly": _lightly_sampler(settings, batch_size),
        }
        if checkout is not None:
            others["published collator"] = published_sampler(checkout, settings, batch_size)
        for other, sampler in others.items():
            name = f"masks, batch of {batch_size} at {grid_size[0]}x{grid_size[1]}, beside the {other}"
            goals = {"goal": 50.0, "stretch": 100.0} if other == "published collator" else {}
            if isinstance(sampler, str):
                rows.append(Row(name=name, not_measured=sampler, **goals))
                continue
            times = take_turns(
                {
                    "ours": _batches_of(our_sampler(MaskSettings(grid_size), batch_size), OUR_BATCHES),
                    "theirs": _batches_of(sampler, THEIR_BATCHES),
                },
                rounds,
                clock=time.process_time,
            )
            ours = [elapsed / OUR_BATCHES for elapsed in times["ours"]]
            theirs = [elapsed / THEIR_BATCHES for elapsed in times["theirs"]]
            rows.append(
                Row(
                    name=name,
                    ours=scaled(ours),
                    reference=scaled(theirs),
                    reference_name=other,
                    ratio=ratios(theirs, ours),
                    note="ms a batch; ours with strategy multi_block",
                    **goals,
                )
            )
    return rows


def _batches_of(sample: Callable[[int], object], number: int) -> Callable[[], object]:
    steps = itertools.count()
    return lambda: [sample(next(steps)) for _ in range(number)]


def _lightly_sampler(settings: MaskSettings, batch_size: int) -> Callable[[int], object] | str:
    """The I-JEPA collator of lightly with the same sizes; why not, if it cannot be imported."""
    try:
        from lightly.data.collate import IJEPAMaskCollator  # type: ignore[import-not-found]
    except ImportError as error:
        return f"lightly cannot be imported ({error}); it is no dependency of this project and needs torchvision"
    collator = IJEPAMaskCollator(**published_options(settings))
    images = [torch.zeros(0)] * batch_size
    return lambda step: collator(images)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, at least 2")
    parser.add_argument("--images", type=Path, help="folder of JPEGs")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as parquet shards")
    parser.add_argument("--checkout", type=Path, help="checkout of I-JEPA")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds} must be at least 2, for there is no spread otherwise")
    rows = image_pipeline_rows(arguments.rounds, arguments.images)
    rows += small_images_rows(arguments.rounds, arguments.cifar)
    rows += mask_rows(arguments.rounds, arguments.checkout)
    print(render_table(rows))


if __name__ == "__main__":
    main()
