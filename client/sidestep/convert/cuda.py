"""CUDA through torch, as staging.py wants a device: everything is enqueued on the caller's stream, nothing waits.

- neither memory that is pageable nor a value as an argument is ever copied, since both would wait
- ranges are computed on the device and never read for it: what is counted is first mapped onto [0, 1]
- a GPU that torch was built for as ROCm goes by the same name, and the same way
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sidestep.convert.torch import CHUNK, local, refusal
from sidestep.errors import UnsupportedValue
from sidestep.staging import Device

_INF = float("inf")


class TorchDevice:
    """What of a device is torch's alone, and the same on all of them."""

    def __init__(self, torch: Any, device: Any) -> None:
        self.torch = torch
        self.device = device
        self._ones: dict[Any, Any] = {}

    def numbers(self, tensors: Sequence[Any]) -> Any:
        """One kernel for all that have no dimension."""
        torch = self.torch
        with torch.no_grad():
            return local(torch, torch.stack([it if it.dim() == 0 else it.reshape(()) for it in tensors]))

    def array(self, tensor: Any) -> Any:
        """In the order of its indices. What is enqueued later on this stream, an update of it too, comes later."""
        return tensor.detach().reshape(-1)

    def histogram(self, tensor: Any, bins: int) -> Any:
        """Counted in parts of `CHUNK` elements, so that what is made on the way is bounded."""
        torch = self.torch
        with torch.no_grad():
            parts = tensor.detach().reshape(-1).split(CHUNK)
            spans = torch.stack([self._span(self._floating(part)) for part in parts])
            least, largest, number = spans[:, 0].amin(), spans[:, 1].amax(), spans[:, 2].sum()
            width = largest - least
            counts = sum(self._counts(self._floating(part), least, width, bins) for part in parts)
            return torch.cat([counts, torch.stack([least, largest, number])])

    def _floating(self, part: Any) -> Any:
        torch = self.torch
        if part.dtype in (torch.float32, torch.float64):
            return part
        exact = part.dtype in (torch.int64, torch.uint64, torch.int32, torch.uint32)
        return part.to(torch.float64 if exact else torch.float32)

    def _span(self, part: Any) -> Any:
        """Least, largest and number of what is finite, as float64."""
        torch = self.torch
        least = part.nan_to_num(nan=_INF, posinf=_INF, neginf=_INF).amin()
        largest = part.nan_to_num(nan=-_INF, posinf=-_INF, neginf=-_INF).amax()
        return torch.stack([least.double(), largest.double(), torch.isfinite(part).sum().double()])

    def _counts(self, part: Any, least: Any, width: Any, bins: int) -> Any:
        """How many are in each bin, as float64: what is not finite is in none, nor anything if all are one value.

        Divided, not multiplied by an inverse: so the largest is at exactly 1, and nothing is beyond it.
        """
        torch = self.torch
        placed = (part - least) / width
        if not torch.are_deterministic_algorithms_enabled():
            return torch.histc(placed, bins=bins, min=0.0, max=1.0).double()
        placed = placed.nan_to_num(nan=2.0, posinf=2.0, neginf=2.0).sort().values  # histc would raise
        edges = torch.arange(1, bins, device=part.device, dtype=placed.dtype) / bins
        below = torch.cat([torch.searchsorted(placed, edges), (placed <= 1).sum().reshape(1)])
        return torch.cat([below[:1], below.diff()]).double()

    def copy(self, into: Any, start: int, array: Any) -> int:
        """Into pinned memory, so that it need not wait."""
        raw = array.view(self.torch.uint8)
        size: int = raw.numel()
        into[start : start + size].copy_(raw, non_blocking=True)
        return size

    def raise_flag(self, into: Any, at: int) -> None:
        """A one that is on the device already, copied like everything else."""
        into[at : at + 1].copy_(self._one(), non_blocking=True)

    def _one(self) -> Any:
        return self._kept_one(None)

    def _kept_one(self, stream: Any) -> Any:
        """Made on the stream that it is used on, so that it is there when it is copied."""
        one = self._ones.get(stream)
        if one is None:
            one = self._ones[stream] = self.torch.ones(1, dtype=self.torch.uint8, device=self.device)
        return one


class Cuda(TorchDevice):
    """One GPU."""

    def memory(self, size: int) -> tuple[Any, memoryview]:
        """Pinned, and kept for the life of the process: the GPU may write to it at any time."""
        memory = self.torch.zeros(size, dtype=self.torch.uint8, pin_memory=True)
        return memory, _view(memory)

    def capturing(self) -> bool:
        """Asked of the current stream, without waiting for it."""
        cuda = self.torch.cuda
        if cuda.current_device() == self.device.index:
            return bool(cuda.is_current_stream_capturing())
        with cuda.device(self.device):
            return bool(cuda.is_current_stream_capturing())

    def _one(self) -> Any:
        return self._kept_one(self.torch.cuda.current_stream(self.device).cuda_stream)


def finder() -> Callable[[Any], Device | None]:
    """What says which device a tensor is on: None for host memory; UnsupportedValue if nothing can be staged."""
    known: dict[Any, Cuda] = {}

    def find(tensor: Any) -> Device | None:
        if not tensor.is_cuda:
            if tensor.device.type == "cpu":
                return None
            raise UnsupportedValue(refusal(tensor.device.type))
        index = tensor.device.index
        found = known.get(index)
        if found is None:
            torch = sys.modules["torch"]
            if torch.cuda._is_in_bad_fork():
                raise UnsupportedValue("it is on a GPU, which a forked process can not use")
            found = known.setdefault(index, Cuda(torch, tensor.device))
        return found

    return find


def _view(memory: Any) -> memoryview:
    """The bytes of a tensor in host memory, read without torch."""
    return memoryview((ctypes.c_uint8 * memory.numel()).from_address(memory.data_ptr())).cast("B")
