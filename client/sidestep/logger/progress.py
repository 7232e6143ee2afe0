"""How far something is, on the console: rich's bar where rich is installed, else a line now and then.

- a bar is drawn by whoever moves it, at most ten times a second: no thread of rich's runs in the training
- the bar is redrawn below what else is printed
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

DRAW_EVERY_S = 0.1
SAY_EVERY_S = 30.0
"""Where there is no bar."""


class Progress(Protocol):
    """A bar, or what stands for one."""

    def update(self, advance: float, text: str | None) -> None:
        """So much more is done."""

    def end(self) -> None:
        """Leave the last state standing."""


class Bar:
    """rich's, which redraws itself below what its console prints."""

    def __init__(self, columns: Any, console: Any, total: float | None, description: str) -> None:
        self._progress = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(description, total=total)
        self._draw_at = 0.0
        self._progress.start()

    def update(self, advance: float, text: str | None) -> None:
        """Move it; draw it if that was long ago."""
        named = {} if text is None else {"description": text}
        self._progress.update(self._task, advance=advance, **named)
        if (now := time.monotonic()) >= self._draw_at:
            self._draw_at = now + DRAW_EVERY_S
            self._progress.refresh()

    def end(self) -> None:
        """Draw it once more."""
        self._progress.refresh()
        self._progress.stop()


class Lines:
    """A line when a tenth more is done, or half a minute went by."""

    def __init__(self, say: Callable[[str], None], total: float | None, description: str) -> None:
        self._say, self._total, self._text = say, total, description or "progress"
        self._done = 0.0
        self._said_done = 0.0
        self._say_at = time.monotonic() + SAY_EVERY_S

    def update(self, advance: float, text: str | None) -> None:
        """Say it, if it is time to."""
        self._done += advance
        self._text = text or self._text
        tenth = bool(self._total) and self._done - self._said_done >= (self._total or 0.0) / 10
        if tenth or time.monotonic() >= self._say_at:
            self._tell()

    def end(self) -> None:
        """Say how far it came."""
        if self._done != self._said_done:
            self._tell()

    def _tell(self) -> None:
        self._said_done, self._say_at = self._done, time.monotonic() + SAY_EVERY_S
        of = f"/{self._total:g} ({100 * self._done / self._total:.0f} %)" if self._total else ""
        self._say(f"{self._text}: {self._done:g}{of}")
