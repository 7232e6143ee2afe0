"""What NVML is asked of one GPU, and how its answers are read.

- each question stands for itself: a function of NVML and a GPU that returns values by our short names, or raises
- nothing is asked for that is known to be slow (PCIe throughput samples 20 ms a call): counters and GPM instead
- NVML says "not available" with a number of ones in some places: that is no value
- no state but the GPU's own, and no judgement: what an error means is decided in gpu.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

from sidestepd.samplers.gpm import Profile
from sidestepd.samplers.names import THROTTLES

ALL_LINKS = 0xFFFFFFFF
NOT_AVAILABLE = frozenset({0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})
BACKOFF_S = (1.0, 60.0)
"""After NVML or a GPU was lost: the first pause and the longest."""

LIBRARY_GONE = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    }
)
GPU_GONE = frozenset(
    {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND}
)
NEVER = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})


@dataclass(slots=True, kw_only=True)
class Gpu:
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
    profiles: dict[int | None, Profile] = field(default_factory=dict)
    """What GPM has counted: of each MIG instance, or of the whole GPU under None."""
    lost: bool = False
    retry_at: float = 0.0
    backoff_s: float = BACKOFF_S[0]

    @property
    def prefix(self) -> str:
        """How its names begin."""
        return f"system/gpu{self.number}/"

    def forget_profiles(self) -> None:
        """Let GPM begin anew."""
        for profile in self.profiles.values():
            profile.close()
        self.profiles.clear()


Answer = dict[str, Any]
Ask = Callable[[Any, Gpu], Answer]
Questions = tuple[tuple[str, Ask], ...]


def _utilization(nvml: Any, gpu: Gpu) -> Answer:
    rates = nvml.nvmlDeviceGetUtilizationRates(gpu.handle)
    return {"utilization": rates.gpu, "memory_utilization_percent": rates.memory}


def _memory(nvml: Any, gpu: Gpu) -> Answer:
    """By version 2, which leaves out what the driver keeps for itself; older drivers know only the first."""
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(gpu.handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH):
            raise
        info = nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
    percent = {"memory_percent": 100 * info.used / info.total} if info.total else {}
    return {"memory_used_bytes": info.used, "memory_total_bytes": info.total, **percent}


def memory_of(handle: Any) -> Ask:
    """The question for the memory of a MIG instance."""
    return lambda nvml, _: {"": nvml.nvmlDeviceGetMemoryInfo(handle)}


def _power(nvml: Any, gpu: Gpu) -> Answer:
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(gpu.handle) / 1000}


def energy(nvml: Any, gpu: Gpu) -> Answer:
    """The counter, where no field value has it."""
    return {"energy_j": nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle) / 1000}


def _temperature(nvml: Any, gpu: Gpu) -> Answer:
    return {"temperature_c": nvml.nvmlDeviceGetTemperature(gpu.handle, nvml.NVML_TEMPERATURE_GPU)}


def _sm_clock(nvml: Any, gpu: Gpu) -> Answer:
    return {"sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu.handle, nvml.NVML_CLOCK_SM)}


def _memory_clock(nvml: Any, gpu: Gpu) -> Answer:
    return {"memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu.handle, nvml.NVML_CLOCK_MEM)}


def _throttle(nvml: Any, gpu: Gpu) -> Answer:
    """Under its present name, or the one that older drivers know it by."""
    try:
        mask = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu.handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu.handle)
    return {"throttle_mask": mask} | {f"throttle/{name}": int(bool(mask & bit)) for name, bit in THROTTLES.items()}


def _power_limit(nvml: Any, gpu: Gpu) -> Answer:
    gpu.limit_w = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu.handle) / 1000
    return {"power_limit_w": gpu.limit_w}


def _fan(nvml: Any, gpu: Gpu) -> Answer:
    return {"fan_percent": nvml.nvmlDeviceGetFanSpeed(gpu.handle)}


def _pstate(nvml: Any, gpu: Gpu) -> Answer:
    state = nvml.nvmlDeviceGetPerformanceState(gpu.handle)
    return {"pstate": state} if 0 <= state <= 15 else {}


def _ecc(kind: str, name: str) -> Ask:
    def ask(nvml: Any, gpu: Gpu) -> Answer:
        count = nvml.nvmlDeviceGetTotalEccErrors(gpu.handle, getattr(nvml, kind), nvml.NVML_VOLATILE_ECC)
        return {name: count}

    return ask


def _remapped(nvml: Any, gpu: Gpu) -> Answer:
    names = ("remapped_rows_corrected", "remapped_rows_uncorrected", "remap_pending", "remap_failure")
    return dict(zip(names, nvml.nvmlDeviceGetRemappedRows(gpu.handle), strict=True))


def _pcie_generation(nvml: Any, gpu: Gpu) -> Answer:
    return {"pcie_generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu.handle)}


def _pcie_width_lanes(nvml: Any, gpu: Gpu) -> Answer:
    return {"pcie_width_lanes": nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu.handle)}


FAST: Questions = (
    ("utilization", _utilization),
    ("memory", _memory),
    ("power", _power),
    ("power_limit", _power_limit),
    ("temperature", _temperature),
    ("sm_clock", _sm_clock),
    ("memory_clock", _memory_clock),
    ("throttle", _throttle),
    ("fan", _fan),
    ("pstate", _pstate),
)
SLOW: Questions = (
    ("ecc_corrected", _ecc("NVML_MEMORY_ERROR_TYPE_CORRECTED", "ecc_corrected")),
    ("ecc_uncorrected", _ecc("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "ecc_uncorrected")),
    ("remapped", _remapped),
    ("pcie_generation", _pcie_generation),
    ("pcie_width_lanes", _pcie_width_lanes),
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
TRAFFIC = tuple(name for name in SLOW_FIELDS if name.endswith("_bytes_per_s"))
"""What counters tell where GPM does not."""
_FIELD_SCALES = {"energy_j": 1e-3, "nvlink_sent_bytes_per_s": 1024, "nvlink_received_bytes_per_s": 1024}
"""NVML counts mJ and KiB."""
_VALUE_TYPES = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
_NARROW = frozenset({1, 5, 6})


def of_field(name: str, value: Any) -> float | None:
    """A field's value in our unit, by the type that it says it has; None if that says nothing.

    A counter of bytes in 32 bits goes round many times between two looks.
    """
    number = getattr(value.value, _VALUE_TYPES.get(value.valueType, "ullVal"))
    if number in NOT_AVAILABLE or (name in TRAFFIC and value.valueType in _NARROW):
        return None
    return float(number * _FIELD_SCALES.get(name, 1))


def text(value: str | bytes) -> str:
    """What NVML calls something, whichever way pynvml gives it."""
    return value.decode() if isinstance(value, bytes) else value
