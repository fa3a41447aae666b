"""Defines the flags of `ijepa-hf evaluate`, checks them and parses them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME

from ijepa_hf.evaluation.backbones import LAYERS, POOLINGS
from ijepa_hf.evaluation.methods import METHODS
from ijepa_hf.recipes.arguments import LabelledDataFlags, flag, nearest_name
from ijepa_hf.recipes.parsing import CommandParser, model_parser, parse_flags
from ijepa_hf.runs.cards import NEIGHBOURS

EVALUATIONS_FOLDER = "evaluations"
_DEFAULT_LABEL_FRACTION = 0.01
_SHAPES_TARGETS = ("count", "nearest_distance")


@dataclass(kw_only=True)
class EvaluationFlags(LabelledDataFlags):
    """Defines the flags of `ijepa-hf evaluate`; names as in `ijepa-hf pretrain` and `finetune`."""

    method: list[str] = flag("result", f"One or several of {', '.join(METHODS)}.", ["knn", "linear"])
    model_revision: str | None = flag("result", "Branch, tag or commit of MODEL on the Hub.")
    pooling: str = flag("result", "Feature of an image: mean (of its patches) or cls (its class token).", "mean")
    layers: int = flag("result", "Layers that features are from: 1, the last; 4, the last four, concatenated.", 1)
    k: int = flag("result", "knn: neighbours that vote.", NEIGHBOURS)
    temperature: float = flag(
        "result", "knn: towards 0 only the nearest counts, towards infinity all k count alike.", 0.07
    )
    samples_per_class: int | None = flag("result", "low_shot: labelled images of each class.")
    label_fraction: float | None = flag(
        "result",
        f"low_shot: this share of the images of each class, rounded up; {_DEFAULT_LABEL_FRACTION} if none is given.",
    )
    num_label_draws: int = flag("result", "low_shot: draws of labelled images; the score is their mean.", 5)
    target_columns: list[str] = flag(
        "result", f"regression: columns of numbers; of shapes {' and '.join(_SHAPES_TARGETS)} if not given.", []
    )
    mask_column_name: str = flag(
        "result", "segmentation: column of pictures whose pixels are classes.", "segmentation"
    )
    boxes_column_name: str = flag(
        "result", "localization: column of lists of boxes [left, top, right, bottom].", "boxes"
    )
    num_train_epochs: float = flag("result", "finetune: length of each of its two runs.", 50.0)
    output_dir: str | None = flag(
        "place", f"Folder of features and of evaluation.json; {EVALUATIONS_FOLDER}/<model>/<data set> if not given."
    )
    update_card: bool = flag(
        "place", "Add the scores to the model-index of MODEL's README.md; MODEL must be a folder.", False
    )
    batch_size: int = flag("speed", "Images in a forward pass.", 64)
    device: str | None = flag("speed", "Such as cpu or cuda; a GPU if there is one.")
    num_cpu_threads: int | None = flag(
        "speed", "Threads of torch and of numpy on a CPU; their own choice if not given."
    )
    seed: int = flag("result", "Seed of every draw.", 0)


@dataclass(kw_only=True)
class EvaluationArguments(EvaluationFlags):
    """Holds the arguments of an evaluation: the flags and the model, which comes first on the command line.

    Without `samples_per_class` and `label_fraction`, `label_fraction` becomes its default; without `target_columns`
    they become the columns of numbers of `shapes`, if that is the data set.

    Args:
        model: Hub id or folder of a vision model that `AutoModel` reads.
    """

    model: str

    def __post_init__(self) -> None:
        if self.samples_per_class is None and self.label_fraction is None:
            self.label_fraction = _DEFAULT_LABEL_FRACTION
        if not self.target_columns and self.dataset_name == "shapes":
            self.target_columns = list(_SHAPES_TARGETS)

    def check(self) -> None:
        """Raises `ValueError` if a value is bad."""
        if self.dataset_name is None:
            raise ValueError(
                "dataset_name is not given: write --dataset_name followed by digits, a Hub id or a folder."
            )
        if not self.method:
            raise ValueError(f"method is empty: write --method followed by one or several of {', '.join(METHODS)}.")
        for name in self.method:
            if name not in METHODS:
                raise ValueError(f"method={name!r} is not known{nearest_name(name, set(METHODS))}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} must be {' or '.join(map(repr, POOLINGS))}.")
        if self.layers not in LAYERS:
            raise ValueError(f"layers={self.layers} must be {' or '.join(map(str, LAYERS))}.")
        if self.samples_per_class is not None and self.label_fraction is not None:
            raise ValueError("samples_per_class and label_fraction are two ways to choose few labels; give one.")
        for name, least in (
            ("max_train_samples", 1), ("max_eval_samples", 1), ("k", 1), ("samples_per_class", 1),
            ("num_label_draws", 1), ("batch_size", 1), ("num_cpu_threads", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        for name in ("temperature", "num_train_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0.")
        if self.label_fraction is not None and not 0 < self.label_fraction <= 1:
            raise ValueError(f"label_fraction={self.label_fraction} must be greater than 0 and at most 1.")
        if "regression" in self.method and not self.target_columns:
            raise ValueError("target_columns is not given: write --target_columns followed by columns of numbers.")
        if self.update_card and not (Path(self.model) / REPOCARD_NAME).is_file():
            raise ValueError(
                f"update_card: model={self.model!r} is no folder with a README.md in it, so there is no card to add "
                "scores to; leave it out."
            )

    def folder(self) -> Path:
        """Returns the folder of everything that an evaluation writes."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        names = []
        for name in (self.model, str(self.dataset_name)):
            name = Path(name).resolve().name if Path(name).exists() else name.split("/")[-1]
            names.append(re.sub(r"[^\w.-]+", "-", name))
        return Path(EVALUATIONS_FOLDER, *names)


def build_evaluate_parser() -> CommandParser:
    """Returns the parser of `ijepa-hf evaluate`, whose values are the arguments of `EvaluationArguments`."""
    text = (
        "Score the frozen features of a vision model, beside those of the same network untrained and raw "
        "pixels, each with its 95 % interval. Nothing is chosen on the held-out split."
    )
    return model_parser("evaluate", text, EvaluationFlags)


def parse_evaluate_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Turns a command line into checked arguments.

    Args:
        argv: What follows `ijepa-hf evaluate`: the model, then flags.

    Returns:
        The arguments.

    Raises:
        ValueError: If a flag is unknown (the nearest is named), or a value is bad.
    """
    arguments = EvaluationArguments(**vars(parse_flags(build_evaluate_parser(), argv)))
    arguments.check()
    return arguments
