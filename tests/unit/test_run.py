"""A run in one process, without a daemon: what a call becomes."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sidestep._run import Run
from sidestep.errors import SidestepError, UnsupportedValue
from sidestep.outbox import DropReason
from sidestep.wire import MAX_NAME_CHARS, MAX_RECORD_BYTES, Kind, Record
from tests.support.runs import balanced, data, logged, new_run, records, steps


@pytest.fixture
def run() -> Iterator[Run]:
    made = new_run()
    yield made
    made.finish()


@pytest.fixture
def strict() -> Iterator[Run]:
    made = new_run(strict=True)
    yield made
    made.finish()


class TestRecords:
    def test_a_call_is_a_record_with_its_step_and_time(self, run: Run):
        run.log({"loss": 0.5, "epoch": 1, "note": "fine", "ok": True, "none": None})

        (record,) = records(run)
        assert isinstance(record, Record)
        assert (Kind.COUNTED, 0, None) == (record.kind, record.step, record.stage)
        assert {"loss": 0.5, "epoch": 1, "note": "fine", "ok": True, "none": None} == record.data
        assert record.time > 1.6e9

    def test_other_values_are_converted(self, run: Run):
        run.log({"np": np.float32(0.5), "torch": torch.tensor(2.0), "huge": 2**70, "deep": {"a": (1, 2)}})

        assert [{"np": 0.5, "torch": 2.0, "huge": 2.0**70, "deep": {"a": [1, 2]}}] == data(run)

    def test_an_empty_call_is_a_record_too(self, run: Run):
        run.log({})

        assert [{}] == data(run)

    def test_any_mapping_will_do(self, run: Run):
        run.log(UserDict(loss=1.0))

        assert [{"loss": 1.0}] == data(run)

    def test_changes_after_the_call_do_not_show(self, run: Run):
        values = {"loss": 1.0, "list": [1]}
        run.log(values)

        values["loss"] = 2.0
        values["list"].append(2)

        assert [{"loss": 1.0, "list": [1]}] == data(run)

    def test_the_callers_dict_is_not_touched(self, run: Run):
        values = {"loss": np.float32(1.0), "bad": object()}
        before = dict(values)

        run.log(values)

        assert before == values

    def test_a_large_record_goes_and_leaves_no_large_packer_behind(self, run: Run):
        run.log({"text": "x" * 100_000})

        assert [{"text": "x" * 100_000}] == data(run)
        assert run._session.packer is None

    def test_many_names_that_are_long_together_are_no_problem(self, run: Run):
        values = {f"metric/{number}": 1.0 for number in range(500)}

        run.log(values)

        assert [values] == data(run)

    def test_what_the_summary_has_no_place_for_goes_with_the_next_row(self, run: Run):
        run.summary.update({"best": 0.9, "weights": np.arange(100)})
        run.log({"loss": 1.0})

        assert [
            (Kind.COUNTED, 0, ["weights"]),
            (Kind.SUMMARY, None, ["best"]),
            (Kind.COUNTED, 0, ["loss"]),
        ] == [(kind, step, list(entries)) for kind, step, entries in logged(run)]

    def test_types_of_numpy_are_configured_by_their_names(self, run: Run):
        run.config["dtype"] = np.dtype("float32")

        assert "float32" == run.config.dtype

    def test_configuration_summary_and_definitions_are_records_without_a_step(self, run: Run):
        run.config.update({"lr": 0.1})
        run.summary["best"] = 0.9
        run.define_metric("eval/*", step_metric="eval/step", reduce=["mean", "max"])

        assert [
            (Kind.CONFIG, None, {"lr": 0.1}),
            (Kind.SUMMARY, None, {"best": 0.9}),
            (
                Kind.DEFINE,
                None,
                {
                    "name": "eval/*",
                    "step_metric": "eval/step",
                    "reduce": ["mean", "max"],
                    "summary": None,
                    "hidden": None,
                },
            ),
        ] == logged(run)


class TestSteps:
    """wandb's rules."""

    def test_without_a_step_calls_are_counted(self, run: Run):
        run.log({})
        run.log({})

        assert [(Kind.COUNTED, 0), (Kind.COUNTED, 1)] == steps(run)

    def test_commit_false_stays_on_the_step(self, run: Run):
        run.log({}, commit=False)
        run.log({})
        run.log({})

        assert [(Kind.COUNTED, 0), (Kind.COUNTED, 0), (Kind.COUNTED, 1)] == steps(run)

    def test_a_call_without_a_step_joins_the_row_that_an_explicit_one_left_open(self, run: Run):
        run.log({}, step=5)
        run.log({})
        run.log({})

        assert [(Kind.LOG, 5), (Kind.LOG, 5), (Kind.LOG, 6)] == steps(run)

    def test_commit_true_closes_the_row_of_an_explicit_step(self, run: Run):
        run.log({}, step=5, commit=True)
        run.log({})

        assert [(Kind.LOG, 5), (Kind.LOG, 6)] == steps(run)

    def test_a_lower_step_is_passed_on_and_moves_nothing(self, run: Run):
        run.log({}, step=5, commit=True)
        run.log({}, step=2)
        run.log({})

        assert [(Kind.LOG, 5), (Kind.LOG, 2), (Kind.LOG, 6)] == steps(run)

    def test_a_lower_step_does_not_end_the_counting(self, run: Run):
        run.log({})
        run.log({})
        run.log({}, step=0)
        run.log({})

        assert [(Kind.COUNTED, 0), (Kind.COUNTED, 1), (Kind.LOG, 0), (Kind.COUNTED, 2)] == steps(run)

    @pytest.mark.parametrize("step", [7, 7.0, np.int64(7), np.float32(7), torch.tensor(7)])
    def test_a_whole_number_of_any_type_is_a_step(self, run: Run, step: Any):
        run.log({}, step=step)

        assert [(Kind.LOG, 7)] == steps(run)

    @pytest.mark.parametrize("step", [-1, 1.5, True, "5", float("nan"), 2**63, object(), [1]])
    def test_anything_else_is_dropped_and_counted(self, run: Run, step: Any):
        run.log({"loss": 1.0}, step=step)
        run.log({})

        assert [(Kind.COUNTED, 0)] == steps(run)
        assert {"bad_step": 1} == run.stats().dropped
        assert balanced(run)

    def test_a_value_that_needs_care_takes_one_step_only(self, run: Run):
        run.log({"huge": 2**70})
        run.log({"text": "\ud800"})
        run.log({"loss": 1.0})

        assert [0, 1, 2] == [step for _, step in steps(run)]

    def test_the_next_step_can_be_read(self, run: Run):
        run.log({}, step=41, commit=True)

        assert 42 == run.step


class TestStages:
    def test_a_stage_has_a_step_of_its_own(self, run: Run):
        stage = run.stage("eval")
        run.log({})
        stage.log({"accuracy": 0.9})

        _, record = records(run)
        assert isinstance(record, Record)
        assert ("eval", 0, {"accuracy": 0.9}) == (record.stage, record.step, record.data)

    def test_the_same_name_gives_the_same_counter(self, run: Run):
        run.stage("eval").log({})
        run.stage("eval").log({})

        assert [0, 1] == [step for _, step in steps(run)]

    def test_stages_nest(self, run: Run):
        assert "a/b/c" == run.stage("a").stage("/b/").stage("c").name

    def test_a_definition_through_a_stage_carries_its_name(self, run: Run):
        run.stage("eval").define_metric("loss", reduce="max")

        (record,) = records(run)
        assert isinstance(record, Record)
        assert "eval" == record.stage

    def test_a_value_that_needs_care_keeps_its_stage(self, run: Run):
        run.stage("eval").log({"np": np.float32(1)})

        (record,) = records(run)
        assert isinstance(record, Record)
        assert "eval" == record.stage


class TestRefusals:
    def test_a_bad_value_is_left_out_and_the_rest_goes(self, run: Run, caplog: pytest.LogCaptureFixture):
        for _ in range(3):
            run.log({"bad": object(), "good": 1.0})

        assert [{"good": 1.0}] * 3 == data(run)
        assert 3 == run.stats().values_refused
        assert 1 == sum("'bad'" in line and "object" in line for line in caplog.messages)

    @pytest.mark.parametrize("wrong", [{"reduce": "avg"}, {"reduce": ["mean", 7]}, {"summary": "maximum"}])
    def test_a_definition_goes_without_what_means_nothing(
        self, run: Run, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
    ):
        run.define_metric("loss", step_metric="epoch", **wrong)

        (defined,) = data(run)
        assert ("loss", "epoch", None) == (defined["name"], defined["step_metric"], defined[next(iter(wrong))])
        assert 1 == run.stats().values_refused
        assert 1 == sum("is unknown" in line and "define_metric(loss)" in line for line in caplog.messages)

    @pytest.mark.parametrize("right", [{"reduce": "mean:n"}, {"reduce": ["max", "std"]}, {"summary": "best,last"}])
    def test_a_definition_that_means_something_goes_as_it_is(self, run: Run, right: dict[str, Any]):
        run.define_metric("loss", **right)

        (defined,) = data(run)
        assert right.items() <= defined.items()
        assert 0 == run.stats().values_refused

    def test_each_mistake_is_said_once_whatever_numbers_are_in_it(
        self, run: Run, caplog: pytest.LogCaptureFixture
    ):
        for name in ("a", "b", "c-1", "c-2"):
            run.log_artifact(f"/nowhere/{name}", name=name)
        run.save("x", policy="never")

        said = [text for text in caplog.messages if "can not be logged" in text]
        assert 4 == len(said)
        assert all(word in text for word, text in zip(("'a'", "'b'", "'c-1'", "never"), said, strict=True))
        assert {DropReason.UNSUPPORTED: 5} == run.stats().dropped

    def test_each_name_and_type_is_said_once(self, run: Run, caplog: pytest.LogCaptureFixture):
        for _ in range(2):
            run.log({"a": object(), "b": object()})
            run.log({"a": lambda: None})

        said = [line for line in caplog.messages if "left out" in line]
        assert 3 == len(said)

    def test_a_flood_of_different_refusals_falls_silent(self, run: Run, caplog: pytest.LogCaptureFixture):
        for number in range(500):
            run.log({f"name{number}": object()})

        assert 500 == run.stats().values_refused
        assert len(caplog.messages) < 250

    @pytest.mark.parametrize("call", [None, 5, "text", [("a", 1)], {1: 2.0}, {("a",): 1.0}, {None: 1}])
    def test_what_is_no_dict_of_names_is_dropped_and_counted(self, run: Run, call: Any):
        run.log(call)

        assert {"unsupported": 1} == run.stats().dropped
        assert balanced(run)

    def test_a_name_that_is_too_long_is_left_out(self, run: Run):
        run.log({"x" * (MAX_NAME_CHARS + 1): 1.0, "x" * MAX_NAME_CHARS: 2.0})

        assert [{"x" * MAX_NAME_CHARS: 2.0}] == data(run)
        assert 1 == run.stats().values_refused

    def test_names_without_end_are_not_remembered_without_end(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sidestep._run.MOST_NAMES", 10)

        for number in range(25):
            run.log({f"name{number}": 1.0})

        assert len(run._session.names) <= 10
        assert 25 == len(data(run))

    @pytest.mark.parametrize(
        "values", [{"text": "x" * MAX_RECORD_BYTES}, dict.fromkeys(map(str, range(60_000)), 1.0)]
    )
    def test_what_is_too_large_for_the_wire_is_dropped_and_counted(self, run: Run, values: dict[str, Any]):
        run.log(values)
        run.log({"after": 1})

        assert balanced(run)
        assert [{"after": 1}] == data(run)[-1:]
        assert 1 == sum(run.stats().dropped.values()) + run.stats().values_refused

    def test_after_finish_calls_are_counted_and_said_once(self, caplog: pytest.LogCaptureFixture):
        run = new_run()
        run.finish()

        run.log({"loss": 1.0})
        run.log({"loss": np.float32(1.0)})

        assert {"after_finish": 2} == run.stats().dropped
        assert 1 == sum("after finish()" in line for line in caplog.messages)
        assert balanced(run)

    def test_a_full_outbox_counts_exactly_what_it_did_not_take(self):
        run = new_run(outbox_bytes=MAX_RECORD_BYTES)
        size = len(run._session.pack(int(Kind.COUNTED), 1, {"text": "x" * 1000}, None))

        for _ in range(1000):
            run.log({"text": "x" * 1000})

        stats = run.stats()
        assert 1000 == stats.offered
        assert MAX_RECORD_BYTES // size - 5 <= stats.pending <= MAX_RECORD_BYTES // size
        assert {"outbox_full": 1000 - stats.pending} == stats.dropped
        run.finish()

    def test_a_call_that_fails_midway_leaves_no_spoilt_packer(self, run: Run):
        run.log({"first": 1.0, "huge": 2**70})
        run.log({"second": 2.0})

        assert [{"first": 1.0, "huge": 2.0**70}, {"second": 2.0}] == data(run)

    def test_without_a_daemon_it_is_said_once_and_everything_is_kept(self, caplog: pytest.LogCaptureFixture):
        run = new_run()
        for _ in range(3):
            run.log({"loss": 1.0})
        run.finish()

        assert 3 == run.stats().pending
        assert 1 == sum("no daemon is known" in line and "sidestep run" in line for line in caplog.messages)
        assert 1 == sum("3 records are not acknowledged" in line for line in caplog.messages)


class TestStrict:
    def test_a_bad_value_is_raised(self, strict: Run):
        with pytest.raises(UnsupportedValue, match="'bad'"):
            strict.log({"bad": object()})

    def test_a_bad_step_is_raised(self, strict: Run):
        with pytest.raises(UnsupportedValue, match="step=-1"):
            strict.log({}, step=-1)

    def test_a_call_after_finish_is_raised(self, strict: Run):
        strict.finish()

        with pytest.raises(SidestepError, match="after finish"):
            strict.log({})

    def test_a_good_call_is_not(self, strict: Run):
        strict.log({"loss": np.float32(1.0)}, step=np.int64(3))

        assert [(Kind.LOG, 3, {"loss": 1.0})] == logged(strict)


class TestMappings:
    def test_entries_are_attributes_too(self, run: Run):
        run.config.lr = 0.1

        assert 0.1 == run.config["lr"] == run.config.lr == run.config.get("lr")

    def test_a_missing_entry_is_missing(self, run: Run):
        with pytest.raises(AttributeError):
            _ = run.config.nothing
        with pytest.raises(KeyError):
            _ = run.config["nothing"]

    def test_namespaces_and_keywords_update(self, run: Run):
        class Arguments:
            def __init__(self) -> None:
                self.lr = 0.1
                self.model = torch.nn.Linear

        run.config.update(Arguments(), batch=8, allow_val_change=True)

        assert {"lr": 0.1, "model": "torch.nn.modules.linear.Linear", "batch": 8} == run.config.as_dict()
        assert [{"lr": 0.1, "model": "torch.nn.modules.linear.Linear", "batch": 8}] == data(run)

    def test_defaults_do_not_replace(self, run: Run):
        run.config["lr"] = 0.1

        made = run.config.setdefaults({"lr": 0.5, "batch": 8})

        assert {"lr": 0.1, "batch": 8} == made

    def test_what_is_no_mapping_is_refused(self, run: Run):
        run.config.update("config.yaml")

        assert 1 == run.stats().values_refused

    def test_a_copy_is_a_plain_dict(self, run: Run):
        run.config["lr"] = 0.1

        assert {"lr": 0.1} == pickle.loads(pickle.dumps(run.config)) == copy.deepcopy(run.config)


class TestProcesses:
    def test_a_part_of_a_run_is_not_pickled_nor_one_that_is_finished(self, run: Run):
        with pytest.raises(TypeError, match="belongs to its process"):
            pickle.dumps(run.stage("eval"))
        run.finish()
        with pytest.raises(TypeError, match="finished"):
            copy.deepcopy(run)

    def test_a_closed_outbox_is_what_a_forked_child_finds(self, run: Run):
        """So that log() needs no check of its own for it."""
        run._session.forked()

        assert run._session.outbox.offer(b"x") is False
        assert run._session.outbox.shut is DropReason.INTERNAL
