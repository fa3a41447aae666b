"""Reads and writes the logs of a run (`.jsonl`): a line of JSON for each entry, with its optimiser step."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa_hf.files import saving

logger = logging.getLogger(__name__)

DAMAGED_SUFFIX = ".damaged"  # of the file that keeps the damaged lines of a log


def read_rows(path: Path, *, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """Reads the entries of a log; leaves out a last line that a crash has cut short.

    Args:
        path: `metrics.jsonl` or another log.
        up_to_step: Leave out lines of later optimiser steps.

    Returns:
        A dictionary for each line; empty where the file is missing.

    Raises:
        ValueError: If a line is damaged; the message names the file and the line.
    """
    rows, problems = sort_rows(path)
    for number, (_, reason) in problems.items():
        raise ValueError(f"{path}, line {number} is damaged ({reason}); remove that line.")
    return rows if up_to_step is None else [row for row in rows if row["step"] <= up_to_step]


def sort_rows(path: Path) -> tuple[list[dict[str, Any]], dict[int, tuple[bytes, str]]]:
    """Separates the lines of a log that can be read from those that cannot.

    Args:
        path: `metrics.jsonl` or another log; a missing file has no lines.

    Returns:
        The entries; and by number, from 1, the bytes of each damaged line and what is wrong with it.
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
    """Adds all lines to a log or, where that fails, none of them.

    A last line that a crash has cut short is removed first.

    Args:
        path: The file; made if it is missing.
        rows: Each with its `step`.

    Raises:
        SaveError: If they cannot be written; the file is as it was.
    """
    _append(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))


class RowFile:
    """Appends to a log; keeps the lines that a full disk has refused, and writes them with the next lines.

    Args:
        path: The file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[Mapping[str, Any]] = []

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Adds lines, after those that were refused before.

        Args:
            *rows: Each with its `step`; without any, only the refused lines are written.

        Raises:
            SaveError: If the lines cannot be written; the object keeps them.
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
    """Adds damaged lines to the file that keeps them, `<log>.damaged`.

    Args:
        path: The log that they come from.
        lines: The lines, without line breaks.

    Raises:
        SaveError: If they cannot be written.
    """
    if lines:
        target = path.with_name(path.name + DAMAGED_SUFFIX)
        _append(target, b"".join(line + b"\n" for line in lines))
        logger.warning("%d damaged lines of %s are moved to %s.", len(lines), path, target)
