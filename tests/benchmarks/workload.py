"""Training steps of one millisecond, as one operation or as many, that take a core's caches for themselves.

- an operation multiplies a batch by a weight matrix of its own; all of them together are larger than the
  second-level cache of most cores, so that each step reads them anew from further away
- torch lets go of the GIL in each operation, as it does in a training
"""

from __future__ import annotations

import statistics
import time

import torch

_BATCH, _FEATURES = 64, 512
_ROUNDS = 6


class Step:
    """A step of about `target_us`, in so many operations of equal size."""

    def __init__(self, operations: int, target_us: float = 1000.0) -> None:
        torch.set_num_threads(1)
        self._input = torch.randn(_BATCH, _FEATURES)
        columns = 2000 // operations
        for _ in range(_ROUNDS):
            self._make(operations, columns)
            columns = max(8, round(columns * target_us / self._measured_us()))
        self._make(operations, columns)

    def __call__(self) -> None:
        """Take the step."""
        for weights, output in self._operations:
            torch.mm(self._input, weights, out=output)

    @property
    def bytes(self) -> int:
        """What a step reads and writes."""
        return sum(matrix.nbytes for operation in self._operations for matrix in operation)

    def _make(self, operations: int, columns: int) -> None:
        self._operations = [
            (torch.randn(_FEATURES, columns), torch.empty(_BATCH, columns)) for _ in range(operations)
        ]

    def _measured_us(self) -> float:
        times = []
        for _ in range(40):
            before = time.perf_counter_ns()
            self()
            times.append(time.perf_counter_ns() - before)
        return statistics.median(times) / 1000
