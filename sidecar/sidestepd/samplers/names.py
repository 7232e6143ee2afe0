"""Every name that a sample may have: its unit, where it comes from, how often, and what wandb calls it.

- a name that is not here is not taken, so that the page NAMES.md, which a test compares with this table, is true
- `{i}` is a GPU's number in NVML's order, `{g}` a MIG instance's, `{r}` a rank, `{path}` an absolute path, with its
  slash, and `{device}` a device's name
- with several nodes `system/` is followed by `node{n}/`; in wandb's system stream names keep their form and the
  node is a label
- values and names only: no I/O
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Cadence = Literal["fast", "slow", "event", "row"]
"""Every `interval_s`; every `slow_interval_s`; when it happens; when a row takes samples with it."""

GPU = "system/gpu{i}/"
_WORDS = {"i": r"\d+", "g": r"\d+", "r": r"\d+", "path": r"/[\w./ +-]*", "device": r"[\w.-]+"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One kind of value.

    `stream` is its name in wandb's system stream where wandb has one, and `scale` makes our unit wandb's; an empty one
    keeps it out of the stream, where another name has the same. `history`: it is on the short list that is merged
    into rows; `over_nodes` is what is told of it with many nodes.
    """

    name: str
    unit: str
    source: str
    cadence: Cadence = "fast"
    stream: str | None = None
    scale: float = 1.0
    history: bool = False
    over_nodes: tuple[str, ...] = ()
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = (
            f"(?P<{part[1:-1]}>{_WORDS[part[1:-1]]})" if part.startswith("{") else re.escape(part)
            for part in re.split(r"(\{\w+\})", self.name)
        )
        object.__setattr__(self, "pattern", re.compile("".join(words)))

    @property
    def is_streamed(self) -> bool:
        """Whether it is in wandb's system stream."""
        return self.stream != "" and self.cadence != "row"

    @property
    def stream_name(self) -> str:
        """What it is called in wandb's system stream, without the `system.` that wandb puts before it."""
        return self.stream or self.name.removeprefix("system/").replace("/", ".").replace("gpu{i}", "gpu.{i}")

    @property
    def node_names(self) -> tuple[str, ...]:
        """What rows hold of it when there are many nodes."""
        plain = self.name.replace("{i}", "")
        return tuple(f"{plain}.{operation}" for operation in self.over_nodes)


class Known(NamedTuple):
    """A name looked up: its kind, and the words in it."""

    metric: Metric
    words: dict[str, str]

    @property
    def stream_name(self) -> str:
        """The kind's, with these words."""
        return self.metric.stream_name.format(**self.words)


def _gpu(name: str, unit: str, source: str, cadence: Cadence = "fast", **more: object) -> Metric:
    return Metric(name=f"{GPU}{name}", unit=unit, source=source, cadence=cadence, **more)  # type: ignore[arg-type]


def _host(name: str, unit: str, source: str, cadence: Cadence = "fast", **more: object) -> Metric:
    return Metric(name=f"system/{name}", unit=unit, source=source, cadence=cadence, **more)  # type: ignore[arg-type]


THROTTLES = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
}
"""The bits of NVML's reasons for which a clock is held down."""

_TORCH = "torch.cuda.memory_stats"
_OR_USED = "; where no worker tells of torch, NVML's used memory"
_REMAPPED = "nvmlDeviceGetRemappedRows"
_OF_INTERVAL = "% of what it can do in the interval"
_ELSE_FIELD = "without it, every `slow_interval_s`, field"

GPU_METRICS = (
    _gpu("utilization", "%", "nvmlDeviceGetUtilizationRates", stream="gpu.{i}.gpu", history=True, over_nodes=("mean", "min")),
    _gpu("memory_allocated", "bytes", f"{_TORCH} allocated_bytes{_OR_USED}", history=True, over_nodes=("max",)),
    _gpu("memory_reserved", "bytes", f"{_TORCH} reserved_bytes{_OR_USED}", history=True, over_nodes=("max",)),
    _gpu("memory_utilization_percent", "% of the time in which it was read or written", "nvmlDeviceGetUtilizationRates", stream="gpu.{i}.memory"),
    _gpu("memory_used_bytes", "bytes", "nvmlDeviceGetMemoryInfo", stream="gpu.{i}.memoryAllocatedBytes"),
    _gpu("memory_percent", "%", "nvmlDeviceGetMemoryInfo", stream="gpu.{i}.memoryAllocated"),
    _gpu("memory_total_bytes", "bytes", "nvmlDeviceGetMemoryInfo"),
    _gpu("power_w", "W", "nvmlDeviceGetPowerUsage", stream="gpu.{i}.powerWatts", history=True, over_nodes=("sum",)),
    _gpu("power_percent", "%", "power_w of power_limit_w", stream="gpu.{i}.powerPercent"),
    _gpu("energy_j", "J, since the driver was loaded", "field 83, or nvmlDeviceGetTotalEnergyConsumption", stream="gpu.{i}.energyJoules"),
    _gpu("temperature_c", "°C", "nvmlDeviceGetTemperature", stream="gpu.{i}.temp", history=True, over_nodes=("max",)),
    _gpu("memory_temperature_c", "°C", "field 82"),
    _gpu("sm_clock_mhz", "MHz", "nvmlDeviceGetClockInfo", stream="gpu.{i}.smClock"),
    _gpu("memory_clock_mhz", "MHz", "nvmlDeviceGetClockInfo", stream="gpu.{i}.memoryClock"),
    _gpu("throttle_mask", "bits", "nvmlDeviceGetCurrentClocksEventReasons"),
    *(_gpu(f"throttle/{name}", "0 or 1", f"bit {bit:#x} of throttle_mask") for name, bit in THROTTLES.items()),
    _gpu("power_limit_w", "W", "nvmlDeviceGetEnforcedPowerLimit", stream="gpu.{i}.enforcedPowerLimitWatts"),
    _gpu("fan_percent", "%", "nvmlDeviceGetFanSpeed", stream="gpu.{i}.fanSpeed"),
    _gpu("pstate", "0 (fastest) to 15", "nvmlDeviceGetPerformanceState"),
    _gpu("sm_active_percent", "% of the SMs and the interval", "GPM 2", stream="gpu.{i}.smActive"),
    _gpu("sm_occupancy_percent", "% of the warps and the interval", "GPM 3", stream="gpu.{i}.smOccupancy"),
    _gpu("tensor_active_percent", _OF_INTERVAL, "GPM 5", stream="gpu.{i}.pipeTensorActive"),
    _gpu("tensor_hmma_active_percent", _OF_INTERVAL, "GPM 7", stream="gpu.{i}.pipeTensorHmmaActive"),
    _gpu("dram_active_percent", _OF_INTERVAL, "GPM 10", stream="gpu.{i}.dramActive"),
    _gpu("fp64_active_percent", _OF_INTERVAL, "GPM 11", stream="gpu.{i}.pipeFp64Active"),
    _gpu("fp32_active_percent", _OF_INTERVAL, "GPM 12", stream="gpu.{i}.pipeFp32Active"),
    _gpu("fp16_active_percent", _OF_INTERVAL, "GPM 13", stream="gpu.{i}.pipeFp16Active"),
    _gpu("pcie_sent_bytes_per_s", "bytes/s", f"GPM 20; {_ELSE_FIELD} 197", stream="gpu.{i}.pcieTxBytes"),
    _gpu("pcie_received_bytes_per_s", "bytes/s", f"GPM 21; {_ELSE_FIELD} 198", stream="gpu.{i}.pcieRxBytes"),
    _gpu("nvlink_sent_bytes_per_s", "bytes/s, over all links", f"GPM 61; {_ELSE_FIELD} 138", stream="gpu.{i}.nvlinkTxBytes"),
    _gpu("nvlink_received_bytes_per_s", "bytes/s, over all links", f"GPM 60; {_ELSE_FIELD} 139", stream="gpu.{i}.nvlinkRxBytes"),
    _gpu("ecc_corrected", "errors since the driver was loaded", "nvmlDeviceGetTotalEccErrors", "slow", stream="gpu.{i}.correctedMemoryErrors"),
    _gpu("ecc_uncorrected", "errors since the driver was loaded", "nvmlDeviceGetTotalEccErrors", "slow", stream="gpu.{i}.uncorrectedMemoryErrors"),
    _gpu("remapped_rows_corrected", "rows", _REMAPPED, "slow"),
    _gpu("remapped_rows_uncorrected", "rows", _REMAPPED, "slow"),
    _gpu("remap_pending", "0 or 1", _REMAPPED, "slow"),
    _gpu("remap_failure", "0 or 1", _REMAPPED, "slow"),
    _gpu("pcie_generation", "", "nvmlDeviceGetCurrPcieLinkGeneration", "slow", stream="gpu.{i}.pcieLinkGen"),
    _gpu("pcie_width_lanes", "lanes", "nvmlDeviceGetCurrPcieLinkWidth", "slow", stream="gpu.{i}.pcieLinkWidth"),
    _gpu("pcie_replays", "since the driver was loaded", "field 94", "slow"),
    _gpu("process_count", "processes", "nvmlDeviceGetComputeRunningProcesses", "slow"),
    _gpu("foreign_process_count", "processes that are no worker's", "the same, with NSpid and PPid of /proc", "slow"),
    _gpu("rank{r}/memory_bytes", "bytes", "the same: the GPU's memory held by this rank and its children", "slow"),
    _gpu("mig_instances", "instances", "nvmlDeviceGetMigDeviceHandleByIndex", "slow"),
    _gpu("mig{g}/memory_used_bytes", "bytes", "nvmlDeviceGetMemoryInfo of the instance"),
    _gpu("mig{g}/memory_total_bytes", "bytes", "nvmlDeviceGetMemoryInfo of the instance"),
    _gpu("mig{g}/sm_active_percent", "% of its SMs and the interval", "GPM 2 of the instance"),
    _gpu("mig{g}/sm_occupancy_percent", "% of its warps and the interval", "GPM 3 of the instance"),
    _gpu("mig{g}/tensor_active_percent", _OF_INTERVAL, "GPM 5 of the instance"),
    _gpu("mig{g}/dram_active_percent", _OF_INTERVAL, "GPM 10 of the instance"),
    _gpu("xid", "code of the newest critical XID", "nvmlEventSetWait", "event", history=True),
    _gpu("lost", "0 or 1", "NVML says that the GPU is lost or must be reset", "event", history=True),
    Metric(name="system/gpu_count", unit="GPUs", source="nvmlDeviceGetCount", cadence="slow"),
)  # fmt: skip

TORCH_METRICS = (
    _gpu("memory_allocated_peak_bytes", "bytes", f"{_TORCH} allocated_bytes.all.peak"),
    _gpu("memory_reserved_peak_bytes", "bytes", f"{_TORCH} reserved_bytes.all.peak"),
    _gpu("memory_active_bytes", "bytes", f"{_TORCH} active_bytes.all.current"),
    _gpu("memory_inactive_split_bytes", "bytes", f"{_TORCH} inactive_split_bytes.all.current"),
    _gpu("alloc_retries", "since the worker began", f"{_TORCH} num_alloc_retries"),
    _gpu("alloc_ooms", "since the worker began", f"{_TORCH} num_ooms"),
)
"""Of the worker's own process, by its sender thread; `memory_allocated` and `memory_reserved` are above."""

HOST_METRICS = (
    _host("cpu/percent", "%, of the machine's cores or the cgroup's limit, whichever is nearer", "psutil.cpu_times, cpu.stat", stream="cpu", history=True, over_nodes=("mean",)),
    _host("cpu/max_core_percent", "%, of the busiest core", "psutil.cpu_times"),
    _host("cpu/iowait_percent", "%, of all cores", "psutil.cpu_times"),
    _host("cpu/load1", "processes", "/proc/loadavg"),
    _host("cpu/threads", "threads, of the whole machine", "/proc/loadavg"),
    _host("cpu/cgroup_limit_cores", "cores, where a cgroup allows fewer than there are", "cpu.max or cpu.cfs_quota_us, cpuset"),
    _host("cpu/cgroup_percent", "% of that limit", "cpu.stat or cpuacct.usage"),
    _host("cpu/cgroup_throttled_percent", "% of the periods in which its quota was used up", "cpu.stat"),
    _host("memory/percent", "%, of the machine's or the cgroup's limit, whichever is nearer", "psutil.virtual_memory, memory.current", stream="memory_percent", history=True, over_nodes=("max",)),
    _host("memory/used_bytes", "bytes", "psutil.virtual_memory"),
    _host("memory/available_bytes", "bytes", "psutil.virtual_memory", stream="proc.memory.availableMB", scale=2**-20),
    _host("memory/cgroup_used_bytes", "bytes, without the inactive page cache", "memory.current or memory.usage_in_bytes"),
    _host("memory/cgroup_limit_bytes", "bytes", "memory.max or memory.limit_in_bytes"),
    _host("swap/percent", "%", "psutil.swap_memory"),
    _host("swap/used_bytes", "bytes", "psutil.swap_memory"),
    _host("disk/percent", "%, where the run's directory lies", "the same as that of its mount point", stream="", history=True, over_nodes=("max",)),
    _host("disk/{path}/percent", "%, of the mount point of the run's directory, and of each path in samplers.paths", "psutil.disk_usage", stream="disk.{path}.usagePercent"),
    _host("disk/{path}/used_bytes", "bytes", "psutil.disk_usage", stream="disk.{path}.usageGB", scale=2**-30),
    _host("disk/{path}/free_bytes", "bytes", "psutil.disk_usage"),
    _host("disk/{device}/read_bytes", "bytes, since the sampler began, of the devices of these paths", "/proc/diskstats", stream="disk.{device}.in", scale=2**-20),
    _host("disk/{device}/written_bytes", "bytes, likewise", "/proc/diskstats", stream="disk.{device}.out", scale=2**-20),
    _host("disk/{device}/read_bytes_per_s", "bytes/s", "/proc/diskstats"),
    _host("disk/{device}/written_bytes_per_s", "bytes/s", "/proc/diskstats"),
    _host("shm/percent", "%, of /dev/shm", "psutil.disk_usage"),
    _host("shm/used_bytes", "bytes", "psutil.disk_usage"),
    _host("network/sent_bytes", "bytes, since the sampler began, over the devices", "/proc/net/dev", stream="network.sent"),
    _host("network/received_bytes", "bytes, likewise", "/proc/net/dev", stream="network.recv"),
    _host("network/tcp_retransmits", "segments, likewise", "/proc/net/snmp", stream="network.tcpRetransmits"),
    _host("network/sent_bytes_per_s", "bytes/s", "/proc/net/dev"),
    _host("network/received_bytes_per_s", "bytes/s", "/proc/net/dev"),
    _host("infiniband/{device}/sent_bytes_per_s", "bytes/s, over the ports", "/sys/class/infiniband, port_xmit_data"),
    _host("infiniband/{device}/received_bytes_per_s", "bytes/s, over the ports", "/sys/class/infiniband, port_rcv_data"),
    _host("pressure/cpu_percent", "% of the last 10 s in which some waited", "/proc/pressure/cpu"),
    _host("pressure/memory_percent", "% of the last 10 s in which some waited", "/proc/pressure/memory"),
    _host("pressure/memory_full_percent", "% of the last 10 s in which all waited", "/proc/pressure/memory"),
    _host("pressure/io_percent", "% of the last 10 s in which some waited", "/proc/pressure/io"),
    _host("pressure/io_full_percent", "% of the last 10 s in which all waited", "/proc/pressure/io"),
    _host("files/open", "descriptors, of the whole machine", "/proc/sys/fs/file-nr"),
    _host("files/percent", "%, of the machine's limit", "/proc/sys/fs/file-nr"),
)  # fmt: skip

OWN_METRICS = tuple(
    Metric(name=f"sidestep/{name}", unit=unit, source=source, history=history)
    for name, unit, source, history in (
        ("spool_bytes", "bytes", "the spool's files", False),
        ("lag_s", "s, that the oldest unread entry has waited", "the spool", True),
        ("waiting_rows", "rows, held until they are in order", "delivery's ledger", False),
        ("late_rows", "rows, so far", "delivery's ledger", False),
        ("dropped", "records, so far", "delivery's ledger", True),
        ("memory_bytes", "bytes, of all processes of this run's daemon", "psutil", False),
        ("cpu_percent", "% of one core, likewise", "psutil", False),
    )
)

DERIVED_METRICS = tuple(
    Metric(name=f"system/{name}", unit=unit, source=source, cadence="row")
    for name, unit, source in (
        ("energy_j", "J, by the run's GPUs since its first sample", "the sum of energy_j's increments"),
        ("energy_per_step_j", "J per step", "energy_j between two rows, by their steps"),
        ("energy_per_sample_j", "J per training sample", "energy_j between two rows, by samplers.samples_metric"),
        ("gpu_idle_s", "GPU-seconds without a kernel since the first sample", "100 - utilization, over time"),
    )
)
"""Of the GPUs that workers are known to use, or of all while that is not known. They stand in rows only."""

METRICS = (*GPU_METRICS, *TORCH_METRICS, *HOST_METRICS, *OWN_METRICS, *DERIVED_METRICS)

_known: dict[str, Known | None] = {}
_MOST_KNOWN = 65_536


def look_up(name: str) -> Known | None:
    """The kind of a sample's name, or None if it is none of ours."""
    if name not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[name] = next(_matches(name, METRICS), None)
    return _known[name]


def _matches(name: str, metrics: Iterable[Metric]) -> Iterator[Known]:
    for metric in metrics:
        if (match := metric.pattern.fullmatch(name)) is not None:
            yield Known(metric, match.groupdict())


def on_node(name: str, number: int) -> str:
    """A name as it is with several nodes."""
    root, _, rest = name.partition("/")
    return f"{root}/node{number}/{rest}"
