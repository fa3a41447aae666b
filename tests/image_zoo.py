"""A folder with one picture of every kind that people have, and some files that are no pictures any more."""

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
