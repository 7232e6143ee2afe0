"""The watch: who is silent, gone, or holds the others up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sidestep.wire import SAMPLER, Kind, Record, encode_record
from sidestepd.entries import Entry, EntryKind
from sidestepd.watch import MOST_NAMES, REGULAR
from tests.support.builders import Tape, bundle, log, part
from tests.support.listening import Listening, replace_options

ALLOCATED = {"values": {"memory_allocated": 1.0}, "ordinal": 0}
SAMPLED = encode_record(Record(kind=Kind.SAMPLES, time=0.0, step=None, data=ALLOCATED))


@pytest.fixture
def ranks() -> Listening:
    return Listening()


class TestSamplers:
    def test_are_not_watched(self, ranks):
        """Neither is one missed that ends, nor does one that speaks on make a stalled training a living one."""
        ranks.tape.hello(9, rank=0, launch="L", role=SAMPLER)
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.vital(9, "gone", since=20.0)
        ranks.tape.lease(9)

        ranks.wait(9.0)

        assert [] == ranks.titles()

        ranks.wait(60.0)

        assert ["no word from any rank"] == ranks.titles()


class TestWhatProcessesSayByThemselves:
    """Samples of torch's allocator go on in a training that hangs, every few seconds and for ever."""

    def wait(self, ranks: Listening, seconds: int, *of: int) -> None:
        for _ in range(seconds):
            ranks.tape.now += 1.0
            for rank in of:
                ranks.tape.say(rank, SAMPLED)
            ranks.listen(ranks.tape.now)

    def test_does_not_make_a_stalled_training_a_living_one(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))

        self.wait(ranks, 70, 0, 1, 2)

        assert ["no word from any rank"] == ranks.titles()

    def test_does_not_hide_a_rank_that_is_silent_while_others_go_on(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))

        for step in range(20, 90):
            ranks.tape.say(1, SAMPLED)
            ranks.train(0, 2, steps=[step])

        assert ["rank 1 is silent"] == ranks.titles()


class TestTheBeginning:
    """Before a launch speaks regularly: loading, compiling, and the first collective, which is where many hang."""

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_that_goes_no_further_is_told_but_later(self, ranks, steps):
        ranks.train(0, 1, 2, steps=range(steps))

        ranks.wait(690.0)
        assert [] == ranks.titles()
        ranks.wait(20.0)
        assert ["no word from any rank"] == ranks.titles()
        assert ("before the first step" in ranks.told[0][0].text) == (steps == 0)

        ranks.train(0, 1, 2, steps=range(steps, steps + 20))
        assert ["no word from any rank", "the training goes on"] == ranks.titles()

    def test_of_one_process_that_only_looks_is_no_stall(self):
        assert [] == Listening(ranks=1).wait(1000.0).titles()

    def test_that_takes_long_is_no_measure_for_later_pauses(self, ranks):
        ranks.wait(600.0).train(0, 1, 2, steps=range(20))
        ranks.wait(45.0)
        assert ["no word from any rank"] == ranks.titles()

    def test_of_a_training_that_logs_through_stages_alone_lasts(self, ranks):
        for _ in range(20):
            ranks.tape.now += 30.0
            ranks.tape.say(0, log(1, stage="eval"))
            ranks.listen(ranks.tape.now)
        assert [] == ranks.titles()
        ranks.wait(710.0)
        assert ["no word from any rank"] == ranks.titles()

    def test_may_be_the_end_of_a_rank_or_its_silence(self, ranks):
        ranks.tape.vital(1, "gone", since=1.0)
        ranks.tape.vital(2, "quiet", since=1.0)
        ranks.wait(20.0)
        assert ["rank 1 ended without a word", "rank 2 is silent"] == ranks.titles()
        assert all("before the first step" in alert.text for alert, _ in ranks.told)


class TestSilence:
    def test_of_one_rank_while_the_others_go_on_is_told_once(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))

        ranks.train(0, 2, steps=range(20, 60))

        assert ["rank 1 is silent"] == ranks.titles()
        alert = ranks.told[0][0]
        assert "its process lives" in alert.text
        assert "It was at step 19" in alert.text
        assert 20 + 10 <= alert.time <= 20 + 12

    def test_is_over_when_the_rank_speaks(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 40)).train(0, 1, 2, steps=range(40, 45))

        assert ["rank 1 is silent", "rank 1 is heard again"] == ranks.titles()
        assert ranks.told[1][0].over
        assert "INFO" == ranks.told[1][0].level

    def test_comes_again_and_is_told_again(self, ranks):
        for start in (0, 40):
            ranks.train(0, 1, 2, steps=range(start, start + 20)).train(0, 2, steps=range(start + 20, start + 40))

        assert ["rank 1 is silent", "rank 1 is heard again", "rank 1 is silent"] == ranks.titles()

    def test_of_a_process_without_heartbeats_is_told_though_nobody_goes_on(self, ranks):
        """In a training that waits for all, everyone stands still, and only the heartbeats say why."""
        ranks.train(0, 1, 2, steps=range(20))
        ranks.wait(4.0)
        ranks.tape.vital(1, "quiet", since=20.0)

        ranks.wait(60.0)

        assert ["rank 1 is silent"] == ranks.titles()
        assert "not even its heartbeats" in ranks.told[0][0].text

    def test_without_heartbeats_is_over_with_a_heartbeat(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.vital(1, "quiet", since=20.0)
        ranks.wait(15.0)
        ranks.tape.vital(1, "heard", since=35.0)

        ranks.listen(36.0)

        assert ["rank 1 is silent", "rank 1 is heard again"] == ranks.titles()

    def test_is_not_that_of_a_rank_that_hardly_ever_speaks(self, ranks):
        ranks.train(0, 1, 2, steps=[0])

        ranks.train(0, steps=range(1, 200))

        assert [] == ranks.titles()

    @pytest.mark.parametrize("calls", [1, 2, 3, 5])
    def test_after_a_few_words_is_told_when_the_beginning_is_over(self, ranks, calls):
        """It hangs in its first steps, and the other two go on."""
        ranks.train(0, 1, 2, steps=range(calls)).train(0, 2, steps=range(calls, calls + 690))
        before = ranks.titles()

        ranks.train(0, 2, steps=range(calls + 690, calls + 720))

        assert [] == before
        assert ["rank 1 is silent"] == ranks.titles()
        assert f"It was at step {calls - 1}" in ranks.told[0][0].text

    def test_after_a_few_words_is_told_though_only_one_goes_on(self, ranks):
        """Who made a call or two may have meant to say no more; who made three did not."""
        ranks.train(0, 1, steps=range(2)).train(0, 1, 2, steps=[2]).train(0, steps=range(3, 800))
        assert ["rank 1 is silent"] == ranks.titles()

    def test_is_not_that_of_a_rank_that_never_logged(self, ranks):
        ranks.train(0, 2, steps=range(800))
        assert [] == ranks.titles()

    def test_is_not_that_of_a_rank_that_logs_rarely_from_the_start(self, ranks):
        """It made a few calls far apart; the next one may take as long."""
        for start in (0, 400, 800):
            ranks.train(0, 1, 2, steps=[start]).train(0, 2, steps=range(start + 1, start + 400))
        ranks.train(0, 2, steps=range(1200, 1800))
        assert [] == ranks.titles()
        ranks.train(0, 2, steps=range(1800, 2100))
        assert ["rank 1 is silent"] == ranks.titles()

    def test_is_measured_by_how_often_the_rank_spoke_before(self, ranks):
        """A rank that logs every twelfth step is not silent for ten seconds, but for forty it is."""
        for start in range(0, 12 * (REGULAR + 4), 12):
            ranks.train(0, 1, 2, steps=[start]).train(0, 2, steps=range(start + 1, start + 12))
        assert [] == ranks.titles()

        ranks.train(0, 2, steps=range(200, 250))

        assert ["rank 1 is silent"] == ranks.titles()

    def test_is_not_that_of_a_rank_that_waits_for_one_that_evaluates(self, ranks):
        """Rank 0 goes on, but not with the training."""
        ranks.train(0, 1, 2, steps=range(20))
        for step in range(60):
            ranks.tape.now += 0.5
            ranks.tape.say(0, log(step, stage="eval"))

        ranks.listen(ranks.tape.now)

        assert [] == ranks.titles()

    def test_is_not_that_of_who_was_behind_when_all_fell_silent(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 24))

        ranks.wait(30.0)

        assert [] == ranks.titles()

    def test_ends_with_a_bye(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.bye(1)

        ranks.train(0, 2, steps=range(20, 100))

        assert [] == ranks.titles()

    def test_is_not_that_of_a_forked_child(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.hello(7, rank=1, world=3)
        ranks.train(0, 1, 2, 7, steps=range(20, 40))

        ranks.tape.vital(7, "gone", since=40.0)
        ranks.train(0, 1, 2, steps=range(40, 80))

        assert [] == ranks.titles()

    def test_is_not_that_of_one_process_that_logs_no_steps(self, ranks):
        """It speaks of other things, and may come and go."""
        ranks.tape.hello(9, rank=0, world=1, launch="sampler")
        ranks.tape.say(9, log(0, {"gpu": 1.0}, stage="system"))
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.vital(9, "quiet", since=1.0)
        ranks.tape.vital(9, "gone", since=2.0)

        ranks.train(0, 1, 2, steps=range(20, 60))

        assert [] == ranks.titles()


class TestStall:
    def test_of_all_ranks_is_told_after_longer(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))

        ranks.wait(39.0)
        before = ranks.titles()
        ranks.wait(3.0)

        assert [] == before
        assert ["no word from any rank"] == ranks.titles()
        assert "their heartbeats come" in ranks.told[0][0].text

    def test_says_who_is_behind(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=[20])

        ranks.wait(60.0)

        assert ["no word from any rank"] == ranks.titles()
        assert "Behind the others: rank 1." in ranks.told[0][0].text

    def test_is_over_when_somebody_speaks(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).wait(60.0).train(0, 1, 2, steps=[20, 21])

        assert ["no word from any rank", "the training goes on"] == ranks.titles()

    def test_is_no_pause_that_there_was_before(self, ranks):
        """A checkpoint took half a minute; a longer one is not a stall, and one four times as long is."""
        ranks.train(0, 1, 2, steps=range(20)).wait(30.0).train(0, 1, 2, steps=range(20, 30)).wait(80.0)
        before = ranks.titles()

        ranks.train(0, 1, 2, steps=range(30, 40)).wait(400.0)

        assert [] == before
        assert ["no word from any rank"] == ranks.titles()

    def test_after_one_long_pause_is_told_after_a_configured_time(self):
        """A checkpoint took so long once that three times as long would be of no use to anybody."""
        ranks = Listening(replace_options(stalled_s=700.0, longest_s=900.0))
        ranks.train(0, 1, 2, steps=range(20)).wait(600.0).train(0, 1, 2, steps=range(20, 40))
        assert [] == ranks.titles()
        ranks.wait(890.0)
        before = ranks.titles()
        ranks.wait(20.0)

        assert [] == before
        assert ["no word from any rank"] == ranks.titles()

    def test_is_no_pause_that_is_usual(self):
        """They log every half minute: what would be a long pause of others is none of theirs."""
        ranks = Listening(replace_options(longest_s=60.0))
        ranks.train(0, 1, 2, steps=range(4)).train(0, 1, 2, steps=range(4, 16), pace=30.0)
        ranks.wait(80.0)
        before = ranks.titles()
        ranks.wait(20.0)

        assert [] == before
        assert ["no word from any rank"] == ranks.titles()

    def test_does_not_make_later_ones_harmless(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).wait(1000.0).train(0, 1, 2, steps=range(20, 30)).wait(60.0)

        assert ["no word from any rank", "the training goes on", "no word from any rank"] == ranks.titles()

    def test_at_the_beginning_is_none(self, ranks):
        """Compiling and filling caches may take long, between the first steps too."""
        ranks.wait(500.0).train(0, 1, 2, steps=[0]).wait(500.0).train(0, 1, 2, steps=[1]).wait(500.0)

        assert [] == ranks.titles()

    def test_is_not_measured_by_the_beginning(self, ranks):
        """The first step was compiled for ten minutes; that is no reason to wait for half an hour later on."""
        ranks.train(0, 1, 2, steps=[0]).wait(600.0).train(0, 1, 2, steps=range(1, 30)).wait(45.0)

        assert ["no word from any rank"] == ranks.titles()

    def test_after_everybody_left_is_none(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))
        for rank in range(3):
            ranks.tape.bye(rank)

        ranks.wait(500.0)

        assert [] == ranks.titles()


class TestDeath:
    def test_of_one_is_told_at_once(self, ranks):
        ranks.train(0, 1, 2, steps=range(5))
        ranks.tape.vital(2, "gone", since=5.0)

        ranks.listen(6.5)

        assert ["rank 2 ended without a word"] == ranks.titles()
        assert "ERROR" == ranks.told[0][0].level
        assert "at step 4" in ranks.told[0][0].text

    def test_of_those_that_it_takes_down_is_not_told(self, ranks):
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.vital(1, "gone", since=20.1)
        ranks.tape.vital(0, "gone", since=20.3)
        ranks.tape.vital(2, "gone", since=20.2)

        ranks.wait(100.0)

        assert ["rank 1 ended without a word"] == ranks.titles()
        assert "ranks 0, 2 ended within a second of it" in ranks.told[0][0].text

    def test_after_a_restart_is_told_again(self, ranks):
        ranks.train(0, 1, 2, steps=range(5))
        for rank in range(3):
            ranks.tape.vital(rank, "gone", since=5.0 + rank / 10)
        ranks.listen(6.0)
        for rank in range(3):
            ranks.tape.hello(10 + rank, rank=rank, world=3)
        ranks.train(10, 11, 12, steps=range(5, 8))
        ranks.tape.vital(12, "gone", since=9.0)

        ranks.listen(10.0)

        assert ["rank 0 ended without a word", "rank 2 ended without a word"] == ranks.titles()

    def test_of_who_came_before_the_death_was_known_is_told_too(self, ranks):
        """The next process of a rank may say HELLO before the end of the one before is certain."""
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.hello(11, rank=1, world=3)
        ranks.tape.vital(1, "gone", since=19.0)
        ranks.train(0, 11, 2, steps=range(20, 40))

        ranks.train(0, 2, steps=range(40, 80))

        assert ["rank 1 ended without a word", "rank 1 is silent"] == ranks.titles()

    def test_of_an_attempt_that_was_replaced_is_told_and_its_silence_is_not(self, ranks):
        """Its end may be known only after the next attempt began; and on another node, never."""
        ranks.train(0, 1, 2, steps=range(20))
        for rank in range(3):
            next_attempt(ranks.tape, 10 + rank, rank=rank)
        ranks.tape.vital(1, "gone", since=20.0)
        ranks.tape.vital(0, "quiet", since=20.0)

        ranks.train(10, 11, 12, steps=range(20, 60))

        assert ["rank 1 ended without a word"] == ranks.titles()

    def test_that_was_none_is_taken_back(self, ranks):
        ranks.train(0, 1, 2, steps=range(5))
        ranks.tape.vital(2, "gone", since=5.0)
        ranks.listen(6.5)

        ranks.train(0, 1, 2, steps=range(5, 8))

        assert ["rank 2 ended without a word", "rank 2 is there after all"] == ranks.titles()

    def test_is_not_undone_by_a_call_that_waited_for_its_step(self, ranks):
        """It was said before; only a frame that comes later is a sign of life."""
        ranks.train(0, 1, 2, steps=range(5))
        ranks.tape.vital(2, "gone", since=5.0)
        ranks.listen(6.5)

        ranks.watch.hear(part(5, rank=2), 7.0)
        ranks.wait(3.0)

        assert ["rank 2 ended without a word"] == ranks.titles()

    def test_together_with_the_command_is_told_before_the_run_is_closed(self, ranks):
        ranks.train(0, 1, 2, steps=range(5))
        ranks.tape.vital(2, "gone", since=5.0)
        ranks.tape.close(1)

        ranks.listen(ranks.tape.now)

        assert ["rank 2 ended without a word"] == ranks.titles()

    def test_with_a_bye_is_none(self, ranks):
        ranks.train(0, 1, 2, steps=range(5))
        ranks.tape.bye(2)
        ranks.tape.vital(2, "gone", since=5.0)

        ranks.wait(5.0)

        assert [] == ranks.titles()


def next_attempt(tape: Tape, session: int, *, rank: int) -> None:
    """A session of the second attempt says HELLO."""
    entry = tape.hello(session, rank=rank, world=3)
    facts = {**entry.facts, "attempt": 1}
    later = Entry.of_event(EntryKind.HELLO, entry.session, first=entry.first, received=entry.received, **facts)
    tape.entries[-1] = replace(later, id=entry.id)


class TestTheDaemonsOwnSilence:
    def test_is_nobody_elses(self, ranks):
        """Intake was frozen or gone for an hour: nobody was heard, and nobody was silent."""
        ranks.train(0, 1, 2, steps=range(20))
        ranks.tape.now += 3600.0
        ranks.tape.boot()

        ranks.listen(ranks.tape.now)
        ranks.wait(5.0)
        ranks.train(0, 1, 2, steps=range(20, 40))

        assert [] == ranks.titles()

    def test_does_not_end_what_was_told_before(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 40))
        ranks.tape.boot()

        ranks.wait(5.0).train(0, 2, steps=range(40, 80))

        assert ["rank 1 is silent"] == ranks.titles()


class TestNotFinite:
    def test_is_told_once_for_each_name(self, ranks):
        ranks.tape.say(0, log(3, {"train/loss": float("nan"), "acc": float("nan"), "val": {"loss": float("inf")}}))
        ranks.tape.say(1, log(3, {"train/loss": float("nan"), "loss_ok": 1.0}))

        ranks.listen(1.0).listen(100.0)

        assert ["train/loss is nan", "val.loss is inf"] == ranks.titles()
        assert "on rank 0 at step 3" in ranks.told[0][0].text

    @pytest.mark.parametrize("name", ["Loss", "trainLoss", "val/LOSS_total"])
    def test_is_seen_in_capitals_too(self, ranks, name):
        ranks.tape.say(0, log(3, {name: float("nan")}))
        assert [f"{name} is nan"] == ranks.listen(1.0).titles()

    def test_a_name_can_not_write_where_it_is_shown(self, ranks):
        ranks.tape.say(0, log(0, {"loss\x1b[2J" + "x" * 500: float("nan")}))

        ranks.listen(1.0)

        [title] = ranks.titles()
        assert title.isprintable()
        assert len(title) < 130

    def test_is_not_told_of_names_without_end(self, ranks):
        ranks.tape.say(0, log(0, {f"loss{number}": float("nan") for number in range(2 * MOST_NAMES)}))

        ranks.listen(1.0)

        assert MOST_NAMES == len(ranks.titles())

    def test_is_what_the_patterns_say(self):
        ranks = Listening(replace_options(not_finite=("grad*",)))
        ranks.tape.say(0, log(0, {"loss": float("nan"), "grad_norm": float("-inf")}))

        assert ["grad_norm is -inf"] == ranks.listen(1.0).titles()


class TestStragglers:
    def test_are_named_when_they_have_been_slow_for_long_and_when_they_are_not_any_more(self, ranks):
        ranks.train(0, 1, 2, steps=[0])

        see_rows(ranks, range(40), slow_s=0.0)
        assert [] == ranks.titles()
        see_rows(ranks, range(40, 80), slow_s=0.3)
        assert ["rank 2 is slower than the others"] == ranks.titles()
        see_rows(ranks, range(80, 120), slow_s=0.0)

        assert ["rank 2 is slower than the others", "rank 2 keeps up again"] == ranks.titles()
        assert "takes 30 % more time" in ranks.told[0][0].text

    def test_are_not_named_for_a_pause_after_a_few_slow_steps(self, ranks):
        """Nobody is slow in a checkpoint, or in a training that hangs."""
        ranks.train(0, 1, 2, steps=[0])

        see_rows(ranks, range(12), slow_s=0.3)
        ranks.wait(100.0)

        assert ranks.watch.pace.scores[2].sure
        assert [] == ranks.titles()

    def test_are_not_named_for_a_time_in_which_nobody_listened(self, ranks):
        ranks.train(0, 1, 2, steps=[0])
        see_rows(ranks, range(12), slow_s=0.3)
        ranks.tape.now += 60.0
        ranks.tape.boot()
        ranks.listen(ranks.tape.now).wait(2.0)

        see_rows(ranks, range(12, 16), slow_s=0.3)
        assert [] == ranks.titles()
        see_rows(ranks, range(16, 32), slow_s=0.3)
        assert ["rank 2 is slower than the others"] == ranks.titles()


def see_rows(ranks: Listening, steps: Sequence[int], *, slow_s: float) -> None:
    """Rows of three ranks leave; each works for a second, rank 2 for longer, and they wait for each other."""
    for step in steps:
        began = ranks.now
        parts = [part(step, rank=rank, time=began + 1.0 + slow_s * (rank == 2)) for rank in range(3)]
        list(ranks.watch.annotate([replace(bundle(step), parts=tuple(parts))]))
        ranks.listen(began + 1.0 + slow_s)


class TestSwitchedOff:
    def test_tells_nothing_and_adds_nothing(self):
        off = replace_options(metrics=False, hangs=False, stragglers=False, not_finite=())
        ranks = Listening(off)
        ranks.tape.say(0, log(0, {"loss": float("nan")}))
        ranks.tape.vital(2, "gone", since=0.0)

        ranks.train(0, 1, 2, steps=range(20)).wait(1000.0)
        seen = list(ranks.watch.annotate([bundle(0, {}, {}), bundle(1, {}, {})]))

        assert [] == ranks.titles()
        assert [{}, {}] == [dict(it.own) for it in seen]


class TestRows:
    def test_of_the_main_axis_say_what_is_known_of_all_ranks(self, ranks):
        ranks.train(0, 1, 2, steps=range(20)).train(0, 2, steps=range(20, 23))
        parts = tuple(part(23, rank=rank, time=5.0 + rank) for rank in range(3))

        [seen] = ranks.watch.annotate([replace(bundle(23), parts=parts)])

        assert 2.0 == seen.own["sidestep/skew_s"]
        assert 3 == seen.own["sidestep/skew_steps"]

    @pytest.mark.parametrize("other", [{"axis": "eval/step"}, {"cause": "late"}])
    def test_of_other_axes_and_late_ones_do_not(self, ranks, other):
        ranks.train(0, 1, 2, steps=range(20))
        shown = bundle(3, {}, {}, **other)

        assert [shown] == list(ranks.watch.annotate([shown]))
