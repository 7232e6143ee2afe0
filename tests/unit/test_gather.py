"""Parts that wait for their media."""

from __future__ import annotations

from typing import Any

import pytest

from sidestepd.gather import Gatherer
from sidestepd.match import Waits
from sidestepd.packed import blobs_in
from sidestepd.resolve import Heard, Left
from sidestepd.rows import Blob, Part, Position

RANK0, RANK1, LANE = b"0" * 16, b"1" * 16, b"L" * 16


def image(number: int) -> dict[str, Any]:
    return {"_sidestep": "image", "facts": {"file": {"_blob": {"of": LANE, "id": number, "size": 3}}}}


def part(step: int, session: bytes = RANK0, used: bool = False, **values: Any) -> Part:
    return Part(
        position=Position(step, step), session=session, rank=0, axis="global_step", step=step, time=float(step),
        values=values, used=used,
    )  # fmt: skip


def blob(number: int, failed: str = "") -> Blob:
    return Blob(session=LANE, number=number, size=3, crc=7, failed=failed)


def gatherer(capacity: int = 1000) -> Gatherer:
    return Gatherer(patience=5.0, capacity=capacity)


def parts(events: list[Any]) -> list[Part]:
    return [event for event in events if isinstance(event, Part)]


def show_all(it: Gatherer, why: str = "") -> None:
    for job in it.take_jobs():
        it.shown(job.key, why)


def lived_on(
    it: Gatherer, written: tuple[int, ...] = (), there: tuple[int, ...] = ()
) -> tuple[Gatherer, list[Any]]:
    """The next life, that has the state and the marks of this one."""
    new = gatherer()
    new.recall(it.marks(), [(LANE, number) for number in written])
    return new, new.restore(it.state(), [(LANE, number) for number in there])


class TestWaiting:
    def test_a_part_without_media_goes_straight_on(self):
        said = part(1, loss=1.0, nested={"a": 1}, several=[1, 2])

        assert [said] == gatherer().hear(said, 0.0)

    def test_a_part_waits_until_its_media_are_there_and_shown(self):
        it, said = gatherer(), part(1, loss=1.0, img=image(4))

        assert [Waits(session=RANK0, waiting=True)] == it.hear(said, 0.0)
        assert [] == it.ready(1.0)
        it.store(blob(4))
        assert [] == it.ready(1.0)
        show_all(it)

        assert [said, Waits(session=RANK0, waiting=False)] == it.ready(1.0)

    def test_media_whose_bytes_came_first_need_only_be_shown(self):
        it = gatherer()
        it.store(blob(4))
        it.hear(part(1, img=image(4)), 0.0)

        show_all(it)

        assert [1] == [one.step for one in parts(it.ready(0.0))]

    def test_media_inside_of_lists_dicts_and_other_media_are_waited_for(self):
        it = gatherer()
        table = {"_sidestep": "table", "facts": {"rows": [[1, image(2)]]}}
        it.hear(part(1, a=[image(0), image(1)], b={"c": table}), 0.0)

        for number in range(3):
            assert not it.showing or number == 2
            it.store(blob(number))
        show_all(it)

        assert [1] == [one.step for one in parts(it.ready(0.0))]

    def test_what_the_session_says_behind_it_keeps_its_place_and_others_pass(self):
        it = gatherer()
        it.hear(part(1, img=image(0)), 0.0)

        assert [] == it.hear(part(2, loss=1.0), 0.0)
        assert [] == it.hear(Heard(session=RANK0, more=False), 0.0)
        assert [] == it.hear(Left(RANK0), 0.0)
        assert [part(2, RANK1)] == it.hear(part(2, RANK1), 0.0)
        it.store(blob(0))
        show_all(it)

        kinds = [type(event).__name__ for event in it.ready(0.0)]
        assert ["Part", "Part", "Heard", "Waits", "Left"] == kinds

    def test_when_there_is_too_much_of_it_the_oldest_goes_on(self):
        it = gatherer(capacity=2)
        for step in range(4):
            it.hear(part(step, img=image(step)), 0.0)

        assert [0, 1] == [one.step for one in parts(it.ready(0.0))]
        assert 4 == it.waiting


class TestNeed:
    """Bytes that no row needs are deleted when their process has ended; what is on its way into one is needed."""

    def test_lasts_from_when_a_part_is_heard_until_its_row_is_decided(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        assert [(LANE, 4)] == list(it.needed)
        it.store(blob(4))
        show_all(it)

        left = parts(it.ready(0.0))

        assert [(LANE, 4)] == list(it.needed)
        it.decide(blobs_in(left[0].values["img"]))
        assert [] == list(it.needed)

    def test_of_a_value_that_is_left_out_there_is_none(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.store(blob(4))
        show_all(it, "bad")

        it.ready(0.0)

        assert [] == list(it.needed)


class TestPatience:
    def test_the_row_goes_without_and_the_media_follow_at_the_same_step(self):
        it = gatherer()
        it.hear(part(1, loss=1.0, img=image(4)), 0.0)

        went = parts(it.ready(5.0))
        it.store(blob(4))
        show_all(it)
        late = parts(it.ready(60.0))

        assert [{"loss": 1.0}] == [one.values for one in went]
        assert [{"img": image(4)}] == [one.values for one in late]
        assert [(1, True, False)] == [(one.step, one.settled, one.moves) for one in late]
        assert [] == it.ready(61.0)

    def test_of_several_media_those_that_are_there_go_with_the_row(self):
        it = gatherer()
        it.hear(part(1, a=image(0), b=image(1)), 0.0)
        it.store(blob(0))
        show_all(it)

        assert [{"a": image(0)}] == [one.values for one in parts(it.ready(5.0))]


class TestLeavingOut:
    @pytest.mark.parametrize("failed", ["torn", "not_sent"])
    def test_bytes_that_will_never_be_whole(self, failed: str):
        it = gatherer()
        it.hear(part(1, loss=1.0, img=image(4)), 0.0)

        it.store(blob(4, failed))

        assert [{"loss": 1.0}] == [one.values for one in parts(it.ready(0.0))]
        assert {failed: 1} == it.left_out

    def test_what_can_not_be_shown(self):
        it = gatherer()
        it.hear(part(1, loss=1.0, img=image(4)), 0.0)
        it.store(blob(4))

        show_all(it, "bad")

        assert [{"loss": 1.0}] == [one.values for one in parts(it.ready(0.0))]
        assert {"bad": 1} == it.left_out
        assert [(LANE, 4)] == it.take_done()

    def test_what_a_lane_that_ended_did_not_say(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)

        it.end(LANE)
        it.ready(0.0)

        assert {"lost": 1} == it.left_out

    def test_at_the_end_nothing_waits_any_more(self):
        it = gatherer()
        it.hear(part(1, a=image(0)), 0.0)
        it.ready(5.0)
        it.hear(part(2, loss=2.0, b=image(1)), 6.0)

        assert [{"loss": 2.0}] == [one.values for one in parts(it.flush())]
        assert {"lost": 2} == it.left_out
        assert 0 == it.waiting


class TestAfterACrash:
    """Each value is said again as long as no row has it, and never once one does."""

    def test_what_waited_too_long_is_still_awaited(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.ready(5.0)

        new, _ = lived_on(it)
        new.store(blob(4))
        show_all(new)

        assert [{"img": image(4)}] == [one.values for one in parts(new.ready(9.0))]

    def test_what_a_row_has_is_not(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.ready(5.0)

        new, _ = lived_on(it, written=(4,))
        new.store(blob(4))

        assert not new.showing
        assert [] == new.ready(9.0)

    def test_what_was_complete_and_has_no_file_any_more_had_its_fate(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.ready(5.0)
        it.store(blob(4))

        new, _ = lived_on(it, there=())
        again, _ = lived_on(it, there=(4,))

        assert not new.showing
        assert again.showing

    def test_what_was_held_is_said_on_as_used_and_its_media_are_awaited_unless_a_row_has_them(self):
        it = gatherer()
        it.hear(part(1, a=image(0), b=image(1)), 0.0)
        it.hear(Left(RANK0), 0.0)

        new, said = lived_on(it, written=(0,))
        new.store(blob(1))
        show_all(new)

        assert [(1, True), "Left"] == [
            (it.step, it.used) if isinstance(it, Part) else type(it).__name__ for it in said
        ]
        assert [{"b": image(1)}] == [one.values for one in parts(new.ready(0.0))]

    def test_a_part_that_is_read_again_and_is_in_a_row_without_its_media_has_them_follow(self):
        new = gatherer()
        new.recall({}, [])
        said = part(1, used=True, img=image(4))

        assert [said] == new.hear(said, 0.0)
        new.store(blob(4))
        show_all(new)

        assert [{"img": image(4)}] == [one.values for one in parts(new.ready(0.0))]

    def test_a_late_value_that_was_handed_on_is_kept_until_its_row_is_decided(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.ready(5.0)
        it.store(blob(4))
        show_all(it)
        late = parts(it.ready(6.0))

        before, _ = lived_on(it, there=(4,))
        it.decide(blobs_in(late[0].values["img"]))
        after, _ = lived_on(it, there=(4,))

        assert before.showing
        assert not after.showing

    def test_what_was_left_out_stays_left_out_and_is_counted_once(self):
        it = gatherer()
        it.hear(part(1, img=image(4)), 0.0)
        it.store(blob(4))
        show_all(it, "bad")
        it.ready(0.0)

        new, _ = lived_on(it, there=(4,))
        new.hear(part(1, used=True, img=image(4)), 0.0)
        new.store(blob(4))

        assert not new.showing
        assert {"bad": 1} == new.left_out
