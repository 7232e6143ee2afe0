"""Make rows: reduce over ranks, let axes meet, and give each row a `_step` that wandb accepts.

- `_step` is `max(step, last + 1)` on the main axis: it never goes back, and equals the step as long as nobody
  else had to take one of its own
- a row of another axis waits to be merged into the next main row; when no main row comes in time, or their
  names clash, it takes `last + 1` for itself; so it does when a newer one of its axis comes, as that would merge
- in a merged row it can be told from a name alone which axis it belongs to
- the value of the axis is data in every row, and every name is defined once, exactly, with its axis
- a late row is a row of its own; a share of a value that was already written goes under `<name>.late`
- no I/O and no clock here: callers pass `now`
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from sidestepd.reduce import is_number, reduce_parts
from sidestepd.rows import MAIN_AXIS, Aggregate, Bundle, Definition, Latest, Position, Row
from sidestepd.rules import Rules

OWN_PREFIX = "sidestep/"
"""Names that sidestep itself adds to rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A bundle reduced, without a `_step` yet. `since`: when it began to wait."""

    axis: str
    step: int
    time: float
    values: dict[str, Any]
    positions: tuple[Position, ...]
    ranks: int
    since: float
    conflicts: int
    own: Mapping[str, Any]


class Assembler:
    """Bundles in, rows out, in the order in which they must be written."""

    def __init__(self, rules: Rules, *, patience: float, max_wait: float, window: int) -> None:
        self.rules = rules
        self.last = -1
        """The `_step` given last."""
        self.shift = 0
        """How far `_step` is ahead of the main axis."""
        self.late_rows = 0
        self.conflicts = 0
        self.released: dict[str, int] = {}
        """The highest step of each axis that is in a row."""
        self.latest: dict[str, Latest] = {}
        self.defined: dict[str, Definition] = {}
        self._defined_as_of: dict[str, int] = {}
        self._aggregates: dict[str, Aggregate] = {}
        self._patience = patience
        self._max_wait = max_wait
        self._window = window
        self._waiting: dict[str, _Draft] = {}
        """The newest row of each other axis, in the order in which they came."""
        self._changed: dict[str, Latest] = {}
        self._written: OrderedDict[tuple[str, int], set[str]] = OrderedDict()
        self._forgotten: dict[str, int] = {}
        """The step of each axis up to which it may be unknown what was written."""
        self._main_at: float | None = None
        self._interval = 0.0
        self._shift_told = 0

    # Rows

    def add(self, bundles: Iterable[Bundle], *, world: int, now: float) -> list[Row]:
        """The rows that follow at once from `bundles`; rows of other axes wait for `ready`."""
        rows: list[Row] = []
        for bundle in bundles:
            draft = self._draft(bundle, now)
            if bundle.axis == MAIN_AXIS and not bundle.late:
                rows.extend(self._main(draft, world))
                continue
            waiting = self._waiting.get(draft.axis)
            if waiting is not None and waiting.step <= draft.step:
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
            step=bundle.step,
            time=first.time,
            values={bundle.axis: bundle.step, **reduced.values},
            positions=tuple(part.position for part in bundle.parts),
            ranks=len({part.rank for part in bundle.parts}),
            since=now,
            conflicts=reduced.conflicts,
            own=bundle.own,
        )

    def _main(self, draft: _Draft, world: int) -> Iterator[Row]:
        """The main row, after those that must go before it, merged with those that may."""
        guests = self._guests(draft)
        yield from self._alone(*(self._waiting.keys() - {guest.axis for guest in guests}))
        self._waiting = {}
        if self._main_at is not None:
            self._interval = draft.since - self._main_at
        self._main_at = draft.since
        step = max(draft.step, self.last + 1)
        self.shift = step - draft.step
        values = {**{name: value for guest in guests for name, value in guest.values.items()}, **draft.values}
        yield self._row(draft, guests, step=step, values={**values, **self._own(draft, world)})

    def _own(self, draft: _Draft, world: int) -> dict[str, Any]:
        """What sidestep says of a main row."""
        own: dict[str, Any] = dict(draft.own)
        if world > 1:
            own[f"{OWN_PREFIX}ranks_reported"] = draft.ranks
        if self.shift or self._shift_told:
            own[f"{OWN_PREFIX}step_shift"] = self._shift_told = self.shift
        return own

    def _guests(self, main: _Draft) -> list[_Draft]:
        """Who of the waiting merges into a main row."""
        row = [main]
        for draft in self._waiting.values():
            if self._can_meet([*row, draft]):
                row.append(draft)
        return row[1:]

    def _can_meet(self, drafts: Sequence[_Draft]) -> bool:
        """Whether no name is said twice, and each is of the axis that it would be taken for in one row."""
        axes = [draft.axis for draft in drafts]
        names = [(name, draft.axis) for draft in drafts for name in draft.values]
        return len(names) == len(dict(names)) and all(
            axis == _axis_of(name, axes) or name in self.rules.step_metrics for name, axis in names
        )

    def _alone(self, *axes: str) -> list[Row]:
        """What waits on these axes leaves, each in a row of its own."""
        drafts = [self._waiting.pop(axis) for axis in list(self._waiting) if axis in axes]
        return [self._row(draft, (), step=self.last + 1, values=draft.values) for draft in drafts]

    def _late(self, draft: _Draft) -> Row:
        self.late_rows += 1
        written = self._names_at(draft.axis, draft.step) - {draft.axis, *self.rules.step_metrics}
        values = {f"{name}.late" if name in written else name: value for name, value in draft.values.items()}
        values[f"{OWN_PREFIX}late_rows"] = self.late_rows
        row = self._row(draft, (), step=self.last + 1, values=values)
        return replace(row, late=True, restore=self._newer_than(draft.axis, draft.step, values))

    def _names_at(self, axis: str, step: int) -> set[str]:
        """The names written at a step; of a step that left the window, the names whose values may be there."""
        written = self._written.get((axis, step), set())
        if step > self._forgotten.get(axis, -1):
            return written
        return written | {name for name, it in self.latest.items() if it.axis == axis and it.step >= step}

    def _newer_than(self, axis: str, step: int, names: Iterable[str]) -> dict[str, Any]:
        """Newer values of names, for the summary; wandb's own aggregates are left alone."""
        newer = {}
        for name in names:
            latest = self.latest.get(name)
            if name.startswith(OWN_PREFIX) or latest is None or self.rules.of_made(name).summary is not None:
                continue
            if latest.axis == axis and latest.step > step:
                newer[name] = latest.value
        return newer

    def _row(self, draft: _Draft, guests: Sequence[_Draft], *, step: int, values: dict[str, Any]) -> Row:
        drafts = (draft, *guests)
        row = Row(
            step=step,
            time=draft.time,
            values=values,
            places={it.axis: it.step for it in drafts},
            positions=tuple(position for it in drafts for position in it.positions),
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
        for axis, step in row.places.items():
            self.released[axis] = max(step, self.released.get(axis, step))
        for place in row.places.items():
            self._written.setdefault(place, set()).update(row.values)
        while len(self._written) > self._window:
            (axis, step), _ = self._written.popitem(last=False)
            self._forgotten[axis] = max(step, self._forgotten.get(axis, step))
        for name, value in row.values.items():
            axis = _axis_of(name, row.places)
            self._note(name, Latest(axis=axis, step=row.places[axis], time=row.time, value=value))

    def _note(self, name: str, new: Latest) -> None:
        old = self.latest.get(name)
        if old is None or old.axis != new.axis or old.step <= new.step or name.startswith(OWN_PREFIX):
            self.latest[name] = self._changed[name] = new

    def take_changed(self) -> dict[str, Latest]:
        """The newest values that changed since this was asked last."""
        changed, self._changed = self._changed, {}
        return changed

    def new_definitions(self, rows: Iterable[Row]) -> list[Definition]:
        """Definitions for the names that these rows are the first to hold since anything was declared."""
        new: list[Definition] = []
        for row in rows:
            for name in _leaves(row.values):
                if self._defined_as_of.get(name) != self.rules.version:
                    self._defined_as_of[name] = self.rules.version
                    definition = self._definition(name, row)
                    if self.defined.get(name) != definition:
                        self.defined[name] = definition
                        new.append(definition)
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
        return {name: it.value for name, it in self.latest.items() if self._summary_of(name) is None}

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
            "released": self.released,
            "aggregates": {name: list(astuple(it)) for name, it in self._aggregates.items()},
        }

    def restore(self, marks: Mapping[str, Any]) -> None:
        """Take up what `marks` gave."""
        self.last, self.shift, self._shift_told = marks["last"], marks["shift"], marks["shift_told"]
        self.late_rows, self.conflicts = marks["late_rows"], marks["conflicts"]
        self._interval, self._main_at = marks["interval"], marks["main_at"]
        self.released = dict(marks["released"])
        self._aggregates = {name: Aggregate(*values) for name, values in marks["aggregates"].items()}
        self._forgotten = dict(self.released)


def _axis_of(name: str, axes: Collection[str]) -> str:
    """The axis among those that meet in a row to which a name belongs: the one whose stage it is under."""
    if len(axes) > 1:
        stages = [axis for axis in axes if axis != MAIN_AXIS and name.startswith(axis[: -len("step")])]
        if stages:
            return max(stages, key=len)
    return next(iter(axes))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names wandb shows: those inside nested dicts are joined by dots."""
    for name, value in values.items():
        if not name:
            continue  # wandb knows no such name
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
