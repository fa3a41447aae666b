"""Invariant 9: what a run leaves behind works in an environment without this package, with the features it
evaluated."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_run

from ijepa_hf import IJepaForPretraining
from ijepa_hf.sources import load_digits

PROGRAM = """
import json, sys
sys.modules["ijepa_hf"] = None  # importing it is now an ImportError
folder, picture, answer = sys.argv[1:]
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageClassification, IJepaModel, ViTImageProcessor, pipeline
)
import transformers
from packaging.version import Version
if Version(transformers.__version__) >= Version("5.18"):
    from transformers import AutoImageProcessor
    processor = AutoImageProcessor.from_pretrained(folder)
else:  # AutoImageProcessor needs torchvision there
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    processor = ViTImageProcessorPil.from_pretrained(folder)
image = Image.open(picture)
model = AutoModel.from_pretrained(folder)
assert type(model) is IJepaModel, type(model)
inputs = processor(image.convert("RGB"), return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).last_hidden_state
    classifier, info = AutoModelForImageClassification.from_pretrained(folder, num_labels=10, output_loading_info=True)
    inside = classifier.ijepa(**inputs).last_hidden_state
extractor = pipeline("image-feature-extraction", model=folder, image_processor=processor)
torch.save({"features": features, "classifier": inside, "pipeline": torch.tensor(extractor(picture))}, answer)
print(json.dumps({"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}))
try:
    import ijepa_hf
except ImportError:
    print("without ijepa_hf")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "run", eval_split_name="test")


def test_stock_classes_give_the_runs_own_features_where_the_package_cannot_be_imported(
    run, tmp_path, child_environment
):
    image = load_digits("test")[0]["image"].resize((50, 41))  # the processor has to resize
    image.save(tmp_path / "digit.png")
    command = [sys.executable, "-c", PROGRAM, str(run), str(tmp_path / "digit.png"), str(tmp_path / "answer.pt")]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report, last = done.stdout.strip().splitlines()[-2:]
    assert last == "without ijepa_hf"
    assert json.loads(report) == {"missing": ["classifier.bias", "classifier.weight"], "unexpected": []}

    model = IJepaForPretraining.from_pretrained(run).target_encoder
    resized = Image.open(tmp_path / "digit.png").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None] / 255
    processor = json.loads((run / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(processor[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = model((pixels - mean) / std).last_hidden_state
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    torch.testing.assert_close(answer["features"], expected, atol=1e-5, rtol=0)
    assert torch.equal(answer["classifier"], answer["features"])
    torch.testing.assert_close(answer["pipeline"], expected, atol=1e-5, rtol=0)


def test_nothing_in_the_folder_needs_pickle_or_remote_code(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors", ".md", ".png"}
    for path in files:
        if path.name == "config.json":
            assert "auto_map" not in json.loads(path.read_text())
