"""What `log()` costs a training: beside `wandb.log`, `SummaryWriter` and no logging, in one run of one process.

    python -m tests.benchmarks.hot_path [--quick]

- the daemon is up and writes every row that was logged; at the end the run must hold them all
- candidates take turns in short blocks, and each block waits until the one before has left nothing to be done
- prints tables, writes bench.json in the current directory, and exits with 1 if a judged claim fails
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import wandb
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

import sidestep
from sidestepd import status
from tests.benchmarks.measuring import (
    BUSY,
    Call,
    Distribution,
    Judgement,
    Slowdown,
    busy_elsewhere,
    judge_at_least,
    judge_at_most,
    machine,
    measure_slowdown,
    nothing,
    time_calls,
    time_calls_between,
    wait_until_quiet,
)
from tests.benchmarks.served import ServedRun
from tests.benchmarks.workload import Step

NOTHING, SIDESTEP, WANDB, TENSORBOARD = "no logging", "sidestep.log", "wandb.log", "SummaryWriter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. Calls of the slow candidates are fewer: each takes as long as hundreds of ours."""

    rounds: int = 20
    burst: int = 2000
    slow_burst: int = 200
    steps: int = 50
    pairs: int = 80
    slow_pairs: int = 12
    steps_per_block: int = 100


QUICK = Size(rounds=2, burst=200, slow_burst=20, steps=10, pairs=4, slow_pairs=4, steps_per_block=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, by candidate; slowdowns by the step's shape first."""

    back_to_back: Mapping[str, Distribution]
    between_steps: Mapping[str, Distribution]
    slowdown: Mapping[str, Mapping[str, Slowdown]]
    step_bytes: Mapping[str, int]
    """What a step of each shape reads and writes."""
    lost: int = 0
    """Records offered to sidestep that are not in the run."""

    def cost(self, of: str, where: str, quantile: str = "p50") -> float:
        """What a candidate takes in microseconds, without what timing an empty call takes."""
        found: Mapping[str, Distribution] = getattr(self, where)
        return max(getattr(found[of], quantile) - getattr(found[NOTHING], quantile), 0.001)

    def times_faster(self, where: str, quantile: str = "p50") -> float:
        """How many of our calls fit into one of wandb's."""
        return self.cost(WANDB, where, quantile) / self.cost(SIDESTEP, where, quantile)


def main() -> int:
    """Measure, show, write down, judge."""
    parser = argparse.ArgumentParser(description="What log() costs a training.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; judges nothing")
    quick = parser.parse_args().quick
    busy = busy_elsewhere()
    figures = measure(QUICK if quick else Size())
    judgements = [] if quick else judge(figures)
    show(figures, judgements)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    found = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "machine": machine(),
        "busy_elsewhere": busy,
        **asdict(figures),
        "judged": [asdict(it) for it in judgements],
    }
    Path("bench.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(it.holds for it in judgements) else 1


def measure(size: Size) -> Figures:
    """All figures, from one process and one run."""
    shapes = {"one operation of 1 ms": Step(1), "twenty of 50 µs": Step(20)}
    with tempfile.TemporaryDirectory() as folder, ServedRun(Path(folder)) as served:
        with candidates(Path(folder)) as calls:
            figures = Figures(
                slowdown={shape: _slowdowns(calls, step, size) for shape, step in shapes.items()},
                between_steps=_between_steps(calls, next(iter(shapes.values())), size),
                back_to_back=_back_to_back(calls, size),
                step_bytes={shape: step.bytes for shape, step in shapes.items()},
            )
        served.finish()
        ledger = status.report(Path(served.environ["SIDESTEP_RUN_DIR"])).ledger
        return replace(figures, lost=ledger.offered - ledger.delivered)


@contextmanager
def candidates(folder: Path) -> Iterator[Mapping[str, Call]]:
    """What is compared, ready to be called; the control is the first."""
    with ExitStack() as stack:
        stack.enter_context(sidestep.init())
        stack.enter_context(_wandb_run(folder))
        writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))
        yield {
            NOTHING: nothing,
            SIDESTEP: sidestep.log,
            WANDB: wandb.log,
            TENSORBOARD: _through(writer),
        }


def _wandb_run(folder: Path) -> wandb.Run:
    """An offline run with everything switched off that is no history."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    settings = wandb.Settings(
        console="off",
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        save_code=False,
        silent=True,
    )
    return wandb.init(mode="offline", dir=folder, settings=settings)


def _through(writer: SummaryWriter) -> Call:
    step = 0

    def add_scalars(data: dict[str, float]) -> None:
        nonlocal step
        for name, value in data.items():
            writer.add_scalar(name, value, step)
        step += 1

    return add_scalars


# Measuring


def _back_to_back(calls: Mapping[str, Call], size: Size) -> dict[str, Distribution]:
    times = {name: array("q") for name in calls}
    for name in _in_turns(calls, size.rounds):
        count = size.burst if name in (NOTHING, SIDESTEP) else size.slow_burst
        _settle()
        times[name] += time_calls(calls[name], count)
    return {name: Distribution.of(found) for name, found in times.items()}


def _between_steps(calls: Mapping[str, Call], step: Step, size: Size) -> dict[str, Distribution]:
    times = {name: array("q") for name in calls}
    for name in _in_turns(calls, size.rounds):
        _settle()
        times[name] += time_calls_between(calls[name], size.steps, step)
    return {name: Distribution.of(found) for name, found in times.items()}


def _slowdowns(calls: Mapping[str, Call], step: Step, size: Size) -> dict[str, Slowdown]:
    """Of each candidate; that of no logging shows what the method itself makes of nothing."""
    return {
        name: measure_slowdown(
            calls[name],
            step,
            pairs=size.pairs if name == SIDESTEP else size.slow_pairs,
            steps=size.steps_per_block,
            settle=_settle,
        )
        for name in calls
    }


def _in_turns(calls: Mapping[str, Call], rounds: int) -> Iterator[str]:
    """Every candidate once a round, each time from the other end."""
    for index in range(rounds):
        yield from list(calls)[:: -1 if index % 2 else 1]


def _settle() -> None:
    """Let daemons, and what they were given, come to rest."""
    if sidestep.run is not None:
        sidestep.run.flush()
    wait_until_quiet()


# Judging


def judge(figures: Figures) -> list[Judgement]:
    """The claims that a run of this benchmark confirms or refutes."""
    medians = f"medians: {figures.times_faster('between_steps'):.0f} times"
    return [
        judge_at_most("10 scalars, back to back, median", figures.cost(SIDESTEP, "back_to_back"), 2, "µs"),
        judge_at_least("faster than wandb.log back to back", figures.times_faster("back_to_back"), 100, "times"),
        judge_at_least(
            f"faster than wandb.log between steps, lower quartiles ({medians})",
            figures.times_faster("between_steps", "p25"),
            50,
            "times",
        ),
        *(
            judge_at_most(f"steps slowed, {shape}", found[SIDESTEP].percent, 2, "%")
            for shape, found in figures.slowdown.items()
        ),
        judge_at_most("records missing in the run", figures.lost, 0, "records"),
    ]


def show(figures: Figures, judgements: list[Judgement]) -> None:
    """Print it all."""
    console = Console()
    console.print(_times_table("10 scalars, back to back (µs per call)", figures.back_to_back))
    console.print(_times_table("10 scalars, between training steps of 1 ms (µs per call)", figures.between_steps))
    console.print(_slowdown_table(figures.slowdown))
    for it in judgements:
        print(it)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


def _times_table(title: str, found: Mapping[str, Distribution]) -> Table:
    table = Table("", title=title, title_justify="left")
    for head in ("p25", "p50", "p99", "p99.9", "max", "calls"):
        table.add_column(head, justify="right")
    for name, it in found.items():
        cells = (
            f"{it.p25:.2f}",
            f"{it.p50:.2f}",
            f"{it.p99:.2f}",
            f"{it.p999:.1f}",
            f"{it.max:.0f}",
            str(it.calls),
        )
        table.add_row(name, *cells)
    return table


def _slowdown_table(found: Mapping[str, Mapping[str, Slowdown]]) -> Table:
    table = Table("", title="training steps of 1 ms, slowed by one call each (%)", title_justify="left")
    for shape in found:
        table.add_column(shape, justify="right")
    for name in next(iter(found.values())):
        cells = [found[shape][name] for shape in found]
        table.add_row(name, *(f"{it.percent:+.2f} ± {it.error:.2f}" for it in cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
