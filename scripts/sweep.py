"""Trains every setting of a sweep with several seeds, scores them, and says whether their order is the paper's.

    python scripts/sweep.py recipes/ablations/masking.yaml --base recipes/ablations/bases/digits.yaml

A sweep is a YAML file: a title, the source of the published figures, and settings, each a name, flags of
`ijepa-hf pretrain` that differ from the base, and the published figure where there is one. The base is a recipe.

Each run is `ijepa-hf pretrain` in a process of its own. Its scores are one JSON in `--results_dir`; a run that has one
is not run again, and one that was stopped goes on from its last checkpoint, so the same command finishes an
interrupted sweep. Settings with the same flags are the same run, whatever sweep they are in.

Exit codes: 0; 2 for a mistake in what was asked; 1 where a run failed (the others are finished first).
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from ijepa_hf.data.transforms import normalize
from ijepa_hf.evaluation.scorecard import ScoredImages, load_scored_images, pooled_features, score_features
from ijepa_hf.files import write_json_atomically, write_text_atomically
from ijepa_hf.model.encoder_ijepa import IJepaModel
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.recipes.parsing import as_flags, parse_arguments
from ijepa_hf.recipes.recipe_files import load_recipe, read_yaml
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, METRICS_FILE
from ijepa_hf.runs.rows import read_rows

CONFIDENCE = 0.95
UNTRAINED = "untrained"
_PERCENT = ("knn", "linear", "low_shot", "count", "nearest_distance")  # the others are shown as they are
_PACKAGES = ("torch", "transformers", "ijepa-hf")


class SweepError(ValueError):
    """What was asked for cannot be done; found before any run starts."""


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Args:
        name: In words.
        flags: Of `ijepa-hf pretrain`, beside those of the base.
        paper: The published figure, in percent.
    """

    name: str
    flags: Mapping[str, Any]
    paper: float | None

    @property
    def folder(self) -> str:
        """Name of the folder of its runs, the same for the same flags."""
        if not self.flags:
            return "base"
        return ",".join(f"{name}={_word(value)}" for name, value in sorted(self.flags.items()))


@dataclass(frozen=True)
class Sweep:
    """A table to be filled.

    Args:
        name: Of its file.
        title: In words.
        source: Of the published figures.
        settings: Its rows, the reference first.
    """

    name: str
    title: str
    source: str
    settings: Sequence[Setting]


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's file.

    Args:
        path: YAML, see the module's docstring.

    Returns:
        The sweep.

    Raises:
        SweepError: If it is not such a file; says what is wrong.
    """
    try:
        values = read_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SweepError(f"{path} cannot be read as a sweep: {error}") from error
    if not isinstance(values, dict) or set(values) != {"title", "source", "settings"}:
        raise SweepError(f"{path} must have the keys title, source and settings, and no others.")
    if not isinstance(values["settings"], list) or len(values["settings"]) < 2:
        raise SweepError(f"{path}: settings must be a list of at least two.")
    settings = []
    for entry in values["settings"]:
        if not isinstance(entry, dict) or not {"name", "flags"} <= set(entry) <= {"name", "flags", "paper"}:
            raise SweepError(f"{path}: a setting must have name and flags, and may have paper; this is {entry!r}.")
        if not isinstance(entry["flags"], dict):
            raise SweepError(f"{path}: flags of {entry['name']!r} must be names and values; {{}} for the base.")
        settings.append(Setting(str(entry["name"]), entry["flags"], entry.get("paper")))
    for what, given in (("name", [each.name for each in settings]), ("flags", [each.folder for each in settings])):
        if len(set(given)) < len(given):
            raise SweepError(f"{path}: two settings have the same {what}.")
    return Sweep(path.stem, str(values["title"]), str(values["source"]), settings)


def check_settings(sweep: Sweep, base: str) -> None:
    """Tries every setting's flags on the base.

    Args:
        sweep: The sweep.
        base: Name or path of the base recipe.

    Raises:
        SweepError: If `ijepa-hf pretrain` would refuse one of them.
    """
    for setting in sweep.settings:
        try:
            model, data, _ = parse_arguments([base, "--output_dir=unused", *as_flags(dict(setting.flags))])
            data.check(model)
            model.to_config()
        except (ValueError, TypeError, OSError) as error:
            raise SweepError(f"{sweep.name}: {setting.name!r} with {base}: {error}") from error


def run_setting(
    setting: Setting, seed: int, base: str, output_dir: Path, results_dir: Path, images: ScoredImages
) -> dict[str, Any]:
    """Trains one setting with one seed, or goes on with it, and scores it; or reads what an earlier call found.

    Args:
        setting: The setting.
        seed: Of the run.
        base: Name or path of the base recipe.
        output_dir: Folder of the runs.
        results_dir: Folder of the JSON files.
        images: On which it is scored.

    Returns:
        The content of its JSON.

    Raises:
        RuntimeError: If the run failed; the end of its output is in the message.
        SweepError: If the JSON that is there is of other arguments.
    """
    path = results_dir / f"{setting.folder}-seed-{seed}.json"
    told = {**load_recipe(base), **setting.flags, "seed": seed}
    found = _read(path, told)
    if found is not None:
        return found
    folder = output_dir / setting.folder / f"seed-{seed}"
    began = time.monotonic()
    _train(folder, base, {**setting.flags, "seed": seed})
    trained = time.monotonic() - began
    result = {
        "name": setting.folder,
        "arguments": told,
        "scores": score_run(folder, images),
        "loss": read_rows(folder / METRICS_FILE)[-1]["loss"],
        "step": read_rows(folder / METRICS_FILE)[-1]["step"],
        "seconds": sum(row["seconds"] for row in read_rows(folder / METRICS_FILE)),
        "seconds_of_this_process": trained,
        "collapse": _collapse(folder),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    _write(path, result)
    return result


def score_run(folder: Path, images: ScoredImages) -> dict[str, float]:
    """Scores the target encoder of a finished run.

    Args:
        folder: The run's.
        images: On which.

    Returns:
        See `score_features`.
    """
    run = json.loads((folder / "run.json").read_text("utf-8"))
    return _score_encoder(IJepaModel.from_pretrained(folder), run["arguments"], images)


def score_untrained(base: str, seed: int, results_dir: Path, images: ScoredImages) -> dict[str, Any]:
    """Scores the network with which a run of the base begins.

    Args:
        base: Name or path of the base recipe.
        seed: Of the run.
        results_dir: Folder of the JSON files.
        images: On which.

    Returns:
        As `run_setting`, without what only training has.

    Raises:
        SweepError: If the JSON that is there is of other arguments.
    """
    path = results_dir / f"{UNTRAINED}-seed-{seed}.json"
    told = {**load_recipe(base), "seed": seed}
    found = _read(path, told)
    if found is not None:
        return found
    model, data, _ = parse_arguments([base, "--output_dir=unused"])
    settings = {"image_mean": data.image_mean, "image_std": data.image_std}
    scores = _score_encoder(new_model(model.to_config(), seed).target_encoder, settings, images)
    result = {"name": UNTRAINED, "arguments": told, "scores": scores}
    _write(path, result)
    return result


def _score_encoder(encoder: IJepaModel, settings: Mapping[str, Any], images: ScoredImages) -> dict[str, float]:
    encoder.eval()

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        return encoder(pixel_values).last_hidden_state.mean(dim=1)

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        return normalize(pixels, settings["image_mean"], settings["image_std"])

    with threadpool_limits(1):
        train, test = (pooled_features(encode, each, prepare) for each in (images.train_pixels, images.test_pixels))
        return score_features(train, test, images)


def _train(folder: Path, base: str, flags: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "ijepa_hf.commands.main",
        "pretrain",
        base,
        f"--output_dir={folder}",
        *as_flags(dict(flags)),
    ]
    log = folder.with_suffix(".log")
    with log.open("ab") as stream:
        done = subprocess.run(
            [*command, "--resume_from_checkpoint=latest"],
            stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
    if done.returncode:
        end = log.read_text("utf-8", errors="replace")[-1500:]
        raise RuntimeError(f"{folder} failed with exit code {done.returncode}; the end of {log}:\n{end}")


def _collapse(folder: Path) -> dict[str, Any] | None:
    rows = read_rows(folder / DIAGNOSTICS_FILE)
    names = ("target_patch_normalized_std", "target_patch_effective_rank", "target_position_share", "cross_image_gap")
    return {name: rows[-1].get(name) for name in names} if rows else None


def _read(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier call wrote of a run with these arguments; `None` where there is nothing."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    kept = found["arguments"]
    differing = sorted(name for name in kept | arguments if kept.get(name) != arguments.get(name))
    if differing:
        raise SweepError(
            f"{path} is of a run with other values of {', '.join(differing)}; delete it and the run's folder, or "
            "choose another --output_dir."
        )
    return found


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, result)


# -- the table -------------------------------------------------------------------------------------------------------


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of seeds and half the width of its 95 % interval, by Student's t.

    Args:
        values: One of each seed.

    Returns:
        Mean and half width; infinite for one seed.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def compare(one: Sequence[float], other: Sequence[float]) -> int:
    """Which of two settings is better, where their intervals say so.

    Args:
        one: Scores of the seeds of a setting.
        other: Those of another.

    Returns:
        1 or -1 where the first is better or worse, 0 where the intervals overlap.
    """
    (mean, half), (other_mean, other_half) = interval_of_mean(one), interval_of_mean(other)
    if abs(mean - other_mean) <= half + other_half:
        return 0
    return 1 if mean > other_mean else -1


def order_of(sweep: Sweep, scores: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Pairs of settings whose order is the paper's, is not, or cannot be told.

    Args:
        sweep: With the published figures.
        scores: One of each seed, by the setting's name.

    Returns:
        `agrees`, `disagrees`, `undecided`: pairs such as "multi_block > random", the paper's order.
    """
    found: dict[str, list[str]] = {"agrees": [], "disagrees": [], "undecided": []}
    rows = [setting for setting in sweep.settings if setting.paper is not None and setting.name in scores]
    for one, other in itertools.combinations(rows, 2):
        assert one.paper is not None
        assert other.paper is not None
        if one.paper == other.paper:
            continue
        better, worse = (one, other) if one.paper > other.paper else (other, one)
        says = compare(scores[better.name], scores[worse.name])
        found[("undecided", "agrees", "disagrees")[says]].append(f"{better.name} > {worse.name}")
    return found


def beside_the_first(sweep: Sweep, scores: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Which settings are better than the first one, which are worse, and of which it cannot be told.

    Args:
        sweep: Whose first setting is the reference.
        scores: One of each seed, by the setting's name.

    Returns:
        `better`, `worse`, `undecided`: names of settings.
    """
    first, *others = (setting.name for setting in sweep.settings)
    found: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for name in others:
        if name in scores and first in scores:
            found[("undecided", "better", "worse")[compare(scores[name], scores[first])]].append(name)
    return found


def render_table(sweep: Sweep, base: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table of a sweep, in markdown.

    Args:
        sweep: The sweep.
        base: Name or path of the base recipe.
        results: Of each setting by its name, and of `UNTRAINED`, those of its seeds; a missing one is "not measured".

    Returns:
        The text.
    """
    names = list(next(iter(results.values()))[0]["scores"])
    has_paper = any(setting.paper is not None for setting in sweep.settings)
    head = ["setting", *names, *(["paper"] if has_paper else [])]
    lines = [f"**{sweep.title}**, base `{Path(base).stem}` ({sweep.source}):", ""]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for setting in [*sweep.settings, Setting(UNTRAINED, {}, None)]:
        rows = results.get(setting.name)
        paper = [] if not has_paper else ["-" if setting.paper is None else f"{setting.paper:g}"]
        cells = ["not measured"] * len(names)
        if rows:
            cells = [_cell(name, [row["scores"][name] for row in rows]) for name in names]
        lines.append("| " + " | ".join([setting.name, *cells, *paper]) + " |")
    lines += ["", "Pairs whose order is the paper's, is not, or is undecided because intervals overlap:", ""]
    if not has_paper:
        lines[-2] = f"Beside {sweep.settings[0].name}; undecided where intervals overlap:"
    for name in names[:-1]:  # the last is RankMe, which is no score
        scores = {each: [row["scores"][name] for row in rows] for each, rows in results.items()}
        order = order_of(sweep, scores) if has_paper else beside_the_first(sweep, scores)
        said = "; ".join(f"{how} {', '.join(settings)}" for how, settings in order.items() if settings)
        lines.append(f"- {name}: {said}")
    return "\n".join(lines) + "\n"


def _cell(name: str, values: Sequence[float]) -> str:
    mean, half = interval_of_mean(values)
    scale, digits = (100, 1) if name in _PERCENT else (1, 2)
    width = "one seed" if math.isinf(half) else f"± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f} {width}"


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


# -- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see the module's docstring.

    Args:
        argv: Its words; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = _build_parser().parse_args(argv)
    try:
        return _main(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    sweeps = [read_sweep(Path(path)) for path in arguments.sweep]
    for sweep in sweeps:
        check_settings(sweep, arguments.base)
    output_dir = Path(arguments.output_dir or Path("runs", "sweeps", Path(arguments.base).stem))
    results_dir = Path(arguments.results_dir or output_dir / "results")
    model, data, _ = parse_arguments([arguments.base, "--output_dir=unused"])
    config = model.to_config()
    assert data.dataset_name is not None
    images = load_scored_images(
        data.dataset_name, config.image_shape, num_channels=config.num_channels, max_train=arguments.max_probe_samples
    )
    wanted = {setting.folder: setting for sweep in sweeps for setting in sweep.settings}
    jobs = [(setting, seed) for seed in arguments.seeds for setting in wanted.values()]
    untrained = [score_untrained(arguments.base, seed, results_dir, images) for seed in arguments.seeds]
    output_dir.mkdir(parents=True, exist_ok=True)
    found, failures = _run_all(jobs, arguments, output_dir, results_dir, images)
    for sweep in sweeps:
        results = {
            setting.name: [found[setting.folder, seed] for seed in arguments.seeds if (setting.folder, seed) in found]
            for setting in sweep.settings
        }
        table = render_table(sweep, arguments.base, {**{k: v for k, v in results.items() if v}, UNTRAINED: untrained})
        write_text_atomically(output_dir / f"{sweep.name}.md", table)
        print(table)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run_all(
    jobs: Sequence[tuple[Setting, int]],
    arguments: argparse.Namespace,
    output_dir: Path,
    results_dir: Path,
    images: ScoredImages,
) -> tuple[dict[tuple[str, int], dict[str, Any]], list[BaseException]]:
    """All runs, `--jobs` at a time; those that fail do not keep the others from running."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    failures: list[BaseException] = []
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(jobs), unit="run") as progress:
        futures = {
            (setting.folder, seed): pool.submit(
                run_setting, setting, seed, arguments.base, output_dir, results_dir, images
            )
            for setting, seed in jobs
        }
        try:
            for key, future in futures.items():
                try:
                    found[key] = future.result()
                except (RuntimeError, OSError) as error:
                    failures.append(error)
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found, failures


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        allow_abbrev=False,
        description="Train every setting of a sweep with several seeds, score them, and compare their order with the "
        "paper's. The same command finishes an interrupted sweep.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sweep", nargs="+", metavar="SWEEP", help="YAML files, such as recipes/ablations/masking.yaml."
    )
    parser.add_argument("--base", required=True, help="Recipe that all settings have in common: a name or a path.")
    parser.add_argument("--output_dir", help="Folder of the runs and tables; runs/sweeps/BASE if not given.")
    parser.add_argument("--results_dir", help="Folder of the JSON files, one a run; OUTPUT_DIR/results if not given.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="A run of each setting for each.")
    parser.add_argument("--jobs", type=_at_least_one, default=1, help="Runs beside each other.")
    parser.add_argument(
        "--max_probe_samples",
        type=_at_least_one,
        default=2000,
        help="Labelled training images that probes are fitted to.",
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1.")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
