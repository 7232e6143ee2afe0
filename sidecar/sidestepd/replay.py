"""A run's rows once more, into another sink, from the run directory alone, of which nothing is changed.

- rows that the run holds come from its files: over all segments, in the order of `_step`, each step once
- rows that were decided and may not be in the run come word for word from the row log
- what is still in the spool is put in order by the code that would have done it, over copies of both databases
- artifacts, media and files of the run follow it, by what its files say of them; a file of lines names them where
  they lie
- an online run that lost its wandb-core may have rows that only the server holds; they are counted, not made up
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sidestep.errors import SettingsError
from sidestep.media.base import Files
from sidestepd import placement
from sidestepd.config import Config
from sidestepd.delivery import Delivery
from sidestepd.entries import Entry, EntryKind
from sidestepd.errors import Reject, Retry, Trouble
from sidestepd.rowlog import SENT, RowLog, RowLogReader
from sidestepd.rows import Definition, Described, Printed, Row, Sample, Version
from sidestepd.rundir import ARTIFACTS, BLOBS, RunFile
from sidestepd.show import SHOWN, Shower
from sidestepd.sinks import Confirmed, RunFacts, Sink, make_sink, patiently, wandb_log
from sidestepd.sinks.jsonl import FILE_NAME, JsonlSink
from sidestepd.spool import Spool, SpoolReader

logger = logging.getLogger(__name__)

UNFINISHED = 1
"""The exit code that a run is given which was not told to finish."""
_CONFIRM_EVERY = 1000

Progress = Callable[[int], None]
"""Called with how many rows were written."""
Waiting = Callable[["Trouble | None"], None]
"""Called all the time with what is waited for; what it raises ends the replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What went into the other sink: `missing` rows are in the run, and in no file here."""

    rows: int
    missing: int = 0


def target(name: str) -> tuple[Sink, Path]:
    """The sink that `jsonl:PATH` or `wandb:DIR` names, and the directory it writes into. Raises SettingsError."""
    kind, colon, place = name.partition(":")
    if kind not in ("jsonl", "wandb") or not colon or not place:
        raise SettingsError(f"--sink {name}: say jsonl:PATH or wandb:DIR")
    path = Path(place).absolute()
    if path.exists() and (kind == "jsonl" or any(path.iterdir())):
        raise SettingsError(f"--sink {name}: {path} is there already")
    directory = path.parent if kind == "jsonl" else path
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--sink {name}: {error.strerror}") from None
    return (JsonlSink(path) if kind == "jsonl" else make_sink("wandb")), directory


def facts_of(run_dir: Path, directory: Path, **other: Any) -> RunFacts:
    """The run as it is called, to be written into `directory`; `other` overrules."""
    run = RunFile.read(run_dir)
    called = {"project": run.project, "entity": run.entity, "name": run.name}
    said = dict(RowLogReader(placement.home(run_dir) / placement.ROW_LOG).meta("run") or {})
    names: dict[str, Any] = {name: said.pop(name, None) or value for name, value in called.items()}
    sweep_id = said.pop("sweep_id", None)
    options = {name: value for name, value in said.items() if name not in ("mode", "resume")}
    facts = RunFacts(id=run.id, directory=directory, sweep_id=sweep_id, options=options, **names)
    return replace(facts, **other)


def replay(
    run_dir: Path,
    sink: Sink,
    facts: RunFacts,
    *,
    progress: Progress = lambda _: None,
    waiting: Waiting = lambda _: None,
) -> Replayed:
    """Write the run as it stands now into `sink`, and finish it there."""
    config = Config.from_json((run_dir / "config.json").read_bytes())
    with tempfile.TemporaryDirectory(prefix="sidestep-replay-") as scratch:
        spool, rowlog = _copies(run_dir, Path(scratch))
        with closing(spool), closing(rowlog):
            confirmed = rowlog.meta("ledger", {}).get("rows", 0)
            unconfirmed = {row.step for row, fate in rowlog.rows() if fate == SENT}
            decided = rowlog.meta("marks", {}).get("last", -1)  # a living run goes on behind these copies
            if rowlog.meta("recover", None) is not None:  # what a damaged row log lost is in the files
                decided = max((row.step for row in held_rows(run_dir)), default=decided)

            def history() -> Iterator[Row]:
                return itertools.takewhile(lambda row: row.step <= decided, held_rows(run_dir))

            whole = AfterHistory(
                sink,
                history,
                unconfirmed,
                progress=progress,
                waiting=waiting,
                carry=partial(_carry, run_dir, sink),
            )
            shower = Shower(run_dir / BLOBS, sink.show, threads=1, scratch=facts.directory / f".{SHOWN}")
            delivery = Delivery(
                spool, rowlog, whole, config,
                shower=shower, shelf=facts.directory / ARTIFACTS,
                horizon=lambda: 0.0, beat=lambda: waiting(delivery.trouble),
            )  # fmt: skip
            delivery.start(facts, lambda _: None)
            delivery.serve()
            delivery.finish()
    return Replayed(rows=whole.rows, missing=max(0, confirmed - whole.found))


def _copies(run_dir: Path, scratch: Path) -> tuple[SpoolReader, RowLog]:
    """Both databases as of now, ready to be read to the end of the run."""
    home = placement.home(run_dir)
    for name in (placement.ROW_LOG, placement.SPOOL):  # in this order: what delivery had read is in the spool
        if (home / name).exists():
            with (
                closing(sqlite3.connect(f"file:{home / name}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(scratch / name)) as copy,
            ):
                source.backup(copy)
    rowlog = RowLog(scratch / placement.ROW_LOG)
    rowlog.settle(bookmark={})
    spool = Spool(scratch / placement.SPOOL, above=RowLogReader(scratch / placement.ROW_LOG).newest())
    if not spool.has_close():
        close = Entry.of_event(EntryKind.CLOSE, received=spool.latest(), exit_code=UNFINISHED)
        spool.commit([close])
    spool.close()
    return SpoolReader(scratch / placement.SPOOL), rowlog


def _carry(run_dir: Path, sink: Sink) -> None:
    """Have artifacts and files follow, of a run whose rows are in wandb's files or in lines."""
    if isinstance(sink, JsonlSink):
        for line in _lines_beside_rows(run_dir):
            sink.carry(line)
    elif (carry_over := getattr(sink, "carry_over", None)) is not None:
        carry_over(run_dir / "wandb")


def _lines_beside_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Artifacts and files that a run holds, as lines, with the places of their files on this disk."""
    if (run_dir / FILE_NAME).exists():
        for line in (run_dir / FILE_NAME).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                for it in [said[kind] for kind in ("artifact", "files") if isinstance(said.get(kind), dict)]:
                    for entry in it.get("entries", ()):
                        if "file" in entry:
                            entry["file"] = str(run_dir / entry["file"])
                    yield said
        return
    from sidestepd.sinks import wandb_carry  # which imports wandb

    for held in wandb_carry.held_artifacts(run_dir / "wandb"):
        entries = [
            {"path": it.path, "ref": it.ref}
            if it.ref
            else {"path": it.path, "size": it.size, "file": it.local_path}
            for it in held.manifest.contents
        ]
        facts = {"name": held.name, "type": held.type, "aliases": list(held.aliases), "tags": list(held.tags)}
        metadata = json.loads(held.metadata or "{}")
        yield {"artifact": {**facts, "metadata": metadata, "id": held.client_id, "entries": entries}}
    files = wandb_carry.held_files(run_dir / "wandb")
    if files:
        yield {"files": {"id": "", "entries": [{"path": name, "file": str(it)} for name, it in files.items()]}}


def held_rows(run_dir: Path) -> Iterator[Row]:
    """The rows in the files of a run, each step once, in order; with wandb's `_runtime` where it is."""
    segments = wandb_log.segments(run_dir / "wandb")
    lives = [_rows_of_segment(path) for path in segments] or [_rows_of_lines(run_dir / FILE_NAME)]
    last = -1
    for row in heapq.merge(*lives, key=lambda row: row.step):
        if row.step > last:
            last = row.step
            yield row


def _rows_of_segment(path: Path) -> Iterator[Row]:
    for row in wandb_log.nested_history(path):
        yield _row(row.step, dict(row.values))


def _rows_of_lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
                step = int(values["_step"])
            except (ValueError, KeyError, TypeError):  # torn, or no row
                continue
            yield _row(step, values)


def _row(step: int, values: dict[str, Any]) -> Row:
    time = float(values.pop("_timestamp", 0.0))
    values.pop("_step", None)
    return Row(step=step, time=time, values=values, places={}, positions=())


class AfterHistory:
    """A sink in which all that the run holds is written before anything else is."""

    def __init__(
        self,
        sink: Sink,
        history: Callable[[], Iterable[Row]],
        unconfirmed: Iterable[int],
        *,
        progress: Progress,
        waiting: Waiting,
        carry: Callable[[], None] = lambda: None,
    ) -> None:
        """`carry` has the sink take what the run holds beside rows."""
        self.rows = self.found = 0
        """Rows written, and those among them that the run was known to hold and its files have."""
        self.takes_files = sink.takes_files
        self._sink, self._history, self._progress, self._waiting = sink, history, progress, waiting
        self._trouble: Trouble | None = None
        self._unconfirmed = frozenset(unconfirmed)
        self._through = -1
        """The last step that the sink held when it was opened."""
        self._poured = False
        self._in_files: set[int] = set()
        self._passed: list[int] = []
        self._kept: list[str] = []
        self._carry, self._carried = carry, False

    def open(self, run: RunFacts, _: Mapping[str, Any]) -> Confirmed:
        """Whatever the sink holds, it holds of this run."""
        held = self._sink.open(run, {})
        self._through = held.steps[-1] if held.steps else -1
        return Confirmed(steps=(), bookmark={})

    def define(self, definitions: Iterable[Definition]) -> None:
        """As given."""
        self._sink.define(definitions)

    def config(self, values: Mapping[str, Any]) -> Sequence[str]:
        """As given."""
        return self._sink.config(values)

    def summary(self, values: Mapping[str, Any]) -> Sequence[str]:
        """As given."""
        return self._sink.summary(values)

    def named(self, values: Mapping[str, Any]) -> None:
        """As given."""
        self._sink.named(values)

    def alert(self, title: str, text: str, level: str) -> None:
        """As given: only what nobody was told before comes here."""
        self._sink.alert(title, text, level)

    def show(self, value: Any, files: Files) -> Any:
        """As the sink does, of what the run's files do not have."""
        return self._sink.show(value, files)

    def prepare(self, version: Version) -> Any:
        """As the sink does."""
        return self._sink.prepare(version)

    def keep(self, version: Version, prepared: Any) -> None:
        """As given: only what the run does not have comes here."""
        self._sink.keep(version, prepared)
        self._kept.append(version.id)

    def sample(self, sample: Sample) -> None:
        """As given: only what was in no stream before comes here."""
        self._sink.sample(sample)

    def printed(self, said: Printed) -> None:
        """As given, likewise."""
        self._sink.printed(said)

    def described(self, said: Described) -> None:
        """As given, likewise."""
        self._sink.described(said)

    def write(self, row: Row) -> Sequence[str]:
        """As given, unless the run's files had it. What is refused here was refused before."""
        self._pour()
        if row.step not in self._in_files:
            self._write(row)
        self._passed.append(row.step)
        return ()

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows of the run's files."""
        for row in self._history():
            yield row.step, {**row.values, "_timestamp": row.time}

    def confirm(self) -> Confirmed:
        """What was written counts here: whether it is durable is asked of the sink itself when all is."""
        steps, self._passed = self._passed, []
        kept, self._kept = self._kept, []
        return Confirmed(steps=steps, bookmark={}, watched=True, kept=kept)

    def close(self, exit_code: int) -> None:
        """After everything."""
        self._pour()
        if not self._carried:
            self._carry()
            self._carried = True
        self._sink.close(exit_code)
        self._sink.confirm()

    def about(self) -> Mapping[str, Any]:
        """As told."""
        return self._sink.about()

    def _pour(self) -> None:
        if self._poured:
            return
        for row in self._history():
            if row.step in self._unconfirmed:
                self._in_files.add(row.step)
            else:
                self.found += 1
            try:
                patiently(partial(self._write, row), beat=self._wait, kept=self._keep)
            except Reject as refusal:
                logger.error("row %d was rejected: %s", row.step, refusal)
        self._poured = True

    def _keep(self, later: Retry) -> None:
        self._trouble = later.trouble

    def _wait(self) -> None:
        self._waiting(self._trouble)

    def _write(self, row: Row) -> None:
        if row.step > self._through:
            self._sink.write(row)
        self._trouble = None
        self.rows += 1
        self._progress(self.rows)
        if self.rows % _CONFIRM_EVERY == 0:
            self._sink.confirm()
