"""What is said of a run, read from its files: the state, the sessions, and a ledger that must balance."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidestep.errors import SettingsError
from sidestep.wire import checksum
from sidestepd.config import Config
from sidestepd.rowlog import RowLog
from sidestepd.rows import Alert
from sidestepd.rundir import RunFile, lay_out
from sidestepd.spool import Entry, EntryKind, Spool, StoredSession
from sidestepd.status import Ledger, Report, SessionReport, losses, report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "20260101-120000-abcd1234"
    config = Config.load(environ={"WANDB_RUN_ID": "abcd1234", "WANDB_DIR": str(tmp_path)})
    lay_out(path, config, RunFile.of(config, path, f"ipc://{tmp_path}/abcd1234.sock"))
    return path


def session(number: int, *, next: int = 0, state: str = "live", offered: int = 0, **dropped: int) -> StoredSession:  # noqa: A002
    return StoredSession(
        id=bytes([number]) * 16,
        next=next,
        state=state,
        hello={"rank": number, "node": "n0", "pid": 100 + number},
        counters={"offered": offered, "dropped": dropped},
    )


def frame(number: int, *, first: int, count: int) -> Entry:
    body = b"x" * count
    return Entry(
        kind=EntryKind.FRAME,
        session=bytes([number]) * 16,
        first=first,
        count=count,
        crc=checksum(body),
        body=body,
    )


def spooled(run_dir: Path, *sessions: StoredSession, entries: tuple[Entry, ...] = ()) -> None:
    spool = Spool(run_dir / "spool.db")
    spool.commit(entries, sessions)
    spool.close()


def delivered(run_dir: Path, *, state: str | None = None, **ledger: object) -> None:
    rowlog = RowLog(run_dir / "delivery.db")
    rowlog.settle(ledger=ledger, **({} if state is None else {"state": state}))
    rowlog.close()


def alert(cause: str, *, over: bool = False) -> Alert:
    return Alert(cause=cause, title=cause, text="because", time=1.0, over=over)


class TestAlerts:
    def test_are_told_with_those_whose_causes_last(self, run_dir):
        rowlog = RowLog(run_dir / "delivery.db")
        alerts = [alert("a"), alert("b"), alert("a", over=True), alert("c"), alert("b", over=True), alert("b")]
        rowlog.warn(alerts, through=7)
        rowlog.close()

        found = report(run_dir)

        assert alerts == list(found.alerts)
        assert ["c", "b"] == [it.cause for it in found.troubles]
        assert "because" == found.to_json()["alerts"][0]["text"]

    def test_are_none_in_a_run_without_any(self, run_dir):
        assert ((), []) == (report(run_dir).alerts, report(run_dir).troubles)


class TestState:
    def test_a_run_whose_daemon_holds_its_lock_is_running(self, run_dir):
        with (run_dir / "intake.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

            assert "running" == report(run_dir).state

    def test_a_run_whose_supervisor_is_about_to_start_the_daemon_again_is_running(self, run_dir, tmp_path):
        with (tmp_path / "abcd1234.sock.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

            assert "running" == report(run_dir).state

    def test_a_run_that_nobody_serves_and_nobody_finished_is_interrupted(self, run_dir):
        assert "interrupted" == report(run_dir).state

    def test_a_run_that_delivery_closed_is_finished(self, run_dir):
        delivered(run_dir, state="closed")

        assert "finished" == report(run_dir).state

    def test_a_directory_that_holds_no_run_is_refused(self, tmp_path):
        with pytest.raises(SettingsError, match="is no run directory"):
            report(tmp_path)

    def test_reading_leaves_no_file_behind(self, run_dir):
        before = sorted(run_dir.iterdir())

        report(run_dir)

        assert before == sorted(run_dir.iterdir())

    def test_a_spool_that_is_only_just_being_made_holds_nothing_yet(self, run_dir):
        sqlite3.connect(run_dir / "spool.db").close()

        assert (0, ()) == (report(run_dir).ledger.offered, report(run_dir).sessions)

    def test_one_that_another_version_made_is_refused_in_words(self, run_dir):
        with sqlite3.connect(run_dir / "spool.db") as database:
            database.execute("CREATE TABLE session (id, name)")

        with pytest.raises(SettingsError, match="made by another version of sidestep"):
            report(run_dir)

    def test_what_keeps_it_from_the_sink_is_told_until_it_is_finished(self, run_dir):
        (run_dir / "deaths.json").write_text('{"what": "delivery ended with 70"}')
        told = report(run_dir).trouble

        delivered(run_dir, state="closed")

        assert ("delivery ended with 70", "") == (told, report(run_dir).trouble)


class TestLedger:
    def test_of_a_run_that_nobody_joined_is_empty_and_balances(self, run_dir):
        ledger = report(run_dir).ledger

        assert Ledger() == ledger
        assert ledger.balances

    def test_what_delivery_has_not_read_is_pending(self, run_dir):
        entries = (frame(0, first=0, count=4), frame(0, first=4, count=6))
        spooled(run_dir, session(0, next=10, offered=10), entries=entries)
        delivered(run_dir, delivered=4, read_through=1)

        ledger = report(run_dir).ledger

        assert Ledger(offered=10, delivered=4, pending=6) == ledger
        assert ledger.balances

    def test_what_a_living_worker_still_holds_is_pending(self, run_dir):
        spooled(run_dir, session(0, next=10, offered=13, full=2))
        delivered(run_dir, delivered=10, read_through=9)

        ledger = report(run_dir).ledger

        assert Ledger(offered=13, delivered=10, dropped={"full": 2}, pending=1) == ledger
        assert ledger.balances

    def test_what_a_killed_worker_had_offered_and_never_sent_is_unknown(self, run_dir):
        spooled(run_dir, session(0, next=10, offered=13, state="lease"))
        delivered(run_dir, delivered=10, read_through=9)

        ledger = report(run_dir).ledger

        assert Ledger(offered=13, delivered=10, unknown=3) == ledger
        assert ledger.balances

    def test_a_heartbeat_older_than_the_frames_after_it_does_not_upset_it(self, run_dir):
        spooled(run_dir, session(0, next=10, offered=7))
        delivered(run_dir, delivered=10, read_through=9)

        ledger = report(run_dir).ledger

        assert Ledger(offered=10, delivered=10) == ledger

    def test_drops_of_workers_are_not_counted_twice_when_delivery_has_read_of_them(self, run_dir):
        spooled(run_dir, session(0, next=8, offered=11, full=3))
        told = {"sessions": {"00": {"dropped": {"full": 2}}}, "dropped": {"full": 2, "malformed": 1}}
        delivered(run_dir, delivered=7, read_through=9, **told)

        ledger = report(run_dir).ledger

        assert Ledger(offered=11, delivered=7, dropped={"full": 3, "malformed": 1}) == ledger
        assert ledger.balances

    def test_a_record_that_went_missing_between_spool_and_run_makes_it_not_balance(self, run_dir):
        spooled(run_dir, session(0, next=10, offered=10, state="bye"))
        delivered(run_dir, delivered=9, read_through=9, state="closed")

        ledger = report(run_dir).ledger

        assert not ledger.balances


class TestSessions:
    def test_those_without_a_word_are_lost_once_the_run_is_finished(self, run_dir):
        spooled(run_dir, session(0, state="bye"), session(1, state="live"), session(2, state="lease"))
        delivered(run_dir, state="closed")

        found = report(run_dir)

        assert ["bye", "lost", "lost"] == [one.state for one in found.sessions]
        assert 2 == found.lost_sessions

    def test_a_rank_that_came_back_is_one_rank(self, run_dir):
        again = StoredSession(id=b"\xff" * 16, next=0, hello={"rank": 1})
        spooled(run_dir, session(0), session(1), again)

        assert 2 == report(run_dir).ranks


class TestJson:
    def test_it_holds_every_part_of_the_ledger_and_whether_it_balances(self, run_dir):
        text = json.dumps(report(run_dir).to_json())

        parts = ["balances", "delivered", "dropped", "offered", "pending", "rejected", "unknown", "values_refused"]
        assert parts == sorted(json.loads(text)["ledger"])


def told(run_dir: Path, *, silent: int = 0, **ledger: Any) -> Report:
    """A report with this ledger, and so many workers that ended without a word."""
    sessions = tuple(
        SessionReport(rank=rank, node="n0", pid=1, state="lost", offered=0, acknowledged=0, dropped={})
        for rank in range(silent)
    )
    return replace(report(run_dir), ledger=Ledger(**ledger), sessions=sessions)


class TestLosses:
    def test_nothing_lost_is_nothing_said(self, run_dir):
        assert "" == losses(told(run_dir, offered=2, delivered=1, pending=1))

    def test_each_reason_is_said_with_its_count(self, run_dir):
        ledger = {"offered": 9, "delivered": 1, "rejected": {"too_big": 2}, "dropped": {"full": 5}, "unknown": 1}

        said = losses(told(run_dir, silent=2, **ledger))

        assert (
            "5 dropped (full), 2 rejected (too_big), "
            "1 and whatever else 2 workers that ended without a word had not sent"
        ) == said

    def test_a_worker_without_a_word_may_have_had_more_than_anybody_knows(self, run_dir):
        said = losses(told(run_dir, silent=1, offered=1, delivered=1))

        assert "whatever else 1 worker that ended without a word had not sent" == said

    def test_a_ledger_that_does_not_balance_is_said(self, run_dir):
        assert "does not balance" in losses(told(run_dir, offered=1))


class TestDamagedSpool:
    def test_workers_are_as_delivery_knew_them(self, run_dir):
        spooled(run_dir, session(0, next=5, offered=5, state="bye"))
        known = {
            "rank": 0,
            "node": "n0",
            "ended": True,
            "offered": 5,
            "dropped": {},
            "acknowledged": 5,
            "final": 5,
        }
        delivered(run_dir, delivered=5, rows=5, last_step=4, sessions={"00" * 16: known})
        path = run_dir / "spool.db"
        path.write_bytes(path.read_bytes()[:4096] + b"\x55" * (path.stat().st_size - 4096))

        found = report(run_dir)

        assert (True, 5, 5) == (found.spool_damaged, found.rows, found.ledger.delivered)
        assert found.ledger.balances
        assert [(0, "bye")] == [(one.rank, one.state) for one in found.sessions]
