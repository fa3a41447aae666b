"""`ijepa-hf estimate`: what a run will take, before it is started: parameters, FLOPs, memory, steps and hours.

Flags and their checks, the numbers put together, the table. The numbers themselves are those of step_cost.py and
step_timing.py.

What is not in it: reading images, talking between processes, evaluations, uploads.
"""

import argparse
import dataclasses
import difflib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ijepa_hf.estimation.cost import (
    Memory,
    Sizes,
    count_parameters,
    draw_sizes,
    estimate_memory,
    largest_batch,
    model_work,
    update_bytes,
)
from ijepa_hf.estimation.timing import HARDWARE, StepTime, measure_step_time, step_time_on
from ijepa_hf.files import write_text_atomically
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.recipes.arguments import DataArguments, ModelArguments, PretrainingArguments
from ijepa_hf.recipes.parsing import CommandParser, build_parser, parse_arguments, parse_flags
from ijepa_hf.recipes.recipe_files import load_recipe
from ijepa_hf.training.plan import make_plan
from ijepa_hf.training.step import eager_is_faster
from ijepa_hf.weights.starting_weights import open_starting_weights

DEFAULT_UTILIZATION = 0.35  # of the peak; docs/performance.md says what is known of it
MEASURING_SECONDS = 4.0  # at least, on the machine at hand
# Of a GPU's memory that no formula here is about: CUDA's own, and what the allocator cannot use.
RESERVED_BYTES, RESERVED_SHARE = 1e9, 0.05
# Of a machine's memory: an allocator wastes up to a fifth (benchmarks/estimate_check.py), others want some.
CPU_SHARE = 0.7

# Images of the training split of sets that are known by name; of others --num_images says it. Nothing is downloaded.
KNOWN_SIZES = {"digits": 1437, "shapes": 5000, "uoft-cs/cifar10": 50_000, "ILSVRC/imagenet-1k": 1_281_167}
MEASURED = ("this", "cpu")  # the machine at hand; and its CPU, also where it has a GPU


def build_estimate_parser() -> CommandParser:
    """Returns the parser of `ijepa-hf estimate`: its own flags, and all of `ijepa-hf pretrain`."""
    parser = build_parser("estimate")
    parser.description = (
        "Say what a run takes: parameters, FLOPs, memory, steps and hours. Flags as for pretrain, and:"
    )
    _add_flags(parser.add_argument_group("of estimate alone"))
    return parser


def _add_flags(parser: Any) -> None:
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"{', '.join(HARDWARE)}; this: the machine at hand, measured in seconds; cpu: its CPU. All but the last "
        "two if not given.",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        help=f"Share of named hardware's peak that is reached, 0 to 1; {DEFAULT_UTILIZATION} if not given.",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="Devices that share a step.")
    parser.add_argument("--num_images", type=int, help="Images of the data set, which is not opened.")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="Also write it as JSON; without a name, on the screen."
    )


def estimate(argv: Sequence[str]) -> str:
    """Says what a run takes.

    Args:
        argv: What follows `ijepa-hf estimate`: a recipe, flags of `ijepa-hf pretrain`, and those of its own.

    Returns:
        What to print: a table, or JSON.

    Raises:
        ValueError: If a flag or value is bad, masks come from the data, or weights to start from are not on this disk.
        FileNotFoundError: If the recipe, or the folder of a JSON file, does not exist.
    """
    named, arguments = _parse(argv)
    found = estimate_run(
        *arguments,
        hardware=named.hardware,
        utilization=named.utilization,
        num_processes=named.num_processes,
        num_images=named.num_images,
    )
    text = json.dumps(found, indent=2) + "\n"
    if named.json == "-":
        return text.rstrip("\n")
    if named.json is not None:
        write_text_atomically(Path(named.json), text)
    return render_estimate(found)


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
    """Works out what a run takes.

    Args:
        model_arguments: The model.
        data: Names the images, which are not opened.
        run: Everything else.
        hardware: A key of `HARDWARE`, `this` or `cpu`; all of `HARDWARE` if not given.
        utilization: Share of the peak of named hardware, 0 to 1.
        num_processes: Devices.
        num_images: Of the data set; the known number of a known set if not given.

    Returns:
        `masks`, `parameters`, `flops_per_image`, `run`, `memory` and `hardware`, of numbers, as in the JSON file.
        Lengths of time are seconds and hours, memory is bytes; what is not known is `None`.

    Raises:
        ValueError: As `estimate`.
    """
    _check(hardware, utilization, num_processes, num_images)
    config = _config(model_arguments, run)
    drawn = draw_sizes(config, run.per_device_train_batch_size)
    parameters = count_parameters(config)
    work = model_work(config, drawn, checkpointing=run.gradient_checkpointing)
    flops = sum(part.total for part in work.values())
    length = _length(data, run, num_processes, num_images)
    accelerator = None
    if hardware in MEASURED:
        if run.num_cpu_threads is not None:
            torch.set_num_threads(run.num_cpu_threads)
        accelerator = Accelerator(mixed_precision=run.mixed_precision, cpu=hardware == "cpu")
    on_cpu = accelerator is not None and accelerator.device.type == "cpu"
    attention = model_arguments.attn_implementation
    eager = attention == "eager"
    if attention is None:
        eager = eager_is_faster("cpu" if on_cpu else "cuda", run.mixed_precision)

    def memory(images: int) -> Memory:
        """Of the masks that need most."""
        found = (
            estimate_memory(
                config,
                sizes,
                parameters,
                images,
                bf16=run.mixed_precision == "bf16",
                checkpointing=run.gradient_checkpointing,
                selective=run.selective_checkpointing,
                eager=eager,
                accumulates=run.gradient_accumulation_steps > 1,
                is_distributed=num_processes > 1,
            )
            for sizes in drawn
        )
        return max(found, key=lambda one: one.peak)

    images_of_device = run.per_device_train_batch_size * run.gradient_accumulation_steps
    rows = []
    for name in [hardware] if hardware is not None else list(HARDWARE):
        share: float | None = None
        if accelerator is not None:
            time_of_step: StepTime | None = measure_step_time(
                config,
                run,
                accelerator,
                attn_implementation=model_arguments.attn_implementation,
                seconds=MEASURING_SECONDS,
            )
            total_memory = _memory_here(accelerator.device)
        else:
            share = DEFAULT_UTILIZATION if utilization is None else utilization
            kind = HARDWARE[name]
            total_memory = kind.memory
            time_of_step = step_time_on(
                kind,
                flops * images_of_device,
                update_bytes(parameters),
                bf16=run.mixed_precision == "bf16",
                utilization=share,
            )
        usable = CPU_SHARE * total_memory if on_cpu else (1 - RESERVED_SHARE) * total_memory - RESERVED_BYTES
        rows.append(
            {
                "name": name,
                "utilization": share,
                "memory_bytes": total_memory,
                "largest_batch": largest_batch(lambda images: memory(images).peak, usable),
                **_times(time_of_step, length, flops * images_of_device),
            }
        )
    return {
        "masks": _describe_masks(config, drawn),
        "parameters": {
            **dataclasses.asdict(parameters),
            "trained": parameters.trained,
            "total": parameters.total,
        },
        "flops_per_image": {**{name: dataclasses.asdict(part) for name, part in work.items()}, "total": flops},
        "run": {
            "per_device_train_batch_size": run.per_device_train_batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "num_processes": num_processes,
            "mixed_precision": run.mixed_precision,
            "gradient_checkpointing": run.gradient_checkpointing,
            "selective_checkpointing": run.selective_checkpointing,
            **dataclasses.asdict(length),
            "flops": None if length.images is None else flops * length.images,
        },
        "memory": dataclasses.asdict(memory(run.per_device_train_batch_size)),
        "hardware": rows,
    }


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


def render_estimate(found: dict[str, Any]) -> str:
    """The numbers of `estimate_run` as text.

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
        f"{'':<18}{'parameters':>15}{'GFLOP an image:':>18}{'forward':>10}{'backward':>10}{'recomputed':>12}",
    ]
    for name in ("context_encoder", "predictor", "target_encoder"):
        part = found["flops_per_image"][name]
        figures = [part["forward"], part["backward"], part["recomputed"]]
        lines.append(
            f"{name.replace('_', ' '):<18}{found['parameters'][name]:>15,}{sum(figures) / 1e9:>18.4g}"
            + "".join(f"{figure / 1e9:>{size}.4g}" for figure, size in zip(figures, (10, 10, 12), strict=True))
        )
    lines += [
        f"{'together':<18}{found['parameters']['total']:>15,}{found['flops_per_image']['total'] / 1e9:>18.4g}",
        f"{'trained':<18}{found['parameters']['trained']:>15,}",
        "",
        f"memory of a process, micro-batches of {run['per_device_train_batch_size']} images, not all of it at once",
    ]
    for name, title in (
        ("weights", "weights, float32"),
        ("weight_copies", "their bfloat16 copies"),
        ("optimizer", "AdamW's moments"),
        ("gradients", "gradients"),
        ("buckets", "exchange buckets"),
        ("activations", "activations"),
        ("working", "beside them"),
        ("batch", "batch"),
        ("peak", "at the peak"),
    ):
        if memory[name]:
            lines.append(f"  {title:<24}{_bytes(memory[name]):>10}")
    lines += ["", f"{'hardware':<18}{'largest batch':>15}{'seconds a step':>18}{'images/s':>10}{'hours':>10}"]
    for row in found["hardware"]:
        if row["seconds_per_step"] is None:
            lines.append(f"{row['name']:<18}{row['largest_batch']:>15}   has no bfloat16: --mixed_precision no")
            continue
        hours = "" if row["hours"] is None else f"{row['hours']:,.{0 if row['hours'] >= 100 else 2}f}"
        speed = f"{row['images_per_second']:,.0f}"
        line = f"{row['name']:<18}{row['largest_batch']:>15}{row['seconds_per_step']:>18.3g}{speed:>10}{hours:>10}"
        if row["utilization"] is None:
            low, high = row["seconds_per_step_range"]
            line += f"   ({low:.3g}-{high:.3g} s, {row['flops_per_second'] / 1e9:.3g} GFLOP/s)"
        lines.append(line)
    shares = {row["utilization"] for row in found["hardware"]} - {None}
    basis = f"at {100 * shares.pop():.3g} % of the peak, an assumption (--utilization)" if shares else "measured here"
    return "\n".join([*lines, "", f"{basis}; without reading images, exchange between processes, evaluations."])


def _length_line(run: dict[str, Any]) -> str:
    if run["steps"] is None:
        return "length     not known, since the number of images is not: write --num_images"
    epochs = "" if run["epochs"] is None else f", {run['epochs']:.4g} epochs"
    return f"length     {run['steps']:,} steps{epochs}, {run['images']:,} images, {run['flops']:.3g} FLOP"


@dataclass(frozen=True)
class _Length:
    global_batch_size: int
    steps: int | None
    epochs: float | None
    images: int | None


def _length(data: DataArguments, run: PretrainingArguments, num_processes: int, num_images: int | None) -> _Length:
    """How long the run is, as far as that is known without its images."""
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


def _parse(
    argv: Sequence[str],
) -> tuple[argparse.Namespace, tuple[ModelArguments, DataArguments, PretrainingArguments]]:
    """Flags of its own, and the arguments of the run; images need no name here."""
    named = parse_flags(build_estimate_parser(), argv)
    own = argparse.ArgumentParser(prog="ijepa-hf estimate", add_help=False, allow_abbrev=False)
    _add_flags(own)
    rest = own.parse_known_args(argv)[1]
    if named.recipe is not None and rest[0] != named.recipe:
        raise ValueError(
            f"{named.recipe!r} stands after a flag; the recipe comes first: ijepa-hf estimate {named.recipe} ..."
        )
    if named.json not in (None, "-"):
        path = Path(named.json)
        if path.suffix != ".json":
            raise ValueError(f"json={named.json!r} must end in .json, for example --json estimate.json.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"json={named.json!r}: there is no folder {str(path.parent)!r}; make it first.")
    recipe = {} if named.recipe is None else load_recipe(named.recipe)
    if named.dataset_name is None and recipe.get("dataset_name") is None:
        rest += ["--dataset_name", "not named"]
    if all(value is None for value in (named.learning_rate, named.base_learning_rate)) and not (
        recipe.keys() & {"learning_rate", "base_learning_rate"}
    ):
        rest += ["--learning_rate", "0"]
    return named, parse_arguments(rest)


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
