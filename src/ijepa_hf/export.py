"""The two-part model folder: what a run publishes, and what stock transformers reads.

    folder/              config.json model.safetensors preprocessor_config.json     the target encoder, keys `ijepa.*`
    folder/pretraining/  config.json model.safetensors                              both encoders and the predictor
    folder/              configuration_ijepa.py masking.py modeling_ijepa.py        their code, for use without us

`AutoModel`, the stock heads and pipelines read the root; `IJepaForPretraining.from_pretrained(folder)` finds the rest,
and so does `AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)` where this package is missing.
Each file is written beside its place and moved there, and both weight files carry the optimiser step, so that a half
written export is noticed (`exported_step`) and written again. What keeps state from being written is a `SaveError`,
here and in `checkpointing.py`.
"""

import contextlib
import copy
import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


# A header entry of safetensors is some 150 bytes; configurations, manifests and folders take a few blocks.
_BYTES_PER_TENSOR, _BYTES_BESIDE_TENSORS = 256, 2**16
FIGURE_BYTES = 2**20  # that a few pictures and records take at most


class SaveError(OSError):
    """State could not be written: the disk is full, read-only or gone. What was written before is whole.

    Args:
        message: Folder, reason, bytes needed and free, and what to do.
        number: The operating system's, as `errno` names it; `None` where it gave none.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


@contextlib.contextmanager
def saving(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns whatever keeps the block from writing into one `SaveError`; too little space is found before it begins.

    Args:
        path: The folder or file that is written.
        num_bytes: What it takes.

    Yields:
        Nothing.

    Raises:
        SaveError: If there is less space, or the operating system refuses something in the block.
    """
    try:
        free = free_bytes(path)
        if free is not None and free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except SaveError:
        raise
    except (OSError, SafetensorError) as error:
        number, reason = _number_and_reason(error)
        if reason is None:  # no fault of the disk's
            raise
        free = free_bytes(path)
        raise SaveError(
            f"{path} could not be written: {reason} ({num_bytes:,} bytes are needed, "
            f"{'an unknown number' if free is None else f'{free:,}'} free). What was written before is whole. Free "
            "space, or mount the disk again or make it writable, and resume the run; with --on_save_error continue a "
            "run goes on, and tries again at its next save.",
            number,
        ) from error


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written where a path is or would be.

    Args:
        path: A file or folder; need not exist.

    Returns:
        The bytes; `None` where the file system does not say.
    """
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None)
    if existing is None:
        return None
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None  # some network file systems say 0 of 0


def file_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of a file of tensors, with its header and what small files go beside it.

    Args:
        tensors: All that are written, whole ones if sharded.

    Returns:
        The bytes, a little too many.
    """
    sizes = [tensor.numel() * tensor.element_size() + _BYTES_PER_TENSOR for tensor in tensors]
    return sum(sizes) + _BYTES_BESIDE_TENSORS


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
        folder: Where to; made if missing. Other files in it are left alone.
        step: Optimiser steps done, kept in both weight files' metadata.
        image_mean: Of each channel, of pixels in [0, 1]; goes into the image processor.
        image_std: Likewise.
        state: Whole tensors by the model's own names, as `collect_state` gathers a sharded model's; `None` takes the
            model's.
        must_exist: A missing folder is an error, as for a run: it has gone with its disk, and a new one would be
            elsewhere.

    Raises:
        SaveError: If something cannot be written; each file is the old or the new one then.
    """
    named = model.state_dict() if state is None else state
    state = {to_file_name(name): _plain(tensor) for name, tensor in named.items()}
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("ijepa.")}
    processor = json.dumps(image_processor_fields(model.config.image_shape, image_mean, image_std), indent=2)
    inner = folder / PRETRAINING_SUBFOLDER
    with saving(folder, file_bytes(state.values()) + file_bytes(encoder.values())):
        if not must_exist:
            folder.mkdir(parents=True, exist_ok=True)
        inner.mkdir(exist_ok=True)
        _write_part(inner, "IJepaForPretraining", model.config, state, step)
        _write_part(folder, "IJepaModel", model.config, encoder, step)
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
    try:
        write(partial)
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is said
            partial.unlink()
        raise
    flush_to_disk(path.parent)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that those may read who may enter its folder.

    Args:
        tensors: On the CPU, contiguous.
        path: The file, in a hidden folder: safetensors leaves a file of its own beside it when it is killed.
        metadata: Of the file.
    """
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors' files are its user's alone


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
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.auto_map = dict(_AUTO_MAP)
    config.dtype = next(value.dtype for name, value in state.items() if not name.endswith("position_embeddings"))
    write_atomically(folder / "config.json", lambda path: config.to_json_file(path))
    _write_weights(folder / WEIGHTS_FILE, state, {"format": "pt", "step": str(step)})


def _write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """As `write_atomically`, in a hidden folder, so that nothing that safetensors leaves there lies in the open."""
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


def remove_entry(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it; one that is missing is no error.

    Args:
        path: What to remove.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _number_and_reason(error: OSError | SafetensorError) -> tuple[int | None, str | None]:
    """What the operating system said; safetensors has it in its message only, or it is another kind of error."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"os error (\d+)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, None)


def _step_of(path: Path) -> int | None:
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):  # also a disk that does not answer
        return None
