"""Views of images for self-supervised learning: crops, flips and colours of a batch of tensors, from a generator.

The draws are made on the CPU and are a function of the generator alone, whatever device the images are on.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from ijepa_hf.data.transforms import normalize

ASPECT_RATIOS = (3 / 4, 4 / 3)
# red, green, blue to luma and two axes of colour (YIQ): grey has no colour, and a turn of the colour plane turns hues
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class ViewSettings:
    """What images of a data set may be turned into without becoming others.

    Args:
        size: Height and width of images and views, pixels.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
        min_crop_scale: Least share of an image that methods without views see, in (0, 1]; 1 is the whole image.
        view_scale: Share of the image that a view shows, least and most.
        flip: Whether half of the views are mirrored left to right.
        brightness: Views are as bright as the image times 1 - brightness to 1 + brightness.
        contrast: The same of differences from the view's mean grey.
        saturation: The same of colours' distance from grey.
        hue: Colours are turned by up to this share of the full circle.
        colour_share: Share of views whose brightness, contrast, saturation and hue are changed.
        grey_share: Share of views that lose their colours.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_crop_scale: float = 1.0
    view_scale: tuple[float, float] = (0.4, 1.0)
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_share: float = 0.8
    grey_share: float = 0.0


def draw_boxes(count: int, scale: tuple[float, float], generator: Generator) -> Tensor:
    """Boxes inside an image: the share of its area uniform, the aspect ratio log-uniform, the place uniform.

    Args:
        count: Number of boxes.
        scale: Least and largest share of the area, in (0, 1].
        generator: The source of all draws.

    Returns:
        float32 `[count, 4]`: top, left, height, width, in shares of the image's side. A side that the ratio makes
        longer than the image is cut to it.
    """
    area, ratio, top, left = torch.rand(4, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = map(math.log, ASPECT_RATIOS)
    ratio = torch.exp(low + (high - low) * ratio)
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], dim=1)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Cuts a box out of each image and resizes it, bilinear.

    Args:
        images: float `[B, C, height, width]`.
        boxes: float `[B, 4]`: top, left, height, width, in shares of the image's side.
        size: Height and width of the results, pixels.
        mirrored: bool `[B]`, which results are mirrored left to right; none if not given.

    Returns:
        float `[B, C, size, size]`.
    """
    boxes = boxes.to(images.device)
    top, left, height, width = (side[:, None] for side in boxes.unbind(1))
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    columns = centres.expand(len(images), -1)
    if mirrored is not None:
        columns = torch.where(mirrored.to(images.device)[:, None], 1 - columns, columns)
    rows, columns = 2 * (top + height * centres) - 1, 2 * (left + width * columns) - 1  # -1 .. 1, as grid_sample asks
    grid = torch.stack([columns[:, None].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)], dim=3)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recolour(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue of each image, in this order.

    Saturation and hue stretch and turn the plane of colours of YIQ, so that neither changes the luma.

    Args:
        images: float `[B, 3, height, width]` in [0, 1].
        brightness: float `[B]`, what pixels are multiplied by.
        contrast: float `[B]`, what their distance from the image's mean luma is multiplied by.
        saturation: float `[B]`, what their distance from grey is multiplied by; 0 gives grey.
        hue: float `[B]`, how far colours are turned, in full circles.

    Returns:
        float of the same shape, cut to [0, 1] after each change.
    """
    angle = 2 * math.pi * hue
    turn = torch.zeros(len(images), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
    mixing = (torch.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ).to(images.device)
    brightness, contrast = (factor.to(images.device).view(-1, 1, 1, 1) for factor in (brightness, contrast))
    bright = (images * brightness).clamp(0, 1)
    mean = (bright.mean(dim=(2, 3)) @ _TO_YIQ[0].to(images.device)).view(-1, 1, 1, 1)
    contrasted = (mean + contrast * (bright - mean)).clamp(0, 1)
    return torch.bmm(mixing, contrasted.flatten(2)).view_as(images).clamp(0, 1)


def jitter_colours(images: Tensor, settings: ViewSettings, generator: Generator) -> Tensor:
    """Recolours each image by chance, and takes the colours from some.

    Args:
        images: float `[B, 3, height, width]` in [0, 1].
        settings: How much, and how often.
        generator: The source of all draws.

    Returns:
        float of the same shape, in [0, 1].

    Source: Chen et al., SimCLR, arXiv 2002.05709, appendix A: what is drawn; the order there is random, and hues turn
    in HSV.
    """
    draws = 2 * torch.rand(4, len(images), generator=generator) - 1
    changed, grey = torch.rand(2, len(images), generator=generator)
    draws = torch.where(changed < settings.colour_share, draws, 0.0)
    saturation = torch.where(grey < settings.grey_share, 0.0, 1 + settings.saturation * draws[2])
    brightness, contrast = 1 + settings.brightness * draws[0], 1 + settings.contrast * draws[1]
    return recolour(images, brightness, contrast, saturation, settings.hue * draws[3])


def make_views(pixels: Tensor, settings: ViewSettings, generator: Generator) -> Tensor:
    """One random view of each image: a resized crop, mirrored and recoloured where the settings allow it.

    Args:
        pixels: uint8 `[B, 3, size, size]`.
        settings: Of the data set.
        generator: The source of all draws.

    Returns:
        float32 `[B, 3, size, size]`, normalised.
    """
    boxes = draw_boxes(len(pixels), settings.view_scale, generator)
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5 if settings.flip else None
    views = crop_and_resize(pixels.float() / 255, boxes, settings.size, mirrored)
    return normalize(jitter_colours(views, settings, generator), settings.mean, settings.std)


def plain_images(pixels: Tensor, settings: ViewSettings, generator: Generator) -> Tensor:
    """The images as they are, or a large crop of each, as the I-JEPA recipe of the data set asks.

    Args:
        pixels: uint8 `[B, 3, size, size]`.
        settings: Of the data set; `min_crop_scale` decides.
        generator: The source of all draws.

    Returns:
        float32 `[B, 3, size, size]`, normalised.
    """
    if settings.min_crop_scale == 1.0:
        return normalize(pixels, settings.mean, settings.std)
    boxes = draw_boxes(len(pixels), (settings.min_crop_scale, 1.0), generator)
    return normalize(crop_and_resize(pixels.float() / 255, boxes, settings.size), settings.mean, settings.std)
