"""numpy: scalars, arrays small enough to be a list, and of larger ones a histogram.

numpy itself is never imported: a value of its types brings the methods along.
"""

from __future__ import annotations

from typing import Any

from sidestep.convert import histograms
from sidestep.errors import UnsupportedValue
from sidestep.staging import Call

MOST_ELEMENTS = 32
"""As in wandb, where a larger array becomes a histogram."""


def convert(value: Any, call: Call | None = None) -> Any:
    """An array of one element is a number, a small one a list; a number is a number."""
    if not hasattr(value, "dtype"):
        if hasattr(value, "itemsize") and hasattr(value, "name"):
            return str(value)  # a dtype
        raise UnsupportedValue(f"numpy's {type(value).__name__} can not be logged: log an array or a number")
    if value.dtype.kind in "mM":
        return str(value) if value.size == 1 else [str(item) for item in small(value).ravel()]
    if value.dtype.kind == "V" and value.dtype.names is None and value.dtype.name.startswith(("bfloat", "float")):
        value = value.astype("float32")  # bfloat16 and float8, of the package ml_dtypes
    if value.size == 1:
        return _number(value)
    if value.size > MOST_ELEMENTS and call is not None:
        return histograms.of_numpy(value, call.bins)
    return small(value).tolist()


def small(value: Any) -> Any:
    """The array itself, or UnsupportedValue."""
    if value.size > MOST_ELEMENTS:
        raise UnsupportedValue(
            f"it is an array of {value.size} elements, and lists go up to {MOST_ELEMENTS}: "
            "log what you want to see of it (its mean, its norm)"
        )
    return value


def _number(value: Any) -> Any:
    item = value.item()
    return float(item) if type(item).__module__ == "numpy" else item  # longdouble has no builtin of its own
