"""Artifacts: files, references and media under one name, as wandb's `Artifact` has them, on their way.

    artifact.add_file(path) ─▶ entry ── log_artifact ─▶ lane and courier: bytes
                                                   └──▶ one record: what it is called, and a list of its entries

- what is added is taken as it is then: small files are read at once and travel together, larger ones are opened,
  or cloned where the file system can (snapshot.py), and read later by another process
- nothing raises: what is wrong is kept as words, and `log_artifact` refuses the whole artifact with them. Half an
  artifact is none
- a reference is an address and nothing else: nobody opens it, here or in the daemon
- what only the server knows of an artifact (its version, its downloads) is wandb's own
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, Any, NoReturn
from urllib.parse import urlparse

from sidestep.errors import NeedsWandb, UnsupportedValue
from sidestep.lane import Lane
from sidestep.media.base import Media, Ref, packed
from sidestep.media.value import plain_content
from sidestep.snapshot import Opened, take

SMALL_BYTES = 4 * 1024 * 1024
"""A file up to this size is read when it is added: scripts write the next one over it, and it is in memory yet."""
BUNDLE_BYTES = 4 * 1024 * 1024
"""Small files travel together, in blobs of this size."""
MOST_HELD = 64 * 1024 * 1024
"""What is read of small files is at most so much for one artifact; further ones are opened."""
MOST_OPEN = 64
"""So many files of an artifact are kept open; further ones are opened when their turn comes."""
MOST_NAME_CHARS = 128
MOST_METADATA = 100
MOST_METADATA_BYTES = 64 * 1024
MOST_PATH_CHARS = 1024
LATEST = "latest"
_NAME = re.compile(r"[a-zA-Z0-9_\-.]+")
_TAG = re.compile(r"[-\w]+( +[-\w]+)*")
_RESERVED = {"job": "", "run_table": "run-", "code": "source-"}
"""Types of wandb's own, and what the names of such artifacts begin with."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """One thing in an artifact: bytes that were read, a file, an address, or media."""

    path: str
    size: int = 0
    data: bytes | None = None
    opened: Opened | None = None
    ref: str = ""
    media: Media | None = None


class Artifact:
    """A version of something that a run makes: a model, a data set, results. Arguments are wandb's."""

    def __init__(
        self,
        name: str,
        type: str,  # noqa: A002 - wandb's name for it
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        incremental: bool = False,
        use_as: str | None = None,  # noqa: ARG002 - wandb's, and without effect there too
        storage_region: str | None = None,  # noqa: ARG002 - the server's business
        digest_algorithm: str = "MD5",  # noqa: ARG002 - what wandb calls its contents by; SHA-256 checks them here
    ) -> None:
        self._wrong = ""
        self._entries: dict[str, Entry] = {}
        self._held = self._open = 0
        self._ttl_s: int | None = None
        self._final = False
        self._is_named_after_run = False
        weakref.finalize(self, _close_all, self._entries).atexit = False  # it may never be logged
        self.name, self.type = _text(name), _text(type)
        self.description = None if description is None else _text(description)
        self.tags: list[str] = []
        self._guard(lambda: _check_name(self.name))
        self._guard(self._check_type)
        if incremental:
            self._note("incremental=True: a version is written at once, so each has all of its files")
        self.metadata = {} if metadata is None else metadata

    # What is in it

    def add_file(
        self,
        local_path: str | os.PathLike[str],
        name: str | None = None,
        is_tmp: bool | None = False,  # noqa: ARG002 - wandb's
        skip_cache: bool | None = False,  # noqa: ARG002 - a worker has no cache
        policy: str | None = "mutable",  # noqa: ARG002 - a file is always taken as it is now
        overwrite: bool = False,
    ) -> None:
        """Add a file, as it is now, under `name`, or its own."""

        def add() -> None:
            path = os.fspath(local_path)
            self._put(self._taken(path, _path(name or os.path.basename(path))), overwrite=overwrite)

        self._guard(add)

    def add_dir(
        self,
        local_path: str | os.PathLike[str],
        name: str | None = None,
        skip_cache: bool | None = False,  # noqa: ARG002 - wandb's
        policy: str | None = "mutable",  # noqa: ARG002 - likewise
        merge: bool = False,
    ) -> None:
        """Add the files of a directory and of those in it, below `name`."""

        def add() -> None:
            root = os.fspath(local_path)
            if not os.path.isdir(root):
                raise UnsupportedValue(f"{root!r:.200} is no directory")
            for path in _walk(root):
                below = os.path.relpath(path, root)
                self._put(self._taken(path, _path(os.path.join(name or "", below))), overwrite=merge)

        self._guard(add)

    def add_reference(
        self,
        uri: str,
        name: str | None = None,
        checksum: bool = True,  # noqa: ARG002 - nobody looks at what an address stands for
        max_objects: int | None = None,  # noqa: ARG002 - likewise
    ) -> None:
        """Add an address: of a bucket, a web page, a shared disk. What is there is not looked at."""

        def add() -> None:
            address = _text(uri)
            found = urlparse(address)
            if not found.scheme or len(address) > 4096:
                raise UnsupportedValue(
                    f"{address!r:.200} is no address: it begins with s3://, https://, file://, ..."
                )
            own = os.path.basename(found.path) if found.scheme == "file" else found.path.strip("/") or found.netloc
            self._put(Entry(path=_path(name or own), ref=address))

        self._guard(add)

    @contextmanager
    def new_file(
        self,
        name: str,
        mode: str = "x",
        encoding: str | None = None,
        policy: str | None = "mutable",  # noqa: ARG002 - wandb's
    ) -> Iterator[IO[Any]]:
        """A file to be written, which is in the artifact when it is closed: `with artifact.new_file(...) as f`."""
        opened = f"w{'b' if 'b' in mode else ''}+"
        with tempfile.NamedTemporaryFile(opened, encoding=None if "b" in mode else encoding) as file:
            yield file
            file.flush()
            self._guard(lambda: self._put(self._taken(file.name, _path(name), hold=True), overwrite="w" in mode))

    def add(self, obj: Any, name: str, overwrite: bool = False) -> None:
        """Add media of this package: an image, a table, ..."""

        def add() -> None:
            if not isinstance(obj, Media):
                raise UnsupportedValue(f"add() takes media of sidestep, not a {type(obj).__name__}")
            self._put(Entry(path=_path(name), media=obj), overwrite=overwrite)

        self._guard(add)

    def __setitem__(self, name: str, item: Any) -> None:
        self.add(item, name)

    def remove(self, item: str | os.PathLike[str]) -> None:
        """Take a file, or all files in a directory, out again."""
        path = os.fspath(item).strip("/")
        gone = [it for it in self._entries if it == path or it.startswith(f"{path}/")]
        if not gone:
            self._note(f"remove({path!r:.200}): there is no such entry")
        for it in gone:
            self._let_go(self._entries.pop(it))

    # What it is

    @property
    def metadata(self) -> dict[str, Any]:
        """What is known of it, as JSON has it."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: Any) -> None:
        self._metadata: dict[str, Any] = {}
        self._guard(lambda: self.__dict__.update(_metadata=dict(metadata or {})))

    @property
    def ttl(self) -> timedelta | None:
        """How long it is kept; None for as long as the team has it."""
        return None if self._ttl_s is None else timedelta(seconds=self._ttl_s)

    @ttl.setter
    def ttl(self, ttl: timedelta | None) -> None:
        def put() -> None:
            if ttl is not None and (not isinstance(ttl, timedelta) or ttl.total_seconds() < 1):
                raise UnsupportedValue("ttl is a timedelta of a second at least")
            self._ttl_s = None if ttl is None else int(ttl.total_seconds())

        self._guard(put)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(entry.size for entry in self._entries.values())

    @property
    def file_count(self) -> int:
        """How many entries it has."""
        return len(self._entries)

    @property
    def state(self) -> str:
        """As wandb calls one whose version only the server knows."""
        return "PENDING"

    def is_draft(self) -> bool:
        """Whether the server does not have it, as far as is known here."""
        return True

    def finalize(self) -> None:
        """Nothing more is added."""
        self._final = True

    def wait(self, timeout: int | None = None) -> Artifact:
        """The artifact. Its bytes leave in the background; what comes of it is known to the run alone."""
        from sidestep import _current

        if (run := _current.current()) is not None:
            run.flush(min(timeout or 5.0, 5.0))
        return self

    def save(self, project: str | None = None, settings: Any = None) -> None:  # noqa: ARG002 - wandb's
        """Log it to the run that there is."""
        from sidestep import _current

        if (run := _current.current()) is not None:
            run.log_artifact(self)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or name not in _OF_THE_SERVER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise NeedsWandb(
            f"artifact.{name}: the server knows it, when the run's daemon has sent it there: "
            "`wandb.Api().artifact(NAME)`"
        )

    def __repr__(self) -> str:
        return f"<sidestep.Artifact {self.type}/{self.name}>"

    # On its way

    def pack(self, lane: Lane, aliases: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
        """The data of its record, with all bytes handed over. Raises UnsupportedValue if anything is wrong."""
        self.finalize()
        if self._wrong:
            raise UnsupportedValue(self._wrong)
        facts: dict[str, Any] = {
            "name": self.name,
            "type": self.type,
            "metadata": _checked_metadata(self._metadata),
            "aliases": list(aliases),
            "tags": list(dict.fromkeys([*_checked_tags(self.tags), *tags])),
        }
        if self.description:
            facts["description"] = self.description[:MOST_METADATA_BYTES]
        if self._ttl_s is not None:
            facts["ttl_s"] = self._ttl_s
        if self._is_named_after_run:  # which a worker may not know yet
            facts["of_run"] = True
        return {"artifact": facts, **packed_entries(self._entries.values(), lane)}

    def release(self) -> None:
        """It will not be logged: let go of its files."""
        _close_all(self._entries)

    def _taken(self, path: str, name: str, *, hold: bool = False) -> Entry:
        """A file as it is now."""
        opened = take(path, keep_open=hold or self._open < MOST_OPEN)
        if opened.size <= SMALL_BYTES and self._held + opened.size <= MOST_HELD:
            data = _read(opened)
            self._held += len(data)
            return Entry(path=name, size=len(data), data=data)
        self._open += opened.file is not None
        return Entry(path=name, size=opened.size, opened=opened)

    def _put(self, entry: Entry, *, overwrite: bool = False) -> None:
        if self._final:
            self._let_go(entry)
            self._note(f"{self.name} was logged: {entry.path!r:.200} is not added; make another version of it")
            return
        there = self._entries.get(entry.path)
        if there is not None and not overwrite and not _same(there, entry):
            self._let_go(entry)
            raise UnsupportedValue(f"{entry.path!r:.200} is in it already, with another content")
        if there is not None:
            self._let_go(there)
        self._entries[entry.path] = entry

    def _let_go(self, entry: Entry) -> None:
        if entry.opened is not None:
            self._open -= entry.opened.file is not None
            entry.opened.close()
        self._held -= len(entry.data or b"")

    def _guard(self, act: Callable[[], object]) -> None:
        """Do it; keep what is wrong, the first time, as words for `log_artifact`."""
        try:
            act()
        except UnsupportedValue as error:
            self._wrong = self._wrong or str(error)
        except Exception as error:  # noqa: BLE001 - a foreign value's own code may raise anything
            self._wrong = self._wrong or f"{type(error).__name__}: {error!s:.200}"

    def _note(self, text: str) -> None:
        from sidestep import _current

        _current.note(f"artifact {self.name} {text[:40]}", f"artifact: {text}")

    def _check_type(self) -> None:
        prefix = _RESERVED.get(self.type)
        mine = isinstance(self, CodeArtifact)
        if not self.type or len(self.type) > MOST_NAME_CHARS or set("/:") & set(self.type):
            raise UnsupportedValue(
                f"the type {self.type!r:.140} is empty, too long, or has a slash or a colon in it"
            )
        if self.type.startswith("wandb-") or (not mine and prefix is not None and self.name.startswith(prefix)):
            raise UnsupportedValue(f"artifacts of the type {self.type!r} with such names are wandb's own")


class CodeArtifact(Artifact):
    """What `log_code` makes."""


class RunFiles(Artifact):
    """Files that become the run's own, under their paths: what `save` makes."""

    def __init__(self) -> None:
        super().__init__("files", "files")

    def pack(self, lane: Lane, aliases: Sequence[str] = (), tags: Sequence[str] = ()) -> dict[str, Any]:  # noqa: ARG002
        """The data of the record."""
        if self._wrong:
            raise UnsupportedValue(self._wrong)
        return packed_entries(self._entries.values(), lane)


@dataclass(slots=True)
class _Bundles:
    """Small files on their way together."""

    lane: Lane
    refs: list[Ref]
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, data: bytes) -> list[int]:
        """In which blob, and where in it, these bytes are."""
        if self.size + len(data) > BUNDLE_BYTES:
            self.close()
        at, self.size = self.size, self.size + len(data)
        self.pieces.append(data)
        return [len(self.refs), at]

    def close(self) -> None:
        """The blob is full."""
        if self.pieces:
            self.refs.append(self.lane.add(tuple(self.pieces), hashed=True))
            self.pieces, self.size = [], 0


def packed_entries(entries: Iterator[Entry] | Any, lane: Lane) -> dict[str, Any]:
    """A list of entries, and which blobs it takes to have them all."""
    refs: list[Ref] = []
    said: list[dict[str, Any]] = []
    media: list[Any] = []
    entries = list(entries)
    bundles = _Bundles(lane, refs)
    try:
        for entry in entries:  # small ones first, so that a bundle's place in `refs` is known when it is full
            if entry.data is not None:
                said.append({"path": entry.path, "size": entry.size, "in": bundles.add(entry.data)})
        bundles.close()
        for entry in entries:
            if entry.opened is not None:
                opened, entry.opened = entry.opened, None
                refs.append(lane.add_opened(opened))
                said.append({"path": entry.path, "size": entry.size, "in": [len(refs) - 1]})
            elif entry.media is not None:
                media.append(packed(entry.media, lane))
                said.append({"path": entry.path, "media": media[-1]})
            elif entry.ref:
                said.append({"path": entry.path, "ref": entry.ref})
        content = plain_content([said, refs]).handed_to(lane)
    except BaseException:
        lane.give_up([refs, media])
        raise
    return {"entries": content, "blobs": _ranges([refs, media, content])}


def _ranges(value: Any) -> list[list[Any]]:
    """All refs in a value, as `[session, first, last]` of numbers that follow on one another."""
    from sidestep.media.base import refs_in

    numbers: dict[bytes, list[int]] = {}
    for ref in refs_in(value):
        numbers.setdefault(ref["of"], []).append(ref["id"])
    found: list[list[Any]] = []
    for of, those in numbers.items():
        for number in sorted(set(those)):
            if found and found[-1][0] == of and found[-1][2] == number - 1:
                found[-1][2] = number
            else:
                found.append([of, number, number])
    return found


def checked_aliases(aliases: Any) -> list[str]:
    """Aliases, with `latest` where none are given, as wandb has it. Raises UnsupportedValue."""
    given = [aliases] if isinstance(aliases, str) else list(aliases if aliases is not None else [])
    texts = [_text(alias) for alias in given]
    for alias in texts:
        if not alias or len(alias) > MOST_NAME_CHARS or set("/:") & set(alias):
            raise UnsupportedValue(f"the alias {alias!r:.140} is empty, too long, or has a slash or a colon in it")
    return list(dict.fromkeys([*texts, LATEST]))


def _checked_tags(tags: Any) -> list[str]:
    texts = [_text(tag) for tag in ([tags] if isinstance(tags, str) else tags or ())]
    for tag in texts:
        if not _TAG.fullmatch(tag) or len(tag) > MOST_NAME_CHARS:
            raise UnsupportedValue(
                f"the tag {tag!r:.140}: letters, digits, hyphens, underscores and spaces may be in one"
            )
    return texts


def checked_tags(tags: Any) -> list[str]:
    """Tags of a version. Raises UnsupportedValue."""
    return _checked_tags(tags)


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: numpy's and torch's values are Python's, NaN is nothing, infinities are refused."""
    from sidestep.logger.python_types import to_python_types

    found = _without_nan(to_python_types(metadata))
    if len(found) > MOST_METADATA:
        raise UnsupportedValue(f"metadata has {len(found)} keys; {MOST_METADATA} is the most")
    try:
        size = len(json.dumps(found, allow_nan=False))
    except ValueError:
        raise UnsupportedValue("metadata has an infinity in it, which W&B does not take") from None
    if size > MOST_METADATA_BYTES:
        raise UnsupportedValue(f"metadata has {size} bytes; {MOST_METADATA_BYTES} is the most: add it as a file")
    return dict(found)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(it) for name, it in value.items()}
    if isinstance(value, list):
        return [_without_nan(it) for it in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def safe_name(name: str) -> str:
    """A text as the name of an artifact: what may not be in one is an underscore, as wandb has it."""
    return re.sub(r"[^a-zA-Z0-9_\-.]", "_", name)[:MOST_NAME_CHARS] or "unnamed"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > MOST_NAME_CHARS:
        raise UnsupportedValue(
            f"the name {name!r:.140}: letters, digits, dashes, underscores and dots may be in one, "
            f"{MOST_NAME_CHARS} at most"
        )


def _path(name: str) -> str:
    """A path in an artifact: relative, and not out of it. Raises UnsupportedValue."""
    parts = [part for part in _text(name).replace("\\", "/").split("/") if part not in ("", ".")]
    path = "/".join(parts)
    if not parts or ".." in parts or len(path) > MOST_PATH_CHARS or not path.isprintable():
        raise UnsupportedValue(f"{name!r:.200} is no path in an artifact")
    return path


def _read(opened: Opened) -> bytes:
    """A small file's content."""
    if opened.file is None:
        opened.file = os.open(opened.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with os.fdopen(os.dup(opened.file), "rb") as file:
            return file.read(SMALL_BYTES + 1)[: opened.size]
    finally:
        opened.close()


def _walk(root: str) -> Iterator[str]:
    for folder, _, files in os.walk(root, followlinks=True):
        for name in sorted(files):
            yield os.path.join(folder, name)


def _close_all(entries: Mapping[str, Entry]) -> None:
    for entry in entries.values():
        if entry.opened is not None:
            entry.opened.close()


def _same(one: Entry, other: Entry) -> bool:
    if one.opened is not None and other.opened is not None:
        return one.opened.was == other.opened.was
    return (one.data, one.ref, one.media) == (other.data, other.ref, other.media) and not (
        one.opened or other.opened
    )


def _text(value: Any) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


_OF_THE_SERVER = frozenset(
    {
        "aliases", "checkout", "collection", "commit_hash", "created_at", "delete", "digest", "download", "entity",
        "file", "files", "get", "get_entry", "get_path", "history_step", "id", "json_encode", "link",
        "linked_artifacts", "logged_by", "manifest", "new_draft", "project", "qualified_name", "source_artifact",
        "source_name",
        "source_version", "unlink", "updated_at", "url", "used_by", "verify", "version",
    }
)  # fmt: skip
"""Names of wandb's artifacts that are known to the server alone."""
