"""Metrics against scikit-learn and numbers worked out by hand; none of them leaves a file or asks the Hub."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score, r2_score
from warm_python import warm_python

from ijepa_hf.evaluation.metrics import R2, BoxIoU, MeanIoU, Top1, new_metric

GENERATOR = np.random.default_rng(0)


def computed(kind, predictions, references):
    with new_metric(kind) as metric:
        return metric.compute(predictions=predictions, references=references)


def test_top_1_is_scikit_learns_accuracy():
    mine, truth = GENERATOR.integers(0, 4, (2, 200))
    assert computed(Top1, mine, truth) == {"top-1": pytest.approx(accuracy_score(truth, mine), abs=1e-12)}
    assert computed(Top1, [0, 1, 2, 2], [0, 1, 1, 2]) == {"top-1": 0.75}


def test_r2_is_scikit_learns():
    truth = GENERATOR.normal(size=200)
    mine = truth + GENERATOR.normal(size=200)
    assert computed(R2, mine, truth) == {"R2": pytest.approx(r2_score(truth, mine), abs=1e-12)}
    assert computed(R2, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == {"R2": 0.0}
    assert computed(R2, [1.0, 3.0], [2.0, 4.0]) == {"R2": 0.0}  # 1 - (1 + 1) / (1 + 1)


def test_mean_iou_is_scikit_learns_mean_jaccard_score_of_the_classes_that_occur():
    mine, truth = GENERATOR.integers(0, 5, (2, 500))
    mine[mine == 3], truth[truth == 3] = 0, 7
    expected = jaccard_score(truth, mine, average="macro", labels=np.union1d(mine, truth))
    assert computed(MeanIoU, mine, truth) == {"mIoU": pytest.approx(expected, abs=1e-12)}
    # class 0: 1 of 3 pixels, class 1: 1 of 3
    assert computed(MeanIoU, [0, 0, 1, 1], [0, 1, 1, 0]) == {"mIoU": pytest.approx(1 / 3)}


def test_box_iou_is_the_mean_of_the_shares_worked_out_by_hand():
    truth = np.array([[0, 0, 4, 4]] * 5) / 8
    mine = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [1, 1, 3, 3], [3, 3, 3, 3]]) / 8
    # equal; 4 of 28; touching; 4 of 16; an empty box
    assert computed(BoxIoU, mine, truth) == {"IoU": pytest.approx((1 + 4 / 28 + 0 + 4 / 16 + 0) / 5)}


def test_a_metric_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with new_metric(Top1) as metric:
        assert list(tmp_path.iterdir()) != []
        metric.compute(predictions=[0], references=[0])
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_command_pays_for_the_import_of_evaluate():
    code = (
        "import importlib, sys, ijepa_hf.commands.main as cli, ijepa_hf.evaluation.evaluate\n"
        "for name in cli.COMMANDS: importlib.import_module(f'ijepa_hf.commands.{name}').build_parser()\n"
        "assert 'evaluate' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([*warm_python(package=False), "-c", code], cwd=root, check=True)
