"""What tests leave out unless they ask for it: waiting for disks, and the pictures of a run.

For this process and those forked from it; the markers `fsync` and `figures` of a test switch them on.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image

wanted = {"fsync": False, "figures": False}
_FIGURES = ("draw_masks_figure", "draw_curves_figure", "draw_diagnostics_figure", "draw_training_figures")
_real_fsync = os.fsync
_seen: set[str] = set()


def _fsync(descriptor: Any) -> None:
    if wanted["fsync"]:
        _real_fsync(descriptor)
    else:
        os.fstat(descriptor)  # one that is not open stays an error


def _pixel(path: Path) -> None:
    PIL.Image.new("RGB", (1, 1)).save(path)


@functools.cache
def _drawing_or_not(draw: Callable[..., Any]) -> Callable[..., Any]:
    """The function where figures are wanted; else one that leaves a picture of one pixel in each of its places."""

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> Any:
        if wanted["figures"]:
            return draw(*args, **options)
        if draw.__name__ != "draw_training_figures":
            return _pixel(next(value for value in [*args, *options.values()] if isinstance(value, Path)))
        (args[-1] / "figures").mkdir(parents=True, exist_ok=True)
        return [_pixel(args[-1] / "figures" / f"{name}.png") for name in ("pca", "predictions", "spectrum")]

    return drawn


def leave_out() -> None:
    """Puts the cheap ones in place, in whatever modules of the package have been imported by now."""
    os.fsync = _fsync
    for name in [name for name in sys.modules if name.startswith("ijepa_hf.") and name not in _seen]:
        _seen.add(name)
        module = sys.modules[name]
        for figure in _FIGURES:
            draw = getattr(module, figure, None)
            if draw is not None and draw.__module__ != name:  # a module that uses it, not its own
                setattr(module, figure, _drawing_or_not(draw))


@contextlib.contextmanager
def nothing_left_out() -> Iterator[None]:
    """Everything as in a run of a user's, for a run that several tests look at."""
    leave_out()
    before = dict(wanted)
    wanted.update(dict.fromkeys(wanted, True))
    try:
        yield
    finally:
        wanted.update(before)
