"""One connection to the daemon above: messages in, messages out, wrapped by the hundred.

- `connected` is false as soon as there is nobody to take a message; then nothing is taken as sent
- a handshake that comes to nothing is known by why: only a monitor of libzmq's says that
- a key that is taken from the list of the daemon above is refused on a connection that stands: `barred`
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator

import zmq

from sidestep.endpoint import Endpoint
from sidestep.errors import RemoteProtocolError, SettingsError
from sidestep.sender import OPTIONS, connect
from sidestep.sender.link import FAILURES, Failure
from sidestep.wire import (
    MAX_ENVELOPE_BYTES,
    Message,
    Refuse,
    VersionError,
    Wrapper,
    decode,
    encode,
    is_envelope,
    unwrap,
)

logger = logging.getLogger("sidestepd.upstream")

ANSWERS_AT_ONCE = 256
_MOST_BYTES = MAX_ENVELOPE_BYTES + 4096


class Link:
    """A DEALER socket. Raises SettingsError for an address that is none."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, session: bytes) -> None:
        self.connected = False
        self.endpoint = endpoint
        self.failure: Failure | None = None
        """Why the last handshake came to nothing."""
        self.barred = ""
        """Why nothing that is said on it is heard above, in the words of the daemon there."""
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        for option, value in {**OPTIONS, zmq.MAXMSGSIZE: _MOST_BYTES}.items():
            self.socket.set(option, value)
        self._monitor: zmq.Socket[bytes] | None = None
        if endpoint.address.startswith("tcp:"):
            self._monitor = self.socket.get_monitor_socket(sum(FAILURES))
        self._wrapper = Wrapper(session)
        try:
            connect(self.socket, endpoint)
        except zmq.ZMQError as error:
            self.shut()
            raise SettingsError(f"{endpoint.address} can not be connected to: {error.strerror}") from None

    @property
    def words(self) -> str:
        """Why there is no way on with it; "" if nothing speaks against it."""
        if self.barred:
            return f"refuses us: {self.barred}"
        return self.failure.words(self.endpoint) if self.failure else ""

    def look(self) -> None:
        """See whether somebody is there, and if not, why."""
        self.connected = bool(int(self.socket.get(zmq.EVENTS)) & zmq.POLLOUT)
        while self._monitor is not None and not self.connected:
            try:
                event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.failure = FAILURES.get(int.from_bytes(event[:2], sys.byteorder))

    def send(self, messages: Iterable[Message]) -> bool:
        """Send messages; False if not all of them could be, and none is known to have been."""
        for message in messages:
            parts = encode(message)
            if not self._wrapper.fits(parts) and not self._post():
                return False
            self._wrapper.add(parts)
        return not len(self._wrapper) or self._post()

    def _post(self) -> bool:
        try:
            self.socket.send_multipart(self._wrapper.close(), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[Message]:
        """What has come. What can not be read is said, and passed over."""
        for _ in range(ANSWERS_AT_ONCE):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                for inner in unwrap(parts) if is_envelope(parts) else (parts,):
                    yield decode(inner)
            except VersionError as error:
                yield Refuse(code="version", message=str(error), final=True)
            except RemoteProtocolError as error:
                logger.warning("the daemon above says what can not be read: %s", error)

    def shut(self) -> None:
        """Let go of it."""
        if self._monitor is not None:
            self.socket.disable_monitor()
        self.socket.close(linger=0)
