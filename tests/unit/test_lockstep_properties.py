"""Attacks on the way from entries to rows of a training whose ranks are less than a patience apart.

Nothing of it is late, whatever happens to intake and delivery.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import Undecodable, decode_records
from sidestepd.rows import MAIN_AXIS, Position, Row
from sidestepd.spool import EntryKind
from tests.support.builders import Tape, log
from tests.support.line import Disk, Line, Options
from tests.support.sound_rows import (
    assert_rows_are_sound,
)

# A training in lockstep

TICK_S = 0.1


PATIENCE_S = 5.0


STRANGER_BACK = 30
"""How many ticks after an outage a rank that was never heard of may come: patience is all it has."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How one rank behaves. All times are in ticks."""

    start: int = 0
    """When it says HELLO."""
    first: int = 0
    """When it logs first, after its HELLO."""
    period: int = 1
    """How often it sends."""
    cap: int = 100
    """How many records it sends at once."""
    back: int = 0
    """How long after an outage it says HELLO."""
    stage: bool = True
    """Whether it speaks on the stage."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What happens meanwhile. All times are in ticks."""

    steps: int = 20
    every: int = 2
    """How often a step is logged."""
    stage_every: int = 4
    """After how many steps the stage is logged."""
    outages: tuple[tuple[int, int], ...] = ()
    """When intake dies, and for how long."""
    reads: int = 1
    """How often delivery reads."""
    crashes: tuple[int, ...] = ()
    """When delivery dies."""


class Lockstep:
    """Ranks that make the same calls, less than a patience apart."""

    def __init__(self, habits: Sequence[Habits], course: Course) -> None:
        self.habits, self.course, self.tape = habits, course, Tape(now=1000.0)
        self.line = Line(Disk(), Options(patience=PATIENCE_S))
        self.queues: list[deque[bytes]] = [deque() for _ in habits]
        self.made = [0] * len(habits)
        self.known: set[int] = set()
        """Ranks that said HELLO since intake started."""
        self.known_before: set[int] = set()
        """Ranks that said HELLO before the last outage."""
        self.back_at = 0
        """When the last outage ended."""

    def run(self) -> Sequence[Row]:
        """From the first HELLO to the last BYE; the rows of the run."""
        tick = 0
        while not self._over(tick):
            self.tape.now = 1000.0 + tick * TICK_S
            up = not any(start <= tick < start + length for start, length in self.course.outages)
            if any(start + length == tick for start, length in self.course.outages) and up:
                self.back_at, self.known_before = tick, self.known_before | self.known
                self.known.clear()
                self.tape.boot()
                self.line = self.line.crash()  # it died with intake
            for rank in range(len(self.habits)):
                self._log(rank, tick)
                if up:
                    self._send(rank, tick)
            if up and tick in self.course.crashes:
                self.line.confirm(1)
                self.line = self.line.crash(durable=2)
            if up and tick % self.course.reads == 0:
                self.line.read(self.tape.entries, clock=self.tape.now)
                self.line.confirm(3)
            tick += 1
        for rank in range(len(self.habits)):
            self.tape.bye(rank)
        self.line.read(self.tape.entries, clock=self.tape.now)
        self.line.finish()
        return self.line.disk.held

    def _over(self, tick: int) -> bool:
        outage = max((start + length for start, length in self.course.outages), default=0)
        finished = all(made == self.course.steps for made in self.made)
        return finished and tick > outage and not any(self.queues) and len(self.known) == len(self.habits)

    def _log(self, rank: int, tick: int) -> None:
        since = tick - self.habits[rank].start - self.habits[rank].first
        if since < 0 or since % self.course.every or self.made[rank] == self.course.steps:
            return
        step = self.made[rank]
        self.made[rank] += 1
        self.queues[rank].append(log(step, {"loss": float(rank)}))
        if self.habits[rank].stage and step % self.course.stage_every == 0:
            self.queues[rank].append(log(step // self.course.stage_every, {"acc": float(rank)}, stage="eval"))

    def _send(self, rank: int, tick: int) -> None:
        habits, queue = self.habits[rank], self.queues[rank]
        if rank not in self.known:
            back = habits.back if rank in self.known_before else min(habits.back, STRANGER_BACK)
            if tick >= habits.start and (tick >= self.back_at + back or self.back_at == 0):
                self.known.add(rank)
                self.tape.hello(rank, world=len(self.habits), more=bool(queue))
        elif queue and (tick + rank) % habits.period == 0:
            sent = [queue.popleft() for _ in range(min(habits.cap, len(queue)))]
            self.tape.say(rank, *sent, more=bool(queue))

    # What must hold

    def expected(self) -> dict[tuple[str, int], int]:
        """How many parts each step of each axis has."""
        stages = range(0, self.course.steps, self.course.stage_every)
        speakers = sum(habits.stage for habits in self.habits)
        main = {(MAIN_AXIS, step): len(self.habits) for step in range(self.course.steps)}
        return main | {("eval/step", step): speakers for step in range(len(stages)) if speakers}


def assert_whole_and_on_time(world: Lockstep, rows: Sequence[Row]) -> None:
    """Every step of every axis is one row with the shares of all ranks, and none is late."""
    parts: Counter[tuple[str, int]] = Counter()
    for bundle in _shares_by_place(world):
        parts[bundle] += 1

    assert [] == [row for row in rows if row.late]
    assert world.expected() == parts
    assert sorted(world.expected()) == sorted(place for row in rows for place in row.places.items())
    assert_rows_are_sound(rows)


def _shares_by_place(world: Lockstep) -> list[tuple[str, int]]:
    """The place of the row that holds it, for each record that was said."""
    axis_of: dict[Position, str] = {}
    for entry in world.tape.entries:
        if entry.kind is EntryKind.FRAME:
            for seq, record in enumerate(decode_records(entry.body, entry.count), entry.first):
                assert not isinstance(record, Undecodable)
                axis_of[Position(entry.id, seq)] = f"{record.stage}/step" if record.stage else MAIN_AXIS
    return [
        (axis_of[position], row.places[axis_of[position]])
        for row in world.line.disk.held
        for position in row.positions
    ]


def habits(*, skew: int, period: int, back: int = 0) -> st.SearchStrategy[list[Habits]]:
    """Ranks that log first at most `skew` ticks apart, and send what they log within `period` ticks."""
    one = st.integers(0, skew).flatmap(
        lambda start: st.builds(
            Habits,
            start=st.just(start),
            first=st.integers(0, skew - start),
            period=st.integers(1, period),
            cap=st.sampled_from([1, 2, 5, 100]),
            back=st.integers(0, back),
            stage=st.booleans(),
        )
    )
    return st.lists(one, min_size=2, max_size=4)


courses = {
    "steps": st.integers(1, 30),
    "every": st.integers(1, 12),
    "stage_every": st.integers(1, 7),
    "reads": st.sampled_from([1, 1, 3, 40, 10_000]),
}


class TestLockstep:
    @given(ranks=habits(skew=40, period=8), course=st.builds(Course, **courses))
    def test_a_start_skew_makes_nothing_late(self, ranks, course):
        """Ranks begin less than a patience apart, and stay so."""
        world = Lockstep(ranks, course)

        rows = world.run()

        assert_whole_and_on_time(world, rows)

    @given(
        ranks=habits(skew=15, period=4, back=120),
        course=st.builds(
            Course,
            outages=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 300)), min_size=1, max_size=3).map(
                tuple
            ),
            **courses,
        ),
    )
    def test_catching_up_after_an_outage_makes_nothing_late(self, ranks, course):
        """However long intake was away, in whatever order ranks come back, and however slowly each sends."""
        world = Lockstep(ranks, course)

        rows = world.run()

        assert_whole_and_on_time(world, rows)

    @given(
        ranks=habits(skew=15, period=4, back=20),
        course=st.builds(
            Course,
            outages=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 100)), max_size=1).map(tuple),
            crashes=st.lists(st.integers(0, 200), min_size=1, max_size=5).map(tuple),
            **courses,
        ),
    )
    def test_a_crash_of_delivery_makes_nothing_late(self, ranks, course):
        """The next life knows who is slow and who is still to come."""
        world = Lockstep(ranks, course)

        rows = world.run()

        assert_whole_and_on_time(world, rows)
        assert 0 == world.line.disk.duplicates
