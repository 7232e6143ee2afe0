"""What it costs a training to log an image: beside `wandb.log`, and beside copying its bytes.

    python -m tests.benchmarks.media_cost [--quick]

- the daemon is up, and encodes and writes every image; at the end the run must hold them all
- an image is made and logged in the timed call; its pixels are new each time and made before
- candidates take turns in bursts, and each burst waits until the one before has left nothing to be done
- prints a table, writes media_cost.json in the current directory, and exits with 1 if a judged claim fails
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import wandb

import sidestep
from sidestepd import status
from tests.benchmarks.hot_path import _wandb_run
from tests.benchmarks.measuring import (
    BUSY,
    Distribution,
    Judgement,
    busy_elsewhere,
    judge_at_least,
    judge_at_most,
    machine,
    wait_until_quiet,
)
from tests.benchmarks.served import ServedRun

SHAPE = (512, 512)
COPY, SIDESTEP, WANDB = "copying the bytes", "sidestep.log", "wandb.log"
Call = Callable[[Any], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many images: few at a time, since all of them wait in the worker's memory."""

    rounds: int = 12
    burst: int = 20
    slow_burst: int = 5


def main() -> int:
    """Measure, show, write down, judge."""
    parser = argparse.ArgumentParser(description="What logging an image costs a training.")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; judges nothing")
    quick = parser.parse_args().quick
    busy = busy_elsewhere()
    figures, missing = measure(Size(rounds=2, burst=5, slow_burst=2) if quick else Size())
    judgements = [] if quick else judge(figures, missing)
    for name, it in figures.items():
        print(f"{name:20} p25 {it.p25:9.1f}  p50 {it.p50:9.1f}  p99 {it.p99:9.1f} µs  {it.calls} calls")
    for judged in judgements:
        print(judged)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    found = {"quick": quick, "machine": machine(), "busy_elsewhere": busy, "missing": missing}
    found |= {"figures": {name: asdict(it) for name, it in figures.items()}}
    Path("media_cost.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(judged.holds for judged in judgements) else 1


def measure(size: Size) -> tuple[Mapping[str, Distribution], int]:
    """Microseconds of each candidate, and how many records are missing in the end."""
    with tempfile.TemporaryDirectory() as folder, ServedRun(Path(folder)) as served:
        with sidestep.init(), _wandb_run(Path(folder)):
            times = _times(size)
        served.finish()
        ledger = status.report(Path(served.environ["SIDESTEP_RUN_DIR"])).ledger
    return {name: Distribution.of(found) for name, found in times.items()}, ledger.offered - ledger.delivered


def _times(size: Size) -> Mapping[str, array[int]]:
    calls: dict[str, Call] = {
        COPY: lambda pixels: pixels.tobytes(),
        SIDESTEP: lambda pixels: sidestep.log({"image": sidestep.Image(pixels)}),
        WANDB: lambda pixels: wandb.log({"image": wandb.Image(pixels)}),
    }
    generator = np.random.default_rng(0)
    times = {name: array("q") for name in calls}
    for index in range(size.rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            if sidestep.run is not None:
                sidestep.run.flush()
            wait_until_quiet()
            for _ in range(size.slow_burst if name == WANDB else size.burst):
                pixels = generator.integers(0, 256, SHAPE, dtype=np.uint8)
                before = time.perf_counter_ns()
                calls[name](pixels)
                times[name].append(time.perf_counter_ns() - before)
    return times


def judge(figures: Mapping[str, Distribution], missing: int) -> list[Judgement]:
    """The claims that a run of this benchmark confirms or refutes."""
    ours, theirs = figures[SIDESTEP].p50, figures[WANDB].p50
    return [
        judge_at_most("an image of 512x512 bytes, median", ours, 150, "µs"),
        judge_at_least("faster than wandb.log", theirs / ours, 50, "times"),
        judge_at_most("records missing in the run", missing, 0, "records"),
    ]


if __name__ == "__main__":
    sys.exit(main())
