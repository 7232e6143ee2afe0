"""Which process this is: its rank, and the launch it was started in.

- pure: the environment, the pid, and a way to look up when a process started come in as arguments
- a value that is no number is said and passed over; nothing is raised
- the processes that one command started together have the same launch: torchrun's id of the run, or, since its
  default is "none", the agent that is the parent of them all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sidestep.notices import say
from sidestep.wire import MAX_NAME_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a session says of the process it belongs to."""

    rank: int
    world: int
    local_rank: int
    node: str
    pid: int
    launch: str
    attempt: int


def identify(
    environ: Mapping[str, str],
    *,
    pid: int,
    parent: int,
    node: str,
    started: Callable[[int], str],
    launch: str | None = None,
    warn: Callable[[str], None] = say,
) -> Identity:
    """Read torchrun's variables. `started` says when a process began; `launch` overrides what was found."""

    def number(name: str, default: int) -> int:
        raw = environ.get(name, "").strip()
        if raw.isdecimal() and len(raw) < 10:
            return int(raw)
        if raw:
            warn(f"{name}={raw!r:.80} is no rank or count: taken as {default}")
        return default

    rank = number("RANK", 0)
    return Identity(
        rank=rank,
        world=max(number("WORLD_SIZE", 1), rank + 1),
        local_rank=number("LOCAL_RANK", 0),
        node=node[:MAX_NAME_CHARS],
        pid=pid,
        launch=(launch or _launch(environ, pid, parent, started))[:MAX_NAME_CHARS],
        attempt=number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def start_of(pid: int) -> str:
    """When a process started, in ticks since boot: with its pid it is unique, where /proc exists."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    return status.rpartition(")")[2].split()[19]


def _launch(environ: Mapping[str, str], pid: int, parent: int, started: Callable[[int], str]) -> str:
    name = environ.get("TORCHELASTIC_RUN_ID", "").strip()
    if name not in ("", "none"):
        return name
    leader = parent if environ.get("RANK", "").strip() else pid
    return f"{leader}-{started(leader)}"
