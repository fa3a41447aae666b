"""What a pretraining run is told: three dataclasses behind the command line and the recipes.

One name for each thing, the same in a recipe, as a flag, in logs and in docs. A recipe is a flat YAML file of these
names, shipped inside the package (`recipe_names()`) or given by path; flags override it.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from ijepa_hf.configuration_ijepa import MASK_FIELDS, IJepaConfig
from ijepa_hf.image_transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.plain_yaml import read_yaml, write_yaml
from ijepa_hf.retrying import DEFAULT_RETRIES, RetryPolicy

if TYPE_CHECKING:
    from ijepa_hf.sources import ImageSource

HUB_STRATEGIES = ("end", "checkpoint")
_LARGEST_WHOLE = 2**63 - 1


def _default(name: str) -> Any:
    return IJepaConfig.__dataclass_fields__[name].default


def _help(text: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field with a help text; lists get a factory, as dataclasses demand."""
    metadata = {"help": text}
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata=metadata, **kwargs)
    return field(default=default, metadata=metadata, **kwargs)


@dataclass
class ModelArguments:
    """Fields of `IJepaConfig` that a recipe or a flag sets; see its docstring for ranges and sources."""

    image_size: list[int] = _help("Pixels: one number, or height and width.", [224])
    patch_size: list[int] = _help("Pixels of a patch: one number, or height and width.", [16])
    num_channels: int = _help("Channels of an image.", 3)
    hidden_size: int = _help("Width D of the encoder.", _default("hidden_size"))
    num_hidden_layers: int = _help("Depth of the encoder.", _default("num_hidden_layers"))
    num_attention_heads: int = _help("Heads of the encoder.", _default("num_attention_heads"))
    intermediate_size: int | None = _help("Width of the encoder's MLPs; 4 x hidden_size if not given.", None)
    predictor_hidden_size: int = _help("Width E of the predictor.", _default("predictor_hidden_size"))
    predictor_num_hidden_layers: int = _help("Depth of the predictor.", _default("predictor_num_hidden_layers"))
    predictor_num_attention_heads: int | None = _help("Heads of the predictor; the encoder's if not given.", None)
    masking_strategy: str = _help(
        "multi_block, multi_block_official (published), or block, rasterized, random (table 6 of the paper).",
        _default("masking_strategy"),
    )
    num_context_sets: int = _help("Context sets S drawn per image.", _default("num_context_sets"))
    num_target_blocks: int = _help("Target blocks M drawn per image (multi-block).", _default("num_target_blocks"))
    context_scale: list[float] = _help("Least and most share of the grid of the context block.", (0.85, 1.0))
    target_scale: list[float] = _help("Least and most share of the grid of a target block.", (0.15, 0.2))
    target_aspect_ratio: list[float] = _help("Least and most height / width of a target block.", (0.75, 1.5))
    context_keep_ratio: float = _help(
        "Share of the patches that the context encoder sees (multi_block).", _default("context_keep_ratio")
    )
    official_min_keep: int = _help(
        "Blocks keep more patches than this (multi_block_official).", _default("official_min_keep")
    )
    allow_overlap: bool = _help("Let context patches lie inside target blocks.", _default("allow_overlap"))
    mask_ratio: float = _help("Share of the patches that is target (block, random).", _default("mask_ratio"))
    loss_type: str = _help("smooth_l1 (published code) or mse (paper).", _default("loss_type"))
    target_type: str = _help(
        "What is predicted: representation, or pixels of the target patches (table 7 of the paper).",
        _default("target_type"),
    )
    normalize_targets: bool = _help("Layer-normalise the targets.", _default("normalize_targets"))
    vicreg_weight: float = _help(
        "Weight of VICReg's variance and covariance terms on pooled context features (C-JEPA); 0 is off.",
        _default("vicreg_weight"),
    )
    patch_init_std: float | None = _help(
        "Std of the initial patch embedding; 1/sqrt(inputs of a patch) if not given, 0.02 as published.", None
    )
    initializer_range: float = _help("Std of the initial weights (truncated normal); 0.02 as published.", 0.02)
    hidden_dropout_prob: float = _help("Dropout after each sublayer.", 0.0)
    attn_implementation: str | None = _help(
        "Attention backend: sdpa, eager, ...; transformers' choice if not given.", None
    )
    # Names that a recipe or a flag set: what a run that starts from weights asks to be otherwise than in the weights.
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def to_config(self, base: IJepaConfig | None = None) -> IJepaConfig:
        """Returns the validated model configuration.

        Args:
            base: The configuration of the weights to start from, if any: whatever no recipe or flag set is as there.

        Raises:
            ValueError: If a field is bad or a geometry cannot fit; the message says what would.
        """
        fields = self._config_fields()
        if base is not None:
            changes = {name: value for name, value in fields.items() if name in self.given}
            if fields["masking_strategy"] != base.masking_strategy and "masking_strategy" in changes:
                # what belongs to the other strategy goes with it
                changes = {**{name: fields[name] for name in MASK_FIELDS}, **changes}
            return base.replace(**changes)
        if fields["intermediate_size"] is None:
            fields["intermediate_size"] = 4 * fields["hidden_size"]
        return IJepaConfig(**fields)

    def resolved(self, config: IJepaConfig) -> "ModelArguments":
        """The same arguments with the values that a configuration has, so that a run's record says what it was.

        Args:
            config: From `to_config`.

        Returns:
            New arguments.
        """
        values = {name: getattr(config, name) for name in self._config_fields()}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        for name, shape in (("image_size", config.image_shape), ("patch_size", config.patch_shape)):
            values[name] = [shape[0]] if shape[0] == shape[1] else list(shape)
        changed = dataclasses.replace(self, **values)
        changed.given = self.given
        return changed

    def _config_fields(self) -> dict[str, Any]:
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init}
        fields.pop("attn_implementation")
        for name in ("image_size", "patch_size"):
            fields[name] = fields[name][0] if len(fields[name]) == 1 else fields[name]
        return fields


@dataclass
class DataArguments:
    """Where the images come from and how they are cut."""

    dataset_name: str | None = _help(
        "digits or shapes (built in), a Hub id, a folder of images, or a file or folder of .parquet, .tar "
        "(WebDataset), .csv or .tsv (paths of images), or .npy.",
        None,
    )
    dataset_config_name: str | None = _help("Configuration of the Hub data set.", None)
    train_split_name: str = _help("Split to train on.", "train")
    eval_split_name: str | None = _help(
        "Labelled split on which the finished encoder is scored; none if not given.", None
    )
    image_column_name: str | None = _help("Column of the images; found by itself if there is only one.", None)
    label_column_name: str | None = _help("Column of the labels, for the scores only; `label` if there is one.", None)
    streaming: bool = _help(
        "Read .parquet or .tar shards from front to end, without a copy on disk; local or from the Hub.", False
    )
    shuffle_buffer_size: int = _help(
        "Images that a reader of a stream shuffles together; their files are held in memory, undecoded.", 1000
    )
    max_train_samples: int | None = _help("Use only the first so many images.", None)
    max_eval_samples: int | None = _help("Score with at most so many images of each split.", None)
    image_mean: list[float] = _help("Mean of each channel, of pixels in [0, 1].", IMAGENET_MEAN)
    image_std: list[float] = _help("Standard deviation of each channel, of pixels in [0, 1].", IMAGENET_STD)
    min_crop_scale: float = _help("Least share of the image that a random crop covers; 1 means no cropping.", 0.3)
    dataloader_num_workers: int = _help("Processes that load images; 0 loads in the training process.", 0)
    keep_images_in_memory: str = _help(
        "Keep images decoded, which must be 8-bit pictures of one size; nothing but the speed depends on it. yes; no; "
        "auto: where they are, take 1 GB at most in each process, and the run reads as many images as there are.",
        "auto",
    )
    max_broken_share: float = _help(
        "Stop, and list them, when more than this share of the images cannot be read; others are skipped.", 0.05
    )
    data_retry_seconds: float = _help(
        "How long a source of data that fails (an I/O error, a server's error, a stall) is tried again, in seconds, "
        "before the run saves its state and stops; 0 does not try again.",
        DEFAULT_RETRIES.seconds,
    )
    data_timeout_seconds: float = _help(
        "A read that takes longer than so many seconds counts as failed; 0 waits for ever.", DEFAULT_RETRIES.timeout
    )

    @property
    def source(self) -> "ImageSource":
        """Which images they are, for `sources`."""
        from ijepa_hf.sources import ImageSource  # `--help` needs no `datasets`, which takes a second to import

        assert self.dataset_name is not None  # check
        return ImageSource(self.dataset_name, self.dataset_config_name, self.image_column_name)

    @property
    def retries(self) -> RetryPolicy:
        """How patiently the images are read."""
        return RetryPolicy(self.data_retry_seconds, self.data_timeout_seconds)

    def check(self, model: ModelArguments) -> None:
        """Checks the values, alone and against the model's.

        Args:
            model: Its channels and masks count.

        Raises:
            ValueError: If a value is bad.
        """
        if self.dataset_name is None:
            raise ValueError(
                "dataset_name is not given: write --dataset_name followed by digits, a Hub id, or a folder of images."
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if len(value) != model.num_channels:
                raise ValueError(
                    f"{name}={value} has {len(value)} values, but num_channels={model.num_channels}; give one for "
                    "each channel."
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} must be greater than 0 everywhere.")
        if not 0.0 < self.min_crop_scale <= 1.0:
            raise ValueError(
                f"min_crop_scale={self.min_crop_scale} must be in (0, 1]; 0.3 as published, 1 for no cropping."
            )
        if not 0.0 <= self.max_broken_share <= 1.0:
            raise ValueError(
                f"max_broken_share={self.max_broken_share} must be from 0 to 1; 0 stops at the first one."
            )
        if self.keep_images_in_memory not in ("auto", "yes", "no"):
            raise ValueError(f"keep_images_in_memory={self.keep_images_in_memory!r} must be 'auto', 'yes' or 'no'.")
        if self.keep_images_in_memory == "yes" and self.streaming:
            raise ValueError(
                "keep_images_in_memory='yes' cannot be done with streaming=True, where rows are read one by one; "
                "leave one of them out."
            )
        _check_at_least(self, 0, "dataloader_num_workers", "data_retry_seconds", "data_timeout_seconds")
        _check_at_least(self, 1, "max_train_samples", "max_eval_samples", "shuffle_buffer_size")
        if self.streaming and self.eval_split_name is not None and self.max_eval_samples is None:
            raise ValueError(
                f"eval_split_name={self.eval_split_name!r} with streaming would keep both splits in memory; say how "
                "many images of each to score with, for example --max_eval_samples 5000."
            )


@dataclass
class PretrainingArguments:
    """The run: optimiser, schedules, batch, saving, logging."""

    output_dir: str | None = _help("Folder of the run; runs/<recipe> if not given.", None)
    overwrite_output_dir: bool = _help("Delete what another run left in output_dir.", False)
    resume_from_checkpoint: str | None = _help(
        "A checkpoint folder, `latest` of output_dir, or `hub`: the last one that hub_model_id has.", None
    )
    model_name_or_path: str | None = _help(
        "Weights to start from: a Hub id, a model folder, or a published .pth.tar; of I-JEPA, ViT or ViT-MAE. What "
        "neither recipe nor flag sets of the model is then as in the weights.",
        None,
    )
    model_revision: str | None = _help("Branch, tag or commit of model_name_or_path on the Hub.", None)
    new_predictor: bool = _help("Start with an untrained predictor even where the weights have one.", False)
    predictor_warmup_steps: int | None = _help(
        "Optimiser steps at the start that train the predictor alone, before the schedules begin; if not given, a "
        "twentieth of the run where the predictor is new and the encoders are not, else 0.",
        None,
    )
    learning_rate: float | None = _help("Highest learning rate.", None)
    base_learning_rate: float | None = _help("Instead of learning_rate: times global batch / 256.", None)
    start_learning_rate: float = _help("Learning rate at the start of the warm-up.", 0.0)
    final_learning_rate: float = _help("Learning rate at the end.", 1e-6)
    warmup_epochs: float = _help("Length of the warm-up, in epochs.", 0.0)
    weight_decay: float = _help("Weight decay at the start (matrices and the mask token only).", 0.04)
    final_weight_decay: float = _help("Weight decay at the end.", 0.4)
    ema_momentum: float = _help("Momentum of the target encoder at the start.", 0.996)
    final_ema_momentum: float = _help("Momentum of the target encoder at the end.", 1.0)
    schedule_scale: float = _help("Schedules are this many times as long as the run (published ipe_scale).", 1.0)
    adam_beta1: float = _help("AdamW's beta 1.", 0.9)
    adam_beta2: float = _help("AdamW's beta 2.", 0.999)
    adam_epsilon: float = _help("AdamW's epsilon.", 1e-8)
    max_grad_norm: float | None = _help("Clip gradients to this norm; off if not given.", None)
    num_train_epochs: float = _help("Length of the run, in epochs.", 100.0)
    max_train_steps: int | None = _help("Length of the run, in optimiser steps; wins over num_train_epochs.", None)
    per_device_train_batch_size: int = _help("Images per device and micro-batch.", 64)
    gradient_accumulation_steps: int = _help("Micro-batches per optimiser step.", 1)
    fit_batch_to_memory: bool = _help(
        "Where a micro-batch does not fit into memory, take smaller ones, and so many more of them that the global "
        "batch stays what it was.",
        False,
    )
    mixed_precision: str = _help("no (float32) or bf16.", "no")
    gradient_checkpointing: bool = _help(
        "Recompute every layer in the backward pass: least memory, a sixth more time.", False
    )
    selective_checkpointing: bool = _help(
        "Recompute only layer norms and activation functions in the backward pass: two thirds of the memory, a "
        "little more time.",
        False,
    )
    num_cpu_threads: int | None = _help(
        "Threads of torch on a CPU; its own choice if not given. 1 is fastest for small models.", None
    )
    seed: int = _help("Seed of every draw.", 0)
    logging_steps: int = _help("Log every so many optimiser steps.", 10)
    checkpointing_steps: int | None = _help("Save every so many optimiser steps; once an epoch if not given.", None)
    checkpoints_total_limit: int = _help("Keep at most so many checkpoints.", 2)
    on_save_error: str = _help(
        "When the state cannot be written (disk full, folder gone or read-only): stop, with exit code 8; or continue: "
        "say it, go on, and try again at the next save.",
        "stop",
    )
    max_skipped_steps: int = _help(
        "Optimiser steps in a row that may be skipped because loss or gradient is NaN or infinite; one more stops the "
        "run with exit code 3.",
        3,
    )
    eval_steps: int | None = _help(
        "Score the target encoder with kNN on eval_split_name every so many optimiser steps; only at the end if not "
        "given.",
        None,
    )
    diagnostics_steps: int | None = _help(
        "Measure the features of a fixed batch and judge whether they collapse, every so many optimiser steps; 0 is "
        "off. If not given, so seldom that it takes less than a hundredth of the time.",
        None,
    )
    on_collapse: str = _help("warn: say it and go on; stop: save, and end with exit code 5.", "warn")
    report_to: list[str] = _help("Trackers: tensorboard, trackio, wandb (pip install ijepa-hf[trackers]).", [])
    license: str | None = _help(
        "Licence of the weights, for their card: apache-2.0, cc-by-4.0, ...; that of model_name_or_path if not given.",
        None,
    )
    push_to_hub: bool = _help("Upload the model to hub_model_id, beside the training.", False)
    hub_model_id: str | None = _help("Repository on the Hub, such as me/my-ijepa.", None)
    hub_private_repo: bool = _help("Make the repository private, where it is made.", False)
    hub_strategy: str = _help(
        "end: upload the finished model; checkpoint: after each save the model and the state to resume from.", "end"
    )
    hub_revision: str | None = _help("Branch to upload to; main if not given.", None)

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        if (self.learning_rate is None) == (self.base_learning_rate is None):
            given = "neither is" if self.learning_rate is None else "both are"
            raise ValueError(
                f"learning_rate and base_learning_rate: {given} given; give exactly one, e.g. --learning_rate 1e-3."
            )
        if self.gradient_checkpointing and self.selective_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True and selective_checkpointing=True exclude each other; drop one of them."
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r} must be 'no' or 'bf16' (fp16's loss scaling skips steps, "
                "which would break exact resume)."
            )
        for name in ("ema_momentum", "final_ema_momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be between 0 and 1; the published runs go from 0.996 to 1."
                )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        _check_at_least(
            self, 0, "learning_rate", "base_learning_rate", "start_learning_rate", "final_learning_rate",
            "warmup_epochs", "weight_decay", "final_weight_decay", "adam_epsilon", "seed",
        )  # fmt: skip
        _check_at_least(
            self, 1, "max_train_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "schedule_scale",
            "num_cpu_threads", "eval_steps",
        )  # fmt: skip
        _check_at_least(self, 0, "diagnostics_steps", "max_skipped_steps")
        if self.on_save_error not in ("stop", "continue"):
            raise ValueError(f"on_save_error={self.on_save_error!r} must be 'stop' or 'continue'.")
        if self.on_collapse not in ("warn", "stop"):
            raise ValueError(f"on_collapse={self.on_collapse!r} must be 'warn' or 'stop'.")
        if self.on_collapse == "stop" and self.diagnostics_steps == 0:
            raise ValueError("on_collapse='stop' needs measurements; leave out --diagnostics_steps 0.")
        for name in ("num_train_epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0.")
        self._check_start()
        self._check_hub()

    def _check_start(self) -> None:
        _check_at_least(self, 0, "predictor_warmup_steps")
        if self.model_name_or_path is not None:
            return
        for name in ("model_revision", "new_predictor", "predictor_warmup_steps"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is about weights to start from, but there are none; name them "
                    "with --model_name_or_path, or leave it out."
                )

    def _check_hub(self) -> None:
        if not self.push_to_hub:
            resumes = self.resume_from_checkpoint == "hub"
            unused = ["hub_private_repo", *([] if resumes else ["hub_model_id", "hub_revision"])]
            given = [name for name in unused if getattr(self, name)]
            given += ["hub_strategy"] if self.hub_strategy == "checkpoint" else []
            if given:
                raise ValueError(
                    f"{given[0]}={getattr(self, given[0])!r} is about uploading, which is off; add --push_to_hub, or "
                    "leave it out."
                )
        if self.hub_strategy not in HUB_STRATEGIES:
            raise ValueError(f"hub_strategy={self.hub_strategy!r} must be 'end' or 'checkpoint'.")
        for name, asks in (
            ("push_to_hub", self.push_to_hub),
            ("resume_from_checkpoint='hub'", self.resume_from_checkpoint == "hub"),
        ):
            if asks and self.hub_model_id is None:
                raise ValueError(f"{name} needs the repository's name; add --hub_model_id, such as me/my-ijepa.")


ARGUMENT_CLASSES = (ModelArguments, DataArguments, PretrainingArguments)
# About one folder or one upload, not about what a run does.
_LOCAL_ARGUMENTS = frozenset(
    ["output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo",
     "hub_strategy", "hub_revision"]
)  # fmt: skip


def recipe_names() -> list[str]:
    """Returns the names of the recipes shipped with the package."""
    folder = resources.files("ijepa_hf") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(recipe: str) -> dict[str, Any]:
    """Reads a recipe.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file.

    Returns:
        Argument names and values.

    Raises:
        FileNotFoundError: If there is no such recipe or file; says which recipes there are.
        ValueError: If the file is not a flat mapping, or a key is no argument; names the nearest one.
    """
    if recipe in recipe_names():
        text = (resources.files("ijepa_hf") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif Path(recipe).is_file():
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {recipe!r} is no text in UTF-8: {error}") from error
    else:
        nearest = difflib.get_close_matches(recipe, recipe_names(), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise FileNotFoundError(
            f"recipe {recipe!r} is neither shipped ({', '.join(recipe_names())}) nor the path of a YAML file.{hint}"
        )
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"recipe {recipe!r} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(
            f"recipe {recipe!r} must be a flat mapping of argument names to values, e.g. 'patch_size: 16'."
        )
    known = argument_names()
    for key in values:
        if key == "regions_column_name":  # of recipes written before the strategy was taken out
            raise ValueError(
                f"recipe {recipe!r} has the key {key!r}, which is gone; take it out, write masking_strategy: "
                "multi_block, and pass the patches of your own regions to the model (docs/masks.md shows how)."
            )
        if key not in known:
            raise ValueError(
                f"recipe {recipe!r} has the key {key!r}, which is no argument{nearest_name(str(key), known)}"
            )
    kinds = {entry.name: str(entry.type) for cls in ARGUMENT_CLASSES for entry in _entries(cls)}
    for key, value in values.items():
        _check_recipe_value(recipe, key, value, kinds[key])
    return values


def _check_recipe_value(recipe: str, key: str, value: Any, kind: str) -> None:
    """Refuses what would reach the parser as other words than those in the file."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float | bool | None):
            raise ValueError(
                f"recipe {recipe!r}: {key} holds a {type(item).__name__}; write a number, a word or a list."
            )
        if "str" in kind and isinstance(item, bool | float):
            raise ValueError(f"recipe {recipe!r}: {key}={item!r} is no text; write it in quotes: {key}: '...'.")
    if value == [] and argument_defaults()[key] != []:
        raise ValueError(f"recipe {recipe!r}: {key} is an empty list; give it values, or leave it out.")
    if isinstance(value, list) and not kind.startswith("list"):
        raise ValueError(f"recipe {recipe!r}: {key}={value!r} is a list; {key} takes one value.")


def argument_names() -> set[str]:
    """Returns the names of all arguments, as written in recipes."""
    return {entry.name for cls in ARGUMENT_CLASSES for entry in _entries(cls)}


def argument_values(*groups: ModelArguments | DataArguments | PretrainingArguments) -> dict[str, Any]:
    """Returns the names and values of all arguments in some groups, in their order."""
    return {entry.name: getattr(group, entry.name) for group in groups for entry in _entries(group)}


def argument_defaults() -> dict[str, Any]:
    """Returns the default of each argument."""
    return argument_values(ModelArguments(), DataArguments(), PretrainingArguments())


def as_recipe(arguments: Mapping[str, Any]) -> str:
    """Writes the arguments of a run as a recipe that starts the same run again, wherever its folder is.

    Args:
        arguments: Names and values; those that are no argument, or about this folder or machine only, are left out.

    Returns:
        YAML.
    """
    defaults = argument_defaults()
    kept = {
        name: value
        for name, value in arguments.items()
        if name in defaults and name not in _LOCAL_ARGUMENTS and value not in (None, [])
    }
    return write_yaml(kept)


def build_parser(prog: str = "ijepa-hf pretrain") -> HfArgumentParser:
    """Returns the parser of `ijepa-hf pretrain`: an optional recipe, then a flag for each argument."""
    parser = HfArgumentParser(
        ARGUMENT_CLASSES,
        prog=prog,
        allow_abbrev=False,
        description="Pretrain an I-JEPA model. A recipe sets the arguments, flags override it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # argparse takes -0.5 for a value and -1e-3 for a flag
    parser._negative_number_matcher = re.compile(
        r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE
    )
    parser.add_argument(
        "recipe", nargs="?", help=f"One of {', '.join(recipe_names())}, or the path of a YAML file.", default=None
    )
    return parser


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Turns a command line into checked arguments.

    Args:
        argv: What follows `ijepa-hf pretrain`: a recipe (optional, first), then flags.

    Returns:
        The three groups; `output_dir` is filled in.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If a flag or recipe key is unknown (the nearest is named), or a value is bad.
    """
    parser = build_parser()
    recipe, flags = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else (None, list(argv))
    positional = [] if recipe is None else [recipe]
    named, unknown = parser.parse_known_args([*positional, *flags])
    if named.recipe != recipe:
        raise ValueError(
            f"{named.recipe!r} stands after a flag; the recipe comes first: ijepa-hf pretrain {named.recipe} ..."
        )
    if any(word.split("=")[0] == "--hub_token" for word in unknown):  # the value must not be repeated
        raise ValueError(
            "--hub_token would show the token to everyone who can list processes; log in once with `hf auth login`, "
            "or set the environment variable HF_TOKEN."
        )
    if unknown:
        known = {f"--{name}" for name in argument_names()}
        raise ValueError(
            f"{unknown[0]!r} is no flag of ijepa-hf pretrain{nearest_name(unknown[0].split('=')[0], known)}"
        )
    # Recipe values travel through the same parser as flags do, so that they get the same types and errors.
    values = load_recipe(recipe) if recipe is not None else {}
    for given, other in (("learning_rate", "base_learning_rate"), ("base_learning_rate", "learning_rate")):
        if any(flag.split("=")[0] == f"--{given}" for flag in flags):
            values.pop(other, None)  # two names of one thing: the flag's wins over the recipe's
    defaults = as_flags(values)
    model, data, run, _ = parser.parse_args_into_dataclasses(
        args=[*positional, *defaults, *flags],
        look_for_args_file=False,  # else `ijepa-hf.args` beside the command would add flags unseen
    )
    model.given = frozenset(name for name, value in values.items() if value is not None) | {
        word[2:].split("=")[0] for word in flags if word.startswith("--")
    }
    if run.output_dir is None:
        run.output_dir = str(Path("runs") / (Path(recipe).stem if recipe else "ijepa"))
    for group in (model, data, run):
        _check_values(group)
    if run.model_name_or_path is None:  # else the weights have a say in what the data are checked against
        data.check(model)
    run.check()
    if run.eval_steps is not None and data.eval_split_name is None:
        raise ValueError(
            f"eval_steps={run.eval_steps} needs labelled images to score with; name their split, for example "
            "--eval_split_name test."
        )
    if model.vicreg_weight and run.per_device_train_batch_size < 2:
        raise ValueError(
            f"vicreg_weight={model.vicreg_weight} needs a variance over images, which "
            f"per_device_train_batch_size={run.per_device_train_batch_size} has not; write 2 or more."
        )
    return model, data, run


def as_flags(values: dict[str, Any]) -> list[str]:
    """Writes argument values as a command line's flags, so that a recipe goes through the same parser as flags do.

    Args:
        values: Names and values; `None` and empty lists are left out.

    Returns:
        Flags and words.
    """
    flags: list[str] = []
    for name, value in values.items():
        if value is None or value == []:
            continue
        # a single value with `=`, for one that begins with a dash
        flags += [f"--{name}", *(str(item) for item in value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command's flags.

    Args:
        parser: Of the command; `prog` is its name, such as "ijepa-hf finetune".
        argv: What follows the command.

    Returns:
        Names and values.

    Raises:
        ValueError: If a flag is unknown; names the nearest.
    """
    named, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = nearest_name(unknown[0].split("=")[0], flag_names(parser))
        raise ValueError(f"{unknown[0]!r} is no flag of {parser.prog}{nearest}")
    return named


def flag_names(parser: argparse.ArgumentParser) -> set[str]:
    """Returns a parser's flags, such as `--seed`; of those spelt with `_` and with `-`, the first."""
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    return {flag for flag in flags if "-" not in flag[2:] or f"--{flag[2:].replace('-', '_')}" not in flags}


def nearest_name(name: str, known: set[str]) -> str:
    """The end of a message about a name that does not exist.

    Args:
        name: What was written.
        known: What there is.

    Returns:
        A question with the most similar name, or the list of all.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(sorted(known))}."


def _entries(group: Any) -> list[dataclasses.Field]:
    """The arguments among the fields of a group."""
    return [entry for entry in dataclasses.fields(group) if entry.init]


def _check_at_least(arguments: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _check_values(group: Any) -> None:
    """Refuses NaN, which passes comparisons with a limit, infinity, whole numbers beyond 64 bits, and empty words."""
    for name, value in argument_values(group).items():
        for number in value if isinstance(value, list) else [value]:
            if number == "":
                raise ValueError(f"{name}={value!r} is empty; give it a value, or leave it out.")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}={value} must be finite.")
            if isinstance(number, int) and abs(number) > _LARGEST_WHOLE:
                raise ValueError(f"{name}={value} must be at most {_LARGEST_WHOLE}.")
