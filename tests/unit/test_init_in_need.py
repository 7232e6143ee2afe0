"""`init()` where a process has nothing left, or is given what raises: the training goes on, and all is counted."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest

import sidestep
from sidestep import _current
from sidestep.notices import Notices
from sidestep.outbox import Outbox
from sidestep.wire import Hello


class Hostile:
    """Whatever is asked of it raises."""

    def __bool__(self) -> bool:
        raise RuntimeError("no")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __hash__(self) -> int:
        raise RuntimeError("no")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has said nothing yet, and knows of no daemon."""
    monkeypatch.setattr(_current, "_run", None)
    monkeypatch.setattr(_current, "_notices", Notices())
    monkeypatch.setattr(sidestep, "log", _current.log)
    monkeypatch.setenv("SIDESTEP_WHEN_FULL", "drop")
    monkeypatch.setenv("SIDESTEP_ADDRESS", "ipc:///nowhere/nobody.sock")
    yield
    sidestep.finish(timeout=0.0)


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    """Not one file may be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class TestAProcessThatHasNothingLeft:
    def test_that_can_open_no_descriptor_trains_on_and_counts(self, no_descriptors, caplog):
        run = sidestep.init()

        run.log({"loss": 1.0})
        run.stage("eval").log({"accuracy": 0.5}, step=3)

        stats = run.stats()
        assert {"no_sender": 2} == {name: count for name, count in stats.dropped.items() if name != "output"}
        assert stats.offered == stats.acknowledged + stats.pending + sum(stats.dropped.values())
        assert not run.flush(timeout=0.1)
        assert "nothing that this process logs can be sent" in caplog.text

    def test_that_can_start_no_thread_trains_on_and_counts(self, monkeypatch, caplog):
        class Carrier:
            def start(self) -> None:
                raise RuntimeError("can't start new thread")

        def make(hello: Hello, outbox: Outbox) -> Any:
            return Carrier()

        monkeypatch.setattr(_current, "_carrier", make)

        run = sidestep.init()
        sidestep.log({"loss": 1.0})

        assert {"no_sender": 1} == run.stats().dropped
        assert "can't start new thread" in caplog.text

    def test_is_told_where_that_was_asked_for(self, no_descriptors):
        with pytest.raises(OSError, match="Too many open files"):
            sidestep.init(strict=True)


class TestAMistakeInInit:
    @pytest.mark.parametrize("keyword", ["mode", "force", "tensorboard", "config_exclude_keys", "resume_from"])
    def test_costs_what_is_logged_and_not_the_training(self, keyword: str, caplog):
        run = sidestep.init(**{keyword: Hostile()})

        sidestep.log({"loss": 1.0})

        assert sidestep.run is run
        assert {"internal": 1} == run.stats().dropped
        assert "init() went wrong" in caplog.text

    def test_does_not_cost_the_run_that_there_is(self):
        before = sidestep.init()

        assert before is sidestep.init(config={"lr": 1}, config_exclude_keys=Hostile())  # type: ignore[arg-type]

        sidestep.log({"loss": 1.0})
        assert 0 == sum(before.stats().dropped.values())

    def test_is_raised_where_that_was_asked_for(self):
        with pytest.raises(RuntimeError, match="no"):
            sidestep.init(mode=Hostile(), strict=True)  # type: ignore[arg-type]

    def test_tags_that_can_not_be_read_are_none(self):
        """And what this process set itself it need not ask anybody for."""
        run = sidestep.init()

        run.tags = Hostile()  # type: ignore[assignment]
        run.notes = "first"

        asked = set(run._asked)
        assert ((), "first") == (run.tags, run.notes)
        assert asked == run._asked
