"""What entries say of lives: attempts, children, ranks that come again."""

from __future__ import annotations

import msgpack
import pytest

from sidestepd.resolve import Joined, Resolver
from sidestepd.rows import Part
from tests.support.builders import (
    counted,
    log,
)
from tests.support.reading import Reading


@pytest.fixture
def reading() -> Reading:
    return Reading()


class TestAttempts:
    def joined(self, reading: Reading) -> list[tuple[str, int]]:
        return [(said.launch, said.attempt) for said in reading.said() if isinstance(said, Joined)]

    def test_a_higher_restart_count_is_a_new_attempt_of_the_run(self):
        reading = Reading()
        for restarts in (0, 1, 1000):
            reading.tape.hello(restarts, rank=0, world=2, attempt=restarts)
            reading.tape.hello(restarts + 5000, rank=1, world=2, attempt=restarts)

        assert ["L#0", "L#0", "L~1#0", "L~1#0", "L~1000#0", "L~1000#0"] == [it for it, _ in self.joined(reading)]
        assert [0, 0, 1, 1, 2, 2] == [it.attempt for it in reading.resolver.sessions.values()]

    def test_a_launch_that_is_new_joins_the_attempt_that_goes_on(self):
        reading = Reading()
        reading.tape.hello(1)
        reading.tape.hello(2, rank=1, attempt=1)
        reading.tape.hello(3, rank=0, launch="evaluation")

        assert [("L#0", 0), ("L~1#0", 1), ("evaluation#0", 1)] == self.joined(reading)

    def test_a_straggler_of_an_older_attempt_is_of_that_one(self):
        reading = Reading()
        reading.tape.hello(1, rank=0, world=2)
        reading.tape.hello(2, rank=0, world=2, attempt=1)
        reading.tape.hello(3, rank=1, world=2)

        assert [("L#0", 0), ("L~1#0", 1), ("L#0", 0)] == self.joined(reading)

    def test_parts_are_of_their_session_s_attempt_and_count_on(self):
        reading = Reading()
        reading.tape.hello(1)
        reading.tape.say(1, counted(0), counted(1), log(5))
        reading.tape.hello(2, rank=0, attempt=1)
        reading.tape.say(2, counted(0), log(3))

        assert [(0, 0), (0, 1), (0, 5), (1, 6), (1, 3)] == [(it.attempt, it.step) for it in reading.parts()]

    def test_outlive_a_crash(self):
        reading, other = Reading(), Resolver()
        reading.tape.hello(1)
        reading.tape.hello(2, rank=0, attempt=1)
        reading.said()

        other.restore(msgpack.unpackb(msgpack.packb(reading.resolver.state()), strict_map_key=False))

        [joined] = other.read(reading.tape.hello(3, rank=1, world=2, attempt=2))
        assert ("L~2#0", 2) == (joined.launch, joined.attempt)


class TestChildren:
    def test_a_session_beside_its_rank_s_own_is_a_child_and_its_bye_is_not_its_rank_s(self):
        """DataLoader workers say BYE one after the other, and none of them opens a launch."""
        reading = Reading()
        reading.tape.hello(0, world=2)
        for child in (5, 6, 7):
            reading.tape.hello(child, rank=0, world=2)
            reading.tape.say(child, counted(0))
            reading.tape.bye(child)
        reading.tape.say(0, counted(0))

        said = reading.said()

        assert {"L#0"} == {it.launch for it in said if isinstance(it, Joined)}
        assert [None, None, None, 0] == [it.call and it.call.own for it in said if isinstance(it, Part)]

    def test_a_session_after_one_that_died_stands_for_its_rank(self):
        reading = Reading()
        reading.tape.hello(0, world=2)
        reading.tape.lease(0)
        reading.tape.hello(5, rank=0, world=2)
        reading.tape.say(5, counted(0))

        assert [0] == [it.call and it.call.own for it in reading.parts()]

    def test_a_world_of_one_has_nobody_to_be_matched_with(self):
        reading = Reading()
        reading.tape.hello(0)
        reading.tape.say(0, counted(0))

        assert [None] == [it.call for it in reading.parts()]


class TestLivesOfRanks:
    def test_the_second_life_of_each_rank_is_one_launch_whoever_is_first(self):
        """Rank 0 has finished and begun again before rank 1 came at all."""
        reading = Reading()
        for session in (1, 2):
            reading.tape.hello(session, rank=0, world=2)
            reading.tape.bye(session)
        for session in (3, 4):
            reading.tape.hello(session, rank=1, world=2)
            reading.tape.bye(session)

        assert ["L#0", "L#1", "L#0", "L#1"] == [it.launch for it in reading.said() if isinstance(it, Joined)]

    def test_a_larger_world_of_the_same_name_does_not_join_one_that_is_over(self):
        reading = Reading()
        reading.tape.hello(1, rank=0)
        reading.tape.bye(1)
        for rank in (1, 0):
            reading.tape.hello(10 + rank, rank=rank, world=2)

        assert ["L#0", "L#1", "L#1"] == [it.launch for it in reading.said() if isinstance(it, Joined)]


class TestStepsThatAreNobodyElses:
    """Those that a process counts for which no rank stands."""

    def owners(self, reading: Reading) -> list[tuple[int, str]]:
        return [(it.step, it.apart) for it in reading.parts()]

    def test_a_child_s_go_on_from_what_was_said_before_it_came(self):
        reading = Reading()
        reading.tape.hello(0)
        reading.tape.say(0, log(99), counted(2, stage="eval"))
        reading.tape.hello(5, rank=0)
        reading.tape.say(0, log(500))
        reading.tape.say(5, counted(0), counted(1), counted(0, stage="eval"), counted(0, stage="load"))

        child = "n0:5"
        expected = [(99, ""), (2, ""), (500, ""), (100, child), (101, child), (3, child), (0, child)]
        assert expected == self.owners(reading)

    def test_steps_that_a_child_names_are_everybody_s(self):
        reading = Reading()
        reading.tape.hello(0)
        reading.tape.hello(5, rank=0)
        reading.tape.say(5, log(7), counted(0))

        assert [(7, ""), (0, "n0:5")] == self.owners(reading)

    def test_a_process_that_nobody_numbered_beside_another_counts_for_itself(self):
        """As `multiprocessing` spawns them: each is a launch of its own."""
        reading = Reading()
        for session, launch in ((1, "A"), (2, "B"), (3, "C")):
            reading.tape.hello(session, rank=0, launch=launch)
        for session in (1, 2, 3):
            reading.tape.say(session, counted(0))

        assert [(0, ""), (0, "n0:2"), (0, "n0:3")] == self.owners(reading)

    @pytest.mark.parametrize("end", ["bye", "lease"])
    def test_one_that_follows_another_goes_on_for_everybody(self, end: str):
        reading = Reading()
        reading.tape.hello(1, rank=0, launch="A")
        reading.tape.say(1, counted(0))
        getattr(reading.tape, end)(1)
        reading.tape.hello(2, rank=0, launch="B")
        reading.tape.say(2, counted(0))

        assert [(0, ""), (1, "")] == self.owners(reading)

    def test_ranks_are_numbered_and_never_for_themselves(self):
        """Where the launch before them was killed, and its end is not known yet."""
        reading = Reading()
        for launch in ("A", "B"):
            for rank in (0, 1):
                reading.tape.hello(2 * (launch == "B") + rank, rank=rank, world=2, launch=launch)
        for session in range(4):
            reading.tape.say(session, counted(0))

        assert [(0, "")] * 4 == self.owners(reading)

    def test_outlive_a_crash(self):
        reading, other = Reading(), Resolver()
        reading.tape.hello(0)
        reading.tape.say(0, log(9))
        reading.tape.hello(5, rank=0)
        reading.said()

        other.restore(msgpack.unpackb(msgpack.packb(reading.resolver.state()), strict_map_key=False))

        part, _ = other.read(reading.tape.say(5, counted(0)))
        assert (10, "n0:5") == (part.step, part.apart)
