"""Makes random generators from keys: numbers that name the purpose of a draw and its place in the run.

No draw depends on an earlier one. So a run is the same for any number of workers, and resuming at a step needs the
number of that step alone. The first number of a key is the purpose; all purposes are listed here, so that no two share
a number.
"""

import numpy as np

DRAW_ORDER = 1  # the order of an epoch's images, or of a stream's shards
DRAW_CROP = 2
DRAW_MASKS = 3
DRAW_DROPOUT = 4
DRAW_SUBSTITUTE = 5  # the image that replaces one that cannot be read
DRAW_BLOCK = 6  # the order of the rows that a reader of a stream shuffles together
DRAW_LABELLED_CROP = 7
DRAW_LABELS = 8  # which images keep their labels
DRAW_VIEWS = 11  # the masks of the collapse monitor; used as the seed, so that they are the same in every run
# of `ijepa-hf visualize`
DRAW_IMAGES = 21
DRAW_GALLERY = 22
DRAW_PATCHES = 23
DRAW_BLOCKS = 24


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """Makes a counter-based generator (Philox) that depends on the given numbers alone.

    Args:
        seed: The run's seed, at least 0.
        *key: Purpose and place of the draw, each at least 0.

    Returns:
        A fresh generator.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))
