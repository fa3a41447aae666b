"""Runs `ijepa-hf diagnose`: judges whether a run or a model has collapsed, and prints the numbers of the verdict.

A run was measured while it trained (`diagnostics.jsonl`), and is judged by all its rows. A model's folder or Hub
repository is measured now, on given images: both encoders and the predictor if it has them, otherwise the encoder (of
any vision backbone of transformers).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.opening import ImageSource, find_image_column, load_split
from ijepa_hf.data.transforms import normalize, resize
from ijepa_hf.diagnosis.demo import run_demo
from ijepa_hf.diagnosis.figures import draw_diagnostics_figure
from ijepa_hf.diagnosis.monitor import MONITOR_IMAGES, CollapseMonitor, make_monitor_batch, measure_features
from ijepa_hf.diagnosis.verdict import (
    HEALTHY,
    LOSS_RISING,
    SIGNS_OF_PARTS,
    SINGLE_SIGNS,
    UNKNOWN,
    CollapseVerdict,
    judge_collapse,
)
from ijepa_hf.escaping import text_table
from ijepa_hf.evaluation.backbones import load_backbone
from ijepa_hf.model.modeling_ijepa import PRETRAINING_SUBFOLDER, IJepaForPretraining
from ijepa_hf.model.vision_models import check_model_name, commit_of, read_image_settings
from ijepa_hf.recipes.arguments import flag
from ijepa_hf.recipes.parsing import CommandParser, command_parser, parse_flags
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, read_run
from ijepa_hf.runs.rows import read_rows

EXIT_CODES = {HEALTHY: 0, LOSS_RISING: 0, UNKNOWN: 6}
FAILURE_EXIT_CODE = 5

# Flags about the images that a model is measured on.
_OF_IMAGES = ("dataset_config_name", "split_name", "image_column_name", "max_samples", "model_revision")


@dataclass(kw_only=True)
class DiagnoseFlags:
    """Defines the flags of `ijepa-hf diagnose`."""

    dataset_name: str | None = flag(
        "result",
        "Images to measure a model on, as for ijepa-hf pretrain; those of its run if not given. A run that was "
        "measured while it trained is measured again only if this is given.",
    )
    dataset_config_name: str | None = flag("result", "Configuration of the Hub data set.")
    split_name: str | None = flag(
        "result",
        "Split of the images; if not given, test, or without --dataset_name the evaluation split of MODEL's run.",
    )
    image_column_name: str | None = flag("result", "Column of the images; found automatically if there is only one.")
    max_samples: int = flag(
        "result", "Images to measure on, spread evenly over the split; at least 2.", MONITOR_IMAGES
    )
    model_revision: str | None = flag("result", "Branch, tag or commit of MODEL on the Hub.")
    output: str | None = flag(
        "place", "PNG file for the curves of a run's measurements; figures/diagnostics.png of the run if not given."
    )
    json: bool = flag("reporting", "Print the verdict and all numbers as JSON.", False)
    demo: bool = flag(
        "result",
        "Train a healthy and a collapsing model on the built-in images `shapes`, and judge both.",
        False,
    )
    output_dir: str = flag("place", "Folder of the demo's runs.", "runs/collapse-demo")


def build_parser() -> CommandParser:
    """Returns the parser of the command."""
    parser = command_parser(
        "diagnose",
        "Judge whether the features of a run or a model have collapsed: print the verdict, its reason, the measured "
        "numbers, and the next flag to try.",
        DiagnoseFlags,
        epilog=f"Exit codes: 0 healthy (the loss may rise), {FAILURE_EXIT_CODE} something is wrong, "
        f"{EXIT_CODES[UNKNOWN]} too few measurements for a verdict, 2 a wrong flag or file. The demo: 0 if both "
        "verdicts are right.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", nargs="?", help="A run's or model's folder, or a Hub id.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: What follows `ijepa-hf diagnose`.

    Returns:
        The exit code.

    Raises:
        OSError: If the run, the model or the images do not exist, or a model cannot be loaded.
        ValueError: If a flag is bad or unknown, or the images cannot be used.
    """
    values = dict(vars(parse_flags(build_parser(), argv)))
    model = values.pop("model")
    flags = DiagnoseFlags(**values)
    if flags.demo == (model is not None):
        raise ValueError("name one run or model to diagnose, or give --demo alone.")
    if flags.demo:
        _refuse(flags, _OF_IMAGES, "is about measuring a model, and the demo has its own; leave it out.")
        text, code = run_demo(Path(flags.output_dir))
    else:
        text, code = _diagnose(model, flags)
    print(text)
    return code


def _diagnose(model: str, flags: DiagnoseFlags) -> tuple[str, int]:
    """Judges a run or a model. Returns the text to print and the exit code."""
    _refuse(flags, ("output_dir",), "is the demo's folder; add --demo, or leave it out.")
    if flags.max_samples < 2:
        raise ValueError(f"max_samples={flags.max_samples} must be at least 2, better {MONITOR_IMAGES}.")
    check_model_name(model, flags.model_revision)
    rows = [] if flags.dataset_name is not None else read_rows(Path(model) / DIAGNOSTICS_FILE)
    picture = ""
    if rows:
        _refuse(
            flags, _OF_IMAGES, "is about measuring images, and this run has rows; add --dataset_name, or leave it out."
        )
        if flags.output is not None or not flags.json:
            picture = _draw(rows, Path(model), flags.output)
    else:
        if flags.output is not None:
            raise ValueError(f"output={flags.output!r}: {model!r} has no rows over steps to draw; leave it out.")
        rows = [measure_model(model, flags)]
    verdict = judge_collapse(rows)
    code = EXIT_CODES.get(verdict.name, FAILURE_EXIT_CODE)
    if flags.json:
        return json.dumps({"verdict": verdict.as_dict(), "rows": rows}, indent=2), code
    return _render(rows[-1], verdict, picture), code


def _refuse(flags: DiagnoseFlags, names: Sequence[str], why: str) -> None:
    """Raises a `ValueError` for a flag that is set and would be ignored."""
    for entry in dataclasses.fields(flags):
        if entry.name in names and getattr(flags, entry.name) != entry.default:
            raise ValueError(f"{entry.name}={getattr(flags, entry.name)!r} {why}")


def _draw(rows: Sequence[Mapping[str, Any]], run: Path, output: str | None) -> str:
    """Draws the rows and returns a line that names the file. A run's folder that is read-only is no error."""
    path = run / "figures" / "diagnostics.png" if output is None else Path(output)
    if path.suffix != ".png":
        raise ValueError(f"output={output!r} must end in .png.")
    if output is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"output={output!r}: there is no folder {str(path.parent)!r}; make it first.")
    try:
        path.parent.mkdir(exist_ok=True)
        draw_diagnostics_figure({run.name: rows}, path, title=run.resolve().name)
    except OSError as error:
        if output is not None:
            raise
        return f"no picture: {error}; choose another place with --output."
    return f"picture: {path}"


def measure_model(model: str, flags: DiagnoseFlags) -> dict[str, Any]:
    """Measures a model on images, float32 on the CPU.

    Args:
        model: A folder or Hub id.
        flags: About the images.

    Returns:
        A row as in `diagnostics.jsonl`, without `step`.

    Raises:
        FileNotFoundError: If the images do not exist.
        OSError: If the model cannot be loaded.
        ValueError: If the images cannot be used, or no data set was named and the model's run names none.
    """
    commit = commit_of(model, flags.model_revision)
    config = AutoConfig.from_pretrained(model, revision=commit, trust_remote_code=False)
    settings = read_image_settings(model, config, revision=commit)
    source, split = _source(model, flags)
    dataset = load_split(source, split)
    images = ImageRows(dataset, find_image_column(dataset, source.image_column), len(settings.mean))
    chosen = torch.linspace(0, len(images) - 1, min(flags.max_samples, len(images))).round().long().tolist()
    pixels = torch.stack(
        [normalize(resize(images[index], settings.shape), settings.mean, settings.std) for index in chosen]
    )
    if _has_predictor(model, commit):
        full: Any = IJepaForPretraining.from_pretrained(model, revision=commit or "main", dtype=torch.float32)
        return CollapseMonitor(make_monitor_batch(full.config, pixels)).measure(full)
    backbone = load_backbone(model, settings.shape, revision=commit)
    patches = torch.cat([backbone.tokens(part).patches for part in pixels.split(16)]).flatten(1, 2)
    return measure_features({"target": patches}, torch.empty(len(patches), 0, 0, dtype=torch.int64))


def _source(model: str, flags: DiagnoseFlags) -> tuple[ImageSource, str]:
    """Returns the images and their split: those that the flags name, else those of the model's run."""
    if flags.dataset_name is not None:
        source = ImageSource(flags.dataset_name, flags.dataset_config_name, flags.image_column_name)
        return source, flags.split_name or "test"
    run = read_run(Path(model))
    if run is None:
        raise ValueError(
            f"{model!r} holds no run whose images could be used; name some with --dataset_name, such as digits, a "
            "Hub id, or a folder."
        )
    theirs = run["arguments"]
    column = flags.image_column_name or theirs.get("image_column_name")
    held_out = theirs.get("eval_split_name") or theirs.get("train_split_name", "train")
    return ImageSource(theirs["dataset_name"], theirs.get("dataset_config_name"), column), flags.split_name or held_out


def _has_predictor(model: str, commit: str | None) -> bool:
    from transformers.utils import cached_file

    for subfolder in ("", PRETRAINING_SUBFOLDER):
        path = cached_file(
            model, "config.json", revision=commit, subfolder=subfolder, _raise_exceptions_for_missing_entries=False
        )
        if path is not None:
            architectures = json.loads(Path(path).read_text("utf-8")).get("architectures") or []
            if IJepaForPretraining.__name__ in architectures:
                return True
    return False


def _render(last: Mapping[str, Any], verdict: CollapseVerdict, picture: str) -> str:
    """Renders the verdict and a table of the last row; `picture` is a line about the picture, empty without one."""
    titles = {"target": "target encoder", "context": "context encoder", "prediction": "predictor"}
    parts = [part for part in titles if f"{part}_patch_normalized_std" in last]
    of_step = "" if last.get("step") is None else f" at step {last['step']}"
    table = [["", *(titles[part] for part in parts)]]
    table += [[sign.words, *(f"{last[f'{part}_{sign.name}']:.4g}" for part in parts)] for sign in SIGNS_OF_PARTS]
    table += [
        [sign.words, f"{last[sign.name]:.4g}"]
        for sign in SINGLE_SIGNS
        if sign.words and last.get(sign.name) is not None
    ]
    reasons = [verdict.reason, *([verdict.advice] if verdict.advice else [])]
    lines = [f"verdict{of_step}: {verdict.name}", "", *reasons, "", *text_table(table, align="<>")]
    return "\n".join([*lines, *(["", picture] if picture else [])])
