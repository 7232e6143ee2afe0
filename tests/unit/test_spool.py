"""The spool: what was committed is there, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from sidestepd.errors import SpoolDamaged, SpoolError, SpoolFull
from sidestepd.spool import (
    SALVAGE_STRIDE,
    Entry,
    EntryKind,
    Spool,
    SpoolReader,
    damage_mark,
)
from tests.support.spools import (
    ALICE,
    BOB,
    EVERYTHING,
    everything_in,
    filled,
    frame,
    hello,
    offset_of,
    overwrite,
    small_files,
    spoil,
    stored,
    together,
    without_id,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


class TestCommit:
    def test_what_was_committed_is_read_back_in_its_order(self, path: Path):
        said = [hello(), frame(0), frame(0, session=BOB), frame(10)]
        spool = Spool(path)

        spool.commit(said, [stored(20), stored(10, session=BOB)])

        assert said == without_id(everything_in(path))
        assert [stored(20), stored(10, session=BOB)] == spool.sessions()

    def test_events_keep_what_they_say(self, path: Path):
        facts = {"rank": 3, "launch": "L", "settings": {"project": "p", "tags": ["a"]}}
        Spool(path).commit([hello(**facts)])

        entry = everything_in(path)[0]

        assert facts == entry.facts

    def test_a_spool_opened_again_goes_on(self, path: Path):
        first = Spool(path)
        first.commit([frame(0)], [stored(10)])
        first.close()

        again = Spool(path)
        again.commit([frame(10)], [stored(20)])

        assert [0, 10] == [entry.first for entry in everything_in(path)]
        assert [20] == [session.next for session in again.sessions()]

    def test_returns_the_last_id(self, path: Path):
        last = Spool(path).commit([frame(0), frame(10)])

        assert everything_in(path)[-1].id == last

    def test_its_latest_time_counts_frames_and_sessions(self, path: Path):
        spool = Spool(path)

        spool.commit([frame(0, received=5.0)], [replace(stored(10), heard=7.0)])

        assert spool.latest() == 7.0

    def test_a_path_that_can_not_be_opened_is_said_to_be_so(self, tmp_path: Path):
        with pytest.raises(SpoolError, match="no/such"):
            Spool(tmp_path / "no" / "such" / "spool.db")


class TestFramesThatCameTogether:
    """One entry, which is read as if each had come by itself."""

    SAID = (frame(0), frame(0, session=BOB, count=3), frame(10), frame(3, session=BOB))

    def test_are_read_one_by_one_with_ids_of_their_own(self, path: Path, tmp_path: Path):
        Spool(path).commit([hello(), together(*self.SAID), frame(20)])
        Spool(tmp_path / "alone.db").commit([hello(), *self.SAID, frame(20)])

        assert everything_in(tmp_path / "alone.db") == everything_in(path)

    @pytest.mark.parametrize("limit", [1, 2, 3, 10])
    def test_are_read_in_pieces(self, path: Path, limit: int):
        Spool(path).commit([hello(), together(*self.SAID), together(frame(20)), frame(30)])
        reader, found = SpoolReader(path), []
        while piece := reader.read(found[-1].id if found else 0, limit):
            assert len(piece) <= limit
            found += piece

        assert everything_in(path) == found
        assert [0, 0, 10, 3, 20, 30] == [entry.first for entry in found[1:]]

    def test_are_counted_from_any_of_them_on(self, path: Path):
        Spool(path).commit([hello(), together(*self.SAID), frame(20)])
        reader, ids = SpoolReader(path), [entry.id for entry in everything_in(path)]

        counts = [reader.records_after(id_) for id_ in ids]

        assert [43, 33, 30, 20, 10, 0] == counts
        assert {ALICE: 0, BOB: 0} == reader.firsts()
        assert reader.front() == ids[0]

    def test_are_deleted_when_the_last_of_them_is(self, path: Path):
        spool = Spool(path)
        spool.commit([together(*self.SAID), frame(20)])
        ids = [entry.id for entry in everything_in(path)]

        spool.delete_through(ids[2])
        kept = everything_in(path)
        spool.delete_through(ids[3])

        assert ids == [entry.id for entry in kept]
        assert SpoolReader(path).front() == ids[4]
        assert [frame(20)] == without_id(everything_in(path))

    def test_that_were_flipped_on_the_disk_are_known_each_by_itself(self, path: Path):
        spool = Spool(path)
        spool.commit([together(*(frame(first) for first in range(0, 50, 10)))])
        spool.close()
        overwrite(path, offset_of(path, b"a 20 a 20") + 2, b"3")

        assert [20] == [entry.first for entry in everything_in(path) if not entry.whole]

    def test_of_which_it_can_not_be_told_whose_they_are_are_damage_of_the_file(self, path: Path):
        spool = Spool(path)
        spool.commit([hello(), together(*self.SAID), frame(20)], [stored(30)])
        spool.close()
        overwrite(path, offset_of(path, BOB), b"c")

        with pytest.raises(SpoolDamaged):
            everything_in(path)

        again = Spool(path)
        assert [hello(), frame(20)] == without_id(everything_in(path))
        assert [30] == [session.next for session in again.sessions()]

    def test_are_kept_by_a_salvage(self, path: Path):
        spool = Spool(path)
        spool.commit([hello(), together(*self.SAID), frame(20)], [stored(0), stored(0, session=BOB)])
        before = everything_in(path)
        spool.close()
        damage_mark(path).touch()

        again = Spool(path)

        assert before == everything_in(path)[: len(before)]
        assert [30, 13] == [session.next for session in again.sessions()]


class TestWhereSessionsStand:
    """Frames say it; the rows of sessions follow."""

    def standing(self, path: Path) -> list[list[int]]:
        """As the reader sees it, and who opens it next."""
        reader = SpoolReader(path)
        seen = [session.next for session in reader.sessions()]
        reader.close()
        again = Spool(path)
        found = [session.next for session in again.sessions()]
        again.close()
        return [seen, found]

    def greeted(self, path: Path) -> Spool:
        spool = Spool(path)
        spool.commit([hello(), hello(BOB)], [stored(0), stored(0, session=BOB)])
        return spool

    def test_is_known_by_frames_alone(self, path: Path):
        spool = self.greeted(path)

        spool.commit([frame(0), together(frame(10), frame(0, session=BOB))])

        assert [[20, 10], [20, 10]] == self.standing(path)

    @pytest.mark.parametrize("through", [0, 3, 4, 5])
    @pytest.mark.parametrize("note", [False, True])
    def test_is_known_when_frames_are_gone(self, path: Path, through: int, note: bool):
        spool = self.greeted(path)
        spool.commit([frame(0), together(frame(10), frame(0, session=BOB))])

        spool.delete_through(through, note=note)

        assert [[20, 10], [20, 10]] == self.standing(path)

    def test_goes_on_behind_what_was_noted(self, path: Path):
        spool = self.greeted(path)
        spool.commit([frame(0)])
        spool.delete_through(3)
        noted = spool.noted

        spool.commit([together(frame(10), frame(0, session=BOB))])
        spool.commit([hello()], [replace(stored(20), state="bye")])

        assert 3 == noted
        assert [[20, 10], [20, 10]] == self.standing(path)

    def test_is_what_its_row_says_in_a_spool_from_before_frames_did(self, path: Path):
        """There a row may be ahead of frames that were taken back, and never behind those that are there."""
        filled(path)
        spoil(path, "DELETE FROM meta WHERE key = 'noted'")

        assert [[2000], [2000]] == self.standing(path)

    def test_is_noted_where_there_is_no_room_for_more(self, path: Path):
        spool = Spool(path, quota=1 << 20)
        spool.commit([hello(), hello(BOB)], [stored(0), stored(0, session=BOB)])
        firsts = iter(range(0, EVERYTHING, 10))

        def speak_for_ever() -> None:
            for first in firsts:
                spool.commit([together(frame(first, size=20_000), frame(first, session=BOB))])

        with pytest.raises(SpoolFull):
            speak_for_ever()
        last = next(firsts) - 10

        spool.delete_through(SpoolReader(path).newest())

        assert [[last, last], [last, last]] == self.standing(path)
        assert [] == everything_in(path)


KILLED_WRITER = """
import sys
from pathlib import Path
from tests.support.spools import frame, stored, together
from sidestepd.spool import Spool
spool, in_envelopes = Spool(Path(sys.argv[1])), sys.argv[2] == "together"
next_ = next((session.next for session in spool.sessions()), 0)
if not next_:
    spool.commit([], [stored(0)])
print("next", next_, flush=True)
while True:
    said = [frame(next_), frame(next_ + 10)]
    if in_envelopes:
        spool.commit([together(*said)])
    else:
        spool.commit(said, [stored(next_ + 20)])
    next_ += 20
    if next_ % 100 == 0:
        spool.delete_through(0, note=True)
    print("acked", next_, flush=True)
"""


class TestKillNine:
    @pytest.mark.parametrize("how", ["alone", "together"])
    def test_no_acknowledged_frame_is_missing_and_sessions_fit_their_frames(self, path: Path, how: str):
        """Killed at a random moment, again and again, on one file."""
        luck = random.Random(5)
        for _ in range(5):
            acked = self._write_until_killed(path, how, commits=luck.randrange(1, 40))

            entries = everything_in(path)
            next_ = self._next_of(path)
            assert all(entry.whole for entry in entries)
            assert list(range(0, next_, 10)) == [entry.first for entry in entries]
            assert next_ >= acked

    def _write_until_killed(self, path: Path, how: str, *, commits: int) -> int:
        """Kill the writer after it acknowledged so many commits; returns what it acknowledged last."""
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(path), how], stdout=subprocess.PIPE, text=True
        )
        with writer:
            assert writer.stdout is not None
            for _ in range(commits + 1):
                assert writer.stdout.readline()
            writer.kill()
            said = writer.stdout.read().splitlines()
        assert writer.returncode == -signal.SIGKILL
        return max([int(line.split()[1]) for line in said if line.count(" ") == 1], default=0)

    def _next_of(self, path: Path) -> int:
        reader = SpoolReader(path)
        try:
            return reader.sessions()[0].next
        finally:
            reader.close()


class TestIds:
    def test_never_used_again_after_everything_was_deleted(self, path: Path):
        spool = Spool(path)
        last = spool.commit([frame(0), frame(10)])
        spool.delete_through(last)

        assert spool.commit([frame(20)]) == last + 1

    def test_never_used_again_after_everything_was_deleted_and_the_file_opened_anew(self, path: Path):
        spool = Spool(path)
        last = spool.commit([frame(0), frame(10)])
        spool.delete_through(last)
        spool.close()

        assert Spool(path).commit([frame(20)]) == last + 1

    def test_far_above_everything_after_a_salvage(self, path: Path):
        last = everything_in(filled(path))[-1].id
        damage_mark(path).touch()

        salvaged = Spool(path)

        assert salvaged.commit([frame(0)]) > last + SALVAGE_STRIDE

    def test_far_above_what_was_read_when_the_file_is_gone(self, path: Path):
        """Its reader would pass over everything up to where it had come."""
        spool = Spool(path, above=5000)

        assert spool.commit([frame(0)]) > 5000 + SALVAGE_STRIDE

    def test_far_above_what_was_read_when_the_file_was_emptied(self, path: Path):
        filled(path, frames=3)
        path.write_bytes(b"")

        spool = Spool(path, above=5000)

        assert spool.commit([frame(0)]) > 5000 + SALVAGE_STRIDE

    def test_a_commit_that_failed_uses_none(self, path: Path):
        spool = Spool(path)
        last = spool.commit([frame(0)])
        with pytest.raises(TypeError):
            spool.commit([frame(10), replace(frame(20), session=None)])  # type: ignore[arg-type]

        assert spool.commit([frame(10)]) == last + 1


class TestDelete:
    def test_goes_from_the_front_only(self, path: Path):
        spool = Spool(path)
        spool.commit([frame(first) for first in range(0, 50, 10)])

        gone = spool.delete_through(everything_in(path)[2].id)

        assert gone == 3
        assert [30, 40] == [entry.first for entry in everything_in(path)]

    def test_a_run_told_to_finish_stays_told(self, path: Path):
        """Intake may die between the last deletion and the end of delivery."""
        spool = Spool(path)
        last = spool.commit([frame(0), Entry.of_event(EntryKind.CLOSE, received=0.0, exit_code=3)])

        spool.delete_through(last)

        assert spool.has_close()


def limited_to(spool: Spool, pages: int) -> None:
    spool._db.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk looks like to SQLite


def fill_up(spool: Spool) -> int:
    """Commit until there is no more room; returns the next sequence."""
    for next_ in range(0, EVERYTHING, 20):
        try:
            spool.commit([frame(next_), frame(next_ + 10)], [stored(next_ + 20)])
        except SpoolFull:
            return next_
    raise AssertionError("there is no end to it")


class TestDiskFull:
    def test_is_said_and_nothing_is_half_written(self, path: Path):
        spool = Spool(path)
        limited_to(spool, 60)

        next_ = fill_up(spool)

        assert next_ > 0
        assert list(range(0, next_, 10)) == [entry.first for entry in everything_in(path)]
        assert [next_] == [session.next for session in spool.sessions()]

    def test_is_over_when_there_is_room_again(self, path: Path):
        spool = Spool(path)
        limited_to(spool, 60)
        next_ = fill_up(spool)

        spool.delete_through(everything_in(path)[-1].id)
        spool.commit([frame(next_)], [stored(next_ + 10)])

        assert [next_] == [entry.first for entry in everything_in(path)]

    def test_a_failed_write_leaves_what_was_committed(self, path: Path):
        spool = Spool(path)
        spool.commit([frame(0)], [stored(10)])
        room = (path.parent / "spool.db-wal").stat().st_size + 3000

        with small_files(room), pytest.raises((SpoolFull, sqlite3.OperationalError)):
            spool.commit([frame(10, size=100_000)], [stored(20)])

        assert [0] == [entry.first for entry in everything_in(path)]
        assert [10] == [session.next for session in Spool(path).sessions()]


class TestReader:
    def test_reads_in_pieces(self, path: Path):
        entries = everything_in(filled(path, frames=30))
        reader = SpoolReader(path)

        pieces = [reader.read(0, 10), reader.read(entries[9].id, 10), reader.read(entries[-1].id, 10)]

        assert [entries[:10], entries[10:20], []] == pieces

    def test_sees_what_was_committed_since(self, path: Path):
        spool = Spool(path)
        reader = SpoolReader(path)
        assert reader.read(0, 10) == []

        spool.commit([frame(0)], [stored(10)])

        assert [0] == [entry.first for entry in reader.read(0, 10)]
        assert [10] == [session.next for session in reader.sessions()]

    def test_counts_records_behind_an_entry(self, path: Path):
        entries = everything_in(filled(path, frames=30))

        assert SpoolReader(path).records_after(entries[20].id) == 100

    def test_finds_the_first_of_a_kind(self, path: Path):
        filled(path, frames=3)

        first = SpoolReader(path).first(EntryKind.CLOSE, EntryKind.HELLO)

        assert first is not None
        assert EntryKind.HELLO is first.kind
        assert SpoolReader(path).first(EntryKind.CLOSE) is None

    def test_reads_a_spool_that_was_closed(self, path: Path):
        """`sidestep status` of a run that ended."""
        filled(path, frames=3)
        for part in path.parent.glob("spool.db-*"):
            part.unlink()

        assert len(everything_in(path)) == 4

    def test_does_not_keep_the_log_from_being_folded_in(self, path: Path):
        """A reader in short transactions costs nothing; one open transaction would let the log grow for ever."""
        spool = Spool(path)
        reader = SpoolReader(path)
        wal = path.parent / "spool.db-wal"
        largest = 0
        for first in range(0, 6000, 10):
            spool.commit([frame(first, size=50_000)], [stored(first + 10)])
            last = reader.read(0, 5)
            if first % 100 == 0:
                spool.delete_through(last[-1].id)
            largest = max(largest, wal.stat().st_size)

        assert largest < 8 * 2**20

    @pytest.mark.parametrize(
        "ask",
        [
            lambda reader: reader.read(0, EVERYTHING),
            lambda reader: reader.first(EntryKind.CLOSE),
            lambda reader: reader.sessions(),
            lambda reader: reader.records_after(0),
        ],
    )
    def test_marks_a_damaged_file_whatever_it_was_asked(self, path: Path, ask: Callable[[SpoolReader], object]):
        filled(path)
        path.write_bytes(path.read_bytes()[:4096] + b"\x55" * (path.stat().st_size - 4096))

        with pytest.raises(SpoolDamaged):
            ask(SpoolReader(path))

        assert damage_mark(path).exists()


def test_ids_only_grow(path: Path):
    """Over commits, deletions, new starts and salvages in any order."""
    luck = random.Random(1)
    ids: list[int] = []

    def lives() -> Iterator[Spool]:
        for _ in range(20):
            if luck.random() < 0.3 and path.exists():
                damage_mark(path).touch()
            yield Spool(path, above=ids[-1] if ids else 0)

    for spool in lives():
        for _ in range(luck.randrange(5)):
            ids.append(spool.commit([frame(0)]))
            if luck.random() < 0.3:
                spool.delete_through(ids[-1])
        spool.close()

    assert all(before < after for before, after in pairwise(ids))
    assert len(ids) > 20
