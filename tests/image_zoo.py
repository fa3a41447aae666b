"""A folder with one picture of every kind that people have, and some files that are no pictures any more."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = ("broken-empty.png", "broken-no-picture.jpg", "broken-truncated.png")


def write_zoo(folder: Path) -> list[str]:
    """Writes the pictures; the broken ones too. Returns the names of those that can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    rgb.save(folder / "rgb.jpg")
    rgb.save(folder / "rgb.webp")
    rgb.convert("L").save(folder / "grayscale.png")
    rgb.convert("1").save(folder / "bilevel.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("LAB").save(folder / "lab.tif")
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(pixels[..., 0]))
    alpha.save(folder / "alpha.png")
    rgb.convert("P").save(folder / "transparent-entry.png", transparency=3)
    deep = generator.integers(0, 65536, (40, 56)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "grayscale-16-bit.png")
    Image.fromarray(generator.random((40, 56)).astype(np.float32)).save(folder / "float.tif")
    frames = [rgb.rotate(90 * turns) for turns in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[:1]).save(folder / "one-row.png")
    Image.fromarray(pixels[:, :1]).save(folder / "one-column.png")
    Image.fromarray(generator.integers(0, 256, (30, 300, 3), dtype=np.uint8)).save(folder / "wide.png")
    readable = sorted(path.name for path in folder.iterdir())
    (folder / BROKEN[0]).write_bytes(b"")
    (folder / BROKEN[1]).write_bytes(b"this was never a picture")
    whole = (folder / "alpha.png").read_bytes()
    (folder / BROKEN[2]).write_bytes(whole[: len(whole) // 2])
    return readable


# -- files that are broken, or a trap --------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *others: bytes, colour: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever pixels it has."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + data + _chunk(b"IEND", b"")


def _encoded(form: str, **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def _first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _with_zeros(content: bytes, first: int, count: int) -> bytes:
    return content[:first] + bytes(count) + content[first + count :]


def _tiff_of_a_strip_far_away() -> bytes:
    content = _encoded("TIFF")
    directory = struct.unpack("<I", content[4:8])[0]
    count = struct.unpack("<H", content[directory : directory + 2])[0]
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        if struct.unpack("<H", content[entry : entry + 2])[0] == 273:  # StripOffsets
            return content[: entry + 8] + struct.pack("<I", 2**31) + content[entry + 12 :]
    raise AssertionError


def _bmp(side: int) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + sizes + bytes(4)


def _gif(side: int) -> bytes:
    screen, frame = struct.pack("<HHBBB", side, side, 0, 0, 0), struct.pack("<HHHHB", 0, 0, side, side, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x02\x00;"


def _bomb() -> bytes:
    """1 MB that unpacks to 212 MB."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**21)) for _ in range(101)) + packer.flush()


BROKEN_BYTES: dict[str, Callable[[], bytes]] = {
    "empty.png": lambda: b"",
    "one-byte.jpg": lambda: b"\xff",
    "text.png": lambda: b"this was never a picture\n" * 40,
    "html.jpg": lambda: b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>",
    "cut.jpg": lambda: _first_half(_encoded("JPEG")),
    "cut.png": lambda: _first_half(_encoded("PNG")),
    "cut.webp": lambda: _first_half(_encoded("WEBP")),
    "cut.gif": lambda: _first_half(_encoded("GIF")),
    "cut.tif": lambda: _first_half(_encoded("TIFF")),
    "zeros.png": lambda: _with_zeros(_encoded("PNG"), 100, 400),
    "no-pixels.png": lambda: _png(0, 0),
    "no-width.png": lambda: _png(0, 20),
    "no-pixels.gif": lambda: _gif(0),
    "no-pixels.ppm": lambda: b"P6 0 0 255\n",
    "claims-40000.png": lambda: _png(40_000, 40_000),
    "claims-all.png": lambda: _png(2**31 - 1, 2**31 - 1),
    "claims-60000.bmp": lambda: _bmp(60_000),
    "claims-60000.gif": lambda: _gif(60_000),
    "claims-60000.ppm": lambda: b"P6 60000 60000 255\n" + bytes(50),
    "bomb-in-pixels.png": lambda: _png(30, 30, pixels=b"")[:-12] + _chunk(b"IDAT", _bomb())[:1000],
    "bomb-in-text.png": lambda: _png(2, 2, _chunk(b"zTXt", b"Comment\0\0" + _bomb()), pixels=bytes(14)),
    "long-text.png": lambda: _png(2, 2, *[_chunk(b"tEXt", b"Comment\0" + bytes(900_000))] * 90, pixels=bytes(14)),
    "strip-far-away.tif": _tiff_of_a_strip_far_away,
    "postscript.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n{} loop\n",
}  # fmt: skip


def write_broken(folder: Path) -> list[Path]:
    """Writes every file of `BROKEN_BYTES`, and names that are no files: pipes, folders, links to nowhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in BROKEN_BYTES.items():
        (folder / name).write_bytes(content())
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "to-itself.png").symlink_to("to-itself.png")
    (folder / "to-nowhere.png").symlink_to("nowhere.png")
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(50 * 2**30)
    return sorted(folder.iterdir())
