"""Ranks: who a process is, from environments such as the launchers really leave to their processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sidestep.ranks import ALONE, LAUNCHERS, Here, Identity, commands_above, identify, start_of
from tests.support.launchers import (
    FLUX,
    HYDRA,
    INDEXED_JOB,
    JOB_SCRIPT,
    JSM,
    KUBEFLOW,
    LIGHTNING,
    MVAPICH2,
    OPENMPI_4,
    OPENMPI_5,
    PALS,
    PMI,
    PRRTE,
    RAY_TRAIN,
    SRUN,
    SRUN_PER_NODE,
    TORCHRUN,
    TORCHRUN_ON_TWO_NODES,
)


def identity(
    environ: dict[str, str],
    *,
    node: str = "here",
    parent: int = 10,
    launch: str | None = None,
    said: list[str] | None = None,
    modules: dict[str, Any] | None = None,
    above: Sequence[Sequence[str]] = (),
) -> Identity:
    return identify(
        environ,
        Here(pid=20, parent=parent, node=node, started=lambda pid: f"started{pid}", above=lambda _: above),
        launch=launch,
        warn=([] if said is None else said).append,
        modules=modules or {},
    )


def place(environ: dict[str, str]) -> tuple[int, int, int]:
    who = identity(environ)
    return who.rank, who.world, who.local_rank


class TestTorchrun:
    def test_its_variables_are_read(self):
        expected = Identity(rank=3, world=4, local_rank=3, node="here", pid=20, launch="10-started10", attempt=2)

        assert expected == identity(TORCHRUN)

    def test_an_id_of_its_own_names_the_launch(self):
        assert "job-7" == identity(TORCHRUN | {"TORCHELASTIC_RUN_ID": "job-7"}).launch

    def test_on_one_node_the_launch_none_is_its_agent(self):
        first = identity(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
        second = identity(TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"})

        assert "10-started10" == first.launch == second.launch

    def test_a_second_launch_on_the_same_port_is_another_one(self):
        assert identity(TORCHRUN, parent=10).launch != identity(TORCHRUN, parent=11).launch

    def test_on_several_nodes_the_launch_none_is_the_place_to_meet(self):
        assert "node001:29500" == identity(TORCHRUN_ON_TWO_NODES).launch

    def test_ranks_of_several_agents_share_it(self):
        first = identity(TORCHRUN_ON_TWO_NODES | {"RANK": "0", "GROUP_RANK": "0"}, parent=10)
        second = identity(TORCHRUN_ON_TWO_NODES, parent=11)

        assert first.launch == second.launch

    def test_a_world_larger_than_the_nodes_is_on_several_even_if_nobody_counts_them(self):
        environ = {name: value for name, value in TORCHRUN_ON_TWO_NODES.items() if name != "GROUP_WORLD_SIZE"}

        assert "node001:29500" == identity(environ).launch

    def test_two_agents_of_one_node_are_several_too(self):
        assert "127.0.0.1:29500" == identity(TORCHRUN | {"NNODES": "2", "GROUP_WORLD_SIZE": ""}).launch

    def test_without_a_place_to_meet_the_agent_is_all_there_is(self):
        assert "10-started10" == identity(TORCHRUN_ON_TWO_NODES | {"MASTER_ADDR": ""}).launch


class TestTorchrunUnderSlurm:
    """One task of srun per node runs an agent: SLURM_PROCID is the *node's* rank there, and in all its workers."""

    WORKER = SRUN_PER_NODE | TORCHRUN_ON_TWO_NODES

    def test_the_ranks_are_torchruns(self):
        assert (5, 8, 1) == place(self.WORKER)

    def test_and_so_is_the_launch(self):
        assert "node001:29500" == identity(self.WORKER).launch

    @pytest.mark.parametrize("outer", [JOB_SCRIPT, SRUN, SRUN_PER_NODE, INDEXED_JOB, OPENMPI_4, PRRTE])
    def test_no_launcher_around_it_is_asked_even_if_its_rank_is_unreadable(self, outer: dict[str, str]):
        worker = outer | TORCHRUN_ON_TWO_NODES | {"RANK": "?", "GROUP_RANK": "?", "LOCAL_RANK": "?"}

        assert (0, 8, 0) == place(worker)

    def test_an_unreadable_rank_is_worked_out_from_the_node(self):
        assert 5 == identity(self.WORKER | {"RANK": "?"}).rank


class TestOtherUsersOfTorchsVariables:
    def test_ray_train_sets_them_in_its_workers(self):
        expected = Identity(rank=5, world=8, local_rank=1, node="here", pid=20, launch="10.0.0.5:42137", attempt=0)

        assert expected == identity(RAY_TRAIN)

    def test_ray_trains_ranks_beat_those_of_the_tasks_that_started_ray(self):
        assert (5, 8, 1) == place(SRUN_PER_NODE | RAY_TRAIN)

    def test_trainings_of_one_ray_cluster_are_different_launches_although_their_parent_is_the_same(self):
        on_one_node = RAY_TRAIN | {"WORLD_SIZE": "4", "RANK": "1"}

        assert identity(on_one_node).launch != identity(on_one_node | {"MASTER_PORT": "42138"}).launch

    def test_a_worker_of_ray_without_them_does_not_take_the_rank_of_the_task_that_started_ray(self):
        assert (0, 1, 0) == place(SRUN_PER_NODE | {"RAY_JOB_ID": "02000000"})

    def test_a_kubeflow_pod_is_a_rank(self):
        expected = Identity(
            rank=5, world=8, local_rank=0, node="train-worker-4", pid=20, launch="train-master-0:23456", attempt=0
        )

        assert expected == identity(KUBEFLOW, node="train-worker-4", parent=0)

    def test_a_script_that_sets_them_from_slurms_has_them_read(self):
        copied = {
            "RANK": "5",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "8",
            "MASTER_ADDR": "node001",
            "MASTER_PORT": "6000",
        }

        assert (5, 8, 1) == place(SRUN | copied)

    def test_without_a_place_to_meet_the_parent_is_the_launch(self):
        assert "10-started10" == identity({"RANK": "1", "WORLD_SIZE": "2"}).launch


class TestSlurm:
    def test_a_task_of_srun_is_a_rank(self):
        expected = Identity(rank=5, world=8, local_rank=1, node="node002", pid=20, launch="4711.0", attempt=0)

        assert expected == identity(SRUN)

    def test_a_later_step_of_the_job_is_another_launch(self):
        assert "4711.1" == identity(SRUN | {"SLURM_STEP_ID": "1"}).launch

    def test_a_task_of_an_array_says_which(self):
        array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "10"}

        assert "4700_3.0" == identity(SRUN | array).launch

    def test_the_step_and_not_the_job_says_how_many_there_are(self):
        assert 4 == identity(SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}).world

    def test_a_step_of_one_task_is_a_world_of_one_and_names_its_launch(self):
        one = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}

        who = identity(SRUN | one)

        assert (0, 1, "4711.0") == (who.rank, who.world, who.launch)

    @pytest.mark.parametrize("mpi", ["pmix", "pmi2"])
    def test_whatever_sruns_mpi_plugin_adds_the_place_is_slurms(self, mpi: str):
        pmix = {"PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.4711.0", "PMIX_HOSTNAME": "node002"}
        pmi2 = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "16"}

        assert identity(SRUN) == identity(SRUN | {"pmix": pmix, "pmi2": pmi2}[mpi])

    def test_a_job_script_is_no_task_although_it_has_a_rank_and_a_number_of_tasks(self):
        who = identity(JOB_SCRIPT)

        assert (0, 1, "20-started20") == (who.rank, who.world, who.launch)

    @pytest.mark.parametrize("step", ["4294967291", "4294967294", "-5", "batch", "interactive"])
    def test_nor_is_a_script_or_a_shell_whose_step_has_a_reserved_number(self, step: str):
        assert (0, 1, 0) == place(JOB_SCRIPT | {"SLURM_STEP_ID": step})

    def test_a_container_handed_only_the_ranks_is_a_task(self):
        handed = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "4711"}

        who = identity(handed)

        assert (5, 8, 1, "4711") == (who.rank, who.world, who.local_rank, who.launch)

    def test_a_rank_in_a_job_of_one_task_without_a_step_is_none(self):
        assert (
            "20-started20" == identity({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "4711"}).launch
        )

    def test_local_ranks_that_a_script_copies_from_it_change_nothing(self):
        assert (5, 8, 1) == place(SRUN | {"LOCAL_RANK": "1", "WORLD_SIZE": "8"})

    @pytest.mark.parametrize("outer", [JOB_SCRIPT, SRUN_PER_NODE], ids=["first node", "others"])
    @pytest.mark.parametrize(
        "inner", [OPENMPI_4, OPENMPI_5, MVAPICH2, HYDRA, FLUX], ids=lambda environ: next(iter(environ))
    )
    def test_what_mpirun_starts_in_a_job_has_mpiruns_ranks(self, outer: dict[str, str], inner: dict[str, str]):
        """mpirun starts its daemons with srun, one per node: the ranks inherit SLURM's rank of their daemon."""
        assert (5, 8, 1) == place(outer | inner)


class TestMpi:
    @pytest.mark.parametrize(
        ("environ", "launch"),
        [
            (OPENMPI_4, "3345154049"),
            (OPENMPI_5, "prterun-node001-31337@1"),
            (MVAPICH2, "99.pbs"),
            (HYDRA, "99.pbs"),
            (PALS, "b0f2b9a2-6a2f-4c1a-a6c3-1f1f6f5d2c11"),
            (FLUX, "f3dSybfQ3"),
            (JSM, "1234.3"),
            (PMI, "77"),
        ],
        ids=["Open MPI 4", "Open MPI 5", "MVAPICH2", "MPICH and Intel", "PALS", "Flux", "JSM", "PMI"],
    )
    def test_every_flavour_is_read(self, environ: dict[str, str], launch: str):
        who = identity(environ)

        assert (5, 8, 1, launch) == (who.rank, who.world, who.local_rank, who.launch)

    def test_pmix_gives_a_rank_and_a_name_and_no_world(self):
        expected = Identity(
            rank=5, world=6, local_rank=0, node="here", pid=20, launch="prterun-node001-31337@1", attempt=0
        )

        assert expected == identity(PRRTE)

    @pytest.mark.parametrize("environ", [MVAPICH2, HYDRA])
    def test_on_one_node_a_launch_without_a_name_is_its_launcher(self, environ: dict[str, str]):
        """The job would not tell two launches in it apart."""
        on_one = environ | {"MPI_LOCALNRANKS": "8", "MV2_COMM_WORLD_LOCAL_SIZE": "8"}

        assert "10-started10" == identity(on_one).launch

    def test_of_mpich_a_launch_is_called_as_the_processes_it_put_on_each_node_know_it(self):
        above = [["bash", "train.sh", ""], ["/opt/hydra_pmi_proxy", "--control-port", "node001:42533", "--rmk"]]

        assert "node001:42533" == identity(HYDRA, above=above).launch
        assert "99.pbs" == identity(HYDRA, above=[["mpiexec", "--control-port"]]).launch

    def test_of_intel_a_launch_has_a_name(self):
        environ = HYDRA | {"I_MPI_HYDRA_UUID": "a74b0000-a1d1-c050-d460-0600222d6f22"}

        assert "a74b0000-a1d1-c050-d460-0600222d6f22" == identity(environ).launch

    def test_on_several_nodes_it_is_the_place_to_meet_rather_than_the_job(self):
        assert "node001:6000" == identity(HYDRA | {"MASTER_ADDR": "node001", "MASTER_PORT": "6000"}).launch


class TestLocalRankAlone:
    def test_on_the_first_node_it_is_the_rank(self):
        expected = Identity(
            rank=3, world=4, local_rank=3, node="here", pid=20, launch="127.0.0.1:51234", attempt=0
        )

        assert expected == identity(LIGHTNING)

    def test_without_anything_else_it_is_the_rank_too(self):
        who = identity({"LOCAL_RANK": "1"})

        assert (1, 2, 1, "10-started10") == (who.rank, who.world, who.local_rank, who.launch)

    @pytest.mark.parametrize("size", [{"LOCAL_WORLD_SIZE": "4"}, {"NNODES": "2"}])
    def test_on_another_node_the_nodes_before_it_count(self, size: dict[str, str]):
        said: list[str] = []

        who = identity(LIGHTNING | {"NODE_RANK": "1", "WORLD_SIZE": "8"} | size, said=said)

        assert 7 == who.rank
        assert [] == said

    def test_on_another_node_of_unknown_size_the_rank_is_said_to_be_a_guess(self):
        said: list[str] = []

        identity(LIGHTNING | {"NODE_RANK": "1", "WORLD_SIZE": "8"}, said=said)

        assert 1 == len(said)
        assert "LOCAL_WORLD_SIZE" in said[0]

    def test_a_pod_of_an_indexed_job_is_one_of_as_many_as_there_are_nodes(self):
        assert (2, 3, 0) == place({"JOB_COMPLETION_INDEX": "2", "NNODES": "3"})

    def test_in_a_task_of_srun_it_beats_the_rank_of_the_task(self):
        """The task's rank is the node's; who started a world of another size within it counts."""
        within = LIGHTNING | {"WORLD_SIZE": "8", "NODE_RANK": ""}

        assert (7, 8, 3) == place(SRUN_PER_NODE | within)

    def test_in_a_task_of_srun_it_beats_what_its_mpi_plugin_says_of_the_task(self):
        pmix = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.4711.0", "PMI_RANK": "1", "PMI_SIZE": "2"}

        assert (3, 4, 3) == place(SRUN_PER_NODE | pmix | LIGHTNING)


class TestKubernetesIndexedJob:
    def test_the_index_is_a_rank_where_a_pod_is_one_process(self):
        expected = Identity(rank=5, world=6, local_rank=0, node="train-5", pid=20, launch="train", attempt=0)

        assert expected == identity(INDEXED_JOB, node="train-5", parent=0)

    def test_the_index_is_a_nodes_where_a_pod_is_several(self):
        several = INDEXED_JOB | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "32"}

        who = identity(several, node="train-5")

        assert (21, 32, 1, "train") == (who.rank, who.world, who.local_rank, who.launch)

    def test_torchrun_in_a_pod_numbers_the_processes(self):
        assert (5, 8, 1) == place(INDEXED_JOB | TORCHRUN_ON_TWO_NODES)

    def test_the_place_to_meet_names_the_launch(self):
        meeting = {"MASTER_ADDR": "train-0.train", "MASTER_PORT": "3389"}

        assert "train-0.train:3389" == identity(INDEXED_JOB | meeting, node="train-5").launch


class TestTorchDistributed:
    @staticmethod
    def loaded(rank: int, world: int, *, initialized: bool = True) -> dict[str, Any]:
        group = SimpleNamespace(
            is_initialized=lambda: initialized, get_rank=lambda: rank, get_world_size=lambda: world
        )
        return {"torch.distributed": group}

    def test_its_rank_counts_where_nobody_else_gives_one(self):
        """Processes of torch.multiprocessing.spawn: no variables, one parent."""
        who = identity({}, modules=self.loaded(1, 2))

        assert (1, 2, "10-started10") == (who.rank, who.world, who.launch)

    def test_its_rank_beats_the_environment_which_still_names_the_launch(self):
        who = identity(SRUN, modules=self.loaded(2, 8))

        assert (2, 8, "4711.0") == (who.rank, who.world, who.launch)

    @pytest.mark.parametrize(
        "modules",
        [
            loaded(7, 9, initialized=False),
            loaded(0, 1),
            loaded(-1, 8),
            {"torch.distributed": SimpleNamespace()},
            {"torch.distributed": None},
        ],
        ids=["no group yet", "a world of one", "not in the group", "built without it", "import blocked"],
    )
    def test_without_a_group_it_says_nothing(self, modules: dict[str, Any]):
        assert identity(SRUN) == identity(SRUN, modules=modules)

    def test_a_group_torn_down_meanwhile_is_passed_over(self):
        def gone() -> int:
            raise ValueError("Default process group has not been initialized")

        modules = self.loaded(1, 2)
        modules["torch.distributed"].get_rank = gone

        assert identity(SRUN) == identity(SRUN, modules=modules)

    def test_torch_is_never_imported_to_be_asked(self):
        code = (
            "import os, sys; from sidestep import ranks;"
            "ranks.identify(os.environ, ranks.Here.now());"
            "sys.exit('torch' in sys.modules)"
        )

        assert 0 == subprocess.run([sys.executable, "-c", code], timeout=60).returncode


class TestRayTrain:
    """Backends other than torch's set no variables; the context knows."""

    @staticmethod
    def loaded(rank: Any, world: Any, local: int = 0) -> dict[str, Any]:
        context = SimpleNamespace(
            get_world_rank=lambda: rank,
            get_world_size=lambda: world,
            get_local_rank=lambda: local,
            get_experiment_name=lambda: "tune-1",
        )
        return {"ray.train": SimpleNamespace(get_context=lambda: context)}

    def test_its_context_says_who_a_worker_is(self):
        who = identity({"RAY_JOB_ID": "02000000"}, modules=self.loaded(5, 8, 1))

        assert (5, 8, 1, "ray.02000000.tune-1") == (who.rank, who.world, who.local_rank, who.launch)

    def test_workers_on_other_nodes_are_of_the_same_launch(self):
        """Their parents are not one process."""
        here = identity({"RAY_JOB_ID": "1"}, modules=self.loaded(0, 2), parent=10)
        there = identity({"RAY_JOB_ID": "1"}, modules=self.loaded(1, 2), parent=99, node="there")

        assert here.launch == there.launch

    def test_the_launch_is_the_environment_s_where_that_has_one(self):
        who = identity(RAY_TRAIN, modules=self.loaded(5, 8, 1))

        assert identity(RAY_TRAIN) == who

    def test_it_beats_the_rank_of_the_task_that_started_ray(self):
        who = identity(SRUN_PER_NODE | {"RAY_JOB_ID": "1"}, modules=self.loaded(3, 4))

        assert (3, 4) == (who.rank, who.world)

    def test_outside_a_worker_it_says_nothing(self):
        def raises() -> Any:
            raise RuntimeError("only within train_loop_per_worker")

        for modules in (
            self.loaded(None, None), self.loaded(0, 1), {"ray.train": SimpleNamespace()}, {"ray.train": None},
            {"ray.train": SimpleNamespace(get_context=raises)},
        ):  # fmt: skip
            assert identity(SRUN) == identity(SRUN, modules=modules)


class TestAttempts:
    def test_torchrun_counts_its_restarts(self):
        assert 2 == identity(TORCHRUN).attempt

    def test_slurm_counts_requeues(self):
        assert 1 == identity(SRUN | {"SLURM_RESTART_COUNT": "1"}).attempt

    def test_a_requeue_is_above_every_restart_before_it(self):
        """torchrun counts from 0 again."""
        before = identity(SRUN_PER_NODE | TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "3"})
        after = identity(
            SRUN_PER_NODE | TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "1"}
        )

        assert before.attempt < after.attempt

    def test_a_restart_after_a_requeue_is_above_it(self):
        requeued = SRUN_PER_NODE | TORCHRUN | {"SLURM_RESTART_COUNT": "1"}

        first, second = (identity(requeued | {"TORCHELASTIC_RESTART_COUNT": count}).attempt for count in "01")

        assert first < second


class TestNode:
    def test_is_the_machines_own_name(self):
        assert "here" == identity({}).node

    def test_is_slurms_name_for_it_where_slurm_has_one(self):
        """In a container the machine's name is the container's."""
        assert "node002" == identity(SRUN_PER_NODE | TORCHRUN_ON_TWO_NODES, node="3f2a9c").node

    def test_is_what_the_environment_calls_it_before_all(self):
        """Pods have a host name each, and one machine."""
        assert "gpu-7" == identity(SRUN | TORCHRUN | {"SIDESTEP_NODE": "gpu-7"}, node="pod-3f2a9c").node

    def test_is_not_the_login_nodes_name_that_a_job_carries_along(self):
        assert "here" == identity({"HOSTNAME": "login1"}).node

    def test_is_not_the_first_nodes_name_that_mpiexec_carries_to_the_others(self):
        assert "here" == identity(JOB_SCRIPT | HYDRA).node

    def test_is_the_environments_where_the_machine_has_none(self):
        assert "train-5" == identity(INDEXED_JOB, node="").node


class TestAlone:
    def test_a_process_without_a_rank_is_a_launch_of_its_own(self):
        expected = Identity(rank=0, world=1, local_rank=0, node="here", pid=20, launch="20-started20", attempt=0)

        assert expected == identity({})

    def test_a_world_without_a_rank_is_not_waited_for(self):
        assert 1 == identity({"WORLD_SIZE": "8"}).world

    def test_a_launch_can_be_named(self):
        assert "mine" == identity(TORCHRUN, launch="mine").launch


class TestBadValues:
    @pytest.mark.parametrize("raw", ["abc", "-1", "1.5", "9" * 30])
    def test_are_said_once_and_passed_over(self, raw: str):
        said: list[str] = []

        who = identity(OPENMPI_4 | {"RANK": raw}, said=said)

        assert 5 == who.rank
        assert 1 == len(said)
        assert f"RANK={raw!r}" in said[0]

    @pytest.mark.parametrize("launcher", [*LAUNCHERS, ALONE], ids=lambda launcher: launcher.name)
    def test_of_all_variables_of_a_launcher_are_each_said_once_at_most(self, launcher: Any):
        said: list[str] = []
        names = {*launcher.rank, *launcher.world, *launcher.local, *launcher.local_world, *launcher.node_rank}

        identity(dict.fromkeys(names | {"LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"}, "nan"), said=said)

        assert said
        assert len(set(said)) == len(said)

    def test_empty_values_are_none(self):
        assert identity({}) == identity(dict.fromkeys(SRUN | TORCHRUN | INDEXED_JOB, ""))

    def test_a_world_smaller_than_the_rank_is_made_large_enough(self):
        assert 4 == identity(TORCHRUN | {"WORLD_SIZE": "1"}).world

    def test_names_fit_the_wire(self):
        who = identity(SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x" * 1000, "SLURMD_NODENAME": "y" * 1000})

        assert (512, 512) == (len(who.launch), len(who.node))

    def test_braces_in_a_value_are_nothing_special(self):
        assert "{RANK}" == identity(TORCHRUN | {"TORCHELASTIC_RUN_ID": "{RANK}"}).launch


class TestStartOfAProcess:
    def test_is_a_number_that_stays(self):
        assert start_of(os.getpid()).isdecimal()
        assert start_of(os.getpid()) == start_of(os.getpid())

    def test_of_one_that_is_not_there_is_zero(self):
        assert "0" == start_of(2**22 + 1)


def test_the_commands_above_a_process_are_its_own_and_its_ancestors():
    code = "import os, sys; from sidestep.ranks import commands_above; print(list(commands_above(os.getpid())))"
    told = subprocess.run([sys.executable, "-c", code, "mine"], capture_output=True, text=True, timeout=60).stdout

    own, parent, *_ = ast.literal_eval(told)
    assert [sys.executable, "-c", code, "mine", ""] == own
    assert parent == next(iter(commands_above(os.getpid())))
    assert [] == list(commands_above(2**22 + 1))
