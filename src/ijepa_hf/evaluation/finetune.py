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

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import huggingface_hub
import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import errors as hub
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError, safe_open
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, Trainer, TrainingArguments

from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.evaluation.backbones import damaged_weights, refuse_kernels
from ijepa_hf.evaluation.finetune_arguments import FinetuningArguments
from ijepa_hf.evaluation.finetune_report import (
    RESULT_FILE,
    draw_finetuning_curves,
    finetuning_result,
    render_finetuning,
    render_finetuning_card,
)
from ijepa_hf.evaluation.image_settings import ImageSettings, check_model_name, commit_of, read_image_settings
from ijepa_hf.evaluation.labelled_data import EpochOrder, LabelledImages, LabelledSplits, load_labelled_splits
from ijepa_hf.export import image_processor_fields
from ijepa_hf.files import write_json_atomically, write_text_atomically
from ijepa_hf.model_card import read_license
from ijepa_hf.modeling_ijepa import IJepaModel

ARGUMENTS_FILE = "finetune_arguments.json"

logger = logging.getLogger(__name__)

_LOGGED_SHARE = 0.02  # of the run between two logged losses
_MAX_GRAD_NORM = 1.0
_CHECKPOINTS = 2
_LAYER = re.compile(r"\.layers?\.(\d+)\.")
# What may differ between a run and its continuation.
_FREE_ARGUMENTS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dataloader_num_workers")
_RUN_ENTRIES = (
    ARGUMENTS_FILE, RESULT_FILE, "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    "figures",
)  # fmt: skip


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
        ValueError: If its file is damaged or lacks weights other than the head's, or it has no head of its own.
    """
    labels = {number: str(name) for number, name in enumerate(names)}
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.model_revision, trust_remote_code=False)
    refuse_kernels(config, arguments.model)
    config.num_labels = len(names)
    config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
    config.problem_type, config.dtype = "single_label_classification", torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        if arguments.from_scratch:
            model = _untrained_classifier(config)
        else:
            try:
                model, info = AutoModelForImageClassification.from_pretrained(
                    arguments.model,
                    config=config,
                    revision=arguments.model_revision,
                    dtype=torch.float32,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            except SafetensorError as error:
                raise damaged_weights(arguments.model, error) from error
            _check_encoder_is_loaded(arguments.model, model, info)
    _choose_trainable(model, freeze_encoder=arguments.freeze_encoder)
    return model


def _untrained_classifier(config: Any) -> PreTrainedModel:
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
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
    check_model_name(arguments.model, arguments.model_revision)
    commit = commit_of(arguments.model, arguments.model_revision)
    if commit is not None:  # all that follows is of one commit; the record keeps what was asked for
        arguments = dataclasses.replace(arguments, model_revision=commit)
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.model_revision, trust_remote_code=False)
    source = {"model_commit": commit, **_license_of(arguments)}
    settings = read_image_settings(arguments.model, config, revision=arguments.model_revision)
    splits = load_labelled_splits(
        arguments,
        len(settings.mean),
        samples_per_class=arguments.samples_per_class,
        label_fraction=arguments.label_fraction,
        seed=arguments.seed,
    )
    model = load_classifier(arguments, splits.names)
    _check_shape(model, settings, arguments.model)
    trainer = _build_trainer(model, splits, settings, arguments)

    if arguments.overwrite_output_dir:
        _delete_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomically(output_dir / ARGUMENTS_FILE, values)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - start
    scored = trainer.predict(cast(Any, trainer.eval_dataset))
    wrong = np.flatnonzero(scored.predictions != scored.label_ids)
    vars(model.config).pop("auto_map", None)  # it names the code of the full model, which is not in this folder
    model.eval().save_pretrained(output_dir)
    write_json_atomically(output_dir / "preprocessor_config.json", image_processor_fields(*settings))
    result = source | finetuning_result(
        trainer.state, splits, values, wrong, seconds=seconds, resumed_from=checkpoint
    )  # fmt: skip
    (output_dir / "figures").mkdir(exist_ok=True)
    draw_finetuning_curves(result, output_dir / "figures" / "curves.png")
    card = render_finetuning_card(result)
    write_text_atomically(output_dir / "README.md", card)
    write_json_atomically(output_dir / RESULT_FILE, result)  # last: it says "finished"
    for folder in output_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return render_finetuning(output_dir)


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
            REPOCARD_NAME,
            " ".join(str(error).split()) or type(error).__name__,
            Path(cast(str, arguments.output_dir)) / REPOCARD_NAME,
        )
        return {"license": None, "license_is_known": False}
    return {"license": license_, "license_is_known": True}


def _find_card(model: str, revision: str | None) -> Path | None:
    """The model's card; `None` where it is known that there is none, an error where it cannot be found out."""
    if Path(model).is_dir():
        path = Path(model) / REPOCARD_NAME
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, REPOCARD_NAME, revision=revision))
    except hub.LocalEntryNotFoundError:  # the Hub could not be asked now, but may have been before
        cached = huggingface_hub.try_to_load_from_cache(model, REPOCARD_NAME, revision=revision)
        if cached is not huggingface_hub._CACHED_NO_EXIST:
            raise
    except hub.EntryNotFoundError:
        pass
    return None


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
        settings,
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
        eval_dataset=LabelledImages(splits.test, splits.test_labels, settings),
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


def differing_arguments(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """What makes a fine-tuning another one than that in a folder.

    Args:
        folder: Holds a fine-tuning, finished or not.
        values: Arguments of `FinetuningArguments`; those that a continuation is free to change do not count.

    Returns:
        Such as "seed is 0 there, 1 here"; nothing where the two are one.

    Raises:
        ValueError: If the file of its arguments is damaged.
    """
    try:
        stored = json.loads((folder / ARGUMENTS_FILE).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ARGUMENTS_FILE} is damaged ({error}); choose another --output_dir.") from error
    return [
        f"{name} is {stored.get(name)!r} there, {value!r} here"
        for name, value in values.items()
        if name not in _FREE_ARGUMENTS and stored.get(name) != value
    ]


def _check_same_run(folder: Path, values: Mapping[str, Any]) -> None:
    differing = differing_arguments(folder, values)
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
