"""A run that is given anything at all, by anybody, at any time: none of it does harm."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidestep._run import Run
from sidestep.wire import Undecodable
from tests.support.runs import balanced, data, logged, new_run, records


@pytest.fixture
def run() -> Iterator[Run]:
    made = new_run()
    yield made
    made.finish()


class Evil:
    """Raises whatever is done to it, but for what hypothesis must know."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Evil
        raise RuntimeError(name)

    def __repr__(self) -> str:
        return "Evil()"

    def _raise(self, *_: object) -> Any:
        raise RuntimeError

    __str__ = __float__ = __int__ = __index__ = __len__ = __iter__ = __eq__ = __bool__ = _raise
    __hash__ = object.__hash__


class EvilMapping(Mapping[str, float]):
    def __getitem__(self, key: str) -> float:
        raise RuntimeError

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


class EvilDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError

    keys = values = __iter__ = items


EVIL_ARRAY = np.empty(1, dtype=object)
EVIL_ARRAY[0] = Evil()


STRANGE: list[Any] = [
    object(),
    Evil(),
    EvilMapping(),
    Decimal("sNaN"),
    float,
    print,
    10**400,
    np.float32(1),
    np.arange(40),
    EVIL_ARRAY,
    torch.zeros(2, device="meta"),
    torch.zeros(3),
]


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.decimals()
    | st.complex_numbers()
    | st.datetimes()
    | st.characters(categories=["Cs"])
    | st.sampled_from(range(len(STRANGE))).map(lambda number: STRANGE[number]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


class TestNothingRaises:
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        call=st.dictionaries(st.text(max_size=10), ANYTHING, max_size=4) | ANYTHING,
        step=st.none() | st.integers() | ANYTHING,
        commit=st.sampled_from([None, True, False, 0, "x"]),
    )
    def test_whatever_is_logged(self, call: Any, step: Any, commit: Any):
        run = RUN_FOR_ANYTHING
        before = dict.copy(call) if isinstance(call, dict) else None
        offered = run.stats().offered

        run.log(call, step=step, commit=commit)
        run.stage("s").log(call, step=step, commit=commit)

        assert offered + 2 == run.stats().offered
        assert balanced(run)
        assert [] == [record for record in records(run) if isinstance(record, Undecodable)]
        if before is not None:
            assert list(map(id, before.values())) == list(map(id, dict.values(call)))

    @settings(max_examples=100, deadline=None)
    @given(value=ANYTHING)
    def test_whatever_else_is_said(self, value: Any):
        run = RUN_FOR_ANYTHING

        run.define_metric(value, step_metric=value, reduce=value, summary=value)
        run.config.update(value)
        run.config["key"] = value
        run.summary.update({"key": value})
        run.config.setdefaults(value)
        run.stage(value).log({"a": 1}, commit=value)

        assert balanced(run)
        assert [] == [record for record in records(run) if isinstance(record, Undecodable)]

    @pytest.mark.parametrize("timeout", ["soon", None, float("nan"), -1, 10**400, [], 1e300])
    def test_a_timeout_that_is_none(self, timeout: Any):
        run = new_run()

        assert run.flush(timeout)
        run.finish(timeout=timeout)

    def test_a_stage_that_has_no_name(self, run: Run):
        class Nameless:
            def __str__(self) -> str:
                raise RuntimeError

        assert "Nameless" == run.stage(Nameless()).name  # type: ignore[arg-type]

    def test_attributes_of_the_users_own(self, run: Run):
        run.my_tag = "mine"  # type: ignore[attr-defined]

        assert "mine" == run.my_tag  # type: ignore[attr-defined]

    def test_a_dict_that_can_not_be_read(self, run: Run):
        """Not among the above: hypothesis reads the dicts it makes."""
        run.log(EvilDict(a=1))
        run.log({"bad": EvilDict(a=1), "good": 1.0})

        assert [{"good": 1.0}] == data(run)
        assert {"unsupported": 1} == run.stats().dropped

    def test_a_value_that_denies_its_class(self, run: Run):
        class Denying:
            @property
            def __class__(self) -> Any:  # type: ignore[override]
                raise RuntimeError

        run.log({"bad": Denying(), "good": 1.0}, step=3)
        run.log(Denying())  # type: ignore[arg-type]
        run.log({}, step=Denying())  # type: ignore[arg-type]

        assert [{"good": 1.0}] == data(run)
        assert balanced(run)

    def test_a_logging_handler_that_fails_does_no_harm(self, run: Run):
        class Failing(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise RuntimeError

        handler = Failing()
        logging.getLogger("sidestep").addHandler(handler)
        try:
            run.log({"bad": object(), "good": 1.0})
        finally:
            logging.getLogger("sidestep").removeHandler(handler)

        assert [{"good": 1.0}] == data(run)


RUN_FOR_ANYTHING = new_run()


class TestThreadsAndReentry:
    def test_threads_lose_nothing_and_take_each_step_once(self, run: Run):
        each, threads = 2000, 4
        workers = [
            threading.Thread(target=lambda mark=mark: [run.log({"mark": mark, "n": n}) for n in range(each)])
            for mark in range(threads)
        ]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(interval)

        found = logged(run)
        assert list(range(each * threads)) == sorted(step for _, step, _ in found if step is not None)
        assert {(mark, n) for mark in range(threads) for n in range(each)} == {
            (entries["mark"], entries["n"]) for _, _, entries in found
        }

    def test_a_value_that_logs_while_it_is_read_spoils_nothing(self, run: Run):
        class Chatty(np.ndarray):
            def item(self, *_: Any) -> float:  # type: ignore[override]
                run.log({"inner": 1.0})
                return 2.0

        value = np.zeros(1).view(Chatty)

        run.log({"before": 0.0, "outer": value, "after": 3.0})

        assert [{"inner": 1.0}, {"before": 0.0, "outer": 2.0, "after": 3.0}] == data(run)

    def test_a_signal_handler_may_log(self, run: Run):
        received = 0

        def handler(*_: object) -> None:
            nonlocal received
            received += 1
            run.log({"signal": received})

        previous = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            calls = 0
            while received < 20:
                run.log({"loss": 1.0, "calls": calls})
                calls += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

        found = logged(run)
        assert calls + received == len(found)
        assert list(range(len(found))) == sorted(step for _, step, _ in found if step is not None)
