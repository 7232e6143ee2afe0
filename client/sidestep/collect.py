"""Hand on to the daemon what ended sessions left in spill files.

- it goes through the daemon's socket, message by message, as if the session had said it itself: there is no second
  way into a run
- a file is removed when the daemon has confirmed all of it, and stays in every other case
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sidestep import spill
from sidestep.endpoint import Endpoint
from sidestep.notices import Notices
from sidestep.sender import Sender
from sidestep.spill import LeftBehind

STALL_S = 10.0
"""A daemon that acknowledges nothing for so long is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What became of one file. `why` is empty if the daemon has all of it, and None if it is nobody's to take."""

    path: Path
    records: int = 0
    why: str | None = None


def collect(
    paths: Iterable[Path],
    endpoint: Endpoint,
    *,
    run: str | None,
    notices: Notices | None = None,
    any_run: bool = False,
    stall_s: float = STALL_S,
) -> list[Collected]:
    """Hand on those of the files that belong to `run`, one after the other; `any_run` takes the others too.

    What is of no run at all is taken only then.
    """
    return [_collect(path, endpoint, run, notices or Notices(), any_run, stall_s) for path in paths]


def _collect(
    path: Path, endpoint: Endpoint, run: str | None, notices: Notices, any_run: bool, stall_s: float
) -> Collected:
    left = spill.reopen(path)
    if left is None:
        return Collected(path=path)
    named = left.hello.run or left.hello.settings.get("id")  # by the environment, or by `init(id=...)`
    if (not named or named != run) and not any_run:
        left.close()
        return Collected(path=path)
    why = _hand_on(left, endpoint, run, notices, stall_s)
    if why:
        left.close()
    else:
        left.remove()
    return Collected(path=path, records=left.records, why=why)


def _hand_on(left: LeftBehind, endpoint: Endpoint, run: str | None, notices: Notices, stall_s: float) -> str:
    sender = Sender(endpoint, replace(left.hello, run=run), left.outbox(), notices)
    return sender.hand_on(left.bye, stall_s=stall_s)
