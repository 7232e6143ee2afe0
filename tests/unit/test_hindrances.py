"""What keeps a run waiting until somebody does something is said once, and once when it is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.errors import Trouble
from sidestepd.hindrances import LOOK_EVERY_S, Hindrances
from sidestepd.rundir import tell_trouble

NO_KEY = Trouble("there is no API key", lasting=True)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    return run_dir


def looks(open_runs: list[Path]) -> tuple[Hindrances, list[str]]:
    said: list[str] = []
    return Hindrances(lambda: open_runs, said.append), said


def test_what_lasts_is_said_once_and_that_it_is_over(run_dir):
    hindrances, said = looks([run_dir])
    tell_trouble(run_dir, NO_KEY)

    hindrances(0.0)
    hindrances(LOOK_EVERY_S)
    assert (["mine waits: there is no API key"], "mine waits: there is no API key") == (said, hindrances.words)

    tell_trouble(run_dir, None)
    hindrances(LOOK_EVERY_S * 2)
    assert ("mine goes on", "") == (said[-1], hindrances.words)


def test_what_heals_by_itself_is_not_said(run_dir):
    hindrances, said = looks([run_dir])
    tell_trouble(run_dir, Trouble("the server is away"))

    hindrances(0.0)

    assert ([], "") == (said, hindrances.words)


def test_a_run_that_is_over_goes_without_a_word(run_dir):
    runs = [run_dir]
    hindrances, said = looks(runs)
    tell_trouble(run_dir, NO_KEY)
    hindrances(0.0)

    runs.clear()
    hindrances(LOOK_EVERY_S)

    assert 1 == len(said)


def test_nothing_is_looked_at_more_often_than_said(run_dir):
    hindrances, said = looks([run_dir])
    hindrances(0.0)
    tell_trouble(run_dir, NO_KEY)

    hindrances(LOOK_EVERY_S / 2)

    assert [] == said
