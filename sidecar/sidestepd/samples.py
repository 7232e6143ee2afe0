"""Samples of the machine: out to the sink's stream at once, and the newest of each name into the next row.

- the stream gets every sample once at most: how far it was told is written down before it is told
- a sample never makes a row and never moves a step; what is superseded before a row comes was in the stream
- in wandb they are plotted against `_step`, which every row has: an axis of ours may be missing where they stand
- rows take the short list only, and with more than `MANY_NODES` nodes its aggregates
- what a row took, and what energy and idle time came to, is committed with the row
- no I/O and no clock here
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from sidestep.wire import Record
from sidestepd.rows import MAIN_AXIS, Definition, Position, Raised, Row, Sample, Sampled
from sidestepd.samplers.names import look_up, on_node
from sidestepd.samplers.visible import device_number

MANY_NODES = 4
"""With more nodes, rows hold aggregates over all of them."""
FRESH_S = 60.0
"""A value that is older, and older than `MISSED` intervals, is not of the present: a worker that is gone, a node
that went silent. By the time at which it came: the clocks of nodes differ."""
MISSED = 3
"""After so many intervals without a sample something was missed."""
LEVELS = ("INFO", "WARN", "ERROR")
_START = Position(0, -1)
_OPERATIONS: Mapping[str, Callable[[list[float]], float]] = {"mean": fmean, "min": min, "max": max, "sum": sum}


def sampled_from(record: Record, position: Position, session: bytes, node: str) -> Sampled | None:
    """What a record of samples says; None if it says nothing that can be understood."""
    values, gpus = record.data.get("values"), record.data.get("gpus")
    ordinal, device, visible = (record.data.get(name) for name in ("ordinal", "device", "visible"))
    if values is None or not _is_table(values) or not (gpus is None or _is_table(gpus)):
        return None
    if not (ordinal is None or (type(ordinal) is int and 0 <= ordinal < 1024)):
        return None
    if not all(it is None or isinstance(it, str) for it in (device, visible)):
        return None
    return Sampled(
        position=position,
        session=session,
        node=node,
        time=record.time,
        values=values,
        ordinal=ordinal,
        device=device,
        visible=visible,
        gpus=None if gpus is None else {uuid: int(number) for uuid, number in gpus.items()},
    )


def alert_from(record: Record, position: Position, node: str) -> Raised | None:
    """What a record of an alert says, likewise; and where, if `node` is given."""
    title, text, level = (record.data.get(name) for name in ("title", "text", "level"))
    if not isinstance(title, str) or not isinstance(text, str) or level not in LEVELS:
        return None
    where = f" On {repr(node[:100])[1:-1]}." if node else ""  # a name from outside, for people
    return Raised(position=position, title=title, text=text + where, level=level)


def _is_table(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and type(value) in (int, float) and math.isfinite(value)
        for name, value in values.items()
    )


@dataclass(slots=True)
class _Meter:
    """What one GPU has used since it was first heard of."""

    counter: float | None = None
    """Its energy counter, as heard last."""
    energy_j: float = 0.0
    idle_s: float = 0.0
    heard: float | None = None
    """When its utilization was heard last."""
    told_j: float = 0.0
    """`energy_j` as of the last row that took it."""
    counted_j: float = 0.0
    """`energy_j` as of the last row that knew of more training samples."""
    pause_s: float = 0.0
    """Between the two newest of its utilization: samplers may have been asked for another interval."""


class Samples:
    """Between what is read of the machines and where it goes."""

    def __init__(
        self,
        *,
        history: bool = True,
        interval_s: float = 5.0,
        samples_metric: str | None = None,
        streamed: Sequence[int] | None = None,
    ) -> None:
        self.streamed = Position(*streamed) if streamed else _START
        """Up to here the stream was told."""
        self._history = history
        self._interval_s = interval_s
        self._fresh_s = max(FRESH_S, MISSED * interval_s)
        self._samples_metric = samples_metric
        self._merged = _START
        self._heard = _START
        self._stream: list[Sample] = []
        self._alerts: list[Raised] = []
        self._defined: set[str] = set()
        self._definitions: list[Definition] = []
        self._pending: dict[tuple[str, str], float] = {}
        """By node and name, what no row has taken."""
        self._newest: dict[tuple[str, str], tuple[float, float]] = {}
        """By node and name, when it came and what."""
        self._began: float | None = None
        """When the first sample came in this life."""
        self._torch: dict[tuple[str, int], dict[bytes, tuple[float, Mapping[str, float]]]] = {}
        self._nodes: dict[str, int] = {}
        self._gpus: dict[str, dict[str, int]] = {}
        self._used: dict[str, set[int]] = {}
        """The GPUs of each node that workers are known to use."""
        self._meters: dict[str, dict[int, _Meter]] = {}
        self._row_at: int | None = None
        """The main step of the last row that took samples."""
        self._counted: float | None = None
        """How many training samples there were when the energy of each was told last."""
        self._count: float | None = None
        """How many there are by now."""

    # Hearing

    def meet(self, nodes: Mapping[str, int]) -> None:
        """Number the nodes that are new, in the order of their lowest ranks; a number once given stays."""
        for node in sorted(nodes.keys() - self._nodes.keys(), key=lambda node: (nodes[node], node)):
            self._nodes[node] = len(self._nodes)

    def alert(self, alert: Raised) -> None:
        """Something that people should hear of."""
        if alert.position > self.streamed:
            self._alerts.append(alert)

    def hear(self, said: Sampled, now: float | None = None) -> None:
        """Take in what was read; it came at `now`, or when it was read if that is not given."""
        now = said.time if now is None else now
        self._began = now if self._began is None else self._began
        self.meet({said.node: len(self._nodes)} if said.node not in self._nodes else {})
        self._heard = max(self._heard, said.position)
        if said.gpus is not None:
            self._gpus[said.node] = dict(said.gpus)
        values = self._of_worker(said, now) if said.ordinal is not None else self._of_machine(said, now)
        values = {name: value for name, value in values.items() if look_up(name) is not None}
        if not values:
            return
        streamed = {name: value for name, value in values.items() if _is_streamed(name)}
        if streamed and said.position > self.streamed:
            self._stream.append(Sample(time=said.time, node=said.node, values=streamed))
        new = said.position > self._merged
        for name, value in values.items():
            if _is_short(name):
                self._newest[said.node, name] = (now, value)
                if new and self._history:
                    self._pending[said.node, name] = value
        if new:
            self._measure(said.node, said.time, values)

    def _of_worker(self, said: Sampled, now: float) -> dict[str, float]:
        """A process's part of one GPU, by full names; several processes of one GPU add up."""
        number = device_number(
            ordinal=said.ordinal or 0,
            device=said.device,
            visible=said.visible,
            gpus=self._gpus.get(said.node, {}),
        )
        self._used.setdefault(said.node, set()).add(number)
        shares = self._torch.setdefault((said.node, number), {})
        shares[said.session] = (now, said.values)
        for session, (time, _) in list(shares.items()):
            if time < now - self._fresh_s:
                del shares[session]
        total: dict[str, float] = {}
        for _, values in shares.values():
            for name, value in values.items():
                total[f"system/gpu{number}/{name}"] = total.get(f"system/gpu{number}/{name}", 0) + value
        return total

    def _of_machine(self, said: Sampled, now: float) -> dict[str, float]:
        """A sampler's values; what torch calls allocated is NVML's used memory where no worker tells better."""
        values = dict(said.values)
        for name, value in said.values.items():
            known = look_up(name)
            if known is None or "i" not in known.words:
                continue
            number = int(known.words["i"])
            if "r" in known.words:
                self._used.setdefault(said.node, set()).add(number)
            if name.endswith(f"gpu{number}/memory_used_bytes") and not self._torch_tells(said.node, number, now):
                values[f"system/gpu{number}/memory_allocated"] = value
                values[f"system/gpu{number}/memory_reserved"] = value
        return values

    def _torch_tells(self, node: str, number: int, now: float) -> bool:
        shares = self._torch.get((node, number), {})
        return any(time >= now - self._fresh_s for time, _ in shares.values())

    # Energy and idle time

    def _measure(self, node: str, time: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            known = look_up(name)
            if known is None or known.metric.name not in (_ENERGY, _UTILIZATION):
                continue
            meter = self._meters.setdefault(node, {}).setdefault(int(known.words["i"]), _Meter())
            if known.metric.name == _ENERGY:
                if meter.counter is not None and value >= meter.counter:  # less: the driver was loaded anew
                    meter.energy_j += value - meter.counter
                meter.counter = value
            else:
                passed = 0.0 if meter.heard is None else time - meter.heard
                if 0 < passed <= MISSED * max(self._interval_s, meter.pause_s):
                    meter.idle_s += passed * (1 - min(value, 100) / 100)
                meter.heard, meter.pause_s = time, passed

    def _of_run(self) -> list[_Meter]:
        """The meters of the GPUs that the run uses, or of all while that is not known."""
        meters = {(node, number): it for node, gpus in self._meters.items() for number, it in gpus.items()}
        used = {(node, number) for node, numbers in self._used.items() for number in numbers}
        return [it for key, it in meters.items() if not used & meters.keys() or key in used]

    def _derived(self, row: Row) -> dict[str, float]:
        meters = self._of_run()
        if not meters:
            return {}
        energy, idle = sum(it.energy_j for it in meters), sum(it.idle_s for it in meters)
        derived: dict[str, float] = {}
        if any(it.heard is not None for it in meters):  # with MIG there is no utilization
            derived["system/gpu_idle_s"] = idle
        if any(it.counter is not None for it in meters):
            derived["system/energy_j"] = energy
        step = None if row.apart else row.places.get(MAIN_AXIS)
        if step is None:
            return derived
        spent = sum(it.energy_j - it.told_j for it in meters)
        if self._row_at is not None and step > self._row_at:
            if spent <= 0:  # what is new was read of something else; these steps count with the next reading
                return derived | self._per_sample(meters)
            derived["system/energy_per_step_j"] = spent / (step - self._row_at)
        for meter in self._every_meter():
            meter.told_j = meter.energy_j
        self._row_at = step
        return derived | self._per_sample(meters)

    def _per_sample(self, meters: Sequence[_Meter]) -> dict[str, float]:
        """The energy of each training sample, since their count was seen to grow last: not every row tells it."""
        count, before = self._count, self._counted
        if count is None or count == before:
            return {}
        spent = sum(it.energy_j - it.counted_j for it in meters)
        if before is not None and count > before and spent <= 0:
            return {}
        self._counted = count
        for meter in self._every_meter():
            meter.counted_j = meter.energy_j
        if before is None or count < before:  # fewer: a checkpoint was loaded
            return {}
        return {"system/energy_per_sample_j": spent / (count - before)}

    def _every_meter(self) -> Iterator[_Meter]:
        return (it for gpus in self._meters.values() for it in gpus.values())

    def _see_count(self, row: Row) -> None:
        count = row.values.get(self._samples_metric) if self._samples_metric else None
        if isinstance(count, (int, float)) and not isinstance(count, bool) and math.isfinite(count):
            self._count = float(count)

    # Going out

    def take(self) -> tuple[list[Sample], list[Raised]]:
        """What the stream is to be told now. Whoever takes it writes `streamed` down before telling."""
        stream, self._stream = self._stream, []
        alerts, self._alerts = self._alerts, []
        positions = (self._heard, *(alert.position for alert in alerts))
        self.streamed = max(self.streamed, *positions)
        return stream, alerts

    def into(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, the first that is in its order with what has been read since the last one that was."""
        rows = list(rows)
        for index, row in enumerate(rows):
            if row.late:
                continue
            self._see_count(row)
            if self._pending and self._is_all_heard():
                read = {**self._take_pending(), **self._derived(row)}
                self._define(read.keys() - row.values.keys())
                rows[index] = replace(row, values={**read, **row.values})
        return rows

    def take_definitions(self) -> list[Definition]:
        """The names that rows took since this was asked last and none before, in this life."""
        definitions, self._definitions = self._definitions, []
        return definitions

    def _define(self, names: Iterable[str]) -> None:
        new = sorted(set(names) - self._defined)
        self._defined.update(new)
        self._definitions += [Definition(name=name) for name in new]

    def _is_all_heard(self) -> bool:
        """Whether a sum over all nodes is one: not just after the start, when some have not been heard yet."""
        if len(self._nodes) <= MANY_NODES or self._began is None:
            return True
        heard = {node for node, _ in self._newest}
        return heard >= self._nodes.keys() or self._latest() - self._began >= self._fresh_s

    def _latest(self) -> float:
        return max((time for time, _ in self._newest.values()), default=0.0)

    def _take_pending(self) -> dict[str, float]:
        pending, self._pending = self._pending, {}
        self._merged = self._heard
        if len(self._nodes) > MANY_NODES:
            return self._over_nodes()
        if len(self._nodes) > 1:
            return {on_node(name, self._nodes[node]): value for (node, name), value in pending.items()}
        return {name: value for (_, name), value in pending.items()}

    def _over_nodes(self) -> dict[str, float]:
        gathered: dict[str, list[float]] = {}
        now = self._latest()
        for (_, name), (time, value) in self._newest.items():
            known = look_up(name)
            if known is not None and time >= now - self._fresh_s:
                for told in known.metric.node_names:
                    gathered.setdefault(told, []).append(value)
        return {name: _OPERATIONS[name.rpartition(".")[2]](values) for name, values in gathered.items()}

    # What outlives a crash

    def state(self) -> dict[str, Any]:
        """What is committed with rows, as plain values."""
        return {
            "merged": list(self._merged),
            "nodes": dict(self._nodes),
            "gpus": dict(self._gpus),
            "used": {node: sorted(numbers) for node, numbers in self._used.items()},
            "meters": {
                node: {
                    n: [m.counter, m.energy_j, m.idle_s, m.heard, m.told_j, m.counted_j, m.pause_s]
                    for n, m in gpus.items()
                }
                for node, gpus in self._meters.items()
            },
            "row_at": self._row_at,
            "counted": self._counted,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._merged = self._heard = Position(*state["merged"])
        self._nodes = dict(state["nodes"])
        self._gpus = {node: dict(gpus) for node, gpus in state["gpus"].items()}
        self._used = {node: set(numbers) for node, numbers in state["used"].items()}
        self._meters = {
            node: {int(number): _Meter(*values) for number, values in gpus.items()}
            for node, gpus in state["meters"].items()
        }
        self._row_at, self._counted = state["row_at"], state["counted"]


_ENERGY, _UTILIZATION = "system/gpu{i}/energy_j", "system/gpu{i}/utilization"


def _is_short(name: str) -> bool:
    known = look_up(name)
    return known is not None and known.metric.history


def _is_streamed(name: str) -> bool:
    known = look_up(name)
    return known is not None and known.metric.is_streamed


def first_ranks(sessions: Iterable[Any]) -> dict[str, int]:
    """The lowest rank of each node, of those sessions that are workers."""
    found: dict[str, int] = {}
    for session in sessions:
        if session.is_worker:
            lowest = max(session.rank - session.local_rank, 0)
            found[session.node] = min(lowest, found.get(session.node, lowest))
    return found
