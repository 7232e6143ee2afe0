"""Many messages in one: what a relay and the daemon above it say to each other.

    ┌──────────────────┬───────────────────────────────────────────────┐
    │ ENVELOPE header  │ length, header, body │ length, header, body │ … │
    └──────────────────┴───────────────────────────────────────────────┘

- the messages inside are what they would be by themselves, byte for byte; none of them is an ENVELOPE
- a receiver pays for one message of the socket where there would have been hundreds; and FRAMEs, which are nearly
  all of what is in it, it may take together, without building each
- each side's bounds hold for the whole: `Wrapper` closes an envelope before it would exceed them
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sidestep.errors import RemoteProtocolError
from sidestep.wire.header import LAYOUT, MAGIC, NO_SESSION, Flags, Header, MessageType, checksum, unpack
from sidestep.wire.limits import MAX_ENVELOPE_BYTES, MAX_ENVELOPE_MESSAGES, OLDEST_VERSION, VERSION
from sidestep.wire.messages import frame_fault

_LENGTH = struct.Struct("!I")
_HEAD = _LENGTH.size + LAYOUT.size
HEAD = struct.Struct("!I" + LAYOUT.format.removeprefix("!"))
"""What stands before the body of each message in it: its length and its header."""


class Wrapped(NamedTuple):
    """A FRAME within the body of an envelope: what its header says, and where it lies from its length on."""

    session: bytes
    first: int
    records: int
    more: bool
    start: int
    end: int

    def parts(self, body: bytes) -> list[bytes]:
        """It as a message of its own."""
        return _parts(body, self.start, self.end)


class Wrapper:
    """Gathers encoded messages until they fill an envelope."""

    def __init__(self, session: bytes = NO_SESSION) -> None:
        self._session = session
        self._pieces: list[bytes] = []
        self._count = self._size = 0

    def fits(self, parts: Sequence[bytes]) -> bool:
        """Whether an encoded message may still be added; the first always may."""
        size = self._size + _HEAD + (len(parts[1]) if len(parts) > 1 else 0)
        return not self._count or (size <= MAX_ENVELOPE_BYTES and self._count < MAX_ENVELOPE_MESSAGES)

    def add(self, parts: Sequence[bytes]) -> None:
        """Add an encoded message that fits."""
        header, body = parts[0], parts[1] if len(parts) > 1 else b""
        self._pieces += (_LENGTH.pack(len(body)), header, body)
        self._size += _HEAD + len(body)
        self._count += 1

    def __len__(self) -> int:
        """How many messages are in it."""
        return self._count

    def close(self) -> list[bytes]:
        """The envelope, in its parts; after this it is empty."""
        body, count = b"".join(self._pieces), self._count
        self._pieces, self._count, self._size = [], 0, 0
        header = Header(type=MessageType.ENVELOPE, session=self._session, count=count, crc=checksum(body))
        return [header.pack(), body]


def is_envelope(parts: Sequence[bytes]) -> bool:
    """Whether a message says that it is one; told from its first bytes, and cheaply."""
    raw = parts[0] if parts else b""
    return len(raw) > 3 and raw[3] == MessageType.ENVELOPE and raw[:2] == MAGIC


def unwrap(parts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The messages inside, each in its parts. Raises RemoteProtocolError."""
    body, count = _checked(parts)
    return (_parts(body, start, end) for start, end in _extents(body, count))


def contents(parts: Sequence[bytes]) -> Iterator[Wrapped | list[bytes]]:
    """The same, but FRAMEs that keep all limits are only told of. Raises RemoteProtocolError."""
    return _told(*_checked(parts))


def _told(body: bytes, count: int) -> Iterator[Wrapped | list[bytes]]:
    for start, end in _extents(body, count):
        _, magic, version, kind, flags, session, first, records, _ = HEAD.unpack_from(body, start)
        is_frame = kind == MessageType.FRAME and magic == MAGIC and OLDEST_VERSION <= version <= VERSION
        if is_frame and frame_fault(session, first, records, end - start - _HEAD) is None:
            yield Wrapped(session, first, records, flags & _MORE != 0, start, end)
        else:
            yield _parts(body, start, end)


def _parts(body: bytes, start: int, end: int) -> list[bytes]:
    after = start + _HEAD
    return [body[start + _LENGTH.size : after], body[after:end]]


def _checked(parts: Sequence[bytes]) -> tuple[bytes, int]:
    header = unpack(parts[0])
    if len(parts) != 2:
        raise RemoteProtocolError(f"an ENVELOPE has 2 parts, this one {len(parts)}")
    body = parts[1]
    if len(body) > MAX_ENVELOPE_BYTES or not 0 < header.count <= MAX_ENVELOPE_MESSAGES:
        raise RemoteProtocolError(f"an ENVELOPE of {len(body)} bytes with {header.count} messages")
    if checksum(body) != header.crc:
        raise RemoteProtocolError("an ENVELOPE whose checksum does not match its body")
    return body, header.count


def _extents(body: bytes, count: int) -> Iterator[tuple[int, int]]:
    at, size = 0, len(body)
    for _ in range(count):
        start = at + _HEAD
        end = start + _LENGTH.unpack_from(body, at)[0] if start <= size else size + 1
        if end > size:
            raise RemoteProtocolError("an ENVELOPE that ends within a message")
        yield at, end
        at = end
    if at != size:
        raise RemoteProtocolError(f"an ENVELOPE with {size - at} bytes behind its last message")


_MORE = int(Flags.MORE)
