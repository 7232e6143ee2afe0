"""What a sink is: a naive writer of rows, and the wrapper that knows about patience.

A sink writes one row at a time and raises when it can not: `Retry` keeps the row, `Reject` gives it up with a
reason, `Fatal` ends this process, and the next one resumes from the spool. It promises nothing durable by
returning from `write`; `confirm` tells which rows the run holds for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sidestepd.errors import Reject, Retry
from sidestepd.rows import Definition, Row

LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The run to write into. `options` are the keywords of wandb's init that were given."""

    id: str
    directory: Path
    mode: str = "offline"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """Rows that the run holds for good, and where to look on from next time."""

    steps: tuple[int, ...]
    bookmark: Mapping[str, Any]


class Sink(Protocol):
    """Where rows go."""

    def open(self, run: RunFacts, bookmark: Mapping[str, Any]) -> Confirmed:
        """Open or resume the run; returns the rows it holds beyond `bookmark`, all lives together."""
        ...

    def define(self, definitions: Iterable[Definition]) -> None:
        """Tell of names before the first row that holds them. Idempotent."""
        ...

    def config(self, values: Mapping[str, Any]) -> None:
        """Set the run's configuration. Idempotent."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary. Idempotent."""
        ...

    def write(self, row: Row) -> None:
        """Write one row, with a `step` above every earlier one's. Raises Retry, Reject or Fatal."""
        ...

    def confirm(self) -> Confirmed:
        """The rows that became durable since this was asked last."""
        ...

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """`_step` and values of every row that the run holds, over all its lives; for when our memory is lost."""
        ...

    def close(self, exit_code: int) -> None:
        """Finish the run; afterwards `confirm` once more tells of every row."""
        ...

    def about(self) -> Mapping[str, Any]:
        """What only the sink knows of the run: `url`, `directory`, ..."""
        ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that the sink refused for good."""

    row: Row
    reason: str


def write_all(
    sink: Sink,
    rows: Iterable[Row],
    *,
    beat: Callable[[], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Rejected]:
    """Write rows in order, trying kept ones again; yields those that were rejected. `beat` shows progress."""
    for row in rows:
        attempt = 0
        while True:
            beat()
            try:
                sink.write(row)
            except Reject as refusal:
                yield Rejected(row, refusal.reason)
            except Retry as later:
                sleep(min(LONGEST_WAIT_S, later.after_s * 2**attempt))
                attempt += 1
                continue
            break
