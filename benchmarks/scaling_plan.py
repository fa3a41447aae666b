"""Computes how two large runs would go: ViT-H/14 on ImageNet-1k, and a giant on a billion streamed images.

    python benchmarks/scaling_plan.py                    # the tables of docs/scaling.md
    python benchmarks/scaling_plan.py --json -           # the numbers, inputs included
    python benchmarks/scaling_plan.py --measure          # measures saving here, and writes results/scaling_plan.json

Every number comes from a formula whose inputs are of three kinds: measured ones, read out of a file in `results`; what
the package itself works out (parameters, FLOPs, activations, bytes of a checkpoint), by the functions of `ijepa-hf
estimate`; and what is assumed of hardware, each a flag. None of it was run on a GPU.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ijepa_hf.data.prepare.prepare import parse_size
from ijepa_hf.estimation.cost import (
    Parameters,
    StepSettings,
    count_parameters,
    draw_sizes,
    estimate_memory,
    meta_model,
    model_work,
    update_bytes,
)
from ijepa_hf.estimation.estimate import DEFAULT_UTILIZATION, RESERVED_BYTES, RESERVED_SHARE
from ijepa_hf.estimation.timing import HARDWARE, step_time_on
from ijepa_hf.files import flush_to_disk, write_text_atomically
from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.recipes.arguments import ModelArguments, PretrainingArguments
from ijepa_hf.recipes.parsing import parse_arguments
from ijepa_hf.training.plan import make_plan

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT = RESULTS / "scaling_plan.json"
SPEED = RESULTS / "2026-11-29-intel-xeon-2-cores.json"
READING = "prepared images a core, normalised on the device"
READING_PHOTOGRAPHS = "photographs a core, normalised on the device"
FLOAT = 4  # bytes of float32, in which weights, moments and gradients are kept and exchanged
CHECKPOINTING = ("none", "selective", "full")
# Of a GPU, bytes/s one way: NVLink (half of what the data sheets of A100 and H100 say for both ways together), and one
# network adapter for each GPU, of 200 and 400 Gb/s, as in a DGX A100 and a DGX H100.
LINKS = {"a100-80gb": (300e9, 25e9), "h100-sxm": (450e9, 50e9)}
SAVED_BYTES, SAVES = 400_000_000, 5


# -- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured on this project's machines.

    Args:
        prepared_bytes: Of an image as `ijepa-hf prepare --shortest_side 256` writes it, JPEG.
        photograph_bytes: Of the photograph that it was made of.
        prepared_seconds: Of one CPU core, to read, decode and crop a prepared image to 224x224.
        photograph_seconds: The same for the photograph itself.
        write_seconds_per_byte: To write a safetensors file and wait until it is on disk.
        hash_seconds_per_byte: Of SHA-256, by which a checkpoint is checked.
    """

    prepared_bytes: float
    photograph_bytes: float
    prepared_seconds: float
    photograph_seconds: float
    write_seconds_per_byte: float
    hash_seconds_per_byte: float

    @property
    def save_bytes_per_second(self) -> float:
        """Of a save: written, flushed, hashed."""
        return 1 / (self.write_seconds_per_byte + self.hash_seconds_per_byte)


def read_measured(speed: Path = SPEED, saves: Path = OUTPUT) -> Measured:
    """Reads the measured inputs out of committed results.

    Args:
        speed: Of `benchmarks/speed.py`: the rows `READING` and `READING_PHOTOGRAPHS`.
        saves: Of this script: `save`.

    Returns:
        The numbers.
    """
    rows = {row["name"]: row for row in json.loads(speed.read_text("utf-8"))["rows"]}
    sizes = re.search(r"an image has (\d+) kB, prepared (\d+) kB", rows[READING]["note"])
    assert sizes is not None
    save = json.loads(saves.read_text("utf-8"))["save"]
    return Measured(
        prepared_bytes=1e3 * int(sizes[2]),
        photograph_bytes=1e3 * int(sizes[1]),
        prepared_seconds=1e-3 * rows[READING]["ours"]["median"],
        photograph_seconds=1e-3 * rows[READING_PHOTOGRAPHS]["ours"]["median"],
        write_seconds_per_byte=statistics.median(save["write_seconds"]) / save["bytes"],
        hash_seconds_per_byte=statistics.median(save["hash_seconds"]) / save["bytes"],
    )


def measure_save() -> dict[str, Any]:
    """Times what a checkpoint's file goes through: written by safetensors, flushed to disk, hashed.

    Returns:
        `bytes`, and `write_seconds` and `hash_seconds` of each of `SAVES` files.
    """
    tensors = {f"{number}": torch.rand(SAVED_BYTES // 16) for number in range(4)}
    writes, hashes = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(SAVES):
            began = time.perf_counter()
            save_file(tensors, path)
            flush_to_disk(path)
            written = time.perf_counter()
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
            writes.append(written - began)
            hashes.append(time.perf_counter() - written)
            path.unlink()
    return {"bytes": SAVED_BYTES, "write_seconds": writes, "hash_seconds": hashes, "cores": os.cpu_count()}


@dataclass(frozen=True)
class Assumed:
    """What is assumed of hardware; nothing of it was measured.

    Args:
        utilization: Share of a GPU's peak that training reaches.
        gpus_per_node: GPUs that the fast links join.
        node_bytes_per_second: Of a GPU to the others of its node, one way; that of `LINKS` if not given.
        network_bytes_per_second: Of a GPU's share of the network between nodes, one way, in bytes per second.
        link_utilization: Share of these that exchanges reach.
        request_seconds: From asking a store for a shard's footer to having it.
        requests_at_once: Footers that are asked for at once, as streaming.py does.
    """

    utilization: float = DEFAULT_UTILIZATION
    gpus_per_node: int = 8
    node_bytes_per_second: float | None = None
    network_bytes_per_second: float | None = None
    link_utilization: float = 0.7
    request_seconds: float = 0.1
    requests_at_once: int = 16

    def links(self, hardware: str) -> tuple[float, float]:
        """Bytes per second that exchanges of a GPU reach inside its node and between nodes."""
        node, network = LINKS[hardware]
        node, network = self.node_bytes_per_second or node, self.network_bytes_per_second or network
        return node * self.link_utilization, network * self.link_utilization


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        name: For headings.
        recipe: Says model, masks, batch and length.
        hardware: A key of `HARDWARE`.
        gpus: Of the run; with the recipe's images a GPU, its global batch.
        num_images: Of the data set.
        shard_size: As `ijepa-hf prepare --shard_size` takes it.
        flags: Further flags of `ijepa-hf pretrain`.
    """

    name: str
    recipe: str
    hardware: str
    gpus: int
    num_images: int
    shard_size: str
    flags: tuple[str, ...] = ()


_ON_STREAM = (
    "--dataset_name", "SHARDS", "--streaming", "True", "--num_train_epochs", "1", "--warmup_epochs", "0.07",
    "--checkpointing_steps",
)  # fmt: skip
CASES = (
    Case("ViT-H/14 on ImageNet-1k", "in1k-vith14", "a100-80gb", 16, 1_281_167, "100MB"),
    Case(
        "ViT-G/16 on a billion images, batches as published", "in22k-vitg16", "h100-sxm", 128, 1_000_000_000, "1GB",
        (*_ON_STREAM, "20000"),
    ),
    Case(
        "ViT-G/16 on a billion images, fewer GPUs with larger batches", "in22k-vitg16", "h100-sxm", 16, 1_000_000_000,
        "1GB", (*_ON_STREAM, "4000", "--per_device_train_batch_size", "128"),
    ),
)  # fmt: skip


# -- formulas --------------------------------------------------------------------------------------------------------


def checkpoint_tensor_bytes(config: IJepaConfig) -> dict[str, int]:
    """Bytes of the tensors of a checkpoint, by file.

    Args:
        config: The model's.

    Returns:
        `model.safetensors`: both encoders and the predictor with their position tables, float32.
        `optimizer.safetensors`: AdamW's two moments of what is trained, and a step number for each of its tensors.
    """
    model = meta_model(config)
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
    moments = 2 * FLOAT * sum(parameter.numel() for parameter in trained)
    return {
        "model.safetensors": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        "optimizer.safetensors": moments + FLOAT * len(trained),
    }


@dataclass(frozen=True)
class Units:
    """Parameters of what FSDP2 gathers at once: each layer is a unit, and all that is in no layer is one.

    Args:
        largest_layer: Of the layer with most.
        root: Of embeddings, last norms and projections.
    """

    largest_layer: int
    root: int


def fsdp_units(config: IJepaConfig) -> Units:
    """Counts the units.

    Args:
        config: The model's.

    Returns:
        The numbers.
    """
    model = meta_model(config)
    parts = (model.ijepa, model.context_encoder, model.predictor)
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for part in parts for layer in part.layers]
    return Units(max(layers), sum(parameter.numel() for parameter in model.parameters()) - sum(layers))


def state_bytes(parameters: Parameters, shards: int = 1) -> float:
    """Bytes of a rank for weights, gradients and AdamW's two moments, all float32.

    Args:
        parameters: From `count_parameters`.
        shards: Ranks that hold the state together; 1 for DDP.

    Returns:
        (weights of all three networks + gradients and two moments of the trained two) / shards.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 3, with float32 for all, as AdamW keeps it here.
    """
    return FLOAT * (parameters.total + 3 * parameters.trained) / shards


def working_bytes(parameters: Parameters, units: Units, shards: int = 1) -> float:
    """Bytes of a rank beside state and activations, for weights and gradients on their way.

    Args:
        parameters: From `count_parameters`.
        units: From `fsdp_units`.
        shards: Ranks that hold the state together; 1 for DDP.

    Returns:
        The bfloat16 copies of trained weights, which autocast keeps for the backward pass however the model is
        sharded; with DDP its buckets of gradients; with FSDP2 two gathered layers (one at work, one fetched ahead),
        the root's weights and gradients, and a layer's gradients before they are scattered.
    """
    copies = 2 * parameters.trained
    if shards == 1:
        return copies + FLOAT * parameters.trained
    return copies + FLOAT * (3 * units.largest_layer + 2 * units.root)


def ddp_bytes(parameters: Parameters, ranks: int) -> float:
    """Bytes that a rank sends in a step under DDP: the ring all-reduce of all gradients.

    Args:
        parameters: From `count_parameters`.
        ranks: Of the run.

    Returns:
        2 (n - 1) / n times the gradients.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (ranks - 1) / ranks * FLOAT * parameters.trained


def fsdp_bytes(parameters: Parameters, shards: int) -> float:
    """Bytes that a rank sends among those with which it shares the state, for one micro-batch, under FSDP2.

    Args:
        parameters: From `count_parameters`.
        shards: Ranks that hold the state together.

    Returns:
        (n - 1) / n times: the weights of three networks, gathered forward; of two, gathered again backward; and their
        gradients, reduced and scattered. The target encoder has no backward pass; its moving average needs no
        exchange, as each rank holds the same part of both encoders.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 7.2.
    """
    return (shards - 1) / shards * FLOAT * (parameters.total + 2 * parameters.trained)


def replica_bytes(parameters: Parameters, shards: int, ranks: int) -> float:
    """Bytes that a rank sends to those that hold the same part, where groups of ranks share the state.

    Args:
        parameters: From `count_parameters`.
        shards: Ranks of a group.
        ranks: Of the run.

    Returns:
        The ring all-reduce of its part of the gradients.
    """
    groups = ranks // shards
    return 2 * (groups - 1) / groups * FLOAT * parameters.trained / shards


# -- a case ----------------------------------------------------------------------------------------------------------


def parse_case(case: Case) -> tuple[ModelArguments, PretrainingArguments, int]:
    """Model and run as `ijepa-hf pretrain` reads them, and the loading processes of a rank."""
    model, data, run = parse_arguments([case.recipe, *case.flags, "--output_dir", "unused"])
    return model, run, data.dataloader_num_workers


def plan_case(case: Case, measured: Measured, assumed: Assumed) -> dict[str, Any]:
    """Works out a run.

    Args:
        case: The run.
        measured: Inputs that were measured.
        assumed: Inputs that were not.

    Returns:
        Numbers by table: `run`, `data`, `memory`, `exchange`, `saving`. Bytes, seconds and hours.
    """
    model, run, workers = parse_case(case)
    config, kind = model.to_config(), HARDWARE[case.hardware]
    images = run.per_device_train_batch_size * run.gradient_accumulation_steps
    drawn = draw_sizes(config, run.per_device_train_batch_size)
    parameters, units = count_parameters(config), fsdp_units(config)
    plan = make_plan(run, case.num_images, case.gpus)

    def seconds(*, full: bool) -> float:
        flops = sum(part.total for part in model_work(config, drawn, checkpointing=full).values())
        moved = update_bytes(parameters)
        found = step_time_on(kind, flops * images, moved, bf16=True, utilization=assumed.utilization)
        assert found is not None
        return found.seconds

    def activations(checkpointing: str) -> float:
        """Of the masks that need most, with batch and what is beside them; no weights."""
        settings = StepSettings(
            bf16=True, checkpointing=checkpointing == "full", selective=checkpointing == "selective"
        )
        none = Parameters(0, 0, 0)
        size = run.per_device_train_batch_size
        return max(estimate_memory(config, sizes, none, size, settings).peak for sizes in drawn)

    step, step_full = seconds(full=False), seconds(full=True)
    per_gpu = images / step
    group = min(assumed.gpus_per_node, case.gpus)
    shardings = {"DDP": 1, f"FSDP2 over {group}": group, f"FSDP2 over {case.gpus}": case.gpus}
    kept = {name: activations(name) for name in CHECKPOINTING}
    memory = {
        sharding: {
            "state": state_bytes(parameters, shards),
            "working": working_bytes(parameters, units, shards),
            "peak": {
                name: state_bytes(parameters, shards) + working_bytes(parameters, units, shards) + kept[name]
                for name in CHECKPOINTING
            },
        }
        for sharding, shards in shardings.items()
    }
    node, network = assumed.links(case.hardware)
    of_all = network if case.gpus > assumed.gpus_per_node else node
    micro = run.gradient_accumulation_steps
    exchange = {
        "DDP": {"node": 0.0, "all": ddp_bytes(parameters, case.gpus)},
        f"FSDP2 over {group}": {
            "node": micro * fsdp_bytes(parameters, group),
            "all": replica_bytes(parameters, group, case.gpus),
        },
        f"FSDP2 over {case.gpus}": {"node": 0.0, "all": micro * fsdp_bytes(parameters, case.gpus)},
    }
    bytes_of_images = case.num_images * measured.prepared_bytes
    shards = math.ceil(bytes_of_images / parse_size(case.shard_size))
    checkpoint = sum(checkpoint_tensor_bytes(config).values())
    save_seconds = checkpoint / measured.save_bytes_per_second
    interval = run.checkpointing_steps or plan.steps_per_epoch
    for row in exchange.values():
        row["seconds"] = row["node"] / node + row["all"] / of_all
        row["share_of_step"] = row["seconds"] / step
        for name, length in (("hidden", max(step, row["seconds"])), ("not_hidden", step + row["seconds"])):
            row[f"hours_{name}"] = plan.num_steps * (length + save_seconds / interval) / 3600
    hours = plan.num_steps * (step + save_seconds / interval) / 3600
    return {
        "case": asdict(case),
        "run": {
            "parameters": asdict(parameters) | {"trained": parameters.trained, "total": parameters.total},
            "global_batch_size": images * case.gpus,
            "images_per_gpu": images,
            "steps": plan.num_steps,
            "seconds_per_step": step,
            "seconds_per_step_full_checkpointing": step_full,
            "images_per_second": per_gpu * case.gpus,
            "hours": hours,
            "gpu_hours": hours * case.gpus,
        },
        "data": {
            "bytes": bytes_of_images,
            "shards": shards,
            "readers": case.gpus * workers,
            "footer_seconds": math.ceil(shards / assumed.requests_at_once) * assumed.request_seconds,
            "bytes_per_second_per_gpu": per_gpu * measured.prepared_bytes,
            "bytes_per_second_per_node": per_gpu * measured.prepared_bytes * group,
            "bytes_per_second": per_gpu * measured.prepared_bytes * case.gpus,
            "cores_per_gpu": per_gpu * measured.prepared_seconds,
            "cores_per_gpu_unprepared": per_gpu * measured.photograph_seconds,
        },
        "activations": kept,
        "memory": memory,
        "usable_bytes": (1 - RESERVED_SHARE) * kind.memory - RESERVED_BYTES,
        "exchange": exchange,
        "saving": {
            "checkpoint_bytes": checkpoint,
            "seconds": save_seconds,
            "interval_steps": interval,
            "saves": plan.num_steps // interval,
            "share_of_run": save_seconds / (interval * step + save_seconds),
            "work_lost_at_most_seconds": interval * step,
        },
    }


# -- text ------------------------------------------------------------------------------------------------------------


def render_case(found: dict[str, Any]) -> str:
    """The tables of a case.

    Args:
        found: From `plan_case`.

    Returns:
        Markdown.
    """
    case, run, data, saving = found["case"], found["run"], found["data"], found["saving"]
    fits = found["usable_bytes"]
    lines = [
        f"{case['gpus']} x {case['hardware']}, recipe `{case['recipe']}`: {run['parameters']['total'] / 1e6:,.0f} M "
        f"parameters, {run['parameters']['trained'] / 1e6:,.0f} M of them trained; {run['global_batch_size']:,} "
        f"images a step, {run['images_per_gpu']} a GPU.",
        "",
        "| | |",
        "| --- | --- |",
        f"| steps | {run['steps']:,} |",
        f"| seconds a step; with full checkpointing | {run['seconds_per_step']:.3g}; "
        f"{run['seconds_per_step_full_checkpointing']:.3g} |",
        f"| images/s, all GPUs | {run['images_per_second']:,.0f} |",
        f"| hours, GPU-hours of work and saves, without exchange | {run['hours']:,.0f}; {run['gpu_hours']:,.0f} |",
        f"| prepared images on disk | {in_bytes(data['bytes'])} |",
        f"| shards of {case['shard_size']}; readers, each of which needs one | {data['shards']:,}; "
        f"{data['readers']:,} |",
        f"| reading all footers at the start | {data['footer_seconds']:,.0f} s |",
        f"| bytes/s from storage: a GPU, a node, all | {in_bytes(data['bytes_per_second_per_gpu'])}, "
        f"{in_bytes(data['bytes_per_second_per_node'])}, {in_bytes(data['bytes_per_second'])} |",
        f"| CPU cores a GPU: prepared images; photographs | {data['cores_per_gpu']:.1f}; "
        f"{data['cores_per_gpu_unprepared']:.1f} |",
        f"| a checkpoint, and on rank 0's host while it is written | {in_bytes(saving['checkpoint_bytes'])} |",
        f"| seconds of a save; all of {saving['saves']:,} (every {saving['interval_steps']:,} steps) | "
        f"{saving['seconds']:.0f}; {100 * saving['share_of_run']:.2g} % of the run |",
        f"| work that a killed run repeats, at most | {saving['work_lost_at_most_seconds'] / 60:.0f} minutes |",
        "",
        "| memory of a rank | state | on their way | peak, no checkpointing | selective | full |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["memory"].items():
        peaks = [f"{in_bytes(peak)}{'' if peak <= fits else ' (too much)'}" for peak in row["peak"].values()]
        lines.append(f"| {name} | {in_bytes(row['state'])} | {in_bytes(row['working'])} | {' | '.join(peaks)} |")
    lines += [
        "",
        "| exchange of a rank in a step | sent inside the node | sent between all | seconds | of the step's work "
        "| hours of the run: hidden behind work; not at all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["exchange"].items():
        sent = " | ".join(in_bytes(row[place]) if row[place] else "" for place in ("node", "all"))
        hours = f"{row['hours_hidden']:,.0f}; {row['hours_not_hidden']:,.0f}"
        lines.append(f"| {name} | {sent} | {row['seconds']:.2g} | {100 * row['share_of_step']:.0f} % | {hours} |")
    return "\n".join(lines)


def in_bytes(number: float) -> str:
    """Bytes in words, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            value = number / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def render_inputs(measured: Measured, assumed: Assumed) -> str:
    """The inputs, with where they are from.

    Args:
        measured: Those that were measured.
        assumed: Those that were not.

    Returns:
        A table in Markdown.
    """
    speed, here = f"`{SPEED.name}`", f"`{OUTPUT.name}`"
    write, digest = (1e-6 / value for value in (measured.write_seconds_per_byte, measured.hash_seconds_per_byte))
    rows = [
        ("bytes of a prepared image (JPEG, 256 pixels)", in_bytes(measured.prepared_bytes), f"{speed}, its note"),
        ("ms of a core for one, to a crop of 224x224", f"{1e3 * measured.prepared_seconds:.2f}",
         f"{speed}, `{READING}`"),
        ("ms of a core for a photograph", f"{1e3 * measured.photograph_seconds:.2f}",
         f"{speed}, `{READING_PHOTOGRAPHS}`"),
        ("a save: written and flushed; hashed", f"{write:,.0f} MB/s; {digest:,.0f} MB/s", f"{here}, `save`"),
        ("share of a GPU's peak", f"{assumed.utilization:g}", "assumed, `--utilization`"),
        *((f"links of a GPU, {name}, one way: in its node; between nodes",
           "; ".join(in_bytes(rate / assumed.link_utilization) + "/s" for rate in assumed.links(name)),
           "assumed, `--node_bytes_per_second`, `--network_bytes_per_second`") for name in LINKS),
        ("share of both that exchanges reach", f"{assumed.link_utilization:g}", "assumed, `--link_utilization`"),
        ("seconds until a shard's footer is here", f"{assumed.request_seconds:g}, {assumed.requests_at_once} at once",
         "assumed, `--request_seconds`"),
    ]  # fmt: skip
    return "\n".join(["| input | | from |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)])


def make_plan_of_all(measured: Measured, assumed: Assumed) -> dict[str, Any]:
    """Inputs and cases, as in the JSON file."""
    return {
        "measured": asdict(measured),
        "assumed": asdict(assumed),
        "cases": [plan_case(case, measured, assumed) for case in CASES],
    }


def main() -> None:
    """Prints the tables, or writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="Write the numbers instead; - is the screen.")
    parser.add_argument("--measure", action="store_true", help=f"Measure saving here, and write {OUTPUT.name} anew.")
    for name, value in asdict(Assumed()).items():
        kind = float if value is None else type(value)
        parser.add_argument(f"--{name}", type=kind, default=value, help="Assumed; %(default)s if not given.")
    named = vars(parser.parse_args())
    target, measure = named.pop("json"), named.pop("measure")
    assumed = Assumed(**named)
    save = measure_save() if measure else json.loads(OUTPUT.read_text("utf-8"))["save"]
    if measure:
        write_text_atomically(OUTPUT, json.dumps({"save": save}) + "\n")
    found = {"save": save, **make_plan_of_all(read_measured(), assumed)}
    text = json.dumps(found, indent=1) + "\n"
    if measure or target not in (None, "-"):
        path = OUTPUT if measure else Path(target)
        write_text_atomically(path, text)
    if target == "-":
        print(text, end="")
        return
    print(render_inputs(read_measured(), assumed))
    for case in found["cases"]:
        print(f"\n## {case['case']['name']}\n\n{render_case(case)}")


if __name__ == "__main__":
    main()
