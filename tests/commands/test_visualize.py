"""The command `visualize`: the right images reach the right picture, and mistakes are found before the work."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from html_pages import Page, write_run
from PIL import Image
from tiny import scrambled_model
from transformers import Dinov2Config, Dinov2Model

from ijepa_hf.commands import main, visualize
from ijepa_hf.data.sources.builtin import load_digits
from ijepa_hf.randomness import DRAW_GALLERY, keyed_generator
from ijepa_hf.runs.export import export_model

pytestmark = pytest.mark.figures
MEAN, STD = [0.3, 0.3, 0.3], [0.4, 0.4, 0.4]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    export_model(scrambled_model(), folder, step=1, image_mean=MEAN, image_std=STD)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, model) -> Path:
    """The same without what is needed for predictions."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((model / "preprocessor_config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of 12 pictures of two classes; the last two are copies of one."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(12):
        kind = folder / ("cat" if number % 2 else "dog")
        kind.mkdir(exist_ok=True)
        if number < 11:
            pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(kind / f"{number:02}.png")
    return folder


@pytest.fixture
def drawn(monkeypatch) -> dict[str, tuple]:
    """What the drawing functions are given, instead of pictures (which have tests of their own)."""
    seen: dict[str, tuple] = {}
    for name in dir(visualize):
        if name.startswith("draw_") and name.endswith("_figure"):
            monkeypatch.setattr(visualize, name, lambda *given, name=name: seen.update({name: given}))
    return seen


def run(*argv: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert visualize.run([str(word) for word in argv]) == 0
    return printed.getvalue()[:-1]


def test_every_figure_is_drawn_of_a_run(model, tmp_path):
    for figure in visualize.FIGURES:
        path = tmp_path / f"{figure}.png"
        count = [] if figure == "spectrum" else ["--num_images", 2]
        gallery = ["--gallery_size", 6] if figure in ("expectation", "retrieval", "spectrum") else []
        said = run(model, "--figure", figure, "--dataset_name", "digits", *count, *gallery, "--output", path)
        assert said.splitlines()[-1] == f"figure: {path}"
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_other_vision_models_have_pictures_of_features(dinov2, photos, drawn):
    run(dinov2, "--figure", "pca", "--dataset_name", photos, "--split_name", "train")
    shown, colors, path = drawn["draw_pca_figure"]
    assert shown.shape == (6, 32, 32, 3)
    assert colors.colors.shape == (6, 4, 4, 3)
    assert path == Path("pca.png")
    run(dinov2, "--figure", "cosine", "--dataset_name", photos, "--split_name", "train", "--num_images", 2)
    _, features, places, _ = drawn["draw_cosine_figure"]
    assert features.shape == (2, 4, 4, 16)
    assert [len(set(own)) for own in places] == [3, 3]


def test_the_images_are_those_of_the_seed_and_are_named(model, drawn):
    flags = [model, "--figure", "pca", "--dataset_name", "digits", "--num_images", 4]
    first, again, other = run(*flags), run(*flags), run(*flags, "--seed", 1)
    assert first == again != other
    numbers = [int(word) for word in first.splitlines()[0].partition(": ")[2].split(", ")]
    assert len(set(numbers)) == 4
    run(*flags)
    shown = drawn["draw_pca_figure"][0]
    for number, picture in zip(numbers, shown, strict=True):
        expected = np.asarray(load_digits("test")[number]["image"])
        np.testing.assert_array_equal(np.round(255 * picture[..., 0]), expected)


def test_a_box_is_predicted_from_all_the_rest(model, drawn):
    said = run(
        model, "--figure", "error", "--dataset_name", "digits", "--image", 7, "--box", "9,5,10,12", "--output", "e.png"
    )
    assert "box 9,5,10,12 touches 12 of 64 patches: predicted is the part 8,4,12,16" in said
    shown, context, targets, errors, patch, path = drawn["draw_errors_figure"]
    assert targets.tolist() == [[[8 * row + column for row in range(1, 5) for column in range(2, 5)]]]
    assert sorted(context[0].tolist() + targets[0, 0].tolist()) == list(range(64))
    assert errors.shape == (1, 1, 12)
    assert (patch, path) == ((4, 4), Path("e.png"))
    assert f"loss {float(errors.mean()):.4f}" in said
    np.testing.assert_array_equal(np.round(255 * shown[0, ..., 0]), np.asarray(load_digits("test")[7]["image"]))


def test_a_file_needs_no_data_set_and_its_box_is_in_its_own_pixels(model, photos, drawn):
    run(model, "--figure", "error", "--image", photos / "dog" / "00.png", "--box", "30,20,30,20")
    _, context, targets, *_ = drawn["draw_errors_figure"]
    assert targets.tolist() == [[[8 * row + column for row in range(4, 8) for column in range(4, 8)]]]
    assert context.shape == (1, 48)


def test_expected_patches_come_from_other_images_and_not_from_copies(model, photos, drawn):
    flags = ["--figure", "expectation", "--dataset_name", photos, "--split_name", "train", "--seed", 2]
    # in the order of the folders cat comes first; 09.png and 11.png, the copies, are a cat and its twin 10.png a dog
    said = run(model, *flags, "--image", photos / "dog" / "10.png", "--box", "0,0,30,20")
    assert "of each of 10 images" in said
    shown, _, targets, found, tiles, _, _ = drawn["draw_expectation_figure"]
    assert found.expected.similarity.max() < 0.9999
    assert found.nearest_to_truth.similarity.max() < 0.9999
    assert [part.shape for part in tiles] == [(1, 1, 16, 4, 4, 3)] * 2
    assert shown.shape == (1, 32, 32, 3)
    assert targets.shape == (1, 1, 16)
    assert f"to the truth {float(found.truth_similarity.mean()):.3f}" in said


def test_tiles_are_the_pixels_of_the_patches_found(model, photos, drawn):
    run(model, "--figure", "expectation", "--dataset_name", photos, "--split_name", "train", "--image", 0)
    found, tiles = drawn["draw_expectation_figure"][3:5]
    resized = [
        np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR))
        for path in sorted(photos.rglob("*.png"))
    ]
    patches = {
        picture[row : row + 4, column : column + 4].tobytes()
        for picture in resized[1:]
        for row in range(0, 32, 4)
        for column in range(0, 32, 4)
    }
    for part in tiles:
        for tile in part.reshape(-1, 4, 4, 3):
            assert np.round(255 * tile).astype(np.uint8).tobytes() in patches
    assert found.expected.images.max() < 11


def test_neighbours_have_the_names_of_their_labels(model, photos, drawn):
    flags = ["--dataset_name", photos, "--split_name", "train", "--k", 3]
    said = run(model, "--figure", "retrieval", *flags, "--num_images", 2)
    queries, names, neighbours, their_names, cosines, _ = drawn["draw_retrieval_figure"]
    assert "neighbours among 10 images" in said or "neighbours among 9 images" in said
    assert queries.shape[0] == len(names) == 2
    assert neighbours.shape == (2, 3, 32, 32, 3)
    assert {*names, *their_names[0], *their_names[1]} <= {"cat", "dog"}
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_the_spectrum_is_of_the_whole_gallery(model, drawn):
    run(model, "--figure", "spectrum", "--dataset_name", "digits", "--gallery_size", 70)
    matrices, path = drawn["draw_spectrum_figure"]
    assert {name: tuple(matrix.shape) for name, matrix in matrices.items()} == {
        "70 images": (70, 32),
        "4480 patches": (70 * 64, 32),
    }
    assert path == Path("spectrum.png")
    pooled = matrices["4480 patches"].unflatten(0, (70, 64)).mean(dim=1)
    torch.testing.assert_close(pooled, matrices["70 images"])


def test_a_run_is_written_as_one_file(tmp_path):
    folder = write_run(tmp_path / "run")
    said = run("--html", folder, "--output", tmp_path / "r.html")
    assert said == f"report: {tmp_path / 'r.html'}"
    assert "trained encoder" in Page((tmp_path / "r.html").read_text()).text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "MODEL is not given: write `ijepa-hf visualize MODEL --figure"),
        ("MODEL", "--figure is not given"),
        ("MODEL --figure pca", "figure='pca' needs images: write --dataset_name"),
        ("MODEL --figure expectation --image PHOTO", "needs other images to look in"),
        ("MODEL --figure pca --dataset_nam digits", "did you mean '--dataset_name'"),
        ("MODEL --figure pca --dataset_name digits --output a.jpg", "must end in .png"),
        ("MODEL --figure pca --dataset_name digits --output nowhere/a.png", "no folder"),
        ("MODEL --figure pca --dataset_name digits --gallery_size 3", "gallery_size is for"),
        ("MODEL --figure pca --dataset_name digits --image 1 --box 1,1,2,2", "box is for"),
        ("MODEL --figure error --dataset_name digits --k 3", "k is for"),
        ("MODEL --figure spectrum --dataset_name digits --image 3", "give --gallery_size"),
        ("MODEL --figure pca --dataset_name digits --image 3 --num_images 2", "give one"),
        ("MODEL --figure pca --dataset_name digits --num_images 0", "num_images=0 must be 1"),
        ("MODEL --figure spectrum --dataset_name digits --gallery_size 1", "use --gallery_size 2 or more"),
        ("MODEL --figure pca --dataset_name digits --num_images 361", "has 360 images"),
        ("MODEL --figure pca --dataset_name digits --seed -1", "seed=-1 must be 0"),
        ("MODEL --figure pca --dataset_name digits --image 360", "numbered 0 to 359"),
        ("MODEL --figure pca --dataset_name digits --image -1", "no such file"),
        ("MODEL --figure pca --dataset_name digits --image a.png", "there is no such file"),
        ("MODEL --figure pca --dataset_name digits --split_name nope", "has no split 'nope'"),
        ("MODEL --figure error --dataset_name digits --box 1,1,2,2", "say which with --image"),
        ("MODEL --figure error --dataset_name digits --image 1 --box 1,1,2", "four whole numbers"),
        ("MODEL --figure error --dataset_name digits --image 1 --box 1,1,2,x", "four whole"),
        (
            "MODEL --figure error --dataset_name digits --image 1 --box 30,0,4,4",
            "leaves the image",
        ),
        ("MODEL --figure error --dataset_name digits --image 1 --box 0,0,32,32", "touches all"),
        ("MODEL --figure error --dataset_name digits --image 1 --box 0,0,0,3", "is empty"),
        ("MODEL --figure retrieval --dataset_name digits --gallery_size 355", "has 354 images"),
        (
            "MODEL --figure retrieval --dataset_name digits --gallery_size 4 --k 5",
            "k=5, but the gallery has 4",
        ),
        ("./nowhere --figure pca --dataset_name digits", "there is no such folder"),
        ("ENCODER --figure error --dataset_name digits", "is an I-JEPA encoder without one"),
        ("DINOV2 --figure expectation --dataset_name digits", "a model of type 'dinov2' without one"),
        ("--html ./nowhere", "there is no run"),
        ("--html RUN --output a.png", "must end in .html"),
        ("--html RUN --figure pca", "'--figure' is no flag"),
    ],
)
def test_mistakes_are_one_line_before_any_weight_is_used(
    argv, message, model, encoder, dinov2, photos, tmp_path, capsys, monkeypatch
):
    def unused(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(visualize, "load_backbone", unused)
    monkeypatch.setattr(visualize, "start_model", unused)
    monkeypatch.chdir(tmp_path)
    stand_ins = {
        "MODEL": model, "ENCODER": encoder, "DINOV2": dinov2, "PHOTO": photos / "dog" / "00.png", "RUN": tmp_path,
    }  # fmt: skip
    assert main.main(["visualize", *(str(stand_ins.get(word, word)) for word in argv.split())]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("figure", ["pca", "cosine", "retrieval", "spectrum"])
def test_features_that_are_no_numbers_are_said_and_not_drawn(figure, dinov2, tmp_path):
    folder, picture = tmp_path / "damaged", tmp_path / "picture.png"
    broken = Dinov2Model.from_pretrained(dinov2)
    broken.layernorm.bias.data[3] = torch.nan
    broken.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((dinov2 / "preprocessor_config.json").read_bytes())
    with pytest.raises(ValueError, match="NaN or infinit"):
        run(folder, "--figure", figure, "--dataset_name", "digits", "--output", picture)
    assert not picture.exists()


def test_a_data_set_of_one_image_has_no_gallery(model, tmp_path, drawn):
    load_digits("test").select([0]).to_parquet(str(tmp_path / "one.parquet"))
    flags = ["--dataset_name", tmp_path / "one.parquet", "--split_name", "train"]
    with pytest.raises(ValueError, match="has 0 images beside those that are looked at"):
        run(model, "--figure", "retrieval", *flags)
    with pytest.raises(ValueError, match="needs 2 images, and the split 'train' has 1"):
        run(model, "--figure", "spectrum", *flags)
    rows = load_digits("test").select([0, 1, 1])
    rows.to_parquet(str(tmp_path / "copies.parquet"))
    flags = ["--dataset_name", tmp_path / "copies.parquet", "--split_name", "train", "--image", 1]
    run(model, "--figure", "retrieval", *flags)
    with pytest.raises(ValueError, match="look just like"):
        run(model, "--figure", "retrieval", *flags, "--gallery_size", 1, "--seed", _seed_that_takes_the_copy())


def _seed_that_takes_the_copy() -> int:
    for seed in range(100):
        order = keyed_generator(seed, DRAW_GALLERY).permutation(3).tolist()
        if next(index for index in order if index != 1) == 2:
            return seed
    raise AssertionError


def test_arrays_of_other_ranges_are_shown_on_one_scale(tmp_path, drawn):
    export_model(scrambled_model(num_channels=1), tmp_path / "gray", step=1, image_mean=[300.0], image_std=[100.0])
    arrays = np.random.default_rng(0).uniform(100, 500, (5, 32, 32)).astype(np.float32)
    np.save(tmp_path / "scans.npy", arrays)
    flags = ["--dataset_name", tmp_path / "scans.npy", "--split_name", "train", "--num_images", 2]
    run(tmp_path / "gray", "--figure", "retrieval", *flags)
    queries, _, neighbours, *_ = drawn["draw_retrieval_figure"]
    scaled = (arrays - arrays.min()) / (arrays.max() - arrays.min())
    for picture in [*queries, *neighbours.reshape(-1, 32, 32, 3)]:
        assert np.abs(scaled - picture[..., 0]).max(axis=(1, 2)).min() < 1e-5
