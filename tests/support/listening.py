"""Delivery's part in watching: entries of a tape are read in their order, and the alerts are written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from sidestepd.config import WatchOptions
from sidestepd.entries import Entry, EntryKind
from sidestepd.resolve import Resolver
from sidestepd.rows import Alert, Part
from sidestepd.watch import Watch
from tests.support.builders import Tape, log

OPTIONS = WatchOptions(silent_s=10.0, stalled_s=40.0, start_s=700.0, straggler_s=12.0)


class Listening:
    """Delivery's part in it: entries are read in their order, alerts are written down."""

    def __init__(self, options: WatchOptions = OPTIONS, *, ranks: int = 3) -> None:
        self.options = options
        self.tape = Tape()
        self.watch = Watch(options)
        self.resolver = Resolver()
        self.read = 0
        self.now = 0.0
        self.told: list[tuple[Alert, int]] = []
        for rank in range(ranks):
            self.tape.hello(rank, world=ranks)

    def listen(self, clock: float | None = None) -> Self:
        """Read what was not read, then it is `clock`."""
        for entry in self.tape.entries[self.read :]:
            self.take(entry)
        if clock is not None:
            self.tape.now = self.now = max(self.now, clock)
        self.tell()
        return self

    def take(self, entry: Entry) -> None:
        self.read, self.now = entry.id, max(self.now, entry.received)
        if entry.kind is not EntryKind.BOOT:
            self.watch.poll(self.now)
        parts = [said for said in self.resolver.read(entry) if isinstance(said, Part)]
        for one in parts:
            self.watch.hear(one, self.now)
        session = self.resolver.sessions.get(entry.session)
        self.watch.read(entry, session.launch if session else "", logged=bool(parts))

    def tell(self) -> None:
        self.watch.poll(self.now)
        self.told += [(alert, self.read) for alert in self.watch.take()]

    def titles(self) -> list[str]:
        return [alert.title for alert, _ in self.told]

    # What ranks do

    def train(self, *ranks: int, steps: Sequence[int], pace: float = 1.0) -> Self:
        """These ranks log each step, a step every `pace` seconds."""
        for step in steps:
            self.tape.now += pace
            for rank in ranks:
                self.tape.say(rank, log(step))
        return self.listen(self.tape.now)

    def wait(self, seconds: float) -> Self:
        """Nobody says anything for so long, and delivery looks at its clock all the time."""
        until = self.tape.now + seconds
        while self.tape.now < until:
            self.listen(min(until, self.tape.now + 0.5))
        return self


def replace_options(**options: Any) -> WatchOptions:
    return WatchOptions(**(OPTIONS.model_dump() | options))
