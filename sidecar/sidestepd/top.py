"""`sidestep top`: how a run stands, again and again, until it has ended or somebody has seen enough.

It reads the run's files as `sidestep status` does, and disturbs nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sidestepd import status
from sidestepd.saying import table


class Rates:
    """How fast a run moves, from one look to the next."""

    def __init__(self) -> None:
        self._before: tuple[float, int, int] | None = None

    def line(self, found: status.Report, now: float) -> str:
        """What was said and written since the last look; "" at the first."""
        offered, rows = found.ledger.offered, found.rows
        before, self._before = self._before, (now, offered, rows)
        if before is None or now <= before[0]:
            return ""
        seconds = now - before[0]
        said, written = (offered - before[1]) / seconds, (rows - before[2]) / seconds
        return f"now       {said:.0f} records/s said, {written:.0f} rows/s in the run"


def watch(run_dir: Path, interval_s: float, *, console: Console | None = None,
          pause: Callable[[float], object] = time.sleep) -> None:  # fmt: skip
    """Show the run until it has ended; where there is no terminal, once."""
    console, rates = console or Console(), Rates()

    def look() -> tuple[status.Report, Text]:
        found = status.report(run_dir)
        return found, Text("\n".join(filter(None, (table(found), rates.line(found, time.monotonic())))))

    found, shown = look()
    if not console.is_terminal:
        console.print(shown, soft_wrap=True)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        while found.state == "running":
            pause(interval_s)
            found, shown = look()
            live.update(shown, refresh=True)
