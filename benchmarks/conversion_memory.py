"""Measures how much memory the conversion of a published checkpoint needs, as a multiple of the weights it keeps.

    python benchmarks/conversion_memory.py
    python benchmarks/conversion_memory.py --model huge14 --output benchmarks/results/conversion_memory.json

Makes a file of the published kind with the shapes of a published architecture, the optimiser's state included, all
numbers random (huge14: 10.5 GB, and 18 GB of disk for everything). Then each case runs in a process of its own, which
first imports what a conversion imports: that is the baseline, and is subtracted. Two numbers are taken, because mapped
files count in one of them:

    anonymous   the highest sum of private memory, sampled a hundred times a second (RssAnon, RssShmem of /proc): what
                the machine has to have, pages of files can be dropped and read again
    resident    the highest resident size that the kernel saw (ru_maxrss), pages of mapped files included, however
                much memory was free

The ratio is memory / bytes of the weights that are kept (with the optimiser: weights and state). Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# imported here, so that it is in the baseline of every process
import torch
import transformers.models.ijepa.modeling_ijepa

from ijepa_hf.model.configuration_ijepa import IJepaConfig
from ijepa_hf.model.encoder_ijepa import sincos_position_table
from ijepa_hf.model.modeling_ijepa import IJepaForPretraining
from ijepa_hf.weights.convert import convert
from ijepa_hf.weights.convert_back import convert_to_official
from ijepa_hf.weights.official_names import PARTS, official_names, optimizer_groups, translate

MODELS: dict[str, dict[str, Any]] = {
    "huge14": {"patch_size": 14, "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "large16": {"patch_size": 16, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "base16": {"patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
SAMPLES_PER_SECOND = 100
CASES = (
    "convert",
    "convert_with_optimizer",
    "convert_to_official",
    "convert_to_official_with_optimizer",
    "old_format",
)


def published_shapes(config: IJepaConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Names and shapes of a published file of this architecture, as tensors without memory."""
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in IJepaForPretraining(config).state_dict().items()}
    shapes: dict[str, dict[str, torch.Tensor]] = {}
    for part, names in official_names(config).items():
        shapes[part] = {}
        for name in names:
            keys = [f"{PARTS[part][0]}.{key}" for key in translate(name, PARTS[part][1]) or ()]
            first, *rest = ours[keys[0]]
            shapes[part][name] = torch.empty([first * len(keys), *rest], device="meta")
    return shapes


def write_published_file(path: Path, config: IJepaConfig, *, legacy: bool = False) -> dict[str, int]:
    """Writes the file; returns the bytes of the weights and of the optimiser's state in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(config)

    def fill(name: str, like: torch.Tensor) -> torch.Tensor:
        if name.endswith("pos_embed"):
            return sincos_position_table(like.shape[-1], config.grid_size)
        return torch.empty(like.shape).uniform_(0.0, 0.05, generator=generator)

    contents: dict[str, Any] = {
        part: {f"module.{name}": fill(name, like) for name, like in named.items()} for part, named in shapes.items()
    }
    weights = sum(tensor.nbytes for part in PARTS for tensor in contents[part].values())
    groups, state, number = [], {}, 0
    for members in optimizer_groups(shapes):
        groups.append({"params": list(range(number, number + len(members))), "betas": (0.9, 0.999), "eps": 1e-8})
        for part, name in members:
            if not name.endswith("pos_embed"):
                moments = [fill(name, shapes[part][name]) for _ in range(2)]
                state[number] = {"step": torch.tensor(187500.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            number += 1
    contents |= {"opt": {"state": state, "param_groups": groups}, "scaler": None, "epoch": 300, "loss": 0.1}
    contents |= {"batch_size": 128, "world_size": 16, "lr": 0.001}
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return {"weights": weights, "optimizer": sum(2 * entry["exp_avg"].nbytes for entry in state.values())}


def anonymous_bytes() -> int:
    """Private memory of this process: nothing that is only a page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))
    }
    return 1024 * sum(kilobytes.values())


def resident_bytes() -> int:
    """The highest resident size of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(case: str, work: Path, answers: multiprocessing.Queue[dict[str, float]]) -> None:
    """Runs one case in this process and says what it took."""
    torch.set_num_threads(1)
    before = {"anonymous": anonymous_bytes(), "resident": resident_bytes()}
    highest = [before["anonymous"]]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1 / SAMPLES_PER_SECOND):
            highest[0] = max(highest[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    if case.startswith("convert_to_official"):
        with_optimizer = case.endswith("with_optimizer")
        convert_to_official(work / "folder", work / "back.pth.tar", with_optimizer=with_optimizer)
    else:
        convert(work / "file.pth.tar", work / "folder", with_optimizer=case == "convert_with_optimizer")
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    answers.put(
        {
            "anonymous": highest[0] - before["anonymous"],
            "resident": resident_bytes() - before["resident"],
            "baseline_anonymous": before["anonymous"],
            "baseline_resident": before["resident"],
            "seconds": seconds,
        }
    )


def in_own_process(target: Any, *arguments: Any) -> Any:
    """Calls a function in a fresh process with a queue as its last argument; returns what it put there."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=target, args=(*arguments, answers))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def make_file(
    work: Path, fields: dict[str, Any], legacy: bool, answers: multiprocessing.Queue[dict[str, int]]
) -> None:
    """Writes the published file in a process of its own, so that its memory is nobody's baseline."""
    answers.put(write_published_file(work / "file.pth.tar", make_config(fields), legacy=legacy))


def make_config(fields: dict[str, Any]) -> IJepaConfig:
    """The configuration of a published architecture."""
    return IJepaConfig(**fields, intermediate_size=4 * fields["hidden_size"])


def measure(model: str, work: Path, cases: list[str]) -> dict[str, Any]:
    """Runs the cases, in an order in which each finds what it needs."""
    results: dict[str, Any] = {}
    sizes = in_own_process(make_file, work, MODELS[model], False)
    size = (work / "file.pth.tar").stat().st_size
    for case in cases:
        if case == "old_format":
            in_own_process(make_file, work, MODELS[model], True)
        if not case.startswith("convert_to_official"):
            shutil.rmtree(work / "folder", ignore_errors=True)
        (work / "back.pth.tar").unlink(missing_ok=True)
        taken = in_own_process(run_case, case, work)
        kept = sizes["weights"] + (sizes["optimizer"] if case.endswith("with_optimizer") else 0)
        ratios = {f"{name}_ratio": round(taken[name] / kept, 4) for name in ("anonymous", "resident")}
        results[case] = {"kept_bytes": kept, **ratios, **taken}
        print(
            f"{case:36} kept {kept / 1e9:6.2f} GB  anonymous {ratios['anonymous_ratio']:.3f}  resident "
            f"{ratios['resident_ratio']:.3f}  {taken['seconds']:.0f} s",
            flush=True,
        )
    return {
        "model": model,
        "file_bytes": size,
        **{f"{name}_bytes": value for name, value in sizes.items()},
        "cases": results,
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base16")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work_dir", help="folder for the files, on a real disk")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as work:
        result = measure(arguments.model, Path(work), arguments.cases)
    if arguments.output:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        where = {
            "command": f"python benchmarks/conversion_memory.py --model {arguments.model} --cases "
            f"{' '.join(arguments.cases)}",
            "machine": f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB of memory, {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        arguments.output.write_text(json.dumps({**where, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
