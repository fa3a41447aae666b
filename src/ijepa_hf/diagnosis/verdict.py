"""Judges the rows of `diagnosis.monitor`: is this run healthy, and if not, what is wrong and what to try next.

A rule is a threshold on numbers of one row. A failure must hold in two successive rows, so that the noise of one row
raises no alarm. Thresholds were fixed on runs on `digits`, healthy and broken on purpose, and then tried unchanged on
other data: docs/collapse.md has the table.

`SIGNS_OF_PARTS` and `SINGLE_SIGNS` list the numbers of a row that are shown, with their words in the table of
`ijepa-hf diagnose` and their panel in the picture. A new sign of collapse is computed in `diagnosis/monitor.py` and
gets one line here; a new rule is one more entry of `_RULES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

PATIENCE = 2  # rows in which a failure has to hold
LEAST_STD = 0.2  # of patches of unit length, where 1 is all directions alike: below is complete collapse
LEAST_RANK = 4.0  # effective rank of centred patches: below is dimensional collapse
MOST_POSITION_SHARE = 0.9  # of the variance of patches: above is positional collapse
LEAST_RATIO = 0.01  # of predictions' variation beside their targets': below, the predictor is dead
PREDICTOR_PROGRESS = 0.15  # share of the run before which a predictor need not have learned anything
PREDICTOR_STEPS = 100  # and steps before which it need not
LEAST_MOVED = 0.1  # of the distance that the momentum implies; below, the moving average is stuck
LEAST_EXPECTED = 1e-3  # of the way to the context encoder, between two rows: less may be rounding
STILL = 1e-9  # of the way: the momentum is 1
EMA_PROGRESS = 0.9  # share of the run after which the momentum may be 1, as its schedule says
LOSS_RISE = 1.1  # times its least value

HEALTHY, LOSS_RISING, UNKNOWN = "healthy", "loss rising, but fine", "not judged yet"
COMPLETE, DIMENSIONAL, POSITIONAL = "complete collapse", "dimensional collapse", "positional collapse"
PREDICTOR_DEAD, EMA_STUCK = "predictor dead", "EMA stuck"
FAILURES = (COMPLETE, DIMENSIONAL, POSITIONAL, PREDICTOR_DEAD, EMA_STUCK)
VERDICTS = (HEALTHY, LOSS_RISING, *FAILURES, UNKNOWN)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """Holds the texts and the limit, drawn as a dashed line, of a panel of the picture of a run's rows."""

    title: str
    unit: str
    limit: float | None = None
    limit_text: str = ""


@dataclass(frozen=True)
class Sign:
    """Says how a number of a row is shown.

    Args:
        name: Its name in the row, without the `target_`, `context_` or `prediction_` of a number of each part.
        words: Its name in the table of `ijepa-hf diagnose`; empty for a number that only the picture shows.
        panel: The panel that it is drawn in, if any.
        line: Its name in the legend of the panel; a number of each part has the names of the parts.
    """

    name: str
    words: str
    panel: Panel | None = None
    line: str = ""


_GAP = Panel("Cross-image gap", "difference of cosines")
_VARIATION = Panel("Variation of predictions", "times that of the targets")
SIGNS_OF_PARTS = (
    Sign("pooled_cosine", "mean pairwise cosine, images"),
    Sign("patch_cosine", "mean pairwise cosine, patches"),
    Sign("pooled_normalized_std", "normalised deviation, images"),
    Sign(
        "patch_normalized_std",
        "normalised deviation, patches",
        Panel("Normalised deviation of patches", "1 = all directions alike", LEAST_STD, "below: complete collapse"),
    ),
    Sign("pooled_rankme", "RankMe, images"),
    Sign("patch_rankme", "RankMe, patches"),
    Sign("pooled_effective_rank", "effective rank, images"),
    Sign(
        "patch_effective_rank",
        "effective rank, patches",
        Panel("Effective rank of patches", "directions", LEAST_RANK, "below: dimensional collapse"),
    ),
    Sign("patch_stable_rank", "stable rank, patches"),
    Sign("patch_spectrum_slope", "spectrum slope, patches"),
    Sign("patch_dead_dimensions", "dead dimensions, patches"),
    Sign(
        "position_share",
        "variance explained by position",
        Panel("Variance explained by position", "share", MOST_POSITION_SHARE, "target above: positional collapse"),
    ),
)
SINGLE_SIGNS = (
    Sign("context_lidar", "LiDAR of the context encoder, images"),
    Sign("cross_image_gap", "cross-image gap", _GAP, "predictions"),
    Sign("perfect_gap", "gap of perfect predictions", _GAP, "of perfect predictions"),
    Sign("prediction_skill", "share of the targets' variance predicted"),
    Sign("prediction_image_ratio", "variation of predictions between images", _VARIATION, "between images"),
    Sign("prediction_place_ratio", "variation of predictions between places", _VARIATION, "between places"),
    Sign("target_distance", "distance of the encoders' weights"),
    Sign("target_moved", "distance that the target encoder moved"),
    Sign("ema_expected", "distance that its momentum implies"),
    Sign("loss", "", Panel("Loss on the fixed images", "mean over target values")),
)


@dataclass(frozen=True)
class CollapseVerdict:
    """Holds a judgement.

    Args:
        name: One of `VERDICTS`.
        step: Optimiser step of the judged row; `None` for a model without a run.
        numbers: The numbers that decided, by their names in a row.
        reason: A sentence with these numbers.
        advice: What to try next, with flags; empty if nothing is wrong.
    """

    name: str
    step: int | None
    numbers: Mapping[str, float]
    reason: str
    advice: str

    @property
    def is_failure(self) -> bool:
        """Whether something is wrong."""
        return self.name in FAILURES

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields and `is_failure`, as JSON can hold them."""
        return {**dataclasses.asdict(self), "numbers": dict(self.numbers), "is_failure": self.is_failure}

    def __str__(self) -> str:
        return " ".join([f"{self.name}: {self.reason}", *([self.advice] if self.advice else [])])


@dataclass(frozen=True)
class _Rule:
    """Holds how a failure is recognised.

    Args:
        name: One of `FAILURES`.
        applies: Whether a row has what the rule needs.
        holds: Whether such a row shows the failure.
        numbers: Names of the numbers that decide.
        reason: Gives a sentence with them.
        advice: What to try.
    """

    name: str
    applies: Callable[[Row], bool]
    holds: Callable[[Row], bool]
    numbers: tuple[str, ...]
    reason: Callable[[Row], str]
    advice: str


def _least(row: Row, name: str) -> float | None:
    """Returns the lower of both encoders' numbers, or the only one of a model with one encoder."""
    values = [float(row[key]) for key in (f"target_{name}", f"context_{name}") if row.get(key) is not None]
    return min(values, default=None)


def _of_encoders(row: Row, name: str, form: str) -> str:
    parts = {"target encoder": row.get(f"target_{name}"), "context encoder": row.get(f"context_{name}")}
    return " and ".join(f"{value:{form}} in the {part}" for part, value in parts.items() if value is not None)


def _below(name: str, limit: float) -> tuple[Callable[[Row], bool], Callable[[Row], bool]]:
    return lambda row: _least(row, name) is not None, lambda row: cast(float, _least(row, name)) < limit


def _predictor_had_time(name: str) -> Callable[[Row], bool]:
    """Returns a check whether the predictor has trained long enough; without a run it counts as trained."""
    return lambda row: (
        row.get(name) is not None
        and row.get("progress", 1.0) >= PREDICTOR_PROGRESS
        and row.get("step", PREDICTOR_STEPS) >= PREDICTOR_STEPS
    )


def _has_ema(row: Row) -> bool:
    moved, expected = row.get("target_moved"), row.get("ema_expected")
    if moved is None or expected is None:  # the first row, or one after steps that left both encoders alone
        return False
    return bool(expected >= LEAST_EXPECTED or (expected < STILL and row.get("progress", 1.0) < EMA_PROGRESS))


# In the order in which they are tried: a broken moving average or predictor comes before what follows from it.
_RULES = (
    _Rule(
        COMPLETE,
        *_below("patch_normalized_std", LEAST_STD),
        ("target_patch_normalized_std", "context_patch_normalized_std", "target_patch_cosine"),
        lambda row: (
            "patches of all images have nearly the same representation: their normalised deviation is "
            f"{_of_encoders(row, 'patch_normalized_std', '.3f')}, where below {LEAST_STD} is collapse and 1 is all "
            "directions alike."
        ),
        "Go back to the last checkpoint before it and try a lower --learning_rate or a longer --warmup_epochs; keep "
        "--ema_momentum 0.996 or more and --normalize_targets True.",
    ),
    _Rule(
        EMA_STUCK,
        _has_ema,
        lambda row: row["ema_expected"] < STILL or row["target_moved"] < LEAST_MOVED * row["ema_expected"],
        ("target_moved", "ema_expected"),
        lambda row: (
            f"the target encoder has gone {row['target_moved']:.4f} of the way to the context encoder between two "
            f"rows, and its momentum makes that {row['ema_expected']:.4f}."
        ),
        "Use --ema_momentum 0.996 --final_ema_momentum 1.0, and in a loop of your own call "
        "model.update_target_encoder(momentum) after each optimiser step.",
    ),
    _Rule(
        PREDICTOR_DEAD,
        _predictor_had_time("prediction_place_ratio"),
        lambda row: row["prediction_place_ratio"] < LEAST_RATIO,
        ("prediction_place_ratio", "prediction_skill"),
        lambda row: (
            "the predictor predicts the same at every position of an image: its predictions vary "
            f"{row['prediction_place_ratio']:.4f} times as much as their targets inside an image, where below "
            f"{LEAST_RATIO} is dead."
        ),
        "Check that the predictor gets positions and learns (grad_norm_predictor in metrics.jsonl); --new_predictor "
        "starts it afresh.",
    ),
    _Rule(
        PREDICTOR_DEAD,
        _predictor_had_time("prediction_image_ratio"),
        lambda row: row["prediction_image_ratio"] < LEAST_RATIO,
        ("prediction_image_ratio", "cross_image_gap"),
        lambda row: (
            "the predictor predicts the same for every image: at one position its predictions vary "
            f"{row['prediction_image_ratio']:.4f} times as much as their targets, where below {LEAST_RATIO} is dead."
        ),
        "Check that it gets the context and learns (grad_norm_predictor in metrics.jsonl); try a higher "
        "--context_keep_ratio or a lower --weight_decay, or --new_predictor.",
    ),
    _Rule(
        POSITIONAL,
        lambda row: row.get("target_position_share") is not None,
        lambda row: row["target_position_share"] > MOST_POSITION_SHARE,
        ("target_position_share", "cross_image_gap", "perfect_gap"),
        lambda row: (
            "patches encode their position and not their content: position alone explains "
            f"{row['target_position_share']:.2f} of their variance, where above {MOST_POSITION_SHARE} is collapse."
        ),
        "Leave out --patch_init_std (its default fits the patch size), or use larger patches.",
    ),
    _Rule(
        DIMENSIONAL,
        *_below("patch_effective_rank", LEAST_RANK),
        ("target_patch_effective_rank", "context_patch_effective_rank", "context_lidar"),
        lambda row: (
            "patches differ along few directions only: their effective rank is "
            f"{_of_encoders(row, 'patch_effective_rank', '.1f')}, where below {LEAST_RANK:g} is collapse."
        ),
        "Try a lower --learning_rate or --weight_decay, and keep --ema_momentum 0.996 or more.",
    ),
)


def judge_collapse(rows: Sequence[Row]) -> CollapseVerdict:
    """Judges a run by all its rows, or a model by the only one.

    Args:
        rows: From `CollapseMonitor.measure`, in the order of steps, each with `step`, `progress` (share of the run)
            and `ema_expected` (share of the way to the context encoder, by the momenta since the previous row;
            `None` if the encoders stood still on purpose). A row without `step` is that of a model. Only rows of
            the newest row's images (`batch`) count.

    Returns:
        The verdict at the newest row. A failure must hold in the newest two rows to which its rule applies; the row
        of a model is judged alone. A run with one row, or with rows without numbers, is not judged yet.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("rows is empty; there is nothing to judge.")
    last = rows[-1]
    rows = [row for row in rows if row.get("batch") == last.get("batch")]
    step = None if last.get("step") is None else int(last["step"])
    needed = 1 if step is None else PATIENCE
    if len(rows) < needed:
        return CollapseVerdict(UNKNOWN, step, {}, f"a run is judged by {PATIENCE} rows or more.", "")
    if not any(rule.applies(last) for rule in _RULES):
        return CollapseVerdict(UNKNOWN, step, {}, "the newest row has none of the numbers that a verdict needs.", "")
    for rule in _RULES:
        recent = [row for row in rows if rule.applies(row)][-needed:]
        if len(recent) == needed and all(map(rule.holds, recent)):
            numbers = {name: float(recent[-1][name]) for name in rule.numbers if recent[-1].get(name) is not None}
            return CollapseVerdict(rule.name, step, numbers, rule.reason(recent[-1]), rule.advice)
    return _judge_healthy(rows, step)


def _judge_healthy(rows: Sequence[Row], step: int | None) -> CollapseVerdict:
    last = rows[-1]
    names = (
        "target_patch_normalized_std", "target_patch_effective_rank", "target_position_share", "cross_image_gap",
    )  # fmt: skip
    numbers = {name: float(last[name]) for name in names if last.get(name) is not None}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    losses = [float(row["loss"]) for row in rows if row.get("loss") is not None and row.get("step") != 0]
    if losses and losses[-1] > LOSS_RISE * min(losses):
        numbers |= {"loss": losses[-1], "least_loss": min(losses)}
        return CollapseVerdict(
            LOSS_RISING,
            step,
            numbers,
            f"the loss is {losses[-1]:.4f} and was {min(losses):.4f}, while no sign of collapse shows ({shown}): "
            "targets that hold more are harder to predict.",
            "Judge by --eval_steps, not by the loss.",
        )
    return CollapseVerdict(HEALTHY, step, numbers, f"no sign of collapse ({shown}).", "")
