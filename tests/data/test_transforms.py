"""Decoding, cropping and normalising: pixel values against Pillow, transformers and closed forms."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from scipy import stats
from transformers import ViTImageProcessorPil

from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.transforms import CROP_NUMBERS, crop_box, normalize, random_resized_crop, resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height: int = 40, width: int = 50, seed: int = 0) -> Image.Image:
    """A smooth colour picture with noise on it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 5), np.cos(columns / 7), np.sin((rows + columns) / 9)], axis=-1)
    noisy = 127 + 90 * waves + generator.normal(0, 15, waves.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image) -> np.ndarray:
    assert isinstance(image, Image.Image)
    return np.asarray(image)


# ---- decoding pictures


def test_bytes_and_dicts_and_pictures_give_the_same_pixels(tmp_path):
    data = encode(photo(), "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    values = [data, bytearray(data), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, photo()]
    for value in values:
        decoded = decode_image(value, 3)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(pixels(decoded), pixels(photo()))


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, undo):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    decoded = decode_image(encode(photo(), "PNG", exif=exif), 3)
    np.testing.assert_array_equal(pixels(decoded), undo(pixels(photo())))


def test_grayscale_is_repeated_over_three_channels():
    gray = photo().convert("L")
    np.testing.assert_array_equal(pixels(decode_image(encode(gray, "PNG"), 3)), np.stack([pixels(gray)] * 3, axis=-1))
    np.testing.assert_array_equal(pixels(decode_image(encode(gray, "PNG"), 1)), pixels(gray))


def test_colour_becomes_luma_for_one_channel():
    expected = pixels(photo()) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(decode_image(photo(), 1)) - expected).max() <= 0.51  # rounded to whole numbers


def test_palette_cmyk_lab_and_bilevel_pictures_are_converted():
    palette = photo().quantize(16)
    np.testing.assert_array_equal(
        pixels(decode_image(encode(palette, "PNG"), 3)),
        np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)],
    )
    cyan, black = Image.new("CMYK", (4, 3), (255, 0, 0, 0)), Image.new("CMYK", (4, 3), (0, 0, 0, 255))
    assert (pixels(decode_image(cyan, 3)) == (0, 255, 255)).all()
    assert (pixels(decode_image(black, 3)) == 0).all()
    assert (pixels(decode_image(black, 1)) == 0).all()
    lab = Image.new("LAB", (4, 3), (255, 128, 128))
    assert (pixels(decode_image(lab, 1)) >= 254).all()
    bilevel = np.eye(4, dtype=bool)
    np.testing.assert_array_equal(pixels(decode_image(Image.fromarray(bilevel), 1)), 255 * bilevel)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_is_composited_onto_white(mode: str):
    alpha = np.tile(np.array([0, 64, 255], dtype=np.uint8), (2, 1))
    gray = np.full((2, 3), 100, dtype=np.uint8)
    image = Image.fromarray(gray).convert("P" if mode == "PA" else "RGB" if mode.startswith("RGB") else "L")
    image.putalpha(Image.fromarray(alpha))
    image = image.convert(mode)
    assert image.mode == mode
    expected = 255 + alpha / 255 * (100.0 - 255)
    for num_channels in (1, 3):
        decoded = pixels(decode_image(image, num_channels)).reshape(2, 3, -1)
        assert np.abs(decoded - expected[:, :, None]).max() <= 2  # premultiplied modes round twice


def test_transparent_palette_entry_and_transparent_colour_become_white():
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode=None).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for data in (encode(palette, "PNG", transparency=0), encode(palette, "PNG", transparency=b"\x00\xff")):
        assert pixels(decode_image(data, 3)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    decoded = decode_image(encode(keyed, "PNG", transparency=(1, 2, 3)), 3)
    assert pixels(decoded).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grayscale_keeps_its_precision(kind: str):
    values = np.arange(0, 65536, 37, dtype=np.uint16)[:1768].reshape(34, 52)
    data = encode(Image.fromarray(values), kind)
    decoded = decode_image(data, 1)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(np.rint(decoded[0].astype(np.float64) * 65535), values)
    np.testing.assert_array_equal(decode_image(data, 3), np.repeat(decoded, 3, axis=0))
    np.testing.assert_array_equal(decode_image(Image.fromarray(values.astype(np.int32)), 1), decoded)


def test_float_pictures_are_taken_as_they_are():
    values = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(decode_image(Image.fromarray(values), 1), values[None])


def test_only_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(decode_image(data, 1)) == 10).all()


def test_the_callers_picture_is_left_alone():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encode(photo(), "PNG", exif=exif)))
    decode_image(image, 1)
    assert image.mode == "RGB"
    assert image.size == (50, 40)


# ---- decoding arrays


def test_eight_bit_arrays_equal_the_picture_with_the_same_pixels():
    array = pixels(photo())
    for value in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())):
        np.testing.assert_array_equal(pixels(decode_image(value, 3)), array)
    gray = array[..., 0]
    for value in (gray, gray[None], gray[..., None]):
        np.testing.assert_array_equal(pixels(decode_image(value, 1)), gray)
        np.testing.assert_array_equal(pixels(decode_image(value, 3)), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 255), ("uint16", 65535), (">u2", 65535), ("float64", 1)])
@pytest.mark.parametrize("num_channels", [2, 5])
def test_other_arrays_become_float_with_channels_first(dtype: str, scale: int, num_channels: int):
    whole = np.random.default_rng(0).integers(0, 256, (num_channels, 6, 7))
    array = (whole / 256 if scale == 1 else whole).astype(dtype)
    for value in (array, np.moveaxis(array, 0, -1)):
        decoded = decode_image(value, num_channels)
        assert decoded.dtype == np.float32
        assert decoded.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(decoded, array.astype(np.float64) / scale, rtol=1e-7)


def test_float_grayscale_is_repeated_over_three_channels():
    gray = np.random.default_rng(0).random((5, 6), dtype=np.float32)
    np.testing.assert_array_equal(decode_image(gray, 3), np.stack([gray] * 3))
    np.testing.assert_array_equal(decode_image(gray[..., None], 3), np.stack([gray] * 3))


def test_channel_axis_settles_what_the_shape_cannot():
    cube = np.random.default_rng(0).random((4, 6, 4), dtype=np.float32)
    np.testing.assert_array_equal(decode_image(cube, 4, channel_axis=0), cube)
    np.testing.assert_array_equal(decode_image(cube, 4, channel_axis=-1), np.moveaxis(cube, -1, 0))


# ---- bad input


@pytest.mark.parametrize(
    ("value", "num_channels", "message"),
    [
        (b"", 3, "image of 0 bytes cannot be decoded: UnidentifiedImageError"),
        (b"not an image", 3, "image of 12 bytes cannot be decoded: UnidentifiedImageError"),
        (encode(photo(), "JPEG")[:400], 3, "cannot be decoded: OSError: .*[Tt]runcated"),
        (encode(photo(), "PNG", exif=b"Exif\0\0nonsense"), 3, "cannot be decoded: SyntaxError: not a TIFF file"),
        (
            encode(Image.fromarray(np.eye(99, dtype=np.uint16)), "TIFF")[:900],
            1,
            "cannot be decoded: OSError: .*runcated",
        ),
        ({"bytes": b"junk", "path": "cats/7.jpg"}, 3, "image 'cats/7.jpg' cannot be decoded"),
        ({"bytes": None, "path": None}, 3, "must have 'bytes' or 'path'"),
        (photo(), 4, r"num_channels=4, but a picture can give 1 or 3 channels \(this one, mode 'RGB', has 3\)"),
        (photo(), 0, "num_channels=0 must be 1 or more"),
        (np.zeros((8, 9, 4), np.uint8), 3, r"num_channels=3, but neither .* \(8, 9, 4\) .*set num_channels=4"),
        (np.zeros((3, 8, 9), np.float32), 1, r"num_channels=1, .* \(3, 8, 9\) .*set num_channels=3"),
        (np.zeros((8, 9), np.uint8), 4, "num_channels=4, but the image array has 1"),
        (np.zeros((3, 8, 3), np.uint8), 3, "both its first and its last axis have 3 entries. Write channel_axis=0"),
        (np.zeros((2, 3, 8, 9), np.uint8), 3, r"\(2, 3, 8, 9\) must be \[H, W\]"),
        (np.zeros((0, 9, 3), np.uint8), 3, "has no pixels"),
        (np.zeros((8, 9, 3), np.int64), 3, "dtype int64 has no stated range: convert it to uint8"),
        (np.zeros((8, 9, 3), bool), 3, "dtype bool has no stated range"),
        (np.full((8, 9, 2), np.nan), 2, "144 of 144 values of the image are NaN or infinite"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), 1, "integers from 70000 to 70000"),
        (Image.fromarray(np.full((2, 2), np.inf, np.float32)), 1, "4 of 4 values"),
        ([[1, 2], [3, 4]], 1, "cannot read an image from a list"),
        ("photo.png", 3, "cannot read an image from a str"),
    ],
)
def test_unusable_images_are_named(value, num_channels: int, message: str):
    with pytest.raises(ValueError, match=message):
        decode_image(value, num_channels)


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 3)


def test_the_cause_of_a_broken_image_is_chained():
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        decode_image(b"junk", 3)
    assert isinstance(caught.value.__cause__, Image.UnidentifiedImageError)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(ValueError, match="DecompressionBombError: Image size"):
        decode_image(encode(photo(), "PNG"), 3)


@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "PPM", "GIF", "BMP"]))
def test_damaged_bytes_decode_or_raise_a_value_error_and_nothing_else(data, kind: str):
    encoded = bytearray(encode(photo(8, 9), kind))
    for place in data.draw(st.lists(st.integers(0, len(encoded) - 1), max_size=8)):
        encoded[place] = data.draw(st.integers(0, 255))
    encoded = encoded[: data.draw(st.integers(0, len(encoded)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it could mend
        try:
            decoded = decode_image(bytes(encoded), 3)
        except ValueError as error:
            assert "cannot be decoded" in str(error)  # noqa: PT017 (both outcomes are right)
        else:
            assert decoded.mode == "RGB"


# ---- resize and crop


@pytest.mark.parametrize("size", [(16, 16), (32, 24), (40, 50), (96, 120)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resize_equals_the_stock_image_processor(size: tuple[int, int], mode: str):
    image = photo(40, 50).convert(mode)
    channels = len(image.getbands())
    processor = ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]}, image_mean=MEAN[:channels], image_std=STD[:channels]
    )
    array = np.asarray(image).reshape(40, 50, channels)
    stock = processor(array, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    ours = normalize(resize(image, size), MEAN[:channels], STD[:channels])
    assert ours.shape == stock.shape == (channels, *size)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)


def test_resize_of_a_picture_is_pillows_bytes():
    resized = resize(photo(), (17, 23))
    assert resized.dtype == torch.uint8
    assert resized.is_contiguous()
    expected = np.asarray(photo().resize((23, 17), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(resized.numpy(), expected)


@pytest.mark.parametrize("size", [(9, 11), (40, 50), (61, 83)])
def test_resize_of_floats_equals_pillow_channel_by_channel(size: tuple[int, int]):
    array = np.random.default_rng(0).random((5, 40, 50), dtype=np.float32)
    resized = resize(array, size)
    assert resized.dtype == torch.float32
    for channel, values in zip(resized.numpy(), array, strict=True):
        expected = Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(channel, np.asarray(expected), rtol=0, atol=1e-5)


def drawn(seed: int) -> list[float]:
    return np.random.default_rng(seed).random(CROP_NUMBERS).tolist()


@pytest.mark.parametrize("kind", ["picture", "array"])
def test_random_crop_is_the_drawn_box_cut_out_and_then_resized(kind: str):
    image = photo(60, 80) if kind == "picture" else np.random.default_rng(0).random((2, 60, 80), dtype=np.float32)
    for seed in range(20):
        top, left, height, width = crop_box(60, 80, (24, 32), 0.3, drawn(seed))
        crop = random_resized_crop(image, (24, 32), 0.3, drawn(seed))
        if isinstance(image, Image.Image):
            part = Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
            expected = np.asarray(part.resize((32, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            # torch's weights have 15 bits, Pillow's 22
            off = np.abs(crop.numpy().astype(int) - expected)
            assert crop.dtype == torch.uint8
            assert off.max() <= 1
            assert (off > 0).mean() < 0.1
        else:
            part = image[:, top : top + height, left : left + width]
            expected = [
                np.asarray(Image.fromarray(p.copy()).resize((32, 24), Image.Resampling.BILINEAR)) for p in part
            ]
            np.testing.assert_allclose(crop.numpy(), np.stack(expected), atol=2e-6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(24, 32), (50, 70), (90, 40)])
def test_crops_of_pictures_are_within_two_levels_of_pillows(mode: str, size: tuple[int, int]):
    generator, share = np.random.default_rng(0), []
    for number in range(30):  # noise, which is worst
        pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        top, left, height, width = crop_box(60, 80, size, 0.1, drawn(number))
        crop = random_resized_crop(image, size, 0.1, drawn(number))
        off = (crop.int() - resize(image.crop((left, top, left + width, top + height)), size).int()).abs()
        assert crop.is_contiguous()
        assert off.max() <= 2
        share.append(float((off > 0).float().mean()))
    assert np.mean(share) < 0.15


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_are_the_same_where_pillow_cannot_lend_its_memory(mode: str, monkeypatch):
    image = photo(60, 80).convert(mode)
    lent = [random_resized_crop(image, (24, 32), 0.3, drawn(seed)) for seed in range(5)]

    def refuse(picture: Image.Image) -> None:
        raise ValueError("in several pieces")

    monkeypatch.setattr("ijepa_hf.data.transforms.pa.array", refuse)
    for seed, crop in enumerate(lent):
        assert torch.equal(random_resized_crop(image, (24, 32), 0.3, drawn(seed)), crop)


def test_a_picture_too_large_for_one_piece_of_memory_is_cropped_all_the_same():
    image = photo(40, 50).resize((2500, 1800))  # 18 MB at four bytes a pixel
    crop = random_resized_crop(image, (24, 32), 0.3, drawn(0))
    top, left, height, width = crop_box(1800, 2500, (24, 32), 0.3, drawn(0))
    expected = resize(image.crop((left, top, left + width, top + height)), (24, 32))
    assert (crop.int() - expected.int()).abs().max() <= 1


def test_crops_of_one_pixel_are_pillows():
    # torch without vector instructions gives other numbers there
    for size in ((1, 16), (16, 1), (1, 1)):
        top, left, height, width = crop_box(40, 50, size, 0.3, drawn(1))
        expected = resize(photo().crop((left, top, left + width, top + height)), size)
        assert torch.equal(random_resized_crop(photo(), size, 0.3, drawn(1)), expected)


def test_a_picture_that_has_the_wanted_mode_is_not_copied():
    image = photo()
    assert decode_image(image, 3) is image


def test_a_crop_scale_of_one_is_the_whole_image_and_needs_no_numbers():
    torch.testing.assert_close(
        random_resized_crop(photo(), (16, 16), 1.0, []), resize(photo(), (16, 16)), rtol=0, atol=0
    )


def test_crops_depend_on_the_numbers_alone():
    first = random_resized_crop(photo(), (16, 16), 0.3, drawn(2))
    again = random_resized_crop(photo(), (16, 16), 0.3, drawn(2))
    other = random_resized_crop(photo(), (16, 16), 0.3, drawn(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def boxes(height: int, width: int, size: tuple[int, int], scale: float, count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.array([crop_box(height, width, size, scale, generator.random(CROP_NUMBERS)) for _ in range(count)])


@pytest.mark.parametrize(("side", "size"), [((10**6, 10**6), (224, 224)), ((10**6, 2 * 10**6), (16, 32))])
def test_crop_scale_aspect_and_place_follow_their_closed_forms(side: tuple[int, int], size: tuple[int, int]):
    """Four Kolmogorov-Smirnov tests on 4,000 boxes: each errs once in 1,000 seeds (the seed is fixed).

    On an image with the aspect of the output a box fits when |l| <= -ln(s), with s its share of the area and l the
    logarithm of its relative aspect. So l given acceptance has a density in proportion to exp(-|l|) - 0.3, and s one
    in proportion to min(L, -ln(s)), with L = ln(4/3). (A million pixels a side make rounding invisible.)
    """
    top, left, height, width = boxes(*side, size, 0.3, 4000).T
    limit = math.log(4 / 3)

    def scale_cdf(s: np.ndarray) -> np.ndarray:
        def integral(s: np.ndarray) -> np.ndarray:
            upper = np.maximum(s, 0.75)
            return limit * (np.minimum(s, 0.75) - 0.3) + (upper - upper * np.log(upper)) - (0.75 + 0.75 * limit)

        return integral(np.clip(s, 0.3, 1)) / integral(np.array(1.0))

    def aspect_cdf(value: np.ndarray) -> np.ndarray:
        def half(v: np.ndarray) -> np.ndarray:
            return 1 - np.exp(-v) - 0.3 * v

        value = np.clip(value, -limit, limit)
        return 0.5 + 0.5 * np.sign(value) * half(np.abs(value)) / half(np.array(limit))

    scale = height * width / (side[0] * side[1])
    aspect = np.log(width / height * size[0] / size[1])
    assert scale.min() >= 0.3 - 1e-5
    assert scale.max() > 0.97
    assert np.abs(aspect).max() <= limit + 1e-5
    assert stats.kstest(scale, scale_cdf).pvalue > 1e-3
    assert stats.kstest(aspect, aspect_cdf).pvalue > 1e-3
    assert stats.kstest(top / (side[0] - height), "uniform").pvalue > 1e-3
    assert stats.kstest(left / (side[1] - width), "uniform").pvalue > 1e-3


def test_the_last_row_and_column_can_be_reached():
    top, left, height, width = boxes(6, 6, (4, 4), 0.3, 500).T
    for start, side in ((top, height), (left, width)):
        for length in (3, 4, 5):
            assert set(start[side == length]) == set(range(7 - length))


@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [
        ((1000, 10), (8, 8), (493, 0, 13, 10)),  # 13 = 10 / (3/4), centred
        ((10, 1000), (8, 8), (0, 493, 10, 13)),
        ((10, 1000), (8, 16), (0, 486, 10, 27)),  # 27 = 10 x 2 x 4/3
    ],
)
def test_an_image_too_narrow_for_any_crop_gives_its_largest_centred_one(shape, size, box):
    assert crop_box(*shape, size, 0.9, drawn(0)) == box


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    scale=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_every_box_lies_inside_the_image(height, width, size, scale, seed):
    top, left, box_height, box_width = crop_box(height, width, size, scale, drawn(seed))
    assert box_height >= 1
    assert box_width >= 1
    assert 0 <= top <= height - box_height
    assert 0 <= left <= width - box_width


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.01, math.nan])
def test_a_crop_scale_outside_its_range_is_refused(scale: float):
    with pytest.raises(ValueError, match=r"min_crop_scale=.* must be in \(0, 1\]"):
        random_resized_crop(photo(), (8, 8), scale, drawn(0))


@pytest.mark.parametrize("size", [(0, 8), (8, 8.5), (8, 8, 8)])
def test_an_impossible_size_is_refused(size):
    for action in (resize, lambda image, size: random_resized_crop(image, size, 0.5, drawn(0))):
        with pytest.raises(ValueError, match="two integers of at least 1"):
            action(photo(), size)


@pytest.mark.parametrize("image", [photo().convert("RGBA"), np.zeros((3, 8, 8)), np.zeros((3, 8, 8), np.uint8), "x"])
def test_images_that_were_not_decoded_are_refused(image):
    with pytest.raises(ValueError, match="pass it through decode_image first"):
        resize(image, (8, 8))


# ---- normalize


def test_normalize_is_the_closed_form_for_bytes_and_floats_one_image_and_a_batch():
    whole = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    expected = (whole.numpy() / 255.0 - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    floats = whole.double() / 255
    before = floats.clone()
    for value in (whole, floats, floats.float()):
        result = normalize(value, MEAN, STD)
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            normalize(value[1], list(MEAN), list(STD)).numpy(), expected[1], rtol=1e-5, atol=1e-6
        )
    assert torch.equal(floats, before)
    whitened = normalize(torch.full((2, 1, 3, 3), 0.5, dtype=torch.bfloat16), [0.25], [0.5])
    assert torch.equal(whitened, torch.full((2, 1, 3, 3), 0.5))


@pytest.mark.parametrize("batch", [1, 7])
def test_normalize_is_within_a_millionth_of_three_steps_for_every_byte_however_images_are_grouped(batch, monkeypatch):
    monkeypatch.setattr("ijepa_hf.data.transforms._NORMALIZED_AT_ONCE", 2 * 3 * 256)  # two images at once
    every = torch.arange(256, dtype=torch.uint8).expand(batch, 3, 4, 256)[:, :, :1]
    for mean, std in ((MEAN, STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))):
        mean_values, std_values = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        stepwise = (every.float() / 255 - mean_values) / std_values
        torch.testing.assert_close(normalize(every, mean, std), stepwise, rtol=0, atol=1e-6)


def test_normalize_lets_gradients_through():
    pixels = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    normalize(pixels, [0.25], [0.5]).sum().backward()
    assert torch.equal(pixels.grad, torch.full((1, 1, 2, 2), 2.0))


@pytest.mark.parametrize(
    ("pixel_values", "mean", "std", "message"),
    [
        (torch.zeros(3, 8, 8), [0.5], [0.5], r"mean has 1 values, but .* \(3, 8, 8\) have 3 channels"),
        (torch.zeros(2, 1, 8, 8), [0.5], [0.5] * 3, "std has 3 values, but .* have 1 channels"),
        (torch.zeros(8, 8), [0.5], [0.5], r"must be \[C, H, W\] or \[B, C, H, W\]"),
        (torch.zeros(1, 8, 8), [0.5], [0.0], "must be above 0 in every channel"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), [0.5], [0.5], "dtype torch.int64 must be uint8"),
    ],
)
def test_normalize_refuses_what_does_not_fit(pixel_values, mean, std, message: str):
    with pytest.raises(ValueError, match=message):
        normalize(pixel_values, mean, std)
