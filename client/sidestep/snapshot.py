"""A file as it is now: opened at once, cloned where the file system can, and told later whether it was changed.

- a clone (FICLONE: btrfs, XFS, ...) shares its blocks with the file and none of its future. It is made without a
  name in the file's own directory, so nothing has to be cleaned up, whoever dies
- where there are no clones the open file itself is read later: what is written into it meanwhile is seen by its
  inode, size or times, and makes what was read worthless. Another file put in its place does no harm
- a hard link would be none: it is the same file
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from sidestep.errors import UnsupportedValue

FICLONE = 0x40049409
"""Of `linux/fs.h`."""
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

Signature = tuple[int, ...]
"""What changes when a file is written to: device, inode, size, and the times of its content and of its inode."""


class Torn(Exception):
    """A file was changed after it was taken."""


@dataclass(slots=True, kw_only=True)
class Opened:
    """A file that was taken: `file` is its descriptor, or None where it is opened only when its turn comes."""

    path: str
    size: int
    was: Signature
    file: int | None
    cloned: bool = False

    def close(self) -> None:
        """Let go of it."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


Clone = Callable[[int, str], int | None]
"""Makes a clone of an open file in a directory, and gives its descriptor, or None where that can not be."""


def clone(file: int, folder: str) -> int | None:
    """A clone without a name."""
    try:
        made = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):
        return None
    try:
        fcntl.ioctl(made, FICLONE, file)
    except OSError:
        os.close(made)
        return None
    return made


def take(path: str | os.PathLike[str], *, keep_open: bool = True, clone: Clone = clone) -> Opened:
    """Take a file as it is now. Raises UnsupportedValue, in words, if it is none that can be read.

    Without `keep_open`, for one of very many, it is opened later; another file in its place is then seen.
    """
    name = os.path.abspath(os.fspath(path))
    try:
        file = os.open(name, _READ)
    except OSError as error:
        raise UnsupportedValue(f"{name!r:.200} can not be read: {error.strerror}") from None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise UnsupportedValue(f"{name!r:.200} is no file")
    opened = Opened(path=name, size=status.st_size, was=signature(status), file=file)
    if not keep_open:
        opened.close()
    elif (made := clone(file, os.path.dirname(name))) is not None:
        os.close(file)
        found = os.fstat(made)
        opened.file, opened.size, opened.was, opened.cloned = made, found.st_size, signature(found), True
    return opened


def reopen(opened: Opened) -> None:
    """Open what was not kept open. Raises OSError, and Torn if it is another file, or another content, by now."""
    if opened.file is None:
        opened.file = os.open(opened.path, _READ)
        if signature(os.fstat(opened.file)) != opened.was:
            opened.close()
            raise Torn


def signature(status: os.stat_result) -> Signature:
    """What tells whether a file was changed. A file that is only renamed or unlinked has the same."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
