"""What a sink is: a naive writer of rows, and the wrappers that know about patience.

A sink writes one row at a time and raises when it can not: `Retry` keeps the row, `Reject` gives it up with a
reason, `Fatal` ends this process, and the next one resumes from the spool. It promises nothing durable by
returning from `write`; `confirm` tells which rows the run holds for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sidestep.media.base import Files
from sidestepd.errors import Reject, Retry, Trouble
from sidestepd.rows import Definition, Described, Printed, Row, Sample, Version

BEAT_EVERY_S = 0.5
"""Whoever waits shows this often that it only waits."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The run to write into. `options` are the keywords of wandb's init that were given, `sweep_id` is its sweep.

    `resume` says whether the server must or may not have the run when it is opened for the first time; `server`
    is the address of the W&B server, `ask_every_s` how often it is asked what it holds, `stall_s` after how long
    something is wrong where nothing moves. They count online only; offline `resume` is held against `earlier`, the
    directories of runs with this id that began before.
    """

    id: str
    directory: Path
    mode: str = "offline"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    resume: str = "allow"
    sweep_id: str | None = None
    server: str | None = None
    ask_every_s: float = 15.0
    stall_s: float = 60.0
    earlier: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """Rows that the run holds for good, and where to look on from next time.

    `steps` rises; a range may name steps that no row has. `trouble` is what is waited for meanwhile. `watched` if
    the sink itself sees whether anything moves.
    """

    steps: Sequence[int]
    bookmark: Mapping[str, Any]
    trouble: Trouble | None = None
    watched: bool = False
    kept: Sequence[str] = ()
    """Ids of artifacts and of files that the run holds for good."""
    refused: Sequence[tuple[str, str]] = ()
    """Ids of those that it never will, and why in one word."""


class Sink(Protocol):
    """Where rows go."""

    takes_files: bool
    """Whether files that were kept lie elsewhere then, and those that `keep` was given may be deleted."""

    def open(self, run: RunFacts, bookmark: Mapping[str, Any]) -> Confirmed:
        """Open or resume the run; returns the rows it holds beyond `bookmark`, all lives together.

        Raises Retry or Fatal.
        """
        ...

    def define(self, definitions: Iterable[Definition]) -> None:
        """Tell of names before the first row that holds them. Idempotent."""
        ...

    def config(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Set the run's configuration. Idempotent. Returns the names that had to be left out."""
        ...

    def summary(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Set values of the run's summary. Idempotent. Returns the names that had to be left out."""
        ...

    def named(self, values: Mapping[str, Any]) -> None:
        """What the run is called from now on: `name`, `notes`, `tags`; `preempted` marks it so. Idempotent."""
        ...

    def alert(self, title: str, text: str, level: str) -> None:
        """Tell people something. Whoever calls tells it once, also across crashes. `level`: INFO, WARN, ERROR."""
        ...

    def write(self, row: Row) -> Sequence[str]:
        """Write one row, with a `step` above every earlier one's. Raises Retry, Reject or Fatal.

        Returns the names that had to be left out.
        """
        ...

    def show(self, value: Any, files: Files) -> Any:
        """What `write` shall be given for a value that is media, or has some in it.

        Called in another thread, and again after a crash. Raises ValueError, in words, if the content is bad.
        """
        ...

    def prepare(self, version: Version) -> Any:
        """What `keep` shall be given for an artifact, or for files of the run.

        Called in another thread, and again after a crash. Raises ValueError, in words, if the content is bad.
        """
        ...

    def keep(self, version: Version, prepared: Any) -> None:
        """Add an artifact, or files, to the run; `confirm` tells when it holds them. Returns at once.

        What is called again with the same content after a crash adds nothing new. Raises Reject or Fatal.
        """
        ...

    def sample(self, sample: Sample) -> None:
        """Add to the run's stream of system metrics, at the sample's own time. Raises Fatal."""
        ...

    def printed(self, said: Printed) -> None:
        """Add lines to the run's console log. Raises Fatal."""
        ...

    def described(self, said: Described) -> None:
        """Note what the program is, or keep a file with the run. Idempotent. Raises Fatal."""
        ...

    def confirm(self) -> Confirmed:
        """The rows that became durable since this was asked last."""
        ...

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """`_step` and values of every row that the run holds, over all its lives; for when our memory is lost.

        Raises Retry.
        """
        ...

    def close(self, exit_code: int) -> None:
        """Finish the run; afterwards `confirm` once more tells of every row. Raises Retry or Fatal."""
        ...

    def about(self) -> Mapping[str, Any]:
        """What only the sink knows of the run: `url`, `directory`, ..."""
        ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that the sink refused for good."""

    row: Row
    reason: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Names of a row whose values the sink refused for good; the row went without them."""

    row: Row
    names: Sequence[str]


def patiently(
    act: Callable[[], _T],
    *,
    beat: Callable[[], None],
    kept: Callable[[Retry], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> _T:
    """Do something, again and again at growing intervals for as long as it raises Retry, which `kept` hears of.

    `beat` shows progress, while it waits too.
    """
    attempt = 0
    while True:
        beat()
        try:
            return act()
        except Retry as later:
            kept(later)
            left = min(later.most_s, later.after_s * 2**attempt)
            attempt = min(attempt + 1, 30)
        while left > 0:
            sleep(min(left, BEAT_EVERY_S))
            left -= BEAT_EVERY_S
            beat()


def write_all(
    sink: Sink,
    rows: Iterable[Row],
    *,
    beat: Callable[[], None],
    kept: Callable[[Retry], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Rejected | LeftOut]:
    """Write rows in order, trying kept ones again; yields what was refused."""
    for row in rows:
        try:
            names = patiently(partial(sink.write, row), beat=beat, kept=kept, sleep=sleep)
            if names:
                yield LeftOut(row, names)
        except Reject as refusal:
            yield Rejected(row, refusal.reason)
