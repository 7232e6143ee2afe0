"""Rows: their `_step`, who merges with whom, what is late, what is defined."""

from __future__ import annotations

import msgpack
import pytest

from sidestepd.assemble import Assembler
from sidestepd.rows import MAIN_AXIS, Bundle, Definition, Latest, Position
from sidestepd.rules import Rule, Rules
from tests.support.assembling import PATIENCE, add, assembler, evaluation, main, places
from tests.support.builders import bundle, part, row


class TestMainRows:
    def test_a_row_takes_its_step_as_it_is(self):
        it = assembler()

        rows = add(it, main(5), main(6), main(100))

        assert [5, 6, 100] == [row.step for row in rows]
        assert all("sidestep/step_shift" not in row.values for row in rows)

    def test_the_axis_value_is_data_in_it(self):
        [row] = add(assembler(), main(5, {"loss": 0.5}))

        assert {"global_step": 5, "loss": 0.5} == row.values

    def test_a_user_s_metric_of_that_name_replaces_the_value_only(self):
        [row] = add(assembler(), main(5, {"global_step": 77}))

        assert {"global_step": 77, "sidestep/global_step": 5} == row.values
        assert {"global_step": 5} == row.places

    def test_axes_whose_values_were_replaced_still_meet(self):
        rows = add(assembler(), evaluation(0, {"eval/step": 9.5}), main(6, {"global_step": True}))

        values = {"global_step": True, "sidestep/global_step": 6, "eval/step": 9.5, "sidestep/eval/step": 0}
        assert [values] == [row.values for row in rows]

    def test_the_step_of_a_late_row_is_known_though_a_metric_has_its_name(self):
        made = assembler()
        add(made, main(5, {"global_step": 77}), main(6))

        [row] = add(made, main(5, {"global_step": 78, "loss": 1.0}, cause="late"))

        assert (78, 5) == (row.values["global_step"], row.values["sidestep/global_step"])

    def test_its_time_is_that_of_the_lowest_rank_s_first_call(self):
        parts = (part(5, rank=1, time=7.0), part(5, rank=0, time=9.0), part(5, rank=0, time=9.5))

        [row] = add(assembler(), Bundle(axis=MAIN_AXIS, step=5, parts=parts))

        assert 9.0 == row.time

    def test_it_holds_the_positions_of_all_its_parts(self):
        parts = tuple(part(5, rank=rank, position=Position(rank, 3)) for rank in range(3))

        [row] = add(assembler(), Bundle(axis=MAIN_AXIS, step=5, parts=parts))

        assert (Position(0, 3), Position(1, 3), Position(2, 3)) == row.positions

    def test_it_says_how_many_ranks_spoke_where_there_are_several(self):
        it = assembler()

        rows = add(it, bundle(5, {"a": 1}, {"a": 3}), main(6), world=2)

        assert [2, 1] == [row.values["sidestep/ranks_reported"] for row in rows]
        assert 2.0 == rows[0].values["a"]

    def test_it_does_not_say_so_where_that_is_switched_off(self):
        it = Assembler(Rules(()), patience=PATIENCE, max_wait=60.0, window=100, ranks_reported=False)

        [row] = add(it, bundle(5, {"a": 1}, {"a": 3}), world=2)

        assert {MAIN_AXIS: 5, "a": 2.0} == row.values

    def test_a_step_behind_the_last_one_takes_the_next_and_says_by_how_much(self):
        it = assembler()
        add(it, main(5), evaluation(0))
        it.flush()

        rows = add(it, main(6), main(7), main(100), main(101))

        assert [7, 8, 100, 101] == [row.step for row in rows]
        assert [1, 1, 0, None] == [row.values.get("sidestep/step_shift") for row in rows]

    def test_calls_of_one_session_that_overwrite_each_other_are_counted(self):
        it = assembler()

        add(it, Bundle(axis=MAIN_AXIS, step=5, parts=(part(5), part(5))))

        assert 1 == it.conflicts


class TestMerging:
    def test_a_row_of_another_axis_is_merged_into_the_next_main_row(self):
        it = assembler()
        add(it, main(5))

        assert [] == add(it, evaluation(0))
        [row] = add(it, main(6))

        assert {"eval/step": 0, "eval/acc": 0.9, "global_step": 6, "loss": 0.5} == row.values
        assert (6, {"global_step": 6, "eval/step": 0}) == (row.step, row.places)
        assert 2 == len(row.positions)

    def test_several_axes_meet_in_one_row(self):
        it = assembler()

        rows = add(it, evaluation(0), bundle(3, {"test/acc": 1}, axis="test/step"), main(6))

        assert [(6, {"global_step": 6, "eval/step": 0, "test/step": 3})] == places(rows)

    def test_when_names_clash_it_takes_a_step_of_its_own(self):
        it = assembler()
        add(it, main(5))

        rows = add(it, evaluation(0), main(6, {"eval/acc": 1}))

        assert [(6, {"eval/step": 0}), (7, {"global_step": 6})] == places(rows)

    def test_two_guests_that_clash_do_not_both_merge(self):
        it = assembler(Rule(pattern="*", step_metric="epoch"))

        rows = add(it, evaluation(0, {"epoch": 1}), bundle(3, {"epoch": 2}, axis="test/step"), main(6))

        assert [(0, {"test/step": 3}), (6, {"global_step": 6, "eval/step": 0})] == places(rows)

    def test_a_main_name_under_the_stage_is_not_taken_for_the_stage_s(self):
        """In a merged row it would be plotted against a step that its other rows do not have."""
        it = assembler()

        rows = add(it, evaluation(0), main(6, {"eval/loss": 1}))

        assert [(0, {"eval/step": 0}), (6, {"global_step": 6})] == places(rows)
        assert "global_step" == {d.name: d for d in it.new_definitions(rows)}["eval/loss"].step_metric

    def test_nor_is_a_name_of_a_stage_taken_for_that_of_a_stage_inside_it(self):
        it = assembler()
        inner = bundle(4, {"eval/deep/acc": 1}, axis="eval/deep/step")

        rows = add(it, evaluation(0, {"eval/deep/loss": 1}), inner, main(6))

        assert [(0, {"eval/deep/step": 4}), (6, {"global_step": 6, "eval/step": 0})] == places(rows)

    def test_stages_inside_each_other_meet_where_names_are_clear(self):
        it = assembler()
        inner = bundle(4, {"eval/deep/acc": 1}, axis="eval/deep/step")

        rows = add(it, evaluation(0), inner, main(6))
        definitions = {definition.name: definition.step_metric for definition in it.new_definitions(rows)}

        assert [(6, {"global_step": 6, "eval/step": 0, "eval/deep/step": 4})] == places(rows)
        assert ("eval/step", "eval/deep/step") == (definitions["eval/acc"], definitions["eval/deep/acc"])

    def test_an_axis_metric_that_came_along_does_not_keep_it_from_merging(self):
        it = assembler(Rule(pattern="eval/*", step_metric="epoch"))

        rows = add(it, evaluation(0, {"eval/acc": 1, "epoch": 3}), main(6))

        assert [(6, {"global_step": 6, "eval/step": 0})] == places(rows)

    def test_of_several_on_one_axis_the_newest_merges_and_the_older_go_first(self):
        it = assembler()
        add(it, main(5))

        rows = [row for step in range(3) for row in add(it, evaluation(step))] + add(it, main(6))

        assert [
            (6, {"eval/step": 0}), (7, {"eval/step": 1}), (8, {"global_step": 6, "eval/step": 2})
        ] == places(rows)  # fmt: skip

    def test_an_older_one_has_nothing_to_wait_for(self):
        """So no more rows wait than there are axes."""
        it = assembler()
        add(it, evaluation(0))

        rows = add(it, evaluation(1))

        assert [(0, {"eval/step": 0})] == places(rows)
        assert 1 == it.waiting


class TestWaiting:
    def test_it_waits_a_patience_for_a_main_row(self):
        it = assembler()
        add(it, evaluation(0), now=10.0)

        assert [] == it.ready(14.9)
        assert [(0, {"eval/step": 0})] == places(it.ready(15.0))
        assert 0 == it.waiting

    def test_it_waits_twice_the_last_interval_of_main_rows(self):
        it = assembler()
        add(it, main(5), now=0.0)
        add(it, main(6), now=10.0)
        add(it, evaluation(0), now=11.0)

        assert [] == it.ready(30.9)
        assert [(7, {"eval/step": 0})] == places(it.ready(31.0))

    def test_it_never_waits_longer_than_the_limit(self):
        it = assembler(max_wait=60.0)
        add(it, main(5), now=0.0)
        add(it, main(6), now=1000.0)
        add(it, evaluation(0), now=1000.0)

        assert [] == it.ready(1059.9)
        assert 1 == len(it.ready(1060.0))

    def test_at_the_end_all_leave_in_the_order_in_which_they_came(self):
        it = assembler()
        add(it, bundle(3, {"test/acc": 1}, axis="test/step"), evaluation(0))

        assert [(0, {"test/step": 3}), (1, {"eval/step": 0})] == places(it.flush())


class TestLateRows:
    def test_a_late_row_is_a_row_of_its_own_with_its_true_axis_value(self):
        it = assembler()
        add(it, main(5), main(7))

        [row] = add(it, main(6, {"other": 1}, cause="late"))

        assert (8, True, {"global_step": 6}) == (row.step, row.late, row.places)
        assert {"global_step": 6, "other": 1, "sidestep/late_rows": 1} == row.values

    def test_a_share_of_a_value_that_was_written_goes_under_late(self):
        it = assembler()
        add(it, main(5, {"loss": 1}), main(6))

        [row] = add(it, main(5, {"loss": 2, "other": 3}, cause="late"))

        assert {"global_step": 5, "loss.late": 2, "other": 3, "sidestep/late_rows": 1} == row.values

    def test_the_next_one_does_too(self):
        it = assembler()
        add(it, main(5, {"loss": 1}), main(6))

        rows = add(it, main(5, {"loss": 2}, cause="late"), main(5, {"loss": 3}, cause="late"))

        assert [2, 3] == [row.values["loss.late"] for row in rows]
        assert [1, 2] == [row.values["sidestep/late_rows"] for row in rows]

    def test_axis_metrics_keep_their_name(self):
        """`loss.late` is plotted against them."""
        it = assembler(Rule(pattern="loss", step_metric="epoch"))
        add(it, main(5, {"loss": 1, "epoch": 2}), main(6))

        rows = add(it, main(5, {"loss": 2, "epoch": 2}, cause="late"))

        assert {"global_step": 5, "loss.late": 2, "epoch": 2, "sidestep/late_rows": 1} == rows[0].values
        assert "epoch" == {d.name: d for d in it.new_definitions(rows)}["loss.late"].step_metric

    def test_the_next_main_row_says_that_a_step_was_taken(self):
        it = assembler()
        add(it, main(5), main(5, cause="late"))

        [row] = add(it, main(6))

        assert (7, 1) == (row.step, row.values["sidestep/step_shift"])

    def test_the_row_itself_goes_before_what_is_late_for_it(self):
        """It may still wait to be merged."""
        it = assembler()
        add(it, evaluation(0))

        rows = add(it, evaluation(0, {"eval/acc": 0.1}, cause="late"))

        assert [False, True] == [row.late for row in rows]
        assert {"eval/step": 0, "eval/acc.late": 0.1, "sidestep/late_rows": 1} == rows[1].values

    def test_a_newer_row_of_the_axis_goes_on_waiting(self):
        it = assembler()
        add(it, evaluation(3))

        rows = add(it, evaluation(1, cause="late"))

        assert [True] == [row.late for row in rows]
        assert 1 == it.waiting

    def test_what_was_written_at_a_merged_row_s_other_axis_is_known(self):
        it = assembler()
        add(it, evaluation(0), main(5))

        [row] = add(it, evaluation(0, {"eval/acc": 0.1}, cause="late"))

        assert 0.1 == row.values["eval/acc.late"]

    def test_a_step_that_never_had_a_row_has_its_values_under_their_names(self):
        it = assembler()
        add(it, main(5, {"loss": 1}), main(7, {"loss": 1}))

        [row] = add(it, main(6, {"loss": 2}, cause="late"))

        assert {"global_step": 6, "loss": 2, "sidestep/late_rows": 1} == row.values


class TestTheWindow:
    @pytest.mark.parametrize("window", [0, 1, 2])
    def test_beyond_it_a_name_whose_values_may_be_there_is_taken_as_written(self, window):
        it = assembler(window=window)
        add(it, *(main(step, {"loss": 1}) for step in range(5)))

        [row] = add(it, main(1, {"loss": 2, "new": 3}, cause="late"))

        assert {"global_step": 1, "loss.late": 2, "new": 3, "sidestep/late_rows": 1} == row.values

    def test_so_it_is_the_second_time(self):
        it = assembler(window=2)
        add(it, *(main(step, {"loss": 1}) for step in range(5)))

        rows = add(it, *(main(step, {"loss": 2}, cause="late") for step in (1, 1, 2)))

        assert [2, 2, 2] == [row.values["loss.late"] for row in rows]

    def test_so_it_is_in_the_next_life(self):
        it, other = assembler(), assembler()
        add(it, *(main(step, {"loss": 1}) for step in range(5)))
        other.restore(it.marks())
        other.latest.update(it.latest)

        [row] = add(other, main(1, {"loss": 2}, cause="late"))

        assert 2 == row.values["loss.late"]

    def test_it_is_bounded(self):
        it = assembler(window=10)

        add(it, *(main(step) for step in range(100)))

        assert 10 == len(it._written)


class TestTheSummary:
    def test_a_late_row_does_not_leave_older_values_behind(self):
        it = assembler()
        add(it, main(5, {"loss": 1, "acc": 1}), main(7, {"loss": 3, "lr": 3}))

        [row] = add(it, main(6, {"loss": 2, "acc": 2, "lr": 2, "new": 2}, cause="late"))

        assert {"global_step": 7, "loss": 3, "lr": 3} == row.restore

    def test_values_of_another_axis_are_not_compared(self):
        it = assembler()
        add(it, main(5, {"x": 1}), main(9), bundle(7, {"x": 2}, axis="eval/step"))
        it.flush()

        [row] = add(it, main(6, {"x": 3}, cause="late"))

        assert {"global_step": 9} == row.restore

    @pytest.mark.parametrize("late", ["loss", "loss.late"])
    def test_what_wandb_aggregates_itself_is_left_alone(self, late):
        it = assembler(Rule(pattern="loss", summary="min"))
        add(it, *(main(step, {late: 1}) for step in (5, 9)))

        [row] = add(it, main(7, {late: 1}, cause="late"))

        assert {"global_step": 9} == row.restore

    def test_the_newest_values_are_kept_and_told_once(self):
        it = assembler()
        add(it, main(5, {"loss": 1}), main(7, {"loss": 3}), main(6, {"loss": 2}, cause="late"))

        changed = it.take_changed()

        assert Latest(axis="global_step", step=7, time=1.0, value=3) == changed["loss"]
        assert {} == it.take_changed()


class TestSummary:
    def test_shows_the_newest_values_and_what_was_declared_instead(self):
        it = assembler(
            Rule(pattern="acc", summary="min,max,mean,first,last"), Rule(pattern="junk", summary="none")
        )

        rows = add(
            it, *(main(step, {"acc": acc, "loss": -acc, "junk": acc}) for step, acc in enumerate((5, 9, 1)))
        )
        it.new_definitions(rows)

        assert {"global_step": 2, "loss": -1} == it.newest()
        assert {"acc": {"min": 1, "max": 9, "mean": 5, "first": 5, "last": 1}} == it.aggregated()

    def test_is_the_same_in_the_next_life_which_counts_no_row_twice(self):
        rule = Rule(pattern="acc", summary="mean")
        it = assembler(rule)
        rows = add(it, *(main(step, {"acc": step}) for step in range(4)))
        again = assembler(rule)
        again.restore(msgpack.unpackb(msgpack.packb(it.marks())))
        again.latest.update(it.latest)
        for decided in rows:
            again.remember(decided)

        again.new_definitions(add(again, main(4, {"acc": 4})))

        assert {"global_step": 4} == again.newest()
        assert {"acc": {"mean": 2}} == again.aggregated()


class TestDefinitions:
    def names(self, it: Assembler, *bundles: Bundle) -> dict[str, Definition]:
        return {
            definition.name: definition for definition in it.new_definitions([*add(it, *bundles), *it.flush()])
        }

    def test_each_name_is_defined_once_with_its_axis(self):
        it = assembler()

        first = self.names(it, main(5, {"loss": 1}))
        second = self.names(it, main(6, {"loss": 1, "lr": 1}))

        assert {"global_step": None, "loss": "global_step"} == {n: d.step_metric for n, d in first.items()}
        assert ["lr"] == list(second)

    def test_in_a_merged_row_each_name_has_the_axis_of_its_stage(self):
        it = assembler()

        definitions = self.names(it, evaluation(0), main(6))

        assert {
            "global_step": None, "eval/step": None, "loss": "global_step", "eval/acc": "eval/step"
        } == {name: definition.step_metric for name, definition in definitions.items()}  # fmt: skip

    def test_a_name_declared_after_its_first_row_is_defined_again(self):
        it = assembler()
        self.names(it, main(5, {"val/loss": 1}))
        it.rules.declare(Rule(pattern="val/*", step_metric="epoch", summary="min"))

        again = self.names(it, main(6, {"val/loss": 1}))

        assert {"val/loss": Definition(name="val/loss", step_metric="epoch", summary="min")} == again

    def test_a_name_of_no_characters_is_none(self):
        assert {"global_step", "ok"} == self.names(assembler(), main(5, {"": 1, "ok": 2})).keys()

    def test_what_was_declared_is_in_it(self):
        it = assembler(Rule(pattern="val/*", step_metric="epoch", summary="max", hidden=True))

        definitions = self.names(it, main(5, {"val/acc": 1, "epoch": 3}))

        assert (
            Definition(name="val/acc", step_metric="epoch", summary="max", hidden=True) == definitions["val/acc"]
        )
        assert "global_step" == definitions["epoch"].step_metric

    def test_a_metric_is_not_its_own_axis(self):
        it = assembler(Rule(pattern="*", step_metric="epoch"))

        assert self.names(it, main(5, {"epoch": 3}))["epoch"].step_metric is None

    def test_names_inside_dicts_are_joined_by_dots(self):
        definitions = self.names(assembler(), main(5, {"a": {"b": 1, "c": {"d": 2}, "e": {}}}))

        assert {"global_step", "a.b", "a.c.d", "a.e"} == definitions.keys()

    def test_what_a_reduction_makes_has_the_axis_of_its_metric(self):
        it = assembler(Rule(pattern="loss", step_metric="epoch", reduce=("max", "per_rank")))

        definitions = self.names(it, main(5, {"loss": 1, "epoch": 3}))

        assert ("epoch", "epoch") == (definitions["loss.max"].step_metric, definitions["loss/rank0"].step_metric)


class TestState:
    def test_what_outlives_a_crash_goes_on_the_same(self):
        it, other = assembler(), assembler()
        add(it, main(5), now=0.0)
        add(it, evaluation(0), main(9), main(5, cause="late"), now=20.0)

        other.restore(msgpack.unpackb(msgpack.packb(it.marks())))

        assert it.marks() == other.marks()
        assert {("global_step", 0): 9, ("eval/step", 0): 0} == other.released
        assert [11] == [row.step for row in add(other, main(10), now=21.0)]

    def test_a_shift_that_was_told_is_taken_back_in_the_next_life(self):
        it, other = assembler(), assembler()
        add(it, main(5), main(4, cause="late"), main(6))

        other.restore(it.marks())

        assert [0, None] == [it.values.get("sidestep/step_shift") for it in add(other, main(50), main(51))]

    def test_rows_of_an_earlier_life_are_remembered(self):
        it = assembler()

        it.remember(row(7, {"global_step": 5, "loss": 1}, places={"global_step": 5}))

        assert (7, {("global_step", 0): 5}) == (it.last, it.released)
        [late] = add(it, main(5, {"loss": 2}, cause="late"))
        assert (8, 2) == (late.step, late.values["loss.late"])

    def test_conflicts_of_a_row_that_still_waits_are_not_counted_twice(self):
        """Its parts are read again in the next life."""
        it = assembler()

        add(it, Bundle(axis="eval/step", step=0, parts=(part(axis="eval/step"), part(axis="eval/step"))))

        assert 0 == it.marks()["conflicts"]
        it.flush()
        assert 1 == it.marks()["conflicts"]
