"""Collapse laboratory: complete and dimensional collapse happen here, and are prevented, in one script.

    python examples/comparison/collapse_laboratory.py --output_dir runs/collapse-laboratory

Eight trainings of one small encoder on digits, equal in its first weights, in images, batches, steps and optimiser;
what differs is the objective. Four compare two views of an image by the mean of the encoder's patches, with nothing
between that mean and the loss; two are BYOL and two I-JEPA, with the stop-gradient and without. At the same steps all
are measured on the same held-out images, and `judge_collapse` says what it makes of their patches. Written are a table
(`.md`), all numbers (`.json`) and a picture (`.png`). About four minutes a seed, on one core.

Sources: both forms of collapse, Jing et al. 2021 (arXiv 2110.09348); negatives, Chen et al. 2020, SimCLR (2002.05709);
stop-gradient, moving average and predictor, Grill et al. 2020, BYOL (2006.07733), and Assran et al. 2023, I-JEPA
(2301.08243); the terms for variance and covariance, Bardes et al. 2021, VICReg (2105.04906).
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from family import AveragedFamily, Family, both_views, numpy_generator, patches, pooled
from losses import nt_xent
from masked import IJepa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn import functional
from training import TrainingSettings, make_optimizer, step_values, training_step
from views import ViewSettings, plain_images

from ijepa_hf import IJepaConfig
from ijepa_hf.data.transforms import normalize
from ijepa_hf.diagnosis.measures import measure_matrix, spectrum
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch, measure_features
from ijepa_hf.diagnosis.verdict import COMPLETE, DIMENSIONAL, LEAST_RANK, judge_collapse
from ijepa_hf.evaluation.probes.knn import knn_accuracy
from ijepa_hf.evaluation.scorecard import ScoredImages, load_scored_images, pooled_features
from ijepa_hf.figures.panels import BLOCK_COLORS, DPI, FAINT_COLOR, TEXT_COLOR, plain_frame
from ijepa_hf.model.encoder_ijepa import gather_patches
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import TARGET_NORM_EPS

NETWORK = IJepaConfig(
    image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    predictor_hidden_size=32, predictor_num_hidden_layers=2, context_keep_ratio=0.4,
)  # fmt: skip
VIEWS = ViewSettings(size=32, mean=(0.3,) * 3, std=(0.38,) * 3, view_scale=(0.4, 1.0), brightness=0.4, contrast=0.4)
SETTINGS = TrainingSettings(
    batch_size=64, learning_rate=2e-3, start_learning_rate=2e-4, final_learning_rate=2e-5, warmup_share=0.1,
    weight_decay=0.04, final_weight_decay=0.04,
    ema_momentum=0.98, final_ema_momentum=1.0,  # the published 0.996 is for runs a hundred times as long
)  # fmt: skip
NUM_ROWS = 20  # measurements after the one before training
NUM_MEASURED = 256  # held-out images, more than the features have dimensions

TEMPERATURE = 0.2  # of the negatives
AGREEMENT_WEIGHT, VARIANCE_WEIGHT = 25.0, 25.0  # as in VICReg
COVARIANCE_WEIGHT = 5.0  # VICReg has 1, on an expander that is 128 times as wide
HEAD_WIDTH = 256  # of BYOL's projector and predictor, inside

COMPLETE_BELOW = 0.1  # times the embeddings' normalised deviation before training
PREVENTED = "no collapse"
NETWORK_FIELDS = (
    "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "predictor_hidden_size", "predictor_num_hidden_layers", "context_keep_ratio",
)  # fmt: skip
STEM = "collapse_laboratory"


# -- objectives ------------------------------------------------------------------------------------------------------


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance of the two views, a mean over images and dimensions; 0 where all vectors are one.

    Args:
        first: `[B, D]`, of one view of each image.
        second: `[B, D]`, of the other.

    Returns:
        A scalar.

    Source: VICReg, arXiv 2105.04906, equation 5, divided by D.
    """
    return functional.mse_loss(first, second)


def variance_hinge(features: Tensor) -> Tensor:
    """How far the standard deviation of each dimension over the batch is below 1, a mean over dimensions.

    Args:
        features: `[B, D]`, B at least 2.

    Returns:
        A scalar, 0 where all dimensions deviate by 1 or more. Dimensions that say the same as others cost nothing.

    Source: VICReg, arXiv 2105.04906, equations 1 and 2, with its gamma of 1 and epsilon of 1e-4.
    """
    return functional.relu(1 - (features.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_penalty(features: Tensor) -> Tensor:
    """Squares of the covariances of all pairs of different dimensions, their sum divided by D.

    Args:
        features: `[B, D]`, B at least 2.

    Returns:
        A scalar, 0 where no two dimensions vary together.

    Source: VICReg, arXiv 2105.04906, equations 3 and 4.
    """
    covariance = features.T.cov()
    return (covariance - covariance.diag().diag()).square().sum() / features.shape[1]


def variance_objective(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance and variance of two views `[B, D]`: VICReg without its covariance."""
    hinges = variance_hinge(first) + variance_hinge(second)
    return AGREEMENT_WEIGHT * squared_distance(first, second) + VARIANCE_WEIGHT * hinges


def vicreg_objective(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance, variance and covariance of two views `[B, D]`."""
    penalties = covariance_penalty(first) + covariance_penalty(second)
    return variance_objective(first, second) + COVARIANCE_WEIGHT * penalties


def unit_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of vectors of length 1, a mean over images: 2 - 2 cos.

    Args:
        predictions: `[B, D]`; their length does not matter.
        targets: `[B, D]`; their length does not matter.

    Returns:
        A scalar, 0 to 4.

    Source: BYOL, arXiv 2006.07733, equation 2.
    """
    return 2 - 2 * functional.cosine_similarity(predictions, targets, dim=1).mean()


# -- trainings -------------------------------------------------------------------------------------------------------


class TwoViews(Family):
    """Two views of an image, encoded and pooled; gradient on both sides, and no head.

    Args:
        config: As for `Family`.
        views: As for `Family`.
        seed: As for `Family`.
        objective: Of the two views `[B, D]`.
    """

    views_per_image = 2

    def __init__(
        self, config: IJepaConfig, views: ViewSettings, seed: int, objective: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(config, views, seed)
        self.objective = objective

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        return self.objective(*pooled(self.encoder, both_views(pixels, self.views, generator)).chunk(2))


class Byol(AveragedFamily):
    """BYOL: a projector and a predictor; targets are those of the moving average, without gradient.

    Source: Grill et al., arXiv 2006.07733, section 3.1; heads as in section 3.3, narrower.
    """

    views_per_image = 2

    def __init__(self, config: IJepaConfig, views: ViewSettings, seed: int) -> None:
        super().__init__(config, views, seed, batch_normalized_mlp(config.hidden_size))
        self.predictor = batch_normalized_mlp(config.hidden_size)

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        both = both_views(pixels, self.views, generator)
        with torch.no_grad():
            targets = self.average_head(pooled(self.average_encoder, both))
        return crossed_distance(self.predictor, self.head(pooled(self.encoder, both)), targets)

    def embed(self, features: Tensor) -> Tensor:
        """What is compared, `[B, D]`, of pooled features `[B, D]` of the scored encoder."""
        return self.average_head(features)


class ByolWithGradient(Byol):
    """BYOL without what keeps it: targets are the trained encoder's own, and have a gradient."""

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        projections = self.head(pooled(self.encoder, both_views(pixels, self.views, generator)))
        return crossed_distance(self.predictor, projections, projections)

    def update_average(self, momentum: float) -> None:  # noqa: D102 (as in Family)
        super().update_average(0.0)  # a copy: what is measured is what is trained


class IJepaWithGradient(IJepa):
    """I-JEPA without what keeps it: targets are the context encoder's own, and have a gradient."""

    def loss(self, pixels: Tensor, labels: Tensor, generator: Generator) -> Tensor:  # noqa: D102 (as in Family)
        masks = draw_masks(self.config.mask_settings(), len(pixels), numpy_generator(generator))
        images = plain_images(pixels, self.views, generator)
        features = self.encoder(images).last_hidden_state
        targets = functional.layer_norm(features, features.shape[-1:], eps=TARGET_NORM_EPS)
        context = self.encoder(images, context_indices=masks.context_indices).last_hidden_state
        predictions = self.model.predict(context, masks.context_indices, masks.target_indices)
        return self.model.compute_loss(predictions, gather_patches(targets, masks.target_indices))

    def update_average(self, momentum: float) -> None:  # noqa: D102 (as in Family)
        super().update_average(0.0)  # a copy, as above


def batch_normalized_mlp(width: int) -> nn.Sequential:
    """BYOL's head: a linear layer, batch norm, ReLU, a linear layer; `[B, width]` to `[B, width]`."""
    norm = nn.BatchNorm1d(HEAD_WIDTH, track_running_stats=False)  # those of the batch, also when it is measured
    return nn.Sequential(nn.Linear(width, HEAD_WIDTH), norm, nn.ReLU(), nn.Linear(HEAD_WIDTH, width))


def crossed_distance(predictor: nn.Module, projections: Tensor, targets: Tensor) -> Tensor:
    """Predicts each view's target from the other view.

    Args:
        predictor: `[B, D]` to `[B, D]`.
        projections: `[2 B, D]`, of all first views, then of all second ones.
        targets: `[2 B, D]`, likewise.

    Returns:
        A scalar, the mean of both directions.
    """
    predictions = [predictor(part) for part in projections.chunk(2)]  # each with a batch norm of its own
    first, second = targets.chunk(2)
    return (unit_distance(predictions[0], second) + unit_distance(predictions[1], first)) / 2


class Arm(NamedTuple):
    """A training of the laboratory.

    Args:
        title: Its name in table and picture.
        make: From configuration, views and seed.
        color: Of its lines.
        style: Of its lines.
    """

    title: str
    make: Callable[[IJepaConfig, ViewSettings, int], Family]
    color: str
    style: str = "-"


_ORANGE, _SKY, _PINK, _GREEN, _, _RED, _BLUE = BLOCK_COLORS
ARMS = {
    "agreement": Arm("agreement alone", partial(TwoViews, objective=squared_distance), _RED, "--"),
    "negatives": Arm("+ negatives", partial(TwoViews, objective=partial(nt_xent, temperature=TEMPERATURE)), _SKY),
    "variance": Arm("+ variance", partial(TwoViews, objective=variance_objective), _ORANGE, "-."),
    "vicreg": Arm("+ variance, covariance", partial(TwoViews, objective=vicreg_objective), _GREEN),
    "byol_gradient": Arm("BYOL, gradient into targets", ByolWithGradient, _BLUE, "--"),
    "byol": Arm("BYOL", Byol, _BLUE),
    "ijepa_gradient": Arm("I-JEPA, gradient into targets", IJepaWithGradient, _PINK, "--"),
    "ijepa": Arm("I-JEPA", IJepa, _PINK),
}


def new_family(name: str, seed: int) -> Family:
    """An arm before its first step; torch's global generator is left as it was.

    Args:
        name: One of `ARMS`.
        seed: Of all first weights; those of the encoder are the same in all arms.

    Returns:
        The arm, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARMS[name].make(NETWORK, VIEWS, seed)


# -- measuring -------------------------------------------------------------------------------------------------------


class Meter:
    """Measures an arm again and again on the same held-out images.

    Args:
        pixels: uint8 `[n, 3, size, size]`; all are embedded, and the patches of the first `MONITOR_IMAGES` are judged.
        num_steps: Of the training.

    Attributes:
        rows: What is measured, in the order of steps.
        judged: What `judge_collapse` reads, likewise.
    """

    def __init__(self, pixels: Tensor, num_steps: int) -> None:
        self.images, self.num_steps = prepare(pixels), num_steps
        self.monitor = CollapseMonitor(make_monitor_batch(NETWORK, self.images[:MONITOR_IMAGES]))
        self.rows: list[dict[str, Any]] = []
        self.judged: list[dict[str, Any]] = []

    @torch.no_grad()
    def measure(self, family: Family, step: int, loss: float | None, ema_expected: float | None) -> Tensor:
        """Takes a row.

        Args:
            family: What is trained. Nothing in it depends on its mode.
            step: Steps made.
            loss: Of the last step; `None` before the first.
            ema_expected: Share of the way to the trained encoder that the momenta since the last row make.

        Returns:
            The embeddings, `[n, D]`.
        """
        features = family.patch_features(self.images)
        embeddings = embed(family, features.mean(dim=1))
        patch_row = self._measure_patches(family, features[:MONITOR_IMAGES])
        progress = step / self.num_steps
        self.judged.append({"step": step, "progress": progress, "ema_expected": ema_expected, **patch_row})
        row: dict[str, Any] = {"step": step, "loss": loss}
        for kind, measured in (("embedding", embeddings), ("pooled", features.mean(dim=1))):
            numbers = measure_matrix(measured)
            row |= {f"{kind}_{name}": numbers[name] for name in ("normalized_std", "rankme", "effective_rank")}
        row |= {f"patch_{name}": patch_row[f"target_patch_{name}"] for name in ("normalized_std", "effective_rank")}
        self.rows.append({**row, "position_share": patch_row["target_position_share"]})
        return embeddings

    def _measure_patches(self, family: Family, features: Tensor) -> dict[str, Any]:
        """All that `judge_collapse` can use: of I-JEPA everything, else what the encoder gives, as `diagnose` does."""
        if isinstance(family, IJepa):
            return self.monitor.measure(family.model)
        encoders = {"target": features}
        if isinstance(family, AveragedFamily):
            encoders["context"] = patches(family.encoder, self.images[:MONITOR_IMAGES])
        return measure_features(encoders, torch.empty(len(features), 0, 0, dtype=torch.int64))


def prepare(pixels: Tensor) -> Tensor:
    """Whole images for the encoder: uint8 to normalised float32."""
    return normalize(pixels, VIEWS.mean, VIEWS.std)


def embed(family: Family, features: Tensor) -> Tensor:
    """What the objective compares: BYOL's projections, else pooled features `[n, D]` (I-JEPA: their patches)."""
    return family.embed(features) if isinstance(family, Byol) else features


def score(family: Family, images: ScoredImages) -> float:
    """Returns kNN-20 top-1 in [0, 1] of the scored encoder's pooled features."""
    features = [
        pooled_features(lambda batch: family.patch_features(batch).mean(dim=1), pixels, prepare)
        for pixels in (images.train_pixels, images.test_pixels)
    ]
    return knn_accuracy(features[0], images.train_labels, features[1], images.test_labels)


def deviations(embeddings: Tensor) -> list[float]:
    """Standard deviations of rows of unit length along their principal directions, largest first.

    Args:
        embeddings: `[n, D]`.

    Returns:
        min(n, D) numbers, whose squares sum up to at most 1.
    """
    return (spectrum(functional.normalize(embeddings, dim=1)) / len(embeddings)).sqrt().tolist()


def what_happened(row: Mapping[str, Any], untrained: Mapping[str, Any]) -> str:
    """Says whether embeddings collapsed, by their numbers before and after training.

    Args:
        row: The last one.
        untrained: The first one.

    Returns:
        `COMPLETE` where the deviation is less than `COMPLETE_BELOW` of what it was, else `DIMENSIONAL` where the
        effective rank is below `LEAST_RANK`, else `PREVENTED`.
    """
    if row["embedding_normalized_std"] < COMPLETE_BELOW * untrained["embedding_normalized_std"]:
        return COMPLETE
    return DIMENSIONAL if row["embedding_effective_rank"] < LEAST_RANK else PREVENTED


def run_arm(name: str, images: ScoredImages, num_steps: int, seed: int) -> dict[str, Any]:
    """Trains an arm and measures it on the way.

    Args:
        name: One of `ARMS`.
        images: Trained on without labels; measured and scored on the held-out ones.
        num_steps: Optimiser steps, at least 1.
        seed: Of weights, order of images, views and masks.

    Returns:
        What is written of it: `rows` (the values of each number, in order of steps), `happened`, `verdict` of
        `judge_collapse` and its reason, `untrained_knn` and `knn`, `deviations` at the end, `seconds`.

    Raises:
        ArithmeticError: If the loss becomes NaN or infinite.
    """
    begun, family = time.process_time(), new_family(name, seed)
    pixels, labels = images.train_pixels, torch.from_numpy(images.train_labels)
    order, draws = (torch.Generator().manual_seed(2 * seed + number) for number in range(2))
    optimizer, meter = make_optimizer(family), Meter(images.test_pixels[:NUM_MEASURED], num_steps)
    found: dict[str, Any] = {"arm": name, "seed": seed, "untrained_knn": score(family, images)}
    meter.measure(family, 0, None, None)
    kept, at_rows = 1.0, {round(num_steps * number / NUM_ROWS) for number in range(1, NUM_ROWS + 1)}
    for step in range(1, num_steps + 1):
        chosen = torch.randint(len(pixels), (SETTINGS.batch_size,), generator=order)
        values = step_values(step, num_steps, SETTINGS)
        loss = training_step(family, optimizer, pixels[chosen], labels[chosen], draws, *values)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss of {name} is {loss} in step {step}.")
        kept *= 0.0 if isinstance(family, IJepaWithGradient) else values[2]
        if step in at_rows:
            embeddings = meter.measure(family, step, loss, 1 - kept)
            kept = 1.0
    verdict = judge_collapse(meter.judged)
    return {
        **found,
        "knn": score(family, images),
        "deviations": deviations(embeddings),
        "happened": what_happened(meter.rows[-1], meter.rows[0]),
        "verdict": verdict.name,
        "verdict_reason": verdict.reason,
        "seconds": time.process_time() - begun,
        "rows": {name: [row[name] for row in meter.rows] for name in meter.rows[0]},
    }


# -- table and picture -----------------------------------------------------------------------------------------------

_NAME_GAP = 0.055  # between names of lines, of a panel's height
_SAID_AT = 104  # on the axis of the scores, beyond them
_Groups = list[tuple[str, list[Mapping[str, Any]]]]  # arms, and the runs of each
_PANELS = (  # title, y, x, scale of y
    ("Complete collapse: normalised deviation", "1 = all directions alike", "optimiser step", "log"),
    ("Dimensional collapse: effective rank", "directions", "optimiser step", "linear"),
    ("Spectra at the end", "deviation along a direction", "principal direction", "log"),
)


class _Curve(NamedTuple):
    arm: Arm
    x: Sequence[float]
    values: np.ndarray  # [seeds, len(x)]


def render_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table in markdown: rows before training, then a row for each arm.

    Args:
        runs: From `run_arm`, of one seed or several; of several, the mean stands before the range.

    Returns:
        The text, with a line's end.
    """
    head = ["training", "deviation", "effective rank", "explained by position", "kNN-20", "embeddings", "patches"]
    lines = [head, ["---"] * len(head)]
    groups = by_arm(runs)
    lines.append(["before", *_numbers(groups[0][1], 0, "pooled", "untrained_knn"), "", ""])
    projected = [own for name, own in groups if name.startswith("byol")]
    if projected:
        lines.append(["before, BYOL's projections", *_numbers(projected[0], 0, "embedding", "untrained_knn"), "", ""])
    for name, own in groups:
        said = [_counted(run[key] for run in own) for key in ("happened", "verdict")]
        lines.append([ARMS[name].title, *_numbers(own, -1, "embedding", "knn"), *said])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def by_arm(runs: Sequence[Mapping[str, Any]]) -> _Groups:
    """Each arm that was run, in the order of `ARMS`, with its runs."""
    groups = [(name, [run for run in runs if run["arm"] == name]) for name in ARMS]
    return [(name, own) for name, own in groups if own]


def _numbers(runs: Sequence[Mapping[str, Any]], place: int, kind: str, score: str) -> list[str]:
    columns = ((f"{kind}_normalized_std", 3), (f"{kind}_effective_rank", 1), ("position_share", 2))
    cells = [_spread([run["rows"][key][place] for run in runs], digits) for key, digits in columns]
    return [*cells, _spread([100 * run[score] for run in runs], 1)]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _counted(words: Iterable[str]) -> str:
    counts = Counter(words)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{word} {count}x" for word, count in counts.items())


def draw_figure(runs: Sequence[Mapping[str, Any]], path: str | Path) -> Figure:
    """Draws deviation and effective rank over the steps, the spectra at the end, and what neighbours say.

    Args:
        runs: From `run_arm`; of several seeds, lines are means and bands go from the least to the largest.
        path: PNG to write; its folder must exist.

    Returns:
        The figure: four panels, each line named at its end.
    """
    figure = Figure(figsize=(11.5, 8.6), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2).ravel()
    groups = by_arm(runs)
    all_curves = [_over_steps(groups, "embedding_normalized_std"), _over_steps(groups, "embedding_effective_rank")]
    all_curves.append(_spectra(groups))
    for axis, curves, (title, y, x, scale) in zip(axes, all_curves, _PANELS, strict=False):
        _draw_curves(axis, curves, scale)
        if scale == "linear":
            axis.set_ylim(bottom=0)
            axis.axhline(LEAST_RANK, color=FAINT_COLOR, linewidth=1, linestyle=":")
            axis.annotate(DIMENSIONAL, (0, 0), (3, 3), textcoords="offset points", va="bottom", fontsize=8,
                          color=FAINT_COLOR)  # fmt: skip
        _name_curves(axis, curves)
        _name_axes(axis, title, y, x)
    _draw_scores(axes[3], groups)
    title = "One encoder, eight objectives: embeddings of the same held-out images"
    figure.suptitle(title, fontsize=11, color=TEXT_COLOR, x=0.01, ha="left")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(path, dpi=DPI)
    return figure


def _over_steps(groups: _Groups, key: str) -> list[_Curve]:
    return [
        _Curve(
            ARMS[name],
            own[0]["rows"]["step"],
            np.array([run["rows"][key] for run in own]),
        )
        for name, own in groups
    ]


def _spectra(groups: _Groups) -> list[_Curve]:
    """All directions but the last, along which the encoder's layer norm leaves nothing."""
    return [
        _Curve(ARMS[name], range(1, len(own[0]["deviations"])), np.array([run["deviations"][:-1] for run in own]))
        for name, own in groups
    ]


def _draw_curves(axis: Axes, curves: Sequence[_Curve], scale: str) -> None:
    for curve in curves:
        axis.plot(curve.x, curve.values.mean(axis=0), color=curve.arm.color, linestyle=curve.arm.style, linewidth=1.6)
        if len(curve.values) > 1:
            low, high = curve.values.min(axis=0), curve.values.max(axis=0)
            axis.fill_between(curve.x, low, high, color=curve.arm.color, alpha=0.15, linewidth=0)
    axis.set_yscale(scale)
    axis.margins(x=0)


def _name_curves(axis: Axes, curves: Sequence[_Curve]) -> None:
    """Writes each curve's name beside its end, names apart from each other; limits have to be settled before."""
    to_axes = axis.transScale + axis.transLimits
    ends = [float(to_axes.transform((0, curve.values.mean(axis=0)[-1]))[1]) for curve in curves]
    order = sorted(range(len(curves)), key=lambda number: ends[number])
    places = dict(zip(order, _spread_apart([ends[number] for number in order], _NAME_GAP), strict=True))
    for number, curve in enumerate(curves):
        axis.annotate(
            curve.arm.title, (1.0, ends[number]), (1.04, places[number]), xycoords="axes fraction",
            textcoords="axes fraction", va="center", fontsize=8.5, color=curve.arm.color,
            arrowprops={"arrowstyle": "-", "color": curve.arm.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Moves rising places up until none is nearer than `gap` to the one below, then all back down as far as needed."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, 0.0))
    limit = 1.0
    for number in reversed(range(len(moved))):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - gap
    return moved


def _draw_scores(axis: Axes, groups: _Groups) -> None:
    """A line an arm, from its worst to its best seed, and what happened beside it."""
    untrained = 100 * statistics.fmean(run["untrained_knn"] for run in groups[0][1])
    axis.axvline(untrained, color=FAINT_COLOR, linewidth=1, linestyle=":")
    axis.annotate("untrained", (untrained, 1.0), (3, -3), xycoords=("data", "axes fraction"), va="top",
                  textcoords="offset points", fontsize=8, color=FAINT_COLOR)  # fmt: skip
    for place, (name, runs) in enumerate(groups):
        arm, values = ARMS[name], [100 * run["knn"] for run in runs]
        axis.plot([min(values), max(values)], [place, place], color=arm.color, linewidth=1.6)
        axis.plot(statistics.fmean(values), place, "o", color=arm.color, markersize=7,
                  markerfacecolor=arm.color if arm.style == "-" else "white")  # fmt: skip
        said = _counted(run["happened"] for run in runs)
        axis.annotate(said, (_SAID_AT, place), va="center", fontsize=8, color=FAINT_COLOR)
    _name_axes(axis, "What neighbours say of the features", "", "kNN-20 top-1, %")
    axis.set_ylim(len(groups) - 0.5, -0.9)
    axis.set_xlim(0, 172)  # room for what happened
    axis.set_xticks(range(0, 101, 20))
    axis.grid(visible=False, axis="y")
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", length=0)
    axis.set_yticks(range(len(groups)), [ARMS[name].title for name, _ in groups])
    for label, (name, _) in zip(axis.get_yticklabels(), groups, strict=True):
        label.set_color(ARMS[name].color)
        label.set_fontsize(8.5)


def _name_axes(axis: Axes, title: str, y: str, x: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold", color=TEXT_COLOR)
    axis.set_ylabel(y, fontsize=9, color=FAINT_COLOR)
    axis.set_xlabel(x, fontsize=9, color=FAINT_COLOR)
    plain_frame(axis)


# -- command ---------------------------------------------------------------------------------------------------------


def write_results(runs: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """Writes table, numbers and picture into the output folder.

    Args:
        runs: From `run_arm`.
        arguments: The flags.
    """
    folder = arguments.output_dir
    words = [f"--steps {arguments.steps}", f"--seed {' '.join(map(str, arguments.seed))}"]
    results = {
        "command": " ".join(["python examples/comparison/collapse_laboratory.py", *words]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "network": {name: getattr(NETWORK, name) for name in NETWORK_FIELDS},
            "views": dataclasses.asdict(VIEWS),
            "training": {"steps": arguments.steps, **dataclasses.asdict(SETTINGS)},
            "temperature": TEMPERATURE,
            "agreement_weight": AGREEMENT_WEIGHT,
            "variance_weight": VARIANCE_WEIGHT,
            "covariance_weight": COVARIANCE_WEIGHT,
            "head_width": HEAD_WIDTH,
        },
        "runs": runs,
    }
    (folder / f"{STEM}.json").write_text(json.dumps(_rounded(results)) + "\n", "utf-8")
    (folder / f"{STEM}.md").write_text(render_table(runs), "utf-8")
    draw_figure(runs, folder / f"{STEM}.png")


def _rounded(value: Any) -> Any:
    """The same with five digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the flags."""
    parser = argparse.ArgumentParser(description="Complete and dimensional collapse, and what prevents them.")
    parser.add_argument("--steps", type=int, default=400, help="of each training; 400 if not given")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], metavar="SEED", help="one or several")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/collapse-laboratory"))
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1, for example 400.")
    if min(arguments.seed) < 0 or len(set(arguments.seed)) < len(arguments.seed):
        parser.error(f"--seed {' '.join(map(str, arguments.seed))} must be different numbers of 0 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parse(argv)
    torch.set_num_threads(1)  # sums of several threads depend on how many there are
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    images = load_scored_images("digits", NETWORK.image_shape)
    runs = []
    for seed in arguments.seed:
        for name in (name for name in ARMS if name in arguments.arms):
            runs.append(run_arm(name, images, arguments.steps, seed))
            said = f"{runs[-1]['happened']}, {runs[-1]['seconds']:.0f} s"
            print(f"seed {seed}, {ARMS[name].title}: {said}", flush=True)
    write_results(runs, arguments)
    print(f"\n{render_table(runs)}\n{arguments.output_dir / STEM}.md, .json and .png")


if __name__ == "__main__":
    main()
