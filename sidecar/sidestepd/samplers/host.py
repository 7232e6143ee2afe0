"""The machine: CPU, memory and its limits, swap, disks, network, pressure, descriptors.

- `/proc` and `/sys` are arguments, so that a test can make the machine that it wants
- what a machine does not have is left out; what can not be read is a gap in that alone
- counters are told as growth per second; a counter that went back tells nothing once
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from sidestepd.samplers.base import Rates, Reading
from sidestepd.samplers.cgroups import NO_LIMIT, cpu_group, memory_groups

PROC, SYS, SHM = Path("/proc"), Path("/sys"), Path("/dev/shm")
SECTOR_BYTES = 512
IB_WORD_BYTES = 4
"""InfiniBand counts its data in words."""
_LOOPBACK = "lo"
Moved = dict[str, tuple[int, int]]
"""By the name of a device: sectors read and written."""


class HostSampler:
    """Everything of this machine but its GPUs. `home` is the run's directory, `paths` are further disks."""

    def __init__(
        self,
        home: Path,
        *,
        paths: list[Path] | None = None,
        proc: Path = PROC,
        sys: Path = SYS,
        shm: Path = SHM,
    ) -> None:
        self._proc, self._sys, self._shm = proc, sys, shm
        self._home = _place(_mount_point(home))
        self._disks = {self._home: home, **{_place(path.absolute()): path for path in paths or []}}
        self._rates = Rates()
        self._cpu: list[tuple[float, float, float]] = []
        """Of all cores, then of each: seconds in all, idle, waiting for I/O."""
        psutil.PROCFS_PATH = str(proc)
        self._read_cpu()

    def read(self, now: float) -> Reading:
        """What there is now."""
        sources: tuple[Callable[[float], Mapping[str, float]], ...] = (
            self._of_cpu,
            self._of_load,
            self._of_memory,
            self._of_disks,
            self._of_shm,
            self._of_network,
            self._of_infiniband,
            self._of_pressure,
            self._of_files,
        )
        values: dict[str, float] = {}
        for source in sources:
            try:
                values |= source(now)
            except (OSError, ValueError, IndexError, KeyError, psutil.Error, RuntimeError):
                continue
        return Reading(values={f"system/{name}": value for name, value in values.items()})

    def rest(self, seconds: float) -> Reading:
        """A machine tells nothing by itself."""
        time.sleep(seconds)
        return Reading()

    def close(self) -> None:
        """Nothing is held."""

    # CPU and memory

    def _read_cpu(self) -> list[tuple[float, float, float]]:
        before, self._cpu = self._cpu, []
        try:
            times = [psutil.cpu_times(), *psutil.cpu_times(percpu=True)]
        except (OSError, ValueError, IndexError):
            return []
        for it in times:
            # A guest's time is in the user's too.
            total = sum(it) - getattr(it, "guest", 0.0) - getattr(it, "guest_nice", 0.0)
            iowait = getattr(it, "iowait", 0.0)
            self._cpu.append((total, it.idle + iowait, iowait))
        return before

    def _of_cpu(self, now: float) -> Mapping[str, float]:
        before = self._read_cpu()
        shares = []
        for (total, idle, iowait), (total0, idle0, iowait0) in zip(self._cpu, before, strict=False):
            passed = total - total0
            if passed > 0:
                shares.append((100 * (1 - (idle - idle0) / passed), 100 * (iowait - iowait0) / passed))
        values: dict[str, float] = {}
        if shares:
            values["cpu/percent"], values["cpu/iowait_percent"] = (_percent(share) for share in shares[0])
            values["cpu/max_core_percent"] = _percent(max(busy for busy, _ in shares[1:] or shares))
        limited = self._of_cpu_limit(now)
        if "cpu/cgroup_percent" in limited and "cpu/percent" in values:
            values["cpu/percent"] = max(values["cpu/percent"], limited["cpu/cgroup_percent"])
        return values | limited

    def _of_load(self, _: float) -> Mapping[str, float]:
        words = (self._proc / "loadavg").read_text().split()
        return {"cpu/load1": float(words[0]), "cpu/threads": float(words[3].partition("/")[2])}

    def _of_cpu_limit(self, now: float) -> dict[str, float]:
        """Where a cgroup allows fewer cores than there are: what of them is used, and how often that was all."""
        group = cpu_group(self._proc, self._sys, machine=len(self._cpu) - 1)
        if group is None:
            return {}
        values = {"cpu/cgroup_limit_cores": group.cores}
        counters = {"used": group.used_s, "periods": group.periods, "throttled": group.throttled}
        rates = {name: self._rates.per_s(f"{group.name} {name}", it, now) for name, it in counters.items()}
        if rates["used"] is not None:
            values["cpu/cgroup_percent"] = _percent(100 * rates["used"] / group.cores)
        if rates["periods"] and rates["throttled"] is not None:
            values["cpu/cgroup_throttled_percent"] = _percent(100 * rates["throttled"] / rates["periods"])
        return values

    def _of_memory(self, _: float) -> Mapping[str, float]:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        values = {
            "memory/percent": memory.percent,
            "memory/used_bytes": memory.used,
            "memory/available_bytes": memory.available,
            "swap/percent": swap.percent,
            "swap/used_bytes": swap.used,
        }
        limits = [
            group for group in memory_groups(self._proc, self._sys) if group[1] < min(memory.total, NO_LIMIT)
        ]
        if limits:
            used, limit = max(limits, key=lambda group: group[0] / group[1])
            values |= {"memory/cgroup_used_bytes": used, "memory/cgroup_limit_bytes": limit}
            values["memory/percent"] = max(memory.percent, 100 * used / limit)
        return values

    # Disks

    def _of_disks(self, now: float) -> Mapping[str, float]:
        """How full the file systems are, and what their devices moved: of all disks where one is not known."""
        values: dict[str, float] = {}
        counters, disks = self._disk_counters()
        moved: Moved = {}
        for place, path in self._disks.items():
            try:
                usage, device = psutil.disk_usage(str(path)), path.stat().st_dev
            except OSError:
                continue
            told = {"percent": usage.percent, "used_bytes": usage.used, "free_bytes": usage.free}
            values |= {f"disk/{place}/{name}": value for name, value in told.items()}
            if place == self._home:
                values["disk/percent"] = usage.percent
            moved |= counters.get((os.major(device), os.minor(device)), disks)
        for device_name, (read, written) in moved.items():
            prefix = f"disk/{_word(device_name)}"
            sizes = {f"{prefix}/read": read * SECTOR_BYTES, f"{prefix}/written": written * SECTOR_BYTES}
            values |= self._growth(sizes, now) | self._so_far(sizes)
        return values

    def _disk_counters(
        self,
    ) -> tuple[dict[tuple[int, int], dict[str, tuple[int, int]]], dict[str, tuple[int, int]]]:
        """Sectors read and written, by name: of each device by its number, partitions too, and of all disks.

        The latter are nearest where a path lies on none of them: an overlay, a network.
        """
        try:
            lines = (self._proc / "diskstats").read_text().splitlines()
        except OSError:
            return {}, {}
        found = [words for line in lines if len(words := line.split()) > 9]
        counters = {(int(it[0]), int(it[1])): {it[2]: (int(it[5]), int(it[9]))} for it in found}
        disks: Moved = {}
        for it in found:
            if (self._sys / "block" / it[2] / "device").exists():  # no loop, no volume of LVM
                disks |= counters[int(it[0]), int(it[1])]
        return counters, disks

    def _of_shm(self, _: float) -> Mapping[str, float]:
        usage = psutil.disk_usage(str(self._shm))
        return {"shm/percent": usage.percent, "shm/used_bytes": usage.used}

    # Network

    def _of_network(self, now: float) -> Mapping[str, float]:
        received, sent = map(sum, zip(*self._interfaces(), strict=True))
        sizes = {"network/received": received, "network/sent": sent}
        values = self._growth(sizes, now) | self._so_far(sizes)
        if (retransmits := self._tcp_retransmits()) is not None:
            values["network/tcp_retransmits"] = self._rates.since_start("network/tcp_retransmits", retransmits)
        return values

    def _tcp_retransmits(self) -> int | None:
        """Segments sent again, since the machine was started; the names of what is counted stand above."""
        path = self._proc / "net" / "snmp"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        names, counts = ([words for words in lines if words[:1] == ["Tcp:"]] + [[], []])[:2]
        return int(dict(zip(names, counts, strict=False)).get("RetransSegs", "-1")) if counts else None

    def _interfaces(self) -> list[tuple[int, int]]:
        """Bytes received and sent by each device; where there are none, as in a container, by all but loopback.

        What goes over a bridge or a bond goes over a device too, and is counted there.
        """
        found: dict[str, tuple[int, int]] = {}
        for line in (self._proc / "net" / "dev").read_text().splitlines()[2:]:
            name, _, counters = line.partition(":")
            if name.strip() != _LOOPBACK and len(words := counters.split()) > 8:
                found[name.strip()] = (int(words[0]), int(words[8]))
        devices = [it for name, it in found.items() if (self._sys / "class" / "net" / name / "device").exists()]
        return devices or list(found.values()) or [(0, 0)]

    def _of_infiniband(self, now: float) -> Mapping[str, float]:
        counters: dict[str, int] = {}
        for device in sorted((self._sys / "class" / "infiniband").iterdir()):
            for name, file in (("sent", "port_xmit_data"), ("received", "port_rcv_data")):
                try:
                    words = [int(path.read_text()) for path in device.glob(f"ports/*/counters/{file}")]
                except (OSError, ValueError):
                    continue  # a virtual function may have no counters
                if words:
                    counters[f"infiniband/{_word(device.name)}/{name}"] = sum(words) * IB_WORD_BYTES
        return self._growth(counters, now)

    def _growth(self, counters: Mapping[str, int], now: float) -> dict[str, float]:
        rates = {name: self._rates.per_s(name, counter, now) for name, counter in counters.items()}
        return {f"{name}_bytes_per_s": rate for name, rate in rates.items() if rate is not None}

    def _so_far(self, counters: Mapping[str, int]) -> dict[str, float]:
        return {f"{name}_bytes": self._rates.since_start(name, counter) for name, counter in counters.items()}

    # What is short

    def _of_pressure(self, _: float) -> Mapping[str, float]:
        values: dict[str, float] = {}
        for name in ("cpu", "memory", "io"):
            path = self._proc / "pressure" / name
            for line in path.read_text().splitlines() if path.exists() else ():
                kind, average = line.split()[:2]
                if kind == "some":
                    values[f"pressure/{name}_percent"] = float(average.partition("=")[2])
                elif name != "cpu":  # a whole machine is never short of all CPU
                    values[f"pressure/{name}_full_percent"] = float(average.partition("=")[2])
        return values

    def _of_files(self, _: float) -> Mapping[str, float]:
        used, free, most = map(int, (self._proc / "sys" / "fs" / "file-nr").read_text().split())
        return {"files/open": used - free, "files/percent": 100 * (used - free) / most}


def _word(text: str) -> str:
    """A device's name as a part of a name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "none"


def _place(path: Path) -> str:
    """An absolute path as a part of a name."""
    return re.sub(r"[^\w./ +-]+", "_", str(path))


def _mount_point(path: Path) -> Path:
    """Where the file system is mounted that a path lies on."""
    path = path.resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _percent(value: float) -> float:
    return min(max(value, 0.0), 100.0)
