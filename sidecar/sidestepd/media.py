"""What delivery does about media: have parts wait for them, have them shown, and let go of their bytes in the end.

- a part waits at most `patience`; media that come later follow as late values (gather.py)
- while delivery catches up, spool time goes faster than anything can be encoded: then it waits for that
- the bytes of a value are deleted when its row is confirmed, or when it was left out and that is written down
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sidestepd.gather import NO_MEDIA, Gatherer
from sidestepd.match import Event
from sidestepd.packed import BlobId, blobs_in, count_media
from sidestepd.resolve import LaneEnded
from sidestepd.rowlog import SENT, RowLog
from sidestepd.rows import Blob, Row
from sidestepd.show import Shower

CATCHING_UP_S = 1.0
"""So far behind the clock, spool time is not the time that encoding takes."""
FLUSH_S = 300.0
"""How long media may take to be encoded when the run ends; what takes longer is left out."""
_SIMPLE = frozenset({int, float, str, bool, bytes, type(None)})


class Media:
    """The media of one run, for one life of its delivery."""

    def __init__(
        self, shower: Shower, *, patience: float, capacity: int, beat: Callable[[], None], told: Mapping[str, Any]
    ) -> None:
        """`told` is what `settled` gave in an earlier life."""
        self._gatherer = Gatherer(patience=patience, capacity=capacity)
        self._shower, self._patience, self._beat, self._told = shower, patience, beat, told
        self.delivered: int = told.get("delivered", 0)
        """Media in rows that the run holds for good."""
        self._rows: dict[int, tuple[int, list[BlobId]]] = {}
        """The rows with media that are not confirmed: how many there are, and their blobs."""

    # Taking up

    def recall(self, rowlog: RowLog, marks: Mapping[str, Any]) -> None:
        """Which blobs are in rows, or were given up, as the row log knows."""
        newest = max((self._told, marks.get("media", {})), key=lambda it: sum(it.get("left_out", {}).values()))
        rows = rowlog.rows()
        self._gatherer.recall(newest, (of for row, _ in rows for of in blobs_in(row.values)))
        self._shower.remove(of for row, fate in rows if fate != SENT for of in blobs_in(row.values))
        self._shower.remove((of, number) for of, number in newest.get("left_blobs", ()))

    def restore(self, fold: Mapping[str, Any]) -> list[Event]:
        """Take up what `state` gave."""
        return self._gatherer.restore(fold.get("media", NO_MEDIA), self._shower.there())

    # What is heard

    def hear(self, said: Event, now: float) -> list[Event]:
        """Take in what a session said; what may go on at once."""
        return self._gatherer.hear(said, now)

    def store(self, said: Blob | LaneEnded) -> None:
        """What is known of bytes."""
        if isinstance(said, Blob):
            self._gatherer.store(said)
        else:
            self._gatherer.end(said.session)

    def ready(self, now: float, horizon: float) -> list[Event]:
        """What may go on by `now`; `horizon` is how far spool time has come."""
        self._show()
        if horizon - now > CATCHING_UP_S:
            self._wait(self._patience)
        return self._gatherer.ready(now)

    def flush(self) -> list[Event]:
        """Nothing more comes: wait for what is being shown, and give up the rest."""
        self._show()
        self._wait(FLUSH_S)
        return self._gatherer.flush()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._gatherer.showing and time.monotonic() < deadline:
            self._beat()
            self._shower.wait()
            self._show()

    def _show(self) -> None:
        for job in self._gatherer.take_jobs():
            self._shower.submit(job)
        for key, why in self._shower.poll():
            self._gatherer.shown(key, why)

    # Blobs

    @property
    def bytes_of(self) -> Gatherer:
        """What is known of blobs."""
        return self._gatherer

    def forget_lanes(self, sessions: Iterable[bytes], kept: Iterable[BlobId]) -> None:
        """Nothing more is said of the blobs of these sessions: those that nobody waits for, and that are not
        `kept`, belong to records that never came.
        """
        sessions = set(sessions)
        if not sessions:
            return
        needed = {*kept, *self._gatherer.needed, *(of for _, blobs in self._rows.values() for of in blobs)}
        self._gatherer.give_back(of for of in self._shower.there() if of[0] in sessions and of not in needed)

    # Rows

    def note(self, rows: Iterable[Row]) -> None:
        """These rows are decided, now or in an earlier life, and not confirmed."""
        for row in rows:
            if not _SIMPLE.issuperset(map(type, row.values.values())) and (
                media := count_media(row.values.values())
            ):
                blobs = list(blobs_in(row.values))
                self._rows[row.step] = media, blobs
                self._gatherer.decide(blobs)

    def shown(self, rows: Sequence[Row]) -> Iterator[Row]:
        """The rows as the sink takes them, each made when it is asked for."""
        for row in rows:
            if row.step not in self._rows:
                yield row
                continue
            made = self._shower.into(row, beat=self._beat)
            if gone := len(row.values) - len(made.values):
                media, blobs = self._rows[row.step]
                self._rows[row.step] = media - gone, blobs
                self._gatherer.left_out["failed"] += gone
            yield made

    def settle(self, steps: Iterable[int], *, rejected: bool = False) -> None:
        """The run holds these rows, or refused them, for good."""
        for step in steps:
            if step in self._rows:
                media, blobs = self._rows.pop(step)
                if rejected:
                    self._gatherer.left_out["rejected"] += media
                else:
                    self.delivered += media
                self._gatherer.confirm(blobs)
                self._shower.settle(step)

    def clean(self) -> None:
        """What was settled is written down: its bytes may go."""
        self._shower.remove(self._gatherer.take_done())

    def close(self) -> None:
        """The run is over."""
        self._shower.close()

    # What outlives a crash, and what is told

    def state(self) -> dict[str, Any]:
        """For the fold."""
        return self._gatherer.state()

    def marks(self) -> dict[str, Any]:
        """To be committed with rows."""
        return self._gatherer.marks()

    def settled(self) -> dict[str, Any]:
        """To be committed with what became of rows."""
        return {**self.marks(), "delivered": self.delivered}

    @property
    def held(self) -> int:
        """What waits for media, or behind them."""
        return self._gatherer.held

    def ledger(self) -> dict[str, Any]:
        """How many media are in the run, were left out and why, and are on their way."""
        waiting = self._gatherer.waiting + sum(media for media, _ in self._rows.values())
        return {"delivered": self.delivered, "left_out": dict(self._gatherer.left_out), "waiting": waiting}
