"""How good is an encoder, measured without training it: frozen features, then kNN and a linear probe.

`extract_features` turns images into one vector each; `knn_accuracy` and `linear_accuracy` judge these vectors against
labels. Both take plain numpy arrays, so raw pixels and other people's features are judged by the same yardstick. Test
labels are used once, to count: every choice (scaling, regularisation) is made on the training half.
"""

from ijepa_hf.evaluation.probes.knn import knn_accuracy
from ijepa_hf.evaluation.probes.linear import linear_accuracy
from ijepa_hf.model.features import extract_features

__all__ = ["extract_features", "knn_accuracy", "linear_accuracy"]
