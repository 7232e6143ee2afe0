"""Time calls of a microsecond and steps of a millisecond, so that noise hits all that is compared alike.

- what is compared is interleaved in one process: a busy machine makes all of it slower, and ratios stay
- every figure has a control: an empty call timed the same way, or the same steps without a call
- a claim is judged as a ratio or against a stated limit; absolute figures are printed for the reader
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil

Call = Callable[[dict[str, float]], object]
"""What is timed: it is given ten scalars."""

BUSY = 0.1
"""The share of all CPUs, used by others, above which figures should be taken again."""
_QUIET_WINDOW_S = 0.03
_QUIET_SHARE = 0.1


def nothing(data: dict[str, float]) -> None:
    """The control: a call that costs what calling costs."""


NAMES = tuple(f"train/metric_{index}" for index in range(10))


def scalars() -> Iterator[dict[str, float]]:
    """Dicts as a training makes them for each call: the names are constants of its code, dict and values new."""
    for call in count(1):
        yield {name: call / (index + 3) for index, name in enumerate(NAMES)}


# Distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How long calls took, in microseconds."""

    calls: int
    p25: float
    p50: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Distribution:
        """The distribution of samples, which are left as they are."""
        ordered = sorted(nanoseconds)

        def quantile(share: float) -> float:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)] / 1000

        return cls(
            calls=len(ordered),
            p25=quantile(0.25),
            p50=quantile(0.5),
            p99=quantile(0.99),
            p999=quantile(0.999),
            max=ordered[-1] / 1000,
        )

    @property
    def tail(self) -> float:
        """p99.9 if enough calls lie beyond it to make it a figure, else p99."""
        return self.p999 if self.calls >= 20_000 else self.p99


def time_calls(call: Call, count: int) -> array[int]:
    """Nanoseconds of each of `count` calls, one right after the other."""
    now, times = time.perf_counter_ns, array("q")
    for data in islice(scalars(), count):
        before = now()
        call(data)
        times.append(now() - before)
    return times


def time_calls_between(call: Call, count: int, step: Callable[[], object]) -> array[int]:
    """Nanoseconds of each of `count` calls, each after a training step that took the caches for itself."""
    now, times, payloads = time.perf_counter_ns, array("q"), scalars()
    for _ in range(count):
        step()
        data = next(payloads)
        before = now()
        call(data)
        times.append(now() - before)
    return times


def time_alternating(
    call: Call, control: Call, count: int, step: Callable[[], object]
) -> tuple[array[int], array[int]]:
    """Nanoseconds of `count` calls of each, in turns after a step, so that both meet the same noise."""
    now, times, controls, payloads = time.perf_counter_ns, array("q"), array("q"), scalars()
    for index in range(count):
        for timed, into in ((call, times), (control, controls))[:: 1 if index % 2 else -1]:
            step()
            data = next(payloads)
            before = now()
            timed(data)
            into.append(now() - before)
    return times, controls


def empty_for(nanoseconds: float) -> Call:
    """An empty call, over and over for so long: the scheduler may strike it as often as the call it stands for.

    One empty call alone is over too soon: what preempts a process once in a few milliseconds would be charged to
    the longer of two calls only.
    """
    now = time.perf_counter_ns

    def empty(data: dict[str, float]) -> None:
        until = now() + nanoseconds
        while now() < until:
            nothing(data)

    return empty


# Slowdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """By how much steps took longer with a call after each: the median over pairs of blocks, in percent.

    `error` is the standard error of that median, estimated from the pairs' spread.
    """

    percent: float
    error: float
    pairs: int
    step_us: float

    @classmethod
    def of(cls, ratios: Sequence[float], step_us: float) -> Slowdown:
        """The slowdown that ratios of block times show."""
        low, _, high = statistics.quantiles(ratios, n=4)
        return cls(
            percent=100 * (statistics.median(ratios) - 1),
            error=100 * 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5,
            pairs=len(ratios),
            step_us=step_us,
        )


def measure_slowdown(
    call: Call,
    step: Callable[[], object],
    *,
    pairs: int,
    steps: int,
    settle: Callable[[], object],
) -> Slowdown:
    """Compare blocks of `steps` steps with `call` after each to blocks with `nothing`, in alternating order.

    `settle` runs before each block, untimed: what one block left to be done is not charged to the next.
    """
    ratios, controls = [], []
    for pair in range(pairs):
        taken = {}
        for logs in (True, False)[:: 1 if pair % 2 else -1]:
            settle()
            taken[logs] = _time_block(call if logs else nothing, step, steps)
        ratios.append(taken[True] / taken[False])
        controls.append(taken[False] / steps / 1000)
    return Slowdown.of(ratios, statistics.median(controls))


def _time_block(call: Call, step: Callable[[], object], steps: int) -> int:
    payloads = scalars()
    _warm_up(step)
    before = time.perf_counter_ns()
    for _ in range(steps):
        step()
        call(next(payloads))
    return time.perf_counter_ns() - before


def _warm_up(step: Callable[[], object]) -> None:
    for _ in range(3):
        step()


# Quiet


def wait_until_quiet(deadline_s: float = 5.0) -> bool:
    """Wait until the processes that this one started rest; False if they have not when time is up."""
    deadline = time.monotonic() + deadline_s
    before = _cpu_ns()
    while time.monotonic() < deadline:
        time.sleep(_QUIET_WINDOW_S)
        after = _cpu_ns()
        if after - before < _QUIET_SHARE * _QUIET_WINDOW_S * 1e9:
            return True
        before = after
    return False


def _cpu_ns() -> int:
    return sum(_cpu_ns_of(child.pid) for child in psutil.Process().children(recursive=True))


def _cpu_ns_of(pid: int) -> int:
    """CPU time of all threads of a process, finer than the ticks of /proc/PID/stat."""
    try:
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    except (OSError, IndexError):  # it has just ended
        return 0


def busy_elsewhere(seconds: float = 1.0) -> float:
    """The share of all CPUs that others use while this process sleeps: what makes figures worth less."""
    psutil.cpu_percent()
    time.sleep(seconds)
    return psutil.cpu_percent() / 100


# Judging


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}  {self.claim}: {self.measured}"


def judge_at_most(claim: str, value: float, limit: float, unit: str) -> Judgement:
    """The claim that a value is no more than a limit."""
    return Judgement(
        claim=f"{claim}: at most {limit:g} {unit}", measured=f"{value:.2f} {unit}", holds=value <= limit
    )


def judge_at_least(claim: str, value: float, limit: float, unit: str) -> Judgement:
    """The claim that a value is no less than a limit."""
    shown = f"{value:.0f}" if value >= 10 else f"{value:.2f}"
    return Judgement(claim=f"{claim}: at least {limit:g} {unit}", measured=f"{shown} {unit}", holds=value >= limit)


# Words


def machine() -> Mapping[str, Any]:
    """Where figures were taken."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("sidestep", "wandb", "torch", "tensorboard")}


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
