"""Trains healthy and broken runs, and records which of them the collapse monitor names, and when.

    python benchmarks/collapse.py run --output_dir runs/collapse        trains what is missing (hours on one core)
    python benchmarks/collapse.py judge --output_dir runs/collapse      judges the rows; --results writes JSON

Each run is `ijepa-hf pretrain` in a process of its own, broken by replacing a part of the model or by its flags. The
thresholds of `collapse_verdict` were fixed on `digits`; `shapes` and `cifar10` are judged with the same. Broken runs
end at 30 % of their length, since a quarter of it is the limit for naming them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HEALTHY_SEEDS = range(8)
BROKEN_SEEDS = (0,)
BROKEN_SHARE = 0.3  # of its length that a broken run is trained for
WHOLE = ("healthy", "targets not normalised")  # trained to the end; the latter to see whether it is broken at all
LIMIT_SHARE = 0.25  # of its length within which a broken run has to be named

_NETWORK = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "predictor_hidden_size": 32,
    "predictor_num_hidden_layers": 2,
    "context_keep_ratio": 0.4,
    "start_learning_rate": 1e-4,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-6,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
}
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {"recipe": "digits"},
    "shapes": {
        **_NETWORK, "dataset_name": "shapes", "eval_split_name": "test", "max_eval_samples": 200, "image_size": 48,
        "patch_size": 6, "min_crop_scale": 0.5, "per_device_train_batch_size": 32, "max_train_steps": 900,
        "warmup_epochs": 0.6, "num_cpu_threads": 1,
    },
    "cifar10": {
        **_NETWORK, "eval_split_name": "test", "max_eval_samples": 200, "image_size": 32, "patch_size": 4,
        "min_crop_scale": 0.3, "per_device_train_batch_size": 32, "max_train_steps": 900, "warmup_epochs": 0.06,
        "num_cpu_threads": 1, "max_train_samples": 50_000,
    },
}  # fmt: skip


def gradient_into_target() -> None:
    """The targets are the context encoder's own, and learn: no stop-gradient and no moving average."""
    from torch.nn.functional import layer_norm

    from ijepa_hf import IJepaForPretraining
    from ijepa_hf.model.encoder_ijepa import gather_patches
    from ijepa_hf.model.modeling_ijepa import TARGET_NORM_EPS

    def encode_targets(self: Any, pixel_values: Any, target_indices: Any) -> Any:
        features = self.context_encoder(pixel_values).last_hidden_state
        if self.config.normalize_targets:
            features = layer_norm(features, features.shape[-1:], eps=TARGET_NORM_EPS)
        return gather_patches(features, target_indices)

    IJepaForPretraining.encode_targets = encode_targets  # type: ignore[method-assign]


def target_never_moves() -> None:
    """The moving average is forgotten."""
    from ijepa_hf import IJepaForPretraining

    IJepaForPretraining.update_target_encoder = lambda self, momentum: None  # type: ignore[method-assign]


def predictor_without_position() -> None:
    """The predictor's position table is zero: it cannot know which patch it is asked for."""
    from ijepa_hf.model.modeling_ijepa import IJepaPredictor

    forward = IJepaPredictor.forward

    def blind(self: Any, *args: Any) -> Any:
        self.position_embeddings.zero_()
        return forward(self, *args)

    IJepaPredictor.forward = blind  # type: ignore[method-assign]


def predictor_without_context() -> None:
    """The predictor gets zeros instead of the context: all it can say is what is usual at a place."""
    from ijepa_hf.model.modeling_ijepa import IJepaPredictor

    forward = IJepaPredictor.forward

    def blind(self: Any, context: Any, *args: Any) -> Any:
        return forward(self, context * 0, *args)

    IJepaPredictor.forward = blind  # type: ignore[method-assign]


def predictor_stuck() -> None:
    """The predictor's last layer is zero and never learns."""
    from ijepa_hf.model.modeling_ijepa import IJepaPredictor

    forward = IJepaPredictor.forward

    def zero(self: Any, *args: Any) -> Any:
        return forward(self, *args) * 0

    IJepaPredictor.forward = zero  # type: ignore[method-assign]


# what is broken: flags, and what is replaced in the process
BROKEN: dict[str, tuple[dict[str, Any], Callable[[], None] | None]] = {
    "gradient into the target": ({}, gradient_into_target),
    "momentum 0, learning rate 1e-2": (
        {"ema_momentum": 0.0, "final_ema_momentum": 0.0, "learning_rate": 1e-2}, None,
    ),
    "targets not normalised": ({"normalize_targets": False}, None),
    "targets not normalised, momentum 0": (
        {"normalize_targets": False, "ema_momentum": 0.0, "final_ema_momentum": 0.0}, None,
    ),
    "patch_init_std 0.02": ({"patch_init_std": 0.02}, None),
    "predictor without position": ({}, predictor_without_position),
    "predictor without context": ({}, predictor_without_context),
    "predictor gives zeros": ({}, predictor_stuck),
    "target never moves": ({}, target_never_moves),
    "weight decay 10": ({"weight_decay": 10.0, "final_weight_decay": 10.0}, None),
}  # fmt: skip


def runs(datasets: list[str]) -> list[tuple[str, str, int]]:
    """Returns all runs: data set, what is broken or `healthy`, seed."""
    found = [(dataset, "healthy", seed) for dataset in datasets for seed in HEALTHY_SEEDS]
    return found + [(dataset, broken, seed) for dataset in datasets for broken in BROKEN for seed in BROKEN_SEEDS]


def folder(root: Path, run: tuple[str, str, int]) -> Path:
    """Returns the folder of a run."""
    return root / run[0] / f"{run[1].replace(' ', '_').replace(',', '')}-{run[2]}"


def train(run: tuple[str, str, int], output_dir: Path, every: int, cifar10: str) -> None:
    """One run, in this process."""
    from ijepa_hf.diagnosis.run_monitor import RunDiagnostics
    from ijepa_hf.recipes.parsing import as_flags, parse_arguments
    from ijepa_hf.recipes.recipe_files import load_recipe
    from ijepa_hf.training.pretrain import pretrain

    dataset, kind, seed = run
    flags, replace = BROKEN.get(kind, ({}, None))
    values = {**DATASETS[dataset]}
    values = {**(load_recipe(values.pop("recipe")) if "recipe" in values else {}), **values}
    if dataset == "cifar10":
        values["dataset_name"] = cifar10
    values |= {
        "output_dir": str(output_dir), "seed": seed, "diagnostics_steps": every, "logging_steps": 50,
        "dataloader_num_workers": 0, "checkpointing_steps": 100_000, "overwrite_output_dir": True, **flags,
    }  # fmt: skip
    if replace is not None:
        replace()
    if kind not in WHOLE:
        measure = RunDiagnostics.measure

        def measure_and_stop(self: Any, model: Any, step: int, *args: Any) -> Any:
            result = measure(self, model, step, *args)
            if step >= BROKEN_SHARE * self.num_steps:
                (output_dir / "done").touch()
                raise SystemExit(0)
            return result

        RunDiagnostics.measure = measure_and_stop  # type: ignore[method-assign]
    pretrain(*parse_arguments(as_flags(values)))
    (output_dir / "done").touch()


def judge(root: Path, datasets: list[str]) -> dict[str, Any]:
    """Judges the rows of all finished runs, row by row as a run would have been."""
    from ijepa_hf.diagnosis.verdict import judge_collapse
    from ijepa_hf.runs.folder import DIAGNOSTICS_FILE
    from ijepa_hf.runs.rows import read_rows

    judged = []
    for run in runs(datasets):
        path = folder(root, run)
        if not (path / "done").exists():
            print(f"missing: {' / '.join(map(str, run))}")
            continue
        rows = read_rows(path / DIAGNOSTICS_FILE)
        verdicts = [judge_collapse(rows[: count + 1]) for count in range(len(rows))]
        failures = [verdict for verdict in verdicts if verdict.is_failure]
        num_steps = round(rows[-1]["step"] / rows[-1]["progress"])
        report = path / "report.json"
        scores = json.loads(report.read_text("utf-8"))["scores"] if report.exists() else []
        judged.append(
            {
                "dataset": run[0], "run": run[1], "seed": run[2],
                "num_steps": num_steps, "last_step": rows[-1]["step"],
                "first_failure": failures[0].name if failures else None,
                "first_failure_step": failures[0].step if failures else None,
                "names": sorted({verdict.name for verdict in failures}),
                "share": failures[0].step / num_steps if failures and failures[0].step is not None else None,
                "last_verdict": verdicts[-1].name,
                "knn": scores[0]["knn"] if scores else None,
                "untrained_knn": max(row["knn"] for row in scores[1:3]) if scores else None,
            }
        )  # fmt: skip
    return {"limit_share": LIMIT_SHARE, "runs": judged}


def render(results: dict[str, Any]) -> str:
    """The tables of docs/collapse.md."""
    lines = ["| broken on purpose | " + " | ".join(DATASETS) + " |", "| --- |" + " --- |" * len(DATASETS)]
    found = {(row["dataset"], row["run"], row["seed"]): row for row in results["runs"]}
    for kind in BROKEN:
        cells = []
        for dataset in DATASETS:
            row = found.get((dataset, kind, 0))
            if row is None:
                cells.append("not run")
            elif row["first_failure"] is None:
                cells.append(f"**not named** by step {row['last_step']}")
            else:
                late = "" if row["share"] <= LIMIT_SHARE else "**late:** "
                cells.append(f"{late}{row['first_failure']}, step {row['first_failure_step']}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    cells = []
    for dataset in DATASETS:
        healthy = [row for row in results["runs"] if row["dataset"] == dataset and row["run"] == "healthy"]
        alarms = [row for row in healthy if row["first_failure"] is not None]
        cells.append(f"{len(healthy)} seeds, {len(alarms)} false alarms")
    return "\n".join([*lines, "| **healthy** | " + " | ".join(cells) + " |"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "judge", "one"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--cifar10", default="uoft-cs/cifar10", help="Hub id or folder")
    parser.add_argument("--every", type=int, default=50, help="steps between two rows")
    parser.add_argument("--results", type=Path, help="judge: JSON to write")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    named = parser.parse_args()
    if named.action == "one":
        run = (named.run[0], named.run[1], int(named.run[2]))
        train(run, folder(named.output_dir, run), named.every, named.cifar10)
        return
    if named.action == "run":
        missing = [run for run in runs(named.datasets) if not (folder(named.output_dir, run) / "done").exists()]
        missing.sort(key=lambda run: (run[2], named.datasets.index(run[0])))  # seed 0 of everything first
        with ThreadPoolExecutor(named.processes) as pool:
            list(pool.map(lambda run: _train_apart(run, named), missing))
        return
    results = judge(named.output_dir, named.datasets)
    print(render(results))
    if named.results is not None:
        named.results.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def _train_apart(run: tuple[str, str, int], named: argparse.Namespace) -> None:
    output_dir = folder(named.output_dir, run)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, __file__, "one", "--output_dir", named.output_dir, "--cifar10", named.cifar10,
        "--every", named.every, "--run", *run,
    ]  # fmt: skip
    with (output_dir.parent / f"{output_dir.name}.log").open("w") as log:
        code = subprocess.run([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{'done' if code == 0 else f'FAILED ({code})'}  {' / '.join(map(str, run))}", flush=True)


if __name__ == "__main__":
    main()
