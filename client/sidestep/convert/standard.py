"""The standard library's own types: an exact number becomes a float to be drawn, everything else its text."""

from __future__ import annotations

from typing import Any

from sidestep.errors import UnsupportedValue


def number(value: Any, _: object = None) -> float:
    """Decimal and Fraction."""
    try:
        return float(value)
    except (OverflowError, ValueError):  # a large Fraction, a signalling NaN
        raise UnsupportedValue(f"{value!r:.80} is beyond the range of a float") from None


def member(value: Any, _: object = None) -> Any:
    """A member of an Enum: its name, or its value where members are numbers themselves."""
    number_like = isinstance(value, int | float)
    return value.value if number_like else value.name


def moment(value: Any, _: object = None) -> str:
    """Dates and times in ISO form; a duration in its usual text."""
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def text(value: Any, _: object = None) -> str:
    """What is best known by its text: paths, UUIDs."""
    return str(value)
