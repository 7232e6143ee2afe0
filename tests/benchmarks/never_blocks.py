"""That `log()` waits for nobody: timed with the daemon up, frozen, killed, absent, and with parts of it broken.

    python -m tests.benchmarks.never_blocks [--calls N]

- each condition is measured in a process of its own, call by call in turns with a control: an empty call, timed
  the same way, and repeated for as long as log() takes at its median
- a frozen daemon has all its processes stopped, after the worker was seen to be connected; so has a killed one
- afterwards `finish()` must return in its time, and say what is not acknowledged
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

import sidestep
from sidestep.spill import private_folder, waiting
from tests.benchmarks.measuring import (
    BUSY,
    Distribution,
    Judgement,
    busy_elsewhere,
    empty_for,
    judge_at_most,
    scalars,
    time_alternating,
    time_calls_between,
)
from tests.benchmarks.served import ServedRun
from tests.benchmarks.workload import Step

SERVED = ("up", "spool slow", "spool disk full", "delivery hung", "wandb-core hung", "frozen", "killed")
CONDITIONS = (*SERVED, "absent", "no address", "outbox full", "spilling", "spill disk full")
ACKNOWLEDGING = ("up", "spool slow", "delivery hung", "wandb-core hung")
"""What is logged in the others is not acknowledged."""
FULL = {"outbox full": "outbox_full", "spill disk full": "spill_failed"}
"""Where each record is dropped, and the reason."""
FINISH_TIMEOUT_S = 1.0
_SLACK_S = 0.5
_TAIL_US = 500.0
_PILOT = 200
_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One condition: how long calls took, and what became of what they said."""

    condition: str
    log: Distribution
    control: Distribution
    offered: int
    acknowledged: int
    pending: int
    dropped: int
    reasons: tuple[str, ...]
    spilled: bool
    finish_s: float
    finish_timeout_s: float
    said: str = ""
    """What the worker's process wrote to stderr."""

    @classmethod
    def from_json(cls, values: dict[str, Any], said: str) -> Self:
        """What the measuring process printed."""
        times = {name: Distribution(**values.pop(name)) for name in ("log", "control")}
        return cls(**times, reasons=tuple(values.pop("reasons")), **values, said=said)

    @property
    def balances(self) -> bool:
        """Whether each record is accounted for."""
        return self.offered == self.acknowledged + self.pending + self.dropped

    @property
    def says_what_is_left(self) -> bool:
        """Whether records that nobody acknowledged are named, by their number."""
        return not self.pending or f"{self.pending} records are not acknowledged" in self.said


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All conditions, and what is claimed of them."""

    cases: tuple[Case, ...]
    judgements: tuple[Judgement, ...]


def measure(calls: int = 20_000) -> Report:
    """Measure each condition, and judge. Raises CalledProcessError if anything raised in a worker."""
    cases = tuple(measured_apart(condition, calls) for condition in CONDITIONS)
    up, *others = cases
    return Report(
        cases=cases, judgements=(*_judge(up, up), *(claim for case in others for claim in _judge(case, up)))
    )


def measured_apart(condition: str, calls: int) -> Case:
    """Measure one condition in a process of its own. Raises CalledProcessError if anything raised there."""
    words = [
        sys.executable,
        "-m",
        "tests.benchmarks.never_blocks",
        "--condition",
        condition,
        "--calls",
        str(calls),
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SIDESTEP_")}
    environ["SIDESTEP_AUTOSTART"] = "0"
    done = subprocess.run(words, cwd=_REPOSITORY, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return Case.from_json(json.loads(done.stdout.splitlines()[-1]), said=done.stderr)


def _judge(case: Case, up: Case) -> Iterator[Judgement]:
    name, tail = case.condition, case.log.tail - case.control.tail
    if name != "up" and name not in FULL:  # there each record is counted as dropped: the tail is what matters
        yield judge_at_most(f"{name}: median over that of up", case.log.p50 / up.log.p50, 3, "times")
    yield judge_at_most(f"{name}: tail above that of the control", tail, _TAIL_US, "µs")
    yield judge_at_most(f"{name}: finish() returns", case.finish_s, case.finish_timeout_s + _SLACK_S, "s")
    yield Judgement(
        claim=f"{name}: finish() says what is not acknowledged, and every record is accounted for",
        measured=f"{case.offered} = {case.acknowledged} + {case.pending} pending + {case.dropped} dropped",
        holds=case.balances and case.says_what_is_left and _as_expected(case),
    )


def _as_expected(case: Case) -> bool:
    """Whether the condition was what it is called."""
    name = case.condition
    return (
        (case.acknowledged == case.offered) == (name in ACKNOWLEDGING)
        and (name not in FULL or FULL[name] in case.reasons)
        and case.spilled == (name == "spilling")
    )


# In a process of its own


def _measure_here(condition: str, calls: int) -> Case:
    step = Step(1, target_us=50.0)
    with _brought_about(condition) as run:
        alike = statistics.median(time_calls_between(run.log, _PILOT, step))
        log, control = time_alternating(run.log, empty_for(alike), calls, step)
        timeout = 5.0 if condition in ACKNOWLEDGING else FINISH_TIMEOUT_S
        spilled = bool(waiting(private_folder()))
        before = time.monotonic()
        run.finish(timeout=timeout)
        finish_s = time.monotonic() - before
        stats = run.stats()
        return Case(
            condition=condition,
            log=Distribution.of(log),
            control=Distribution.of(control),
            offered=stats.offered,
            acknowledged=stats.acknowledged,
            pending=stats.pending,
            dropped=sum(stats.dropped.values()),
            reasons=tuple(stats.dropped),
            spilled=spilled,
            finish_s=finish_s,
            finish_timeout_s=timeout,
        )


@contextmanager
def _brought_about(condition: str) -> Iterator[sidestep.Run]:
    """A run to log into, in this condition."""
    with tempfile.TemporaryDirectory() as folder:
        if condition in SERVED:
            with _served(condition, Path(folder)) as run:
                yield run
        else:
            os.environ["TMPDIR"] = folder
            yield _alone(condition, folder)


@contextmanager
def _served(condition: str, folder: Path) -> Iterator[sidestep.Run]:
    settings = ["intake.commit_interval_s=1"] if condition == "spool slow" else []
    with ServedRun(folder, *settings) as served:
        os.environ["TMPDIR"] = str(folder)
        run = sidestep.init()
        run.log({"connected": True})
        if not run.flush(timeout=30):
            raise RuntimeError("the daemon did not acknowledge while it was up")
        match condition:
            case "frozen":
                served.freeze()
            case "killed":
                served.kill()
            case "spool disk full":
                served.fill_the_disk()
            case "delivery hung":
                served.hang("sidestepd.delivery")
            case "wandb-core hung":
                served.hang("wandb-core")
        yield run


def _alone(condition: str, folder: str) -> sidestep.Run:
    """Nobody listens; and in some conditions memory is full."""
    if condition != "no address":
        os.environ["SIDESTEP_ADDRESS"] = f"ipc://{folder}/nobody.sock"
    if condition in (*FULL, "spilling"):
        os.environ["SIDESTEP_OUTBOX_BYTES"] = str(4 * 1024 * 1024)
    if condition == "outbox full":
        os.environ["SIDESTEP_WHEN_FULL"] = "drop"
    run = sidestep.init()
    if condition == "spill disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if condition == "spilling":
        _fill(run, lambda: bool(waiting(private_folder())))
    elif condition in FULL:
        _fill(run, lambda: FULL[condition] in run.stats().dropped)
    return run


def _fill(run: sidestep.Run, full: Callable[[], bool]) -> None:
    """Log until it is full, also for what is no larger than what is measured."""
    large = {"text": "x" * 10_000}
    while not full():
        run.log(large)
    for data in islice(scalars(), 100):
        run.log(data)


# Words


def show(report: Report) -> None:
    """Print it all."""
    table = Table("daemon", title="log() of 10 scalars, and its control (µs)", title_justify="left")
    for head in ("p50", "p99.9", "max", "control\np99.9", "control\nmax", "finish (s)", "left"):
        table.add_column(head, justify="right")
    for case in report.cases:
        table.add_row(
            case.condition,
            f"{case.log.p50:.2f}",
            f"{case.log.p999:.1f}",
            f"{case.log.max:.0f}",
            f"{case.control.p999:.1f}",
            f"{case.control.max:.0f}",
            f"{case.finish_s:.2f}",
            str(case.pending),
        )
    Console().print(table)
    for it in report.judgements:
        print(it)


def main() -> int:
    """Measure one condition and print it as JSON, or all of them and judge."""
    parser = argparse.ArgumentParser(description="That log() waits for nobody.")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--condition", choices=CONDITIONS, help="measure only this, here, and print JSON")
    options = parser.parse_args()
    if options.condition:
        case = asdict(_measure_here(options.condition, options.calls))
        case.pop("said")
        print(json.dumps(case))
        return 0
    busy = busy_elsewhere()
    report = measure(options.calls)
    show(report)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    return 0 if all(it.holds for it in report.judgements) else 1


if __name__ == "__main__":
    sys.exit(main())
