"""Declares the arguments of a pretraining run: three dataclasses behind the command line and the recipes.

An argument has one name, the same in a recipe, as a flag, in logs and in docs. A recipe is a flat YAML file of these
names, shipped inside the package (`recipe_names()`) or given by path; flags override it.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import IJepaConfig as StockIJepaConfig

from ijepa_hf.data.labelled import LabelledSource
from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.model.configuration_ijepa import MASK_FIELDS, IJepaConfig

if TYPE_CHECKING:
    from ijepa_hf.data.sources.opening import ImageSource

HUB_STRATEGIES = ("end", "checkpoint")


# What an argument changes. result: the weights or scores of a run. speed: its time and memory, and its numbers by
# rounding only. place: its folder and repository. reporting: what is logged, measured and saved, and when it stops.
CHANGES = ("result", "speed", "place", "reporting")


def flag(changes: str, text: str, default: Any = None) -> Any:
    """Makes a field of a dataclass of flags.

    Args:
        changes: What the flag changes, one of `CHANGES`.
        text: The text in `--help`.
        default: The value where the flag is not given; each object gets its own copy of a list.

    Returns:
        The field.

    Raises:
        ValueError: If `changes` is another word.
    """
    if changes not in CHANGES:
        raise ValueError(f"changes={changes!r} must be one of {', '.join(CHANGES)}.")
    metadata = {"help": text, "changes": changes}
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class _EncoderArguments:
    image_size: list[int] = flag("result", "Pixels: one number, or height and width.", [224])
    patch_size: list[int] = flag("result", "Pixels of a patch: one number, or height and width.", [16])
    num_channels: int = flag("result", "Channels of an image.", 3)
    hidden_size: int = flag("result", "Width D of the encoder.", 768)
    num_hidden_layers: int = flag("result", "Depth of the encoder.", 12)
    num_attention_heads: int = flag("result", "Heads of the encoder.", 12)
    intermediate_size: int | None = flag("result", "Width of the encoder's MLPs; 4 x hidden_size if not given.")
    initializer_range: float = flag(
        "result", "Std of the initial weights (truncated normal); 0.02 as published.", 0.02
    )
    hidden_dropout_prob: float = flag("result", "Dropout after each sublayer.", 0.0)


def _argument_of(entry: dataclasses.Field) -> tuple[str, Any, Any]:
    """Returns name, type and field of the argument for a field of `IJepaConfig`."""
    kind = entry.type if entry.default is None else type(entry.default)
    return entry.name, list[float] if kind is tuple else kind, flag("result", entry.metadata["help"], entry.default)


# The fields that `IJepaConfig` adds to the stock class are arguments by themselves, with default and help text there.
_ConfigArguments: Any = dataclasses.make_dataclass(
    "_ConfigArguments",
    [
        _argument_of(entry)
        for entry in dataclasses.fields(IJepaConfig)
        if entry.name not in StockIJepaConfig.__dataclass_fields__
    ],
    bases=(_EncoderArguments,),
)


@dataclass
class ModelArguments(_ConfigArguments):
    """Fields of `IJepaConfig` that a recipe or a flag sets; `IJepaConfig` has their ranges and sources."""

    attn_implementation: str | None = flag(
        "speed", "Attention backend: sdpa, eager, ...; transformers' choice if not given."
    )
    # Names that a recipe or a flag set: what a run that starts from weights asks to be otherwise than in the weights.
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def to_config(self, base: IJepaConfig | None = None) -> IJepaConfig:
        """Returns the validated model configuration.

        Args:
            base: The configuration of the weights to start from, if any; it gives every field that no recipe or flag
                set.

        Raises:
            ValueError: If a field is bad or a geometry cannot fit; the message says what would.
        """
        fields = self._config_fields()
        if base is not None:
            changes = {name: value for name, value in fields.items() if name in self.given}
            if fields["masking_strategy"] != base.masking_strategy and "masking_strategy" in changes:
                # the fields of the other strategy do not carry over
                changes = {**{name: fields[name] for name in MASK_FIELDS}, **changes}
            return base.replace(**changes)
        if fields["intermediate_size"] is None:
            fields["intermediate_size"] = 4 * fields["hidden_size"]
        return IJepaConfig(**fields)

    def resolved(self, config: IJepaConfig) -> "ModelArguments":
        """Returns the same arguments with the values of a configuration, for the record of the run.

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
    """Declares the source of the images, and how they are read and cropped."""

    dataset_name: str | None = flag(
        "result",
        "digits or shapes (built in), a Hub id, a folder of images, or a file or folder of .parquet, .tar "
        "(WebDataset), .csv or .tsv (paths of images), or .npy.",
    )
    dataset_config_name: str | None = flag("result", "Configuration of the Hub data set.")
    train_split_name: str = flag("result", "Split to train on.", "train")
    eval_split_name: str | None = flag(
        "reporting", "Labelled split on which the finished encoder is scored; none if not given."
    )
    image_column_name: str | None = flag("result", "Column of the images; found automatically if there is only one.")
    label_column_name: str | None = flag(
        "reporting", "Column of the labels, for the scores only; `label` if there is one."
    )
    streaming: bool = flag(
        "result",
        "Read .parquet or .tar shards from front to end, without a copy on disk; local or from the Hub.",
        False,
    )
    shuffle_buffer_size: int = flag(
        "result",
        "Images that a reader of a stream shuffles together; it holds their undecoded files in memory.",
        1000,
    )
    max_train_samples: int | None = flag("result", "Use only the first N images.")
    max_eval_samples: int | None = flag("reporting", "Score with at most N images of each split.")
    image_mean: list[float] = flag("result", "Mean of each channel, of pixels in [0, 1].", IMAGENET_MEAN)
    image_std: list[float] = flag("result", "Standard deviation of each channel, of pixels in [0, 1].", IMAGENET_STD)
    min_crop_scale: float = flag(
        "result", "Least share of the image that a random crop covers; 1 means no cropping.", 0.3
    )
    dataloader_num_workers: int = flag("speed", "Processes that load images; 0 loads in the training process.", 0)
    keep_images_in_memory: str = flag(
        "result",
        "Keep the decoded images, which must be 8-bit pictures of one size; pixels of crops may be off by 2 of 255. "
        "yes; no; auto: yes for such images if they take at most 1 GB in each process and the run lasts an epoch.",
        "auto",
    )
    max_broken_share: float = flag(
        "reporting",
        "Stop when more than this share of the images cannot be read, and list them; fewer are skipped.",
        0.05,
    )
    data_retry_seconds: float = flag(
        "reporting",
        "How long to retry a source of data that fails (an I/O error, a server's error, a stall), in seconds, before "
        "the run saves its state and stops; 0 does not retry.",
        300.0,
    )
    data_timeout_seconds: float = flag(
        "reporting", "Seconds after which a read counts as failed; 0 waits for ever.", 120.0
    )

    @property
    def source(self) -> "ImageSource":
        """The source, as `load_split` takes it."""
        from ijepa_hf.data.sources.opening import (
            ImageSource,  # `--help` needs no `datasets`, which takes a second to import
        )

        assert self.dataset_name is not None  # check
        return ImageSource(self.dataset_name, self.dataset_config_name, self.image_column_name)

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
        check_at_least(self, 0, "dataloader_num_workers", "data_retry_seconds", "data_timeout_seconds")
        check_at_least(self, 1, "max_train_samples", "max_eval_samples", "shuffle_buffer_size")
        if self.streaming and self.eval_split_name is not None and self.max_eval_samples is None:
            raise ValueError(
                f"eval_split_name={self.eval_split_name!r} with streaming would keep both splits in memory; say how "
                "many images of each to score with, for example --max_eval_samples 5000."
            )


@dataclass
class PretrainingArguments:
    """Declares the run: optimiser, schedules, batch, saving, logging."""

    output_dir: str | None = flag("place", "Folder of the run; runs/<recipe> if not given.")
    overwrite_output_dir: bool = flag("place", "Delete what another run left in output_dir.", False)
    resume_from_checkpoint: str | None = flag(
        "place", "A checkpoint folder; `latest`, the newest in output_dir; or `hub`, the newest in hub_model_id."
    )
    model_name_or_path: str | None = flag(
        "result",
        "Weights to start from: a Hub id, a model folder, or a published .pth.tar; of I-JEPA, ViT or ViT-MAE. They "
        "set all model arguments that neither the recipe nor a flag sets.",
    )
    model_revision: str | None = flag("result", "Branch, tag or commit of model_name_or_path on the Hub.")
    new_predictor: bool = flag("result", "Start with an untrained predictor even where the weights have one.", False)
    predictor_warmup_steps: int | None = flag(
        "result",
        "Optimiser steps at the start that train the predictor alone, before the schedules begin; if not given, 5 "
        "percent of the run where the predictor is new and the encoders are not, else 0.",
    )
    learning_rate: float | None = flag("result", "Highest learning rate.")
    base_learning_rate: float | None = flag("result", "Sets learning_rate to this value times global batch / 256.")
    start_learning_rate: float = flag("result", "Learning rate at the start of the warm-up.", 0.0)
    final_learning_rate: float = flag("result", "Learning rate at the end.", 1e-6)
    warmup_epochs: float = flag("result", "Length of the warm-up, in epochs.", 0.0)
    weight_decay: float = flag("result", "Weight decay at the start (matrices and the mask token only).", 0.04)
    final_weight_decay: float = flag("result", "Weight decay at the end.", 0.4)
    ema_momentum: float = flag("result", "Momentum of the target encoder at the start.", 0.996)
    final_ema_momentum: float = flag("result", "Momentum of the target encoder at the end.", 1.0)
    schedule_scale: float = flag(
        "result", "Length of the schedules, in lengths of the run (published ipe_scale).", 1.0
    )
    adam_beta1: float = flag("result", "AdamW's beta 1.", 0.9)
    adam_beta2: float = flag("result", "AdamW's beta 2.", 0.999)
    adam_epsilon: float = flag("result", "AdamW's epsilon.", 1e-8)
    max_grad_norm: float | None = flag("result", "Clip gradients to this norm; off if not given.")
    num_train_epochs: float = flag("result", "Length of the run, in epochs.", 100.0)
    max_train_steps: int | None = flag("result", "Length of the run, in optimiser steps; overrides num_train_epochs.")
    per_device_train_batch_size: int = flag("speed", "Images per device and micro-batch.", 64)
    gradient_accumulation_steps: int = flag("speed", "Micro-batches per optimiser step.", 1)
    fit_batch_to_memory: bool = flag(
        "speed",
        "Take smaller micro-batches, and more of them, where one does not fit into memory; the global batch stays the "
        "same.",
        False,
    )
    mixed_precision: str = flag("result", "no (float32) or bf16.", "no")
    gradient_checkpointing: bool = flag(
        "speed", "Recompute every layer in the backward pass: least memory, 1/6 more time.", False
    )
    selective_checkpointing: bool = flag(
        "speed",
        "Recompute layer norms and activation functions only in the backward pass: 2/3 of the memory, a little more "
        "time.",
        False,
    )
    num_cpu_threads: int | None = flag(
        "speed", "Threads of torch on a CPU; its own choice if not given. 1 is fastest for small models."
    )
    seed: int = flag("result", "Seed of every draw.", 0)
    logging_steps: int = flag("reporting", "Log every N optimiser steps.", 10)
    checkpointing_steps: int | None = flag("reporting", "Save every N optimiser steps; once an epoch if not given.")
    checkpoints_total_limit: int = flag("reporting", "Keep at most N checkpoints.", 2)
    on_save_error: str = flag(
        "reporting",
        "When the state cannot be written (disk full, folder gone or read-only): stop, with exit code 8; or continue: "
        "warn, go on training, and try again at the next save.",
        "stop",
    )
    max_skipped_steps: int = flag(
        "reporting",
        "Optimiser steps in a row that may be skipped because loss or gradient is NaN or infinite; one more stops the "
        "run with exit code 3.",
        3,
    )
    eval_steps: int | None = flag(
        "reporting",
        "Score the target encoder with kNN on eval_split_name every N optimiser steps; only at the end if not given.",
    )
    diagnostics_steps: int | None = flag(
        "reporting",
        "Measure the features of a fixed batch, and judge whether they collapse, every N optimiser steps; 0 is off. "
        "If not given, N is chosen so that this takes less than 1 percent of the time.",
    )
    on_collapse: str = flag(
        "reporting", "warn: log a warning and go on; stop: save, and end with exit code 5.", "warn"
    )
    report_to: list[str] = flag(
        "reporting", "Trackers: tensorboard, trackio, wandb (pip install ijepa-hf[trackers]).", []
    )
    license: str | None = flag(
        "reporting",
        "Licence of the weights, for their card: apache-2.0, cc-by-4.0, ...; the licence of model_name_or_path if not "
        "given.",
    )
    push_to_hub: bool = flag("place", "Upload the model to hub_model_id while training goes on.", False)
    hub_model_id: str | None = flag("place", "Repository on the Hub, such as me/my-ijepa.")
    hub_private_repo: bool = flag("place", "Make a new repository private.", False)
    hub_strategy: str = flag(
        "place",
        "end: upload the finished model; checkpoint: upload the model and the training state after each save.",
        "end",
    )
    hub_revision: str | None = flag("place", "Branch to upload to; main if not given.")

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
        check_at_least(
            self, 0, "learning_rate", "base_learning_rate", "start_learning_rate", "final_learning_rate",
            "warmup_epochs", "weight_decay", "final_weight_decay", "adam_epsilon", "seed",
        )  # fmt: skip
        check_at_least(
            self, 1, "max_train_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "schedule_scale",
            "num_cpu_threads", "eval_steps",
        )  # fmt: skip
        check_at_least(self, 0, "diagnostics_steps", "max_skipped_steps")
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
        check_at_least(self, 0, "predictor_warmup_steps")
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
_CHANGES_OF: dict[str, str] = {
    entry.name: entry.metadata["changes"]
    for cls in ARGUMENT_CLASSES
    for entry in dataclasses.fields(cls)
    if entry.init
}


def argument_names(*changes: str) -> set[str]:
    """Returns the names of arguments, as written in recipes.

    Args:
        *changes: Words of `CHANGES`; only arguments that change one of these are named. All if none is given.
    """
    return {name for name, word in _CHANGES_OF.items() if not changes or word in changes}


def argument_values(*groups: ModelArguments | DataArguments | PretrainingArguments) -> dict[str, Any]:
    """Returns the names and values of all arguments in some groups, in their order."""
    return {entry.name: getattr(group, entry.name) for group in groups for entry in _entries(group)}


def argument_defaults() -> dict[str, Any]:
    """Returns the default of each argument."""
    return argument_values(ModelArguments(), DataArguments(), PretrainingArguments())


def differing_arguments(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    free: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Names the arguments in which two runs differ.

    Args:
        stored: Arguments of the earlier run or checkpoint.
        current: Arguments of the run that is compared with it.
        free: Names that may differ; if not given, all that do not change the result. `per_device_train_batch_size`
            counts in any case with `multi_block_official`, whose context depends on it.
        defaults: Values of arguments that `stored` lacks, because an earlier version wrote it; if not given, those of
            `ijepa-hf pretrain`.

    Returns:
        Phrases such as "seed is 0 there, 1 here", sorted.
    """
    names = {*stored, *current} - set(argument_names("speed", "place", "reporting") if free is None else free)
    if current.get("masking_strategy") == "multi_block_official" and "per_device_train_batch_size" in current:
        names.add("per_device_train_batch_size")
    before = {**(argument_defaults() if defaults is None else defaults), **stored}
    return [
        f"{name} is {before.get(name)!r} there, {current.get(name)!r} here"
        for name in sorted(names)
        if before.get(name) != current.get(name)
    ]


@dataclass(kw_only=True)
class LabelledDataFlags:
    """Declares the flags that choose the labelled images of a command; names as in `ijepa-hf pretrain`."""

    dataset_name: str | None = flag(
        "result",
        "Labelled images, as for ijepa-hf pretrain: digits or shapes (built in), a Hub id, a folder or a file.",
    )
    dataset_config_name: str | None = flag("result", "Configuration of the Hub data set.")
    train_split_name: str = flag("result", "Split to train on.", "train")
    eval_split_name: str = flag("result", "Held-out split: scored, never used for a choice.", "test")
    image_column_name: str | None = flag("result", "Column of the images; found automatically if there is only one.")
    label_column_name: str | None = flag(
        "result", "Column of the labels: classes, whole numbers or words; `label` if any."
    )
    max_train_samples: int | None = flag("result", "Use at most N training images, spread evenly over the split.")
    max_eval_samples: int | None = flag("result", "Score with at most N images, spread evenly over the split.")

    @property
    def labelled(self) -> LabelledSource:
        """The source, as `load_labelled_splits` takes it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(LabelledSource)}
        return LabelledSource(**{**values, "dataset_name": str(self.dataset_name)})


def nearest_name(name: str, known: set[str]) -> str:
    """Suggests a name in place of one that does not exist.

    Args:
        name: The name that does not exist.
        known: The names that exist.

    Returns:
        The end of an error message: the most similar name, or all names.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(sorted(known))}."


def _entries(group: Any) -> list[dataclasses.Field]:
    """Returns the fields of a group that are arguments."""
    return [entry for entry in dataclasses.fields(group) if entry.init]


def check_at_least(arguments: Any, least: int, *names: str) -> None:
    """Refuses numbers below a limit.

    Args:
        arguments: Has the numbers as attributes; `None` passes.
        least: The least number allowed.
        *names: Names of the attributes.

    Raises:
        ValueError: If a number is less.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
