"""How long steps take and who holds them up, from the times at which ranks made the same call.

- a rank's *step time* is the time from its call at one step to its call at the next, per step
- in a training that waits for all its ranks at each step, every rank's step time is that of the slowest. So what
  is compared is the *work* of a rank: from when the last rank made its call at the step before until this one
  makes its own. Ranks that do not wait for each other are compared by their step times
- the *slowest* rank of a step is the one with the most work; the *score* of a rank is its work above that of the
  median rank, as a share of it, in the middle of its last `WINDOW` steps: a step that was slow once moves nothing
- a call that every rank makes just behind the point where they wait for each other shows no difference, and
  nobody is blamed; there a metric in which ranks log how long they worked (`work_metric`) may replace call times
- nodes have clocks of their own: times are moved by what `Clocks` knows of them
- values in, values out: no clock here
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import median, median_low
from typing import Any, Protocol

from sidestepd.reduce import is_number
from sidestepd.rows import Bundle, Part

WINDOW = 32
"""Steps that a score is made of."""
FEWEST = 8
"""Steps without which there is no score."""
STRIDE = 4
"""Steps from one look at the scores to the next; they are in the rows of these steps."""
SURE = 3.0
"""How many standard errors a score must be away from nothing."""
CLOCK_WINDOW_S = 60.0

STEP_TIME = "sidestep/step_time_s"
SLOWEST = "sidestep/slowest_rank"
SKEW = "sidestep/skew_s"
SCORE = "sidestep/straggler_score"
STRAGGLER = "sidestep/straggler_rank"
NOBODY = -1


class Seat(Protocol):
    """Who a session is."""

    @property
    def rank(self) -> int:
        """Its number in its launch."""
        ...

    @property
    def node(self) -> str:
        """Whose clock it has."""
        ...

    @property
    def launch(self) -> str:
        """The processes that it was started with."""
        ...

    @property
    def main(self) -> bool:
        """Whether it speaks for its rank, and is no forked child."""
        ...


class Clocks:
    """How far the clocks of nodes are apart.

    What is received at `r` was said before it, so `r` minus the time of the call is the node's offset from our
    clock plus a delay, and the least of many is the offset plus the least delay. Two nodes' offsets are told apart
    with an error of at most the difference of their least delays: what a message takes through the network
    and, at most, through one flush interval. Only the last one to two minutes count, so that clocks may drift.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[int, float, float]] = {}
        """Node to (number of the current window, least delay in it, least delay in the one before)."""

    def hear(self, node: str, called: float, received: float) -> None:
        """A record said at `called` by its node's clock came at `received` by ours."""
        window, delay = int(received // CLOCK_WINDOW_S), received - called
        current, least, before = self._nodes.get(node, (window, inf, inf))
        if window > current:
            current, least, before = window, inf, least if window == current + 1 else inf
        if delay < least:
            self._nodes[node] = (current, delay, before)
        elif current == window:
            self._nodes[node] = (current, least, before)

    def ahead(self, node: str, reference: str) -> float:
        """What to take from a time of `node` to have it by the clock of `reference`; 0 on the same node."""
        if node == reference:
            return 0.0
        one, other = self._offset(node), self._offset(reference)
        return 0.0 if inf in (one, other) else other - one

    def _offset(self, node: str) -> float:
        _, least, before = self._nodes.get(node, (0, inf, inf))
        return min(least, before)


@dataclass(frozen=True, slots=True)
class Score:
    """How much more work a rank has than the median rank; `sure`: that is no noise."""

    value: float
    sure: bool


class Pace:
    """The steps of one launch, seen as their rows leave."""

    def __init__(self, *, share: float, per_rank: int, work_metric: str) -> None:
        self.clocks = Clocks()
        self.scores: dict[int, Score] = {}
        """By rank, as of the newest step that was looked at."""
        self._share = share
        self._per_rank = per_rank
        self._work_metric = work_metric
        self._launch = ""
        self._before: dict[int, tuple[int, float, str]] = {}
        """Rank to (step, time, whose clock that is) of its newest call that is in a row."""
        self._windows: dict[int, deque[float]] = {}
        self._steps = 0

    @property
    def launch(self) -> str:
        """The launch whose steps were seen last."""
        return self._launch

    def note(self, part: Part, seat: Seat) -> None:
        """A call that is in a row of an earlier life."""
        self._turn_to(seat.launch)
        before = self._before.get(seat.rank)
        if before is None or part.step > before[0]:
            self._before[seat.rank] = (part.step, part.time, seat.node)

    def see(self, bundle: Bundle, seats: Mapping[bytes, Seat]) -> dict[str, Any]:
        """What a row of the main axis says of the pace of its ranks; {} if fewer than two are heard."""
        if len(bundle.parts) < 2:
            return {}
        calls = _same_call(bundle.parts, seats)
        if len(calls) < 2:
            return {}
        first = seats[calls[min(calls)].session]
        self._turn_to(first.launch)
        said = {rank: (bundle.step, it.time, seats[it.session].node) for rank, it in sorted(calls.items())}
        before = {rank: it for rank in said if (it := self._before.get(rank)) and it[0] < bundle.step}
        self._before.update(said)
        times = self._by_clock_of(first.node, said)
        own: dict[str, Any] = {SKEW: max(times.values()) - min(times.values())}
        return own | self._compare(bundle, times, before, first.node, seats)

    def _compare(
        self,
        bundle: Bundle,
        times: Mapping[int, float],
        before: Mapping[int, tuple[int, float, str]],
        node: str,
        seats: Mapping[bytes, Seat],
    ) -> dict[str, Any]:
        """Step times and the slowest rank, by what was said at the step before."""
        then = self._by_clock_of(node, before)
        took = {rank: (times[rank] - then[rank]) / (bundle.step - before[rank][0]) for rank in then}
        if len(took) < 2 or min(took.values()) < 0:  # less than nothing: somebody's clock was set
            return {}
        last_steps = {rank: it[0] for rank, it in before.items()}
        work = self._said_work(bundle.parts, seats) or _work(times, then, last_steps, took)
        return {
            STEP_TIME: sum(took.values()) / len(took),
            f"{STEP_TIME}.max": max(took.values()),
            SLOWEST: max(work, key=lambda rank: work[rank]),
            **self._weigh(work),
        }

    def _by_clock_of(self, node: str, said: Mapping[int, tuple[int, float, str]]) -> dict[int, float]:
        return {rank: time - self.clocks.ahead(whose, node) for rank, (_, time, whose) in said.items()}

    def _turn_to(self, launch: str) -> None:
        if launch != self._launch:
            self._launch = launch
            self._before, self._windows, self.scores = {}, {}, {}

    def _said_work(self, parts: Sequence[Part], seats: Mapping[bytes, Seat]) -> dict[int, float]:
        """The work that ranks say they did, if at least two do."""
        if not self._work_metric:
            return {}
        said = {
            seats[part.session].rank: float(value)
            for part in parts
            if part.session in seats and is_number(value := part.values.get(self._work_metric, ""))
        }
        good = {rank: value for rank, value in said.items() if 0 <= value < inf}
        return good if len(good) > 1 else {}

    def _weigh(self, work: Mapping[int, float]) -> dict[str, Any]:
        """Put a step into the windows, and now and then tell the scores."""
        middle = median_low(work.values())
        if middle <= 0:
            return {}
        for rank, time in work.items():
            self._windows.setdefault(rank, deque(maxlen=WINDOW)).append(time / middle - 1)
        self._steps += 1
        if self._steps % STRIDE:
            return {}
        full = {rank: self._windows[rank] for rank in work if len(self._windows[rank]) >= FEWEST}
        self.scores = {rank: score(it, self._share) for rank, it in full.items()}
        return self._told()

    def _told(self) -> dict[str, Any]:
        """The scores, for the row."""
        if not self.scores:
            return {}
        worst = max(self.scores, key=lambda rank: self.scores[rank].value)
        told = {
            SCORE: self.scores[worst].value,
            STRAGGLER: worst if self.scores[worst].sure else NOBODY,
        }
        if len(self.scores) <= self._per_rank:
            told |= {f"{SCORE}/rank{rank}": it.value for rank, it in sorted(self.scores.items())}
        return told

    def state(self) -> dict[str, Any]:
        """What outlives a crash: not the windows, which fill again."""
        return {"launch": self._launch, "before": {rank: list(it) for rank, it in self._before.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._launch = state["launch"]
        self._before = {rank: (step, time, node) for rank, (step, time, node) in state["before"].items()}


def score(excesses: Iterable[float], share: float) -> Score:
    """The middle of what a rank's work was above the median rank's.

    It is sure if it is `share` at least, and `SURE` standard errors away from nothing, as the median absolute
    deviation tells them: neither a few slow steps nor wide noise makes a straggler.
    """
    values = list(excesses)
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return Score(middle, sure=middle >= share and middle > SURE * spread / sqrt(len(values)))


def _same_call(parts: Sequence[Part], seats: Mapping[bytes, Seat]) -> dict[int, Part]:
    """By rank, the call of this row that the most ranks of one launch made, told by its names; of equals the last.

    Ranks do not all make the same calls: rank 0 may say more, and earlier or later than what all say.
    """
    calls: dict[tuple[str, frozenset[str]], dict[int, Part]] = {}
    for part in parts:
        seat = seats.get(part.session)
        if seat is not None and seat.main:
            ranks = calls.setdefault((seat.launch, frozenset(part.values)), {})
            known = ranks.get(seat.rank)
            if known is None or known.time <= part.time:
                ranks[seat.rank] = part
    return max(calls.values(), key=lambda ranks: (len(ranks), max(it.time for it in ranks.values())), default={})


def _work(
    times: Mapping[int, float], then: Mapping[int, float], last_steps: Mapping[int, int], took: Mapping[int, float]
) -> dict[int, float]:
    """How long each rank worked towards its call: since all had made theirs, if nobody went on before that."""
    all_there = max(then.values())
    together = len(set(last_steps.values())) == 1 and min(times[rank] for rank in then) >= all_there
    return {rank: times[rank] - all_there for rank in then} if together else dict(took)
