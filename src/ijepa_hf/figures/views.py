"""Computes what the pictures of features and predictions show; `figures.features` draws it.

There is no decoder: a prediction is shown by the real patches whose targets are most like it.

Models run in eval mode and without gradients; the mode of each module is then put back, and no random number is drawn.
Shape letters as in `modeling_ijepa`; n images, q queries.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from ijepa_hf.model.features import predict_targets
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining

ROBUST_PERCENTILES = (1.0, 99.0)
_MOST_SIMILARITIES = 2**24  # in memory at a time: 64 MB


# -- features --------------------------------------------------------------------------------------------------------


class PatchColors(NamedTuple):
    """Holds principal components of patch features as colours.

    Args:
        colors: float64 `[n, rows, columns, 3]`, from 0 to 1.
        explained: Share of the variance of each of the three components.
    """

    colors: np.ndarray
    explained: np.ndarray


def patch_colors(features: Tensor) -> PatchColors:
    """Computes the first three principal components of patch features as red, green and blue.

    All images share one basis, so that equal colours mean similar features in any of them. Each component is stretched
    from its 1st to its 99th percentile over all patches, so that a few odd patches do not make the rest gray. Its sign
    is arbitrary, and so are the colours themselves.

    Args:
        features: `[n, rows, columns, D]`, with at least 3 patches and D at least 3.

    Returns:
        The colours and the shares of the variance.

    Raises:
        ValueError: Too few patches or dimensions, or values that are not finite.
    """
    matrix = features.flatten(0, 2).double().numpy()
    if min(matrix.shape) < 3:
        raise ValueError(f"three components need at least 3 patches and 3 dimensions; features are {matrix.shape}.")
    _check_finite(features)
    # `full` where the covariance would be the larger matrix
    solver = "covariance_eigh" if matrix.shape[0] > matrix.shape[1] else "full"
    pca = PCA(n_components=3, svd_solver=solver)
    with np.errstate(invalid="ignore"):  # shares are 0 / 0 where all patches are equal
        components = pca.fit_transform(matrix)
    low, high = np.percentile(components, ROBUST_PERCENTILES, axis=0)
    spread = np.where(high > low, high - low, 1.0)
    colors = np.where(high > low, (components - low) / spread, 0.5).clip(0, 1)
    explained = np.nan_to_num(pca.explained_variance_ratio_)
    return PatchColors(colors.reshape(*features.shape[:3], 3), explained)


def cosine_map(features: Tensor, row: int, column: int) -> np.ndarray:
    """Computes the cosine of one patch to all patches of its image.

    Args:
        features: `[rows, columns, D]`.
        row: The patch's row, from 0.
        column: The patch's column, from 0.

    Returns:
        float64 `[rows, columns]`, from -1 to 1.

    Raises:
        ValueError: If features are not finite.
    """
    _check_finite(features)
    units = nn.functional.normalize(features.double(), dim=-1)
    return (units @ units[row, column]).numpy()


def differing_patches(features: Tensor, count: int, first: int) -> list[tuple[int, int]]:
    """Chooses patches of an image that differ from each other, so that a few of them show what the image has.

    Args:
        features: `[rows, columns, D]`.
        count: Patches wanted, at most rows x columns.
        first: Row-major position of the first; each further one is the patch whose highest cosine to those before is
            the lowest.

    Returns:
        Row and column of each.
    """
    units = nn.functional.normalize(features.flatten(0, 1).double(), dim=-1)
    chosen = [first]
    while len(chosen) < count:
        highest = (units @ units[chosen].T).amax(dim=1)
        highest[chosen] = math.inf
        chosen.append(int(highest.argmin()))
    return [divmod(position, features.shape[1]) for position in chosen]


def find_nearest_images(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the images of a gallery whose pooled features are most similar to those of query images.

    Args:
        queries: `[q, D]`.
        gallery: `[n, D]`.
        k: Neighbours of each, at most n.

    Returns:
        Their numbers in the gallery, int64 `[q, k]`, the most similar first, and their cosines, float64 `[q, k]`.

    Raises:
        ValueError: If the gallery has fewer than k images, or features are not finite.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k={k} neighbours of a gallery of {len(gallery)} images: k must be 1 to {len(gallery)}.")
    for features in (queries, gallery):
        _check_finite(torch.tensor(features))
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(gallery)
    distances, indices = search.kneighbors(queries)
    return indices, 1.0 - distances


# -- predictions -----------------------------------------------------------------------------------------------------


def box_to_patches(
    box: tuple[int, int, int, int], image_shape: tuple[int, int], grid_size: tuple[int, int]
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Finds the patches that a box touches: it is snapped outward to whole patches.

    Args:
        box: Left, top, width and height, in pixels of the image as it was given.
        image_shape: Height and width of that image, in pixels.
        grid_size: Rows and columns of patches; the grid is laid over the whole image.

    Returns:
        int64 `[P]`, row-major patch positions, and the box that they fill, as `box`.

    Raises:
        ValueError: If the box is empty, leaves the image, or its patches are all patches.
    """
    left, top, width, height = box
    image_height, image_width = image_shape
    given = f"box={','.join(map(str, box))}"
    if width < 1 or height < 1:
        raise ValueError(f"{given} is empty: write x,y,w,h with a width and height of 1 or more.")
    if left < 0 or top < 0 or left + width > image_width or top + height > image_height:
        raise ValueError(
            f"{given} leaves the image, which is {image_width} pixels wide and {image_height} high: x + w can be at "
            f"most {image_width}, y + h at most {image_height}."
        )
    rows, columns = grid_size
    # whole numbers, so that a box that ends on a patch's edge does not spill over
    first_row, last_row = top * rows // image_height, -(-(top + height) * rows // image_height)
    first_column, last_column = left * columns // image_width, -(-(left + width) * columns // image_width)
    if (last_row - first_row) * (last_column - first_column) == rows * columns:
        raise ValueError(
            f"{given} touches all {rows}x{columns} patches, which leaves nothing to predict from: take a smaller box."
        )
    positions = torch.arange(rows * columns).view(rows, columns)[first_row:last_row, first_column:last_column]
    patch_height, patch_width = image_height / rows, image_width / columns
    snapped = (
        first_column * patch_width,
        first_row * patch_height,
        (last_column - first_column) * patch_width,
        (last_row - first_row) * patch_height,
    )
    return positions.flatten(), snapped


def error_map(errors: Tensor, target_indices: Tensor, grid_size: tuple[int, int]) -> np.ndarray:
    """Puts the errors of an image's blocks in their places.

    Args:
        errors: `[M, P]`.
        target_indices: int64 `[M, P]`.
        grid_size: Rows and columns of patches.

    Returns:
        float64 `[rows, columns]`: the mean over the blocks that have the patch; NaN where none has.
    """
    num_patches = math.prod(grid_size)
    positions = target_indices.cpu().flatten().numpy()
    sums = np.bincount(positions, errors.flatten().double().numpy(), minlength=num_patches)
    counts = np.bincount(positions, minlength=num_patches)
    return np.where(counts > 0, sums / counts.clip(1), np.nan).reshape(grid_size)


class PatchMatches(NamedTuple):
    """Holds the patches of a gallery that are most similar to some features.

    Args:
        images: int64, numbers of the gallery's images.
        positions: int64, row-major patch positions in them.
        similarity: float32, cosines.
    """

    images: Tensor
    positions: Tensor
    similarity: Tensor

    def reshape(self, *shape: int) -> "PatchMatches":
        """Returns the same in another shape."""
        return PatchMatches(*(part.reshape(shape) for part in self))


def find_nearest_patches(
    queries: Tensor, gallery: Iterable[Tensor], *, own_images: Tensor | None = None
) -> PatchMatches:
    """Finds for each query the patch of a gallery with the highest cosine, wherever in its image it lies.

    The gallery comes in parts, which are searched one after the other and not kept. Of equal patches the first counts.

    Args:
        queries: `[q, D]`.
        gallery: Features of images, `[b, N, D]` each.
        own_images: int64 `[q]`: a gallery image that is not searched, for each query; -1 for none.

    Returns:
        The matches, each `[q]`, on the CPU.

    Raises:
        ValueError: If there is no patch to choose from, or features are not finite.
    """
    _check_finite(queries)
    units = nn.functional.normalize(queries.float(), dim=-1)
    best = torch.full((len(queries),), -math.inf, device=queries.device)
    images, positions = torch.zeros(2, len(queries), dtype=torch.int64, device=queries.device)
    seen = 0
    for part in gallery:
        _check_finite(part)
        num_images, num_patches, _ = part.shape
        candidates = nn.functional.normalize(part.float(), dim=-1).flatten(0, 1).to(units.device)
        step = max(1, _MOST_SIMILARITIES // len(candidates))
        for start in range(0, len(units), step):
            rows = slice(start, start + step)
            cosines = units[rows] @ candidates.T
            if own_images is not None:
                own = own_images[rows].to(units.device)[:, None, None]
                numbers = torch.arange(seen, seen + num_images, device=units.device)[None, :, None]
                cosines.view(-1, num_images, num_patches).masked_fill_(own == numbers, -math.inf)
            highest, index = cosines.max(dim=1)
            better = highest > best[rows]
            best[rows] = torch.where(better, highest, best[rows])
            images[rows] = torch.where(better, seen + index // num_patches, images[rows])
            positions[rows] = torch.where(better, index % num_patches, positions[rows])
        seen += num_images
    if not bool(torch.isfinite(best).all()):
        raise ValueError("the gallery has no image other than the one that is looked at: give it at least one more.")
    return PatchMatches(images.cpu(), positions.cpu(), best.cpu())


@dataclass(frozen=True)
class Expectation:
    """Holds what a predictor expects at target patches, as patches of a gallery.

    Args:
        expected: `[B, M, P]`: the gallery's patches whose targets are most like the predictions.
        nearest_to_truth: `[B, M, P]`: those most like the true targets: the best that this gallery could show.
        truth_similarity: float32 `[B, M, P]`: cosine of the prediction and the true target.
    """

    expected: PatchMatches
    nearest_to_truth: PatchMatches
    truth_similarity: Tensor


def expect_patches(
    model: IJepaForPretraining,
    pixel_values: Tensor,
    context_indices: Tensor,
    target_indices: Tensor,
    gallery: Iterable[Tensor],
    *,
    own_images: Tensor | None = None,
) -> Expectation:
    """Predicts target blocks, and finds the real patches that are most similar to the predictions.

    Predictions, true targets and the gallery's patches are compared by cosine, targets layer-normalised as in the
    loss. A match may lie anywhere in its image: what is there decides, not where.

    Args:
        model: The model.
        pixel_values: float `[B, C, height, width]`, normalised.
        context_indices: int64 `[B, K]`, or `[B, S, K]`, of which the first set counts.
        target_indices: int64 `[B, M, P]`.
        gallery: Targets of other images, `[b, N, D]` each, from `target_features`.
        own_images: int64 `[B]`: the number that each image has in the gallery, where it is in it; not searched.

    Returns:
        The expectation.

    Raises:
        ValueError: If the model predicts pixels: there are no representations to compare.
    """
    if model.config.target_type != "representation":
        raise ValueError(
            f"this model has target_type={model.config.target_type!r}: its predictions are no representations, so no "
            "patches can be found that are like them; take a model that predicts representations."
        )
    first_sets = context_indices if context_indices.ndim == 2 else context_indices[:, 0]
    predictions, targets = predict_targets(model, pixel_values, first_sets, target_indices)
    predictions = predictions[:, 0]
    shape = tuple(target_indices.shape)
    own = None
    if own_images is not None:
        own = own_images.view(-1, 1, 1).expand(shape).flatten().repeat(2)
    queries = torch.cat([predictions.flatten(0, 2), targets.flatten(0, 2)])
    matches = find_nearest_patches(queries, gallery, own_images=own)
    half = len(queries) // 2
    return Expectation(
        expected=PatchMatches(*(part[:half] for part in matches)).reshape(*shape),
        nearest_to_truth=PatchMatches(*(part[half:] for part in matches)).reshape(*shape),
        truth_similarity=nn.functional.cosine_similarity(predictions, targets, dim=-1).cpu(),
    )


def _check_finite(features: Tensor) -> None:
    finite = torch.isfinite(features)
    if not bool(finite.all()):
        raise ValueError(
            f"{int((~finite).sum())} of {features.numel()} features are NaN or infinite: the weights are damaged, or "
            "the training has diverged."
        )
