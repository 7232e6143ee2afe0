"""What only who hears all ranks can say: who fell silent, died without a word, or holds the others up.

- a rank is *silent* when nothing is heard of its process, not even heartbeats, for `silent_s`; or when it says
  nothing for that long while the others go on, though it spoke regularly before
- a launch has *stalled* when all its ranks say nothing for `stalled_s`, and none of them is silent or gone
- both wait longer for who has paused longer before without harm: three times the longest pause, up to `longest_s`,
  and three times the usual one in any case. A launch that has spoken a few times only, or not yet, may say nothing
  for `start_s`; so may a rank, and one that made a call or two is missed then only if most ranks go on
- a worker is *gone* when its process ended and it said no BYE; only the first is named of those that a launcher
  takes down with it
- each cause is told once while it lasts, and once more when it is over; what is open is kept by the row log, and
  whoever reads the same entries again does not tell it again
- time is spool time, and after BOOT nobody has been silent: a daemon that stood still has missed what was said
- samplers are no ranks, and are not watched; nor is one process by itself that logs no steps, and may come and go
- no I/O and no clock: entries and parts in, values for rows and alerts out
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from sidestep.wire import WORKER
from sidestepd.config import WatchOptions
from sidestepd.entries import Entry, EntryKind
from sidestepd.pace import Pace
from sidestepd.rows import MAIN_AXIS, Alert, Bundle, Part

WARM_UP = 3
"""Pauses at the beginning that say nothing of later ones: compiling, filling caches."""
REGULAR = 8
"""So many pauses make a rank one that speaks regularly."""
PATIENCE = 3
"""A pause is a silence when it is longer than so many times the longest one before."""
FEW = 3
"""Who made so many calls on the main axis is expected to make more."""
MOST_NAMES = 50
"""Metrics that an alert is raised for when they are no number."""
MOST_ALERTS = 500
"""After so many nobody reads them."""
_HANGS = ("silent/", "stalled/")
SKEW_STEPS = "sidestep/skew_steps"


@dataclass(slots=True, kw_only=True)
class _Voice:
    """How often somebody speaks."""

    spoke: float
    pauses: int = 0
    longest: float = 0.0
    """Of the pauses that did no harm, but for those of the beginning."""
    paused: float = 0.0
    """These together."""
    first: float = 0.0
    """The longest of the beginning."""
    excused: bool = False
    """Nobody listened since it spoke: whether it is silent is not known."""

    def hear(self, now: float, *, harmless: bool) -> None:
        """Something was said; a pause in which something was wrong is no measure for later ones."""
        pause = now - self.spoke
        if pause > 0:
            self.pauses += 1
            if harmless and not self.excused:
                if self.pauses > WARM_UP:
                    self.longest, self.paused = max(self.longest, pause), self.paused + pause
                else:
                    self.first = max(self.first, pause)
        self.spoke, self.excused = now, False

    def excuse(self, now: float) -> None:
        """Whatever it said until now was not heard."""
        self.spoke, self.excused = now, True

    def silent_for(self, now: float, at_least: float, at_most: float) -> bool:
        """Whether this pause is longer than any that may be expected.

        `at_most` is how long the longest one may make us wait: it may have been a checkpoint, made once in hours.
        The usual one is what it is.
        """
        usual = self.paused / max(self.pauses - WARM_UP, 1)
        return now - self.spoke >= max(at_least, PATIENCE * usual, min(PATIENCE * self.longest, at_most))

    def silent_from_the_start(self, now: float, at_least: float) -> bool:
        """The same of one that has hardly spoken: its first pauses are all that is known of it."""
        return now - self.spoke >= max(at_least, PATIENCE * self.first, PATIENCE * self.longest)

    @property
    def is_regular(self) -> bool:
        """Whether enough was heard to tell how often it speaks."""
        return self.pauses >= REGULAR


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A session, as far as it is watched. `main`: it speaks for its rank, and is no forked child."""

    rank: int
    name: str
    """Of its launch, over all attempts."""
    launch: str
    node: str = ""
    pid: int = 0
    attempt: int = 0
    main: bool = True
    joined: float = 0.0
    voice: _Voice
    step: int = -1
    calls: int = 0
    """On the main axis."""
    quiet_since: float | None = None
    gone_at: float | None = None
    ended: bool = False
    replaced: bool = False
    """A later attempt of its rank has begun."""

    @property
    def lives(self) -> bool:
        """Whether more is to be heard of it."""
        return not self.ended and not self.replaced and self.gone_at is None

    @property
    def where(self) -> str:
        """For people; a worker's words are not trusted."""
        return f"process {self.pid} on {_cut(self.node)}"


@dataclass(slots=True, kw_only=True)
class _Launch:
    """Processes started together. `step` is below 0 as long as none logged a step of the main axis."""

    voice: _Voice
    step: int = -1


@dataclass(slots=True)
class _Told:
    """Causes that are open, and what else is known of alerts so far."""

    open: dict[str, Alert] = field(default_factory=dict)
    count: int = 0
    well_since: float = -inf
    """Since when nobody is silent and nothing has stalled; infinity while it is so."""
    through: int = 0
    """The entry that an earlier life had read when it told the last of these; what comes by then is not judged."""


class Watch:
    """The sessions of a run, listened to. With everything switched off it costs next to nothing."""

    def __init__(self, options: WatchOptions) -> None:
        self.options = options
        self.pace = Pace(share=options.straggler_share, per_rank=options.per_rank, work_metric=options.work_metric)
        self._workers: dict[bytes, _Worker] = {}
        self._launches: dict[str, _Launch] = {}
        self._slow_since: dict[bytes, float] = {}
        self._weighed, self._weighed_at = self.pace.scores, -inf
        """The scores that were seen last, and since when: they tell nothing of the time after their steps."""
        self._told = _Told()
        self._alerts: list[Alert] = []
        self._read = 0
        """The entry that was heard last."""
        self.prompt = True
        """Whether what is read now came when it was said: else the time it took tells nothing of clocks."""
        self._due = 0.0
        self._stride = min(1.0, options.silent_s / 8)
        self._watched: dict[str, bool] = {}
        self._nodes: set[str] = set()

    # What is heard

    def read(self, entry: Entry, launch: str, *, logged: bool) -> None:
        """Take in an entry, after its parts; `launch` is the one that its session belongs to.

        `logged`: there is a call of `log()` in it. What a process says by itself, samples of its GPUs for
        instance, does not show that its training goes on.
        """
        self._read, now = entry.id, entry.received
        match entry.kind:
            case EntryKind.FRAME if logged:
                self._speak(entry.session, now)
            case EntryKind.HELLO:
                self._join(entry, launch)
            case EntryKind.BYE:
                if entry.session in self._workers:
                    self._workers[entry.session].ended = True
            case EntryKind.BOOT:
                self._boot(now)
            case EntryKind.VITAL:
                self._sense(entry)
            case EntryKind.CLOSE:
                self._due = 0.0  # what is not seen now is never seen

    def hear(self, part: Part, now: float) -> None:
        """Take in a call; it may have waited for its step since its frame was read."""
        worker = self._workers.get(part.session)
        if worker is None:
            return
        if len(self._nodes) > 1 and self.prompt:
            self.pace.clocks.hear(worker.node, part.time, now)
        if part.used and part.axis == MAIN_AXIS and not part.apart:
            self.pace.note(part, worker)
        if self.options.not_finite:
            for name, value in _not_finite(part.values):
                self._see_not_finite(name, value, part, now)
        if worker.main and part.axis == MAIN_AXIS:
            self._move(worker, part, now)

    def _join(self, entry: Entry, launch: str) -> None:
        facts, now = entry.facts, entry.received
        if facts.get("role", WORKER) != WORKER:
            return
        worker = self._workers.get(entry.session)
        if worker is None:
            worker = self._workers[entry.session] = _Worker(
                rank=facts["rank"], name=facts["launch"], launch=launch, attempt=facts.get("attempt", 0),
                node=facts.get("node", ""), pid=facts.get("pid", 0), joined=now, voice=_Voice(spoke=now),
            )  # fmt: skip
            others = [it for it in self._workers.values() if it is not worker and it.rank == worker.rank]
            for it in others:
                it.replaced = it.replaced or (it.name == worker.name and it.attempt < worker.attempt)
            worker.main = not any(it.main and it.lives and it.launch == launch for it in others)
            self._nodes.add(worker.node)
        self._launches.setdefault(launch, _Launch(voice=_Voice(spoke=now)))
        worker.ended, worker.quiet_since, worker.gone_at = False, None, None
        worker.voice.excused = False

    def _speak(self, session: bytes, now: float) -> None:
        """A frame came: after which pause, if its launch logs steps already."""
        worker = self._workers.get(session)
        if worker is None:
            return
        worker.quiet_since = worker.gone_at = None
        launch = self._launches[worker.launch]
        if launch.step < 0:
            launch.voice.spoke = worker.voice.spoke = now  # how long it took to begin says nothing
        elif worker.main:
            launch.voice.hear(now, harmless=launch.voice.spoke >= self._told.well_since)
            worker.voice.hear(now, harmless=worker.voice.spoke >= self._told.well_since)

    def _move(self, worker: _Worker, part: Part, now: float) -> None:
        """A rank is at this step."""
        launch = self._launches[worker.launch]
        if launch.step < 0:
            launch.voice.spoke = now
        if worker.step < 0:
            worker.voice.spoke = now
        worker.calls += 1
        worker.step, launch.step = max(worker.step, part.step), max(launch.step, part.step)

    def _boot(self, now: float) -> None:
        for worker in self._workers.values():
            worker.quiet_since = None
            worker.voice.excuse(now)
        for launch in self._launches.values():
            launch.voice.excuse(now)
        self._slow_since.clear()
        self._weighed_at = now

    def _sense(self, entry: Entry) -> None:
        worker, facts = self._workers.get(entry.session), entry.facts
        if worker is None:
            return
        match facts["state"]:
            case "quiet":
                worker.quiet_since = facts["since"]
            case "heard":
                worker.quiet_since, worker.voice.excused = None, False
            case "gone" if not worker.ended:
                worker.gone_at, worker.quiet_since = facts["since"], None
                self._succeed(worker)

    def _succeed(self, gone: _Worker) -> None:
        """Who came for a rank before its end was known speaks for it now."""
        others = [it for it in self._of(gone.launch) if it.rank == gone.rank and it.lives]
        if gone.main and others and not any(it.main for it in others):
            others[-1].main = True

    def _of(self, launch: str) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.launch == launch]

    def _see_not_finite(self, name: str, value: float, part: Part, now: float) -> None:
        cause = f"nan/{name}"
        if cause in self._told.open or not self._is_watched(name):
            return
        if sum(cause.startswith("nan/") for cause in self._told.open) < MOST_NAMES:
            text = f"{_cut(name)} became {value} on rank {part.rank} at step {part.step} of {_cut(part.axis)}."
            self._raise(cause, f"{_cut(name)} is {value}", text, now)

    def _is_watched(self, name: str) -> bool:
        answer = self._watched.get(name)
        if answer is None:
            lower = name.lower()
            answer = any(fnmatchcase(lower, pattern.lower()) for pattern in self.options.not_finite)
            if len(self._watched) < 65_536:
                self._watched[name] = answer
        return answer

    # What rows say

    def annotate(self, bundles: Iterable[Bundle]) -> Iterator[Bundle]:
        """Rows of the main axis, with what is known of all ranks at their step."""
        for bundle in bundles:
            wanted = self.options.metrics or self.options.stragglers
            if not wanted or bundle.axis != MAIN_AXIS or bundle.late or bundle.apart:
                yield bundle
                continue
            own = self.pace.see(bundle, self._workers)
            if own and (skew := self._skew()) is not None:
                own[SKEW_STEPS] = skew
            yield replace(bundle, own=own) if self.options.metrics and own else bundle

    def _skew(self) -> int | None:
        """How many steps lie between the first and the last rank that speak regularly."""
        steps = [
            worker.step
            for worker in self._workers.values()
            if worker.launch == self.pace.launch and worker.main and worker.lives
            if worker.voice.is_regular
        ]
        return max(steps) - min(steps) if len(steps) > 1 else None

    # What time shows

    def poll(self, now: float) -> None:
        """See what is so by spool time `now`."""
        if now < self._due:
            return
        self._due = now + self._stride
        if self._read < self._told.through:
            return  # an earlier life has seen this
        for name, launch in self._launches.items():
            workers = {id_: it for id_, it in self._workers.items() if it.launch == name and it.main}
            if self.options.hangs and (launch.step >= 0 or len(workers) > 1):
                self._see_gone(workers, now)
                for id_, worker in workers.items():
                    self._see_silent(id_, worker, launch, now)
                self._see_stalled(name, launch, workers, now)
        if self.options.stragglers:
            self._see_stragglers(now)

    def _see_gone(self, workers: Mapping[bytes, _Worker], now: float) -> None:
        dead = sorted(
            ((it.gone_at, id_) for id_, it in workers.items() if it.gone_at is not None), key=lambda it: it[0]
        )
        leader: float | None = None
        for at, id_ in dead:
            if leader is not None and workers[id_].joined <= leader and at < leader + self.options.silent_s:
                continue
            leader = at
            followers = [workers[other] for when, other in dead if other != id_ and at <= when < at + 1.0]
            self._raise(
                _about("gone", id_),
                f"rank {workers[id_].rank} ended without a word",
                f"Rank {workers[id_].rank} ({workers[id_].where}) ended without a word, "
                f"{_at(workers[id_].step)}: it was killed, or ran out of memory."
                + (f" {_ranks(followers)} ended within a second of it." if followers else ""),
                now,
                "ERROR",
            )
        for id_, worker in workers.items():
            if worker.gone_at is None:
                self._clear(_about("gone", id_), f"rank {worker.rank} is there after all", "", now)

    def _see_silent(self, id_: bytes, worker: _Worker, launch: _Launch, now: float) -> None:
        cause, silent_s = _about("silent", id_), self.options.silent_s
        if not worker.lives or (worker.voice.excused and worker.quiet_since is None):
            return
        if worker.quiet_since is not None:
            if now - worker.quiet_since < silent_s:
                return
            for_s = now - worker.quiet_since
            why = "not even its heartbeats came: it is stopped, swapped out, or cut off"
        elif self._is_missed(worker, now) and self._is_ahead(launch, worker):
            for_s = now - worker.voice.spoke
            why = f"its process lives; the others are at step {launch.step}"
        else:
            self._clear(cause, f"rank {worker.rank} is heard again", f"It is {_at(worker.step)}.", now)
            return
        self._raise(
            cause,
            f"rank {worker.rank} is silent",
            f"Nothing was heard of rank {worker.rank} ({worker.where}) for {for_s:.0f} s; {why}. "
            f"It was {_at(worker.step)}.",
            now,
        )

    def _is_missed(self, worker: _Worker, now: float) -> bool:
        """Whether it says nothing for longer than it may; who never spoke is not expected to."""
        voice = worker.voice
        if voice.is_regular:
            return voice.silent_for(now, self.options.silent_s, self.options.longest_s)
        if not worker.calls or not voice.silent_from_the_start(now, self.options.start_s):
            return False
        ranks = [it for it in self._of(worker.launch) if it.main and it.lives]
        return worker.calls >= FEW or 2 * sum(self._is_ahead(it, worker) for it in ranks) > len(ranks)

    def _is_ahead(self, other: _Launch | _Worker, worker: _Worker) -> bool:
        """Whether another, or the launch, goes on with the training while this one says nothing."""
        later = worker.voice.spoke + self.options.silent_s / 2
        return other.step > worker.step + 1 and other.voice.spoke >= later

    def _see_stalled(self, name: str, launch: _Launch, workers: Mapping[bytes, _Worker], now: float) -> None:
        cause = f"stalled/{name}"
        if launch.voice.excused:
            return
        at_least = self.options.stalled_s if launch.voice.is_regular else self.options.start_s
        if not launch.voice.silent_for(now, at_least, self.options.longest_s):
            self._clear(cause, "the training goes on", f"It is at step {launch.step}.", now)
            return
        there = {id_: it for id_, it in workers.items() if it.lives}
        lately = launch.voice.spoke - self.options.silent_s
        explained = any(it.gone_at is not None and it.gone_at >= lately for it in workers.values()) or any(
            it.quiet_since is not None or _about("silent", id_) in self._told.open for id_, it in there.items()
        )
        if not there or explained:
            return
        behind = [it for it in there.values() if it.step < launch.step]
        ahead = len(there) > len(behind) > 0
        self._raise(
            cause,
            f"no word from {'any rank' if len(there) > 1 else 'the training'}",
            f"All {len(there)} live processes said nothing for {now - launch.voice.spoke:.0f} s, "
            f"{_at(launch.step)}; their heartbeats come."
            + (f" Behind the others: {_ranks(behind)}." if ahead else ""),
            now,
        )

    def _see_stragglers(self, now: float) -> None:
        if self.pace.scores is not self._weighed:
            self._weighed, self._weighed_at = self.pace.scores, now
        launch = self.pace.launch
        there = ((id_, it) for id_, it in self._workers.items() if it.launch == launch and it.main and it.lives)
        sessions = {it.rank: id_ for id_, it in there}
        for rank, score in self.pace.scores.items():
            if (id_ := sessions.get(rank)) is None:
                continue
            cause = _about("straggler", id_)
            if score.value < self.options.straggler_share / 2:
                self._slow_since.pop(id_, None)
                self._clear(cause, f"rank {rank} keeps up again", f"Its score is {score.value:.2f}.", now)
            elif score.sure and self._slow_for(id_) >= self.options.straggler_s:
                self._raise(
                    cause,
                    f"rank {rank} is slower than the others",
                    f"Rank {rank} ({self._workers[id_].where}) takes {100 * score.value:.0f} % more time for its "
                    f"share of a step than the median rank, at step {self._workers[id_].step}.",
                    now,
                )

    def _slow_for(self, id_: bytes) -> float:
        """How long its steps have been slow: a pause after them does not make them more."""
        return self._weighed_at - self._slow_since.setdefault(id_, self._weighed_at)

    # Telling

    def _raise(self, cause: str, title: str, text: str, now: float, level: str = "WARN") -> None:
        if cause not in self._told.open and self._told.count < MOST_ALERTS:
            self._tell(Alert(cause=cause, title=title, text=text, level=level, time=now))

    def _clear(self, cause: str, title: str, text: str, now: float) -> None:
        if (raised := self._told.open.get(cause)) is not None:
            after = f"After {now - raised.time:.0f} s: {title}. {text}".strip()
            self._tell(Alert(cause=cause, title=title, text=after, level="INFO", time=now, over=True))

    def _tell(self, alert: Alert) -> None:
        _account(self._told, alert)
        self._alerts.append(alert)

    def take(self) -> list[Alert]:
        """The alerts since this was asked last; they must be written down, with the entry that was read last."""
        taken, self._alerts = self._alerts, []
        return taken

    # What outlives a crash

    def state(self) -> dict[str, Any]:
        """Who was heard and when, as plain values."""
        return {
            "workers": {id_: asdict(it) for id_, it in self._workers.items()},
            "launches": {name: asdict(it) for name, it in self._launches.items()},
            "pace": self.pace.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._workers = {id_: _Worker(**_with_voice(it)) for id_, it in state["workers"].items()}
        self._launches = {name: _Launch(**_with_voice(it)) for name, it in state["launches"].items()}
        for worker in self._workers.values():
            self._nodes.add(worker.node)
            self._launches.setdefault(worker.launch, _Launch(voice=_Voice(spoke=worker.joined)))
        self.pace.restore(state["pace"])

    def take_up(self, told: Sequence[Alert], through: int) -> None:
        """What earlier lives told, and the entry up to which they had read when they did so last."""
        for alert in told:
            _account(self._told, alert)
        self._told.through = through


def _account(told: _Told, alert: Alert) -> None:
    told.count += 1
    if alert.over:
        told.open.pop(alert.cause, None)
    else:
        told.open[alert.cause] = alert
    if alert.cause.startswith(_HANGS):
        told.well_since = inf if any(cause.startswith(_HANGS) for cause in told.open) else alert.time


def _about(what: str, session: bytes) -> str:
    return f"{what}/{session.hex()}"


def _with_voice(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "voice": _Voice(**state["voice"])}


def _not_finite(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The values that are NaN or infinite, those in nested dicts too."""
    found = []
    for name, value in values.items():
        if type(value) is float:
            if value - value != 0:
                found.append((prefix + name, value))
        elif type(value) is dict:
            found += _not_finite(value, f"{prefix}{name}.")
    return found


def _ranks(workers: Sequence[_Worker]) -> str:
    ranks = sorted(worker.rank for worker in workers)
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _at(step: int) -> str:
    return f"at step {step}" if step >= 0 else "before the first step"


def _cut(text: str) -> str:
    """A name from outside, for people: no control characters, and not without end."""
    return repr(text[:100])[1:-1]
