"""The ledger at the end of a test, whatever the test was about: every record that was offered has its place.

It has to balance at any moment, also of a run whose processes were just killed: what nobody knows the fate of is
pending, or unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sidestep.testing import FakeDaemon
from sidestepd import rundir, status


def assert_balances(run_dir: Path) -> None:
    """Of one run, as its files tell; but where the guards that it rests on were switched off."""
    unsafe = rundir.stored_config(run_dir).unsafe
    report = status.report(run_dir)
    if unsafe.duplicate_gate and unsafe.row_log and not report.spool_damaged:
        assert report.ledger.balances, f"{run_dir.name}: {report.ledger}"


def assert_all_balance(base: Path) -> None:
    """Of every run below a directory."""
    for run_file in base.glob("sidestep-runs/*/run.json"):
        if (run_file.parent / "config.json").exists():
            assert_balances(run_file.parent)


def assert_sessions_balance(daemon: FakeDaemon) -> None:
    """Of every session that said its last word: what it was offered came, or was dropped for a reason."""
    for seen in daemon.sessions.values():
        if seen.bye is not None:
            assert seen.bye.offered == seen.bye.first + sum(seen.bye.dropped.values()), seen.bye
            assert seen.bye.first == seen.next


@contextlib.contextmanager
def balanced_daemon() -> Iterator[FakeDaemon]:
    """A daemon in memory; in the end the ledger of each session that it saw out must balance."""
    with FakeDaemon() as daemon:
        yield daemon
    assert_sessions_balance(daemon)
