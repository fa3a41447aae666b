"""The scores, as `evaluate.Metric` classes that are defined here: nothing is fetched from the Hub.

Importing `evaluate` takes seconds, so nothing but the command imports this module. Its classes make a folder for the
files of distributed scoring when they are built; `new_metric` gives them one that is deleted again.

    with new_metric(Top1) as metric:
        metric.compute(predictions=[0, 1], references=[0, 2])     # {"top-1": 0.5}
"""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, TypeVar

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, r2_score

_INPUTS = "predictions: what was predicted, one entry each. references: the truth, in the same order."


class Top1(evaluate.Metric):
    """Share of images whose predicted class is right, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return _info("Top-1 accuracy: the share of right classes.", whole, "numpy")

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"top-1": float(accuracy_score(references, predictions))}


class R2(evaluate.Metric):
    """Share of the truth's variance that is explained: 1 at best, 0 for its mean, without a lower end."""

    def _info(self) -> evaluate.MetricInfo:
        # as lists, for the numpy format of `datasets` makes float32 of all floats
        return _info("Coefficient of determination.", datasets.Value("float64"), None)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"R2": float(r2_score(references, predictions))}


class MeanIoU(evaluate.Metric):
    """Mean over classes of intersection over union, both counted over the pixels of all images; from 0 to 1.

    An entry is the class of a pixel, 0 to 65535. A class that is neither predicted nor there has no IoU.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean intersection over union of the classes of pixels.", datasets.Value("uint16"), "numpy")

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        counts = [np.bincount(classes, minlength=2**16) for classes in (predictions, references)]
        both = np.bincount(predictions[predictions == references], minlength=2**16)
        union = counts[0] + counts[1] - both
        there = union > 0
        return {"mIoU": float(np.mean(both[there] / union[there]))}


class BoxIoU(evaluate.Metric):
    """Mean over images of the intersection over union of two boxes, from 0 to 1.

    An entry is left, top, right and bottom of a box, right and bottom being the first outside.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        return _info("Mean intersection over union of boxes.", box, None)

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        mine, other = np.array(predictions, dtype=np.float64), np.array(references, dtype=np.float64)
        sides = np.minimum(mine[:, 2:], other[:, 2:]) - np.maximum(mine[:, :2], other[:, :2])
        both = sides.clip(0).prod(axis=1)
        areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (mine, other)]
        union = areas[0] + areas[1] - both
        return {"IoU": float(np.mean(np.divide(both, union, out=np.zeros_like(both), where=union > 0)))}


Metric = TypeVar("Metric", bound=evaluate.Metric)


@contextlib.contextmanager
def new_metric(kind: type[Metric]) -> Iterator[Metric]:
    """Builds a metric that leaves no file behind.

    Args:
        kind: One of the classes above.

    Yields:
        The metric; its entries are kept in memory.
    """
    with tempfile.TemporaryDirectory(prefix="ijepa-hf-metric-") as folder:
        yield kind(keep_in_memory=True, cache_dir=folder)


def _info(description: str, entry: Any, entry_format: str | None) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": entry, "references": entry})
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=_INPUTS, features=features, format=entry_format
    )
