"""One value of what several ranks said."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.definitions import REDUCTIONS
from sidestepd.reduce import reduce_parts
from sidestepd.rules import Rule, Rules
from tests.support.builders import part

NAN, INF = math.nan, math.inf


def reduced(*values: Any, by: str | tuple[str, ...] | None = None) -> dict[str, Any]:
    """What becomes of `m` when rank 0, 1, ... say these values."""
    operations = (by,) if isinstance(by, str) else by
    rules = Rules([Rule(pattern="m", reduce=operations)])
    parts = [part(data={"m": value}, rank=rank) for rank, value in enumerate(values)]
    return reduce_parts(parts, rules, ()).values


class TestOperations:
    @pytest.mark.parametrize(
        ("by", "values", "expected"),
        [
            ("mean", (1, 2, 6), 3.0), ("mean", (1.5,), 1.5), ("mean", (1, NAN), NAN), ("mean", (1, INF), INF),
            ("mean", (INF, -INF), NAN),
            ("min", (3, 1, 2), 1), ("min", (NAN, 1), NAN), ("min", (1, NAN), NAN), ("min", (1, -INF), -INF),
            ("max", (3, 1, 4), 4), ("max", (NAN, 1), NAN), ("max", (1, NAN), NAN), ("max", (1, INF), INF),
            ("sum", (1, 2, 3), 6), ("sum", (1, NAN), NAN), ("sum", (0.5, INF), INF),
            ("sum", (2**63, 2**63), 2.0**64),
            ("sum", (-(2**63), -1), -(2.0**63)),
            ("std", (1, 3), 1.0), ("std", (7,), 0.0), ("std", (1, NAN), NAN), ("std", (1, INF), NAN),
            ("std", (1e200, -1e200), 1e200), ("std", (2**63, 2**63), 0.0),
            ("count", (5, 5, NAN), 3), ("count", (5,), 1),
            ("argmax_rank", (1, 5, 3), 1), ("argmax_rank", (5, 5), 0), ("argmax_rank", (9, NAN, NAN), 1),
        ],
    )  # fmt: skip
    def test_numbers_are_reduced_as_declared(self, by, values, expected):
        assert repr({"m": expected}) == repr(reduced(*values, by=by))  # NaN is as good as NaN, and 3 is not 3.0

    def test_without_a_word_it_is_the_mean(self):
        assert {"m": 2.0} == reduced(1, 3)

    def test_one_rank_alone_keeps_its_value_and_type(self):
        assert repr({"m": 7}) == repr(reduced(7))

    @pytest.mark.parametrize(("by", "expected"), [("first", 20), ("last", 10)])
    def test_first_and_last_go_by_the_time_of_the_call(self, by, expected):
        rules = Rules([Rule(pattern="m", reduce=(by,))])
        parts = [part(data={"m": 10}, rank=0, time=9.0), part(data={"m": 20}, rank=1, time=8.0)]

        assert {"m": expected} == reduce_parts(parts, rules, ()).values

    def test_several_operations_stand_beside_each_other(self):
        assert {"m.mean": 2.0, "m.max": 3} == reduced(1, 3, by=("mean", "max"))

    def test_per_rank_names_the_rank(self):
        assert {"m/rank0": 1, "m/rank1": "x"} == reduced(1, "x", by="per_rank")

    def test_per_rank_stands_beside_others(self):
        assert {"m/rank0": 1, "m/rank1": 3, "m.mean": 2.0} == reduced(1, 3, by=("per_rank", "mean"))

    def test_a_rank_that_did_not_say_it_does_not_count(self):
        rules = Rules([Rule(pattern="m", reduce=("count",))])
        parts = [part(data={"m": 1}, rank=0), part(data={"other": 1}, rank=1)]

        assert {"m": 1, "other": 1} == reduce_parts(parts, rules, ()).values


class TestWeightedMean:
    def test_each_value_weighs_what_its_rank_says(self):
        assert 2.5 == self.weighed({"m": 1, "n": 1}, {"m": 3, "n": 3})

    def test_a_rank_without_a_weight_weighs_one(self):
        assert 2.0 == self.weighed({"m": 1, "n": 1}, {"m": 3})

    def test_a_weight_that_is_no_number_weighs_one(self):
        assert 2.0 == self.weighed({"m": 1, "n": "x"}, {"m": 3, "n": True})

    def test_no_weight_at_all_is_not_a_number(self):
        assert math.isnan(self.weighed({"m": 1, "n": 0}, {"m": 3, "n": 0}))

    def test_the_weight_of_numbers_in_a_dict_is_the_call_s(self):
        assert {"a": 2.5} == self.weighed({"m": {"a": 1}, "n": 1}, {"m": {"a": 3}, "n": 3})

    def weighed(self, *datas: dict[str, Any]) -> Any:
        rules = Rules([Rule(pattern="m", reduce=("mean:n",))])
        parts = [part(data=data, rank=rank) for rank, data in enumerate(datas)]
        return reduce_parts(parts, rules, ()).values["m"]


class TestWhatIsNoNumber:
    @pytest.mark.parametrize("value", ["text", None, True, [1, 2], b"bytes"])
    def test_it_is_the_lowest_rank_s(self, value):
        assert {"m": value} == reduced(value, "other")

    @pytest.mark.parametrize("by", ["mean", "std", "max", "argmax_rank", "mean:n", ("mean", "max")])
    @pytest.mark.parametrize("values", [(1, "x"), ("x", 1), (None, 1.0), (1, True), ({"a": 1}, 2), (2, {"a": 1})])
    def test_so_it_is_when_one_rank_said_a_number_and_another_did_not(self, values, by):
        assert {"m": values[0]} == reduced(*values, by=by)

    def test_per_rank_stays_beside_it(self):
        assert {"m": "x", "m/rank0": "x", "m/rank1": 1} == reduced("x", 1, by=("mean", "per_rank"))

    def test_ranks_are_in_order_however_they_came(self):
        parts = [part(data={"m": "high"}, rank=3), part(data={"m": "low"}, rank=1)]

        assert {"m": "low"} == reduce_parts(parts, Rules(), ()).values


class TestDicts:
    def test_numbers_inside_are_reduced_and_the_shape_stays(self):
        assert {"m": {"a": 2.0, "b": {"c": 5}, "d": "x"}} == reduced(
            {"a": 1, "b": {"c": 5}, "d": "x"}, {"a": 3, "d": "y"}
        )

    def test_a_number_here_and_a_dict_there_is_the_lowest_rank_s(self):
        assert {"m": {"a": {"b": 1}}} == reduced({"a": {"b": 1}}, {"a": 3})

    def test_several_operations_reach_inside(self):
        assert {"m.min": {"a": 1}, "m.max": {"a": 3}} == reduced({"a": 1}, {"a": 3}, by=("min", "max"))

    def test_an_empty_one_stays(self):
        assert {"m": {}} == reduced({}, {})


class TestCallsOfOneSession:
    def test_the_later_call_wins_and_that_is_counted(self):
        parts = [part(data={"m": 1, "a": 1}), part(data={"m": 5, "b": 2})]

        result = reduce_parts(parts, Rules(), ())

        assert {"m": 5, "a": 1, "b": 2} == result.values
        assert 1 == result.conflicts

    def test_two_sessions_of_one_rank_are_two_speakers(self):
        parts = [part(data={"m": 1}, session=1), part(data={"m": 3}, session=2)]

        result = reduce_parts(parts, Rules(), ())

        assert {"m": 2.0} == result.values
        assert 0 == result.conflicts

    def test_axis_metrics_are_the_lowest_rank_s_and_never_reduced(self):
        parts = [part(data={"epoch": 4}, rank=2), part(data={"epoch": 3}, rank=1)]

        assert {"epoch": 3} == reduce_parts(parts, Rules(), {"epoch"}).values


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abm"), inner, max_size=3),
    max_leaves=5,
)


class TestWhateverWasSaid:
    @given(
        datas=st.lists(st.dictionaries(st.sampled_from("mn"), values, max_size=2), min_size=1, max_size=4),
        by=st.lists(st.sampled_from([*sorted(REDUCTIONS), "mean:n"]), min_size=1, max_size=3).map(tuple),
    )
    def test_the_result_can_be_packed(self, datas, by):
        """No exception, and no number of more than 64 bits."""
        rules = Rules([Rule(pattern="m", reduce=by)])
        parts = [part(data=data, rank=rank) for rank, data in enumerate(datas)]

        result = reduce_parts(parts, rules, ())

        assert msgpack.packb(result.values)
