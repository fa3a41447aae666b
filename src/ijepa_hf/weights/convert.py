"""Converts a published I-JEPA checkpoint (`*.pth.tar`) into a model folder.

If asked, it also writes the optimiser's state, as a `checkpoint-<step>/` to resume from. `official_checkpoint.py`
reads the file. Written files are read back and compared tensor by tensor, so that the peak of memory stays near the
size of the weights.
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
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import safe_open
from torch import Tensor

from ijepa_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ijepa_hf.files import flush_to_disk, write_text_atomically
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import to_file_name
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining
from ijepa_hf.runs.cards import render_converted_card
from ijepa_hf.runs.checkpoints import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    collect_state,
    config_fields,
    save_checkpoint,
)
from ijepa_hf.runs.export import WEIGHTS_FILE, export_model
from ijepa_hf.runs.folder import CONVERSION_FILE
from ijepa_hf.weights.official_checkpoint import (
    format_problems,
    model_from_official,
    networks_of,
    read_contents,
    read_scalars,
)
from ijepa_hf.weights.official_names import (
    NAME_PREFIX,
    PARTS,
    PUBLISHED_LICENSE,
    Networks,
    our_names,
)
from ijepa_hf.weights.official_optimizer import OptimizerState, read_optimizer_state


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    num_attention_heads: int | None = None,
    with_optimizer: bool = False,
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

    Returns:
        A few lines for the user: what was found and how to load it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such a checkpoint; a tensor is missing, unexpected, of the wrong shape or type,
            or not finite; the optimiser's state does not fit; or the folder is not empty. Nothing is written then.
    """
    source, target = Path(checkpoint), Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir={str(target)!r} is not an empty folder; choose another.")
    contents = read_contents(source)
    if not with_optimizer:
        contents.pop("opt", None)  # of a file that could not be mapped, this frees the memory
    networks = networks_of(contents, source)
    model = model_from_official(networks, num_attention_heads=num_attention_heads)
    state = read_optimizer_state(contents, networks, model.config, source) if with_optimizer else None
    report = _describe(source, contents, networks, model, state)
    with _hidden_folder(target) as hidden:
        _write_folder(hidden, model, state, report, target.resolve().name)
    return _converted_message(model.config, source, target, report)


# -- writing our folder ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """Makes a hidden folder beside the target; renames it to the target at the end, or deletes it after an error."""
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
    write_text_atomically(folder / REPOCARD_NAME, render_converted_card(model.config, report, name, PUBLISHED_LICENSE))


def _write_checkpoint(folder: Path, model: IJepaForPretraining, state: OptimizerState) -> Path:
    """Writes the checkpoint that a run goes on from, with the writer of all checkpoints.

    Its arguments hold two things that no published file has and that are the same for all of them, so that the resumed
    run keeps them: the licence, and the normalisation of images.
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
            if not same_bits(file.get_tensor(name), tensors[name]):
                differing.append(name)
    if differing:
        raise OSError(
            f"{path.name} is not what was written to it, in {format_problems(differing)}; is the disk sound?"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are float32 of one shape and equal bit for bit, with NaN and the sign of 0."""
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype != torch.float32:
        return False
    return torch.equal(one.detach().reshape(-1).view(torch.int32), other.detach().reshape(-1).view(torch.int32))


# -- report and message ----------------------------------------------------------------------------------------------


def _describe(
    path: Path,
    contents: Mapping[str, Any],
    networks: Networks,
    model: IJepaForPretraining,
    state: OptimizerState | None,
) -> dict[str, Any]:
    """Makes the report, without the results of the comparison."""
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
        "tensors": pairs,
    }
    if state is not None:
        report["optimizer_step"] = state.step
        report["steps_per_epoch"] = state.steps_per_epoch
    return report


def _report_text(report: Mapping[str, Any]) -> str:
    """Writes JSON with one tensor a line."""
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
    return "\n".join([*lines, "licence: weights of published checkpoints stay CC BY-NC 4.0"])
