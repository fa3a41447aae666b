"""A run as one HTML file that needs nothing else: no scripts, no style sheets or pictures from elsewhere.

Readable on a phone, in light and dark. Whatever comes from the run's files is escaped; pictures are PNG in `data:`
addresses, and the page tells browsers to take nothing else. A run that is not finished has fewer sections.
"""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ijepa_hf.diagnosis.verdict import CollapseVerdict, judge_collapse
from ijepa_hf.figures.curves import draw_curves_figure
from ijepa_hf.files import read_json, write_text_atomically
from ijepa_hf.runs.cards import NEIGHBOURS, verdict
from ijepa_hf.runs.folder import DIAGNOSTICS_FILE, EVALUATIONS_FILE, METRICS_FILE, REPORT_FILE, read_run
from ijepa_hf.runs.rows import read_rows

_PNG = b"\x89PNG\r\n\x1a\n"
# What a browser may take: the page's own style and pictures. It asks nobody, and runs nothing, whatever it finds.
_ALLOWED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_FITS_A_PHONE = 1200  # pixels; wider pictures are scrolled there

# File in `figures`, heading, what is to be seen.
_FIGURES = (
    ("masks.png", "Masks", "The first images of the run: what the context encoder sees, and what is predicted."),
    (
        "diagnostics.png",
        "Signs of collapse",
        "What was measured on one fixed batch: deviation and rank of patches, what their position alone explains, and "
        "how far predictions tell images apart. Dashed: where a verdict begins.",
    ),
    (
        "predictions.png",
        "Predictions",
        "The loss at each target patch with the mean of each block below; and in the place of the target patches the "
        "real patches, of other images of the batch, that are most like the predictions. On the right those most "
        "like the true targets: the best that these images could show.",
    ),
    (
        "pca.png",
        "Patch features",
        "The first three principal components of the target encoder's patch features as red, green and blue; one "
        "basis for all images.",
    ),
    (
        "spectrum.png",
        "Spectrum",
        "Singular values of the features, not centred. A line that falls off a cliff is dimensional collapse.",
    ),
)
_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #57606a; --ground: #ffffff; --line: #d0d7de;
  --panel: #f6f8fa; --good: #1a7f37; --bad: #b35900; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --faint: #9ea7b1; --ground: #0d1117; --line: #30363d;
  --panel: #161b22; --good: #56d364; --bad: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--text); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.verdict { padding: .75rem 1rem; background: var(--panel); border-left: 4px solid var(--good); border-radius: 4px; }
.verdict.bad { border-color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
.arguments td { text-align: left; white-space: normal; vertical-align: top; }
figure { margin: .5rem 0 0; }
figure img { display: block; max-width: min(100%, 44rem); height: auto; background: #ffffff; border-radius: 4px; }
.wide img { max-width: 100%; }
@media (max-width: 40rem) { th, td { padding-right: .5rem; font-size: .92rem; }
  th:first-child, td:first-child { min-width: 7rem; } .wide img { max-width: none; width: 40rem; } }
summary { cursor: pointer; margin-top: 2rem; font-weight: 600; }
"""


def write_html_report(run: Path, output: Path) -> None:
    """Writes a run as one HTML file.

    Args:
        run: Folder of a run, finished or not.
        output: The file; its folder must exist.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file of the run is damaged.
    """
    write_text_atomically(output, render_html_report(run))


def render_html_report(run: Path) -> str:
    """A run as HTML.

    Args:
        run: Folder of a run, finished or not.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file of the run is damaged.
    """
    record = read_run(run)
    if record is None:
        raise FileNotFoundError(
            f"html={str(run)!r}: there is no run (no run.json) in it; give the --output_dir of a pretraining."
        )
    report = read_json(run / REPORT_FILE)
    measured = read_rows(run / DIAGNOSTICS_FILE)
    rows = read_rows(run / METRICS_FILE)
    arguments = record["arguments"]
    name = escape(run.resolve().name)
    sections = [
        f"<h1>{name}</h1>",
        _state(report, rows, arguments),
        _verdict(judge_collapse(measured)) if measured else "",
        _scores(report),
        _curves(rows, read_rows(run / EVALUATIONS_FILE)),
        *(_figure(run / "figures" / file, heading, text) for file, heading, text in _FIGURES),
        _arguments(arguments),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_ALLOWED}">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _state(report: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """One line: what was trained on what, how far, and how fast."""
    parts = [f"I-JEPA on {arguments.get('dataset_name')}"]
    if report is not None:
        parts.append(f"finished: {report['step']} steps, {report['epochs']:.4g} epochs")
    elif rows:
        parts.append(f"not finished: last logged step {rows[-1]['step']}")
    else:
        parts.append("not finished: nothing logged yet")
    if rows:
        parts.append(f"loss {rows[-1]['loss']:.4f}")
    if report is not None:
        parts.append(f"on {report['machine']['device']}")
    return f'<p class="faint">{escape("; ".join(parts))}.</p>'


def _verdict(judged: CollapseVerdict) -> str:
    lines = [f"<p><strong>{escape(judged.name)}</strong></p>"]
    lines += [f"<p>{escape(text)}</p>" for text in (judged.reason, judged.advice) if text]
    kind = "verdict bad" if judged.is_failure else "verdict"
    return f'<div class="{kind}">{"".join(lines)}</div>'


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None or not report.get("scores"):
        return ""
    header = "".join(f"<th>{title}</th>" for title in ("features", f"kNN-{NEIGHBOURS}", "linear", "RankMe"))
    lines = []
    for score in report["scores"]:
        values = f"{100 * score['knn']:.1f}", f"{100 * score['linear']:.1f}", f"{score['rankme']:.1f}"
        cells = "".join(f"<td>{value}</td>" for value in (escape(str(score["features"])), *values))
        lines.append(f"<tr>{cells}</tr>")
    said = "".join(f"<p>{escape(line)}</p>" for line in verdict(report["scores"]))
    return (
        f'<h2>Scores</h2>\n<p class="faint">Top-1 in percent on {int(report["num_eval_images"])} held-out images, '
        f'mean-pooled features.</p>\n<div class="wide"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n{said}"
    )


def _curves(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Drawn from the log, so that a run that is under way has them too."""
    if not rows:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        draw_curves_figure(rows, path, evaluations, columns=2)  # as wide as a phone can show
        return _figure(path, "Curves", "What was logged, over the optimiser steps.")


def _figure(path: Path, heading: str, text: str) -> str:
    if not path.is_file():
        return ""
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG; delete it, or let the run draw it again.")
    width = int.from_bytes(content[16:20], "big")
    kind = ' class="wide"' if width > _FITS_A_PHONE else ""
    data = base64.b64encode(content).decode("ascii")
    return (
        f"<h2>{heading}</h2>\n<figure><figcaption>{escape(text)}</figcaption><div{kind}>"
        f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}"></div></figure>'
    )


def _arguments(arguments: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(json.dumps(value))}</td></tr>"
        for name, value in sorted(arguments.items())
        if value is not None
    )
    return (
        '<details><summary>Arguments</summary><div class="wide"><table class="arguments">'
        f"<tbody>{lines}</tbody></table></div></details>"
    )
