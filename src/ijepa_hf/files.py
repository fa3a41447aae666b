"""Writes files whole or not at all, reads and writes JSON, and reports full disks (`SaveError`)."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# A header entry of safetensors is some 150 bytes; configurations, manifests and folders take a few blocks.
_BYTES_PER_TENSOR, _BYTES_BESIDE_TENSORS = 256, 2**16
FIGURE_BYTES = 2**20  # an upper bound for a few pictures and records


class SaveError(OSError):
    """The disk is full, read-only or gone, and something was not written. What was written before is whole.

    Args:
        message: Folder, reason, bytes needed and free, and what to do.
        number: The operating system's error number, as in `errno`; `None` if it gave none.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


@contextlib.contextmanager
def saving(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns every error that keeps the block from writing into one `SaveError`; checks the free space first.

    Args:
        path: The folder or file that the block writes.
        num_bytes: Its size, in bytes.

    Yields:
        Nothing.

    Raises:
        SaveError: If less space is free, or the operating system refuses an operation in the block.
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
        if reason is None:  # not an error of the disk
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
    """Returns the number of bytes that can still be written at a path.

    Args:
        path: A file or folder; need not exist.

    Returns:
        The bytes; `None` if the file system does not report them.
    """
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None)
    if existing is None:
        return None
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None  # some network file systems report 0 of 0


def file_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the size of a file of tensors, with its header and the small files beside it.

    Args:
        tensors: All tensors in the file; unsharded.

    Returns:
        The bytes, rounded up generously.
    """
    sizes = [tensor.numel() * tensor.element_size() + _BYTES_PER_TENSOR for tensor in tensors]
    return sum(sizes) + _BYTES_BESIDE_TENSORS


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
        with contextlib.suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise
    flush_to_disk(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, as `write_atomically` does.

    Args:
        path: The file.
        text: All of it.
    """
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8"))


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes a JSON file, indented by 2 and with a line's end, as `write_atomically` does.

    Args:
        path: The file.
        value: What `json.dumps` takes.
    """
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.

    Returns:
        The object; `None` if there is no such file.

    Raises:
        ValueError: If the file is not JSON, or its value is not an object.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or run the command that wrote it again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no JSON object; delete it, or run the command that wrote it again.")
    return record


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of its folder.

    Args:
        tensors: By name; on the CPU, contiguous.
        path: The file, in a hidden folder: a process killed in safetensors leaves a temporary file beside it.
        metadata: Of the file.
    """
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the user alone read its files


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


def remove_entry(path: Path) -> None:
    """Removes a file, a link or a folder with its content; does nothing where it is missing.

    Args:
        path: The file, link or folder.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _number_and_reason(error: OSError | SafetensorError) -> tuple[int | None, str | None]:
    """Returns the operating system's error; safetensors has it in its message only. `None` for other errors."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"os error (\d+)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, None)
