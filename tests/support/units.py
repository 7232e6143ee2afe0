"""A unit of deploy/systemd in a booted Debian, and trainings that log through it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidestepd import status
from tests.support.machines import Machine
from tests.support.waiting import eventually
from tests.support.wandb_server.store import HISTORY, Store
from tests.support.workshop import assert_whole, is_finished, lines, rows_in, rows_of, run_dir_in

WAIT_S = 120.0
UNIT = "sidestep@train"
SOCKET = "ipc:///run/sidestep/train/daemon.sock"
QUICK = (
    "SIDESTEP_SERVE_LINGER_S=1", "SIDESTEP_DELIVERY_CONFIRM_INTERVAL_S=0.2", "SIDESTEP_ORDER_PATIENCE_S=1",
    "SIDESTEP_SAMPLERS_INTERVAL_S=0.5",
)  # fmt: skip
KEY = "k" * 40


class Trained:
    """A training of a real worker, that goes on until it is told."""

    def __init__(
        self, machine: Machine, id_: str, *, user: str = "alice", address: str = SOCKET, state: Path | None = None
    ) -> None:
        self.machine, self.id, self._state = machine, id_, state or machine.tree / "var/lib/sidestep/train"
        self._until = machine.tree / f"srv/until-{id_}"
        words = ["env", f"SIDESTEP_ADDRESS={address}", "/opt/train/bin/python", "/opt/train/train.py"]
        self.process = machine.start(*words, f"/srv/until-{id_}", id_, "30", user=user)

    def state(self) -> Path:
        return self._state

    def reaches(self, rows: int) -> None:
        """Wait until so many rows are in the run for good."""

        def held() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return rows_in(self.state(), self.id) >= rows

        eventually(held, WAIT_S, lambda: self.machine.journal(UNIT)[-3000:])

    def see_sampled(self, *names: str) -> None:
        """Wait until the run has a value of each of these in its rows, read under the daemon's own sandbox."""
        self.reaches(1)
        run_dir = run_dir_in(self._state, self.id)
        eventually(
            lambda: set(names) <= {name for row in rows_of(run_dir) for name in row},
            WAIT_S,
            lambda: f"{names} are not all in {run_dir}:\n{(run_dir / 'logs/samplers.log').read_text()[-3000:]}",
        )

    def ends(self) -> int:
        """Tell it to; how many steps it logged."""
        self._until.touch()
        told, said = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, said
        return int(told)

    def is_whole(self, steps: int) -> status.Report:
        """Once its run is finished."""
        eventually(
            lambda: is_finished(self.state(), self.id),
            WAIT_S,
            lambda: f"{self.id} is not finished:\n{self.machine.journal(UNIT)[-3000:]}",
        )
        return assert_whole(self.state(), self.id, steps)


@contextmanager
def with_drop_in(machine: Machine, *settings: str, unit: str = UNIT) -> Iterator[None]:
    """The unit with further settings, restarted with them."""
    folder = machine.tree / f"etc/systemd/system/{unit}.service.d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.conf").write_text(lines(["[Service]", *settings]))
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "restart", unit)
    try:
        yield
    finally:
        (folder / "test.conf").unlink()
        machine.ask("systemctl", "daemon-reload")


# Weights & Biases


def serve_wandb(machine: Machine) -> str:
    """The port of a stand-in for W&B's server there."""
    place = machine.tree / "srv/wandb"
    if machine.run("pgrep", "-f", "tests.support.wandb_server").returncode:
        (place / "port").unlink(missing_ok=True)
        machine.do("mkdir", "-p", "/srv/wandb")
        words = ["env", "PYTHONPATH=/sidestep", "/opt/sidestep/bin/python", "-m", "tests.support.wandb_server"]
        machine.start(*words, "/srv/wandb", "--key", KEY, "--entities", "me")
    return eventually(lambda: _text(place / "port"), WAIT_S, "no server")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def rows_on_server(machine: Machine, id_: str) -> list[dict[str, Any]]:
    """What that server holds of a run, and that it was told nothing it could not make sense of."""
    store = Store(machine.tree / "srv/wandb/store.db")
    assert [] == store.breaches()
    return [json.loads(line) for line in store.lines(f"me/deployed/{id_}", HISTORY)]
