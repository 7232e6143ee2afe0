"""Records: what is packed is read, and nothing that a peer may send makes reading fail or grow."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.errors import LocalProtocolError
from sidestep.wire import (
    MAX_DEPTH,
    MAX_FRAME_BYTES,
    MAX_NAME_CHARS,
    MAX_RECORD_BYTES,
    Kind,
    Record,
    Undecodable,
    decode_records,
    encode_record,
)
from sidestep.wire.plain import is_plain

GOOD = b"\x94\x01" + struct.pack("!Bd", 0xCB, 1.5) + b"\x05\x81\xa1a\x01"
A = Record(kind=Kind.LOG, time=1.5, step=5, data={"a": 1})
MIB = 2**20


def packed(*parts: Any) -> bytes:
    result: bytes = msgpack.packb(list(parts))
    return result


def log_of(data: Any) -> bytes:
    return packed(1, 1.5, 5, data)


def decode_one(record: bytes) -> Record | Undecodable:
    [decoded] = decode_records(record, 1)
    return decoded


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def nested_map(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"k": value}
    return value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.binary(max_size=30)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=15,
)
DATA = st.dictionaries(st.text(max_size=30), PLAIN, max_size=6)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
STAGES = st.none() | st.text(max_size=20)
STEPPED = st.builds(
    Record,
    kind=st.sampled_from([Kind.LOG, Kind.COUNTED]),
    time=TIMES,
    step=st.integers(-(2**63) + 1, 2**63 - 1),
    data=DATA,
    stage=STAGES,
)
STEPLESS = st.builds(
    Record,
    kind=st.sampled_from([Kind.CONFIG, Kind.SUMMARY, Kind.DEFINE, Kind.SAMPLES, Kind.ALERT]),
    time=TIMES,
    step=st.none(),
    data=DATA,
    stage=STAGES,
)
ANY_RECORD = STEPPED | STEPLESS


class TestRoundTrip:
    @settings(max_examples=100, deadline=None)
    @given(records=st.lists(ANY_RECORD, max_size=5))
    def test_what_is_packed_is_read(self, records: list[Record]) -> None:
        body = b"".join(map(encode_record, records))

        assert records == decode_records(body, len(records))

    def test_nan_and_infinities_are_values(self) -> None:
        record = decode_one(log_of({"nan": math.nan, "up": math.inf, "down": -math.inf}))

        assert isinstance(record, Record)
        assert math.isnan(record.data["nan"])
        assert (math.inf, -math.inf) == (record.data["up"], record.data["down"])

    def test_the_widest_integers_are_carried(self) -> None:
        assert {"a": 2**64 - 1, "b": -(2**63)} == decode_one(log_of({"a": 2**64 - 1, "b": -(2**63)})).data  # type: ignore[union-attr]

    def test_of_a_name_that_is_there_twice_the_last_counts(self) -> None:
        record = decode_one(b"\x94" + packed(1, 1.5, 5)[1:] + b"\x82\xa1a\x01\xa1a\x02")

        assert Record(kind=Kind.LOG, time=1.5, step=5, data={"a": 2}) == record

    def test_scalars_may_be_keys_inside_a_value(self) -> None:
        assert {"a": {1: "x", 2.5: "y", None: "z"}} == decode_one(
            log_of({"a": {1: "x", 2.5: "y", None: "z"}})
        ).data  # type: ignore[union-attr]

    def test_an_empty_frame_holds_no_record(self) -> None:
        assert [] == decode_records(b"", 0)

    def test_a_stage_may_be_nil(self) -> None:
        assert A == decode_one(packed(1, 1.5, 5, {"a": 1}, None))


class TestUndecodable:
    @pytest.mark.parametrize(
        ("reason", "record"),
        [
            ("shape", packed()),
            ("shape", packed(1, 1.5, 5)),
            ("shape", packed(1, 1.5, 5, {}, "s", 0)),
            ("shape", b"\x80"),
            ("shape", b"\xc0"),
            ("shape", packed(0, 1.5, 5, {})),
            ("shape", packed(99, 1.5, 5, {})),
            ("shape", packed(True, 1.5, 5, {})),
            ("shape", packed(1.0, 1.5, 5, {})),
            ("shape", packed([], 1.5, 5, {})),
            ("shape", packed(1, 1.5, 5, [1])),
            ("shape", packed(1, 1.5, 5, None)),
            ("time", packed(1, 1, 5, {})),
            ("time", packed(1, None, 5, {})),
            ("time", packed(1, math.nan, 5, {})),
            ("time", packed(1, math.inf, 5, {})),
            ("step", packed(1, 1.5, None, {})),
            ("step", packed(2, 1.5, None, {})),
            ("step", packed(1, 1.5, 5.0, {})),
            ("step", packed(1, 1.5, True, {})),
            ("step", packed(1, 1.5, 2**63, {})),
            ("step", packed(1, 1.5, -(2**63), {})),
            ("step", packed(3, 1.5, 5, {})),
            ("stage", packed(1, 1.5, 5, {}, 7)),
            ("stage", packed(1, 1.5, 5, {}, "s" * (MAX_NAME_CHARS + 1))),
            ("name", log_of({1: 2})),
            ("name", log_of({b"a": 2})),
            ("name", log_of({"n" * (MAX_NAME_CHARS + 1): 2})),
            ("value", log_of({"a": nested(MAX_DEPTH + 1)})),
            ("value", log_of({"a": nested_map(MAX_DEPTH + 1)})),
            ("size", log_of({"a": "x" * MAX_RECORD_BYTES})),
            ("malformed", log_of({"a": "x"}).replace(b"x", b"\xff")),
            ("malformed", log_of({"a": msgpack.ExtType(5, b"x")})),
            ("malformed", log_of({"a": msgpack.ExtType(5, b"")})),
            ("malformed", log_of({"a": msgpack.ExtType(5, b"xxxx")})),
            ("malformed", log_of({"a": msgpack.Timestamp(1)})),
            ("malformed", log_of({"a": msgpack.Timestamp(1, 1)})),
            ("malformed", log_of({"a": msgpack.Timestamp(2**40, 1)})),
            ("malformed", b"\x94\x01\x01\x01\x81\x91\x01\x01"),
        ],
    )
    def test_is_one_record_and_no_other(self, reason: str, record: bytes) -> None:
        assert [A, Undecodable(reason), A] == decode_records(GOOD + record + GOOD, 3)

    @pytest.mark.parametrize(
        "record",
        [
            pytest.param(b"\xc1", id="no msgpack"),
            pytest.param(GOOD[:-1], id="cut"),
            pytest.param(b"\x91" * 2000 + b"\x90", id="deeper than msgpack goes"),
            pytest.param(b"\xdd\xff\xff\xff\xff", id="announces more than it has"),
            pytest.param(b"", id="missing"),
        ],
    )
    def test_takes_all_after_it_along_when_its_end_can_not_be_found(self, record: bytes) -> None:
        assert [A, *[Undecodable("malformed")] * 3] == decode_records(GOOD + record, 4)

    def test_is_all_of_a_frame_that_holds_more_than_it_announced(self) -> None:
        assert [Undecodable("miscounted")] == decode_records(GOOD + GOOD, 1)
        assert [Undecodable("miscounted")] == decode_records(GOOD + b"\xc1", 1)

    def test_names_are_looked_at_in_every_record(self) -> None:
        """Names seen before are not looked at again; others must be."""
        long = "n" * (MAX_NAME_CHARS + 1)
        body = GOOD + log_of({"a": 1, long: 1}) + log_of({long: 1}) + GOOD

        assert [A, Undecodable("name"), Undecodable("name"), A] == decode_records(body, 4)


class TestPlainValues:
    @pytest.mark.parametrize("value", [object(), (1,), {(1,): 1}, [{1, 2}], {"a": [object()]}, Kind.LOG])
    def test_are_of_the_types_that_travel(self, value: object) -> None:
        assert not is_plain(value)

    @pytest.mark.parametrize("value", [None, True, 1, 1.0, "a", b"a", [], {}, [[1], {"a": {1: [None]}}]])
    def test_hold_plain_values(self, value: object) -> None:
        assert is_plain(value)


class TestLimits:
    def test_records_at_the_limits_are_carried(self) -> None:
        for data in (
            {"n" * MAX_NAME_CHARS: 1},
            {"a": nested(MAX_DEPTH)},
            {"a": nested_map(MAX_DEPTH)},
            {"a": [0] * 200_000},
        ):
            record = Record(kind=Kind.LOG, time=1.5, step=5, data=data, stage="s" * MAX_NAME_CHARS)

            assert record == decode_one(encode_record(record))

    def test_a_record_of_just_the_size_is_carried_and_one_byte_more_is_not(self) -> None:
        room = MAX_RECORD_BYTES - len(log_of({"a": "x" * 100_000})) + 100_000

        assert isinstance(decode_one(log_of({"a": "x" * room})), Record)
        assert Undecodable("size") == decode_one(log_of({"a": "x" * (room + 1)}))

    @pytest.mark.parametrize(
        ("reason", "changes"),
        [
            ("size", {"data": {"a": "x" * MAX_RECORD_BYTES}}),
            ("value", {"data": {"a": nested(MAX_DEPTH + 1)}}),
            ("name", {"data": {"n" * (MAX_NAME_CHARS + 1): 1}}),
            ("name", {"data": {1: 1}}),
            ("step", {"step": None}),
            ("step", {"step": 2**63}),
            ("time", {"time": math.nan}),
            ("stage", {"stage": "s" * (MAX_NAME_CHARS + 1)}),
            ("packed", {"data": {"a": object()}}),
            ("packed", {"data": {"a": 2**64}}),
            ("packed", {"data": {"a": "\ud800"}}),
            ("packed", {"data": {"a": nested(2000)}}),
        ],
    )
    def test_what_no_daemon_would_take_is_not_packed(self, reason: str, changes: dict[str, Any]) -> None:
        values: dict[str, Any] = {"kind": Kind.LOG, "time": 1.5, "step": 5, "data": {"a": 1}}

        with pytest.raises(LocalProtocolError, match=reason):
            encode_record(Record(**values | changes))


class TestBombs:
    @pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff"])
    def test_containers_in_containers_end_at_the_depth_that_msgpack_goes(self, opening: bytes) -> None:
        body = opening * (MAX_FRAME_BYTES // len(opening))

        assert [Undecodable("malformed")] * 3 == decode_records(body, 3)

    def test_announced_lengths_cost_nothing(self) -> None:
        """Three bytes announce 65,535 entries; a thousand of them inside each other would be half a gigabyte."""
        body = b"\xdc\xff\xff" * 1000

        tracemalloc.start()
        decoded = decode_records(body, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert [Undecodable("malformed")] == decoded
        assert peak < MIB

    @pytest.mark.parametrize("empty", [b"\x80", b"\x90"])
    def test_a_record_of_empty_containers_is_refused_by_its_size_before_it_is_built(self, empty: bytes) -> None:
        count = MAX_FRAME_BYTES - 32
        body = b"\x94\x01" + struct.pack("!Bd", 0xCB, 1.5) + b"\x05\x81\xa1a\xdd" + struct.pack("!I", count)
        body += empty * count

        tracemalloc.start()
        decoded = decode_records(body, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert [Undecodable("size")] == decoded
        assert peak < 2 * MIB

    def test_the_costliest_records_that_are_allowed_stay_bounded(self) -> None:
        record = encode_record(Record(kind=Kind.LOG, time=1.5, step=5, data={"a": [{}] * (MAX_RECORD_BYTES - 32)}))

        tracemalloc.start()
        decoded = decode_one(record)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert isinstance(decoded, Record)
        assert peak < 24 * MIB

    def test_a_frame_of_empty_records_is_as_many_undecodable(self) -> None:
        assert [Undecodable("shape")] * 65_536 == decode_records(b"\x90" * 65_536, 65_536)

    def test_a_count_that_no_body_can_hold_is_answered_in_full(self) -> None:
        assert [Undecodable("malformed")] * 65_536 == decode_records(b"\xc1", 65_536)


class TestAnything:
    @settings(max_examples=200, deadline=None)
    @given(body=st.binary(max_size=300), count=st.integers(0, 50))
    def test_of_bytes_gives_as_many_as_were_announced(self, body: bytes, count: int) -> None:
        assert count == len(decode_records(body, count))

    @settings(max_examples=200, deadline=None)
    @given(records=st.lists(ANY_RECORD, min_size=1, max_size=4), data=st.data())
    def test_that_is_mutated_gives_as_many_and_only_what_can_be_packed_again(
        self, records: list[Record], data: st.DataObject
    ) -> None:
        body = bytearray(b"".join(map(encode_record, records)))
        for at in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
            body[at] = data.draw(st.integers(0, 255))

        decoded = decode_records(bytes(body), len(records))

        assert len(records) == len(decoded)
        for record in decoded:
            if isinstance(record, Record):
                once = encode_record(record)
                assert [once] == [encode_record(again) for again in decode_records(once, 1)]  # type: ignore[arg-type]

    @settings(max_examples=200, deadline=None)
    @given(parts=st.lists(PLAIN, max_size=6))
    def test_of_plain_values_is_a_record_or_undecodable(self, parts: list[Any]) -> None:
        assert isinstance(decode_one(packed(*parts)), Record | Undecodable)
