"""What a daemon serves from, as its supervisor sees it: the directory of one run, or that of a service.

A service's directory lies in `sidestep-runs/.services/`, named by its address: its options, its log, and which
of its workers' runs are open. A service that starts where another one was interrupted takes up those runs.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

from sidestep.errors import SettingsError, SidestepError
from sidestepd import addresses, rundir, status
from sidestepd.config import Config
from sidestepd.errors import AlreadyRunning
from sidestepd.processes import Lock, read_json, write_json
from sidestepd.rundir import RunFile

SERVICES = ".services"


@dataclass(frozen=True, slots=True)
class Standing:
    """How far delivery is: `pending` records are to be written; `seen` changes with any progress."""

    pending: int
    seen: object
    trouble: str = ""
    lasting: bool = False
    """Whether somebody must do something about the trouble."""


class Home(Protocol):
    """A directory that a daemon serves from."""

    directory: Path
    address: str
    listens: bool
    """Whether other nodes are let in, as the options say."""
    options: Config

    @property
    def resume(self) -> str:
        """The command that takes up what is not complete."""
        ...

    @property
    def open_runs(self) -> Sequence[Path]:
        """The directories of the runs that are not finished."""
        ...

    def begin(self) -> None:
        """Make it, or take it up. Raises SettingsError, AlreadyRunning."""
        ...

    def standing(self) -> Standing | None:
        """How far it is; None if that can not be read now."""
        ...

    def ended(self, *, complete: bool, exit_code: int | None) -> None:
        """Write down how its daemon ended."""
        ...


class RunHome:
    """The directory of one run."""

    def __init__(self, directory: Path, config: Config, run: RunFile, *, listens: bool = True) -> None:
        self.directory, self.address, self.run, self.listens = directory, run.address, run, listens
        self.options = config

    @property
    def open_runs(self) -> Sequence[Path]:
        """The run's own."""
        return [self.directory]

    @property
    def resume(self) -> str:
        """By the run's directory."""
        goes_online = self.run.mode == "online" and not self.options.is_relay
        return f"sidestep {'sync' if goes_online else 'drain'} {short(self.directory)}"

    def begin(self) -> None:
        """Lay it out if it is new."""
        if self.listens:
            addresses.check(self.options)
        if not Lock.is_free(self.directory / "intake.lock"):
            raise AlreadyRunning(f"another daemon serves {self.directory}")
        if self.directory.exists():
            self.run.now("running").write(self.directory)
        else:
            rundir.lay_out(self.directory, self.options, self.run)

    def standing(self) -> Standing | None:
        """By the run's ledger."""
        return _standing([self.directory])

    def ended(self, *, complete: bool, exit_code: int | None) -> None:
        """Whether the run is finished, or can be taken up."""
        if self.directory.exists():
            run = self.run.now("finished", exit_code) if complete else self.run.now("interrupted")
            run.write(self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFile:
    """`service.json`: where a service listens, and its open runs: {dir, named, launch, turn} of each.

    `until_idle`: a worker started it; it ends when the processes of its workers have. `closing`: it takes no more
    runs, and ends when those it has are complete.
    """

    address: str
    until_idle: bool = False
    closing: bool = False
    runs: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether this is the directory of a service."""
        return (directory / "service.json").exists()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What the directory says. Raises SettingsError if it says nothing."""
        values = read_json(directory / "service.json")
        if "address" not in values:
            raise SettingsError(f"{directory} is the directory of no service")
        known = {spec.name: values[spec.name] for spec in fields(cls) if spec.name in values}
        return cls(**(known | {"runs": tuple(known.get("runs", ()))}))

    def write(self, directory: Path) -> None:
        """Replace `service.json`."""
        write_json(directory / "service.json", asdict(self))


class ServiceHome:
    """The directory of a service."""

    def __init__(self, config: Config, address: str | None = None, *, until_idle: bool = False) -> None:
        folder = config.run.dir.expanduser().absolute()
        base = folder / rundir.RUNS
        self.listens = True
        self.address = address or rundir.private_address(base)
        self.directory = base / SERVICES / rundir.name_of(self.address)
        run = config.run.model_copy(update={"dir": folder})  # wherever intake is started again
        self.options, self._until_idle = config.model_copy(update={"run": run}), until_idle

    @property
    def resume(self) -> str:
        """The service as it was, or each of its runs by itself."""
        return f"sidestep drain {' '.join(map(short, self.open_runs))}" if self.open_runs else "sidestep serve"

    def begin(self) -> None:
        """With the options of now, and the runs that are still open from before."""
        addresses.check(self.options)
        if not Lock.is_free(self.directory / "intake.lock"):
            raise AlreadyRunning(f"another daemon serves {self.directory}")
        runs = ServiceFile.read(self.directory).runs if ServiceFile.is_in(self.directory) else ()
        try:
            (self.directory / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self.directory / "config.json", self.options.model_dump(mode="json"))
            service = ServiceFile(address=self.address, until_idle=self._until_idle, runs=runs)
            service.write(self.directory)
        except OSError as error:
            source = self.options.source("run.dir")
            raise SettingsError(f"run.dir = {self.options.run.dir} (from {source}): {error.strerror}") from None

    @property
    def open_runs(self) -> list[Path]:
        """The directories of the runs that are not finished."""
        return [Path(run["dir"]) for run in read_json(self.directory / "service.json").get("runs", ())]

    def standing(self) -> Standing | None:
        """By the ledgers of all open runs."""
        return _standing(self.open_runs)

    def ended(self, *, complete: bool, exit_code: int | None) -> None:  # noqa: ARG002 - each run has its own
        """A service that a worker started leaves nothing but its runs."""
        for run_dir in self.open_runs:
            if run_dir.exists():
                RunFile.read(run_dir).now("interrupted").write(run_dir)
        if complete and self._until_idle and not self.open_runs:
            shutil.rmtree(self.directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may be there
                self.directory.parent.rmdir()


def short(path: Path) -> str:
    """A path as it is typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _standing(run_dirs: Sequence[Path]) -> Standing | None:
    try:
        reports = [status.report(run_dir) for run_dir in run_dirs]
    except (OSError, sqlite3.Error, SidestepError):
        return None
    trouble = next((report.trouble for report in reports if report.trouble), "")
    seen = [(report.run.dir, report.ledger) for report in reports]
    lasting = any(report.lasting for report in reports)
    return Standing(sum(report.ledger.pending for report in reports), seen, trouble, lasting)
