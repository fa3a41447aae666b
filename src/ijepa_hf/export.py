"""The two-part model folder: what a run publishes, and what stock transformers reads.

    folder/              config.json model.safetensors preprocessor_config.json     the target encoder, keys `ijepa.*`
    folder/pretraining/  config.json model.safetensors                              both encoders and the predictor
    folder/              configuration_ijepa.py masking.py modeling_ijepa.py        their code, for use without us

`AutoModel`, the stock heads and pipelines read the root; `IJepaForPretraining.from_pretrained(folder)` finds the rest,
and so does `AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)` where this package is missing.
Each file is written beside its place and moved there, and both weight files carry the optimiser step, so that a half
written export is noticed (`exported_step`) and written again.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining, to_file_name

WEIGHTS_FILE = "model.safetensors"
BILINEAR = 2  # PIL's number, as image processors write it
# What `IJepaForPretraining` is made of. These modules import each other relatively and nothing else of the package.
CODE_FILES = ("configuration_ijepa.py", "masking.py", "modeling_ijepa.py")
# Only for the full model: `AutoModel` and `AutoConfig` have to give the stock classes, with and without remote code.
_AUTO_MAP = {"AutoModelForPreTraining": "modeling_ijepa.IJepaForPretraining"}


def export_model(
    model: IJepaForPretraining, folder: Path, *, step: int, image_mean: Sequence[float], image_std: Sequence[float]
) -> None:
    """Writes the two-part folder and the code of the full model.

    Args:
        model: The model.
        folder: Where to; made if missing. Other files in it are left alone.
        step: Optimiser steps done, kept in both weight files' metadata.
        image_mean: Of each channel, of pixels in [0, 1]; goes into the image processor.
        image_std: Likewise.
    """
    state = {to_file_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("ijepa.")}
    inner = folder / PRETRAINING_SUBFOLDER
    _write_part(inner, "IJepaForPretraining", model.config, state, step)
    _write_part(folder, "IJepaModel", model.config, encoder, step)
    processor = json.dumps(image_processor_fields(model.config.image_shape, image_mean, image_std), indent=2)
    write_atomically(folder / "preprocessor_config.json", lambda path: path.write_text(processor + "\n", "utf-8"))
    write_code_files(folder)


def write_code_files(folder: Path) -> None:
    """Writes the modules that `auto_map` in the folder's config.json names.

    Args:
        folder: A model folder.
    """
    for name in CODE_FILES:
        code = (resources.files("ijepa_hf") / name).read_bytes()
        write_atomically(folder / name, functools.partial(Path.write_bytes, data=code))


def exported_step(folder: Path) -> int | None:
    """The optimiser step of a complete export.

    Args:
        folder: A run's folder.

    Returns:
        The step, or `None` where a weight file is missing or damaged, or the two differ.
    """
    steps = {_step_of(folder / part / WEIGHTS_FILE) for part in ("", PRETRAINING_SUBFOLDER)}
    return steps.pop() if len(steps) == 1 else None


def image_processor_fields(
    shape: tuple[int, int], image_mean: Sequence[float], image_std: Sequence[float]
) -> dict[str, object]:
    """The fields of `preprocessor_config.json`: whole image to the model's size, bilinear, then normalised.

    Args:
        shape: Height and width, in pixels.
        image_mean: Of each channel, of pixels in [0, 1].
        image_std: Likewise.

    Returns:
        What `AutoImageProcessor` reads as a `ViTImageProcessor`.
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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place, flushes it to disk and moves it there, so that a reader never sees half of it.

    Args:
        path: The file.
        write: Called with the path to write to.
    """
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    flush_to_disk(partial)
    os.replace(partial, path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder is on disk.

    Args:
        path: The file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_part(
    folder: Path, architecture: str, config: IJepaConfig, state: dict[str, torch.Tensor], step: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.auto_map = dict(_AUTO_MAP)
    config.dtype = next(value.dtype for name, value in state.items() if not name.endswith("position_embeddings"))
    write_atomically(folder / "config.json", lambda path: config.to_json_file(path))
    metadata = {"format": "pt", "step": str(step)}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(contiguous, path, metadata=metadata))


def _step_of(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, KeyError, ValueError):
        return None
