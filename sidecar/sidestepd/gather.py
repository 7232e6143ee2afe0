"""Have parts wait for the media in them: until their bytes are there and they can be shown, or patience is over.

    Part ─▶ complete? ─▶ shown? ─▶ Part          with the media that could be shown
                 └── patience over ──▶ Part      without them; each follows as a part of its own, when it is there

- what a session says stays in its order: behind a part that waits, its other words wait too
- a value whose bytes will never be whole, or that can not be shown, is left out with a reason, and counted
- all of this is learnt from the spool and goes into the fold. Which values are in a row, or were left out, is
  known by the row log: so each is in the run once, wherever delivery died
- values in, values out: whether a value can be shown is asked for by `take_jobs`, and told by `shown`
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import msgpack

from sidestepd.match import Event, Waits
from sidestepd.packed import BlobId, blobs_in, has_media
from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import Blob, Part, Position

NO_MEDIA: Mapping[str, Any] = {"blobs": [], "ended": [], "late": [], "held": []}
"""What `Gatherer.state` gives where there are none."""
NOT_WANTED = "dropped"
"""How a blob fails whose record was given up by its worker."""
MOST_LEFT_OUT = 1000
"""So many blobs of values that were left out are remembered: a crash goes back no further."""
_CONTAINERS = frozenset({dict, list})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A value that is to be shown: `key` tells it from every other; size and crc of each blob in it."""

    key: bytes
    value: Any
    blobs: Mapping[BlobId, tuple[int, int]]


@dataclass(slots=True, kw_only=True)
class _Value:
    """Media under one name of a part. `state` is "", "asked", "good", "gone on", or why it is left out."""

    name: str
    value: Any
    blobs: tuple[BlobId, ...]
    key: bytes
    state: str = ""

    @property
    def open(self) -> bool:
        return self.state in ("", "asked")


@dataclass(slots=True, kw_only=True)
class _Late:
    """A value whose part went without it, until it is in a row."""

    part: Part
    value: _Value


@dataclass(slots=True, kw_only=True)
class _Held:
    """Something that a session said; a part that waits for media has them in `values`."""

    said: Event
    values: list[_Value] = field(default_factory=list)
    until: float = 0.0


class Gatherer:
    """What is known of blobs, and what waits for them."""

    def __init__(self, *, patience: float, capacity: int) -> None:
        self.patience, self.capacity = patience, capacity
        self.left_out: Counter[str] = Counter()
        """Values that are in no row, by reason."""
        self._left_blobs: deque[BlobId] = deque(maxlen=MOST_LEFT_OUT)
        self._blobs: dict[BlobId, tuple[int, int, str, bytes]] = {}
        """Size, crc, why it failed, and SHA-256 where it was said, of blobs that are over and in no row yet."""
        self._ended: set[bytes] = set()
        self._written: set[BlobId] = set()
        """Blobs whose values have their fate, as the row log knows."""
        self._queues: dict[bytes, deque[_Held]] = {}
        self._late: list[_Late] = []
        self._gone_on: set[BlobId] = set()
        """Blobs of values that went on, and are in no row that is written down yet."""
        self._jobs: list[Job] = []
        self._waits: dict[bytes, bool] = {}
        self._done: list[BlobId] = []

    # What is heard

    def hear(self, said: Event, now: float) -> list[Event]:
        """Take in what a session said; what may go on at once."""
        if isinstance(said, Booted):
            return [said]
        session = said.session
        if isinstance(said, Waits):
            self._waits[session] = said.waiting
            return [] if session in self._queues else [said]
        values = self._media_of(said) if isinstance(said, Part) else []
        if isinstance(said, Part) and said.used:
            self._late += [_Late(part=_without_values(said), value=value) for value in values]
            self._look(values)
            values = []
        queue = self._queues.get(session)
        if queue is None:
            if not values:
                return [said]
            queue = self._queues[session] = deque()
            queue.append(self._held(said, values, now))
            return [Waits(session=session, waiting=True), *self._release(session, now)]
        queue.append(self._held(said, values, now))
        return self._release(session, now)

    def _held(self, said: Event, values: list[_Value], now: float) -> _Held:
        self._look(values)
        return _Held(said=said, values=values, until=now + self.patience)

    def _media_of(self, part: Part) -> list[_Value]:
        """The media in a part, but those that have their fate."""
        if _CONTAINERS.isdisjoint(map(type, part.values.values())):
            return []
        found = [
            _value(name, value)
            for name, value in part.values.items()
            if type(value) in _CONTAINERS and has_media(value)
        ]
        return [it for it in found if not part.used or self._is_undecided(it)]

    def _is_undecided(self, value: _Value) -> bool:
        """Whether a value that a row was decided without, or with, is in none: one without blobs never is late."""
        return bool(value.blobs) and not self._written.issuperset(value.blobs)

    def store(self, blob: Blob) -> None:
        """No more comes of a blob."""
        of = (blob.session, blob.number)
        if of not in self._written:
            self._blobs[of] = (blob.size, blob.crc, blob.failed, blob.sha256)
            self._look(self._values())
        if blob.failed == NOT_WANTED:
            self.give_back([of])

    def known(self, of: BlobId) -> str | None:
        """Whether a blob is whole (""), never will be (why), or may still come (None)."""
        if of in self._blobs:
            return self._blobs[of][2]
        return "lost" if of in self._written or of[0] in self._ended else None

    def facts_of(self, of: BlobId) -> tuple[int, int, bytes]:
        """Size, crc and SHA-256 of a blob that is whole."""
        size, crc, _, sha256 = self._blobs[of]
        return size, crc, sha256

    def give_back(self, blobs: Iterable[BlobId]) -> None:
        """Nobody needs these any more, whatever they are."""
        blobs = list(blobs)
        self.decide(blobs)
        self._done += blobs

    @property
    def needed(self) -> Iterator[BlobId]:
        """The blobs of values that wait for them, or are on their way into a row: a crash has them shown anew."""
        return chain(self._gone_on, (of for value in self._values() for of in value.blobs))

    def end(self, session: bytes) -> None:
        """A session that sends blobs said its last word: what is not complete will not be."""
        self._ended.add(session)
        self._look(self._values())

    def shown(self, key: bytes, why: str = "") -> None:
        """A value can be shown; or it can not, for this reason."""
        for value in self._values():
            if value.key == key and value.state == "asked":
                value.state = why or "good"

    def take_jobs(self) -> list[Job]:
        """The values that became complete since this was asked last."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def decide(self, blobs: Iterable[BlobId]) -> None:
        """These are in a row that is written down."""
        for of in blobs:
            self._blobs.pop(of, None)
            self._written.add(of)
            self._gone_on.discard(of)
        self._late = [it for it in self._late if not self._written.issuperset(it.value.blobs)]

    def confirm(self, blobs: Iterable[BlobId]) -> None:
        """The run holds them."""
        self._done += blobs

    def take_done(self) -> list[BlobId]:
        """The blobs that nobody needs any more, since this was asked last."""
        done, self._done = self._done, []
        return done

    # What leaves

    def ready(self, now: float) -> list[Event]:
        """What may go on by `now`."""
        if not self._queues and not self._late:
            return []
        leaving: list[Event] = []
        while sum(map(len, self._queues.values())) > self.capacity:
            fullest = max(self._queues, key=lambda session: len(self._queues[session]))
            self._queues[fullest][0].until = now
            leaving += self._release(fullest, now)
        for session in list(self._queues):
            leaving += self._release(session, now)
        return leaving + self._release_late()

    def flush(self) -> list[Event]:
        """Nothing more comes: what is not complete is lost."""
        for value in self._values():
            if value.open:
                value.state = "lost"
        leaving = [event for session in list(self._queues) for event in self._release(session, 0.0)]
        return leaving + self._release_late()

    @property
    def showing(self) -> bool:
        """Whether something is still to be shown."""
        return bool(self._jobs) or any(value.state == "asked" for value in self._values())

    @property
    def waiting(self) -> int:
        """Media that wait for their bytes, or to be shown."""
        return sum(value.open for value in self._values())

    @property
    def held(self) -> int:
        """What waits behind media, and with them."""
        return sum(map(len, self._queues.values()))

    def _release(self, session: bytes, now: float) -> list[Event]:
        queue, leaving = self._queues[session], list[Event]()
        while queue and (now >= queue[0].until or not any(value.open for value in queue[0].values)):
            leaving.append(self._let_go(queue.popleft()))
        if not queue:
            del self._queues[session]
            calm = Waits(session=session, waiting=self._waits.get(session, False))
            leaving.insert(len(leaving) - isinstance(leaving[-1], Left), calm)
        return leaving

    def _let_go(self, held: _Held) -> Event:
        """A part without what is missing of its media."""
        part, without = held.said, set()
        for value in held.values:
            if value.state == "good":
                self._go_on(value)
                continue
            assert isinstance(part, Part)
            without.add(value.name)
            if value.open and value.blobs:
                self._late.append(_Late(part=_without_values(part), value=value))
            else:
                value.state = "slow" if value.open else value.state
                self._leave_out(value)
        if not without or not isinstance(part, Part):
            return part
        return replace(part, values={name: it for name, it in part.values.items() if name not in without})

    def _release_late(self) -> list[Event]:
        leaving: list[Event] = []
        for late in list(self._late):
            value = late.value
            if value.state == "good":
                self._go_on(value)
                leaving.append(replace(late.part, values={value.name: value.value}))
            elif not value.open and value.state != "gone on":
                self._late.remove(late)
                self._leave_out(value)
        return leaving

    def _go_on(self, value: _Value) -> None:
        value.state = "gone on"
        self._gone_on.update(value.blobs)

    def _leave_out(self, value: _Value) -> None:
        self.left_out[value.state] += 1
        self._left_blobs.extend(value.blobs)
        self._done += value.blobs
        self.decide(value.blobs)

    # Looking

    def _values(self) -> Iterator[_Value]:
        held = (value for queue in self._queues.values() for held in queue for value in held.values)
        return chain(held, (late.value for late in self._late))

    def _look(self, values: Iterable[_Value]) -> None:
        """See what of them is complete now, or never will be."""
        for value in list(values):
            if value.state == "":
                if (why := self._why_never(value)) is not None:
                    value.state = why
                elif all(of in self._blobs for of in value.blobs):
                    value.state = "asked"
                    blobs = {of: self._blobs[of][:2] for of in value.blobs}
                    self._jobs.append(Job(key=value.key, value=value.value, blobs=blobs))

    def _why_never(self, value: _Value) -> str | None:
        for of in value.blobs:
            if of in self._blobs and self._blobs[of][2]:
                return self._blobs[of][2]
            if of not in self._blobs and (of[0] in self._ended or of in self._written):
                return "lost"
        return None

    # What outlives a crash

    def marks(self) -> dict[str, Any]:
        """What must be committed together with rows, as plain values."""
        return {"left_out": dict(self.left_out), "left_blobs": [list(of) for of in self._left_blobs]}

    def recall(self, marks: Mapping[str, Any], blobs: Iterable[BlobId]) -> None:
        """Take up what `marks` gave; `blobs` are in rows that the row log remembers."""
        self.left_out = Counter(marks.get("left_out", {}))
        self._left_blobs.extend((of, number) for of, number in marks.get("left_blobs", ()))
        self._written.update(blobs, self._left_blobs)

    def state(self) -> dict[str, Any]:
        """As plain values. Of what is held only its traces: when this is taken up, all of it was decided."""
        return {
            "blobs": [[*of, *facts] for of, facts in self._blobs.items()],
            "ended": sorted(self._ended),
            "late": [[_place(late.part), late.value.name, late.value.value] for late in self._late],
            "held": [_trace(held) for queue in self._queues.values() for held in queue],
        }

    def restore(self, state: Mapping[str, Any], there: Iterable[BlobId]) -> list[Event]:
        """Take up what `state` gave; what was held is said on, as what is in rows already.

        `there` are the blobs that have files: one that was complete and has none had its fate.
        """
        there = set(there)
        for of, number, size, crc, why, *sha256 in state["blobs"]:
            if (of, number) in self._written or (not why and (of, number) not in there):
                self._written.add((of, number))
            else:
                self._blobs[of, number] = (size, crc, why, sha256[0] if sha256 else b"")
        self._ended = set(state["ended"])
        for place, name, value in state["late"]:
            self._restore_late(place, name, value)
        events: list[Event] = []
        for kind, facts, media in state["held"]:
            if kind != "Part":
                events.append(_KINDS[kind](**facts))
                continue
            events.append(replace(_part_at(facts), used=True))
            for name, value in media:
                self._restore_late(facts, name, value)
        return events

    def _restore_late(self, place: Mapping[str, Any], name: str, packed: Any) -> None:
        value = _value(name, packed)
        if self._is_undecided(value):
            self._late.append(_Late(part=_without_values(_part_at(place)), value=value))
            self._look([value])


def key_of(value: Any) -> bytes:
    """What tells a value from every other."""
    key: bytes = msgpack.packb(value)
    return key


_KINDS: Mapping[str, Any] = {"Joined": Joined, "Left": Left, "Heard": Heard}
_PLACE = ("session", "rank", "axis", "step", "time", "attempt", "moves")


def _value(name: str, value: Any) -> _Value:
    return _Value(name=name, value=value, blobs=tuple(blobs_in(value)), key=key_of(value))


def _without_values(part: Part) -> Part:
    """Where a value that comes later belongs: its record has its fate, and moves nothing any more."""
    return replace(part, values={}, used=False, moves=False, settled=True)


def _place(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name in _PLACE}


def _part_at(place: Mapping[str, Any]) -> Part:
    return Part(position=Position(0, 0), values={}, **place)


def _trace(held: _Held) -> list[Any]:
    said = held.said
    if isinstance(said, Part):
        return ["Part", _place(said), [[value.name, value.value] for value in held.values]]
    return [type(said).__name__, asdict(said), []]
