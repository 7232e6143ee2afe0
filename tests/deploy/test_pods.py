"""The overlays of Kubernetes, run: pods as a kubelet makes them of the built manifests, by podman.

Each test has an overlay of its own on top, as deploy/README.md says: other images, a training, options that make a
run quick. Nothing else is changed. What a cluster does beside pods (scheduling, network policies) is not here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidestep import __version__
from sidestepd import status
from tests.support.daemons import freeze
from tests.support.images import IMAGE, TRAINER, Podman
from tests.support.pods import Cluster, Manifest, Pod
from tests.support.waiting import eventually
from tests.support.workshop import DEPLOY, assert_whole, is_finished, kustomized, rows_in, run_dir_in, steps_in

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

WAIT_S = 120.0
QUICK = {
    "SIDESTEP_RUN_MODE": "offline",
    "SIDESTEP_SERVE_LINGER_S": "1",
    "SIDESTEP_DELIVERY_CONFIRM_INTERVAL_S": "0.2",
    "SIDESTEP_ORDER_PATIENCE_S": "1",
}
TRAIN = """
import signal, sys, time
from pathlib import Path
import sidestep
folder, stops = Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
saved = folder / "checkpoint"
step = int(saved.read_text()) if saved.exists() else 0
run = sidestep.init(project="in-a-pod")
while not stops and not (folder / "until").exists():
    run.log({"loss": 1 / (step + 1)}, step=step)
    step += 1
    time.sleep(0.01)
run.finish(timeout=60)
saved.write_text(str(step))
"""
"""Logs until a file appears, or it is told to end; goes on from its checkpoint. Its run is what its pod says."""


@pytest.fixture
def cluster(podman: Podman, tmp_path: Path) -> Iterator[Cluster]:
    images = {f"sidestep:{__version__}": IMAGE, "training": TRAINER}
    yield Cluster(podman, tmp_path, images)
    podman.run("rm", "-f", "--time", "0", *podman.do("ps", "-aq").split())


def overlay(cluster: Cluster, name: str, patches: list[Mapping[str, Any]] | None = None) -> list[Manifest]:
    """The manifests of an overlay on top of one of ours, applied."""
    folder = cluster.folder / f"kubernetes-{name}"
    shutil.copytree(DEPLOY / "kubernetes", folder)
    (folder / "mine").mkdir()
    said = {
        "resources": [f"../overlays/{name}"],
        "configMapGenerator": [
            {"name": "sidestep-options", "behavior": "merge", "literals": [f"{k}={v}" for k, v in QUICK.items()]}
        ],
        "patches": patches or [],
    }
    if name == "drain":
        del said["configMapGenerator"]
    (folder / "mine/kustomization.yaml").write_text(json.dumps(said))
    manifests = kustomized(folder / "mine")
    cluster.apply(manifests)
    return list(manifests)


def training(cluster: Cluster) -> list[Manifest]:
    """The overlay `sidecar` with a training that one can tell to end."""
    path = "/spec/template/spec"
    shared = cluster.folder / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for node in ("node1", "node2"):  # a network file system
        (cluster.folder / "nodes" / node).mkdir(parents=True)
        (cluster.folder / "nodes" / node / "until").symlink_to(shared)
    words = ["/opt/train/bin/python", "-c", TRAIN, "/until"]
    patch = [
        {"op": "replace", "path": f"{path}/containers/0/command", "value": words},
        {"op": "add", "path": f"{path}/containers/0/volumeMounts/-",
         "value": {"name": "until", "mountPath": "/until"}},
        {"op": "add", "path": f"{path}/volumes/-",
         "value": {"name": "until", "hostPath": {"path": "/until", "type": "DirectoryOrCreate"}}},
    ]  # fmt: skip
    return overlay(
        cluster, "sidecar", [{"target": {"kind": "Job", "name": "training"}, "patch": json.dumps(patch)}]
    )


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only one of its kind."""
    (found,) = (it for it in manifests if it["kind"] == kind)
    return found


def steps_said(cluster: Cluster, folder: str = "until") -> int:
    """How far a training came."""
    return int((cluster.folder / "nodes/node1" / folder / "checkpoint").read_text())


def process(pod: Pod, container: str, module: str) -> psutil.Process:
    """The one that runs a module of ours."""

    def found() -> psutil.Process | None:
        for it in pod.cluster.podman.processes(pod.called(container)):
            if module in it.cmdline():
                return it
        return None

    return eventually(found, WAIT_S, lambda: pod.logs(container))


def reaches(state: Path, id_: str, rows: int, told: Callable[[], str]) -> None:
    """Wait until so many rows are in the run for good."""
    eventually(lambda: rows_in(state, id_) >= rows, WAIT_S, told)


def is_finished_soon(state: Path, id_: str, told: Callable[[], str]) -> None:
    """Wait until a run is."""
    eventually(lambda: is_finished(state, id_), WAIT_S, told)


class TestASidecar:
    def test_is_up_before_the_training_and_finishes_its_run_after_it(self, cluster):
        manifests = training(cluster)
        pod = Pod(cluster, one(manifests, "Job"), "training-1", node="node1")
        state = cluster.claim("sidestep-state")

        pod.start()

        reaches(state, "training", 50, lambda: pod.logs("sidestep") + pod.logs("train"))
        assert pod.probe("sidestep", "livenessProbe")
        (pod.volume("until") / "until").touch()
        assert 0 == pod.exit_code("train"), pod.logs("train")
        pod.end()
        assert 0 == pod.exit_code("sidestep"), pod.logs("sidestep")
        report = assert_whole(state, "training", steps_said(cluster))
        (worker,) = (it for it in report.sessions if it.role == "worker")
        assert ("training-1", "bye") == (worker.node, worker.state)

    def test_that_is_killed_is_started_again_beside_the_training(self, cluster):
        pod = Pod(cluster, one(training(cluster), "Job"), "training-1", node="node1")
        state = cluster.claim("sidestep-state")
        pod.start()
        reaches(state, "training", 30, lambda: pod.logs("sidestep"))

        pod.kill("sidestep")
        assert 137 == pod.exit_code("sidestep")
        pod.run("sidestep")

        reaches(state, "training", 150, lambda: pod.logs("sidestep"))
        (pod.volume("until") / "until").touch()
        assert 0 == pod.exit_code("train"), pod.logs("train")
        pod.end()
        assert_whole(state, "training", steps_said(cluster))


class TestAGraceThatIsTooShort:
    """The training used up nearly all of it: the sidecar is killed with a backlog, which is on the claim."""

    @pytest.fixture
    def left(self, cluster: Cluster) -> Pod:
        pod = Pod(cluster, one(training(cluster), "Job"), "training-1", node="node1")
        state = cluster.claim("sidestep-state")
        pod.start()
        reaches(state, "training", 30, lambda: pod.logs("sidestep"))
        freeze(process(pod, "sidestep", "sidestepd.delivery"))
        run_dir = run_dir_in(state, "training")
        before = status.report(run_dir).rows
        eventually(lambda: status.report(run_dir).ledger.offered > before + 100, WAIT_S)

        pod.end(within_s=5)

        assert (0, 137) == (pod.exit_code("train"), pod.exit_code("sidestep"))
        assert status.report(run_dir).ledger.pending > 0
        return pod

    def test_is_made_up_for_by_the_next_pod_in_the_same_run(self, cluster, left):
        """In the directory that was left, or in one more of the same run: who comes first, worker or end."""
        before = steps_said(cluster)
        pod = Pod(cluster, cluster.of("Job", "training"), "training-2", node="node2")
        state = cluster.claim("sidestep-state")

        pod.start()

        def reports() -> list[status.Report]:
            return [status.report(path.parent) for path in state.glob("sidestep-runs/*-training/run.json")]

        eventually(lambda: sum(it.rows for it in reports()) >= before + 30, WAIT_S, lambda: pod.logs("sidestep"))
        (pod.volume("until") / "until").touch()
        assert 0 == pod.exit_code("train"), pod.logs("train")
        pod.end()
        assert 0 == pod.exit_code("sidestep"), pod.logs("sidestep")
        said = [step for path in sorted(state.glob("sidestep-runs/*-training")) for step in steps_in(path)]
        assert list(range(steps_said(cluster))) == said
        assert {("training", "finished", True, 0)} == {
            (it.run.id, it.state, it.ledger.balances, it.ledger.pending) for it in reports()
        }

    def test_is_made_up_for_by_drain(self, cluster, left):
        drain = one(overlay(cluster, "drain"), "Job")
        pod = Pod(cluster, drain, "drain-1", node="node2")

        pod.start()

        assert 0 == pod.exit_code("drain"), pod.logs("drain")
        assert_whole(cluster.claim("sidestep-state"), "training", steps_said(cluster))
        again = Pod(cluster, drain, "drain-2", node="node2")
        again.start()
        assert 0 == again.exit_code("drain"), again.logs("drain")


def test_drain_finds_nothing_to_do_where_nothing_was(cluster):
    training(cluster)
    pod = Pod(cluster, one(overlay(cluster, "drain"), "Job"), "drain-1", node="node1")

    pod.start()

    assert 0 == pod.exit_code("drain"), pod.logs("drain")


def worker(cluster: Cluster, name: str, environ: Mapping[str, str], *, socket: str = "") -> Pod:
    """A pod of a training of its own, as the comments of the overlays say."""
    (cluster.folder / "nodes/node1" / name).mkdir(parents=True)
    (cluster.folder / "nodes/node1" / name).chmod(0o777)
    volumes: list[Any] = [{"name": "until", "hostPath": {"path": f"/{name}", "type": "Directory"}}]
    mounts = [{"name": "until", "mountPath": "/until"}]
    if socket:
        volumes.append({"name": "socket", "hostPath": {"path": socket, "type": "Directory"}})
        mounts.append({"name": "socket", "mountPath": "/run/sidestep", "readOnly": True})
    else:
        volumes.append({"name": "key", "secret": {"secretName": "sidestep-client", "defaultMode": 0o400}})
        mounts.append({"name": "key", "mountPath": "/key", "readOnly": True})
    container = {
        "name": "train", "image": "training", "command": ["/opt/train/bin/python", "-c", TRAIN, "/until"],
        "env": [{"name": key, "value": value} for key, value in environ.items()], "volumeMounts": mounts,
        "securityContext": {"runAsUser": 1234, "runAsGroup": 1234, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    spec = {
        "containers": [container],
        "volumes": volumes,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {"fsGroup": 4321},
    }
    pod = Pod(
        cluster, {"kind": "Deployment", "spec": {"template": {"spec": spec}}}, name, node="node1",
        network="none" if socket else "container:head-sidestep",
    )  # fmt: skip
    pod.start()
    return pod


def ends(pod: Pod) -> int:
    """Tell a worker's pod to; how far it came."""
    (pod.volume("until") / "until").touch()
    assert 0 == pod.exit_code("train"), pod.logs("train")
    return steps_said(pod.cluster, pod.name)


class TestADaemonOnEachNode:
    def test_has_the_runs_of_its_pods_and_goes_on_with_them_when_it_was_killed(self, cluster):
        """Directories of the host, which are root's at first; two pods, in runs of their own, on one machine."""
        pod = Pod(cluster, one(overlay(cluster, "node"), "DaemonSet"), "node-a", node="node1")
        pod.start()
        state = cluster.on_host("node1", "/var/lib/sidestep/node")
        environ = {"SIDESTEP_ADDRESS": "ipc:///run/sidestep/daemon.sock", "SIDESTEP_NODE": "node1"}
        workers = {
            name: worker(cluster, name, environ | {"WANDB_RUN_ID": name}, socket="/run/sidestep/node")
            for name in ("first", "second")
        }
        for name in workers:
            reaches(state, name, 30, lambda: pod.logs("sidestep"))

        pod.kill("sidestep")
        assert 137 == pod.exit_code("sidestep")
        pod.run("sidestep")

        for name, it in workers.items():
            reaches(state, name, 150, lambda: pod.logs("sidestep"))
            steps = ends(it)
            is_finished_soon(state, name, lambda: pod.logs("sidestep"))
            report = assert_whole(state, name, steps)
            assert {"node1"} == {session.node for session in report.sessions}
        pod.end()
        assert 0 == pod.exit_code("sidestep"), pod.logs("sidestep")


class TestAHead:
    def test_has_workers_of_other_nodes_and_those_of_a_relay_that_is_killed(self, cluster):
        """Keys as `kustomization.yaml` says, with the owners and modes that secrets have in pods."""
        head = overlay(cluster, "head")
        relay = overlay(cluster, "relay")
        keygen(cluster)
        state = cluster.claim("sidestep-head-state")
        above = Pod(cluster, one(head, "Deployment"), "head", node="node0")
        above.start()
        below = Pod(cluster, one(relay, "DaemonSet"), "relay", node="node1", network="container:head-sidestep")
        below.start()
        near = worker(
            cluster, "near",
            {"SIDESTEP_ADDRESS": "tcp://sidestep-head:7711", "SIDESTEP_KEY_FILE": "/key/client.key",
             "WANDB_RUN_ID": "near", "SIDESTEP_NODE": "node1"},
        )  # fmt: skip
        far = worker(
            cluster, "far",
            {"SIDESTEP_ADDRESS": "ipc:///run/sidestep/daemon.sock",
             "WANDB_RUN_ID": "far", "SIDESTEP_NODE": "node1"},
            socket="/run/sidestep/node",
        )  # fmt: skip

        def told() -> str:
            return f"{above.logs('sidestep')}\n{below.logs('sidestep')}\n{near.logs('train')}\n{far.logs('train')}"

        for name in ("near", "far"):
            reaches(state, name, 30, told)

        below.kill("sidestep")
        below.run("sidestep")

        reaches(state, "far", 150, told)
        for pod in (near, far):
            steps = ends(pod)
            is_finished_soon(state, pod.name, told)
            assert_whole(state, pod.name, steps)
        assert not list(cluster.on_host("node1", "/var/lib/sidestep/node").glob("sidestep-runs/2*"))
        below.end()
        above.end()
        assert (0, 0) == (below.exit_code("sidestep"), above.exit_code("sidestep")), told()


class TestAnIndexedJob:
    def test_is_one_run_of_all_its_pods(self, cluster):
        """By `sidestep run` alone: keys of the job's secret, the first pod by its service's name for it.

        Both pods are in one network namespace, in which all names are 127.0.0.1: no network between them is shown.
        """
        cluster.podman.do(
            "run", "--detach", "--name=net", "--network=none", "--entrypoint=sleep", IMAGE, "infinity"
        )
        network = f"ns:/proc/{cluster.podman.processes('net')[0].pid}/ns/net"
        cluster.secret("sidestep-job", secret=b"s" * 64)
        path = "/spec/template/spec"
        words = ["sidestep", "run", "--", "python3", "-c", TRAIN, "/until"]
        patch = [
            {"op": "replace", "path": f"{path}/containers/0/command", "value": words},
            {"op": "replace", "path": f"{path}/containers/0/image", "value": f"sidestep:{__version__}"},
            {"op": "add", "path": f"{path}/containers/0/env/-",
             "value": {"name": "SIDESTEP_ADDRESS", "value": ""}},  # which a training's image has not
            {"op": "add", "path": f"{path}/containers/0/env/-",
             "value": {"name": "SIDESTEP_ORDER_PATIENCE_S", "value": "60"}},  # pods need not begin together
            {"op": "add", "path": f"{path}/containers/0/volumeMounts/-",
             "value": {"name": "until", "mountPath": "/until"}},
            {"op": "add", "path": f"{path}/volumes/-",
             "value": {"name": "until", "hostPath": {"path": "/until", "type": "Directory"}}},
        ]  # fmt: skip
        for node in ("node0", "node1"):
            (cluster.folder / "nodes" / node / "until").mkdir(parents=True)
            (cluster.folder / "nodes" / node / "until").chmod(0o777)
        job = one(overlay(cluster, "indexed", [{"target": {"kind": "Job"}, "patch": json.dumps(patch)}]), "Job")
        pods = [Pod(cluster, job, f"training-{n}", node=f"node{n}", network=network, index=str(n)) for n in (0, 1)]

        for pod in pods:
            pod.start()

        state = pods[0].volume("state")

        def told() -> str:
            return "\n".join(pod.logs("train") for pod in pods)

        reaches(state, "training", 50, told)
        for pod in pods:
            (pod.volume("until") / "until").touch()
        assert [0, 0] == [pod.exit_code("train") for pod in pods], told()
        steps = [int((pod.volume("until") / "checkpoint").read_text()) for pod in pods]
        report = assert_whole(state, "training", max(steps))
        workers = {(it.node, it.rank) for it in report.sessions if it.role == "worker"}
        assert {("training-0", 0), ("training-1", 1)} == workers


def keygen(cluster: Cluster) -> None:
    """Make keys, and the two secrets of them."""
    keys = cluster.folder / "keys"
    keys.mkdir()
    keys.chmod(0o777)
    cluster.podman.do("run", "--rm", "--network=none", f"--volume={keys}:/here", IMAGE, "keygen", "/here/keys")
    server, clients, client = (keys / "keys" / name for name in ("server.key", "clients", "client.key"))
    cluster.secret("sidestep-keys", server__key=server.read_bytes(), clients=clients.read_bytes())
    cluster.secret("sidestep-client", client__key=client.read_bytes())
