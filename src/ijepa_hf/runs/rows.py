"""The files that grow with a run: a line of JSON for each entry, with the optimiser step that wrote it."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa_hf.files import saving

logger = logging.getLogger(__name__)

DAMAGED_SUFFIX = ".damaged"  # of the file that keeps the lines of a growing one that cannot be read


def read_rows(path: Path, *, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a file that grows with the run; a last line cut short by a crash is left out.

    Args:
        path: `metrics.jsonl` or one of its kind.
        up_to_step: Leave out lines of later optimiser steps.

    Returns:
        A dictionary for each line; none where the file is missing.

    Raises:
        ValueError: If a line is damaged; names the file and the line.
    """
    rows, problems = sort_rows(path)
    for number, (_, reason) in problems.items():
        raise ValueError(f"{path}, line {number} is damaged ({reason}); remove that line.")
    return rows if up_to_step is None else [row for row in rows if row["step"] <= up_to_step]


def sort_rows(path: Path) -> tuple[list[dict[str, Any]], dict[int, tuple[bytes, str]]]:
    """Tell the lines of a file apart that can be read and that cannot.

    Args:
        path: `metrics.jsonl` or one of its kind; a missing one has no lines.

    Returns:
        The entries; and the bytes and the reason of each line that cannot be read, by its number, from 1.
    """
    rows: list[dict[str, Any]] = []
    problems: dict[int, tuple[bytes, str]] = {}
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no entry with a step")
            rows.append(row)
        except ValueError as error:
            problems[number] = line, str(error)
    return rows, problems


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to a file that grows with the run: all of them or, where that fails, none.

    A last line that a crash has cut short is removed first, as `read_rows` leaves it out.

    Args:
        path: The file; made if it is missing.
        rows: Each with its `step`.

    Raises:
        SaveError: If they cannot be written; the file is as it was.
    """
    _append(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))


class RowFile:
    """A file that grows with the run, and the lines that a full disk has not taken yet: they go with the next ones.

    Args:
        path: The file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[Mapping[str, Any]] = []

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Adds lines, after those that are left from before.

        Args:
            *rows: Each with its `step`; none writes what is left.

        Raises:
            SaveError: If they cannot be written; they are kept.
        """
        self.unwritten += rows
        if self.unwritten:
            append_rows(self.path, self.unwritten)
            self.unwritten = []


def _append(path: Path, content: bytes) -> None:
    with saving(path, len(content)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = _length_of_whole_lines(descriptor)
            try:
                if size < os.fstat(descriptor).st_size:
                    os.ftruncate(descriptor, size)
                written = 0
                while written < len(content):
                    written += os.write(descriptor, content[written:])
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def _length_of_whole_lines(descriptor: int) -> int:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().rfind(b"\n") + 1


def move_damaged_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Add lines that cannot be read to the file that keeps them.

    Args:
        path: The file that they were in.
        lines: The lines, without their ends.

    Raises:
        SaveError: If they cannot be written.
    """
    if lines:
        target = path.with_name(path.name + DAMAGED_SUFFIX)
        _append(target, b"".join(line + b"\n" for line in lines))
        logger.warning("%d damaged lines of %s are kept in %s, the others stay.", len(lines), path, target)
