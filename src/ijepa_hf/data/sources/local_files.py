"""Finds what a local path holds, and which split each file is of."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

KIND_OF_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    ".parquet": "parquet",
    ".tar": "tar",
    ".csv": "table",
    ".tsv": "table",
    ".npy": "arrays",
}
KINDS_IN_WORDS = {
    "images": "pictures", "parquet": ".parquet files", "tar": ".tar files", "table": ".csv or .tsv files",
    "arrays": ".npy files", "saved": "a data set saved by save_to_disk",
}  # fmt: skip

_METADATA = ("metadata.csv", "metadata.parquet")  # columns beside the pictures of a folder, read by imagefolder

_SPLIT_OF_WORD = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")


def is_shard(file: str) -> bool:
    """Returns whether a file can be a shard of a stream: .parquet or .tar."""
    return KIND_OF_SUFFIX.get(os.path.splitext(file)[1].lower()) in ("parquet", "tar")


class LocalFiles(NamedTuple):
    """Holds the files of a path, all of one kind, by split, and whether each file's folder is its class."""

    path: Path
    kind: str
    splits: dict[str, list[Path]]
    folders: dict[str, list[Path]]  # those that are wholly of one split
    has_classes: bool = False


def find_files(path: Path) -> LocalFiles:
    """Finds the files of a path, and decides their kind and the split of each."""
    if path.is_file():
        kind = KIND_OF_SUFFIX.get(path.suffix.lower())
        if kind == "images":
            raise ValueError(f"dataset_name={str(path)!r} is one picture; give the folder that it lies in.")
        if kind is None:
            raise ValueError(
                f"dataset_name={str(path)!r} is a file of no kind that is read: give a .parquet, .tar, .csv, .tsv or "
                ".npy file, or a folder (an archive has to be unpacked first)."
            )
        return LocalFiles(path, kind, {"train": [path]}, {})
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return LocalFiles(path, "saved", {}, {})
    kind, files = _files_of_one_kind(path)
    below = [file.relative_to(path).parts for file in files]
    if {parts[0] for parts in below} == {"data"}:
        return find_files(path / "data")._replace(path=path)
    named = _split_folders(path, below)
    if named:
        files_of: dict[str, list[Path]] = defaultdict(list)
        folders_of: dict[str, list[Path]] = defaultdict(list)
        for top in named:
            folders_of[_SPLIT_OF_WORD[top.lower()]].append(path / top)
        for file, parts in zip(files, below, strict=True):
            files_of[_SPLIT_OF_WORD[parts[0].lower()]].append(file)
        below = [parts[1:] for parts in below]
    elif kind in ("images", "arrays"):
        files_of, folders_of = {"train": files}, {"train": [path]}
    else:
        files_of, folders_of = _splits_by_file_name(path, files), {}
    has_classes = len({parts[0] for parts in below}) > 1 and all(len(parts) == 2 for parts in below)
    return LocalFiles(path, kind, dict(files_of), dict(folders_of), has_classes)


def _split_folders(folder: Path, below: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the top folders that are splits: all or none; a single one among others may be a class."""
    tops = {parts[0] if len(parts) > 1 else "" for parts in below}
    named = sorted(top for top in tops if top.lower() in _SPLIT_OF_WORD)
    others = sorted(top for top in tops if top not in named)
    if len(named) > 1 and others:
        raise ValueError(
            f"dataset_name={str(folder)!r}: {' and '.join(named)} look like splits, but there are files outside of "
            f"them ({others[0] or 'beside them'}); move those away, or give the folder of one split."
        )
    return [] if others else named


def _files_of_one_kind(folder: Path) -> tuple[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__")) and not _leads_back(Path(here, name))
        )
        for name in sorted(names):
            kind = KIND_OF_SUFFIX.get(os.path.splitext(name)[1].lower())
            if kind is not None and not name.startswith((".", "__")) and name not in _METADATA:
                found[kind].append(Path(here, name))
    if len(found) > 1:
        found.pop("table", None)
    if len(found) > 1:
        kinds = ", ".join(f"{len(files)} {KINDS_IN_WORDS[kind]}" for kind, files in sorted(found.items()))
        raise ValueError(
            f"dataset_name={str(folder)!r} holds {kinds}; give a folder of one kind, or the path of one file."
        )
    if not found:
        raise FileNotFoundError(
            f"dataset_name={str(folder)!r}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)}) and no "
            ".parquet, .tar, .csv, .tsv or .npy file."
        )
    return next(iter(found.items()))


def _leads_back(folder: Path) -> bool:
    """Returns whether a folder is a link to a folder above it: following it would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _splits_by_file_name(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        shard = _SHARD_NAME.fullmatch(file.stem)
        words = re.split(r"[-._ ]+", shard[1] if shard else file.stem)
        said = {_SPLIT_OF_WORD[word.lower()] for word in words if word.lower() in _SPLIT_OF_WORD}
        if shard and not said:
            said = {shard[1]}
        splits[said.pop() if len(said) == 1 else ""].append(file)
    if "" in splits and len(splits) > 1:
        raise ValueError(
            f"dataset_name={str(folder)!r}: some files say their split ({', '.join(sorted(set(splits) - {''}))}), "
            f"{splits[''][0].name!r} does not; name all like train-00000-of-00002{files[0].suffix}, or give one file."
        )
    return {name or "train": part for name, part in splits.items()}
