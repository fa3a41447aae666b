"""Runs `ijepa-hf visualize`: draws a recipe's masks or what a model has learnt, or writes a run as one HTML file.

    ijepa-hf visualize --masks RECIPE [--audit] ...
    ijepa-hf visualize MODEL --figure pca|cosine|error|expectation|retrieval|spectrum --dataset_name NAME ...
    ijepa-hf visualize --html RUN

Flags, images and the model's kind are checked before the model's weights are loaded.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ijepa_hf.data.collator import BatchMaker, IJepaDataCollator
from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.reading import CropReader, ImageRows
from ijepa_hf.data.sources.opening import ImageSource, find_image_column, find_label_column, load_split
from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, resize, stack_images
from ijepa_hf.diagnosis.figures import draw_spectrum_figure
from ijepa_hf.evaluation.backbones import Backbone, load_backbone
from ijepa_hf.figures.features import (
    cut_patches,
    draw_cosine_figure,
    draw_errors_figure,
    draw_expectation_figure,
    draw_pca_figure,
    draw_retrieval_figure,
)
from ijepa_hf.figures.masks import draw_audit_figure, draw_masks_figure
from ijepa_hf.figures.panels import to_pictures
from ijepa_hf.figures.views import (
    PatchMatches,
    box_to_patches,
    differing_patches,
    expect_patches,
    find_nearest_images,
    patch_colors,
)
from ijepa_hf.model.configuration_ijepa import MASK_FIELDS, IJepaConfig
from ijepa_hf.model.features import prediction_errors, target_features
from ijepa_hf.model.mask_audit import audit_masks, render_audit
from ijepa_hf.model.masking import STRATEGIES, draw_masks
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.model.vision_models import ImageSettings, check_model_name, read_image_settings
from ijepa_hf.randomness import DRAW_BLOCKS, DRAW_GALLERY, DRAW_IMAGES, DRAW_PATCHES, keyed_generator
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments
from ijepa_hf.recipes.parsing import CommandParser, as_flags, command_parser, flag_names, parse_flags
from ijepa_hf.recipes.recipe_files import load_recipe, recipe_names
from ijepa_hf.training.html_report import write_html_report
from ijepa_hf.training.images import open_training_images
from ijepa_hf.weights.start import start_model
from ijepa_hf.weights.starting_weights import StartingWeights, open_starting_weights

FIGURES = {
    "pca": "the first three principal components of the patches as colours",
    "cosine": "the cosine similarity of a few patches to all others",
    "error": "the loss of each target patch",
    "expectation": "what the predictor expects: the real patches most like its predictions",
    "retrieval": "images and their nearest neighbours",
    "spectrum": "the singular values of the features",
}
_OF_PREDICTOR = ("error", "expectation")
_WITH_GALLERY = ("expectation", "retrieval", "spectrum")
_IMAGES_SHOWN = 6
_GALLERY_SIZE = 512
_NEIGHBOURS = 5
_PATCHES_SHOWN = 3  # an image
_BATCH = 64
_MOST_PATCHES = 20_000  # in the spectrum of patches


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf visualize`.

    Returns:
        The exit code.

    Raises:
        ValueError: If a flag is unknown or has a bad value, or model, images and flags do not fit.
        OSError: If a model, data set, image or folder does not exist.
    """
    named = {word.split("=")[0] for word in argv if word.startswith("--")}
    draw = _draw_masks if "--masks" in named else _draw_html if "--html" in named else _draw_figure
    print(draw(argv))
    return 0


def _check_output(output: Path, suffix: str) -> None:
    if output.suffix != suffix:
        raise ValueError(
            f"output={str(output)!r} must end in {suffix}, for example --output {output.stem or 'picture'}{suffix}."
        )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}; make it first.")


# -- masks -----------------------------------------------------------------------------------------------------------


def _draw_masks(argv: Sequence[str]) -> str:
    named, model, data = _parse_masks(argv)
    config = model.to_config()
    output = Path(named.output or ("mask-audit.png" if named.audit else "masks.png"))
    _check_output(output, ".png")
    if named.audit:
        audit = audit_masks(config.mask_settings(), batch_size=named.batch_size, seed=named.seed)
        draw_audit_figure([audit], output)
        return f"{render_audit(audit)}\n\nfigure: {output}"
    data.check(model)
    _draw_first_masks(config, data, named.batch_size, named.seed, output)
    return f"\nfigure: {output}"


def _draw_first_masks(config: IJepaConfig, data: DataArguments, batch_size: int, seed: int, output: Path) -> None:
    """Draws some training images, whole, with masks as a run might draw them."""
    images = open_training_images(data, config, num_ranks=1)
    crops = CropReader(images.column, config.image_shape, 1.0, seed)
    make_batch = BatchMaker(IJepaDataCollator(config, normalize=False, seed=seed, global_batch_size=batch_size))
    size = min(_IMAGES_SHOWN, batch_size, images.num_images)
    batch = images.first_batch(crops, make_batch, size).inputs
    draw_masks_figure(
        batch["pixel_values"], batch["context_indices"], batch["target_indices"], config.patch_shape, output
    )


def _parse_masks(argv: Sequence[str]) -> tuple[argparse.Namespace, ModelArguments, DataArguments]:
    """Parses the command's own flags and the recipe's arguments; flags override the recipe."""
    parser = build_masks_parser()
    named, known = parse_flags(parser, argv), flag_names(parser)
    values = {name: value for name, value in load_recipe(named.masks).items() if f"--{name}" in known}
    if any(word.split("=")[0] == "--masking_strategy" for word in argv):
        # The recipe's numbers were meant for its own strategy; those that the new strategy does not use are dropped.
        strategy = STRATEGIES.get(named.masking_strategy)
        used = ("masking_strategy", *(strategy.fields if strategy else MASK_FIELDS))
        values = {name: value for name, value in values.items() if name not in MASK_FIELDS or name in used}
    model, data, named = parser.parse_args_into_dataclasses(args=[*as_flags(values), *argv])
    return named, model, data


def build_masks_parser() -> CommandParser:
    """Returns the parser of the form `--masks RECIPE`."""
    parser = command_parser(
        "visualize",
        "Draw the first training images of a recipe with their masks, or with --audit measure the masks of many "
        "steps. Flags override the recipe; --masking_strategy drops the recipe's mask settings that the new strategy "
        "does not use.",
        (ModelArguments, DataArguments),
    )
    parser.add_argument(
        "--masks",
        metavar="RECIPE",
        required=True,
        help=f"Recipe whose masks are drawn: one of {', '.join(recipe_names())}, or the path of a YAML file.",
    )
    parser.add_argument(
        "--audit", action="store_true", help="Measure the masks, print and draw the result; needs no images."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images that share one draw of masks.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every draw; the recipe's seed if it has one.")
    parser.add_argument("--output", help="PNG file to write; masks.png, or mask-audit.png with --audit, if not given.")
    return parser


# -- a run as one file -----------------------------------------------------------------------------------------------


def _draw_html(argv: Sequence[str]) -> str:
    named = parse_flags(build_html_parser(), argv)
    output = Path(named.output)
    _check_output(output, ".html")
    write_html_report(Path(named.html), output)
    return f"report: {output}"


def build_html_parser() -> CommandParser:
    """Returns the parser of the form `--html RUN`."""
    parser = command_parser(
        "visualize",
        "Write a run as one self-contained HTML file: scores, curves, pictures, arguments.",
    )
    parser.add_argument("--html", metavar="RUN", required=True, help="Folder of a run, finished or not.")
    parser.add_argument("--output", default="report.html", help="HTML file to write.")
    return parser


# -- features and predictions ----------------------------------------------------------------------------------------


def build_parser() -> CommandParser:
    """Returns the parser of the form `MODEL --figure NAME`, whose help names the two others."""
    parser = command_parser(
        "visualize",
        "Draw the features or the predictions of a model. "
        + "; ".join(f"{name}: {text}" for name, text in FIGURES.items())
        + ". error and expectation need an I-JEPA model with its predictor, the others any vision model.",
        epilog="Two other forms: `ijepa-hf visualize --masks RECIPE` draws or measures the masks of a recipe "
        "(`--masks RECIPE --help` lists its flags); `ijepa-hf visualize --html RUN` writes a run as one HTML file.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="Folder or Hub id of a model.")
    parser.add_argument("--figure", choices=list(FIGURES), help="What to draw.")
    parser.add_argument(
        "--dataset_name", help="Images, as for ijepa-hf pretrain: digits, shapes, a Hub id, a file or a folder."
    )
    parser.add_argument("--dataset_config_name", help="Configuration of the Hub data set.")
    parser.add_argument("--split_name", default="test", help="Split from which the images and the gallery are taken.")
    parser.add_argument("--image_column_name", help="Column of the images; found automatically if there is only one.")
    parser.add_argument("--label_column_name", help="Column of the labels, which are written below images.")
    parser.add_argument(
        "--image", metavar="N|PATH", help="Draw this one image: its number in the split, counted from 0, or a file."
    )
    parser.add_argument(
        "--box",
        metavar="X,Y,W,H",
        help="For error and expectation: the part of the image to predict, in pixels of the image on disk; the rest "
        "is the context. If not given, blocks are drawn as in training.",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        help=f"Images to draw, chosen at random from the split; {_IMAGES_SHOWN} if not given.",
    )
    parser.add_argument(
        "--gallery_size",
        type=int,
        help="For expectation and retrieval: other images of the split to search in; for spectrum: images to measure. "
        f"All, but at most {_GALLERY_SIZE}, if not given.",
    )
    parser.add_argument("--k", type=int, help=f"For retrieval: neighbours of each image; {_NEIGHBOURS} if not given.")
    parser.add_argument("--model_revision", help="Branch, tag or commit of MODEL on the Hub.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of images, patches and blocks.")
    parser.add_argument("--output", help="PNG file to write; FIGURE.png if not given.")
    return parser


class _Images(NamedTuple):
    """Images of the model's size, not normalised: uint8 or float32 `[n, C, height, width]`; and their names."""

    pixels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.pixels)


class _Request(NamedTuple):
    """What is drawn: images and gallery, and for predictions the masks; `lines` are to be printed."""

    named: argparse.Namespace
    settings: ImageSettings
    images: _Images
    gallery: _Images
    masks: tuple[Tensor, Tensor] | None
    lines: list[str]

    def normalized(self, images: _Images) -> Tensor:
        return normalize(images.pixels, self.settings.mean, self.settings.std)

    def limits(self) -> tuple[float, float]:
        parts = [part.pixels for part in (self.images, self.gallery) if len(part)]
        return min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)

    def pictures(self, images: _Images) -> np.ndarray:
        return to_pictures(images.pixels, limits=self.limits())


def _draw_figure(argv: Sequence[str]) -> str:
    named = parse_flags(build_parser(), argv)
    output = Path(named.output or f"{named.figure}.png")
    box = _check_flags(named)
    _check_output(output, ".png")
    check_model_name(named.model, named.model_revision)
    weights = _open_whole_model(named) if named.figure in _OF_PREDICTOR else None
    settings = _image_settings(named, weights)
    request = _read_images(named, settings, None if weights is None else weights.config, box)
    if weights is not None:
        lines = _draw_predictions(request, weights, output)
    else:
        backbone = load_backbone(named.model, settings.shape, revision=named.model_revision)
        lines = _draw_features(request, backbone, output)
    return "\n".join([*request.lines, *lines, f"figure: {output}"])


def _check_flags(named: argparse.Namespace) -> tuple[int, int, int, int] | None:
    """Checks flags against each other; returns the box."""
    if named.model is None or named.figure is None:
        missing = "MODEL" if named.model is None else "--figure"
        raise ValueError(
            f"{missing} is not given: write `ijepa-hf visualize MODEL --figure {'|'.join(FIGURES)} --dataset_name "
            "NAME`, or `--masks RECIPE`, or `--html RUN`."
        )
    is_file = named.image is not None and not named.image.isdecimal()
    if named.dataset_name is None and (named.figure in _WITH_GALLERY or not is_file):
        needs = "other images to look in" if named.figure in _WITH_GALLERY else "images"
        raise ValueError(
            f"figure={named.figure!r} needs {needs}: write --dataset_name followed by digits, a Hub id or a folder."
        )
    for name, figures in (("gallery_size", _WITH_GALLERY), ("k", ("retrieval",)), ("box", _OF_PREDICTOR)):
        if getattr(named, name) is not None and named.figure not in figures:
            raise ValueError(f"{name} is for {' and '.join(figures)}; leave it out with --figure {named.figure}.")
    if named.figure == "spectrum" and (named.image is not None or named.num_images is not None):
        raise ValueError("figure='spectrum' is of many images: give --gallery_size, not --image or --num_images.")
    if named.image is not None and named.num_images is not None:
        raise ValueError("image and num_images are two ways to choose images; give one.")
    for name, least in (("num_images", 1), ("gallery_size", 1), ("k", 1), ("seed", 0)):
        value = getattr(named, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
    if named.figure == "spectrum" and named.gallery_size == 1:
        raise ValueError("gallery_size=1: a spectrum is of how images differ; use --gallery_size 2 or more.")
    if is_file and not Path(named.image).expanduser().is_file():
        raise FileNotFoundError(
            f"image={named.image!r}: there is no such file; give a picture's path, or a number of the split."
        )
    if named.box is None:
        return None
    if named.image is None:
        raise ValueError(f"box={named.box} is a place in one image: say which with --image.")
    parts = named.box.split(",")
    if len(parts) != 4 or not all(part.strip().lstrip("-").isdecimal() for part in parts):
        raise ValueError(f"box={named.box!r} must be four whole numbers x,y,w,h, for example --box 16,16,32,24.")
    left, top, width, height = map(int, parts)
    return left, top, width, height


def _open_whole_model(named: argparse.Namespace) -> StartingWeights:
    config = AutoConfig.from_pretrained(named.model, revision=named.model_revision, trust_remote_code=False)
    kind = getattr(config, "model_type", None)
    weights = open_starting_weights(named.model, revision=named.model_revision) if kind == "ijepa" else None
    if weights is None or not weights.has_predictor:
        found = "an I-JEPA encoder" if kind == "ijepa" else f"a model of type {kind!r}"
        raise ValueError(
            f"figure={named.figure!r} shows a predictor's work, and model={named.model!r} is {found} without one: "
            f"give the folder of a run, or choose {', '.join(name for name in FIGURES if name not in _OF_PREDICTOR)}."
        )
    return weights


def _image_settings(named: argparse.Namespace, weights: StartingWeights | None) -> ImageSettings:
    if weights is None:
        config = AutoConfig.from_pretrained(named.model, revision=named.model_revision, trust_remote_code=False)
        return read_image_settings(named.model, config, revision=named.model_revision)
    mean, std = weights.image_mean or IMAGENET_MEAN, weights.image_std or IMAGENET_STD
    return ImageSettings(weights.config.image_shape, list(mean), list(std))


# -- images ----------------------------------------------------------------------------------------------------------


def _read_images(
    named: argparse.Namespace,
    settings: ImageSettings,
    config: IJepaConfig | None,
    box: tuple[int, int, int, int] | None,
) -> _Request:
    """Chooses and reads images, masks (of a model with a predictor, whose `config` is given) and gallery."""
    channels = len(settings.mean)
    is_file = named.image is not None and not named.image.isdecimal()
    source = None if named.dataset_name is None else _Source(named, channels)
    chosen: list[int] = []
    lines: list[str] = []
    if is_file:
        path = Path(named.image).expanduser()
        decoded = [decode_image({"bytes": None, "path": str(path)}, channels)]
        names = [path.name]
    else:
        assert source is not None  # _check_flags
        chosen = source.choose(named)
        decoded = [source.images[index] for index in chosen]
        names = [source.name(index) for index in chosen]
        if named.figure != "spectrum":
            lines.append(f"images of the split {named.split_name!r}: {', '.join(map(str, chosen))}")
    images = _Images(stack_images([resize(image, settings.shape) for image in decoded]), names)
    masks = None
    if config is not None:
        *masks_and_line, line = _choose_masks(named, config, box, [_shape_of(image) for image in decoded])
        masks = masks_and_line[0], masks_and_line[1]
        lines += [line] if line else []
    gallery = _Images(torch.zeros(0, *images.pixels.shape[1:], dtype=images.pixels.dtype), [])
    if named.figure in _WITH_GALLERY:
        assert source is not None  # _check_flags
        gallery = source.gallery(named, chosen, images.pixels, settings.shape)
    return _Request(named, settings, images, gallery, masks, lines)


def _choose_masks(
    named: argparse.Namespace,
    config: IJepaConfig,
    box: tuple[int, int, int, int] | None,
    shapes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, str]:
    """Returns context and target indices, of the box or drawn as in training, and a line to print about them."""
    if box is None:
        generator = keyed_generator(named.seed, DRAW_BLOCKS)
        masks = draw_masks(config.mask_settings(), len(shapes), generator)
        return masks.context_indices, masks.target_indices, ""
    positions, snapped = box_to_patches(box, shapes[0], config.grid_size)
    every = torch.arange(config.num_patches)
    x, y, width, height = (f"{value:g}" for value in snapped)
    line = (
        f"box {named.box} touches {len(positions)} of {config.num_patches} patches: predicted is the part "
        f"{x},{y},{width},{height}"
    )
    return every[~torch.isin(every, positions)][None], positions[None, None], line


class _Source:
    """Reads the images of a split and the names of their labels."""

    def __init__(self, named: argparse.Namespace, channels: int) -> None:
        source = ImageSource(named.dataset_name, named.dataset_config_name, named.image_column_name)
        self.dataset, self.split = load_split(source, named.split_name), named.split_name
        if not len(self.dataset):
            raise ValueError(f"dataset_name={named.dataset_name!r}: the split {named.split_name!r} has no images.")
        self.images = ImageRows(self.dataset, find_image_column(self.dataset, named.image_column_name), channels)
        self.label = find_label_column(self.dataset, named.label_column_name)

    def name(self, index: int) -> str:
        """Returns the name of an image's label, "" where it has none."""
        if self.label is None:
            return ""
        value = self.dataset[self.label][index]
        feature = self.dataset.features[self.label]
        if isinstance(feature, datasets.ClassLabel):
            return feature.int2str(value) if value is not None and value >= 0 else ""
        return "" if value is None else str(value)

    def choose(self, named: argparse.Namespace) -> list[int]:
        """Returns the numbers of the images to draw."""
        count = len(self.dataset)
        if named.figure == "spectrum":
            return [0]  # only for its shape and kind
        if named.image is not None:
            if int(named.image) >= count:
                raise ValueError(
                    f"image={named.image}: the split {self.split!r} has {count} images, numbered 0 to {count - 1}."
                )
            return [int(named.image)]
        wanted = min(_IMAGES_SHOWN, count) if named.num_images is None else named.num_images
        if wanted > count:
            raise ValueError(f"num_images={wanted}, but the split {self.split!r} has {count} images.")
        return keyed_generator(named.seed, DRAW_IMAGES).permutation(count)[:wanted].tolist()

    def gallery(self, named: argparse.Namespace, chosen: list[int], shown: Tensor, shape: tuple[int, int]) -> _Images:
        """Returns other images; such as look just like one that is shown are left out too."""
        left_out = set() if named.figure == "spectrum" else set(chosen)
        order = keyed_generator(named.seed, DRAW_GALLERY).permutation(len(self.dataset)).tolist()
        others = [index for index in order if index not in left_out]
        wanted = min(_GALLERY_SIZE, len(others)) if named.gallery_size is None else named.gallery_size
        if named.figure == "spectrum" and len(others) < 2:
            raise ValueError(f"figure='spectrum' needs 2 images, and the split {self.split!r} has {len(others)}.")
        if not others or wanted > len(others):
            raise ValueError(
                f"gallery_size={wanted or 1}, but the split {self.split!r} has {len(others)} images beside those that "
                "are looked at."
            )
        taken = others[:wanted]
        pixels = stack_images([resize(self.images[index], shape) for index in taken])
        names = [self.name(index) for index in taken]
        if named.figure != "spectrum":
            copies = [bool((shown == image).flatten(1).all(dim=1).any()) for image in pixels]
            pixels = pixels[[not is_copy for is_copy in copies]]
            names = [name for name, is_copy in zip(names, copies, strict=True) if not is_copy]
            if not names:
                raise ValueError(f"all {wanted} images of the gallery look just like one that is looked at.")
        if named.k is not None and named.k > len(names):
            raise ValueError(f"k={named.k}, but the gallery has {len(names)} images.")
        return _Images(pixels, names)


def _shape_of(image: Any) -> tuple[int, int]:
    return image.shape[1:] if isinstance(image, np.ndarray) else (image.height, image.width)


# -- any vision model ------------------------------------------------------------------------------------------------


def _draw_features(request: _Request, backbone: Backbone, output: Path) -> list[str]:
    named = request.named
    if named.figure in ("pca", "cosine"):
        backbone.check_patches(named.figure)
        features = torch.cat(list(_patches(backbone, request, request.images)))
        pictures = request.pictures(request.images)
        if named.figure == "pca":
            draw_pca_figure(pictures, patch_colors(features), output)
            return []
        count = features.shape[1] * features.shape[2]
        first = keyed_generator(named.seed, DRAW_PATCHES).integers(count, size=len(features)).tolist()
        places = [
            differing_patches(own, min(_PATCHES_SHOWN, count), begin)
            for own, begin in zip(features, first, strict=True)
        ]
        draw_cosine_figure(pictures, features, places, output)
        return [f"patches (row, column): {', '.join(map(str, places[0]))}"] if len(places) == 1 else []
    pooled, patches = [], []
    count = 0
    for part in _patches(backbone, request, request.gallery):
        pooled.append(part.mean(dim=(1, 2)))
        room = max(0, _MOST_PATCHES - count) // (part.shape[1] * part.shape[2])
        if room:
            patches.append(part[:room].flatten(0, 2))
            count += len(patches[-1])
    gallery = torch.cat(pooled)
    if named.figure == "spectrum":
        matrices = {f"{len(gallery)} images": gallery}
        if patches and patches[0].shape[0] > len(pooled[0]):
            matrices[f"{count} patches"] = torch.cat(patches)
        draw_spectrum_figure(matrices, output)
        return []
    queries = torch.cat([part.mean(dim=(1, 2)) for part in _patches(backbone, request, request.images)])
    neighbours = min(_NEIGHBOURS, len(gallery)) if named.k is None else named.k
    found, cosines = find_nearest_images(queries.numpy(), gallery.numpy(), neighbours)
    names = [[request.gallery.names[index] for index in row] for row in found]
    shown = [request.pictures(_Images(request.gallery.pixels[torch.from_numpy(row)], [])) for row in found]
    draw_retrieval_figure(
        request.pictures(request.images), request.images.names, np.stack(shown), names, cosines, output
    )
    return [f"neighbours among {len(gallery)} images of the split {named.split_name!r}"]


def _patches(backbone: Backbone, request: _Request, images: _Images) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        part = _Images(images.pixels[start : start + _BATCH], [])
        yield backbone.tokens(request.normalized(part)).patches.cpu()


# -- predictors ------------------------------------------------------------------------------------------------------


def _draw_predictions(request: _Request, weights: StartingWeights, output: Path) -> list[str]:
    named, config = request.named, weights.config
    assert request.masks is not None
    context, targets = request.masks
    model, _ = start_model(weights, config, named.seed)
    pixels, pictures = request.normalized(request.images), request.pictures(request.images)
    if named.figure == "error":
        errors = prediction_errors(model, pixels, context, targets)
        draw_errors_figure(pictures, context, targets, errors, config.patch_shape, output)
        return [f"loss {float(errors.mean()):.4f}, the mean over {errors[..., 0].numel()} blocks"]
    gallery = request.normalized(request.gallery)
    parts = (target_features(model, part) for part in gallery.split(_BATCH))
    expectation = expect_patches(model, pixels, context, targets, parts)
    tiles = _tiles(request, expectation.expected, model), _tiles(request, expectation.nearest_to_truth, model)
    draw_expectation_figure(pictures, context, targets, expectation, tiles, config.patch_shape, output)
    return [
        f"gallery: {config.num_patches} patches of each of {len(request.gallery)} images of the split "
        f"{named.split_name!r}",
        f"cosine of predictions to what is shown {float(expectation.expected.similarity.mean()):.3f}, to the truth "
        f"{float(expectation.truth_similarity.mean()):.3f}; of the truth to its nearest in the gallery "
        f"{float(expectation.nearest_to_truth.similarity.mean()):.3f}",
    ]


def _tiles(request: _Request, found: PatchMatches, model: IJepaForPretraining) -> np.ndarray:
    """Returns the pixels `[B, M, P, height, width, 3]` of patches of the gallery."""
    raw = cut_patches(request.gallery.pixels.permute(0, 2, 3, 1).numpy(), found, model.config.patch_shape)
    flat = torch.from_numpy(raw).flatten(0, -4).permute(0, 3, 1, 2)
    return to_pictures(flat, limits=request.limits()).reshape(*raw.shape[:-1], 3)
