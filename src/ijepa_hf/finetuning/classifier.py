"""Loads an encoder with a new head as a stock classifier, and groups its parameters by layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.vision_models import ImageSettings, damaged_weights, refuse_kernels

_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def load_classifier(arguments: FinetuningArguments, names: Sequence[str]) -> PreTrainedModel:
    """Loads a model and gives it a new head, whose random weights are a function of the seed.

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


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups a classifier's parameters by learning rate and weight decay.

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
        ValueError: If `layer_decay` is not 1 and its parameters' names do not show the layers of the model.

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


def check_shape(model: PreTrainedModel, settings: ImageSettings, source: str) -> None:
    """Checks with one black image that a classifier takes the images it will be given.

    Args:
        model: The classifier; it is left in eval mode.
        settings: What its images are like.
        source: Its Hub id or folder, for the message.

    Raises:
        ValueError: If it does not take them, or gives another number of logits than it has classes.
    """
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


def _depths(model: PreTrainedModel, layer_decay: float) -> dict[str, int]:
    """Counts how many layers each parameter is below the head: 0 for head and last norm, L + 1 for the embeddings."""
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
