"""Pictures and arrays of every kind, whole and damaged: a crop of the right shape, or a `ValueError` with a reason."""

import io
import warnings
from typing import Any

import datasets
import numpy as np
import torch
from bad_input import bounded, examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ijepa_hf.data.decoding import decode_image
from ijepa_hf.data.order import SampleKey
from ijepa_hf.data.reading import CropReader, ImageColumn
from ijepa_hf.data.transforms import CROP_NUMBERS, random_resized_crop

SIZE = (12, 16)
MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "DDS", "SGI")
SHARES = st.floats(0, 1, exclude_max=True)
SIDES = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 31, 64, 90])
DTYPES = (
    "bool", "uint8", "int8", "uint16", ">u2", "int16", "uint32", "int32", "int64", "uint64", "float16", "float32",
    ">f4", "float64", "complex64", "object", "U1", "S1", "datetime64[s]",
)  # fmt: skip


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise in any mode."""
    generator = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(generator.normal(0, 3, (height, width)).astype(np.float32))
    if mode in ("I", "I;16"):
        deep = generator.integers(0, 65536, (height, width))
        return Image.fromarray(deep.astype(np.int32 if mode == "I" else np.uint16))
    image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8))
    through = {"La": ["LA", "La"], "PA": ["P", "PA"], "RGBa": ["RGBa"], "LAB": ["RGB", "LAB"], "HSV": ["RGB", "HSV"]}
    for step in through.get(mode, [mode]):
        image = image.convert(step)
    return image


@st.composite
def pictures(draw: Any) -> Image.Image:
    image = picture(draw(st.sampled_from(MODES)), draw(SIDES), draw(SIDES), draw(st.integers(0, 99)))
    if draw(st.integers(0, 4)) == 0:
        image.info["transparency"] = draw(st.sampled_from([0, 3, 255, 300, -1, (1, 2, 3), b"\x00\xff", b"", "x"]))
    if draw(st.integers(0, 4)) == 0:
        image.getexif()[ExifTags.Base.Orientation] = draw(st.sampled_from([1, 2, 6, 8, 0, 9, -1, "6", 2.5]))
    return image


def encoded(image: Image.Image, kind: str, orientation: int | None, frames: int) -> bytes:
    """The picture as a file, in the nearest mode that the kind of file can have."""
    options: dict[str, Any] = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    if frames > 1 and kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options |= {"save_all": True, "append_images": [image.copy() for _ in range(frames - 1)]}
    image.info.clear()
    for mode in (image.mode, "RGB", "L"):
        buffer = io.BytesIO()
        try:
            image.convert(mode).save(buffer, kind, **options)
            return buffer.getvalue()
        except (OSError, ValueError, KeyError, TypeError, SystemError):  # this kind of file does not have this mode
            options = {name: value for name, value in options.items() if name != "exif"}
    return b""


@st.composite
def files(draw: Any) -> bytes:
    """An encoded picture, whole, cut, with bytes changed, put in or left out; or no picture."""
    if draw(st.integers(0, 9)) == 9:
        beginning = draw(
            st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\x00", b"P6 9 9 255 "])
        )
        return beginning + draw(st.binary(max_size=200))
    image = picture(draw(st.sampled_from(MODES)), draw(SIDES), draw(SIDES), draw(st.integers(0, 99)))
    orientation = draw(st.sampled_from([None, None, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535]))
    content = bytearray(encoded(image, draw(st.sampled_from(FORMATS)), orientation, draw(st.sampled_from([1, 1, 3]))))
    damage = draw(st.sampled_from(["none", "cut", "flip", "flip", "flip early", "insert", "delete", "cut and flip"]))
    # places as shares of the length, which differs from one release of an encoder to the next
    if "cut" in damage:
        content = content[: int(draw(SHARES) * len(content))]
    if "flip" in damage and content:
        length = min(len(content), 120 if "early" in damage else len(content))
        for share in draw(st.lists(SHARES, min_size=1, max_size=6)):
            content[int(share * length)] = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 255, 127, 128])))
    place = int(draw(SHARES) * len(content))
    if damage == "insert":
        content[place:place] = draw(st.binary(min_size=1, max_size=9))
    if damage == "delete":
        del content[place : place + draw(st.integers(1, 9))]
    return bytes(content)


@st.composite
def arrays(draw: Any) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    sides = st.sampled_from([0, 1, 2, 3, 4, 5, 12, 13, 40])
    shape = tuple(draw(st.lists(sides, min_size=0, max_size=4)))
    if draw(st.booleans()):
        channels = draw(st.sampled_from([1, 3, 4, 5, 12]))
        height, width = draw(st.sampled_from([(8, 9), (1, 1), (20, 13), (7, 200)]))
        shape = draw(st.sampled_from([(channels, height, width), (height, width, channels), (height, width)]))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    values = generator.normal(100, 80, shape)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = np.abs(values).astype(np.int64).astype(dtype) if dtype.kind in "USM" else values.astype(dtype)
    if dtype.kind == "f" and array.size and draw(st.integers(0, 3)) == 0:
        odd = draw(st.sampled_from([np.nan, np.inf, -np.inf, np.finfo(dtype).max, np.finfo(dtype).tiny, -0.0]))
        array[np.unravel_index(0, array.shape)] = odd
    layout = draw(st.sampled_from(["as it is", "fortran", "reversed", "strided", "read only", "broadcast"]))
    if layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "reversed" and array.ndim:
        array = array[::-1]
    elif layout == "strided" and array.ndim > 1:
        array = np.repeat(array, 2, axis=1)[:, ::2]
    elif layout == "read only":
        array.setflags(write=False)
    elif layout == "broadcast" and array.ndim == 3 and array.shape[2] == 1:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    return array


OTHERS = st.sampled_from(
    [
        None, "photo.png", 3, 1.5, [], [[1, 2], [3, 4]], {}, {"bytes": None, "path": None},
        {"bytes": None, "path": "/nowhere"}, {"bytes": b"", "path": "x.png"}, {"bytes": None, "path": "/"},
        {"bytes": "text", "path": None}, {"bytes": 3}, {"path": 3}, {"path": "a\0b"}, {"path": ""},
        torch.zeros(3, 8, 9), torch.zeros(3, 8, 9, dtype=torch.bfloat16), torch.zeros(8, 9, 3).to_sparse(),
        memoryview(b"abc"), bytearray(b"abc"), object(), np.float32(3), Image, Image.new("RGB", (0, 5)),
        Image.new("L", (5, 0)),
    ]
)  # fmt: skip
CHANNELS = st.sampled_from([3, 3, 3, 3, 3, 1, 1, 2, 4, 5, 12, 0, -1])


def outcome_of_image(value: Any, channels: int, seed: int) -> str:
    with bounded(seconds=1, megabytes=150):
        try:
            image = decode_image(value, channels)
        except (ValueError, FileNotFoundError) as error:
            return refusal(error)
        if isinstance(image, Image.Image):
            assert image.mode == ("L" if channels == 1 else "RGB")
            assert min(image.size) >= 1
            kind = torch.uint8
        else:
            assert image.dtype == np.float32
            assert image.shape[0] == channels
            assert np.isfinite(image).all()
            kind = torch.float32
        crop = random_resized_crop(image, SIZE, 0.3, np.random.default_rng(seed).random(CROP_NUMBERS))
        assert crop.shape == (channels, *SIZE)
        assert crop.dtype == kind
        assert torch.isfinite(crop.float()).all()
    return "right"


def refusal(error: Exception) -> str:
    """A reason in words, not an echo of whatever failed inside."""
    message = str(error)
    assert len(message) > 20, message
    assert any(
        word in message
        for word in ("image", "picture", "num_channels", "cannot be decoded", "No such file", "is no file")
    )
    return type(error).__name__


def quiet(check: Any, *arguments: Any) -> str:
    """Pillow warns of what it could mend, which is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow takes up to 179 million pixels for a picture, 0.7 GB and seconds, before it can see that a file that
        # says so is cut short; with fewer that path is as long as it is here.
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**20
        try:
            return check(*arguments)
        finally:
            Image.MAX_IMAGE_PIXELS = most


VALUES = st.one_of(pictures(), pictures(), files(), files(), arrays(), OTHERS)
SEEDS = st.integers(0, 2**32)


@examples(150, 3000)
@given(value=VALUES, channels=CHANNELS, seed=SEEDS)
def test_an_image_becomes_a_crop_or_is_refused_with_a_reason(value, channels, seed):
    quiet(outcome_of_image, value, channels, seed)


# -- as a row of a data set ------------------------------------------------------------------------------------------

GOOD_ROW = {"image": {"bytes": encoded(picture("RGB", 20, 14, 0), "PNG", None, 1), "path": None}}


def make_reader() -> CropReader:
    rows = datasets.Dataset.from_dict(
        {"image": [GOOD_ROW["image"]]}, features=datasets.Features(image=datasets.Image())
    )
    return CropReader(ImageColumn(rows, "image", 3), SIZE, 0.3, seed=0)


READER = make_reader()


def outcome_of_row(content: bytes) -> str:
    with bounded(seconds=1, megabytes=150):
        row = {"image": {"bytes": content, "path": "folder/odd.png"}}
        sample = READER.read_all([SampleKey(0, 0, 0, 5)], [row], [lambda _: (1, GOOD_ROW)])[0]
    crop = sample["pixel_values"]
    assert crop.shape == (3, *SIZE)
    assert torch.isfinite(crop.float()).all()
    if not sample["unreadable"]:
        return "right"
    (skipped,) = sample["unreadable"]
    assert skipped.image == 5
    assert "folder/odd.png" in skipped.reason
    good = READER.read_all([SampleKey(0, 0, 0, 1)], [GOOD_ROW], [lambda _: (1, GOOD_ROW)])[0]
    assert torch.equal(crop, good["pixel_values"])
    return "another image instead"


@examples(30, 500)
@given(content=files())
def test_a_row_becomes_a_crop_or_another_image_stands_in_and_the_row_is_named(content):
    quiet(outcome_of_row, content)
