"""How many names a run may have."""

from __future__ import annotations

from typing import Any

import pytest

from sidestepd.quota import Names
from sidestepd.resolve import Lost, Resolver
from sidestepd.rows import Part
from tests.support.builders import Tape, config, define, log, summary


def values_of(resolver: Resolver, tape: Tape, *records: bytes) -> list[Any]:
    """The values of each call, or the reason why it is none."""
    entry = tape.say(0, *records)
    return [
        said.values if isinstance(said, Part) else said.reason
        for said in resolver.read(entry)
        if isinstance(said, Part | Lost)
    ]


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def resolver(tape: Tape) -> Resolver:
    """A run that may have four names, one of which is its axis."""
    resolver = Resolver(names=Names(4))
    for _ in resolver.read(tape.hello(0)):
        pass
    return resolver


class TestARunWithAllItsNames:
    def test_keeps_those_that_it_has(self, resolver, tape):
        said = [log(0, {"a": 1, "b": 2, "c": 3}), log(1, {"a": 1, "b": 2, "c": 3})]

        assert [{"a": 1, "b": 2, "c": 3}] * 2 == values_of(resolver, tape, *said)
        assert 0 == resolver.names.refused

    def test_goes_without_the_values_of_further_ones_and_counts_them(self, resolver, tape):
        said = [log(0, {"a": 1, "b": 2, "c": 3}), log(1, {"a": 1, "d": 2, "e": 3})]

        assert {"a": 1} == values_of(resolver, tape, *said)[1]
        assert 2 == resolver.names.refused

    def test_gives_up_a_call_of_which_nothing_is_left(self, resolver, tape):
        said = [log(0, {"a": 1, "b": 2, "c": 3}), log(1, {"d": 2}), log(2, {})]

        assert [{"a": 1, "b": 2, "c": 3}, "names", {}] == values_of(resolver, tape, *said)
        assert {"names": 1} == dict(resolver.dead)

    def test_opens_no_further_axis(self, resolver, tape):
        said = [log(0, {"a": 1, "b": 2, "c": 3}), log(7, {"a": 1}, stage="eval"), log(1, {"a": 1})]

        assert [{"a": 1, "b": 2, "c": 3}, "names", {"a": 1}] == values_of(resolver, tape, *said)

    def test_counts_what_wandb_shows_of_nested_values(self, resolver, tape):
        said = [log(0, {"a": {"x": 1, "y": {"z": 2}}}), log(1, {"a": {"x": 1, "w": 2}, "b": 3}), log(2, {"c": 1})]

        assert [{"a": {"x": 1, "y": {"z": 2}}}, {"a": {"x": 1, "w": 2}}, "names"] == values_of(
            resolver, tape, *said
        )

    def test_takes_no_further_configuration_summary_or_declaration(self, resolver, tape):
        said = [
            log(0, {"a": 1}),
            config(lr=1),
            summary({"best": 2}),
            config(more=3),
            summary({"more": 4}),
            define("x"),
        ]

        assert ["names"] == values_of(resolver, tape, *said)[1:]
        assert (["lr"], ["best"]) == (list(resolver.config), list(resolver.summary))
        assert 2 == resolver.names.refused

    def test_takes_the_same_when_it_reads_on_in_another_life(self, resolver, tape):
        values_of(resolver, tape, log(0, {"a": 1, "b": 2, "c": 3}), log(1, {"d": 1, "a": 1}))

        again = Resolver(names=Names(4))
        again.restore(resolver.state())

        assert [{"c": 3}, "names"] == values_of(again, tape, log(2, {"c": 3, "e": 1}), log(3, {"d": 1}))
        assert 2 == again.names.refused

    def test_that_was_counted_before_there_was_a_quota_goes_on(self, resolver):
        state = resolver.state()
        del state["names"]

        resolver.restore(state)

        assert (0, 4) == (resolver.names.refused, resolver.names.most)
