"""Gives the features of the rows of an evaluation: the model, its untrained twin and raw pixels.

Features are read from the disk, and extracted where they are not there yet; see `feature_store`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from transformers import AutoConfig

from ijepa_hf import __version__
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.evaluation.arguments import EvaluationArguments
from ijepa_hf.evaluation.backbones import Backbone, load_backbone, raw_patches, raw_pixels, untrained_twin
from ijepa_hf.evaluation.feature_store import fingerprint_images, fingerprint_model, store_features
from ijepa_hf.evaluation.features import iterate_features
from ijepa_hf.evaluation.results import MODEL, RAW_PIXELS, UNTRAINED
from ijepa_hf.model.vision_models import ImageSettings, check_model_name, commit_of, read_image_settings

FEATURES_FOLDER = "features"
_PACKAGES = ("torch", "transformers", "numpy", "pillow", "scikit-learn")


class Subject(NamedTuple):
    """Describes the model that is evaluated.

    Args:
        commit: On the Hub; `None` for a folder.
        settings: What its images are like.
        fingerprint: Says which weights it has.
    """

    commit: str | None
    settings: ImageSettings
    fingerprint: dict[str, Any]

    def transform(self) -> dict[str, Any]:
        """Returns what is done to an image."""
        shape, mean, std = self.settings
        return {"size": shape, "mean": mean, "std": std, "resize": "whole image, bilinear, antialias"}


def open_subject(arguments: EvaluationArguments) -> Subject:
    """Finds a model, without loading its weights.

    Args:
        arguments: Their `model` and `model_revision`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such folder, or no model in it.
        OSError: If there is no such model on the Hub.
        ValueError: If the name or the revision cannot be right, or its image processor cannot be used.
    """
    model = arguments.model
    check_model_name(model, arguments.model_revision)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"model={model!r}: the folder holds no config.json; is the run finished?")
    commit = commit_of(model, arguments.model_revision)
    config = AutoConfig.from_pretrained(model, revision=commit, trust_remote_code=False)
    return Subject(commit, read_image_settings(model, config, revision=commit), fingerprint_model(model, commit))


def load_row(row: str, subject: Subject, arguments: EvaluationArguments) -> Backbone:
    """Loads the network of a row.

    Args:
        row: `MODEL` or `UNTRAINED`.
        subject: The model.
        arguments: Their `layers`, `device` and `seed`.

    Returns:
        The network, on the device.

    Raises:
        OSError: As `load_backbone`.
        ValueError: As `load_backbone`, and for a device that cannot be used.
    """
    options: dict[str, Any] = {
        "layers": arguments.layers, "revision": subject.commit, "device": choose_device(arguments.device),
    }  # fmt: skip
    if row == MODEL:
        return load_backbone(arguments.model, subject.settings.shape, **options)
    return untrained_twin(arguments.model, subject.settings.shape, arguments.seed, **options)


def choose_device(name: str | None) -> torch.device:
    """Returns the device of this name, or a GPU if there is one; a `ValueError` where it cannot be used."""
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={name!r} cannot be used; write cpu or cuda: {reason}") from error
        return device
    has_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.device("cuda" if has_gpu else "cpu")


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that features and scores may depend on."""
    return {**{name: version(name) for name in _PACKAGES}, "ijepa-hf": __version__}


class Images(NamedTuple):
    """Holds the images of both splits, and the SHA-256 of each split."""

    train: ImageRows
    test: ImageRows
    train_sha256: str
    test_sha256: str

    @classmethod
    def of(cls, splits: Any) -> "Images":
        """Returns the images of `LabelledSplits` or `TargetSplits`."""
        return cls(splits.train, splits.test, fingerprint_images(splits.train), fingerprint_images(splits.test))


@dataclass(frozen=True)
class RowFeatures:
    """Computes the features of one row, or reads them from the disk.

    Args:
        row: One of `ROWS`.
        backbone: Of the row; of raw pixels the model's, whose grid says what a patch is.
        arguments: Of the evaluation.
        subject: The model.
        images: The images.
    """

    row: str
    backbone: Backbone
    arguments: EvaluationArguments
    subject: Subject
    images: Images

    def of(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Gives the features of the training and of the test images.

        Args:
            kind: `pooled` or `patches`.

        Returns:
            For both splits float32 `[n, D]`, in memory; or of patches `[n, rows, columns, D]`, mapped from the disk.

        Raises:
            ValueError: If an image cannot be read, or features are NaN or infinite.
        """
        backbone, pooling, is_raw = self.backbone, self.arguments.pooling, self.row == RAW_PIXELS
        if kind == "patches":
            grid = backbone.grid_size
            if is_raw:
                return self._both("patches of pixels", lambda pixels: raw_patches(pixels, grid), {"grid": grid})
            return self._both("patches", lambda pixels: backbone.tokens(pixels).patches, self._of_network())
        if is_raw:
            train, test = self._both("pixels", raw_pixels, {})
        else:
            encode = functools.partial(backbone.pooled, pooling=pooling)
            train, test = self._both("pooled", encode, {"pooling": pooling, **self._of_network()})
        return np.array(train), np.array(test)

    def _of_network(self) -> dict[str, Any]:
        seed = {"seed": self.arguments.seed} if self.row == UNTRAINED else {}
        return {"layers": self.arguments.layers, "model": self.subject.fingerprint, **seed}

    def _both(
        self, kind: str, encode: Callable[[Tensor], Tensor], depends_on: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        settings, device = self.subject.settings, choose_device(self.arguments.device)
        trial = encode(torch.zeros(1, len(settings.mean), *settings.shape, device=device))
        train, test, *hashes = self.images
        found = []
        for split, images, sha256 in zip(("train", "test"), (train, test), hashes, strict=True):
            identity = {
                "features": self.row,
                "kind": kind,
                **depends_on,
                "images": {"sha256": sha256, "column": images.images.column},
                "transform": self.subject.transform(),
                "dtype": "float32",
                "device": device.type,
                "versions": package_versions(),
            }
            compute = functools.partial(
                iterate_features, images, encode=encode, settings=settings,
                batch_size=self.arguments.batch_size, device=device, description=f"{self.row}, {split}",
            )  # fmt: skip
            root = self.arguments.folder() / FEATURES_FOLDER
            found.append(store_features(root, identity, len(images), tuple(trial.shape[1:]), compute).whole())
        return found[0], found[1]
