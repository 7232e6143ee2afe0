"""The run as a worker sees it: what it is told here leaves through the session's outbox.

- `log()` never waits and never raises, and packs at once: nothing of the caller's is kept or changed
- names that were looked at before, with plain scalars, go straight; everything else (new names, other values, a
  full outbox, a finished run, a forked process, a mistake) goes the careful way, value by value
- only `flush`, `finish` and reading what the daemon alone knows wait, with a deadline
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import time as now
from types import TracebackType
from typing import Any

from sidestep import convert, definitions
from sidestep._about import About
from sidestep.alerts import Alerts
from sidestep.bags import Bag
from sidestep.convert import PLAIN
from sidestep.elsewhere import Elsewhere
from sidestep.errors import UnsupportedValue
from sidestep.media.base import Media
from sidestep.outbox import DropReason
from sidestep.outputs import Outputs, Saved
from sidestep.session import EXIT_S, LARGE_BYTES, Refusal, Session, Stats
from sidestep.staging import Call
from sidestep.steps import OffsetSteps, truth, whole
from sidestep.wire import MAX_NAME_CHARS, MAX_RECORD_BYTES, Kind

MOST_NAMES = 65_536
"""Names remembered as good; when there are more, they are looked at again."""
MAIN_AXIS = "global_step"
"""The axis of what is logged outside a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What `define_metric` returns, as wandb does."""

    name: str


class Axis:
    """Something to log on: the run itself, or a stage of it. Each has a step of its own."""

    __slots__ = ("_session", "_stage", "_steps")

    def __init__(self, session: Session, stage: str | None) -> None:
        self._session = session
        self._stage = stage
        self._steps = session.steps_of(stage)

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Say what happened at a step, in about a microsecond.

        `step` and `commit` mean what they mean in wandb. Values may be numbers, text, bools, None, lists and
        dicts of these, numpy scalars, small tensors on the CPU, and media, whose bytes follow in the background;
        a value that can not be logged is left out, counted and said once.
        """
        session, number = self._session, None
        try:
            if type(data) is dict and session.names.issuperset(data):
                for value in data.values():  # a loop, not a C call over a map: less code that has left the caches
                    if type(value) is not float and type(value) not in PLAIN:
                        break
                else:
                    steps = self._steps
                    if step is None and commit is None:  # what Steps.take does, without the call
                        steps.next = (number := steps.next) + 1
                        kind = steps.kind
                    else:
                        kind, number = steps.take(step, commit)
                    packer, session.packer = session.packer, None  # what Session.take_packer does, likewise
                    if packer is None:
                        packer = session.take_packer()
                    if self._stage is None:
                        record = packer.pack((kind, now(), number, data))
                    else:
                        record = packer.pack((kind, now(), number, data, self._stage))
                    size, outbox = len(record), session.outbox
                    if size <= LARGE_BYTES:
                        session.packer = packer
                        if outbox.room >= size:  # what Outbox.offer does
                            outbox.room -= size
                            outbox.queue.append(record)
                            if outbox.idle:
                                session.wake()
                            return
        except Exception:  # noqa: BLE001 - the careful way finds out what it was, counts it and says it
            pass
        self._log_guarded(data, step, commit, None if number is None else (kind, number))

    def define_metric(
        self,
        name: str,
        step_metric: Any = None,
        step_sync: bool | None = None,  # noqa: ARG002 - wandb's; here an axis always has its value in the row
        hidden: bool | None = None,
        summary: str | None = None,
        overwrite: bool | None = None,  # noqa: ARG002 - wandb's; here the last definition counts
        goal: str | None = None,
        *,
        reduce: str | list[str] | None = None,
    ) -> Metric:
        """Say how the metrics of a name or pattern are plotted (`step_metric`) and joined (`reduce`)."""
        definition = {
            "name": name,
            "step_metric": step_metric.name if isinstance(step_metric, Metric) else step_metric,
            "reduce": reduce,
            "summary": summary,
            "hidden": hidden,
        }
        if goal is not None:
            definition["goal"] = goal
        self._session.guard(lambda: self._define(definition))
        return Metric(name=name)

    def stage(self, name: str) -> Stage:
        """A stage of this, with its own step; the same name gives the same stage."""
        path = "/".join(part for part in (self._stage, _text(name).strip("/")) if part)
        return Stage(self._session, path[:MAX_NAME_CHARS] or None)

    def scope(self, name: str, step_offset: int | None = None) -> Scope:
        """A sub-experiment: its metrics are named under `name`, and its step 0 is `step_offset` of this axis.

        So sub-experiments that all count from 0 follow one another. Without an offset their steps are the axis's
        own. For an axis of its own there is `stage`.
        """
        return Scope(self, name, step_offset)

    @property
    def step(self) -> int:
        """The step that the next call without one takes."""
        return self._steps.next

    # The careful way

    def _log_guarded(self, data: Any, step: Any, commit: Any, at: tuple[int, int] | None) -> None:
        if self._session.dormant:
            at = None  # a step taken before a fork was the parent's
        self._session.guard(lambda: self._log_carefully(data, step, commit, at))

    def _log_carefully(self, data: Any, step: Any, commit: Any, at: tuple[int, int] | None) -> None:
        session = self._session
        if session.outbox.shut is not None:
            raise Refusal(session.outbox.shut)
        session.hide_from_compiler()
        call = session.staging.call()
        values = self._plain_values(_entries(data), call)
        try:
            kind, number = at or self._take(step, commit)
            if call.deferred:
                call.launch()
                session.offer_staged((kind, number), values, self._stage, call.by_name)
            else:
                session.offer(session.pack(kind, number, values, self._stage))
        except Refusal:
            session.lane.give_up(values)
            raise

    def _plain_values(self, entries: dict[Any, Any], call: Call) -> dict[str, Any]:
        """The values that can be logged; the others are counted and said."""
        values = {}
        stage = convert.quickly(call)
        for name, value in entries.items():
            found = len(call.deferred)
            try:
                known = self._name_of(name)
                if (staged := stage(value)) is not None:
                    values[known], call.by_name[known] = staged, [staged]
                    continue
                values[known] = convert.plain(value, blobs=self._session.lane, implied=_media_of, call=call)
                call.named(known, found)
            except UnsupportedValue as error:
                call.without(found)
                self._session.refuse_value(name, type(value), str(error))
        return values

    def _name_of(self, name: Any) -> str:
        """A name that the wire takes, looked at once in a session."""
        known = self._session.names
        if type(name) is str and name in known:
            return name
        text = _name(name)
        if len(known) >= MOST_NAMES:
            known.clear()
        known.add(text)
        return text

    def _take(self, step: Any, commit: Any) -> tuple[int, int]:
        try:
            return self._steps.take(whole(step), truth(commit))
        except UnsupportedValue as error:
            raise Refusal(DropReason.BAD_STEP, str(error)) from None

    def _define(self, definition: dict[str, Any]) -> None:
        try:
            plain = convert.plain(definition)
            for name in (plain["name"], plain["step_metric"] or ""):
                _name(name)
        except UnsupportedValue as error:
            raise Refusal(DropReason.UNSUPPORTED, f"define_metric: {error}") from None
        for attribute, why in definitions.complaints(plain):
            plain[attribute] = None
            self._session.refuse_value(f"define_metric({plain['name']})", str, why)
        self._session.offer(self._session.pack(int(Kind.DEFINE), None, plain, self._stage))

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and is not pickled: "
            "call sidestep.init() in the other one"
        )


vars(Axis.log)["_torchdynamo_disable"] = True  # torch.compile calls it as it is, instead of looking inside


class Stage(Axis):
    """A part of the training with a step of its own: its metrics are named and plotted under it."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """Where its metrics are found."""
        return self._stage or ""

    def __repr__(self) -> str:
        return f"<sidestep.Stage {self.name!r}>"


class Scope(Axis):
    """A sub-experiment on the axis of the run, or of a stage: a prefix of names, and an offset of steps."""

    __slots__ = ("_offset", "_prefix")

    def __init__(self, parent: Axis, name: str, step_offset: int | None) -> None:
        super().__init__(parent._session, parent._stage)
        outer = parent if isinstance(parent, Scope) else None
        self._prefix: str = f"{outer._prefix if outer else ''}{_text(name).strip('/')}/"
        self._offset: int = outer._offset if outer else 0
        self._steps = parent._steps
        if step_offset is not None:
            self._offset += self._checked(step_offset)
            key = f"{self._stage or ''}\0{self._prefix}{self._offset}"
            self._steps = self._session.steps.setdefault(key, OffsetSteps(self._offset))

    @property
    def name(self) -> str:
        """What its metrics are named under."""
        return self._prefix[:-1]

    @property
    def step(self) -> int:
        """The step that the next call without one takes, counted from the offset."""
        return self._steps.next - self._offset

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Say what happened at a step of this sub-experiment; else as `Axis.log`."""
        try:
            data = {f"{self._prefix}{name}": value for name, value in data.items()}
        except Exception:  # noqa: BLE001 - what is no dict of names and values is found out below, and said
            pass
        super().log(data, step, commit)

    def define_metric(
        self, name: str, step_metric: Any = None, *args: Any, reduce: str | list[str] | None = None, **more: Any
    ) -> Metric:
        """As `Axis.define_metric`, of names in this sub-experiment."""
        if isinstance(step_metric, str) and step_metric != MAIN_AXIS:
            step_metric = self._prefix + step_metric
        if isinstance(reduce, str):
            reduce = self._weighed(reduce)
        elif isinstance(reduce, list | tuple):
            reduce = [self._weighed(one) for one in reduce]
        return super().define_metric(f"{self._prefix}{name}", step_metric, *args, reduce=reduce, **more)

    def stage(self, name: str) -> Stage:
        """A stage of this sub-experiment: its steps are its own, and know no offset."""
        return super().stage(f"{self._prefix}{_text(name).strip('/')}")

    def _weighed(self, reduce: str) -> str:
        """A reduction whose weight, if it has one, is a name in this sub-experiment."""
        weighted = isinstance(reduce, str) and reduce.startswith("mean:")
        return f"mean:{self._prefix}{reduce[5:]}" if weighted else reduce

    def _checked(self, step_offset: Any) -> int:
        try:
            if (offset := whole(step_offset) or 0) >= 0:
                return offset
            raise UnsupportedValue(f"step_offset={step_offset!r:.80}: an offset is not negative")
        except UnsupportedValue as error:
            if self._session.settings.strict:
                raise
            self._session.notices.once(("scope", self._prefix), f"scope({self.name!r:.80}): {error}; taken as 0")
            return 0

    def __repr__(self) -> str:
        return f"<sidestep.Scope {self.name!r} from step {self._offset}>"


class Run(Axis, About, Outputs, Elsewhere):
    """The one run that every rank logs into. Made by `sidestep.init()`."""

    __slots__ = (
        "__dict__",
        "_alerts",
        "_asked",
        "_began",
        "_config",
        "_keywords",
        "_named",
        "_saved",
        "_summary",
    )  # users may add attributes, as to wandb's

    def __init__(self, session: Session, keywords: Mapping[str, Any]) -> None:
        super().__init__(session, None)
        self._keywords = keywords
        self._asked: set[str] = set()
        self._named: dict[str, Any] = {}
        self._saved: dict[str, Saved] = {}
        self._alerts = Alerts()
        self._began = now()
        self._config = Bag(session, Kind.CONFIG)
        self._summary = Bag(session, Kind.SUMMARY, self._log_last)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is that process's own, which joins the same run; a copy of it is itself."""
        if self._session.finished:
            raise TypeError("a Run that is finished is neither copied nor pickled")
        from sidestep import _current  # not before it is needed: it imports this

        settings = self._session.settings
        run_id = self._told("id", settings.run_id or self._keywords.get("id"), wait=False)
        return _current.rejoin, (settings.address, run_id, self._keywords.get("mode"))

    @property
    def config(self) -> Bag:
        """What the run was configured with."""
        return self._config

    @property
    def summary(self) -> Bag:
        """What the run comes to in the end, beside the last values of its metrics."""
        return self._summary

    def _log_last(self, values: dict[Any, Any]) -> None:
        """Media for the summary go with the next row: what was logged last under a name is in the summary."""
        self._log_guarded(values, None, False, None)

    def watch(
        self,
        models: Any,
        criterion: Any = None,  # noqa: ARG002 - wandb's, for the graph
        log: str | None = "gradients",
        log_freq: int = 1000,
        idx: int | None = None,
        log_graph: bool = False,
    ) -> None:
        """Log histograms of the gradients or parameters of torch models (`"gradients"`, `"parameters"`, `"all"`).

        Every `log_freq` batches, in the row of the next `log()`. Named as in wandb: `gradients/layer.weight`.
        """
        from sidestep.watching import watch  # only who watches needs it

        self._session.guard(lambda: watch(self._session, models, log, log_freq, idx, log_graph=log_graph))

    def unwatch(self, models: Any = None) -> None:
        """End it for some models, or for all."""
        if (watcher := self._session.watcher) is not None:
            self._session.guard(lambda: watcher.unwatch(models))

    def flush(self, timeout: float = EXIT_S) -> bool:
        """Wait until the daemon has on its disk what this process said so far; False if it was not in time."""
        return self._session.flush(_seconds(timeout))

    def stats(self) -> Stats:
        """The ledger of this process."""
        return self._session.stats()

    def finish(self, exit_code: int | None = None, timeout: float = EXIT_S) -> None:
        """End this process's part, in at most `timeout` seconds; what was not acknowledged is said.

        The run itself goes on until the command that it belongs to has ended.
        """
        code = self._session.exit_code if exit_code is None else exit_code
        self._session.finish(_seconds(timeout), _exit_status(code))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def __repr__(self) -> str:
        return f"<sidestep.Run {self._session.settings.run_id or ''} rank {self.rank} of {self.world}>"


class _Silent(Axis):
    """Takes every call and does nothing."""

    __slots__ = ()

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Nothing."""

    def define_metric(self, name: str, *_: Any, **__: Any) -> Metric:
        """Nothing, with the usual answer."""
        return Metric(name=name)

    def stage(self, name: str) -> Stage:
        """A stage as silent as this."""
        return _SilentStage(self._session, str(name))

    def scope(self, name: str, step_offset: int | None = None) -> Scope:
        """A sub-experiment as silent as this."""
        return _SilentScope(self, name, step_offset)


class _SilentStage(_Silent, Stage):
    __slots__ = ()


class _SilentScope(_Silent, Scope):
    __slots__ = ()


class SilentRun(_Silent, Run):
    """The run of `mode="disabled"`: it has the attributes of one, and costs nothing."""

    __slots__ = ()

    def __init__(self, session: Session, keywords: Mapping[str, Any]) -> None:
        from sidestep.util import generate_id  # a script may name its files by the run that is none

        super().__init__(session, {"id": generate_id(), **keywords})
        self._config, self._summary = Bag(None, Kind.CONFIG), Bag(None, Kind.SUMMARY)

    def watch(self, models: Any, *_: Any, **__: Any) -> None:
        """Nothing."""

    def unwatch(self, models: Any = None) -> None:
        """Nothing."""

    @property
    def dir(self) -> str:
        """Where files do no harm: a script may write some beside the run."""
        import tempfile  # which costs more than the rest of a run that does nothing

        return tempfile.gettempdir()


def _text(name: Any) -> str:
    """A name as users give it."""
    try:
        return str(name)
    except Exception:  # noqa: BLE001 - a foreign value's own code may raise anything
        return type(name).__name__


def _media_of(value: Any) -> Media | None:
    """The media that a foreign value is: a figure, an image of PIL's, a data frame."""
    from sidestep.media.implicit import media_of  # few trainings log such values

    return media_of(value)


def _exit_status(code: Any) -> int | None:
    """A code as users give it: anything that is no small number means failure."""
    if code is None or (isinstance(code, int) and abs(code) < 2**31):
        return None if code is None else int(code)
    return 1


def _seconds(timeout: Any) -> float:
    """A timeout as users give it: what is no number of seconds, or is too many, is the usual one."""
    try:
        seconds = float(timeout)
    except (TypeError, ValueError, OverflowError):
        return EXIT_S
    return min(seconds, threading.TIMEOUT_MAX) if seconds >= 0 else 0.0 if seconds < 0 else EXIT_S


def _entries(data: Any) -> dict[Any, Any]:
    if not isinstance(data, Mapping):
        raise Refusal(DropReason.UNSUPPORTED, f"log() takes a dict of names and values, not {type(data).__name__}")
    try:
        entries = dict(data)
    except Exception as error:  # noqa: BLE001 - a foreign mapping's own code may raise anything
        raise Refusal(DropReason.UNSUPPORTED, f"reading the dict raised {type(error).__name__}") from None
    if len(entries) > MAX_RECORD_BYTES:
        raise Refusal(DropReason.TOO_LARGE, f"{len(entries)} names do not fit into {MAX_RECORD_BYTES} bytes")
    return entries


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise Refusal(DropReason.UNSUPPORTED, f"a metric's name is text, not {type(name).__name__}")
    if len(name) > MAX_NAME_CHARS:
        raise UnsupportedValue(f"its name has {len(name)} characters; {MAX_NAME_CHARS} is the most")
    return str(convert.plain(name))
