"""A damaged spool: the damage is seen, opening succeeds, and what is whole is kept."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sidestepd.errors import SpoolDamaged, SpoolError
from sidestepd.spool import (
    Entry,
    EntryKind,
    Spool,
    damage_mark,
)
from tests.support.spools import (
    EVERYTHING,
    everything_in,
    filled,
    frame,
    offset_of,
    overwrite,
    small_files,
    spoil,
    stored,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


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


class TestWriterOnADamagedFile:
    def test_marks_it_and_says_so(self, path: Path):
        """Without the mark a file that can be walked but not written would be opened and fail for ever."""
        spool = Spool(filled(path, frames=500, size=9000))
        path.write_bytes(path.read_bytes()[:4096] + b"\x55" * (path.stat().st_size - 4096))

        with pytest.raises(SpoolDamaged):
            spool.delete_through(EVERYTHING)

        assert damage_mark(path).exists()


class TestWithoutAFile:
    """There is nothing to be saved, and a start succeeds."""

    def test_a_mark_without_its_file_is_no_reason_to_fail(self, path: Path):
        damage_mark(path).touch()

        assert Spool(path).commit([frame(0)]) > 0

    def test_a_directory_in_its_place_is_put_aside(self, path: Path):
        path.mkdir()
        (path / "something").touch()

        assert Spool(path).commit([frame(0)]) > 0
        assert [True] == [(found / "something").exists() for found in path.parent.glob("quarantine/*/spool.db")]
