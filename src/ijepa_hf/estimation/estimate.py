"""Estimates parameters, FLOPs, memory, steps and hours of a run, as numbers and as a table.

The numbers are those of cost.py and timing.py. Not counted are reading images, exchange between processes, evaluations
and uploads.
"""

import dataclasses
import difflib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ijepa_hf.escaping import text_table
from ijepa_hf.estimation.cost import (
    Memory,
    Sizes,
    StepSettings,
    count_parameters,
    draw_sizes,
    estimate_memory,
    largest_batch,
    model_work,
    update_bytes,
)
from ijepa_hf.estimation.timing import HARDWARE, StepTime, measure_step_time, step_time_on
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.training.plan import make_plan
from ijepa_hf.training.step import eager_is_faster
from ijepa_hf.weights.starting_weights import open_starting_weights

DEFAULT_UTILIZATION = 0.35  # of the peak; docs/performance.md says what is known of it
MEASURING_SECONDS = 4.0  # at least, on the machine at hand
# Of a GPU's memory, what no formula covers: CUDA's own, and what the allocator cannot use.
RESERVED_BYTES, RESERVED_SHARE = 1e9, 0.05
# Of a machine's memory: an allocator wastes up to a fifth (benchmarks/estimate_check.py), other programs need some.
CPU_SHARE = 0.7

# Images of the training split of sets that are known by name; for others --num_images. Nothing is downloaded.
KNOWN_SIZES = {"digits": 1437, "shapes": 5000, "uoft-cs/cifar10": 50_000, "ILSVRC/imagenet-1k": 1_281_167}
MEASURED = ("this", "cpu")  # the machine at hand; its CPU, even if it has a GPU


def estimate_run(
    model_arguments: ModelArguments,
    data: DataArguments,
    run: PretrainingArguments,
    *,
    hardware: str | None = None,
    utilization: float | None = None,
    num_processes: int = 1,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Estimates parameters, FLOPs, memory and time of a run.

    Args:
        model_arguments: The model.
        data: Names the images, which are not opened.
        run: Everything else.
        hardware: A key of `HARDWARE`, `this` or `cpu`; all of `HARDWARE` if not given.
        utilization: Share of the peak of named hardware, above 0 and at most 1.
        num_processes: Devices, at least 1.
        num_images: Images of the data set; the known number of a known set if not given.

    Returns:
        `masks`, `parameters`, `flops_per_image`, `run`, `memory` and `hardware`, of numbers, as in the JSON file.
        Times are in seconds or hours, memory is in bytes; what is not known is `None`.

    Raises:
        ValueError: If a value is bad, or weights to start from are not on this disk.
    """
    _check(hardware, utilization, num_processes, num_images)
    config = _config(model_arguments, run)
    drawn = draw_sizes(config, run.per_device_train_batch_size)
    parameters = count_parameters(config)
    work = model_work(config, drawn, checkpointing=run.gradient_checkpointing)
    flops = sum(part.total for part in work.values())
    length = _length(data, run, num_processes, num_images)
    attention = model_arguments.attn_implementation
    accelerator = _accelerator(run, hardware) if hardware in MEASURED else None
    on_cpu = accelerator is not None and accelerator.device.type == "cpu"
    is_bf16 = run.mixed_precision == "bf16"
    settings = StepSettings(
        bf16=is_bf16,
        checkpointing=run.gradient_checkpointing,
        selective=run.selective_checkpointing,
        eager=attention == "eager"
        or (attention is None and eager_is_faster("cpu" if on_cpu else "cuda", run.mixed_precision)),
        accumulates=run.gradient_accumulation_steps > 1,
        is_distributed=num_processes > 1,
    )

    def memory(images: int) -> Memory:
        """Returns the memory with the masks that need the most."""
        found = (estimate_memory(config, sizes, parameters, images, settings) for sizes in drawn)
        return max(found, key=lambda one: one.peak)

    def row(name: str, share: float | None, total_memory: float, time_of_step: StepTime | None) -> dict[str, Any]:
        usable = CPU_SHARE * total_memory if on_cpu else (1 - RESERVED_SHARE) * total_memory - RESERVED_BYTES
        return {
            "name": name,
            "utilization": share,
            "memory_bytes": total_memory,
            "largest_batch": largest_batch(lambda images: memory(images).peak, usable),
            **_times(time_of_step, length, flops_of_step),
        }

    flops_of_step = flops * run.per_device_train_batch_size * run.gradient_accumulation_steps
    if accelerator is not None and hardware is not None:
        measured = measure_step_time(
            config, run, accelerator, attn_implementation=attention, seconds=MEASURING_SECONDS
        )
        rows = [row(hardware, None, _memory_here(accelerator.device), measured)]
    else:
        share, moved = utilization or DEFAULT_UTILIZATION, update_bytes(parameters)
        kinds = HARDWARE if hardware is None else {hardware: HARDWARE[hardware]}
        rows = [
            row(name, share, kind.memory, step_time_on(kind, flops_of_step, moved, bf16=is_bf16, utilization=share))
            for name, kind in kinds.items()
        ]
    return {
        "masks": _describe_masks(config, drawn),
        "parameters": {**dataclasses.asdict(parameters), "trained": parameters.trained, "total": parameters.total},
        "flops_per_image": {**{name: dataclasses.asdict(part) for name, part in work.items()}, "total": flops},
        "run": _describe_run(run, num_processes, length, flops),
        "memory": dataclasses.asdict(memory(run.per_device_train_batch_size)),
        "hardware": rows,
    }


def _accelerator(run: PretrainingArguments, hardware: str | None) -> Accelerator:
    if run.num_cpu_threads is not None:
        torch.set_num_threads(run.num_cpu_threads)
    return Accelerator(mixed_precision=run.mixed_precision, cpu=hardware == "cpu")


def _describe_masks(config: IJepaConfig, drawn: Sequence[Sizes]) -> dict[str, Any]:
    contexts, targets = [sizes.context for sizes in drawn], [sizes.target for sizes in drawn]
    return {
        "patches": config.num_patches,
        "grid": list(config.grid_size),
        "context_sets": config.num_context_sets,
        "context_patches": statistics.mean(contexts),
        "context_patches_range": [min(contexts), max(contexts)],
        "target_blocks": drawn[0].blocks,
        "target_patches": statistics.mean(targets),
        "target_patches_range": [min(targets), max(targets)],
    }


def _describe_run(run: PretrainingArguments, num_processes: int, length: "_Length", flops: float) -> dict[str, Any]:
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "mixed_precision",
        "gradient_checkpointing",
        "selective_checkpointing",
    )
    return {
        **{name: getattr(run, name) for name in names},
        "num_processes": num_processes,
        **dataclasses.asdict(length),
        "flops": None if length.images is None else flops * length.images,
    }


_MEMORY_TITLES = {
    "weights": "weights, float32",
    "weight_copies": "their bfloat16 copies",
    "optimizer": "AdamW's moments",
    "gradients": "gradients",
    "buckets": "exchange buckets",
    "activations": "activations",
    "working": "temporary memory",
    "batch": "batch",
    "peak": "at the peak",
}


def render_estimate(found: dict[str, Any]) -> str:
    """Writes the numbers of `estimate_run` as text.

    Args:
        found: From `estimate_run`.

    Returns:
        Several lines.
    """
    masks, run, memory = found["masks"], found["run"], found["memory"]
    sets = f"{masks['context_sets']} x " if masks["context_sets"] > 1 else ""
    context, target = (
        f"{masks[name]:.0f} ({masks[f'{name}_range'][0]}-{masks[f'{name}_range'][1]})"
        for name in ("context_patches", "target_patches")
    )
    lines = [
        f"masks      {sets}{context} context patches of {masks['grid'][0]}x{masks['grid'][1]}, "
        f"{masks['target_blocks']} targets of {target}",
        f"batch      {run['global_batch_size']} images a step = {run['per_device_train_batch_size']} x "
        f"{run['gradient_accumulation_steps']} micro-batches x {run['num_processes']} processes",
        _length_line(run),
        "",
        *_table_of_parts(found),
        "",
        f"memory of a process with micro-batches of {run['per_device_train_batch_size']} images; not all of it is in "
        "use at the same time",
        *text_table(
            [[title, _bytes(memory[name])] for name, title in _MEMORY_TITLES.items() if memory[name]], indent="  "
        ),
        "",
        *_table_of_hardware(found["hardware"]),
        "",
    ]
    shares = {row["utilization"] for row in found["hardware"]} - {None}
    basis = f"assumed: {100 * shares.pop():.3g} % of the peak (--utilization)" if shares else "measured here"
    return "\n".join([*lines, f"{basis}; without reading images, exchange between processes, evaluations."])


def _table_of_parts(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = [["", "parameters", "GFLOP an image:", "forward", "backward", "recomputed"]]
    for name in ("context_encoder", "predictor", "target_encoder"):
        part = found["flops_per_image"][name]
        flops = [part["forward"], part["backward"], part["recomputed"]]
        figures = [f"{figure / 1e9:.4g}" for figure in (sum(flops), *flops)]
        rows.append([name.replace("_", " "), f"{found['parameters'][name]:,}", *figures])
    parameters = found["parameters"]
    rows.append(["together", f"{parameters['total']:,}", f"{found['flops_per_image']['total'] / 1e9:.4g}"])
    return text_table([*rows, ["trained", f"{parameters['trained']:,}"]])


def _table_of_hardware(hardware: Sequence[dict[str, Any]]) -> list[str]:
    rows: list[list[str]] = [["hardware", "largest batch", "seconds a step", "images/s", "hours"]]
    without_bf16: list[str] = []
    for row in hardware:
        cells = [row["name"], str(row["largest_batch"])]
        if row["seconds_per_step"] is None:
            rows.append([*cells, "-"])
            without_bf16.append(row["name"])
            continue
        hours = "" if row["hours"] is None else f"{row['hours']:,.{0 if row['hours'] >= 100 else 2}f}"
        cells += [f"{row['seconds_per_step']:.3g}", f"{row['images_per_second']:,.0f}", hours]
        if row["utilization"] is None:
            low, high = row["seconds_per_step_range"]
            cells.append(f"({low:.3g}-{high:.3g} s, {row['flops_per_second'] / 1e9:.3g} GFLOP/s)")
        rows.append(cells)
    return [*text_table(rows), *(f"{name} has no bfloat16: use --mixed_precision no" for name in without_bf16)]


def _length_line(run: dict[str, Any]) -> str:
    if run["steps"] is None:
        return "length     not known, because the number of images is not; give it with --num_images"
    epochs = "" if run["epochs"] is None else f", {run['epochs']:.4g} epochs"
    return f"length     {run['steps']:,} steps{epochs}, {run['images']:,} images, {run['flops']:.3g} FLOP"


@dataclass(frozen=True)
class _Length:
    global_batch_size: int
    steps: int | None
    epochs: float | None
    images: int | None


def _length(data: DataArguments, run: PretrainingArguments, num_processes: int, num_images: int | None) -> _Length:
    """Computes the length of the run; fields that depend on an unknown number of images are `None`."""
    if num_images is None and data.train_split_name == "train":
        num_images = KNOWN_SIZES.get(str(data.dataset_name))
    if data.max_train_samples is not None:
        num_images = min(num_images or data.max_train_samples, data.max_train_samples)
    batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * num_processes
    if num_images is not None:
        plan = make_plan(run, num_images, num_processes)
        return _Length(batch, plan.num_steps, plan.num_steps / plan.steps_per_epoch, plan.num_steps * batch)
    steps = run.max_train_steps
    return _Length(batch, steps, None, None if steps is None else steps * batch)


def _times(time_of_step: StepTime | None, length: _Length, flops: float) -> dict[str, Any]:
    if time_of_step is None:
        names = ("seconds_per_step", "seconds_per_step_range", "images_per_second", "flops_per_second", "hours")
        return dict.fromkeys(names)
    seconds = time_of_step.seconds
    return {
        "seconds_per_step": seconds,
        "seconds_per_step_range": [time_of_step.low, time_of_step.high],
        "images_per_second": length.global_batch_size / seconds,
        "flops_per_second": flops / seconds,
        "hours": None if length.steps is None else length.steps * seconds / 3600,
    }


def _bytes(number: float) -> str:
    unit, size = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
    return f"{number / size:,.3g} {unit}" if number < 1e12 else f"{number / size:,.0f} {unit}"


def _memory_here(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _config(model_arguments: ModelArguments, run: PretrainingArguments) -> IJepaConfig:
    if run.model_name_or_path is None:
        return model_arguments.to_config()
    if not Path(run.model_name_or_path).exists():
        raise ValueError(
            f"model_name_or_path={run.model_name_or_path!r} is not on this disk, and nothing is downloaded for an "
            "estimate; name a folder or file, or leave it out and give the model's sizes (--hidden_size, ...)."
        )
    heads = model_arguments.num_attention_heads if "num_attention_heads" in model_arguments.given else None
    return model_arguments.to_config(open_starting_weights(run.model_name_or_path, num_attention_heads=heads).config)


def _check(hardware: str | None, utilization: float | None, num_processes: int, num_images: int | None) -> None:
    names = [*HARDWARE, *MEASURED]
    if hardware is not None and hardware not in names:
        nearest = difflib.get_close_matches(hardware.lower(), names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"hardware={hardware!r} must be one of {', '.join(names)}{hint}")
    if utilization is not None:
        if not 0.0 < utilization <= 1.0:
            raise ValueError(f"utilization={utilization} must be in (0, 1]; {DEFAULT_UTILIZATION} if not given.")
        if hardware in MEASURED:
            raise ValueError(f"utilization={utilization} is not used with hardware={hardware!r}, which is measured.")
    for name, value in (("num_processes", num_processes), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
