"""Who may speak to a daemon over tcp: the list of clients' public keys, and what follows from it.

    # one line each: a public key, and the name of its owner
    3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29 client

- several keys may have one name: that is how a key is replaced, the old one goes when nobody uses it any more
- a session belongs to the name that said HELLO first, whatever key it has by then; nobody else can speak for it
- the socket on this node is guarded by its directory: who reaches that may read all there is, and speak for all
- the file is read again when it changes; while it can not be read the list stays as it was
- a daemon begins with no list of nobody; one that became that under it lets in nobody, as was meant
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from sidestep.endpoint import is_key
from sidestep.errors import SettingsError

logger = logging.getLogger("sidestepd.intake")

LOCAL = ""
"""Who comes over the socket on this node."""
MAX_NAME_CHARS = 128
MAX_LIST_BYTES = 4 * 1024 * 1024


class Clients:
    """The list in a file. Raises SettingsError for one that can not be used from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._mark()
        self._names = read_clients(path, or_nobody=True)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None for one that is not, or no longer, on the list."""
        return self._names.get(key)

    def look(self) -> None:
        """Read the file again if it has changed."""
        seen = self._mark()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            names = read_clients(self.path, or_nobody=True)
        except SettingsError as error:
            logger.error("the list of clients stays as it was: %s", error)
            return
        if gone := self._names.keys() - names.keys():
            logger.warning("%d keys are no longer on the list of clients", len(gone))
        self._names = names

    def _mark(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


def read_clients(path: Path, *, or_nobody: bool = False) -> dict[str, str]:
    """Names by public key. Raises SettingsError for a list that is none, or that others can change.

    With `or_nobody` an empty list is one too.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            text = file.read(MAX_LIST_BYTES).decode()
    except OSError as error:
        raise SettingsError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is no list of clients") from None
    if found.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(found.st_mode) & 0o022:
        raise SettingsError(f"{path}: others can change it, and let in whom they like: chmod 644, or chown")
    if not (names := parse(text, path)) and not or_nobody:
        raise SettingsError(f"{path} lists nobody: `sidestep keygen` adds clients to it")
    return names


def parse(text: str, path: Path) -> dict[str, str]:
    """The lines of a list; what follows a `#` is for people."""
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not is_key(words[0]) or len(words[1]) > MAX_NAME_CHARS:
            raise SettingsError(f"{path}, line {number}: a public key of 64 hexadecimal digits, and a name")
        if names.setdefault(words[0], words[1]) != words[1]:
            raise SettingsError(f"{path}, line {number}: this key is {names[words[0]]}'s already")
    return names


def may_speak(peer: str, owner: str | None) -> bool:
    """Whether `peer` may speak for a session that belongs to `owner`; None for one that is new."""
    return owner in (peer, None) or peer == LOCAL
