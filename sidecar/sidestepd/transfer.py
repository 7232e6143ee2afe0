"""What `sidestep sync` and `sidestep replay` say while they work, and when they are done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from sidestepd import replay
from sidestepd.saying import is_terminal
from sidestepd.sync import Target, sync

__all__ = ["Target", "send", "write"]

_QUIET_S = 1.0
_EVERY_S = 0.1


def send(run_dir: Path, target: Target, pause: Callable[[float], object]) -> str:
    """Send a run to a server; returns the line to be said. Raises as `sync` does."""
    with _Rows() as rows:
        done = sync(run_dir, target, progress=rows, pause=pause)
    return f"{'already there: ' if done.again else ''}{done.rows} rows at {done.url}"


def write(run_dir: Path, sink: str) -> str:
    """Write a run into another sink; returns the line to be said. Raises SettingsError."""
    facts = replay.facts_of(run_dir, run_dir)  # before anything is made
    into, directory = replay.target(sink)
    with _Rows() as rows:
        done = replay.replay(run_dir, into, replace(facts, directory=directory), progress=rows)
    more = f"; {done.missing} rows more are on the server alone" if done.missing else ""
    return f"{done.rows} rows in {sink.partition(':')[2]}{more}"


class _Rows:
    """One line, written over and over, while rows are copied in a terminal."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _QUIET_S
        self._shown = False

    def __enter__(self) -> Callable[..., None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\033[K", err=True, nl=False)

    def _show(self, done: int, of: int | None = None) -> None:
        if time.monotonic() > self._next and is_terminal():
            self._next, self._shown = time.monotonic() + _EVERY_S, True
            click.echo(f"\r\033[Ksidestep: {done} rows" + (f" of {of}" if of else ""), err=True, nl=False)
