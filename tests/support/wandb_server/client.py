"""The stand-in server, as a test sees it: start, ask, disturb, stop."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.waiting import eventually
from tests.support.wandb_server.store import ALERTS, EVENTS, HISTORY, SUMMARY

KEY = "standin" + "0" * 33
ENTITY = "tester"
ROOT = Path(__file__).resolve().parents[3]


class StandIn:
    """A W&B server with one user, `tester`, who is also in the team `crew`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        breaches = self.breaches() if self._process and kind is None else []
        self.stop()
        assert breaches == []

    def start(self) -> Self:
        """Return when it answers; at the address that it had before."""
        words = ["-m", "tests.support.wandb_server", str(self.directory)]
        known = ["--key", KEY, "--entities", f"{ENTITY},crew"]
        self._process = subprocess.Popen([sys.executable, *words, *known], cwd=ROOT)
        eventually(self._answers, 60.0, "the stand-in server does not answer")
        return self

    def stop(self) -> None:
        """SIGKILL: connections are refused from now on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the stand-in server died"
        try:
            self._ask("tallies")
        except OSError:
            return False
        return True

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{(self.directory / 'port').read_text()}"

    @property
    def environment(self) -> dict[str, str]:
        """What leads wandb to it."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    # What it holds

    def rows(self, run: str, project: str = "p", entity: str = ENTITY) -> list[dict[str, Any]]:
        """The history of a run, in order."""
        return [json.loads(line) for line in self._lines(run, HISTORY, project, entity)]

    def steps(self, run: str, project: str = "p", entity: str = ENTITY) -> list[int]:
        """The `_step` of each row."""
        return [row["_step"] for row in self.rows(run, project, entity)]

    def samples(self, run: str, project: str = "p", entity: str = ENTITY) -> list[dict[str, Any]]:
        """The system stream of a run."""
        return [json.loads(line) for line in self._lines(run, EVENTS, project, entity)]

    def summary(self, run: str, project: str = "p", entity: str = ENTITY) -> dict[str, Any]:
        """The summary of a run."""
        lines = self._lines(run, SUMMARY, project, entity)
        return dict(json.loads(lines[-1])) if lines else {}

    def run(self, run: str) -> dict[str, Any]:
        """What was upserted of a run: `config`, `tags`, ..., and `exitcode` once it is finished."""
        [found] = [it for it in self._ask("runs") if it["name"] == run]
        config = json.loads(found.get("config") or "{}")
        return {**found, "config": {name: it["value"] for name, it in config.items()}}

    def alerts(self, run: str, project: str = "p", entity: str = ENTITY) -> list[tuple[str, str, str]]:
        """Title, text and level of what people were told."""
        told = map(json.loads, self._lines(run, ALERTS, project, entity))
        return [(title, text, level) for title, text, level in told]

    def runs(self) -> list[str]:
        """Their names."""
        return [it["name"] for it in self._ask("runs")]

    def breaches(self) -> list[str]:
        """What its clients did wrong."""
        return list(self._ask("breaches"))

    def tallies(self) -> dict[str, int]:
        """How often it was asked what, and what happened."""
        return dict(self._ask("tallies"))

    def artifacts(self) -> list[dict[str, Any]]:
        """Every version of every artifact, in the order in which they were created."""
        return list(self._ask("artifacts"))

    # Disturbing it

    def fault(self, match: str, kind: str, **how: Any) -> None:
        """Put a fault in force; see faults.py."""
        self._ask("fault", match=match, kind=kind, **how)

    def lift(self) -> None:
        """No fault from now on."""
        self._ask("lift")

    def make(self, run: str, rows: list[dict[str, Any]], project: str = "p", entity: str = ENTITY) -> None:
        """A run that somebody else logged."""
        self._ask("make", entity=entity, project=project, name=run)
        self._ask("replace", run=f"{entity}/{project}/{run}", file=HISTORY, lines=list(map(json.dumps, rows)))

    def lose_rows(self, run: str, *, summary: dict[str, Any], project: str = "p", entity: str = ENTITY) -> None:
        """Forget the history of a run, and have its summary say this."""
        place = f"{entity}/{project}/{run}"
        self._ask("replace", run=place, file=HISTORY, lines=[])
        self._ask("replace", run=place, file=SUMMARY, lines=[json.dumps(summary)])

    def _lines(self, run: str, file: str, project: str, entity: str) -> list[str]:
        return list(self._ask("lines", run=f"{entity}/{project}/{run}", file=file))

    def _ask(self, what: str, **said: Any) -> Any:
        if not (self.directory / "port").exists():
            raise FileNotFoundError(self.directory / "port")
        request = urllib.request.Request(f"{self.url}/control/{what}", json.dumps(said).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
