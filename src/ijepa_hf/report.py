"""What a finished run says of itself: scores, figures, `report.json`, the card's files, and the text on the screen.

The trained encoder always stands beside rows that keep it honest: the weights that it started from, if any, the same
network untrained, with both usual initial values of its patch embedding, and the raw pixels. Scores are made where
the data have labels and a held-out split (`eval_split_name`); the linear probe's regularisation is chosen on a part of
the training split.
"""

import json
import logging
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ijepa_hf import __version__
from ijepa_hf.arguments import DataArguments
from ijepa_hf.collapse_verdict import judge_collapse
from ijepa_hf.configuration_ijepa import IJepaConfig
from ijepa_hf.data import ImageRows, resized_pixels
from ijepa_hf.diagnostics import rankme
from ijepa_hf.escaping import on_one_line
from ijepa_hf.evaluation.features import extract_features
from ijepa_hf.evaluation.knn import NEIGHBOURS, knn_accuracy
from ijepa_hf.evaluation.linear_probe import linear_accuracy
from ijepa_hf.expected_band import BandWatch, RunRows, find_band
from ijepa_hf.files import FIGURE_BYTES, saving, write_json_atomically, write_text_atomically
from ijepa_hf.model_card import (
    STARTING_WEIGHTS,
    loading_lines,
    render_card,
    render_eval_results,
    score_table,
    verdict,
)
from ijepa_hf.modeling_ijepa import IJepaForPretraining, new_model
from ijepa_hf.retrying import RetryPolicy
from ijepa_hf.run_folder import (
    DIAGNOSTICS_FILE,
    EVAL_RESULTS_FOLDER,
    EVALUATIONS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SKIPPED_FILE,
    UNREADABLE_FILE,
)
from ijepa_hf.run_rows import read_rows
from ijepa_hf.sources import at_most, find_image_column, find_label_column, load_split, open_stream
from ijepa_hf.visualization import draw_curves_figure

PIXELS_AT_ONCE = 512  # images
PUBLISHED_PATCH_INIT_STD = 0.02
RAW_PIXELS_SIDE = 32  # larger images are shrunk to this: a linear probe on 224 x 224 x 3 inputs is no use

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSets:
    """Labelled images to score an encoder with.

    Args:
        train: Images of the training split.
        train_labels: int64 `[n]`.
        test: Held-out images.
        test_labels: int64 `[m]`.
    """

    train: ImageRows
    train_labels: np.ndarray
    test: ImageRows
    test_labels: np.ndarray


def load_evaluation_sets(data: DataArguments, config: IJepaConfig) -> EvaluationSets | None:
    """Loads what `data.eval_split_name` asks for.

    Args:
        data: The images.
        config: Says the number of channels.

    Returns:
        The labelled sets, or `None` where no evaluation split was named.

    Raises:
        ValueError: If the split or its labels are missing.
    """
    if data.eval_split_name is None:
        return None
    parts: list[Any] = []
    for split in (data.train_split_name, data.eval_split_name):
        dataset = _load_part_of_stream(data, split) if data.streaming else load_split(data.source, split)
        label = find_label_column(dataset, data.label_column_name)
        values = None if label is None else dataset[label]
        if values is None or any(value is None or value < 0 for value in values):  # -1 is how unlabelled sets say it
            raise ValueError(
                f"eval_split_name={data.eval_split_name!r} asks for scores, but the split {split!r} has no labels "
                f"(its columns are {', '.join(dataset.features)}); choose with --label_column_name, or leave out "
                "--eval_split_name."
            )
        dataset = at_most(dataset, data.max_eval_samples)
        column = find_image_column(dataset, data.image_column_name)
        images = ImageRows(
            dataset,
            column,
            config.num_channels,
            retries=RetryPolicy(data.data_retry_seconds, data.data_timeout_seconds),
        )
        parts += [images, np.asarray(dataset[label], dtype=np.int64)]
    evaluation = EvaluationSets(*parts)
    if len(evaluation.train) < 5 or len(set(evaluation.train_labels.tolist())) < 2:
        raise ValueError(
            f"eval_split_name={data.eval_split_name!r} asks for scores, which need at least 5 labelled images of 2 "
            f"classes in {data.train_split_name!r}; there are {len(evaluation.train)}. Leave out --eval_split_name."
        )
    evaluation.test[0]  # an image that cannot be used is found before the training
    return evaluation


def _load_part_of_stream(data: DataArguments, split: str) -> datasets.Dataset:
    """Some rows of a streamed split in memory, as many of each shard (sets are often sorted by class)."""
    rows = open_stream(data.source, split).rows
    assert data.max_eval_samples is not None  # DataArguments.check
    each = math.ceil(data.max_eval_samples / rows.num_shards)
    shards = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
    taken = [row for shard in shards for row in shard.take(each)]
    return datasets.Dataset.from_list(taken, features=rows.features)


def write_report(
    model: IJepaForPretraining,
    output_dir: Path,
    evaluation: EvaluationSets | None,
    arguments: Mapping[str, Any],
    *,
    step: int,
    machine: Mapping[str, Any],
    starting_encoder: nn.Module | None = None,
) -> None:
    """Scores the target encoder, draws the curves, writes `report.json`, the model card and `.eval_results`.

    Args:
        model: The trained model.
        output_dir: The run's folder.
        evaluation: Labelled sets, or `None` for no scores.
        arguments: All arguments of the run, as in `run.json`.
        step: Optimiser steps done.
        machine: From `describe_machine`.
        starting_encoder: The encoder before the first step, where it was a trained one.

    Raises:
        SaveError: If something cannot be written.
    """
    rows, evaluations = read_rows(output_dir / METRICS_FILE), read_rows(output_dir / EVALUATIONS_FILE)
    diagnostics = read_rows(output_dir / DIAGNOSTICS_FILE)
    mean, std, seed = arguments["image_mean"], arguments["image_std"], arguments["seed"]
    band = find_band(arguments)
    watch = None if band is None else BandWatch(band, RunRows(arguments, rows, diagnostics, evaluations))
    report = {
        "step": step,
        "epochs": step * arguments["global_batch_size"] / arguments["num_train_images"],
        "parameters_encoder": sum(parameter.numel() for parameter in model.target_encoder.parameters()),
        "log": _summarise(rows) if rows else None,
        "evaluations": evaluations,
        "collapse_verdict": judge_collapse(diagnostics).as_dict() if diagnostics else None,
        "expected_band": None if watch is None else watch.as_dict(),
        "num_unreadable_images": len(read_rows(output_dir / UNREADABLE_FILE)),
        "num_skipped_steps": len(read_rows(output_dir / SKIPPED_FILE)),
        "scores": []
        if evaluation is None
        else score_encoder(model, evaluation, mean, std, seed, starting_encoder=starting_encoder),
        "num_eval_images": 0 if evaluation is None else len(evaluation.test),
        "machine": dict(machine),
        "hub_dataset": _on_the_hub(arguments["dataset_name"]),
        "hub_base_model": _on_the_hub(arguments["model_name_or_path"]),
        "arguments": dict(arguments),
    }
    card = render_card(report, model.config)
    with saving(output_dir, FIGURE_BYTES):
        (output_dir / "figures").mkdir(exist_ok=True)
        if rows:  # a log can be lost (a checkpoint that was moved); that must not keep the run from ending
            draw_curves_figure(rows, output_dir / "figures" / "curves.png", evaluations, expected=watch)
        for name, entries in render_eval_results(report).items():
            path = output_dir / EVAL_RESULTS_FOLDER / name
            path.parent.mkdir(exist_ok=True)
            write_text_atomically(path, entries)
        write_text_atomically(output_dir / "README.md", card)
        write_json_atomically(output_dir / REPORT_FILE, report)  # last: it says "finished"


def describe_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """What a run was trained with, for its report and card.

    Args:
        device: Of this process.
        num_processes: Of the run.

    Returns:
        `device` in words, `processes`, and the versions of torch, transformers and this package.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"a CPU ({_cpu_name()}), {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": name,
        "processes": num_processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ijepa_hf": __version__,
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.machine()


def _on_the_hub(name: str | None) -> str | None:
    """The name, if it is a repository's: neither built in nor a path of this machine."""
    return name if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "first_step": rows[0]["step"],
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "target_rankme_first": rows[0]["target_rankme"],
        "target_rankme_last": rows[-1]["target_rankme"],
        "target_std_first": rows[0]["target_std"],
        "target_std_last": rows[-1]["target_std"],
        "seconds": sum(row["seconds"] for row in rows) if all("seconds" in row for row in rows) else None,
        "images_per_second": float(np.median([row["images_per_second"] for row in rows])),
        "data_wait_share": float(np.median([row["data_wait_share"] for row in rows])),
    }


def evaluate_encoder(
    encoder: nn.Module, evaluation: EvaluationSets, config: IJepaConfig, arguments: Mapping[str, Any]
) -> dict[str, float]:
    """What is scored while a run goes on: seconds where `score_encoder`, with its linear probes, takes minutes.

    Args:
        encoder: A target encoder.
        evaluation: Labelled sets.
        config: The model's.
        arguments: The run's `image_mean` and `image_std`.

    Returns:
        `knn` (top-1 in [0, 1]) and `rankme` of the held-out images' pooled features.
    """
    mean, std = arguments["image_mean"], arguments["image_std"]
    train, train_kept = _all_features({"": encoder}, evaluation.train, config, mean, std)
    test, test_kept = _all_features({"": encoder}, evaluation.test, config, mean, std)
    labels = evaluation.train_labels[train_kept], evaluation.test_labels[test_kept]
    neighbours = min(NEIGHBOURS, len(train[""]))
    return {
        "knn": knn_accuracy(train[""], labels[0], test[""], labels[1], k=neighbours),
        "rankme": rankme(torch.from_numpy(test[""])),
    }


def score_encoder(
    model: IJepaForPretraining,
    evaluation: EvaluationSets,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    *,
    starting_encoder: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """KNN and linear top-1 and RankMe of the target encoder, of what it began as, and of raw pixels.

    Args:
        model: The trained model.
        evaluation: Labelled sets.
        mean: Of each channel.
        std: Of each channel.
        seed: The run's seed; the untrained network with the run's `patch_init_std` is the one that it started from.
        starting_encoder: The encoder before the first step, where it was a trained one.

    Returns:
        A row for each: `features` (its name), `knn`, `linear` (top-1 in [0, 1]), `rankme` (of the held-out images).
    """
    encoders: dict[str, nn.Module | None] = {"trained encoder": model.target_encoder}
    if starting_encoder is not None:
        encoders[STARTING_WEIGHTS] = starting_encoder.to(model.device)
    for value, name in ((None, "1/sqrt(inputs)"), (PUBLISHED_PATCH_INIT_STD, f"{PUBLISHED_PATCH_INIT_STD}")):
        untrained = new_model(model.config.replace(patch_init_std=value), seed).target_encoder
        encoders[f"untrained, patch_init_std {name}"] = untrained.to(model.device)
    encoders["raw pixels"] = None
    train, train_kept = _all_features(encoders, evaluation.train, model.config, mean, std)
    test, test_kept = _all_features(encoders, evaluation.test, model.config, mean, std)
    rows = []
    for name in encoders:
        labelled = (train[name], evaluation.train_labels[train_kept], test[name], evaluation.test_labels[test_kept])
        rows.append(
            {
                "features": name,
                "knn": knn_accuracy(*labelled, k=min(NEIGHBOURS, len(train[name]))),
                "linear": linear_accuracy(*labelled),
                "rankme": rankme(torch.from_numpy(test[name])),
            }
        )
    return rows


def _all_features(
    encoders: Mapping[str, nn.Module | None],
    images: ImageRows,
    config: IJepaConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Features `[n, D]` under each name, and the numbers of their images: those that cannot be read are left out.

    A part of the images at a time, so that pixels of all need no memory.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    kept: list[int] = []
    for start in range(0, len(images), PIXELS_AT_ONCE):
        readable = _readable(images, range(start, min(start + PIXELS_AT_ONCE, len(images))))
        if not readable:
            continue
        kept += readable
        pixels = resized_pixels(readable.values(), config, mean, std)
        for name, encoder in encoders.items():
            parts[name].append(_raw(pixels) if encoder is None else extract_features(encoder, pixels))
    return {name: np.concatenate(part) for name, part in parts.items()}, kept


def first_readable_pixels(
    images: ImageRows, config: IJepaConfig, mean: Sequence[float], std: Sequence[float], limit: int
) -> Tensor:
    """Some whole images, spread evenly over a split; those that cannot be read are left out.

    Args:
        images: A split.
        config: Says the size.
        mean: Of each channel.
        std: Of each channel.
        limit: Images wanted.

    Returns:
        float32 `[n, num_channels, height, width]`, n at most `limit`.
    """
    chosen = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    readable = _readable(images, map(int, chosen))
    if not readable:
        return torch.empty(0, config.num_channels, *config.image_shape)
    return resized_pixels(readable.values(), config, mean, std)


def _readable(images: ImageRows, indices: Iterable[int]) -> dict[int, Any]:
    found = {}
    for index in indices:
        try:
            found[index] = images[index]
        except ValueError as error:  # a broken image must not cost the scores of all others
            logger.warning("not scored: %s", error)
    return found


def _raw(pixels: Tensor) -> np.ndarray:
    if max(pixels.shape[-2:]) > RAW_PIXELS_SIDE:
        shape = [min(side, RAW_PIXELS_SIDE) for side in pixels.shape[-2:]]
        pixels = nn.functional.interpolate(pixels, size=shape, mode="bilinear", antialias=True)
    return pixels.flatten(1).numpy()


# -- text ------------------------------------------------------------------------------------------------------------


def render_report(output_dir: Path) -> str:
    """The report of a finished run, as printed at its end.

    Args:
        output_dir: The run's folder.

    Returns:
        Several lines of plain text.

    Raises:
        FileNotFoundError: If the run is not finished.
    """
    report = json.loads((output_dir / REPORT_FILE).read_text("utf-8"))
    lines = [f"steps {report['step']} ({report['epochs']:.4g} epochs)"]
    log = report["log"]
    if log is None:
        lines.append("the log of this run was lost")
    else:
        lines[0] += f", {log['images_per_second']:.0f} images/s"
        lines.append(
            f"loss {log['loss_first']:.4f} at step {log['first_step']}, {log['loss_last']:.4f} at the last; "
            f"RankMe of the targets {log['target_rankme_last']:.1f}; "
            f"{100 * log['data_wait_share']:.0f} % of the time went into waiting for images"
        )
    if report.get("collapse_verdict"):  # runs of earlier versions have none
        found = report["collapse_verdict"]
        lines.append(" ".join([f"verdict: {found['name']}:", found["reason"], found["advice"]]).strip())
    if report.get("expected_band"):  # runs of earlier versions have none
        lines.append(report["expected_band"]["verdict"])
    if report["num_unreadable_images"]:
        lines.append(
            f"{report['num_unreadable_images']} images could not be read and were skipped; "
            f"{output_dir / UNREADABLE_FILE} lists them"
        )
    if report.get("num_skipped_steps"):  # reports of earlier versions have none
        lines.append(
            f"{report['num_skipped_steps']} steps were skipped because loss or gradient was not finite; "
            f"{output_dir / SKIPPED_FILE} lists them"
        )
    if report["scores"]:
        lines += ["", f"top-1 on {report['num_eval_images']} held-out images, mean-pooled features", ""]
        lines += score_table(report["scores"], "{:<42} {:>8} {:>8} {:>8}")
        lines += ["", *verdict(report["scores"])]
    figures = ", ".join(on_one_line(path) for path in sorted((output_dir / "figures").glob("*.png")))
    lines += ["", f"pictures: {figures}", "", "load it with:", "", *loading_lines(str(output_dir))]
    return "\n".join(lines)
