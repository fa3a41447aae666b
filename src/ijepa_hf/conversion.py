"""Published I-JEPA checkpoints (`*.pth.tar`) into this package's model folder, and back.

    convert              FILE.pth.tar -> a model folder and, if asked, the `checkpoint-<step>/` to go on from
    convert_to_official  a model folder, a run's too -> FILE.pth.tar

What is in such a file, and how it is read, is in `official_checkpoint`. What is written is read back and compared,
tensor by tensor, so that the peak of memory stays near the size of the weights.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.files import flush_to_disk, read_json, write_text_atomically
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining, from_file_name, to_file_name
from ijepa_hf.official_checkpoint import (
    ADAMW_SLOTS,
    FROZEN_NAMES,
    NAME_PREFIX,
    PARTS,
    PUBLISHED_HEADS,
    PUBLISHED_LAYER_NORM_EPS,
    PUBLISHED_LICENSE,
    SCALARS,
    TRAINED_PARTS,
    Networks,
    OptimizerState,
    all_finite,
    format_problems,
    model_from_official,
    networks_of,
    official_names,
    optimizer_groups,
    our_names,
    read_contents,
    read_optimizer_state,
    read_scalars,
    unpickle,
)
from ijepa_hf.published_code import check_checkout, compare_with_published_code
from ijepa_hf.runs.cards import render_converted_card
from ijepa_hf.runs.checkpoints import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    collect_state,
    config_fields,
    find_latest,
    save_checkpoint,
)
from ijepa_hf.runs.export import WEIGHTS_FILE, export_model, exported_step
from ijepa_hf.runs.folder import CONVERSION_FILE

# What a gradient scaler starts with. The published code calls its load under bf16, and an error there sends it back to
# epoch 0; the scale changes nothing in bf16.
_FRESH_SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


# -- published -> ours -----------------------------------------------------------------------------------------------


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    num_attention_heads: int | None = None,
    with_optimizer: bool = False,
    published_code: str | Path | None = None,
) -> str:
    """Converts a published checkpoint into a model folder that stock transformers loads.

    The folder is complete or not there: it is written under a hidden name beside its place and renamed when everything
    in it was read back and found equal to the file, bit for bit. `conversion.json` in it says what was compared.

    Args:
        checkpoint: The `.pth.tar` file.
        output_dir: Folder to write; must be missing or empty.
        num_attention_heads: Heads of both networks; needed only where the encoder is no published size.
        with_optimizer: Also write `checkpoint-<step>/` with the optimiser's state, from which
            `ijepa-hf pretrain RECIPE --resume_from_checkpoint` goes on.
        published_code: Folder of a checkout of the published code. Its networks then compute the same images as ours,
            in a process of its own, and the values are compared. The code in that folder is run: name only one that
            you trust.

    Returns:
        A few lines for the user: what was found and how to load it.

    Raises:
        FileNotFoundError: If there is no such file, or the checkout lacks the networks.
        ValueError: If the file is not such a checkpoint; a tensor is missing, unexpected, of the wrong shape or type,
            or not finite; the optimiser's state does not fit; the values differ from the published code's; or the
            folder is not empty. Nothing is written then.
    """
    source, target = Path(checkpoint), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir={str(target)!r} is not an empty folder; choose another.")
    checkout = None if published_code is None else check_checkout(Path(published_code))
    contents = read_contents(source)
    if not with_optimizer:
        contents.pop("opt", None)  # of a file that could not be mapped, this frees the memory
    networks = networks_of(contents, source)
    model = model_from_official(networks, num_attention_heads=num_attention_heads)
    state = read_optimizer_state(contents, networks, model.config, source) if with_optimizer else None
    report = _describe(source, contents, networks, model, state)
    if checkout is not None:
        report["published_code"] = compare_with_published_code(checkout, source, model)
    with _hidden_folder(target) as hidden:
        _write_folder(hidden, model, state, report, target.resolve().name)
    return _converted_message(model.config, source, target, report)


# -- writing our folder ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes the target at the end, or is gone if anything goes wrong."""
    target = target.resolve()
    hidden = target.with_name(f".{target.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        if target.exists():
            target.rmdir()  # it was empty when we started; if it is not now, this fails
        os.replace(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    flush_to_disk(target.parent)


def _write_folder(
    folder: Path, model: IJepaForPretraining, state: OptimizerState | None, report: dict[str, Any], name: str
) -> None:
    """Writes everything and reads it back.

    Args:
        folder: Where to, for now.
        model: The model.
        state: The optimiser's, or `None`.
        report: What `conversion.json` says; gets what was compared.
        name: Of the folder when it is finished, for the card.
    """
    step = 0 if state is None else state.step
    export_model(model, folder, step=step, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    weights = {to_file_name(key): tensor for key, tensor in model.state_dict().items()}
    encoder = {key: tensor for key, tensor in weights.items() if key.startswith("ijepa.")}
    written = {WEIGHTS_FILE: encoder, f"{PRETRAINING_SUBFOLDER}/{WEIGHTS_FILE}": weights}
    if state is not None:
        checkpoint = _write_checkpoint(folder, model, state)
        states = {f"{key}/{slot}": value for key, slots in state.tensors.items() for slot, value in slots.items()}
        written[f"{checkpoint.name}/{MODEL_FILE}"] = model.state_dict()
        written[f"{checkpoint.name}/{OPTIMIZER_FILE}"] = states
    for path, tensors in written.items():
        _check_written(folder / path, tensors)
    report["bit_equal"] = {path: {"tensors": len(tensors)} for path, tensors in written.items()}
    write_text_atomically(folder / CONVERSION_FILE, _report_text(report))
    write_text_atomically(folder / "README.md", render_converted_card(model.config, report, name, PUBLISHED_LICENSE))


def _write_checkpoint(folder: Path, model: IJepaForPretraining, state: OptimizerState) -> Path:
    """The checkpoint that a run goes on from, through the writer of all checkpoints.

    Its arguments say what no published file does and all have in common, so that the run keeps it: the licence, and
    how images are normalised.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)  # only carries names and state: the groups are those of the run to come
    for name, parameter in trained:
        optimizer.state[parameter] = state.tensors[name]
    return save_checkpoint(
        folder,
        state.step,
        collect_state(model, optimizer),
        config=config_fields(model.config),
        arguments={
            **state.arguments,
            "license": PUBLISHED_LICENSE,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        },
        total_limit=1,
    )


def _check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a file back; it is opened anew for each tensor, so that its pages do not add up in memory."""
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
    differing = sorted(found ^ tensors.keys())
    for name in found & tensors.keys():
        with safe_open(path, framework="pt") as file:
            if not _same_bits(file.get_tensor(name), tensors[name]):
                differing.append(name)
    if differing:
        raise OSError(
            f"{path.name} is not what was written to it, in {format_problems(differing)}; is the disk sound?"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype != torch.float32:
        return False
    return torch.equal(one.detach().reshape(-1).view(torch.int32), other.detach().reshape(-1).view(torch.int32))


# -- what is said about it -------------------------------------------------------------------------------------------


def _describe(
    path: Path,
    contents: Mapping[str, Any],
    networks: Networks,
    model: IJepaForPretraining,
    state: OptimizerState | None,
) -> dict[str, Any]:
    """The report, but for what is only known when everything was written."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    pairs = []
    for part in PARTS:
        for name, tensor in networks[part].items():
            pairs.append(
                {
                    "published": f"{part}.{NAME_PREFIX}{name}",
                    "shape": list(tensor.shape),
                    "ours": {key: shapes[key] for key in our_names(part, name)},
                }
            )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    report: dict[str, Any] = {
        "source": {"name": path.name, "size": path.stat().st_size, "sha256": digest},
        "entries": read_scalars(contents),
        "optimizer_step": None,
        "steps_per_epoch": None,
        "published": {
            "tensors": len(pairs),
            "parameters": sum(tensor.numel() for part in PARTS for tensor in networks[part].values()),
        },
        "ours": {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes.values()))},
        "published_code": None,
        "tensors": pairs,
    }
    if state is not None:
        report["optimizer_step"] = state.step
        report["steps_per_epoch"] = state.steps_per_epoch
    return report


def _report_text(report: Mapping[str, Any]) -> str:
    """JSON with one tensor a line."""
    head = json.dumps({name: value for name, value in report.items() if name != "tensors"}, indent=2)
    lines = ",\n".join(f"    {json.dumps(pair)}" for pair in report["tensors"])
    return f'{head.removesuffix("}").rstrip()},\n  "tensors": [\n{lines}\n  ]\n}}\n'


def _converted_message(config: IJepaConfig, source: Path, target: Path, report: Mapping[str, Any]) -> str:
    lines = [
        f"{source.name}: width {config.hidden_size}, depth {config.num_hidden_layers}, "
        f"{config.num_attention_heads} heads, {config.image_size} px, patch {config.patch_size}; predictor "
        f"{config.predictor_num_hidden_layers} x {config.predictor_hidden_size}",
        f"encoder for everyone:  AutoModel.from_pretrained({str(target)!r})",
        f"both encoders and the predictor:  IJepaForPretraining.from_pretrained({str(target)!r})",
    ]
    step = report["optimizer_step"]
    if step is not None:
        lines.append(f"training goes on with:  --resume_from_checkpoint {target / f'checkpoint-{step}'}")
        if report["entries"]["epoch"] == 0:
            lines.append(f"note: no epoch is done in the file; step {step} lies in the first")
        elif report["steps_per_epoch"] is None:
            lines.append(
                f"note: step {step} is no multiple of the {report['entries']['epoch']} epochs in the file; published "
                "training skips steps whose scaled gradient overflows, and does not count them"
            )
    if report["published_code"] is not None:
        largest = max(value["largest_difference"] for value in report["published_code"]["outputs"].values())
        lines.append(f"published code computes the same: largest difference {largest:.2g}")
    return "\n".join([*lines, "licence: weights of published checkpoints stay CC BY-NC 4.0"])


# -- ours -> published -----------------------------------------------------------------------------------------------


def convert_to_official(folder: str | Path, target: str | Path, *, with_optimizer: bool = False) -> str:
    """Converts a model folder into a file that the published code loads.

    Args:
        folder: As `convert` or a run wrote it.
        target: The `.pth.tar` file to write; must not exist.
        with_optimizer: Take weights and optimiser state from the folder's newest checkpoint, so that published
            training goes on; else the exported weights are taken and `opt` is `None`.

    Returns:
        A few lines for the user.

    Raises:
        FileNotFoundError: If the folder holds no model, or no checkpoint where one is needed.
        ValueError: If the target exists, or the model cannot be said in the published format. Nothing is written then.
    """
    folder, target = Path(folder), Path(target)
    if target.exists():
        raise ValueError(f"target={str(target)!r} exists already; choose another name.")
    checkpoint = _newest_checkpoint(folder) if with_optimizer else None
    config = _read_config(folder) if checkpoint is None else IJepaConfig(**checkpoint.config)
    _check_is_published_architecture(config)
    weights = folder / PRETRAINING_SUBFOLDER / WEIGHTS_FILE if checkpoint is None else checkpoint.path / MODEL_FILE
    networks = _networks_from_ours(weights, config)
    entries = _entries_of(folder, checkpoint)
    contents: dict[str, Any] = {
        part: {NAME_PREFIX + name: tensor for name, tensor in networks[part].items()} for part in PARTS
    }
    contents |= {"opt": None, "scaler": None, **entries}
    if checkpoint is not None:
        contents["opt"] = _official_optimizer(checkpoint, networks)
        contents["scaler"] = _FRESH_SCALER
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.partial")
    try:
        torch.save(contents, hidden)
        del contents, networks  # unmapped before the file is read back
        _check_official_file(hidden, weights, config, checkpoint)
        flush_to_disk(hidden)
        os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)
    flush_to_disk(target.parent)
    return _official_message(folder, target, config, checkpoint, entries)


# -- reading our folder ----------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> IJepaConfig:
    inner = folder / PRETRAINING_SUBFOLDER
    if not (inner / "config.json").is_file() or not (inner / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no model with both encoders and the predictor (no {PRETRAINING_SUBFOLDER}/ "
            "with config.json and weights); name one that `ijepa-hf convert` or `ijepa-hf pretrain` wrote."
        )
    return IJepaConfig.from_pretrained(inner)


def _newest_checkpoint(folder: Path) -> Checkpoint:
    checkpoint = find_latest(folder)
    if checkpoint is None:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no usable checkpoint, which with_optimizer takes weights and state from."
        )
    return checkpoint


def _check_is_published_architecture(config: IJepaConfig) -> None:
    """What the published code has no way to say would be lost, or computed otherwise there."""
    predictor_heads = config.predictor_num_attention_heads or config.num_attention_heads
    rules = {
        f"image_size={config.image_size} and patch_size={config.patch_size} are not square": (
            config.grid_size[0] == config.grid_size[1] and config.patch_shape[0] == config.patch_shape[1]
        ),
        f"num_channels={config.num_channels} is not 3": config.num_channels == 3,
        f"predictor_num_attention_heads={predictor_heads} are not the encoder's {config.num_attention_heads}": (
            predictor_heads == config.num_attention_heads
        ),
        f"layer_norm_eps={config.layer_norm_eps:g} is not {PUBLISHED_LAYER_NORM_EPS:g}": (
            config.layer_norm_eps == PUBLISHED_LAYER_NORM_EPS
        ),
        f"hidden_act={config.hidden_act!r} is not 'gelu'": config.hidden_act == "gelu",
        f"target_type={config.target_type!r} is not 'representation'": config.target_type == "representation",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"the published code has no such model: {'; '.join(broken)}.")


def _networks_from_ours(path: Path, config: IJepaConfig) -> dict[str, dict[str, Tensor]]:
    """The three networks under their published names, in the published order; mapped, but for what is joined."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in IJepaForPretraining(config).state_dict().items()}
    tensors = _read_tensors(path)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name!r} is unexpected" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tensor.shape != expected[name] or tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected float32 {list(expected[name])}")
        elif not all_finite(tensor):
            problems.append(f"{name} has NaN or infinite values")
    if problems:
        raise ValueError(
            f"{path} does not fit its configuration; nothing was written:\n  " + format_problems(problems)
        )
    return {
        part: {name: _join(tensors, part, name) for name in names} for part, names in official_names(config).items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {from_file_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _join(tensors: Mapping[str, Tensor], part: str, name: str, slot: str = "") -> Tensor:
    """The published tensor of a name: ours, or three of ours one below the other."""
    pieces = [tensors[f"{key}{slot}"] for key in our_names(part, name)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _entries_of(folder: Path, checkpoint: Checkpoint | None) -> dict[str, int | float | None]:
    """The numbers beside the networks: those of the file that a folder came from, or of the run; else `None`."""
    report = read_json(folder / CONVERSION_FILE)
    if report is not None:
        return {name: report.get("entries", {}).get(name) for name in SCALARS}
    run = read_json(folder / "run.json") or {}
    arguments = run.get("arguments", {}) if checkpoint is None else checkpoint.arguments
    step = exported_step(folder) if checkpoint is None else checkpoint.step
    entries: dict[str, int | float | None] = dict.fromkeys(SCALARS)
    batch, steps_per_epoch = arguments.get("global_batch_size"), _epoch_length(arguments)
    if steps_per_epoch is not None and step is not None:
        entries["epoch"] = step // steps_per_epoch
    if batch:
        rank_batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        entries |= {"batch_size": rank_batch, "world_size": batch // rank_batch}
        entries["lr"] = _learning_rate(arguments)
    return entries


def _epoch_length(arguments: Mapping[str, Any]) -> int | None:
    """Optimiser steps of an epoch of a run; `None` where its arguments do not say."""
    batch, images = arguments.get("global_batch_size"), arguments.get("num_train_images")
    return images // batch if batch and images else None


def _learning_rate(arguments: Mapping[str, Any]) -> float | None:
    """The highest of a run, which 0 can be; `None` where its arguments do not say."""
    rate, base, batch = (arguments.get(name) for name in ("learning_rate", "base_learning_rate", "global_batch_size"))
    if rate is not None:
        return float(rate)
    return None if base is None or batch is None else base * batch / 256


# -- the optimiser, ours -> published --------------------------------------------------------------------------------


def _official_optimizer(checkpoint: Checkpoint, networks: Networks) -> dict[str, Any]:
    """What the published optimiser's `state_dict()` would be."""
    tensors = _read_tensors(checkpoint.path / OPTIMIZER_FILE)
    arguments = checkpoint.arguments
    blank = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]  # every field that torch knows
    rate = _learning_rate(arguments)
    blank["lr"] = blank["lr"] if rate is None else rate
    blank["betas"] = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    blank["eps"] = arguments.get("adam_epsilon", 1e-8)
    blank["weight_decay"] = arguments.get("weight_decay", blank["weight_decay"])
    groups, state, number = [], {}, 0
    for place, members in enumerate(optimizer_groups(networks)):
        undecayed = {"WD_exclude": True, "weight_decay": 0} if place >= len(TRAINED_PARTS) else {}
        groups.append({**blank, **undecayed, "params": list(range(number, number + len(members)))})
        for part, name in members:
            if name not in FROZEN_NAMES:
                state[number] = _joined_state(tensors, part, name, checkpoint)
            number += 1
    return {"state": state, "param_groups": groups}


def _joined_state(tensors: Mapping[str, Tensor], part: str, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    keys = our_names(part, name)
    lacking = [f"{key}/{slot}" for key in keys for slot in ADAMW_SLOTS if f"{key}/{slot}" not in tensors]
    if lacking:
        raise ValueError(f"{checkpoint.path / OPTIMIZER_FILE} lacks {', '.join(lacking)}; nothing was written.")
    steps = {float(tensors[f"{key}/step"]) for key in keys}
    if steps != {float(checkpoint.step)}:
        raise ValueError(f"{keys[0]} is at step {steps} of the optimiser, the checkpoint at {checkpoint.step}.")
    joined = {slot: _join(tensors, part, name, f"/{slot}") for slot in ("exp_avg", "exp_avg_sq")}
    return {"step": tensors[f"{keys[0]}/step"].clone(), **joined}


def _check_official_file(path: Path, weights: Path, config: IJepaConfig, checkpoint: Checkpoint | None) -> None:
    """Reads the file back and compares each tensor with ours; mapped anew for each network, to keep memory small."""
    differing = []
    for part, names in official_names(config).items():
        found, tensors = unpickle(path)[part], _read_tensors(weights)
        differing += [f"{part}.{name} is missing" for name in names if NAME_PREFIX + name not in found]
        differing += [
            f"{part}.{name}"
            for name, tensor in found.items()
            if not _same_bits(tensor, _join(tensors, part, name.removeprefix(NAME_PREFIX)))
        ]
    if checkpoint is not None:
        contents, tensors = unpickle(path), _read_tensors(checkpoint.path / OPTIMIZER_FILE)
        members = [member for group in optimizer_groups(networks_of(contents, path)) for member in group]
        for number, entry in contents["opt"]["state"].items():
            part, name = members[number]
            differing += [
                f"opt.state[{number}].{slot}"
                for slot in ("exp_avg", "exp_avg_sq")
                if not _same_bits(entry[slot], _join(tensors, part, name, f"/{slot}"))
            ]
    if differing:
        raise OSError(
            f"{path.name} is not what was written to it, in {format_problems(differing)}; is the disk sound?"
        )


def _official_message(
    folder: Path, target: Path, config: IJepaConfig, checkpoint: Checkpoint | None, entries: Mapping[str, Any]
) -> str:
    lines = [f"{target}: encoder, predictor and target encoder of {folder}, every bit compared"]
    if checkpoint is None:
        lines.append("without optimiser state: published code loads the weights, and starts at epoch 0")
    else:
        lines.append(f"optimiser state of step {checkpoint.step}, epoch {entries['epoch']}")
        steps_per_epoch = _epoch_length(checkpoint.arguments)
        if steps_per_epoch is not None and checkpoint.step % steps_per_epoch:
            lines.append(
                f"note: the epoch is rounded down: {checkpoint.step % steps_per_epoch} of the {steps_per_epoch} steps "
                "of the one that it is in are done, and published code starts that one again"
            )
    if PUBLISHED_HEADS.get(config.hidden_size) != config.num_attention_heads:
        lines.append(
            f"the file does not say that there are {config.num_attention_heads} heads: whoever loads it must know"
        )
    return "\n".join(lines)
