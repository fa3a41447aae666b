"""Compares what `ijepa-hf estimate` predicts on this machine, seconds and bytes, with real training steps.

    python benchmarks/estimate_check.py --output benchmarks/results/estimate_check.json
    python benchmarks/estimate_check.py --memory --output benchmarks/results/estimate_check.json
    python benchmarks/estimate_check.py --cases digits --threads 1      (one row, printed only)

Predictions and real steps of the whole model take turns in one process, a prediction first, so that whatever else the
machine does falls on both; `predicted / measured` is taken within each round. Real steps have masks of other draws
than the prediction, and their seconds are scaled by mean work / work of their masks: published masks differ by half
between steps, and few steps are timed. Memory (`--memory`): the peak of a process of its own, less what it had before
the model was made; once as it is, and once with an allocator that gives everything back (glibc's
MALLOC_MMAP_THRESHOLD_), since what is predicted is what tensors take. With `--output`, rows of other cases that the
file holds already are kept.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from ijepa_hf.estimation.cost import Sizes, StepSettings, count_parameters, draw_sizes, estimate_memory, model_work
from ijepa_hf.estimation.timing import measure_step_time
from ijepa_hf.model.mask_audit import TRIALS
from ijepa_hf.model.masking import draw_masks
from ijepa_hf.model.modeling_ijepa import new_model
from ijepa_hf.randomness import keyed_generator
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.training.plan import StepValues
from ijepa_hf.training.step import set_up_model

SECONDS_TO_PREDICT = 2.0
SMALL_VIT = (
    "in1k-vitb16 --mixed_precision no --hidden_size 384 --num_attention_heads 6 --intermediate_size 1536 "
    "--predictor_hidden_size 192"
)
CASES = {
    "digits": "digits",
    "cifar10-vit-micro": "cifar10-vit-micro",
    "cifar10-vit-tiny, batch 16": "cifar10-vit-tiny --per_device_train_batch_size 16",
    "cifar10-vit-tiny, batch 128": "cifar10-vit-tiny",
    "ViT-S/16 at 224, batch 4": f"{SMALL_VIT} --per_device_train_batch_size 4",
    "ViT-S/16 at 224, batch 8": f"{SMALL_VIT} --per_device_train_batch_size 8",
    "ViT-S/16 at 224, batch 4, checkpointing": f"{SMALL_VIT} --per_device_train_batch_size 4 --gradient_checkpointing",
    "ViT-S/16 at 224, batch 4, bf16": f"{SMALL_VIT} --per_device_train_batch_size 4 --mixed_precision bf16",
    "narrow and deep": "digits --num_hidden_layers 24 --predictor_num_hidden_layers 8",
    "wide, two micro-batches": (
        "cifar10-vit-tiny --hidden_size 576 --num_attention_heads 9 --num_hidden_layers 6 --predictor_hidden_size 288 "
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 2"
    ),
    "ViT-B/8 at 96, batch 2": (
        "in1k-vitb16 --mixed_precision no --image_size 96 --patch_size 8 --per_device_train_batch_size 2"
    ),
}
MEMORY_CASES = ("cifar10-vit-tiny, batch 128", "ViT-S/16 at 224, batch 8", "ViT-S/16 at 224, batch 4, checkpointing")


class Training:
    """The whole model, which takes real steps."""

    def __init__(self, flags: str) -> None:
        self.model_arguments, _, self.run = parse_arguments([*flags.split(), "--output_dir", "unused"])
        self.config = self.model_arguments.to_config()
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        self.accelerator = Accelerator(cpu=True, mixed_precision=self.run.mixed_precision)

    def build(self) -> None:
        """Makes model, optimiser and the micro-batches of several steps."""
        self.ready = set_up_model(new_model(self.config, 0), self.run, self.accelerator)
        size = self.run.per_device_train_batch_size
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(size, self.config.num_channels, *self.config.image_shape, generator=generator)
        self.batches = []
        drawn = draw_sizes(self.config, size)
        self.mean_work = self._work(drawn)
        for step in range(TRIALS):
            masks = draw_masks(self.config.mask_settings(), size, keyed_generator(1, step))
            named = {"context_indices": masks.context_indices, "target_indices": masks.target_indices}
            self.batches.append({"pixel_values": pixels, **named})
        self.number = 0

    def _work(self, drawn: list[Sizes]) -> float:
        work = model_work(self.config, drawn, checkpointing=self.run.gradient_checkpointing)
        return sum(part.total for part in work.values())

    def _sizes(self, batch: dict[str, torch.Tensor]) -> Sizes:
        blocks, target = batch["target_indices"].shape[1:]
        context = batch["context_indices"].shape[-1]
        return Sizes(self.config.num_patches, self.config.num_context_sets, context, blocks, target)

    def step(self) -> float:
        """Seconds of one training step, scaled to masks of mean work."""
        accumulated = self.run.gradient_accumulation_steps
        micro_batches = [self.batches[(self.number + one) % TRIALS] for one in range(accumulated)]
        self.number += accumulated
        values = StepValues(learning_rate=1e-4, weight_decay=0.04, ema_momentum=0.996)
        begin = time.perf_counter()
        self.ready.step(micro_batches, values)
        seconds = time.perf_counter() - begin
        return seconds * self.mean_work / self._work([self._sizes(batch) for batch in micro_batches])


def compare_times(name: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Predicted and measured seconds of a step of one case."""
    torch.set_num_threads(threads)
    training = Training(CASES[name])
    training.build()
    training.step()
    predicted, measured, ratios = [], [], []
    for _ in range(rounds):
        found = measure_step_time(training.config, training.run, training.accelerator, seconds=SECONDS_TO_PREDICT)
        training.step()  # what the prediction left in caches and allocators is not its own
        steps: list[float] = []
        while len(steps) < 3 or (sum(steps) < seconds and len(steps) < TRIALS):
            steps.append(training.step())
        predicted.append(found.seconds)
        measured.append(statistics.median(steps))
        ratios.append(predicted[-1] / measured[-1])
    flops = training.run.per_device_train_batch_size * training.run.gradient_accumulation_steps * training.mean_work
    row = {
        "case": name,
        "threads": threads,
        "predicted_seconds": statistics.median(predicted),
        "measured_seconds": statistics.median(measured),
        "predicted_over_measured": statistics.median(ratios),
        "least_and_most": [min(ratios), max(ratios)],
        "gflops_per_second": flops / statistics.median(measured) / 1e9,
        "rounds": rounds,
    }
    print(
        f"{name:<42} {threads} threads: predicted {1e3 * row['predicted_seconds']:8.1f} ms, measured "
        f"{1e3 * row['measured_seconds']:8.1f} ms, {row['predicted_over_measured']:.3f} ({min(ratios):.3f}-"
        f"{max(ratios):.3f}), {row['gflops_per_second']:.0f} GFLOP/s",
        flush=True,
    )
    return row


def peak_of_process(name: str) -> float:
    """Bytes that a process of its own takes for three steps, beyond what it has after steps of a tiny model."""
    warm_up = Training(CASES["digits"])
    warm_up.build()  # brings the code of libraries into memory
    for _ in range(3):
        warm_up.step()
    training = Training(CASES[name])
    before = _peak_bytes()
    training.build()
    for _ in range(3):
        training.step()
    return _peak_bytes() - before


def _peak_bytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare_memory(name: str) -> dict[str, Any]:
    """Predicted and measured peak of one case."""
    measured = []
    for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        command = [sys.executable, __file__, "--peak_of", name]
        environment = {**os.environ, **settings}
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        measured.append(float(answer.stdout.split()[-1]))
    training = Training(CASES[name])
    peaks = [
        estimate_memory(
            training.config,
            sizes,
            count_parameters(training.config),
            training.run.per_device_train_batch_size,
            StepSettings(
                bf16=training.run.mixed_precision == "bf16", checkpointing=training.run.gradient_checkpointing
            ),
        ).peak
        for sizes in draw_sizes(training.config, training.run.per_device_train_batch_size)
    ]
    predicted = max(peaks)
    print(
        f"{name:<42} predicted {predicted / 1e6:,.0f} MB, measured {measured[0] / 1e6:,.0f} MB, "
        f"{measured[1] / 1e6:,.0f} MB with all given back",
        flush=True,
    )
    return {
        "case": name,
        "predicted_bytes": predicted,
        "measured_bytes": measured[0],
        "measured_bytes_all_given_back": measured[1],
        "predicted_over_measured": predicted / measured[0],
        "predicted_over_measured_all_given_back": predicted / measured[1],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of real steps in a round")
    parser.add_argument("--memory", action="store_true", help="compare memory instead of time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak_of", choices=list(CASES), help=argparse.SUPPRESS)
    named = parser.parse_args()
    if named.peak_of:
        torch.set_num_threads(1)
        print(peak_of_process(named.peak_of))
        return
    rows: dict[str, list[dict[str, Any]]] = {"times": [], "memory": []}
    if named.memory:
        rows["memory"] = [compare_memory(name) for name in MEMORY_CASES if name in named.cases]
    else:
        rows["times"] = [
            compare_times(name, threads, named.rounds, named.seconds)
            for name in named.cases
            for threads in named.threads
        ]
    if named.output:
        kept = json.loads(named.output.read_text()) if named.output.exists() else {}
        for kind, new in rows.items():
            places = {(row["case"], row.get("threads")) for row in new}
            old = [row for row in kept.get(kind, []) if (row["case"], row.get("threads")) not in places]
            names = list(CASES)
            rows[kind] = sorted([*old, *new], key=lambda row: (names.index(row["case"]), row.get("threads", 0)))
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        named.output.write_text(json.dumps({**machine, **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
