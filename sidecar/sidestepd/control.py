"""Ask a daemon, and wait for its answer: a few questions, each with a deadline.

Every question has a connection of its own: a daemon that was killed and started again in between is simply
asked again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from sidestep.endpoint import Endpoint, KeyFile, endpoints
from sidestep.errors import RemoteProtocolError
from sidestep.sender import connect
from sidestep.wire import Control as ControlMessage
from sidestep.wire import Message, RunInfo, Status, decode, encode

STUCK_S = 30.0
"""A disk that has not answered for so long is trouble to who asks."""
_RECONNECT_MS = 50


def endpoint_at(address: str, key_file: Path | None) -> Endpoint:
    """The daemon there, as a tool speaks to it: with the first of the daemons' keys that our key file names."""
    return endpoints(address, KeyFile.read(key_file) if key_file and address.startswith("tcp:") else None)[0]


def unwell(info: Mapping[str, Any] | None, stuck_s: float = STUCK_S) -> str:
    """What is wrong with a daemon that answered `info`; "" if nothing is. To answer alone proves no health."""
    if info is None:
        return "it does not answer"
    silent_s = float(info.get("silent_s", 0.0))
    return f"its disk has not answered for {silent_s:.0f} s" if silent_s > stuck_s else ""


class Control:
    """A client of a daemon that is no worker; an address alone is one that needs no keys."""

    def __init__(self, endpoint: Endpoint | str) -> None:
        self._endpoint = Endpoint(address=endpoint) if isinstance(endpoint, str) else endpoint
        self._context = zmq.Context()
        self.files: Mapping[str, Any] = {}
        """What `close_run` was told of files that are still on their way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Let go of the socket library's thread."""
        self._context.destroy(linger=0)

    def ask_status(self, timeout_s: float = 1.0) -> Mapping[str, Any] | None:
        """How the daemon is, or None if it does not say in time."""
        answer = self._ask(Status(), Status, timeout_s)
        return answer.info if isinstance(answer, Status) else None

    def close_run(self, exit_code: int, timeout_s: float = 1.0) -> bool:
        """Have the run finished with `exit_code`; True once the daemon has that on disk."""
        answer = self._ask(RunInfo(close=exit_code), RunInfo, timeout_s)
        if not isinstance(answer, RunInfo):
            return False
        self.files = answer.info.get("files") or {}
        return answer.close is not None

    def _ask(self, question: ControlMessage, kind: type[Message], timeout_s: float) -> Message | None:
        try:
            with self._context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
                connect(socket, self._endpoint)
                socket.send_multipart(encode(question))
                return _answer(socket, kind, time.monotonic() + timeout_s)
        except zmq.ZMQError:  # An address that is none, or no descriptor to be had.
            return None


def _answer(socket: zmq.Socket[bytes], kind: type[Message], deadline: float) -> Message | None:
    while (left_s := deadline - time.monotonic()) > 0:
        if socket.poll(max(1, int(left_s * 1000))):
            answer = _readable(socket.recv_multipart())
            if isinstance(answer, kind):
                return answer
    return None


def _readable(parts: list[bytes]) -> Message | None:
    try:
        return decode(parts)
    except RemoteProtocolError:
        return None
