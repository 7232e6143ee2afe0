"""What a worker costs its process besides the calls: import, init(), memory, threads.

    python -m tests.benchmarks.worker_cost [--times N]

- everything is measured in `--times` fresh processes, one after the other, with a daemon in memory to connect to.
  Of times the shortest is judged, since what else goes on can only add to them; of memory the median
- beside it, in turns, a control: an interpreter that imports what any program does (argparse, logging, json), so
  that a busy machine shows
- memory is what the process has more of (resident) than before the import: after it, after init() and a
  connection, and after 10,000 calls of ten scalars that were acknowledged. Threads are counted then
- in a process that has loaded torch most of the standard library is there already: that is what a training pays,
  and is told too
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from sidestep.testing import FakeDaemon, environment
from tests.benchmarks.measuring import BUSY, Judgement, busy_elsewhere, judge_at_most

IMPORT_MS, INIT_MS, MEMORY_MB, PYTHON_THREADS = 80, 10, 14, 1
HEAVY = ("wandb", "torch", "numpy")
CALLS = 10_000

_WORKER = """
import json, os, sys, threading, time
{before}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
threads, tasks, loaded = threading.active_count(), len(os.listdir("/proc/self/task")), set(sys.modules)
memory = [resident()]
at = [time.perf_counter()]
import sidestep
at.append(time.perf_counter()); memory.append(resident())
heavy = sorted({heavy!r} & (set(sys.modules) - loaded))
run = sidestep.init()
at.append(time.perf_counter())
run.log({{"connected": 1}})
assert run.flush(60)
memory.append(resident())
while any(thread.name == "sidestep-program" for thread in threading.enumerate()):  # it ends by itself, and soon
    time.sleep(0.01)
for call in range({calls}):
    run.log({{f"train/metric_{{index}}": call / (index + 3) for index in range(10)}})
assert run.flush(60)
memory.append(resident())
print(json.dumps({{
    "import_ms": 1000 * (at[1] - at[0]), "init_ms": 1000 * (at[2] - at[1]),
    "memory_mb": [after - memory[0] for after in memory[1:]], "heavy": heavy,
    "python_threads": threading.active_count() - threads, "threads": len(os.listdir("/proc/self/task")) - tasks,
}}))
"""
_CONTROL = """
import time
before = time.perf_counter()
import argparse, json, logging
print(1000 * (time.perf_counter() - before))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The shortest times, and medians of memory, over processes.

    `memory_mb` is after the import, after init() and a connection, and after calls.
    """

    import_ms: float
    init_ms: float
    memory_mb: tuple[float, float, float]
    python_threads: int
    threads: int
    heavy: tuple[str, ...]

    @classmethod
    def of(cls, told: Sequence[dict[str, Any]]) -> Cost:
        """What each process told, in one."""

        memory = [statistics.median(one["memory_mb"][index] for one in told) for index in range(3)]
        return cls(
            import_ms=min(one["import_ms"] for one in told),
            init_ms=min(one["init_ms"] for one in told),
            memory_mb=(memory[0], memory[1], memory[2]),
            python_threads=max(one["python_threads"] for one in told),
            threads=max(one["threads"] for one in told),
            heavy=tuple(sorted({name for one in told for name in one["heavy"]})),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The cost in a bare interpreter, in one with torch, and how long the control's import took."""

    bare: Cost
    with_torch: Cost
    control_ms: float
    judgements: tuple[Judgement, ...]


def measure(times: int = 11) -> Report:
    """Measure, and judge. Raises CalledProcessError if a worker failed."""
    bare, torch, controls = [], [], []
    with tempfile.TemporaryDirectory() as folder, FakeDaemon() as daemon:
        environ = environment(
            daemon, {name: it for name, it in os.environ.items() if not name.startswith("SIDESTEP")}
        ) | {"TMPDIR": folder}  # where nobody left anything
        _worker(environ, "")  # whatever is compiled or cached, is then
        for _ in range(times):
            controls.append(float(_python(_CONTROL, environ)))
            bare.append(_worker(environ, ""))
            torch.append(_worker(environ, "import torch"))
    cost = Cost.of(bare)
    return Report(
        bare=cost,
        with_torch=Cost.of(torch),
        control_ms=min(controls),
        judgements=tuple(_judge(cost)),
    )


def _judge(cost: Cost) -> list[Judgement]:
    loaded = ", ".join(cost.heavy) or "none"
    return [
        judge_at_most("import sidestep", cost.import_ms, IMPORT_MS, "ms"),
        Judgement(claim=f"it loads none of {', '.join(HEAVY)}", measured=loaded, holds=not cost.heavy),
        judge_at_most("init()", cost.init_ms, INIT_MS, "ms"),
        judge_at_most("resident memory, connected", cost.memory_mb[1], MEMORY_MB, "MB"),
        judge_at_most("threads of Python", cost.python_threads, PYTHON_THREADS, "more"),
    ]


def _worker(environ: dict[str, str], before: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(
        _python(_WORKER.format(before=before, heavy=set(HEAVY), calls=CALLS), environ)
    )
    return told


def _python(code: str, environ: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    ).stdout


def show(report: Report) -> None:
    """Print it all."""
    table = Table("in a process", title="what a worker costs", title_justify="left")
    for head in (
        "import\nms", "init()\nms", "imported\nMB", "connected\nMB", "logged\nMB",
        "Python\nthreads", "all\nthreads",
    ):  # fmt: skip
        table.add_column(head, justify="right")
    for name, cost in (("bare", report.bare), ("with torch", report.with_torch)):
        table.add_row(
            name,
            f"{cost.import_ms:.1f}",
            f"{cost.init_ms:.1f}",
            *(f"{it:.1f}" for it in cost.memory_mb),
            str(cost.python_threads),
            str(cost.threads),
        )
    table.add_row("the control", f"{report.control_ms:.1f}")
    Console().print(table)
    for it in report.judgements:
        print(it)


def main() -> int:
    """Measure, show, judge."""
    parser = argparse.ArgumentParser(description="What a worker costs its process.")
    parser.add_argument("--times", type=int, default=11, help="processes of each kind")
    options = parser.parse_args()
    busy = busy_elsewhere()
    report = measure(options.times)
    show(report)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    return 0 if all(it.holds for it in report.judgements) else 1


if __name__ == "__main__":
    sys.exit(main())
