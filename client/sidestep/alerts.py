"""Alerts: something that people should hear of now, told at most once."""

from __future__ import annotations

import math
from datetime import timedelta
from enum import Enum
from time import monotonic
from typing import Any

from sidestep.errors import UnsupportedValue

WAIT_S = 60.0
"""An alert of the same title waits this long after the one before, unless it says otherwise."""
MOST_TITLES = 1000
MOST_TEXT_CHARS = 20_000


class AlertLevel(Enum):
    """How bad it is; wandb's names."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


class Alerts:
    """What one process told lately: titles that come again too soon are passed over, as in wandb."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def take(self, title: Any, text: Any, level: Any, wait_duration: Any) -> dict[str, Any] | None:
        """The record's data, or None if it is too soon for it. Raises UnsupportedValue for what is no alert."""
        said = {"title": _text(title, 1000), "text": _text(text, MOST_TEXT_CHARS), "level": _level(level)}
        wait, now = _seconds(wait_duration), monotonic()
        before = self._told.get(said["title"])
        if before is not None and now - before < wait:
            return None
        if len(self._told) >= MOST_TITLES:
            self._told.clear()
        self._told[said["title"]] = now
        return said


def _text(value: Any, most: int) -> str:
    try:
        return str(value)[:most].encode(errors="replace").decode()
    except Exception as error:  # noqa: BLE001 - a foreign value's own code may raise anything
        raise UnsupportedValue(f"its text can not be read ({type(error).__name__})") from None


def _level(level: Any) -> str:
    value = AlertLevel.INFO if level is None else level
    try:
        return str(AlertLevel(getattr(value, "value", value)).value)  # wandb's own enumeration has the same values
    except ValueError:
        raise UnsupportedValue("an alert's level is INFO, WARN or ERROR") from None


def _seconds(wait: Any) -> float:
    if not wait:
        return WAIT_S
    try:
        seconds = wait.total_seconds() if isinstance(wait, timedelta) else float(wait)
    except (TypeError, ValueError, OverflowError):
        raise UnsupportedValue("wait_duration is a number of seconds, or a timedelta") from None
    return WAIT_S if math.isnan(seconds) else float(seconds)
