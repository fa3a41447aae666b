"""Invariant 9: what a run leaves behind works in an environment without this package, with the features it
evaluated; the full model runs from the code that lies beside it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_batch, tiny_run
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from warm_python import warm_python

from ijepa_hf import IJepaForPretraining
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.model import modeling_ijepa
from ijepa_hf.runs.export import CODE_FILES

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
    command = [
        *warm_python(package=False),
        "-c",
        PROGRAM,
        str(run),
        str(tmp_path / "digit.png"),
        str(tmp_path / "answer.pt"),
    ]
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


FULL_MODEL = """
import sys
sys.modules["ijepa_hf"] = None
folder, inputs, answer = sys.argv[1:]
import torch
from transformers import AutoModel, AutoModelForPreTraining, IJepaModel
model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    output = model(**torch.load(inputs, weights_only=True))
torch.save({"loss": output.loss, "predictions": output.predictions, "targets": output.targets}, answer)
print(sorted({parameter.requires_grad for parameter in model.target_encoder.parameters()}))
print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is IJepaModel)
"""


def test_the_full_model_runs_from_the_code_in_the_folder_with_the_same_bits(run, tmp_path, child_environment):
    model = IJepaForPretraining.from_pretrained(run)
    torch.save(tiny_batch(model.config), tmp_path / "inputs.pt")
    command = [
        *warm_python(package=False),
        "-c",
        FULL_MODEL,
        str(run),
        str(tmp_path / "inputs.pt"),
        str(tmp_path / "answer.pt"),
    ]
    environment = {**child_environment, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-2:] == ["[False]", "True"]
    with torch.no_grad():
        expected = model(**tiny_batch(model.config))
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    assert all(torch.equal(answer[name], expected[name]) for name in ("loss", "predictions", "targets"))


def test_nothing_in_the_folder_needs_pickle_and_only_the_full_model_names_code(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors", ".md", ".png", ".py", ".yaml"}
    assert {path.name for path in files if path.suffix == ".py"} == set(CODE_FILES)
    for path in files:
        if path.name == "config.json":
            auto_map = json.loads(path.read_text())["auto_map"]
            assert auto_map == {"AutoModelForPreTraining": "modeling_ijepa.IJepaForPretraining"}


def test_the_code_in_the_folder_imports_nothing_else_of_the_package():
    for name in CODE_FILES:
        path = Path(modeling_ijepa.__file__).with_name(name)
        assert set(get_relative_imports(path)) <= {Path(file).stem for file in CODE_FILES}
        assert "ijepa_hf" not in get_imports(path)
