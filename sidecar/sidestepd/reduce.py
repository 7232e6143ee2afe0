"""Make one value of what several ranks said under one name.

- numbers are reduced as declared, by default to their mean; anything else is the lowest rank's, and so is a
  name under which one rank said a number and another did not
- one reduction gives the plain name, several give `name.max` and so on, `per_rank` gives `name/rank3`
- media are never reduced: of several ranks they are `name/rank3`, of one alone they keep their name
- inside nested dicts the numbers are reduced and the shape stays
- within one session the later call wins, and that is counted
- whatever was said, the result is plain: no exception, and no number that can not be packed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidestepd.packed import has_media
from sidestepd.rows import Part
from sidestepd.rules import Rules

DEFAULT = ("mean",)
NUMBERS = frozenset({int, float})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """What a row will hold, and how many values a later call of the same session overwrote."""

    values: dict[str, Any]
    conflicts: int = 0


@dataclass(slots=True)
class _Speaker:
    """One session's part in a row: its calls merged."""

    rank: int
    time: float
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Share:
    """One session's value of one name."""

    value: Any
    speaker: _Speaker


def reduce_parts(parts: Sequence[Part], rules: Rules, axis_metrics: Collection[str]) -> Reduced:
    """Reduce the parts of one row; names in `axis_metrics` are the lowest rank's, never reduced."""
    speakers, conflicts = _speakers(parts)
    values, rest = _plain_means(speakers, rules, axis_metrics)
    for name, shares in _shares(speakers, rest).items():
        if name in axis_metrics:
            values[name] = shares[0].value
        else:
            values |= _reduced(name, shares, rules.of(name).reduce or DEFAULT)
    return Reduced(values=values, conflicts=conflicts)


def _plain_means(
    speakers: Sequence[_Speaker], rules: Rules, axis_metrics: Collection[str]
) -> tuple[dict[str, Any], set[str]]:
    """The means of what every rank said as a number, with nothing declared of it; and the names that are left.

    This is nearly all of nearly every row, so it takes the short way.
    """
    first, *others = [speaker.values for speaker in speakers]
    values: dict[str, Any] = {}
    rest: set[str] = set()
    for other in others:
        if other.keys() != first.keys():
            rest.update(other.keys() ^ first.keys())
    for name, value in first.items():
        if name in rest or name in axis_metrics or rules.of(name).reduce is not None or type(value) not in NUMBERS:
            rest.add(name)
        elif not others:
            values[name] = value
        else:
            numbers = [value, *(other[name] for other in others)]
            if NUMBERS.issuperset(map(type, numbers)):
                values[name] = sum(numbers) / len(numbers)
            else:
                rest.add(name)
    return values, rest


def _speakers(parts: Sequence[Part]) -> tuple[list[_Speaker], int]:
    """Merge the calls of each session; lowest rank first."""
    if len(parts) == 1:
        return [_Speaker(parts[0].rank, parts[0].time, parts[0].values)], 0
    speakers: dict[bytes, _Speaker] = {}
    conflicts = 0
    for part in sorted(parts, key=lambda part: part.position.seq):
        speaker = speakers.get(part.session)
        if speaker is None:
            speakers[part.session] = _Speaker(part.rank, part.time, part.values)
        else:
            conflicts += len(speaker.values.keys() & part.values.keys())
            speaker.values = {**speaker.values, **part.values}
    return sorted(speakers.values(), key=lambda speaker: speaker.rank), conflicts


def _shares(speakers: Sequence[_Speaker], names: Collection[str]) -> dict[str, list[_Share]]:
    """What each of these names was given, lowest rank first, in the order in which names were first said."""
    shares: dict[str, list[_Share]] = {}
    if names:
        for speaker in speakers:
            for name, value in speaker.values.items():
                if name in names:
                    shares.setdefault(name, []).append(_Share(value, speaker))
    return shares


def _reduced(name: str, shares: Sequence[_Share], operations: Sequence[str]) -> dict[str, Any]:
    if media := [share for share in shares if has_media(share.value)]:
        return _of_each_rank(name, media)
    reducible = _are(is_number, shares) or _are(_is_dict, shares)
    values: dict[str, Any] = {}
    for operation in operations:
        if operation == "per_rank":
            values |= {f"{name}/rank{share.speaker.rank}": share.value for share in shares}
        elif reducible:
            values[name if len(operations) == 1 else f"{name}.{operation}"] = _apply(operation, shares)
        else:
            values[name] = shares[0].value
    return values


def _of_each_rank(name: str, shares: Sequence[_Share]) -> dict[str, Any]:
    """Media can not be reduced: each rank's stands for itself, unless only one had some to show."""
    if len({share.speaker.rank for share in shares}) == 1:
        return {name: shares[0].value}
    return {f"{name}/rank{share.speaker.rank}": share.value for share in reversed(shares)}


def _apply(operation: str, shares: Sequence[_Share]) -> Any:
    """Reduce numbers, or the numbers inside dicts."""
    if not _is_dict(shares[0].value):
        if operation.startswith("mean:"):
            return _weighted_mean(shares, operation.removeprefix("mean:"))
        return _OPERATIONS[operation](shares)
    inner: dict[str, list[_Share]] = {}
    for share in shares:
        for key, value in share.value.items():
            inner.setdefault(str(key), []).append(_Share(value, share.speaker))
    return {
        key: _apply(operation, values) if _are(is_number, values) or _are(_is_dict, values) else values[0].value
        for key, values in inner.items()
    }


def _are(kind: Callable[[Any], bool], shares: Sequence[_Share]) -> bool:
    """Whether every share is of a kind."""
    return all(kind(share.value) for share in shares)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def is_number(value: Any) -> bool:
    """Whether a value, as it came off the wire, can be reckoned with; a bool can not."""
    return type(value) in NUMBERS


def _numbers(shares: Sequence[_Share]) -> list[float]:
    return [share.value for share in shares]


def _mean(shares: Sequence[_Share]) -> float:
    numbers = _numbers(shares)
    return numbers[0] if len(numbers) == 1 else sum(numbers) / len(numbers)


def _weighted_mean(shares: Sequence[_Share], weight: str) -> float:
    """The mean by another metric of the same rank's; by 1 where that is missing or no number."""
    weights = [share.speaker.values.get(weight, 1) for share in shares]
    weights = [value if is_number(value) else 1 for value in weights]
    total = sum(weights)
    if not total:
        return math.nan
    return float(sum(n * w for n, w in zip(_numbers(shares), weights, strict=True)) / total)


def _extreme(choose: Callable[[list[float]], float]) -> Callable[[Sequence[_Share]], float]:
    """Smallest or largest; NaN if any is NaN, whatever the order of ranks."""

    def extreme(shares: Sequence[_Share]) -> float:
        numbers = _numbers(shares)
        return math.nan if any(number != number for number in numbers) else choose(numbers)

    return extreme


def _sum(shares: Sequence[_Share]) -> float:
    """The sum; a float where an int would have more than 64 bits."""
    total = sum(_numbers(shares))
    return total if -(2**63) <= total < 2**64 else float(total)


def _std(shares: Sequence[_Share]) -> float:
    """The population's standard deviation."""
    numbers = _numbers(shares)
    mean = sum(numbers) / len(numbers)
    if not math.isfinite(mean):
        return math.nan
    return math.hypot(*(number - mean for number in numbers)) / math.sqrt(len(numbers))


def _argmax_rank(shares: Sequence[_Share]) -> int:
    """The rank of the largest, the lowest such; one that is NaN counts as largest."""
    return max(shares, key=lambda share: (share.value != share.value, share.value)).speaker.rank


_OPERATIONS: Mapping[str, Callable[[Sequence[_Share]], Any]] = {
    "mean": _mean,
    "min": _extreme(min),
    "max": _extreme(max),
    "sum": _sum,
    "std": _std,
    "count": len,
    "first": lambda shares: min(shares, key=lambda share: share.speaker.time).value,
    "last": lambda shares: max(shares, key=lambda share: share.speaker.time).value,
    "argmax_rank": _argmax_rank,
}
