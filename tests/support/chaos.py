"""A real `sidestep run` of a real command, whose daemon is killed piece by piece; and what the run holds then."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from sidestepd import status
from sidestepd.processes import read_json
from sidestepd.rowlog import RowLogReader
from sidestepd.rundir import RunFile, newest_run_dir
from sidestepd.sinks import wandb_log
from tests.support.daemons import HeldRow, read_jsonl, see_gone
from tests.support.ledgers import assert_all_balance
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
QUICK = {"order.patience_s": 2.0, "delivery.confirm_interval_s": 0.5, "delivery.backoff_s": 0.5}
QUICK["samplers.enabled"] = False  # what is sampled has tests of its own
QUIET = {"SIDESTEP_PROGRAM": "0", "SIDESTEP_CONSOLE": "0"}  # likewise what is printed: records are counted here
ONLINE = {"run.mode": "online", "sink.ask_every_s": 0.5}


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that was killed, and the one that took its place."""

    what: str
    pid: int
    successor: int


@dataclass(slots=True)
class Training:
    """`sidestep run` of a training, from the inside of a `with` to its end."""

    base: Path
    command: Sequence[str]
    sink: str = "wandb"
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    server: StandIn | None = None
    """Where the run goes; offline without one."""
    kills: list[Kill] = field(default_factory=list)
    _supervisor: psutil.Popen | None = None

    def __enter__(self) -> Self:
        chosen = {**QUICK, "sink.kind": self.sink, **(ONLINE if self.server else {}), **self.options}
        settings = [f"{name}={value}" for name, value in chosen.items()]
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_"))}
        own |= QUIET
        self._supervisor = psutil.Popen(
            [sys.executable, "-m", "sidestep", "run", "--dir", str(self.base)]
            + [word for setting in settings for word in ("--set", setting)]
            + ["--", *self.command],
            env=own | (self.server.environment if self.server else {}) | dict(self.environment),
            cwd=ROOT,
            stdout=(self.base / "stdout").open("ab"),
            stderr=(self.base / "stderr").open("ab"),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.supervisor, *self.supervisor.children(recursive=True)]  # so that nobody starts it again
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.supervisor.wait()
        if kind is None:
            assert_all_balance(self.base)

    @property
    def supervisor(self) -> psutil.Popen:
        """The process of `sidestep run`."""
        assert self._supervisor is not None
        return self._supervisor

    @property
    def over(self) -> bool:
        """Whether `sidestep run` has ended."""
        return self.supervisor.poll() is not None

    def wait(self, timeout: float = DEADLINE_S) -> int:
        """Its exit code."""
        try:
            return int(self.supervisor.wait(timeout))
        except psutil.TimeoutExpired:
            raise AssertionError(f"`sidestep run` does not end:\n{self.log()}") from None

    # Its processes

    def find(self, what: str) -> psutil.Process | None:
        """intake, delivery (once it has opened the run), or core."""
        if what == "core":
            return self._core()
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                if f"sidestepd.{what}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process if what != "delivery" or self._has_opened(process) else None
        return None

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found: list[psutil.Process] = self.supervisor.children(recursive=True)
            return found
        return []

    def _about(self) -> Path | None:
        run_dir = newest_run_dir(self.base)
        return run_dir / "about.json" if run_dir else None

    def _has_opened(self, delivery: psutil.Process) -> bool:
        about = self._about()
        return bool(about and about.exists() and about.stat().st_mtime >= delivery.create_time())

    def _core(self) -> psutil.Process | None:
        about, delivery = self._about(), self.find("delivery")
        recorded = read_json(about).get("core") if about and delivery else None
        with contextlib.suppress(psutil.NoSuchProcess):
            if recorded:
                process = psutil.Process(recorded["pid"])
                if process.status() != psutil.STATUS_ZOMBIE and process.ppid() == delivery.pid:
                    return process
        return None

    def wait_for(self, what: str, *, other_than: int | None = None) -> psutil.Process | None:
        """The process, when it is there; None if the run ended first."""

        def found() -> psutil.Process | bool:
            process = self.find(what)
            return process if process is not None and process.pid != other_than else self.over

        process = eventually(found, DEADLINE_S, lambda: f"no {what}:\n{self.log()}")
        return process if isinstance(process, psutil.Process) else None

    def kill(self, what: str) -> bool:
        """SIGKILL one, see it gone, and see another one in its place; False if the run ended first."""
        process = self.wait_for(what)
        if process is None:
            return False
        process.kill()
        see_gone(process)
        successor = self.wait_for(what, other_than=process.pid)
        if successor is None:
            return False
        self.kills.append(Kill(what, process.pid, successor.pid))
        return True

    def wait_for_progress(self) -> None:
        """Until delivery has confirmed further rows, or the run ended."""
        before = self.told().get("rows", 0)
        eventually(
            lambda: self.over or self.told().get("rows", 0) > before,
            DEADLINE_S,
            lambda: f"no progress:\n{self.log()}",
        )

    # What it left

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return eventually(lambda: newest_run_dir(self.base), DEADLINE_S, "no run directory")

    def told(self) -> Mapping[str, Any]:
        """What delivery said of its work last."""
        run_dir = newest_run_dir(self.base)
        ledger: Mapping[str, Any] = RowLogReader(run_dir / "delivery.db").meta("ledger", {}) if run_dir else {}
        return ledger

    def report(self) -> status.Report:
        """What `sidestep status` says."""
        return status.report(self.run_dir)

    def rows(self) -> list[HeldRow]:
        """Every row, over all segments in their order."""
        if self.sink == "jsonl":
            return read_jsonl(self.run_dir)
        if self.server:
            held = self.server.rows(RunFile.read(self.run_dir).id, project="chaos")
            return [HeldRow(row["_step"], row) for row in held]
        segments = wandb_log.segments(self.run_dir / "wandb")
        return [HeldRow(row.step, row.values) for path in segments for row in wandb_log.history(path)]

    def boots(self) -> int:
        """How often intake was started."""
        return self.intake_log().count(": boot ")

    def deaths(self) -> int:
        """How often intake saw its delivery killed."""
        return self.intake_log().count("delivery ended with -9")

    def intake_log(self) -> str:
        """What intake wrote so far."""
        path = self.run_dir / "logs" / "intake.log"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        """The end of what everybody wrote."""
        paths = [self.base / "stderr"]
        if run_dir := newest_run_dir(self.base):
            paths += [run_dir / "logs" / "intake.log", run_dir / "logs" / "delivery.log"]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists())


def training(
    *, ranks: int, steps: int, rate: float = 100.0, pids: Path | None = None, until: Path | None = None
) -> list[str]:
    """The command of a training. With `until` it goes on after its steps until that file is there."""
    words = ["--ranks", str(ranks), "--steps", str(steps), "--rate", str(rate)]
    words += ["--pids", str(pids)] if pids else []
    words += ["--until", str(until)] if until else []
    return [sys.executable, "-m", "tests.support.training", *words]


def steps_taken(until: Path) -> dict[int, int]:
    """How many steps each rank of a training took in the end, where it was told when to end."""
    return {int(path.suffix[1:]): int(path.read_text()) for path in until.parent.glob(f"{until.stem}.*")}


def steps_of_ranks(rows: Sequence[HeldRow]) -> dict[int, list[int]]:
    """What each rank logged as its own, in the order of the rows."""
    found: dict[int, list[int]] = {}
    for row in rows:
        for name, value in row.values.items():
            if name.startswith("mine/rank"):
                found.setdefault(int(name.removeprefix("mine/rank")), []).append(value)
    return found


def duplicates(rows: Sequence[HeldRow]) -> int:
    """How many steps of ranks are there more than once, under whatever name."""
    return sum(
        count - 1
        for rank in range(64)
        for count in Counter(
            row.values[name]
            for row in rows
            for name in (f"mine/rank{rank}", f"mine/rank{rank}.late")
            if name in row.values
        ).values()
    )


def assert_whole(run: Training, *, ranks: int, steps: int | Mapping[int, int]) -> status.Report:
    """Every step of every rank exactly once, `_step` strictly increases, and every record is accounted for."""
    rows, report = run.rows(), run.report()
    taken = dict.fromkeys(range(ranks), steps) if isinstance(steps, int) else steps
    assert {rank: list(range(taken[rank])) for rank in range(ranks)} == steps_of_ranks(rows), run.log()
    assert list(_falls([row.step for row in rows])) == []
    assert (report.ledger.offered, 0, 0) == (report.ledger.delivered, report.ledger.pending, report.ledger.unknown)
    assert ({}, {}) == (_nonzero(report.ledger.dropped), _nonzero(report.ledger.rejected))
    assert report.ledger.balances
    assert report.ledger.offered >= sum(taken.values())
    return report


def _falls(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours that do not increase."""
    return ((before, after) for before, after in itertools.pairwise(steps) if before >= after)


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


__all__ = ["Kill", "Training", "assert_whole", "duplicates", "steps_of_ranks", "steps_taken", "training"]
