"""Which run of its launch a session means: the k-th init of every rank the k-th run, in whatever order."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidestepd.launches import Launches


def hello(rank: int = 0, *, pid: int | None = None, launch: str = "L", attempt: int = 0) -> dict[str, Any]:
    own = 100 + rank if pid is None else pid
    return {"launch": launch, "rank": rank, "node": "here", "pid": own, "attempt": attempt}


def seat(launches: Launches, said: dict[str, Any]) -> int:
    """A new session says HELLO, and is let in."""
    turn = launches.turn_of(said)
    launches.take(said, turn)
    return turn


class TestTurns:
    @given(st.lists(st.integers(0, 3), max_size=40))
    def test_the_kth_init_of_every_rank_is_the_kth_run(self, arrivals: list[int]):
        launches = Launches()
        inits: dict[int, int] = {}

        for rank in arrivals:
            assert inits.get(rank, 0) == seat(launches, hello(rank))
            inits[rank] = inits.get(rank, 0) + 1

    def test_launches_do_not_know_of_each_other(self):
        launches = Launches()
        seat(launches, hello())
        seat(launches, hello())

        assert 0 == seat(launches, hello(launch="another"))

    def test_a_fork_is_where_its_rank_is(self):
        launches = Launches()
        seat(launches, hello())
        seat(launches, hello())

        assert 1 == seat(launches, hello(pid=7))

    def test_a_restarted_rank_is_where_it_was(self):
        launches = Launches()
        seat(launches, hello(0))
        seat(launches, hello(1))

        assert 0 == seat(launches, hello(1, pid=7, attempt=1))

    def test_a_rank_that_comes_when_the_first_run_is_over_is_in_the_first_that_is_not(self):
        launches = Launches()
        seat(launches, hello(0))
        seat(launches, hello(0))
        launches.closed("L", 0)

        assert 1 == seat(launches, hello(1))

    def test_a_process_whose_run_is_over_goes_on_to_the_next(self):
        launches = Launches()
        for _ in range(3):
            seat(launches, hello(0))
        seat(launches, hello(1))
        launches.closed("L", 0)

        assert 1 == seat(launches, hello(1))


class TestMemory:
    @given(st.integers(1, 30), st.integers(1, 4))
    def test_a_launch_without_an_open_run_is_forgotten(self, turns: int, ranks: int):
        launches = Launches()

        for turn in range(turns):
            for rank in range(ranks):
                assert turn == seat(launches, hello(rank))
        for turn in range(turns):
            assert 1 == len(launches)
            launches.closed("L", turn)

        assert 0 == len(launches)
