"""A daemon, relays in front of it, and a training whose ranks speak through them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from sidestepd import status
from sidestepd.status import Ledger
from tests.support.daemons import DEADLINE_S, ServedRun, killed
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


class Topology:
    """A head, `nodes` relays, and a proxy in front of the head for each of them.

    Options of the head are named `section__option`; those of the relays come in `relay`.
    """

    def __init__(
        self, base: Path, *, nodes: int = 2, relay: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.head = ServedRun(base / "head", **options)
        self.proxies = [Proxy(self.head.address) for _ in range(nodes)]
        self._base, self._relay = base, dict(relay or {})
        self.relays: list[ServedRun] = []
        self._ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.head.start()
        for number, proxy in enumerate(self.proxies):
            proxy.__enter__()
            options = {"upstream__address": proxy.address, **self._relay}
            environment = {"SLURMD_NODENAME": f"node{number}"}
            served = ServedRun(self._base / f"node{number}", sink="upstream", environment=environment, **options)
            self.relays.append(served.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
        for served in (*self.relays, self.head):
            served.__exit__(None, None, None)
        for proxy in self.proxies:
            proxy.__exit__(None, None, None)

    # The training

    def train(self, words: Sequence[str], *, ranks_per_node: int = 2) -> None:
        """Start every rank of a command, on its node."""
        world = ranks_per_node * len(self.relays)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SIDESTEP_", "WANDB_"))}
        for rank in range(world):
            node = rank // ranks_per_node
            own = {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % ranks_per_node),
                "SIDESTEP_ADDRESS": self.relays[node].address, "SIDESTEP_RUN_ID": "tested",
                "SIDESTEP_RUN_DIR": str(self.relays[node].run_dir), "SIDESTEP_LAUNCH_ID": "job",
                "SLURMD_NODENAME": f"node{node}", "SIDESTEP_PROGRAM": "0", "SIDESTEP_CONSOLE": "0",
            }  # fmt: skip
            with (self._base / f"rank{rank}.log").open("ab") as log:
                self._ranks.append(
                    subprocess.Popen(list(words), env=plain | own, cwd=ROOT, stdout=log, stderr=log)
                )

    def wait(self) -> list[int]:
        """The exit codes of the ranks."""
        return [rank.wait(DEADLINE_S) for rank in self._ranks]

    def finish(self) -> None:
        """Close the relays' runs, then the head's."""
        for relay in self.relays:
            assert 0 == relay.finish()
        assert 0 == self.head.finish()

    # Its processes

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Start each intake whenever it has died, as its supervisor would."""
        with contextlib.ExitStack() as stack:
            for served in (self.head, *self.relays):
                stack.enter_context(served.kept_alive())
            yield

    def forwarder(self, node: int, *, other_than: int | None = None) -> psutil.Process:
        """The forwarder of a relay, when there is one."""

        def found() -> psutil.Process | None:
            pid = self.relays[node].status()["delivery"]["pid"]
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(pid) if pid not in (None, other_than) else None
            return None

        return eventually(found, DEADLINE_S, lambda: f"no forwarder:\n{self.relays[node].log()}")

    def kill_forwarder(self, node: int) -> None:
        """SIGKILL, and another one is there."""
        gone = killed(self.forwarder(node))
        self.forwarder(node, other_than=gone.pid)

    def rows_of_head(self) -> int:
        """How many rows the head has confirmed."""
        return int(self.head.told().get("rows", 0))

    def wait_for_rows(self, more: int = 20) -> None:
        """Until the head holds further rows."""
        before = self.rows_of_head()
        eventually(lambda: self.rows_of_head() >= before + more, DEADLINE_S, self.log)

    def wait_for_all(self, ranks: int) -> int:
        """Until a row has all ranks in it; how many rows were late by then, of ranks that started later."""

        def together() -> bool:
            rows = self.head.rows()
            return bool(rows) and rows[-1].values.get("sidestep/ranks_reported") == ranks

        eventually(together, DEADLINE_S, self.log)
        self.wait_for_rows(1)  # with which delivery tells of those before
        return int(self.head.told().get("late_rows", 0))

    def log(self) -> str:
        """The end of what everybody wrote."""
        ranks = [f"--- {path.name}\n{path.read_text()[-1000:]}" for path in sorted(self._base.glob("rank*.log"))]
        return "\n".join([f"--- head\n{self.head.log()}", *(f"--- relay\n{r.log()}" for r in self.relays), *ranks])

    def ledgers(self) -> list[Ledger]:
        """Of the head, then of each relay."""
        return [status.report(served.run_dir).ledger for served in (self.head, *self.relays)]


def command(*, steps: int, rate: float = 50.0, until: Path | None = None) -> list[str]:
    """A training to be killed around: each rank logs what is its own, and a mean."""
    words = ["--steps", str(steps), "--rate", str(rate)] + (["--until", str(until)] if until else [])
    return [sys.executable, "-m", "tests.support.training", *words]
