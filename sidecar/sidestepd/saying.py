"""What the command line says, and how: a line, a table, a bar.

- stdout belongs to the command that is run; everything here goes to stderr, but for what was asked for
- in a pipe, and where WANDB_SILENT asks for it, it is quiet, except about errors and losses
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep.errors import SidestepError
from sidestep.wire import BLOBS, FILES, WORKER
from sidestepd import status
from sidestepd.errors import ExitCode
from sidestepd.home import short
from sidestepd.rows import Alert

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_QUIET_S = 1.0
"""A drain shorter than this is not worth a line."""
_MOST_ALERTS = 5
"""So many are shown."""


def say(text: str) -> None:
    """Something that everybody should see; where nobody reads it any more, what we do goes on."""
    with contextlib.suppress(OSError):
        click.echo(f"sidestep: {seen(text)}", err=True)


def seen(text: str) -> str:
    """Text of whoever said it, without what would move a terminal's cursor or change its colours."""
    return "".join(it if it.isprintable() or it == "\n" else f"\\x{ord(it):02x}" for it in text)


def say_in_terminal(text: str) -> None:
    """A line for who is watching."""
    if _is_watched():
        say(text)


def _is_watched() -> bool:
    return is_terminal() and os.environ.get("WANDB_SILENT", "").lower() not in ("1", "true", "yes", "on")


def is_terminal() -> bool:
    """Whether somebody sees what is said; a process may have been started without a stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """A bar in a terminal while a run drains, once that takes more than a moment. Called with what is left."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._bar: Bar | None = None
        self._most = 0

    def __call__(self, pending: int) -> None:
        """So many records are still to be written."""
        self._most = max(self._most, pending)
        if self._bar is None and _is_watched() and time.monotonic() > self._since + _QUIET_S:
            self._bar = _bar()
            self._bar.add_task("sidestep: writing the last rows")
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=self._most, completed=self._most - pending)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar:
    from rich.console import Console  # a drain in a pipe does without
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def sum_up(run_dir: Path, exit_code: int, *, complete: bool) -> int:
    """Say what the run holds, and return our exit code."""
    try:
        found = status.report(run_dir)
    except (OSError, sqlite3.Error, SidestepError) as error:
        say(f"can not read {short(run_dir)}: {error}")
    else:
        _tell(found, run_dir, complete=complete)
    return exit_code if complete or exit_code else ExitCode.INTERRUPTED


def _tell(found: status.Report, run_dir: Path, *, complete: bool) -> None:
    if complete and found.upstream:
        say_in_terminal(f"{_many(found.ledger.delivered, 'record')} handed on to {found.upstream['address']}")
    elif complete:
        say_in_terminal(
            f"{found.rows} rows of {_many(found.ranks, 'rank')}: {found.late_rows} late, "
            f"{sum(found.ledger.dropped.values())} dropped, {sum(found.ledger.rejected.values())} rejected"
        )
        if found.run.url:
            say_in_terminal(f"at {found.run.url}")
        elif any((run_dir / "wandb").glob("offline-run-*")):
            say_in_terminal(f"sidestep sync {short(run_dir)}")
    for alert in found.troubles[:_MOST_ALERTS]:
        say(_alert(alert))
    lost = status.losses(found)
    if lost and complete:
        say(f"not in the run: {lost}; `sidestep status {short(run_dir)}` says more")


def table(found: status.Report) -> str:
    """How a run stands, for people."""
    run, ledger = found.run, found.ledger
    rows = f"rows      {found.rows}" + ("" if found.last_step is None else f", the last at step {found.last_step}")
    lines = [
        f"run       {run.id}" + (f" ({run.name})" if run.name else "") + f", {found.state}",
        f"in        {short(Path(run.dir))}",
        *([f"at        {run.url}"] if run.url else []),
        *([_upstream(found)] if found.upstream else [rows, f"late      {found.late_rows}, forced {found.forced}"]),
        f"records   {_equation(ledger)}",
        f"spool     {found.spool_bytes / 1e6:.1f} MB"
        + (", FULL: workers keep what they have" if found.full else ""),
    ]
    lines += [_media(found.media)] if any(found.media.values()) else []
    lines += [_artifacts(found.artifacts)] if any(found.artifacts.values()) else []
    lines += [f"trouble   {found.trouble}"] if found.trouble else []
    if found.spool_damaged:
        lines.append("the spool is damaged: workers as delivery knew them; the next start keeps what can be read")
    lines += [f"nothing matched the declared {pattern}" for pattern in found.unmatched]
    lines += [
        f"{_who(one):<9} {one.state:<5} {one.acknowledged} of {one.offered} acknowledged"
        + (f", {_by_reason(one.dropped)} dropped" if any(one.dropped.values()) else "")
        + (f", {one.values_refused} values left out" if one.values_refused else "")
        + f"   {one.node}:{one.pid}"
        for one in found.sessions
    ]
    lasting = {id(alert) for alert in found.troubles} if found.state == "running" else set()
    lines += [
        f"alert     {_alert(alert)}" + (" It lasts." if id(alert) in lasting else "")
        for alert in found.alerts[-_MOST_ALERTS:]
    ]
    if len(found.alerts) > _MOST_ALERTS:
        lines.append(f"          {len(found.alerts)} alerts in all; --json has them")
    return "\n".join(map(seen, lines))


def _upstream(found: status.Report) -> str:
    """Of a relay: where its records go, and how many are still here."""
    above = found.upstream
    how = "connected" if above.get("connected") else "done" if found.state == "finished" else "NOT CONNECTED"
    waiting = found.ledger.pending
    return f"upstream  {above.get('address', '')}, {how}, {_many(waiting, 'record')} still to go there"


def _who(session: status.SessionReport) -> str:
    if session.role == BLOBS:
        return f"media {session.rank}"
    if session.role == FILES:
        return f"files {session.rank}"
    return f"rank {session.rank}" if session.role == WORKER else session.role


def _media(media: Mapping[str, Any]) -> str:
    waiting = f", {media['waiting']} waiting, {media['bytes'] / 1e6:.1f} MB on disk" if media["bytes"] else ""
    left_out = f", {_by_reason(media['left_out'])} left out" if any(media["left_out"].values()) else ""
    return f"media     {media['delivered']} delivered{waiting}{left_out}"


def _artifacts(artifacts: Mapping[str, Any]) -> str:
    waiting = f", {artifacts['waiting']} waiting" if artifacts["waiting"] else ""
    same = f", {artifacts['unchanged']} the same as before" if artifacts["unchanged"] else ""
    left_out = f", {_by_reason(artifacts['left_out'])} left out" if any(artifacts["left_out"].values()) else ""
    return f"artifacts {artifacts['delivered']} delivered{same}{waiting}{left_out}"


def _alert(alert: Alert) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(alert.time))} {alert.text}"


def _equation(ledger: status.Ledger) -> str:
    refused = ledger.values_refused
    return (
        f"{ledger.offered} offered = {ledger.delivered} delivered + {_by_reason(ledger.rejected)} rejected"
        f" + {_by_reason(ledger.dropped)} dropped + {ledger.pending} pending + {ledger.unknown} unknown"
        + ("" if ledger.balances else "   DOES NOT BALANCE")
        + (
            f"\nvalues    {refused} that can not be logged were left out"
            if (refused := ledger.values_refused)
            else ""
        )
    )


def _by_reason(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()) if count)
    return f"{sum(counts.values())} ({reasons})" if reasons else "0"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
