"""A real daemon on tcp with keys: who is let in, who is told why not, and keys that are replaced meanwhile."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from sidestep._run import Run
from sidestep.endpoint import Endpoint, KeyFile, endpoints
from sidestep.errors import SettingsError
from sidestep.notices import Notices
from sidestep.ranks import Identity
from sidestep.sender import connect
from sidestep.session import Session
from sidestep.settings import WorkerSettings
from sidestep.wire import Ack, Hello, Refuse, RunInfo, Status, Welcome
from sidestepd.addresses import BOUND, CONTEXT, remember, remembered
from sidestepd.control import Control
from sidestepd.intake.front import bind_tcp
from sidestepd.intake.gate import Gate
from sidestepd.keygen import make_keys, rotate
from sidestepd.processes import read_json
from tests.support.daemons import RawWorker, ServedRun
from tests.support.waiting import eventually

WITHIN_S = 60.0


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


V6 = ["tcp://[::1]:0"] if _has_ipv6() else []


class Told(Notices):
    """What a worker would print."""

    __slots__ = ("_all",)

    def __init__(self, all_: list[str]) -> None:
        super().__init__()
        self._all = all_

    def once(self, cause: Hashable, text: str) -> None:
        self._all.append(text)


class Guarded:
    """A run that is served on tcp too, its keys, and what its workers were told."""

    def __init__(self, base: Path) -> None:
        self.keys = base / "keys"
        make_keys(self.keys, ["client", "other"])
        self.run = ServedRun(
            base,
            listen__tcp=["tcp://127.0.0.1:0", *V6],
            listen__key_file=str(self.keys / "server.key"),
            listen__clients=str(self.keys / "clients"),
        )
        self.told: list[str] = []

    def start(self) -> None:
        self.run.start()
        self.address = str(read_json(self.run.run_dir / BOUND)["tcp://127.0.0.1:0"])

    def endpoint(self, name: str) -> Endpoint:
        return endpoints(self.address, KeyFile.read(self.keys / f"{name}.key"))[0]

    def raw(self, name: str, **facts: Any) -> RawWorker:
        """A worker that speaks message by message, with that key."""
        return RawWorker(self.endpoint(name), **facts)

    def worker(self, key_file: Path | None, rank: int) -> Run:
        """A real one."""
        notices = Told(self.told)
        me = Identity(rank=rank, world=9, local_rank=0, node="here", pid=os.getpid(), launch="t", attempt=0)
        settings = WorkerSettings(
            address=self.address, key_file=None if key_file is None else str(key_file), run_id="tested"
        )
        return Run(Session(settings=settings, identity=me, keywords={}, notices=notices), {})

    def said(self, words: str) -> bool:
        return any(words in text for text in self.told)

    def values(self, name: str) -> list[float]:
        return [row.values[name] for row in self.run.rows() if name in row.values]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("curve"))
    with made.run:
        made.start()
        yield made


@pytest.fixture(autouse=True)
def _spills_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


class TestWhoIsLetIn:
    def test_a_worker_with_a_key_on_the_list(self, daemon: Guarded):
        run = daemon.worker(daemon.keys / "client.key", rank=0)

        for step in range(5):
            run.log({"right": step}, step=step)
        assert run.flush(WITHIN_S)
        run.finish(0, WITHIN_S)

        eventually(lambda: daemon.values("right") == list(range(5)), WITHIN_S, daemon.run.log)
        assert (run.stats().pending, []) == (0, daemon.told)

    def test_others_are_told_why_not_and_keep_what_they_said(self, daemon: Guarded, tmp_path: Path):
        """Without a key; with one that is not listed; with one for another daemon; with one others can read."""
        stranger, astray, exposed = (tmp_path / name for name in ("stranger.key", "astray.key", "exposed.key"))
        make_keys(tmp_path / "elsewhere")
        elsewhere = json.loads((tmp_path / "elsewhere" / "client.key").read_text())
        ours = json.loads((daemon.keys / "client.key").read_text())
        for path, values in [
            (stranger, elsewhere | {"servers": ours["servers"]}),
            (astray, ours | {"servers": elsewhere["servers"]}),
            (exposed, ours),
        ]:
            path.write_text(json.dumps(values))
            path.chmod(0o644 if path == exposed else 0o600)

        runs = [daemon.worker(path, rank=3 + n) for n, path in enumerate((None, stranger, astray, exposed))]
        for run in runs:
            run.log({"wrong": 1}, step=0)
        for words in (
            "wants a key of its workers: SIDESTEP_KEY_FILE shall name one",
            f"does not know the key of this worker: its list of clients lacks {elsewhere['public']}",
            f"hangs up: it does not have the key {elsewhere['servers'][0]}, by which this worker's key file",
            "exposed.key: others can read or change it (mode 0644)",
        ):
            eventually(lambda words=words: daemon.said(words), WITHIN_S, lambda: "\n".join(daemon.told))
        for run in runs:
            run.finish(0, 0.5)

        assert [1, 1, 1, 1] == [run.stats().pending for run in runs]
        kept = list((tmp_path / f"sidestep-{os.geteuid()}" / "spill").glob("*.spill"))
        assert 4 == len(kept)
        assert [] == daemon.values("wrong")
        assert daemon.run.status()["refused_keys"] >= 1
        daemon.told.clear()

    @pytest.mark.skipif(not V6, reason="this machine has no IPv6")
    def test_ipv6_and_the_socket_of_this_node_at_once(self, daemon: Guarded):
        address = str(read_json(daemon.run.run_dir / BOUND)["tcp://[::1]:0"])
        there = replace(daemon.endpoint("client"), address=address)

        with Control(there) as over_ipv6, Control(daemon.run.address) as here:
            assert address.startswith("tcp://[::1]:")
            assert over_ipv6.ask_status(WITHIN_S) is not None
            assert here.ask_status(WITHIN_S) is not None

    def test_without_an_answer_from_the_list_nobody_is_let_in(self, tmp_path: Path):
        """Our gate enforces its domain: one that is not open means no, and not yes, to a listed key as well."""
        make_keys(tmp_path)
        listed = KeyFile.read(tmp_path / "client.key")
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
            gate = Gate(context, key_file=tmp_path / "server.key", clients=tmp_path / "clients")
            gate.secure(router)
            address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
            monitor = dealer.get_monitor_socket()
            dealer.linger = 0
            connect(dealer, endpoints(address, listed)[0])
            events = [0]
            while not events[-1] & (FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED):
                assert monitor.poll(WITHIN_S * 1000)
                events.append(int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder))
            dealer.disable_monitor()

        assert events[-1] & FAILED


FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class TestWhoseSessionItIs:
    def test_nobody_else_speaks_for_a_session_also_after_a_restart(self, daemon: Guarded):
        """The gate against duplicates counts by session: who could speak for one could make it lose records."""
        mine, theirs = daemon.raw("client", rank=1), daemon.raw("other", rank=1)
        mine.hello()
        mine.log(100, 101)
        impostor = Hello(session=mine.session, first=1000, rank=1, world=2, launch="L", node="here", pid=1)

        for _ in range(2):
            refused = theirs.ask(impostor, Refuse)
            theirs.say(mine.frame(102))
            unheard = theirs.hear(Refuse)
            assert ("key", "hello") == (refused.code, unheard.code)
            daemon.run.kill()
            daemon.run.start()

        welcome = mine.ask(Hello(session=mine.session, first=2, rank=1, world=2, launch="L", pid=1), Welcome)
        assert 2 == welcome.first
        mine.log(102)
        mine.bye()
        for worker in (mine, theirs):
            worker.leave()

    def test_this_node_may_hand_on_what_a_session_left(self, daemon: Guarded):
        mine = daemon.raw("client", rank=2)
        mine.hello()
        mine.log(200)
        here = daemon.run.worker(rank=2, session=mine.session)
        here.next = 1

        here.hello()

        assert isinstance(here.log(201), Ack)
        here.bye()
        mine.leave()

    def test_a_run_is_closed_on_the_daemons_own_node(self, daemon: Guarded):
        tool = daemon.raw("client", session=bytes(16))

        assert "key" == tool.ask(RunInfo(close=0), Refuse).code
        assert isinstance(tool.ask(Status(), Status), Status)
        tool.leave()


class TestReplacement:
    def test_keys_of_both_are_replaced_while_a_worker_goes_on(self, daemon: Guarded):
        run = daemon.worker(daemon.keys / "client.key", rank=7)
        run.log({"turned": 0}, step=1000)
        assert run.flush(WITHIN_S)
        old = KeyFile.read(daemon.keys / "client.key").pair.public
        clients = daemon.keys / "clients"

        rotate(daemon.keys, "client")
        run.log({"turned": 1}, step=1001)
        assert run.flush(WITHIN_S)
        clients.write_text("".join(line for line in clients.read_text().splitlines(True) if old not in line))
        eventually(lambda: "no longer on the list" in daemon.run.log(), WITHIN_S)
        run.log({"turned": 2}, step=1002)
        assert run.flush(WITHIN_S)
        rotate(daemon.keys, "server")
        daemon.run.kill()
        daemon.run.start()
        run.log({"turned": 3}, step=1003)
        assert run.flush(WITHIN_S)
        run.finish(0, WITHIN_S)

        eventually(lambda: daemon.values("turned") == [0, 1, 2, 3], WITHIN_S, daemon.run.log)
        assert KeyFile.read(daemon.keys / "server.key").pair.public == daemon_key(daemon)


def daemon_key(daemon: Guarded) -> str:
    return str(read_json(daemon.run.run_dir / CONTEXT)["server_key"])


class TestStarting:
    def test_a_free_port_that_somebody_took_meanwhile_is_another_one_then(self, tmp_path: Path):
        """A port that was said is not replaced: nobody would find it."""
        with socket.create_server(("127.0.0.1", 0)) as taken, zmq.Context() as context:
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            remember(tmp_path, {"tcp://127.0.0.1:0": address})
            with context.socket(zmq.ROUTER) as router:
                (bound,) = bind_tcp(router, tmp_path, ["tcp://127.0.0.1:0"])

                with pytest.raises(SettingsError, match=r"Address already in use: .* SIDESTEP_PORT"):
                    bind_tcp(router, tmp_path, [address])

        assert bound != address
        assert bound == remembered(tmp_path, "tcp://127.0.0.1:0")

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (
                ["--listen", "tcp://*:7711"],
                "listen.tcp = tcp://*:7711 (from --listen): beyond this machine only with",
            ),
            (["--listen", "tcp://127.0.0.1:7711", "--keys", "nowhere"], "nowhere/server.key: can not be read"),
        ],
    )
    def test_a_daemon_that_would_not_ask_who_is_speaking_refuses_to_start(
        self, tmp_path: Path, words: list[str], why: str
    ):
        command = [sys.executable, "-P", "-m", "sidestep", "serve", "--id", "x", *words]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WITHIN_S)

        assert 2 == ended.returncode
        assert why in ended.stderr
        assert not (tmp_path / "sidestep-runs").exists()
