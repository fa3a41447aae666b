"""Defines the flags of `ijepa-hf finetune`, checks them and parses them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ijepa_hf.recipes.arguments import LabelledDataFlags, flag
from ijepa_hf.recipes.parsing import CommandParser, model_parser, parse_flags


@dataclass(kw_only=True)
class FinetuningFlags(LabelledDataFlags):
    """Defines the flags of `ijepa-hf finetune`; names as in `ijepa-hf pretrain` and transformers' examples."""

    samples_per_class: int | None = flag("result", "Few labels: train on N images of each class, drawn by the seed.")
    label_fraction: float | None = flag(
        "result",
        "Few labels: train on this share of the images of each class (rounded up), drawn by the seed; e.g. 0.01.",
    )
    output_dir: str | None = flag("place", "Folder of the classifier.")
    overwrite_output_dir: bool = flag("place", "Delete what another fine-tuning left in output_dir.", False)
    resume_from_checkpoint: str | None = flag("place", "A checkpoint folder; or `latest`, the newest in output_dir.")
    model_revision: str | None = flag("result", "Branch, tag or commit of MODEL on the Hub.")
    from_scratch: bool = flag(
        "result",
        "Start from new weights instead of the model's: the same network without pretraining, to compare with.",
        False,
    )
    freeze_encoder: bool = flag("result", "Train the linear head alone.", False)
    learning_rate: float = flag("result", "Highest learning rate, that of the head.", 1e-3)
    layer_decay: float = flag(
        "result", "Factor from the learning rate of each layer to that of the layer below it; 1 is off.", 0.75
    )
    weight_decay: float = flag("result", "Weight decay, of matrices only.", 0.05)
    warmup_ratio: float = flag(
        "result", "Share of the steps in which the learning rate rises; then it falls as a cosine.", 0.1
    )
    label_smoothing: float = flag("result", "Probability that is spread over all classes.", 0.0)
    num_train_epochs: float = flag("result", "Length of the run, in epochs.", 50.0)
    max_train_steps: int | None = flag("result", "Length of the run, in optimiser steps; wins over num_train_epochs.")
    per_device_train_batch_size: int = flag("result", "Images per micro-batch.", 64)
    gradient_accumulation_steps: int = flag("result", "Micro-batches per optimiser step.", 1)
    mixed_precision: str = flag("result", "no (float32) or bf16.", "no")
    min_crop_scale: float = flag(
        "result", "Least share of the image that a random crop covers; 1 means no cropping.", 0.3
    )
    horizontal_flip: bool = flag("result", "Mirror half of the training images.", False)
    num_cpu_threads: int | None = flag("speed", "Threads of torch on a CPU; its own choice if not given.")
    dataloader_num_workers: int = flag("speed", "Processes that load images; 0 loads in the training process.", 0)
    seed: int = flag("result", "Seed of every draw.", 0)


@dataclass(kw_only=True)
class FinetuningArguments(FinetuningFlags):
    """Holds the arguments of a fine-tuning: the flags and the model, which comes first on the command line.

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


def build_finetune_parser() -> CommandParser:
    """Returns the parser of `ijepa-hf finetune`, whose values are the arguments of `FinetuningArguments`."""
    text = (
        "Fine-tune a pretrained encoder, with a linear head on the mean of its patches, for "
        "classification. What comes out is a stock transformers model. The last epoch's accuracy is the result: "
        "nothing is chosen on the held-out split."
    )
    return model_parser("finetune", text, FinetuningFlags)


def parse_finetune_arguments(argv: Sequence[str]) -> FinetuningArguments:
    """Turns a command line into checked arguments.

    Args:
        argv: What follows `ijepa-hf finetune`: the model, then flags.

    Returns:
        The arguments.

    Raises:
        ValueError: If a flag is unknown (the nearest is named), or a value is bad.
    """
    arguments = FinetuningArguments(**vars(parse_flags(build_finetune_parser(), argv)))
    arguments.check()
    return arguments
