"""Calls without a step: which step they take when ranks make different calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from sidestepd import match
from sidestepd.match import Event, Matcher, Waits
from sidestepd.resolve import Booted, Heard, Joined, Left
from sidestepd.rows import MAIN_AXIS, Part
from tests.support.builders import Tape, counted, part, session_id
from tests.support.line import Disk, Line, Options

PATIENCE = 5.0
LOSS, IO = {"loss": 0.5}, {"io": 1.0}


class Matching:
    """A matcher of patience 5 that is told of calls; each session counts for itself, as a worker does.

    `settled`: every rank made a call long ago, on both axes.
    """

    def __init__(self, *, ranks: int = 2, capacity: int = 1000, settled: bool = True) -> None:
        self.matcher = Matcher(patience=PATIENCE, capacity=capacity)
        self.own: dict[int, int] = {}
        for rank in range(ranks):
            self.join(rank, world=ranks)
        for rank in range(ranks * settled):
            for axis in (MAIN_AXIS, "eval/step"):
                self.hear(part(-1, {"begin": 1}, rank=rank, own=-1, axis=axis), now=-100.0)

    def join(self, session: int, *, rank: int | None = None, world: int = 2, more: bool = False) -> None:
        rank = session if rank is None else rank
        said = Joined(session=session_id(session), rank=rank, world=world, launch="L", more=more)
        self.matcher.hear(said, 0.0)

    def call(
        self, session: int, data: dict[str, Any] = LOSS, *, now: float = 0.0, commit: bool = True, **options: Any
    ) -> list[tuple[int, int]]:
        """A call without a step; who leaves with which step."""
        own = self.own.setdefault(session, 0)
        self.own[session] += commit
        step = options.pop("step", own)
        return left(self.matcher.hear(part(step, data, rank=session, own=own, **options), now))

    def hear(self, said: Any, now: float = 0.0) -> Sequence[Event]:
        return self.matcher.hear(said, now)

    def ready(self, now: float) -> list[tuple[int, int]]:
        return left(self.matcher.ready(now))


def left(events: Sequence[Event]) -> list[tuple[int, int]]:
    """Ranks and steps of the parts."""
    return [(event.rank, event.step) for event in events if isinstance(event, Part)]


class TestTheSameCalls:
    def test_of_all_ranks_take_their_own_counts(self):
        ranks = Matching()

        assert [(0, 0), (1, 0), (0, 1), (1, 1)] == [
            *ranks.call(0), *ranks.call(1), *ranks.call(0), *ranks.call(1)
        ]  # fmt: skip

    def test_of_a_higher_rank_that_is_first_wait_for_nobody_who_never_used_the_names(self):
        ranks = Matching()

        assert [(1, 0)] == ranks.call(1)
        assert [(0, 0)] == ranks.call(0)

    def test_of_a_higher_rank_that_is_ahead_wait_for_the_lower(self):
        ranks = Matching()
        ranks.call(0)
        ranks.call(1)

        assert [] == ranks.call(1)
        assert [(0, 1), (1, 1)] == ranks.call(0)


class TestTheBeginning:
    def test_lower_ranks_are_waited_for_that_said_nothing_yet(self):
        """Ranks begin within moments of each other, and the first is seldom rank 0."""
        ranks = Matching(settled=False)

        assert [] == [*ranks.call(1), *ranks.call(1, IO)]
        assert [(0, 0), (1, 0)] == ranks.call(0)
        assert [(1, 1)] == ranks.ready(now=5.0)

    def test_for_one_patience_after_the_first_call_of_the_launch(self):
        ranks = Matching(settled=False)
        ranks.call(1, now=0.0)
        ranks.call(1, now=4.0)

        assert [(1, 0), (1, 1)] == ranks.ready(now=5.0)
        assert [(1, 2)] == ranks.call(1, now=5.0)

    def test_those_that_have_not_come_too(self):
        ranks = Matching(ranks=0, settled=False)
        ranks.join(1)

        assert [] == ranks.call(1)
        ranks.join(0)
        assert [(0, 0), (1, 0)] == ranks.call(0)

    def test_but_none_that_left(self):
        ranks = Matching(settled=False)
        ranks.hear(Left(session_id(0)))

        assert [(1, 0)] == ranks.call(1)


class TestMovingAlong:
    def moves(self, events: Sequence[Event]) -> list[bool]:
        return [event.moves for event in events if isinstance(event, Part)]

    def test_a_call_between_matched_ones_does_not(self):
        ranks = Matching()
        ranks.call(0)

        assert [True] == self.moves(ranks.hear(part(0, LOSS, rank=1, own=0)))
        assert [False] == self.moves(ranks.hear(part(1, IO, rank=1, own=1)))

    def test_the_lowest_rank_s_own_does(self):
        assert [True] == self.moves(Matching().hear(part(0, LOSS, rank=0, own=0)))


class TestDifferentCalls:
    def test_a_rank_with_calls_of_its_own_stays_beside_the_lowest(self):
        """Rank 1 logs twice as often; its losses are at rank 0's steps, and what it says alone is in between."""
        ranks = Matching()
        steps: list[tuple[int, int]] = []
        for _ in range(3):
            steps += [*ranks.call(0), *ranks.call(1), *ranks.call(1, IO)]

        assert [(0, 0), (0, 1), (0, 2)] == [it for it in steps if it[0] == 0]
        assert [(1, 0), (1, 1), (1, 1), (1, 2), (1, 2), (1, 3)] == [it for it in steps if it[0] == 1]

    def test_the_lowest_rank_among_those_who_use_the_names_counts(self):
        ranks = Matching(ranks=3)
        for _ in range(4):
            ranks.call(1)
        ranks.call(1, IO)

        assert [(2, 4)] == ranks.call(2, IO)

    def test_the_same_names_on_another_axis_are_other_calls(self):
        ranks = Matching()
        ranks.call(0)
        ranks.call(0, IO)

        assert [(1, 0)] == ranks.call(1, IO, axis="eval/step")

    def test_names_in_another_order_are_the_same(self):
        ranks = Matching()
        ranks.call(0, IO)
        ranks.call(0, {"a": 1, "b": 2})

        assert [(1, 1)] == ranks.call(1, {"b": 2, "a": 1})

    def test_a_step_that_was_named_is_not_touched(self):
        ranks = Matching()
        ranks.call(0)
        ranks.call(0)

        assert [(1, 70)] == left(ranks.hear(part(70, LOSS, rank=1)))

    def test_calls_that_make_one_row_take_one_step(self):
        """`commit=False` leaves the row open: its names are not those of the call that rank 0 made."""
        ranks = Matching()
        ranks.call(0, IO)
        ranks.call(0)

        assert [(1, 1)] == ranks.call(1, commit=False)
        assert [(1, 1)] == ranks.call(1, {"acc": 1.0})
        assert [(1, 2)] == ranks.call(1, {"acc": 1.0})


class TestWaiting:
    def ahead(self, **options: Any) -> Matching:
        """Rank 1 waits since 0.0 for rank 0's second call."""
        ranks = Matching(**options)
        ranks.call(0)
        ranks.call(1)
        assert [] == ranks.call(1)
        return ranks

    def test_is_for_one_patience(self):
        ranks = self.ahead()

        assert [] == ranks.ready(now=4.9)
        assert [(1, 1)] == ranks.ready(now=5.0)
        assert 0 == ranks.matcher.waiting

    def test_is_over_when_the_lower_rank_left(self):
        ranks = self.ahead()

        ranks.hear(Left(session_id(0)))

        assert [(1, 1)] == ranks.ready(now=0.1)

    def test_does_not_run_out_against_a_rank_that_has_not_caught_up(self):
        ranks = self.ahead()
        ranks.hear(Heard(session=session_id(0), more=True))

        assert [] == ranks.ready(now=50.0)
        ranks.hear(Heard(session=session_id(0), more=False))
        assert [(1, 1)] == ranks.ready(now=50.0)

    def test_nor_after_a_boot_until_it_is_heard(self):
        ranks = self.ahead()
        assert [Booted()] == list(ranks.hear(Booted()))

        assert [] == ranks.ready(now=50.0)
        ranks.join(0)
        assert [(1, 1)] == ranks.ready(now=50.0)

    def test_keeps_the_order_of_what_a_session_says(self):
        ranks = self.ahead()
        assert [] == left(ranks.hear(part(70, rank=1, axis="eval/step")))

        assert [(0, 1), (1, 1), (1, 70)] == ranks.call(0)

    def test_is_told(self):
        ranks = Matching()
        ranks.call(0)
        ranks.call(1)

        [waits] = ranks.hear(part(1, LOSS, rank=1, own=1))

        assert Waits(session=session_id(1), waiting=True) == waits
        assert Waits(session=session_id(1), waiting=False) == ranks.hear(part(1, LOSS, rank=0, own=1))[-1]

    def test_a_session_leaves_after_what_it_said(self):
        ranks = self.ahead()
        assert [] == list(ranks.hear(Left(session_id(1))))

        assert Left(session_id(1)) == ranks.matcher.ready(now=5.0)[-1]

    def test_a_session_that_speaks_again_meanwhile_has_not_left(self):
        ranks = self.ahead()
        ranks.hear(Left(session_id(1)))
        ranks.join(1)

        assert Left(session_id(1)) not in ranks.matcher.ready(now=5.0)

    def test_frees_everyone_who_waits_for_the_same(self):
        ranks = Matching(ranks=3)
        for rank in range(3):
            ranks.call(rank)
        assert [] == [*ranks.call(2), *ranks.call(1)]

        assert [(0, 1), (1, 1), (2, 1)] == sorted(ranks.call(0))

    def test_of_one_rank_on_another_that_waits_itself_ends(self):
        """Rank 2 waits for rank 1, whose call stands behind one that waits for rank 0."""
        ranks = Matching(ranks=3)
        ranks.call(0)
        for rank in (1, 2):
            ranks.call(rank, IO)
        ranks.call(1)
        assert [] == [*ranks.call(1), *ranks.call(1, IO), *ranks.call(2, IO)]

        assert [(0, 1), (1, 1), (1, 2), (2, 2)] == ranks.call(0)

    def test_is_bounded(self):
        ranks = self.ahead(capacity=2)
        ranks.call(1)

        assert [(1, 1)] == ranks.call(1)
        assert 2 == ranks.matcher.waiting

    def test_ends_with_the_run(self):
        ranks = self.ahead()
        ranks.call(1, IO)

        assert [(1, 1), (1, 2)] == left(ranks.matcher.flush())


class TestBounds:
    def test_calls_too_old_to_be_known_are_not_matched(self, monkeypatch):
        ranks = Matching()
        monkeypatch.setattr(match, "MOST_CALLS", 2)
        ranks.call(0, IO)
        for _ in range(4):
            ranks.call(0)

        assert [(1, 0)] == ranks.call(1)

    def test_names_that_were_not_used_for_longest_are_forgotten(self, monkeypatch):
        ranks = Matching()
        monkeypatch.setattr(match, "MOST_NAMES", 1)
        ranks.call(0, IO)
        ranks.call(0, IO)
        ranks.call(0)

        assert [(1, 0)] == ranks.call(1, IO)

    def test_a_launch_that_left_is_forgotten(self):
        ranks = Matching()
        ranks.call(0)
        for rank in (0, 1):
            ranks.hear(Left(session_id(rank)))

        assert [] == ranks.matcher.state()["calls"]


class TestTheNextLife:
    def restored(self, ranks: Matching) -> tuple[Matching, Sequence[Event]]:
        other = Matching(ranks=0)
        other.own = dict(ranks.own)
        state = msgpack.unpackb(msgpack.packb(ranks.matcher.state()), strict_map_key=False)
        return other, other.matcher.restore(state)

    def test_knows_who_made_which_calls(self):
        ranks = Matching()
        for _ in range(3):
            ranks.call(0)
        ranks.call(0, IO)
        ranks.call(1)

        other, _ = self.restored(ranks)

        assert [(1, 1), (1, 2), (1, 3)] == [*other.call(1), *other.call(1), *other.call(1, IO)]

    def test_takes_what_waited_as_said(self):
        """Its frames are gone by then: it is in a row."""
        ranks = Matching(ranks=3)
        for rank in (0, 1, 2):
            ranks.call(rank)
        ranks.call(1)

        other, _ = self.restored(ranks)

        assert 0 == other.matcher.waiting
        assert [(2, 1)] == other.call(2)
        assert [(0, 1)] == other.call(0)
        assert [(0, 2), (1, 2)] == [*other.call(0), *other.call(1)]

    def test_lets_go_of_who_had_left(self):
        ranks = Matching()
        ranks.call(0)
        ranks.call(1)
        ranks.call(1)
        ranks.hear(Left(session_id(1)))

        _, events = self.restored(ranks)

        assert [Left(session_id(1))] == events

    def test_takes_a_call_that_is_in_a_row_to_be_at_its_step(self):
        """Whatever it was matched with in the life before."""
        ranks = Matching()
        ranks.call(0)
        ranks.call(1)

        assert [(1, 41)] == ranks.call(1, step=41, used=True)
        assert [(1, 42)] == ranks.call(1, IO)


class TestTheLine:
    """Through all stages: ranks that log different things implicitly, a patience apart at most."""

    @given(
        extras=st.lists(st.integers(0, 3), min_size=2, max_size=4),
        skews=st.lists(st.integers(0, 40), min_size=4, max_size=4),
        steps=st.integers(1, 15),
        every=st.integers(1, 8),
        crashes=st.lists(st.integers(0, 150), max_size=3),
    )
    def test_every_rank_s_share_is_at_the_step_of_the_lowest_and_none_is_late(
        self, extras, skews, steps, every, crashes
    ):
        tape = Tape(now=1000.0)
        line = Line(Disk(), Options(patience=PATIENCE))
        for rank in range(len(extras)):
            tape.hello(rank, world=len(extras))
        for tick in range(every * steps + max(skews) + 2):
            tape.now = 1000.0 + tick * 0.1
            for rank, extra in enumerate(extras):
                since = tick - skews[rank]
                if since >= 0 and since % every == 0 and since // every < steps:
                    first = since // every * (1 + extra)
                    calls = [counted(first, {"loss": float(rank), "of": 1})]
                    calls += [counted(first + 1 + n, {f"own{rank}": n}) for n in range(extra)]
                    tape.say(rank, *calls)
            if tick in crashes:
                line.confirm(1)
                line = line.crash(durable=1)
            line.read(tape.entries, clock=tape.now)
            line.confirm(3)
        for rank in range(len(extras)):
            tape.bye(rank)
        line.read(tape.entries, clock=tape.now)
        line.finish()

        rows = line.disk.held
        own = extras[0]
        assert [] == [row for row in rows if row.late]
        losses = [row for row in rows if "loss" in row.values]
        assert [step * (1 + own) for step in range(steps)] == [row.places[MAIN_AXIS] for row in losses]
        assert {sum(range(len(extras))) / len(extras)} == {row.values["loss"] for row in losses}

    def test_a_lower_rank_that_says_a_name_once_does_not_hold_the_others_for_ever(self):
        """What rank 1 waits for never comes; rank 0, far ahead, is let go of all the same."""
        tape = Tape(now=1000.0)
        line = Line(Disk(), Options(patience=PATIENCE, capacity=10_000))
        for rank in (0, 1):
            tape.hello(rank, world=2)
        tape.say(0, counted(0, IO))
        tape.say(1, counted(0, IO))
        for step in range(1, 300):
            tape.now += 0.1
            tape.say(0, counted(step, LOSS))
            if step % 10 == 0:
                tape.say(1, counted(step // 10, IO))
            line.read(tape.entries, clock=tape.now)

        assert 300 - 2.2 * PATIENCE / 0.1 < line.assembler.last
