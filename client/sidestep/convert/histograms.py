"""Histograms: what becomes of an array of more elements than a list is drawn of.

- as in wandb: 32 equal bins from the least to the largest, and one unit around a value that is the only one
- NaN and infinities, of which wandb makes an error, are left out; where nothing is left there is no histogram
- counted where the array is, by its own library
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from sidestep.errors import UnsupportedValue
from sidestep.media.base import MARK
from sidestep.wire.plain import dump

BINS = 32
"""Of an array in `log()`, as in wandb 0.31."""
WATCH_BINS = 64
"""Of a tensor that is watched, likewise."""
NOTHING_FINITE = "none of its elements is a finite number"


class Packed(dict[str, Any]):
    """The media value `histogram` as it stands in a record."""

    __slots__ = ()


def packed(counts: Sequence[int], edges: Sequence[float]) -> Packed:
    """The one place that knows how a record says a histogram: as media/histogram.py packs and shows it."""
    return Packed({MARK: "histogram", "facts": {"counted": dump([list(counts), list(edges)])}})


def spread(counts: Sequence[int], least: float, largest: float, number: int) -> Packed:
    """Of equal bins between two values, that hold `number` elements; as numpy does it when the two are one."""
    if number == 0:
        raise UnsupportedValue(NOTHING_FINITE)
    bins = len(counts)
    if least == largest:
        counts = [0] * bins
        counts[bins // 2] = number
        least, largest = least - 0.5, largest + 0.5
    return packed(counts, edges_of(bins, least, largest))


def single(counts: Sequence[int], least: float, largest: float, number: int) -> Packed:
    """As wandb's `watch` does it: values that are all the same are one bin without a width."""
    if number and least == largest:
        return packed([number], [least, largest])
    return spread(counts, least, largest, number)


def edges_of(bins: int, least: float, largest: float) -> list[float]:
    """The edges of equal bins."""
    return [
        least * (1 - at / bins) + largest * (at / bins) for at in range(bins + 1)
    ]  # no difference: it may overflow


def of_numpy(array: Any, bins: int = BINS) -> Packed:
    """Counted by numpy, which whoever has an array has loaded."""
    numpy = sys.modules["numpy"]
    if array.dtype.kind not in "biuf":
        raise UnsupportedValue(
            f"it is an array of {array.size} elements of {array.dtype}, which can not be counted"
        )
    flat = array.reshape(-1)
    if array.dtype.kind == "b":
        flat = flat.astype(numpy.uint8)
    elif array.dtype.kind == "f":
        flat = flat.astype(numpy.float32) if array.dtype.itemsize == 2 else flat
        finite = numpy.isfinite(flat)
        flat = flat if finite.all() else flat[finite]
    if flat.size == 0:
        raise UnsupportedValue(NOTHING_FINITE)
    counts, edges = numpy.histogram(flat, bins=bins)
    return packed(counts.tolist(), [float(edge) for edge in edges.tolist()])
