"""Labelled images: draws of labels, orders and crops, other targets, and what of a data set cannot be used."""

import datasets
import numpy as np
import pytest
import torch
from image_zoo import write_zoo
from PIL import Image
from sklearn.datasets import load_digits as load_scans

from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.labelled import EpochOrder, LabelledImages, LabelledSource, choose_labelled, load_labelled_splits
from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.data.transforms import normalize, resize
from ijepa_hf.model.vision_models import ImageSettings

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = ImageSettings((32, 32), MEAN, STD)


def tell(**changes):
    """Flags that ask for 48 digits to train on and 60 to score with."""
    values = {"dataset_name": "digits", "max_train_samples": 48, "max_eval_samples": 60, **changes}
    return LabelledSource(**values)


def write_pictures(folder, labels):
    """A folder of class folders, with pictures of grays."""
    for number, label in enumerate(labels):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        gray = np.full((36, 36, 3), 10 * (number % 7), np.uint8)
        Image.fromarray(gray).save(folder / str(label) / f"{number:03d}.png")


def test_few_label_draws_have_the_number_asked_of_each_class_and_hold_smaller_draws():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 101)
    chosen = choose_labelled(labels, 7, None, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [7, 7, 7]
    assert len(set(chosen.tolist())) == 21
    assert chosen.tolist() == sorted(chosen.tolist())
    assert set(choose_labelled(labels, 3, None, seed=3)) < set(chosen)
    assert chosen.tolist() == choose_labelled(labels, 7, None, seed=3).tolist()
    assert chosen.tolist() != choose_labelled(labels, 7, None, seed=4).tolist()
    assert np.bincount(labels[choose_labelled(labels, None, 0.01, seed=0)]).tolist() == [1, 1, 2]  # rounded up
    assert choose_labelled(labels, None, None, seed=0).tolist() == list(range(181))
    with pytest.raises(ValueError, match=r"samples_per_class=40, but there are fewer images of 1 \(30\)"):
        choose_labelled(labels, 40, None, seed=0)


def test_a_run_trains_on_the_labels_that_belong_to_its_images():
    splits = load_labelled_splits(tell(max_train_samples=None), 3, samples_per_class=2)
    assert np.bincount(splits.train_labels).tolist() == [2] * 10
    scans = load_scans()
    truth = {image.tobytes(): label for image, label in zip(scans.images.astype(np.uint8), scans.target, strict=True)}
    large = {
        np.asarray(
            Image.fromarray(np.rint(np.frombuffer(key, np.uint8).reshape(8, 8) * (255 / 16)).astype(np.uint8)).resize(
                (32, 32), Image.Resampling.BILINEAR
            ).convert("RGB")
        ).tobytes(): label
        for key, label in truth.items()
    }  # fmt: skip
    for images, labels in ((splits.train, splits.train_labels), (splits.test, splits.test_labels)):
        assert [large[np.asarray(images[index]).tobytes()] for index in range(len(images))] == labels.tolist()


def test_words_and_whole_numbers_are_classes_too(tmp_path):
    write_pictures(tmp_path / "pictures", ["a"] * 6)
    for split in ("train", "test"):
        rows = [f"pictures/a/{number:03d}.png,{('wren', 'owl')[number % 2]},{7 + number % 3}" for number in range(6)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label,kind", *rows]) + "\n")
    folder = tmp_path / "tables"
    folder.mkdir()
    for split in ("train", "test"):
        text = (tmp_path / f"{split}.csv").read_text().replace("pictures/", "../pictures/")
        (folder / f"{split}.csv").write_text(text)
    splits = load_labelled_splits(tell(dataset_name=str(folder)), 3)
    assert (splits.names, splits.train_labels.tolist()) == (["owl", "wren"], [1, 0, 1, 0, 1, 0])
    numbers = load_labelled_splits(tell(dataset_name=str(folder), label_column_name="kind"), 3)
    assert numbers.label_column == "kind"
    assert (numbers.names, numbers.test_labels.tolist()) == (["7", "8", "9"], [0, 1, 2, 0, 1, 2])


def test_a_label_that_training_has_never_seen_is_refused(tmp_path):
    for split, labels in (("train", "abab"), ("test", "abc")):
        columns = {"image": [Image.new("RGB", (8, 8))] * len(labels), "label": list(labels)}
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    with pytest.raises(ValueError, match="'test' has labels that the training split does not have: c"):
        load_labelled_splits(tell(dataset_name=str(tmp_path)), 3)


def test_a_crop_depends_on_seed_epoch_and_image_alone_and_an_evaluation_takes_the_whole_image():
    rows = ImageRows(load_digits("train").select(range(8)), "image", 3)
    labels = np.arange(8)
    crops = LabelledImages(rows, labels, SETTINGS, min_crop_scale=0.3, horizontal_flip=True, seed=1)
    again = LabelledImages(rows, labels, SETTINGS, min_crop_scale=0.3, horizontal_flip=True, seed=1)
    other = LabelledImages(rows, labels, SETTINGS, min_crop_scale=0.3, horizontal_flip=True, seed=2)
    first = crops[0, 3]["pixel_values"]
    assert first.shape == (3, 32, 32)
    for _ in range(3):
        again[1, 5]
    assert torch.equal(first, again[0, 3]["pixel_values"])
    assert not torch.equal(first, again[1, 3]["pixel_values"])
    assert not torch.equal(first, other[0, 3]["pixel_values"])
    whole = (torch.from_numpy(np.array(rows[3])).permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / (
        torch.tensor(STD).view(3, 1, 1)
    )
    torch.testing.assert_close(crops[3]["pixel_values"], whole)
    assert crops[3]["labels"].item() == 3


def test_half_of_the_images_are_mirrored_only_where_asked():
    rows = ImageRows(load_digits("train").select(range(60)), "image", 3)
    labels = np.zeros(60, np.int64)
    flipped = LabelledImages(rows, labels, SETTINGS, horizontal_flip=True)
    plain = LabelledImages(rows, labels, SETTINGS)
    count = 0
    for index in range(60):
        whole, drawn = plain[0, index]["pixel_values"], flipped[0, index]["pixel_values"]
        assert torch.equal(whole, plain[index]["pixel_values"])
        assert torch.equal(drawn, whole) or torch.equal(drawn, whole.flip(-1))
        count += not torch.equal(drawn, whole)
    assert 20 <= count <= 40


def test_each_epoch_visits_every_image_once_in_an_order_of_its_own():
    order = EpochOrder(20, seed=0)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == [(0, index) for index in range(20)]
    assert sorted(second) == [(1, index) for index in range(20)]
    assert [index for _, index in first] != [index for _, index in second]


def test_every_kind_of_picture_reaches_the_model_as_the_package_decodes_it(tmp_path):
    for label in ("a", "b"):
        readable = write_zoo(tmp_path / "zoo" / "train" / label)
        write_zoo(tmp_path / "zoo" / "test" / label)
    for path in (tmp_path / "zoo").rglob("broken-*"):
        path.unlink()
    splits = load_labelled_splits(tell(dataset_name=str(tmp_path / "zoo"), max_train_samples=None), 3)
    assert len(splits.train) == 2 * len(readable)
    images = LabelledImages(splits.train, splits.train_labels, SETTINGS)
    for index, name in enumerate(readable):  # the first class
        decoded = decode_image((tmp_path / "zoo" / "train" / "a" / name).read_bytes(), 3)
        assert torch.equal(images[index]["pixel_values"], normalize(resize(decoded, (32, 32)), MEAN, STD)), name


def test_a_set_without_labels_or_with_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        write_pictures(tmp_path / "flat" / split / "deep", ["x", "y"] * 2)
        write_pictures(tmp_path / "one" / split, ["only"] * 4)
    with pytest.raises(ValueError, match="the split 'train' has no labels"):
        load_labelled_splits(tell(dataset_name=str(tmp_path / "flat")), 3)
    columns = {"image": [Image.new("RGB", (8, 8))] * 4, "label": [1, 1, 1, 1]}
    for split in ("train", "test"):
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        dataset.to_parquet(tmp_path / "same" / f"{split}.parquet")
        unlabelled = dataset.remove_columns("label").add_column("label", [0, 1, -1, 0])
        unlabelled.to_parquet(tmp_path / "some" / f"{split}.parquet")
    with pytest.raises(ValueError, match="labels of one class only"):
        load_labelled_splits(tell(dataset_name=str(tmp_path / "same")), 3)
    with pytest.raises(ValueError, match="has images without a label"):
        load_labelled_splits(tell(dataset_name=str(tmp_path / "some")), 3)
