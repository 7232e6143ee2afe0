"""Where this worker's daemon is, as of now.

- an address that was given; else what the context file says; else the node that the launcher calls the first, for
  a worker with a key on one of several nodes
- files are read again whenever it is asked: a daemon may move, a file may come late, and keys are replaced
- it never raises: what is wrong is said once, and asked again later
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sidestep.endpoint import Endpoint, KeyFile, endpoints
from sidestep.errors import SettingsError
from sidestep.head import tcp_address
from sidestep.settings import WorkerSettings, told_by


class Whereabouts:
    """`head` is the host of node 0, where it can be told and this is not a launch on one node."""

    def __init__(
        self, settings: WorkerSettings, *, head: str | None = None, say: Callable[[str], object] = lambda _: None
    ) -> None:
        self._settings = settings
        self._head = head if settings.key_file else None
        self._say = say
        self._turn = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing will ever say where a daemon is."""
        return not (self._settings.address or self._settings.context or self._head)

    def look(self) -> Endpoint | None:
        """Where it is and how to speak to it, None while that is not known."""
        try:
            ways = self._ways()
        except SettingsError as error:
            self._say(f"no way to the daemon: {error}. Records wait here until that is mended")
            return None
        return ways[self._turn % len(ways)] if ways else None

    def failed(self) -> None:
        """That endpoint's daemon has another key: there may be another to try."""
        self._turn += 1

    def _ways(self) -> list[Endpoint]:
        settings = self._settings
        address, told = settings.address, settings.server_key or ""
        if settings.context:
            try:
                said = told_by(Path(settings.context))
            except (OSError, ValueError):
                said = {}  # not there yet, or just being replaced by somebody who does not rename
            address, told = said.get("address", address), said.get("server_key", told)
        if address is None and self._head is not None:
            address = tcp_address(self._head, settings.port)
        if address is None:
            return []
        keys = KeyFile.read(Path(settings.key_file)) if settings.key_file and address.startswith("tcp:") else None
        return endpoints(address, keys, told=told)
