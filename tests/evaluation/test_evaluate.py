"""The evaluation as a whole: honest rows, intervals, nothing tuned on test labels, reuse, merging, clear errors."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from fakehub import in_this_process
from image_zoo import BROKEN, write_zoo
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, r2_score
from tiny import scrambled_model
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel, pipeline

from ijepa_hf.commands.main import main
from ijepa_hf.evaluation import methods, rows
from ijepa_hf.evaluation.arguments import EvaluationArguments
from ijepa_hf.evaluation.evaluate import evaluate_model
from ijepa_hf.evaluation.intervals import bootstrap_interval, mean_interval
from ijepa_hf.evaluation.results import ROWS
from ijepa_hf.runs.export import export_model, image_processor_fields

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
COLORS = np.array([(150, 105, 105), (105, 150, 105), (105, 105, 150)])
NUM_TRAIN, NUM_TEST = 45, 36
EVERYTHING = ["knn", "linear", "linear_sgd", "attentive", "low_shot", "regression", "segmentation", "localization"]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["red", "green", "blue"]),
        "side": datasets.Value("float32"),
        "count": datasets.Value("int32"),
        "mask": datasets.Image(),
        "boxes": datasets.List(datasets.List(datasets.Value("int32"), length=4)),
    }
)


def squares(count: int, seed: int) -> dict[str, list]:
    """Grey noise with one square each: its colour is the label."""
    generator = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for index in range(count):
        label, side = index % 3, int(generator.integers(6, 20))
        left, top = generator.integers(0, 32 - side, 2)
        pixels = generator.integers(90, 140, (32, 32, 3))
        pixels[top : top + side, left : left + side] = COLORS[label] + generator.integers(-30, 31, 3)
        mask = np.zeros((32, 32), np.uint8)
        mask[top : top + side, left : left + side] = 1 + label
        box = [int(left), int(top), int(left) + side, int(top) + side]
        row = {
            "image": Image.fromarray(pixels.astype(np.uint8)), "label": label, "side": side + generator.random(),
            "count": side // 5, "mask": Image.fromarray(mask), "boxes": [[0, 0, 1, 1], box],
        }  # fmt: skip
        for name, value in row.items():
            columns[name].append(value)
    return columns


def write_squares(folder: Path, **changes) -> Path:
    """Parquet files of both splits; a change takes the columns of a split and its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": NUM_TRAIN, "test": NUM_TEST}.items()):
        columns, features = squares(count, seed), FEATURES.copy()
        for change in changes.values():
            change(columns, features, split)
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "encoder"
    export_model(scrambled_model(), folder, step=3, image_mean=MEAN, image_std=STD)
    return folder


@pytest.fixture
def tell(model, data, tmp_path):
    def arguments(**changes):
        values = {
            "model": str(model), "dataset_name": str(data), "output_dir": str(tmp_path / "out"), "k": 5,
            "samples_per_class": 3, "num_label_draws": 2, "target_columns": ["side", "count"],
            "mask_column_name": "mask", **changes,
        }  # fmt: skip
        return EvaluationArguments(**values)

    return arguments


def scores_of(arguments) -> list[dict]:
    evaluate_model(arguments)
    return read(arguments)


def read(arguments) -> list[dict]:
    return json.loads((arguments.folder() / "evaluation.json").read_text())["scores"]


class Spied:
    """Keeps what each probe was given and gave, and what was scored."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[str, tuple, np.ndarray]] = []
        for name in dir(methods):
            if name.startswith("predict_"):
                monkeypatch.setattr(methods, name, self.wrapped(name, getattr(methods, name)))
        for name, metric in methods.METRICS.items():
            monkeypatch.setitem(methods.METRICS, name, metric._replace(value=self.scored(metric.value)))

    def wrapped(self, name, probe):
        def call(*arguments, **options):
            result = probe(*arguments, **options)
            self.calls.append((name, arguments, result.copy()))
            return result

        return call

    def scored(self, compute):
        def call(predicted, truth):
            self.calls.append(("scored", (), np.array(predicted)))
            return compute(predicted, truth)

        return call

    def results(self, name: str) -> list[np.ndarray]:
        return [result for called, _, result in self.calls if called == name]


@pytest.fixture(scope="module")
def everything(model, data, tmp_path_factory):
    """One evaluation by all methods but finetune, and what the probes said."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        spied = Spied(monkeypatch)
        arguments = EvaluationArguments(
            model=str(model), dataset_name=str(data), output_dir=str(tmp_path_factory.mktemp("all")), k=5,
            samples_per_class=3, num_label_draws=2, target_columns=["side", "count"], mask_column_name="mask",
            method=EVERYTHING,
        )  # fmt: skip
        text = evaluate_model(arguments)
    return arguments, read(arguments), spied, text


# -- what is found ---------------------------------------------------------------------------------------------------


def test_every_method_scores_the_model_the_untrained_network_and_raw_pixels(everything):
    _, scores, _, text = everything
    found = {}
    for score in scores:
        found.setdefault((score["method"], score["target"], score["metric"]), []).append(score["features"])
    scored = [
        *((name, "label", "top-1") for name in ("knn", "linear", "linear_sgd", "attentive", "low_shot")),
        *(("regression", column, metric) for column in ("side", "count") for metric in ("R2", "top-1")),
        ("segmentation", "mask", "mIoU"), ("localization", "boxes", "IoU"),
    ]  # fmt: skip
    assert found == {place: list(ROWS) for place in scored}
    assert text.count("raw pixels") == 11
    for score in scores:
        low, high = score["interval"]
        assert low <= score["value"] <= high
        assert 0 < high - low < 2.5
        assert score["num_eval_images"] == NUM_TEST


def test_scores_are_scikit_learns_of_what_the_probes_said(everything):
    _, scores, spied, _ = everything
    columns = squares(NUM_TEST, 1)
    by_place = {(score["method"], score["target"], score["metric"], score["features"]): score for score in scores}

    def value(method, target, metric, row=0):
        return by_place[method, target, metric, ROWS[row]]["value"]

    for row in range(3):
        for method, probe in (
            ("knn", "predict_knn"), ("linear_sgd", "predict_linear_sgd"), ("attentive", "predict_attentive")
        ):  # fmt: skip
            predicted = spied.results(probe)[row]
            assert value(method, "label", "top-1", row) == accuracy_score(columns["label"], predicted)
        quantities = spied.results("predict_ridge")[row]
        assert value("regression", "side", "R2", row) == pytest.approx(
            r2_score(np.float32(columns["side"]), quantities[:, 0])
        )
        masks = np.stack([np.asarray(mask) for mask in columns["mask"]]).ravel()
        predicted = spied.results("predict_segmentation")[row].ravel()
        expected = jaccard_score(masks, predicted, average="macro", labels=np.union1d(masks, predicted))
        assert value("segmentation", "mask", "mIoU", row) == pytest.approx(expected)


def test_intervals_are_those_of_scores_computed_draw_by_draw(everything):
    _, scores, spied, _ = everything
    columns = squares(NUM_TEST, 1)
    sides, quantities = np.float32(columns["side"]).astype(float), spied.results("predict_ridge")[0][:, 0]
    pairs = zip(columns["mask"], spied.results("predict_segmentation")[0], strict=True)
    confusions = [confusion_matrix(np.asarray(mask).ravel(), found.ravel(), labels=range(4)) for mask, found in pairs]

    def r2(drawn):
        return r2_score(sides[drawn], quantities[drawn])

    def mean_iou(drawn):
        counts = sum(confusions[index] for index in drawn)
        unions = counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
        return np.mean(counts.diagonal()[unions > 0] / unions[unions > 0])

    for metric, statistic in (("R2", r2), ("mIoU", mean_iou)):
        expected = bootstrap_interval(
            lambda weights, of=statistic: np.array(
                [of(np.repeat(range(NUM_TEST), row.astype(int))) for row in weights]
            ),
            NUM_TEST,
            seed=0,
        )
        score = next(score for score in scores if score["metric"] == metric)
        assert score["interval"] == pytest.approx(expected)


def test_features_are_those_of_the_stock_processor_and_model(everything, model):
    _, _, spied, _ = everything
    _, (train_x, train_y, test_x), _ = next(call for call in spied.calls if call[0] == "predict_knn")
    processor, encoder = AutoImageProcessor.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for found, columns in ((train_x, squares(NUM_TRAIN, 0)), (test_x, squares(NUM_TEST, 1))):
        with torch.no_grad():
            expected = encoder(**processor(columns["image"], return_tensors="pt")).last_hidden_state.mean(dim=1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert train_y.tolist() == squares(NUM_TRAIN, 0)["label"]


def test_few_labels_are_drawn_several_times_and_the_spread_is_kept(everything):
    _, scores, spied, _ = everything
    score = next(score for score in scores if score["method"] == "low_shot")
    calls = [arguments for name, arguments, _ in spied.calls if name == "predict_linear" and len(arguments[1]) == 9]
    assert len(calls) == 2 * 3
    assert [np.bincount(train_y).tolist() for _, train_y, _ in calls] == [[3, 3, 3]] * 6
    assert not np.array_equal(calls[0][0], calls[1][0])
    assert score["num_train_images"] == 9
    assert len(score["draws"]) == 2
    assert score["value"] == pytest.approx(np.mean(score["draws"]))


def test_numbers_are_also_scored_as_classes_that_training_images_define(everything):
    _, scores, spied, _ = everything
    classes = {score["target"]: score["settings"].get("classes") for score in scores if "classes" in score["settings"]}
    assert classes == {"side": "6 bins", "count": "its values"}
    bins = [arguments[1] for name, arguments, _ in spied.calls if name == "predict_linear" and len(arguments[1]) == 45]
    assert sorted(np.bincount(bins[1])) == [7, 7, 7, 8, 8, 8]  # of the first row; before it is `linear` itself


# -- nothing is tuned on test data -----------------------------------------------------------------------------------


def test_shuffled_test_labels_change_no_prediction_and_bring_the_score_to_chance(
    tell, tmp_path, monkeypatch, everything
):
    order = np.random.default_rng(0).permutation(NUM_TEST)

    def shuffle(columns, features, split):
        if split == "test":
            for name in ("label", "side", "count", "mask", "boxes"):
                columns[name] = [columns[name][index] for index in order]

    _, truly, before, _ = everything
    shuffled = write_squares(tmp_path / "shuffled", shuffle=shuffle)
    after = Spied(monkeypatch)
    scores = scores_of(tell(dataset_name=str(shuffled), method=EVERYTHING))
    assert [name for name, _, _ in after.calls] == [name for name, _, _ in before.calls]
    assert len(after.calls) > 60
    for (_, _, mine), (_, _, theirs) in zip(before.calls, after.calls, strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    for true, false in zip(truly, scores, strict=True):
        assert {**true, "value": 0, "interval": 0, "draws": 0} == {**false, "value": 0, "interval": 0, "draws": 0}
    by_method = {
        score["method"]: (score["value"], other["value"], score["interval"][0])
        for score, other in zip(truly, scores, strict=True)
        if score["metric"] == "top-1" and score["target"] == "label" and score["features"] == "raw pixels"
    }
    for true, false, _ in by_method.values():
        assert true > 0.6
        assert false < 0.55  # chance is 1/3, and 36 images leave some room


# -- features, and files that grow -----------------------------------------------------------------------------------


def test_features_are_extracted_once_and_reused_by_later_methods(tell, monkeypatch):
    first = scores_of(tell(method=["knn"]))

    def fail(*_, **__):
        raise AssertionError("extracted again")

    monkeypatch.setattr(rows, "iterate_features", fail)
    both = scores_of(tell(method=["linear", "knn"]))
    assert both[:3] == first
    assert [score["method"] for score in both] == ["knn"] * 3 + ["linear"] * 3
    other_k = scores_of(tell(method=["knn"], k=3))
    assert [score["settings"].get("k") for score in other_k] == [5] * 3 + [None] * 3 + [3] * 3
    with pytest.raises(AssertionError, match="extracted again"):
        evaluate_model(tell(method=["knn"], layers=1, max_train_samples=30, output_dir=str(tell().folder()) + "-30"))


def test_scores_and_features_of_another_model_are_not_mixed(tell, tmp_path):
    evaluate_model(tell(method=["knn"]))
    other = tmp_path / "other"
    export_model(scrambled_model(seed=9), other, step=3, image_mean=MEAN, image_std=STD)
    with pytest.raises(ValueError, match=r"holds scores of another model.* model\.sha256\.model\.safetensors is"):
        evaluate_model(tell(method=["knn"], model=str(other)))
    (tell().folder() / "evaluation.json").unlink()
    folders = {path.name for path in (tell().folder() / "features").iterdir()}
    evaluate_model(tell(method=["knn"], model=str(other)))
    new = {path.name for path in (tell().folder() / "features").iterdir()} - folders
    assert len(new) == 4  # of the model and of its untrained twin; raw pixels are the same
    with pytest.raises(ValueError, match=r"of other images: data\.num_train_images is 45 there, 30 here"):
        evaluate_model(tell(method=["knn"], model=str(other), max_train_samples=30))


def test_finetuning_stands_beside_the_same_from_new_weights(tell):
    scores = scores_of(tell(method=["finetune"], num_train_epochs=1))
    assert [(score["features"], score["num_train_images"]) for score in scores] == [("model", 45), ("untrained", 45)]
    for score in scores:
        folder = tell().folder() / "finetune" / f"{score['features']}-label-1-epochs-seed-0"
        result = json.loads((folder / "finetune.json").read_text())
        assert result["arguments"]["from_scratch"] == (score["features"] == "untrained")
        assert score["value"] == result["accuracy"]
        # the draws of test images are those of every other row
        rows = squares(NUM_TEST, 1)
        classify = pipeline("image-classification", model=str(folder))
        said = [answers[0]["label"] for answers in classify(rows["image"], top_k=1)]
        right = np.array(said) == np.array(["red", "green", "blue"])[rows["label"]]
        assert 0 < right.sum() < NUM_TEST
        assert tuple(score["interval"]) == mean_interval(right, 0)
    assert scores_of(tell(method=["finetune"], num_train_epochs=1, num_cpu_threads=1)) == scores
    longer = scores_of(tell(method=["finetune"], num_train_epochs=1.5))
    assert [score["settings"]["num_train_epochs"] for score in longer] == [1, 1, 1.5, 1.5]


def test_a_fine_tuning_that_is_in_the_way_is_found_before_any_work(tell, data, monkeypatch):
    told = tell(method=["knn", "finetune"], num_train_epochs=1)

    def fail(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(rows, "iterate_features", fail)
    folder = told.folder() / "finetune" / "untrained-label-1-epochs-seed-0"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no fine-tuning .* choose another --output_dir"):
        evaluate_model(told)
    (folder / "finetune_arguments.json").write_text(json.dumps({"seed": 0, "learning_rate": 1.0}))
    with pytest.raises(ValueError, match=r"learning_rate is 1\.0 there, 0\.001 here.*Delete the folder") as caught:
        evaluate_model(told)
    assert "overwrite_output_dir" not in str(caught.value).split("Delete")[1]
    assert not (told.folder() / "features").exists()


def test_scores_of_two_seeds_stand_beside_each_other(tell):
    first = scores_of(tell(method=["knn", "low_shot"]))
    assert [score["settings"]["seed"] for score in first] == [0] * 6
    both = scores_of(tell(method=["knn", "low_shot"], seed=1))
    assert both[:6] == first
    assert [score["settings"]["seed"] for score in both[6:]] == [1] * 6
    assert scores_of(tell(method=["knn"])) == both


def test_what_becomes_of_an_image_is_written_and_another_transform_is_not_mixed_in(tell, model, tmp_path):
    folder = tmp_path / "same-weights"
    shutil.copytree(model, folder)
    evaluate_model(tell(method=["knn"], model=str(folder)))
    stored = json.loads((tell().folder() / "evaluation.json").read_text())
    assert stored["data"]["transform"] == {
        "size": [32, 32], "mean": MEAN, "std": STD, "resize": "whole image, bilinear, antialias",
    }  # fmt: skip
    fields = image_processor_fields((32, 32), MEAN, [0.5, 0.5, 0.5])
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"data\.transform\.std is \[0\.229"):
        evaluate_model(tell(method=["knn"], model=str(folder)))


def test_the_labels_are_called_by_the_name_of_their_column(tell, tmp_path):
    def rename(columns, features, split):
        columns["cls"], features["cls"] = columns.pop("label"), features.pop("label")

    renamed = str(write_squares(tmp_path / "renamed", change=rename))
    scores = scores_of(tell(method=["knn", "low_shot", "finetune"], dataset_name=renamed, num_train_epochs=1))
    assert {score["target"] for score in scores} == {"cls"}


def test_the_card_gets_the_models_own_scores(tell, model, capsys):
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Encoder\n")
    flags = ["--dataset_name", tell().dataset_name, "--output_dir", tell().output_dir, "--method", "knn", "--k", "5"]
    assert main(["evaluate", str(model), *flags, "--update_card"]) == 0
    printed, text = capsys.readouterr().out, (model / "README.md").read_text()
    (model / "README.md").unlink()
    assert "knn of label, top-1 (45 training images, k 5" in printed
    assert "license: mit" in text
    assert "name: top-1, knn of label with k 5, temperature 0.07, pooling mean, layers 1, seed 0" in " ".join(
        text.split()
    )
    assert text.count("value:") == 1
    assert text.endswith("# Encoder\n")


# -- models of the Hub -----------------------------------------------------------------------------------------------

REPO = "me/birds"


@pytest.fixture
def fake(model, tmp_path, monkeypatch):
    """A Hub with the model at the tag v1, and other weights on main."""
    with in_this_process(monkeypatch, str(tmp_path / "cache")) as fake:
        names = ("config.json", "model.safetensors", "preprocessor_config.json")
        fake.create(REPO, files={name: (model / name).read_bytes() for name in names})
        fake.repos[REPO].branches["v1"] = fake.commit(REPO).sha
        export_model(scrambled_model(7), tmp_path / "other", step=1, image_mean=[0.5] * 3, image_std=[0.25] * 3)
        fake.change(REPO, {name: (tmp_path / "other" / name).read_bytes() for name in names})
        yield fake


def test_a_revision_of_the_hub_is_scored_with_its_own_weights_and_is_known_by_its_commit(tell, fake, tmp_path):
    local = scores_of(tell(method=["knn"], output_dir=str(tmp_path / "local")))
    told = tell(method=["knn"], model=REPO, model_revision="v1")
    assert scores_of(told) == local
    commit = fake.commit(REPO, "v1").sha
    stored = json.loads((told.folder() / "evaluation.json").read_text())
    assert stored["model"] == {"name": REPO, "repo": REPO, "commit": commit}
    fake.repos[REPO].branches["v1"] = fake.commit(REPO).sha
    with pytest.raises(ValueError, match=rf"model\.commit is '{commit}' there, '{fake.commit(REPO).sha}' here"):
        evaluate_model(told)


# -- what is refused, before any feature is extracted ----------------------------------------------------------------


def without(column):
    def change(columns, features, split):
        del columns[column], features[column]

    return change


def constant(column, value, *splits):
    def change(columns, features, split):
        if split in splits:
            columns[column] = [value] * len(columns[column])

    return change


def nearly_constant(columns, features, split):
    columns["side"] = [1.5] * (len(columns["side"]) - 1) + [7.5]


def one_class(columns, features, split):
    columns["label"] = [1] * len(columns["label"])


def unknown_test_label(columns, features, split):
    features["label"] = datasets.Value("int64")
    if split == "test":
        columns["label"][4] = 7


def unknown_test_mask(columns, features, split):
    if split == "test":
        columns["mask"][4] = Image.fromarray(np.full((32, 32), 9, np.uint8))


def empty_masks(columns, features, split):
    columns["mask"] = [Image.new("L", (32, 32))] * len(columns["mask"])


REGRESSION = {"method": ["regression"]}


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (without("label"), {}, r"has no labels \(its columns are image, side, count, mask, boxes\)"),
        (None, {"label_column_name": "lable"}, "label_column_name='lable' is no column of classes"),
        (unknown_test_label, {}, "split 'test' has labels that the training split does not have: 7"),
        (one_class, {}, r"has labels of one class only \('label' is always 'green'\)"),
        (None, {"k": 46}, "k=46, but there are 45 training images; use --k 45 or less"),
        (
            None,
            {"method": ["linear"], "max_train_samples": 4},
            "there are 4 training images; a probe needs at least 5",
        ),
        (None, {"method": ["low_shot"], "samples_per_class": 1}, "low_shot would be fitted to 3 labelled images"),
        (
            None,
            {"method": ["low_shot"], "samples_per_class": 16},
            r"fewer images of red \(15\).*--samples_per_class 15",
        ),
        (None, {"pooling": "cls"}, "has no class token; use --pooling mean"),
        (None, {"method": ["regression"], "target_columns": ["size"]}, "column 'size' .* there are: 'side', 'count'"),
        (
            None,
            REGRESSION | {"max_eval_samples": 2},
            "R2 of 'side' can have no interval: .* the 2 test .* at least 10",
        ),
        (constant("count", 3, "test"), REGRESSION, "'count' is 3 in each of the 36 images of the split 'test'"),
        (constant("count", 3, "train"), REGRESSION, "'count' is 3 in each of the 45 images of the split 'train'"),
        (nearly_constant, REGRESSION, "'side' cannot be cut into bins .* 2 different values in 45 images"),
        (None, {"method": ["segmentation"], "mask_column_name": "boxes"}, "columns of pictures there are: 'mask'"),
        (unknown_test_mask, {"method": ["segmentation"]}, "pixels of class 9 in 'mask', above 3, the highest of the"),
        (empty_masks, {"method": ["segmentation"]}, "has pixels of one class only in 'mask'"),
        (None, {"method": ["localization"], "boxes_column_name": "box"}, "column 'box' .* there are: 'boxes'"),
        (None, {"eval_split_name": "validation"}, "has no split 'validation'"),
        (None, {"device": "gpu"}, "device='gpu' cannot be used; write cpu or cuda"),
        (None, {"device": "cuda:99"}, "device='cuda:99' cannot be used; write cpu or cuda"),
    ],
)
def test_data_that_a_method_cannot_use_are_refused_before_the_work(tell, tmp_path, change, flags, message):
    if change is not None:
        flags = {**flags, "dataset_name": str(write_squares(tmp_path / "changed", change=change))}
    arguments = tell(**{"method": ["knn"], **flags})
    with pytest.raises(ValueError, match=message):
        evaluate_model(arguments)
    assert not arguments.folder().exists()


def test_a_model_without_patches_is_refused_where_a_method_needs_them(tell, tmp_path):
    folder = tmp_path / "resnet"
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor_fields((32, 32), MEAN, STD)))
    for method in ("attentive", "segmentation", "localization"):
        with pytest.raises(ValueError, match=f"method='{method}' needs a vector for each patch"):
            evaluate_model(tell(model=str(folder), method=["knn", method]))
    with pytest.raises(ValueError, match=r"no plain stack of layers.* leave finetune out of --method"):
        evaluate_model(tell(model=str(folder), method=["knn", "finetune"]))
    assert not tell().folder().exists()
    assert len(scores_of(tell(model=str(folder), method=["knn"]))) == 3


def test_features_that_are_no_numbers_are_refused(tell, tmp_path, model):
    folder = tmp_path / "broken"
    export_model(scrambled_model(), folder, step=3, image_mean=MEAN, image_std=STD)
    state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    state["ijepa.layernorm.bias"][3] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the features of 45 of 45 images, the first of them image 0, are NaN"):
        evaluate_model(tell(model=str(folder), method=["knn"]))
    assert not (tell().folder() / "evaluation.json").exists()


def test_a_picture_that_cannot_be_read_is_named(tell, tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write_zoo(tmp_path / "zoo" / split / label)
            for name in BROKEN[1:]:
                (tmp_path / "zoo" / split / label / name).unlink()
    with pytest.raises(ValueError, match=rf"{BROKEN[0]}.*No image is skipped"):
        evaluate_model(tell(dataset_name=str(tmp_path / "zoo"), method=["knn"]))


def test_a_folder_without_a_model_is_named(tell, tmp_path, capsys, monkeypatch):
    (tmp_path / "unfinished").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; is the run finished"):
        evaluate_model(tell(model="unfinished"))
    assert main(["evaluate", str(tmp_path / "gone" / "x"), "--dataset_name", "digits"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
