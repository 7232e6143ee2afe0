"""Where the databases of a run lie: in its directory, or on a local disk if that directory is on none.

SQLite's write-ahead log needs a disk of this machine, and runs are started on network file systems.

- `spool.json` in the run directory says where the databases are; without it they are there. Everybody asks `home`
- intake decides, at its start and before anything is opened; where it lay once it stays, as long as that is there
- whoever ends in good order brings the databases home, so that a start on another machine takes them from there
- at any moment one place is the one that counts: `spool.json` is replaced only when the copies are complete
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sidestepd.processes import read_json, write_json

logger = logging.getLogger(__name__)

SPOOL, ROW_LOG = "spool.db", "delivery.db"
_FILES = tuple(f"{name}{suffix}" for name in (SPOOL, ROW_LOG) for suffix in ("", ".damaged"))
"""With the marks of damage that was found and not mended."""
_QUARANTINE = "quarantine"
_POINTER = "spool.json"
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "daos", "glusterfs", "gpfs", "lustre", "mfs",
        "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "vboxsf",
        "wekafs",
    }
)  # fmt: skip
"""File systems that others may write to as well, by their names in the kernel; FUSE is told by its prefix."""
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def home(run_dir: Path) -> Path:
    """Where the databases of a run are."""
    said = read_json(run_dir / _POINTER).get("dir")
    return Path(said) if isinstance(said, str) and said else run_dir


def settle(run_dir: Path, wanted: Path | None = None) -> Path:
    """Decide where the databases shall be, and bring there what lies in the run directory; returns the place."""
    now = home(run_dir)
    if now != run_dir:
        if now.is_dir():
            return now
        node = read_json(run_dir / _POINTER).get("node")
        logger.error("the spool was left in %s on %s, and is not here: what was not delivered is lost", now, node)
    place = choose(run_dir, wanted)
    if place != run_dir:
        place.parent.mkdir(mode=0o700, exist_ok=True, parents=True)
        place.mkdir(mode=0o700, exist_ok=True)
        logger.warning("the spool of %s lies in %s", run_dir, place)
        _bring(run_dir, place)
    _point(run_dir, place)
    return place


def bring_home(run_dir: Path) -> None:
    """Put the databases into the run directory; nobody may have them open. If that fails, they stay."""
    place = home(run_dir)
    if place == run_dir or not place.is_dir():
        return
    try:
        _bring(place, run_dir)
        if (place / _QUARANTINE).is_dir():
            shutil.copytree(place / _QUARANTINE, run_dir / _QUARANTINE, dirs_exist_ok=True)
        _point(run_dir, run_dir)
        shutil.rmtree(place)
    except (OSError, sqlite3.Error) as error:
        logger.warning("the spool stays in %s: %s", place, error)


def choose(
    run_dir: Path,
    wanted: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    mounts: str | None = None,
) -> Path:
    """The run directory if it is on a local disk, else one for this run on a local disk, or below `wanted`."""
    name = f"{run_dir.name}-{hashlib.sha256(bytes(run_dir)).hexdigest()[:8]}"
    if wanted is not None:
        return wanted.expanduser().absolute() / name
    mounts = read_mounts() if mounts is None else mounts
    if not is_network(file_system(run_dir, mounts)):
        return run_dir
    given = (environ.get("SLURM_TMPDIR"), environ.get("TMPDIR"), "/var/tmp", tempfile.gettempdir())
    places = [Path(place) for place in dict.fromkeys(given) if place and os.access(place, os.W_OK)]
    local = [place for place in places if not is_network(file_system(place, mounts))]
    lasting = [place for place in local if file_system(place, mounts) not in IN_MEMORY]
    if not local:
        logger.warning("%s is on a network file system, and there is no local disk: set spool.dir", run_dir)
        return run_dir
    if not lasting:
        logger.warning("the spool will not outlive this machine: %s is in its memory", local[0])
    return (lasting or local)[0] / f"sidestep-{os.geteuid()}" / name


def is_network(kind: str) -> bool:
    """Whether a file system of this kind may be on another machine."""
    return kind in _NETWORK or kind == "fuse" or kind.startswith("fuse.")


def file_system(path: Path, mounts: str) -> str:
    """The kind of file system that `path` is on, by the text of `/proc/self/mountinfo`; "" if it does not say."""
    path, best, kind = path.resolve(), -1, ""
    for point, name in _mounts(mounts):
        if path.is_relative_to(point) and len(point.parts) >= best:  # of two at one place the later one is seen
            best, kind = len(point.parts), name
    return kind


def _mounts(text: str) -> Iterator[tuple[Path, str]]:
    """Where something is mounted, and what."""
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split()
        if dash and len(fields) > 4:
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            yield Path(point), after.split(maxsplit=1)[0]


def read_mounts() -> str:
    """What is mounted where, as the kernel tells; "" where it does not."""
    with contextlib.suppress(OSError):
        return _MOUNTS.read_text(errors="surrogateescape")
    return ""


def _bring(source: Path, target: Path) -> None:
    """Copy what there is; it counts from when `spool.json` says so."""
    for name in (SPOOL, ROW_LOG):
        _fold(source / name)
    for name in _FILES:
        _copy(source / name, target)


def _point(run_dir: Path, place: Path) -> None:
    """From now on the databases are there, and what was left in the run directory is not them."""
    if place == run_dir:
        if (run_dir / _POINTER).exists():
            write_json(run_dir / _POINTER, {"dir": None})
        return
    write_json(run_dir / _POINTER, {"dir": str(place), "node": platform.node()})
    for name in _FILES:
        with contextlib.suppress(OSError):
            (run_dir / name).unlink(missing_ok=True)


def _fold(path: Path) -> None:
    """Fold the write-ahead log into the file; a file that is damaged is copied as it is, and salvaged later."""
    if path.is_file():
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _copy(source: Path, into: Path) -> None:
    """A durable copy, in place as a whole or not at all."""
    if not source.is_file():
        return
    draft = into / f".{source.name}.draft"
    with source.open("rb") as original, draft.open("wb") as copy:
        shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    draft.rename(into / source.name)
