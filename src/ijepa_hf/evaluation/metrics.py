"""Defines the scores as `evaluate.Metric` classes; nothing is downloaded from the Hub.

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

from ijepa_hf.evaluation.probes.dense import box_iou, confusion_counts, mean_iou

_INPUTS = "predictions: what was predicted, one entry each. references: the truth, in the same order."


class Top1(evaluate.Metric):
    """Computes the share of images whose predicted class is right, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return _info("Top-1 accuracy: the share of right classes.", whole, "numpy")

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"top-1": float(accuracy_score(references, predictions))}


class R2(evaluate.Metric):
    """Computes the share of the truth's variance that is explained: 1 at best, 0 for its mean, or below 0."""

    def _info(self) -> evaluate.MetricInfo:
        # as lists, for the numpy format of `datasets` makes float32 of all floats
        return _info("Coefficient of determination.", datasets.Value("float64"), None)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"R2": float(r2_score(references, predictions))}


class MeanIoU(evaluate.Metric):
    """Computes the mean over classes of intersection over union, over the pixels of all images; from 0 to 1.

    An entry is the class of a pixel, 0 to 65535. A class that is neither predicted nor there has no IoU.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean intersection over union of the classes of pixels.", datasets.Value("uint16"), "numpy")

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        number = int(max(predictions.max(), references.max())) + 1
        rows = [classes.reshape(1, 1, -1) for classes in (predictions, references)]
        return {"mIoU": mean_iou(*confusion_counts(rows[0], rows[1], number, ignore_index=-1))}


class BoxIoU(evaluate.Metric):
    """Computes the mean over images of the intersection over union of two boxes, from 0 to 1.

    An entry is left, top, right and bottom of a box, as shares of the picture; a predicted one may be empty.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        return _info("Mean intersection over union of boxes.", box, None)

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        return {"IoU": float(np.mean(box_iou(np.array(predictions), np.array(references))))}


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
