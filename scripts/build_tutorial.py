"""Builds the tutorial's notebook from its page: `python scripts/build_tutorial.py`, some four minutes.

`docs/tutorial.md` is the source. Each of its python blocks is a code cell, the text between two of them a text cell.
The notebook is run, its outputs are kept in it and written back into the page: what a cell prints as a text block
below its code, what it draws as `docs/figures/tutorial-*.png`. `--keep_outputs` runs nothing, for changes of the text.
Needs the packages of the extra `notebook`.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "ijepa_tutorial.ipynb"
FIGURES = ROOT / "docs" / "figures"
SECONDS = 1800  # for one cell; training takes a minute or two, and many times that on a busy machine

# A python block, and the text block that holds what it printed.
_CODE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
_FIGURE = re.compile(r"^!\[[^\]]*\]\(figures/tutorial-[\w-]+\.png\)\n+", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def make_notebook(page: str) -> dict[str, Any]:
    """Turns the page into a notebook without outputs.

    Printed outputs and the tutorial's own figures are left out, for cells have them; links lead to the same files from
    the notebook's folder.

    Args:
        page: The text of `docs/tutorial.md`.

    Returns:
        The notebook, in the format of nbformat 4.5; the same for the same page.

    Raises:
        ValueError: If the page has no code, or a python block that cannot be a cell (it has a tag, or is indented).
    """
    found = list(_CODE.finditer(page))
    if len(found) != len(re.findall(r"^ *```python\b", page, re.MULTILINE)) or not found:
        raise ValueError("every code block of the tutorial must open with ```python alone, at the start of a line.")
    cells: list[dict[str, Any]] = []
    start = 0
    for block in found:
        _add_text(cells, page[start : block.start()])
        cells.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell-{len(cells):02d}",
                "metadata": {},
                "outputs": [],
                "source": _lines(block["code"]),
            }
        )
        start = block.end()
    _add_text(cells, page[start:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    text = _LINK.sub(_link_from_notebook, _FIGURE.sub("", text))
    if text.strip():
        cells.append({"cell_type": "markdown", "id": f"cell-{len(cells):02d}", "metadata": {}, "source": _lines(text)})


def _link_from_notebook(link: re.Match[str]) -> str:
    target = link[1]
    return f"]({target.removeprefix('../examples/') if target.startswith('../examples/') else f'../docs/{target}'})"


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def run_notebook(notebook: dict[str, Any], work_folder: Path) -> dict[str, Any]:
    """Runs all cells in order, in a process of their own.

    Args:
        notebook: From `make_notebook`.
        work_folder: Where the cells run and write.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails; names it and shows its error.
    """
    import nbclient
    import nbformat

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    client = nbclient.NotebookClient(
        node, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(work_folder)}}
    )
    client.execute()
    for cell in node.cells:
        cell.metadata.pop("execution", None)  # when it ran: another in each run
    nbformat.validate(node)
    run: dict[str, Any] = json.loads(nbformat.writes(node))
    run["metadata"] = notebook["metadata"]  # not which Python it was
    return run


def printed(cell: dict[str, Any]) -> str:
    """What a code cell printed.

    Args:
        cell: A cell of a notebook that was run.

    Returns:
        The text, "" where there is none.
    """
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in streams)


def with_outputs(page: str, notebook: dict[str, Any]) -> str:
    """Writes what the cells printed into the page.

    Args:
        page: The text of `docs/tutorial.md`.
        notebook: The notebook that was made from it, with outputs.

    Returns:
        The page, with a text block below each python block that printed something.
    """
    texts = iter([printed(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"])

    def replaced(block: re.Match[str]) -> str:
        text = next(texts).rstrip("\n")
        return f"```python\n{block['code']}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    return _CODE.sub(replaced, page)


def take_outputs(notebook: dict[str, Any], old: dict[str, Any]) -> None:
    """Gives a notebook the outputs of an older one, whose code is the same.

    Args:
        notebook: From `make_notebook`; changed.
        old: The older one.

    Raises:
        ValueError: If the code differs.
    """
    code, old_code = ([cell for cell in one["cells"] if cell["cell_type"] == "code"] for one in (notebook, old))
    if [cell["source"] for cell in code] != [cell["source"] for cell in old_code]:
        raise ValueError("--keep_outputs: the page's code is not the notebook's any more; leave the flag out.")
    for cell, old_cell in zip(code, old_code, strict=True):
        cell["outputs"], cell["execution_count"] = old_cell["outputs"], old_cell["execution_count"]


def main() -> None:
    """Builds, runs and writes notebook, page and figures."""
    parser = argparse.ArgumentParser(description="Build the tutorial's notebook from docs/tutorial.md.")
    parser.add_argument("--keep_outputs", action="store_true", help="run nothing: only text has changed")
    page = PAGE.read_text("utf-8")
    notebook = make_notebook(page)
    if parser.parse_args().keep_outputs:
        take_outputs(notebook, json.loads(NOTEBOOK.read_text("utf-8")))
    else:
        with tempfile.TemporaryDirectory() as work_folder:
            notebook = run_notebook(notebook, Path(work_folder))
            for figure in sorted(Path(work_folder).glob("tutorial/tutorial-*.png")):
                shutil.copy(figure, FIGURES / figure.name)
    PAGE.write_text(with_outputs(page, notebook), "utf-8")
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook['cells'])} cells, {NOTEBOOK.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
