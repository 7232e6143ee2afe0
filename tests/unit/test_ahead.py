"""Records go ahead of wandb's thread, in their order, and are waited for in time."""

from typing import Any

import pytest

from sidestepd.sinks.wandb import Ahead


class Interface:
    """wandb's, with a thread that gets to what is under way when it is waited for."""

    def __init__(self) -> None:
        self.under_way: list[object] = []
        self.passed_on: list[object] = []
        self.most = 0
        self.broken = False

    def _publish(self, record: object, *, nowait: bool = False) -> None:
        self.under_way.append(record)
        self.most = max(self.most, len(self.under_way))
        if not nowait:
            if self.broken:
                raise BrokenPipeError
            self.passed_on += self.under_way
            self.under_way.clear()

    def publish_keepalive(self) -> None:
        self._publish("keepalive")


class Run:
    def __init__(self) -> None:
        self._interface: Any = Interface()


def test_order_stays_and_no_more_than_some_are_under_way() -> None:
    run = Run()
    Ahead(run)  # type: ignore[arg-type]
    for record in range(1000):
        run._interface._publish(record)
    interface = run._interface
    assert [*interface.passed_on, *interface.under_way] == list(range(1000))
    assert interface.most == Ahead.MOST


def test_waiting_passes_on_what_is_left_and_costs_nothing_when_there_is_nothing() -> None:
    run = Run()
    ahead = Ahead(run)  # type: ignore[arg-type]
    ahead.wait()
    assert run._interface.passed_on == []
    for record in range(3):
        run._interface._publish(record)
    assert run._interface.passed_on == []
    ahead.wait()
    ahead.wait()
    assert run._interface.passed_on == [0, 1, 2, "keepalive"]


def test_a_broken_way_is_felt_by_who_waits() -> None:
    run = Run()
    ahead = Ahead(run)  # type: ignore[arg-type]
    run._interface.broken = True
    run._interface._publish("row")
    with pytest.raises(BrokenPipeError):
        ahead.wait()
