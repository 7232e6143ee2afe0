"""The spill: frames that no longer fit into memory, in a file that outlives the process.

    entry:  ┌────────┬───────┬───────────────────┬──────┐
            │ length │ crc32 │ header (40 bytes) │ body │      length of the body; crc of length and header
            └────────┴───────┴───────────────────┴──────┘

- a file is one session's: HELLO, then its unacknowledged FRAMEs in order, in between STATUS with the counters,
  and BYE if the session ended well. All are messages of the wire, with its bounds and checksums: whoever reads a
  file believes it no more than a socket
- a torn end, as a kill leaves it, is told by its length or its checksum; what is before it counts
- it is locked by the session that writes it, so that only what an ended session left is ever taken
- it takes no more than its bound, and leaves `RESERVE_BYTES` of the disk to others; nothing here raises OSError
- it is not synced: it survives the process, not the machine. Acknowledged is only what the daemon has
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidestep.errors import LocalProtocolError, RemoteProtocolError
from sidestep.outbox import DropReason, Outbox, Shelved
from sidestep.wire import MAX_FRAME_BYTES, MAX_FRAME_RECORDS, Bye, Frame, Hello, Message, Status, decode, encode
from sidestep.wire.header import LAYOUT, MessageType, unpack
from sidestep.wire.limits import END_OF_SEQUENCES

SUFFIX = ".spill"
DEFAULT_BYTES = 1024 * 1024 * 1024
RESERVE_BYTES = 256 * 1024 * 1024
MAX_ENTRIES = 65_536
"""Of a file. Its index is kept in memory, and a session that runs out of it drops."""
_PREFIX = struct.Struct("!II")
_HEADER_BYTES = LAYOUT.size
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Spill:
    """One session's shelf. Its file is made when it is first needed, and removed when it is empty again.

    `hello` makes the introduction that a file begins with; its sender sets it. `folders` are tried in turn. `say`
    is told why a file can not be written.
    """

    def __init__(
        self,
        session: bytes,
        *,
        folders: Callable[[], Sequence[Path]],
        limit: int = DEFAULT_BYTES,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._session = session
        self.hello: Callable[[], Hello] = lambda: Hello(session=session)
        self._folders = folders
        self._limit = limit
        self._say = say
        self._file: int | None = None
        self._end = self._entries = 0
        self.path: Path | None = None
        self.why = DropReason.SPILL_FAILED

    def put(self, frame: Frame) -> int | None:
        """Keep a frame; where it lies, or None and `why`."""
        if self._file is None and not self._make():
            return None
        return self._append(frame)

    def get(self, place: int) -> Frame | None:
        """The frame at `place`, if it is what was put there."""
        return None if self._file is None else _frame_at(self._file, place)

    def clear(self) -> None:
        """Remove the file."""
        if self.path is not None:
            _quietly(self.path.unlink)
        self.leave()

    def note(self, message: Status | Bye) -> None:
        """Write down how the counters stand, for who finds the file."""
        if self._file is not None:
            self._append(message)

    def leave(self) -> None:
        """Let go of the file, which stays for others to find. Also for a forked child, whose file it is not."""
        if self._file is not None:
            _quietly(os.close, self._file)
        self._file, self.path, self._end, self._entries = None, None, 0, 0

    def _make(self) -> bool:
        for folder in self._folders():
            path = folder / f"{self._session.hex()}{SUFFIX}"
            unready = path.with_suffix(".new")  # nobody takes it before it is locked and begun
            try:
                self._file = _made(unready)
                if self._append(self.hello()) is None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                unready.rename(path)
            except OSError as error:
                self._fail(f"{folder}: {error.strerror}")
                _quietly(unready.unlink)
                self.leave()
            else:
                self.path = path
                return True
        return False

    def _append(self, message: Message) -> int | None:
        assert self._file is not None
        try:
            entry = _entry(message)
        except LocalProtocolError as error:
            self._fail(str(error))
            return None
        if self._end + len(entry) > self._limit or self._entries >= MAX_ENTRIES:
            self.why = DropReason.SPILL_FULL
            return None
        place = self._end
        try:
            disk = os.fstatvfs(self._file)
            if disk.f_bavail * disk.f_frsize < RESERVE_BYTES + len(entry):
                raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES >> 20} MiB are free")
            _write(self._file, entry, place)
        except OSError as error:
            _quietly(os.ftruncate, self._file, place)
            self._fail(f"{self.path or 'a new file'}: {error.strerror}")
            return None
        self._end += len(entry)
        self._entries += 1
        return place

    def _fail(self, text: str) -> None:
        self.why = DropReason.SPILL_FAILED
        self._say(f"records that do not fit into memory can not be spilled to disk and will be dropped: {text}")


@dataclass(slots=True, kw_only=True)
class LeftBehind:
    """What an ended session left in a file. It is ours, and locked, until `remove` or `close`."""

    path: Path
    file: int
    hello: Hello
    bye: Bye | None = None
    frames: list[Shelved] = field(default_factory=list)
    offered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    values_refused: int = 0
    why: DropReason = DropReason.SPILL_FAILED

    @property
    def records(self) -> int:
        """How many records are in it."""
        return sum(frame.count for frame in self.frames)

    def outbox(self) -> Outbox:
        """An outbox that sends it, under the sequences it has."""
        return Outbox.of_shelf(
            self.hello.session,
            self,
            self.frames,
            first=self.hello.first,
            offered=self.offered,
            dropped=self.dropped,
            values_refused=self.values_refused,
        )

    def add(self, frame: Shelved) -> None:
        """Take in a frame if it follows on the others: a session's own file has no holes."""
        end = self.frames[-1].end if self.frames else frame.first
        if frame.first == end and 0 < frame.count <= MAX_FRAME_RECORDS and frame.end < END_OF_SEQUENCES:
            self.frames.append(frame)

    def count(self, said: Hello | Status | Bye) -> None:
        """Take in the counters as they stood later."""
        self.offered, self.dropped, self.values_refused = said.offered, dict(said.dropped), said.values_refused
        if isinstance(said, Bye):
            self.bye = said

    def put(self, frame: Frame) -> None:
        """Take nothing."""

    def get(self, place: int) -> Frame | None:
        """The frame at `place`."""
        return _frame_at(self.file, place)

    def clear(self) -> None:
        """Nothing yet: the last word has to be said too before the file may go."""

    def remove(self) -> None:
        """The daemon has all of it."""
        _quietly(self.path.unlink)
        self.close()

    def close(self) -> None:
        """Leave it to others."""
        _quietly(os.close, self.file)


def reopen(path: Path) -> LeftBehind | None:
    """What lies at `path`, if its session has ended, nobody else has taken it, and it can be read."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    left = None
    try:
        if _is_ours(file) and _lock(file):
            left = _read(path, file)
    except (OSError, RemoteProtocolError):
        pass
    finally:
        if left is None:
            _quietly(os.close, file)
    return left


def is_free(path: Path) -> bool:
    """Whether the session that wrote it has ended, and nobody else is taking it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _is_ours(file) and _lock(file)
    except OSError:
        return False
    finally:
        _quietly(os.close, file)


def waiting(folder: Path) -> list[Path]:
    """The spill files in `folder`, whoever they belong to."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    except OSError:
        return []


def folder_of_run(run_dir: Path) -> Path:
    """Where the workers of a run spill when they can reach its directory."""
    return run_dir / "spill"


def private_folder() -> Path:
    """Where the workers of this user on this node spill when they can not.

    The temporary directory is chosen as the standard library does, whose import costs more than all of this.
    """
    bases = [os.environ.get("TMPDIR"), "/tmp", "/var/tmp"]
    base = next((Path(base) for base in bases if base and Path(base).is_dir()), Path())
    return base.absolute() / f"sidestep-{os.geteuid()}" / "spill"


def own_folder() -> Path | None:
    """What is this user's alone on this node, made; None if it can not be."""
    folder = private_folder().parent
    return folder if _is_private(folder) else None


def folders(run_dir: str | None) -> list[Path]:
    """Where a worker may spill, the best place first; made, and ours alone."""
    found = []
    if run_dir is not None and _is_private(own := folder_of_run(Path(run_dir))):
        found.append(own)
    private = private_folder()
    if own_folder() and _is_private(private):
        found.append(private)
    return found


def _quietly(act: Callable[..., object], *arguments: object) -> None:
    try:
        act(*arguments)
    except OSError:
        pass


def _is_private(folder: Path) -> bool:
    """Make a folder if need be; whether it is a directory of ours that nobody else may enter."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _made(path: Path) -> int:
    """A new file, locked."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not _lock(file):
            raise OSError(errno.EAGAIN, "somebody else has locked it")
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int) -> bool:
    """Lock it, where that can be done; False if somebody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_ours(file: int) -> bool:
    """Whether it is a plain file of this user's, under one name."""
    status = os.fstat(file)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def _entry(message: Message) -> bytes:
    header, body = encode(message)
    length = len(body).to_bytes(4, "big")
    return b"".join((_PREFIX.pack(len(body), zlib.crc32(length + header)), header, body))


def _write(file: int, entry: bytes, place: int) -> None:
    left = memoryview(entry)
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written


def _head_at(file: int, place: int) -> tuple[int, bytes] | None:
    """The length of the body and the header of the entry at `place`; None if there is none that is whole."""
    head = os.pread(file, _PREFIX.size + _HEADER_BYTES, place)
    if len(head) < _PREFIX.size + _HEADER_BYTES:
        return None
    length, crc = _PREFIX.unpack_from(head)
    header = head[_PREFIX.size :]
    if zlib.crc32(head[:4] + header) != crc or length > MAX_FRAME_BYTES:
        return None
    return length, header


def _message_at(file: int, place: int) -> Message | None:
    try:
        if (head := _head_at(file, place)) is None:
            return None
        length, header = head
        body = os.pread(file, length, place + _PREFIX.size + _HEADER_BYTES)
        return decode([header, body]) if len(body) == length else None
    except (OSError, RemoteProtocolError):
        return None


def _frame_at(file: int, place: int) -> Frame | None:
    message = _message_at(file, place)
    return message if isinstance(message, Frame) and message.intact else None


def _entries(file: int) -> Iterator[tuple[int, int, bytes]]:
    """Where each entry begins, with the length of its body and its header, up to the first that is not whole."""
    place, size = 0, os.fstat(file).st_size
    for _ in range(MAX_ENTRIES):
        if (head := _head_at(file, place)) is None:
            return
        length, header = head
        end = place + _PREFIX.size + _HEADER_BYTES + length
        if end > size:
            return
        yield place, length, header
        place = end


def _read(path: Path, file: int) -> LeftBehind | None:
    """The index of a file, and its events; None if it does not begin as one of ours."""
    first = _message_at(file, 0)
    if not isinstance(first, Hello):
        return None
    left = LeftBehind(path=path, file=file, hello=first)
    left.count(first)
    for place, length, raw in _entries(file):
        header = unpack(raw)
        if header.session != first.session:
            continue
        if header.type is MessageType.FRAME:
            left.add(Shelved(first=header.first, count=header.count, size=length, place=place))
        elif isinstance(message := _message_at(file, place), Status | Bye):
            left.count(message)
    return left
