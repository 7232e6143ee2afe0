"""Read back what a run of the digits examples holds, and say what is wrong with it.

    python inspect_run.py RUN_DIR

- every `.wandb` segment counts: a daemon that was killed on the way leaves one for each of its lives
- what is expected is taken from the run's own config (steps, batch size, ranks), not from this file
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sidestepd import status
from sidestepd.sinks import wandb_log

AXES = ("global_step", "eval/step")
SAMPLED = ("system/", "sidestep/")


@dataclass(slots=True, kw_only=True)
class Contents:
    """What the segments of one run hold, together. Rows are `name: value`, in the order they were written."""

    segments: int = 0
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    """Each defined name, as wandb was told it, and the metric it is plotted against ("" if none)."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def column(self, name: str) -> list[Any]:
        """The values of one metric, in the order they were written."""
        return [row[name] for row in self.rows if name in row]

    def names(self) -> list[str]:
        """Every name in any row, in order of the alphabet, but for wandb's own."""
        return sorted({name for row in self.rows for name in row if not name.startswith("_")})


def read_run(run_dir: Path) -> Contents:
    """Everything in a run directory's `.wandb` files, oldest first."""
    found = Contents()
    for segment in wandb_log.segments(run_dir / "wandb"):
        found.segments += 1
        found.rows += [{**row.values, "_step": row.step} for row in wandb_log.history(segment)]
        for record in wandb_log.records(segment):
            _fold(record, found)
    return found


def check_run(run_dir: Path) -> list[str]:
    """Every promise that the run breaks, one line each; empty for a run that is whole."""
    if not wandb_log.segments(run_dir / "wandb"):
        return [f"there is no .wandb file in {run_dir}"]
    found, ledger = read_run(run_dir), status.report(run_dir).ledger
    missing = [name for name in ("steps", "batch_size", "world_size") if name not in found.config]
    if missing:
        return [f"config lacks {', '.join(missing)}"]
    return [
        *_steps_that_go_back(found),
        *_training_steps(found),
        *_ranks(found),
        *_rows_without_an_axis(found),
        *_definitions(found),
        *_evaluation(found),
        *([] if found.exit_code == 0 else [f"exit code is {found.exit_code}, not 0"]),
        *([] if ledger.balances else [f"the ledger does not balance: {ledger}"]),
        *([] if ledger.offered == ledger.delivered else [f"not everything was delivered: {ledger}"]),
    ]


def _fold(record: Any, found: Contents) -> None:
    """Take over what a record says beside the history."""
    if record.HasField("run"):
        found.config |= _items(record.run.config.update)
        found.summary |= _items(record.run.summary.update)
    if record.HasField("config"):
        found.config |= _items(record.config.update)
    if record.HasField("summary"):
        found.summary |= _items(record.summary.update)
    if record.HasField("metric"):
        found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    if record.HasField("exit"):
        found.exit_code = record.exit.exit_code


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _steps_that_go_back(found: Contents) -> Iterator[str]:
    steps = found.column("_step")
    for before, after in pairwise(steps):
        if after <= before:
            yield f"_step goes from {before} to {after}"


def _training_steps(found: Contents) -> Iterator[str]:
    steps = Counter(row["global_step"] for row in found.rows if "train/loss" in row and "global_step" in row)
    wanted = range(found.config["steps"])
    if lost := [step for step in wanted if step not in steps]:
        yield f"{len(lost)} training steps are missing, the first is {lost[0]}"
    if twice := [step for step, count in steps.items() if count > 1]:
        yield f"{len(twice)} training steps are there more than once, the first is {twice[0]}"
    if strange := steps.keys() - set(wanted):
        yield f"{len(strange)} training steps were never taken, such as {min(strange)}"


def _ranks(found: Contents) -> Iterator[str]:
    world = found.config["world_size"]
    samples = found.config["batch_size"] * world
    own = [f"train/step_time_s/rank{rank}" for rank in range(world)]
    rows = [row for row in found.rows if "train/loss" in row]
    if unsummed := [row for row in rows if row.get("train/samples") != samples]:
        got, step = unsummed[0].get("train/samples"), unsummed[0]["_step"]
        yield f"train/samples is {got} at _step {step}, not the {samples} of {world} ranks: {len(unsummed)} rows"
    if alone := [row for row in rows if not all(name in row for name in own)]:
        yield f"{len(alone)} rows lack one of {', '.join(own)}, the first is _step {alone[0]['_step']}"


def _rows_without_an_axis(found: Contents) -> Iterator[str]:
    for row in found.rows:
        if not any(axis in row for axis in AXES):
            yield f"_step {row['_step']} has neither {' nor '.join(AXES)}"


def _definitions(found: Contents) -> Iterator[str]:
    for name in found.axes:
        if "*" in name:
            yield f"wandb was given the pattern {name!r}"
    for name in found.names():
        axis = "eval/step" if name.startswith("eval/") else "global_step"
        if name not in found.axes:
            yield f"{name} is not defined"
        elif name.startswith(SAMPLED) and not found.axes[name]:
            continue  # what is read of the machine is on no axis of the training, but on `_step`
        elif name not in AXES and found.axes[name] != axis:
            yield f"{name} is plotted against {found.axes[name] or 'nothing'}, not {axis}"


def _evaluation(found: Contents) -> Iterator[str]:
    steps, accuracies = found.column("eval/step"), found.column("eval/accuracy")
    if not steps or steps != sorted(set(steps)):
        yield f"the evaluated checkpoints are {steps}"
    if len(accuracies) != len(steps) or not all(0.5 < accuracy <= 1 for accuracy in accuracies):
        yield f"eval/accuracy is {accuracies}"
    wanted = {
        "best_accuracy": max(accuracies, default=None),
        "eval/accuracy": accuracies[-1] if accuracies else None,
    }
    for name, value in wanted.items():
        if found.summary.get(name) != value:
            yield f"summary says {name} = {found.summary.get(name)}, not {value}"


if __name__ == "__main__":
    problems = check_run(Path(sys.argv[1]))
    print("\n".join(problems) or "whole")
    sys.exit(bool(problems))
