"""A device that works through what was enqueued when a test says so. Its tensors are torch's, on the CPU.

Copies and flags are done by `run()`, in their order, with whatever else a test has enqueued between them. What is
computed (stacking, counting) is done at once, as of when it was enqueued, by the code that a GPU runs too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from sidestep.convert.cuda import TorchDevice
from sidestep.staging import Device


class FakeDevice(TorchDevice):
    """A stream. Every tensor that has requires_grad, or was `put` there, is on it."""

    def __init__(self) -> None:
        super().__init__(torch, torch.device("cpu"))
        self.stream: deque[Callable[[], object]] = deque()
        self.is_capturing = False
        self.copies = 0
        self._on_it: list[torch.Tensor] = []

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Have a tensor be on the device."""
        self._on_it.append(tensor)
        return tensor

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A number on the device."""
        return self.put(torch.tensor(value, dtype=dtype))

    def enqueue(self, work: Callable[[], object]) -> None:
        """Have something done after what was enqueued before."""
        self.stream.append(work)

    def run(self, most: int = 1 << 30) -> None:
        """Do what was enqueued."""
        while self.stream and most > 0:
            self.stream.popleft()()
            most -= 1

    def finder(self) -> Callable[[Any], Device | None]:
        """For a session's `devices`."""
        return lambda tensor: self if any(tensor is it for it in self._on_it) else None

    # As a device

    def memory(self, size: int) -> tuple[Any, memoryview]:
        memory = torch.zeros(size, dtype=torch.uint8)
        return memory, memoryview(memory.numpy())

    def capturing(self) -> bool:
        return self.is_capturing

    def copy(self, into: Any, start: int, array: Any) -> int:
        self.copies += 1
        self.enqueue(lambda: super(FakeDevice, self).copy(into, start, array))
        return int(array.numel() * array.element_size())

    def raise_flag(self, into: Any, at: int) -> None:
        self.enqueue(lambda: super(FakeDevice, self).raise_flag(into, at))
