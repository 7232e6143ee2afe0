"""All sessions of a run on their way up: what the spool says of them, and what is said of them above.

    entry ─▶ read ─▶ passages ─▶ say ─▶ messages          hear ◀─ answers ─▶ settled: up to where, and what is open

- each session has a dialogue of its own with the daemon above; a daemon between the two adds nothing to it but
  its own name
- who is no rank waits for the first that is one: only then is known which run is meant
- what happened to a session (its HELLO, its end, what it counted) is kept here and in `state`; of the spool only
  frames are waited for
- no socket, no file and no clock: entries, answers and `now` in, messages out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sidestep.dialogue import Dialogue, Phase
from sidestep.wire import LANES, RELAY, WORKER, Frame, Hello, Message, Refuse, RunInfo, Status, Welcome
from sidestepd.entries import Entry, EntryKind
from sidestepd.upstream.passage import Carried, Passage

LOST = 1
"""The exit code of a session that ended without a word."""
Load = Callable[[Entry], Callable[[], Frame | None]]
"""How the bytes of a frame of blobs are found again, from the entry that tells of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upper:
    """What the run is called above: its id if it was given, else its place in its launch."""

    relay: bytes
    """The session of this relay."""
    node: str = ""
    pid: int = 0
    run: str | None = None
    turn: int = 0


@dataclass(slots=True, kw_only=True)
class Leg:
    """A session. `ending` is how it ended here, as long as that is not confirmed above."""

    passage: Passage
    hello: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ending: dict[str, Any] | None = None
    vital: tuple[str, float] | None = None
    tell_vital: bool = False
    caught_up: bool = True
    """What was told above of whether it has caught up, beside its frames."""
    dialogue: Dialogue | None = None
    refused: Refuse | None = None

    @property
    def role(self) -> str:
        """What the session is."""
        return str(self.hello.get("role", WORKER))

    @property
    def given_up(self) -> bool:
        """Whether it was refused, and is nobody that a run would miss."""
        return self.refused is not None and self.role not in (WORKER, *LANES)

    @property
    def over(self) -> bool:
        """Whether all of it is above, its end too."""
        return self.ending is not None and self.dialogue is not None and self.dialogue.phase is Phase.OVER


class Legs:
    """The sessions of one connection."""

    def __init__(self, upper: Upper, *, jitter: Callable[[], float], behind: Callable[[], bool]) -> None:
        self.legs: dict[bytes, Leg] = {}
        self.run: dict[str, Any] = {}
        """What the daemon above has told of the run."""
        self.intervals: dict[str, float] = {}
        """How often it wants workers to speak, and samples."""
        self.relay = upper.relay
        self._upper, self._jitter, self._behind = upper, jitter, behind

    # From the spool

    def read(self, entry: Entry) -> None:
        """What happened to a session; frames come by `carry`."""
        leg = self.leg(entry.session)
        match entry.kind:
            case EntryKind.HELLO:
                self._hello(leg, entry)
            case EntryKind.BYE | EntryKind.LEASE:
                facts = entry.facts
                leg.passage.count(facts)
                leg.passage.reach(entry.first)
                lost = entry.kind is EntryKind.LEASE
                leg.ending = {"exit_code": LOST if lost else facts.get("exit_code"), "lost": lost}
                leg.passage.said_more = False
                self._end(leg)
            case EntryKind.COUNTERS:
                leg.passage.count(entry.facts)
                leg.passage.said_more = bool(entry.facts.get("more", leg.passage.said_more))
                leg.caught_up = False
            case EntryKind.VITAL:
                leg.vital, leg.tell_vital = (entry.facts["state"], entry.facts["since"]), True

    def leg(self, session: bytes) -> Leg:
        """The session, known or new."""
        if session not in self.legs:
            self.legs[session] = Leg(passage=Passage(session, behind=self._behind))
        return self.legs[session]

    def carry(self, session: bytes, frame: Carried, *, more: bool) -> None:
        """A frame of a session is to go up; `more`: its worker had not caught up."""
        leg = self.leg(session)
        if leg.ending is not None:  # it speaks again
            self._revive(leg)
        leg.passage.said_more = more
        leg.passage.add(frame)

    def _hello(self, leg: Leg, entry: Entry) -> None:
        facts = dict(entry.facts)
        known = Hello.__dataclass_fields__.keys() - {"session", "first", "more", "settings"}
        leg.settings = dict(facts.get("settings", {}))
        leg.hello = {name: facts[name] for name in known & facts.keys()}
        for name in ("offered", "dropped", "values_refused"):
            leg.hello.pop(name, None)
        leg.passage.count(facts)
        leg.passage.reach(entry.first)
        leg.passage.said_more = bool(facts.get("more"))
        leg.caught_up = False
        leg.vital = None
        if leg.ending is not None:
            self._revive(leg)

    def _revive(self, leg: Leg) -> None:
        """It was taken for ended, and is not."""
        leg.ending, leg.dialogue = None, None

    def boot(self) -> None:
        """Intake started again: of nobody is it known that it has caught up."""
        for leg in self.legs.values():
            if leg.ending is None and leg.role == WORKER:
                leg.passage.said_more, leg.caught_up = True, False

    def introduce(self) -> None:
        """This relay itself is a session too: it vouches for the others."""
        leg, upper = self.leg(self.relay), self._upper
        leg.hello = {"role": RELAY, "launch": RELAY, "node": upper.node, "pid": upper.pid}

    def leave(self, exit_code: int) -> None:
        """All others have left: so does this relay."""
        leg = self.legs[self.relay]
        if leg.ending is None:
            leg.ending = {"exit_code": exit_code, "lost": False}
            self._end(leg)

    def ask(self) -> None:
        """Ask what has become known of the run."""
        dialogue = self.legs[self.relay].dialogue
        if dialogue is not None and dialogue.phase is Phase.OPEN:
            dialogue.ask()

    # The daemon above

    def say(self, now: float, spool_now: float) -> Iterator[Message]:
        """What is to be said now. It is taken as sent: ask only while there is room for it."""
        for session, leg in list(self.legs.items()):
            if leg.over or (leg.dialogue is None and not self._begin(session, leg)):
                continue
            dialogue = leg.dialogue
            assert dialogue is not None
            if leg.ending is not None and dialogue.phase is Phase.OPEN:
                leg.passage.step_over_the_rest()
            while (message := dialogue.say(now)) is not None:
                yield message
                if isinstance(message, Hello):
                    leg.tell_vital = leg.vital is not None and leg.vital[0] != "heard"
                elif isinstance(message, Frame):
                    leg.caught_up = not message.more
            if dialogue.phase is Phase.OPEN:
                yield from self._tell(leg, dialogue, spool_now)

    def _tell(self, leg: Leg, dialogue: Dialogue, now: float) -> Iterator[Message]:
        """What a session does not say itself, and whether it has caught up where no frame says so."""
        if leg.tell_vital and leg.vital is not None:
            leg.tell_vital = False
            state, since = leg.vital
            info = {"vital": state, "since_s": max(now - since, 0.0)}
            yield Status(session=leg.passage.session, info=info, **_counters(leg.passage), more=leg.passage.more)
        elif not leg.caught_up and not leg.passage.pending and not self._behind():
            leg.caught_up = True
            yield dialogue.status()

    def _begin(self, session: bytes, leg: Leg) -> bool:
        """Open a session's dialogue, as soon as it is known what to say in it."""
        if not leg.hello or leg.refused is not None:
            return False
        upper = self._upper
        is_rank = leg.role in (WORKER, *LANES)
        run = upper.run if is_rank else self.run.get("id") or upper.run
        if not is_rank and not run:
            return False
        relay = "" if session == self.relay else self.relay.hex()
        turn = upper.turn if leg.role == WORKER else 0
        facts = leg.hello | {"relay": relay, "run": run, "turn": turn, "settings": leg.settings}
        leg.dialogue = Dialogue(leg.passage, Hello(session=session, **facts), jitter=self._jitter)
        self._end(leg)
        return True

    def _end(self, leg: Leg) -> None:
        if leg.ending is not None and leg.dialogue is not None:
            leg.dialogue.leave(leg.ending["exit_code"], lost=leg.ending["lost"])

    def hear(self, message: Message, now: float) -> None:
        """Take in an answer."""
        leg = self.legs.get(message.session)
        if leg is None or leg.dialogue is None:
            return
        leg.dialogue.hear(message, now)
        if isinstance(message, Welcome):
            self._learn(message)
        if isinstance(message, RunInfo):
            self.run |= message.info
        if isinstance(message, Refuse) and message.final and leg.dialogue.phase is Phase.OVER:
            leg.refused, leg.dialogue = message, None

    def _learn(self, welcome: Welcome) -> None:
        self.run |= welcome.run
        self.intervals = {
            "flush_interval_s": welcome.flush_interval_s,
            "sample_interval_s": welcome.sample_interval_s,
        }

    def interrupted(self) -> None:
        """The connection is gone."""
        for leg in self.legs.values():
            if leg.dialogue is not None:
                leg.dialogue.interrupted()

    def due(self, now: float) -> float:
        """Seconds until something is to be said even if nothing happens."""
        open_ = (leg.dialogue for leg in self.legs.values() if leg.dialogue is not None)
        return min((it.due(now) for it in open_ if it.phase is not Phase.OVER), default=1.0)

    # How it stands

    @property
    def open(self) -> bool:
        """Whether the daemon above has welcomed anybody, and not been lost since."""
        dialogues = [leg.dialogue for leg in self.legs.values() if leg.dialogue is not None]
        return any(it.phase is Phase.OPEN for it in dialogues) or (bool(dialogues) and self.all_over)

    @property
    def all_over(self) -> bool:
        """Whether there is nobody left of whom anything is to be said, but for this relay itself."""
        return all(leg.over or leg.given_up for session, leg in self.legs.items() if session != self.relay)

    @property
    def left(self) -> bool:
        """Whether this relay has said its last word above, or there is no run there that it could say it to."""
        leg = self.legs[self.relay]
        if leg.dialogue is None:
            return True
        trouble = leg.dialogue.trouble
        return leg.over or (trouble is not None and trouble.code == "run" and leg.dialogue.phase is Phase.GREETING)

    @property
    def refused(self) -> Refuse | None:
        """Why the daemon above will never take what workers said."""
        ranks = (leg for leg in self.legs.values() if leg.role in (WORKER, *LANES))
        return next((leg.refused for leg in ranks if leg.refused is not None), None)

    @property
    def held(self) -> int:
        """Bytes of frames in memory."""
        return sum(leg.passage.held for leg in self.legs.values())

    @property
    def lost(self) -> int:
        """Records that were not here to be sent."""
        return sum(leg.passage.lost for leg in self.legs.values())

    @property
    def pending(self) -> int:
        """Records that were read, and are not known to be above."""
        return sum(leg.passage.pending for leg in self.legs.values())

    # What outlives this process

    def state(self) -> dict[bytes, dict[str, Any]]:
        """Every session that may still have something to say, as plain values; frames are in the spool."""
        return {
            session: {
                "hello": leg.hello,
                "settings": leg.settings,
                "ending": leg.ending,
                "vital": list(leg.vital) if leg.vital else None,
                "counters": _counters(leg.passage),
                "end": leg.passage.acknowledged,
            }
            for session, leg in self.legs.items()
            if session != self.relay and not (leg.over and not (leg.ending or {}).get("lost"))
        }

    def restore(self, state: Mapping[bytes, Mapping[str, Any]]) -> None:
        """Take up what `state` gave."""
        for session, facts in state.items():
            leg = self.leg(session)
            leg.hello, leg.settings, leg.ending = dict(facts["hello"]), dict(facts["settings"]), facts["ending"]
            leg.vital = tuple(facts["vital"]) if facts["vital"] else None
            leg.passage.count(facts["counters"])
            leg.passage.reach(facts["end"])


def _counters(passage: Passage) -> dict[str, Any]:
    return {
        "offered": passage.offered,
        "dropped": dict(passage.dropped),
        "values_refused": passage.values_refused,
    }


@dataclass(frozen=True, slots=True)
class Waiting:
    """An entry that was read. A frame waits until all below `end` is above, anything else for those before it."""

    entry: int
    kind: EntryKind
    session: bytes
    end: int
    count: int


@dataclass(slots=True)
class Settling:
    """Up to where everything is above: entries in their order, and what of them is still waited for."""

    cursor: int = 0
    delivered: int = 0
    """Records of the frames up to there that are above."""
    refused: int = 0
    """Those that nobody above wanted."""
    media: dict[bytes, int] = field(default_factory=dict)
    """Of each session that sends blobs, up to which sequence its entries are settled: their bytes are in files."""
    waiting: deque[Waiting] = field(default_factory=deque)

    def wait(self, entry: Entry) -> None:
        """An entry was read."""
        self.waiting.append(Waiting(entry.id, entry.kind, entry.session, entry.first + entry.count, entry.count))

    def look(self, legs: Legs) -> bool:
        """Go on as far as frames are above; whether that is further than before."""
        before = self.cursor
        while self.waiting:
            it = self.waiting[0]
            leg = legs.legs.get(it.session) if it.kind is EntryKind.FRAME else None
            above = leg is None or leg.passage.acknowledged >= it.end
            if not above and not (leg is not None and leg.given_up):
                break
            self.waiting.popleft()
            self.cursor = it.entry
            self.delivered += it.count if above else 0
            self.refused += 0 if above else it.count
            if it.kind is EntryKind.BLOBS:
                self.media[it.session] = it.end
        return self.cursor > before
