"""NVIDIA GPUs, through the real `pynvml`: what they do, how they are, and what befalls them.

    down ──nvmlInit──▶ up ──the library is gone──▶ down, tried again ever later
                        each GPU for itself: ok ◀──▶ lost, tried again ever later

- a failure is a gap in what failed and in nothing else: one metric, one GPU, or all of NVML; never an end
- only "not supported" is remembered, for that metric of that GPU, until NVML is started anew
- a GPU that is lost, an XID, and a changed number of GPUs are told as they happen
- nothing here is asked for that is known to be slow (PCIe throughput samples 20 ms a call): counters instead
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

from sidestepd.samplers.base import Notice, Rates, Reading
from sidestepd.samplers.names import THROTTLES
from sidestepd.samplers.owners import Owners

logger = logging.getLogger("sidestepd.samplers.gpu")

BACKOFF_S = (1.0, 60.0)
"""After NVML or a GPU was lost: the first pause and the longest."""
SAME_XID_S = 300.0
"""People hear of the same XID of the same GPU once in this time; the samples hold each."""
ALL_LINKS = 0xFFFFFFFF

_LIBRARY_GONE = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    }
)
_GPU_GONE = frozenset(
    {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND}
)
_NEVER = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
_NO_GPU_HERE = frozenset({pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED})
"""At the start this is a machine without a GPU, which is no news."""

XIDS = {
    13: "a kernel of the application failed",
    31: "the application touched memory that is not its own",
    43: "the application's work was stopped",
    45: "the application ended while it used the GPU",
    48: "an uncorrectable memory error",
    63: "a memory row is remapped",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many corrected memory errors",
    94: "an uncorrectable memory error, contained to one application",
    95: "an uncorrectable memory error, not contained: the GPU needs a reset",
    119: "the GPU's own processor does not answer",
    120: "the GPU's own processor failed",
}
_BY_APPLICATION = frozenset({13, 31, 43, 45})


class _LibraryGone(Exception):
    """NVML as a whole does not answer."""

    def __init__(self, error: pynvml.NVMLError) -> None:
        super().__init__(str(error))
        self.error = error


class _GpuGone(Exception):
    """One GPU does not answer, and will not for a while."""


@dataclass(slots=True, kw_only=True)
class _Gpu:
    """One GPU, by its number in NVML's order."""

    number: int
    handle: Any = None
    uuid: str = ""
    never: set[str] = field(default_factory=set)
    """What it does not support."""
    limit_w: float = 0.0
    instances: dict[int, Any] = field(default_factory=dict)
    """MIG instances by their id."""
    mig: dict[str, int] = field(default_factory=dict)
    """Their UUIDs, to this GPU's number."""
    lost: bool = False
    retry_at: float = 0.0
    backoff_s: float = BACKOFF_S[0]

    @property
    def prefix(self) -> str:
        return f"system/gpu{self.number}/"


class GpuSampler:
    """All GPUs of this machine."""

    def __init__(self, *, slow_interval_s: float = 30.0, owners: Owners | None = None, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._owners = owners
        self._slow_interval_s = slow_interval_s
        self._slow_at = 0.0
        self._gpus: list[_Gpu] = []
        self._known: dict[str, int] | None = None
        self._count: int | None = None
        self._rates = Rates()
        self._events: Any = None
        self._deaf = False
        """Waiting for events failed: one GPU may have spoilt it for all."""
        self._xid_told: dict[tuple[int, int], float] = {}
        self._up = False
        self._told: int | None = None
        """The error of NVML that was told last."""
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_S[0]

    def read(self, now: float) -> Reading:
        """What the GPUs do; the slow list too when that is due."""
        reading = Reading()
        if not self._up and (now < self._retry_at or not self._start(now, reading)):
            return reading
        slow = now >= self._slow_at
        try:
            if slow:
                self._slow_at = now + self._slow_interval_s
                self._recount(now, reading)
                if self._deaf:
                    self._listen()
            answered = [self._read_gpu(gpu, slow, now, reading) for gpu in self._gpus]
            if answered and not any(answered) and not all(gpu.lost for gpu in self._gpus):
                raise _LibraryGone(self._nvml.NVMLError(self._nvml.NVML_ERROR_UNKNOWN))
        except _LibraryGone as gone:
            self._lose(gone.error, now, reading)
            return reading
        known = {gpu.uuid: gpu.number for gpu in self._gpus if gpu.uuid}
        known |= {uuid: number for gpu in self._gpus for uuid, number in gpu.mig.items()}
        if known != self._known:
            self._known = reading.gpus = known
        return reading

    def rest(self, seconds: float) -> Reading:
        """Wait for events of the GPUs, if they can be waited for."""
        reading = Reading()
        if self._events is None:
            time.sleep(seconds)
            return reading
        try:
            data = self._nvml.nvmlEventSetWait_v2(self._events, max(1, int(seconds * 1000)))
        except self._nvml.NVMLError as error:
            if error.value != self._nvml.NVML_ERROR_TIMEOUT:
                logger.warning("events can not be waited for, and are asked for anew: %s", error)
                self._forget_events()
                self._deaf = True
                time.sleep(seconds)
            return reading
        self._on_event(data, reading)
        return reading

    def close(self) -> None:
        """Shut NVML down."""
        if self._up:
            self._shut()

    # NVML as a whole

    def _start(self, now: float, reading: Reading) -> bool:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._put_off(error, now, reading)
            return False
        try:
            count = self._nvml.nvmlDeviceGetCount()
            self._gpus = [self._meet(number) for number in range(count)]
        except self._nvml.NVMLError as error:
            self._up = True
            self._lose(error, now, reading)
            return False
        self._up, self._backoff_s, self._slow_at, self._known = True, BACKOFF_S[0], 0.0, None
        self._listen()
        if self._told is not None and count:
            reading.notices.append(
                Notice(title="NVML answers again", text=f"{count} GPUs are sampled again.", level="INFO")
            )
        self._told = None
        self._note_count(count, reading)
        logger.info("NVML knows %d GPUs", count)
        return True

    def _meet(self, number: int) -> _Gpu:
        gpu = _Gpu(number=number)
        try:
            gpu.handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
            gpu.uuid = _text(self._nvml.nvmlDeviceGetUUID(gpu.handle))
        except self._nvml.NVMLError as error:
            if error.value in _LIBRARY_GONE:
                raise
            logger.warning("GPU %d does not introduce itself: %s", number, error)
        return gpu

    def _recount(self, now: float, reading: Reading) -> None:
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            raise _LibraryGone(error) from error
        reading.values["system/gpu_count"] = count
        if count != len(self._gpus):
            self._shut()
            if not self._start(now, reading):
                self._gpus = []
            self._slow_at = now + self._slow_interval_s

    def _note_count(self, count: int, reading: Reading) -> None:
        reading.values["system/gpu_count"] = count
        if self._count is not None and count != self._count:
            reading.notices.append(
                Notice(
                    title="The number of GPUs changed", text=f"There were {self._count}, now there are {count}."
                )
            )
        self._count = count

    def _lose(self, error: Any, now: float, reading: Reading) -> None:
        self._shut()
        self._put_off(error, now, reading)

    def _put_off(self, error: Any, now: float, reading: Reading) -> None:
        """NVML is away: say so once, and try again later."""
        self._retry_at = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
        if error.value == self._told:
            return
        quiet = self._count is None and error.value in _NO_GPU_HERE
        self._told = None if quiet else error.value
        logger.info("NVML does not answer: %s", error)
        if not quiet:
            hint = " The driver was replaced while it was in use." if error.value == 18 else ""
            text = f"{error}.{hint} The GPUs' metrics have a gap until it answers again."
            reading.notices.append(Notice(title="NVML does not answer", text=text))

    def _shut(self) -> None:
        self._up = False
        self._forget_events()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass  # it is gone already

    def _forget_events(self) -> None:
        events, self._events = self._events, None
        try:
            if events is not None:
                self._nvml.nvmlEventSetFree(events)
        except self._nvml.NVMLError:
            pass  # likewise

    # One GPU

    def _read_gpu(self, gpu: _Gpu, slow: bool, now: float, reading: Reading) -> bool:
        """Ask one GPU everything that is due; whether it answered at all."""
        if gpu.lost and now < gpu.retry_at:
            reading.values[f"{gpu.prefix}lost"] = 1
            return False
        values: dict[str, float] = {}
        try:
            if gpu.lost or gpu.handle is None:
                self._find_again(gpu)
            for name, ask in (*(SLOW if slow else ()), *FAST):
                values |= self._ask(gpu, name, ask)
            values |= self._fields(gpu, slow, now)
            if slow:
                values |= self._processes(gpu)
            values |= self._instances(gpu, slow)
        except _GpuGone as gone:
            self._lose_gpu(gpu, str(gone), now, reading)
            values = {"lost": 1}
        else:
            if values and gpu.lost:
                gpu.lost, gpu.backoff_s, values["lost"] = False, BACKOFF_S[0], 0
                reading.notices.append(Notice(title=f"GPU {gpu.number} is back", text=gpu.uuid, level="INFO"))
        if "power_w" in values and gpu.limit_w:
            values["power_percent"] = 100 * values["power_w"] / gpu.limit_w
        reading.values |= {f"{gpu.prefix}{name}": value for name, value in values.items()}
        return bool(values) and not gpu.lost

    def _find_again(self, gpu: _Gpu) -> None:
        found = self._ask(gpu, "handle", lambda nvml, _: {"": nvml.nvmlDeviceGetHandleByIndex(gpu.number)})
        if not found:
            raise _GpuGone("it can not be found")
        gpu.handle = found[""]
        gpu.uuid = gpu.uuid or _text(self._nvml.nvmlDeviceGetUUID(gpu.handle))

    def _lose_gpu(self, gpu: _Gpu, why: str, now: float, reading: Reading) -> None:
        if not gpu.lost:
            gpu.lost = True
            text = f"{why} ({gpu.uuid}). The other GPUs are sampled on."
            reading.notices.append(Notice(title=f"GPU {gpu.number} is lost", text=text, level="ERROR"))
        gpu.retry_at = now + gpu.backoff_s
        gpu.backoff_s = min(2 * gpu.backoff_s, BACKOFF_S[1])

    def _ask(self, gpu: _Gpu, name: str, ask: Callable[[Any, _Gpu], dict[str, Any]]) -> dict[str, Any]:
        """One question; what goes wrong with it alone is a gap."""
        if name in gpu.never:
            return {}
        try:
            return ask(self._nvml, gpu)
        except self._nvml.NVMLError as error:
            self._judge(gpu, name, error.value)
            return {}

    def _judge(self, gpu: _Gpu, name: str, code: int) -> None:
        if code in _LIBRARY_GONE:
            raise _LibraryGone(self._nvml.NVMLError(code))
        if code in _GPU_GONE:
            raise _GpuGone(str(self._nvml.NVMLError(code)))
        if code in _NEVER:
            gpu.never.add(name)

    def _fields(self, gpu: _Gpu, slow: bool, now: float) -> dict[str, float]:
        """All field values that are due, in one call."""
        all_due = {**FIELDS, **SLOW_FIELDS} if slow else FIELDS
        due = {name: id_ for name, id_ in all_due.items() if name not in gpu.never}
        values: dict[str, float] = {}
        if due and "fields" not in gpu.never:
            got = self._ask(
                gpu, "fields", lambda nvml, _: {"": nvml.nvmlDeviceGetFieldValues(gpu.handle, list(due.values()))}
            )
            for name, value in zip(due, got.get("", ()), strict=False):
                if value.nvmlReturn == self._nvml.NVML_SUCCESS:
                    values |= self._of_field(gpu, name, _number(value), now)
                else:
                    self._judge(gpu, name, value.nvmlReturn)
        if {"energy_j", "fields"} & gpu.never:
            values |= self._ask(gpu, "energy", _energy)
        return values

    def _of_field(self, gpu: _Gpu, name: str, value: float, now: float) -> dict[str, float]:
        value *= _FIELD_SCALES.get(name, 1)
        if name.endswith("_per_s"):
            rate = self._rates.per_s(f"{gpu.prefix}{name}", value, now)
            return {} if rate is None else {name: rate}
        return {name: value}

    def _processes(self, gpu: _Gpu) -> dict[str, float]:
        """How many there are, and what of the GPU's memory each rank holds."""
        got = self._ask(
            gpu, "processes", lambda nvml, _: {"": nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle)}
        )
        if "" not in got:
            return {}
        values: dict[str, float] = {"process_count": len(got[""])}
        if self._owners is None:
            return values
        shares = self._owners.share({it.pid: it.usedGpuMemory or 0 for it in got[""]})
        if shares.foreign is not None:
            values["foreign_process_count"] = shares.foreign
        return values | {f"rank{rank}/memory_bytes": size for rank, size in shares.by_rank.items()}

    def _instances(self, gpu: _Gpu, slow: bool) -> dict[str, float]:
        """The memory of each MIG instance; NVML knows no utilization of them."""
        if slow:
            gpu.instances, gpu.mig = self._find_instances(gpu)
        values: dict[str, float] = {"mig_instances": len(gpu.instances)} if slow and gpu.instances else {}
        for id_, handle in gpu.instances.items():
            memory = self._ask(gpu, f"mig{id_}", _memory_of(handle))
            for info in memory.values():
                values[f"mig{id_}/memory_used_bytes"] = info.used
                values[f"mig{id_}/memory_total_bytes"] = info.total
        return values

    def _find_instances(self, gpu: _Gpu) -> tuple[dict[int, Any], dict[str, int]]:
        mode = self._ask(gpu, "mig", lambda nvml, it: {"": nvml.nvmlDeviceGetMigMode(it.handle)[0]})
        found: dict[int, Any] = {}
        uuids: dict[str, int] = {}
        if mode.get("") != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return found, uuids
        for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle)):
            try:
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, index)
                found[self._nvml.nvmlDeviceGetGpuInstanceId(handle)] = handle
                uuids[_text(self._nvml.nvmlDeviceGetUUID(handle))] = gpu.number
            except self._nvml.NVMLError:
                continue  # there is none of this number
        return found, uuids

    # Events

    def _listen(self) -> None:
        """Register for critical XIDs, where that is supported."""
        self._deaf = False
        if not self._gpus:
            return
        nvml, heard = self._nvml, 0
        try:
            self._events = nvml.nvmlEventSetCreate()
            for gpu in self._gpus:
                try:
                    nvml.nvmlDeviceRegisterEvents(gpu.handle, nvml.nvmlEventTypeXidCriticalError, self._events)
                    heard += 1
                except nvml.NVMLError as error:
                    logger.info("GPU %d tells of no XIDs: %s", gpu.number, error)
        except nvml.NVMLError as error:
            logger.info("NVML tells of no events: %s", error)
        if not heard:
            self._forget_events()

    def _on_event(self, data: Any, reading: Reading) -> None:
        if data.eventType != self._nvml.nvmlEventTypeXidCriticalError:
            return
        xid, gpu = int(data.eventData), self._gpu_of(data.device)
        if gpu is None:
            return
        reading.values[f"{gpu.prefix}xid"] = xid
        now = time.monotonic()
        if now < self._xid_told.get((gpu.number, xid), 0.0):
            return
        self._xid_told[gpu.number, xid] = now + SAME_XID_S
        text = f"{XIDS.get(xid, 'see the driver documentation for what it means')} ({gpu.uuid})."
        level = "WARN" if xid in _BY_APPLICATION else "ERROR"
        reading.notices.append(Notice(title=f"XID {xid} on GPU {gpu.number}", text=text, level=level))

    def _gpu_of(self, handle: Any) -> _Gpu | None:
        """By the handle's address: a GPU that just failed could not be asked."""
        address = ctypes.cast(handle, ctypes.c_void_p).value
        same = (it for it in self._gpus if ctypes.cast(it.handle, ctypes.c_void_p).value == address)
        return next(same, None)


# The questions


def _utilization(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    rates = nvml.nvmlDeviceGetUtilizationRates(gpu.handle)
    return {"utilization": rates.gpu, "memory_utilization": rates.memory}


def _memory(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    """By version 2, which leaves out what the driver keeps for itself; older drivers know only the first."""
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(gpu.handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH):
            raise
        info = nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
    percent = {"memory_percent": 100 * info.used / info.total} if info.total else {}
    return {"memory_used_bytes": info.used, "memory_total_bytes": info.total, **percent}


def _memory_of(handle: Any) -> Callable[[Any, _Gpu], dict[str, Any]]:
    return lambda nvml, _: {"": nvml.nvmlDeviceGetMemoryInfo(handle)}


def _power(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(gpu.handle) / 1000}


def _energy(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"energy_j": nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle) / 1000}


def _temperature(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"temperature_c": nvml.nvmlDeviceGetTemperature(gpu.handle, nvml.NVML_TEMPERATURE_GPU)}


def _sm_clock(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu.handle, nvml.NVML_CLOCK_SM)}


def _memory_clock(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu.handle, nvml.NVML_CLOCK_MEM)}


def _throttle(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    """Under its present name, or the one that older drivers know it by."""
    try:
        mask = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu.handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu.handle)
    return {"throttle_mask": mask} | {f"throttle/{name}": int(bool(mask & bit)) for name, bit in THROTTLES.items()}


def _power_limit(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    gpu.limit_w = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu.handle) / 1000
    return {"power_limit_w": gpu.limit_w}


def _fan(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"fan_percent": nvml.nvmlDeviceGetFanSpeed(gpu.handle)}


def _pstate(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    state = nvml.nvmlDeviceGetPerformanceState(gpu.handle)
    return {"pstate": state} if 0 <= state <= 15 else {}


def _ecc(kind: str, name: str) -> Callable[[Any, _Gpu], dict[str, float]]:
    def ask(nvml: Any, gpu: _Gpu) -> dict[str, float]:
        count = nvml.nvmlDeviceGetTotalEccErrors(gpu.handle, getattr(nvml, kind), nvml.NVML_VOLATILE_ECC)
        return {name: count}

    return ask


def _remapped(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    names = ("remapped_rows_corrected", "remapped_rows_uncorrected", "remap_pending", "remap_failure")
    return dict(zip(names, nvml.nvmlDeviceGetRemappedRows(gpu.handle), strict=True))


def _pcie_generation(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"pcie_generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu.handle)}


def _pcie_width(nvml: Any, gpu: _Gpu) -> dict[str, float]:
    return {"pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu.handle)}


_Questions = tuple[tuple[str, Callable[[Any, _Gpu], dict[str, float]]], ...]

FAST: _Questions = (
    ("utilization", _utilization),
    ("memory", _memory),
    ("power", _power),
    ("temperature", _temperature),
    ("sm_clock", _sm_clock),
    ("memory_clock", _memory_clock),
    ("throttle", _throttle),
)
SLOW: _Questions = (
    ("power_limit", _power_limit),
    ("fan", _fan),
    ("pstate", _pstate),
    ("ecc_corrected", _ecc("NVML_MEMORY_ERROR_TYPE_CORRECTED", "ecc_corrected")),
    ("ecc_uncorrected", _ecc("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "ecc_uncorrected")),
    ("remapped", _remapped),
    ("pcie_generation", _pcie_generation),
    ("pcie_width", _pcie_width),
)
FIELDS: Mapping[str, Any] = {
    "memory_temperature_c": pynvml.NVML_FI_DEV_MEMORY_TEMP,
    "energy_j": pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
}
SLOW_FIELDS: Mapping[str, Any] = {
    "pcie_replays": pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER,
    "pcie_sent_bytes_per_s": pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
    "pcie_received_bytes_per_s": pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES,
    "nvlink_sent_bytes_per_s": (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS),
    "nvlink_received_bytes_per_s": (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS),
}
_FIELD_SCALES = {"energy_j": 1e-3, "nvlink_sent_bytes_per_s": 1024, "nvlink_received_bytes_per_s": 1024}
"""NVML counts mJ and KiB."""
_VALUE_TYPES = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


def _number(value: Any) -> float:
    """A field's value, by the type that it says it has."""
    return float(getattr(value.value, _VALUE_TYPES.get(value.valueType, "ullVal")))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
