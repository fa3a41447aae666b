"""Time and memory of kNN on 50,000 training and 10,000 test images, beside scikit-learn's brute force.

    python benchmarks/knn_blocks.py --output benchmarks/results/knn_blocks.json

Features of 384 float32 columns, 20 neighbours, one thread. Each run is a process of its own, which imports, reads the
features from files and warms up first; what counts is the processor time of the call (the clock is noted beside it),
and how far it raises the highest resident size that the kernel saw (ru_maxrss). The two take turns, so that whatever
else the machine does falls on both. The ratios are medians of scikit-learn's divided by ours.

scikit-learn's classifier votes with the same weights, in float32, so a few labels may differ where neighbours or votes
are closer than float32 can tell; how many is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from ijepa_hf.evaluation.knn import predict_knn

TEMPERATURE = 0.07
NUM_CLASSES = 100
PARTS = ("train_x", "train_y", "test_x")


def make_features(train: int, test: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters around one centre a class, so wide that they overlap, and a direction that all share."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(NUM_CLASSES, columns)).astype(np.float32)
    labels = generator.integers(0, NUM_CLASSES, train + test)
    features = generator.standard_normal((train + test, columns), dtype=np.float32)
    features = 3 * features + centres[labels] + 1
    return features[:train], labels[:train], features[train:]


def write_features(folder: Path, sizes: tuple[int, int, int]) -> None:
    """Write what `make_features` makes, a file a part."""
    for part, array in zip(PARTS, make_features(*sizes), strict=True):
        np.save(folder / f"{part}.npy", array)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, from a fresh process that ends with it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def our_labels(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int) -> np.ndarray:
    """Labels by this package."""
    return predict_knn(train_x, train_y, test_x, k=k, temperature=TEMPERATURE)


def scikit_learns_labels(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int) -> np.ndarray:
    """Labels by scikit-learn's brute force with the same vote."""
    classifier = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp(-distances / TEMPERATURE)
    )
    return classifier.fit(train_x, train_y).predict(test_x)


METHODS = {"ijepa_hf": our_labels, "scikit-learn": scikit_learns_labels}


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, folder: Path, k: int) -> tuple[float, float, int, np.ndarray]:
    """Seconds of the processor and of the clock, bytes beyond those before, and labels. For a fresh process."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        train_x, train_y, test_x = (np.load(folder / f"{part}.npy") for part in PARTS)
        warm_up = slice(0, 50 * k)
        METHODS[name](train_x[warm_up], train_y[warm_up], test_x[:10], k)
        before, start, busy = peak_bytes(), time.perf_counter(), time.process_time()
        labels = METHODS[name](train_x, train_y, test_x, k)
        return time.process_time() - busy, time.perf_counter() - start, peak_bytes() - before, labels


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=50_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--columns", type=int, default=384, help="columns of the features")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, at least 1")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    sizes = (arguments.train, arguments.test, arguments.columns)
    runs: dict[str, list[tuple[float, float, int, np.ndarray]]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        # A process begins with the resident size of the one that starts it as its peak, so this one stays small.
        in_a_process(write_features, Path(folder), sizes)
        for _ in range(arguments.rounds):
            for name in METHODS:
                runs[name].append(in_a_process(measure, name, Path(folder), arguments.k))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": [round(seconds, 2) for seconds, _, _, _ in taken],
            "clock_seconds": [round(seconds, 2) for _, seconds, _, _ in taken],
            "megabytes": [round(size / 1e6, 1) for _, _, size, _ in taken],
        }
        for name, taken in runs.items()
    }
    ratios = {
        quantity: statistics.median(rows["scikit-learn"][quantity]) / statistics.median(rows["ijepa_hf"][quantity])
        for quantity in ("seconds", "megabytes")
    }
    different = int(np.sum(runs["ijepa_hf"][0][3] != runs["scikit-learn"][0][3]))
    print("| method | processor seconds | megabytes beside the features |\n| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {statistics.median(row['seconds']):.1f} | {statistics.median(row['megabytes']):.0f} |")
    print(f"\n{ratios['seconds']:.2f} times as fast, with 1/{ratios['megabytes']:.1f} of the memory")
    print(f"{different} of {arguments.test} labels differ")
    if arguments.output:
        result = {
            "machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            "numpy": np.__version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__,
            "train": arguments.train, "test": arguments.test, "columns": arguments.columns, "k": arguments.k,
            "all_pairs_megabytes": arguments.train * arguments.test * 4 / 1e6,
            "runs": rows, "scikit_learn_over_ours": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "labels_that_differ": different,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
