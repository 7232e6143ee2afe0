"""The one thread of a worker that talks to the daemon, and its socket.

- it is the only owner of the socket, and the only one that takes records out of the outbox
- while there is traffic it wakes every `flush_interval` and never in between: an answer can wait, the training
  loop's next bytecode can not. When nothing was said for a while it sleeps until it is woken
- it survives any failure: counted, said once, and on with a fresh socket
- whoever it speaks to over tcp proves who it is, and so does it: see endpoint.py. A handshake that fails is told
  in one sentence, and tried again with what the key file says by then
- when memory fills up it moves records to the spill, and at the end whatever nobody acknowledged; where no daemon
  is known, or ever will be, that is all it does. At the end it begins with that while there is time, and talks on:
  a process that is killed then, or starved, has left what it had
- a forked child inherits neither: `Sender` must not be used there (session.py sees to it)
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from sidestep.dialogue import Dialogue, Phase
from sidestep.endpoint import Endpoint
from sidestep.errors import RemoteProtocolError
from sidestep.notices import Notices
from sidestep.outbox import DropReason, Outbox
from sidestep.sender.link import OPTIONS, Bell, Failure, Link, connect, require_curve
from sidestep.spill import Spill
from sidestep.whereabouts import Whereabouts
from sidestep.wire import Bye, Frame, Hello, Refuse, VersionError, decode, encode

__all__ = ["OPTIONS", "Sender", "connect", "require_curve"]

LULL_S = 1.0
"""After this long without a record the sender sleeps. A shorter pause does not cost `log()` a wake-up call."""
LONGEST_SLEEP_S = 1.0
RECOVER_S = (0.1, 5.0)
"""The pause after a failure of the loop itself, the first and the longest."""
SPILL_FROM, SPILL_TO = 1 / 2, 1 / 4
"""Of the outbox's memory: when more than the first is in use, frames move to the spill until the second is."""
SPILL_LOOK_S = 0.1
"""How often a sender that waits for its daemon looks at memory that fills up."""
SPILL_AGAIN_S = 5.0
"""A spill that took no more is not tried again before."""
JOIN_S = 0.1
"""The time the thread has to end when there is none left for it."""
KEEP_S = 1.0
"""Of the time that `finish` has: what is left to the spill at most (and a quarter of it at most)."""
COPY_AFTER_S = 0.5
"""So long `finish` waits for the next acknowledgement, or a quarter of its time, before it copies to the spill."""
COPY_S = 0.02
"""So long at once: the daemon may answer meanwhile."""
LISTEN_S = 0.1
"""How often answers are looked for while nobody waits for one and the window has room."""
ANSWERS_AT_ONCE = 256
OVERTAKE_S = 10.0
"""A record whose values are not there after this time is overtaken by those behind it."""
GIVE_UP_S = 60.0
"""After this it leaves without them."""
SILENT_S = 5.0
"""A daemon that says nothing to a HELLO for so long is said to be away. It is greeted on and on all the same."""

STARTING_S = 25.0
"""A daemon that was only just started gets so much longer."""
LOOK_AGAIN_S = 1.0
"""How often it is asked anew where the daemon is, while none answers."""
HANDSHAKES = 3
"""So many in a row must fail without a reason before it is told: a daemon that is just ending gives none."""


class Sender:
    """The thread, from `start` to `finish`. Every other method may be called from any thread."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        hello: Hello,
        outbox: Outbox,
        notices: Notices,
        *,
        whereabouts: Whereabouts | None = None,
        flush_interval_s: float | None = None,
        sample: Callable[[], None] | None = None,
        spill: Spill | None = None,
        on_welcome: Callable[[], None] = lambda: None,
        when_alone: Callable[[], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._whereabouts = whereabouts  # asked anew while nobody answers
        self._alone = endpoint is None and (whereabouts is None or whereabouts.is_hopeless)
        self._look_again_at = 0.0
        self._looked_last = False  # nobody is known, and there is no more time to come to know one
        self._failed_handshakes = 0
        self._when_alone = when_alone or _nothing  # called again and again, in this thread, while nobody answers
        self._outbox = outbox
        self._notices = notices
        self._dialogue = Dialogue(outbox, hello, jitter=random.random, flush_interval_s=flush_interval_s)
        self._spill = spill
        if spill is not None:
            spill.hello = self._dialogue.hello
        self._on_welcome: Callable[[], None] | None = on_welcome
        self._spill_at = self._keep_until = 0.0
        self._copy_at = inf
        self._acknowledged = 0
        self._values_until = inf
        self._bell = Bell()
        self._flushes: deque[_Flush] = deque()
        self._questions: deque[threading.Event] = deque()
        self._over = threading.Event()
        self._stopping = False
        self._last_record = (0, 0.0)
        self._listen_at = 0.0
        self._held_up = False
        self._sample = sample
        self._sample_at = 0.0
        self._answered_at = monotonic() + (STARTING_S if when_alone else 0.0)
        self.failures = 0
        self.kept_in: Path | None = None
        """The file that holds what was not acknowledged in the end."""
        self._thread = threading.Thread(target=self._main, name="sidestep-sender", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def wake(self) -> None:
        """End the sender's sleep. Costs a system call, so only who finds `outbox.idle` calls it."""
        self._outbox.idle = False
        self._bell.ring()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was offered before is acknowledged; False when it was not in time, or can not be."""
        flush = _Flush(self._outbox.end)
        if self._outbox.acknowledged >= flush.end or self._alone:
            return self._outbox.acknowledged >= flush.end
        self._flushes.append(flush)
        self.wake()
        return flush.done.wait(timeout) and self._outbox.acknowledged >= flush.end

    def ask(self, timeout: float) -> Mapping[str, Any]:
        """What the daemon says of the run, or what is known of it when it does not answer in time."""
        if self._alone:
            return self._dialogue.run
        answered = threading.Event()
        self._dialogue.ask()
        self._questions.append(answered)
        self.wake()
        answered.wait(timeout)
        return self._dialogue.run

    def finish(self, timeout: float, exit_code: int | None) -> bool:
        """Send what is left, say BYE and stop; whether the daemon confirmed it in time."""
        self._keep_until = ends = monotonic() + timeout
        self._copy_at = ends - timeout + min(COPY_AFTER_S, timeout / 4)
        self._acknowledged = self._outbox.acknowledged
        self._values_until = ends - timeout / 2
        self._dialogue.leave(exit_code)
        self._look_again_at = 0.0
        self.wake()
        if not self._alone:
            self._over.wait(timeout - (min(KEEP_S, timeout / 4) if self._spill is not None else 0.0))
        confirmed = self._dialogue.phase is Phase.OVER
        self._stop(max(ends - monotonic(), JOIN_S))
        return confirmed

    def hand_on(self, bye: Bye | None, *, stall_s: float) -> str:
        """Send what another session left behind, and its BYE if it said one; returns why not, "" if it is done.

        Gives up when nothing was acknowledged for `stall_s`.
        """
        if bye is None:
            self._dialogue.leave_silently()
        else:
            self._dialogue.leave(bye.exit_code)
        self.start()
        before = -1
        while not self._over.wait(stall_s) and self._outbox.acknowledged > before:
            before = self._outbox.acknowledged
        trouble = self._dialogue.trouble
        done = self._dialogue.phase is Phase.OVER and not (trouble is not None and trouble.final)
        self._stop(JOIN_S)
        if done:
            return ""
        return trouble.message if trouble is not None and trouble.final else "the daemon does not answer"

    def forget(self) -> None:
        """In a forked child: let go of what the parent goes on using."""
        if self._spill is not None:
            self._spill.leave()

    @property
    def run(self) -> Mapping[str, Any]:
        """What the daemon has told of the run so far."""
        return self._dialogue.run

    @property
    def reconnects(self) -> int:
        """How often the connection was lost and greeted anew."""
        return self._dialogue.reconnects

    # The thread

    def _stop(self, seconds: float) -> None:
        self._stopping = True
        self.wake()
        self._thread.join(seconds)

    def _main(self) -> None:
        pause = RECOVER_S[0]
        self._is_elsewhere()
        self._when_alone()
        while not self._ended():
            try:
                with Link(self._endpoint, self._bell) as link:
                    while not self._ended() and not self._is_to_be_replaced(link):
                        self._turn(link)
                if link.failure and not self._ended():
                    self._bell.wait(pause)
                    pause = min(pause * 2, RECOVER_S[1])
                else:
                    pause = RECOVER_S[0]
            except Exception as error:  # noqa: BLE001 - the loop's head: whatever it is, records must leave
                self.failures += 1
                self._notices.once(
                    ("sender", type(error)),
                    f"no way to {self._daemon}, tried again: {type(error).__name__}: {error}",
                )
                self._dialogue.interrupted()
                self._bell.wait(pause)
                pause = min(pause * 2, RECOVER_S[1])
        self._keep()
        self._settle()
        self._bell.close()

    def _is_to_be_replaced(self, link: Link) -> bool:
        """Whether there is no way on with this link: the handshake failed for good, or the daemon is elsewhere."""
        if self._dialogue.phase is Phase.OPEN:
            self._failed_handshakes = 0
            return False
        if link.failure:
            self._failed_handshakes += 1
            self._look_again_at = 0.0
            if self._whereabouts is not None:
                self._whereabouts.failed()
            if self._endpoint and (link.failure.told or self._failed_handshakes >= HANDSHAKES):
                what = (
                    f"{self._daemon} {link.failure.words(self._endpoint)}. Records wait here until that is mended"
                )
                self._notices.once(("handshake", what), what)
        elif (trouble := self._dialogue.trouble) is not None and trouble.code == "key":
            self._dialogue.trouble = None
            link.failure, self._look_again_at = Failure.KEY, 0.0
        return self._is_elsewhere() or link.failure is not None

    def _is_elsewhere(self) -> bool:
        """Ask anew where the daemon is, now and then; whether it is not where it was looked for, or nowhere."""
        if self._whereabouts is None or monotonic() < self._look_again_at:
            return False
        self._look_again_at = monotonic() + LOOK_AGAIN_S
        leaving, before = self._dialogue.leaving, self._endpoint
        now = self._whereabouts.look()
        self._looked_last = leaving and now is None and before is None
        if now is None or now == before:
            return self._looked_last
        self._endpoint = now
        return True

    def _ended(self) -> bool:
        return self._stopping or self._looked_last or self._dialogue.phase is Phase.OVER

    def _turn(self, link: Link) -> None:
        self._wait(link)
        now = monotonic()
        if self._sample is not None and now >= self._sample_at:
            self._take_sample(self._sample, now)
        if self._attentive(link, now):
            self._listen_at = now + LISTEN_S
            link.look()
            if link.heard:
                self._listen(link)
        self._look_at_devices(now)
        if link.connected:
            self._speak(link)
        else:
            self._dialogue.interrupted()
            self._when_alone()
        self._say_if_nobody_answers(now)
        self._relieve(now)
        self._copy(now)
        if self._dialogue.phase is Phase.OPEN and self._on_welcome is not None:
            on_welcome, self._on_welcome = self._on_welcome, None
            on_welcome()
        self._settle()

    def _take_sample(self, sample: Callable[[], None], now: float) -> None:
        """What is read of this process's own devices goes out with the rest."""
        interval = self._dialogue.sample_interval_s
        self._sample_at = now + (interval or LONGEST_SLEEP_S)
        if interval and not self._dialogue.leaving:
            sample()

    def _say_if_nobody_answers(self, now: float) -> None:
        if self._dialogue.phase is not Phase.GREETING:
            self._answered_at = now
        elif now - self._answered_at > SILENT_S:
            where = "where it is looked for" if self._endpoint is None else f"at {self._endpoint}"
            self._notices.once(
                "nobody answers",
                f"no daemon answers {where}: records wait here for it, as many as the outbox holds",
            )

    def _wait(self, link: Link) -> None:
        """Sleep until there is something to do, and no more often than the training loop can bear."""
        now = monotonic()
        longest = SPILL_LOOK_S if self._spill is not None and self._outbox.in_use > SPILL_TO else LONGEST_SLEEP_S
        if self._spill is not None:
            longest = max(min(longest, self._copy_at - now), 0.0)
        due = min(self._dialogue.due(now), longest)
        if not link.connected:
            link.wait_for_connection(longest)
        elif self._dialogue.phase is Phase.GREETING:
            link.wait_for_answer(due)
        elif self._urgent():
            link.wait_for_answer(min(due, self._dialogue.flush_interval_s))
        elif self._busy(now):
            self._bell.wait(self._dialogue.flush_interval_s)
        else:
            self._sleep(link, due)

    def _sleep(self, link: Link, seconds: float) -> None:
        self._listen_at = 0.0
        self._outbox.idle = True
        if not self._outbox.queued:  # looked at after the flag is up, so that no record goes unnoticed
            link.wait_for_answer(seconds)
        self._outbox.idle = False

    def _urgent(self) -> bool:
        """Whether somebody waits for the daemon's answer."""
        return bool(self._flushes or self._questions or self._dialogue.leaving)

    def _attentive(self, link: Link, now: float) -> bool:
        """Whether to look for answers in this turn: a socket costs more to look at than to send to."""
        return (
            now >= self._listen_at
            or not link.connected
            or self._dialogue.phase is not Phase.OPEN
            or self._urgent()
            or self._held_up
        )

    def _busy(self, now: float) -> bool:
        end, since = self._last_record
        if self._outbox.end != end:
            self._last_record = (self._outbox.end, now)
            return True
        return self._outbox.pending > 0 or now - since < LULL_S

    def _listen(self, link: Link) -> None:
        for _ in range(ANSWERS_AT_ONCE):
            if (parts := link.receive()) is None:
                return
            try:
                self._dialogue.hear(decode(parts), monotonic())
            except VersionError as error:
                self._dialogue.hear(Refuse(code="version", message=str(error), final=True), monotonic())
            except RemoteProtocolError as error:
                self._notices.once("daemon speaks otherwise", f"{self._daemon}: {error}")

    def _speak(self, link: Link) -> None:
        while (message := self._dialogue.say(monotonic())) is not None:
            if not link.send(encode(message)):
                link.connected = False
                if isinstance(message, Frame):
                    self._outbox.rewind()
                break
        self._held_up = self._outbox.more

    def _look_at_devices(self, now: float) -> None:
        """See to records that wait for values, as far as they hold up others or it is too late for them."""
        outbox = self._outbox
        if now >= self._values_until:
            outbox.settle()
            return
        if outbox.overtake(now - OVERTAKE_S):
            self._notices.once(
                "overtaken",
                f"a value logged on a device was not there after {OVERTAKE_S:g} s: what was logged after it goes "
                "first. Its row comes late",
            )
        outbox.join(now - GIVE_UP_S)

    # The spill

    def _relieve(self, now: float) -> None:
        """Make room in memory, and write down beside the frames how the counters stand."""
        outbox, spill = self._outbox, self._spill
        if spill is None or outbox.in_use <= SPILL_FROM or now < self._spill_at:
            return
        while outbox.shelve() and outbox.in_use > SPILL_TO:
            pass
        if spill.path is not None:
            spill.note(self._dialogue.status())
            self._notices.once(
                "spill", f"{self._daemon} is away, or too slow: records wait in {spill.path} until it takes them"
            )
        if outbox.full is not DropReason.OUTBOX_FULL:
            self._spill_at = now + SPILL_AGAIN_S

    def _copy(self, now: float) -> None:
        """The end is near, and the daemon is away or slow: begin with what `_keep` would do at the last moment."""
        if self._spill is None or now < self._copy_at:
            return
        before, self._acknowledged = self._acknowledged, self._outbox.acknowledged
        if before < self._acknowledged and now < self._values_until:
            self._copy_at = now + COPY_AFTER_S
            return
        until = now + COPY_S
        while self._outbox.shelve():
            if monotonic() >= until:
                return  # on in the next turn
        self._copy_at = inf

    def _keep(self) -> None:
        """The process ends: put what was not acknowledged where it will be found."""
        outbox, spill = self._outbox, self._spill
        outbox.settle()
        if spill is None:
            return
        if self._dialogue.phase is Phase.OVER:
            spill.clear()
            return
        while outbox.shelve() and monotonic() < self._keep_until:
            pass
        if outbox.shelved:
            full = outbox.full
            outbox.keep_what_is_shelved(DropReason.SPILL_FAILED if full is DropReason.OUTBOX_FULL else full)
            spill.note(self._dialogue.bye())
            self.kept_in = spill.path
        spill.leave()

    @property
    def _daemon(self) -> str:
        return "the daemon" if self._endpoint is None else f"the daemon at {self._endpoint}"

    def _settle(self) -> None:
        """Tell those who wait what has come of it."""
        over = self._ended()
        if (trouble := self._dialogue.trouble) is not None:
            self._notices.once(("refused", trouble.code), f"the daemon refused: {trouble.message or trouble.code}")
        for flush in list(self._flushes):
            if over or self._outbox.acknowledged >= flush.end:
                self._flushes.remove(flush)
                flush.done.set()
        while self._questions and (over or not self._dialogue.asking):
            self._questions.popleft().set()
        if over:
            self._over.set()


def _nothing() -> None:
    """A daemon of whom nothing is known but the address comes back by itself."""


class _Flush:
    """Somebody waits for everything below `end` to be acknowledged."""

    __slots__ = ("done", "end")

    def __init__(self, end: int) -> None:
        self.end = end
        self.done = threading.Event()
