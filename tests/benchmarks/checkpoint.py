"""What it costs a training that a checkpoint of a gigabyte is sent: steps beside it, and memory of the worker.

    python -m tests.benchmarks.checkpoint [--quick] [--megabytes 1024]

- the daemon is up and writes an offline wandb run; in the end the run must hold the checkpoint, with its SHA-256
- steps of 1 ms are taken all the while. The process that sends is stopped and let go on in turns, so that steps
  beside it and steps without it are taken within half a second of each other, on the same machine
- memory is the worker's highest resident set from the call on, above what it was before
- prints a table, writes checkpoint.json in the current directory, and exits with 1 if a judged claim fails
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sidestep
from sidestepd import status
from tests.benchmarks.measuring import (
    BUSY,
    Judgement,
    Slowdown,
    busy_elsewhere,
    judge_at_most,
    machine,
    wait_until_quiet,
)
from tests.benchmarks.served import ServedRun
from tests.benchmarks.workload import Step

MB = 1024 * 1024
SLICE_S, SETTLE_S = 0.4, 0.1
"""So long steps are timed with the one and then with the other; after each change a moment is not."""
DEADLINE_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one checkpoint. `held_s` is from the call to when the run held it."""

    megabytes: int
    call_ms: float
    sent_s: float
    """While the process that sends was let go on."""
    held_s: float
    slowdown: Slowdown | None
    memory_mb: float
    courier_memory_mb: float
    delivered: int
    missing: int
    is_whole: bool


def main() -> int:
    """Measure, show, write down, judge."""
    parser = argparse.ArgumentParser(description="What sending a checkpoint costs a training.")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; judges nothing")
    parser.add_argument("--megabytes", type=int, default=1024)
    options = parser.parse_args()
    busy = busy_elsewhere()
    figures = measure(48 if options.quick else options.megabytes)
    judgements = [] if options.quick else judge(figures)
    for name, value in asdict(figures).items():
        print(f"{name:20} {value}")
    for judged in judgements:
        print(judged)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    found = {"quick": options.quick, "machine": machine(), "busy_elsewhere": busy, "figures": asdict(figures)}
    Path("checkpoint.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(judged.holds for judged in judgements) else 1


def measure(megabytes: int) -> Figures:
    """One checkpoint of so many megabytes."""
    with tempfile.TemporaryDirectory(dir=".") as folder, ServedRun(Path(folder)) as served:
        path, sha256 = Path(folder) / "model.bin", _write(Path(folder) / "model.bin", megabytes)
        run_dir = Path(served.environ["SIDESTEP_RUN_DIR"])
        with sidestep.init() as run:
            step = Step(1)
            found = _send(run, path, step)
            began = time.monotonic()
            while not (status.report(run_dir).artifacts["delivered"]) and time.monotonic() - began < DEADLINE_S:
                step()
                time.sleep(0.02)
            held_s = time.monotonic() - began + found["sent_s"]
        served.finish()
        report = status.report(run_dir)
        return Figures(
            megabytes=megabytes,
            held_s=held_s,
            delivered=report.artifacts["delivered"],
            missing=report.ledger.offered - report.ledger.delivered - sum(report.ledger.dropped.values()),
            is_whole=(run_dir / "artifacts" / sha256).stat().st_size == megabytes * MB,
            **found,
        )


def _send(run: sidestep.Run, path: Path, step: Step) -> dict[str, Any]:
    """Log it, and take steps until the daemon has it."""
    run.log({"warm": 1})
    wait_until_quiet()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is counted from now on
    before, called = _memory_mb("VmRSS"), time.monotonic()
    run.log_artifact(str(path), name="checkpoint", type="model")
    call_ms = (time.monotonic() - called) * 1000
    courier = run._session.lane._courier
    assert courier is not None
    while courier._process is None:
        time.sleep(0.001)
    ratios, times, sent_s, courier_mb = [], [], 0.0, 0.0
    while run.stats().blobs_pending:
        beside = _steps_while(courier._process.pid, signal.SIGCONT, step)
        sent_s += SLICE_S + SETTLE_S
        courier_mb = max(courier_mb, _memory_mb("VmHWM", courier._process.pid))
        alone = _steps_while(courier._process.pid, signal.SIGSTOP, step)
        ratios.append(beside / alone)
        times.append(alone)
    os.kill(courier._process.pid, signal.SIGCONT)
    ratios = ratios[1:-1] if len(ratios) > 4 else ratios  # its start, and where nothing was left to send
    return {
        "call_ms": call_ms,
        "sent_s": sent_s,
        "slowdown": Slowdown.of(ratios, statistics.median(times) * 1e6) if len(ratios) > 1 else None,
        "memory_mb": _memory_mb("VmHWM") - before,
        "courier_memory_mb": courier_mb,
    }


def _steps_while(pid: int, number: signal.Signals, step: Step) -> float:
    """Seconds that a step takes after the process got this signal."""
    os.kill(pid, number)
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        step()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SLICE_S:
        step()
        count += 1
    return (time.perf_counter() - began) / count


def _write(path: Path, megabytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(megabytes):
            piece = os.urandom(MB)
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _memory_mb(what: str, pid: int | str = "self") -> float:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def judge(figures: Figures) -> list[Judgement]:
    """The claims that a run of this benchmark confirms or refutes."""
    slowdown: Mapping[str, Any] = asdict(figures.slowdown) if figures.slowdown else {"percent": float("inf")}
    return [
        judge_at_most("steps slowed while it is sent", slowdown["percent"], 3, "%"),
        judge_at_most("memory of the worker", figures.memory_mb, 64, "MB"),
        judge_at_most("the call", figures.call_ms, 250, "ms"),
        judge_at_most("checkpoints missing in the run", 1 - figures.delivered * figures.is_whole, 0, "artifacts"),
        judge_at_most("records missing in the run", figures.missing, 0, "records"),
    ]


if __name__ == "__main__":
    sys.exit(main())
