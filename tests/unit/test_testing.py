"""The recorder: what users' tests see of what their training logs."""

from __future__ import annotations

import threading

import pytest

import sidestep
from sidestep import _current
from sidestep.errors import UnsupportedValue
from sidestep.testing import Recorder, record


@pytest.fixture
def logged():
    with record() as recorder:
        yield recorder


def train(steps: int) -> None:
    run = sidestep.init(project="p", config={"lr": 0.1})
    run.define_metric("loss", reduce="mean")
    for step in range(steps):
        sidestep.log({"loss": 1 / (step + 1)}, step=step)
    run.stage("eval").log({"accuracy": 0.5})
    run.summary["best"] = 3
    run.finish(exit_code=0)


class TestRecorder:
    def test_values_come_back_by_name_with_their_steps(self, logged: Recorder):
        train(3)

        assert [1.0, 0.5, 1 / 3] == logged["loss"]
        assert [0, 1, 2] == logged.steps("loss")
        assert [0.5] == logged["eval/accuracy"]
        assert ["eval/accuracy", "loss"] == logged.names

    def test_config_summary_and_definitions_are_there(self, logged: Recorder):
        train(1)

        assert {"lr": 0.1} == logged.config
        assert {"best": 3} == logged.summary
        assert "mean" == logged.definitions["loss"]["reduce"]

    def test_what_was_never_logged_is_missing(self, logged: Recorder):
        train(1)

        assert "loss" in logged
        assert "other" not in logged
        with pytest.raises(KeyError, match="other"):
            logged["other"]

    def test_a_value_is_seen_at_once(self, logged: Recorder):
        run = sidestep.init()

        run.log({"n": 1})

        assert [1] == logged["n"]
        assert run.stats().acknowledged == run.stats().offered
        assert run.flush()
        assert run.url is None

    def test_several_runs_one_after_the_other_are_all_there(self, logged: Recorder):
        train(1)
        train(1)

        assert 2 == len(logged["loss"])
        assert [0, 0] == logged.exit_codes

    def test_threads_lose_nothing(self, logged: Recorder):
        run = sidestep.init()

        def work() -> None:
            for n in range(500):
                run.log({"n": n})

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.flush()

        assert sorted(list(range(500)) * 4) == sorted(logged["n"])

    def test_mistakes_are_raised_unless_told_otherwise(self):
        with record(), pytest.raises(UnsupportedValue):
            sidestep.init().log({"bad": object()})

        with record(strict=False) as logged:
            run = sidestep.init()
            run.log({"bad": object(), "good": 1})
            assert 1 == run.stats().values_refused
        assert ["good"] == logged.names

    def test_the_process_is_as_it_was_afterwards(self):
        before = (_current._run, _current._carrier, sidestep.log)

        with record():
            train(1)
            sidestep.init()
        with pytest.raises(ZeroDivisionError), record() as failed:
            sidestep.init().log({"n": 1 // 0})

        assert before == (_current._run, _current._carrier, sidestep.log)
        assert [1] == failed.exit_codes

    def test_no_thread_is_started(self, logged: Recorder):
        before = threading.active_count()

        sidestep.init().log({"n": 1})

        assert before == threading.active_count()
