"""Who is let in over tcp: CURVE proves who holds which key, ZAP asks here whether that key is on the list.

- the domain is enforced: without an answer from here nobody is let in, whatever becomes of this handler
- one ROUTER serves both the node's socket, bound before without keys, and tcp: libzmq takes a socket's options as
  they are when it is bound
- a key that leaves the list is refused with its next message, on a connection that stands too
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import zmq

from sidestep.endpoint import KeyFile
from sidestep.sender import require_curve
from sidestepd.clients import LOCAL, Clients

logger = logging.getLogger("sidestepd.intake")

ZAP = "inproc://zeromq.zap.01"
DOMAIN = b"sidestep"
LOOK_EVERY_S = 1.0
STRANGERS_REMEMBERED = 1000
"""Each is told of once."""


class Gate:
    """The guard of one context's tcp sockets. To be opened inside the event loop, before anything is bound."""

    def __init__(self, context: zmq.Context[Any], *, key_file: Path, clients: Path) -> None:
        """Raises SettingsError for keys or a list that can not be used."""
        require_curve()
        self.keys = KeyFile.read(key_file).pair
        self.clients = Clients(clients)
        self.refused = 0
        self._strangers: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._inbox = asyncio.Event()

    def open(self) -> None:
        """Begin to answer."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._answer_all)
        self._look(loop)

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """What is bound to this socket from now on lets in by key alone."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, bytes.fromhex(self.keys.secret))
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def who(self, frame: zmq.Frame) -> str | None:
        """The name of who sent this; None if its key is no longer on the list."""
        try:
            return self.clients.name_of(str(frame.get("User-Id")))
        except zmq.ZMQError:  # not by tcp
            return LOCAL

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.clients.look()
        self._answer_all()  # the descriptor tells of changes only
        loop.call_later(LOOK_EVERY_S, self._look, loop)

    def _answer_all(self) -> None:
        while not self._socket.closed:
            try:
                request = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._socket.send_multipart(self._judge(request))

    def _judge(self, request: list[bytes]) -> list[bytes]:
        """A reply as RFC 27 has it; the key becomes the sender's user id, which is looked up with each message."""
        version, id_, domain, address, _, mechanism, *credentials = request
        key = credentials[0].hex() if mechanism == b"CURVE" and credentials else ""
        if version == b"1.0" and domain == DOMAIN and self.clients.name_of(key) is not None:
            return [b"1.0", id_, b"200", b"OK", key.encode(), b""]
        self._refuse(address.decode(errors="replace"), key)
        return [b"1.0", id_, b"400", b"this key is not on the list", b"", b""]

    def _refuse(self, address: str, key: str) -> None:
        self.refused += 1
        if (address, key) not in self._strangers:
            self._strangers[address, key] = None
            logger.warning("%s is refused: its key %s is not in %s", address, key or "(none)", self.clients.path)
        while len(self._strangers) > STRANGERS_REMEMBERED:
            self._strangers.popitem(last=False)
