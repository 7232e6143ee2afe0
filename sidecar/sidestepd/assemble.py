"""Make rows: reduce over ranks, let axes meet, and give each row a `_step` that wandb accepts.

- `_step` is `max(step, last + 1)` on the main axis: it never goes back, and equals the step as long as nobody
  else had to take one of its own
- a row of another axis waits to be merged into the next main row; when no main row comes in time, or their
  names clash, it takes `last + 1` for itself; so it does when a newer one of its axis comes, as that would merge
- in a merged row it can be told from a name alone which axis it belongs to
- the value of the axis is data in every row, and every name is defined once, exactly, with its axis. Where a
  user's own metric has the axis's name, its value is there, and that of the axis under `sidestep/` and that name
- a late row is a row of its own; a share of a value that was already written goes under `<name>.late`
- a row that is a process's own meets no other, says whose it is, and is not what others' steps are measured by
- attempts do not meet in a row; a step that an earlier attempt has in a row is said again, and says so
- no I/O and no clock here: callers pass `now`
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import astuple, dataclass, replace
from typing import Any

from sidestepd.packed import has_media
from sidestepd.quota import leaves
from sidestepd.reduce import is_number, reduce_parts
from sidestepd.rows import MAIN_AXIS, OWN_PREFIX, PROCESS, Aggregate, Bundle, Definition, Latest, Position, Row
from sidestepd.rules import Rules

NOWHERE = (-1, -1)
"""The attempt and step of an axis that is in no row."""


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A bundle reduced, without a `_step` yet. `since`: when it began to wait."""

    axis: str
    attempt: int
    step: int
    time: float
    values: dict[str, Any]
    positions: tuple[Position, ...]
    ranks: int
    since: float
    conflicts: int
    own: Mapping[str, Any]
    apart: str


class Assembler:
    """Bundles in, rows out, in the order in which they must be written."""

    def __init__(
        self, rules: Rules, *, patience: float, max_wait: float, window: int, ranks_reported: bool = True
    ) -> None:
        self.rules = rules
        self._ranks_reported = ranks_reported
        self.last = -1
        """The `_step` given last."""
        self.shift = 0
        """How far `_step` is ahead of the main axis."""
        self.late_rows = 0
        self.conflicts = 0
        self.late_values = 0
        self.forced_rows = 0
        self.released: dict[tuple[str, int], int] = {}
        """The highest step of each axis and attempt that is in a row."""
        self._furthest: dict[str, tuple[int, int]] = {}
        """The newest attempt of each axis, and the highest step of that which is in a row."""
        self._latest: dict[str, Latest] = {}
        self._recent: dict[str, Row] = {}
        """The newest row of each name that is not in `_latest` yet: looked at once for many rows."""
        self.defined: dict[str, Definition] = {}
        self._defined_as_of: dict[str, int] = {}
        self._settled: set[str] = set()
        """Names whose values are no dicts, and that were defined as of the newest declaration."""
        self._settled_as_of = 0
        self._aggregates: dict[str, Aggregate] = {}
        self._patience = patience
        self._max_wait = max_wait
        self._window = window
        self._waiting: dict[str, _Draft] = {}
        """The newest row of each other axis, in the order in which they came."""
        self._changed: dict[str, Latest] = {}
        self._written: OrderedDict[tuple[str, int, int], Set[str]] = OrderedDict()
        self._forgotten: dict[tuple[str, int], int] = {}
        """The step of each axis and attempt up to which it may be unknown what was written."""
        self._main_at: float | None = None
        self._interval = 0.0
        self._shift_told = 0

    # Rows

    def add(self, bundles: Iterable[Bundle], *, world: int, now: float) -> list[Row]:
        """The rows that follow at once from `bundles`; rows of other axes wait for `ready`."""
        rows: list[Row] = []
        for bundle in bundles:
            draft = self._draft(bundle, now)
            self.forced_rows += bundle.cause == "forced"
            if bundle.apart:
                rows.append(self._late(draft) if bundle.late else self._apart(draft))
                continue
            if bundle.axis == MAIN_AXIS and not bundle.late:
                rows.extend(self._main(draft, world))
                continue
            waiting = self._waiting.get(draft.axis)
            if waiting is not None and (waiting.step <= draft.step or not bundle.late):
                rows.extend(self._alone(draft.axis))
            if bundle.late:
                rows.append(self._late(draft))
            else:
                self._waiting[draft.axis] = draft
        return rows

    def ready(self, now: float) -> list[Row]:
        """The rows of other axes that no main row came for in time."""
        limit = min(self._max_wait, max(self._patience, 2 * self._interval))
        return self._alone(*(axis for axis, draft in self._waiting.items() if now >= draft.since + limit))

    def flush(self) -> list[Row]:
        """Everything that waits leaves."""
        return self._alone(*self._waiting)

    @property
    def waiting(self) -> int:
        """Rows that wait for a main row."""
        return len(self._waiting)

    def _draft(self, bundle: Bundle, now: float) -> _Draft:
        reduced = reduce_parts(bundle.parts, self.rules, {bundle.axis, *self.rules.step_metrics})
        first = min(bundle.parts, key=lambda part: (part.rank, part.position.seq))
        return _Draft(
            axis=bundle.axis,
            attempt=bundle.attempt,
            step=bundle.step,
            time=first.time,
            values=_with_axis(bundle, reduced.values),
            positions=tuple(part.position for part in bundle.parts if not part.settled),
            ranks=len({part.rank for part in bundle.parts}),
            since=now,
            conflicts=reduced.conflicts,
            own=bundle.own,
            apart=bundle.apart,
        )

    def _main(self, draft: _Draft, world: int) -> Iterator[Row]:
        """The main row, after those that must go before it, merged with those that may."""
        guests = self._guests(draft) if self._waiting else []
        if self._waiting:
            yield from self._alone(*(self._waiting.keys() - {guest.axis for guest in guests}))
            self._waiting = {}
        if self._main_at is not None:
            self._interval = draft.since - self._main_at
        self._main_at = draft.since
        step = max(draft.step, self.last + 1)
        self.shift = step - draft.step
        values = {name: value for guest in guests for name, value in guest.values.items()}
        values |= draft.values
        values |= self._own(draft, world)
        yield self._row(draft, guests, step=step, values=values)

    def _own(self, draft: _Draft, world: int) -> dict[str, Any]:
        """What sidestep says of a main row."""
        own: dict[str, Any] = dict(draft.own)
        if world > 1 and self._ranks_reported:
            own[f"{OWN_PREFIX}ranks_reported"] = draft.ranks
        if self.shift or self._shift_told:
            own[f"{OWN_PREFIX}step_shift"] = self._shift_told = self.shift
        return own

    def _guests(self, main: _Draft) -> list[_Draft]:
        """Who of the waiting merges into a main row."""
        row = [main]
        for draft in self._waiting.values():
            if draft.attempt == main.attempt and self._can_meet([*row, draft]):
                row.append(draft)
        return row[1:]

    def _can_meet(self, drafts: Sequence[_Draft]) -> bool:
        """Whether no name is said twice, and each is of the axis that it would be taken for in one row."""
        axes = [draft.axis for draft in drafts]
        names = [(name, draft.axis) for draft in drafts for name in draft.values]
        return len(names) == len(dict(names)) and all(
            axis == _axis_of(name, axes) or name in self.rules.step_metrics or name.startswith(OWN_PREFIX)
            for name, axis in names
        )

    def _alone(self, *axes: str) -> list[Row]:
        """What waits on these axes leaves, each in a row of its own."""
        drafts = [self._waiting.pop(axis) for axis in list(self._waiting) if axis in axes]
        return [self._row(draft, (), step=self.last + 1, values=draft.values) for draft in drafts]

    def _apart(self, draft: _Draft) -> Row:
        return self._row(draft, (), step=self.last + 1, values=draft.values)

    def _late(self, draft: _Draft) -> Row:
        written = self._names_at(draft) - {draft.axis, OWN_PREFIX + draft.axis, *self.rules.step_metrics}
        self.late_rows += 1
        self.late_values += len(written & draft.values.keys())
        values = {f"{name}.late" if name in written else name: value for name, value in draft.values.items()}
        values[f"{OWN_PREFIX}late_rows"] = self.late_rows
        return replace(self._row(draft, (), step=self.last + 1, values=values), late=True)

    def _names_at(self, draft: _Draft) -> Set[str]:
        """The names written at a step; of a step that left the window, the names whose values may be there."""
        if draft.apart:
            return frozenset()  # each row of its own stands for itself
        written: Set[str] = self._written.get((draft.axis, draft.attempt, draft.step), frozenset())
        if draft.step > self._forgotten.get((draft.axis, draft.attempt), -1):
            return written
        place = (draft.attempt, draft.step)
        return written | {
            name for name, it in self.latest.items() if it.axis == draft.axis and (it.attempt, it.step) >= place
        }

    def _newer_than(self, draft: _Draft, names: Iterable[str]) -> dict[str, Any]:
        """Newer values of names, for the summary; wandb's own aggregates are left alone."""
        newer, place = {}, (draft.attempt, draft.step)
        for name in names:
            latest = self.latest.get(name)
            if name.startswith(OWN_PREFIX) or latest is None or self.rules.of_made(name).summary is not None:
                continue
            if has_media(latest.value):
                continue  # wandb alone can put it there
            if latest.axis == draft.axis and (latest.attempt, latest.step) > place:
                newer[name] = latest.value
        return newer

    def _is_behind(self, draft: _Draft) -> bool:
        """Whether a row of its axis holds a later step, or a later attempt."""
        return not draft.apart and self._furthest.get(draft.axis, NOWHERE) > (draft.attempt, draft.step)

    def _is_said_again(self, draft: _Draft) -> bool:
        """Whether an earlier attempt came as far, and this one goes over it anew."""
        return any(
            axis == draft.axis and attempt < draft.attempt and step >= draft.step
            for (axis, attempt), step in self.released.items()
        )

    def _row(self, draft: _Draft, guests: Sequence[_Draft], *, step: int, values: dict[str, Any]) -> Row:
        drafts = (draft, *guests)
        if draft.attempt and any(map(self._is_said_again, drafts)):
            values[f"{OWN_PREFIX}attempt"] = draft.attempt
        if draft.apart:
            values[PROCESS] = draft.apart
        row = Row(
            step=step,
            time=draft.time,
            values=values,
            places={it.axis: it.step for it in drafts},
            positions=tuple(position for it in drafts for position in it.positions),
            attempt=draft.attempt,
            restore=self._newer_than(draft, values) if self._is_behind(draft) else {},
            apart=draft.apart != "",
        )
        self.conflicts += sum(it.conflicts for it in drafts)
        self.remember(row)
        if self.rules.summarized:
            self._aggregate(values)
        return row

    # What is remembered of rows

    def remember(self, row: Row) -> None:
        """Note what a row holds, made now or in an earlier life."""
        self.last = max(self.last, row.step)
        if row.apart:
            self._recent.update(dict.fromkeys(row.values, row))
            return
        attempt, behind = row.attempt, False
        for axis, step in row.places.items():
            place = (axis, attempt)
            furthest = self._furthest.get(axis, NOWHERE)
            behind = behind or furthest > (attempt, step)
            self._furthest[axis] = max((attempt, step), furthest)
            self.released[place] = max(step, self.released.get(place, step))
            before, names = self._written.get((axis, attempt, step)), row.values.keys()
            self._written[axis, attempt, step] = names if before is None else before | names
        while len(self._written) > self._window:
            (axis, attempt, step), _ = self._written.popitem(last=False)
            self._forgotten[axis, attempt] = max(step, self._forgotten.get((axis, attempt), step))
        if behind:
            for name in row.values:
                self._note(name, row)
        else:
            self._recent.update(dict.fromkeys(row.values, row))

    @property
    def latest(self) -> dict[str, Latest]:
        """The newest value of each name."""
        for name, row in self._recent.items():
            axis = _axis_of(name, row.places)
            new = Latest(
                axis=axis, attempt=row.attempt, step=row.places[axis], time=row.time, value=row.values[name]
            )
            self._latest[name] = self._changed[name] = new
        self._recent = {}
        return self._latest

    def _note(self, name: str, row: Row) -> None:
        """Take a value of a row that is behind, unless there is a newer one."""
        axis, old = _axis_of(name, row.places), self.latest.get(name)
        place = (row.attempt, row.places[axis])
        if old is None or old.axis != axis or (old.attempt, old.step) <= place or name.startswith(OWN_PREFIX):
            self._recent[name] = row

    def take_changed(self) -> dict[str, Latest]:
        """The newest values that changed since this was asked last."""
        _ = self.latest
        changed, self._changed = self._changed, {}
        return changed

    def new_definitions(self, rows: Iterable[Row]) -> list[Definition]:
        """Definitions for the names that these rows are the first to hold since anything was declared."""
        new: list[Definition] = []
        if self._settled_as_of != self.rules.version:
            self._settled, self._settled_as_of = set(), self.rules.version
        for row in rows:
            if self._settled.issuperset(row.values) and dict not in map(type, row.values.values()):
                continue
            for name in leaves(row.values):
                if self._defined_as_of.get(name) != self.rules.version:
                    self._defined_as_of[name] = self.rules.version
                    definition = self._definition(name, row)
                    if self.defined.get(name) != definition:
                        self.defined[name] = definition
                        new.append(definition)
            self._settled.update(name for name, value in row.values.items() if type(value) is not dict)
        return new

    def _aggregate(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if self.rules.of_made(name).summary is None or not is_number(value):
                continue
            if name in self._aggregates:
                self._aggregates[name].add(value)
            else:
                self._aggregates[name] = Aggregate.of(value)

    def newest(self) -> dict[str, Any]:
        """The newest value of each name, but for those of which something else was declared to be shown."""
        return {
            name: it.value
            for name, it in self.latest.items()
            if self._summary_of(name) is None and not has_media(it.value)
        }

    def aggregated(self) -> dict[str, dict[str, float]]:
        """What was declared to be shown of names instead of their newest values, over all rows of all lives."""
        shown = {name: it.shown(self._summary_of(name) or "") for name, it in self._aggregates.items()}
        return {name: values for name, values in shown.items() if values}

    def _summary_of(self, name: str) -> str | None:
        return self.defined[name].summary if name in self.defined else None

    def _definition(self, name: str, row: Row) -> Definition:
        rule = self.rules.of_made(name)
        axis = None if name in row.places else rule.step_metric or _axis_of(name, row.places)
        return Definition(
            name=name,
            step_metric=None if axis == name else axis,
            summary=rule.summary,
            hidden=rule.hidden,
        )

    def marks(self) -> dict[str, Any]:
        """What must be committed together with rows, as plain values."""
        return {
            "last": self.last,
            "shift": self.shift,
            "shift_told": self._shift_told,
            "late_rows": self.late_rows,
            "conflicts": self.conflicts,
            "interval": self._interval,
            "main_at": self._main_at,
            "late_values": self.late_values,
            "forced_rows": self.forced_rows,
            "released": [[axis, attempt, step] for (axis, attempt), step in self.released.items()],
            "aggregates": {name: list(astuple(it)) for name, it in self._aggregates.items()},
        }

    def restore(self, marks: Mapping[str, Any]) -> None:
        """Take up what `marks` gave."""
        self.last, self.shift, self._shift_told = marks["last"], marks["shift"], marks["shift_told"]
        self.late_rows, self.conflicts = marks["late_rows"], marks["conflicts"]
        self._interval, self._main_at = marks["interval"], marks["main_at"]
        self.late_values, self.forced_rows = marks["late_values"], marks["forced_rows"]
        self.released = {(axis, attempt): step for axis, attempt, step in marks["released"]}
        for (axis, attempt), step in self.released.items():
            self._furthest[axis] = max((attempt, step), self._furthest.get(axis, NOWHERE))
        self._aggregates = {name: Aggregate(*values) for name, values in marks["aggregates"].items()}
        self._forgotten = dict(self.released)


def _with_axis(bundle: Bundle, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with that of the axis. A user's own metric of that name takes its place, and it another one."""
    values = {bundle.axis: bundle.step, **values}
    shown = values[bundle.axis]
    if type(shown) is not int or shown != bundle.step:
        values[OWN_PREFIX + bundle.axis] = bundle.step
    return values


def _axis_of(name: str, axes: Collection[str]) -> str:
    """The axis among those that meet in a row to which a name belongs: the one whose stage it is under."""
    if len(axes) > 1:
        stages = [axis for axis in axes if axis != MAIN_AXIS and name.startswith(axis[: -len("step")])]
        if stages:
            return max(stages, key=len)
    return next(iter(axes))
