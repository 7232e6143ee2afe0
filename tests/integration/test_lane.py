"""The blob lane of a worker against a daemon in memory: real sockets, threads, files and forks."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest

import sidestep
from sidestep import media
from sidestep.collect import collect
from sidestep.errors import UnsupportedValue
from sidestep.media.base import Blobs, Media
from sidestep.testing import FakeDaemon, environment, record
from sidestep.wire import BLOBS, WORKER, Kind, Refuse
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


def lane_of(daemon: FakeDaemon) -> Any:
    return next(seen for seen in daemon.sessions.values() if seen.hello.role == BLOBS)


def arrived(daemon: FakeDaemon) -> dict[int, bytes]:
    """The blobs that are complete, by their number; each as its crc says."""
    pieces: dict[int, bytes] = {}
    done = {}
    for it in lane_of(daemon).records:
        number = it.data["id"]
        if "bytes" in it.data:
            assert it.data["at"] == len(pieces.get(number, b""))
            pieces[number] = pieces.get(number, b"") + it.data["bytes"]
        elif "crc" in it.data:
            done[number] = pieces.get(number, b"")
            assert (it.data["size"], it.data["crc"]) == (len(done[number]), zlib.crc32(done[number]))
    return done


def failed(daemon: FakeDaemon) -> dict[int, str]:
    return {it.data["id"]: it.data["failed"] for it in lane_of(daemon).records if "failed" in it.data}


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

        run.flush(10.0)

        assert {0: content} == arrived(daemon)

    def test_one_that_is_written_to_meanwhile_is_torn(self, daemon, run, tmp_path, caplog):
        path = tmp_path / "checkpoint"
        path.write_bytes(bytes(40 * MB))
        with daemon.frozen():
            run.log({"a": Thing(path), "b": Thing(b"next")})
            with path.open("r+b") as file:
                file.write(b"changed")
                os.fsync(file.fileno())

        run.flush(20.0)

        assert {0: "torn"} == failed(daemon)
        assert {1: b"next"} == arrived(daemon)
        assert "was changed while it was being sent" in caplog.text

    @pytest.mark.parametrize("what", ["none", "."])
    def test_what_is_no_file_is_refused_in_words(self, what, tmp_path):
        with record() as logged, pytest.raises(UnsupportedValue, match=r"No such file|is no file|directory"):
            sidestep.init().log({"a": Thing(tmp_path / what)})
        assert [] == logged.records


class TestBesideMetrics:
    def test_metrics_pass_while_a_hundred_megabytes_are_refused(self, daemon, monkeypatch):
        """What is said after them is acknowledged while not one piece of them is."""
        frame = FakeDaemon._frame

        def full_for_blobs(self, message):
            if self.sessions[message.session].hello.role == BLOBS:
                return [Refuse(session=message.session, code="full", message="no room")]
            return frame(self, message)

        monkeypatch.setattr(FakeDaemon, "_frame", full_for_blobs)
        run = sidestep.init(reinit=True)
        run.log({"a": Thing(bytes(100 * MB))}, step=0)

        for step in range(1, 50):
            run.log({"loss": step}, step=step)

        daemon.wait_until(lambda: 49 in [it.step for it in daemon.records])
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
        collect(sorted(tmp_path.rglob("*.spill")), daemon.address, run=str(daemon.run["id"]))
        assert {0: content} == arrived(daemon)

    def test_a_file_that_can_not_leave_in_time_is_said_exactly(self, daemon, tmp_path, caplog):
        path = tmp_path / "checkpoint"
        path.write_bytes(bytes(30 * MB))
        daemon.freeze()
        run = sidestep.init(reinit=True)
        run.log({"a": Thing(path)})

        run.finish(timeout=1.0)

        daemon.thaw()
        assert "1 media or files" in caplog.text
        assert str(path) in caplog.text


def test_the_recorder_has_the_bytes():
    content = bytes(8192)
    with record() as logged:
        sidestep.init().log({"a": media.Image(content)})

    ref = logged["a"][0]["facts"]["file"]["_blob"]
    assert content == logged.blobs[ref["of"], ref["id"]]
