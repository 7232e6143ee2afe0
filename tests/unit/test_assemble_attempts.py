"""Rows: of launches that begin again, and of processes beside the ranks."""

from __future__ import annotations

from typing import Any

import msgpack

from sidestepd.rows import MAIN_AXIS, Bundle, Row
from tests.support.assembling import add, assembler, evaluation, main, places
from tests.support.builders import part


class TestAttempts:
    def test_a_step_that_an_earlier_attempt_has_in_a_row_is_tagged(self):
        it = assembler()
        add(it, main(4), main(5))

        rows = add(it, main(4, attempt=1), main(5, attempt=1), main(6, attempt=1))

        assert [1, 1, None] == [row.values.get("sidestep/attempt") for row in rows]
        assert [(6, 4), (7, 5), (8, 6)] == [(row.step, row.places[MAIN_AXIS]) for row in rows]
        assert not any(row.late for row in rows)

    def test_a_late_share_looks_for_its_own_attempt(self):
        it = assembler()
        add(it, main(4, {"loss": 1.0}), main(4, {"acc": 1.0}, attempt=1))

        [late] = add(it, main(4, {"loss": 2.0, "acc": 2.0}, attempt=1, cause="late"))

        assert (2.0, 2.0) == (late.values["loss"], late.values["acc.late"])
        assert 1 == it.late_values

    def test_the_summary_keeps_the_newest_attempt_s_value_though_its_step_is_lower(self):
        it = assembler()

        add(it, main(900, {"loss": 9.0}), main(500, {"loss": 5.0}, attempt=1))

        assert 5.0 == it.newest()["loss"]

    def test_a_row_of_an_attempt_that_is_over_leaves_the_summary_alone(self):
        it = assembler()
        add(it, main(500, {"loss": 5.0}, attempt=1))

        [old] = add(it, main(900, {"loss": 9.0}))

        assert 5.0 == it.newest()["loss"] == old.restore["loss"]

    def test_rows_of_different_attempts_do_not_meet(self):
        it = assembler()

        rows = add(it, evaluation(0), main(3, attempt=1))

        assert [(0, {"eval/step": 0}), (3, {MAIN_AXIS: 3})] == places(rows)

    def test_a_stage_row_that_waits_leaves_before_one_of_the_next_attempt(self):
        it = assembler()

        rows = [*add(it, evaluation(7), evaluation(0, attempt=1)), *it.flush()]

        assert [(0, {"eval/step": 7}), (1, {"eval/step": 0})] == places(rows)

    def test_outlive_a_crash(self):
        it, other = assembler(), assembler()
        add(it, main(5), main(2, attempt=1))

        other.restore(msgpack.unpackb(msgpack.packb(it.marks())))

        [row] = add(other, main(4, attempt=1))
        assert 1 == row.values["sidestep/attempt"]


class TestCounters:
    def test_forced_rows_are_counted(self):
        it = assembler()

        add(it, main(5, cause="forced"), main(6))

        assert (1, 1) == (it.forced_rows, it.marks()["forced_rows"])


class TestRowsOfAProcessesOwn:
    def own(self, step: int, data: dict[str, Any], **options: Any) -> Bundle:
        axis = options.pop("axis", MAIN_AXIS)
        said = part(step, data, session=7, axis=axis, apart="n0:7")
        return Bundle(axis=axis, step=step, parts=(said,), **options)

    def test_each_is_a_row_that_says_whose_it_is(self):
        it = assembler()

        rows = add(it, main(5, {"loss": 0.5}), self.own(5, {"loss": 2.5}), self.own(9, {"loss": 3.5}), main(6))

        assert [5, 6, 7, 8] == [row.step for row in rows]
        assert {"global_step": 5, "loss": 2.5, "sidestep/process": "n0:7"} == rows[1].values
        assert 2 == rows[3].values["sidestep/step_shift"]

    def test_they_do_not_make_others_late_nor_are_they(self):
        it = assembler()

        rows = add(it, self.own(900, {"loss": 2.5}), main(5), self.own(3, {"loss": 3.5}), main(6))

        assert not any(row.late or row.restore for row in rows)
        assert {(MAIN_AXIS, 0): 6} == it.released

    def test_those_of_a_stage_meet_no_other_row(self):
        it = assembler()

        rows = add(it, evaluation(0), self.own(0, {"eval/acc": 0.1}, axis="eval/step"), main(1))

        assert [(0, {"eval/step": 0}), (1, {"eval/step": 0, "global_step": 1})] == places(rows)

    def test_a_late_one_keeps_its_names(self):
        it = assembler()

        first, late = add(it, self.own(3, {"loss": 2.5}), self.own(3, {"loss": 3.5}, cause="late"))

        assert 3.5 == late.values["loss"]
        assert (False, True) == (first.late, late.late)

    def test_the_summary_shows_what_was_written_last(self):
        it = assembler()

        add(it, self.own(900, {"loss": 2.5}), main(5, {"loss": 0.5}))
        assert 0.5 == it.newest()["loss"]
        add(it, self.own(3, {"loss": 3.5}))
        assert 3.5 == it.newest()["loss"]

    def test_what_they_are_outlives_a_crash(self):
        [row] = add(assembler(), self.own(900, {"loss": 2.5}))
        other = assembler()

        other.remember(Row.unpack(row.pack(), msgpack.packb([])))

        assert ({}, 0) == (other.released, other.last)

    def test_rows_written_down_by_an_older_version_are_everybody_s(self):
        [row] = add(assembler(), main(5))
        content = msgpack.packb(msgpack.unpackb(row.pack(), strict_map_key=False)[:7])

        assert not Row.unpack(content, msgpack.packb([])).apart
