"""What logging tensors costs the caller: CUDA scalars beside `.item()`, a large array, `watch` of a large model.

    python -m tests.benchmarks.tensors [--quick]

- in one process, against a daemon in memory; what is beside one another takes turns
- without a GPU what needs one is left out, and said so
- prints a table, writes tensors.json in the current directory, and exits with 1 if a judged claim fails
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sidestep
from sidestep._run import Run
from sidestep.testing import FakeDaemon, environment
from tests.benchmarks.measuring import machine

SCALARS = 10
GOAL_US = 30.0
"""For 10 CUDA scalars, p50."""
MODEL = (1024, 24)
"""Width and layers of four linear maps each: 100 million parameters."""


def main() -> int:
    """Measure, show, write down, judge."""
    parser = argparse.ArgumentParser(description="What logging tensors costs.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; judges nothing")
    quick = parser.parse_args().quick
    with FakeDaemon() as daemon:
        os.environ.update(environment(daemon, {}))
        run = sidestep.init()
        found = {**of_arrays(run, 3 if quick else 20), **of_watch(run, 3 if quick else 12, small=quick)}
        if torch.cuda.is_available():
            found |= of_cuda(run, 20 if quick else 500)
        else:
            print("no GPU: what is on one is not measured")
        run.finish(timeout=30)
    for name, value in found.items():
        print(f"{name:48} {value:12.1f}")
    Path("tensors.json").write_text(json.dumps({"quick": quick, "machine": machine(), **found}, indent=2) + "\n")
    judged = not quick and torch.cuda.is_available()
    return 1 if judged and found["cuda: log of 10 scalars, p50 (us)"] > GOAL_US else 0


def of_cuda(run: Run, times: int) -> Mapping[str, float]:
    """While the GPU works through a kernel that takes longer than the calls: as in a training that runs ahead."""
    numbers = {f"n{index}": torch.rand((), device="cuda") for index in range(SCALARS)}
    large = torch.randn(1_000_000, device="cuda")
    matrix = torch.randn(2048, 2048, device="cuda")

    def busy() -> None:
        torch.cuda.synchronize()
        for _ in range(20):
            torch.mm(matrix, matrix)

    def items() -> None:
        run.log({name: it.item() for name, it in numbers.items()})

    return {
        **timed("cuda: log of 10 scalars", lambda: run.log(numbers), times, busy),
        **timed("cuda: log of .item() of the same", items, times, busy),
        **timed("cuda: log of 1M elements", lambda: run.log({"h": large}), times, busy),
        **timed("cuda: log of 10 floats", lambda: run.log(dict.fromkeys(numbers, 0.5)), times, busy),
    }


def of_arrays(run: Run, times: int) -> Mapping[str, float]:
    """A million elements on the CPU, beside what wandb does with them."""
    tensor = torch.randn(1_000_000)
    array = tensor.numpy()
    return {
        **timed("cpu: log of a tensor of 1M elements", lambda: run.log({"h": tensor}), times),
        **timed("cpu: log of an array of 1M elements", lambda: run.log({"h": array}), times),
        **timed("cpu: log of Histogram() of the array", lambda: run.log({"h": sidestep.Histogram(array)}), times),
        **timed("cpu: numpy.histogram of the same", lambda: np.histogram(array, bins=32), times),
    }


def of_watch(run: Run, times: int, *, small: bool) -> Mapping[str, float]:
    """Steps of a training that is watched, and at the same time is not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, layers = (64, 2) if small else MODEL
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4 * layers))).to(device)
    inputs = torch.randn(4, width, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    plain: list[float] = []
    hooked: list[float] = []
    counted: list[float] = []
    for _ in range(times):
        plain += once(step)
        run.watch(model, log="all", log_freq=2, idx=0)
        hooked += once(step)  # hooks that count calls
        counted += once(step)  # hooks that count elements
        run.unwatch()
    parameters = sum(it.numel() for it in model.parameters())
    whole = statistics.median(counted) - statistics.median(plain)
    return {
        f"watch, {device}: parameters": parameters,
        f"watch, {device}: a step without (us)": statistics.median(plain),
        f"watch, {device}: hooks at a step not counted (us)": statistics.median(hooked) - statistics.median(plain),
        f"watch, {device}: a step that is counted (us)": whole,
        f"watch, {device}: at every 1000th step, each (us)": whole / 1000,
    }


def timed(
    name: str, call: Callable[[], Any], times: int, before: Callable[[], None] | None = None
) -> dict[str, float]:
    """Median and worst of some calls, in microseconds."""
    call()
    found: list[float] = []
    for _ in range(times):
        if before is not None:
            before()
        found += once(call)
    return {f"{name}, p50 (us)": statistics.median(found), f"{name}, max (us)": max(found)}


def once(call: Callable[[], Any]) -> list[float]:
    """How long one call takes, in microseconds."""
    began = time.perf_counter_ns()
    call()
    return [(time.perf_counter_ns() - began) / 1000]


if __name__ == "__main__":
    sys.exit(main())
