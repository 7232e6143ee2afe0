"""torch's caching allocator in this process: what it holds, read without touching the GPU.

- torch is never imported, and CUDA never initialised: where the training has not done it there is nothing to read
- nothing here waits for a GPU: the allocator keeps its figures in host memory
- the sender's thread has a current device of its own, so every device that the allocator has used is told of
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FIGURES = {
    "memory_allocated": "allocated_bytes.all.current",
    "memory_reserved": "reserved_bytes.all.current",
    "memory_allocated_peak_bytes": "allocated_bytes.all.peak",
    "memory_reserved_peak_bytes": "reserved_bytes.all.peak",
    "memory_active_bytes": "active_bytes.all.current",
    "memory_inactive_split_bytes": "inactive_split_bytes.all.current",
    "alloc_retries": "num_alloc_retries",
    "alloc_ooms": "num_ooms",
}
"""Our names, and torch's."""


class Allocator:
    """What to say of it. `modules` are those that are loaded, `environ` is what CUDA was started with."""

    def __init__(self, modules: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._modules = modules
        self._environ = environ
        self._uuids: dict[int, str | None] = {}

    def read(self) -> list[dict[str, Any]]:
        """One reading for each device in use; none where torch or CUDA is not up, or fails to say."""
        torch = self._modules.get("torch")
        try:
            cuda = getattr(torch, "cuda", None)
            if cuda is None or not cuda.is_initialized():
                return []
            return list(self._readings(cuda))
        except (AttributeError, RuntimeError, AssertionError, TypeError, ValueError):
            return []  # half imported, or CUDA has failed: that is not for this thread to find out

    def _readings(self, cuda: Any) -> Iterator[dict[str, Any]]:
        for ordinal in range(cuda.device_count()):
            stats = cuda.memory_stats(ordinal)
            values = {ours: int(stats[theirs]) for ours, theirs in FIGURES.items() if theirs in stats}
            if values.get("memory_reserved_peak_bytes", 0) > 0:
                yield {
                    "values": values,
                    "ordinal": ordinal,
                    "device": self._uuid(cuda, ordinal),
                    "visible": self._environ.get("CUDA_VISIBLE_DEVICES"),
                }

    def _uuid(self, cuda: Any, ordinal: int) -> str | None:
        """The device's UUID as NVML says it, where this torch knows it."""
        if ordinal not in self._uuids:
            uuid = getattr(cuda.get_device_properties(ordinal), "uuid", None)
            text = None if uuid is None else str(uuid)
            self._uuids[ordinal] = text if text is None or text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"
        return self._uuids[ordinal]
