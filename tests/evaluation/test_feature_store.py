"""Stored features: resumed after a kill, reused when nothing changed, never mixed, and damage is found."""

import json
import logging
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel
from warm_python import warm_python

from ijepa_hf.data.reading import ImageRows
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.evaluation import feature_store
from ijepa_hf.evaluation.feature_store import differences, fingerprint_images, fingerprint_model, store_features

IDENTITY = {"model": {"sha256": "a"}, "transform": {"size": [32, 32], "mean": [0.5]}}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_store, "_IMAGES_PER_SHARD", 4)


class Extraction:
    """Features that say which image they are of; remembers what it was asked for."""

    def __init__(self, stop_after: int | None = None, broken: int | None = None) -> None:
        self.asked: list[range] = []
        self.stop_after, self.broken = stop_after, broken

    def __call__(self, parts: Sequence[range]) -> Iterator[np.ndarray]:
        for number, part in enumerate(parts):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(part)
            yield expected(part, self.broken)


def expected(part: Sequence[int], broken: int | None = None) -> np.ndarray:
    values = np.array([[index, index**2] for index in part], np.float32)
    values[[index == broken for index in part]] = np.inf
    return values


def stored(root: Path, extraction: Extraction, identity=IDENTITY, num_images: int = 10):
    return store_features(root, identity, num_images, (2,), extraction)


def test_features_are_written_in_shards_and_read_back(tmp_path):
    features = stored(tmp_path, extraction := Extraction())
    assert extraction.asked == [range(0, 4), range(4, 8), range(8, 10)]
    assert sorted(path.name for path in features.folder.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "manifest.json",
    ]  # fmt: skip
    assert features.shape == (10, 2)
    np.testing.assert_array_equal(features.whole(), expected(range(10)))
    np.testing.assert_array_equal(features[2:9], expected(range(2, 9)))
    np.testing.assert_array_equal(features[np.array([9, 0, 5, 0])], expected([9, 0, 5, 0]))
    np.testing.assert_array_equal(features[np.arange(10) % 3 == 0], expected([0, 3, 6, 9]))


def test_what_is_read_is_mapped_and_changes_do_not_reach_the_files(tmp_path):
    features = stored(tmp_path, Extraction())
    for array in (*features.shards, features.whole()):
        assert isinstance(array, np.memmap)
        array[0] = -1
        array.flush()
    assert len(list(features.folder.iterdir())) == 4  # the file behind whole() has no name
    np.testing.assert_array_equal(stored(tmp_path, Extraction()).whole(), expected(range(10)))


def test_features_are_reused_when_nothing_changed(tmp_path):
    stored(tmp_path, Extraction())
    features = stored(tmp_path, again := Extraction())
    assert again.asked == []
    np.testing.assert_array_equal(features.whole(), expected(range(10)))


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path, stop_after):
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, Extraction(stop_after))
    features = stored(tmp_path, rest := Extraction())
    assert rest.asked == [range(0, 4), range(4, 8), range(8, 10)][stop_after:]
    np.testing.assert_array_equal(features.whole(), expected(range(10)))


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_feature_store as tests
tests.feature_store._IMAGES_PER_SHARD = 4
def dying(name):
    real = getattr(os, name)
    def call(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return call
replace, fsync = dying("replace"), dying("fsync")
for place in sys.argv[3:]:
    left = int(place)
    process = os.fork()
    if process == 0:
        os.replace, os.fsync = replace, fsync
        tests.stored(Path(sys.argv[1], place), tests.Extraction())
    assert os.waitpid(process, 0)[1] == 9
"""


def test_a_kill_between_any_two_steps_of_writing_loses_and_mixes_nothing(tmp_path, child_environment):
    steps = range(18)  # a shard and the manifest after it are six of them, for each of three shards
    command = [*warm_python(), "-c", KILLED, str(tmp_path), str(Path(__file__).parent), *map(str, steps)]
    subprocess.run(command, env=child_environment, check=True)
    for left in steps:
        features = stored(tmp_path / str(left), rest := Extraction())
        np.testing.assert_array_equal(features.whole(), expected(range(10)))
        assert len(rest.asked) == 3 - left // 6 - (left % 6 > 4)


@pytest.mark.parametrize(
    "identity",
    [
        {**IDENTITY, "model": {"sha256": "b"}},
        {**IDENTITY, "transform": {"size": [32, 48], "mean": [0.5]}},
        {**IDENTITY, "layers": 4},
    ],
    ids=["model", "size", "layers"],
)
def test_another_identity_gets_its_own_features(tmp_path, identity):
    first = stored(tmp_path, Extraction())
    other = stored(tmp_path, extraction := Extraction(), identity)
    assert other.folder != first.folder
    assert len(extraction.asked) == 3
    assert stored(tmp_path, Extraction(), num_images=9).folder not in (first.folder, other.folder)


def test_features_of_something_else_in_its_place_are_an_error_that_names_what_differs(tmp_path):
    other = {**IDENTITY, "model": {"sha256": "b"}}
    first = stored(tmp_path, Extraction()).folder
    second = stored(tmp_path, Extraction(), other).folder
    for path in second.iterdir():
        path.unlink()
    second.rmdir()
    first.rename(second)
    with pytest.raises(ValueError, match="holds features of something else: identity.model.sha256 is 'a' there, 'b'"):
        stored(tmp_path, Extraction(), other)


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_shard_is_computed_again_and_said(tmp_path, caplog, damage):
    path = stored(tmp_path, Extraction()).folder / "00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "byte":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-8])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        features = stored(tmp_path, repair := Extraction())
    assert repair.asked == [range(4, 8)]
    assert "00001.safetensors is damaged or missing" in caplog.text
    np.testing.assert_array_equal(features.whole(), expected(range(10)))
    stored(tmp_path, after := Extraction())
    assert after.asked == []


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_said_and_trusted_for_nothing(tmp_path, caplog, text):
    folder = stored(tmp_path, Extraction()).folder
    (folder / "manifest.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        stored(tmp_path, again := Extraction())
    assert len(again.asked) == 3
    assert "manifest.json is damaged" in caplog.text


def test_features_that_are_no_numbers_are_refused_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match="of 1 of 4 images, the first of them image 6, are NaN or infinite"):
        stored(tmp_path, Extraction(broken=6))
    stored(tmp_path, rest := Extraction())
    assert rest.asked == [range(4, 8), range(8, 10)]


def test_features_of_another_shape_or_type_are_refused(tmp_path):
    with pytest.raises(ValueError, match="are float64 of shape \\(4, 2\\), not float32 of shape \\(4, 2\\)"):
        store_features(tmp_path, IDENTITY, 4, (2,), lambda parts: iter([np.zeros((4, 2))]))
    with pytest.raises(ValueError, match="are float32 of shape \\(3, 2\\)"):
        store_features(tmp_path, IDENTITY, 4, (2,), lambda parts: iter([np.zeros((3, 2), np.float32)]))


def test_a_shard_is_no_larger_than_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "_BYTES_PER_SHARD", 3 * 8 + 1)
    stored(tmp_path, extraction := Extraction())
    assert [len(part) for part in extraction.asked] == [3, 3, 3, 1]


def test_the_manifest_says_what_the_features_depend_on(tmp_path):
    folder = stored(tmp_path, Extraction()).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["dtype"] == "float32"
    assert list(manifest["shards"]) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


# -- images ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_images_is_of_their_contents_order_and_number():
    rows = load_digits("test")

    def fingerprint(dataset: datasets.Dataset) -> str:
        return fingerprint_images(ImageRows(dataset, "image", 3))

    whole = fingerprint(rows)
    assert whole == fingerprint(load_digits("test"))
    assert whole == fingerprint(rows.select(range(len(rows))).remove_columns("label"))
    others = [rows.select(range(359)), rows.select([1, 0, *range(2, 360)]), load_digits("train").select(range(360))]
    assert len({whole, *map(fingerprint, others)}) == 4


def test_the_fingerprint_of_a_picture_in_a_folder_changes_with_the_picture(tmp_path):
    Image.new("L", (4, 4), 10).save(tmp_path / "a.png")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}, features=features)
    before = fingerprint_images(ImageRows(rows, "image", 3))
    assert fingerprint_images(ImageRows(rows, "image", 1)) == before
    Image.new("L", (5, 4), 11).save(tmp_path / "a.png")
    assert fingerprint_images(ImageRows(rows, "image", 3)) != before


def test_the_fingerprint_of_arrays_is_of_their_values():
    arrays = np.arange(2 * 4 * 4, dtype=np.uint16).reshape(2, 4, 4)
    features = datasets.Features({"image": datasets.Array2D((4, 4), "uint16")})

    def fingerprint(values: np.ndarray) -> str:
        return fingerprint_images(ImageRows(datasets.Dataset.from_dict({"image": values}, features), "image", 1))

    assert fingerprint(arrays) == fingerprint(arrays.copy())
    assert fingerprint(arrays) != fingerprint(arrays + np.uint16(1))


def test_differences_are_named_by_their_place():
    mine = {"a": {"b": [1, 2], "c": 3}, "d": None}
    other = {"a": {"b": [1, 4], "c": 3}, "e": 5}
    assert differences(mine, other) == ["a.b is [1, 4] there, [1, 2] here", "e is 5 there, None here"]


def test_a_fingerprint_is_of_weights_and_configuration_or_of_the_commit(tmp_path):
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path)
    first = fingerprint_model(str(tmp_path), None)
    assert sorted(first["sha256"]) == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path)
    assert fingerprint_model(str(tmp_path), None) == first
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path)
    changed = fingerprint_model(str(tmp_path), None)
    assert [name for name in first["sha256"] if changed["sha256"][name] != first["sha256"][name]] == [
        "model.safetensors"
    ]
    assert fingerprint_model("some/model", "c0ffee") == {"repo": "some/model", "commit": "c0ffee"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        fingerprint_model(str(tmp_path), None)
