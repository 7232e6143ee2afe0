"""The spill file: what is put is what comes back, and whatever else a file holds costs no more than itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sidestep import spill
from sidestep.outbox import DropReason
from sidestep.spill import LeftBehind, Spill, reopen, waiting
from sidestep.wire import Bye, Frame, Hello, Status, checksum

SESSION = bytes(range(16))
HELLO = Hello(session=SESSION, rank=3, run="abc", first=5, offered=9, dropped={"too_large": 1})
Make = Callable[..., Spill]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(**options: object) -> Spill:
        it = Spill(SESSION, **{"folders": lambda: [tmp_path], **options})  # type: ignore[arg-type]
        it.hello = lambda: HELLO
        return it

    return made


def frame(first: int, count: int = 2, session: bytes = SESSION) -> Frame:
    body = bytes([first % 256]) * (10 * count)
    return Frame(session=session, first=first, count=count, body=body, crc=checksum(body))


def put(it: Spill, *frames: Frame) -> list[int]:
    places = [it.put(one) for one in frames]
    assert None not in places
    return [place for place in places if place is not None]


def left_in(folder: Path) -> LeftBehind | None:
    (path,) = waiting(folder)
    left = reopen(path)
    if left is not None:
        left.close()
    return left


class TestPutting:
    def test_a_frame_comes_back_as_it_was(self, make: Make):
        it = make()
        first, second = put(it, frame(5), frame(7))

        assert (frame(7), frame(5)) == (it.get(second), it.get(first))

    def test_there_is_no_file_until_it_is_needed_nor_afterwards(self, make: Make, tmp_path: Path):
        it = make()
        before = list(tmp_path.iterdir())
        put(it, frame(5))
        during = waiting(tmp_path)
        it.clear()

        assert ([], 1, []) == (before, len(during), list(tmp_path.iterdir()))

    def test_it_can_be_used_again_after_it_was_cleared(self, make: Make):
        it = make()
        put(it, frame(5))
        it.clear()

        (place,) = put(it, frame(7))

        assert frame(7) == it.get(place)

    def test_it_takes_no_more_than_its_bound(self, make: Make, tmp_path: Path):
        it = make(limit=500)
        taken = 0
        while it.put(frame(5 + 2 * taken)) is not None:
            taken += 1

        assert taken > 1
        assert it.why is DropReason.SPILL_FULL
        assert waiting(tmp_path)[0].stat().st_size <= 500

    def test_the_file_is_ours_alone(self, make: Make, tmp_path: Path):
        put(make(), frame(5))

        (path,) = waiting(tmp_path)

        assert 0o600 == path.stat().st_mode & 0o777

    def test_a_folder_that_can_not_be_written_leads_to_the_next(self, make: Make, tmp_path: Path):
        it = make(folders=lambda: [tmp_path / "none", tmp_path])

        put(it, frame(5))

        assert it.path is not None
        assert tmp_path == it.path.parent

    def test_no_folder_at_all_is_said(self, make: Make, tmp_path: Path):
        said: list[str] = []
        it = make(folders=lambda: [tmp_path / "none"], say=said.append)

        assert it.put(frame(5)) is None
        assert it.why is DropReason.SPILL_FAILED
        assert "No such file or directory" in said[0]

    def test_some_of_the_disk_is_left_to_others(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        disk = os.statvfs(tmp_path)
        monkeypatch.setattr(spill, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize * 2)
        said: list[str] = []
        it = make(say=said.append)

        assert it.put(frame(5)) is None
        assert "MiB are free" in said[0]
        assert [] == list(tmp_path.iterdir())


class TestFolders:
    def test_the_runs_own_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        (tmp_path / "run").mkdir()

        found = spill.folders(str(tmp_path / "run"))

        assert [tmp_path / "run" / "spill", spill.private_folder()] == found
        assert {0o700} == {path.stat().st_mode & 0o777 for path in found}

    @pytest.mark.parametrize("how", ["open to others", "a link", "a file"])
    def test_one_that_is_not_ours_alone_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        mine = spill.private_folder().parent
        if how == "open to others":
            mine.mkdir()
            mine.chmod(0o755)
        elif how == "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            mine.symlink_to(tmp_path / "elsewhere")
        else:
            mine.touch()

        assert [] == spill.folders(None)


class TestReopening:
    def test_everything_that_was_said_is_there(self, make: Make, tmp_path: Path):
        it = make()
        put(it, frame(5), frame(7, 3))
        it.note(Status(session=SESSION, offered=12, dropped={"too_large": 2}))
        it.note(
            Bye(session=SESSION, first=10, offered=13, dropped={"too_large": 3}, values_refused=4, exit_code=1)
        )
        it.leave()

        left = left_in(tmp_path)

        assert left is not None
        assert HELLO == left.hello
        assert [(5, 2), (7, 3)] == [(one.first, one.count) for one in left.frames]
        assert (13, {"too_large": 3}, 4, 1) == (
            left.offered, left.dropped, left.values_refused, left.bye and left.bye.exit_code,
        )  # fmt: skip

    def test_what_it_hands_out_is_what_was_put(self, make: Make, tmp_path: Path):
        it = make()
        put(it, frame(5), frame(7))
        it.leave()
        (path,) = waiting(tmp_path)

        left = reopen(path)

        assert left is not None
        box = left.outbox()
        assert (5, 9, 4, 9) == (box.acknowledged, box.end, box.pending, box.offered - 1)
        box.credit = 1 << 20
        assert [frame(5).body, frame(7).body] == [one.body for one in iter(box.next_frame, None)]
        left.remove()
        assert [] == waiting(tmp_path)

    def test_a_living_sessions_file_is_not_taken(self, make: Make, tmp_path: Path):
        it = make()
        put(it, frame(5))
        (path,) = waiting(tmp_path)

        assert reopen(path) is None
        it.leave()
        assert spill.is_free(path)

    @pytest.mark.parametrize("what", ["nothing", "rubbish", "a folder", "a link", "two names", "no hello"])
    def test_what_is_no_spill_file_is_left_alone(self, make: Make, tmp_path: Path, what: str):
        path = tmp_path / f"x{spill.SUFFIX}"
        target = tmp_path / "target"
        target.write_bytes(b"x" * 1000)
        {
            "nothing": lambda: None,
            "rubbish": lambda: path.write_bytes(os.urandom(5000)),
            "a folder": path.mkdir,
            "a link": lambda: path.symlink_to(target),
            "two names": lambda: path.hardlink_to(target),
            "no hello": lambda: path.write_bytes(spill._entry(frame(5))),
        }[what]()

        assert reopen(path) is None
        assert b"x" * 1000 == target.read_bytes()

    def test_torn_at_any_byte_all_before_counts(self, make: Make, tmp_path: Path):
        it = make()
        places = put(it, frame(5), frame(7), frame(9))
        size = it._end
        it.leave()
        (path,) = waiting(tmp_path)
        whole = path.read_bytes()
        ends = [*places[1:], size]

        for length in range(places[0], size + 1):
            path.write_bytes(whole[:length])
            left = left_in(tmp_path)
            assert left is not None
            assert sum(end <= length for end in ends) == len(left.frames), length

    def test_a_flipped_bit_costs_at_most_what_is_behind_it(self, make: Make, tmp_path: Path):
        """In a body one frame; in a head, by which the next one is found, the rest. Never anything else."""
        it = make()
        put(it, *(frame(5 + 2 * index) for index in range(5)))
        it.leave()
        (path,) = waiting(tmp_path)
        whole, dice = path.read_bytes(), random.Random(1)

        for _ in range(300):
            at = dice.randrange(len(whole) * 8)
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << at % 8
            path.write_bytes(flipped)
            left = reopen(path)
            if left is None:
                continue
            box = left.outbox()
            box.credit = 1 << 20
            while (one := box.next_frame()) is not None:
                assert frame(one.first).body == one.body
                box.ack(one.end)
            left.close()

    def test_frames_of_others_and_with_holes_are_passed_over(self, make: Make, tmp_path: Path):
        it = make()
        put(it, frame(5), frame(7, session=bytes(16)[:-1] + b"x"), frame(20), frame(7))
        it.leave()

        left = left_in(tmp_path)

        assert left is not None
        assert [5, 7] == [one.first for one in left.frames]

    def test_no_announced_length_is_believed(self, make: Make, tmp_path: Path):
        it = make()
        put(it, frame(5))
        it.leave()
        (path,) = waiting(tmp_path)
        header = spill._entry(frame(7))[8:48]
        length = (2**32 - 1).to_bytes(4, "big")
        path.write_bytes(
            path.read_bytes() + length + spill.zlib.crc32(length + header).to_bytes(4, "big") + header
        )

        left = left_in(tmp_path)

        assert left is not None
        assert [5] == [one.first for one in left.frames]
