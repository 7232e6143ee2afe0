"""The standard library's own types: an exact number becomes a float to be drawn, everything else its text."""

from __future__ import annotations

import dataclasses
from typing import Any

from sidestep.errors import UnsupportedValue


def number(value: Any, _: object = None) -> float:
    """Decimal and Fraction."""
    try:
        return float(value)
    except (OverflowError, ValueError):  # a large Fraction, a signalling NaN
        raise UnsupportedValue(f"{value!r:.80} is beyond the range of a float") from None


def member(value: Any, call: object = None) -> Any:
    """A member of an Enum: its value where it is logged, or members are numbers themselves; else its name."""
    logged = call is not None and isinstance(value.value, str | int | float)
    return value.value if logged or isinstance(value, int | float) else value.name


def moment(value: Any, _: object = None) -> str:
    """Dates and times in ISO form; a duration in its usual text."""
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def fields(value: Any) -> dict[str, Any]:
    """What an instance of a dataclass holds."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def complex_number(value: complex) -> str:
    """As wandb writes it, without brackets."""
    return str(complex(value)).strip("()")


def text(value: Any, _: object = None) -> str:
    """What is best known by its text: paths, UUIDs."""
    return str(value)
