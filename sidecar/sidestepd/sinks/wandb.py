"""Rows into a wandb run: one `run.log(row, step=N, commit=True)` for each, never a lower step.

- `run.log` returning means nothing durable: offline a row counts once it is read back from the synced `.wandb`
  file, online once the server tells of it (wandb_online.py)
- offline a resumed run writes a further segment: the rows it holds are those of all segments together
- the connection to wandb-core breaking is `Fatal`: the next process resumes, by the path walked at every start
- a value that wandb refuses costs that value, not its row
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import wandb
from wandb.proto import wandb_internal_pb2 as pb
from wandb.sdk.data_types.base_types.wb_value import WBValue
from wandb.sdk.data_types.utils import history_dict_to_json

from sidestep import media
from sidestep.media.base import Files
from sidestepd import credentials
from sidestepd.errors import Fatal, Reject, Retry
from sidestepd.rows import Definition, Described, Printed, Row, Sample, Version
from sidestepd.samplers.names import look_up
from sidestepd.sinks import wandb_artifacts, wandb_carry, wandb_log
from sidestepd.sinks.base import Confirmed, RunFacts

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0
"""How often wandb-core writes what it has into its file."""
MOST_TITLE = 63
"""Characters that the title of an alert may have in wandb."""
OF_A_SWEEP = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
"""With these wandb takes a run's names from its environment alone. The sweep's values are in the configuration."""
NO_WAIT_S = 0.001
"""An alert shall not be held back because there was one of the same title; 0 would mean wandb's own minute."""
CALLED: Mapping[str, Callable[[Any], Any]] = {"name": str, "notes": str, "tags": tuple}
"""What of a run's names may change while it is open, and how wandb wants it."""
REFUSED = (wandb.errors.Error, TypeError, ValueError)
"""What wandb raises when it does not like a value; pydantic's errors are ValueErrors."""
BROKEN = (ConnectionError, wandb.errors.CommError, wandb.errors.UsageError, OSError)
"""What it raises when wandb-core is gone, or a disk does not do what it shall."""
OF_A_NAME = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP})
"""Of those, what a name makes that no file can have, however often it is tried."""


class WandbSink:
    """One run in this process: what both modes have in common.

    Of wandb's inside it uses one method, `_publish` of the run's interface: for records that have no call of their
    own (samples, console, environment), and to let rows go `Ahead`.
    """

    takes_files = False

    def __init__(self) -> None:
        self._run: wandb.Run | None = None
        self._ahead: Ahead | None = None
        self._defined: set[str] = set()

    def define(self, definitions: Iterable[Definition]) -> None:
        """Exact names only: a name with a `*` in it would be a pattern to wandb, and is left alone."""
        for it in definitions:
            if it.name and "*" not in it.name:
                self._define(it)

    def _define(self, it: Definition) -> None:
        try:
            self._open_run.define_metric(
                it.name,
                step_metric=it.step_metric,
                step_sync=False,
                hidden=it.hidden,
                summary=it.summary,
                overwrite=it.name in self._defined or None,
            )
        except REFUSED as error:
            logger.warning("wandb refuses the definition of %.80r: %s", it.name, error)
        self._defined.add(it.name)

    def config(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Later values replace earlier ones."""
        run = self._open_run
        return _each(values, lambda some: run.config.update(some, allow_val_change=True))  # type: ignore[no-untyped-call]

    def summary(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Beside what wandb derives from the rows."""
        return _each(values, self._open_run.summary.update)

    def named(self, values: Mapping[str, Any]) -> None:
        """As wandb's own properties do it; what it refuses stays as it was."""
        run = self._open_run
        for name in CALLED.keys() & values.keys():
            try:
                setattr(run, name, CALLED[name](values[name]))
            except BROKEN as error:
                raise Fatal(f"wandb-core is gone: {error!r}") from error
            except REFUSED as error:
                logger.warning("wandb refuses the %s %.80r: %s", name, values[name], error)
        if values.get("preempted"):
            run.mark_preempting()

    def alert(self, title: str, text: str, level: str) -> None:
        """wandb sends it by mail or chat, as the user has set up there; offline it waits for `wandb sync`."""
        try:
            self._open_run.alert(title[:MOST_TITLE], text, level, wait_duration=NO_WAIT_S)
        except BROKEN as error:
            raise Fatal(f"wandb-core is gone: {error!r}") from error
        except REFUSED as error:
            logger.warning("wandb refuses the alert %.80r: %s", title, error)

    def write(self, row: Row) -> Sequence[str]:
        """One call."""
        try:
            refused = self._send(row)
            if row.restore:
                self.summary(row.restore)
            return refused
        except (TypeError, ValueError) as error:
            raise Reject("unloggable", str(error)) from error
        except BROKEN as error:
            raise Fatal(f"wandb-core is gone: {error!r}") from error

    def show(self, value: Any, files: Files) -> Any:
        """wandb's own objects."""
        try:
            return _takeable(_histograms_in_lists(media.shown(value, files)))
        except (wandb.errors.Error, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"wandb does not take it: {error!r}") from error

    def prepare(self, version: Version) -> Any:
        """wandb's own artifact, with its files where they are."""
        if version.facts is None:
            return None
        try:
            return wandb_artifacts.made(version, self._open_run.id, self.show)
        except wandb.errors.Error as error:
            raise ValueError(f"wandb does not take it: {error!r}") from error

    def keep(self, version: Version, prepared: Any) -> None:
        """`run.log_artifact`, or `run.save`."""
        try:
            if version.facts is None:
                wandb_artifacts.save(self._open_run, version)
            else:
                self._log_artifact(version, prepared)
        except (*BROKEN, *REFUSED) as error:
            if is_broken(error):
                raise Fatal(f"wandb-core is gone: {error!r}") from error
            raise Reject("unloggable", str(error)) from error

    def _log_artifact(self, version: Version, prepared: Any) -> None:
        facts = version.facts or {}
        self._open_run.log_artifact(prepared, aliases=facts.get("aliases"), tags=facts.get("tags") or None)

    def sample(self, sample: Sample) -> None:
        """One record of system metrics, as wandb's own monitor writes them; that one is off."""
        stats = pb.StatsRecord(stats_type=pb.StatsRecord.StatsType.SYSTEM)  # type: ignore[attr-defined]
        stats.timestamp.FromNanoseconds(round(sample.time * 1e6) * 1000)
        for name, value in sample.values.items():
            known = look_up(name)
            if known is not None:
                key = f"{known.stream_name}/l:{sample.node}"
                stats.item.add(key=key, value_json=json.dumps(value * known.metric.scale))
        self._publish(stats=stats)

    def printed(self, said: Printed) -> None:
        """One record of console output, as wandb's own capture writes them."""
        kind = pb.OutputRawRecord.OutputType.Value(said.stream.upper())  # type: ignore[attr-defined]
        output = pb.OutputRawRecord(output_type=kind, line=said.text)  # type: ignore[attr-defined]
        output.timestamp.FromNanoseconds(round(said.time * 1e6) * 1000)
        self._publish(output_raw=output)

    def described(self, said: Described) -> None:
        """One record of the environment, or a file among the run's files."""
        if said.file is None:
            self._publish(environment=environment(said))
            return
        folder = Path(self._open_run.settings.files_dir)
        path = folder / said.file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(said.text)
            self._open_run.save(str(path), base_path=str(folder), policy="now")
        except BROKEN as error:
            raise Fatal(f"{path} can not be kept: {error!r}") from error
        except REFUSED as error:
            logger.warning("wandb refuses the file %.80r: %s", said.file, error)

    def _publish(self, **record: Any) -> None:
        try:
            self._open_run._interface._publish(pb.Record(**record))  # type: ignore[attr-defined, union-attr]
        except BROKEN as error:
            raise Fatal(f"wandb-core is gone: {error!r}") from error

    def _send(self, row: Row) -> Sequence[str]:
        values = {"_timestamp": row.time, **row.values}
        try:
            self._open_run.log(values, step=row.step, commit=True)
            return ("",) if "" in values else ()  # wandb-core takes it and does not keep it
        except Exception as error:  # media have code of their own, which may raise anything
            if is_broken(error):
                raise
            good = _loggable(self._open_run, values, row.step, error)
            self._open_run.log(good, step=row.step, commit=True)
            return tuple(name for name in values if name not in good or not name)

    def _opened(self, run: wandb.Run) -> wandb.Run:
        self._run, self._ahead = run, Ahead(run)
        return run

    def _pass_on(self) -> None:
        """Wait until wandb-core was given all that was written. Raises Fatal if the way to it is broken."""
        if self._ahead is not None:
            try:
                self._ahead.wait()
            except BROKEN as error:
                raise Fatal(f"wandb-core is gone: {error!r}") from error

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """From the files of all segments."""
        for segment in wandb_log.segments(Path(self._open_run.settings.sync_file).parents[1]):
            yield from ((row.step, row.values) for row in wandb_log.history(segment))

    def about(self) -> Mapping[str, Any]:
        """The run's address and wandb-core's process, to be gone before another one is started."""
        core = _core()
        run = self._open_run
        return {
            "name": run.name,
            "project": run.project,
            "entity": run.entity,
            "mode": "offline" if run.offline else "online",
            "url": run.url,
            "starting_step": run.starting_step,
            "resumed": run.resumed,
            "group": run.group,
            "job_type": run.job_type,
            "tags": list(run.tags or ()),
            "notes": run.notes,
            "sweep_id": run.sweep_id,
            "start_time": run.start_time,
            "segment": str(Path(run.settings.sync_file).parent),
            "core": {"pid": core.pid, "started": core.create_time()} if core else None,
        }

    @property
    def _open_run(self) -> wandb.Run:
        if self._run is None:
            raise RuntimeError("the sink is not open")
        return self._run


class OfflineSink(WandbSink):
    """A run in files."""

    def __init__(self) -> None:
        super().__init__()
        self._file = Path()
        self._reader = wandb_log.LogReader(self._file)
        self._offsets: dict[str, int] = {}
        self._saved: dict[str, frozenset[str]] = {}
        """The paths of files that were saved and were not read back, by their ids."""

    def open(self, run: RunFacts, bookmark: Mapping[str, Any]) -> Confirmed:
        """Read what earlier segments hold, then begin a new one."""
        folder = run.directory / "wandb"
        folder.mkdir(exist_ok=True)
        if run.resume == "never" and run.earlier and not bookmark:
            there = f"run {run.id} is there already, in {run.earlier[-1]}; another id makes another run"
            raise Retry(there, after_s=5.0, lasting=True)
        self._offsets = dict(bookmark.get("offsets", {}))
        told = [self._read(segment) for segment in wandb_log.segments(folder)]
        wait_for_free_name(folder)
        self._file = Path(self._opened(_init_offline(run)).settings.sync_file)
        self._reader = wandb_log.LogReader(self._file)
        return Confirmed(
            steps=tuple(step for it in told for step in it.steps),
            bookmark={"offsets": self._offsets},
            kept=tuple(id_ for it in told for id_ in it.artifacts),
        )

    def keep(self, version: Version, prepared: Any) -> None:
        """As any; files count once their names are read back."""
        super().keep(version, prepared)
        if version.facts is None:
            self._saved[version.id] = frozenset(content.path for content in version.contents)

    def carry_over(self, folder: Path) -> None:
        """Have what another run's files say of artifacts and files in this run too."""
        run = self._open_run
        wandb_carry.carry_files(run, folder)
        wandb_carry.carry_artifacts(run, folder, skip=(), hand_over=lambda record: self._publish(artifact=record))

    def confirm(self) -> Confirmed:
        """Read what the file has got since the last time, then sync it: so what was read is on the disk."""
        self._pass_on()
        told = wandb_log.told_in(self._reader)
        _sync(self._file)
        self._offsets[self._file.parent.name] = self._reader.offset
        kept = [*told.artifacts]
        for id_, paths in list(self._saved.items()):
            self._saved[id_] = paths - told.files
            if not self._saved[id_]:
                del self._saved[id_]
                kept.append(id_)
        return Confirmed(steps=told.steps, bookmark={"offsets": self._offsets}, kept=kept)

    def close(self, exit_code: int) -> None:
        """Finish the run and wait for wandb-core to end: only then is its file complete."""
        self._pass_on()
        self._ahead = None
        self._open_run.finish(exit_code=exit_code)
        wandb.teardown(exit_code)

    def _read(self, segment: Path) -> wandb_log.Told:
        reader = wandb_log.LogReader(segment, self._offsets.get(segment.parent.name, 0))
        told = wandb_log.told_in(reader)
        self._offsets[segment.parent.name] = reader.offset
        return told


class Ahead:
    """A run whose calls go on while wandb's own thread passes records to wandb-core.

    - `run.log` waits for that thread each time, which is half of what it takes; here one record in `MOST` waits
    - their order stays, and a way to wandb-core that broke is raised by the next that waits
    """

    MOST = 64
    """Records under way to that thread: a core that takes nothing is soon felt, and memory stays bounded."""

    def __init__(self, run: wandb.Run) -> None:
        interface: Any = run._interface
        self._interface = interface
        self._publish = interface._publish
        self._under_way = 0
        interface._publish = self._go_on

    def wait(self) -> None:
        """Until nothing is under way any more."""
        if self._under_way:
            self._under_way = self.MOST
            self._interface.publish_keepalive()  # it only has to be the last

    def _go_on(self, record: Any, *, nowait: bool = False) -> None:
        self._under_way += 1
        if self._under_way < self.MOST:
            self._publish(record, nowait=True)
        else:
            self._publish(record, nowait=nowait)
            self._under_way = 0


def init(
    run: RunFacts, names: Mapping[str, Any], mode: Literal["offline", "online"], **settings: Any
) -> wandb.Run:
    """Open the run by `names`, with everything switched off that looks at this process or its machine."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    credentials.take(os.environ)
    os.environ.pop("WANDB_SERVICE", None)  # another process's core would die with that process
    for variable in OF_A_SWEEP:
        os.environ.pop(variable, None)
    if run.sweep_id:
        settings["sweep_id"] = run.sweep_id
    quiet = wandb.Settings(
        console="wrap",  # else wandb-core passes over what is printed; the wrapping itself is undone below
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        save_code=False,
        label_disable=True,
        silent=True,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        init_timeout=30,
        **settings,
    )
    opened = wandb.init(id=run.id, dir=run.directory, mode=mode, reinit="create_new", settings=quiet, **names)
    opened._restore()  # what this process prints is no part of the run
    return opened


def environment(said: Described) -> Any:
    """What the program is, as wandb has it."""
    made = pb.EnvironmentRecord()  # type: ignore[attr-defined]
    made.started_at.FromNanoseconds(round(said.time * 1e6) * 1000)
    facts = said.facts
    for name in ("os", "python", "executable", "program", "host", "username", "cuda_version", "root", "code_path"):
        if facts.get(name):
            setattr(made, name, str(facts[name]))
    if isinstance(args := facts.get("args"), list):
        made.args.extend(str(it) for it in args)
    if isinstance(count := facts.get("cpu_count"), int) and 0 < count < 2**31:
        made.cpu_count_logical = count
    if isinstance(git := facts.get("git"), dict):
        made.git.commit, made.git.remote_url = str(git.get("commit") or ""), str(git.get("remote") or "")
    return made


def _init_offline(run: RunFacts) -> wandb.Run:
    named = {"project": run.project, "entity": run.entity, "name": run.name}
    for names in ({**named, **run.options}, named, {}):
        try:
            return init(run, names, "offline")
        except OSError as error:
            raise Fatal(f"wandb can not open the run: {error}") from error
        except REFUSED as error:  # what a run is called is no reason to be without it
            logger.warning("wandb refuses to open the run with %s: %s", ", ".join(names) or "no names", error)
    raise Fatal("wandb can not open the run; the lines before say why")


def _each(values: Mapping[str, Any], tell: Callable[[dict[str, Any]], object]) -> Sequence[str]:
    """Tell all at once, or if wandb refuses that, one by one; returns the names that it refuses."""
    refused = []
    try:
        tell(dict(values))
    except REFUSED:
        for name, value in values.items():
            try:
                tell({name: value})
            except REFUSED as error:
                logger.warning("wandb refuses %.80r: %s", name, error)
                refused.append(name)
    return refused


def _histograms_in_lists(value: Any, inside: bool = False) -> Any:
    """In a list, as wandb tells it of a list of arrays; it knows media there only among themselves."""
    if isinstance(value, list):
        return [_histograms_in_lists(item, inside=True) for item in value]
    if isinstance(value, dict):
        return {name: _histograms_in_lists(item, inside) for name, item in value.items()}
    return value.to_json() if inside and isinstance(value, wandb.Histogram) else value


def wait_for_free_name(folder: Path) -> None:
    """wandb names a segment by the second it began in; two of one second would be one file."""
    taken = {segment.parent.name.split("-")[2] for segment in wandb_log.segments(folder)}
    while time.strftime("%Y%m%d_%H%M%S") in taken:
        time.sleep(0.05)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _core() -> psutil.Process | None:
    """The wandb-core that this process started."""
    for child in psutil.Process().children(recursive=True):
        if "wandb-core" in child.name():
            return child
    return None


def is_broken(error: Exception) -> bool:
    """Whether an error has nothing to do with what was logged: the next life may do better."""
    return isinstance(error, BROKEN) and getattr(error, "errno", None) not in OF_A_NAME


def _takeable(value: Any, inside: bool = False) -> Any:
    """The value, unless wandb has no form for it: it knows lists of media, and no other list with media in it."""
    if isinstance(value, dict):
        for item in value.values():
            _takeable(item, inside)
    elif isinstance(value, WBValue):
        if inside:
            raise ValueError("wandb shows lists of media, and none with anything else beside or around them")
    elif isinstance(value, list):
        alone = not inside and all(isinstance(item, WBValue) for item in value)
        for item in () if alone else value:
            _takeable(item, inside=True)
    return value


def _names_no_file(told: Any) -> bool:
    """Whether media, as wandb tells of them, are not among the run's files: the try before this one left them."""
    if isinstance(told, list):
        return any(map(_names_no_file, told))
    if not isinstance(told, dict):
        return False
    path = told.get("path")
    return ("_type" in told and isinstance(path, str) and path.startswith("..")) or any(
        map(_names_no_file, told.values())
    )


def _loggable(run: wandb.Run, values: Mapping[str, Any], step: int, error: Exception) -> dict[str, Any]:
    """The values that wandb can turn into JSON, as such, each tried by itself."""
    good = {}
    for name, value in values.items():
        try:
            told = history_dict_to_json(run, {name: value}, step=step)
            wandb.util.json_dumps_safer_history(told[name])
            if _names_no_file(told[name]):
                raise ValueError("its file could not be put among the run's")
        except Exception as why:  # likewise
            if is_broken(why):
                raise
            logger.warning("wandb refuses %.80r in row %d: %s", name, step, error)
        else:
            good[name] = told[name]
    return good
