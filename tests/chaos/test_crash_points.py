"""Die at each named place, in every life and while recovering too: every row is in the run exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chaos import DEADLINE_S, Training, assert_whole, steps_taken, training
from tests.support.waiting import eventually

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


OFTEN = ("intake.committed", "delivery.decided", "delivery.settle")
"""The others are for the long form."""


def die_at(place: str, base: Path, *, passes: int, sink: str) -> Training:
    """A training of two ranks through a daemon that dies there at least twice; gives the run when it is over."""
    enough = base / "enough"
    with Training(
        base,
        training(ranks=2, steps=300, rate=200.0, until=enough),
        sink=sink,
        options={"delivery.confirm_interval_s": 0.1, "delivery.backoff_s": 0.2},
        environment={"SIDESTEP_CRASH_AT": f"{place}:{passes}"},
    ) as run:
        eventually(lambda: deaths(run, place) >= 2 or run.over, DEADLINE_S, run.log)
        enough.touch()
        assert run.wait() == 0, run.log()
    assert deaths(run, place) >= 2
    return run


def deaths(run: Training, place: str) -> int:
    return run.boots() - 1 if place.startswith("intake") else run.deaths()


@pytest.mark.parametrize(
    "place", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.nightly) for it in PLACES]
)
def test_a_daemon_that_dies_there_again_and_again_writes_every_row_once(place: str, tmp_path: Path):
    run = die_at(place, tmp_path, passes=PLACES[place], sink="jsonl")

    assert_whole(run, ranks=2, steps=steps_taken(tmp_path / "enough"))


@pytest.mark.nightly
def test_so_does_wandb_behind_a_delivery_that_dies_with_rows_on_their_way(tmp_path: Path):
    """What wandb-core had not written yet is sent again; what it had is not."""
    run = die_at("delivery.written", tmp_path, passes=12, sink="wandb")

    assert_whole(run, ranks=2, steps=steps_taken(tmp_path / "enough"))
