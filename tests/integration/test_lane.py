"""The blob lane of a worker against a daemon in memory: real sockets, threads, files and forks."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

import sidestep
from sidestep import media
from sidestep.collect import collect
from sidestep.endpoint import Endpoint
from sidestep.errors import UnsupportedValue
from sidestep.media.base import Blobs, Media
from sidestep.testing import FakeDaemon, environment, record
from sidestep.wire import BLOBS, FILES, WORKER, Frame, Hello, Kind, Refuse
from tests.support.ledgers import balanced_daemon

MB = 1024 * 1024


class Thing(Media):
    """Bytes, or a file, as they are."""

    kind = "thing"

    def __init__(self, content: Any) -> None:
        self.content = content

    def pack(self, blobs: Blobs) -> dict[str, Any]:
        it = self.content
        return {"bytes": blobs.add_file(it) if isinstance(it, Path) else blobs.add(it)}


@pytest.fixture
def daemon(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with balanced_daemon() as daemon:
        for name, value in environment(daemon).items():
            monkeypatch.setenv(name, value)
        yield daemon


@pytest.fixture
def run(daemon):
    run = sidestep.init(reinit=True)
    yield run
    run.finish(timeout=10.0)


def lane_of(daemon: FakeDaemon, role: str = BLOBS) -> Any:
    return next(seen for seen in daemon.sessions.values() if seen.hello.role == role)


def arrived(daemon: FakeDaemon, role: str = BLOBS) -> dict[int, bytes]:
    """The blobs that are complete, by their number; each as its crc says, and its SHA-256 where it has one."""
    pieces: dict[int, bytes] = {}
    done = {}
    for it in lane_of(daemon, role).records:
        number = it.data["id"]
        if "bytes" in it.data:
            assert it.data["at"] == len(pieces.get(number, b""))
            pieces[number] = pieces.get(number, b"") + it.data["bytes"]
        elif "crc" in it.data:
            done[number] = pieces.get(number, b"")
            assert (it.data["size"], it.data["crc"]) == (len(done[number]), zlib.crc32(done[number]))
            sha256 = hashlib.sha256(done[number]).digest()
            assert sha256 == it.data.get("sha256", sha256)
    return done


def failed(daemon: FakeDaemon) -> dict[int, str]:
    return {it.data["id"]: it.data["failed"] for it in lane_of(daemon, FILES).records if "failed" in it.data}


class TestLane:
    def test_bytes_arrive_whole_beside_their_record(self, daemon, run):
        content = os.urandom(1 * MB)
        run.log({"loss": 1.0, "a": Thing(content), "b": Thing((b"xy", bytearray(b"z"))), "c": Thing(b"")})

        assert run.flush(10.0)

        assert {0: content, 1: b"xyz", 2: b""} == arrived(daemon)
        record = next(it for it in daemon.records if it.kind is Kind.COUNTED)
        facts = record.data["a"]["facts"]
        assert {"of": lane_of(daemon).hello.session, "id": 0, "size": len(content)} == facts["bytes"]["_blob"]
        assert (3, 0) == (run.stats().blobs, run.stats().blobs_pending)

    def test_nothing_is_made_before_the_first(self, daemon, run):
        run.log({"loss": 1.0})
        run.flush(10.0)

        assert [WORKER] == [seen.hello.role for seen in daemon.sessions.values()]

    def test_its_session_is_beside_the_one_that_logs(self, daemon, run):
        run.log({"a": Thing(b"x")})
        run.flush(10.0)

        worker = next(seen for seen in daemon.sessions.values() if seen.hello.role == WORKER)
        assert worker.hello.session.hex() == lane_of(daemon).hello.beside
        run.finish(timeout=10.0)
        assert all(seen.bye is not None for seen in daemon.sessions.values())

    def test_what_is_the_callers_may_change_at_once(self, daemon, run):
        mine = bytearray(b"before")
        run.log({"a": Thing(mine)})
        mine[:] = b"after!"

        run.flush(10.0)

        assert {0: b"before"} == arrived(daemon)

    def test_a_dict_that_looks_like_media_is_none(self, daemon, run):
        run.log({"loss": 1.0, "a": {"_sidestep": "image", "facts": {}}})
        run.flush(10.0)

        assert [{"loss": 1.0}] == [it.data for it in daemon.records if it.kind is Kind.COUNTED]
        assert 1 == run.stats().values_refused

    def test_what_finds_no_room_is_left_out_and_counted_and_its_record_goes(self, daemon, monkeypatch):
        monkeypatch.setenv("SIDESTEP_BLOB_BYTES", str(MB))
        monkeypatch.setenv("SIDESTEP_WHEN_FULL", "drop")
        run = sidestep.init(reinit=True)

        run.log({"loss": 1.0, "a": Thing(b"x" * (2 * MB))})

        run.finish(timeout=10.0)
        assert [{"loss": 1.0}] == [it.data for it in daemon.records if it.kind is Kind.COUNTED]
        assert 1 == run.stats().values_refused


class TestFiles:
    def test_a_file_is_what_it_was_when_it_was_logged_though_its_name_is_another_ones_by_then(
        self, daemon, run, tmp_path
    ):
        path, content = tmp_path / "checkpoint", os.urandom(3 * MB)
        path.write_bytes(content)
        with daemon.frozen():
            run.log({"a": Thing(path)})
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").rename(path)

        assert run.flush(20.0)

        assert {0: content} == arrived(daemon, FILES)
        assert os.getpid() != lane_of(daemon, FILES).hello.pid

    def test_one_that_is_written_to_meanwhile_is_torn(self, daemon, run, tmp_path, caplog):
        path = tmp_path / "checkpoint"
        path.write_bytes(bytes(40 * MB))
        with daemon.frozen():
            run.log({"a": Thing(path), "b": Thing(b"next")})
            with path.open("r+b") as file:
                file.write(b"changed")
                os.fsync(file.fileno())

        assert run.flush(20.0)

        assert {0: "torn"} == failed(daemon)
        assert {0: b"next"} == arrived(daemon)
        assert "was changed while it was being sent" in caplog.text

    def test_half_of_one_is_gone_on_with_when_the_daemon_is_back(self, daemon, run, tmp_path):
        """No piece of it twice in the daemon's memory, and not from its beginning again."""
        path, content = tmp_path / "checkpoint", os.urandom(20 * MB)
        path.write_bytes(content)
        daemon.drop_acks(20)
        run.log({"a": Thing(path)})
        daemon.wait_until(lambda: any(it.hello.role == FILES and it.next > 4 for it in daemon.sessions.values()))

        daemon.restart()

        assert run.flush(60.0)
        assert {0: content} == arrived(daemon, FILES)
        hellos = [it for it in daemon.heard if isinstance(it, Hello) and it.role == FILES]
        assert len(hellos) > 1
        frames = [it for it in daemon.heard if isinstance(it, Frame) and it.session == hellos[0].session]
        again = sum(it.count for it in frames) - lane_of(daemon, FILES).next
        assert again < 80, "a file of 82 pieces was begun again"

    def test_one_whose_record_was_given_up_is_not_wanted(self, daemon, run, tmp_path):
        path = tmp_path / "checkpoint"
        path.write_bytes(bytes(5 * MB))

        run.log({"a": Thing(path), "b": Thing(b"x"), "c": "x" * 200_000, "d": "y" * 200_000})

        run.flush(20.0)
        assert {0: "dropped"} == failed(daemon)
        assert ["dropped"] == [it.data["failed"] for it in lane_of(daemon).records if "failed" in it.data]
        assert {"too_large": 1} == run.stats().dropped

    def test_when_they_have_arrived_nobody_waits_for_who_sent_them(self, daemon, tmp_path):
        """It would wait for longer than a test may take."""
        (tmp_path / "checkpoint").write_bytes(bytes(5 * MB))
        run = sidestep.init(reinit=True)
        run.log({"a": Thing(tmp_path / "checkpoint")})
        assert run.flush(20.0)

        run.finish(timeout=3600.0)

        assert {0: bytes(5 * MB)} == arrived(daemon, FILES)

    @pytest.mark.parametrize("what", ["none", "."])
    def test_what_is_no_file_is_refused_in_words(self, what, tmp_path):
        with record() as logged, pytest.raises(UnsupportedValue, match=r"No such file|is no file|directory"):
            sidestep.init().log({"a": Thing(tmp_path / what)})
        assert [] == logged.records


class TestBesideMetrics:
    def test_metrics_pass_while_a_hundred_megabytes_are_refused(self, daemon, monkeypatch):
        """What is said after them is acknowledged while not one piece of them is."""
        frame = FakeDaemon._frame
        refused = []

        def full_for_blobs(self, message):
            if self.sessions[message.session].hello.role == BLOBS:
                refused.append(message)
                return [Refuse(session=message.session, code="full", message="no room")]
            return frame(self, message)

        monkeypatch.setattr(FakeDaemon, "_frame", full_for_blobs)
        run = sidestep.init(reinit=True)
        run.log({"a": Thing(bytes(100 * MB))}, step=0)

        for step in range(1, 50):
            run.log({"loss": step}, step=step)

        daemon.wait_until(lambda: refused and 49 in [it.step for it in daemon.records])
        assert [] == lane_of(daemon).records
        assert 1 <= run.stats().blobs_pending
        monkeypatch.undo()
        run.finish(timeout=0.5)


class TestForkAndExit:
    def test_a_forked_child_has_a_lane_of_its_own(self, daemon, run):
        run.log({"a": Thing(b"parent")})
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run.log({"a": Thing(b"child")})
                run.finish(timeout=10.0)
                code = 0
            finally:
                os._exit(code)

        assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        run.log({"a": Thing(b"again")})
        run.flush(10.0)

        lanes = [seen for seen in daemon.sessions.values() if seen.hello.role == BLOBS]
        said = sorted([it.data["bytes"] for it in seen.records if "bytes" in it.data] for seen in lanes)
        assert [[b"child"], [b"parent", b"again"]] == said

    def test_what_waits_when_nobody_answers_is_kept_in_the_spill(self, daemon, tmp_path, caplog):
        daemon.freeze()
        run = sidestep.init(reinit=True)
        content = os.urandom(2 * MB)
        run.log({"loss": 1.0, "a": Thing(content)})

        run.finish(timeout=5.0)

        daemon.thaw()
        assert 2 == len(list(tmp_path.rglob("*.spill")))
        assert "pieces of media are not acknowledged" in caplog.text
        collect(sorted(tmp_path.rglob("*.spill")), Endpoint(address=daemon.address), run=str(daemon.run["id"]))
        assert {0: content} == arrived(daemon)

    def test_a_file_that_can_not_leave_in_time_leaves_when_its_worker_is_gone(self, daemon, tmp_path, caplog):
        path, content = tmp_path / "checkpoint", os.urandom(30 * MB)
        path.write_bytes(content)
        run = sidestep.init(reinit=True)
        run.log({"a": Thing(path)})
        daemon.wait_until(lambda: any(it.hello.role == FILES for it in daemon.sessions.values()))

        with daemon.frozen():
            run.finish(timeout=1.0)

        assert "1 files (31457280 bytes) are still on their way" in caplog.text
        daemon.wait_until(lambda: lane_of(daemon, FILES).bye is not None, timeout=60.0)
        assert {0: content} == arrived(daemon, FILES)

    def test_a_file_that_nobody_knows_of_when_its_worker_ends_is_said_exactly(self, daemon, tmp_path, caplog):
        path = tmp_path / "checkpoint"
        path.write_bytes(bytes(MB))
        with daemon.frozen():
            run = sidestep.init(reinit=True)
            run.log({"a": Thing(path)})

            run.finish(timeout=1.0)

        assert "1 files (1048576 bytes) did not leave" in caplog.text
        assert str(path) in caplog.text


def test_the_recorder_has_the_bytes():
    content = bytes(8192)
    with record() as logged:
        sidestep.init().log({"a": media.Image(content)})

    ref = logged["a"][0]["facts"]["file"]["_blob"]
    assert content == logged.blobs[ref["of"], ref["id"]]
