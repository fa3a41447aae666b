"""The report of a run as one file: it shows what the run's files say, escaped, and asks for nothing from elsewhere."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from html_pages import Page, write_run
from PIL import Image

from ijepa_hf.training.html_report import write_html_report

pytestmark = pytest.mark.figures


def page_of(run: Path) -> str:
    output = run.parent / "report.html"
    write_html_report(run, output)
    return output.read_text("utf-8")


def add_picture(folder: Path, name: str, size: tuple[int, int] = (40, 30)) -> bytes:
    (folder / "figures").mkdir(exist_ok=True)
    path = folder / "figures" / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


def pictures_of(page: Page) -> dict[str, bytes]:
    found = {}
    for image in page.all("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        found[image["alt"]] = base64.b64decode(data, validate=True)
    return found


def test_a_finished_run_shows_scores_curves_pictures_and_arguments(tmp_path):
    run = write_run(tmp_path / "run")
    names = {"masks.png": "Masks", "predictions.png": "Predictions", "pca.png": "Patch features"}
    files = {heading: add_picture(run, name) for name, heading in names.items()}
    files["Spectrum"] = add_picture(run, "spectrum.png")
    page = Page(page_of(run))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    shown = pictures_of(page)
    assert list(shown) == ["Curves", "Masks", "Predictions", "Patch features", "Spectrum"]
    for heading, content in files.items():
        assert shown[heading] == content
    curves = np.asarray(Image.open(io.BytesIO(shown["Curves"])).convert("RGB"))
    assert len(np.unique(curves.reshape(-1, 3), axis=0)) > 20
    for text in ("80.1", "94.4", "7.3", "untrained <new>", "360 held-out images", "Raw pixels win, by 9.9"):
        assert text in page.text, text
    assert "finished: 4 steps, 2 epochs" in page.text
    assert "loss 0.2500" in page.text
    assert "seed\n3" in page.text
    assert "weight_decay" not in page.text  # None is no setting
    assert len(page.all("details")) == 1


def test_the_page_is_for_phones_and_for_light_and_dark(tmp_path):
    text = page_of(write_run(tmp_path / "run"))
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert {"charset": "utf-8"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text
    assert "color-scheme: light dark" in text
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    run = write_run(tmp_path / "run")
    add_picture(run, "masks.png")
    text = page_of(run)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "form", "a"})
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")
    (policy,) = [attributes for attributes in page.all("meta") if "http-equiv" in attributes]
    assert policy == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    }
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_whatever_comes_from_the_run_is_escaped(tmp_path):
    harm = '<script>alert("1")</script>'
    run = write_run(tmp_path / "<script>x<b>", dataset_name=harm, license=f"'{harm}'", **{harm: "&amp;"})
    text = page_of(run)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(harm) >= 2
    assert "<script>x<b>" in page.text
    assert "&amp;" in page.text


def test_a_run_that_is_under_way_has_what_there_is(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    page = Page(page_of(run))
    assert list(pictures_of(page)) == ["Curves"]
    assert "not finished: last logged step 4" in page.text
    assert "Scores" not in page.text
    (run / "metrics.jsonl").write_text("")
    page = Page(page_of(run))
    assert pictures_of(page) == {}
    assert "nothing logged yet" in page.text


@pytest.mark.parametrize("is_failure", [True, False])
def test_the_verdict_on_the_runs_rows_is_shown_first(tmp_path, is_failure: bool):
    run = write_run(tmp_path / "run")
    row = {"loss": 0.2, "progress": 0.5, "target_patch_cosine": 0.5, "context_patch_normalized_std": 0.9}
    rows = [{**row, "step": step, "target_patch_normalized_std": 0.01234 if is_failure else 0.9} for step in (10, 20)]
    (run / "diagnostics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(page_of(run))
    (box,) = [attributes for attributes in page.all("div") if "verdict" in (attributes.get("class") or "")]
    assert box["class"] == ("verdict bad" if is_failure else "verdict")
    shown = "0.012" if is_failure else "no sign of collapse"
    assert ("complete collapse" if is_failure else "healthy") in page.text
    assert page.text.index(shown) < page.text.index("Scores")
    (run / "diagnostics.jsonl").unlink()
    assert 'class="verdict' not in page_of(run)


def test_only_wide_pictures_are_scrolled(tmp_path):
    run = write_run(tmp_path / "run")
    add_picture(run, "masks.png", (1300, 20))
    add_picture(run, "pca.png", (1100, 20))
    text = page_of(run)
    assert '<div class="wide"><img alt="Masks"' in text
    assert '<div><img alt="Patch features"' in text
    assert '<div><img alt="Curves"' in text


def test_what_is_no_run_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        page_of(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "figures").mkdir()
    (run / "figures" / "pca.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"pca\.png is no PNG"):
        page_of(run)
