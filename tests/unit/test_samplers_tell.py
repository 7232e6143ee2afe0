"""What samplers say while their process ends: whole, or not at all."""

from __future__ import annotations

import threading
from typing import Any

from sidestep.wire import Kind
from sidestepd.samplers.__main__ import Tell
from sidestepd.samplers.base import Reading


class SlowSession:
    """Takes what is sent when it is let."""

    def __init__(self, events: list[Any]) -> None:
        self.events, self.begun, self.let = events, threading.Event(), threading.Event()

    def send(self, kind: Kind, data: dict[str, Any]) -> None:
        self.begun.set()
        assert self.let.wait(30)
        self.events.append((kind, data["values"]))


def test_an_end_waits_for_what_is_being_said_and_nothing_is_said_after_it():
    events: list[Any] = []
    session = SlowSession(events)
    tell = Tell(session)
    sampler = threading.Thread(target=tell, args=(Reading(values={"cpu": 1.0}),))
    ending = threading.Thread(target=lambda: (tell.end(), events.append("ended")))

    sampler.start()
    assert session.begun.wait(30)
    ending.start()
    session.let.set()
    for thread in (sampler, ending):
        thread.join(30)
    tell(Reading(values={"cpu": 2.0}))

    assert [(Kind.SAMPLES, {"cpu": 1.0}), "ended"] == events
