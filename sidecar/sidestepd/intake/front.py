"""The socket: what comes in is decoded and handed to its run, what a run answers goes out.

- reading never waits for a disk: runs commit in threads of their own
- an answer that can not be sent is forgotten: whoever is gone asks again
- what comes from no worker is a tool's question, answered here for the whole process
- a session belongs to who said HELLO first: what is said for it with another key is refused (clients.py)
- who wraps messages is answered likewise: all that is said to it in one turn is one message
- who speaks an older version is answered in it
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from errno import EADDRINUSE
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import zmq

from sidestep.errors import ProtocolError, SettingsError
from sidestep.sender import OPTIONS
from sidestep.wire import (
    MAX_ENVELOPE_BYTES,
    NO_SESSION,
    OLDEST_VERSION,
    VERSION,
    Acks,
    Hello,
    Message,
    Refuse,
    RunInfo,
    Status,
    VersionError,
    Wrapped,
    Wrapper,
    contents,
    decode,
    encode,
    is_envelope,
    session_of,
    spoken_in,
    version_of,
)
from sidestepd import addresses
from sidestepd.clients import LOCAL, may_speak
from sidestepd.intake.gate import Gate
from sidestepd.intake.run import Intake

logger = logging.getLogger("sidestepd.intake")

KEEPALIVE = (zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL, zmq.TCP_KEEPALIVE_CNT)
MOST_AT_ONCE = 512
"""Messages taken from the socket before others get their turn."""
MOST_WRAPPING = 16_384
"""Routes of relays, and of who speaks otherwise, that are remembered; a connection more is a route more."""


class Runs(Protocol):
    """Which runs there are."""

    async def serve(self) -> int:
        """Until all is complete, or the process is told to stop; returns its exit code."""
        ...

    def stop(self) -> None:
        """End, resumably."""
        ...

    def shut(self) -> None:
        """Let go of everything."""
        ...

    def greet(self, route: bytes, hello: Hello, peer: str) -> None:
        """A worker says HELLO, and `peer` is who it proved to be: find its run."""
        ...

    def owner(self, session: bytes) -> str | None:
        """Who a session belongs to; None if it is not known."""
        ...

    def of(self, session: bytes) -> Intake | None:
        """The run that a session belongs to."""
        ...

    def close(self, exit_code: int, then: tuple[bytes, Message]) -> None:
        """The supervisor says that it is time to finish; `then` is answered once that is on disk."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is known of the run, where there is one."""
        ...

    def report(self) -> dict[str, Any]:
        """How things are."""
        ...


class Front:
    """One ROUTER socket. `runs` is to be set before `serve`."""

    def __init__(self, socket: zmq.Socket[bytes], *, supervisor: int, gate: Gate | None = None) -> None:
        self.socket = socket
        self.runs: Runs
        self.impostors = 0
        """HELLOs for sessions that belong to somebody else."""
        self._gate = gate
        self.messages = self.transfers = self.malformed = 0
        """Messages taken, and in how many pieces they came: a relay's envelope is one."""
        self._supervisor = supervisor
        self._inbox = asyncio.Event()
        self._inbox.set()
        self._wrapping: OrderedDict[bytes, Wrapper] = OrderedDict()
        """By route, what is to be said to who wraps its messages."""
        self._older: OrderedDict[bytes, int] = OrderedDict()
        """By route, the version of those who do not speak ours."""
        self._to_post: list[bytes] = []

    async def serve(self) -> int:
        """Until its runs are complete, or this process is told to stop; returns its exit code."""
        receiving, serving = asyncio.create_task(self._receive()), asyncio.create_task(self.runs.serve())
        try:
            await asyncio.wait((receiving, serving), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
            return serving.result()
        finally:
            receiving.cancel()
            serving.cancel()
            await asyncio.gather(receiving, serving, return_exceptions=True)

    def send(self, route: bytes, message: Message | Acks) -> None:
        """Answer, or forget it."""
        for parts in message.encode() if isinstance(message, Acks) else (encode(message),):
            self._say(route, parts)

    def _say(self, route: bytes, parts: list[bytes]) -> None:
        if route in self._older:
            parts = spoken_in(self._older[route], parts)
        wrapper = self._wrapping.get(route)
        if wrapper is None:
            self._post(route, parts)
            return
        if not wrapper.fits(parts):
            self._post(route, wrapper.close())
        if not len(wrapper):
            self._to_post.append(route)
            if len(self._to_post) == 1:
                asyncio.get_running_loop().call_soon(self._post_wrapped)
        wrapper.add(parts)

    def _post_wrapped(self) -> None:
        """What was said to relays in this turn."""
        routes, self._to_post = self._to_post, []
        for route in routes:
            wrapper = self._wrapping.get(route)
            if wrapper is not None and len(wrapper):
                self._post(route, wrapper.close())

    def _post(self, route: bytes, parts: Sequence[bytes]) -> None:
        if route in self._older:  # an envelope is ours until here
            parts = spoken_in(self._older[route], parts)
        try:
            self.socket.send_multipart([route, *parts], zmq.DONTWAIT)
        except zmq.ZMQError:
            logger.debug("a peer is gone before its answer")
        self._inbox.set()  # the descriptor tells of changes only, and sending may have taken the last one

    async def _receive(self) -> None:
        asyncio.get_running_loop().add_reader(self.socket.fileno(), self._inbox.set)
        while True:
            await self._inbox.wait()
            self._inbox.clear()
            most = self.messages + self.transfers + MOST_AT_ONCE
            try:
                while self.messages + self.transfers < most:
                    self._take_one()
                self._inbox.set()
            except zmq.Again:
                pass
            await asyncio.sleep(0)

    def _take_one(self) -> None:
        """Raises zmq.Again if nothing is there."""
        if self._gate is None:
            route, *parts = self.socket.recv_multipart(zmq.DONTWAIT)
            self.transfers += 1
            self._take(route, parts, LOCAL)
            return
        frame = self.socket.recv(zmq.DONTWAIT, copy=False)  # with what the handshake said of who sent it
        route, parts = frame.bytes, self.socket.recv_multipart()
        self.transfers += 1
        if (peer := self._gate.who(frame)) is not None:
            self._take(route, parts, peer)
            return
        gone = "this key is no longer on the daemon's list of clients"
        self.send(route, Refuse(session=session_of(parts), code="key", message=gone))

    def _take(self, route: bytes, parts: Sequence[bytes], peer: str) -> None:
        if (version := version_of(parts)) != VERSION:
            self._note_version(route, version)
        if is_envelope(parts):
            self._unwrap(route, parts, peer)
        else:
            self._handle(route, parts, peer)

    def _note_version(self, route: bytes, version: int) -> None:
        if OLDEST_VERSION <= version < VERSION:
            self._older[route] = version
        if len(self._older) > MOST_WRAPPING:
            self._older.popitem(last=False)

    def _unwrap(self, route: bytes, parts: Sequence[bytes], peer: str) -> None:
        """The messages in it are as if each had come by itself, but that FRAMEs are heard together."""
        self._wrapping.setdefault(route, Wrapper())
        if len(self._wrapping) > MOST_WRAPPING:
            self._wrapping.popitem(last=False)
        frames: list[Wrapped] = []
        try:
            for inner in contents(parts):
                if isinstance(inner, Wrapped):
                    frames.append(inner)
                    continue
                self._hear_together(route, frames, parts[1])
                frames = []
                self._handle(route, inner, peer)
        except ProtocolError as error:
            self._hear_together(route, frames, parts[-1])
            self._refuse(route, parts, error)
        else:
            self._hear_together(route, frames, parts[1])

    def _hear_together(self, route: bytes, frames: Sequence[Wrapped], body: bytes) -> None:
        """FRAMEs that came one behind the other. Each counts: a turn is not the longer for being wrapped."""
        self.messages += len(frames)
        for run, its in groupby(frames, key=self._run_of):
            if run is not None:
                run.hear_together(route, list(its), body)
                continue
            for frame in its:
                self.send(route, Refuse(session=frame.session, code="hello", message="say HELLO first"))

    def _run_of(self, frame: Wrapped) -> Intake | None:
        return self.runs.of(frame.session)

    def _refuse(self, route: bytes, parts: Sequence[bytes], error: ProtocolError) -> None:
        self.malformed += 1
        other = isinstance(error, VersionError)
        code = "version" if other else "malformed"
        self.send(route, Refuse(session=session_of(parts), code=code, message=str(error), final=other))

    def _handle(self, route: bytes, parts: Sequence[bytes], peer: str) -> None:
        self.messages += 1
        try:
            message = decode(parts)
        except ProtocolError as error:
            self._refuse(route, parts, error)
            return
        if isinstance(message, Hello):
            self._greet(route, message, peer)
        elif message.session == NO_SESSION and isinstance(message, Status | RunInfo):
            self._answer(route, message, peer)
        elif (run := self.runs.of(message.session)) is not None:
            run.hear(route, message)
        else:
            self.send(route, Refuse(session=message.session, code="hello", message="say HELLO first"))

    def _greet(self, route: bytes, hello: Hello, peer: str) -> None:
        beside = bytes.fromhex(hello.beside) if re.fullmatch("[0-9a-f]{32}", hello.beside) else hello.session
        if all(may_speak(peer, self.runs.owner(session)) for session in (hello.session, beside)):
            self.runs.greet(route, hello, peer)
            return
        self.impostors += 1
        logger.warning("%.80r speaks for session %s, which is another's", peer, hello.session.hex()[:8])
        message = f"this session began with another key than one of {peer}"
        self.send(route, Refuse(session=hello.session, code="key", message=message))

    def _answer(self, route: bytes, question: Status | RunInfo, peer: str) -> None:
        """A tool asks, or the supervisor."""
        if isinstance(question, Status):
            process = {
                "pid": os.getpid(),
                "node": os.uname().nodename,
                "supervisor": self._supervisor,
                "messages": self.messages,
                "transfers": self.transfers,
                "malformed": self.malformed,
                "impostors": self.impostors,
                "refused_keys": 0 if self._gate is None else self._gate.refused,
            }
            self.send(route, Status(info={**self.runs.report(), **process}))
        elif question.close is None:
            self.send(route, RunInfo(info=self.runs.facts()))
        elif peer != LOCAL:
            self.send(route, Refuse(code="key", message="a run is closed on the daemon's own node"))
        else:
            self.runs.close(question.close, (route, RunInfo(info=self.runs.facts(), close=question.close)))


def bind(socket: zmq.Socket[bytes], address: str) -> None:
    """Let workers connect to this ROUTER."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RCVHWM, 64)
    socket.setsockopt(zmq.SNDHWM, 64)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_ENVELOPE_BYTES + 4096)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 15_000)
    for option in (zmq.TCP_MAXRT, *KEEPALIVE):  # no heartbeats of ZeroMQ's: see there
        socket.setsockopt(option, OPTIONS[option])
    _bind(socket, address)


def bind_tcp(socket: zmq.Socket[bytes], directory: Path, wanted: Sequence[str]) -> list[str]:
    """Let others connect too; returns where. Raises SettingsError where that can not be."""
    bound: dict[str, str] = {}
    for address in wanted:
        try:
            _bind(socket, addresses.remembered(directory, address))
        except SettingsError as error:
            if not address.endswith(":0"):
                raise
            logger.warning("%s: another port then", error)  # who found us by a file finds us there again
            _bind(socket, address)
        bound[address] = socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        logger.info("listens at %s", bound[address])
    if any(address.endswith(":0") for address in wanted):
        addresses.remember(directory, bound)
    return list(bound.values())


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    socket.setsockopt(zmq.IPV6, int(address.startswith("tcp:")))
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        taken = (
            ": --listen says another one, or SIDESTEP_PORT on all nodes of a job"
            if error.errno == EADDRINUSE
            else ""
        )
        raise SettingsError(f"can not listen at {address}: {zmq.strerror(error.errno or 0)}{taken}") from None
