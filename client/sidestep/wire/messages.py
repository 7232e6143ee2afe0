"""Messages: values on either side, two parts of bytes between them. No sockets, no clock.

    worker                                   daemon
    HELLO  who I am, first unacknowledged ─▶
                                          ◀─ WELCOME  next wanted, credit, the run
    FRAME  records [first, first+count)   ─▶
                                          ◀─ ACK      everything below `wanted` is on disk
    STATUS counters (the heartbeat)       ─▶
    RUN    what is the run?               ─▶
                                          ◀─ RUN      its id, directory, address in the browser
    BYE    that was all                   ─▶
                                          ◀─ BYE      it is on disk
                                          ◀─ REFUSE   no, and why, in words

- `encode` raises LocalProtocolError, `decode` RemoteProtocolError: an error always says whose fault it is
- what `encode` lets out, `decode` lets in: both ask the same checks
- a field that is not known is passed over, one that is not there has its default
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from sidestep.errors import LocalProtocolError, RemoteProtocolError
from sidestep.wire.header import NO_SESSION, Flags, Header, MessageType, checksum, pack, unpack
from sidestep.wire.limits import (
    END_OF_SEQUENCES,
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAME_RECORDS,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_REASONS,
    MAX_TEXT_CHARS,
)
from sidestep.wire.plain import dump, ends, is_plain, load

WORKER, SAMPLER, BLOBS, FILES, RELAY = "worker", "sampler", "blobs", "files", "relay"
"""What a session is."""
LANES = frozenset({BLOBS, FILES})
"""The sessions that send bytes, and say nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Records sent together; immutable once cut. `crc` is that of `body`; see `intact`."""

    session: bytes
    first: int
    count: int
    body: bytes
    crc: int
    more: bool = False

    @property
    def end(self) -> int:
        """The sequence after the last record."""
        return self.first + self.count

    @property
    def intact(self) -> bool:
        """Whether the body is the one that the checksum was made of."""
        return checksum(self.body) == self.crc


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker introduces itself, at first and after every interruption.

    `first` is its first unacknowledged sequence. `settings` are wandb's keywords of `init()`. `offered`,
    `dropped` and `values_refused` are the worker's counters so far: records, records by reason, and values that
    were left out of records. `role` is WORKER; or SAMPLER for one that reads the machine and is no rank: nothing
    waits for it; or BLOBS for the one with which a worker sends the bytes of its media, and FILES for that of the
    process which sends its files, `beside` its own session, which is named in hexadecimal; or RELAY for a daemon
    that passes on what its own workers say. `relay` is then the session of the one that passed this on, in
    hexadecimal. `turn` is the place of a run without an id among those of its launch, from 1 on, where a relay has
    counted; else 0. `pids` names the pid namespace that `pid` is a number of.
    """

    session: bytes
    first: int = 0
    more: bool = False
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    node: str = ""
    pid: int = 0
    launch: str = ""
    attempt: int = 0
    run: str | None = None
    client: str = ""
    offered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    values_refused: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    role: str = WORKER
    beside: str = ""
    relay: str = ""
    turn: int = 0
    pids: str = ""

    TYPE: ClassVar = MessageType.HELLO


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The daemon's answer: `first` is the sequence it wants next, `credit` bytes may be unacknowledged.

    `sample_interval_s` is how often it wants to hear of torch's allocator; 0 for never.
    """

    session: bytes
    first: int
    boot: str = ""
    credit: int = 0
    flush_interval_s: float = 0.02
    heartbeat_s: float = 5.0
    sample_interval_s: float = 0.0
    run: Mapping[str, Any] = field(default_factory=dict)

    TYPE: ClassVar = MessageType.WELCOME


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Everything below `first` is on the daemon's disk. `gap`: send again from there."""

    session: bytes
    first: int
    gap: bool = False
    credit: int = 0

    TYPE: ClassVar = MessageType.ACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """No. `code` is for programs, `message` for people; `final` means that trying again will not help."""

    session: bytes = NO_SESSION
    code: str = ""
    message: str = ""
    final: bool = False

    TYPE: ClassVar = MessageType.REFUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Asked with nothing, answered with what only the daemon knows: `info` of the run.

    From the supervisor, `close` is the exit code with which the run shall be finished.
    """

    session: bytes = NO_SESSION
    info: Mapping[str, Any] = field(default_factory=dict)
    close: int | None = None

    TYPE: ClassVar = MessageType.RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """A session's last word: `first` is the sequence after its last record. The daemon answers the same.

    `lost`: a relay says it of a session that ended without a word.
    """

    session: bytes
    first: int
    offered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    values_refused: int = 0
    exit_code: int | None = None
    lost: bool = False

    TYPE: ClassVar = MessageType.BYE


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """From a worker its heartbeat, with its counters; from a tool a question; from the daemon the answer.

    From a relay `info` may say what a session does not say itself: `vital`, one of "quiet", "heard", "gone", and
    `since_s`, how many seconds ago that began.
    """

    session: bytes = NO_SESSION
    more: bool = False
    offered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    values_refused: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)

    TYPE: ClassVar = MessageType.STATUS


@dataclass(frozen=True, slots=True)
class Acks:
    """An ACK for each of many sessions: with the sequence that is wanted next of it, and the same credit."""

    reached: Sequence[tuple[bytes, int]]
    credit: int

    def encode(self) -> list[list[bytes]]:
        """Each as it would be by itself, in its parts. There is one for each frame, so this is done quickly."""
        body, crc = _body_of_ack(self.credit)
        return [[pack(_ACK, 0, session, first, 0, crc), body] for session, first in self.reached]


Control = Hello | Welcome | Ack | Refuse | RunInfo | Bye | Status
Message = Control | Frame


def encode(message: Message) -> list[bytes]:
    """Turn a message into its parts."""
    if isinstance(message, Frame):
        return _encode_frame(message)
    body = _body(type(message), {name: getattr(message, name) for name in _CHECKS[type(message)]})
    header = Header(
        type=message.TYPE,
        flags=_flags(message),
        session=message.session,
        first=getattr(message, "first", 0),
        crc=checksum(body),
    )
    return [header.pack(), body]


def decode(parts: Sequence[bytes]) -> Message:
    """Turn parts into a message, checking every bound."""
    if not 1 <= len(parts) <= MAX_PARTS:
        raise RemoteProtocolError(f"a message has {MAX_PARTS} parts, this one {len(parts)}")
    header = unpack(parts[0])
    body = parts[1] if len(parts) > 1 else b""
    if header.type is MessageType.FRAME:
        return _decode_frame(header, body)
    if header.type is MessageType.ENVELOPE:
        raise RemoteProtocolError("an ENVELOPE is between a relay and its daemon, and never inside another")
    return _decode_control(header, body)


def _body(kind: type[Control], fields: Mapping[str, Any]) -> bytes:
    try:
        body = dump({name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()})
        _check_size(kind, body)
        _fields(kind, body)
    except (TypeError, ValueError, OverflowError, RemoteProtocolError) as error:
        raise LocalProtocolError(f"a message that can not be sent: {error}") from error
    return body


def _encode_frame(frame: Frame) -> list[bytes]:
    if (fault := frame_fault(frame.session, frame.first, frame.count, len(frame.body))) is not None:
        raise LocalProtocolError(fault)
    return [
        pack(MessageType.FRAME, frame.more, frame.session, frame.first, frame.count, frame.crc),
        frame.body,
    ]


@lru_cache(maxsize=256, typed=True)
def _body_of_ack(credit: int) -> tuple[bytes, int]:
    body = _body(Ack, {"credit": credit})
    return body, checksum(body)


def _decode_frame(header: Header, body: bytes) -> Frame:
    if (fault := frame_fault(header.session, header.first, header.count, len(body))) is not None:
        raise RemoteProtocolError(fault)
    return Frame(
        session=header.session,
        first=header.first,
        count=header.count,
        body=body,
        crc=header.crc,
        more=Flags.MORE in header.flags,
    )


def frame_fault(session: bytes, first: int, count: int, size: int) -> str | None:
    """What is wrong with a FRAME by its header and the size of its body, if anything."""
    if session == NO_SESSION:
        return "a FRAME without a session"
    if not 0 < size <= MAX_FRAME_BYTES:
        return f"a FRAME of {size} bytes; 1 to {MAX_FRAME_BYTES} are allowed"
    if not 0 < count <= MAX_FRAME_RECORDS or count > size:
        return f"a FRAME that announces {count} records in {size} bytes"
    if first + count >= END_OF_SEQUENCES:
        return f"a FRAME whose sequence {first} is out of range"
    return None


def _decode_control(header: Header, body: bytes) -> Control:
    kind = _TYPES[header.type]
    _check_size(kind, body)
    if checksum(body) != header.crc:
        raise RemoteProtocolError(f"a {header.type.name} whose checksum does not match its body")
    values = _fields(kind, body)
    values["session"] = header.session
    for name, value in (
        ("first", header.first),
        ("more", Flags.MORE in header.flags),
        ("gap", Flags.GAP in header.flags),
    ):
        if name in kind.__dataclass_fields__:
            values[name] = value
    return kind(**values)


def _check_size(kind: type[Control], body: bytes) -> None:
    if len(body) > MAX_CONTROL_BYTES:
        raise RemoteProtocolError(f"a {kind.TYPE.name} of {len(body)} bytes; {MAX_CONTROL_BYTES} is the limit")


def _fields(kind: type[Control], body: bytes) -> dict[str, Any]:
    """The fields that a body holds, each one checked."""
    name = kind.TYPE.name
    checks = _CHECKS[kind]
    values = {key: value for key, value in _map(name, body).items() if key in checks}
    for key, value in values.items():
        if not checks[key](value):
            raise RemoteProtocolError(f"a {name} whose {key} is {reprlib.repr(value):.80}")
    return values


def _map(name: str, body: bytes) -> dict[Any, Any]:
    if not body:
        return {}
    if ends(body, 1) != [len(body)]:
        raise RemoteProtocolError(f"a {name} whose body is not one msgpack value")
    try:
        values = load(body)
    except ValueError as error:
        raise RemoteProtocolError(f"a {name} whose body can not be read: {error!r:.80}") from error
    if not isinstance(values, dict):
        raise RemoteProtocolError(f"a {name} whose body is no map")
    return values


def _flags(message: Message) -> Flags:
    flags = Flags.NONE
    if getattr(message, "more", False):
        flags |= Flags.MORE
    if getattr(message, "gap", False):
        flags |= Flags.GAP
    return flags


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < END_OF_SEQUENCES


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARS


def _is_name_or_none(value: Any) -> bool:
    return value is None or _is_name(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_exit_code(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) < 2**31)


def _is_interval(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 3600


def _is_interval_or_zero(value: Any) -> bool:
    return (type(value) in (int, float) and value == 0) or _is_interval(value)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value) and is_plain(value)


def _is_counts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_REASONS
        and all(_is_name(reason) and _is_count(count) for reason, count in value.items())
    )


_COUNTERS = {"offered": _is_count, "dropped": _is_counts, "values_refused": _is_count}
_CHECKS: Mapping[type[Control], Mapping[str, Callable[[Any], bool]]] = {
    Hello: {
        **dict.fromkeys(("rank", "world", "local_rank", "pid", "attempt", "turn"), _is_count),
        **dict.fromkeys(("node", "launch", "client", "role", "beside", "relay", "pids"), _is_name),
        "run": _is_name_or_none,
        "settings": _is_map,
        **_COUNTERS,
    },
    Welcome: {
        "boot": _is_name,
        "credit": _is_count,
        "flush_interval_s": _is_interval,
        "heartbeat_s": _is_interval,
        "sample_interval_s": _is_interval_or_zero,
        "run": _is_map,
    },
    Ack: {"credit": _is_count},
    Refuse: {"code": _is_name, "message": _is_text, "final": _is_flag},
    RunInfo: {"info": _is_map, "close": _is_exit_code},
    Bye: {"exit_code": _is_exit_code, "lost": _is_flag, **_COUNTERS},
    Status: {"info": _is_map, **_COUNTERS},
}
"""The fields of each body; the others travel in the header."""
_ACK = int(MessageType.ACK)
_TYPES: Mapping[MessageType, type[Control]] = {kind.TYPE: kind for kind in _CHECKS}
