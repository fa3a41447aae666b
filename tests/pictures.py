"""Pictures whose patches have one colour each, and the colours of patches in a drawn panel."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image


def patch_centres(figure: Figure, png: Path, panel: int, grid: tuple[int, int]) -> np.ndarray:
    """What the PNG shows at the middle of each patch of a panel, uint8 [rows, columns, 3]."""
    pixels = np.asarray(Image.open(png).convert("RGB"))
    box = figure.axes[panel].get_position()
    height, width = pixels.shape[:2]
    rows = [round(height * (1 - box.y1 + (r + 0.5) / grid[0] * box.height)) for r in range(grid[0])]
    columns = [round(width * (box.x0 + (c + 0.5) / grid[1] * box.width)) for c in range(grid[1])]
    return pixels[np.ix_(rows, columns)]


def patches_of_one_colour(batch: int, channels: int, grid: tuple[int, int], patch: tuple[int, int], seed: int = 0):
    """Images whose patches are each of one random colour; also these colours, [batch, rows, columns, channels]."""
    colors = np.random.default_rng(seed).integers(0, 256, (batch, *grid, channels), dtype=np.uint8)
    pixels = colors.repeat(patch[0], axis=1).repeat(patch[1], axis=2)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), colors
