"""The draws of many generators, each keyed on an image, without making them one by one.

A generator that is keyed on an image costs more to make (12 us, and 50 where decoding has emptied the caches) than a
small image to crop. Here the same arithmetic runs on arrays: NumPy's `SeedSequence` and its Philox4x64-10, both of
which are specified to the bit, then what `Generator.uniform` and `Generator.integers` make of their words.
`keyed_draws` gives what stands for a generator where a crop is drawn, `keyed_crop_boxes` the boxes of images of one
size.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for Philox; O'Neill's `seed_seq_fe`
and NEP 19, for seeds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ijepa_hf.image_transforms import CROP_TRIES, LOG_ASPECT, draw_crop_box

_POOL = 4  # words
_MASK_32 = 0xFFFFFFFF
_HASH_A, _MULTIPLY_A = 0x43B0D7E5, 0x931E8875
_HASH_B, _MULTIPLY_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_KEY_STEPS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW, _HALF = np.uint64(_MASK_32), np.uint64(32)
_WORDS = 8  # made beforehand for `keyed_draws`: three attempts at a box
_DOUBTFUL = 1e-6  # this close to a half, rounding is left to `draw_crop_box`; also covers what exp may differ by


def keyed_crop_boxes(
    key: Sequence[int],
    images: np.ndarray,
    image_size: tuple[int, int],
    size: tuple[int, int],
    min_crop_scale: float,
) -> np.ndarray:
    """Draw the crop boxes of images of one size, each from its own generator.

    Args:
        key: What the generators have in common, each number at least 0: seed, purpose, epoch.
        images: int64 [n], the last number of each generator's key, 0 to 2**32 - 1.
        image_size: (height, width) of the images in pixels.
        size: (height, width) of the crops in pixels.
        min_crop_scale: smallest share of the area, in (0, 1].

    Returns:
        int64 [n, 4]: (top, left, height, width) of each box, as `draw_crop_box` gives them with the generator
        `Philox(SeedSequence([*key, image]))`. Where rounding could depend on the last bit of an exponential, or a
        whole number would be drawn again, an image is drawn by itself.
    """
    words = _Words(_philox_keys(key, images))
    height, width = image_size
    boxes = np.zeros((len(images), 4), dtype=np.int64)
    left, alone = np.arange(len(images)), np.zeros(len(images), dtype=bool)
    for attempt in range(CROP_TRIES):
        if not len(left):
            break
        area = height * width * (min_crop_scale + (1.0 - min_crop_scale) * words.uniform(left, 2 * attempt))
        angle = -LOG_ASPECT + 2 * LOG_ASPECT * words.uniform(left, 2 * attempt + 1)
        ratio = size[1] / size[0] * np.exp(angle)
        wide, high = np.sqrt(area * ratio), np.sqrt(area / ratio)
        doubtful = (np.abs(wide % 1 - 0.5) < _DOUBTFUL) | (np.abs(high % 1 - 0.5) < _DOUBTFUL)
        wide, high = np.rint(wide).astype(np.int64), np.rint(high).astype(np.int64)
        fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
        place = words.integers(left, 2 * attempt + 2, height - high + 1, width - wide + 1)
        alone[left[doubtful | (fits & place.rejected)]] = True
        found = left[fits]
        boxes[found] = np.stack([place.first[fits], place.second[fits], high[fits], wide[fits]], axis=1)
        left = left[~fits]
    alone[left] = True  # no box of ten fitted
    for place_alone in np.flatnonzero(alone).tolist():
        seeds = np.random.SeedSequence([*key, int(images[place_alone])])
        generator = np.random.Generator(np.random.Philox(seeds))
        boxes[place_alone] = draw_crop_box(height, width, size, min_crop_scale, generator)
    return boxes


class KeyedDraws:
    """Stands for the generator `Philox(SeedSequence(key))` where a crop is drawn: the same numbers.

    Args:
        key: Of the generator.
        words: Its first 64-bit words.
    """

    __slots__ = ("_half", "_key", "_taken", "_words")

    def __init__(self, key: Sequence[int], words: Sequence[int]) -> None:
        self._key, self._words = key, words
        self._taken = 0
        self._half: int | None = None  # of a word, left by the last whole number

    def uniform(self, low: float, high: float) -> float:
        """A number from low to high, as `Generator.uniform` gives it."""
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def integers(self, low: int, high: int) -> int:
        """A whole number from low to high - 1, as `Generator.integers` gives it; at most 2**32 - 1 of them."""
        count = high - low
        if count == 1:
            return low
        while True:  # Lemire's method
            if self._half is None:
                word = self._word()
                half, self._half = word & _MASK_32, word >> 32
            else:
                half, self._half = self._half, None
            product = half * count
            if product & _MASK_32 >= (2**32 - count) % count:
                return low + (product >> 32)

    def _word(self) -> int:
        if self._taken == len(self._words):
            bits = np.random.Philox(np.random.SeedSequence(self._key))
            self._words = bits.random_raw(2 * len(self._words) + 4).tolist()
        self._taken += 1
        return self._words[self._taken - 1]


def keyed_draws(key: Sequence[int], images: Sequence[int]) -> list[KeyedDraws]:
    """What stands for the generators of some images; cheaper than they are from about ten images on.

    Args:
        key: What the generators have in common, each number at least 0: seed, purpose, epoch.
        images: The last number of each generator's key, 0 to 2**32 - 1.

    Returns:
        One for each image.
    """
    keys = _philox_keys(key, np.array(images, dtype=np.int64))
    words = np.concatenate([_philox(block + 1, keys) for block in range(_WORDS // 4)]).T.tolist()
    return [KeyedDraws((*key, image), row) for image, row in zip(images, words, strict=True)]


class _Places(NamedTuple):
    """Two whole numbers for each of some images, and whether one of them may have to be drawn again."""

    first: np.ndarray
    second: np.ndarray
    rejected: np.ndarray


class _Words:
    """The 64-bit words of many Philox generators, made four at a time when they are asked for.

    Args:
        keys: uint64 [n, 2].
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys
        self.blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def word(self, which: np.ndarray, number: int) -> np.ndarray:
        """Word `number` of some generators: uint64."""
        block, inside = divmod(number, 4)
        known, values = self.blocks.get(block, (np.empty(0, dtype=np.int64), np.empty((4, 0), dtype=np.uint64)))
        if len(known) == 0:
            known, values = which, _philox(block + 1, self.keys[which])
            self.blocks[block] = known, values
        # those that are asked for become fewer, never others
        return values[inside] if len(known) == len(which) else values[inside, np.searchsorted(known, which)]

    def uniform(self, which: np.ndarray, number: int) -> np.ndarray:
        """float64 in [0, 1) of a word, as `Generator.random` makes it."""
        return (self.word(which, number) >> np.uint64(11)) * 2.0**-53

    def integers(self, which: np.ndarray, number: int, first: np.ndarray, second: np.ndarray) -> _Places:
        """Whole numbers below `first`, then below `second`, as `Generator.integers` makes them of half a word each.

        A range of one number takes nothing from the generator.
        """
        word = self.word(which, number)
        low, high = word & _LOW, word >> _HALF
        above = _scaled(low, first)
        beside = _scaled(np.where(first > 1, high, low), second)
        return _Places(above[0], beside[0], above[1] | beside[1])


def _scaled(word: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lemire's method: the upper half of the product of 32 bits; and whether the lower half asks for another word."""
    limit = np.maximum(limit, 1).astype(np.uint64)
    product = word * limit
    return (product >> _HALF).astype(np.int64), (product & _LOW) < limit


def _philox_keys(key: Sequence[int], images: np.ndarray) -> np.ndarray:
    """uint64 [n, 2]: what `SeedSequence([*key, image]).generate_state(2, uint64)` gives for each image."""
    entropy: list[np.ndarray] = []
    for number in key:
        entropy.append(np.full(1, number & _MASK_32, dtype=np.uint32))
        while number > _MASK_32:
            number >>= 32
            entropy.append(np.full(1, number & _MASK_32, dtype=np.uint32))
    entropy.append(images.astype(np.uint32))
    constant = _HASH_A

    def hashed(value: Any) -> Any:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * _MULTIPLY_A & _MASK_32
        value = value * np.uint32(constant)
        return value ^ (value >> np.uint32(16))

    def mixed(one: Any, other: Any) -> Any:
        value = one * _MIX_LEFT - other * _MIX_RIGHT
        return value ^ (value >> np.uint32(16))

    nothing = np.zeros(1, dtype=np.uint32)
    pool = [hashed(entropy[place] if place < len(entropy) else nothing) for place in range(_POOL)]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for more in entropy[_POOL:]:
        for target in range(_POOL):
            pool[target] = mixed(pool[target], hashed(more))
    constant = _HASH_B
    state = []
    for value in pool:
        value = value ^ np.uint32(constant)
        constant = constant * _MULTIPLY_B & _MASK_32
        value = value * np.uint32(constant)
        state.append(np.broadcast_to(value ^ (value >> np.uint32(16)), images.shape).astype(np.uint64))
    return np.stack([state[0] | state[1] << _HALF, state[2] | state[3] << _HALF], axis=1)


def _philox(block: int, keys: np.ndarray) -> np.ndarray:
    """uint64 [4, n]: the words of block `block`, counted from 1, of generators with these keys."""
    zero = np.zeros(len(keys), dtype=np.uint64)
    words = [zero + np.uint64(block), zero, zero, zero]
    first, second = keys[:, 0], keys[:, 1]
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiplied(_MULTIPLIERS[0], words[0])
        high_1, low_1 = _multiplied(_MULTIPLIERS[1], words[2])
        words = [high_1 ^ words[1] ^ first, low_1, high_0 ^ words[3] ^ second, low_0]
        first, second = first + _KEY_STEPS[0], second + _KEY_STEPS[1]
    return np.stack(words)


def _multiplied(factor: np.uint64, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of a product, of which each factor is cut into halves."""
    factor_high, factor_low = factor >> _HALF, factor & _LOW
    high, low = value >> _HALF, value & _LOW
    middle = factor_high * low + (factor_low * low >> _HALF)
    other = factor_low * high + (middle & _LOW)
    return factor_high * high + (middle >> _HALF) + (other >> _HALF), factor * value
