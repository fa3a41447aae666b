"""Ten ways to train one small encoder, on equal terms: one command, one table, one figure.

    python examples/comparison/compare.py --dataset_name digits --output_dir runs/comparison
    python examples/comparison/compare.py --collect runs/comparison
    python examples/comparison/compare.py --collect benchmarks/results/comparison.json

The first trains each family with each seed, first for the same epochs, then for the time that I-JEPA takes, and writes
one JSON file for each family and seed, a table and a figure; what is there already is not done again. The second
gathers such folders into one file, table and figure; the third does it with the numbers of docs/comparison.md, which
says what is equal and what cannot be.
"""

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bounds import Supervised, Untrained
from contrastive import MoCo, SimClr
from family import Family
from masked import IJepa, Mae
from pretext import Jigsaw, Rotation
from results import draw_figure, render_tables
from self_distillation import Dino, IBot
from training import TrainingSettings, peak_memory_bytes, step_times, train
from views import ViewSettings

from ijepa_hf import IJepaConfig
from ijepa_hf.data.transforms import normalize
from ijepa_hf.evaluation.scorecard import ScoredImages, load_scored_images, pooled_features, score_features
from ijepa_hf.recipes.recipe_files import load_recipe

FAMILIES: dict[str, type[Family]] = {
    "untrained": Untrained,
    "supervised": Supervised,
    "ijepa": IJepa,
    "mae": Mae,
    "simclr": SimClr,
    "moco": MoCo,
    "dino": Dino,
    "ibot": IBot,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
}
BUDGETS = ("equal_epochs", "equal_time")
RECIPE = load_recipe("digits")
NETWORK_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "predictor_hidden_size",
    "predictor_num_hidden_layers", "context_keep_ratio", "initializer_range",
)  # fmt: skip
# What differs between the data sets; all else is the recipe `digits`.
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {
        "num_train_epochs": 40, "max_train": None, "patch_size": 4,
        "views": ViewSettings(
            size=32, view_scale=(0.6, 1.0), mean=tuple(RECIPE["image_mean"]), std=tuple(RECIPE["image_std"]),
            brightness=0.2, contrast=0.2,
        ),
    },
    "shapes": {
        "num_train_epochs": 40, "max_train": 2000, "patch_size": 6,
        "views": ViewSettings(
            size=48, view_scale=(0.5, 1.0), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), min_crop_scale=0.5,
            flip=True, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey_share=0.2,
        ),
    },
}  # fmt: skip


def encoder_config(dataset_name: str) -> IJepaConfig:
    """The configuration of the encoder, and of I-JEPA, on a data set."""
    chosen = DATASETS[dataset_name]
    network = {name: RECIPE[name] for name in NETWORK_FIELDS}
    return IJepaConfig(image_size=chosen["views"].size, patch_size=chosen["patch_size"], **network)


def training_settings() -> TrainingSettings:
    """What is the same for all families: the numbers of the recipe `digits`."""
    names = {field.name for field in dataclasses.fields(TrainingSettings)}
    return TrainingSettings(
        batch_size=RECIPE["per_device_train_batch_size"],
        warmup_share=RECIPE["warmup_epochs"] / RECIPE["num_train_epochs"],
        **{name: RECIPE[name] for name in names & RECIPE.keys()},
    )


def new_family(name: str, dataset_name: str, seed: int, num_classes: int) -> Family:
    """A family before its first step; torch's global generator is left as it was.

    Args:
        name: One of `FAMILIES`.
        dataset_name: One of `DATASETS`.
        seed: Of all initial weights.
        num_classes: Labels of the data set.

    Returns:
        The family, on the CPU.
    """
    kind, extra = FAMILIES[name], (num_classes,) if name == "supervised" else ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(encoder_config(dataset_name), DATASETS[dataset_name]["views"], seed, *extra)


def score(family: Family, images: ScoredImages, device: torch.device) -> dict[str, float]:
    """Scores of the mean over patches of the family's scored encoder (its moving average where it has one)."""
    family.eval()
    views = family.views
    features = [
        pooled_features(
            lambda batch: family.patch_features(batch).mean(dim=1),
            pixels,
            lambda part: normalize(part.to(device), views.mean, views.std),
        )
        for pixels in (images.train_pixels, images.test_pixels)
    ]
    return score_features(*features, images)


def run(name: str, dataset_name: str, seed: int, num_steps: int, images: ScoredImages, device: str) -> dict[str, Any]:
    """Trains a family once and scores it.

    Args:
        name: One of `FAMILIES`.
        dataset_name: One of `DATASETS`.
        seed: Of weights, order and draws.
        num_steps: Optimiser steps.
        images: Trained on (without their labels, but for `supervised`) and scored with.
        device: For example `cpu`.

    Returns:
        What is written of a run.
    """
    place = torch.device(device)
    family = new_family(name, dataset_name, seed, int(images.train_labels.max()) + 1).to(place)
    found: dict[str, Any] = {"num_steps": 0, "seconds": 0.0, "peak_memory_bytes": 0}
    if name != "untrained":
        settings = training_settings()
        pixels, labels = images.train_pixels.to(place), torch.from_numpy(images.train_labels).to(place)
        found["peak_memory_bytes"] = peak_memory_bytes(family, pixels, labels, settings)
        found |= dataclasses.asdict(train(family, pixels, labels, num_steps, settings, seed))
    return {**found, "scores": score(family, images, place)}


def path_of(output_dir: Path, dataset_name: str, name: str, seed: int) -> Path:
    """The file of a family and a seed."""
    return output_dir / f"{dataset_name}-{name}-seed{seed}.json"


def settings_of(name: str, dataset_name: str, seed: int, num_train_epochs: int, device: str) -> dict[str, Any]:
    """All that a result depends on; a file with other settings is done again."""
    return json.loads(
        json.dumps(
            {
                "family": name,
                "dataset_name": dataset_name,
                "seed": seed,
                "num_train_epochs": num_train_epochs,
                "max_train": DATASETS[dataset_name]["max_train"],
                "encoder": {name: RECIPE[name] for name in NETWORK_FIELDS}
                | {"patch_size": DATASETS[dataset_name]["patch_size"]},
                "views": dataclasses.asdict(DATASETS[dataset_name]["views"]),
                "constants": FAMILIES[name].constants,
                "training": dataclasses.asdict(training_settings()),
                "device": device,
            }
        )
    )


def read_record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file says of these settings, or an empty record."""
    if path.exists():
        record = json.loads(path.read_text("utf-8"))
        if record["settings"] == settings:
            return record
    return {"settings": settings}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record so that a killed run leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what is missing in the output folder.

    Args:
        arguments: The flags.

    Returns:
        The records in the folder that have the given settings, of all families and seeds.
    """
    output_dir, dataset_name, seeds = arguments.output_dir, arguments.dataset_name, arguments.seeds
    output_dir.mkdir(parents=True, exist_ok=True)
    chosen = DATASETS[dataset_name]
    size = chosen["views"].size
    images = load_scored_images(dataset_name, (size, size), max_train=chosen["max_train"])
    epochs = arguments.num_train_epochs or chosen["num_train_epochs"]
    steps_per_epoch = len(images.train_pixels) // training_settings().batch_size
    names = [name for name in FAMILIES if name in arguments.families]
    seconds = measured_step_times(dataset_name, images, output_dir, arguments.device)
    for budget in BUDGETS:
        for seed in seeds:
            for name in names:
                settings = settings_of(name, dataset_name, seed, epochs, arguments.device)
                path = path_of(output_dir, dataset_name, name, seed)
                record = read_record(path, settings)
                if budget in record:
                    continue
                num_steps = epochs * steps_per_epoch
                if budget == "equal_time" and name != "untrained":
                    num_steps = max(1, round(num_steps * seconds["ijepa"] / seconds[name]))
                done = record.get("equal_epochs")
                same = done is not None and num_steps == epochs * steps_per_epoch
                record[budget] = done if same else run(name, dataset_name, seed, num_steps, images, arguments.device)
                record["views_per_image"] = FAMILIES[name].views_per_image
                record["steps_per_epoch"] = steps_per_epoch
                record["seconds_per_step"] = seconds.get(name, 0.0)
                record["environment"] = environment(arguments.device)
                write_record(path, record)
                report(budget, record)
    found = [json.loads(path.read_text("utf-8")) for path in sorted(output_dir.glob(f"{dataset_name}-*-seed*.json"))]
    same = [settings_of(name, dataset_name, 0, epochs, arguments.device) for name in FAMILIES]
    return [record for record in found if record["settings"] | {"seed": 0} in same]


def measured_step_times(dataset_name: str, images: ScoredImages, output_dir: Path, device: str) -> dict[str, float]:
    """Seconds of a step of each family that is trained, measured side by side, or read where that was done before.

    Args:
        dataset_name: One of `DATASETS`.
        images: Of it.
        output_dir: Where they are kept, so that all seeds of a comparison have the same budget.
        device: For example `cpu`.

    Returns:
        By name of the family.
    """
    path = output_dir / f"{dataset_name}-step-times.json"
    names = [name for name in FAMILIES if name != "untrained"]
    settings = {"families": [settings_of(name, dataset_name, 0, 0, device) for name in names]}
    record = read_record(path, settings)
    if "seconds" not in record:
        place, num_classes = torch.device(device), int(images.train_labels.max()) + 1
        families = {name: new_family(name, dataset_name, 0, num_classes).to(place) for name in names}
        pixels, labels = images.train_pixels.to(place), torch.from_numpy(images.train_labels).to(place)
        record["seconds"] = step_times(families, pixels, labels, training_settings())
        write_record(path, record)
    return record["seconds"]


def report(budget: str, record: dict[str, Any]) -> None:
    """One line a run, on the screen."""
    settings, found = record["settings"], record[budget]
    scores = ", ".join(f"{name} {value:.3f}" for name, value in found["scores"].items())
    print(
        f"{settings['dataset_name']} {settings['family']} seed {settings['seed']} {budget}: {found['num_steps']} "
        f"steps, {found['seconds']:.1f} s, {scores}",
        flush=True,
    )


def environment(device: str) -> dict[str, str]:
    """What the times depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }


def collect(sources: Sequence[Path], results: Path, figure: Path) -> str:
    """Gathers the files of some folders into one file and one figure.

    Args:
        sources: Output folders of this command, or files that this function has written.
        results: JSON to write.
        figure: Picture to write.

    Returns:
        The tables.

    Raises:
        FileNotFoundError: If a folder holds no result, or there is no such file.
        ValueError: If two files are of the same data set, family and seed.
    """
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    for source in sources:
        paths = sorted(source.glob("*-seed*.json")) if source.is_dir() else [source]
        if not paths:
            raise FileNotFoundError(f"--collect {source}: it holds no file like digits-ijepa-seed0.json.")
        for path in paths:
            found = json.loads(path.read_text("utf-8"))
            for record in found.get("runs", [found]):
                key = tuple(record["settings"][name] for name in ("dataset_name", "family", "seed"))
                if key in records:
                    raise ValueError(
                        f"--collect: {path} is another result of {' '.join(map(str, key))}; give one of them."
                    )
                records[key] = record
    gathered = list(records.values())
    tables = render_tables(gathered)
    write_record(results, {"runs": gathered})
    draw_figure(gathered, figure)
    return tables


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the flags."""
    parser = argparse.ArgumentParser(description="Compares ways to train one small encoder.")
    parser.add_argument("--dataset_name", choices=DATASETS, default="digits")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--num_train_epochs", type=int, help="of all families; 40 if not given")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument(
        "--collect",
        nargs="+",
        type=Path,
        metavar="PLACE",
        help="train nothing; gather these: folders, or a file of gathered ones",
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/comparison.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/comparison.png"))
    arguments = parser.parse_args(argv)
    if arguments.num_train_epochs is not None and arguments.num_train_epochs < 1:
        parser.error(f"--num_train_epochs {arguments.num_train_epochs} must be at least 1.")
    if min(arguments.seeds) < 0:
        parser.error(f"--seeds {min(arguments.seeds)} must be 0 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parse(argv)
    if arguments.collect:
        print(collect(arguments.collect, arguments.results, arguments.figure))
        return
    torch.set_num_threads(RECIPE["num_cpu_threads"])  # as the recipe; the clock counts the work of all threads
    records = compare(arguments)
    tables = render_tables(records)
    (arguments.output_dir / f"{arguments.dataset_name}.md").write_text(tables, "utf-8")
    draw_figure(records, arguments.output_dir / f"{arguments.dataset_name}.png")
    print(tables)


if __name__ == "__main__":
    main()
