"""What the cgroups of this process allow, and how much of it is used, in version 1 and 2 alike.

- a limit of a cgroup above holds too: all of them are looked at, up to the root
- in a container its own cgroup is at the root, whatever the path says
- `proc` and `sys` are trees like /proc and /sys; a file that is not there is a limit that is none
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
NO_LIMIT = 2**60
"""What version 1 says for no limit of memory is near 2^63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuGroup:
    """A cgroup with fewer cores than the machine. Counters since it was made; the times are in seconds."""

    name: str
    cores: float
    used_s: float
    periods: int = 0
    """Periods in which it wanted to run, and those in which its quota was used up."""
    throttled: int = 0


def memory_groups(proc: Path, sys: Path) -> Iterator[tuple[int, int]]:
    """Use and limit in bytes, of this process's cgroup and of those above it."""
    for controllers, path in _memberships(proc):
        root = sys / "fs" / "cgroup"
        if not controllers:
            yield from _each(_first(root / "unified", root), path, _memory_v2)
        elif "memory" in controllers:
            yield from _each(_first(root / "memory", root), path, _memory_v1)


def cpu_group(proc: Path, sys: Path, machine: int) -> CpuGroup | None:
    """The one with the fewest cores, if these are fewer than the `machine` has."""
    found: list[CpuGroup] = []
    for controllers, path in _memberships(proc):
        root = sys / "fs" / "cgroup"
        if not controllers:
            found += _each(_first(root / "unified", root), path, _cpu_v2)
        elif "cpu" in controllers:
            place = _first(root / ",".join(controllers), root / "cpu")
            accounts = _first(root / "cpuacct", place)
            found += _each(place, path, partial(_cpu_v1, roots=(place, accounts, root / "cpuset")))
    narrow = [group for group in found if group.cores < machine]
    return min(narrow, key=lambda group: group.cores, default=None)


def _memberships(proc: Path) -> Iterator[tuple[list[str], str]]:
    """Controllers and path of each hierarchy; version 2 has no controllers here. A kernel may have no cgroups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        yield (controllers.split(",") if controllers else []), path


def _each(root: Path, path: str, read: Callable[[Path], _T]) -> Iterator[_T]:
    folder = root / path.lstrip("/")
    if ".." in folder.parts or not folder.exists():
        folder = root
    while True:
        try:
            yield read(folder)
        except (OSError, ValueError, LookupError):
            pass  # no limit is told of here
        if folder == root:
            return
        folder = folder.parent


# Memory


def _memory_v2(folder: Path) -> tuple[int, int]:
    limit = (folder / "memory.max").read_text().strip()
    return _active(folder, "memory.current"), NO_LIMIT if limit == "max" else int(limit)


def _memory_v1(folder: Path) -> tuple[int, int]:
    return _active(folder, "memory.usage_in_bytes"), int((folder / "memory.limit_in_bytes").read_text())


def _active(folder: Path, file: str) -> int:
    """Without the page cache that the kernel gives back when it is asked for memory."""
    used, inactive = int((folder / file).read_text()), 0
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "total_inactive_file" or (name == "inactive_file" and not inactive):
            inactive = int(value)
    return max(used - inactive, 0)


# CPU


def _cpu_v2(folder: Path) -> CpuGroup:
    quota, period = (_words(folder / "cpu.max") or ["max", "100000"])[:2]
    cores = float("inf") if quota == "max" else int(quota) / int(period)
    counted = _table(folder / "cpu.stat")
    return CpuGroup(
        name=str(folder),
        cores=min(cores, _set_size(folder / "cpuset.cpus.effective")),
        used_s=counted["usage_usec"] / 1e6,
        periods=counted.get("nr_periods", 0),
        throttled=counted.get("nr_throttled", 0),
    )


def _cpu_v1(folder: Path, *, roots: tuple[Path, Path, Path]) -> CpuGroup:
    """Three hierarchies, which have the same groups wherever limits are set."""
    accounts, sets = (root / folder.relative_to(roots[0]) for root in roots[1:])
    quota, period = int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())
    counted = _table(folder / "cpu.stat")
    return CpuGroup(
        name=str(folder),
        cores=min(quota / period if quota > 0 else float("inf"), _set_size(sets / "cpuset.cpus")),
        used_s=int((accounts / "cpuacct.usage").read_text()) / 1e9,
        periods=counted.get("nr_periods", 0),
        throttled=counted.get("nr_throttled", 0),
    )


def _set_size(path: Path) -> float:
    """How many cores a list like 0-3,8 has; without bound where there is none."""
    ranges = [text.partition("-") for text in ",".join(_words(path)).split(",") if text]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges) or float("inf")


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (path.read_text().splitlines() if path.exists() else ()))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _first(*paths: Path) -> Path:
    return next((path for path in paths if path.exists()), paths[-1])
