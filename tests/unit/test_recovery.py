"""What the run holds although the row log does not know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidestepd.recovery import Recovery, settled_before
from tests.support.builders import part, row, session_id


def recovered(*rows: tuple[int, Mapping[str, Any]]) -> Recovery:
    return Recovery(rows)


class TestWhatIsInTheRun:
    def test_a_record_of_a_row_is(self):
        assert recovered((4, {"global_step": 4, "loss": 0.5})).holds(part(4))

    def test_one_of_another_step_is_not(self):
        assert not recovered((4, {"global_step": 4, "loss": 0.5})).holds(part(5))

    def test_the_axis_counts_and_not_the_step_that_wandb_was_given(self):
        recovery = recovered((7, {"global_step": 4, "loss": 0.5}))

        assert (True, False) == (recovery.holds(part(4)), recovery.holds(part(7)))

    def test_a_metric_that_has_the_axis_s_name_does_not_hide_the_step(self):
        values = {"global_step": 1077.5, "sidestep/global_step": 4, "eval/step": 7, "sidestep/eval/step": 2}
        recovery = recovered((9, values))

        assert {("global_step", 0): 4, ("eval/step", 0): 2} == recovery.released
        assert recovery.holds(part(4, {"global_step": 1077.5}))
        assert recovery.holds(part(2, {"eval/step": 7}, axis="eval/step"))

    def test_a_stage_may_have_our_name(self):
        recovery = recovered((9, {"global_step": 4, "step": 1, "sidestep/step": 7, "sidestep/loss": 1.0}))

        assert recovery.holds(part(7, {"sidestep/loss": 1.0}, axis="sidestep/step"))

    def test_axes_that_met_in_a_row_are_told_apart(self):
        recovery = recovered((7, {"global_step": 7, "loss": 0.5, "eval/step": 2, "eval/accuracy": 1.0}))

        assert recovery.holds(part(2, {"eval/accuracy": 1.0}, axis="eval/step"))
        assert not recovery.holds(part(7, {"eval/accuracy": 1.0}, axis="eval/step"))

    def test_a_name_that_the_row_lacks_was_not_in_it(self):
        assert not recovered((4, {"global_step": 4, "loss": 0.5})).holds(part(4, {"other": 1}))

    def test_names_are_found_in_what_was_made_of_them(self):
        values = {"global_step": 4, "loss.mean": 1.0, "loss.max": 2.0, "time/rank3": 0.1}

        assert recovered((4, values)).holds(part(4, {"loss": 1.5, "time": 0.1}))

    def test_a_row_of_a_process_s_own_is_known_by_when_it_was_said(self):
        """Others' rows may be at the same step, and it may be another after a lost row log."""
        own = {"global_step": 7, "loss": 0.5, "lr": 0.1, "sidestep/process": "n0:7", "_timestamp": 2.5}
        recovery = recovered((9, own))

        assert recovery.holds(part(0, session=7, time=2.5, apart="n0:7"))
        assert recovery.holds(part(0, {"lr": 0.1}, session=7, time=2.6, apart="n0:7"))
        assert not recovery.holds(part(1, session=7, time=2.7, apart="n0:7"))
        assert not recovery.holds(part(0, session=8, time=2.5, apart="n0:8"))
        assert not recovery.holds(part(7))
        assert {} == recovery.released
        assert 9 == recovery.last

    def test_of_several_ranks_those_heard_first_are_in_it(self):
        """The others came late, and their rows were not written."""
        recovery = recovered((4, {"global_step": 4, "loss": 0.5, "sidestep/ranks_reported": 2}))

        assert [True, True, False] == [recovery.holds(part(4, rank=rank)) for rank in (2, 0, 1)]

    def test_what_one_rank_said_in_several_calls_is_all_in_it(self):
        recovery = recovered((4, {"global_step": 4, "a": 1, "b": 1, "sidestep/ranks_reported": 1}))

        assert recovery.holds(part(4, {"a": 1}))
        assert recovery.holds(part(4, {"b": 1}))

    def test_what_it_released_is_as_far_as_any_row_came(self):
        recovery = recovered((3, {"global_step": 3}), (4, {"eval/step": 9}), (5, {"global_step": 2}))

        marks = recovery.over({"last": 4, "released": [["global_step", 0, 7]], "shift": 1})

        assert {"last": 5, "released": [["global_step", 0, 7], ["eval/step", 0, 9]], "shift": 1} == marks

    def test_a_server_may_hold_a_later_row_than_any_that_can_be_read(self):
        assert 9 == recovered((3, {"global_step": 3})).over({"last": 4, "released": []}, last=9)["last"]


class TestAttempts:
    """A row says its attempt where an earlier one came as far."""

    def test_a_step_that_is_said_again_is_not_in_the_row_of_the_attempt_before(self):
        recovery = recovered((4, {"global_step": 4, "loss": 0.5, "_timestamp": 1.0}))

        assert not recovery.holds(part(4, time=9.0, attempt=1))
        assert recovery.holds(part(4, time=1.0))

    def test_it_is_in_the_row_that_says_its_attempt(self):
        recovery = recovered((7, {"global_step": 4, "loss": 0.5, "sidestep/attempt": 1}))

        assert (True, False) == (recovery.holds(part(4, attempt=1)), recovery.holds(part(4)))

    def test_beyond_the_attempt_before_rows_do_not_say_it(self):
        recovery = recovered(
            (4, {"global_step": 4, "loss": 0.5, "sidestep/attempt": 1, "_timestamp": 9.0}),
            (5, {"global_step": 5, "loss": 0.5, "_timestamp": 10.0}),
        )

        found = [recovery.holds(part(step, time=step + 5.0, attempt=1)) for step in (4, 5)]

        assert [True, True] == found

    def test_each_is_released_by_itself_and_a_launch_goes_on_behind_all(self):
        recovery = recovered((8, {"global_step": 8}), (9, {"global_step": 4, "sidestep/attempt": 1}))

        assert {("global_step", 0): 8, ("global_step", 1): 4} == recovery.released
        assert {"global_step": 8} == recovery.reached


class TestWhatWasSettled:
    """Records of frames that are gone were delivered, but for those known to have been given up."""

    def test_without_any_row(self):
        kept = {session_id(1): 40, session_id(2): 30}

        assert (65, 0) == settled_before(kept, [], cursor=0, front=10, given_up=5)

    def test_a_settled_row_in_frames_that_are_there_is_delivered_too(self):
        rows = [(row(1, positions=((12, 40), (13, 41))), True)]

        assert (42, 0) == settled_before({session_id(1): 40}, rows, cursor=9, front=10, given_up=0)

    def test_a_row_that_is_still_to_be_confirmed_is_not_counted_before_it_is(self):
        rows = [(row(1, positions=((5, 38), (6, 39))), False)]

        assert (38, 2) == settled_before({session_id(1): 40}, rows, cursor=4, front=10, given_up=0)
