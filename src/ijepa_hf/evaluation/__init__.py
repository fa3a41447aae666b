"""Scores encoders without training them: extracts frozen features, then applies kNN and a linear probe.

`extract_features` turns images into one vector each; `knn_accuracy` and `linear_accuracy` score these vectors with
labels. Both take plain numpy arrays, so raw pixels and other people's features are scored in the same way. Test labels
are used only for counting: every choice (scaling, regularisation) is made on the training half.
"""

from ijepa_hf.evaluation.probes.knn import knn_accuracy
from ijepa_hf.evaluation.probes.linear import linear_accuracy
from ijepa_hf.model.features import extract_features

__all__ = ["extract_features", "knn_accuracy", "linear_accuracy"]
