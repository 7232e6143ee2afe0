"""What can go wrong in the daemon, and whether it heals.

SidestepError
├── SpoolError
│   ├── SpoolFull             the disk has no room: nothing was acknowledged, workers keep what they have
│   └── SpoolDamaged          the file can not be read on; it is quarantined and salvaged at the next start
├── SinkError
│   ├── Retry(after_s)        the row is kept and tried again
│   ├── Reject(reason)        this row will never be taken; the next one may be
│   └── Fatal(trouble)        nothing more can be written by this process; a new one resumes from the spool
├── AlreadyRunning            another process holds the run directory or the address
├── StartFailed               the daemon did not come up; the text ends with its log
├── Incomplete                the run could not be finished now, and can be taken up again
├── Unreachable               no daemon answers, or none ends when told to
├── Deleted                   the run directory is gone: nothing can be taken up again
└── CanNotRun(exit_code)      the user's command is not there, or is none
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidestep.errors import SidestepError


class SpoolError(SidestepError):
    """The spool could not do what was asked."""


class SpoolFull(SpoolError):
    """No room on the disk."""


class SpoolDamaged(SpoolError):
    """The database file is not whole."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(f"{path} is damaged ({why}); it will be moved aside and what can be read is kept")
        self.path = path


class SinkError(SidestepError):
    """A row was not written."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps rows from the run although nothing here is broken; `lasting` if it takes a person to heal it."""

    what: str
    lasting: bool = False


class Retry(SinkError):
    """Not now: again after `after_s` seconds, then at growing intervals of at most `most_s`."""

    def __init__(self, why: str, *, after_s: float = 1.0, most_s: float = 30.0, lasting: bool = False) -> None:
        super().__init__(why)
        self.after_s, self.most_s = after_s, most_s
        self.trouble = Trouble(why, lasting)


class Reject(SinkError):
    """Not ever; `reason` is one word for the ledger."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(why or reason)
        self.reason = reason


class Fatal(SinkError):
    """Not by this process. `trouble` if it is none of its own."""

    def __init__(self, why: str, *, trouble: Trouble | None = None) -> None:
        super().__init__(why)
        self.trouble = trouble


class AlreadyRunning(SidestepError):
    """Another daemon serves this run."""


class StartFailed(SidestepError):
    """The daemon did not come up. Its text ends with what it wrote to its log."""


class Incomplete(SidestepError):
    """The run could not be finished now; nothing acknowledged is lost, and it can be taken up again."""


class Unreachable(SidestepError):
    """The daemon that was asked for does not answer."""


class Deleted(SidestepError):
    """Somebody deleted the run directory while it was in use."""


class CanNotRun(SidestepError):
    """There is no such command, or it is none; `exit_code` is what a shell would say."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class ExitCode:
    """How the processes of the daemon end. 64 and above follow sysexits.h."""

    COMPLETE = 0
    """The run is finished and everything in it is confirmed."""
    UNAVAILABLE = 69
    """The daemon could not start, or is not installed."""
    SOFTWARE = 70
    """A bug; the log says where. The supervisor starts the process again."""
    DISK = 74
    """The spool's disk failed, or the run directory was deleted. Never retried in the same process."""
    INTERRUPTED = 75
    """Stopped before the run was complete; starting again on the same run directory resumes it."""
    ALREADY_RUNNING = 73
    """Another process holds the lock."""
