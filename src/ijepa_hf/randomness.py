"""Makes random generators from numbers that say what a draw is for and where it happens.

No draw depends on what was drawn before it, so a run is the same for any number of workers, and resuming at a step
needs that step's number alone. The second number of a key says what the draw is for; all are listed here, so that no
two purposes share one.
"""

import numpy as np

DRAW_ORDER = 1  # the order of an epoch's images, or of a stream's shards
DRAW_CROP = 2
DRAW_MASKS = 3
DRAW_DROPOUT = 4
DRAW_SUBSTITUTE = 5  # for an image that cannot be read
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
    """Make a counter-based generator (Philox) that depends on nothing but the numbers given.

    Args:
        seed: The run's seed, at least 0.
        *key: What the draw is for and where it happens, each at least 0.

    Returns:
        A fresh generator.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))
