"""Measures how fast features are extracted, beside a bare loop over a stock image processor and a stock model.

    python benchmarks/feature_extraction.py
    python benchmarks/feature_extraction.py --output benchmarks/results/feature_extraction.json

Ours is what `ijepa-hf evaluate` does: decode, resize, normalise, forward, average the patches, and store the result
with its checksum. The bare loop is what one writes by hand: `AutoImageProcessor`, `AutoModel`, the same images in
batches of the same size, the features kept in memory. Both run in this process, in alternating rounds, so that
whatever else the machine does falls on both; both give the same features, which is checked. The ratio is the median
over rounds of theirs / ours. Weights are random: they cost the same as trained ones.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoImageProcessor, AutoModel, IJepaConfig, IJepaModel

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.shapes import draw_shape_scene
from ijepa_hf.evaluation.backbones import load_backbone
from ijepa_hf.evaluation.feature_store import store_features
from ijepa_hf.evaluation.features import iterate_features
from ijepa_hf.model.vision_models import ImageSettings
from ijepa_hf.runs.export import image_processor_fields

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# name: images, their side in pixels, format, the model's side, patch, width, layers, images a batch
CASES = {
    "32x32 PNG, 6 layers of 192": (400, 32, "PNG", 32, 4, 192, 6, 64),
    "320x320 JPEG to 224x224, 12 layers of 192": (48, 320, "JPEG", 224, 16, 192, 12, 16),
}


def write_model(folder: Path, side: int, patch: int, width: int, layers: int) -> None:
    """A stock I-JEPA encoder of random weights with its image processor."""
    torch.manual_seed(0)
    config = IJepaConfig(
        image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width,
    )  # fmt: skip
    IJepaModel(config, add_pooling_layer=False).save_pretrained(folder)
    fields = image_processor_fields((side, side), MEAN, STD)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def draw_images(count: int, side: int, kind: str) -> datasets.Dataset:
    """Scenes of shapes as encoded pictures in memory."""
    encoded = []
    for index in range(count):
        stream = io.BytesIO()
        draw_shape_scene(0, index, max(side, 32)).image.save(stream, kind)
        encoded.append({"bytes": stream.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))


def bare_loop(folder: Path, images: datasets.Dataset, batch_size: int) -> Callable[[], np.ndarray]:
    """What one writes by hand."""
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def extract() -> np.ndarray:
        features = []
        for start in range(0, len(images), batch_size):
            inputs = processor(images=images[start : start + batch_size]["image"], return_tensors="pt")
            with torch.no_grad():
                features.append(model(**inputs).last_hidden_state.mean(dim=1))
        return torch.cat(features).numpy()

    return extract


def ours(folder: Path, images: datasets.Dataset, batch_size: int, side: int) -> Callable[[], np.ndarray]:
    """What the command does, into a folder of its own each time."""
    backbone, rows = load_backbone(str(folder), (side, side)), ImageRows(images, "image", 3)
    compute = functools.partial(
        iterate_features, rows, encode=functools.partial(backbone.pooled, pooling="mean"),
        settings=ImageSettings((side, side), MEAN, STD), batch_size=batch_size,
    )  # fmt: skip

    def extract() -> np.ndarray:
        with tempfile.TemporaryDirectory() as root:
            return np.array(store_features(Path(root), {}, len(rows), (backbone.width,), compute).whole())

    return extract


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time both, round by round; the first round warms up and checks that they agree."""
    count, side, kind, model_side, patch, width, layers, batch_size = CASES[name]
    images = draw_images(count, side, kind)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), model_side, patch, width, layers)
        loops = {
            "bare loop": bare_loop(Path(folder), images, batch_size),
            "ours": ours(Path(folder), images, batch_size, model_side),
        }
        found = [loop() for loop in loops.values()]
        np.testing.assert_allclose(found[0], found[1], atol=1e-3)
        seconds: dict[str, list[float]] = {key: [] for key in loops}
        for turn in range(rounds):
            for key in list(loops) if turn % 2 else list(loops)[::-1]:
                start = time.perf_counter()
                loops[key]()
                seconds[key].append(time.perf_counter() - start)
    ratios = [theirs / mine for theirs, mine in zip(seconds["bare loop"], seconds["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": name,
        "images": count,
        "batch_size": batch_size,
        "rounds": rounds,
        "milliseconds_per_image": {key: 1e3 * statistics.median(took) / count for key, took in seconds.items()},
        "times_as_fast": {"median": middle, "quarter": low, "three_quarters": high},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| case | bare loop, ms an image | ours | times as fast |", "| --- | --- | --- | --- |"]
    for result in results:
        took, ratio = result["milliseconds_per_image"], result["times_as_fast"]
        lines.append(
            f"| {result['case']} | {took['bare loop']:.2f} | {took['ours']:.2f} | {ratio['median']:.2f} "
            f"({ratio['quarter']:.2f} to {ratio['three_quarters']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, at least 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds} must be at least 2, for there is no spread otherwise")
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    results = [measure(name, arguments.rounds) for name in CASES]
    print(table(results))
    if arguments.output:
        where = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {
            "torch": torch.__version__, "torch_threads": arguments.threads, "transformers": transformers.__version__,
        }  # fmt: skip
        arguments.output.write_text(json.dumps({**where, **versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
