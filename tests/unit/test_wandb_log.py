"""The reader of `.wandb` files, against files that wandb wrote, whole, torn, damaged and growing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestepd.sinks.wandb_log import (
    BLOCK,
    CHUNK,
    HEADER,
    HistoryRow,
    LogReader,
    history,
    records,
    segments,
    steps_of,
)

FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
DEADLINE_S = 60.0

WRITER = """
import json, sys
import wandb
quiet = dict(
    console="off", silent=True, label_disable=True, disable_git=True, disable_code=True, save_code=False,
    x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
    x_transaction_log_flush_interval=1,
)
run = wandb.init(mode="offline", project="reader", id=sys.argv[1], settings=wandb.Settings(**quiet))
for line in sys.stdin:
    step, values = json.loads(line)
    run.log(values, step=step, commit=True)
    print(step, flush=True)
run.finish()
"""

NESTED = {
    "loss": 0.5,
    "deep": {"er": {"est": 1}, "nan": math.nan},
    "up": math.inf,
    "down": -math.inf,
    "with.dot": "text",
    "list": [1, 2, {"k": None}],
    "big": "long " * 30_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A file, and what is in it."""

    data: bytes
    payloads: list[bytes]


@contextlib.contextmanager
def wandb_writing(directory: Path, run_id: str) -> Iterator[Callable[[int, dict[str, object]], None]]:
    """A real wandb run in a process of its own; the callable logs one row and returns when `log()` has."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, run_id],
        cwd=directory,
        env=environment | {"WANDB_DIR": str(directory), "WANDB_ERROR_REPORTING": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def log(step: int, values: dict[str, object]) -> None:
            print(json.dumps([step, values]), file=process.stdin, flush=True)
            assert process.stdout.readline() == f"{step}\n"

        yield log
    assert process.returncode == 0


def written_by_wandb(directory: Path, rows: list[tuple[int, dict[str, object]]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with wandb_writing(directory, "abc") as log:
        for step, values in rows:
            log(step, values)
    [path] = segments(directory / "wandb")
    wait_until(lambda: any(record.HasField("exit") for record in records(path)))  # finish() is back before this
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows, one of them wider than several blocks."""
    return written_by_wandb(tmp_path_factory.mktemp("mixed"), [(3, NESTED), (7, {"loss": 1.0}), (8, {"loss": 2})])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Two blocks and a bit, of few records: they are read once for every byte."""
    rows = [(step, {"text": chr(97 + step) * 7_000}) for step in range(5)]
    path = written_by_wandb(tmp_path_factory.mktemp("small"), rows)
    return Sample(data=path.read_bytes(), payloads=list(LogReader(path).read()))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def chunk(kind: int, data: bytes) -> bytes:
    return CHUNK.pack(zlib.crc32(data, zlib.crc32(bytes([kind]))), len(data), kind) + data


def log_of(payloads: list[bytes]) -> bytes:
    """What a writer makes of payloads."""
    out = bytearray(HEADER)
    for payload in payloads:
        rest, first = payload, True
        while first or rest:
            if (left := BLOCK - len(out) % BLOCK) < CHUNK.size:
                out += bytes(left)
                left = BLOCK
            part, rest = rest[: left - CHUNK.size], rest[left - CHUNK.size :]
            out += chunk((FIRST if rest else FULL) if first else (MIDDLE if rest else LAST), part)
            first = False
    return bytes(out)


def ends_of(payloads: list[bytes]) -> list[int]:
    """Where each record ends in `log_of(payloads)`."""
    return [len(log_of(payloads[: count + 1])) for count in range(len(payloads))]


def blocks_of(start: int, end: int) -> range:
    return range(start // BLOCK, (end - 1) // BLOCK + 1)


class TestRowsOfARun:
    def test_values_are_read_as_they_were_logged(self, mixed: Path) -> None:
        first, *rest = history(mixed)

        assert first.step == 3
        assert math.isnan(first.values["deep.nan"])
        assert {
            "loss": 0.5,
            "deep.er.est": 1,
            "up": math.inf,
            "down": -math.inf,
            "with.dot": "text",
            "list": [1, 2, {"k": None}],
            "big": "long " * 30_000,
        } == {name: first.values[name] for name in first.values if name[0] != "_" and name != "deep.nan"}
        assert [(7, 1.0), (8, 2)] == [(row.step, row.values["loss"]) for row in rest]

    def test_step_time_and_runtime_are_among_the_values(self, mixed: Path) -> None:
        rows = list(history(mixed))

        assert [3, 7, 8] == [row.values["_step"] for row in rows]
        assert all(row.values["_timestamp"] > 1e9 and row.values["_runtime"] >= 0 for row in rows)

    def test_every_record_is_read_with_nothing_damaged(self, mixed: Path) -> None:
        reader = LogReader(mixed)

        numbers = [record.num for record in records(mixed)]
        payloads = list(reader.read())

        assert list(range(1, len(payloads) + 1)) == numbers
        assert 0 == reader.damaged
        assert mixed.stat().st_size == reader.offset

    def test_our_own_writer_makes_the_same_bytes_as_wandb(self, mixed: Path) -> None:
        """The files that other tests make up are therefore true to life."""
        payloads = list(LogReader(mixed).read())

        assert mixed.read_bytes() == log_of(payloads)

    def test_history_goes_on_from_an_offset(self, mixed: Path) -> None:
        reader = LogReader(mixed)
        steps = steps_of(reader)

        assert 3 == next(steps)

        assert [7, 8] == [row.step for row in history(mixed, reader.offset)]

    def test_steps_are_said_once(self, mixed: Path) -> None:
        reader = LogReader(mixed)

        assert [3, 7, 8] == list(steps_of(reader))
        assert [] == list(steps_of(reader))

    def test_a_payload_of_another_schema_is_counted_and_passed_over(self, mixed: Path, tmp_path: Path) -> None:
        payloads = list(LogReader(mixed).read())
        path = tmp_path / "run-a.wandb"
        path.write_bytes(log_of([payloads[0], b"\xff\xff\xff", *payloads[1:]]))
        reader = LogReader(path)

        steps = list(steps_of(reader))

        assert [3, 7, 8] == steps
        assert 1 == reader.damaged

    def test_a_row_can_not_be_changed(self) -> None:
        row = HistoryRow(step=1, values={})

        with pytest.raises(AttributeError):
            row.step = 2  # type: ignore[misc]


class TestNothingThere:
    @pytest.mark.parametrize("size", range(len(HEADER)))
    def test_a_file_shorter_than_its_header_holds_nothing_yet(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(HEADER[:size])
        reader = LogReader(path)

        assert [] == list(reader.read())
        assert (0, 0) == (reader.offset, reader.damaged)

    def test_a_missing_file_holds_nothing_yet(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        reader = LogReader(path)
        assert [] == list(reader.read())

        path.write_bytes(log_of([b"one"]))

        assert [b"one"] == list(reader.read())


class TestTornTail:
    def test_cut_anywhere_it_holds_the_whole_records_before_the_cut(self, small: Sample, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(small.data)
        ends = ends_of(small.payloads)
        wrong = []

        for size in range(len(small.data), len(small.data) - 2 * BLOCK, -1):
            os.truncate(path, size)
            reader = LogReader(path)
            whole = sum(end <= size for end in ends)
            if list(reader.read()) != small.payloads[:whole] or reader.damaged or reader.offset > size:
                wrong.append(size)

        assert [] == wrong

    def test_growing_by_one_byte_at_a_time_each_record_comes_once(self, small: Sample, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        reader = LogReader(path)
        seen: list[bytes] = []

        with path.open("ab", buffering=0) as file:
            for byte in small.data:
                file.write(bytes([byte]))
                seen.extend(reader.read())

        assert small.payloads == seen
        assert 0 == reader.damaged

    def test_a_chunk_whose_bytes_have_not_all_arrived_is_read_once_they_have(self, tmp_path: Path) -> None:
        """A crc that does not match at the very end of the file is no damage yet."""
        path = tmp_path / "run-a.wandb"
        data = log_of([b"one", b"two"])
        path.write_bytes(data[:-3] + bytes(3))
        reader = LogReader(path)
        assert [b"one"] == list(reader.read())
        assert 0 == reader.damaged

        path.write_bytes(data)

        assert [b"two"] == list(reader.read())

    def test_what_is_written_during_a_read_is_left_to_the_next_one(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        payloads = [b"one", b"x" * BLOCK, b"three"]
        data = log_of(payloads)
        path.write_bytes(data[: BLOCK // 2])
        reader = LogReader(path)
        reading = reader.read()
        assert b"one" == next(reading)

        path.write_bytes(data)

        assert payloads[1:] == [*reading, *reader.read()]
        assert 0 == reader.damaged

    def test_a_tail_of_zeros_is_no_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        data = log_of([b"one"])
        path.write_bytes(data + bytes(3 * BLOCK))
        reader = LogReader(path)

        assert [b"one"] == list(reader.read())
        assert (len(data), 0) == (reader.offset, reader.damaged)

    def test_zeros_with_records_behind_them_are_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        data = log_of([b"one"])
        path.write_bytes(data + bytes(2 * BLOCK - len(data)) + chunk(FULL, b"two"))
        reader = LogReader(path)

        assert [b"one", b"two"] == list(reader.read())
        assert 1 == reader.damaged


class TestDamage:
    def test_the_rest_of_its_block_is_skipped_and_the_next_one_read(self, tmp_path: Path) -> None:
        payloads = [bytes([65 + number]) * 10_000 for number in range(9)]
        data = bytearray(log_of(payloads))
        data[len(HEADER) + CHUNK.size] ^= 1
        path = tmp_path / "run-a.wandb"
        path.write_bytes(data)
        reader = LogReader(path)

        seen = list(reader.read())

        assert payloads[4:] == seen  # the fourth began in the damaged block
        assert 2 == reader.damaged  # the flipped chunk, and the end of the fourth

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param(CHUNK.pack(zlib.crc32(b"", zlib.crc32(b"\x07")), 0, 7), id="bad type"),
            pytest.param(CHUNK.pack(0, 0xFFFF, FULL) + b"x", id="length beyond the block"),
            pytest.param(chunk(MIDDLE, b"lost"), id="middle without first"),
            pytest.param(chunk(LAST, b"lost"), id="last without first"),
            pytest.param(chunk(FIRST, b"lost"), id="first without last"),
        ],
    )
    def test_of_a_finished_block_is_counted_once(self, tmp_path: Path, wrong: bytes) -> None:
        before = HEADER + chunk(FULL, b"one") + wrong
        filler = bytes(BLOCK - len(before) - CHUNK.size)
        path = tmp_path / "run-a.wandb"
        path.write_bytes(before + chunk(FULL, filler) + chunk(FULL, b"two"))
        reader = LogReader(path)

        seen = [payload for payload in reader.read() if payload != filler]
        again = list(reader.read())

        assert [b"one", b"two"] == seen
        assert [] == again
        assert 1 == reader.damaged

    def test_in_the_middle_of_the_newest_block_is_counted_though_not_settled(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        data = log_of([b"one", b"two", b"three"])
        path.write_bytes(data.replace(b"two", b"owt"))
        reader = LogReader(path)

        assert [b"one"] == list(reader.read())
        assert [] == list(reader.read())

        assert 1 == reader.damaged
        assert len(log_of([b"one"])) == reader.offset

    def test_of_the_newest_block_is_counted_once_however_often_it_is_met(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        data = log_of([b"one", b"two", b"three", b"x" * BLOCK, b"five"]).replace(b"two", b"owt")
        path.write_bytes(data[:100])
        reader = LogReader(path)
        assert [b"one"] == list(reader.read())
        assert 1 == reader.damaged

        path.write_bytes(data)

        assert [b"five"] == list(reader.read())
        assert 2 == reader.damaged  # with it went the start of the fourth, whose end is the second

    def test_of_the_header_is_counted_and_the_records_still_read(self, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(b":X&B" + log_of([b"one"])[4:])
        reader = LogReader(path)

        assert [b"one"] == list(reader.read())
        assert 1 == reader.damaged

    @settings(max_examples=150, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 50_000) | st.integers(BLOCK - 20, BLOCK), min_size=1, max_size=8),
        flips=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6),
        resume=st.integers(0, 10),
    )
    def test_flipped_bits_never_raise_nor_invent_a_record(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], flips: list[float], resume: int
    ) -> None:
        payloads = [bytes([number + 1]) + os.urandom(size) for number, size in enumerate(sizes)]
        data = bytearray(log_of(payloads))
        bits = {int(flip * 8 * len(data)) for flip in flips}
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        path = tmp_path_factory.mktemp("flipped") / "run-a.wandb"
        path.write_bytes(data)
        one_pass = LogReader(path)

        seen = [(payload, one_pass.offset) for payload in one_pass.read()]

        hurt = {bit // 8 // BLOCK for bit in bits}
        ends = [len(HEADER), *ends_of(payloads)]
        unhurt = [
            payload
            for payload, (start, end) in zip(payloads, pairwise(ends), strict=True)
            if hurt.isdisjoint(blocks_of(start, end))
        ]
        whole = [payload for payload, _ in seen]
        assert [payload for payload in payloads if payload in whole] == whole
        assert [payload for payload in whole if payload in unhurt] == unhurt
        assert whole == payloads or one_pass.damaged or max(hurt) == len(data) // BLOCK
        offset = seen[min(resume, len(seen) - 1)][1] if seen else 0
        assert [payload for payload, at in seen if at > offset] == list(LogReader(path, offset).read())
        shutil.rmtree(path.parent)

    @settings(max_examples=100, deadline=None)
    @given(data=st.binary(max_size=300), offset=st.integers(0, 400))
    def test_bytes_that_are_no_log_never_raise(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int
    ) -> None:
        path = tmp_path_factory.mktemp("noise") / "run-a.wandb"
        path.write_bytes(data)

        assert [] == list(LogReader(path, offset).read())


class TestResuming:
    def test_from_any_offset_gives_what_one_pass_gives(self, small: Sample, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(small.data)
        reader = LogReader(path)
        offsets = [0, *(reader.offset for _ in reader.read())]

        rests = [list(LogReader(path, offset).read()) for offset in offsets]

        assert [small.payloads[count:] for count in range(len(offsets))] == rests

    def test_a_reader_given_up_halfway_goes_on_with_the_next_record(self, small: Sample, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(small.data)
        reader = LogReader(path)
        first = next(reader.read())

        rest = list(reader.read())

        assert small.payloads == [first, *rest]

    def test_an_offset_beyond_the_end_of_the_file_gives_nothing(self, small: Sample, tmp_path: Path) -> None:
        path = tmp_path / "run-a.wandb"
        path.write_bytes(small.data)

        assert [] == list(LogReader(path, 10 * BLOCK).read())


class TestLiveRun:
    def test_rows_appear_while_wandb_is_still_writing(self, tmp_path: Path) -> None:
        with wandb_writing(tmp_path, "live") as log:
            log(0, {"loss": 0.0})
            [path] = segments(tmp_path / "wandb")
            reader, seen = LogReader(path), []
            for step in range(1, 4):
                log(step, {"loss": 1.0, "big": "x" * 20_000})
                wait_until(lambda step=step: seen.extend(steps_of(reader)) or step in seen)

        wait_until(lambda: any(record.HasField("exit") for record in records(path, reader.offset)))
        assert [0, 1, 2, 3] == seen + list(steps_of(reader))
        assert 0 == reader.damaged


class TestSegments:
    def test_are_ordered_by_start_then_by_last_change(self, tmp_path: Path) -> None:
        names = [
            "offline-run-20260102_000000-a-1",
            "run-20260101_235959-z",
            "offline-run-20260102_000000-a",
            "offline-run-20260103_000000-a",
        ]
        for age, name in enumerate(names):
            file = tmp_path / name / "run-a.wandb"
            file.parent.mkdir()
            file.touch()
            os.utime(file, (age, 100 - age))

        assert [names[1], names[2], names[0], names[3]] == [path.parent.name for path in segments(tmp_path)]

    def test_are_the_runs_own_files_alone(self, tmp_path: Path) -> None:
        run = tmp_path / "offline-run-20260101_000000-a"
        (run / "files").mkdir(parents=True)
        (run / "run-a.wandb").touch()
        (run / "run-a.wandb.synced").touch()
        (run / "files" / "run-b.wandb").touch()
        (tmp_path / "latest-run").symlink_to(run)

        assert [run / "run-a.wandb"] == segments(tmp_path)

    def test_of_a_missing_directory_are_none(self, tmp_path: Path) -> None:
        assert [] == segments(tmp_path / "wandb")


def test_reading_payloads_does_not_import_wandb() -> None:
    code = (
        "import sys, pathlib; from sidestepd.sinks.wandb_log import LogReader; "
        "list(LogReader(pathlib.Path('none')).read()); sys.exit('wandb' in sys.modules)"
    )

    assert 0 == subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S).returncode
