"""NVIDIA GPUs, through the real `pynvml`: what they do, how they are, and what befalls them.

    down ──nvmlInit──▶ up ──the library is gone──▶ down, tried again ever later
                        each GPU for itself: ok ◀──▶ lost, tried again ever later

- a failure is a gap in what failed and in nothing else: one metric, one GPU, or all of NVML; never an end
- only "not supported" is remembered, for that metric of that GPU, until NVML is started anew
- a GPU that is lost, an XID, and a changed number of GPUs are told as they happen; what lasts is told once, by
  whichever process
- a process keeps the library that it loaded first: after the driver was replaced only a new one can use NVML
- what is asked of a GPU stands in nvml.py
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from math import isfinite, nan
from typing import Any

import pynvml

from sidestepd.samplers.base import Notice, Rates, Reading, StartAnew
from sidestepd.samplers.gpm import Profile, is_supported
from sidestepd.samplers.nvml import (
    BACKOFF_S,
    FAST,
    FIELDS,
    GPU_GONE,
    LIBRARY_GONE,
    NEVER,
    NOT_AVAILABLE,
    SLOW,
    SLOW_FIELDS,
    TRAFFIC,
    Ask,
    Gpu,
    energy,
    memory_of,
    of_field,
    text,
)
from sidestepd.samplers.owners import Owners
from sidestepd.samplers.told import Told

logger = logging.getLogger("sidestepd.samplers.gpu")

SAME_XID_S = 300.0
"""People hear of the same XID of the same GPU once in this time; the samples hold each."""
PROBE_S = 20.0
"""How long another process may take to see whether NVML works there."""
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


class GpuSampler:
    """All GPUs of this machine."""

    def __init__(
        self,
        *,
        slow_interval_s: float = 30.0,
        owners: Owners | None = None,
        told: Told | None = None,
        nvml: Any = pynvml,
        works_elsewhere: Callable[[], bool] | None = None,
    ) -> None:
        self._nvml = nvml
        self._works_elsewhere = works_elsewhere or _works_elsewhere
        self._owners = owners
        self._slow_interval_s = slow_interval_s
        self._slow_at = 0.0
        self._gpus: list[Gpu] = []
        self._known: dict[str, int] | None = None
        self._rates = Rates()
        self._events: Any = None
        self._deaf = False
        """Waiting for events failed: one GPU may have spoilt it for all."""
        self._xid_told: dict[tuple[int, int], float] = {}
        self._up = False
        self._told = told or Told()
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_S[0]

    def read(self, now: float) -> Reading:
        """What the GPUs do; the slow list too when that is due. Raises StartAnew when only that helps."""
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
            if error.value == self._nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH and self._works_elsewhere():
                raise StartAnew(
                    Notice(
                        title="NVML answers again",
                        text="The driver was replaced. The samplers start anew to use its library.",
                        level="INFO",
                    )
                ) from error
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
        if self._told.nvml is not None and count:
            reading.notices.append(
                Notice(title="NVML answers again", text=f"{count} GPUs are sampled again.", level="INFO")
            )
        self._told.nvml = None
        self._note_count(count, reading)
        logger.info("NVML knows %d GPUs", count)
        return True

    def _meet(self, number: int) -> Gpu:
        gpu = Gpu(number=number)
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
            gpu.uuid = text(self._nvml.nvmlDeviceGetUUID(handle))
            gpu.handle = handle
        except self._nvml.NVMLError as error:
            if error.value in LIBRARY_GONE:
                raise
            logger.warning("GPU %d does not introduce itself: %s", number, error)
        gpu.lost = self._told.is_lost(number, gpu.uuid)
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
        before, self._told.count = self._told.count, count
        if before is not None and count != before:
            what = f"There were {before}, now there are {count}."
            reading.notices.append(Notice(title="The number of GPUs changed", text=what))

    def _lose(self, error: Any, now: float, reading: Reading) -> None:
        self._shut()
        self._put_off(error, now, reading)

    def _put_off(self, error: Any, now: float, reading: Reading) -> None:
        """NVML is away: say so once, and try again later."""
        self._retry_at = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_S[1])
        if error.value == self._told.nvml:
            return
        quiet = self._told.count is None and error.value in _NO_GPU_HERE
        self._told.nvml = None if quiet else error.value
        logger.info("NVML does not answer: %s", error)
        if not quiet:
            replaced = error.value == self._nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
            hint = " The driver was replaced while it was in use." if replaced else ""
            why = f"{error}.{hint} The GPUs' metrics have a gap until it answers again."
            reading.notices.append(Notice(title="NVML does not answer", text=why))

    def _shut(self) -> None:
        self._up = False
        self._forget_events()
        for gpu in self._gpus:
            gpu.forget_profiles()
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

    def _read_gpu(self, gpu: Gpu, slow: bool, now: float, reading: Reading) -> bool:
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
            values |= self._instances(gpu, slow)
            profile = self._profile(gpu)
            values |= self._fields(gpu, slow, now, counted=profile.keys()) | profile
            if slow:
                values |= self._processes(gpu)
        except _GpuGone as gone:
            self._lose_gpu(gpu, str(gone), now, reading)
            values = {"lost": 1}
        else:
            if values and gpu.lost:
                gpu.lost, gpu.backoff_s, values["lost"] = False, BACKOFF_S[0], 0
                self._told.find(gpu.number)
                reading.notices.append(Notice(title=f"GPU {gpu.number} is back", text=gpu.uuid, level="INFO"))
                self._forget_events()  # its own are asked for anew, with the next slow list
                self._deaf = True
        if "power_w" in values and gpu.limit_w:
            values["power_percent"] = 100 * values["power_w"] / gpu.limit_w
        reading.values |= {f"{gpu.prefix}{name}": value for name, value in values.items() if _is_value(value)}
        return bool(values) and not gpu.lost

    def _find_again(self, gpu: Gpu) -> None:
        """By its UUID once that is known: numbers may have moved."""
        ask = self._nvml.nvmlDeviceGetHandleByIndex
        found = self._ask(gpu, "handle", lambda nvml, it: {"": _by_uuid(nvml, it) if it.uuid else ask(it.number)})
        if not found:
            raise _GpuGone("it can not be found")
        gpu.handle = found[""]
        gpu.forget_profiles()  # what was counted in its last life is not to be compared
        if not gpu.uuid:
            said = self._ask(gpu, "uuid", lambda nvml, it: {"": nvml.nvmlDeviceGetUUID(it.handle)})
            gpu.uuid = text(said.get("", ""))

    def _lose_gpu(self, gpu: Gpu, why: str, now: float, reading: Reading) -> None:
        if not gpu.lost:
            gpu.lost = True
            self._told.lose(gpu.number, gpu.uuid)
            what = f"{why} ({gpu.uuid}). The other GPUs are sampled on."
            reading.notices.append(Notice(title=f"GPU {gpu.number} is lost", text=what, level="ERROR"))
        gpu.retry_at = now + gpu.backoff_s
        gpu.backoff_s = min(2 * gpu.backoff_s, BACKOFF_S[1])

    def _ask(self, gpu: Gpu, name: str, ask: Ask) -> dict[str, Any]:
        """One question; what goes wrong with it alone is a gap."""
        if name in gpu.never:
            return {}
        try:
            return ask(self._nvml, gpu)
        except self._nvml.NVMLError as error:
            self._judge(gpu, name, error.value)
            return {}

    def _judge(self, gpu: Gpu, name: str, code: int) -> None:
        if code in LIBRARY_GONE:
            raise _LibraryGone(self._nvml.NVMLError(code))
        if code in GPU_GONE:
            raise _GpuGone(str(self._nvml.NVMLError(code)))
        if code in NEVER:
            gpu.never.add(name)

    def _fields(self, gpu: Gpu, slow: bool, now: float, *, counted: Collection[str]) -> dict[str, float]:
        """All field values that are due, in one call, but for what GPM has `counted`."""
        all_due = {**FIELDS, **SLOW_FIELDS} if slow else FIELDS
        due = {name: id_ for name, id_ in all_due.items() if name not in gpu.never and name not in counted}
        values: dict[str, float] = {}
        if due and "fields" not in gpu.never:
            got = self._ask(
                gpu, "fields", lambda nvml, _: {"": nvml.nvmlDeviceGetFieldValues(gpu.handle, list(due.values()))}
            )
            for name, value in zip(due, got.get("", ()), strict=False):
                if value.nvmlReturn == self._nvml.NVML_SUCCESS:
                    values |= self._of_field(gpu, name, of_field(name, value), now)
                else:
                    self._judge(gpu, name, value.nvmlReturn)
        if {"energy_j", "fields"} & gpu.never:
            values |= self._ask(gpu, "energy", energy)
        return values

    def _of_field(self, gpu: Gpu, name: str, value: float | None, now: float) -> dict[str, float]:
        if value is not None and name in TRAFFIC:
            value = self._rates.per_s(f"{gpu.prefix}{name}", value, now)
        return {} if value is None else {name: value}

    def _processes(self, gpu: Gpu) -> dict[str, float]:
        """How many there are, and what of the GPU's memory each rank holds; with MIG those of its instances."""
        found: dict[int, float] = {}
        for name, handle in [(f"processes{id_}", it) for id_, it in gpu.instances.items()] or [
            ("processes", gpu.handle)
        ]:
            got = self._ask(gpu, name, _processes_on(handle))
            if "" not in got:
                return {}
            for it in got[""]:
                size = nan if it.usedGpuMemory is None else it.usedGpuMemory  # not every driver tells it
                found[it.pid] = found.get(it.pid, 0) + size
        values: dict[str, float] = {"process_count": len(found)}
        if self._owners is None:
            return values
        shares = self._owners.share(found)
        if shares.foreign is not None:
            values["foreign_process_count"] = shares.foreign
        return values | {f"rank{rank}/memory_bytes": size for rank, size in shares.by_rank.items()}

    def _profile(self, gpu: Gpu) -> dict[str, float]:
        """What GPM counted since the last time, of the GPU or of each of its MIG instances."""
        if "gpm" in gpu.never or not (gpu.profiles or self._has_gpm(gpu)):
            return {}
        wanted: set[int | None] = {*gpu.instances} or {None}
        for id_ in gpu.profiles.keys() - wanted:
            gpu.profiles.pop(id_).close()
        values: dict[str, float] = {}
        for id_ in wanted:
            if (profile := gpu.profiles.get(id_)) is None:
                profile = gpu.profiles[id_] = Profile(self._nvml, gpu.handle, id_)
            read = self._ask(gpu, f"gpm of {id_}", lambda *_, of=profile: of.read())
            values |= read if id_ is None else {f"mig{id_}/{name}": value for name, value in read.items()}
        return values

    def _has_gpm(self, gpu: Gpu) -> bool:
        said = self._ask(gpu, "gpm", lambda nvml, it: {"": is_supported(nvml, it.handle)})
        if said.get("") is False:
            gpu.never.add("gpm")
        return bool(said.get(""))

    def _instances(self, gpu: Gpu, slow: bool) -> dict[str, float]:
        """The memory of each MIG instance; what it does, only GPM knows."""
        if slow:
            gpu.instances, gpu.mig = self._find_instances(gpu)
        values: dict[str, float] = {"mig_instances": len(gpu.instances)} if slow and gpu.instances else {}
        for id_, handle in gpu.instances.items():
            memory = self._ask(gpu, f"mig{id_}", memory_of(handle))
            for info in memory.values():
                values[f"mig{id_}/memory_used_bytes"] = info.used
                values[f"mig{id_}/memory_total_bytes"] = info.total
        return values

    def _find_instances(self, gpu: Gpu) -> tuple[dict[int, Any], dict[str, int]]:
        mode = self._ask(gpu, "mig", lambda nvml, it: {"": nvml.nvmlDeviceGetMigMode(it.handle)[0]})
        found: dict[int, Any] = {}
        uuids: dict[str, int] = {}
        if mode.get("") != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return found, uuids
        most = self._ask(gpu, "mig", lambda nvml, it: {"": nvml.nvmlDeviceGetMaxMigDeviceCount(it.handle)})
        for index in range(most.get("", 0)):
            try:
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, index)
                found[self._nvml.nvmlDeviceGetGpuInstanceId(handle)] = handle
                uuids[text(self._nvml.nvmlDeviceGetUUID(handle))] = gpu.number
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
            for gpu in (it for it in self._gpus if it.handle is not None):
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
        what = f"{XIDS.get(xid, 'see the driver documentation for what it means')} ({gpu.uuid})."
        level = "WARN" if xid in _BY_APPLICATION else "ERROR"
        reading.notices.append(Notice(title=f"XID {xid} on GPU {gpu.number}", text=what, level=level))

    def _gpu_of(self, handle: Any) -> Gpu | None:
        """By the handle's address: a GPU that just failed could not be asked."""
        address = ctypes.cast(handle, ctypes.c_void_p).value
        same = (it for it in self._gpus if ctypes.cast(it.handle, ctypes.c_void_p).value == address)
        return next(same, None)


def _by_uuid(nvml: Any, gpu: Gpu) -> Any:
    return nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)


def _processes_on(handle: Any) -> Ask:
    return lambda nvml, _: {"": nvml.nvmlDeviceGetComputeRunningProcesses(handle)}


def _is_value(value: float) -> bool:
    return isfinite(value) and value not in NOT_AVAILABLE


def _works_elsewhere() -> bool:
    """Whether NVML works in a process that loads it now."""
    probe = [sys.executable, "-P", "-c", "import pynvml; pynvml.nvmlInit()"]
    nowhere = subprocess.DEVNULL
    try:
        done = subprocess.run(probe, check=False, timeout=PROBE_S, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
