"""What delivery does about artifacts: have them checked and made in a thread, sent once, and let go of.

- every file is read once, and its size, crc and SHA-256 held against what its worker said
- what is whole gets another name in the run's `artifacts/`, by its content: no byte is written twice on one disk,
  and a file that several versions share is there once
- that an artifact is sent is written down before; what became of it is the run's own word
- the bytes that came are deleted when that is written down, and so is what nobody ever referred to
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import msgpack

from sidestep.media.base import Ref
from sidestep.media.value import unpacked
from sidestepd.artifacts import Artifacts, blobs_of
from sidestepd.crashpoints import crash_point
from sidestepd.errors import Reject
from sidestepd.intake.blobs import name_of
from sidestepd.media import Media
from sidestepd.packed import BlobId, blobs_in
from sidestepd.resolve import SessionFacts
from sidestepd.rowlog import RowLog
from sidestepd.rows import Content, Logged, Part, Version
from sidestepd.show import BlobFiles, Corrupt
from sidestepd.sinks import Confirmed, Sink

logger = logging.getLogger("sidestepd.delivery")

SHOWN = "shown"
ORPHANED_S = 600.0
"""So long after the end of a process that said no word the bytes that it sent are kept for what may still come."""
FULL_S = 10.0
"""When a disk is full, it is tried again so much later."""
MOST_ENTRIES = 1_000_000
OF_WANDB = frozenset(
    {"wandb-metadata.json", "wandb-summary.json", "config.yaml", "output.log", "requirements.txt", "diff.patch",
     "conda-environment.yaml", "wandb-history.jsonl", "wandb-events.jsonl"}
)  # fmt: skip
"""Files of a run that are not a worker's to write."""
_READ_BYTES = 1024 * 1024

Facts = Mapping[BlobId, tuple[int, int, bytes]]


class Storing:
    """The artifacts of one run, for one life of its delivery."""

    def __init__(
        self,
        folder: Path,
        blobs: Path,
        sink: Sink,
        rowlog: RowLog,
        media: Media,
    ) -> None:
        """`folder` gets the files, `blobs` has what came of them."""
        self._folder, self._blobs, self._sink, self._rowlog, self._media = folder, blobs, sink, rowlog, media
        self.artifacts = Artifacts(fates=rowlog.artifacts())
        self._pool = ThreadPoolExecutor(1, "artifacts")
        self._making: dict[str, Future[tuple[Version, str, Any]]] = {}
        self._files: dict[str, set[Path]] = {}
        """The files of what was sent in this life."""
        self._not_before = 0.0
        self._over: dict[bytes, float] = {}
        """Sessions of which no more is said: when that was seen, or infinity once it was dealt with."""

    # What is heard

    def hear(self, said: Logged) -> None:
        """An artifact was logged."""
        self.artifacts.hear(said)

    def restore(self, fold: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.artifacts.restore(fold.get("artifacts", ()))

    def see(self, confirmed: Confirmed) -> None:
        """What the run holds, or never will."""
        self.artifacts.hold(confirmed.kept)
        for id_, why in confirmed.refused:
            logger.warning("an artifact was refused: %s", why)
            self.artifacts.refuse(id_, why)

    # Going on

    def go_on(self) -> None:
        """Have those made that are whole, and send those that are made."""
        if not self.artifacts.waiting or time.monotonic() < self._not_before:
            return
        for said in self.artifacts.complete(self._media.bytes_of.known):
            facts = {of: self._media.bytes_of.facts_of(of) for of in blobs_of(said)}
            self._making[said.id] = self._pool.submit(self._make, said, facts)
        ready = [self._made(id_, future) for id_, future in list(self._making.items()) if future.done()]
        versions = [it for it in ready if it is not None]
        if not versions:
            return
        self._rowlog.settle(artifacts=self.artifacts.take_fates())
        crash_point("delivery.artifact")
        for version, prepared in versions:
            try:
                self._sink.keep(version, prepared)
            except Reject as refusal:
                logger.warning("an artifact was rejected: %s", refusal)
                self.artifacts.refuse(version.id, "rejected")
        crash_point("delivery.artifact_sent")

    def flush(self) -> None:
        """Nothing more comes: what is not whole is lost."""
        self.artifacts.flush(self._media.bytes_of.known)

    def _made(self, id_: str, future: Future[tuple[Version, str, Any]]) -> tuple[Version, Any] | None:
        del self._making[id_]
        error = future.exception()
        if error is None:
            version, signature, prepared = future.result()
            self._files[id_] = {content.file for content in version.contents if content.file is not None}
            return (version, prepared) if self.artifacts.made(id_, signature) else None
        logger.warning("an artifact can not be kept: %s: %.500s", type(error).__name__, error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.artifacts.try_again(id_)
            self._not_before = time.monotonic() + FULL_S
            return None
        why = "corrupt" if isinstance(error, Corrupt) else "bad" if isinstance(error, ValueError) else "failed"
        self.artifacts.refuse(id_, why)
        return None

    # Letting go

    def clean(self) -> None:
        """What was settled is written down: its bytes may go."""
        for said in self.artifacts.take_done():
            self._media.bytes_of.give_back(blobs_of(said))
            shutil.rmtree(self._scratch(said.id), ignore_errors=True)
            files = self._files.pop(said.id, set())
            if self._sink.takes_files and self.artifacts.is_in_run(said.id):
                for path in files.difference(*self._files.values()):
                    path.unlink(missing_ok=True)

    def forget_orphans(
        self, sessions: Mapping[bytes, SessionFacts], now: float, waiting: Iterable[Part] = ()
    ) -> None:
        """Bytes whose record never came, of processes that will not say it any more.

        `waiting` is what came, and was not heard of here yet.
        """
        gone = []
        for id_, session in sessions.items():
            beside = sessions.get(bytes.fromhex(session.beside)) if session.beside else None
            if beside is None or not session.ended or not beside.ended or self._over.get(id_) == float("inf"):
                if self._over.get(id_) != float("inf"):
                    self._over.pop(id_, None)
                continue
            since = self._over.setdefault(id_, now)
            if session.ended == beside.ended == "bye" or now - since > ORPHANED_S:
                gone.append(id_)
        self._over.update(dict.fromkeys(gone, float("inf")))
        if gone:
            wanted = (of for part in waiting for of in blobs_in(part.values))
            self._media.forget_lanes(gone, chain(self.artifacts.blobs, wanted))

    def close(self) -> None:
        """The run is over."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._folder / SHOWN, ignore_errors=True)

    # In the thread

    def _make(self, said: Logged, facts: Facts) -> tuple[Version, str, Any]:
        files = BlobFiles(
            self._blobs, self._scratch(said.id), {of: (size, crc) for of, (size, crc, _) in facts.items()}
        )
        said_entries, refs = _entries(files.read(said.entries))
        taken = _Taken(self._folder, self._blobs, facts)
        contents = tuple(_content(it, refs, taken, in_run=said.facts is None) for it in said_entries)
        version = Version(id=said.id, time=said.time, facts=said.facts, contents=contents, files=files)
        return version, _signature(version), self._sink.prepare(version)

    def _scratch(self, id_: str) -> Path:
        return self._folder / SHOWN / id_[:32]


class _Taken:
    """The files of one artifact, each checked once."""

    def __init__(self, folder: Path, blobs: Path, facts: Facts) -> None:
        self._folder, self._blobs, self._facts = folder, blobs, facts
        self._checked: dict[BlobId, str] = {}
        folder.mkdir(mode=0o700, exist_ok=True)

    def whole(self, ref: Ref) -> tuple[Path, str]:
        """The file of a blob under the name of its content, and its SHA-256."""
        of = _blob_of(ref)
        sha256 = self._check(of)
        kept = self._folder / sha256
        source = self._blobs / name_of(*of)
        if not kept.exists():
            try:
                os.link(source, kept)
            except OSError:  # another disk, or one without links
                _copy(source, kept)
        return kept, sha256

    def part(self, ref: Ref, at: int, size: int) -> tuple[Path, str]:
        """The same of a part of a blob."""
        of = _blob_of(ref)
        self._check(of)
        with (self._blobs / name_of(*of)).open("rb") as file:
            file.seek(at)
            data = file.read(size)
        if len(data) != size:
            raise Corrupt("an entry names bytes that its artifact does not have")
        sha256 = hashlib.sha256(data).hexdigest()
        kept = self._folder / sha256
        if not kept.exists():
            _write(kept, data)
        return kept, sha256

    def _check(self, of: BlobId) -> str:
        if of not in self._checked:
            if of not in self._facts:
                raise Corrupt("an entry names bytes that are none of its artifact")
            self._checked[of] = check(self._blobs / name_of(*of), *self._facts[of])
        return self._checked[of]


def check(path: Path, size: int, crc: int, sha256: bytes) -> str:
    """The SHA-256 of a file, if it holds what was sent; else raises Corrupt."""
    digest, found, seen = hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                found, seen = zlib.crc32(piece, found), seen + len(piece)
    except FileNotFoundError:
        if size:
            raise Corrupt("its bytes are gone") from None
        path.touch(mode=0o600)
    if (seen, found) != (size, crc) or (sha256 and digest.digest() != sha256):
        raise Corrupt(f"{seen} of {size} bytes are there, or they are not what was sent")
    return digest.hexdigest()


def _entries(content: bytes) -> tuple[list[Any], list[Any]]:
    said = unpacked(content)
    if not isinstance(said, list) or len(said) != 2 or not all(isinstance(it, list) for it in said):
        raise ValueError("what is said of an artifact's entries is no list of them")
    if len(said[0]) > MOST_ENTRIES:
        raise ValueError(f"an artifact has {MOST_ENTRIES} entries at most")
    return said[0], said[1]


def _content(said: Any, refs: list[Any], taken: _Taken, *, in_run: bool) -> Content:
    """One entry. Everything here is a worker's, and may be anything."""
    if not isinstance(said, dict):
        raise ValueError("an entry is no map")
    path = _checked_path(said.get("path"), in_run=in_run)
    if "media" in said:
        return Content(path=path, media=said["media"])
    if "ref" in said:
        return Content(path=path, ref=str(said["ref"])[:4096])
    size, place = said.get("size"), said.get("in")
    if type(size) is not int or size < 0 or not isinstance(place, list) or not 1 <= len(place) <= 2:
        raise ValueError(f"{path!r:.200} is nowhere")
    if any(type(it) is not int or it < 0 for it in place) or place[0] >= len(refs):
        raise ValueError(f"{path!r:.200} is nowhere")
    ref = refs[place[0]]
    file, sha256 = taken.whole(ref) if len(place) == 1 else taken.part(ref, place[1], size)
    return Content(path=path, size=size, sha256=sha256, file=file)


def _checked_path(path: Any, *, in_run: bool) -> str:
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if not parts or ".." in parts or path.startswith("/") or "\\" in path or not path.isprintable():
        raise ValueError(f"{path!r:.200} is no path in an artifact")
    if in_run and (path in OF_WANDB or parts[0] == "media" or path.startswith("wandb-")):
        raise ValueError(f"{path!r:.200} is a file of wandb's own")
    return str(PurePosixPath(path))


def _blob_of(ref: Any) -> BlobId:
    of = next(iter(blobs_in(ref)), None)
    if of is None:
        raise Corrupt(f"{ref!s:.80} stands for no bytes")
    return of


def _signature(version: Version) -> str:
    """What is the same for two versions that do not differ in anything."""
    contents = sorted((it.path, it.sha256, it.ref, msgpack.packb(it.media)) for it in version.contents)
    return hashlib.sha256(msgpack.packb([version.facts, contents])).hexdigest()


def _copy(source: Path, target: Path) -> None:
    draft = target.with_name(f"{target.name}.draft")
    shutil.copyfile(source, draft)
    _sync(draft)
    draft.rename(target)


def _write(target: Path, data: bytes) -> None:
    draft = target.with_name(f"{target.name}.draft")
    draft.write_bytes(data)
    _sync(draft)
    draft.rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
