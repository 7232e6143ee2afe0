"""A session: one life of one worker process, with its outbox and its sender.

- `pack` and `offer` are what everything said goes through; `log()` does the same inline
- what closes an outbox (finish, a fork) takes its room away, so that `log()` needs no check of its own
- **fork**: in the child the outbox is replaced by a closed one and the session is dormant. It costs nothing
  until something is logged, which makes it a session of its own: another id, another outbox, another thread.
  The parent's socket, thread and queued records are never touched there
- **exit**: what is queued is flushed, in `EXIT_S` at most, in children of multiprocessing too; what the daemon
  does not take in that time stays in the spill
- the bytes of media go through a twin, a session that this one makes, ends, and waits for
"""

from __future__ import annotations

import atexit
import os
import platform
import re
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Protocol

from msgpack import Packer

from sidestep._version import __version__
from sidestep.allocator import Allocator
from sidestep.convert import cuda
from sidestep.convert.torch import hide_from_compiler
from sidestep.endpoint import Endpoint
from sidestep.errors import SidestepError, UnsupportedValue
from sidestep.head import head_of
from sidestep.lane import Lane, lane_of
from sidestep.notices import Notices, say
from sidestep.outbox import DropReason, Outbox
from sidestep.ranks import Identity, is_on_one_node, pid_namespace
from sidestep.sender import Sender  # with zmq: loaded here, since init() has no time for it
from sidestep.settings import WorkerSettings
from sidestep.spill import Spill, folders, private_folder, waiting
from sidestep.staging import Deferred, Device, Staging
from sidestep.steps import Steps
from sidestep.waiting import Waiting
from sidestep.whereabouts import Whereabouts
from sidestep.wire import BLOBS, LANES, MAX_RECORD_BYTES, WORKER, Hello, Kind

if TYPE_CHECKING:
    from sidestep.autostart import Starter
    from sidestep.watching import Watcher

EXIT_S = 5.0
LANE_SHARE = 0.2
"""Of the time that `finish` has, kept for media where there are some."""
LARGE_BYTES = 64 * 1024
"""A packer that made a larger record is not used again: it keeps its buffer."""

WHY = {
    DropReason.UNSUPPORTED: "this call can not be logged",
    DropReason.BAD_STEP: "this call can not be logged",
    DropReason.TOO_LARGE: "this call is too large",
    DropReason.OUTBOX_FULL: "the daemon is away, or too slow, and the outbox is full: new records are dropped",
    DropReason.SPILL_FULL: "the daemon is away, or too slow, and the spill file is full: new records are dropped",
    DropReason.SPILL_FAILED: "the daemon is away, or too slow, the outbox is full and there is nowhere to spill: "
    "new records are dropped",
    DropReason.AFTER_FINISH: "log() after finish(): dropped",
    DropReason.REFUSED: "the daemon takes no more from this process: dropped",
    DropReason.NO_SENDER: "this process could not start what sends its records: dropped",
    DropReason.OUTPUT: "the program prints more than is kept of it",
    DropReason.INTERNAL: "a mistake in sidestep itself, please report it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What became of the records: offered == acknowledged + pending + sum(dropped.values())."""

    offered: int
    acknowledged: int
    """On the daemon's disk."""
    pending: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Given up, by reason."""
    values_refused: int = 0
    """Values that were left out of records which were sent without them."""
    blobs: int = 0
    """Media and files whose bytes were taken along."""
    blobs_pending: int = 0
    """Of these, how many are not known to be on the daemon's disk; at least."""


class Carrier(Protocol):
    """Takes records out of a session's outbox: the sender, or what a test puts in its place."""

    kept_in: Path | None

    @property
    def run(self) -> Mapping[str, Any]:
        """What is known of the run."""

    def start(self) -> None:
        """Begin."""

    def wake(self) -> None:
        """There is something in an outbox that was idle, or no room in it."""

    def flush(self, timeout: float) -> bool:
        """Wait until all that was offered so far is acknowledged."""

    def ask(self, timeout: float) -> Mapping[str, Any]:
        """Wait for what the daemon says of the run."""

    def finish(self, timeout: float, exit_code: int | None) -> bool:
        """Deliver what is left and stop; whether that was confirmed."""

    def forget(self) -> None:
        """This is a forked child: touch nothing any more."""


NewCarrier = Callable[[Hello, Outbox], Carrier | None]
Wanted = dict[str, list[Deferred]]
"""What the values of a record wait for, by name."""
Devices = Callable[[], Callable[[Any], Device | None]]
"""Makes what finds the device of a tensor; anew in a forked child."""


class Refusal(Exception):
    """A record is given up, for this reason. Never leaves this package."""

    def __init__(self, reason: DropReason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Session:
    """One life of a process. The object outlives a fork; its id, outbox and sender do not."""

    __slots__ = (
        "__weakref__", "_beside", "_carried", "_devices", "_hidden", "_keywords", "_lock", "_new_carrier",
        "_own_id", "_spill", "_spills", "_starter", "dormant", "exit_code", "finished", "id", "identity", "lane",
        "names", "notices", "on_finish", "outbox", "packer", "role", "sender", "settings", "silent", "staging",
        "steps", "watcher", "whereabouts",
    )  # fmt: skip

    def __init__(
        self,
        *,
        settings: WorkerSettings,
        identity: Identity,
        keywords: Mapping[str, Any],
        notices: Notices,
        silent: bool = False,
        carrier: NewCarrier | None = None,
        role: str = WORKER,
        beside: Session | bytes | None = None,
        own_id: bytes | None = None,
        devices: Devices = cuda.finder,
    ) -> None:
        """`beside` is the session, or its id, whose bytes this one sends; `own_id` is what others know already."""
        self.settings = settings
        self.identity = identity
        self.notices = notices
        self.silent = silent
        self.role = role
        self.lane: Lane = lane_of(self)
        self._beside = beside
        self._own_id = own_id
        self._carried = carrier
        self.packer: Packer | None  # whoever packs takes it away, and puts it back
        self.names: set[str] = set()  # that log() has looked at and found good
        self.on_finish: Callable[[float], None] = lambda _: None  # is given the seconds there are
        self.exit_code: int | None = None  # of the process, as soon as it is known
        self.steps: dict[str | None, Steps] = {}
        self.watcher: Watcher | None = None
        self.dormant = False
        self.finished = False
        self._keywords = keywords
        self._devices = devices
        self._hidden = False
        self.staging = Staging(devices())
        self._new_carrier = carrier or self._new_sender
        self._spills = not silent and carrier is None and settings.when_full == "spill"
        self._starter: Starter | None = None
        self.whereabouts = Whereabouts(settings)
        self._lock = threading.Lock()
        self.outbox: Outbox
        self.sender: Carrier | None
        self._begin()
        if not silent:
            _living.add(self)
            if beside is None:
                atexit.register(self.at_exit)

    # What log() uses

    def wake(self) -> None:
        """End the sender's sleep; for who finds `outbox.idle`."""
        if self.sender is not None:
            self.sender.wake()

    def take_packer(self) -> Packer:
        """A packer that nobody else is using: threads, signal handlers and re-entry each get their own."""
        packer, self.packer = self.packer, None
        return packer or new_packer()

    def steps_of(self, stage: str | None) -> Steps:
        """The counter of an axis."""
        return self.steps.setdefault(stage, Steps())

    @property
    def is_sent(self) -> bool:
        """Whether what is said leaves for a daemon: neither switched off nor taken by a recorder."""
        return not self.silent and self._new_carrier == self._new_sender

    # What everything else uses

    def send(self, kind: Kind, data: Mapping[str, Any], stage: str | None = None) -> None:
        """Say something that has no step."""
        self.guard(lambda: self.offer(self.pack(int(kind), None, data, stage)))

    def guard(self, say_it: Callable[[], None]) -> None:
        """Do it; whatever goes wrong is counted and said once, or raised where that was asked for."""
        try:
            self.awake()
            say_it()
        except Refusal as refusal:
            self.drop(refusal.reason, refusal.detail)
        except Exception as error:
            if self.settings.strict:
                raise
            self.drop(DropReason.INTERNAL, repr(error))

    def pack(self, kind: int, step: int | None, data: Mapping[str, Any], stage: str | None) -> bytes:
        """Make a record of plain data."""
        packer = self.take_packer()
        parts = (kind, time(), step, data) if stage is None else (kind, time(), step, data, stage)
        record: bytes = packer.pack(parts)
        if len(record) > MAX_RECORD_BYTES:
            raise Refusal(DropReason.TOO_LARGE, f"{len(record)} bytes; {MAX_RECORD_BYTES} is the most")
        if len(record) <= LARGE_BYTES:
            self.packer = packer
        return record

    def offer_staged(
        self, said: tuple[int, int | None], data: dict[str, Any], stage: str | None, wanted: Wanted
    ) -> None:
        """Put a record into the outbox that waits for values, by the names of its data that want them.

        `said` is its kind and its step.
        """
        refused = [it for some in wanted.values() for it in some if it.why]
        for name in [name for name, some in wanted.items() if refused and not set(some).isdisjoint(refused)]:
            for it in (some := wanted.pop(name)):
                it.give_up()
            del data[name]
            why = next(it for it in some if it.why)
            self.refuse_value(name, type(why), why.why)
        kind, step = said
        if not wanted:
            return self.offer(self.pack(kind, step, data, stage))
        record = Waiting((kind, time(), step), data, stage, wanted, since=monotonic(), refuse=self._refuse_later)
        try:
            if len(record) > MAX_RECORD_BYTES:
                raise Refusal(DropReason.TOO_LARGE, f"{len(record)} bytes; {MAX_RECORD_BYTES} is the most")
            self.offer(record)
        except Refusal:
            record.give_up()
            raise

    def hide_from_compiler(self) -> None:
        """As soon as something was compiled in this process, see that nothing of this package is."""
        if not self._hidden:
            self._hidden = True  # so that a signal handler that logs meanwhile does not do it too
            self._hidden = hide_from_compiler()

    def _refuse_later(self, name: str, why: str) -> None:
        """A value that did not come. It is too late to raise anything."""
        self.outbox.values_refused += 1
        self.notices.once(("value", name, why), f"{name[:80]!r} is left out: {why}")

    def offer(self, record: bytes | Waiting) -> None:
        """Put a record into the outbox, or raise Refusal."""
        outbox = self.outbox
        if not outbox.offer(record):
            if self._spills and outbox.full is DropReason.OUTBOX_FULL:
                self.wake()  # a sender that sleeps may be able to make room
            raise Refusal(outbox.shut or outbox.full)
        if outbox.idle:
            self.wake()

    def drop(self, reason: DropReason, detail: str = "") -> None:
        """Count a record that was given up, and say so once; of a user's mistakes, each, but for its numbers."""
        self.outbox.drop(reason)
        text = f"{WHY[reason]}: {detail}" if detail else WHY[reason]
        if self.settings.strict:
            raise (UnsupportedValue if reason in _USERS else SidestepError)(text)
        kind_of_mistake = re.sub(r"\d+", "#", detail) if reason is DropReason.UNSUPPORTED else ""
        self.notices.once(("drop", reason, kind_of_mistake), text)

    def refuse_value(self, name: str, kind: type, why: str) -> None:
        """Count a value that its record goes without, and say so once for each name and type."""
        self.outbox.values_refused += 1
        if self.settings.strict:
            raise UnsupportedValue(f"{name[:80]!r}: {why}")
        self.notices.once(("value", name, kind), f"{name[:80]!r} is left out: {why}")

    def stats(self) -> Stats:
        """The ledger as it is now."""
        outbox = self.outbox
        acknowledged, pending, dropped = outbox.acknowledged, outbox.pending, outbox.dropped
        if lost := outbox.lost:
            acknowledged, dropped = acknowledged - lost, {**dropped, "spill_lost": lost}
        return Stats(
            offered=acknowledged + pending + sum(dropped.values()),
            acknowledged=acknowledged,
            pending=pending,
            dropped=dropped,
            values_refused=outbox.values_refused,
            blobs=self.lane.added,
            blobs_pending=self.lane.pending,
        )

    def flush(self, timeout: float) -> bool:
        """Wait until the daemon has what was said so far, media too; False if it has not, or will not."""
        deadline = monotonic() + timeout
        if self.sender is None:
            said = self.outbox.pending == 0 and self.outbox.shut is not DropReason.NO_SENDER
        else:
            said = self.sender.flush(timeout) and self.outbox.shut is not DropReason.REFUSED
        return self.lane.flush(max(deadline - monotonic(), 0.0)) and said

    def twin(self, settings: WorkerSettings) -> Session:
        """A session of this process for the bytes of its media, which begins, forks and ends with this one."""
        return Session(
            settings=settings,
            identity=self.identity,
            keywords={},
            notices=self.notices,
            carrier=self._carried,
            role=BLOBS,
            beside=self,
        )

    @property
    def inline(self) -> bool:
        """Whether a test carries what is said, in the thread that says it."""
        return self._carried is not None

    def finish(self, timeout: float, exit_code: int | None) -> None:
        """Take nothing more, deliver what is left in at most `timeout` seconds, and say what was not."""
        if self.finished:
            return
        self.finished = True
        deadline = monotonic() + timeout
        self.on_finish(timeout)  # which may have last words
        self.outbox.close(DropReason.AFTER_FINISH)
        atexit.unregister(self.at_exit)
        if self.dormant:
            return
        self.lane.settle_in(timeout / 2)
        timeout = max(deadline - monotonic(), 0.0)
        if self.lane.pending:
            timeout -= LANE_SHARE * timeout
            self.lane.hurry(deadline - LANE_SHARE / 2 * timeout)
        self._end(timeout, exit_code)
        self.lane.finish(max(deadline - monotonic(), 0.0), exit_code)

    def _end(self, timeout: float, exit_code: int | None) -> None:
        confirmed = self.sender is not None and self.sender.finish(timeout, exit_code)
        what = "pieces of media" if self.role in LANES else "records"
        if left := self.outbox.pending:
            say(f"{left} {what} are not acknowledged {self._whose_fault(timeout)}{self._where_they_are()}")
        elif self.sender is not None and not confirmed:
            say(f"everything is delivered, but the daemon did not confirm the end within {timeout:.1f} s")

    def at_exit(self) -> None:
        """What the interpreter does at its end."""
        self.finish(EXIT_S, self.exit_code)

    def ends_with(self, exit_code: int) -> None:
        """Something is about to end this process. What comes later knows better, but nothing unsays a failure."""
        self.exit_code = exit_code or self.exit_code or 0

    # Fork

    def awake(self) -> None:
        """Make sure that this process has a session of its own."""
        if self.dormant and not self.finished:
            with self._lock:
                if self.dormant:
                    self.identity = replace(self.identity, pid=os.getpid())
                    self._begin()

    def forked(self) -> None:
        """In a child, right after the fork: touch nothing, and let `log()` find a closed outbox."""
        if self.sender is not None:
            self.sender.forget()
        _abandoned.append((self.sender, self.outbox, self.staging))
        self.outbox = Outbox(bytes(16), 0)
        self.outbox.close(self._dormant_reason())
        self.sender = None
        self.dormant = True
        self.staging = Staging(self._devices())
        self._lock = threading.Lock()
        self.lane.forked()

    def _dormant_reason(self) -> DropReason:
        return DropReason.AFTER_FINISH if self.finished else DropReason.INTERNAL

    def _begin(self) -> None:
        for steps in self.steps.values():
            steps.restart()
        self.id = self._own_id or os.urandom(16)  # what `secrets` does, without its import, which takes 4 MB
        self.packer = new_packer()
        self._spill = self._new_spill()
        self.outbox = Outbox(self.id, self.settings.outbox_bytes, self._spill)
        self.sender = None if self.silent else self._started(self.outbox)
        self.dormant = False
        if (
            not self.silent
            and self._beside is None
            and (util := sys.modules.get("multiprocessing.util")) is not None
        ):
            util.Finalize(None, self.at_exit, exitpriority=0)  # its children leave without atexit

    def _started(self, outbox: Outbox) -> Carrier | None:
        """The sender, at work; without one nothing is taken, which is said, and counted for each record."""
        try:
            carrier = self._new_carrier(self._hello(), outbox)
            if carrier is not None:
                carrier.start()
            return carrier
        except (OSError, RuntimeError) as error:  # no descriptor, or no thread, to be had in this process
            if self.settings.strict:
                raise
            outbox.close(DropReason.NO_SENDER)
            self.notices.once("no sender", f"nothing that this process logs can be sent: {error}")
            return None

    def _new_spill(self) -> Spill | None:
        if not self._spills:
            return None
        run_dir, notices = self.settings.run_dir, self.notices
        return Spill(
            self.id,
            folders=lambda: folders(run_dir),
            limit=self.settings.spill_bytes,
            say=lambda text: notices.once("spill failed", text),
        )

    def _new_sender(self, hello: Hello, outbox: Outbox) -> Carrier | None:
        self.whereabouts = self._new_whereabouts()
        when_alone = self._find_daemon()
        if self.whereabouts.is_hopeless and self._spill is None:
            return None
        return Sender(
            None,  # found out in its own thread: files may lie on a network that hangs
            hello,
            outbox,
            self.notices,
            whereabouts=self.whereabouts,
            flush_interval_s=self.settings.flush_interval_s,
            sample=self._sampler(),
            spill=self._spill,
            on_welcome=self._hand_on_what_others_left if self.role == WORKER else lambda: None,
            when_alone=when_alone,
        )

    def _sampler(self) -> Callable[[], None] | None:
        """What the sender does whenever the daemon wants samples; a sampler's own session has other ways."""
        if self.role != WORKER:
            return None
        allocator = Allocator(sys.modules, os.environ)

        def sample() -> None:
            for reading in allocator.read():
                if self.outbox.shut is None:
                    self.send(Kind.SAMPLES, reading)

        return sample

    def _find_daemon(self) -> Callable[[], None] | None:
        """Where no address was given, see to one; returns what the sender shall do while nobody answers."""
        if not self.whereabouts.is_hopeless and self._starter is None:
            return None
        found: Starter | str | None = self._starter
        if found is None:
            found = "autostart is off" if not self.settings.autostart else self._new_starter()
        if isinstance(found, str):
            what = (
                "nothing will be logged" if self._spill is None else "records are kept on disk for one to collect"
            )
            self.notices.once(
                "no daemon",
                f"no daemon is known (SIDESTEP_ADDRESS is not set, and {found}): {what}. "
                "Start the training with `sidestep run -- COMMAND`",
            )
            return None
        self._starter, self.settings = found, replace(self.settings, address=found.address)
        self.whereabouts = self._new_whereabouts()
        return found.look

    def _new_whereabouts(self) -> Whereabouts:
        node = os.uname().nodename
        head = None if is_on_one_node(os.environ, self.identity.world) else head_of(os.environ, node)
        return Whereabouts(
            self.settings, head=head, say=lambda text: self.notices.once(("whereabouts", text), text)
        )

    def _new_starter(self) -> Starter | str:
        from sidestep.autostart import starter_for  # only a process that has no address needs it

        folder = self._keywords.get("dir")
        return starter_for(
            self.identity.launch,
            on_one_node=is_on_one_node(os.environ, self.identity.world),
            notices=self.notices,
            folder=folder if isinstance(folder, str) else None,
        )

    def _hand_on_what_others_left(self) -> None:
        """Sessions of this run that ended on this node with a spill the daemon could not reach."""
        run, endpoint = self.settings.run_id, self.whereabouts.look()
        if run is None or endpoint is None or not (left := waiting(private_folder())):
            return
        threading.Thread(
            target=self._hand_on, args=(left, endpoint, run), name="sidestep-collect", daemon=True
        ).start()

    def _hand_on(self, left: list[Path], endpoint: Endpoint, run: str) -> None:
        from sidestep.collect import collect  # as the sender is

        try:
            collect(left, endpoint, run=run, notices=self.notices)
        except Exception as error:  # noqa: BLE001 - a thread's head: it is others' data, and no harm to this process
            self.notices.once("hand on", f"what other workers kept in {left[0].parent} stays there: {error!r}")

    def _hello(self) -> Hello:
        who = self.identity
        return Hello(
            session=self.id,
            rank=who.rank,
            world=who.world,
            local_rank=who.local_rank,
            node=who.node,
            pid=who.pid,
            launch=who.launch,
            attempt=who.attempt,
            run=self.settings.run_id,
            client=f"sidestep {__version__} python {platform.python_version()}",
            settings=self._keywords,
            role=self.role,
            beside=self._beside_id().hex(),
            pids=pid_namespace(),
        )

    def _beside_id(self) -> bytes:
        beside = self._beside
        return beside.id if isinstance(beside, Session) else beside or b""

    def _whose_fault(self, timeout: float) -> str:
        endpoint = self.whereabouts.look()
        if endpoint is None:
            return "because no daemon is known"
        return f"by the daemon at {endpoint} within {timeout:.1f} s"

    def _where_they_are(self) -> str:
        path = self.sender.kept_in if self.sender is not None else None
        if path is None:
            return ""
        if self.settings.run_dir and path.is_relative_to(self.settings.run_dir):
            who = "the run's daemon collects them"
        elif self.settings.run_id:
            who = "the next worker of this run on this node hands them on, or `sidestep collect`"
        else:
            who = "`sidestep run -- sidestep collect --any` makes a run of them"
        return f"; {self.outbox.shelved} of them are kept in {path}: {who}"


def new_packer() -> Packer:
    """A packer of the size that most records have, since its buffer is kept."""
    return Packer(buf_size=16 * 1024)


_USERS = (DropReason.UNSUPPORTED, DropReason.BAD_STEP, DropReason.TOO_LARGE)
_living: weakref.WeakSet[Session] = weakref.WeakSet()
_abandoned: list[object] = []
"""What a child inherited: kept, so that no destructor touches the parent's socket."""


def _after_fork_in_child() -> None:
    for session in list(_living):
        session.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
