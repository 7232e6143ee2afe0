"""The samplers' process, seen from intake: started, started again, and sent away."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep import session as sessions
from sidestep.wire import Kind
from sidestepd.config import Config
from sidestepd.processes import write_json
from sidestepd.samplers.__main__ import make_session
from sidestepd.samplers.keeper import FIRST_BACKOFF_S, LAST_WORD_S, SamplersKeeper
from tests.support.daemons import DEADLINE_S, freeze, killed
from tests.support.waiting import eventually


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose intake is not there: samplers wait for it, and sample nothing meanwhile."""
    options = {"samplers.gpu": False, "samplers.host": False, "samplers.own": False}
    (tmp_path / "config.json").write_text(Config.load(environ={}, overrides=options).to_json())
    write_json(tmp_path / "run.json", {"id": "r", "address": f"ipc://{tmp_path}/nobody"})
    return tmp_path


@pytest.fixture
def keeper(run_dir: Path) -> Iterator[SamplersKeeper]:
    keeper = SamplersKeeper(run_dir, enabled=True, backoff_s=30)
    yield keeper
    keeper.kill()


def started(keeper: SamplersKeeper, now: float = 0.0) -> psutil.Process:
    """The process, once it minds signals."""
    keeper.tend(now)
    assert keeper.pid is not None
    process = psutil.Process(keeper.pid)
    eventually(lambda: process.num_threads() > 1, DEADLINE_S, "it does not begin to talk")
    return process


def until(condition: Callable[[], bool]) -> None:
    eventually(condition, DEADLINE_S)


def tended_until_ended(keeper: SamplersKeeper, now: float) -> None:
    """At one moment, until its end is seen: a process is no more when the last of its threads is."""

    def ended() -> bool:
        keeper.tend(now)
        return keeper.pid is None

    until(ended)


class TestSession:
    def test_has_no_file_to_spill_to_no_daemon_to_start_and_nothing_of_others_to_hand_on(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is to be gone with its intake, and what it has not said then is nobody's loss."""
        made: list[dict[str, Any]] = []
        monkeypatch.setattr(sessions, "Sender", lambda *_, **options: made.append(options))
        hooks = (sys.excepthook, threading.excepthook, sys.exit)

        session = make_session({"id": "r", "address": f"ipc://{run_dir}/nobody"})
        for _ in range(3):
            session.send(Kind.SAMPLES, {"values": {}})
        session.finish(0.0, 0)

        assert (None, None) == (made[0]["spill"], made[0]["sample"])
        assert made[0]["on_welcome"]() is made[0]["when_alone"] is None
        assert hooks == (sys.excepthook, threading.excepthook, sys.exit)
        assert not session.settings.autostart


class TestSamplersKeeper:
    def test_starts_them_again_ever_later(self, keeper: SamplersKeeper) -> None:
        first = killed(started(keeper))

        tended_until_ended(keeper, 1.0)
        assert 1 == keeper.restarts
        keeper.tend(1.0 + FIRST_BACKOFF_S / 2)
        assert keeper.pid is None
        second = killed(started(keeper, 1.0 + FIRST_BACKOFF_S))

        assert first.pid != second.pid
        tended_until_ended(keeper, 2.0)
        keeper.tend(2.0 + FIRST_BACKOFF_S)
        assert keeper.pid is None
        keeper.tend(2.0 + 2 * FIRST_BACKOFF_S)
        assert keeper.pid is not None

    def test_has_them_leave_and_starts_them_no_more(self, keeper: SamplersKeeper) -> None:
        started(keeper)

        assert not keeper.ended(10.0)
        until(lambda: keeper.ended(10.0))

        keeper.tend(100.0)
        assert 0 == keeper.restarts

    def test_starts_them_again_when_the_run_goes_on_after_all(self, keeper: SamplersKeeper) -> None:
        first = started(keeper)
        assert not keeper.ended(10.0)
        until(lambda: keeper.ended(10.0))

        keeper.stay()
        tended_until_ended(keeper, 11.0)

        assert first.pid != started(keeper, 11.0 + FIRST_BACKOFF_S).pid

    def test_kills_those_that_do_not_leave(self, keeper: SamplersKeeper) -> None:
        process = started(keeper)
        freeze(process)

        assert not keeper.ended(10.0)
        assert keeper.ended(10.0 + LAST_WORD_S)

        until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)

    def test_that_are_switched_off_are_never_there(self, run_dir: Path) -> None:
        keeper = SamplersKeeper(run_dir, enabled=False, backoff_s=30)
        keeper.tend(0.0)
        assert (None, True) == (keeper.pid, keeper.ended(time.monotonic()))
