"""Checks which versions of transformers can load the folders that this package writes under each version.

    .venv/bin/python benchmarks/compatibility.py [--output FILE.json] [--environments FOLDER]

Makes a virtual environment for each version (needs a network the first time), with torch and the rest from this one.
Each version that this package supports writes a run's folder and a fine-tuned classifier; 4.57.6, the last of the 4.x
series, which this package does not support, writes with its own stock classes. Then each version loads each folder:

    encoder      AutoModel: the same features
    head         AutoModelForImageClassification: nothing missing but the new classifier, the same features inside
    classifier   one that a version saved after it got its head: the same logits
    whole        IJepaForPretraining of this package: the same predictions and targets (5.9 and newer)
    remote code  AutoModelForPreTraining with trust_remote_code, without this package (5.9 and newer)

A cell is the largest absolute difference from the values computed before anything was saved.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("4.57.6", "5.9.0", "5.17.0", "5.23.0")
OLDEST_SUPPORTED = Version("5.9")
# What transformers itself gets wrong, whoever wrote the file: 5.9 to 5.15 leave the encoder inside a stock classifier
# random, with a log line only, where the file's keys lack the prefix `ijepa.`. This package's files have it.
KNOWN_FAILURES = {("4.57.6", "5.9.0", "head")}
TOLERANCE = 1e-5  # other versions may order sums otherwise; a tensor that was not loaded differs by far more

BEGIN = """
import sys, torch, transformers
from pathlib import Path
from packaging.version import Version
here = Version(transformers.__version__)
supported = here >= Version("5.9")
folder = Path(sys.argv[1])
pixels = torch.load(folder / "pixels.pt", weights_only=True)
masks = torch.load(folder / "masks.pt", weights_only=True)
"""

REFERENCE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from ijepa_hf.randomness import keyed_generator
from ijepa_hf import IJepaConfig, IJepaForPretraining, draw_masks
folder = Path(sys.argv[1])
torch.manual_seed(0)
config = IJepaConfig(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                     intermediate_size=64, predictor_hidden_size=16, predictor_num_hidden_layers=2)
model = IJepaForPretraining(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
pixels = torch.randn(2, 3, 32, 32)
masks = draw_masks(config.mask_settings(), 2, keyed_generator(0))
masks = {"context_indices": masks.context_indices, "target_indices": masks.target_indices}
torch.save(pixels, folder / "pixels.pt")
torch.save(masks, folder / "masks.pt")
torch.save(model.state_dict(), folder / "state.pt")
with torch.no_grad():
    output = model(pixels, **masks)
    features = model.target_encoder(pixels).last_hidden_state
head = torch.nn.Linear(32, 5)
values = {"features": features, "predictions": output.predictions, "targets": output.targets,
          "logits": head(features.mean(1)).detach(), "weight": head.weight.detach(), "bias": head.bias.detach()}
torch.save(values, folder / "values.pt")
"""

SAVE = (
    BEGIN
    + """
from transformers import AutoModel, AutoModelForImageClassification
out, stock = folder / f"by-{sys.argv[2]}", folder / f"classifier-by-{sys.argv[2]}"
if supported:
    from ijepa_hf import IJepaConfig, IJepaForPretraining
    from ijepa_hf.runs.export import export_model
    config = IJepaConfig(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                         intermediate_size=64, predictor_hidden_size=16, predictor_num_hidden_layers=2)
    model = IJepaForPretraining(config)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    export_model(model, out, step=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
else:
    AutoModel.from_pretrained(folder / f"by-{sys.argv[3]}").save_pretrained(out)
values = torch.load(folder / "values.pt", weights_only=True)
classifier = AutoModelForImageClassification.from_pretrained(folder / f"by-{sys.argv[3]}", num_labels=5)
classifier.classifier.load_state_dict({"weight": values["weight"], "bias": values["bias"]})
classifier.save_pretrained(stock)
"""
)

LOAD = (
    BEGIN
    + """
import json, os
from transformers import AutoModel, AutoModelForImageClassification
values = torch.load(folder / "values.pt", weights_only=True)
out, stock, has_whole = folder / f"by-{sys.argv[2]}", folder / f"classifier-by-{sys.argv[2]}", sys.argv[3] == "whole"
cells = {}
def differs(name, make):
    try:
        with torch.no_grad():
            cells[name] = make()
    except Exception as error:
        cells[name] = f"{type(error).__name__}: {error}"[:300]
def most(*pairs):
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
def head():
    model, info = AutoModelForImageClassification.from_pretrained(out, num_labels=5, output_loading_info=True)
    if sorted(info["missing_keys"]) != ["classifier.bias", "classifier.weight"]:
        return f"missing {sorted(info['missing_keys'])[:5]}"
    return most((model.ijepa(pixels).last_hidden_state, values["features"]))
def whole(cls, **options):
    output = cls.from_pretrained(out, **options)(pixels, **masks)
    return most((output.predictions, values["predictions"]), (output.targets, values["targets"]))
def classifier():
    model, info = AutoModelForImageClassification.from_pretrained(stock, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        return f"missing {sorted(info['missing_keys'])[:5]}"
    return most((model(pixels).logits, values["logits"]))
differs("encoder", lambda: most((AutoModel.from_pretrained(out)(pixels).last_hidden_state, values["features"])))
differs("head", head)
differs("classifier", classifier)
if supported and has_whole:
    if os.environ.get("WITH_PACKAGE"):
        from ijepa_hf import IJepaForPretraining
        differs("whole", lambda: whole(IJepaForPretraining))
    else:
        from transformers import AutoModelForPreTraining
        differs("remote code", lambda: whole(AutoModelForPreTraining, trust_remote_code=True))
print(json.dumps(cells))
"""
)


def make_environment(folder: Path, version: str) -> Path:
    """Makes a virtual environment with one version of transformers and what it asks for; returns its Python.

    Everything else (torch first of all) comes from this environment's packages, which stand behind its own.
    """
    python = folder / version / "bin" / "python"
    done = folder / version / "installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder / version)], check=True)
        install = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            str(python),
            "install",
            "-qq",
        ]
        subprocess.run([*install, f"transformers=={version}"], check=True)
        site = next((folder / version / "lib").glob("python*/site-packages"))
        (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        done.touch()
    return python


def run(python: Path, program: str, *arguments: str, with_package: bool, modules: Path) -> str:
    """Runs a program in one of the environments; returns its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}
    environment.pop("WITH_PACKAGE", None)
    if with_package:
        environment |= {"PYTHONPATH": str(ROOT / "src"), "WITH_PACKAGE": "1"}
    else:  # the package is installed behind, editable: keep it out
        program = "import sys\nsys.modules['ijepa_hf'] = None\n" + program
    done = subprocess.run(
        [str(python), "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def measure(folder: Path, environments: Path, versions: tuple[str, ...] = VERSIONS) -> dict[str, dict[str, dict]]:
    """Saves with each version and loads with each; returns cells by who saved and who loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {version: make_environment(environments, version) for version in versions}
    newest = versions[-1]
    run(pythons[newest], REFERENCE, str(folder), with_package=True, modules=folder / "modules")
    # the newest first: what 4.57.6 writes is made from its folder
    for version in sorted(versions, key=Version, reverse=True):
        supported = Version(version) >= OLDEST_SUPPORTED
        base = version if supported else newest
        run(pythons[version], SAVE, str(folder), version, base, with_package=supported, modules=folder / "modules")
    table: dict[str, dict[str, dict]] = {}
    for saved in versions:
        whole = "whole" if Version(saved) >= OLDEST_SUPPORTED else "encoder"
        for loaded in versions:
            cells: dict[str, float | str] = {}
            for with_package in (False, True) if Version(loaded) >= OLDEST_SUPPORTED else (False,):
                modules = folder / f"modules-{saved}-{loaded}"
                answer = run(
                    pythons[loaded], LOAD, str(folder), saved, whole, with_package=with_package, modules=modules
                )
                cells |= json.loads(answer)
            table.setdefault(saved, {})[loaded] = cells
    return table


def problems(table: dict[str, dict[str, dict]]) -> list[str]:
    """What in a table is no success, one sentence each."""
    return [
        f"{what} saved by {saved}, loaded by {loaded}: {cell}"
        for saved, row in table.items()
        for loaded, cells in row.items()
        for what, cell in cells.items()
        if (isinstance(cell, str) or cell > TOLERANCE) and (saved, loaded, what) not in KNOWN_FAILURES
    ]


def render(table: dict[str, dict[str, dict]]) -> str:
    """The table as Markdown: the largest difference in each cell."""
    versions = list(table)
    lines = ["| saved by, loaded by | " + " | ".join(versions) + " |", "| --- |" + " --- |" * len(versions)]
    for saved in versions:
        row = []
        for loaded in versions:
            cells = table[saved][loaded]
            bad = [what for what, cell in cells.items() if isinstance(cell, str) or cell > TOLERANCE]
            most = max((cell for cell in cells.values() if not isinstance(cell, str)), default=0.0)
            row.append(f"fails: {', '.join(bad)}" if bad else f"{', '.join(cells)}: {most:.0e}")
        lines.append(f"| {saved} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table, writes it where asked; 1 if a cell fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-transformers", help="Made and kept there.")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "compatibility", help="For the models.")
    named = parser.parse_args()
    table = measure(named.folder.resolve(), named.environments.resolve())
    print(render(table))
    for problem in problems(table):
        print(problem)
    if named.output is not None:
        text = json.dumps({"command": "benchmarks/compatibility.py", "cells": table}, indent=1)
        named.output.write_text(text + "\n", "utf-8")
    return 1 if problems(table) else 0


if __name__ == "__main__":
    raise SystemExit(main())
