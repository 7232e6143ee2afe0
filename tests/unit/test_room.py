"""How much may still be taken, and the ballast."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestepd.errors import SpoolFull
from sidestepd.room import CLOSED_MARK, LEAST_CREDIT, Ballast, Patience, Room, open_spool
from sidestepd.spool import Spool
from tests.support.disks import fill, small_disk
from tests.support.spools import EVERYTHING, everything_in, frame, stored

MEGABYTE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


def room_for(spool: Spool, *, quota: int = 4 * MEGABYTE, reserve: int = 0) -> Room:
    return Room(
        spool, Ballast(spool.path.with_name("ballast"), 0), [spool.path.parent], quota=quota, reserve=reserve
    )


def filled_to(share: float, path: Path, quota: int = 4 * MEGABYTE) -> Spool:
    spool = Spool(path, quota=quota)
    for first in range(0, EVERYTHING, 10):
        if spool.used_bytes() >= share * quota:
            return spool
        spool.commit([frame(first, size=20_000)], [stored(first + 10)])
    raise AssertionError("there is no end to it")


class TestRoom:
    def test_with_plenty_left_gives_all_the_credit(self, path: Path):
        room = room_for(Spool(path))

        room.look()

        assert 1000 * 1000 == room.credit(1000 * 1000)
        assert not room.closed

    def test_that_nears_its_end_gives_less(self, path: Path):
        room = room_for(filled_to(0.8, path))

        room.look()

        assert LEAST_CREDIT < room.credit(4 * MEGABYTE) < 3 * MEGABYTE
        assert not room.closed

    def test_at_its_end_takes_nothing_and_leaves_a_mark_for_status(self, path: Path):
        room = room_for(filled_to(0.92, path))

        room.look()

        assert room.closed
        assert LEAST_CREDIT == room.credit(4 * MEGABYTE)
        assert path.with_name(CLOSED_MARK).exists()

    def test_opens_when_enough_was_deleted_and_not_before(self, path: Path):
        spool = filled_to(0.92, path)
        room = room_for(spool)
        room.look()
        ids = [entry.id for entry in everything_in(path)]

        spool.delete_through(ids[len(ids) // 20])
        room.look()
        still_closed = room.closed
        spool.delete_through(ids[len(ids) // 3])
        room.look()

        assert still_closed
        assert not room.closed
        assert not path.with_name(CLOSED_MARK).exists()

    def test_counts_what_has_yet_to_be_written_to_the_same_disk(self, path: Path):
        spool = filled_to(0.5, path)
        room = room_for(spool, quota=1000 * MEGABYTE, reserve=10**15)

        room.look()

        assert room.share > 1

    def test_gives_back_to_the_disk_what_was_deleted(self, path: Path):
        spool = filled_to(0.92, path)
        spool.delete_through(EVERYTHING)
        spool.shrink()

        assert path.stat().st_size < MEGABYTE


class TestQuota:
    def test_is_never_passed_and_nothing_is_half_written(self, path: Path):
        spool = Spool(path, quota=MEGABYTE)
        said = iter(range(0, EVERYTHING, 10))

        def speak_for_ever() -> None:
            for first in said:
                spool.commit([frame(first, size=20_000)], [stored(first + 10)])

        with pytest.raises(SpoolFull):
            speak_for_ever()

        refused = next(said) - 10
        assert spool.used_bytes() <= MEGABYTE
        assert list(range(0, refused, 10)) == [entry.first for entry in everything_in(path)]
        assert [refused] == [session.next for session in spool.sessions()]


class TestBallast:
    def test_holds_as_much_as_it_says(self, tmp_path: Path):
        ballast = Ballast(tmp_path / "ballast", MEGABYTE)

        ballast.take()

        assert MEGABYTE == ballast.path.stat().st_blocks * 512

    def test_is_given_up_once(self, tmp_path: Path):
        ballast = Ballast(tmp_path / "ballast", MEGABYTE)
        ballast.take()

        assert [True, False] == [ballast.give_up(), ballast.give_up()]

    def test_is_not_taken_where_room_is_short(self, tmp_path: Path):
        with small_disk(tmp_path / "disk", 3) as disk:
            ballast = Ballast(disk / "ballast", MEGABYTE)

            ballast.take()

            assert not ballast.held

    def test_lets_a_full_disk_delete(self, tmp_path: Path):
        """Without it SQLite can not even delete."""
        with small_disk(tmp_path / "disk", 16) as disk:
            path = disk / "spool.db"
            ballast = Ballast(disk / "ballast", 2 * MEGABYTE)
            ballast.take()
            spool = filled_to(0.5, path)
            spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            others = fill(disk)
            with pytest.raises(SpoolFull):
                spool.delete_through(EVERYTHING)

            ballast.give_up()

            assert spool.delete_through(EVERYTHING) > 10
            spool.close()
            others.unlink()

    def test_opens_a_spool_on_a_full_disk(self, tmp_path: Path):
        with small_disk(tmp_path / "disk", 16) as disk:
            path, ballast = disk / "spool.db", Ballast(disk / "ballast", 2 * MEGABYTE)
            ballast.take()
            fill(disk)

            spool = open_spool(lambda: Spool(path), ballast)

            assert not ballast.held
            spool.close()


class TestPatience:
    def test_gives_the_ballast_before_it_waits_and_shows_that_it_lives(self, tmp_path: Path):
        with small_disk(tmp_path / "disk", 16) as disk:
            ballast = Ballast(disk / "ballast", 2 * MEGABYTE)
            ballast.take()
            others, happened = fill(disk), []

            def sleep(_: float) -> None:
                happened.append("slept")
                if len(happened) > 6:
                    others.unlink()

            patience = Patience(ballast, [disk], beat=lambda: happened.append("beat"), sleep=sleep)
            patience.wait_for_room()
            gave, first = not ballast.held, list(happened)
            fill(disk)
            (disk / "somebody-elses").rename(others)
            patience.wait_for_room()

        assert gave
        assert [] == first
        assert ["beat", "slept"] == happened[:2]
        assert len(happened) > 6
