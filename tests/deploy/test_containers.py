"""The image of deploy/docker, built and run: without root, with a root that is read-only, beside a training.

Daemon and training are containers of one host name with pids of their own, as in a pod. Runs go to real wandb in
the container, and are read back from the volume.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidestepd import status
from tests.support.daemons import freeze
from tests.support.images import BASE, IMAGE, LOCKED, TRAINER, Podman
from tests.support.waiting import eventually
from tests.support.wandb_server.store import HISTORY, Store
from tests.support.workshop import (
    DEPLOY,
    ROOT,
    assert_whole,
    find,
    is_finished,
    need,
    rows_in,
    run_dir_in,
)

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

WAIT_S = 120.0
KEY = "k" * 40
QUICK = {
    "SIDESTEP_SERVE_LINGER_S": "1",
    "SIDESTEP_DELIVERY_CONFIRM_INTERVAL_S": "0.2",
    "SIDESTEP_ORDER_PATIENCE_S": "1",
}


class Pair:
    """A daemon and a training, each in a container, with two volumes between them."""

    def __init__(self, podman: Podman, name: str, folder: Path) -> None:
        self.podman, self.name = podman, name
        self.daemon, self._folder = f"{name}-daemon", folder
        for volume in (f"{name}-state", f"{name}-socket"):
            podman.do("volume", "create", volume)

    @property
    def state(self) -> Path:
        return self.podman.volume(f"{self.name}-state")

    def serve(self, *words: str, network: str = "none", **environ: str) -> None:
        """Start the daemon, as locked up as can be; words with dashes are podman's, others the daemon's."""
        told = list(itertools.takewhile(lambda word: word.startswith("--"), words))
        where = [f"--network={network}", *([] if ":" in network else ["--hostname=node0"])]
        said = [f"--env={name}={value}" for name, value in (QUICK | environ).items()]
        self.podman.do(
            "run", "--detach", f"--name={self.daemon}", *LOCKED, *where, *said, *told,
            f"--volume={self.name}-state:/var/lib/sidestep", f"--volume={self.name}-socket:/run/sidestep",
            IMAGE, *words[len(told) :],
        )  # fmt: skip
        eventually(self.is_healthy, WAIT_S, lambda: self.podman.logs(self.daemon))

    def is_healthy(self) -> bool:
        return self.podman.run("healthcheck", "run", self.daemon).returncode == 0

    def train(self, id_: str) -> None:
        """Start a training."""
        self.podman.do(
            "run", "--detach", f"--name={self.name}-{id_}", "--hostname=node0", "--network=none", *LOCKED,
            "--env=SIDESTEP_ADDRESS=ipc:///run/sidestep/daemon.sock", f"--volume={self._folder}:/until:ro",
            f"--volume={self.name}-socket:/run/sidestep:ro", TRAINER, f"/until/{id_}", id_, "30",
        )  # fmt: skip

    def reaches(self, id_: str, rows: int) -> None:
        """Wait until so many rows are in the run for good."""

        def held() -> bool:
            return rows_in(self.state, id_) >= rows

        eventually(held, WAIT_S, lambda: self.podman.logs(self.daemon) + self.podman.logs(f"{self.name}-{id_}"))

    def ends(self, id_: str) -> int:
        """Tell the training to; how many steps it logged."""
        (self._folder / id_).touch()
        assert 0 == self.podman.exit_code(f"{self.name}-{id_}"), self.podman.logs(f"{self.name}-{id_}")
        return int(self.podman.logs(f"{self.name}-{id_}").split()[-1])

    def finished(self, id_: str) -> None:
        """Wait until the run is."""
        eventually(
            lambda: is_finished(self.state, id_),
            WAIT_S,
            lambda: self.podman.logs(self.daemon),
        )

    def is_whole(self, id_: str, steps: int) -> status.Report:
        """Once it is finished."""
        self.finished(id_)
        return assert_whole(self.state, id_, steps)

    def process(self, module: str) -> psutil.Process:
        """The daemon's process that runs a module of ours."""

        def found() -> psutil.Process | None:
            for process in self.podman.processes(self.daemon):
                with contextlib.suppress(psutil.Error):
                    if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                        return process
            return None

        return eventually(found, WAIT_S, f"no {module}")


@pytest.fixture
def pair(podman: Podman, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o755)
    pair = Pair(podman, request.node.name.replace("test_", "").replace("_", "-")[:24], tmp_path)
    yield pair
    podman.run("rm", "-f", "--time", "0", *podman.do("ps", "-aq").split())


class TestTheImage:
    def test_says_what_it_is_and_how_it_is_stopped_and_asked(self, podman):
        config = podman.inspect(IMAGE)["Config"]
        size_mb = (podman.inspect(IMAGE)["Size"] - podman.inspect(BASE)["Size"]) / 1e6
        print(f"{size_mb:.0f} MB above its base")

        assert ("10001:10001", "SIGTERM") == (config["User"], config["StopSignal"])
        assert "sidestep" == config["Labels"]["org.opencontainers.image.title"]
        assert ["/usr/bin/tini", "--", "sidestep"] == config["Entrypoint"]
        assert '"CMD", "sidestep", "ping", "--timeout", "5"' in json.dumps(podman.inspect(IMAGE))
        told = int(re.findall(r"about (\d+) MB larger than its base", (DEPLOY / "README.md").read_text())[0])
        assert abs(size_mb - told) < 40

    def test_holds_no_pip_no_compiler_and_nothing_of_the_tree_but_the_wheel(self, podman):
        words = (
            "ls -d /src /opt/sidestep/bin/pip /tmp/pip /usr/bin/cc /opt/sidestep/lib/python3*/site-packages/pip"
        )
        done = podman.run("run", "--rm", "--network=none", *LOCKED, "--entrypoint=sh", IMAGE, "-c", words)

        assert "" == done.stdout


class TestARun:
    def test_of_a_training_in_a_container_beside_it_is_whole(self, pair):
        pair.serve()
        pair.train("beside")
        pair.reaches("beside", 100)
        steps = pair.ends("beside")

        report = pair.is_whole("beside", steps)

        assert [] == [alert.title for alert in report.alerts if "ended" in alert.title]
        (worker,) = (one for one in report.sessions if one.role == "worker")
        assert ("node0", "bye") == (worker.node, worker.state)

    def test_survives_the_death_of_delivery_and_leaves_no_zombie(self, pair):
        pair.serve()
        pair.train("orphan")
        pair.reaches("orphan", 30)

        pair.process("sidestepd.delivery").kill()

        pair.reaches("orphan", 150)

        def zombies() -> list[psutil.Process]:
            return [one for one in pair.podman.processes(pair.daemon) if one.status() == psutil.STATUS_ZOMBIE]

        eventually(lambda: not zombies(), WAIT_S, lambda: str(zombies()))
        pair.is_whole("orphan", pair.ends("orphan"))

    def test_survives_the_container_and_goes_on_in_the_next_one(self, pair):
        pair.serve()
        pair.train("again")
        pair.reaches("again", 30)

        pair.podman.do("kill", "--signal", "KILL", pair.daemon)
        pair.podman.do("rm", "-f", pair.daemon)
        pair.serve()

        pair.reaches("again", 100)
        pair.is_whole("again", pair.ends("again"))


class TestStopping:
    def test_finishes_what_it_has(self, pair):
        """The run would wait 30 s more for further workers; who is told to stop finishes it."""
        pair.serve(SIDESTEP_SERVE_LINGER_S="30")
        pair.train("drained")
        pair.reaches("drained", 30)
        steps = pair.ends("drained")

        pair.podman.do("stop", "--time", "100", pair.daemon)

        assert 0 == pair.podman.inspect(pair.daemon, "container")["State"]["ExitCode"]
        pair.is_whole("drained", steps)

    def test_with_a_backlog_keeps_it_in_the_volume_for_the_next_container(self, pair):
        pair.serve("serve", "--address", "ipc:///run/sidestep/daemon.sock", "--grace", "2")
        pair.train("backlog")
        pair.reaches("backlog", 30)
        freeze(pair.process("sidestepd.delivery"))
        run_dir = run_dir_in(pair.state, "backlog")
        before = status.report(run_dir).rows
        eventually(lambda: status.report(run_dir).ledger.offered > before + 100, WAIT_S)
        steps = pair.ends("backlog")

        pair.podman.do("stop", "--time", "60", pair.daemon)

        assert 75 == pair.podman.inspect(pair.daemon, "container")["State"]["ExitCode"]
        assert status.report(run_dir).ledger.pending > 0
        pair.podman.do("rm", pair.daemon)
        pair.serve()
        pair.is_whole("backlog", steps)


class TestHealth:
    def test_is_bad_while_the_daemon_is_frozen(self, pair):
        pair.serve()
        intake = pair.process("sidestepd.intake")

        freeze(intake)

        assert not pair.is_healthy()
        intake.resume()
        eventually(pair.is_healthy, WAIT_S, "it does not recover")

    def test_metrics_tell_the_same(self, pair):
        pair.serve(SIDESTEP_SERVE_METRICS="127.0.0.1:9464")
        pair.train("counted")
        pair.reaches("counted", 30)
        fetch = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9464/%s').read().decode())"

        def asked(page: str) -> str:
            return pair.podman.do("exec", pair.daemon, "python3", "-c", fetch % page)

        told = asked("metrics")
        assert "sidestep_up 1.0" in told
        assert 'sidestep_workers{run="counted",state="live"} 1.0' in told
        assert "well" == asked("healthz")
        pair.is_whole("counted", pair.ends("counted"))


class TestOnline:
    """Real wandb with a stand-in for its server, under a root that is read-only; the key is a mounted file."""

    @pytest.fixture
    def server(self, podman: Podman, tmp_path: Path) -> Iterator[tuple[str, Path]]:
        """A network of its own with the server in it: the address, and what the server holds."""
        podman.do("run", "--detach", "--name=net", "--network=none", "--entrypoint=sleep", IMAGE, "infinity")
        words = ["nsenter", "--target", str(podman.processes("net")[0].pid), "--net", sys.executable]
        place = tmp_path / "wandb"
        place.mkdir()
        with subprocess.Popen(
            [*words, "-m", "tests.support.wandb_server", str(place), "--key", KEY, "--entities", "me"], cwd=ROOT
        ) as process:
            eventually((place / "port").exists, WAIT_S, "no server")
            yield f"http://127.0.0.1:{(place / 'port').read_text()}", place / "store.db"
            process.kill()
        podman.run("rm", "-f", "--depend", "--time", "0", "net")

    def serve(self, pair: Pair, server: str, tmp_path: Path, owner: int) -> None:
        key = tmp_path / "wandb_api_key"
        key.write_text(f"{KEY}\n")
        key.chmod(0o400)
        os.chown(key, owner, owner)
        pair.serve(
            f"--volume={key}:/run/secrets/wandb_api_key:ro", network="container:net",
            SIDESTEP_RUN_MODE="online", SIDESTEP_SINK_SERVER=server, SIDESTEP_RUN_ENTITY="me",
            SIDESTEP_SINK_ASK_EVERY_S="0.5",
        )  # fmt: skip

    def test_a_run_is_on_the_server_and_the_key_nowhere_to_be_seen(self, pair, server, tmp_path):
        self.serve(pair, server[0], tmp_path, owner=10001)
        pair.train("online")
        pair.reaches("online", 50)
        steps = pair.ends("online")

        report = pair.is_whole("online", steps)

        store = Store(server[1])
        assert [] == store.breaches()
        lines = store.lines("me/deployed/online", HISTORY)
        assert list(range(steps)) == [json.loads(line)["global_step"] for line in lines]
        assert "online" == report.run.mode
        assert KEY not in json.dumps(pair.podman.inspect(pair.daemon, "container"))
        found = subprocess.run(["grep", "-rl", KEY, str(pair.state)], capture_output=True, text=True)
        assert "" == found.stdout

    def test_a_key_that_the_daemon_may_not_read_is_said_and_costs_nothing(self, pair, server, tmp_path):
        """As a file with mode 0600 of whoever typed `compose up`."""
        self.serve(pair, server[0], tmp_path, owner=1000)
        pair.train("locked")

        eventually(lambda: "wandb_api_key" in pair.podman.logs(pair.daemon), WAIT_S,
                   lambda: pair.podman.logs(pair.daemon))  # fmt: skip

        os.chown(tmp_path / "wandb_api_key", 10001, 10001)
        pair.reaches("locked", 50)
        pair.is_whole("locked", pair.ends("locked"))


class TestCompose:
    def test_has_a_training_beside_the_daemon(self, podman, tmp_path):
        need("podman-compose")
        tmp_path.chmod(0o755)
        (tmp_path / "compose.yaml").write_text((DEPLOY / "docker/compose.yaml").read_text())
        more = {
            "services": {
                "daemon": {"network_mode": "none", "environment": QUICK},
                "train": {
                    "network_mode": "none", "shm_size": "64m", "volumes": [f"{tmp_path}:/until:ro"],
                    "command": ["/until/stop", "composed", "30"],
                },
            }
        }  # fmt: skip
        (tmp_path / "more.yaml").write_text(json.dumps(more))
        (tmp_path / "key").write_text("")
        compose = [str(find("podman-compose")), "--podman-path", str(_wrapper(podman, tmp_path))]
        files = ["-f", str(tmp_path / "compose.yaml"), "-f", str(tmp_path / "more.yaml")]
        environ = {
            "SIDESTEP_IMAGE": IMAGE, "TRAIN_IMAGE": TRAINER, "WANDB_API_KEY_FILE": str(tmp_path / "key"),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path),
        }  # fmt: skip

        def composed(*words: str) -> str:
            done = subprocess.run(
                [*compose, *files, *words], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        composed("up", "--detach", "--no-build")
        try:
            state = podman.volume("sidestep_state")
            eventually(lambda: rows_in(state, "composed") >= 30, WAIT_S,
                       lambda: podman.run("ps", "-a").stdout)  # fmt: skip
            (tmp_path / "stop").touch()
            (train,) = podman.do("ps", "-aq", "--filter", "name=train").split()
            assert 0 == podman.exit_code(train), podman.logs(train)
            steps = int(podman.logs(train).split()[-1])
        finally:
            composed("down", "--timeout", "100")
        assert_whole(state, "composed", steps)


def _wrapper(podman: Podman, folder: Path) -> Path:
    """podman with its store, as one word."""
    path = folder / "podman"
    path.write_text(f'#!/bin/sh\nexec {" ".join(podman.words)} "$@"\n')
    path.chmod(0o755)
    return path
