"""The spool: what was committed is there, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from sidestep.wire import Frame, checksum
from sidestepd.errors import SpoolDamaged, SpoolError, SpoolFull
from sidestepd.spool import (
    SALVAGE_STRIDE,
    Entry,
    EntryKind,
    Spool,
    SpoolReader,
    StoredSession,
    damage_mark,
)

ALICE, BOB = b"a" * 16, b"b" * 16
EVERYTHING = 1_000_000


def frame(first: int, *, session: bytes = ALICE, count: int = 10, size: int = 300, received: float = 0.0) -> Entry:
    """A frame whose body can be told from every other frame's."""
    body = b"%s %d " % (session[:1], first) * (size // 4)
    said = Frame(session=session, first=first, count=count, body=body, crc=checksum(body))
    return Entry.of_frame(said, received=received)


def hello(session: bytes = ALICE, **facts: object) -> Entry:
    return Entry.of_event(EntryKind.HELLO, session, received=0.0, **{"rank": 3, "launch": "L", **facts})


def stored(next_: int, *, session: bytes = ALICE) -> StoredSession:
    return StoredSession(id=session, next=next_, hello={"rank": 3, "launch": "L"}, counters={"offered": next_})


def filled(path: Path, frames: int = 200, **shape: int) -> Path:
    """A spool with a HELLO, frames, and where the session stands, closed."""
    spool = Spool(path)
    spool.commit([hello(), *(frame(first, **shape) for first in range(0, 10 * frames, 10))], [stored(10 * frames)])
    spool.close()
    return path


def spoil(path: Path, change: str) -> Path:
    """Change rows behind the spool's back."""
    with sqlite3.connect(path) as db:
        assert db.execute(change).rowcount
    db.close()
    return path


def everything_in(path: Path) -> list[Entry]:
    reader = SpoolReader(path)
    try:
        return reader.read(0, EVERYTHING)
    finally:
        reader.close()


def without_id(entries: list[Entry]) -> list[Entry]:
    return [replace(entry, id=0) for entry in entries]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def offset_of(path: Path, needle: bytes) -> int:
    return path.read_bytes().index(needle)


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


KILLED_WRITER = """
import sys
from pathlib import Path
from tests.unit.test_spool import frame, stored
from sidestepd.spool import Spool
spool = Spool(Path(sys.argv[1]))
next_ = next((session.next for session in spool.sessions()), 0)
print("next", next_, flush=True)
while True:
    spool.commit([frame(next_), frame(next_ + 10)], [stored(next_ + 20)])
    next_ += 20
    print("acked", next_, flush=True)
"""


class TestKillNine:
    def test_no_acknowledged_frame_is_missing_and_sessions_fit_their_frames(self, path: Path):
        """Killed at a random moment, again and again, on one file."""
        luck = random.Random(5)
        for _ in range(8):
            acked = self._write_until_killed(path, commits=luck.randrange(1, 40))

            entries = everything_in(path)
            next_ = self._next_of(path)
            assert all(entry.whole for entry in entries)
            assert list(range(0, next_, 10)) == [entry.first for entry in entries]
            assert next_ >= acked

    def _write_until_killed(self, path: Path, *, commits: int) -> int:
        """Kill the writer after it acknowledged so many commits; returns what it acknowledged last."""
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE, text=True
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


class TestFlippedBits:
    def test_in_a_frames_body_leave_a_frame_that_is_not_whole(self, path: Path):
        filled(path)
        overwrite(path, offset_of(path, b"a 500 a 500") + 2, b"6")

        broken = [entry for entry in everything_in(path) if not entry.whole]

        assert [500] == [entry.first for entry in broken]

    @pytest.mark.parametrize("bit", range(8))
    def test_anywhere_in_a_page_are_seen(self, path: Path, bit: int):
        """Whatever is read and called whole is what was written: SQLite itself would hand out anything."""
        written = {entry.first: entry for entry in everything_in(filled(path, frames=60))}
        page = path.read_bytes()
        at = offset_of(path, b"a 300 a 300")
        seen = 0
        for offset in range(at - 60, at + 20):
            flipped = bytearray(page)
            flipped[offset] ^= 1 << bit
            path.write_bytes(flipped)

            found = self._read(path)

            seen += found is None or len(found) < len(written)
            assert all(written[entry.first] == entry for entry in found or () if entry.kind is EntryKind.FRAME)
        assert seen > 40

    def _read(self, path: Path) -> list[Entry] | None:
        try:
            return [entry for entry in everything_in(path) if entry.whole]
        except SpoolDamaged:
            return None

    def test_in_what_a_frame_says_of_itself_are_damage_of_the_file(self, path: Path):
        """Its session or sequence can not be trusted, so the frame can not even be counted."""
        filled(path)
        overwrite(path, offset_of(path, b"a 500 a 500") - 20, b"\x55\x55")

        with pytest.raises(SpoolDamaged):
            everything_in(path)

        assert damage_mark(path).exists()

    def test_in_an_event_are_damage_of_the_file(self, path: Path):
        spoil(filled(path), "UPDATE entry SET body = x'82c1' WHERE kind = 2")

        with pytest.raises(SpoolDamaged):
            everything_in(path)

    def test_in_a_session_do_not_keep_the_spool_from_opening(self, path: Path):
        spoil(filled(path, frames=3), "UPDATE session SET hello = x'82c1'")

        spool = Spool(path)

        assert spool.salvaged == 4
        assert [30] == [session.next for session in spool.sessions()]


class TestSalvage:
    """Opening a damaged spool."""

    def test_a_healthy_spool_is_left_alone(self, path: Path):
        spool = Spool(filled(path))

        assert spool.salvaged == 0
        assert not (path.parent / "quarantine").exists()

    @pytest.mark.parametrize(
        "content", [b"", b"\0" * 5000, b"no database at all, really" * 100, b"SQLite format 3\0"]
    )
    def test_a_file_that_is_no_database_gives_an_empty_spool(self, path: Path, content: bytes):
        path.write_bytes(content)

        spool = Spool(path)
        spool.commit([frame(0)], [stored(10)])

        assert [0] == [entry.first for entry in everything_in(path)]

    def test_the_damaged_file_is_kept_in_quarantine(self, path: Path):
        path.write_bytes(b"no database" * 100)

        Spool(path)

        assert [b"no database" * 100] == [p.read_bytes() for p in path.parent.glob("quarantine/*/spool.db")]

    def test_keeps_everything_that_a_healthy_file_with_a_mark_holds(self, path: Path):
        """The mark of a reader that found damage leads to a salvage at the next start."""
        before = everything_in(filled(path))
        damage_mark(path).touch()

        spool = Spool(path)

        assert spool.salvaged == len(before)
        assert before == everything_in(path)
        assert [2000] == [session.next for session in spool.sessions()]
        assert not damage_mark(path).exists()

    def test_keeps_what_lies_before_between_and_behind_damaged_pages(self, path: Path):
        """Two damaged leaves cost what is on them, and not what lies between."""
        before = everything_in(filled(path, frames=500))
        for first in (1000, 4000):
            at = offset_of(path, b"a %d a %d" % (first, first))
            overwrite(path, at // 4096 * 4096, b"\x55" * 64)
        with pytest.raises(SpoolDamaged):
            everything_in(path)

        Spool(path)

        kept = everything_in(path)
        assert len(before) > len(kept) >= len(before) - 30
        assert {entry.id for entry in kept} < {entry.id for entry in before}
        assert {1000, 4000}.isdisjoint({entry.first for entry in kept})
        assert 2500 in {entry.first for entry in kept}

    def test_keeps_a_frame_with_a_broken_body_for_its_reader_to_count(self, path: Path):
        filled(path)
        overwrite(path, offset_of(path, b"a 500 a 500") + 2, b"6")
        damage_mark(path).touch()

        Spool(path)

        assert [500] == [entry.first for entry in everything_in(path) if not entry.whole]

    def test_wants_of_a_lost_session_what_comes_after_its_frames(self, path: Path):
        """Else what is sent again would be stored twice."""
        spoil(filled(path), "UPDATE session SET next = 77")

        spool = Spool(path)

        assert [2000] == [session.next for session in spool.sessions()]
        assert [3] == [session.hello["rank"] for session in spool.sessions()]

    def test_says_hello_for_a_session_whose_own_was_lost(self, path: Path):
        """Else its frames would be read as those of a rank 0."""
        spoil(filled(path), "UPDATE entry SET body = x'82c1' WHERE kind = 2")
        with pytest.raises(SpoolDamaged):
            everything_in(path)

        Spool(path)

        entries = everything_in(path)
        assert EntryKind.HELLO is entries[0].kind
        assert entries[0].facts["rank"] == 3
        assert list(range(0, 2000, 10)) == [entry.first for entry in entries[1:]]

    @pytest.mark.parametrize("keep", [1, 100, 4096, 4097, 20_000, 60_000])
    def test_of_a_truncated_file_opens(self, path: Path, keep: int):
        before = everything_in(filled(path, frames=300))
        path.write_bytes(path.read_bytes()[:keep])

        spool = Spool(path, above=before[-1].id)

        assert spool.commit([frame(9000)]) > before[-1].id
        assert set(everything_in(path)[:-1]) <= set(before)

    @pytest.mark.parametrize("seed", range(25))
    def test_of_a_file_damaged_at_random_opens_and_invents_nothing(self, path: Path, seed: int):
        luck = random.Random(seed)
        before = everything_in(filled(path, frames=luck.choice([5, 100]), size=luck.choice([100, 9000])))
        self._damage(path, luck)

        last = self._commit_in_some_life(path, above=before[-1].id)

        frames = [entry for entry in self._settled_entries(path) if entry.kind is EntryKind.FRAME]
        assert {entry for entry in frames if entry.whole} <= {*before, replace(frame(90_000), id=last)}
        assert last > before[-1].id

    def _damage(self, path: Path, luck: random.Random) -> None:
        size = path.stat().st_size
        match luck.randrange(4):
            case 0:
                for _ in range(luck.randrange(1, 50)):
                    overwrite(path, luck.randrange(size), luck.randbytes(1))
            case 1:
                for _ in range(luck.randrange(1, 4)):
                    overwrite(path, luck.randrange(size // 4096) * 4096, luck.randbytes(4096))
            case 2:
                overwrite(path, luck.randrange(size // 4096) * 4096, bytes(4096))
            case _:
                overwrite(path, luck.randrange(120), luck.randbytes(luck.randrange(1, 8)))

    def _commit_in_some_life(self, path: Path, *, above: int) -> int:
        """Opening never fails; damage that it did not see may end a life, and the next start heals it."""
        for _ in range(3):
            spool = Spool(path, above=above)
            try:
                return spool.commit([frame(90_000)], [stored(90_010)])
            except SpoolDamaged:
                continue
            finally:
                spool._db.close()
        raise AssertionError("opened three times and still damaged")

    def _settled_entries(self, path: Path) -> list[Entry]:
        """What a reader gets in the end: it may find damage that opening did not, which the next start heals."""
        for _ in range(5):
            try:
                return everything_in(path)
            except SpoolDamaged:
                Spool(path).close()
        raise AssertionError("salvaged five times and still damaged")

    def test_of_a_file_whose_log_is_damaged_opens(self, path: Path):
        spool = Spool(path)
        for first in range(0, 500, 10):
            spool.commit([frame(first)], [stored(first + 10)])
        crashed = path.parent / "crashed"
        crashed.mkdir()
        for part in path.parent.glob("spool.db*"):
            shutil.copy(part, crashed)
        wal = crashed / "spool.db-wal"
        overwrite(wal, wal.stat().st_size // 2, b"\x55" * 5000)

        spool = Spool(crashed / "spool.db")

        kept = [entry.first for entry in everything_in(crashed / "spool.db")]
        assert list(range(0, len(kept) * 10, 10)) == kept
        assert 0 < len(kept) < 50
        assert [10 * len(kept)] == [session.next for session in spool.sessions()]

    @pytest.mark.parametrize("place", ["spool.salvage", "spool.salvaged", "spool.quarantine"])
    def test_killed_at_any_place_is_done_again(self, path: Path, place: str):
        before = everything_in(filled(path))
        damage_mark(path).touch()
        open_it = f"from sidestepd.spool import Spool; from pathlib import Path; Spool(Path({str(path)!r}))"
        died = subprocess.run(
            [sys.executable, "-c", open_it], env=os.environ | {"SIDESTEP_CRASH_AT": place}, check=False
        )
        assert died.returncode == -signal.SIGKILL

        spool = Spool(path)

        assert before == everything_in(path)
        assert [2000] == [session.next for session in spool.sessions()]

    def test_is_not_done_for_a_disk_that_is_full(self, path: Path):
        """The file is whole: what is needed is room."""
        before = everything_in(filled(path))
        with small_files(1000), pytest.raises((SpoolError, sqlite3.Error)):
            Spool(path)

        assert not (path.parent / "quarantine").exists()
        assert before == everything_in(path)


class small_files:  # noqa: N801 - used like a function
    """Within this, no file of this process grows beyond so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


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
            lambda reader: reader.clock_offset(),
            lambda reader: reader.records_after(0),
        ],
    )
    def test_marks_a_damaged_file_whatever_it_was_asked(self, path: Path, ask: Callable[[SpoolReader], object]):
        filled(path)
        path.write_bytes(path.read_bytes()[:4096] + b"\x55" * (path.stat().st_size - 4096))

        with pytest.raises(SpoolDamaged):
            ask(SpoolReader(path))

        assert damage_mark(path).exists()


class TestWriterOnADamagedFile:
    def test_marks_it_and_says_so(self, path: Path):
        """Without the mark a file that can be walked but not written would be opened and fail for ever."""
        spool = Spool(filled(path, frames=500, size=9000))
        path.write_bytes(path.read_bytes()[:4096] + b"\x55" * (path.stat().st_size - 4096))

        with pytest.raises(SpoolDamaged):
            spool.delete_through(EVERYTHING)

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
