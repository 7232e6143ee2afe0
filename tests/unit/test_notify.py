"""What a service manager is told, and that a watchdog is told the truth."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sidestepd.control import unwell
from sidestepd.notify import Watchdog, notify, stopping

WELL = {"live": 2, "silent_s": 0.4}


class Manager:
    """A service manager's end of the line."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(folder / "notify"), **environ}

    def heard(self) -> list[str]:
        """Everything that was said since."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(1000).decode())
            except BlockingIOError:
                return found

    def shut(self) -> None:
        self._socket.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:  # a socket's path has to be short
        yield Path(path)


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    manager = Manager(folder, WATCHDOG_USEC="20000000", WATCHDOG_PID="7")
    yield manager
    manager.shut()


def told(manager: Manager, info: Mapping[str, Any] | None) -> list[str]:
    """What is said after intake answered `info`, or not."""
    Watchdog(lambda _: info, manager.environ, pid=7)()
    return manager.heard()


def test_what_keeps_a_run_waiting_is_told_beside_and_the_daemon_is_well(manager):
    Watchdog(lambda _: WELL, manager.environ, pid=7, beside=lambda: "mine waits: no key")()

    assert ["WATCHDOG=1\nSTATUS=2 workers; mine waits: no key"] == manager.heard()


class TestWatchdog:
    def test_is_told_while_intake_answers_and_its_disk_does(self, manager):
        assert ["WATCHDOG=1\nSTATUS=2 workers"] == told(manager, WELL)

    def test_is_told_of_runs_where_there_may_be_several(self, manager):
        assert ["WATCHDOG=1\nSTATUS=2 runs, 8 workers"] == told(manager, {"live": 8, "runs": [{}, {}]})

    def test_is_not_told_when_intake_does_not_answer(self, manager):
        assert ["STATUS=it does not answer"] == told(manager, None)

    def test_is_not_told_when_intake_answers_and_its_disk_does_not(self, manager):
        """To answer needs no disk; half of the period is the most that a disk may take."""
        assert ["STATUS=its disk has not answered for 11 s"] == told(manager, {"live": 2, "silent_s": 11.2})

    def test_is_asked_no_more_often_than_it_needs(self, manager):
        asked: list[float] = []
        watchdog = Watchdog(asked.append, manager.environ, pid=7)

        for _ in range(3):
            watchdog()

        assert [1.0] == asked

    def test_of_another_process_is_not_ours(self, manager):
        Watchdog(lambda _: WELL, manager.environ, pid=8)()

        assert ["STATUS=2 workers"] == manager.heard()

    def test_is_not_asked_for_where_nobody_listens(self):
        asked: list[float] = []
        Watchdog(asked.append, {"WATCHDOG_USEC": "1000000"})()

        assert [] == asked


class TestNotify:
    def test_never_raises(self, folder):
        assert not notify("READY=1", {"NOTIFY_SOCKET": str(folder / "nobody")})
        assert not notify("READY=1", {"NOTIFY_SOCKET": "not a path"})
        assert not notify("READY=1", {})

    def test_says_how_long_the_end_may_take(self):
        assert "STOPPING=1\nEXTEND_TIMEOUT_USEC=630000000" == stopping(600)


class TestUnwell:
    def test_is_who_does_not_answer_or_does_not_write(self):
        assert "" == unwell(WELL)
        assert "it does not answer" == unwell(None)
        assert "its disk has not answered for 31 s" == unwell({"silent_s": 31.0})
