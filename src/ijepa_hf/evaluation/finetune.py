"""Fine-tuning for classification: a pretrained encoder and a new linear head, trained together on labelled images.

On transformers' own `Trainer` and `AutoModelForImageClassification`, so that what comes out is a stock model that
loads without this package. What is added is what a fine-tuning of a vision transformer needs and the stock classes
lack: layer-wise learning rates, few-label draws, a fixed position table, and a resume that restores every weight.

Nothing is tuned on the held-out split: there is no early stopping and no best epoch, the last epoch's accuracy is the
result. Every draw is a function of (seed, epoch, image), as in `data`.

    output_dir/
      finetune_arguments.json                                                 written first: whose folder it is
      checkpoint-<step>/                                                      deleted at the end
      config.json  model.safetensors  preprocessor_config.json  README.md     the classifier and its card
      figures/curves.png  finetune.json                                       the results, written last
"""

import argparse
import dataclasses
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import datasets
import huggingface_hub
import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub import errors as hub
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ijepa_hf.arguments import DataArguments, nearest_name
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import DRAW_ORDER, ImageRows, keyed_generator
from ijepa_hf.export import image_processor_fields, write_atomically
from ijepa_hf.image_transforms import normalize, random_resized_crop, resize
from ijepa_hf.model_card import read_license
from ijepa_hf.modeling_ijepa import IJepaModel
from ijepa_hf.sources import find_image_column, find_label_column, load_split

ARGUMENTS_FILE = "finetune_arguments.json"
RESULT_FILE = "finetune.json"

logger = logging.getLogger(__name__)

_DRAW_CROP, _DRAW_LABELS = 7, 8  # beside the streams of `data`
_Z_95 = 1.959963984540054  # standard normal quantile of 0.975
_LOGGED_SHARE = 0.02  # of the run between two logged losses
_MAX_GRAD_NORM = 1.0
_CHECKPOINTS = 2
_CARD_NAME = "README.md"
_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_STRINGS = ("string", "large_string")
# What may differ between a run and its continuation.
_FREE_ARGUMENTS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dataloader_num_workers")
_RUN_ENTRIES = (
    ARGUMENTS_FILE, RESULT_FILE, "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    "figures",
)  # fmt: skip


def _flag(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class FinetuningFlags:
    """The flags of `ijepa-hf finetune`; names as in `ijepa-hf pretrain` and transformers' examples."""

    dataset_name: str | None = _flag(
        "Labelled images, as for ijepa-hf pretrain: digits or shapes (built in), a Hub id, a folder or a file."
    )
    dataset_config_name: str | None = _flag("Configuration of the Hub data set.")
    train_split_name: str = _flag("Split to train on.", "train")
    eval_split_name: str = _flag("Held-out split; scored after each epoch, never used for a choice.", "test")
    image_column_name: str | None = _flag("Column of the images; found by itself if there is only one.")
    label_column_name: str | None = _flag("Column of the labels: classes, whole numbers or words; `label` if any.")
    max_train_samples: int | None = _flag("Use at most so many training images, spread evenly over the split.")
    max_eval_samples: int | None = _flag("Score with at most so many images, spread evenly over the split.")
    samples_per_class: int | None = _flag("Few labels: train on so many images of each class, drawn by the seed.")
    label_fraction: float | None = _flag(
        "Few labels: train on this share of the images of each class (rounded up), drawn by the seed; e.g. 0.01."
    )
    output_dir: str | None = _flag("Folder of the classifier.")
    overwrite_output_dir: bool = _flag("Delete what another fine-tuning left in output_dir.", False)
    resume_from_checkpoint: str | None = _flag("A checkpoint folder, or `latest` of output_dir.")
    model_revision: str | None = _flag("Branch, tag or commit of MODEL on the Hub.")
    from_scratch: bool = _flag(
        "Start from new weights instead of the model's: the same network without pretraining, to compare with.", False
    )
    freeze_encoder: bool = _flag("Train the linear head alone.", False)
    learning_rate: float = _flag("Highest learning rate, that of the head.", 1e-3)
    layer_decay: float = _flag("Each layer further down learns so many times as fast; 1 is off.", 0.75)
    weight_decay: float = _flag("Weight decay, of matrices only.", 0.05)
    warmup_ratio: float = _flag("Share of the steps in which the learning rate rises; then it falls as a cosine.", 0.1)
    label_smoothing: float = _flag("Probability that is spread over all classes.", 0.0)
    num_train_epochs: float = _flag("Length of the run, in epochs.", 50.0)
    max_train_steps: int | None = _flag("Length of the run, in optimiser steps; wins over num_train_epochs.")
    per_device_train_batch_size: int = _flag("Images per micro-batch.", 64)
    gradient_accumulation_steps: int = _flag("Micro-batches per optimiser step.", 1)
    mixed_precision: str = _flag("no (float32) or bf16.", "no")
    min_crop_scale: float = _flag("Least share of the image that a random crop covers; 1 means no cropping.", 0.3)
    horizontal_flip: bool = _flag("Mirror half of the training images.", False)
    num_cpu_threads: int | None = _flag("Threads of torch on a CPU; its own choice if not given.")
    dataloader_num_workers: int = _flag("Processes that load images; 0 loads in the training process.", 0)
    seed: int = _flag("Seed of every draw.", 0)


@dataclass(kw_only=True)
class FinetuningArguments(FinetuningFlags):
    """What a fine-tuning is told: the flags, and what comes first on the command line.

    Args:
        model: Hub id or folder of a vision model that `AutoModelForImageClassification` reads.
    """

    model: str

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        for name, example in (("dataset_name", "digits, a Hub id, or a folder"), ("output_dir", "a folder to write")):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given: write --{name} followed by {example}.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} must be 'no' or 'bf16'.")
        if self.samples_per_class is not None and self.label_fraction is not None:
            raise ValueError("samples_per_class and label_fraction are two ways to choose few labels; give one.")
        if self.overwrite_output_dir and self.resume_from_checkpoint == "latest":
            raise ValueError("overwrite_output_dir deletes what resume_from_checkpoint=latest goes on from; give one.")
        if self.from_scratch and self.freeze_encoder:
            raise ValueError("from_scratch with freeze_encoder would train a head on random features; leave one out.")
        for name, least in (
            ("max_train_samples", 1), ("max_eval_samples", 1), ("samples_per_class", 1), ("max_train_steps", 1),
            ("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1), ("num_cpu_threads", 1),
            ("dataloader_num_workers", 0), ("weight_decay", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        for name in ("learning_rate", "num_train_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0.")
        for name in ("layer_decay", "min_crop_scale", "label_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be greater than 0 and at most 1.")
        for name in ("warmup_ratio", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1.")


def build_finetune_parser() -> HfArgumentParser:
    """Returns the parser of `ijepa-hf finetune`, whose values are the arguments of `FinetuningArguments`."""
    parser = HfArgumentParser(
        FinetuningFlags,
        prog="ijepa-hf finetune",
        allow_abbrev=False,
        description="Fine-tune a pretrained encoder, with a linear head on the mean of its patches, for "
        "classification. What comes out is a stock transformers model. The last epoch's accuracy is the result: "
        "nothing is chosen on the held-out split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="A run's folder, or the Hub id or folder of a vision model.")
    return parser


def parse_finetune_arguments(argv: Sequence[str]) -> FinetuningArguments:
    """Turns a command line into checked arguments.

    Args:
        argv: What follows `ijepa-hf finetune`: the model, then flags.

    Returns:
        The arguments.

    Raises:
        ValueError: If a flag is unknown (the nearest is named), or a value is bad.
    """
    named, unknown = build_finetune_parser().parse_known_args(argv)
    if unknown:
        known = {f"--{entry.name}" for entry in dataclasses.fields(FinetuningFlags)}
        raise ValueError(
            f"{unknown[0]!r} is no flag of ijepa-hf finetune{nearest_name(unknown[0].split('=')[0], known)}"
        )
    arguments = FinetuningArguments(**vars(named))
    arguments.check()
    return arguments


# -- images and labels -----------------------------------------------------------------------------------------------


class LabelledImages(TorchDataset[dict[str, Tensor]]):
    """Images with their labels, as the model takes them.

    Args:
        images: n images.
        labels: int64 `[n]`.
        shape: Height and width of the model's images.
        mean: Of each channel, of pixels in [0, 1].
        std: Likewise.
        min_crop_scale: Of the random crop.
        horizontal_flip: Whether to mirror half of the images.
        seed: Of crops and flips.
    """

    def __init__(
        self,
        images: ImageRows,
        labels: np.ndarray,
        shape: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        min_crop_scale: float = 1.0,
        horizontal_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.shape, self.mean, self.std = images, labels, shape, mean, std
        self.min_crop_scale, self.horizontal_flip, self.seed = min_crop_scale, horizontal_flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Returns a sample.

        Args:
            key: Number of an image, which is then taken whole; or (epoch, number): a crop that depends on nothing
                else.

        Returns:
            `pixel_values` float32 `[channels, height, width]`, normalised, and `labels` int64 `[]`.

        Raises:
            ValueError: If the image cannot be read, naming it.
        """
        epoch, index = key if isinstance(key, tuple) else (None, key)
        try:
            image = self.images[index]
        except ValueError as error:
            raise ValueError(
                f"{error} A fine-tuning skips no image: mend or remove it, or let `ijepa-hf prepare` write the set "
                "without those that cannot be read."
            ) from error
        if epoch is None:
            pixels = resize(image, self.shape)
        else:
            generator = keyed_generator(self.seed, _DRAW_CROP, epoch, index)
            pixels = random_resized_crop(image, self.shape, self.min_crop_scale, generator)
            if self.horizontal_flip and generator.random() < 0.5:
                pixels = pixels.flip(-1)
        return {"pixel_values": normalize(pixels, self.mean, self.std), "labels": torch.tensor(self.labels[index])}


class EpochOrder(Sampler[tuple[int, int]]):
    """A permutation of all images for each epoch, a function of (seed, epoch); yields what `LabelledImages` is asked.

    Args:
        num_images: Images in the data set.
        seed: The run's seed.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of an epoch.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = keyed_generator(self.seed, DRAW_ORDER, self.epoch).permutation(self.num_images)
        return iter([(self.epoch, int(index)) for index in order])


class LabelledSplits(NamedTuple):
    """Both splits of a labelled data set.

    Args:
        train: Images to train on.
        train_labels: int64 `[n]`.
        test: Held-out images.
        test_labels: int64 `[m]`.
        names: Of the classes 0 .. C-1.
    """

    train: ImageRows
    train_labels: np.ndarray
    test: ImageRows
    test_labels: np.ndarray
    names: list[str]


def load_labelled_splits(arguments: FinetuningFlags, num_channels: int) -> LabelledSplits:
    """Loads the images that a fine-tuning trains on and is scored with; reads the first image of each split.

    Args:
        arguments: The flags about data.
        num_channels: Channels of the model.

    Returns:
        The splits, training images cut down to what the flags ask for.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a split, its images or its labels are missing, labels are of one class only, a class has fewer
            images than asked, or images do not fit the model.
    """
    source = DataArguments(dataset_name=arguments.dataset_name, dataset_config_name=arguments.dataset_config_name)
    source.image_column_name = arguments.image_column_name
    train = load_split(source, arguments.train_split_name)
    test = load_split(source, arguments.eval_split_name)
    column = _label_column(train, arguments.train_split_name, arguments.label_column_name)
    if column not in test.features:
        raise ValueError(f"the split {arguments.eval_split_name!r} has no column {column!r}; it cannot be scored.")
    train = _at_most(train, arguments.max_train_samples)
    test = _at_most(test, arguments.max_eval_samples)
    names, train_labels = _encode_labels(train, column, arguments.train_split_name)
    _, test_labels = _encode_labels(test, column, arguments.eval_split_name, names)
    if len(set(train_labels.tolist())) < 2:
        raise ValueError(
            f"train_split_name={arguments.train_split_name!r} has labels of one class only ({column!r} is always "
            f"{names[train_labels[0]]!r}); a classifier needs at least two."
        )
    chosen = choose_labelled(
        train_labels, arguments.samples_per_class, arguments.label_fraction, arguments.seed, names=names
    )
    images = [
        ImageRows(dataset, find_image_column(dataset, arguments.image_column_name), num_channels)
        for dataset in (train.select(chosen), test)
    ]
    for split in images:
        split[0]  # an image that does not fit the model is found before the work
    return LabelledSplits(images[0], train_labels[chosen], images[1], test_labels, names)


def choose_labelled(
    labels: np.ndarray,
    samples_per_class: int | None,
    label_fraction: float | None,
    seed: int,
    *,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draws the images of a few-label run, class by class.

    Args:
        labels: int64 `[n]`, those of all training images.
        samples_per_class: Images of each class.
        label_fraction: Instead: share of each class, in (0, 1], rounded up to whole images.
        seed: Of the draw. A larger number of images holds the smaller one's.
        names: Of the classes, for errors.

    Returns:
        int64 indices in ascending order; of all images where neither number is given.

    Raises:
        ValueError: If a class has fewer images than `samples_per_class`; lists them.
    """
    if samples_per_class is None and label_fraction is None:
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    if samples_per_class is not None and counts.min() < samples_per_class:
        short = [
            f"{names[label] if names else label} ({count})"
            for label, count in zip(classes, counts, strict=True)
            if count < samples_per_class
        ]
        raise ValueError(
            f"samples_per_class={samples_per_class}, but there are fewer images of {', '.join(short[:10])}; use "
            f"--samples_per_class {counts.min()} or less, or --label_fraction."
        )
    chosen = []
    for label, count in zip(classes, counts, strict=True):
        wanted = samples_per_class or math.ceil(cast(float, label_fraction) * int(count))
        order = keyed_generator(seed, _DRAW_LABELS, int(label)).permutation(np.flatnonzero(labels == label))
        chosen.append(order[:wanted])
    return np.sort(np.concatenate(chosen))


def _at_most(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """A part of a data set, spread evenly (sets are often sorted by class)."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.linspace(0, len(dataset) - 1, limit).round().astype(int))


def _label_column(dataset: datasets.Dataset, split: str, name: str | None) -> str:
    """As `find_label_column`, which knows no words."""
    wanted = "label" if name is None else name
    feature = dataset.features.get(wanted)
    if isinstance(feature, datasets.Value) and feature.dtype in _STRINGS:
        return wanted
    column = find_label_column(dataset, name)
    if column is None:
        raise ValueError(
            f"the split {split!r} has no labels (its columns are {', '.join(dataset.features)}); choose with "
            "--label_column_name."
        )
    return column


def _encode_labels(
    dataset: datasets.Dataset, column: str, split: str, names: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Names of the classes (those of the training split, where `names` is not given) and int64 labels `[n]`."""
    values, feature = list(dataset[column]), dataset.features[column]
    if any(value is None or value == -1 for value in values):  # -1 is how unlabelled sets say it
        raise ValueError(f"the split {split!r} has images without a label in {column!r} (none, or -1).")
    if isinstance(feature, datasets.ClassLabel):
        words = [feature.names[value] for value in values]
        own = list(feature.names)
    else:
        words = [str(value) for value in values]
        own = [str(value) for value in sorted(set(values))]
    names = own if names is None else names
    unknown = sorted(set(words) - set(names))
    if unknown:
        raise ValueError(
            f"the split {split!r} has labels that the training split does not have: {', '.join(unknown[:10])}."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[word] for word in words], dtype=np.int64)


# -- model -----------------------------------------------------------------------------------------------------------


def load_classifier(arguments: FinetuningArguments, names: Sequence[str]) -> PreTrainedModel:
    """The model with a new head; its random weights are a function of the seed.

    The sin-cos position table of an I-JEPA model, which the stock class holds as a parameter, does not train: it is
    fixed in pretraining too. With `freeze_encoder` nothing but the head trains.

    Args:
        arguments: Which model, of which revision, whether from scratch, whether frozen, the seed.
        names: Of the classes.

    Returns:
        A stock model, in float32 on the CPU.

    Raises:
        OSError: If there is no such model.
        ValueError: If weights are missing from its file, other than the head's, or it has no head of its own.
    """
    labels = {number: str(name) for number, name in enumerate(names)}
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.model_revision)
    config.num_labels = len(names)
    config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
    config.problem_type, config.dtype = "single_label_classification", torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        if arguments.from_scratch:
            model = _untrained_classifier(config)
        else:
            model, info = AutoModelForImageClassification.from_pretrained(
                arguments.model,
                config=config,
                revision=arguments.model_revision,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            _check_encoder_is_loaded(arguments.model, model, info)
    _choose_trainable(model, freeze_encoder=arguments.freeze_encoder)
    return model


def _untrained_classifier(config: Any) -> PreTrainedModel:
    model = AutoModelForImageClassification.from_config(config)
    if config.model_type == "ijepa":
        # as a pretraining starts: the stock class would draw a random position table, which then would stay fixed
        encoder = IJepaModel(IJepaConfig.from_stock(config))
        model.base_model.load_state_dict(encoder.state_dict())
    return model


def _check_encoder_is_loaded(source: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    prefix = f"{model.base_model_prefix}."
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    new = sorted(name for name in [*info["missing_keys"], *mismatched] if name.startswith(prefix))
    if new:
        raise ValueError(
            f"model={source!r}: the file does not hold {len(new)} weights of {type(model).__name__}'s encoder (the "
            f"first is {new[0]}), which would stay random. Is it an encoder of this kind? To train one from new "
            "weights on purpose, add --from_scratch."
        )


def _choose_trainable(model: PreTrainedModel, *, freeze_encoder: bool) -> None:
    prefix = f"{model.base_model_prefix}."
    head = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    if not head:
        raise ValueError(f"{type(model).__name__} has no head beside its encoder {prefix.rstrip('.')!r} to train.")
    for name, parameter in model.named_parameters():
        is_fixed_table = model.config.model_type == "ijepa" and name.endswith("position_embeddings")
        parameter.requires_grad = name in head or not (freeze_encoder or is_fixed_table)


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    Of L layers, layer l = 1 .. L learns with `learning_rate` x `layer_decay`^(L + 1 - l), the embeddings are l = 0,
    and the last norm and the head learn with `learning_rate`. Biases and other parameters of one dimension have no
    weight decay.

    Args:
        model: A classifier; parameters that do not train are left out.
        learning_rate: The head's, greater than 0.
        layer_decay: In (0, 1]; 1 is off.
        weight_decay: At least 0.

    Returns:
        Groups for `torch.optim.AdamW`, the head's first, each with `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: If `layer_decay` is not 1 and the layers of the model cannot be told from its parameters' names.

    Source: Clark et al. 2020 (ELECTRA, arXiv 2003.10555), appendix A; Bao et al. 2022 (BEiT, arXiv 2106.08254),
    appendix; the fine-tuning of He et al. 2022 (MAE, arXiv 2111.06377), appendix A.1.
    """
    depths = _depths(model, layer_decay)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name], parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**distance,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (distance, decays), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def _depths(model: PreTrainedModel, layer_decay: float) -> dict[str, int]:
    """How many layers each parameter is below the head: 0 for the head and the last norm, L + 1 for the embeddings."""
    names = [name for name, _ in model.named_parameters()]
    if layer_decay == 1.0:
        return dict.fromkeys(names, 0)
    layers = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    count = int(getattr(model.config, "num_hidden_layers", None) or 0)
    embeddings = [name for name in names if ".embeddings." in name]
    if set(layers.values()) != set(range(count)) or not embeddings:
        raise ValueError(
            f"layer_decay={layer_decay}: {type(model).__name__} is no plain stack of layers, by the names of its "
            "parameters; use --layer_decay 1."
        )
    return {name: count - layers[name] if name in layers else count + 1 if name in embeddings else 0 for name in names}


class ImageSettings(NamedTuple):
    """What a model's images are like.

    Args:
        shape: Height and width in pixels.
        mean: Of each channel, of pixels in [0, 1].
        std: Likewise.
    """

    shape: tuple[int, int]
    mean: list[float]
    std: list[float]


def read_image_settings(source: str, config: Any, *, revision: str | None = None) -> ImageSettings:
    """Reads what a model's images are like from its configuration and its image processor's file.

    Args:
        source: Hub id or folder.
        config: The model's.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The settings; the size is the processor's centre crop where it has one, else the model's.

    Raises:
        OSError: If there is no image processor.
    """
    fields, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    size = config.image_size
    if fields.get("do_center_crop") and isinstance(fields.get("crop_size"), Mapping):
        size = [fields["crop_size"]["height"], fields["crop_size"]["width"]]
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.num_channels
    if fields.get("do_normalize", True):
        return ImageSettings((height, width), list(fields["image_mean"]), list(fields["image_std"]))
    return ImageSettings((height, width), [0.0] * channels, [1.0] * channels)


def _check_shape(model: PreTrainedModel, settings: ImageSettings, source: str) -> None:
    """A forward pass of one black image: what does not fit together is found before the work."""
    channels = len(settings.mean)
    try:
        with torch.no_grad():
            logits = model.eval()(pixel_values=torch.zeros(1, channels, *settings.shape)).logits
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"model={source!r} does not take the images of its own image processor, {channels} channels of "
            f"{settings.shape[0]}x{settings.shape[1]}: {error}"
        ) from error
    if logits.shape != (1, model.config.num_labels):
        raise ValueError(f"model={source!r} gives logits of shape {list(logits.shape)}, not one for each class.")


# -- training --------------------------------------------------------------------------------------------------------


class FinetuningTrainer(Trainer):
    """`Trainer` with layer-wise learning rates, an order that is a function of the epoch, and a complete resume.

    Args:
        layer_decay: See `parameter_groups`.
        **kwargs: As for `Trainer`.
    """

    optimizer: Any

    def __init__(self, *, layer_decay: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer_decay = layer_decay

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds AdamW.

        Args:
            model: As in the stock class.

        Returns:
            The optimiser.
        """
        if self.optimizer is None:
            arguments = self.args
            groups = parameter_groups(
                self.model if model is None else model,
                arguments.learning_rate,
                self.layer_decay,
                arguments.weight_decay,
            )
            betas = (arguments.adam_beta1, arguments.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=arguments.adam_epsilon)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Does what the stock class does, and stops where the loss is no number.

        Args:
            model: As in the stock class.
            inputs: As in the stock class.
            num_items_in_batch: As in the stock class.

        Returns:
            The loss.

        Raises:
            ValueError: If the loss is NaN or infinite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; use a lower --learning_rate, a "
                "longer --warmup_ratio, or --mixed_precision no. The last checkpoint is kept."
            )
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        dataset = cast(Any, self.train_dataset if train_dataset is None else train_dataset)
        return EpochOrder(len(dataset), self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restores every weight, or fails.

        Files hold the parameter names of transformers 4. The stock method gives a file's names to `load_state_dict`
        as they are, not strictly, and so leaves most weights of an I-JEPA model as they were; `from_pretrained`
        knows all names that a file may have.
        """
        target = cast(PreTrainedModel, self.model if model is None else model)
        stored, info = type(target).from_pretrained(
            resume_from_checkpoint, dtype=target.dtype, use_safetensors=True, output_loading_info=True
        )
        wrong = {name: sorted(map(str, found)) for name, found in info.items() if found}
        if wrong:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is no checkpoint of this model: {wrong}."
            )
        target.load_state_dict(stored.state_dict())


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """The loss: cross-entropy, averaged over the images of an optimiser step, however many micro-batches it has.

    Given to `Trainer` because its own label smoothing is not divided by the number of micro-batches in every version.

    Args:
        label_smoothing: Probability that is spread over all classes, in [0, 1).
    """

    label_smoothing: float

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Returns the loss of a micro-batch as its part of the mean over `num_items_in_batch` images."""
        logits = outputs["logits"].float()
        total = nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Makes a batch.

    Args:
        samples: As `LabelledImages` gives them.

    Returns:
        `pixel_values` float32 `[B, channels, height, width]` and `labels` int64 `[B]`.
    """
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}


def finetune(arguments: FinetuningArguments) -> str:
    """Fine-tunes a model, scores it and writes the folder that the module's docstring lists.

    Args:
        arguments: See `FinetuningArguments`.

    Returns:
        What is to be printed, see `render_finetuning`; that of a finished run is given again without work.

    Raises:
        FileNotFoundError: If the data set or a local model does not exist.
        OSError: If the model cannot be loaded.
        ValueError: If a value is bad, the data cannot be used, the model's card is damaged, or `output_dir` holds
            something else.
    """
    arguments.check()
    output_dir = Path(cast(str, arguments.output_dir))
    values = dataclasses.asdict(arguments)
    _check_output_dir(output_dir, arguments, values)
    if (output_dir / RESULT_FILE).is_file() and not arguments.overwrite_output_dir:
        logger.warning("%s holds this fine-tuning, finished; its result follows.", output_dir)
        return render_finetuning(output_dir)
    checkpoint = _find_checkpoint(output_dir, arguments)
    if arguments.num_cpu_threads is not None:
        torch.set_num_threads(arguments.num_cpu_threads)
    _check_model_name(arguments.model, arguments.model_revision)
    commit = _commit_of(arguments.model, arguments.model_revision)
    if commit is not None:  # all that follows is of one commit; the record keeps what was asked for
        arguments = dataclasses.replace(arguments, model_revision=commit)
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.model_revision)
    source = {"model_commit": commit, **_license_of(arguments)}
    settings = read_image_settings(arguments.model, config, revision=arguments.model_revision)
    splits = load_labelled_splits(arguments, len(settings.mean))
    model = load_classifier(arguments, splits.names)
    _check_shape(model, settings, arguments.model)
    trainer = _build_trainer(model, splits, settings, arguments)

    if arguments.overwrite_output_dir:
        _delete_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_json(output_dir / ARGUMENTS_FILE, values)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - start
    vars(model.config).pop("auto_map", None)  # it names the code of the full model, which is not in this folder
    model.eval().save_pretrained(output_dir)
    _write_json(output_dir / "preprocessor_config.json", image_processor_fields(*settings))
    result = source | _result(trainer.state, splits, values, seconds=seconds, resumed_from=checkpoint)
    (output_dir / "figures").mkdir(exist_ok=True)
    draw_finetuning_curves(result, output_dir / "figures" / "curves.png")
    card = render_finetuning_card(result)
    write_atomically(output_dir / "README.md", lambda path: path.write_text(card, "utf-8"))
    _write_json(output_dir / RESULT_FILE, result)  # last: it says "finished"
    for folder in output_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return render_finetuning(output_dir)


def _commit_of(model: str, revision: str | None) -> str | None:
    """The commit that a revision on the Hub is now; `None` for a folder."""
    if Path(model).is_dir():
        return None
    path = cached_file(model, CONFIG_NAME, revision=revision)
    return None if path is None else extract_commit_hash(str(path), None)


def _license_of(arguments: FinetuningArguments) -> dict[str, Any]:
    """The licence that goes with the weights, and whether it is known; read before the work, which it could lose."""
    if arguments.from_scratch:  # takes no weights
        return {"license": None, "license_is_known": True}
    try:
        license_ = read_license(_find_card(arguments.model, arguments.model_revision))
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's own
        logger.warning(
            "the licence of %s is NOT KNOWN: its %s could not be read (%s). The card of this fine-tuning will name "
            "none: look it up on the Hub, and set `license` at the top of %s by hand.",
            arguments.model,
            _CARD_NAME,
            " ".join(str(error).split()) or type(error).__name__,
            Path(cast(str, arguments.output_dir)) / _CARD_NAME,
        )
        return {"license": None, "license_is_known": False}
    return {"license": license_, "license_is_known": True}


def _find_card(model: str, revision: str | None) -> Path | None:
    """The model's card; `None` where it is known that there is none, an error where it cannot be found out."""
    if Path(model).is_dir():
        path = Path(model) / _CARD_NAME
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, _CARD_NAME, revision=revision))
    except hub.LocalEntryNotFoundError:  # the Hub could not be asked now, but may have been before
        cached = huggingface_hub.try_to_load_from_cache(model, _CARD_NAME, revision=revision)
        if cached is not huggingface_hub._CACHED_NO_EXIST:
            raise
    except hub.EntryNotFoundError:
        pass
    return None


def _check_model_name(model: str, revision: str | None) -> None:
    if revision is not None and Path(model).expanduser().exists():
        raise ValueError(
            f"model_revision={revision!r} is for Hub repos, and model={model!r} is on this disk; omit it."
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        path = Path(model).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such folder with a config.json in it.")


def _build_trainer(
    model: PreTrainedModel, splits: LabelledSplits, settings: ImageSettings, arguments: FinetuningArguments
) -> FinetuningTrainer:
    training = TrainingArguments(
        output_dir=cast(str, arguments.output_dir),
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_train_steps or -1,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.warmup_ratio,  # below 1: a share of all steps
        max_grad_norm=_MAX_GRAD_NORM,
        bf16=arguments.mixed_precision == "bf16",
        use_cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"),
        seed=arguments.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=_CHECKPOINTS,
        logging_steps=_LOGGED_SHARE,
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=arguments.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            f"ijepa-hf finetune runs on one device, and there are {max(training.world_size, training.n_gpu)}; start "
            "it without torchrun, and choose one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    train = LabelledImages(
        splits.train,
        splits.train_labels,
        *settings,
        min_crop_scale=arguments.min_crop_scale,
        horizontal_flip=arguments.horizontal_flip,
        seed=arguments.seed,
    )
    return FinetuningTrainer(
        layer_decay=arguments.layer_decay,
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=LabelledImages(splits.test, splits.test_labels, *settings),
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        compute_loss_func=SmoothedCrossEntropy(arguments.label_smoothing),
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(prediction.label_ids, prediction.predictions))}


# -- the folder ------------------------------------------------------------------------------------------------------


def _check_output_dir(output_dir: Path, arguments: FinetuningArguments, values: Mapping[str, Any]) -> None:
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not empty and holds no fine-tuning of ijepa-hf; choose another "
            "--output_dir."
        )
    if arguments.overwrite_output_dir:
        for name, path in (("model", arguments.model), ("resume_from_checkpoint", arguments.resume_from_checkpoint)):
            if path not in (None, "latest"):
                resolved = Path(path).resolve()
                if output_dir.resolve() in (resolved, *resolved.parents):
                    raise ValueError(
                        f"overwrite_output_dir would delete {name}={path!r}; choose another --output_dir."
                    )
        return
    _check_same_run(output_dir, values)
    if arguments.resume_from_checkpoint is None and not (output_dir / RESULT_FILE).is_file():
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds this fine-tuning, unfinished. Add --resume_from_checkpoint latest "
            "to continue it, or --overwrite_output_dir to start again."
        )


def _check_same_run(folder: Path, values: Mapping[str, Any]) -> None:
    try:
        stored = json.loads((folder / ARGUMENTS_FILE).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ARGUMENTS_FILE} is damaged ({error}); choose another --output_dir.") from error
    differing = [
        f"{name} is {stored.get(name)!r} there, {value!r} here"
        for name, value in values.items()
        if name not in _FREE_ARGUMENTS and stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds another fine-tuning: {'; '.join(differing)}. Choose another --output_dir, or add "
            "--overwrite_output_dir to delete that one."
        )


def _find_checkpoint(output_dir: Path, arguments: FinetuningArguments) -> Path | None:
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "latest":
        folder = Path(asked)
        if not _is_complete(folder):
            raise FileNotFoundError(
                f"resume_from_checkpoint={asked!r}: there is no complete and undamaged checkpoint."
            )
        if (folder.parent / ARGUMENTS_FILE).is_file():
            _check_same_run(folder.parent, dataclasses.asdict(arguments))
        return folder
    found = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        if _is_complete(folder):
            return folder
        logger.warning("skipping %s, which is incomplete or damaged", folder)
    logger.warning("%s holds no checkpoint: the fine-tuning starts at step 0", output_dir)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint can be read; `Trainer` writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            return True
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError):
        return False


def _delete_run(output_dir: Path) -> None:
    """Deletes what a fine-tuning writes, and nothing else that may lie in the folder."""
    for entry in [output_dir / name for name in _RUN_ENTRIES] + list(output_dir.glob("checkpoint-*")):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8"))


# -- results ---------------------------------------------------------------------------------------------------------


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy: of the images alone, not of other seeds or other draws of labels.

    Args:
        num_correct: 0 .. `num_images`.
        num_images: At least 1.

    Returns:
        Least and most, in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = num_correct / num_images, _Z_95**2 / num_images
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _result(
    state: Any, splits: LabelledSplits, values: Mapping[str, Any], *, seconds: float, resumed_from: Path | None
) -> dict[str, Any]:
    history = state.log_history
    evaluations = [
        {"epoch": row["epoch"], "step": row["step"], "accuracy": row["eval_accuracy"], "loss": row["eval_loss"]}
        for row in history
        if "eval_accuracy" in row
    ]
    num_correct = round(evaluations[-1]["accuracy"] * len(splits.test))
    return {
        "accuracy": num_correct / len(splits.test),
        "accuracy_interval": list(wilson_interval(num_correct, len(splits.test))),
        "num_correct": num_correct,
        "num_eval_images": len(splits.test),
        "num_train_images": len(splits.train),
        "classes": splits.names,
        "steps": state.global_step,
        "seconds": seconds,
        "resumed_from": None if resumed_from is None else resumed_from.name,
        "evaluations": evaluations,
        "losses": [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row],
        "transformers": version("transformers"),
        "arguments": dict(values),
    }


def draw_finetuning_curves(result: Mapping[str, Any], path: Path) -> None:
    """Draws the training loss and the held-out accuracy over the optimiser steps.

    Args:
        result: As in `finetune.json`.
        path: PNG to write; its folder must exist.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    scores = [(row["step"], 100 * row["accuracy"]) for row in result["evaluations"]]
    losses = [(row["step"], row["loss"]) for row in result["losses"]]
    for axis, points, title, unit in (
        (left, losses, "Training loss", "cross-entropy"),
        (right, scores, "Held-out accuracy", "top-1 in percent"),
    ):
        axis.plot(*zip(*points, strict=True), color="#0072B2", linewidth=1.4, marker="o" if len(points) < 2 else None)
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold", color="#222222")
        axis.set_ylabel(unit, fontsize=8, color="#555555")
        axis.set_xlabel("optimiser step", fontsize=8, color="#555555")
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors="#555555")
    figure.savefig(path, dpi=150)


def render_finetuning(output_dir: Path) -> str:
    """What is printed at the end of a fine-tuning.

    Args:
        output_dir: The folder.

    Returns:
        Several lines of plain text.
    """
    result = json.loads((output_dir / RESULT_FILE).read_text("utf-8"))
    return "\n".join(
        [
            f"{_summary(result)}",
            f"the last epoch's, after {result['steps']} steps; nothing was chosen on these images",
            *(f"licence: {line}" for line in _unknown_license_lines(result)),
            "",
            f"pictures: {output_dir / 'figures' / 'curves.png'}",
            "",
            "load it with:",
            "",
            *(f"    {line}" for line in _loading_lines(str(output_dir))),
        ]
    )


def _summary(result: Mapping[str, Any]) -> str:
    low, high = (100 * value for value in result["accuracy_interval"])
    start = "new weights" if result["arguments"]["from_scratch"] else "pretrained weights"
    head = ", the encoder frozen" if result["arguments"]["freeze_encoder"] else ""
    return (
        f"top-1 {100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f}, 95 % interval) of "
        f"{result['num_eval_images']} held-out images, from {start}{head}, with {result['num_train_images']} labelled "
        f"images of {len(result['classes'])} classes"
    )


def _unknown_license_lines(result: Mapping[str, Any]) -> list[str]:
    if result.get("license_is_known", True):
        return []
    model = result["arguments"]["model"]
    return [
        f"that of `{model}` could not be read; look it up, and set `license` at the top of the card ({_CARD_NAME})"
    ]


def _loading_lines(name: str) -> list[str]:
    return [
        "from transformers import pipeline",
        f'classify = pipeline("image-classification", model="{name}")',
        'classify("picture.png")',
    ]


def render_finetuning_card(result: Mapping[str, Any]) -> str:
    """The model card of a fine-tuned model.

    Args:
        result: As in `finetune.json`.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    arguments = result["arguments"]
    dataset = Path(arguments["dataset_name"]).name
    base = None if Path(arguments["model"]).exists() else arguments["model"]  # a folder is nothing to link to
    data = ModelCardData(
        license=result["license"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ijepa", "vision"],
        base_model=base,
        model_name=Path(arguments["output_dir"]).name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=arguments["eval_split_name"],
                metric_type="accuracy",
                metric_value=result["accuracy"],
            )
        ],
    )
    start = "A network with new weights" if arguments["from_scratch"] else f"`{base or Path(arguments['model']).name}`"
    if not arguments["from_scratch"] and result.get("model_commit") is not None:
        start += f" (commit `{result['model_commit']}`)"
    settings = "\n".join(f"{name}: {value}" for name, value in sorted(arguments.items()) if value is not None)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {Path(arguments['output_dir']).name}",
        "",
        f"{start}, fine-tuned on `{dataset}` with `ijepa-hf finetune`.",
        "",
        f"{_summary(result)[0].upper()}{_summary(result)[1:]}. It is the last epoch's; nothing was chosen on the "
        "held-out images. The interval is that of the images alone, not of other seeds.",
        "",
        *(f"Licence: {line}.\n" for line in _unknown_license_lines(result)),
        "```python",
        *_loading_lines(arguments["output_dir"]),
        "```",
        "",
        "![Training loss and held-out accuracy](figures/curves.png)",
        "",
        "```",
        settings,
        "```",
        "",
    ]
    return str(ModelCard("\n".join(lines)))
