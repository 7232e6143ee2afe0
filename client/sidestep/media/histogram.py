"""Histograms: of numbers, which the daemon counts, or counted already.

- the numbers leave the worker as they are, copied once; counting them takes several times longer than copying them
- NaN and infinities, of which wandb 0.31 raises, are left out, and the worker says how many
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from sidestep import convert
from sidestep.errors import UnsupportedValue
from sidestep.media import arrays
from sidestep.media.base import Files
from sidestep.media.value import Value, plain_content, say, unpacked

MOST_BINS = 512


class Histogram(Value):
    """A distribution: of the numbers of `sequence`, or `np_histogram`, a pair of counts and of edges.

    At most 512 bins, of which there is one edge more.
    """

    kind: ClassVar[str] = "histogram"
    MAX_LENGTH: ClassVar[int] = MOST_BINS

    __slots__ = ()

    def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
        super().__init__(lambda: _of_counts(np_histogram) if np_histogram else _of_numbers(sequence, num_bins))


def _of_numbers(sequence: Any, bins: Any) -> dict[str, Any]:
    if sequence is None:
        raise UnsupportedValue("a histogram is of a sequence of numbers, or of np_histogram=(counts, edges)")
    if isinstance(bins, bool) or not isinstance(bins, int) or not 0 < bins <= MOST_BINS:
        raise UnsupportedValue(f"num_bins={bins!r:.40}: a histogram has from 1 to {MOST_BINS} bins")
    if not (hasattr(sequence, "__len__") or arrays.is_array(sequence)):
        sequence = list(sequence)
    found = arrays.taken(sequence)
    if left_out := arrays.not_finite(sequence):
        say("histogram", f"{left_out} numbers of a histogram are NaN or infinite: these are left out")
    return {"numbers": found, "bins": bins}


def _of_counts(pair: Any) -> dict[str, Any]:
    try:
        counts, edges = (_plain_list(it) for it in pair)
    except ValueError:
        raise UnsupportedValue("np_histogram= is a pair of counts and of edges") from None
    if len(counts) > MOST_BINS:
        raise UnsupportedValue(f"it has {len(counts)} bins, and {MOST_BINS} is the most")
    if len(counts) + 1 != len(edges):
        raise UnsupportedValue(f"{len(counts)} bins have {len(counts) + 1} edges, not {len(edges)}")
    if not all(isinstance(it, int | float) and math.isfinite(it) for it in [*counts, *edges]):
        raise UnsupportedValue("its counts and edges are to be finite numbers")
    return {"counted": plain_content([counts, edges])}


def _plain_list(values: Any) -> list[Any]:
    if arrays.is_tensor(values) and values.device.type != "cpu":
        raise UnsupportedValue(f"its counts are on {values.device.type!r}: hand over counts.cpu()")
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return values if sys.getsizeof(values) > 1 << 16 else [convert.plain(it) for it in values]


def show(facts: Mapping[str, Any], files: Files) -> Any:
    """A `wandb.Histogram`."""
    import wandb

    if "counted" in facts:
        counts, edges = unpacked(files.read(facts["counted"]))
        return wandb.Histogram(np_histogram=(counts, edges))
    return wandb.Histogram(np_histogram=_counted(facts, files))


def _counted(facts: Mapping[str, Any], files: Files) -> tuple[Any, Any]:
    import numpy

    numbers = arrays.numpy_of(facts["numbers"], files)
    if numbers.dtype.kind == "f":
        numbers = numbers[numpy.isfinite(numbers)]
    if numbers.dtype.kind == "b":
        numbers = numbers.astype(numpy.uint8)
    return numpy.histogram(numbers, bins=int(facts["bins"]))
