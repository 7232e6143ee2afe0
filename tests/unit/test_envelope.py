"""Many messages in one: what goes in comes out, and whatever else a peer may send is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.errors import RemoteProtocolError
from sidestep.wire import (
    MAX_ENVELOPE_BYTES,
    MAX_ENVELOPE_MESSAGES,
    MAX_FRAME_BYTES,
    Ack,
    Acks,
    Frame,
    Status,
    Wrapped,
    Wrapper,
    contents,
    decode,
    encode,
    is_envelope,
    unwrap,
)
from sidestep.wire.header import Header, MessageType, checksum

GOLDEN = Path(__file__).parents[1] / "data" / "wire" / "envelope.hex"
SESSION = bytes(range(16))
MESSAGES = [encode(Ack(session=SESSION, first=7, credit=1)), encode(Status(session=bytes(15) + b"x", offered=3))]


SIZES = st.integers(1, 40)


def frame(size: int, first: int, *, more: bool = False) -> Frame:
    body = bytes([size]) * size
    return Frame(session=SESSION, first=first, count=size, body=body, crc=checksum(body), more=more)


def wrapped(messages: list[list[bytes]]) -> list[bytes]:
    wrapper = Wrapper(SESSION)
    for parts in messages:
        assert wrapper.fits(parts)
        wrapper.add(parts)
    return wrapper.close()


def envelope(body: bytes, count: int, crc: int | None = None) -> list[bytes]:
    crc = checksum(body) if crc is None else crc
    return [Header(type=MessageType.ENVELOPE, session=SESSION, count=count, crc=crc).pack(), body]


class TestEnvelope:
    def test_is_laid_out_as_the_golden_one(self):
        lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]

        assert bytes.fromhex("".join(lines)) == b"".join(wrapped(MESSAGES))

    def test_is_told_from_other_messages(self):
        assert is_envelope(wrapped(MESSAGES))
        assert not any(is_envelope(parts) for parts in (*MESSAGES, [], [b""], [b"SS\x01"]))

    @given(
        st.lists(st.tuples(st.binary(min_size=40, max_size=40), st.binary(max_size=50)), min_size=1, max_size=9)
    )
    def test_gives_what_was_put_in(self, messages: list[tuple[bytes, bytes]]):
        parts = [list(message) for message in messages]

        assert parts == list(unwrap(wrapped(parts)))

    @given(
        st.lists(
            st.one_of(
                st.sampled_from(MESSAGES),
                st.builds(
                    lambda size, first, more: encode(frame(size, first, more=more)), SIZES, SIZES, st.booleans()
                ),
                st.builds(lambda size, first: [*encode(frame(size, first))[:1], b""], SIZES, SIZES),
            ),
            min_size=1,
            max_size=9,
        )
    )
    def test_tells_of_frames_what_decoding_them_would(self, messages: list[list[bytes]]):
        """And gives all else as it is: also a FRAME that is none, so that it is refused in words."""
        parts = wrapped(messages)

        found = list(contents(parts))

        assert messages == [it.parts(parts[1]) if isinstance(it, Wrapped) else it for it in found]
        for it, message in zip(found, messages, strict=True):
            if not isinstance(it, Wrapped):
                assert message in MESSAGES or not message[1]
                continue
            said = decode(message)
            assert isinstance(said, Frame)
            assert (said.session, said.first, said.count, said.more) == it[:4]

    @pytest.mark.parametrize(
        "change",
        [(4, b"XX"), (6, b"\x07"), (7, b"\x63"), (12, bytes(16)), (28, b"\xff"), (36, bytes(4)), (36, b"\xff")],
    )
    def test_leaves_a_frame_that_breaks_a_limit_to_be_refused(self, change: tuple[int, bytes]):
        at, what = change
        _, body = wrapped([encode(frame(5, 1))])
        body = body[:at] + what + body[at + len(what) :]

        (found,) = contents(envelope(body, 1))

        with pytest.raises(RemoteProtocolError):
            decode(found)

    def test_takes_no_more_than_the_other_side_does(self):
        wrapper, large = Wrapper(), [bytes(40), bytes(MAX_FRAME_BYTES)]
        wrapper.add(large)
        many = Wrapper()
        for _ in range(MAX_ENVELOPE_MESSAGES):
            many.add([bytes(40), b""])

        assert not wrapper.fits(large)
        assert wrapper.fits([bytes(40), bytes(MAX_ENVELOPE_BYTES - MAX_FRAME_BYTES - 88)])
        assert not many.fits([bytes(40), b""])

    @given(st.binary(max_size=200), st.integers(0, 5))
    def test_of_rubbish_is_refused_or_read_to_its_end(self, body: bytes, count: int):
        try:
            found = list(unwrap(envelope(body, count)))
        except RemoteProtocolError:
            return

        assert count == len(found)
        assert len(body) == sum(4 + len(header) + len(inner) for header, inner in found)

    def test_that_was_changed_under_way_is_refused(self):
        head, body = wrapped(MESSAGES)

        with pytest.raises(RemoteProtocolError, match="checksum"):
            unwrap([head, body[:-1] + b"?"])

    def test_that_is_too_much_is_refused(self):
        with pytest.raises(RemoteProtocolError, match="bytes with"):
            unwrap(envelope(bytes(MAX_ENVELOPE_BYTES + 1), 1))


class TestAcksOfMany:
    @given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**62))), SIZES)
    def test_are_what_each_would_be_by_itself(self, reached: list[tuple[bytes, int]], credit: int):
        each = [encode(Ack(session=session, first=first, credit=credit)) for session, first in reached]

        assert each == Acks(reached, credit).encode()
