"""Control groups: one of its own for a booted system, and a bound on the memory of a service's processes.

    with bounded(service, 48) as group:
        eventually(lambda: group.kills() > 0, ...)

- two systems in one group would take each other's services for theirs, which are called alike
- a service has a group of version 2 from systemd. Where memory is a controller of version 1 still, systemd sets no
  bound, and the processes are put into a group of version 1 for the time of the block
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

MOUNT = Path("/sys/fs/cgroup")
UNIFIED = MOUNT / "unified" if (MOUNT / "unified").is_dir() else MOUNT
MIB = 1024 * 1024


class OwnGroup:
    """A group below ours, in the hierarchies that systemd keeps its services in."""

    def __init__(self, name: str) -> None:
        places, mounts = _places(os.getpid()), {"": UNIFIED, "name=systemd": MOUNT / "systemd"}
        self._folders = [mounts[it] / places[it] / f"{name}-{os.getpid()}" for it in mounts if it in places]

    def make(self) -> None:
        """There must be none of the name."""
        for folder in self._folders:
            folder.mkdir()

    def inside(self) -> list[str]:
        """What comes before a command so that it begins there."""
        enter = "".join(f"echo 0 > {shlex.quote(str(folder))}/cgroup.procs && " for folder in self._folders)
        return ["sh", "-c", f'{enter}exec "$@"', "sh"]

    def remove(self) -> None:
        """With all below it; no process may be left."""
        for folder in self._folders:
            for inner in sorted(folder.rglob("*/"), reverse=True):
                inner.rmdir()
            folder.rmdir()


class Group(NamedTuple):
    """The files of one."""

    limit: Path
    used: Path
    events: Path

    def kills(self) -> int:
        """How often the kernel has killed a process in it."""
        words = self.events.read_text().split()
        return int(words[words.index("oom_kill") + 1])


def group_of(pid: int) -> Group | None:
    """That of version 2 that a process is in; None where memory is no controller of it."""
    folder = UNIFIED / _places(pid)[""]
    found = Group(folder / "memory.max", folder / "memory.current", folder / "memory.events")
    return found if found.limit.exists() else None


@contextmanager
def bounded(service: psutil.Process, mebibytes: int) -> Iterator[Group]:
    """A service's processes, and those they start, may have so much more memory than they have now."""
    group = group_of(service.pid)
    if group is not None:
        yield from _limited(group, mebibytes)
    elif not (MOUNT / "memory").exists():
        pytest.skip("memory is a controller of neither version of control groups here")
    else:
        home, made = MOUNT / "memory" / _places(service.pid)["memory"], MOUNT / f"memory/bounded-{service.pid}"
        made.mkdir()
        group = Group(*(made / f"memory.{what}" for what in ("limit_in_bytes", "usage_in_bytes", "oom_control")))
        for one in (service, *service.children(recursive=True)):
            (made / "cgroup.procs").write_text(str(one.pid))
        try:
            yield from _limited(group, mebibytes)
        finally:
            while inside := (made / "cgroup.procs").read_text().split():
                (home / "cgroup.procs").write_text(inside[0])
            made.rmdir()


def _limited(group: Group, mebibytes: int) -> Iterator[Group]:
    before = group.limit.read_text()
    group.limit.write_text(str(int(group.used.read_text()) + mebibytes * MIB))
    try:
        yield group
    finally:
        group.limit.write_text(before)


def _places(pid: int) -> dict[str, str]:
    """Where a process is in each hierarchy: by the controllers' names, version 2 by none."""
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return {name: path.lstrip("/") for _, names, path in lines for name in names.split(",")}
