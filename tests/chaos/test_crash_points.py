"""Die at each named place, in every life and while recovering too: every row is in the run exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chaos import Training, assert_whole, training

pytestmark = pytest.mark.chaos

PLACES = {
    "intake.commit": 8,
    "intake.committed": 8,
    "delivery.decide": 9,
    "delivery.decided": 9,
    "delivery.written": 9,
    "delivery.settle": 4,
    "delivery.settled": 5,
}
"""Each place, and at which pass of it a life ends: late enough that every life comes further than the last."""


def die_at(place: str, base: Path, *, passes: int, sink: str) -> Training:
    """A training of two ranks through a daemon that dies again and again; gives the run when it is over."""
    with Training(
        base,
        training(ranks=2, steps=300, rate=200.0),
        sink=sink,
        options={"delivery.confirm_interval_s": 0.1, "delivery.backoff_s": 0.2},
        environment={"SIDESTEP_CRASH_AT": f"{place}:{passes}"},
    ) as run:
        assert run.wait() == 0, run.log()
    return run


@pytest.mark.parametrize("place", PLACES)
def test_a_daemon_that_dies_there_again_and_again_writes_every_row_once(place: str, tmp_path: Path):
    run = die_at(place, tmp_path, passes=PLACES[place], sink="jsonl")

    deaths = run.boots() - 1 if place.startswith("intake") else run.deaths()
    assert deaths >= 2
    assert_whole(run, ranks=2, steps=300)


def test_so_does_wandb_behind_a_delivery_that_dies_with_rows_on_their_way(tmp_path: Path):
    """What wandb-core had not written yet is sent again; what it had is not."""
    run = die_at("delivery.written", tmp_path, passes=12, sink="wandb")

    assert run.deaths() >= 2
    assert_whole(run, ranks=2, steps=300)
