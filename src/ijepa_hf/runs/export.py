"""Writes the two-part model folder, which a run publishes and stock transformers reads.

    folder/              config.json model.safetensors preprocessor_config.json     the target encoder, keys `ijepa.*`
    folder/pretraining/  config.json model.safetensors                              both encoders and the predictor
    folder/              *.py                           the code of the full model, for use without us

`AutoModel`, the stock heads and pipelines read the root; `IJepaForPretraining.from_pretrained(folder)` finds the rest,
and so does `AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)` where this package is missing.
Each file is written under another name and then renamed. Both weight files carry the optimiser step, so that an
incomplete export is noticed (`exported_step`) and written again.
"""

import copy
import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ijepa_hf.files import (
    file_bytes,
    flush_to_disk,
    remove_entry,
    save_tensors,
    saving,
    write_atomically,
    write_json_atomically,
)
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import to_file_name
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining

WEIGHTS_FILE = "model.safetensors"
BILINEAR = 2  # PIL's number, which image processors use
# What `IJepaForPretraining` is made of. These modules import each other relatively and nothing else of the package.
CODE_FILES = ("block_sizes.py", "configuration_ijepa.py", "encoder_ijepa.py", "masking.py", "modeling_ijepa.py")
# Only for the full model: `AutoModel` and `AutoConfig` have to give the stock classes, with and without remote code.
_AUTO_MAP = {"AutoModelForPreTraining": "modeling_ijepa.IJepaForPretraining"}


def export_model(
    model: IJepaForPretraining,
    folder: Path,
    *,
    step: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    state: Mapping[str, torch.Tensor] | None = None,
    must_exist: bool = False,
) -> None:
    """Writes the two-part folder and the code of the full model.

    Args:
        model: The model.
        folder: The folder; created if missing. Other files in it are left alone.
        step: Optimiser steps done; kept in the metadata of both weight files.
        image_mean: Mean of each channel, of pixels in [0, 1]; for the image processor.
        image_std: Standard deviation of each channel, of pixels in [0, 1]; for the image processor.
        state: Unsharded tensors by the model's own names, as `collect_state` gathers them; `None` takes those of the
            model.
        must_exist: Treat a missing folder as an error. That of a run is missing only when its disk has gone, and must
            not be created elsewhere.

    Raises:
        SaveError: If something cannot be written; each file is then the old one or the new one.
    """
    named = model.state_dict() if state is None else state
    state = {to_file_name(name): _plain(tensor) for name, tensor in named.items()}
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("ijepa.")}
    processor = image_processor_fields(model.config.image_shape, image_mean, image_std)
    inner = folder / PRETRAINING_SUBFOLDER
    with saving(folder, file_bytes(state.values()) + file_bytes(encoder.values())):
        if not must_exist:
            folder.mkdir(parents=True, exist_ok=True)
        inner.mkdir(exist_ok=True)
        _write_part(inner, "IJepaForPretraining", model.config, state, step)
        _write_part(folder, "IJepaModel", model.config, encoder, step)
        write_json_atomically(folder / "preprocessor_config.json", processor)
        write_code_files(folder)


def write_code_files(folder: Path) -> None:
    """Writes the modules that `auto_map` in the folder's config.json names.

    Args:
        folder: A model folder.
    """
    for name in CODE_FILES:
        code = (resources.files("ijepa_hf.model") / name).read_bytes()
        if (
            not (folder / name).is_file() or (folder / name).read_bytes() != code
        ):  # most saves find the same code there
            write_atomically(folder / name, functools.partial(Path.write_bytes, data=code))


def exported_step(folder: Path) -> int | None:
    """Returns the optimiser step of a complete export.

    Args:
        folder: A run's folder.

    Returns:
        The step, or `None` if a weight file is missing or damaged, or the two differ.
    """
    steps = {_step_of(folder / part / WEIGHTS_FILE) for part in ("", PRETRAINING_SUBFOLDER)}
    return steps.pop() if len(steps) == 1 else None


def image_processor_fields(
    shape: tuple[int, int], image_mean: Sequence[float], image_std: Sequence[float]
) -> dict[str, object]:
    """Returns the fields of `preprocessor_config.json`: bilinear resize to the model's size, then normalisation.

    Args:
        shape: Height and width, in pixels.
        image_mean: Mean of each channel, of pixels in [0, 1].
        image_std: Standard deviation of each channel, of pixels in [0, 1].

    Returns:
        Fields that `AutoImageProcessor` reads as a `ViTImageProcessor`.
    """
    height, width = shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
    }


def _write_part(
    folder: Path, architecture: str, config: IJepaConfig, state: dict[str, torch.Tensor], step: int
) -> None:
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.auto_map = dict(_AUTO_MAP)
    config.dtype = next(value.dtype for name, value in state.items() if not name.endswith("position_embeddings"))
    write_atomically(folder / "config.json", lambda path: config.to_json_file(path))
    _write_weights(folder / WEIGHTS_FILE, state, {"format": "pt", "step": str(step)})


def _write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes atomically, by way of a hidden folder, because safetensors leaves temporary files beside its own."""
    hidden = path.with_name(f".{path.name}.partial")
    remove_entry(hidden)  # of a process that was killed
    hidden.mkdir()
    try:
        save_tensors(tensors, hidden / path.name, metadata)
        flush_to_disk(hidden / path.name)
        os.replace(hidden / path.name, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    flush_to_disk(path.parent)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _step_of(path: Path) -> int | None:
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):  # OSError: also a disk that does not answer
        return None
