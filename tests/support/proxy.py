"""A network that can be cut: a TCP port in front of a daemon's socket, through which bytes pass, or do not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self

PASS, STALL, REFUSE = "pass", "stall", "refuse"


class Proxy:
    """Leads to the daemon at `address`, from `self.address`.

    While it stalls, nothing passes and nothing is closed, as when a cable is pulled; while it refuses, connections
    are reset and new ones closed, as when a host is down.
    """

    def __init__(self, address: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._target, self._host, self._wanted = address, host, port
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._mode = PASS
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._port = 0
        self.held_bytes = 0
        """What came while it stalled: the cut was in use."""
        self.refused = 0
        """Connections that were closed while it refused."""
        self._thread = threading.Thread(target=self._main, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)

    @property
    def address(self) -> str:
        """Where relays connect."""
        return f"tcp://{self._host}:{self._port}"

    def set(self, mode: str) -> None:
        """How it behaves from now on."""
        self._loop.call_soon_threadsafe(self._set, mode)

    def _set(self, mode: str) -> None:
        self._mode = mode
        if mode == STALL:
            self._open.clear()
        else:
            self._open.set()
        if mode == REFUSE:
            for writer in list(self._writers):
                writer.transport.abort()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, self._host, self._wanted))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == REFUSE:
            self.refused += 1
            writer.transport.abort()
            return
        try:
            there, back = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)
        self._writers -= {writer, back}

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        kind, _, where = self._target.partition("://")
        if kind == "ipc":
            return await asyncio.open_unix_connection(where)
        host, _, port = where.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._mode == STALL:
                    self.held_bytes += len(data)
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
