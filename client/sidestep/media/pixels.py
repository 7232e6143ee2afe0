"""Pixels of any range as 8 bits per channel, in the daemon.

| values                           | what becomes of them                     | wandb 0.31               |
| -------------------------------- | ---------------------------------------- | ------------------------ |
| bool                             | black and white                          | black, and all but black |
| uint8, whole numbers to 255      | as they are                              | the same                 |
| uint16 above 255                 | the high eight bits, rounded             | the low eight bits       |
| other whole numbers              | stretched from the least to the greatest | the low eight bits       |
| floats in [0, 1]                 | times 255                                | black                    |
| floats in [0, 255]               | as they are, without their fraction      | the same                 |
| other floats                     | stretched from the least to the greatest | what their low bits are  |
| NaN and infinities               | black, and the ends of the range         | what their low bits are  |

`stretch=False` takes numbers as they are and cuts them off at 0 and 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHANNELS = frozenset({1, 3, 4})


def to_uint8(pixels: Any, *, stretch: bool = True) -> Any:
    """The same array as uint8."""
    import numpy

    if pixels.dtype == numpy.uint8:
        return pixels
    if pixels.dtype == numpy.bool_:
        return pixels.astype(numpy.uint8) * numpy.uint8(255)
    if not pixels.size:
        return pixels.astype(numpy.uint8)
    if pixels.dtype.kind == "f":
        return _floats(pixels.astype(numpy.float64), stretch)
    least, greatest = int(pixels.min()), int(pixels.max())
    if not stretch or (least >= 0 and greatest <= 255):
        return pixels.clip(0, 255).astype(numpy.uint8)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        return ((pixels.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8)
    return _stretched(pixels.astype(numpy.float64), least, greatest)


def layout(shape: Sequence[int], *, channels_first: bool) -> tuple[list[int], bool]:
    """The shape without trivial axes, and whether the channels come first; raises ValueError for what is no image.

    Where the last axis can not be channels and the first can, the first are taken to be.
    """
    found = list(shape)
    while len(found) > 3 and 1 in found:
        found.remove(1)
    first = len(found) == 3 and (channels_first or found[-1] not in CHANNELS) and found[0] in CHANNELS
    channels = 1 if len(found) == 2 else found[0 if first else -1] if len(found) == 3 else 0
    if channels not in CHANNELS or 0 in found:
        hint = "; log a batch as a list of images" if len(found) > 3 else ""
        raise ValueError(
            f"an image is HxW or HxWxC (in torch CxHxW) with 1, 3 or 4 channels, not {list(shape)}{hint}"
        )
    return found, first


def channels_last(pixels: Any, *, channels_first: bool) -> Any:
    """HxW or HxWxC, whatever the order was."""
    import numpy

    shape, first = layout(pixels.shape, channels_first=channels_first)
    pixels = pixels.reshape(shape)
    if first:
        pixels = numpy.moveaxis(pixels, 0, -1)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


def _floats(pixels: Any, stretch: bool) -> Any:
    import numpy

    finite = pixels[numpy.isfinite(pixels)]
    least, greatest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    pixels = numpy.nan_to_num(pixels, nan=min(least, 0.0), posinf=greatest, neginf=least)
    if not stretch or (least >= 0 and 1 < greatest <= 255):
        return pixels.clip(0, 255).astype(numpy.uint8)
    if least >= 0 and greatest <= 1:
        return (pixels * 255).round().astype(numpy.uint8)
    return _stretched(pixels, least, greatest)


def _stretched(pixels: Any, least: float, greatest: float) -> Any:
    import numpy

    span = greatest - least
    shares = (pixels - least) / span if span > 0 else numpy.zeros(pixels.shape)
    return (shares * 255).round().clip(0, 255).astype(numpy.uint8)
