"""The bytes of media on the daemon's disk, and what is made of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidestep.wire import Frame, Kind, Record, checksum, encode_record
from sidestepd.gather import Job, key_of
from sidestepd.intake.blobs import BlobStore, name_of
from sidestepd.media import Media
from sidestepd.rows import Row
from sidestepd.show import BlobFiles, Shower

LANE = b"L" * 16


def frame(*data: dict[str, Any], first: int = 0, kind: Kind = Kind.BLOB) -> Frame:
    body = b"".join(encode_record(Record(kind=kind, time=1.0, step=None, data=it)) for it in data)
    return Frame(session=LANE, first=first, count=len(data), body=body, crc=checksum(body))


def store(folder: Path, quota: int = 10**6) -> BlobStore:
    return BlobStore(folder / "blobs", quota=quota, reserve=0)


class TestStoring:
    def test_pieces_lie_one_behind_the_other_and_the_end_is_told(self, tmp_path: Path):
        told = store(tmp_path).write(
            [frame({"id": 3, "at": 0, "bytes": b"abc"}, {"id": 3, "at": 3, "bytes": b"de"}),
             frame({"id": 3, "size": 5, "crc": 9}, first=2)]
        )  # fmt: skip

        assert b"abcde" == (tmp_path / "blobs" / name_of(LANE, 3)).read_bytes()
        assert [{"ends": [], "lost": []}, {"ends": [[2, 3, 5, 9, ""]], "lost": []}] == told

    def test_a_piece_that_comes_again_changes_nothing(self, tmp_path: Path):
        it, pieces = (
            store(tmp_path),
            frame({"id": 3, "at": 0, "bytes": b"abc"}, {"id": 3, "at": 3, "bytes": b"de"}),
        )

        it.write([pieces])
        it.write([pieces])

        assert b"abcde" == (tmp_path / "blobs" / name_of(LANE, 3)).read_bytes()

    @pytest.mark.parametrize(
        "data",
        [
            {"id": 3, "at": 1, "bytes": b"a"},
            {"id": 3, "at": -1, "bytes": b"a"},
            {"id": 3, "at": 2**62, "bytes": b"a"},
            {"id": 3, "at": 0, "bytes": b""},
            {"id": 3, "at": 0, "bytes": "text"},
            {"id": -1, "at": 0, "bytes": b"a"},
            {"id": "../x", "at": 0, "bytes": b"a"},
            {"at": 0, "bytes": b"a"},
        ],
    )
    def test_what_is_no_piece_is_counted_and_makes_no_hole(self, tmp_path: Path, data: dict[str, Any]):
        told = store(tmp_path).write([frame(data)])

        assert [[0, "blob"]] == told[0]["lost"]
        assert 0 == sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir())

    def test_an_end_that_says_nothing_of_use_ends_it_as_malformed(self, tmp_path: Path):
        told = store(tmp_path).write([frame({"id": 3, "size": "much"})])

        assert [[0, 3, 0, 0, "malformed"]] == told[0]["ends"]

    def test_other_records_have_no_place_there(self, tmp_path: Path):
        assert [[0, "blob"]] == store(tmp_path).write([frame({"loss": 1}, kind=Kind.CONFIG)])[0]["lost"]

    def test_what_lies_in_the_place_of_a_file_is_not_followed(self, tmp_path: Path):
        it = store(tmp_path)
        (tmp_path / "blobs" / name_of(LANE, 3)).symlink_to(tmp_path / "precious")

        with pytest.raises(OSError, match="symbolic"):
            it.write([frame({"id": 3, "at": 0, "bytes": b"a"})])
        assert not (tmp_path / "precious").exists()


class TestRoom:
    def test_nothing_is_taken_beyond_the_quota_until_there_is_room_again(self, tmp_path: Path):
        it = store(tmp_path, quota=100)

        assert it.admit(60)
        assert not it.admit(60)
        assert not it.admit(1)
        it.look()
        assert it.admit(60)

    def test_what_lies_there_from_before_counts(self, tmp_path: Path):
        store(tmp_path).write([frame({"id": 3, "at": 0, "bytes": b"x" * 90})])

        assert not store(tmp_path, quota=100).admit(20)


def ref(number: int, size: int) -> dict[str, Any]:
    return {"_blob": {"of": LANE, "id": number, "size": size}}


def picture(number: int, content: bytes) -> dict[str, Any]:
    return {"_sidestep": "picture", "facts": {"file": ref(number, len(content))}}


def job(value: Any, content: bytes) -> Job:
    number = value["facts"]["file"]["_blob"]["id"]
    return Job(key=key_of(value), value=value, blobs={(LANE, number): (len(content), zlib.crc32(content))})


def put(folder: Path, number: int, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name_of(LANE, number)).write_bytes(content)


def read_it(value: Any, files: BlobFiles) -> bytes:
    made = files.new(".made")
    made.write_bytes(b"made")
    return files.read(value["facts"]["file"])


def shower(folder: Path, make: Callable[[Any, BlobFiles], Any] = read_it) -> Shower:
    return Shower(folder, make, threads=2)


def finished(it: Shower, count: int = 1) -> list[tuple[bytes, str]]:
    found: list[tuple[bytes, str]] = []
    while len(found) < count:
        it.wait()
        found += it.poll()
    return found


def row(**values: Any) -> Row:
    return Row(step=7, time=1.0, values=values, places={"global_step": 7}, positions=())


class TestShowing:
    def test_what_was_made_is_in_the_row_and_its_files_stay_until_that_is_settled(self, tmp_path: Path):
        put(tmp_path, 3, b"abc")
        it, value = shower(tmp_path), picture(3, b"abc")

        it.submit(job(value, b"abc"))
        told = finished(it)
        made = it.into(row(loss=1.0, img=value), beat=lambda: None)

        assert [(key_of(value), "")] == told
        assert {"loss": 1.0, "img": b"abc"} == made.values
        assert [b"made"] == [path.read_bytes() for path in tmp_path.rglob("*.made")]
        it.settle(7)
        assert [] == list(tmp_path.rglob("*.made"))

    def test_values_of_the_same_content_are_each_told(self, tmp_path: Path):
        """What has no blobs is told from others by its content alone, and may be the same at every step."""
        put(tmp_path, 3, b"abc")
        it, value = shower(tmp_path), picture(3, b"abc")

        told = []
        for _ in range(2):
            it.submit(job(value, b"abc"))
            told += finished(it)
        it.submit(job(value, b"abc"))
        it.into(row(img=value), beat=lambda: None)  # the row of the first goes before the third was told
        told += finished(it)

        assert [(key_of(value), "")] * 3 == told
        assert {"img": b"abc"} == it.into(row(img=value), beat=lambda: None).values
        assert [] == it.poll()

    def test_a_row_of_an_earlier_life_is_made_anew(self, tmp_path: Path):
        put(tmp_path, 3, b"abc")

        made = shower(tmp_path).into(row(img=picture(3, b"abc")), beat=lambda: None)

        assert {"img": b"abc"} == made.values

    @pytest.mark.parametrize("there", [b"abX", b"ab", b"abcd", None])
    def test_bytes_that_are_not_what_was_sent_are_corrupt(self, tmp_path: Path, there: bytes | None):
        if there is not None:
            put(tmp_path, 3, there)
        it, value = shower(tmp_path), picture(3, b"abc")

        it.submit(job(value, b"abc"))

        assert [(key_of(value), "corrupt")] == finished(it)

    def test_nothing_at_all_needs_no_piece(self, tmp_path: Path):
        it, value = shower(tmp_path), picture(3, b"")

        it.submit(job(value, b""))

        assert [(key_of(value), "")] == finished(it)

    @pytest.mark.parametrize(("error", "word"), [(ValueError("no image"), "bad"), (MemoryError(), "failed")])
    def test_what_can_not_be_shown_is_told_in_a_word(self, tmp_path: Path, error: Exception, word: str):
        def refuse(value: Any, files: BlobFiles) -> Any:
            raise error

        put(tmp_path, 3, b"abc")
        it, value = shower(tmp_path, refuse), picture(3, b"abc")

        it.submit(job(value, b"abc"))

        assert [(key_of(value), word)] == finished(it)

    def test_in_a_row_that_is_decided_it_is_left_out_and_the_row_goes_on(self, tmp_path: Path):
        made = shower(tmp_path).into(row(loss=1.0, img=picture(3, b"abc")), beat=lambda: None)

        assert {"loss": 1.0} == made.values

    def test_it_is_counted_so_and_not_as_delivered(self, tmp_path: Path):
        put(tmp_path, 4, b"abc")
        media = Media(shower(tmp_path), patience=1.0, capacity=10, beat=lambda: None, told={})
        decided = row(loss=1.0, gone=picture(3, b"abc"), there=picture(4, b"abc"))
        media.note([decided])

        (made,) = media.shown([decided])
        media.settle([7])

        assert {"loss": 1.0, "there": b"abc"} == made.values
        assert {"delivered": 1, "left_out": {"failed": 1}, "waiting": 0} == media.ledger()

    def test_what_the_last_life_encoded_is_removed_and_the_blobs_are_told(self, tmp_path: Path):
        put(tmp_path, 3, b"abc")
        (tmp_path / "shown" / "0").mkdir(parents=True)

        it = shower(tmp_path)

        assert {(LANE, 3)} == it.there()
        assert not (tmp_path / "shown").exists()
        it.close()
        assert [] == list(tmp_path.iterdir())
