"""`log()` with the daemon up, away and broken in parts: it returns, raises nothing, and each record is counted.

How fast it returns is for `python -m tests.benchmarks.never_blocks` to judge, against a control in the same run.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.never_blocks import ACKNOWLEDGING, CONDITIONS, FULL, Case, measured_apart

pytestmark = pytest.mark.chaos

CALLS = 1_000
BLOCKED_US = 1_000_000.0
"""A call that waits for a daemon that does not answer waits for ever; the scheduler is never this late."""


OFTEN = ("up", "frozen", "killed", "absent")
"""The others are for the long form."""


class Cases(dict[str, Case]):
    """Each condition, brought about when it is asked for first."""

    def __missing__(self, condition: str) -> Case:
        self[condition] = measured_apart(condition, CALLS)
        return self[condition]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases()


@pytest.mark.parametrize(
    "condition", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.nightly) for it in CONDITIONS]
)
class TestWhateverTheDaemonDoes:
    def test_no_call_waits_for_it(self, cases, condition):
        assert cases[condition].log.max < BLOCKED_US

    def test_every_record_is_accounted_for(self, cases, condition):
        case = cases[condition]

        assert case.balances
        assert case.offered > CALLS

    def test_the_condition_is_what_it_is_called(self, cases, condition):
        """The fault happened: what is logged during it is acknowledged, dropped or spilled as it must be."""
        case = cases[condition]

        assert (condition in ACKNOWLEDGING) == (case.acknowledged == case.offered)
        assert case.spilled == (condition == "spilling")
        assert FULL.get(condition, "") in (*case.reasons, "")

    def test_finish_returns_in_its_time_and_says_what_is_left(self, cases, condition):
        case = cases[condition]

        assert case.finish_s < case.finish_timeout_s + 2.0
        assert case.says_what_is_left
