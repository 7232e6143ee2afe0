"""Messages: golden bytes, round trips, limits on both sides, and whatever else a peer may send."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.errors import LocalProtocolError, RemoteProtocolError
from sidestep.wire import (
    BLOBS,
    MAX_CONTROL_BYTES,
    MAX_DEPTH,
    MAX_FRAME_BYTES,
    MAX_FRAME_RECORDS,
    MAX_NAME_CHARS,
    MAX_TEXT_CHARS,
    NO_SESSION,
    VERSION,
    Ack,
    Bye,
    Frame,
    Hello,
    Kind,
    Message,
    Record,
    Refuse,
    RunInfo,
    Status,
    VersionError,
    Welcome,
    checksum,
    decode,
    decode_records,
    encode,
    encode_record,
    limits,
    session_of,
)
from sidestep.wire.header import LAYOUT, MessageType

GOLDEN = Path(__file__).parents[1] / "data" / "wire"
SESSION = bytes(range(16))

RECORDS = [
    Record(
        kind=Kind.LOG, time=1700000000.25, step=7, data={"loss": 0.5, "lr": 1e-4, "n": 3, "tag": "a", "ok": True}
    ),
    Record(
        kind=Kind.COUNTED, time=1700000000.5, step=0, data={"nested": {"k": [1, None, math.inf]}}, stage="eval"
    ),
    Record(kind=Kind.CONFIG, time=1700000001.0, step=None, data={"seed": 2**64 - 1}),
    Record(kind=Kind.SUMMARY, time=1700000002.0, step=None, data={"best": -1}),
    Record(
        kind=Kind.DEFINE,
        time=1700000003.0,
        step=None,
        data={"name": "loss", "step_metric": None, "reduce": "mean", "summary": "min", "hidden": False},
    ),
    Record(
        kind=Kind.SAMPLES,
        time=1700000004.0,
        step=None,
        data={"values": {"memory_allocated": 2**30}, "ordinal": 0, "device": "GPU-1f", "visible": "0,1"},
    ),
    Record(
        kind=Kind.SAMPLES,
        time=1700000005.0,
        step=None,
        data={"values": {"system/gpu0/utilization": 93.0}, "gpus": {"GPU-1f": 0}},
    ),
    Record(
        kind=Kind.ALERT,
        time=1700000006.0,
        step=None,
        data={"title": "GPU 0 is lost", "text": "Reset it.", "level": "ERROR"},
    ),
    Record(kind=Kind.BLOB, time=1700000007.0, step=None, data={"id": 3, "at": 0, "bytes": b"\x89PNG"}),
    Record(kind=Kind.BLOB, time=1700000008.0, step=None, data={"id": 3, "size": 4, "crc": 3735928559}),
    Record(kind=Kind.NAMED, time=1700000009.0, step=None, data={"name": "a", "tags": ["b"]}),
    Record(kind=Kind.OUTPUT, time=1700000007.0, step=None, data={"stream": "stderr", "text": "one\ntwo"}),
    Record(
        kind=Kind.ARTIFACT,
        time=1700000010.0,
        step=None,
        data={
            "artifact": {"name": "m", "type": "model", "metadata": {}, "aliases": ["latest"], "tags": []},
            "entries": b"\x92\x90\x90",
            "blobs": [[SESSION, 0, 2]],
        },
    ),
    Record(
        kind=Kind.PROGRAM, time=1700000008.0, step=None, data={"facts": {"python": "3.11", "args": ["--lr", "1"]}}
    ),
    Record(kind=Kind.PROGRAM, time=1700000009.0, step=None, data={"file": "requirements.txt", "text": "torch==2"}),
]
BODY = b"".join(map(encode_record, RECORDS))

MESSAGES: dict[str, Message] = {
    "hello": Hello(
        session=SESSION,
        first=41,
        more=True,
        rank=3,
        world=8,
        local_rank=1,
        node="node-1",
        pid=4242,
        launch="job-7",
        attempt=2,
        run="abc123",
        client="sidestep 0.1.0",
        offered=50,
        dropped={"outbox_full": 2},
        values_refused=4,
        settings={"project": "digits", "tags": ["a", "b"]},
        role=BLOBS,
        beside="0f" * 16,
        relay="0e" * 16,
        turn=2,
        pids="pid:[4026531836]",
    ),
    "welcome": Welcome(
        session=SESSION,
        first=41,
        boot="b1",
        credit=1 << 20,
        flush_interval_s=0.02,
        heartbeat_s=5.0,
        sample_interval_s=5.0,
        run={"id": "abc123", "dir": "/runs/abc123"},
    ),
    "frame": Frame(session=SESSION, first=41, count=len(RECORDS), body=BODY, crc=checksum(BODY), more=True),
    "ack": Ack(session=SESSION, first=46, gap=True, credit=1 << 20),
    "refuse": Refuse(session=SESSION, code="closed", message="the run is over", final=True),
    "run": RunInfo(session=SESSION, info={"id": "abc123", "url": None}, close=3),
    "bye": Bye(
        session=SESSION,
        first=46,
        offered=48,
        dropped={"outbox_full": 2},
        values_refused=5,
        exit_code=0,
        lost=True,
    ),
    "status": Status(
        session=SESSION, more=True, offered=48, dropped={"too_large": 1}, values_refused=5, info={"rows": 5}
    ),
}

HEADER_FIELDS = {"session", "first", "more", "gap"}


def golden(name: str) -> list[bytes]:
    """The parts in a file: hexadecimal, a blank line between parts, comments after `#`."""
    text = "\n".join(line.partition("#")[0] for line in (GOLDEN / f"{name}.hex").read_text().splitlines())
    return [bytes.fromhex(part) for part in text.strip().split("\n\n")]


def regenerate() -> None:
    """Write all golden frames."""
    for name, message in MESSAGES.items():
        header, body = (part.hex(" ") for part in encode(message))
        lines = [body[at : at + 96].strip() for at in range(0, len(body), 96)]
        (GOLDEN / f"{name}.hex").write_text("\n".join([f"# {name.upper()}", header, "", *lines, ""]))
        print(GOLDEN / f"{name}.hex")


def control(
    kind: MessageType, body: bytes | dict[Any, Any], *, first: int = 0, version: int = VERSION
) -> list[bytes]:
    """A message as a peer might make it, whatever is in it."""
    if not isinstance(body, bytes):
        body = msgpack.packb(body)
    return [header(kind, version=version, first=first, crc=zlib.crc32(body)), body]


def header(
    kind: int, *, version: int = VERSION, flags: int = 0, first: int = 0, count: int = 0, crc: int = 0,
    session: bytes = SESSION, magic: bytes = b"SS",
) -> bytes:  # fmt: skip
    return struct.pack("!2sBBHxx16sQII", magic, version, kind, flags, session, first, count, crc)


def frame(**changes: Any) -> Frame:
    return replace(MESSAGES["frame"], **changes)  # type: ignore[type-var]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


class TestGoldenFrames:
    def test_there_is_one_for_every_type(self) -> None:
        assert {kind.name.lower() for kind in MessageType} == {path.stem for path in GOLDEN.glob("*.hex")}

    @pytest.mark.parametrize("name", MESSAGES)
    def test_are_what_is_encoded(self, name: str) -> None:
        assert golden(name) == encode(MESSAGES[name])

    @pytest.mark.parametrize("name", MESSAGES)
    def test_are_decoded_to_what_was_meant(self, name: str) -> None:
        assert MESSAGES[name] == decode(golden(name))

    def test_hold_records_of_every_kind(self) -> None:
        message = decode(golden("frame"))

        assert isinstance(message, Frame)
        assert RECORDS == decode_records(message.body, message.count)
        assert set(Kind) == {record.kind for record in RECORDS}

    @pytest.mark.parametrize("name", MESSAGES)
    def test_say_something_in_every_field(self, name: str) -> None:
        """A field left at its default would not show in the bytes if it were lost."""
        message = MESSAGES[name]

        same = [
            field.name
            for field in fields(message)
            if field.default is not MISSING and field.default == getattr(message, field.name)
            if (name, field.name) not in {("welcome", "flush_interval_s"), ("welcome", "heartbeat_s")}
        ]

        assert [] == same


class TestFormatPage:
    @pytest.mark.parametrize("name", [name for name in vars(limits) if name.startswith("MAX_")])
    def test_names_every_limit_with_its_value(self, name: str) -> None:
        page = Path(limits.__file__).with_name("FORMAT.md").read_text()

        assert f"| `{name}` | {getattr(limits, name):,} |" in page


class TestHeader:
    def test_is_laid_out_as_drawn(self) -> None:
        raw, _ = encode(MESSAGES["frame"])

        assert 40 == LAYOUT.size == len(raw)
        assert b"SS" == raw[0:2]
        assert (VERSION, MessageType.FRAME) == (raw[2], raw[3])
        assert 1 == int.from_bytes(raw[4:6], "big")
        assert bytes(2) == raw[6:8]
        assert SESSION == raw[8:24]
        assert 41 == int.from_bytes(raw[24:32], "big")
        assert len(RECORDS) == int.from_bytes(raw[32:36], "big")
        assert zlib.crc32(BODY) == int.from_bytes(raw[36:40], "big")

    @pytest.mark.parametrize(
        "raw",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"SS", id="cut"),
            pytest.param(header(4)[:-1], id="too short"),
            pytest.param(header(4) + b"x", id="too long"),
            pytest.param(header(4, magic=b"GE"), id="another protocol"),
            pytest.param(header(0), id="no type"),
            pytest.param(header(9), id="many messages in one"),
            pytest.param(header(10), id="unknown type"),
            pytest.param(header(4, first=2**63), id="sequence out of range"),
        ],
    )
    def test_that_is_none_is_refused(self, raw: bytes) -> None:
        with pytest.raises(RemoteProtocolError):
            decode([raw])

    def test_flags_of_the_future_are_passed_over(self) -> None:
        assert decode([header(4, first=1)]) == decode([header(4, first=1, flags=0xFFFC)])

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"session": b"short"}, id="session"),
            pytest.param({"first": -1}, id="below the sequences"),
            pytest.param({"first": 2**63}, id="beyond the sequences"),
        ],
    )
    def test_that_does_not_fit_is_our_fault(self, changes: dict[str, Any]) -> None:
        with pytest.raises(LocalProtocolError):
            encode(replace(MESSAGES["ack"], **changes))  # type: ignore[type-var]


class TestVersions:
    @pytest.mark.parametrize("version", [0, VERSION + 1, 255])
    def test_another_version_is_refused_with_both_versions_in_words(self, version: int) -> None:
        with pytest.raises(
            VersionError, match=rf"version {version}, this side .*{VERSION}: install the same release"
        ):
            decode(control(MessageType.HELLO, {}, version=version))

    def test_another_version_is_known_even_if_its_header_is_longer(self) -> None:
        with pytest.raises(VersionError):
            decode([header(MessageType.HELLO, version=VERSION + 1) + bytes(8)])

    def test_a_refusal_is_read_whatever_its_version(self) -> None:
        """So the older side learns from the newer one, in words, why it was refused."""
        parts = control(MessageType.REFUSE, {"code": "version", "message": "too old", "final": True}, version=9)

        assert Refuse(session=SESSION, code="version", message="too old", final=True) == decode(parts)

    def test_the_session_to_refuse_is_known_in_any_version(self) -> None:
        assert SESSION == session_of([header(MessageType.HELLO, version=9) + bytes(8), b""])

    @pytest.mark.parametrize("parts", [[], [b""], [header(1)[:23]], [header(1, magic=b"GE")]])
    def test_of_what_is_no_message_there_is_no_session(self, parts: list[bytes]) -> None:
        assert NO_SESSION == session_of(parts)

    def test_fields_of_a_later_release_are_passed_over(self) -> None:
        parts = control(MessageType.ACK, {"credit": 5, "invented_later": {"a": [1]}}, first=3)

        assert Ack(session=SESSION, first=3, credit=5) == decode(parts)

    def test_fields_that_are_not_there_have_their_defaults(self) -> None:
        assert Hello(session=SESSION) == decode(control(MessageType.HELLO, {}))
        assert Hello(session=SESSION) == decode([header(MessageType.HELLO)])


class TestFrames:
    def test_end_after_their_last_record(self) -> None:
        assert 46 == frame(first=41, count=5).end

    def test_are_intact_as_long_as_the_checksum_matches(self) -> None:
        assert frame().intact
        assert not frame(body=BODY[:-1] + b"?").intact

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"session": NO_SESSION}, id="no session"),
            pytest.param({"body": b""}, id="empty"),
            pytest.param({"body": bytes(MAX_FRAME_BYTES + 1)}, id="too large"),
            pytest.param({"count": 0}, id="no records"),
            pytest.param({"count": MAX_FRAME_RECORDS + 1, "body": bytes(MAX_FRAME_BYTES)}, id="too many records"),
            pytest.param({"count": 3, "body": b"ab"}, id="more records than bytes"),
            pytest.param({"first": 2**63 - 1, "count": 1}, id="sequences out of range"),
        ],
    )
    def test_beyond_a_limit_are_refused_on_both_sides(self, changes: dict[str, Any]) -> None:
        wrong = frame(**changes)
        raw = header(3, first=wrong.first, count=wrong.count, crc=wrong.crc, session=wrong.session)

        with pytest.raises(LocalProtocolError):
            encode(wrong)
        with pytest.raises(RemoteProtocolError):
            decode([raw, wrong.body])

    def test_at_the_limits_are_carried(self) -> None:
        largest = frame(body=bytes(MAX_FRAME_BYTES), count=MAX_FRAME_RECORDS, first=2**63 - MAX_FRAME_RECORDS - 1)

        assert largest == decode(encode(largest))


class TestControlMessages:
    @pytest.mark.parametrize("count", [0, 3, 4])
    def test_of_another_number_of_parts_are_refused(self, count: int) -> None:
        with pytest.raises(RemoteProtocolError, match="2 parts"):
            decode([header(4), b"\x80", b"", b""][:count])

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            pytest.param(MessageType.ACK, b"\xc1", id="no msgpack"),
            pytest.param(MessageType.ACK, b"\x81", id="cut"),
            pytest.param(MessageType.ACK, b"\x80\x80", id="two values"),
            pytest.param(MessageType.ACK, b"\x90", id="no map"),
            pytest.param(MessageType.ACK, b"\xdf\xff\xff\xff\xff", id="announces more than it has"),
            pytest.param(MessageType.HELLO, b"\x81\xa4node\xa1\xff", id="no UTF-8"),
            pytest.param(MessageType.HELLO, b"\x81\xa4node\xd4\x01\x00", id="ext type"),
            pytest.param(MessageType.HELLO, b"\x81\xa4node\xd6\xff\x00\x00\x00\x00", id="timestamp"),
            pytest.param(MessageType.HELLO, b"\x81\x90\x00", id="list as a key"),
            pytest.param(MessageType.HELLO, b"\x81\xa4node" + b"\x91" * 1100 + b"\x90", id="too deep to unpack"),
            pytest.param(MessageType.HELLO, b"\x81\xa4node" + b"\x91" * 1000 + b"\x90", id="too deep to show"),
            pytest.param(MessageType.HELLO, {"rank": -1}, id="negative count"),
            pytest.param(MessageType.HELLO, {"rank": 2**63}, id="huge count"),
            pytest.param(MessageType.HELLO, {"rank": True}, id="bool as a count"),
            pytest.param(MessageType.HELLO, {"rank": 1.0}, id="float as a count"),
            pytest.param(MessageType.HELLO, {"run": {"id": "a"}}, id="the run of a HELLO is an id"),
            pytest.param(MessageType.HELLO, {"settings": [1]}, id="settings are a map"),
            pytest.param(MessageType.HELLO, {"settings": {1: 2}}, id="settings have names"),
            pytest.param(MessageType.HELLO, {"settings": {"a": nested(MAX_DEPTH)}}, id="settings too deep"),
            pytest.param(MessageType.HELLO, {"dropped": {"a": -1}}, id="negative dropped"),
            pytest.param(MessageType.HELLO, {"dropped": {1: 1}}, id="reasons have names"),
            pytest.param(MessageType.HELLO, {"dropped": {str(n): 1 for n in range(257)}}, id="too many reasons"),
            pytest.param(MessageType.HELLO, {"node": "n" * (MAX_NAME_CHARS + 1)}, id="name too long"),
            pytest.param(MessageType.HELLO, {"launch": None}, id="nil as a name"),
            pytest.param(MessageType.WELCOME, {"run": "abc"}, id="the run of a WELCOME is a map"),
            pytest.param(MessageType.WELCOME, {"run": None}, id="and not nil"),
            pytest.param(MessageType.WELCOME, {"heartbeat_s": 0}, id="interval of nothing"),
            pytest.param(MessageType.WELCOME, {"heartbeat_s": math.nan}, id="interval that is no number"),
            pytest.param(MessageType.WELCOME, {"flush_interval_s": True}, id="bool as an interval"),
            pytest.param(MessageType.WELCOME, {"flush_interval_s": 3600}, id="interval of an hour"),
            pytest.param(MessageType.REFUSE, {"message": "m" * (MAX_TEXT_CHARS + 1)}, id="text too long"),
            pytest.param(MessageType.REFUSE, {"final": 1}, id="number as a flag"),
            pytest.param(MessageType.RUN, {"close": 2**31}, id="huge exit code"),
            pytest.param(MessageType.BYE, {"exit_code": False}, id="bool as an exit code"),
        ],
    )
    def test_beyond_a_limit_are_refused(self, kind: MessageType, body: bytes | dict[Any, Any]) -> None:
        with pytest.raises(RemoteProtocolError):
            decode(control(kind, body))

    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(Hello(session=SESSION, rank=-1), id="count"),
            pytest.param(Hello(session=SESSION, node="n" * (MAX_NAME_CHARS + 1)), id="name"),
            pytest.param(Hello(session=SESSION, settings={"a": "x" * MAX_CONTROL_BYTES}), id="size"),
            pytest.param(Hello(session=SESSION, settings={"a": nested(MAX_DEPTH)}), id="depth"),
            pytest.param(Hello(session=SESSION, settings={"a": object()}), id="not plain"),
            pytest.param(Hello(session=SESSION, settings={"a": 2**64}), id="huge int"),
            pytest.param(Hello(session=SESSION, settings={"a": "\ud800"}), id="no UTF-8"),
            pytest.param(Hello(session=SESSION, run={"id": "a"}), id="run"),  # type: ignore[arg-type]
            pytest.param(Refuse(message="m" * (MAX_TEXT_CHARS + 1)), id="text"),
            pytest.param(RunInfo(close=2**31), id="exit code"),
        ],
    )
    def test_beyond_a_limit_are_not_sent(self, message: Message) -> None:
        with pytest.raises(LocalProtocolError):
            encode(message)

    @pytest.mark.parametrize(
        "message",
        [
            Hello(session=SESSION, node="n" * MAX_NAME_CHARS, settings={"a": nested(MAX_DEPTH - 1)}),
            Refuse(message="m" * MAX_TEXT_CHARS),
            RunInfo(close=-(2**31) + 1),
            Bye(session=SESSION, first=2**63 - 1, dropped={str(n): 1 for n in range(256)}),
        ],
    )
    def test_at_the_limits_are_carried(self, message: Message) -> None:
        assert message == decode(encode(message))

    def test_of_another_checksum_are_refused(self) -> None:
        raw, body = encode(MESSAGES["ack"])

        with pytest.raises(RemoteProtocolError, match="checksum"):
            decode([raw, body[:-1] + bytes([body[-1] ^ 1])])

    def test_announced_lengths_cost_nothing(self) -> None:
        body = b"\x81\xa1a" + b"\xdc\xff\xff" * 1000
        parts = control(MessageType.HELLO, body.ljust(MAX_CONTROL_BYTES, b"\xc0"))

        tracemalloc.start()
        with pytest.raises(RemoteProtocolError):
            decode(parts)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert peak < 2**20

    def test_any_mapping_can_be_sent(self) -> None:
        message = Hello(
            session=SESSION, dropped=MappingProxyType({"a": 1}), settings=MappingProxyType({"b": (1, 2)})
        )

        assert Hello(session=SESSION, dropped={"a": 1}, settings={"b": [1, 2]}) == decode(encode(message))

    def test_of_a_field_that_is_there_twice_the_last_counts(self) -> None:
        parts = control(MessageType.ACK, b"\x82\xa6credit\x01\xa6credit\x02")

        assert Ack(session=SESSION, first=0, credit=2) == decode(parts)

    def test_what_is_said_of_a_bad_value_is_short_and_escaped(self) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(control(MessageType.ACK, {"credit": "\x1b[31m" + "x" * 10_000}))

        assert len(str(caught.value)) < 200
        assert "\x1b" not in str(caught.value)


PLAIN_KEYS = st.text(max_size=20)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PLAIN_KEYS, inner, max_size=4),
    max_leaves=10,
)
COUNTS = st.integers(0, 2**63 - 1)
SESSIONS = st.binary(min_size=16, max_size=16)
COUNTERS = st.dictionaries(PLAIN_KEYS, COUNTS, max_size=5)
MAPS = st.dictionaries(PLAIN_KEYS, PLAIN, max_size=5)
EXIT_CODES = st.none() | st.integers(-255, 255)
ANY_MESSAGE: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello, session=SESSIONS, first=COUNTS, more=st.booleans(), rank=COUNTS, node=PLAIN_KEYS, launch=PLAIN_KEYS,
        run=st.none() | PLAIN_KEYS, offered=COUNTS, dropped=COUNTERS, settings=MAPS,
    ),
    st.builds(Welcome, session=SESSIONS, first=COUNTS, credit=COUNTS, boot=PLAIN_KEYS, run=MAPS),
    st.builds(Ack, session=SESSIONS, first=COUNTS, gap=st.booleans(), credit=COUNTS),
    st.builds(Refuse, session=SESSIONS, code=PLAIN_KEYS, message=PLAIN_KEYS, final=st.booleans()),
    st.builds(RunInfo, session=SESSIONS, info=MAPS, close=EXIT_CODES),
    st.builds(Bye, session=SESSIONS, first=COUNTS, offered=COUNTS, dropped=COUNTERS, exit_code=EXIT_CODES),
    st.builds(Status, session=SESSIONS, more=st.booleans(), offered=COUNTS, dropped=COUNTERS, info=MAPS),
    st.builds(
        Frame, session=SESSIONS.filter(any), first=st.integers(0, 2**62), count=st.just(1),
        body=st.binary(min_size=1, max_size=200), crc=st.integers(0, 2**32 - 1), more=st.booleans(),
    ),
)  # fmt: skip


def survives(parts: list[bytes]) -> None:
    """Nothing but a RemoteProtocolError, or a message that is the same when sent on."""
    try:
        message = decode(parts)
    except RemoteProtocolError:
        return
    again = encode(message)
    assert again == encode(decode(again))


class TestAnything:
    @settings(max_examples=150, deadline=None)
    @given(message=ANY_MESSAGE)
    def test_that_is_sent_arrives(self, message: Message) -> None:
        assert message == decode(encode(message))

    @settings(max_examples=150, deadline=None)
    @given(parts=st.lists(st.binary(max_size=80), max_size=4))
    def test_of_bytes_is_refused_or_read(self, parts: list[bytes]) -> None:
        survives(parts)

    @settings(max_examples=150, deadline=None)
    @given(kind=st.sampled_from(MessageType), body=st.binary(max_size=200), flags=st.integers(0, 2**16 - 1))
    def test_of_bytes_behind_a_good_header_is_refused_or_read(
        self, kind: MessageType, body: bytes, flags: int
    ) -> None:
        survives([header(kind, flags=flags, count=1, crc=zlib.crc32(body)), body])

    @settings(max_examples=150, deadline=None)
    @given(
        kind=st.sampled_from(MessageType),
        body=st.dictionaries(
            st.sampled_from(sorted({field.name for message in MESSAGES.values() for field in fields(message)})),
            PLAIN,
            max_size=6,
        ),
    )
    def test_of_values_in_known_fields_is_refused_or_read(self, kind: MessageType, body: dict[str, Any]) -> None:
        survives(control(kind, body))

    @settings(max_examples=300, deadline=None)
    @given(message=ANY_MESSAGE, data=st.data())
    def test_that_is_mutated_is_refused_or_read(self, message: Message, data: st.DataObject) -> None:
        raw, body = map(bytearray, encode(message))
        for part in (raw, body):
            for at in data.draw(st.lists(st.integers(0, len(part) - 1), max_size=3)):
                part[at] = data.draw(st.integers(0, 255))
        raw[36:40] = zlib.crc32(body).to_bytes(4, "big")

        survives([bytes(raw), bytes(body)])


if __name__ == "__main__":
    regenerate()
