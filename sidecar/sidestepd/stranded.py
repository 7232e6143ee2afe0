"""What relays of a run kept on disk when they were killed: handed on to the run while that is finished from disk.

- the directory of a relay that `sidestep run` started lies beside the run's; whose it is, the daemon above told it
- it is handed on over the run's socket on this node: the keys of the job were gone with the job
- one that somebody serves is left alone, and so is one whose spool is on another machine's own disk
- the run is not finished before all of that is in its spool: a run that is over takes no more
- its options are as they were afterwards, so that whoever does it another way still can
- one at a time: two would turn the same relay towards themselves
- a relay's directory is removed when all that was in it is with the daemon above
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sidestep.errors import SidestepError
from sidestep.spill import folder_of_run
from sidestepd import placement, rundir, status
from sidestepd.daemon import Daemon
from sidestepd.home import RunHome
from sidestepd.processes import Lock, read_json, write_json
from sidestepd.rowlog import RowLogReader

AT_ONCE = 8
"""So many are served beside the run: each is two processes."""
LOST = 1
"""The exit code of a node whose processes were killed."""


def start(daemon: Daemon, run_id: str, pause: Callable[[float], object]) -> None:
    """Start the daemon of a run that was interrupted, and have it told what relays of that kept.

    Raises Incomplete if one of them can not say it all, AlreadyRunning if somebody does this now (the epilog of
    another node, say), and whatever `Daemon.start` raises.
    """
    lock = Lock(daemon.home.directory / "stranded.lock")
    lock.acquire()
    try:
        _start(daemon, run_id, pause)
    finally:
        lock.release()


def _start(daemon: Daemon, run_id: str, pause: Callable[[float], object]) -> None:
    relays = relays_of(daemon.home.directory, {run_id, daemon.home.options.run.id})
    for begin in range(0, max(1, len(relays)), AT_ONCE):
        with _served(relays[begin : begin + AT_ONCE], daemon.home.address, pause) as handing_on:
            if begin == 0:  # they are there before rows are made without what they have
                daemon.start()
            for one in handing_on:
                one.close(LOST)
                one.wait_closed(lambda _: None)
        for relay in relays[begin : begin + AT_ONCE]:
            forget(relay)


def forget(run_dir: Path) -> None:
    """Remove the directory of a relay, unless there is something in it that nobody else has."""
    if run_dir.parent.name != rundir.RELAYS or not _is_handed_on(run_dir):
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    with suppress(OSError):  # those of other nodes are there
        run_dir.parent.rmdir()


def _is_handed_on(run_dir: Path) -> bool:
    try:
        found = status.report(run_dir)
    except (OSError, sqlite3.Error, SidestepError):
        return False
    kept = (path for folder in (run_dir / rundir.BLOBS, folder_of_run(run_dir)) for path in folder.glob("*"))
    return found.state == "finished" and found.ledger.balances and not (found.ledger.pending or any(kept))


def relays_of(run_dir: Path, ids: Collection[str | None]) -> list[Path]:
    """The directories of those that have something for this run, by each id it had, and can be taken up here."""
    beside = sorted(path.parent for path in (run_dir.parent / rundir.RELAYS).glob("*/run.json"))
    return [relay for relay in beside if _ids(relay) & {*ids} and _has_more(relay, run_dir)]


def _ids(relay: Path) -> set[str | None]:
    """What its run was called when it began, and what the daemon above called it: it may have come before that."""
    return {read_json(relay / name).get("id") for name in ("run.json", "about.json")} - {None}


def _has_more(relay: Path, run_dir: Path) -> bool:
    home = placement.home(relay)
    try:
        if not home.is_dir() or not Lock.is_free(relay / "intake.lock"):
            return False
        above = RowLogReader(home / placement.ROW_LOG).meta("above", {}).get("dir", run_dir)
        found = status.report(relay)
    except (OSError, sqlite3.Error, SidestepError):  # half made, or of somebody else
        return False
    if Path(above).name != run_dir.name or found.state == "finished":  # or of an earlier start with the same id
        return False
    return found.ledger.pending > 0 or any(folder_of_run(relay).glob("*.spill"))


@contextmanager
def _served(relays: Sequence[Path], above: str, pause: Callable[[float], object]) -> Iterator[list[Daemon]]:
    """Daemons that hand on what these have to the one at `above`, until they are released."""
    with ExitStack() as stack:
        daemons = []
        for relay in relays:
            stack.enter_context(_pointed_at(relay, above))
            run = rundir.RunFile.read(relay).at(relay, rundir.private_address(relay))
            daemon = Daemon(RunHome(relay, rundir.stored_config(relay), run, listens=False), pause=pause)
            stack.callback(daemon.release)
            daemon.start()
            daemons.append(daemon)
        yield daemons


@contextmanager
def _pointed_at(relay: Path, above: str) -> Iterator[None]:
    """The relay's options, with another daemon above it for a while."""
    path = relay / "config.json"
    before = read_json(path)
    upstream = {**before.get("upstream", {}), "address": above, "context": None, "key_file": None}
    write_json(path, before | {"upstream": upstream})
    try:
        yield
    finally:
        write_json(path, before)
