"""Fine-tunes for classification: trains a pretrained encoder and a new linear head together on labelled images.

It uses transformers' own `Trainer` and `AutoModelForImageClassification`, so the result is a stock model that loads
without this package. It adds four things that the stock classes lack and a vision transformer needs: layer-wise
learning rates, few-label draws, a fixed position table, and a resume that restores every weight.

Nothing is tuned on the held-out split: there is no early stopping and no best epoch, and the result is the last
epoch's accuracy. Every draw is a function of (seed, epoch, image), as in `data`.

    output_dir/
      finetune_arguments.json                                                 written first: whose folder it is
      checkpoint-<step>/                                                      deleted at the end
      config.json  model.safetensors  preprocessor_config.json  README.md     the classifier and its card
      figures/curves.png  finetune.json                                       the results, written last
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import errors as hub
from huggingface_hub.constants import REPOCARD_NAME
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments

from ijepa_hf.data.labelled import EpochOrder, LabelledImages, LabelledSplits, load_labelled_splits
from ijepa_hf.files import write_json_atomically, write_text_atomically
from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.classifier import check_shape, load_classifier, parameter_groups
from ijepa_hf.finetuning.folder import ARGUMENTS_FILE, check_output_dir, delete_run, find_checkpoint
from ijepa_hf.finetuning.report import draw_finetuning_curves, finetuning_result, render_finetuning
from ijepa_hf.model.vision_models import ImageSettings, check_model_name, commit_of, read_image_settings
from ijepa_hf.runs.cards import read_license, render_classifier_card
from ijepa_hf.runs.export import image_processor_fields
from ijepa_hf.runs.folder import FINETUNING_FILE

logger = logging.getLogger(__name__)

_LOGGED_SHARE = 0.02  # of the run between two logged losses
_MAX_GRAD_NORM = 1.0
_CHECKPOINTS = 2


class FinetuningTrainer(Trainer):
    """Extends `Trainer` by layer-wise learning rates, an order that depends on the epoch, and a complete resume.

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
        """Takes a step as the stock class does; raises an error if the loss is NaN or infinite.

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
    """Computes the loss: cross-entropy, averaged over all images of an optimiser step and its micro-batches.

    `Trainer` gets this loss because its own label smoothing is not divided by the number of micro-batches in every
    version.

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
        The text to print, see `render_finetuning`. For a finished run it is returned again without training.

    Raises:
        FileNotFoundError: If the data set or a local model does not exist.
        OSError: If the model cannot be loaded.
        ValueError: If a value is bad, the data cannot be used, the model's card is damaged, or `output_dir` holds
            something else.
    """
    arguments.check()
    output_dir = Path(cast(str, arguments.output_dir))
    values = dataclasses.asdict(arguments)
    check_output_dir(output_dir, arguments)
    if (output_dir / FINETUNING_FILE).is_file() and not arguments.overwrite_output_dir:
        logger.warning("%s holds this fine-tuning, finished; its result follows.", output_dir)
        return render_finetuning(output_dir)
    checkpoint = find_checkpoint(output_dir, arguments)
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
        arguments.labelled,
        len(settings.mean),
        samples_per_class=arguments.samples_per_class,
        label_fraction=arguments.label_fraction,
        seed=arguments.seed,
    )
    model = load_classifier(arguments, splits.names)
    check_shape(model, settings, arguments.model)
    trainer = _build_trainer(model, splits, settings, arguments)

    if arguments.overwrite_output_dir:
        delete_run(output_dir)
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
    card = render_classifier_card(result)
    write_text_atomically(output_dir / REPOCARD_NAME, card)
    write_json_atomically(output_dir / FINETUNING_FILE, result)  # last: it says "finished"
    for folder in output_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return render_finetuning(output_dir)


def _license_of(arguments: FinetuningArguments) -> dict[str, Any]:
    """Returns the licence of the weights, and whether it is known; called before the training, which it could lose."""
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
    """Finds the model's card; returns `None` if there is certainly none, raises an error if that is not certain."""
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
