"""The tutorial's page and notebook are one text, and its cells run.

The everyday suite runs the cells before the training, in which every formula of the method is checked; the whole
notebook runs in `make test-slow`, in a kernel of its own as a reader would run it.
"""

import importlib.util
import json
import re
import resource
import subprocess
from pathlib import Path

import pytest
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "ijepa_tutorial.ipynb"
FIGURES = ROOT / "docs" / "figures"
FIRST_LONG_SECTION = "## 9."
SECONDS = 300  # of one core, for the whole notebook: time on the clock would judge what else the machine does

_spec = importlib.util.spec_from_file_location("build_tutorial", ROOT / "scripts" / "build_tutorial.py")
build_tutorial = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_tutorial)

MADE_UP = """# A

See [b](b.md#part), [c](../examples/c.py), [d](#a), [e](https://e.invalid) and [f](../f.md).

```python
print(1)
x = [0](0)
```

```text
1
```

![a picture](figures/tutorial-a.png)

![another page's picture](figures/b.png)

```bash
ls
```

```python
pass
```
"""


def code_of(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def numbers_of(text):
    return [float(number) for number in NUMBER.findall(text.replace(",", ""))]


def without_numbers(text):
    return NUMBER.sub("#", text.replace(",", "")).split()


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def committed():
    return json.loads(NOTEBOOK.read_text("utf-8"))


# ---- the builder, on a made-up page ---------------------------------------------------------------------------------


def test_python_blocks_become_cells_and_what_is_between_them_text_without_outputs_and_own_figures():
    cells = build_tutorial.make_notebook(MADE_UP)["cells"]
    assert [(cell["cell_type"], cell["id"]) for cell in cells] == [
        ("markdown", "cell-00"),
        ("code", "cell-01"),
        ("markdown", "cell-02"),
        ("code", "cell-03"),
    ]
    assert "".join(cells[1]["source"]) == "print(1)\nx = [0](0)"
    assert "".join(cells[2]["source"]) == "![another page's picture](../docs/figures/b.png)\n\n```bash\nls\n```"


def test_links_lead_from_the_notebook_to_the_files_that_the_page_means():
    (text, *_) = build_tutorial.make_notebook(MADE_UP)["cells"]
    assert text["source"][-1] == (
        "See [b](../docs/b.md#part), [c](c.py), [d](#a), [e](https://e.invalid) and [f](../docs/../f.md)."
    )


@pytest.mark.parametrize("block", ["```python run\nx\n```\n", "- a\n  ```python\n  x\n  ```\n", "no code\n"])
def test_blocks_that_could_not_be_cells_are_refused(block):
    good = "" if block == "no code\n" else "```python\nx\n```\n"
    with pytest.raises(ValueError, match="must open with ```python alone"):
        build_tutorial.make_notebook(good + block)


def test_printed_outputs_are_written_below_their_blocks_and_replace_older_ones():
    notebook = build_tutorial.make_notebook(MADE_UP)
    notebook["cells"][1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["2\n", "3\n"]},
        {"output_type": "execute_result", "data": {"text/plain": "not printed"}},
    ]
    written = build_tutorial.with_outputs(MADE_UP, notebook)
    assert written == MADE_UP.replace("```text\n1\n```", "```text\n2\n3\n```")
    notebook["cells"][1]["outputs"] = []
    assert build_tutorial.with_outputs(written, notebook) == MADE_UP.replace("\n```text\n1\n```\n", "")


def test_outputs_are_kept_where_only_text_has_changed():
    old = build_tutorial.make_notebook(MADE_UP)
    old["cells"][3].update(outputs=[{"output_type": "stream", "name": "stdout", "text": ["2\n"]}], execution_count=2)
    notebook = build_tutorial.make_notebook(MADE_UP.replace("# A\n", "# B\n"))
    build_tutorial.take_outputs(notebook, old)
    assert notebook["cells"][1:] == old["cells"][1:]
    assert notebook["cells"][0] != old["cells"][0]
    with pytest.raises(ValueError, match="the page's code is not the notebook's"):
        build_tutorial.take_outputs(build_tutorial.make_notebook(MADE_UP.replace("print(1)", "print(2)")), old)


# ---- the page and the notebook --------------------------------------------------------------------------------------


def test_the_notebook_is_the_one_that_the_page_makes(page, committed):
    made = build_tutorial.make_notebook(page)
    for notebook in (made, committed):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
    assert committed == made, "run: python scripts/build_tutorial.py"


def test_the_page_shows_what_the_notebook_printed_and_drew(page):
    committed = json.loads(NOTEBOOK.read_text("utf-8"))
    assert build_tutorial.with_outputs(page, committed) == page
    shown = re.findall(r"\(figures/(tutorial-[\w-]+\.png)\)", page)
    drawn = re.findall(r'show\(figure, "([\w-]+)"\)', page)
    assert shown == [f"tutorial-{name}.png" for name in drawn]
    assert sorted(shown) == sorted(path.name for path in FIGURES.glob("tutorial-*.png"))
    pictures = [
        output
        for cell in committed["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == len(shown)


def test_pictures_and_notebook_are_small():
    assert {path.name for path in FIGURES.glob("tutorial-*.png") if path.stat().st_size > 150_000} == set()
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_the_notebook_is_valid_and_was_run_from_top_to_bottom(committed):
    import nbformat

    nbformat.validate(json.loads(NOTEBOOK.read_text("utf-8")), version=4, version_minor=5)
    run = json.loads(NOTEBOOK.read_text("utf-8"))
    code = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert len({cell["id"] for cell in run["cells"]}) == len(run["cells"])


def test_the_cells_before_the_training_run(page, tmp_path, child_environment):
    before, found, _ = page.partition(FIRST_LONG_SECTION)
    assert found
    cells = code_of(build_tutorial.make_notebook(before))
    assert sum(cell.count("assert ") for cell in cells) > 40
    (tmp_path / "cells.py").write_text("\n\n".join(cells), "utf-8")
    done = subprocess.run(
        [*warm_python(), "-W", "error", "cells.py"], cwd=tmp_path, env=child_environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # it prints what the page shows; other machines round otherwise
    shown = "".join(re.findall(r"^```text\n(.*?)^```", before, re.MULTILINE | re.DOTALL))
    assert without_numbers(done.stdout) == without_numbers(shown)
    assert numbers_of(done.stdout) == pytest.approx(numbers_of(shown), rel=0.02, abs=0.02)


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
def test_the_notebook_runs_within_five_minutes_of_one_core(page, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "work").mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = build_tutorial.run_notebook(build_tutorial.make_notebook(page), tmp_path / "work")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    # each cell runs to its end: its claims about the trained network are asserts
    code = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert sorted(path.name for path in (tmp_path / "work" / "tutorial").glob("tutorial-*.png")) == sorted(
        path.name for path in FIGURES.glob("tutorial-*.png")
    )
