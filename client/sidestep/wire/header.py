"""The fixed 40 bytes before every body.

- magic, version, type and session lie where every version will look for them, and a REFUSE is laid out the same
  in all versions: whoever is too old or too new can still be told so in words
- `first` counts records: of a FRAME the sequence of its first, of an ACK the one wanted next
- the crc is of the body and travels with it into the spool, to be checked again when it is read there
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from sidestep.errors import LocalProtocolError, RemoteProtocolError
from sidestep.wire.limits import END_OF_SEQUENCES, OLDEST_VERSION, VERSION

MAGIC = b"SS"
LAYOUT = struct.Struct("!2sBBHxx16sQII")
NO_SESSION = bytes(16)
"""The session of a peer that is no worker: `sidestep status`, the supervisor."""


class VersionError(RemoteProtocolError):
    """The peer speaks a version that this side does not. Final: only another installation heals it."""


class MessageType(IntEnum):
    """What a message is for."""

    HELLO = 1
    WELCOME = 2
    FRAME = 3
    ACK = 4
    REFUSE = 5
    RUN = 6
    BYE = 7
    STATUS = 8
    ENVELOPE = 9
    """Messages of many sessions in one, between a relay and the daemon above it: envelope.py."""


class Flags(IntFlag):
    """One bit each; those of a later release are kept and mean nothing."""

    NONE = 0
    MORE = 1
    """More is queued behind this: the sender has not caught up."""
    GAP = 2
    """On an ACK: what arrived is beyond what is wanted; send again from `first`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The values of the fixed part, in their order on the wire."""

    version: int = VERSION
    type: MessageType
    flags: Flags = Flags.NONE
    session: bytes = NO_SESSION
    first: int = 0
    count: int = 0
    crc: int = 0

    def pack(self) -> bytes:
        """Lay the header out in its 40 bytes, big-endian, or raise LocalProtocolError."""
        return pack(self.type, self.flags, self.session, self.first, self.count, self.crc, version=self.version)


def pack(
    kind: int, flags: int, session: bytes, first: int, count: int, crc: int, *, version: int = VERSION
) -> bytes:
    """A header in its 40 bytes, or raise LocalProtocolError."""
    if len(session) != len(NO_SESSION) or not 0 <= first < END_OF_SEQUENCES:
        raise LocalProtocolError(f"a header with session {session!r:.40} and sequence {first}")
    try:
        return LAYOUT.pack(MAGIC, version, kind, flags, session, first, count, crc)
    except struct.error as error:
        raise LocalProtocolError(f"a header that can not be packed: {error}") from error


def unpack(raw: bytes) -> Header:
    """Read 40 bytes, or raise RemoteProtocolError in words fit for the peer's log."""
    if raw[:2] != MAGIC or len(raw) < 4:
        raise RemoteProtocolError("this is not the sidestep protocol")
    version, kind = raw[2], raw[3]
    if not OLDEST_VERSION <= version <= VERSION and kind != MessageType.REFUSE:
        raise VersionError(
            f"the peer speaks protocol version {version}, this side {OLDEST_VERSION} to {VERSION}: "
            "install the same release of sidestep on both sides"
        )
    if len(raw) != LAYOUT.size:
        raise RemoteProtocolError(f"a header has {LAYOUT.size} bytes, this one {len(raw)}")
    type_ = _TYPES.get(kind)
    if type_ is None:
        raise RemoteProtocolError(f"message type {kind} is unknown in version {version}")
    flags, session, first, count, crc = LAYOUT.unpack(raw)[3:]
    if first >= END_OF_SEQUENCES:
        raise RemoteProtocolError(f"sequence {first} is out of range")
    return Header(
        version=version,
        type=type_,
        flags=_FLAGS[flags] if flags < len(_FLAGS) else Flags(flags),
        session=session,
        first=first,
        count=count,
        crc=crc,
    )


def session_of(parts: Sequence[bytes]) -> bytes:
    """The session that a message is from, as far as it can be told: without it a refusal is not heard."""
    raw = parts[0] if parts else b""
    return raw[_SESSION] if raw[:2] == MAGIC and len(raw) >= _SESSION.stop else NO_SESSION


def version_of(parts: Sequence[bytes]) -> int:
    """The version that a message says it is of; ours for what is no message."""
    raw = parts[0] if parts else b""
    return raw[2] if len(raw) > 2 and raw[:2] == MAGIC else VERSION


def spoken_in(version: int, parts: Sequence[bytes]) -> list[bytes]:
    """The same message in an older version. As yet nothing but the number differs."""
    raw, *rest = parts
    return [raw[:2] + bytes((version,)) + raw[3:], *rest]


def checksum(body: bytes) -> int:
    """The crc32 of a body."""
    return zlib.crc32(body)


_TYPES = {int(kind): kind for kind in MessageType}
_FLAGS = tuple(map(Flags, range(int(Flags.MORE | Flags.GAP) + 1)))
"""Looked up, since making one takes as long as all else of a header."""
_SESSION = slice(8, 24)
