"""Which process this is: its rank, and the launch it was started in.

Every launcher sets variables, and its processes inherit those of the launchers around it: a worker of a `torchrun`
that is itself a task of `srun` sees both. `LAUNCHERS` is ordered from the innermost outwards, and the first that
gives a rank is believed in everything: no identity is patched together from two of them.

- pure: the environment, the loaded modules, the pid, and ways to look at the processes above come in as arguments;
  nothing is imported to be asked
- a value that is no number is said once and passed over; nothing is raised
- the processes that one command started together have the same launch, on whatever node they are
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep import lives
from sidestep.notices import say
from sidestep.spill import own_folder
from sidestep.wire import MAX_NAME_CHARS

REQUEUED = 1000
"""Attempts that one requeue of the job counts for, where its launcher counts restarts of its own from 0 again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a session says of the process it belongs to."""

    rank: int
    world: int
    local_rank: int
    node: str
    pid: int
    launch: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What a process knows without its environment: where it is, and how to look at the processes above it."""

    pid: int
    parent: int
    node: str
    """The machine's own name."""
    started: Callable[[int], str]
    """When a process began."""
    above: Callable[[int], Iterable[Sequence[str]]]
    """The words of a process's command and of those it descends from, the nearest first."""
    lives: Callable[[str], int] = lambda _: 0
    """Which life of the process of a local rank this is under a torchrun, from 1 on; 0 where nobody can tell."""

    @classmethod
    def now(cls) -> Here:
        """Of this process."""
        node = os.uname().nodename
        return cls(
            pid=os.getpid(), parent=os.getppid(), node=node, started=start_of, above=commands_above, lives=_lives
        )

    def born(self, leader: int) -> str:
        """A name for a process that no other one has or had."""
        return f"{leader}-{self.started(leader)}"


def identify(
    environ: Mapping[str, str],
    here: Here,
    *,
    launch: str | None = None,
    warn: Callable[[str], None] = say,
    modules: Mapping[str, Any] = sys.modules,
) -> Identity:
    """Say who this process is. `launch` overrides what was found."""
    said = _Said(environ, warn)
    launcher, rank = _started_by(said)
    world = said.number(*launcher.world) or 1
    spawned = _torch_ranks(modules) or _ray_ranks(modules, said)
    if spawned is not None:
        rank, world = spawned.rank, spawned.world
    if launcher is ALONE and spawned is None:
        found = here.born(here.pid)
    else:
        found = _launch(said, launcher, world, here) or (spawned and spawned.launch) or here.born(here.parent)
    local_rank = said.number(*launcher.local, "LOCAL_RANK")
    if local_rank is None and spawned is not None:
        local_rank = spawned.local_rank
    return Identity(
        rank=rank,
        world=max(world, rank + 1),
        local_rank=local_rank or 0,
        node=(said.text(NODE, *launcher.node) or here.node or said.text("HOSTNAME"))[:MAX_NAME_CHARS],
        pid=here.pid,
        launch=(launch or found)[:MAX_NAME_CHARS],
        attempt=_attempt(said, launcher, here),
    )


def is_on_one_node(environ: Mapping[str, str], world: int) -> bool:
    """Whether all processes of the launch are known to be on this node."""
    if world == 1:
        return True
    said = _Said(environ, lambda _: None)
    launcher, _ = _started_by(said)
    if launcher is ALONE:  # somebody who numbers its processes itself, and meets at home
        return said.text("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1")
    return _is_on_one_node(said, launcher, world)


NODE = "SIDESTEP_NODE"
"""What the machine is called, where containers of it have each a host name of their own."""


def pid_namespace() -> str:
    """Of which pid namespace our pids are numbers, where the kernel tells: each container of a pod has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When a process started, in ticks since boot: with its pid it is unique, where /proc exists."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    return status.rpartition(")")[2].split()[19]


def parent_of(pid: int) -> int:
    """The process that started another one; 0 where nobody can tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _lives(local_rank: str) -> int:
    return lives.count(local_rank, folder=own_folder(), started=start_of, parent_of=parent_of)


def commands_above(pid: int) -> Iterator[list[str]]:
    """The words of a process's command and of those it descends from, the nearest first, where /proc exists."""
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return
        yield words.decode(errors="replace").split("\0")
        pid = parent_of(pid)


class _Said:
    """What the environment says. An empty value is none."""

    def __init__(self, environ: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self._environ = environ
        self.warn = warn
        self._bad: set[str] = set()

    def text(self, *names: str) -> str:
        """The first of these that is set."""
        return next((text for name in names if (text := self._environ.get(name, "").strip())), "")

    def number(self, *names: str) -> int | None:
        """The first of these that is a rank or a count."""
        for name in names:
            raw = self.text(name)
            if _is_number(raw):
                return int(raw)
            if raw and name not in self._bad:
                self._bad.add(name)
                self.warn(f"{name}={raw!r:.80} is no rank or count: it is passed over")
        return None

    def fill(self, template: str, more: Mapping[str, str]) -> str:
        """The template with its variables in place; nothing if one of them is not set."""
        values = {name: more.get(name) or self.text(name) for name in re.findall(r"{(\w+)}", template)}
        return template.format_map(values) if all(values.values()) else ""


def _is_number(raw: str) -> bool:
    return raw.isdecimal() and len(raw) < 10


def _always(_: _Said) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """One way to start processes, and the variables it leaves to each of them; of several the first counts."""

    name: str
    rank: tuple[str, ...] = ()
    """The place among all processes."""
    world: tuple[str, ...] = ()
    """How many processes there are."""
    local: tuple[str, ...] = ()
    """The place among the processes of the node."""
    local_world: tuple[str, ...] = ()
    """How many processes there are on the node."""
    node_rank: tuple[str, ...] = ()
    """The node's place among the nodes: the rank is worked out from it where none is given."""
    node: tuple[str, ...] = ()
    """The node's name, where the launcher sets it there, and does not carry it over from another node."""
    launch: tuple[str, ...] = ()
    """What only the processes started together have in common. `{POD_SET}` is the name of an indexed job."""
    proxy: str = ""
    """Else an option of the launcher's process on each node: its value is the same on all of them."""
    restarts: tuple[str, ...] = ()
    """How often the launcher started its processes again."""
    when: Callable[[_Said], bool] = _always
    """Whether the variables are this launcher's, and mean this process."""
    final: bool = False
    """Where this launcher is, none around it is asked, even if its own variables are of no use."""


def _under_torchrun(said: _Said) -> bool:
    return bool(said.text("TORCHELASTIC_RUN_ID"))


def _is_task_of_srun(said: _Said) -> bool:
    """Whether SLURM's rank is this process's, and not that of a task or a job script which started it.

    A job script and an interactive shell are rank 0 of a job of so many tasks, though they are none of them: they
    have no step, or one of SLURM's reserved numbers (-5, or 4294967291). Containers are often handed only a few
    variables, without the step; then a job of several tasks counts.
    """
    if said.text("RAY_JOB_ID"):
        return False  # ray's workers inherit the task in which ray itself was started on their node
    tasks, others = said.number(*SLURM_TASKS), said.number("WORLD_SIZE")
    if said.text("LOCAL_RANK") and others is not None and others != tasks:
        return False  # somebody started `others` processes within the tasks
    if step := said.text("SLURM_STEP_ID", "SLURM_STEPID"):
        return _is_number(step)
    return (tasks or 1) > 1 and not said.text("SLURM_SUBMIT_DIR")


MASTER = "{MASTER_ADDR}:{MASTER_PORT}"
JOBS = ("{SLURM_JOB_ID}", "{PBS_JOBID}", "{LSB_JOBID}")
SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")

LAUNCHERS: tuple[Launcher, ...] = (
    Launcher(
        name="torchrun",  # and `accelerate launch`, which is torchrun inside
        rank=("RANK",),
        world=("WORLD_SIZE",),
        local=("LOCAL_RANK",),
        local_world=("LOCAL_WORLD_SIZE",),
        node_rank=("GROUP_RANK",),
        node=("SLURMD_NODENAME",),
        launch=("{TORCHELASTIC_RUN_ID}",),
        restarts=("TORCHELASTIC_RESTART_COUNT",),
        when=_under_torchrun,
        final=True,
    ),
    Launcher(
        name="torch's variables",  # deepspeed, composer, Ray Train, Kubeflow, and scripts that set them by hand
        rank=("RANK",),
        world=("WORLD_SIZE",),
        local=("LOCAL_RANK",),
        local_world=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        node=("SLURMD_NODENAME",),
        launch=(MASTER,),
    ),
    Launcher(
        name="Open MPI",
        rank=("OMPI_COMM_WORLD_RANK",),
        world=("OMPI_COMM_WORLD_SIZE",),
        local=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_world=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        launch=("{OMPI_MCA_ess_base_jobid}", "{PMIX_NAMESPACE}"),
    ),
    Launcher(
        name="MVAPICH2",
        rank=("MV2_COMM_WORLD_RANK",),
        world=("MV2_COMM_WORLD_SIZE",),
        local=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_world=("MV2_COMM_WORLD_LOCAL_SIZE",),
        proxy="--control-port",  # its mpiexec is MPICH's
    ),
    Launcher(
        name="PALS",
        rank=("PALS_RANKID",),
        world=("PALS_SIZE", "PALS_NRANKS", "PMI_SIZE"),
        local=("PALS_LOCAL_RANKID",),
        local_world=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        launch=("{PALS_APID}",),
    ),
    Launcher(
        name="MPICH's Hydra",  # and Intel MPI; `srun --mpi=pmi2` sets PMI_RANK too, but not the place on the node
        rank=("PMI_RANK",),
        world=("PMI_SIZE",),
        local=("MPI_LOCALRANKID",),
        local_world=("MPI_LOCALNRANKS",),
        launch=("{I_MPI_HYDRA_UUID}",),
        proxy="--control-port",
        when=lambda said: bool(said.text("MPI_LOCALRANKID")),
    ),
    Launcher(
        name="Flux",
        rank=("FLUX_TASK_RANK",),
        world=("FLUX_JOB_SIZE",),
        local=("FLUX_TASK_LOCAL_ID",),
        launch=("{FLUX_JOB_ID}",),
    ),
    Launcher(
        name="JSM",
        rank=("JSM_NAMESPACE_RANK",),
        world=("JSM_NAMESPACE_SIZE",),
        local=("JSM_NAMESPACE_LOCAL_RANK",),
        launch=("{LSB_JOBID}.{PMIX_NAMESPACE}", "{LSB_JOBID}"),
    ),
    Launcher(
        name="SLURM",
        rank=("SLURM_PROCID",),
        world=SLURM_TASKS,
        local=("SLURM_LOCALID",),
        node=("SLURMD_NODENAME",),
        launch=(
            "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}.{SLURM_STEP_ID}",
            "{SLURM_JOB_ID}.{SLURM_STEP_ID}",
            "{SLURM_JOB_ID}",
        ),
        when=_is_task_of_srun,
    ),
    Launcher(
        name="PMIx",
        rank=("PMIX_RANK",),
        launch=("{PMIX_NAMESPACE}",),
        when=lambda said: not said.text("PMIX_NAMESPACE").startswith("slurm."),  # those of srun were judged above
    ),
    Launcher(
        name="PMI",
        rank=("PMI_RANK",),
        world=("PMI_SIZE",),
        local=("PMI_LOCAL_RANK",),
        local_world=("PMI_LOCAL_SIZE",),
        launch=("{PMI_JOBID}",),
        when=lambda said: not said.text("SLURM_STEP_ID"),  # the same
    ),
    Launcher(
        name="LOCAL_RANK alone",  # lightning's subprocesses, and launchers older than torchrun
        world=("WORLD_SIZE",),
        local=("LOCAL_RANK",),
        local_world=("LOCAL_WORLD_SIZE",),
        node_rank=("NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"),
        node=("SLURMD_NODENAME",),
        launch=(MASTER, "{POD_SET}"),
        when=lambda said: bool(said.text("LOCAL_RANK")),
    ),
    Launcher(
        name="a Kubernetes indexed job",  # the index is the pod's: a node, as far as ranks go
        world=("WORLD_SIZE", "NNODES"),
        local_world=("LOCAL_WORLD_SIZE",),
        node_rank=("JOB_COMPLETION_INDEX",),
        launch=(MASTER, "{POD_SET}"),
    ),
)
"""From the innermost outwards. A scheduler more is an entry more."""

ALONE = Launcher(name="nobody", node=("SLURMD_NODENAME",))
"""A process that no launcher we know has numbered."""


def _started_by(said: _Said) -> tuple[Launcher, int]:
    for launcher in LAUNCHERS:
        if not launcher.when(said):
            continue
        rank = said.number(*launcher.rank)
        if rank is None and launcher.node_rank:
            rank = _rank_by_node(said, launcher)
        if rank is not None or launcher.final:
            return launcher, rank or 0
    return ALONE, 0


def _rank_by_node(said: _Said, launcher: Launcher) -> int | None:
    """The rank from the node's place and the process's place there, as all launchers number their processes."""
    node, local = said.number(*launcher.node_rank), said.number(*launcher.local)
    if node is None:
        return local
    per_node = said.number(*launcher.local_world)
    if per_node is None and (nodes := said.number("NNODES", "SLURM_NNODES")):
        per_node = (said.number(*launcher.world) or 0) // nodes
    if not per_node and node and local is not None:
        said.warn(f"node {node}, process {local} there: without LOCAL_WORLD_SIZE or NNODES the rank is a guess")
    return node * (per_node or (local or 0) + 1) + (local or 0)


def _launch(said: _Said, launcher: Launcher, world: int, here: Here) -> str:
    """The launch's name, from what the launcher, the place to meet, or the job has; else nothing.

    Nothing also where all are known to be on one node: there their parent, the launcher, is the better name, since
    a port and a job may see a second launch.
    """
    index = said.text("JOB_COMPLETION_INDEX")  # the pods of the job `train` are named train-0, train-1, and so on
    more = {"POD_SET": here.node.removesuffix(f"-{index}")} if index else {}
    for template in launcher.launch:
        if (name := said.fill(template, more)) not in ("", "none"):  # "none" is torchrun's default
            return name
    if launcher.proxy and (name := _option(here.above(here.parent), launcher.proxy)):
        return name
    if _is_on_one_node(said, launcher, world):
        return ""
    return next(filter(None, (said.fill(template, {}) for template in (MASTER, *JOBS))), "")


def _option(commands: Iterable[Sequence[str]], name: str) -> str:
    """What the nearest of these commands that has this option says with it."""
    return next((words[words.index(name) + 1] for words in commands if name in words[:-1]), "")


def _is_on_one_node(said: _Said, launcher: Launcher, world: int) -> bool:
    if (said.number("GROUP_WORLD_SIZE", "NNODES") or 1) > 1:
        return False
    return (said.number(*launcher.local_world) or 0) >= world


def _attempt(said: _Said, launcher: Launcher, here: Here) -> int:
    """How often these processes were started before: it only grows, over restarts and over requeues of the job."""
    requeues, restarts = said.number("SLURM_RESTART_COUNT") or 0, said.number(*launcher.restarts)
    if restarts is not None and (said.number("GROUP_WORLD_SIZE") or 1) > 1:
        restarts = max(restarts, here.lives(said.text(*launcher.local)) - 1)
    return requeues if restarts is None else requeues * REQUEUED + restarts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spawned:
    """What a library that is loaded says of this process."""

    rank: int
    world: int
    local_rank: int | None = None
    launch: str = ""


def _torch_ranks(modules: Mapping[str, Any]) -> _Spawned | None:
    """Rank and world of torch's process group, if torch is there and has one; a world of one says nothing."""
    distributed = modules.get("torch.distributed")
    try:
        if distributed is None or not distributed.is_initialized():
            return None
        rank, world = distributed.get_rank(), distributed.get_world_size()
    except (AttributeError, RuntimeError, ValueError):  # half imported, built without it, or just torn down
        return None
    return _Spawned(rank=rank, world=world) if 0 <= rank < world > 1 else None


def _ray_ranks(modules: Mapping[str, Any], said: _Said) -> _Spawned | None:
    """What Ray Train says of this worker, if it is one: backends other than torch's set no variables.

    The workers' parent is Ray's own process on each node, so the job and the experiment name the launch.
    """
    train = modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        rank, world, local = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
        experiment = context.get_experiment_name()
    except Exception:  # noqa: BLE001 - outside a worker each version of it raises something of its own
        return None
    if type(rank) is not int or type(world) is not int or not 0 <= rank < world > 1:
        return None
    job = said.text("RAY_JOB_ID")
    return _Spawned(
        rank=rank, world=world, local_rank=local, launch=f"ray.{job}.{experiment}" if experiment else ""
    )
