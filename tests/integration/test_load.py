"""The load generator of many sessions starts, speaks to a daemon with keys, and judges what became of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.benchmarks.sessions import judged
from tests.support.namespaces import ROOT

WELL: dict[str, Any] = {
    "relays": 2, "records": 160, "steps": 20, "acknowledged": 160, "pending": 0, "dropped": 0, "exit_code": 0,
    "relays_exit_codes": [0, 0], "delivered": 160, "balances": True, "rows": 20,
}  # fmt: skip
LOAD = "--sessions 8 --seconds 2 --processes 1"


def said(*words: str) -> list[str]:
    """The verdicts of a load."""
    command = [sys.executable, "-m", "tests.benchmarks.sessions", *LOAD.split(), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout.rpartition("}\n")[2].splitlines()


def test_a_small_load_is_in_the_run():
    verdicts = said()

    assert ["holds"] * 3 == [line.split()[0] for line in verdicts], verdicts


@pytest.mark.nightly
def test_direct_and_behind_relays_are_compared():
    *verdicts, told = said("--compare", "2")

    assert ["holds"] * 6 == [line.split()[0] for line in verdicts], verdicts
    assert told.startswith("told   intake of the head, direct and through 2 relays: ")
    assert "goal: 4" in told


@pytest.mark.parametrize(
    "instead",
    [{"dropped": 1}, {"acknowledged": 159}, {"pending": 1}, {"delivered": 159}, {"rows": 19}, {"balances": False},
     {"exit_code": 75}, {"relays_exit_codes": [0, 75]}],
    ids=str,
)  # fmt: skip
def test_what_is_missing_fails_the_load(instead: dict[str, Any]):
    assert all(judgement.holds for judgement in judged(WELL))
    assert 1 == sum(not judgement.holds for judgement in judged(WELL | instead))
