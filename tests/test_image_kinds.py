"""Whole runs on every kind of image that people have: many bands, 16 bits, odd shapes, odd files, broken ones."""

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from image_zoo import BROKEN, BROKEN_BYTES, write_broken, write_zoo
from PIL import Image
from tiny import final_weights, logged, signal_in_step, tiny_flags, tiny_run
from transformers import AutoModel
from warm_python import warm_python

from ijepa_hf.commands import main
from ijepa_hf.data import decoding
from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.reading import ImageColumn, ImageRows
from ijepa_hf.data.transforms import CROP_NUMBERS, random_resized_crop
from ijepa_hf.runs.checkpoints import find_latest
from ijepa_hf.training.signals import StoppedBySignal

FEW = {"max_train_steps": 3, "warmup_epochs": 0, "max_train_samples": None}


def unreadable(run):
    path = run / "unreadable_images.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def assert_trained(run, num_channels=3, size=(32, 32)):
    """It trained: finite losses, weights that moved, and an encoder that stock transformers loads and feeds."""
    assert all(np.isfinite(loss) for (loss,) in logged(run, "loss"))
    encoder = AutoModel.from_pretrained(run)
    features = encoder(torch.randn(2, num_channels, *size)).last_hidden_state
    assert features.shape == (2, size[0] // 4 * (size[1] // 4), 32)
    assert torch.isfinite(features).all()


def bands(count, number, side=40):
    return np.random.default_rng(0).random((number, count, side, side + 8))


# -- arrays ----------------------------------------------------------------------------------------------------------


def test_satellite_like_arrays_of_12_float_bands_train_from_one_file(tmp_path):
    np.save(tmp_path / "tiles.npy", bands(12, 16).astype(np.float32) * 3000)
    run = tiny_run(
        tmp_path / "run", dataset_name=tmp_path / "tiles.npy", num_channels=12, image_mean=[1500] * 12,
        image_std=[866] * 12, **FEW,
    )  # fmt: skip
    assert_trained(run, num_channels=12)


def test_arrays_of_16_bits_train_from_a_folder_and_from_streamed_parquet_alike(tmp_path):
    (tmp_path / "tiles").mkdir()
    for number, tile in enumerate((bands(5, 16) * 65535).astype(np.uint16)):
        np.save(tmp_path / "tiles" / f"{number:02d}.npy", tile)
    flags = {"num_channels": 5, "image_mean": [0.5] * 5, "image_std": [0.3] * 5, **FEW}
    run = tiny_run(tmp_path / "run", dataset_name=tmp_path / "tiles", **flags)
    assert_trained(run, num_channels=5)
    rows = datasets.load_dataset("parquet", data_files=write_shards(tmp_path, run_rows(tmp_path / "tiles")))["train"]
    assert rows.features["image"].dtype == "uint16"
    streamed = tiny_run(tmp_path / "streamed", dataset_name=tmp_path / "shards", streaming=True, **flags)
    assert_trained(streamed, num_channels=5)


def run_rows(folder):
    from ijepa_hf.data.sources.opening import ImageSource, load_split

    return load_split(ImageSource(str(folder)), "train")


def write_shards(folder, dataset, count=2):
    (folder / "shards").mkdir()
    names = [str(folder / "shards" / f"train-{number:05d}-of-{count:05d}.parquet") for number in range(count)]
    for number, name in enumerate(names):
        dataset.shard(count, number, contiguous=True).to_parquet(name)
    return names


def test_medical_like_grayscale_of_16_bits_trains_with_one_channel_and_keeps_its_depth(tmp_path):
    (tmp_path / "scans").mkdir()
    generator = np.random.default_rng(0)
    for number in range(16):
        # all that differs lies in the lower 8 bits: read with 8 bits the pictures would be constant
        scan = (30000 + generator.integers(0, 200, (48, 36))).astype(np.uint16)
        Image.fromarray(scan).save(tmp_path / "scans" / f"{number}.png")
    flags = {"num_channels": 1, "image_mean": [30100 / 65535], "image_std": [58 / 65535]}
    run = tiny_run(tmp_path / "run", dataset_name=tmp_path / "scans", **flags, **FEW)
    assert_trained(run, num_channels=1)
    ((std,),) = logged(run, "target_std")[-1:]
    assert std > 0.1  # constant pictures would give targets that differ by their place only


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_rectangular_images_train_on_a_rectangular_grid(tmp_path):
    (tmp_path / "wide").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 150, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "wide" / f"{number}.jpg")
    run = tiny_run(tmp_path / "run", dataset_name=tmp_path / "wide", image_size=[32, 64], **FEW)
    assert_trained(run, size=(32, 64))


def test_photographs_train_at_224_pixels(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375)).save(tmp_path / "photos" / f"{number}.jpg")
    run = tiny_run(tmp_path / "run", dataset_name=tmp_path / "photos", image_size=224, patch_size=16, **FEW)
    features = AutoModel.from_pretrained(run)(torch.randn(1, 3, 224, 224)).last_hidden_state
    assert features.shape == (1, 14 * 14, 32)


# -- odd and broken files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    assert len(write_zoo(folder)) == 16
    return folder


LONG = {"max_train_steps": 10, "warmup_epochs": 0, "max_train_samples": None, "max_broken_share": 0.5}


@pytest.fixture(scope="module")
def zoo_run(zoo, tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "run", dataset_name=zoo, **LONG)


def test_every_kind_of_picture_trains_and_broken_ones_are_skipped_named_once_and_counted(zoo_run, zoo):
    assert_trained(zoo_run)
    found = unreadable(zoo_run)
    assert sorted(name for row in found for name in BROKEN if name in row["reason"]) == sorted(BROKEN)
    assert len(found) == len(BROKEN)
    report = json.loads((zoo_run / "report.json").read_text())
    assert report["num_unreadable_images"] == len(BROKEN)


def test_one_channel_models_read_every_kind_too(zoo, tmp_path):
    flags = {"num_channels": 1, "image_mean": [0.5], "image_std": [0.25]}
    assert_trained(tiny_run(tmp_path / "run", dataset_name=zoo, **LONG, **flags), num_channels=1)


MEASURES_BROKEN = """
import json, resource, sys, warnings
import datasets
from ijepa_hf.data.reading import ImageColumn

warnings.simplefilter("error")
features = datasets.Features({"image": datasets.Image()})
column = ImageColumn(datasets.Dataset.from_dict({"image": []}, features=features), "image", 3)
found, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        column.decode({"image": {"bytes": None, "path": path}})
    except ValueError as error:
        found[path] = str(error)
print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_every_way_to_be_broken_has_a_reason_and_costs_neither_time_nor_memory(tmp_path, child_environment):
    paths = [str(path) for path in write_broken(tmp_path / "broken")]
    assert len(paths) == len(BROKEN_BYTES) + 5
    command = [*warm_python(), "-c", MEASURES_BROKEN, *paths]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=60, check=True)
    found, kilobytes = json.loads(done.stdout)
    assert sorted(found) == sorted(paths)
    assert all(path in reason for path, reason in found.items())
    assert kilobytes < 200_000
    said = {Path(path).name: reason for path, reason in found.items()}
    for name, words in (
        ("claims-40000.png", "1600000000 pixels"), ("pipe.png", "no file, but a pipe"),
        ("empty.png", "cannot identify"), ("folder.png", "no file, but a folder"),
        ("to-itself.png", "Too many levels of symbolic links"),
        ("sparse.png", "has 53,687 MB; a picture has at most"), ("postscript.png", "PostScript"),
        ("bomb-in-text.png", "Decompressed data too large"), ("cut.jpg", "truncated"),
    ):  # fmt: skip
        assert words in said[name]


def test_a_file_that_may_not_be_read_is_a_broken_image_with_its_reason(tmp_path, monkeypatch):
    column = ImageColumn(run_rows_of_one_picture(tmp_path), "image", 3)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(ValueError, match=r"Permission denied: '.*0\.png'"):
        column.decode({"image": {"bytes": None, "path": str(tmp_path / "one" / "0.png")}})


def run_rows_of_one_picture(folder):
    (folder / "one").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "one" / "0.png")
    return run_rows(folder / "one")


def test_a_picture_of_an_absurd_shape_is_read_like_any_other():
    for size in ((100_000, 1), (1, 100_000)):
        decoded = decode_image(Image.new("RGB", size, (1, 2, 3)), 3)
        crop = random_resized_crop(decoded, (32, 32), 0.3, np.random.default_rng(0).random(CROP_NUMBERS))
        assert crop.shape == (3, 32, 32)
        assert crop[:, 5, 7].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="no pixels: 0x5"):
        decode_image(Image.new("RGB", (0, 5)), 3)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_transparency_of_a_large_picture_is_composited_in_parts_with_the_same_bits(mode, monkeypatch):
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    if mode == "P":
        picture = picture.convert("P")
        picture.info["transparency"] = 7
    else:
        if mode != "RGBA":
            picture = picture.convert({"RGBa": "RGB", "PA": "P"}.get(mode, "L"))
        picture.putalpha(Image.fromarray(generator.integers(0, 256, (40, 56), dtype=np.uint8)))
        picture = picture.convert(mode)
    assert picture.has_transparency_data
    at_once = [decode_image(picture, channels).tobytes() for channels in (1, 3)]
    for pixels in (56, 56 * 7, 56 * 39, 1):
        monkeypatch.setattr(decoding, "_PIXELS_COMPOSITED_AT_ONCE", pixels)
        assert [decode_image(picture, channels).tobytes() for channels in (1, 3)] == at_once


def test_a_folder_with_names_that_are_no_files_and_links_that_lead_back_is_opened(tmp_path):
    folder = tmp_path / "all"
    (folder / "below").mkdir(parents=True)
    for name in ("0.png", "below/1.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "to-itself.png").symlink_to("to-itself.png")
    for name in ("up", "again", "below/up"):
        (folder / name).symlink_to(folder, target_is_directory=True)
    rows = run_rows(folder)
    assert sorted(Path(row["path"]).name for row in ImageRows(rows, "image", 3).rows["image"]) == ["0.png", "1.png"]


# -- some of many are broken -----------------------------------------------------------------------------------------

SIX = {
    "keep_images_in_memory": "no", "per_device_train_batch_size": 30, "max_train_steps": 14, "max_train_samples": None,
    "warmup_epochs": 0, "checkpointing_steps": 3, "checkpoints_total_limit": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def broken_here_and_there(tmp_path_factory):
    """300 small pictures, of which six are broken, each in another way."""
    folder = tmp_path_factory.mktemp("some")
    generator = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    ways = ("empty.png", "cut.jpg", "cut.png", "text.png", "claims-40000.png", "bomb-in-text.png")
    broken = {f"{number:03d}.png": BROKEN_BYTES[way] for number, way in zip(range(20, 300, 47), ways, strict=True)}
    for name, content in broken.items():
        (folder / name).write_bytes(content())
    return folder, sorted(broken)


@pytest.fixture(scope="module")
def broken_run(broken_here_and_there, tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "run", dataset_name=broken_here_and_there[0], **SIX)


def test_of_two_percent_broken_each_is_listed_once_and_counted(broken_run, broken_here_and_there):
    assert_trained(broken_run)
    found = unreadable(broken_run)
    assert sorted(Path(row["reason"].split("'")[1]).name for row in found) == broken_here_and_there[1]
    assert json.loads((broken_run / "report.json").read_text())["num_unreadable_images"] == 6


def test_all_that_a_run_has_met_is_listed_when_a_signal_stops_it_between_two_lines_of_its_log(
    broken_run, broken_here_and_there, tmp_path, monkeypatch
):
    signal_in_step(monkeypatch, 5, signal.SIGTERM)
    flags = {**SIX, "dataset_name": broken_here_and_there[0], "logging_steps": 14, "checkpointing_steps": 50}
    with pytest.raises(StoppedBySignal, match="at step 5 of 14"):
        tiny_run(tmp_path / "run", **flags)
    monkeypatch.undo()
    run = tiny_run(tmp_path / "run", **flags, resume_from_checkpoint="latest")
    assert {row["image"] for row in unreadable(run)} == {row["image"] for row in unreadable(broken_run)}


@pytest.mark.parametrize(("step", "workers"), [(3, 2), (9, 0)])
def test_broken_images_cost_no_bit_of_a_run_that_goes_on_in_mid_epoch_with_other_workers(
    broken_run, broken_here_and_there, tmp_path, step, workers
):
    resumed = tiny_run(
        tmp_path / "run", dataset_name=broken_here_and_there[0], **SIX,
        resume_from_checkpoint=broken_run / f"checkpoint-{step}", dataloader_num_workers=workers,
    )  # fmt: skip
    whole = final_weights(broken_run)
    assert all(torch.equal(value, whole[name]) for name, value in final_weights(resumed).items())
    names = [sorted((row["image"], row["reason"]) for row in unreadable(run)) for run in (resumed, broken_run)]
    assert names[0] == names[1]


def test_too_many_broken_images_stop_the_run_with_a_list_and_a_checkpoint_that_goes_on(zoo_run, zoo, tmp_path, capsys):
    flags = tiny_flags(tmp_path / "run", dataset_name=zoo, **{**LONG, "max_broken_share": 0.1})
    assert main.main(["pretrain", *flags]) == 2
    error = capsys.readouterr().err
    assert "max_broken_share=0.1" in error
    assert all(name in error for name in BROKEN)
    checkpoint = find_latest(tmp_path / "run")
    assert checkpoint is not None
    assert 2 <= checkpoint.step < 10
    run = tiny_run(tmp_path / "run", dataset_name=zoo, **LONG, resume_from_checkpoint="latest")
    whole = final_weights(zoo_run)
    assert all(torch.equal(value, whole[name]) for name, value in final_weights(run).items())


def test_a_set_of_which_nothing_can_be_read_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "broken").mkdir()
    for number in range(16):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="images one after the other cannot be read"):
        tiny_run(tmp_path / "run", dataset_name=tmp_path / "broken", **FEW)
    assert not (tmp_path / "run").exists()


def test_a_broken_image_among_the_scored_ones_costs_its_own_score_only(tmp_path, capsys):
    for split in ("train", "test"):
        for label in ("dark", "light"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(8):
                value = number + (200 if label == "light" else 0)
                Image.new("RGB", (32, 32), (value, value, value)).save(
                    tmp_path / "data" / split / label / f"{number}.png"
                )
    (tmp_path / "data" / "test" / "dark" / "3.png").write_bytes(b"no picture")
    run = tiny_run(tmp_path / "run", dataset_name=tmp_path / "data", eval_split_name="test", eval_steps=2, **FEW)
    scores = json.loads((run / "report.json").read_text())["scores"]
    assert scores[-1]["knn"] == 1.0  # raw pixels tell dark from light
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
