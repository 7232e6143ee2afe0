"""A real intake that serves the runs its workers name, and what a test wants of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from sidestep.wire import NO_SESSION, RunInfo, Status
from sidestepd import status
from sidestepd.config import Config
from sidestepd.home import ServiceHome
from tests.support.daemons import DEADLINE_S, RawWorker, read_jsonl
from tests.support.ledgers import assert_all_balance
from tests.support.waiting import eventually

QUICK = {
    "order.patience_s": 0.5,
    "delivery.confirm_interval_s": 0.1,
    "delivery.backoff_s": 0.5,
    "serve.linger_s": 0.3,
    "sink.kind": "jsonl",
    "samplers.enabled": False,  # what is sampled has tests of its own
}


class Service:
    """A service's directory, and the intake process that serves it while it is started.

    Options are named `section__option`.
    """

    def __init__(self, base: Path, *, until_idle: bool = False, **options: Any) -> None:
        overrides = {name.replace("__", "."): value for name, value in options.items()}
        config = Config.load(environ={}, overrides={**QUICK, "run.dir": str(base), **overrides})
        self.base = base
        self.home = ServiceHome(config, until_idle=until_idle)
        self.home.begin()
        self.address = self.home.address
        self.process: subprocess.Popen[bytes] | None = None
        self._workers: list[RawWorker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.leave()
        self.kill()
        Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)
        if kind is None:
            assert_all_balance(self.base)

    def start(self) -> Self:
        """Start intake, and see it answer."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_"))}
        with (self.home.directory / "logs" / "intake.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidestepd.intake", str(self.home.directory)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.status()
        return self

    def kill(self) -> None:
        """SIGKILL, and everything that it started goes with it."""
        if self.process is not None and self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=DEADLINE_S)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        assert self.process is not None
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"intake does not end:\n{self.log()}") from None

    def worker(self, rank: int = 0, **facts: Any) -> RawWorker:
        """A new session, not yet introduced."""
        worker = RawWorker(self.address, rank=rank, **facts)
        self._workers.append(worker)
        return worker

    def ask(self, question: RunInfo | Status) -> Any:
        """A tool's question, and its answer."""
        tool = RawWorker(self.address, session=NO_SESSION)
        try:
            return tool.ask(question, type(question))
        finally:
            tool.leave()

    def status(self) -> Mapping[str, Any]:
        """What intake reports of itself, once it answers."""
        report: Mapping[str, Any] = self.ask(Status()).info
        return report

    def run_dirs(self) -> list[Path]:
        """The directories of all its runs, the oldest first."""
        found = self.base.glob("sidestep-runs/*/config.json")
        return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def run_dir(self, id_: str) -> Path:
        """The directory of a run."""
        (found,) = self.base.glob(f"sidestep-runs/*-{id_}")
        return found

    def finished(self, run_dir: Path) -> status.Report:
        """A run, once it is finished."""

        def look() -> status.Report | None:
            found = status.report(run_dir)
            return found if found.state == "finished" and found.run.state == "finished" else None

        return eventually(look, DEADLINE_S, lambda: f"{run_dir} is not finished:\n{self.log()}")

    def log(self) -> str:
        """The end of what intake wrote."""
        return (self.home.directory / "logs" / "intake.log").read_text()[-4000:]


def steps(run_dir: Path) -> list[int]:
    """The steps that a run holds."""
    return [row.values["global_step"] for row in read_jsonl(run_dir)]


def assert_balanced(report: status.Report, delivered: int) -> None:
    """So many records are in the run, and nothing else became of any."""
    ledger = report.ledger
    assert (delivered, delivered, 0, 0) == (ledger.offered, ledger.delivered, ledger.pending, ledger.unknown)
    assert ledger.balances
