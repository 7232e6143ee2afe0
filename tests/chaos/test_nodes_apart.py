"""Three nodes with a network between them that is cut: a real torchrun on each, one run, every row there once.

The nodes are network namespaces of this machine. What is measured is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestepd import status
from sidestepd.addresses import CONTEXT
from sidestepd.processes import read_json
from sidestepd.rundir import newest_run_dir
from tests.support.chaos import steps_of_ranks
from tests.support.daemons import HeldRow, killed, read_jsonl
from tests.support.elastic import CRASHED_AT, SAVED_AT, STEPS
from tests.support.namespaces import CUTS, ROOT, Network, missing
from tests.support.proxy import Proxy
from tests.support.waiting import eventually
from tests.support.wandb_server import StandIn

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.nightly,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(600),
]

NODES, PER_NODE = 3, 2
CUT_S = float(os.environ.get("SIDESTEP_TEST_CUT_S", "30"))
DEADLINE_S = 180.0
HUNDREDS = 300
"""Records that wait in a relay which is cut off while its ranks go on."""
OPTIONS = {
    "samplers.enabled": "off",
    "sink.kind": "jsonl",
    "delivery.confirm_interval_s": "0.5",
    "order.patience_s": "60",  # ranks whose training is held up by the cut are waited for
}


class Cluster:
    """The nodes, their shared folder, and a torchrun on each."""

    def __init__(self, network: Network, base: Path) -> None:
        self.network, self.base = network, base
        self.shared, self.reports, self.until = base / "shared", base / "reports", base / "until"
        for folder in (self.shared, self.reports):
            folder.mkdir()

    def torchrun(self, node: int, *, nodes: int = NODES, first: int = 0) -> list[str]:
        """As it is typed on a node."""
        return [
            "torchrun", f"--nnodes={nodes}", f"--nproc-per-node={PER_NODE}", f"--node-rank={node - first}",
            f"--master-addr=node{first}", "--master-port=29517", "-m", "tests.support.in_nodes",
            "--until", str(self.until), "--report", str(self.reports),
        ]  # fmt: skip

    def train(self) -> list[subprocess.Popen[bytes]]:
        """`sidestep run -- torchrun ...` on each node, and nothing else said."""
        words = [word for name, value in OPTIONS.items() for word in ("--set", f"{name}={value}")]
        run = [*SIDESTEP, "run", "--dir", str(self.shared), *words, "--"]
        return [self.network.start(node, [*run, *self.torchrun(node)], ENVIRONMENT) for node in range(NODES)]

    @property
    def run_dir(self) -> Path | None:
        return newest_run_dir(self.shared)

    def told_by_head(self) -> dict[str, str]:
        """Where it says that it is."""
        assert self.run_dir is not None
        return dict(read_json(self.run_dir / CONTEXT))

    def rows(self) -> list[HeldRow]:
        return read_jsonl(self.run_dir) if self.run_dir else []

    def wait_for_rows(self, more: int = 20) -> None:
        before = len(self.rows())
        eventually(lambda: len(self.rows()) >= before + more, DEADLINE_S, self.network.log)

    @property
    def relays(self) -> Path:
        return self.shared / "sidestep-runs" / ".relays"

    def relay_dir(self, node: int) -> Path:
        return next(self.relays.glob(f"*-node{node}"))

    def pending(self, node: int) -> int:
        """What the relay of a node still has."""
        return status.report(self.relay_dir(node)).ledger.pending

    def acknowledged(self, node: int) -> int:
        """How many records of a node's workers the daemon above has."""
        assert self.run_dir is not None
        sessions = status.report(self.run_dir).sessions
        return sum(it.acknowledged for it in sessions if (it.node, it.role) == (f"node{node}", "worker"))

    def seen(self) -> dict[int, dict[str, Any]]:
        """What each rank saw."""
        return {int(path.name): json.loads(path.read_text()) for path in self.reports.iterdir()}


SIDESTEP = [sys.executable, "-m", "sidestep"]
PATH = str(Path(sys.executable).parent)
ENVIRONMENT = {
    "PATH": f"{PATH}:/usr/sbin:/usr/bin:/sbin:/bin",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Network(tmp_path, NODES) as network:
        yield Cluster(network, tmp_path)


def assert_whole(cluster: Cluster) -> None:
    """Every step of every rank once; nobody's log() noticed; both ends of the ledger agree."""
    seen, rows = cluster.seen(), cluster.rows()
    assert set(range(NODES * PER_NODE)) == seen.keys()
    assert {rank: list(range(int(it["steps"]))) for rank, it in seen.items()} == steps_of_ranks(rows)
    steps = [row.step for row in rows]
    assert sorted(set(steps)) == steps
    assert {NODES * PER_NODE} == {row.values["sidestep/ranks_reported"] for row in rows}, "rows are whole"
    ledger = status.report(cluster.run_dir).ledger
    assert (True, 0, 0) == (ledger.balances, ledger.pending, sum(ledger.dropped.values())), ledger
    assert sum(int(it["offered"]) for it in seen.values()) == ledger.offered == ledger.delivered
    assert all(it["offered"] == it["acknowledged"] for it in seen.values())
    assert not cluster.relays.exists(), "a relay of which all is in the run leaves nothing"
    print(
        f"{len(rows)} rows of {len(seen)} ranks; "
        f"the longest log() took {1e3 * max(it['longest_s'] for it in seen.values()):.1f} ms"
    )
    assert max(it["longest_s"] for it in seen.values()) < 2.0, "no call waits for a network"


def end(cluster: Cluster, commands: list[subprocess.Popen[bytes]]) -> None:
    cluster.until.touch()
    assert [0] * NODES == [command.wait(DEADLINE_S) for command in commands], cluster.network.log()


class TestALinkThatIsCut:
    @pytest.mark.parametrize("how", CUTS)
    def test_for_half_a_minute_costs_no_row(self, cluster: Cluster, how: str):
        commands = cluster.train()
        cluster.wait_for_rows()
        cluster.network.cut(2, how)
        cut = time.monotonic()
        eventually(lambda: cluster.pending(2) > 0, DEADLINE_S, cluster.network.log)
        time.sleep(max(0.0, cut + CUT_S - time.monotonic()))  # a cut has a length
        waited = cluster.pending(2)
        cluster.network.heal(2, how)
        healed = time.monotonic()
        eventually(lambda: cluster.pending(2) < max(waited, 1), DEADLINE_S, cluster.network.log)
        print(f"{how}: {waited} records waited; the first was through {time.monotonic() - healed:.1f} s after")
        cluster.wait_for_rows()
        end(cluster, commands)

        assert waited > 0
        assert_whole(cluster)


class TestADaemonThatIsNotReached:
    def test_while_ranks_reach_each_other_costs_no_row_and_no_call(self, cluster: Cluster):
        """A firewall between a relay and the head alone: gloo does not notice, and ranks log all the time."""
        commands, network = cluster.train(), cluster.network
        cluster.wait_for_rows(100)
        network.cut_port(2, 0, int(cluster.told_by_head()["remote"].rpartition(":")[2]))
        cut = time.monotonic()
        eventually(lambda: cluster.pending(2) >= HUNDREDS, DEADLINE_S, network.log)
        time.sleep(max(0.0, cut + CUT_S - time.monotonic()))  # a cut has a length
        waited = cluster.pending(2)
        network.heal(2, "drop")
        healed = time.monotonic()
        eventually(lambda: cluster.pending(2) < waited, DEADLINE_S, network.log)
        print(f"one port: {waited} records waited; the first was through {time.monotonic() - healed:.1f} s after")
        cluster.wait_for_rows()
        end(cluster, commands)

        assert_whole(cluster)
        calls = [it["calls"] for it in cluster.seen().values()]
        assert min(sum(cut <= began < healed for began, _ in one) for one in calls) >= HUNDREDS / PER_NODE / 2
        before = sorted(took for one in calls for began, took in one if began < cut)
        during = sorted(took for one in calls for began, took in one if cut <= began < healed)
        p99s = [phase[int(len(phase) * 0.99)] for phase in (before, during)]
        print(
            f"log(), p99 of {len(before)} calls before and {len(during)} during the cut: "
            f"{1e3 * p99s[0]:.2f} and {1e3 * p99s[1]:.2f} ms; the longest {1e3 * during[-1]:.1f} ms"
        )
        assert max(p99s) < 0.05, "no call waits for a daemon"


class TestKillNine:
    @pytest.mark.parametrize(("node", "what"), [(1, "sidestepd.intake"), (2, "sidestepd.upstream"),
                                                (0, "sidestepd.intake"), (0, "sidestepd.delivery")])  # fmt: skip
    def test_on_a_node_costs_no_row(self, cluster: Cluster, node: int, what: str):
        commands = cluster.train()
        cluster.wait_for_rows()
        gone = killed(cluster.network.find(node, what))
        at = time.monotonic()
        eventually(
            lambda: (it := cluster.network.find(node, what)) and it.pid != gone.pid,
            DEADLINE_S,
            cluster.network.log,
        )
        cluster.wait_for_rows(5)
        print(f"{what} of node{node}: rows again {time.monotonic() - at:.1f} s after")
        end(cluster, commands)

        assert_whole(cluster)


class TestAHeadThatMoves:
    def test_to_another_port_is_found_there(self, cluster: Cluster):
        """Its command and its daemon are killed, its port is somebody else's by then, and it is served on."""
        commands = cluster.train()
        cluster.wait_for_rows()
        before = cluster.told_by_head()["remote"]
        killed(psutil.Process(commands[0].pid))
        killed(cluster.network.find(0, "sidestepd.intake"))
        at = time.monotonic()
        port = before.rpartition(":")[2]
        cluster.network.start(0, [sys.executable, "-c", TAKES, port], ENVIRONMENT)
        eventually(lambda: cluster.network.reaches(0, "node0", int(port)), DEADLINE_S, cluster.network.log)
        eventually(lambda: min(map(cluster.pending, (1, 2))) > 0, DEADLINE_S, cluster.network.log)

        served = cluster.network.start(0, [*SIDESTEP, "serve", str(cluster.run_dir)], ENVIRONMENT)
        eventually(
            lambda: read_json(cluster.run_dir / CONTEXT)["remote"] != before, DEADLINE_S, cluster.network.log
        )
        cluster.wait_for_rows()
        print(f"head of another port: rows again {time.monotonic() - at:.1f} s after")
        cluster.until.touch()
        assert [0, 0] == [command.wait(DEADLINE_S) for command in commands[1:]], cluster.network.log()
        eventually(lambda: cluster.seen().keys() == set(range(NODES * PER_NODE)), DEADLINE_S, cluster.network.log)
        served.terminate()

        assert (-9, 0) == (commands[0].wait(DEADLINE_S), served.wait(DEADLINE_S)), cluster.network.log()
        assert_whole(cluster)
        assert not (cluster.relays.parent / ".jobs").exists(), "nobody needs its keys any more"


class TestWorkersOfAllNodes:
    def test_speak_to_one_daemon_wherever_they_find_it(self, cluster: Cluster, tmp_path: Path):
        """By the daemon's file on node0, where it is, and on node1; on node2 by their launcher's MASTER_ADDR."""
        network, keys, context = cluster.network, tmp_path / "keys", cluster.shared / "daemon.json"
        assert 0 == network.start(0, [*SIDESTEP, "keygen", str(keys)], ENVIRONMENT).wait(DEADLINE_S), network.log()
        options = [*OPTIONS.items(), ("run.dir", cluster.shared), ("listen.context_file", context)]
        words = [word for name, value in options for word in ("--set", f"{name}={value}")]
        serve = [*SIDESTEP, "serve", "--id", "one", *words, *listens(keys)]
        head = network.start(0, serve, ENVIRONMENT)
        ranks = []
        for node in range(NODES):
            finds = {"SIDESTEP_KEY_FILE": str(keys / "client.key")} if node else {}
            finds |= {"SIDESTEP_CONTEXT": str(context)} if node < 2 else {}
            ranks.append(network.start(node, cluster.torchrun(node), ENVIRONMENT | finds))
        cluster.wait_for_rows()

        network.cut(2, "drop")
        cut = time.monotonic()
        eventually(lambda: cluster.acknowledged(2) < cluster.acknowledged(1), DEADLINE_S, network.log)
        time.sleep(max(0.0, cut + CUT_S - time.monotonic()))  # a cut has a length
        before = cluster.acknowledged(2)
        assert before < cluster.acknowledged(1), "what is said on node2 waits there"
        network.heal(2, "drop")
        healed = time.monotonic()
        eventually(lambda: cluster.acknowledged(2) > before, DEADLINE_S, network.log)
        print(f"without relays: the first was through {time.monotonic() - healed:.1f} s after")
        cluster.wait_for_rows()
        end(cluster, ranks)
        head.terminate()
        assert 0 == head.wait(DEADLINE_S), network.log()

        assert_whole(cluster)


class TestATorchrunThatStartsAgain:
    def test_on_all_nodes_is_a_second_attempt_of_all_ranks(self, cluster: Cluster, tmp_path: Path):
        """It counts that on the node where a rank crashed alone."""
        words = [
            *elastic_options(),
            "--",
            "torchrun",
            f"--nnodes={NODES}",
            "--nproc-per-node=1",
            "--max-restarts=1",
        ]
        words += ["--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:29517", "--rdzv-id=7"]
        words += ["-m", "tests.support.elastic", "--together", "--checkpoint", str(tmp_path / "checkpoint")]
        run = [*SIDESTEP, "run", "--dir", str(cluster.shared)]
        commands = [cluster.network.start(node, [*run, *words], ENVIRONMENT) for node in range(NODES)]

        assert [0] * NODES == [command.wait(DEADLINE_S) for command in commands], cluster.network.log()

        rows, report = cluster.rows(), status.report(cluster.run_dir)
        first, second = ([row for row in rows if row.values["life"] == life] for life in (0, 1))
        assert list(range(CRASHED_AT)) == [row.values["global_step"] for row in first]
        assert list(range(SAVED_AT, STEPS)) == [row.values["global_step"] for row in second]
        assert {NODES} == {row.values["ranks"] for row in rows}
        again = [row.values["global_step"] for row in rows if row.values.get("sidestep/attempt") == 1]
        assert list(range(SAVED_AT, CRASHED_AT)) == again
        assert (0, True, 0) == (report.late_rows, report.ledger.balances, report.ledger.pending)


def elastic_options() -> list[str]:
    options = {**OPTIONS, "reduce.ranks": "sum", "reduce.life": "max"}
    return [word for name, value in options.items() for word in ("--set", f"{name}={value}")]


class TestAnIndexedJob:
    def test_of_pods_that_share_a_secret_and_no_folder_is_one_run(self, tmp_path: Path):
        """Each pod has the name, the list of hosts and the variables that Kubernetes gives to one."""
        with Network(tmp_path, NODES, host="train-{}", domain="trainers.ml.svc") as network:
            shared = {"SIDESTEP_JOB_SECRET": "s" * 40, "NNODES": str(NODES), "PYTHONPATH": str(ROOT)}
            words = [word for name, value in OPTIONS.items() for word in ("--set", f"{name}={value}")]
            pods = []
            for index in (2, 1, 0):
                folder = ["--dir", str(tmp_path / f"pod{index}")]
                own = {"JOB_COMPLETION_INDEX": str(index)}
                command = [*SIDESTEP, "run", *folder, *words, "--", sys.executable, "-c", POD]
                pods.append(network.start(index, command, ENVIRONMENT | shared | own))
            codes = [pod.wait(DEADLINE_S) for pod in pods]

            assert [4, 0, 4] == codes, network.log()
            run_dir = newest_run_dir(tmp_path / "pod0")
            assert run_dir is not None
            rows, report = read_jsonl(run_dir), status.report(run_dir)
        assert list(range(20)) == [row.values["step"] for row in rows]
        assert {NODES} == {row.values["sidestep/ranks_reported"] for row in rows}
        assert (4, True, 0, 60) == (
            report.run.exit_code, report.ledger.balances, report.ledger.pending, report.ledger.delivered,
        )  # fmt: skip
        assert {f"train-{index}" for index in range(NODES)} == {it.node for it in report.sessions}
        assert [] == [path for index in range(NODES) for path in tmp_path.glob(f"pod{index}/*/.jobs/*")]


POD = """
import os, sys, time, sidestep
run = sidestep.init()
index = int(os.environ["JOB_COMPLETION_INDEX"])
for step in range(20):
    run.log({"mine": index, "step": step}, step=step)
    time.sleep(0.02)
run.finish()
sys.exit(4 if index == 2 else 0)
"""


class TestNodesWithoutInternet:
    def test_are_in_a_live_run_through_the_login_node(self, cluster: Cluster, tmp_path: Path):
        """node0 is the login node: it alone reaches the W&B server, and holds the key for it."""
        network, keys = cluster.network, tmp_path / "keys"
        assert 0 == network.start(0, [*SIDESTEP, "keygen", str(keys)], ENVIRONMENT).wait(DEADLINE_S), network.log()
        with StandIn(tmp_path / "server") as server:
            port = server.url.rpartition(":")[2]
            with Proxy(f"tcp://127.0.0.1:{port}", host=network.uplink(0)) as internet:
                host, _, outside = internet.address.removeprefix("tcp://").partition(":")
                assert [True, False, False] == [network.reaches(node, host, int(outside)) for node in range(NODES)]
                network.start(0, [sys.executable, "-c", GATE, internet.address, port], ENVIRONMENT)
                eventually(lambda: network.reaches(0, "127.0.0.1", int(port)), DEADLINE_S, network.log)
                login = network.start(0, [*SIDESTEP, *LOGIN, *listens(keys)], ENVIRONMENT | server.environment)
                up = ["--sink", "upstream", "--id", "live", "--dir", str(cluster.shared), *to(keys), "--"]
                compute = [
                    network.start(
                        node, [*SIDESTEP, "run", *up, *cluster.torchrun(node, nodes=2, first=1)], ENVIRONMENT
                    )
                    for node in (1, 2)
                ]
                eventually(lambda: len(server.rows("live")) > 20, DEADLINE_S, network.log)
                assert [None, None] == [command.poll() for command in compute], "the run is live"
                cluster.until.touch()
                assert [0, 0] == [command.wait(DEADLINE_S) for command in compute], network.log()
                login.terminate()
                assert 0 == login.wait(DEADLINE_S), network.log()
            rows = [HeldRow(row["_step"], row) for row in server.rows("live")]

        seen = cluster.seen()
        assert {rank: list(range(int(it["steps"]))) for rank, it in seen.items()} == steps_of_ranks(rows)
        assert {4} == {row.values["sidestep/ranks_reported"] for row in rows}


TAKES = """
import socket, sys, time
with socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True):
    time.sleep(3600)
"""
"""Somebody else has that port."""
GATE = """
import sys, time
from tests.support.proxy import Proxy
with Proxy(sys.argv[1], port=int(sys.argv[2])):
    time.sleep(3600)
"""
"""The server names itself by an address of this machine's: on the login node that leads out, too."""
LOGIN = ["serve", "--id", "live", "--project", "p", "--mode", "online", "--set", "sink.ask_every_s=0.5",
         "--set", "samplers.enabled=off", "--set", "order.patience_s=60"]  # fmt: skip


def listens(keys: Path) -> list[str]:
    """The options that let in those of other nodes."""
    options = {"tcp": "tcp://*:7711", "key_file": keys / "server.key", "clients": keys / "clients"}
    return [word for name, value in options.items() for word in ("--set", f"listen.{name}={value}")]


def to(keys: Path) -> list[str]:
    """The options that lead to the login node."""
    options = {"upstream.address": "tcp://node0:7711", "upstream.key_file": keys / "client.key"}
    options["samplers.enabled"] = "off"
    return [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
