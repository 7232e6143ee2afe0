"""Rows as lines of JSON in `rows.jsonl`, for those without wandb and for tests.

A line is whole when it ends in a newline; a torn one, left by a crash, is cut off when the file is opened
again. Config, definitions, summary and alerts are lines of their own, told apart by their only key; samples are
told by `system`. Artifacts are lines too, and files of the run; what is in them lies beside the file, called by
its SHA-256.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sidestep.media.base import MARK, Files, Ref, is_packed, is_ref
from sidestepd.errors import Fatal
from sidestepd.rows import Content, Definition, Described, Printed, Row, Sample, Version
from sidestepd.sinks.base import Confirmed, RunFacts

FILE_NAME = "rows.jsonl"
FOLDER = "media"
"""Beside it: the bytes of media."""


class JsonlSink:
    """Appends to one file, and syncs it when asked to confirm."""

    takes_files = False

    def __init__(self, path: Path | None = None) -> None:
        """Into `path`, or into `rows.jsonl` in the run directory."""
        self._path = path or Path()
        self._named = path is not None
        self._file: IO[bytes] | None = None
        self._written: list[int] = []
        self._kept: list[str] = []
        self._id = ""

    def open(self, run: RunFacts, bookmark: Mapping[str, Any]) -> Confirmed:
        """Cut a torn line off, and tell of the rows beyond the bookmark."""
        if not self._named:
            self._path = run.directory / FILE_NAME
        self._id = run.id
        offset = int(bookmark.get("offset", 0))
        steps: list[int] = []
        kept: list[str] = []
        self._file = self._path.open("ab")
        if offset > self._file.tell():  # not the file that it was
            offset = 0
        with self._path.open("r+b") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                steps += _steps(line)
                kept += _ids(line)
            file.truncate(offset)
        return Confirmed(steps=tuple(steps), bookmark={"offset": offset}, kept=tuple(kept))

    def define(self, definitions: Iterable[Definition]) -> None:
        """One line each."""
        for it in definitions:
            self._append({"define_metric": {"name": it.name, "step_metric": it.step_metric}})

    def config(self, values: Mapping[str, Any]) -> Sequence[str]:
        """One line."""
        self._append({"config": dict(values)})
        return ()

    def summary(self, values: Mapping[str, Any]) -> Sequence[str]:
        """One line."""
        self._append({"summary": dict(values)})
        return ()

    def named(self, values: Mapping[str, Any]) -> None:
        """One line."""
        self._append({"named": dict(values)})

    def alert(self, title: str, text: str, level: str) -> None:
        """One line."""
        self._append({"alert": {"title": title, "text": text, "level": level}})

    def write(self, row: Row) -> Sequence[str]:
        """One line with `_step` and `_timestamp`, as in wandb's history."""
        self._append({"_step": row.step, "_timestamp": row.time, **row.values})
        self._written.append(row.step)
        return ()

    def show(self, value: Any, files: Files) -> Any:
        """Media by their kind and facts; their bytes are in files beside this one."""
        if is_packed(value):
            return {"_type": value[MARK], **self.show(value["facts"], files)}
        if is_ref(value):
            return self._keep(value, files)
        if isinstance(value, dict):
            return {name: self.show(item, files) for name, item in value.items()}
        if isinstance(value, list):
            return [self.show(item, files) for item in value]
        return value

    def _keep(self, ref: Ref, files: Files) -> dict[str, Any]:
        path = files.path(ref)
        kept = self._path.with_name(FOLDER) / path.name
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            os.link(path, kept)
        except FileExistsError:
            pass  # of a life before this one
        except OSError:  # another disk
            shutil.copyfile(path, kept)
        return {"file": f"{FOLDER}/{path.name}", "size": kept.stat().st_size}

    def prepare(self, version: Version) -> Any:
        """What stands in the line: facts and entries."""
        entries = [self._entry(content, version.files) for content in version.contents]
        facts = dict(version.facts or {})
        if facts.pop("of_run", False):
            facts["name"] = f"run-{self._id}-{facts['name']}"
        return {**facts, "id": version.id, "entries": entries, "_timestamp": version.time}

    def _entry(self, content: Content, files: Files) -> dict[str, Any]:
        if content.media is not None:
            return {"path": content.path, "media": self.show(content.media, files)}
        if content.file is None:
            return {"path": content.path, "ref": content.ref}
        beside, file = self._path.parent, content.file
        place = file.relative_to(beside) if file.is_relative_to(beside) else file
        return {"path": content.path, "size": content.size, "sha256": content.sha256, "file": str(place)}

    def keep(self, version: Version, prepared: Any) -> None:
        """One line."""
        self._append({"files" if version.facts is None else "artifact": prepared})
        self._kept.append(version.id)

    def carry(self, line: Mapping[str, Any]) -> None:
        """A line of another run."""
        self._append(line)

    def sample(self, sample: Sample) -> None:
        """One line."""
        self._append({"system": dict(sample.values), "node": sample.node, "_timestamp": sample.time})

    def printed(self, said: Printed) -> None:
        """One line."""
        self._append({"printed": said.text, "stream": said.stream, "_timestamp": said.time})

    def described(self, said: Described) -> None:
        """One line."""
        if said.file is None:
            self._append({"program": dict(said.facts)})
        else:
            self._append({"file": said.file, "text": said.text})

    def confirm(self) -> Confirmed:
        """Sync the file."""
        file = self._open_file
        file.flush()
        os.fsync(file.fileno())
        steps, self._written = tuple(self._written), []
        kept, self._kept = tuple(self._kept), []
        return Confirmed(steps=steps, bookmark={"offset": file.tell()}, kept=kept)

    def history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """From the file's lines."""
        with self._path.open("rb") as file:
            for line in file:
                yield from ((step, json.loads(line)) for step in _steps(line))

    def close(self, exit_code: int) -> None:
        """One last line."""
        self._append({"exit_code": exit_code})

    def about(self) -> Mapping[str, Any]:
        """Where the file is."""
        return {"path": str(self._path)}

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._open_file.write(json.dumps(line, default=_plain).encode() + b"\n")
        except OSError as error:
            raise Fatal(f"{self._path}: {error}") from error  # the next process cuts off what is torn

    @property
    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise RuntimeError("the sink is not open")
        return self._file


def _steps(line: bytes) -> Iterator[int]:
    """The step of a line that is a row; a damaged line is none, and its row will be written again."""
    try:
        yield int(json.loads(line)["_step"])
    except (ValueError, KeyError, TypeError):
        return


def _ids(line: bytes) -> Iterator[str]:
    """The id of a line that is an artifact, or files of the run."""
    try:
        said = json.loads(line)
        yield str((said.get("artifact") or said["files"])["id"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return


def _plain(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
