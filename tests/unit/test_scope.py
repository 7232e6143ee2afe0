"""Sub-experiments: names under a prefix, steps from an offset."""

from __future__ import annotations

from typing import Any

import pytest

from sidestep._run import Run
from sidestep.errors import UnsupportedValue
from sidestep.wire import Kind, Record
from tests.unit.test_run import new_run, records, run, strict

__all__ = ["run", "strict"]  # fixtures


def said(run: Run) -> list[tuple[int | None, Any]]:
    """Steps and values of what was logged."""
    return [(record.step, record.data) for record in records(run) if isinstance(record, Record)]


class TestSteps:
    def test_a_step_counts_from_the_offset(self, run: Run):
        run.scope("e_p2_1", step_offset=1000).log({"loss": 0.5}, step=7)

        assert [(1007, {"e_p2_1/loss": 0.5})] == said(run)

    def test_a_call_without_one_begins_there(self, run: Run):
        scope = run.scope("e", step_offset=1000)
        for _ in range(2):
            scope.log({"loss": 1})

        assert 2 == scope.step
        assert [1000, 1001] == [step for step, _ in said(run)]

    def test_they_are_said_as_they_are(self, run: Run):
        """No daemon puts them on the base of a launch: the offset says where they belong."""
        run.scope("e", step_offset=1000).log({"loss": 1})

        assert [Kind.LOG] == [record.kind for record in records(run) if isinstance(record, Record)]

    def test_the_run_s_own_steps_go_on_beside_them(self, run: Run):
        run.log({"a": 1})
        run.scope("e", step_offset=1000).log({"loss": 1}, step=5)
        run.log({"a": 2})

        assert [0, 1005, 1] == [step for step, _ in said(run)]

    def test_commit_false_leaves_the_row_open(self, run: Run):
        scope = run.scope("e", step_offset=10)
        scope.log({"a": 1}, commit=False)
        scope.log({"b": 1})

        assert [10, 10] == [step for step, _ in said(run)]

    def test_the_same_scope_again_goes_on(self, run: Run):
        for _ in range(2):
            run.scope("e", step_offset=10).log({"a": 1})

        assert [10, 11] == [step for step, _ in said(run)]

    def test_without_an_offset_they_are_the_run_s(self, run: Run):
        scope = run.scope("e")
        run.log({"a": 1})
        scope.log({"b": 1})
        run.log({"a": 1})

        assert [(0, {"a": 1}), (1, {"e/b": 1}), (2, {"a": 1})] == said(run)

    def test_offsets_of_nested_scopes_add_up(self, run: Run):
        inner = run.scope("outer", step_offset=100).scope("inner", step_offset=10)
        inner.log({"a": 1}, step=3)

        assert [(113, {"outer/inner/a": 1})] == said(run)

    def test_on_the_axis_of_a_stage(self, run: Run):
        run.stage("eval").scope("e", step_offset=100).log({"a": 1}, step=3)

        (record,) = records(run)
        assert isinstance(record, Record)
        assert ("eval", 103, {"e/a": 1}) == (record.stage, record.step, record.data)


class TestNames:
    def test_a_stage_of_it_has_steps_of_its_own(self, run: Run):
        stage = run.scope("e", step_offset=100).stage("eval")
        stage.log({"a": 1})

        assert ("e/eval", [(0, {"a": 1})]) == (stage.name, said(run))

    def test_what_is_declared_is_of_its_names(self, run: Run):
        scope = run.scope("e")
        metric = scope.define_metric("epoch")
        scope.define_metric("loss", step_metric=metric, reduce=["mean:tokens", "max"])
        scope.define_metric("acc", "epoch", reduce="mean:tokens")
        scope.define_metric("lr", step_metric="global_step")

        keys = ("name", "step_metric", "reduce")
        assert [
            ("e/epoch", None, None),
            ("e/loss", "e/epoch", ["mean:e/tokens", "max"]),
            ("e/acc", "e/epoch", "mean:e/tokens"),
            ("e/lr", "global_step", None),
        ] == [tuple(record.data[key] for key in keys) for record in records(run) if isinstance(record, Record)]


class TestMistakes:
    @pytest.mark.parametrize("data", [None, 3, [1], "text"])
    def test_what_is_no_dict_is_counted_as_ever(self, run: Run, data: Any):
        run.scope("e").log(data)

        assert {"unsupported": 1} == run.stats().dropped

    @pytest.mark.parametrize("offset", [-1, "a", 1.5])
    def test_an_offset_that_is_none_is_taken_as_zero(self, run: Run, offset: Any):
        run.scope("e", step_offset=offset).log({"a": 1}, step=3)

        assert [(3, {"e/a": 1})] == said(run)

    def test_and_raised_where_that_was_asked_for(self, strict: Run):
        with pytest.raises(UnsupportedValue, match="offset"):
            strict.scope("e", step_offset=-1)

    @pytest.mark.parametrize("step", [-1, 1.5, "x"])
    def test_a_bad_step_is_counted(self, run: Run, step: Any):
        run.scope("e", step_offset=100).log({"a": 1}, step=step)

        assert {"bad_step": 1} == run.stats().dropped

    def test_a_disabled_run_s_takes_every_call(self):
        import sidestep

        made = sidestep.init(mode="disabled")
        scope = made.scope("e", step_offset=3)
        scope.log({"a": 1})
        scope.scope("f").log({"a": 1})

        assert 0 == made.stats().offered
        made.finish()


def test_a_scope_of_a_run_that_is_new_begins_anew():
    first, second = new_run(), new_run()
    for one in (first, second):
        one.scope("e", step_offset=5).log({"a": 1})

    assert [(5, {"e/a": 1})] == said(first) == said(second)
    for one in (first, second):
        one.finish()
