"""How much the daemon takes, how fast it hands it on, what many ranks cost it, and that a long run stays small.

    python -m tests.benchmarks.throughput [--quick] [--only intake|delivery|ranks|week] [--online]

- intake: many sessions in one process say what was packed beforehand, as fast as they are acknowledged; delivery
  is stopped meanwhile, so that what is measured is one intake and its disk
- delivery: a spool that is full already is written into an offline wandb run, beside a bare loop of `run.log` on
  the same rows with the same settings, in a process of its own as well; both are timed until the run is finished
- ranks: 64 sessions say 50 records of 10 scalars a second, and everything runs as in real life
- week: so many records that a run of a week has, as fast as they are delivered; with `--online` to a server that
  stands in for W&B. How it grows is printed every five seconds
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from sidestep.wire import Frame, checksum
from sidestepd import rundir
from sidestepd.config import Config
from sidestepd.errors import ExitCode
from sidestepd.rundir import RunFile
from sidestepd.spool import Entry, EntryKind, Spool, StoredSession
from tests.benchmarks.measuring import BUSY, Judgement, busy_elsewhere, judge_at_least, judge_at_most, machine
from tests.support.daemons import ServedRun, freeze
from tests.support.load import NAMES, Load, record
from tests.support.wandb_server import KEY, StandIn

MEGABYTE = 1e6
MOST_WAITING = 40_000
"""Records that may be under way in the week: it is to be fast, and no burst."""
PATIENT = {"delivery__stall_s": 3600.0, "order__patience_s": 5.0, "delivery__confirm_interval_s": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    intake_records: int = 2_000_000
    delivery_rows: int = 50_000
    ranks: int = 64
    ranks_rate: float = 50.0
    ranks_seconds: float = 60.0
    week_records: int = 10_000_000
    week_online: bool = False


QUICK = Size(intake_records=200_000, delivery_rows=2_000, ranks=16, ranks_seconds=5.0, week_records=100_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement: its figures by name, and what is claimed of them."""

    name: str
    figures: dict[str, float]
    judgements: tuple[Judgement, ...]


# Intake


def measure_intake(size: Size) -> Part:
    """Records a second into the committed spool."""
    with _served(spool__max_bytes=16 << 30) as served, Load(served.address, 16) as load:
        load.hello()
        freeze(served.delivery())
        packed = [record(step) for step in range(200)]
        for _ in range(size.intake_records // len(load.speakers) // len(packed)):
            for one in load.speakers:
                one.cut(packed)
        records = sum(one.end for one in load.speakers)
        assert served.process is not None
        intake = psutil.Process(served.process.pid)
        before, began = intake.cpu_times(), time.monotonic()
        load.drain()
        seconds, after = time.monotonic() - began, intake.cpu_times()
        stored = served.frames()
    cpu_s = after.user + after.system - before.user - before.system
    figures = {
        "records": records, "seconds": seconds, "records_per_s": records / seconds,
        "bytes_per_record": len(packed[0]), "cpu_us_per_record": 1e6 * cpu_s / records,
        "not_stored": records - stored,
    }  # fmt: skip
    claims = (
        judge_at_least(
            "records a second into the committed spool", figures["records_per_s"], 100_000, "records/s"
        ),
        judge_at_most("acknowledged and not in the spool", figures["not_stored"], 0, "records"),
    )
    return Part(name="intake", figures=figures, judgements=claims)


# Delivery


def measure_delivery(size: Size) -> Part:
    """Rows a second into wandb, beside a bare loop; the two take turns."""
    rows, ours, bare = size.delivery_rows, list[float](), list[float]()
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(rows / _time_delivery(Path(folder), rows))
            bare.append(rows / _time_bare(Path(folder), rows))
    figures = {"rows": rows, "rows_per_s": max(ours), "bare_rows_per_s": max(bare)}
    share = max(ours) / max(bare)
    claims = (judge_at_least("rows a second, over those of a bare loop of run.log", share, 0.8, "times"),)
    return Part(name="delivery", figures={**figures, "share": share}, judgements=claims)


def _time_delivery(folder: Path, rows: int) -> float:
    """Seconds from when the run is open to when it is finished and confirmed."""
    run_dir = _full_spool(folder, rows)
    words = [sys.executable, "-P", "-m", "sidestepd.delivery", str(run_dir), "--parent", str(os.getpid())]
    with (run_dir / "logs" / "delivery.log").open("ab") as log:
        subprocess.run(words, check=True, stdout=log, stderr=log)
    return time.time() - (run_dir / "about.json").stat().st_mtime


def _full_spool(folder: Path, rows: int) -> Path:
    """A run directory in which one worker has said everything."""
    config = Config.load(environ={}, overrides={"run.dir": str(folder), "run.id": "bench"})
    run_dir = rundir.new_run_dir(config, now=time.time())
    rundir.lay_out(run_dir, config, RunFile.of(config, run_dir, f"ipc://{folder}/nobody.sock"))
    spool = Spool(run_dir / "spool.db")
    session = StoredSession(id=bytes(range(16)), next=rows, state="bye", counters={"offered": rows})
    spool.commit(_said(session.id, rows), [session])
    spool.close()
    return run_dir


def _said(session: bytes, rows: int) -> Iterator[Entry]:
    facts: dict[str, Any] = {"rank": 0, "world": 1, "node": "here", "launch": "L", "offered": 0, "dropped": {}}
    yield Entry.of_event(EntryKind.HELLO, session, received=1.0, **facts)
    for first in range(0, rows, 100):
        count = min(100, rows - first)
        body = b"".join(record(step) for step in range(first, first + count))
        frame = Frame(session=session, first=first, count=count, body=body, crc=checksum(body))
        yield Entry.of_frame(frame, received=1.0 + first / 1000)
    yield Entry.of_event(EntryKind.BYE, session, first=rows, received=2.0 + rows, offered=rows, dropped={})
    yield Entry.of_event(EntryKind.CLOSE, received=2.0 + rows, exit_code=0)


BARE = f"""
import os, sys, time
from pathlib import Path
import wandb
from sidestepd.delivery import NICENESS
from sidestepd.sinks.base import RunFacts
from sidestepd.sinks.wandb import _init_offline

os.nice(NICENESS)
rows, folder = int(sys.argv[1]), Path(sys.argv[2])
(folder / "wandb").mkdir(parents=True)
run = _init_offline(RunFacts(id="bare", directory=folder))
began = time.monotonic()
for step in range(rows):
    values = {{name: step + at + 0.0 for at, name in enumerate({NAMES!r})}}
    run.log({{"_timestamp": 1.0 + step, "global_step": step, **values}}, step=step, commit=True)
run.finish()
wandb.teardown(0)
print(time.monotonic() - began, flush=True)
os._exit(0)
"""


def _time_bare(folder: Path, rows: int) -> float:
    words = [sys.executable, "-c", BARE, str(rows), str(folder / "bare")]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


# Many ranks


def measure_ranks(size: Size) -> Part:
    """What the daemon takes of memory and time while many ranks speak, and what becomes of it."""
    with _served(sink="wandb") as served, Load(served.address, size.ranks) as load:
        load.hello()
        served.delivery()
        meter = Meter(served)
        steps = load.say_at(size.ranks_rate, size.ranks_seconds, meanwhile=meter.read)
        began = time.monotonic()
        load.bye()
        code = served.finish()
        drained_s, ledger, report = time.monotonic() - began, served.ledger(), served.told()
    offered = steps * size.ranks
    figures = {
        "sessions": size.ranks, "records": offered, "records_per_s": offered / size.ranks_seconds,
        "delivered": ledger.delivered, "rows": report["rows"], "late_rows": report["late_rows"],
        "daemon_mb": meter.most / MEGABYTE, "daemon_pss_mb": meter.most_shared / MEGABYTE,
        "core_mb": meter.most_core / MEGABYTE, "cpu_share": meter.cpu_share(), "drained_s": drained_s,
    }  # fmt: skip
    claims = (
        judge_at_least("steps a second", steps / size.ranks_seconds, 0.95 * size.ranks_rate, "steps/s"),
        Judgement(
            claim="every record is delivered, and the ledger balances",
            measured=f"{ledger.delivered} of {offered}, exit code {code}",
            holds=ledger.balances and ledger.delivered == offered and code == ExitCode.COMPLETE,
        ),
        judge_at_most("memory of the daemon without wandb-core", figures["daemon_mb"], 300, "MB"),
    )  # fmt: skip
    return Part(name="ranks", figures=figures, judgements=claims)


class Meter:
    """The memory of a daemon's processes, as much as it ever was, and their time."""

    EVERY_S = 1.0

    def __init__(self, served: ServedRun) -> None:
        assert served.process is not None
        self._intake = psutil.Process(served.process.pid)
        self._began, self._cpu_before = time.monotonic(), self._cpu_s()
        self._next = 0.0
        self.most = self.most_shared = self.most_core = 0

    def read(self) -> None:
        """Look, if it is time to."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self.EVERY_S
        resident = shared = core = 0
        for process in self._processes():
            memory = process.memory_full_info()
            if "wandb-core" in process.name():
                core += memory.rss
            else:
                resident, shared = resident + memory.rss, shared + memory.pss
        self.most, self.most_shared = max(self.most, resident), max(self.most_shared, shared)
        self.most_core = max(self.most_core, core)
        self._cpu_now, self._now = self._cpu_s(), now

    def cpu_share(self) -> float:
        """Cores that all of it used, wandb-core included."""
        return (self._cpu_now - self._cpu_before) / (self._now - self._began)

    def _processes(self) -> list[psutil.Process]:
        return [self._intake, *self._intake.children(recursive=True)]

    def _cpu_s(self) -> float:
        return sum(it.cpu_times().user + it.cpu_times().system for it in self._processes())


# A week


def measure_week(size: Size) -> Part:
    """A run without end: how large its files and its processes ever are, early on and then."""
    steps = size.week_records // 8
    with _week(size.week_online) as served, Load(served.address, 8) as load:
        load.hello()
        served.delivery()
        growth, began = Growth(served), time.monotonic()
        for step in range(0, steps, 50):
            for one in load.speakers:
                one.cut([record(at, one.rank) for at in range(step, step + 50)])
            said = (step + 50) * len(load.speakers)
            load.until(lambda said=said: _waiting(served, said) < MOST_WAITING, deadline_s=3600.0)  # type: ignore[misc]
            growth.look(said, said / size.week_records)
        load.bye()
        code, ledger = served.finish(), served.ledger()
        seconds = time.monotonic() - began
    offered = sum(one.end for one in load.speakers)
    figures = {"records": offered, "seconds": seconds, "records_per_s": offered / seconds, **growth.figures()}
    claims = (
        *(
            judge_at_most(f"{name} at its largest, over that of the first fifth", growth.share(name), 1.5, "times")
            for name in ("spool", "delivery_db", "intake", "delivery")
        ),
        Judgement(
            claim="every record is delivered, and the ledger balances",
            measured=f"{ledger.delivered} of {offered}, exit code {code}",
            holds=ledger.balances and ledger.delivered == offered and code == ExitCode.COMPLETE,
        ),
    )
    return Part(name="week", figures=figures, judgements=claims)


@contextmanager
def _week(online: bool) -> Iterator[ServedRun]:
    """A run in files, or on the server that stands in for W&B."""
    if not online:
        with _served(sink="wandb") as served:
            yield served
        return
    with tempfile.TemporaryDirectory() as folder, StandIn(Path(folder) / "server") as server:
        environment = {**server.environment, "WANDB_API_KEY": KEY}
        with _served(sink="wandb", environment=environment, run__mode="online", sink__ask_every_s=2.0) as served:
            yield served


class Growth:
    """Bytes of the databases and resident bytes of the processes of a daemon, as much as they ever were."""

    EVERY_S = 5.0
    EARLY = 0.2
    """What is reached in this share of the run shall be about all that is ever reached."""

    def __init__(self, served: ServedRun) -> None:
        assert served.process is not None
        self._served, self._next = served, 0.0
        self._intake = psutil.Process(served.process.pid)
        self._early: dict[str, int] = {}
        self._late: dict[str, int] = {}

    def look(self, said: int, share: float) -> None:
        """Note how it is after so many records, that share of all; it is printed, so that one can see it live."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self.EVERY_S
        found = self._found()
        most = self._early if share <= self.EARLY else self._late
        most.update({name: max(size, most.get(name, 0)) for name, size in found.items()})
        shown = "  ".join(f"{name} {size / MEGABYTE:.1f}" for name, size in found.items())
        print(f"{said:>10,} records  {shown} MB", flush=True)

    def _found(self) -> dict[str, int]:
        home = self._served.home
        found = {
            name: sum(path.stat().st_size for path in home.glob(f"{file}*"))
            for name, file in (("spool", "spool.db"), ("delivery_db", "delivery.db"))
        }
        found["intake"] = self._intake.memory_info().rss
        for process in self._intake.children(recursive=True):
            with suppress(psutil.Error):
                name = "core" if "wandb-core" in process.name() else "delivery"
                found[name] = process.memory_info().rss
        return found

    def share(self, name: str) -> float:
        """The most of it late, over the most of it early."""
        return self._late.get(name, 0) / self._early[name]

    def figures(self) -> dict[str, float]:
        """The most of each, early and late, in MB."""
        return {
            f"{name}_{when}_mb": size / MEGABYTE
            for when, most in (("early", self._early), ("late", self._late))
            for name, size in most.items()
        }


def _waiting(served: ServedRun, said: int) -> int:
    told = served.told()
    return said - int(told.get("delivered", 0))


# Together


PARTS: dict[str, Callable[[Size], Part]] = {
    "intake": measure_intake,
    "delivery": measure_delivery,
    "ranks": measure_ranks,
    "week": measure_week,
}


@contextmanager
def _served(**options: Any) -> Iterator[ServedRun]:
    """A run on the disk of the current directory: a temporary folder may be in memory."""
    with (
        tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder,
        ServedRun(Path(folder), **{**PATIENT, **options}) as served,
    ):
        yield served.start()


def show(parts: list[Part]) -> None:
    """Tables, then the claims."""
    console = Console()
    for part in parts:
        table = Table("", "", title=part.name, title_justify="left", show_header=False)
        table.columns[1].justify = "right"
        for name, value in part.figures.items():
            table.add_row(name.replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:.2f}")
        console.print(table)
        for claim in part.judgements:
            console.print(str(claim), highlight=False)


def main() -> int:
    """Measure, show, write down, judge."""
    parser = argparse.ArgumentParser(description="How much the daemon takes, and how fast it hands it on.")
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, to see that it runs; judges nothing"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this, and what else is named so")
    parser.add_argument("--week-records", type=int, help="how many records the week has, of 10 scalars each")
    parser.add_argument("--online", action="store_true", help="the week goes to a server that stands in for W&B")
    options = parser.parse_args()
    size = replace(QUICK if options.quick else Size(), week_online=options.online)
    size = replace(size, week_records=options.week_records or size.week_records)
    busy = busy_elsewhere()
    parts = [measure(size) for name, measure in PARTS.items() if name in (options.only or PARTS)]
    show(parts)
    if busy > BUSY:
        print(f"other work was using {busy:.0%} of the CPUs before this began: take it again when they are free")
    found = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "quick": options.quick, "machine": machine(),
        "busy_elsewhere": busy, "parts": [asdict(part) for part in parts],
    }  # fmt: skip
    Path("throughput.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if options.quick or all(claim.holds for part in parts for claim in part.judgements) else 1


if __name__ == "__main__":
    sys.exit(main())
