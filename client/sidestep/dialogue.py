"""What a session says to the daemon next, and what it makes of the answers.

    greeting ──WELCOME──▶ open ──BYE answered──▶ over
        ◀── interrupted, no ack in time, "hello" asked for

- after every interruption: HELLO first, then what the daemon lacks, from the first unacknowledged frame on
- a frame unacknowledged for `ACK_TIMEOUT_S` leads to a new HELLO, each time a little later
- a daemon without room is sent no frames until it says that it has some, or for `HOLD_S`
- BYE is said when all else is acknowledged, and again until it is answered
- no socket and no clock: callers pass `now`, and call `say` only while the socket takes a message
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Protocol

from sidestep.outbox import DropReason
from sidestep.wire import NO_SESSION, Ack, Bye, Frame, Hello, Message, Refuse, RunInfo, Status, Welcome

HELLO_AGAIN_S = (0.25, 2.0)
"""An unanswered HELLO is repeated after the first, then ever later, up to the second."""
ACK_TIMEOUT_S = (2.0, 5.0)
BYE_AGAIN_S = 0.5
ASK_AGAIN_S = 0.5
HOLD_S = 10.0
"""A daemon without room says when there is some; should that be missed, it is tried again after this."""
GAP_AGAIN_S = 0.5
"""Frames under way behind a gap are each answered with the same gap; one resend serves them all."""


class Phase(Enum):
    """How far the two have come."""

    GREETING = auto()
    OPEN = auto()
    OVER = auto()


class Frames(Protocol):
    """What a session has to send: an `Outbox`, or what a relay has read of it."""

    credit: int
    values_refused: int

    @property
    def acknowledged(self) -> int:
        """The first unacknowledged sequence."""

    @property
    def pending(self) -> int:
        """Records that are not acknowledged."""

    @property
    def end(self) -> int:
        """The sequence after the last record."""

    @property
    def outstanding(self) -> bool:
        """Whether a frame was sent and is not acknowledged."""

    @property
    def more(self) -> bool:
        """Whether more waits behind what was handed out last."""

    @property
    def offered(self) -> int:
        """Records that anybody tried to send."""

    @property
    def dropped(self) -> dict[str, int]:
        """Records given up, by reason."""

    def next_frame(self) -> Frame | None:
        """The frame to send now."""

    def ack(self, first: int) -> bool:
        """Everything below `first` is on disk; whether that is news."""

    def rewind(self) -> None:
        """Send again all that is unacknowledged."""

    def abandon(self, reason: DropReason) -> None:
        """Nothing more of it is taken."""


class Dialogue:
    """One session's side of the protocol.

    `run` is what the daemon has told of the run, `trouble` the last thing it refused, in its words.
    """

    def __init__(
        self, outbox: Frames, hello: Hello, *, jitter: Callable[[], float], flush_interval_s: float | None = None
    ) -> None:
        self._outbox = outbox
        self._hello = hello
        self._jitter = jitter
        self._own_flush_interval_s = flush_interval_s
        self._boot = ""
        self._said_more = False
        self._heartbeat_s = 5.0
        self._leaving: Bye | None = None
        self._silent = False
        self.asking = False
        self._hello_wait, self._ack_wait = HELLO_AGAIN_S[0], ACK_TIMEOUT_S[0]
        self._hello_at = self._ask_at = self._bye_at = self._heartbeat_at = 0.0
        self._ack_by: float | None = None
        self._held_until: float | None = None
        self._gap = (-1, 0.0)
        self.phase = Phase.GREETING
        self.flush_interval_s = flush_interval_s or 0.02
        self.sample_interval_s = 0.0
        """How often the daemon wants samples; 0 for never."""
        self.run: Mapping[str, Any] = {}
        self.reconnects = 0
        self.trouble: Refuse | None = None

    # What the program wants

    def ask(self) -> None:
        """Ask what the run is, when there is a chance to."""
        self.asking, self._ask_at = True, 0.0

    def leave(self, exit_code: int | None, *, lost: bool = False) -> None:
        """Say BYE once everything is acknowledged; `lost`: for one that ended without a word."""
        self._leaving = Bye(session=self._hello.session, first=0, exit_code=exit_code, lost=lost)
        self._bye_at = 0.0

    def leave_silently(self) -> None:
        """Be over once everything is acknowledged: this is another's session, whose last word nobody knows."""
        self._silent = True

    @property
    def leaving(self) -> bool:
        """Whether the end is to be said, or come to."""
        return self._leaving is not None or self._silent

    # How things stand

    def hello(self) -> Hello:
        """The introduction, as of now."""
        outbox = self._outbox
        return replace(self._hello, first=outbox.acknowledged, more=outbox.pending > 0, **self._counters())

    def status(self) -> Status:
        """The counters, as of now."""
        return Status(session=self._hello.session, more=self._outbox.more, **self._counters())

    def bye(self) -> Bye:
        """The last word, as of now."""
        last = self._leaving or Bye(session=self._hello.session, first=0)
        return replace(last, first=self._outbox.end, **self._counters())

    def _counters(self) -> dict[str, Any]:
        outbox = self._outbox
        return {"offered": outbox.offered, "dropped": outbox.dropped, "values_refused": outbox.values_refused}

    # What happens to the connection

    def interrupted(self) -> None:
        """The connection is gone: greet as soon as there is one again."""
        if self.phase is Phase.OPEN:
            self.reconnects += 1
        if self.phase is not Phase.OVER:
            self._hello_wait = HELLO_AGAIN_S[0]
            self._greet()

    def hear(self, message: Message, now: float) -> None:
        """Take in an answer."""
        if message.session not in (self._hello.session, NO_SESSION) or self.phase is Phase.OVER:
            return
        match message:
            case Welcome():
                self._welcomed(message, now)
            case Ack():
                self._acknowledged(message, now)
            case Refuse():
                self._refused(message, now)
            case RunInfo():
                self.run, self.asking = {**self.run, **message.info}, False
            case Bye() if self._leaving is not None:
                self.phase = Phase.OVER

    def say(self, now: float) -> Message | None:
        """What to send now, if anything. It is taken as sent: ask only while it can be."""
        if self.phase is Phase.OPEN and self._ack_by is not None and now >= self._ack_by:
            self._ack_wait = min(self._ack_wait * 1.5, ACK_TIMEOUT_S[1])
            self._greet()
        if self.phase is Phase.GREETING:
            return self._say_hello(now)
        if self.phase is Phase.OPEN and self._silent and not self._outbox.pending:
            self.phase = Phase.OVER
        if self.phase is Phase.OPEN:
            return self._say_frame(now) or self._say_question(now) or self._say_bye(now) or self._say_status(now)
        return None

    def due(self, now: float) -> float:
        """Seconds until there is something to say even if nothing happens."""
        if self.phase is Phase.GREETING:
            return max(self._hello_at - now, 0.0)
        times = [self._heartbeat_at]
        if self._held_until is not None:
            times.append(self._held_until)
        if self._ack_by is not None:
            times.append(self._ack_by)
        if self.asking:
            times.append(self._ask_at)
        if self._leaving is not None and not self._outbox.pending:
            times.append(self._bye_at)
        return max(min(times) - now, 0.0)

    # Answers

    def _welcomed(self, welcome: Welcome, now: float) -> None:
        self._outbox.ack(welcome.first)
        if self.phase is Phase.GREETING or welcome.boot != self._boot:
            self._outbox.rewind()
            self._ack_by = self._held_until = None
        self.phase, self._boot = Phase.OPEN, welcome.boot
        self._outbox.credit = welcome.credit
        self._heartbeat_s, self._heartbeat_at = welcome.heartbeat_s, now + welcome.heartbeat_s
        if self._said_more and not self._outbox.pending:
            self._heartbeat_at = now  # all that there was is there already: nobody need wait for it
        self.flush_interval_s = self._own_flush_interval_s or welcome.flush_interval_s
        self.sample_interval_s = welcome.sample_interval_s
        self.run = {**self.run, **welcome.run}
        self._hello_wait = HELLO_AGAIN_S[0]
        self._bye_at = self._ask_at = 0.0

    def _acknowledged(self, ack: Ack, now: float) -> None:
        if ack.credit:
            self._outbox.credit = ack.credit
        if self._outbox.ack(ack.first):
            self._ack_wait = ACK_TIMEOUT_S[0]
            waits = self._outbox.outstanding and self._held_until is None
            self._ack_by = now + self._patience() if waits else None
        if ack.gap and self.phase is Phase.OPEN:
            self._resend_from(ack.first, now)

    def _resend_from(self, first: int, now: float) -> None:
        if first < self._outbox.acknowledged:  # its spool is gone: HELLO tells it where this session stands
            self._greet()
        elif self._held_until is not None or self._gap[0] != first or now >= self._gap[1]:
            self._gap = (first, now + GAP_AGAIN_S)
            self._held_until = None
            self._outbox.rewind()

    def _refused(self, refuse: Refuse, now: float) -> None:
        if refuse.final:
            self.trouble, self.phase = refuse, Phase.OVER
            self._outbox.abandon(DropReason.REFUSED)
        elif refuse.code in ("hello", "bye_early"):
            if self.phase is Phase.OPEN:
                self._greet()
        else:
            self.trouble = refuse
            if refuse.code == "full":
                self._held_until, self._ack_by = now + HOLD_S, None
            elif refuse.code == "key" and self.phase is Phase.OPEN:
                self._greet()

    # Sayings

    def _greet(self) -> None:
        self.phase, self._hello_at, self._ack_by = Phase.GREETING, 0.0, None

    def _say_hello(self, now: float) -> Hello | None:
        if now < self._hello_at:
            return None
        self._hello_at = now + self._hello_wait * (0.75 + 0.5 * self._jitter())
        self._hello_wait = min(self._hello_wait * 2, HELLO_AGAIN_S[1])
        hello = self.hello()
        self._said_more = hello.more
        return hello

    def _say_frame(self, now: float) -> Message | None:
        if self._held_until is not None:
            if now < self._held_until:
                return None
            self._held_until = None
            self._outbox.rewind()
        frame = self._outbox.next_frame()
        if frame is not None and self._ack_by is None:
            self._ack_by = now + self._patience()
        return frame

    def _say_question(self, now: float) -> RunInfo | None:
        if not self.asking or now < self._ask_at:
            return None
        self._ask_at = now + ASK_AGAIN_S
        return RunInfo(session=self._hello.session)

    def _say_bye(self, now: float) -> Bye | None:
        if self._leaving is None or self._outbox.pending or now < self._bye_at:
            return None
        self._bye_at = now + BYE_AGAIN_S
        return self.bye()

    def _say_status(self, now: float) -> Status | None:
        if now < self._heartbeat_at:
            return None
        self._heartbeat_at = now + self._heartbeat_s
        return self.status()

    def _patience(self) -> float:
        return self._ack_wait * (1.0 + 0.25 * self._jitter())
