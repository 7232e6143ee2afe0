"""Pace: step times, the slowest rank, scores that survive noise, and clocks that differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestepd.pace import CLOCK_WINDOW_S, Clocks, Pace, score
from sidestepd.rows import Bundle, Part
from tests.support.builders import part, session_id

WORK_S = 1.0
STEP, SLOWEST, SKEW = "sidestep/step_time_s", "sidestep/slowest_rank", "sidestep/skew_s"
SCORE, STRAGGLER = "sidestep/straggler_score", "sidestep/straggler_rank"


@dataclass(frozen=True)
class At:
    """Where a session sits."""

    rank: int
    node: str = "n0"
    launch: str = "L#0"
    main: bool = True


def seats(ranks: int, nodes: int = 1) -> dict[bytes, At]:
    return {session_id(rank): At(rank, node=f"n{rank % nodes}") for rank in range(ranks)}


def pace(**options: object) -> Pace:
    return Pace(**{"share": 0.15, "per_rank": 16, "work_metric": "", **options})  # type: ignore[arg-type]


def said(step: int, times: Mapping[int, float], **values: float) -> Bundle:
    """The row of one step: each rank's call."""
    parts = [part(step, {"loss": 0.5, **values}, rank=rank, time=time) for rank, time in times.items()]
    return Bundle(axis="global_step", step=step, parts=tuple(parts))


Work = Callable[[int, int], float]
"""How long a rank works in a step."""


def lockstep(work: Work, *, ranks: int = 4, steps: int = 60, call_behind: bool = False) -> list[Bundle]:
    """A training that waits for all at each step; each rank makes its call before it waits, or behind that."""
    bundles, began = [], 0.0
    for step in range(steps):
        done = {rank: began + work(rank, step) for rank in range(ranks)}
        began = max(done.values())
        bundles.append(said(step, dict.fromkeys(done, began) if call_behind else done))
    return bundles


def free(work: Work, *, ranks: int = 4, steps: int = 60) -> list[Bundle]:
    """Ranks that never wait for each other."""
    clocks = dict.fromkeys(range(ranks), 0.0)
    bundles = []
    for step in range(steps):
        clocks = {rank: time + work(rank, step) for rank, time in clocks.items()}
        bundles.append(said(step, clocks))
    return bundles


def last_row(bundles: list[Bundle], seen_by: Pace | None = None) -> dict[str, float]:
    """The newest value of each name."""
    one = seen_by or pace()
    own: dict[str, float] = {}
    for bundle in bundles:
        own |= one.see(bundle, seats(len(bundle.parts)))
    return own


def slow(rank: int, by: float = 0.3) -> Work:
    return lambda who, _: WORK_S * (1 + by * (who == rank))


class TestStepTimes:
    def test_are_mean_and_max_from_call_to_call(self):
        one = pace()
        one.see(said(3, {0: 10.0, 1: 20.0}), seats(2))

        own = one.see(said(4, {0: 12.0, 1: 26.0}), seats(2))

        assert (4.0, 6.0, 1) == (own[STEP], own[f"{STEP}.max"], own[SLOWEST])

    def test_are_per_step_where_not_every_step_is_logged(self):
        one = pace()
        one.see(said(0, {0: 0.0, 1: 0.0}), seats(2))

        own = one.see(said(10, {0: 20.0, 1: 20.5}), seats(2))

        assert 2.05 == pytest.approx(own[f"{STEP}.max"])

    def test_are_not_there_at_the_first_step(self):
        assert {SKEW: 1.0} == pace().see(said(0, {0: 0.0, 1: 1.0}), seats(2))

    def test_of_one_rank_alone_are_its_own_business(self):
        one = pace()

        assert [{}, {}] == [one.see(said(step, {0: step}), seats(1)) for step in (0, 1)]

    def test_of_a_clock_that_was_set_back_are_left_out(self):
        one = pace()
        one.see(said(0, {0: 5000.0, 1: 5000.0}), seats(2))

        own = one.see(said(1, {0: 5001.0, 1: 1401.0}), seats(2))

        assert {SKEW} == own.keys()

    def test_are_those_of_the_call_that_all_make(self):
        """Rank 0 says something more, earlier in the step: that is no reason to call it fast."""
        one, rows = pace(), []
        for step in range(2):
            parts = [
                part(step, {"lr": 0.1}, rank=0, time=10.0 * step),
                *(part(step, rank=rank, time=10.0 * step + 5) for rank in range(3)),
                part(step, {"eval": 0.1}, rank=0, time=10.0 * step + 9),
            ]
            rows.append(one.see(Bundle(axis="global_step", step=step, parts=tuple(parts)), seats(3)))

        assert (0.0, 10.0) == (rows[1][SKEW], rows[1][f"{STEP}.max"])

    def test_begin_anew_with_another_launch(self):
        one = pace()
        one.see(said(0, {0: 0.0, 1: 0.0}), seats(2))
        restarted = {id_: At(it.rank, launch="L#1") for id_, it in seats(2).items()}

        assert {SKEW: 0.0} == one.see(said(1, {0: 500.0, 1: 500.0}), restarted)

    def test_go_on_after_a_death_of_delivery(self):
        one, other = pace(), pace()
        one.see(said(0, {0: 0.0, 1: 0.0}), seats(2))
        one.see(said(1, {0: 1.0, 1: 1.0}), seats(2))
        other.restore(msgpack.unpackb(msgpack.packb(one.state()), strict_map_key=False))
        used: list[Part] = [part(2, rank=rank, time=3.0, used=True) for rank in range(2)]
        for it in used:
            other.note(it, seats(2)[it.session])

        assert 1.5 == other.see(said(3, {0: 4.5, 1: 4.5}), seats(2))[STEP]


class TestStragglers:
    @pytest.mark.parametrize("training", [lockstep, free])
    @pytest.mark.parametrize("rank", range(4))
    def test_are_found_whether_ranks_wait_for_each_other_or_not(self, training, rank):
        own = last_row(training(slow(rank)))

        assert (rank, rank) == (own[SLOWEST], own[STRAGGLER])
        assert 0.3 == pytest.approx(own[SCORE])
        assert 0.0 == pytest.approx(own[f"{SCORE}/rank{(rank + 1) % 4}"])

    def test_among_two_are_found_too(self):
        assert 1 == last_row(lockstep(slow(1), ranks=2))[STRAGGLER]

    def test_are_not_those_that_once_were_slow(self):
        """A checkpoint on rank 0 every tenth step holds everybody up, and makes nobody a straggler."""
        own = last_row(lockstep(lambda rank, step: WORK_S + 20.0 * (rank == 0 and step % 10 == 0)))

        assert -1 == own[STRAGGLER]

    def test_are_forgotten_once_they_keep_up(self):
        own = last_row(lockstep(lambda rank, step: WORK_S * (1.3 if rank == 2 and step < 60 else 1.0), steps=100))

        assert -1 == own[STRAGGLER]

    def test_that_stay_behind_without_falling_back_further_are_none_any_more(self):
        """Where ranks do not wait for each other, one that lost ground is as fast as all, so many steps behind."""
        own = last_row(free(lambda rank, step: WORK_S * (3.0 if rank == 2 and step < 20 else 1.0), steps=100))

        assert -1 == own[STRAGGLER]
        assert own[SKEW] > 10 * WORK_S

    def test_are_nobody_where_the_call_lies_behind_the_waiting(self):
        """Then all make it at once, and call times can not tell. Nobody is blamed for that."""
        own = last_row(lockstep(slow(2), call_behind=True))

        assert -1 == own[STRAGGLER]
        assert 1.3 == pytest.approx(own[STEP])

    def test_are_found_there_by_what_ranks_say_of_their_work(self):
        one, own = pace(work_metric="perf/work_s"), {}
        for row in lockstep(slow(2), call_behind=True):
            parts = [
                part(row.step, {"perf/work_s": slow(2)(it.rank, 0), "loss": 1}, rank=it.rank, time=it.time)
                for it in row.parts
            ]
            own |= one.see(Bundle(axis=row.axis, step=row.step, parts=tuple(parts)), seats(4))

        assert (2, 2) == (own[SLOWEST], own[STRAGGLER])

    def test_have_no_score_of_their_own_among_very_many(self):
        own = last_row(lockstep(slow(2)), pace(per_rank=3))

        assert 2 == own[STRAGGLER]
        assert not any(name.startswith(f"{SCORE}/") for name in own)

    @given(
        seed=st.integers(0, 2**32),
        ranks=st.integers(3, 8),
        victim=st.integers(0, 7),
        noise=st.floats(0.0, 0.1),
        training=st.sampled_from([lockstep, free]),
    )
    def test_are_the_right_ones_through_noise_and_outliers(self, seed, ranks, victim, noise, training):
        """Every step of every rank varies, and one in twenty takes five times as long."""
        chance, victim = random.Random(seed), victim % ranks

        def work(rank: int, _: int) -> float:
            outlier = 5.0 if chance.random() < 0.05 else 1.0
            return WORK_S * outlier * (1 + noise * chance.gauss(0, 1)) * (1.4 if rank == victim else 1.0)

        assert victim == last_row(training(work, ranks=ranks, steps=80))[STRAGGLER]

    @given(seed=st.integers(0, 2**32), ranks=st.integers(2, 8), noise=st.floats(0.0, 0.2))
    def test_are_nobody_in_noise_alone(self, seed, ranks, noise):
        chance = random.Random(seed)

        def work(_: int, __: int) -> float:
            return WORK_S * (3.0 if chance.random() < 0.1 else 1.0) * (1 + noise * chance.random())

        one = pace()
        for bundle in lockstep(work, ranks=ranks, steps=100):
            assert -1 == one.see(bundle, seats(ranks)).get(STRAGGLER, -1)


class TestScores:
    @given(st.lists(st.floats(-0.5, 5.0), min_size=8, max_size=32), st.floats(0.01, 1.0))
    def test_lie_between_the_least_and_the_most_and_are_sure_only_above_the_share(self, excesses, share):
        found = score(excesses, share)

        assert min(excesses) <= found.value <= max(excesses)
        assert not found.sure or found.value >= share

    def test_are_not_sure_when_the_noise_is_wider_than_they_are(self):
        wide, narrow = score([-1.0, 1.5] * 8, 0.15), score([0.2, 0.3] * 8, 0.15)

        assert wide.value == narrow.value == 0.25
        assert (False, True) == (wide.sure, narrow.sure)

    @given(st.lists(st.floats(0.2, 0.4), min_size=17, max_size=32), st.lists(st.floats(-1e6, 1e6), max_size=8))
    def test_are_not_moved_far_by_a_few_steps_however_far_off(self, excesses, wild):
        assert 0.2 <= score([*excesses, *wild], 0.15).value <= 0.4


class TestClocks:
    def test_on_one_node_are_the_same(self):
        clocks = Clocks()
        clocks.hear("n0", 100.0, 500.0)

        assert 0.0 == clocks.ahead("n0", "n0")

    def test_that_were_not_heard_are_taken_as_they_are(self):
        assert 0.0 == Clocks().ahead("n0", "n1")

    @given(
        offset=st.floats(-1e5, 1e5),
        delays=st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 0.5)), min_size=1, max_size=50),
    )
    def test_are_told_apart_to_within_the_least_delays(self, offset, delays):
        clocks = Clocks()
        for number, (here, there) in enumerate(delays):
            now = 1000.0 + number
            clocks.hear("n0", now, now + here)
            clocks.hear("n1", now + offset, now + there)

        error = clocks.ahead("n1", "n0") - offset

        least_here, least_there = (min(delay[it] for delay in delays) for it in (0, 1))
        assert error == pytest.approx(least_here - least_there, abs=1e-6)

    def test_that_are_set_are_known_by_their_new_time_within_two_windows(self):
        clocks = Clocks()
        for second in range(int(4 * CLOCK_WINDOW_S)):
            offset = 0.0 if second < CLOCK_WINDOW_S else -3600.0
            clocks.hear("n0", second, second + 0.1)
            clocks.hear("n1", second + offset, second + 0.1)

        assert -3600.0 == pytest.approx(clocks.ahead("n1", "n0"))

    def test_that_differ_by_an_hour_do_not_make_a_straggler(self):
        one, own = pace(), {}
        here = seats(4, nodes=2)
        for bundle in lockstep(slow(2)):
            parts = []
            for it in bundle.parts:
                hour = 3600.0 * (here[it.session].node == "n1")
                one.clocks.hear(here[it.session].node, it.time + hour, it.time + 0.02)
                parts.append(part(bundle.step, rank=it.rank, time=it.time + hour))
            own |= one.see(Bundle(axis="global_step", step=bundle.step, parts=tuple(parts)), here)

        assert (2, 2) == (own[SLOWEST], own[STRAGGLER])
        assert 0.3 == pytest.approx(own[SKEW], abs=0.05)
