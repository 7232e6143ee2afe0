"""`sidestep keygen`: the keys of a daemon and of those who may speak to it, and their replacement.

    DIR/server.key     the daemon's pair                                   its node alone
    DIR/clients        whom it lets in: a public key and a name a line     its node alone; no secret
    DIR/client.key     a worker's pair, and the daemon's public key        where workers run

- whatever is written is whole and 0600 from its first byte, or not there
- nothing is overwritten but by --rotate, and that leaves what was valid before valid
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from sidestep.endpoint import KeyFile, KeyPair
from sidestep.errors import SettingsError
from sidestep.sender import require_curve
from sidestepd.clients import parse

SERVER, CLIENT, CLIENTS = "server", "client", "clients"
_HEAD = """\
# Who may speak to the daemon: a public key and a name a line. It is read again when it changes.
# Several keys may have one name; a key whose line goes is refused from then on.
"""


def keygen(folder: Path, names: Sequence[str], rotated: Sequence[str]) -> list[Path]:
    """What the command does; returns the files that it wrote. Raises SettingsError."""
    changed = [path for name in rotated for path in rotate(folder, name)]
    if names or not rotated:
        changed += make_keys(folder, names or (CLIENT,))
    if not changed:
        raise SettingsError(f"{folder} has all of that already: --client adds one, --rotate replaces one")
    return list(dict.fromkeys(changed))


def make_keys(folder: Path, names: Sequence[str] = (CLIENT,)) -> list[Path]:
    """Make what is missing in `folder` for a daemon and these clients; returns what was made.

    Raises SettingsError.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = []
        if not _path(folder, SERVER).exists():
            _write(_path(folder, SERVER), _contents(new_pair()))
            made.append(_path(folder, SERVER))
        server = KeyFile.read(_path(folder, SERVER)).pair.public
        for name in names:
            if not _path(folder, _checked(name)).exists():
                pair = new_pair()
                _admit(folder, pair.public, name)
                _write(_path(folder, name), _contents(pair, [server]))
                made.append(_path(folder, name))
    except OSError as error:
        raise SettingsError(f"{error.filename or folder}: {error.strerror}") from None
    return made


def rotate(folder: Path, name: str) -> list[Path]:
    """Replace the pair of a client, or of the daemon; returns what was changed. Raises SettingsError.

    A client's new key is let in beside its old one; of a daemon's new key all clients in the folder are told
    beside the old one.
    """
    try:
        old, pair = KeyFile.read(_path(folder, name)), new_pair()
        if name != SERVER:
            _admit(folder, pair.public, name)
            _write(_path(folder, name), _contents(pair, old.servers))
            return [_path(folder, name), folder / CLIENTS]
        changed = []
        for path in sorted(folder.glob("*.key")):
            if path != _path(folder, SERVER):
                client = KeyFile.read(path)
                _write(path, _contents(client.pair, [pair.public, old.pair.public]))
                changed.append(path)
        _write(_path(folder, SERVER), _contents(pair))
        return [*changed, _path(folder, SERVER)]
    except OSError as error:
        raise SettingsError(f"{error.filename or folder}: {error.strerror}") from None


def new_pair() -> KeyPair:
    """Raises SettingsError where libzmq has no CURVE."""
    require_curve()
    public, secret = zmq.curve_keypair()
    return KeyPair(public=z85.decode(public).hex(), secret=z85.decode(secret).hex())


def derive_keys(folder: Path, secret: str) -> None:
    """Keys that follow from a secret, the same wherever it is known: of a daemon and of one client, `CLIENT`.

    What the folder has of others goes. Raises SettingsError.
    """
    server, client = (_derived(secret, name) for name in (SERVER, CLIENT))
    try:
        _write(folder / CLIENTS, f"{_HEAD}{client.public} {CLIENT}\n")
        _write(_path(folder, SERVER), _contents(server))
        _write(_path(folder, CLIENT), _contents(client, [server.public]))
    except OSError as error:
        raise SettingsError(f"{error.filename or folder}: {error.strerror}") from None


def _derived(secret: str, name: str) -> KeyPair:
    """Any 32 bytes are a secret key of Curve25519; these are as hard to guess as the secret is."""
    require_curve()
    own = hashlib.scrypt(secret.encode(), salt=f"sidestep {name}".encode(), n=2**14, r=8, p=1, dklen=32)
    return KeyPair(public=z85.decode(zmq.curve_public(z85.encode(own))).hex(), secret=own.hex())


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.key"


def _checked(name: str) -> str:
    if name == SERVER or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise SettingsError(f"{name}: a client's name is letters, digits, dots and dashes, and not `server`")
    return name


def _contents(pair: KeyPair, servers: Sequence[str] = ()) -> str:
    values: dict[str, Any] = {"public": pair.public, "secret": pair.secret}
    return json.dumps(values | ({"servers": list(servers)} if servers else {}), indent=2) + "\n"


def _admit(folder: Path, public: str, name: str) -> None:
    path = folder / CLIENTS
    before = path.read_text() if path.exists() else _HEAD
    parse(before, path)
    _write(path, before + ("" if before.endswith("\n") else "\n") + f"{public} {name}\n")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:  # noqa: PTH123 - opened with a mode that shows it to nobody
        os.fchmod(descriptor, 0o600)  # a umask may have taken it from us too
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    draft.rename(path)
