"""The sender's socket: connected as an endpoint says, and watched for handshakes that come to nothing.

- over tcp with keys both ends prove who they are (CURVE); libzmq says only to a monitor why that failed, tries
  some failures again by itself and others never
- `connect` is also how the daemon's own tools speak to a daemon
"""

from __future__ import annotations

import select
import socket as sockets
import sys
from enum import Enum
from math import ceil

import zmq

from sidestep.endpoint import Endpoint
from sidestep.errors import SettingsError
from sidestep.wire import MAX_CONTROL_BYTES

OPTIONS = {
    zmq.IMMEDIATE: 1,  # nothing is queued for a peer that is not there
    zmq.LINGER: 0,  # flushing is ours, with a deadline
    zmq.SNDHWM: 64,
    zmq.RCVHWM: 64,
    zmq.RECONNECT_IVL: 50,  # milliseconds, as all below; libzmq adds up to as much again
    zmq.RECONNECT_IVL_MAX: 500,
    zmq.CONNECT_TIMEOUT: 3000,
    zmq.HANDSHAKE_IVL: 15_000,
    # No HEARTBEAT_IVL: where a peer is gone while more waits to be read than RCVHWM allows, libzmq 4.3.5 aborts
    # the process at the next heartbeat. The kernel finds dead links too, and the dialogue asks who is silent.
    zmq.TCP_MAXRT: 6000,
    zmq.TCP_KEEPALIVE_IDLE: 5,  # seconds, as the next
    zmq.TCP_KEEPALIVE_INTVL: 2,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.MAXMSGSIZE: MAX_CONTROL_BYTES + 1024,
    zmq.TCP_KEEPALIVE: 1,
}


class Bell:
    """Wakes the sender from any thread. Socket objects, because a late ring on a closed one is harmless."""

    def __init__(self) -> None:
        self._ear, self._hand = sockets.socketpair()
        self._ear.setblocking(False)
        self._hand.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._ear, select.POLLIN)

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake; a bell that rings already is left alone."""
        try:
            self._hand.send(b"\0")
        except OSError:
            pass

    def wait(self, seconds: float) -> None:
        """Sleep until it rings."""
        if self._poll.poll(ceil(seconds * 1000)):
            self.silence()

    def silence(self) -> None:
        """Forget that it rang."""
        try:
            self._ear.recv(4096)
        except OSError:
            pass

    def close(self) -> None:
        """Give the descriptors back."""
        self._ear.close()
        self._hand.close()


class Failure(Enum):
    """Why a handshake came to nothing."""

    KEY = "the daemon refuses our key"
    MECHANISM = "one side has a key, and the other none"
    UNSAID = "the daemon hung up"

    @property
    def told(self) -> bool:
        """Whether the daemon gave its reason, and will not change its mind by itself."""
        return self is not Failure.UNSAID

    def words(self, endpoint: Endpoint) -> str:
        """What is wrong, and what to do."""
        if endpoint.own is None or not endpoint.is_secured:
            return "wants a key of its workers: SIDESTEP_KEY_FILE shall name one that its list of clients has"
        if self is Failure.KEY:
            return f"does not know the key of this worker: its list of clients lacks {endpoint.own.public}"
        if self is Failure.MECHANISM:
            return "speaks without keys, and this worker with one: take away SIDESTEP_KEY_FILE, or give it --keys"
        return (
            f"hangs up: it does not have the key {endpoint.server_key}, by which this worker's key file knows it, "
            "or is too busy to answer"
        )


def connect(socket: zmq.Socket[bytes], endpoint: Endpoint) -> None:
    """Connect a socket as an endpoint says. Raises SettingsError where libzmq can not do that."""
    socket.set(zmq.IPV6, int(endpoint.address.startswith("tcp:")))
    if endpoint.is_secured and endpoint.own is not None:
        require_curve()
        socket.set(zmq.CURVE_SERVERKEY, bytes.fromhex(endpoint.server_key))
        socket.set(zmq.CURVE_PUBLICKEY, bytes.fromhex(endpoint.own.public))
        socket.set(zmq.CURVE_SECRETKEY, bytes.fromhex(endpoint.own.secret))
    socket.connect(endpoint.address)


def require_curve() -> None:
    """Raise SettingsError where libzmq was built without encryption."""
    if not zmq.has("curve"):
        raise SettingsError(
            f"libzmq {zmq.zmq_version()} of this Python was built without CURVE: "
            "`pip install --force-reinstall pyzmq` takes a wheel that has it"
        )


FAILURES = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): Failure.KEY,
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): Failure.MECHANISM,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): Failure.UNSAID,
}


class Link:
    """One socket, its context, and the bell beside it.

    `connected`: a daemon is there, with room for a message to it. `heard`: something has come. `failure`: why the
    last handshake came to nothing, on tcp; libzmq itself says nothing of it, and tries some again and others not.
    As of `look`.
    """

    def __init__(self, endpoint: Endpoint | None, bell: Bell) -> None:
        self.connected = self.heard = False
        self.failure: Failure | None = None
        self._bell = bell
        self._context = zmq.Context(io_threads=1)
        self._monitor: zmq.Socket[bytes] | None = None
        try:
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
            for option, value in OPTIONS.items():
                self._socket.set(option, value)
            if endpoint is not None:
                if endpoint.address.startswith("tcp:"):
                    self._monitor = self._socket.get_monitor_socket(sum(FAILURES))
                connect(self._socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._poller = zmq.Poller()
        self._poller.register(bell.fileno(), zmq.POLLIN)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def look(self) -> None:
        """See how things are; once a turn, since it costs microseconds."""
        events = int(self._socket.get(zmq.EVENTS))
        self.connected = bool(events & zmq.POLLOUT)
        self.heard = bool(events & zmq.POLLIN)
        while self._monitor is not None and not self.connected:
            try:
                event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self.failure = FAILURES.get(int.from_bytes(event[:2], sys.byteorder))

    def wait_for_connection(self, seconds: float) -> None:
        """Sleep until a message could be sent or has come, or the bell rings."""
        self._wait(zmq.POLLIN | zmq.POLLOUT, seconds)

    def wait_for_answer(self, seconds: float) -> None:
        """Sleep until a message has come, or the bell rings."""
        self._wait(zmq.POLLIN, seconds)

    def send(self, parts: list[bytes]) -> bool:
        """Hand a message to libzmq, if it takes one."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        """A message that has come, if one has."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _wait(self, events: int, seconds: float) -> None:
        self._poller.register(self._socket, events)
        if any(ready == self._bell.fileno() for ready, _ in self._poller.poll(ceil(seconds * 1000))):
            self._bell.silence()
