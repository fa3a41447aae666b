"""Fine-tuning: training, resume to the bit, and a folder that stock transformers reads."""

import dataclasses
import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from fakehub import in_this_process
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import scrambled_model, tiny_config, tiny_run
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    IJepaForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from warm_python import warm_python

from ijepa_hf.data.labelled import load_labelled_splits
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.finetuning import finetune as module
from ijepa_hf.finetuning.arguments import FinetuningArguments
from ijepa_hf.finetuning.classifier import load_classifier
from ijepa_hf.finetuning.finetune import FinetuningTrainer, SmoothedCrossEntropy, finetune
from ijepa_hf.runs.export import export_model

NAMES = [str(digit) for digit in range(10)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("pretrained") / "run", hidden_dropout_prob=0.1, license="cc-by-4.0")


# A fine-tuning of a second: 48 digits, two epochs of three steps.
SHORT = {
    "dataset_name": "digits", "max_train_samples": 48, "max_eval_samples": 60, "per_device_train_batch_size": 16,
    "num_train_epochs": 2, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture
def tell(pretrained, tmp_path):
    """Arguments of a short fine-tuning."""

    def arguments(**changes):
        values = {"model": str(pretrained), "output_dir": str(tmp_path / "classifier"), **SHORT, **changes}
        return FinetuningArguments(**values)

    return arguments


@pytest.fixture(scope="module")
def classifier(pretrained, tmp_path_factory):
    """The folder of a short fine-tuning, finished; to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "classifier"
    return finetuned(FinetuningArguments(model=str(pretrained), output_dir=str(folder), **SHORT))


def finetuned(arguments):
    finetune(arguments)
    return Path(arguments.output_dir)


def weights(folder):
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def result_of(folder):
    return json.loads((folder / "finetune.json").read_text())


def write_pictures(folder, labels):
    """A folder of class folders, with pictures of grays."""
    for number, label in enumerate(labels):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        gray = np.full((36, 36, 3), 10 * (number % 7), np.uint8)
        Image.fromarray(gray).save(folder / str(label) / f"{number:03d}.png")


def vision_model(kind, folder=None):
    """A tiny stock classifier, saved with an image processor where a folder is given."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    if kind == "ijepa":
        model = IJepaForImageClassification.from_pretrained(folder, num_labels=10)
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**shape, intermediate_size=64))
    else:
        model = Dinov2ForImageClassification(Dinov2Config(**shape, mlp_ratio=2))
    if folder is not None and kind != "ijepa":
        model.save_pretrained(folder)
        processor = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def test_every_group_warms_up_and_falls_as_a_cosine_of_its_own_rate(tell):
    trainer = trainer_of(tell(layer_decay=0.5, learning_rate=0.1, warmup_ratio=0.2))
    trainer.create_optimizer_and_scheduler(10)
    rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    highest = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})
    np.testing.assert_allclose(highest, [0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])
    assert rates == [0.0]
    for step in range(1, 11):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        share = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
        rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
        np.testing.assert_allclose(rates, [rate * share for rate in highest] if share else [0.0], atol=1e-12)


def trainer_of(arguments):
    splits = load_labelled_splits(arguments.labelled, 3)
    settings = module.read_image_settings(arguments.model, tiny_config())
    return module._build_trainer(load_classifier(arguments, splits.names), splits, settings, arguments)


# -- images ----------------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_read_stops_the_run_and_is_named(tell, tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write_pictures(tmp_path / "pictures" / split, [label] * 4)
    (tmp_path / "pictures" / "train" / "b" / "002.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train/b/002\.png.*No labelled image is skipped"):
        finetune(tell(dataset_name=str(tmp_path / "pictures")))


def test_rectangles_of_five_bands_are_fine_tuned_too(tell, tmp_path):
    export_model(
        scrambled_model(num_channels=5, image_size=[16, 32]), tmp_path / "bands", step=1, image_mean=[0.5] * 5,
        image_std=[0.3] * 5,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("field", "forest"):
            (tmp_path / "tiles" / split / label).mkdir(parents=True)
            for number in range(4):
                tile = generator.random((5, 20, 40)).astype(np.float32)
                np.save(tmp_path / "tiles" / split / label / f"{number}.npy", tile)
    folder = finetuned(tell(model=str(tmp_path / "bands"), dataset_name=str(tmp_path / "tiles"), max_train_steps=2))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "field", 1: "forest"}
    assert model(torch.zeros(1, 5, 16, 32)).logits.shape == (1, 2)


# -- what comes out --------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
sys.modules["ijepa_hf"] = None  # importing it is now an ImportError
folder, pictures = sys.argv[1], sys.argv[2:]
import transformers
from packaging.version import Version
if Version(transformers.__version__) >= Version("5.18"):
    classify = transformers.pipeline("image-classification", model=folder)
else:  # AutoImageProcessor needs torchvision there
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    processor = ViTImageProcessorPil.from_pretrained(folder)
    classify = transformers.pipeline("image-classification", model=folder, image_processor=processor)
assert type(classify.model) is transformers.IJepaForImageClassification
try:
    import ijepa_hf
except ImportError:
    print(json.dumps([answer[0]["label"] for answer in classify(pictures)]))
"""


def test_the_pipeline_has_the_accuracy_of_the_report_where_the_package_cannot_be_imported(
    tell, tmp_path, child_environment
):
    told = tell(max_train_samples=300, num_train_epochs=8, min_crop_scale=0.8, learning_rate=3e-3)
    printed, folder = finetune(told), Path(told.output_dir)
    result = result_of(folder)
    digits = load_digits("test")
    chosen = np.linspace(0, len(digits) - 1, 60).round().astype(int).tolist()
    for index in chosen:
        digits[index]["image"].convert("RGB").save(tmp_path / f"{index}.png")
    pictures = [str(tmp_path / f"{index}.png") for index in chosen]
    done = subprocess.run(
        [*warm_python(package=False), "-c", PROGRAM, str(folder), *pictures],
        env=child_environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    is_right = [answer == str(digits[index]["label"]) for answer, index in zip(answers, chosen, strict=True)]
    right = sum(is_right)
    assert right == result["num_correct"]
    assert result["wrong_images"] == [number for number, each in enumerate(is_right) if not each]
    assert result["accuracy"] == right / 60 == result["evaluations"][-1]["accuracy"]
    assert right > 12, "it has learned nothing, so that little is tested"
    assert len(result["evaluations"]) == 8
    assert f"top-1 {100 * right / 60:.1f} %" in printed


def test_the_folder_holds_a_model_a_card_and_numbers_and_no_pickle(classifier):
    folder = classifier
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "finetune.json",
        "finetune_arguments.json", "curves.png",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["IJepaForImageClassification"]
    assert "auto_map" not in config  # the code that it names stays with the pretrained model
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    card = ModelCard.load(folder / "README.md").data.to_dict()
    assert (card["library_name"], card["pipeline_tag"]) == ("transformers", "image-classification")
    assert card["license"] == "cc-by-4.0"  # of the weights that it was made of
    (score,) = card["model-index"][0]["results"]
    assert score["metrics"] == [{"type": "accuracy", "value": result_of(folder)["accuracy"]}]


# -- models of the Hub -----------------------------------------------------------------------------------------------

REPO = "me/birds"


@pytest.fixture
def fake(pretrained, tmp_path, monkeypatch):
    """A Hub with a model whose licence is cc-by-nc-4.0 at the tag v1, and mit with other weights on main."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between retries
    with in_this_process(monkeypatch, str(tmp_path / "cache")) as fake:
        names = ("config.json", "model.safetensors", "preprocessor_config.json")
        fake.create(REPO, files={name: (pretrained / name).read_bytes() for name in names})
        fake.change(REPO, {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
        fake.repos[REPO].branches["v1"] = fake.commit(REPO).sha
        export_model(scrambled_model(7), tmp_path / "other", step=1, image_mean=[0.5] * 3, image_std=[0.25] * 3)
        fake.change(REPO, {name: (tmp_path / "other" / name).read_bytes() for name in names})
        fake.change(REPO, {"README.md": b"---\nlicense: mit\n---\n"})
        yield fake


def license_on(folder):
    return ModelCard.load(folder / "README.md").data.license


def test_a_revision_of_the_hub_is_fine_tuned_with_its_own_weights_images_and_licence_and_recorded(
    tell, fake, pretrained, tmp_path
):
    told = tell(model=REPO, model_revision="v1", freeze_encoder=True, num_train_epochs=1)
    folder = finetuned(told)
    before, after = weights(pretrained), weights(folder)
    assert all(torch.equal(after[name], before[name]) for name in before)
    moments = [
        json.loads((place / "preprocessor_config.json").read_text())["image_std"] for place in (folder, pretrained)
    ]
    assert moments[0] == moments[1] != [0.25] * 3
    assert license_on(folder) == "cc-by-nc-4.0"
    commit = fake.commit(REPO, "v1").sha
    result = result_of(folder)
    assert (result["arguments"]["model_revision"], result["model_commit"]) == ("v1", commit)
    assert f"`{REPO}` (commit `{commit}`), fine-tuned" in (folder / "README.md").read_text()
    assert (
        license_on(finetuned(dataclasses.replace(told, model_revision=None, output_dir=str(tmp_path / "main"))))
        == "mit"
    )
    with pytest.raises(ValueError, match="model_revision is 'v1' there, 'main' here"):
        finetune(dataclasses.replace(told, model_revision="main"))
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        finetune(dataclasses.replace(told, model_revision="v9", output_dir=str(tmp_path / "v9")))


def test_all_files_are_of_one_commit_although_the_branch_moves_in_between(tell, fake, pretrained, monkeypatch):
    begun = fake.commit(REPO).sha
    names = ("config.json", "model.safetensors", "preprocessor_config.json")
    stock = module.load_labelled_splits

    def load_while_the_branch_moves(*args, **kwargs):  # after the configuration was read, before the weights are
        fake.change(REPO, {name: (pretrained / name).read_bytes() for name in names})
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, "load_labelled_splits", load_while_the_branch_moves)
    folder = finetuned(tell(model=REPO, freeze_encoder=True, num_train_epochs=1))
    assert fake.commit(REPO).sha != begun == result_of(folder)["model_commit"]
    expected = scrambled_model(7).ijepa.layernorm.weight.detach()  # of the commit that it began with
    assert torch.equal(weights(folder)["ijepa.layernorm.weight"], expected)


@pytest.mark.parametrize("kind", ["status", "drop", "cut"])
def test_a_card_that_the_hub_does_not_give_is_not_taken_for_absent(kind, tell, fake, caplog, tmp_path):
    fake.fail(kind, match="README.md", method="GET" if kind == "cut" else None, times=1000)
    assert module._license_of(tell(model=REPO)) == {"license": None, "license_is_known": False}
    assert f"the licence of {REPO} is NOT KNOWN: its README.md could not be read" in caplog.text
    assert f"set `license` at the top of {tmp_path / 'classifier' / 'README.md'} by hand" in caplog.text


def test_a_licence_that_is_not_known_is_said_before_the_training_and_on_the_new_card(tell, fake, caplog, monkeypatch):
    fake.fail("status", match="README.md", times=1000)
    said = []
    stock = FinetuningTrainer.train
    monkeypatch.setattr(
        FinetuningTrainer, "train", lambda *args, **kwargs: (said.append(caplog.text), stock(*args, **kwargs))[1]
    )
    told = tell(model=REPO, num_train_epochs=1)
    printed = finetune(told)
    folder = Path(told.output_dir)
    assert "is NOT KNOWN" in said[0]
    assert license_on(folder) is None
    assert f"Licence: that of `{REPO}` could not be read" in (folder / "README.md").read_text()
    assert f"licence: that of `{REPO}` could not be read" in printed


def test_offline_a_card_that_is_not_in_the_cache_is_not_taken_for_absent(tell, fake, monkeypatch, caplog):
    told = tell(model=REPO)
    card = module._find_card(REPO, None)
    load_classifier(told, NAMES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(fake.requests)
    assert module._license_of(told) == {"license": "mit", "license_is_known": True}
    card.unlink()
    assert module._license_of(told) == {"license": None, "license_is_known": False}
    assert "is NOT KNOWN" in caplog.text
    assert len(fake.requests) == asked


def test_a_card_that_is_known_to_be_absent_is_no_matter(tell, fake, pretrained, monkeypatch, caplog):
    fake.create("me/bare", files={"config.json": (pretrained / "config.json").read_bytes()})
    told, nothing = tell(model="me/bare"), {"license": None, "license_is_known": True}
    huggingface_hub.hf_hub_download("me/bare", "config.json")
    assert module._license_of(told) == nothing
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert module._license_of(told) == nothing  # the cache remembers that there is none
    assert module._license_of(tell(from_scratch=True, model="me/never-seen")) == nothing  # takes no weights
    assert caplog.text == ""


def test_a_card_whose_metadata_cannot_be_read_stops_before_the_training(tell, fake, tmp_path):
    fake.change(REPO, {"README.md": b"---\nlicense: [mit\n---\n"})
    with pytest.raises(ValueError, match=r"README\.md: the metadata in front cannot be read"):
        finetune(tell(model=REPO))
    assert not (tmp_path / "classifier").exists()


# -- training --------------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_keeps_its_bits_and_another_one_only_its_position_table(tell, pretrained, classifier):
    before = weights(pretrained)
    frozen = weights(finetuned(tell(freeze_encoder=True)))
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert set(frozen) - set(before) == {"classifier.weight", "classifier.bias"}
    trained = weights(classifier)
    kept = [name for name in before if torch.equal(trained[name], before[name])]
    assert kept == ["ijepa.embeddings.position_embeddings"]
    assert not torch.equal(frozen["classifier.weight"], trained["classifier.weight"])


def test_the_loss_is_smoothed_cross_entropy_averaged_over_the_step_however_it_is_cut():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    loss = SmoothedCrossEntropy(0.1)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    parts = [loss({"logits": logits[part]}, labels[part], num_items_in_batch=6) for part in (slice(4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), expected)


def test_two_micro_batches_train_as_one_batch_does(tell, tmp_path):
    model = scrambled_model()  # without dropout
    export_model(model, tmp_path / "plain", step=1, image_mean=MEAN, image_std=STD)
    flags = {"model": str(tmp_path / "plain"), "learning_rate": 1e-3, "label_smoothing": 0.1}
    whole = finetuned(tell(**flags))
    cut = finetuned(
        tell(**flags, output_dir=str(tmp_path / "cut"), per_device_train_batch_size=8, gradient_accumulation_steps=2)
    )
    assert result_of(whole)["steps"] == result_of(cut)["steps"] == 6
    for one, other in zip(result_of(whole)["losses"], result_of(cut)["losses"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    theirs = weights(cut)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0)


def test_the_number_of_workers_changes_no_bit(tell, classifier):
    two = weights(finetuned(tell(dataloader_num_workers=2)))
    assert all(torch.equal(tensor, two[name]) for name, tensor in weights(classifier).items())


def test_bf16_and_a_length_in_steps_work(tell):
    result = result_of(finetuned(tell(mixed_precision="bf16", max_train_steps=2)))
    assert result["steps"] == 2
    assert math.isfinite(result["losses"][-1]["loss"])


def test_a_loss_that_is_no_number_stops_the_run(tell, monkeypatch):
    monkeypatch.setattr(
        SmoothedCrossEntropy, "__call__", lambda *_, **__: torch.full((1,), math.nan, requires_grad=True).sum()
    )
    with pytest.raises(ValueError, match="the loss is nan at step 1; use a lower --learning_rate"):
        finetuned(tell())


# -- going on --------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, arguments, step):
    """Runs until a step, and stops there as Ctrl-C would."""
    stock = FinetuningTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(FinetuningTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(arguments)
    monkeypatch.setattr(FinetuningTrainer, "training_step", stock)


def test_an_interrupted_and_resumed_run_has_the_bits_and_the_report_of_an_uninterrupted_one(
    tell, tmp_path, monkeypatch
):
    flags = {"num_train_epochs": 4, "horizontal_flip": True, "label_smoothing": 0.1}  # and dropout
    whole = finetuned(tell(**flags, output_dir=str(tmp_path / "whole")))
    resumed = tell(**flags, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint="latest")
    interrupt(monkeypatch, resumed, step=4)
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == [
        "checkpoint-3",
        "finetune_arguments.json",
    ]
    interrupt(monkeypatch, resumed, step=10)
    folder = finetuned(resumed)
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("losses", "accuracy", "steps"):
        assert result_of(folder)[name] == result_of(whole)[name], name
    assert result_of(folder)["resumed_from"] == "checkpoint-9"


@pytest.mark.parametrize("kind", ["ijepa", "vit", "dinov2"])
def test_every_weight_of_a_checkpoint_is_restored(kind, pretrained, tmp_path):
    model = vision_model(kind, pretrained if kind == "ijepa" else tmp_path / "model")
    scramble(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scramble(model)
    make_trainer(FinetuningTrainer, model, tmp_path, layer_decay=1.0)._load_from_checkpoint(
        str(tmp_path / "checkpoint-1")
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_stock_trainer_still_restores_only_some_of_them(pretrained, tmp_path):
    """Why `_load_from_checkpoint` is overridden; when this fails, the stock one may have become good enough."""
    model = vision_model("ijepa", pretrained)
    model.save_pretrained(tmp_path / "checkpoint-1")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scramble(model)
    make_trainer(Trainer, model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    restored = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, expected[name])]
    assert 0 < len(restored) < len(expected) / 2
    assert not any(".layers." in name and "layernorm" not in name for name in restored)


def test_a_checkpoint_of_another_model_or_with_weights_missing_is_refused(pretrained, tmp_path):
    model = vision_model("ijepa", pretrained)
    model.save_pretrained(tmp_path / "checkpoint-1")
    stored = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    del stored["ijepa.encoder.layer.1.output.dense.bias"]
    save_file(stored, tmp_path / "checkpoint-1" / "model.safetensors", metadata={"format": "pt"})
    trainer = make_trainer(FinetuningTrainer, model, tmp_path, layer_decay=1.0)
    with pytest.raises(
        ValueError, match=r"no checkpoint of this model: \{'missing_keys': \['ijepa.layers.1.mlp.fc2.bia"
    ):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


def scramble(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def make_trainer(cls, model: nn.Module, folder, **options):
    return cls(model=model, args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none"), **options)


def test_a_finished_run_is_reported_again_without_work_and_overwritten_only_where_asked(
    tell, classifier, tmp_path, monkeypatch
):
    shutil.copytree(classifier, tmp_path / "classifier")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", None)
        assert "load it with:" in finetune(tell())
        with pytest.raises(ValueError, match="another fine-tuning: learning_rate is 0.01 there, 0.005 here"):
            finetune(tell(learning_rate=5e-3))
    assert weights(tmp_path / "classifier").keys() == weights(classifier).keys()
    (tmp_path / "classifier" / "notes.txt").write_text("mine")
    folder = finetuned(tell(learning_rate=5e-3, overwrite_output_dir=True))
    assert result_of(folder)["arguments"]["learning_rate"] == 5e-3
    assert (folder / "notes.txt").read_text() == "mine"


# -- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_other_vision_models_are_fine_tuned_as_well(kind, tell, tmp_path):
    vision_model(kind, tmp_path / kind)
    folder = finetuned(tell(model=str(tmp_path / kind), num_train_epochs=1))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.num_labels == 10
    assert type(model).__name__ in ("ViTForImageClassification", "Dinov2ForImageClassification")
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)


# -- errors before work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split_name": "validation"}, "no split 'validation'; it has 'train' and 'test'"),
        ({"model": "./nowhere"}, "model='./nowhere': there is no such folder"),
        ({"model_revision": "v1"}, "model_revision='v1' is for Hub repos, and model='.*' is on this disk; omit it"),
    ],
)
def test_a_mistake_is_named_before_any_work(tell, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetuned(tell(**changes))
    assert not (tmp_path / "classifier").exists()


def test_images_of_other_channels_than_the_models_are_refused(tell, tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "tiles" / split / label).mkdir(parents=True)
            np.save(tmp_path / "tiles" / split / label / "0.npy", np.zeros((5, 20, 24), np.float32))
    with pytest.raises(ValueError, match="image 0 of the data set: num_channels=3"):
        finetuned(tell(dataset_name=str(tmp_path / "tiles")))


def test_a_folder_that_holds_something_else_is_never_touched(tell, pretrained):
    before = sorted((path, path.stat().st_mtime_ns) for path in pretrained.rglob("*"))
    with pytest.raises(ValueError, match="holds no fine-tuning of ijepa-hf"):
        finetune(tell(output_dir=str(pretrained), overwrite_output_dir=True))
    assert sorted((path, path.stat().st_mtime_ns) for path in pretrained.rglob("*")) == before
