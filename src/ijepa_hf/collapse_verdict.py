"""What the rows of `collapse_monitor` mean: is this run healthy, and if not, what is wrong and what to try next.

A rule is a threshold on numbers of one row. A failure has to hold in two rows in a row before it is said, so that the
noise of one is no alarm. Thresholds were fixed on runs on `digits`, healthy and broken on purpose, and then tried on
other data unchanged: docs/collapse.md has the table.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PATIENCE = 2  # rows in which a failure has to hold
LEAST_STD = 0.2  # of patches of unit length, where 1 is all directions alike: below is complete collapse
LEAST_RANK = 4.0  # effective rank of centred patches: below is dimensional collapse
MOST_POSITION_SHARE = 0.9  # of the variance of patches: above is positional collapse
LEAST_RATIO = 0.01  # of predictions' variation beside their targets': below, the predictor is dead
PREDICTOR_PROGRESS = 0.15  # share of the run before which a predictor need not have learned anything
LEAST_MOVED = 0.1  # of the way that the target encoder should have gone: below, the moving average is stuck
LEAST_EXPECTED = 1e-3  # of the way to the context encoder, between two rows
EMA_PROGRESS = 0.9  # share of the run after which a target encoder may stand still, as its schedule says
LOSS_RISE = 1.1  # times its least value

HEALTHY, LOSS_RISING, UNKNOWN = "healthy", "loss rising, but fine", "not judged yet"
COMPLETE, DIMENSIONAL, POSITIONAL = "complete collapse", "dimensional collapse", "positional collapse"
PREDICTOR_DEAD, EMA_STUCK = "predictor dead", "EMA stuck"
FAILURES = (COMPLETE, DIMENSIONAL, POSITIONAL, PREDICTOR_DEAD, EMA_STUCK)
VERDICTS = (HEALTHY, LOSS_RISING, *FAILURES, UNKNOWN)


@dataclass(frozen=True)
class CollapseVerdict:
    """A judgement.

    Args:
        name: One of `VERDICTS`.
        step: Optimiser step of the row that it is about; `None` for a model without a run.
        numbers: What it rests on, by the names of a row.
        reason: A sentence with these numbers.
        advice: What to try next, with flags; empty where there is nothing to do.
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
    name: str
    holds: Callable[[Mapping[str, Any]], bool]
    numbers: tuple[str, ...]
    reason: str
    advice: str


def _value(row: Mapping[str, Any], name: str, missing: float) -> float:
    value = row.get(name)
    return missing if value is None else float(value)


def _progress(row: Mapping[str, Any]) -> float:
    """Of a model without a run it is 1: it has had its time."""
    return _value(row, "progress", 1.0)


def _is_complete(row: Mapping[str, Any]) -> bool:
    return min(_value(row, f"{part}_patch_std", 1.0) for part in ("target", "context")) < LEAST_STD


def _is_dimensional(row: Mapping[str, Any]) -> bool:
    return min(_value(row, f"{part}_patch_effective_rank", LEAST_RANK) for part in ("target", "context")) < LEAST_RANK


def _is_positional(row: Mapping[str, Any]) -> bool:
    return _value(row, "target_position_share", 0.0) > MOST_POSITION_SHARE


def _ignores_image(row: Mapping[str, Any]) -> bool:
    return _progress(row) >= PREDICTOR_PROGRESS and _value(row, "prediction_image_ratio", 1.0) < LEAST_RATIO


def _ignores_place(row: Mapping[str, Any]) -> bool:
    return _progress(row) >= PREDICTOR_PROGRESS and _value(row, "prediction_place_ratio", 1.0) < LEAST_RATIO


def _is_stuck(row: Mapping[str, Any]) -> bool:
    moved, expected = row.get("target_moved"), row.get("ema_expected")
    if moved is None or expected is None:
        return False
    if expected < LEAST_EXPECTED:  # the momentum itself keeps it where it is
        return _progress(row) < EMA_PROGRESS
    return bool(moved < LEAST_MOVED * expected)


# In the order in which they are asked: whatever is wrong with the moving average or the predictor comes before what
# follows from it.
_RULES = (
    _Rule(
        COMPLETE,
        _is_complete,
        ("target_patch_std", "context_patch_std", "target_patch_cosine"),
        "patches of all images have nearly the same representation: their deviation is {target_patch_std:.3f} in "
        "the target encoder and {context_patch_std:.3f} in the context encoder, where below "
        f"{LEAST_STD} is collapse and 1 is all directions alike.",
        "Go back to the last checkpoint before it and try a lower --learning_rate or a longer --warmup_epochs; keep "
        "--ema_momentum 0.996 or more and --normalize_targets True.",
    ),
    _Rule(
        EMA_STUCK,
        _is_stuck,
        ("target_moved", "ema_expected"),
        "the target encoder has gone {target_moved:.4f} of the way to the context encoder since the last row, and its "
        "momentum makes that {ema_expected:.4f}.",
        "Use --ema_momentum 0.996 --final_ema_momentum 1.0, and in a loop of your own call "
        "model.update_target_encoder(momentum) after each optimiser step.",
    ),
    _Rule(
        PREDICTOR_DEAD,
        _ignores_place,
        ("prediction_place_ratio", "prediction_skill"),
        "the predictor says the same for every place of an image: its predictions vary {prediction_place_ratio:.4f} "
        "times as much as their targets inside an image.",
        "Check that the predictor gets positions and learns (grad_norm_predictor in metrics.jsonl); --new_predictor "
        "starts it afresh.",
    ),
    _Rule(
        PREDICTOR_DEAD,
        _ignores_image,
        ("prediction_image_ratio", "cross_image_gap"),
        "the predictor says the same for every image: at one place its predictions vary {prediction_image_ratio:.4f} "
        "times as much as their targets, and the cross-image gap is {cross_image_gap:.4f}.",
        "Check that it gets the context and learns (grad_norm_predictor in metrics.jsonl); try a higher "
        "--context_keep_ratio, or --new_predictor.",
    ),
    _Rule(
        POSITIONAL,
        _is_positional,
        ("target_position_share", "cross_image_gap", "possible_gap"),
        "patches say where they are and not what they show: position alone explains {target_position_share:.2f} of "
        f"their variance, where above {MOST_POSITION_SHARE} is collapse.",
        "Leave out --patch_init_std (its default fits the patch size), or use larger patches.",
    ),
    _Rule(
        DIMENSIONAL,
        _is_dimensional,
        ("target_patch_effective_rank", "context_patch_effective_rank", "context_lidar"),
        "patches differ along few directions only: their effective rank is {target_patch_effective_rank:.1f} in the "
        f"target encoder and {{context_patch_effective_rank:.1f}} in the context encoder, where below {LEAST_RANK:g} "
        "is collapse.",
        "Try a lower --learning_rate or --weight_decay, and keep --ema_momentum 0.996 or more.",
    ),
)  # fmt: skip


def judge_collapse(rows: Sequence[Mapping[str, Any]]) -> CollapseVerdict:
    """Judges a run by all its rows, or a model by the only one.

    Args:
        rows: From `CollapseMonitor.measure`, in the order of steps, each with `step`, `progress` (share of the run)
            and `ema_expected` (share of the way to the context encoder that the momenta since the row before make); a
            row without them is a model's.

    Returns:
        The verdict on the newest row. A failure is only one that held in the newest two rows; a single row of a model
        is judged alone, and a run that has one row only is not judged yet.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("rows is empty; there is nothing to judge.")
    last = rows[-1]
    step = None if last.get("step") is None else int(last["step"])
    if step is not None and len(rows) < PATIENCE:
        return CollapseVerdict(UNKNOWN, step, {}, f"a run is judged from its {PATIENCE}nd row on.", "")
    recent = rows[-PATIENCE:] if step is not None else rows[-1:]
    for rule in _RULES:
        if all(rule.holds(row) for row in recent):
            numbers = {name: _value(last, name, float("nan")) for name in rule.numbers}
            return CollapseVerdict(rule.name, step, numbers, rule.reason.format(**numbers), rule.advice)
    return _judge_healthy(rows, step)


def _judge_healthy(rows: Sequence[Mapping[str, Any]], step: int | None) -> CollapseVerdict:
    last = rows[-1]
    names = ("target_patch_std", "target_patch_effective_rank", "target_position_share", "cross_image_gap")
    numbers = {name: float(last[name]) for name in names if last.get(name) is not None}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    losses = [float(row["loss"]) for row in rows[1:] if row.get("loss") is not None]  # the first is before training
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
