"""Reads HTML pages strictly, and writes the folder of a run that a page can show."""

import json
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page and fails on a tag that is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_run(folder: Path, *, finished: bool = True, **arguments) -> Path:
    folder.mkdir(parents=True)
    values = {"output_dir": str(folder), "dataset_name": "digits", "seed": 3, "weight_decay": None, **arguments}
    (folder / "run.json").write_text(json.dumps({"arguments": values, "config": {}}))
    rows = [{"step": step, "loss": 1 / step, "target_rankme": 5.0 + step} for step in (1, 2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        report = {
            "step": 4,
            "epochs": 2.0,
            "machine": {"device": "a CPU"},
            "num_eval_images": 360,
            "scores": [
                {"features": "trained encoder", "knn": 0.801, "linear": 0.944, "rankme": 7.26},
                {"features": "untrained <new>", "knn": 0.5, "linear": 0.95, "rankme": 2.0},
                {"features": "raw pixels", "knn": 0.9, "linear": 0.9, "rankme": 30.0},
            ],
            "arguments": values,
        }
        (folder / "report.json").write_text(json.dumps(report))
    return folder
