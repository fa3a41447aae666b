"""Draws scenes of a few coloured shapes, with complete labels; nothing is downloaded.

A scene is a function of (seed, index) alone. Its labels are more than a class: the number of objects, their distances
and positions, and the object at each pixel. So features can be scored on more than classification.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPE_KINDS = ("circle", "square", "triangle", "star", "cross")
MIN_VISIBLE_SHARE = 0.5  # of the pixels of every object
MIN_OBJECTS, MAX_OBJECTS = 2, 6
MIN_SCENE_SIZE = 32

_RADII = (0.08, 0.22)  # of the circle around an object, as a share of the picture's side
_OVERSAMPLING = 4
_PLACES_TRIED = 100
_NEAREST_CENTERS = 0.06  # as a share of the side: objects that share a centre could not be told apart
_BACKGROUND_LIGHTNESS = (50, 206)
_COLOR_SPREAD = 20
_GRAIN = 20
# far from each other, and from the greyish backgrounds
_COLORS = np.array(
    [
        (225, 35, 35), (240, 135, 25), (235, 220, 35), (45, 180, 50),
        (35, 205, 205), (40, 75, 225), (130, 45, 190), (235, 55, 180),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ShapeScene:
    """Holds a picture and its labels; n is `count`, pixels are counted from the upper left corner.

    Attributes:
        image: Picture of mode RGB, `size` x `size`.
        label: Kind of the object of which most pixels are visible (the rearmost of equals): 0 .. 4, an index into
            `SHAPE_KINDS`.
        count: Number of objects, 2 .. 6.
        nearest_distance: Distance of the two nearest centres, in pixels, greater than 0.
        boxes: int64 `[n, 4]`, rear objects first: left, top, right and bottom of the visible part of each, in pixels;
            right and bottom are the first pixel outside.
        box_classes: int64 `[n]`, kinds of the objects, 0 .. 4.
        centers: float64 `[n, 2]`, x and y of the middle of each object, hidden or not, in pixels.
        segmentation: uint8 `[size, size]`: 0 for the background, else 1 + kind of the object visible at the pixel.
        instances: uint8 `[size, size]`: 0 for the background, else 1 + number of the object visible at the pixel.
    """

    image: Image.Image
    label: int
    count: int
    nearest_distance: float
    boxes: np.ndarray
    box_classes: np.ndarray
    centers: np.ndarray
    segmentation: np.ndarray
    instances: np.ndarray


def draw_shape_scene(seed: int, index: int, size: int = 96) -> ShapeScene:
    """Draws a scene of 2 to 6 circles, squares, triangles, stars and crosses.

    Objects have different colours, lie wholly inside the picture, turned at will, and may cover each other: of each at
    least half of its pixels (`MIN_VISIBLE_SHARE`) stay visible. The background is plain, a gradient or cloudy. An
    object counts as visible at a pixel that it covers by half or more. There are at least two objects, so that there
    is always a nearest distance.

    Args:
        seed: Of the whole set, at least 0.
        index: Number of the scene, at least 0.
        size: Side of the picture in pixels, at least 32.

    Returns:
        The scene, a function of the three numbers (to the bit with one version of Pillow, which fills the outlines).

    Raises:
        ValueError: If a number is too small.
    """
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("size", size, MIN_SCENE_SIZE)):
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    image = _draw_background(generator, size)
    instances = np.zeros((size, size), np.uint8)
    colors = np.clip(
        generator.permutation(_COLORS) + generator.integers(-_COLOR_SPREAD, _COLOR_SPREAD + 1, _COLORS.shape), 0, 255
    )
    kinds: list[int] = []
    centers: list[tuple[float, float]] = []
    areas, visible = np.zeros(MAX_OBJECTS, int), np.zeros(MAX_OBJECTS, int)
    for _ in range(int(generator.integers(MIN_OBJECTS, MAX_OBJECTS + 1))):
        # most tries succeed; where none does, the scene has fewer objects
        for _ in range(_PLACES_TRIED):
            kind, center, mask, (left, top) = _draw_object(generator, size)
            if any(math.dist(center, other) < _NEAREST_CENTERS * size for other in centers):
                continue
            covers = np.asarray(mask) >= 128
            window = instances[top : top + mask.height, left : left + mask.width]
            covered = np.bincount(window[covers], minlength=MAX_OBJECTS + 1)
            if np.any(visible - covered[1:] < MIN_VISIBLE_SHARE * areas):
                continue
            window[covers] = len(kinds) + 1
            visible -= covered[1:]
            areas[len(kinds)] = visible[len(kinds)] = covered.sum()
            image.paste(tuple(int(part) for part in colors[len(kinds)]), (left, top), mask)
            kinds.append(kind)
            centers.append(center)
            break
    return _describe(image, instances, visible, np.array(kinds), np.array(centers))


def _describe(
    image: Image.Image, instances: np.ndarray, visible: np.ndarray, kinds: np.ndarray, centers: np.ndarray
) -> ShapeScene:
    return ShapeScene(
        image=image,
        label=int(kinds[visible.argmax()]),
        count=len(kinds),
        nearest_distance=min(math.dist(*pair) for pair in itertools.combinations(centers, 2)),
        boxes=np.array([_bounding_box(instances == number) for number in range(1, len(kinds) + 1)]),
        box_classes=kinds,
        centers=centers,
        segmentation=np.concatenate([[0], 1 + kinds]).astype(np.uint8)[instances],
        instances=instances,
    )


def _bounding_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _draw_object(
    generator: np.random.Generator, size: int
) -> tuple[int, tuple[float, float], Image.Image, tuple[int, int]]:
    """Draws an object wholly inside the picture: its kind, centre, coverage (0 .. 255) and where that is pasted."""
    kind = int(generator.integers(len(SHAPE_KINDS)))
    radius = generator.uniform(*_RADII) * size
    x, y = generator.uniform(radius, size - radius, 2)
    angle = generator.uniform(0, 2 * math.pi)
    left, top = int(x - radius), int(y - radius)
    right, bottom = min(size, math.ceil(x + radius)), min(size, math.ceil(y + radius))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    outline = (radius * (_OUTLINES[kind] @ turn) + (x - left, y - top)) * _OVERSAMPLING
    mask = Image.new("L", ((right - left) * _OVERSAMPLING, (bottom - top) * _OVERSAMPLING))
    ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=255)
    return kind, (float(x), float(y)), mask.reduce(_OVERSAMPLING), (left, top)


def _draw_background(generator: np.random.Generator, size: int) -> Image.Image:
    """Draws a plain, graded or cloudy background between two muted colours."""
    lightness = generator.uniform(*_BACKGROUND_LIGHTNESS, (2, 1))
    rear, front = (lightness + generator.uniform(-_COLOR_SPREAD, _COLOR_SPREAD, (2, 3))).astype(int).tolist()
    kind = generator.integers(3)
    plain = Image.new("RGB", (size, size), tuple(rear))
    if kind == 0:
        return plain
    if kind == 1:
        angle = generator.uniform(0, 2 * math.pi)
        line = np.linspace(-90, 90, size, dtype=np.float32)
        share = 127.5 + line * np.float32(math.cos(angle)) + line[:, None] * np.float32(math.sin(angle))
    else:
        clouds = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
        share = np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        share = share + generator.integers(-_GRAIN, _GRAIN + 1, (size, size), dtype=np.int8)
    mask = Image.fromarray(share.clip(0, 255).astype(np.uint8))
    return Image.composite(Image.new("RGB", (size, size), tuple(front)), plain, mask)


def _on_circle(corners: int, *radii: float) -> np.ndarray:
    """Returns points `[corners, 2]` at equal angles, whose distances from the centre are `radii` in turn."""
    angles = 2 * math.pi * np.arange(corners) / corners
    distances = np.resize(radii, corners)
    return np.stack([distances * np.cos(angles), distances * np.sin(angles)], axis=1)


def _cross(half_width: float) -> np.ndarray:
    """Returns the outline `[12, 2]` of a cross whose outer corners lie on the unit circle."""
    far = math.sqrt(1 - half_width**2)
    arm = np.array([(far, -half_width), (far, half_width), (half_width, half_width)])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


# nearly equal areas, so that no kind is the largest of a scene much more often than another
_OUTLINES = (
    _on_circle(48, 0.75),
    _on_circle(4, 0.9),
    _on_circle(3, 1.0),
    _on_circle(10, 1.0, 0.42),
    _cross(0.3),
)
