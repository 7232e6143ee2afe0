"""Where a daemon is, and how to speak to it: its address, its public key, and our own pair.

- keys are CURVE's (Curve25519), written as 64 hexadecimal digits: they survive shells, YAML and TOML unquoted
- a key file holds a secret: it is read only if it is ours, or the system's, and nobody else can read it
- a worker's key file names the daemons that it speaks to, by their public keys: no other can pose as one
- nothing here opens a socket
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.errors import SettingsError

DEFAULT_PORT = 7711
"""Where a daemon is looked for when the launcher says on which node it is, and nobody says where there."""
_KEY = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A key pair; the secret half is not shown."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """What a key file says: a pair and, in a worker's, the public keys of the daemons it speaks to."""

    pair: KeyPair
    servers: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Raises SettingsError for a file that others can read, and for one that is no key file."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:  # noqa: PTH123 - what was looked at is what is read
                if fault := exposed(os.fstat(descriptor), os.geteuid()):
                    raise SettingsError(f"{path}: {fault}")
                values = json.loads(file.read())
        except SettingsError:
            raise
        except OSError as error:
            raise SettingsError(f"{path}: can not be read: {error.strerror}") from None
        except ValueError:
            raise SettingsError(f"{path} is no key file: `sidestep keygen` makes one") from None
        return cls.of(values, path)

    @classmethod
    def of(cls, values: Any, path: Path) -> KeyFile:
        """What was read from `path`, checked."""
        said: Mapping[str, Any] = values if isinstance(values, dict) else {}
        servers = said.get("servers", [])
        keys = (said.get("public"), said.get("secret"), *(servers if isinstance(servers, list) else [None]))
        if not all(is_key(key) for key in keys):
            raise SettingsError(f"{path} is no key file: `sidestep keygen` makes one")
        return cls(pair=KeyPair(public=said["public"], secret=said["secret"]), servers=tuple(servers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A daemon at `address`. With `server_key` what is said there is encrypted, and `own` says who speaks."""

    address: str
    server_key: str = ""
    own: KeyPair | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def is_secured(self) -> bool:
        """Whether both ends prove who they are."""
        return self.own is not None and bool(self.server_key)


def is_key(value: object) -> bool:
    """Whether it is a key as it is written here."""
    return isinstance(value, str) and _KEY.fullmatch(value) is not None


def endpoints(address: str, keys: KeyFile | None, *, told: str = "") -> list[Endpoint]:
    """The ways to speak to the daemon at `address`: one for each public key that it may have by now.

    `told` is the key that somebody says the daemon has; a key file that names daemons itself knows better.
    Only tcp is secured: a socket in the file system is guarded by its directory. Raises SettingsError.
    """
    if keys is None or not address.startswith("tcp:"):
        return [Endpoint(address=address)]
    servers = keys.servers or ((told,) if is_key(told) else ())
    if not servers:
        raise SettingsError(f"no public key of the daemon at {address} is known: the key file shall name it")
    return [Endpoint(address=address, server_key=server, own=keys.pair) for server in servers]


def exposed(found: os.stat_result, us: int) -> str:
    """What is wrong with who may read or write a file with a secret; "" if nothing is.

    The group may read what belongs to the system: so do secrets of Kubernetes and credentials of systemd look.
    """
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISREG(found.st_mode):
        return "a key is in a regular file"
    if found.st_uid not in (us, 0):
        return f"it belongs to user {found.st_uid}, and not to us"
    allowed = 0o740 if found.st_uid == 0 else 0o700
    if mode & 0o777 & ~allowed:
        return f"others can read or change it (mode {mode:04o}): chmod 600, and make new keys if they could before"
    return ""
