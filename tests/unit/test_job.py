"""Which of the commands of a job this is, by what launchers say to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sidestep.ranks import Here
from sidestepd.job import Place, place_of, starts_elsewhere

TRAIN = ("python", "train.py")


def place(
    environ: Mapping[str, str], words: Sequence[str] = TRAIN, *, node: str = "n", **more: Any
) -> Place | None:
    here = Here(pid=7, parent=6, node=node, started=lambda _: "1", above=lambda _: ())
    return place_of(environ, words, here, **more)


def srun(task: int, *, per_node: int = 1, nodes: int = 2, restarts: int = 0) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": str(per_node * nodes), "SLURM_LOCALID": str(task % per_node),
        "SLURM_NODEID": str(task // per_node), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})", "SLURMD_NODENAME": f"n{task // per_node}",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip


def mpirun(rank: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % 2), "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prte-1",
    }  # fmt: skip


def torchrun(*words: str) -> list[str]:
    return ["torchrun", "--nnodes=2", *words, "train.py"]


class TestSrun:
    def test_with_a_task_on_each_node_has_a_daemon_for_each(self):
        one, other = place(srun(0)), place(srun(1))

        assert (True, True, 2, 1, "n0") == (one.first, one.hosts, one.nodes, one.tasks, one.node)
        assert (False, True, "n1") == (other.first, other.hosts, other.node)
        assert one.job == other.job

    def test_with_a_task_for_each_rank_has_one_that_hosts_and_others_that_join(self):
        found = [place(srun(task, per_node=2)) for task in range(4)]

        assert [(True, True), (False, False), (False, True), (False, False)] == [
            (it.first, it.hosts) for it in found
        ]
        assert {2} == {it.tasks for it in found}

    def test_on_one_node_needs_no_network(self):
        assert place(srun(1, per_node=4, nodes=1)).alone

    def test_that_is_queued_again_is_another_job(self):
        assert place(srun(0)).job != place(srun(0, restarts=1)).job

    def test_of_one_task_is_none(self):
        assert place(srun(0, nodes=1)) is None


class TestOthers:
    def test_mpirun(self):
        found = [place(mpirun(rank)) for rank in range(4)]

        assert [(True, True), (False, False), (False, True), (False, False)] == [
            (it.first, it.hosts) for it in found
        ]
        assert {(2, 2, 4)} == {(it.nodes, it.tasks, it.guessed_of) for it in found}

    def test_a_job_that_sets_torchs_variables_for_each_node(self):
        """As Kubeflow does for its pods, whose command is a torchrun."""
        environ = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "1"}

        found = place(environ)

        assert (False, True, 4, 1) == (found.first, found.hosts, found.nodes, found.tasks)

    def test_torchs_variables_of_one_machine(self):
        environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "m", "LOCAL_WORLD_SIZE": "2"}

        assert place(environ).alone

    def test_a_pod_of_an_indexed_job(self):
        pods = [place({"JOB_COMPLETION_INDEX": str(index)}, node=f"train-{index}") for index in range(2)]

        assert [(True, None), (False, None)] == [(pod.first, pod.nodes) for pod in pods]
        assert pods[0].job == pods[1].job

    @pytest.mark.parametrize("how", ["torchrun", "variables"])
    def test_replicas_of_a_jobset_that_are_told_of_each_other(self, how: str):
        """Two of two pods each; the pods of each count from 0, and call themselves js-workers-REPLICA-POD."""
        found = []
        for node in range(4):
            replica, pod = divmod(node, 2)
            environ, words = {"JOB_COMPLETION_INDEX": str(pod), "MASTER_ADDR": "js-workers-0-0.js"}, TRAIN
            if how == "torchrun":
                options = [f"--node-rank={node}", "--master-addr=js-workers-0-0.js", "train.py"]
                words = ("torchrun", "--nnodes=4", *options)
            else:
                environ |= {"RANK": str(node), "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
            found.append(place(environ, words, node=f"js-workers-{replica}-{pod}"))

        assert [True, False, False, False] == [it.first for it in found]
        assert {4} == {it.nodes for it in found}
        assert 1 == len({it.job for it in found})

    def test_replicas_of_a_jobset_that_are_not_are_a_job_each(self):
        pods = [
            place({"JOB_COMPLETION_INDEX": "0"}, node=f"js-workers-{replica}-0", words=TRAIN)
            for replica in range(2)
        ]

        assert [True, True] == [pod.first for pod in pods]
        assert pods[0].job != pods[1].job

    def test_nothing(self):
        assert place({}) is None
        assert place({}, ["torchrun", "--nproc-per-node", "4", "train.py"]) is None


class TestATorchrunInTheCommand:
    @pytest.mark.parametrize("words", [("--node-rank", "1"), ("--node_rank=1",)])
    def test_says_which_node_it_is(self, words: Sequence[str]):
        found = place({}, torchrun("--master-addr", "h0", "--master-port=5", *words))

        assert (False, True, 2, "h0") == (found.first, found.hosts, found.nodes, found.master)

    def test_that_meets_at_a_host_has_its_first_node_there(self):
        words = torchrun("--rdzv-endpoint=h0:29400", "--rdzv-id=7")

        here, there = (place({}, words, is_here=lambda host, name=name: host == name) for name in ("h0", "h1"))

        assert (True, False) == (here.first, there.first)
        assert here.job == there.job

    def test_may_be_told_by_its_environment(self):
        environ = {"PET_NNODES": "3", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "h0"}

        found = place(environ, ["torchrun", "train.py"])

        assert (True, 3) == (found.first, found.nodes)

    def test_of_as_many_nodes_as_come_has_no_number(self):
        assert place({}, ["torchrun", "--nnodes=1:4", "--node-rank=0", "t.py"]).nodes is None

    @pytest.mark.parametrize(
        "words",
        [
            ("--nproc-per-node", "2", "-t", "3", "train.py", "--nnodes", "2"),
            ("--standalone", "-m", "train", "--nnodes=2", "--node-rank=0"),
            ("--standalone", "--nnodes=2", "train.py"),
        ],
    )
    def test_has_its_options_before_the_trainings_own(self, words: Sequence[str]):
        assert place({}, ["torchrun", *words]) is None

    def test_is_told_by_the_last_of_two(self):
        assert 3 == place({}, torchrun("--node-rank=0", "--nnodes=3")).nodes

    def test_counts_when_python_starts_it(self):
        words = ["python", "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "0", "t.py"]

        assert place({}, words).first


BATCH = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}


class TestALauncherInTheCommand:
    @pytest.mark.parametrize(
        ("environ", "words", "launcher"),
        [
            (BATCH, ["srun", *TRAIN], "srun"),
            (BATCH, ["/opt/mpi/bin/mpirun", "-n", "4", *TRAIN], "mpirun"),
            (BATCH, ["srun", "-N1", *TRAIN], None),
            (BATCH, TRAIN, None),
            (BATCH | {"SLURM_JOB_NUM_NODES": "1"}, ["srun", *TRAIN], None),
            ({}, ["mpirun", *TRAIN], None),
        ],
    )
    def test_of_a_batch_script_starts_tasks_that_do_not_reach_us(
        self, environ: Mapping[str, str], words: Sequence[str], launcher: str | None
    ):
        assert launcher == starts_elsewhere(environ, words)


class TestTheName:
    def test_of_a_job_is_fit_for_a_directory(self):
        odd = torchrun("--rdzv-endpoint=[::1]:5", "--rdzv-id=a/../b")
        for found in (place(srun(0)), place(mpirun(0)), place({}, odd)):
            assert found.job.replace("-", "").isalnum()
            assert len(found.job) < 64
