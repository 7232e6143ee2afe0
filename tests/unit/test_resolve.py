"""What entries say: axes, steps, declarations, and what can not be read."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import SAMPLER
from sidestepd.resolve import Booted, Closed, Folded, Heard, Joined, Left, Lost, Resolver
from sidestepd.rows import Part, Position, Raised, Sampled
from sidestepd.rules import Rule
from tests.support.builders import (
    Tape,
    alert,
    config,
    corrupted,
    counted,
    define,
    log,
    named,
    samples,
    session_id,
    summary,
)
from tests.support.reading import Reading


@pytest.fixture
def reading() -> Reading:
    return Reading()


class TestSessions:
    def test_a_hello_says_who_joined(self, reading):
        reading.tape.hello(1, rank=3, world=8, launch="L", more=True)

        assert [Joined(session=session_id(1), rank=3, world=8, launch="L#0", more=True)] == reading.said()

    def test_a_frame_says_its_parts_and_then_that_it_was_heard(self, reading):
        reading.tape.hello(1, rank=3)
        reading.tape.say(1, log(5, {"a": 1}, time=2.5), more=True)

        assert [
            Part(
                position=Position(2, 0), session=session_id(1), rank=3, axis="global_step", step=5, time=2.5,
                values={"a": 1},
            ),
            Heard(session=session_id(1), more=True),
        ] == reading.said()[1:]  # fmt: skip

    def test_the_end_of_a_session_is_told_whichever_way_it_ends(self, reading):
        reading.tape.hello(1)
        reading.tape.bye(1)
        reading.tape.hello(2)
        reading.tape.lease(2)

        assert [Left(session_id(1)), Left(session_id(2))] == [it for it in reading.said() if isinstance(it, Left)]
        assert ["bye", "lease"] == [it.ended for it in reading.resolver.sessions.values()]

    def test_a_session_that_speaks_again_has_not_ended(self, reading):
        reading.tape.hello(1)
        reading.tape.lease(1)
        reading.tape.say(1, log(0))

        reading.said()

        assert reading.resolver.sessions[session_id(1)].ended is None

    def test_boot_and_close_are_passed_on(self, reading):
        reading.tape.boot()
        reading.tape.close(3)

        assert [Booted(), Closed(exit_code=3)] == reading.said()

    def test_a_heartbeat_that_says_whether_more_is_to_come_was_heard(self, reading):
        """HELLO counts as more what the daemon turned out to have; without this, patience would not run again."""
        reading.tape.hello(1, more=True)
        reading.tape.counters(1, offered=4, dropped={}, more=False)

        assert Heard(session=session_id(1), more=False) == reading.said()[-1]

    def test_counters_keep_the_highest_of_each(self, reading):
        reading.tape.hello(1, offered=5, dropped={"full": 2})
        reading.tape.counters(1, offered=4, dropped={"full": 1, "size": 3})

        assert len(reading.said()) == 1
        facts = reading.resolver.sessions[session_id(1)]
        assert (5, {"full": 2, "size": 3}) == (facts.offered, facts.dropped)

    def test_bye_says_how_many_records_there_were(self, reading):
        reading.tape.hello(1)
        reading.tape.say(1, log(0), log(1))
        reading.tape.bye(1)

        reading.said()

        assert 2 == reading.resolver.sessions[session_id(1)].final

    def test_a_session_whose_first_hello_was_lost_is_known_from_the_next(self, reading):
        """A damaged spool may begin with a frame."""
        reading.tape.say(1, log(0))
        reading.tape.hello(1, rank=3, world=4)
        reading.tape.say(1, log(1))

        assert [0, 3] == [part.rank for part in reading.parts()]
        assert "L#0" == reading.resolver.sessions[session_id(1)].launch


class TestAxes:
    def test_a_call_without_a_stage_is_on_the_main_axis(self, reading):
        reading.tape.say(1, log(7, {"a": 1}))

        assert [("global_step", 7)] == reading.places()

    def test_a_call_in_a_stage_is_on_its_axis_and_its_names_lie_under_it(self, reading):
        reading.tape.say(1, log(7, {"a": 1, "b/c": 2}, stage="eval/deep"))

        [part] = reading.parts()

        assert ("eval/deep/step", 7) == (part.axis, part.step)
        assert {"eval/deep/a": 1, "eval/deep/b/c": 2} == part.values

    def test_a_step_is_one_of_62_bits(self, reading):
        reading.tape.say(1, log(-1), log(2**62), log(2**62 - 1), log(0))

        assert [
            Lost(position=Position(1, 0), count=1, reason="step"),
            Lost(position=Position(1, 1), count=1, reason="step"),
        ] == reading.losses()
        assert {"step": 2} == reading.resolver.dead

    def test_a_row_of_an_earlier_life_marks_its_parts(self, reading):
        entry = reading.tape.say(1, log(0), log(1))

        in_rows = {Position(1, 1): {"global_step": 1}}
        parts = [it for it in reading.resolver.read(entry, in_rows.get) if isinstance(it, Part)]

        assert [False, True] == [part.used for part in parts]


class TestCountedSteps:
    def test_the_first_launch_counts_from_zero(self, reading):
        reading.tape.hello(1)
        reading.tape.say(1, counted(0), counted(1))

        assert [("global_step", 0), ("global_step", 1)] == reading.places()

    def test_a_later_launch_goes_on_one_past_the_highest_step_of_each_axis(self, reading):
        """An evaluation process continues where training ended."""
        reading.tape.hello(1, launch="train")
        reading.tape.say(1, log(99), log(40), log(5, stage="eval"))
        reading.tape.bye(1)
        reading.tape.hello(2, rank=0, launch="evaluate")
        reading.tape.say(2, counted(0), counted(2), counted(0, stage="eval"), counted(0, stage="new"))

        assert [("global_step", 100), ("global_step", 102), ("eval/step", 6), ("new/step", 0)] == reading.places()[
            3:
        ]

    def test_ranks_of_one_launch_share_its_base(self, reading):
        """Also the one that comes when the other has counted on."""
        reading.tape.hello(1, rank=0)
        reading.tape.say(1, counted(0), counted(1))
        reading.tape.hello(2, rank=1)
        reading.tape.say(2, counted(0))

        assert ("global_step", 0) == reading.places()[-1]

    def test_an_explicit_step_stands_for_itself(self, reading):
        reading.tape.hello(1, launch="train")
        reading.tape.say(1, log(99))
        reading.tape.hello(2, launch="evaluate")
        reading.tape.say(2, log(3))

        assert ("global_step", 3) == reading.places()[-1]


class TestLaunches:
    def launches(self, reading: Reading) -> list[str]:
        return [said.launch for said in reading.said() if isinstance(said, Joined)]

    def test_a_rank_seen_again_after_its_bye_opens_a_new_launch(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.hello(2, rank=1)
        for session in (1, 2):
            reading.tape.bye(session)
        reading.tape.hello(3, rank=1)
        reading.tape.hello(4, rank=0)

        assert ["L#0", "L#0", "L#1", "L#1"] == self.launches(reading)

    def test_and_again(self, reading):
        for session in (1, 2, 3):
            reading.tape.hello(session, rank=0)
            reading.tape.bye(session)

        assert ["L#0", "L#1", "L#2"] == self.launches(reading)

    def test_a_rank_seen_again_without_a_bye_is_of_the_same(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.lease(1)
        reading.tape.hello(2, rank=0)

        assert ["L#0", "L#0"] == self.launches(reading)

    def test_a_session_that_comes_back_stays_in_its_launch(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.hello(1, rank=0)

        assert ["L#0", "L#0"] == self.launches(reading)

    def test_the_new_one_counts_on(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.say(1, counted(0), counted(1))
        reading.tape.bye(1)
        reading.tape.hello(2, rank=0)
        reading.tape.say(2, counted(0))

        assert ("global_step", 2) == reading.places()[-1]


class TestAxisMetrics:
    def test_the_session_s_last_value_is_added_where_it_is_needed(self, reading):
        reading.tape.say(1, define("val/*", step_metric="epoch"), log(0, {"epoch": 3}), log(1, {"val/acc": 1}))
        reading.tape.say(1, log(2, {"loss": 1}))

        assert [{"epoch": 3}, {"val/acc": 1, "epoch": 3}, {"loss": 1}] == reading.values()

    def test_a_value_in_the_call_is_the_one(self, reading):
        reading.tape.say(1, define("val/*", step_metric="epoch"), log(0, {"epoch": 3}))
        reading.tape.say(1, log(1, {"val/acc": 1, "epoch": 4}), log(2, {"val/acc": 1}))

        assert [{"epoch": 3}, {"val/acc": 1, "epoch": 4}, {"val/acc": 1, "epoch": 4}] == reading.values()

    def test_another_session_s_value_is_not_taken(self, reading):
        reading.tape.say(1, define("val/*", step_metric="epoch"), log(0, {"epoch": 3}))
        reading.tape.say(2, log(1, {"val/acc": 1}))

        assert {"val/acc": 1} == reading.values()[-1]

    def test_a_stage_plotted_against_the_main_axis_has_its_step(self, reading):
        """The chart would be empty otherwise: a row of the stage has no main step of its own."""
        reading.tape.say(1, define("acc", stage="val", step_metric="global_step"), log(7, {"loss": 1}))
        reading.tape.say(1, log(0, {"acc": 1}, stage="val"))

        assert {"val/acc": 1, "global_step": 7} == reading.values()[-1]

    def test_a_metric_of_the_stage_can_be_the_axis_of_others_there(self, reading):
        reading.tape.say(1, define("acc", stage="val", step_metric="epoch"), log(0, {"epoch": 2}, stage="val"))
        reading.tape.say(1, log(1, {"acc": 1}, stage="val"))

        assert {"val/acc": 1, "val/epoch": 2} == reading.values()[-1]

    def test_the_axis_of_the_call_itself_is_not_added_twice(self, reading):
        reading.tape.say(1, define("loss", step_metric="global_step"), log(7, {"loss": 1}))

        assert [{"loss": 1}] == reading.values()


class TestDeclarations:
    def test_what_is_declared_is_folded_and_counted(self, reading):
        reading.tape.say(1, config(lr=1), summary({"best": 2}), define("a", summary="max"))

        assert [Folded(Position(1, seq)) for seq in range(3)] == reading.said()[:3]
        assert 3 == reading.resolver.folded
        assert Rule(pattern="a", summary="max") == reading.resolver.rules.of("a")

    def test_a_lower_rank_is_not_overruled_by_a_higher_one(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.hello(2, rank=1)
        reading.tape.say(2, config(a=1, b=1))
        reading.tape.say(1, config(a=0))
        reading.tape.say(2, config(a=2, b=2))

        reading.said()

        assert {"a": (0, 0), "b": (1, 2)} == reading.resolver.config

    def test_what_the_run_is_called_is_as_the_lowest_rank_says_and_outlives_a_crash(self, reading):
        reading.tape.hello(1, rank=0)
        reading.tape.hello(2, rank=1)
        reading.tape.say(1, named(name="first"), named(name="best"))
        reading.tape.say(2, named(name="other", tags=["a"]))
        reading.said()

        again = Resolver()
        again.restore(msgpack.unpackb(msgpack.packb(reading.resolver.state()), strict_map_key=False))

        assert {"name": (0, "best"), "tags": (1, ["a"])} == reading.resolver.named == again.named
        assert 3 == reading.resolver.folded

    def test_a_rank_overrules_itself(self, reading):
        reading.tape.say(1, config(a=1), config(a=2))

        reading.said()

        assert {"a": (0, 2)} == reading.resolver.config

    def test_summary_values_of_a_stage_lie_under_it(self, reading):
        reading.tape.say(1, summary({"best": 2}, stage="eval", time=5.0))

        reading.said()

        assert {"eval/best": (5.0, 2)} == reading.resolver.summary

    @pytest.mark.parametrize("attributes", [{"reduce": "median"}, {"reduce": 5}, {"step_metric": [1]}])
    def test_a_declaration_that_says_nothing_sensible_is_counted(self, reading, attributes):
        reading.tape.say(1, define("a", **attributes), log(0))

        assert [Lost(position=Position(1, 0), count=1, reason="definition")] == reading.losses()
        assert {"definition": 1} == reading.resolver.dead


class TestWhatCanNotBeRead:
    def test_a_corrupt_frame_is_lost_as_a_whole_but_was_heard(self, reading):
        """Else a session that had more to say would be waited for until it speaks again."""
        entry = corrupted(reading.tape.say(1, log(0), log(1)))

        assert [
            Lost(position=Position(1, 0), count=2, reason="corrupt"),
            Heard(session=session_id(1), more=False),
        ] == list(reading.resolver.read(entry))
        assert {"corrupt": 2} == reading.resolver.dead

    def test_a_record_that_is_none_takes_no_other_with_it(self, reading):
        reading.tape.say(1, log(0), b"\x05", log(1))

        assert [Part, Lost, Part, Heard] == [type(said) for said in reading.said()]
        assert {"shape": 1} == reading.resolver.dead

    def test_a_gap_before_a_frame_was_lost_with_a_spool(self, reading):
        reading.tape.say(1, log(0))
        reading.tape.next[1] = 5
        reading.tape.say(1, log(5))

        assert [Lost(position=Position(2, 1), count=4, reason="spool_lost", in_frame=False)] == reading.losses()
        assert 4 == reading.resolver.sessions[session_id(1)].lost

    def test_so_was_what_a_hello_no_longer_has(self, reading):
        reading.tape.hello(1, first=3)
        reading.tape.say(1, log(3))

        assert [Lost(position=Position(1, 0), count=3, reason="spool_lost", in_frame=False)] == reading.losses()

    def test_a_hello_behind_what_was_read_loses_nothing(self, reading):
        reading.tape.say(1, log(0), log(1))
        reading.tape.hello(1, first=0)
        reading.tape.say(1, log(2))

        assert [] == reading.losses()
        assert 3 == reading.resolver.sessions[session_id(1)].next


class TestState:
    @given(cut=st.integers(0, 20))
    def test_a_resolver_that_was_restored_reads_on_as_if_nothing_had_happened(self, cut):
        """At whatever entry the checkpoint is."""
        tape = Tape()
        tape.hello(1, rank=0, world=2, offered=9, dropped={"full": 1})
        tape.say(1, define("val/*", step_metric="epoch"), config(lr=1), log(4, {"epoch": 1}))
        tape.hello(2, rank=1, world=2)
        tape.say(2, config(lr=2, bs=3), counted(0), b"\x05", summary({"best": 1}))
        tape.say(1, counted(1, stage="eval"), log(9, {"val/acc": 1}), define("v*", reduce=["max", "mean"]))
        tape.bye(2)
        tape.hello(3, rank=1, world=2)
        tape.say(3, counted(0), counted(0, stage="eval"))
        tape.lease(1)
        tape.say(1, log(10, {"val/acc": 2}))
        tape.bye(1)
        tape.hello(4, rank=0, world=2)
        tape.say(4, counted(0), counted(3, stage="eval"), config(lr=5))
        tape.next[4] += 2
        tape.say(4, counted(9))
        tape.hello(5, rank=0, world=1, launch="evaluate")
        tape.say(5, counted(0), summary({"best": 2}), define(""))
        tape.bye(4)
        tape.hello(6, rank=0, world=2)
        one, other = Resolver(), Resolver()
        for entry in tape.entries[:cut]:
            list(one.read(entry))

        other.restore(msgpack.unpackb(msgpack.packb(one.state()), strict_map_key=False))

        for entry in tape.entries[cut:]:
            assert list(one.read(entry)) == list(other.read(entry))
        assert one.state() == other.state()

    def test_entries_may_be_read_again_from_a_checkpoint(self, reading):
        """Reading is deterministic: the same entries teach the same."""
        reading.tape.hello(1)
        reading.tape.say(1, counted(0), config(a=1))
        first, second = Resolver(), Resolver()

        said = [[said for entry in reading.tape.entries for said in it.read(entry)] for it in (first, second)]

        assert said[0] == said[1]
        assert first.state() == second.state()

    def test_an_entry_is_not_touched(self, reading):
        entry = reading.tape.say(1, log(0))
        before = replace(entry)

        list(reading.resolver.read(entry))

        assert before == entry


class TestSamples:
    def test_are_said_with_their_node_and_move_no_axis(self, reading):
        reading.tape.hello(1, rank=3)
        reading.tape.say(1, samples({"a": 5}, time=2.5, ordinal=0, device="GPU-1"), alert("hot"))

        said = reading.said()[1:]

        assert [
            Sampled(
                position=Position(2, 0),
                session=session_id(1),
                node="n0",
                time=2.5,
                values={"a": 5},
                ordinal=0,
                device="GPU-1",
            ),
            Raised(position=Position(2, 1), title="hot", text="x", level="WARN"),
            Heard(session=session_id(1), more=False),
        ] == said
        assert 2 == reading.resolver.folded

    def test_that_are_none_are_lost_with_a_reason(self, reading):
        reading.tape.hello(1)
        reading.tape.say(1, samples("hot"), alert(3))
        assert ["samples", "alert"] == [lost.reason for lost in reading.losses()]

    def test_of_a_sampler_come_from_nobody_that_order_knows(self, reading):
        tape = reading.tape
        tape.hello(1, launch="L")
        tape.hello(9, rank=0, launch="L", role=SAMPLER)
        tape.say(9, samples({"a": 5}))
        tape.counters(9, more=False)
        tape.lease(9)
        tape.hello(9, rank=0, role=SAMPLER)
        tape.bye(9)

        joined, sampled = reading.said()

        assert (session_id(1), session_id(9)) == (joined.session, sampled.session)

    def test_a_sampler_that_logs_steps_counts_from_no_base(self, reading):
        reading.tape.hello(1, launch="L")
        reading.tape.say(1, log(4))
        reading.tape.hello(9, rank=0, role=SAMPLER)
        reading.tape.say(9, counted(2))
        assert [4, 2] == [part.step for part in reading.parts()]

    def test_of_a_sampler_that_ended_open_no_new_launch(self, reading):
        reading.tape.hello(9, rank=0, launch="L", role=SAMPLER)
        reading.tape.bye(9)
        reading.tape.hello(1, rank=0, launch="L")
        assert ["L#0"] == [said.launch for said in reading.said()]
