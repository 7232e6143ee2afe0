"""What NVIDIA's GPM counts on Hopper and later: how much of a GPU, or of a MIG instance, was at work.

- a value is of the whole time between two samples, not of a moment; the first sample tells nothing yet
- a metric that is not supported is not asked for again; what fails otherwise is tried again
- samples are memory of NVML's: they are given back before it is shut down
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import pynvml

MIB = float(1 << 20)

METRICS: Mapping[str, tuple[int, float]] = {
    "sm_active_percent": (pynvml.NVML_GPM_METRIC_SM_UTIL, 1.0),
    "sm_occupancy_percent": (pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, 1.0),
    "tensor_active_percent": (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, 1.0),
    "tensor_hmma_active_percent": (pynvml.NVML_GPM_METRIC_HMMA_TENSOR_UTIL, 1.0),
    "dram_active_percent": (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, 1.0),
    "fp64_active_percent": (pynvml.NVML_GPM_METRIC_FP64_UTIL, 1.0),
    "fp32_active_percent": (pynvml.NVML_GPM_METRIC_FP32_UTIL, 1.0),
    "fp16_active_percent": (pynvml.NVML_GPM_METRIC_FP16_UTIL, 1.0),
    "pcie_sent_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, MIB),
    "pcie_received_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, MIB),
    "nvlink_sent_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, MIB),
    "nvlink_received_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, MIB),
}
"""Our names, GPM's numbers, and what makes its unit ours: it counts traffic in MiB/s."""
OF_INSTANCES = ("sm_active_percent", "sm_occupancy_percent", "tensor_active_percent", "dram_active_percent")
"""Those that are told of a MIG instance."""


def is_supported(nvml: Any, handle: Any) -> bool:
    """Whether a GPU has GPM at all."""
    return bool(nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)


class Profile:
    """One GPU's two newest samples, or those of its MIG instance with the id `instance`."""

    def __init__(self, nvml: Any, handle: Any, instance: int | None = None) -> None:
        self._nvml, self._handle, self._instance = nvml, handle, instance
        self._names = list(METRICS if instance is None else OF_INSTANCES)
        self._last: Any = None
        self._spare: Any = None
        self._question = nvml.c_nvmlGpmMetricsGet_t(version=nvml.NVML_GPM_METRICS_GET_VERSION)

    def read(self) -> dict[str, float]:
        """What was so since this was asked last. Raises NVMLError."""
        nvml = self._nvml
        if self._spare is None:
            self._spare = nvml.nvmlGpmSampleAlloc()
        if self._instance is None:
            nvml.nvmlGpmSampleGet(self._handle, self._spare)
        else:
            nvml.nvmlGpmMigSampleGet(self._handle, self._instance, self._spare)
        before, self._last, self._spare = self._last, self._spare, self._last
        return {} if before is None else self._between(before, self._last)

    def _between(self, before: Any, after: Any) -> dict[str, float]:
        question, names = self._question, self._names
        question.sample1, question.sample2, question.numMetrics = before, after, len(names)
        for place, name in enumerate(names):
            question.metrics[place].metricId = METRICS[name][0]
        self._nvml.nvmlGpmMetricsGet(question)
        values: dict[str, float] = {}
        for place, name in enumerate(names):
            metric = question.metrics[place]
            if metric.nvmlReturn == self._nvml.NVML_SUCCESS and isfinite(metric.value):
                values[name] = metric.value * METRICS[name][1]
            elif metric.nvmlReturn == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                self._names = [it for it in self._names if it != name]
        return values

    def close(self) -> None:
        """Give the samples back."""
        samples, self._last, self._spare = (self._last, self._spare), None, None
        for sample in samples:
            try:
                if sample is not None:
                    self._nvml.nvmlGpmSampleFree(sample)
            except self._nvml.NVMLError:
                pass  # NVML is gone already
