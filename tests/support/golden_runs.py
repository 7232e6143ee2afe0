"""A run as a daemon of one version of the wire left it, with a backlog, and what its workers say when they go on.

    python -m tests.support.golden_runs          writes tests/data/upgrade/<version>/, once for each version

`run/` is the run directory of a daemon that was killed: rows 0 to 3 and what belongs to them are in the run, more
is in the spool. `workers.hex` has the messages of its two workers afterwards, a part a line, an empty line behind
each: HELLO, a frame that was acknowledged before, a new one, a heartbeat and BYE.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sidestep.wire import VERSION, Bye, Hello, Kind, Message, Record, Status, encode, encode_record
from sidestepd import rundir
from sidestepd.rundir import RunFile
from tests.support.daemons import DEADLINE_S, RawWorker, ServedRun, freeze
from tests.support.waiting import eventually

FOLDER = Path(__file__).parents[1] / "data" / "upgrade"
STEPS = 13
"""Of both workers, in the end."""
KEPT = ("run.json", "config.json", "rows.jsonl", "spool.db", "spool.db-wal", "delivery.db", "delivery.db-wal")
CONFIG = {"lr": 0.5}


class TakenUp(ServedRun):
    """A copy of a golden run, to be served from where it is."""

    def __init__(self, version: Path, run_dir: Path) -> None:
        shutil.copytree(version / "run", run_dir)
        (run_dir / "logs").mkdir()
        self.environment, self.sink, self.run_dir = {}, "jsonl", run_dir
        self.address = rundir.private_address(run_dir)
        RunFile.read(run_dir).at(run_dir, self.address).write(run_dir)
        self.process, self.starts, self._workers = None, 0, []


def messages(version: Path) -> Iterator[list[bytes]]:
    """What the workers of a version say when they go on, byte for byte."""
    for message in (version / "workers.hex").read_text().split("\n\n"):
        if message.strip():
            yield [bytes.fromhex(part) for part in message.splitlines()]


def _write(version: Path) -> None:
    with tempfile.TemporaryDirectory() as base:
        run = ServedRun(Path(base), sink="jsonl", spool__ballast_bytes=0)
        with run:
            run.start()
            workers = [run.worker(rank=rank, world=2) for rank in range(2)]
            for worker in workers:
                worker.hello(settings={"project": "golden"})
            for worker in workers:
                told = (
                    [Record(kind=Kind.CONFIG, time=time.time(), step=None, data=CONFIG)]
                    if worker is workers[0]
                    else []
                )
                worker.log(*range(5), records=[encode_record(record) for record in told])
            eventually(lambda: len(run.rows()) >= 4, DEADLINE_S, run.log)
            freeze(run.delivery())
            for worker in workers:
                worker.log(*range(5, 10))
            said = [part for worker in workers for part in _goes_on(worker)]
            run.kill()
        version.mkdir(parents=True)
        (version / "run").mkdir()
        for name in KEPT:
            if (run.run_dir / name).exists():
                shutil.copy(run.run_dir / name, version / "run" / name)
        (version / "workers.hex").write_text("\n".join(said))


def _goes_on(worker: RawWorker) -> Iterator[str]:
    acknowledged, repeated = worker.next, worker.frame(*range(5, 10), first=worker.next - 5)
    said: list[Message] = [
        Hello(session=worker.session, first=repeated.first, offered=worker.next + 3, **worker._facts),
        repeated,
        worker.frame(*range(10, STEPS), first=acknowledged),
        Status(session=worker.session, offered=acknowledged + 3),
        Bye(session=worker.session, first=acknowledged + 3, offered=acknowledged + 3, exit_code=0),
    ]
    for message in said:
        yield from (part.hex() for part in encode(message))
        yield ""


if __name__ == "__main__":
    target = FOLDER / str(VERSION)
    if target.exists():
        sys.exit(f"{target} is there: what a version left is never changed")
    _write(target)
