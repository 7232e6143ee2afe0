"""What was declared of metrics: their axis metric, their reduction, their summary.

- an exact name beats every pattern; among patterns the one declared first wins; each attribute by itself
- what the command line says beats what the code says, and that beats what a file says
- what is made of a name (`loss.max`, `loss/rank3`, `loss.late`) takes from its name what is not declared of itself
- what is declared through a stage speaks of the stage's names, and of the main axis
- a pattern may hold `*`, `?` and `[...]` anywhere, and `*` crosses `/`
- patterns are resolved here and never handed to wandb, which matches overlapping ones in random order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from sidestep.definitions import REDUCTIONS, SUMMARIES, is_reduction
from sidestepd.rows import MAIN_AXIS

T = TypeVar("T")

_MADE = re.compile(rf"(?P<name>.+)(\.late|\.({'|'.join(sorted(REDUCTIONS))}|mean:.+)|/rank\d+)", re.DOTALL)
"""The names that the daemon makes of a name."""


class Source(IntEnum):
    """Who declared it, the strongest first."""

    COMMAND_LINE = 0
    CODE = 1
    FILE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is declared of a name or pattern; None: nothing."""

    pattern: str
    step_metric: str | None = None
    reduce: tuple[str, ...] | None = None
    summary: str | None = None
    hidden: bool | None = None
    source: Source = Source.CODE

    @property
    def exact(self) -> bool:
        """Whether this speaks of one name only."""
        return not any(sign in self.pattern for sign in "*?[")

    def fits(self, name: str) -> bool:
        """Whether this speaks of a name; a pattern also of the name that is written like it."""
        return name == self.pattern or (not self.exact and fnmatchcase(name, self.pattern))


def rule_from(data: Mapping[str, Any], stage: str | None = None) -> Rule:
    """Read what a worker declared. Raises ValueError in words."""
    pattern, prefix = data.get("name"), f"{stage}/" if stage else ""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"define_metric of {pattern!r:.80}: a name or a pattern is wanted")
    step_metric = data.get("step_metric")
    if step_metric is not None and not isinstance(step_metric, str):
        raise ValueError(f"define_metric({pattern!r:.80}): step_metric must be a name")
    hidden = data.get("hidden")
    return Rule(
        pattern=prefix + pattern,
        step_metric=prefix + step_metric if step_metric and step_metric != MAIN_AXIS else step_metric,
        reduce=operations(data.get("reduce"), prefix),
        summary=_summary(data.get("summary"), data.get("goal")),
        hidden=hidden if isinstance(hidden, bool) else None,
    )


def _summary(summary: object, goal: object) -> str | None:
    """The operations that wandb knows; "best" is what `goal` makes of it."""
    best = {"minimize": "min", "maximize": "max"}.get(goal if isinstance(goal, str) else "", "")
    names = summary.split(",") if isinstance(summary, str) else []
    known = [best if name == "best" else name for name in (name.strip() for name in names)]
    return ",".join(name for name in dict.fromkeys(known) if name in SUMMARIES) or None


def operations(reduce: str | Sequence[str] | None, prefix: str = "") -> tuple[str, ...] | None:
    """Check the names of reductions; weights lie under `prefix`. Raises ValueError that lists the known ones."""
    if reduce is None:
        return None
    names = tuple(reduce) if isinstance(reduce, list | tuple) else (reduce,)
    for name in names:
        if not is_reduction(name):
            known = ", ".join(sorted(REDUCTIONS))
            raise ValueError(f"reduce={name!r:.80} is unknown: one of {known}, mean:NAME_OF_THE_WEIGHT")
    return tuple(f"mean:{prefix}{name[5:]}" if name.startswith("mean:") else name for name in names) or None


class Rules:
    """Every declaration so far, and what follows for a name."""

    def __init__(self, configured: Iterable[Rule] = ()) -> None:
        self._rules: dict[tuple[str, Source], Rule] = {}
        self._answers: dict[str, Rule] = {}
        self.step_metrics: set[str] = set()
        self.summarized = False
        """Whether anything was declared of anybody's summary."""
        self.version = 0
        """Another one after each declaration that said something new."""
        for rule in configured:
            self.declare(rule)

    def declare(self, rule: Rule) -> None:
        """Add a declaration; a repeated pattern keeps its place and takes the new attributes."""
        key = (rule.pattern, rule.source)
        old = self._rules.get(key)
        if old is not None:
            said = {
                name: value
                for name in ("step_metric", "reduce", "summary", "hidden")
                if (value := getattr(rule, name)) is not None
            }
            rule = replace(old, **said)
        if rule == old:
            return
        self._rules[key] = rule
        self._answers.clear()
        self.version += 1
        self.summarized = self.summarized or rule.summary is not None
        if rule.step_metric:
            self.step_metrics.add(rule.step_metric)

    def of(self, name: str) -> Rule:
        """What holds for a metric's name."""
        answer = self._answers.get(name)
        if answer is None:
            answer = self._answers[name] = self._resolve(name)
        return answer

    def of_made(self, name: str) -> Rule:
        """What holds for a name of a row, which may be one that was made of a metric's."""
        rule, made = self.of(name), _MADE.fullmatch(name)
        if made is None:
            return rule
        origin = self.of_made(made["name"])
        return replace(
            rule,
            step_metric=_first((rule.step_metric, origin.step_metric)),
            summary=_first((rule.summary, origin.summary)),
            hidden=_first((rule.hidden, origin.hidden)),
        )

    def _resolve(self, name: str) -> Rule:
        matches = [rule for rule in self._rules.values() if rule.fits(name)]
        matches.sort(key=lambda rule: (rule.source, rule.pattern != name))
        return Rule(
            pattern=name,
            step_metric=_first(rule.step_metric for rule in matches),
            reduce=_first(rule.reduce for rule in matches),
            summary=_first(rule.summary for rule in matches),
            hidden=_first(rule.hidden for rule in matches),
        )

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that fit none of `names`."""
        names = list(names)
        return [rule.pattern for rule in self._rules.values() if not rule.exact and not any(map(rule.fits, names))]

    def state(self) -> list[list[Any]]:
        """What the code declared, as plain values."""
        return [
            [r.pattern, r.step_metric, list(r.reduce) if r.reduce else None, r.summary, r.hidden]
            for r in self._rules.values()
            if r.source is Source.CODE
        ]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Declare again what `state` gave."""
        for pattern, step_metric, reduce, summary, hidden in state:
            self.declare(
                Rule(
                    pattern=pattern,
                    step_metric=step_metric,
                    reduce=tuple(reduce) if reduce else None,
                    summary=summary,
                    hidden=hidden,
                )
            )


def _first(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
