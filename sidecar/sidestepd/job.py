"""Which of the commands of a job this one is: those that one launcher started together, on one node or on many.

- `sidestep run` may be started once on each node, or once for each rank; who of them has a daemon, and whose
  daemon makes the run, follows from what the launcher says to each
- a torchrun inside the command counts too: by its own options it is known that it is one of several
- all commands of a job find the same name for it, which nobody else uses, and which a later start does not share
- the environment and the command's words in, values out: nothing is asked, nothing waits
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidestep.ranks import Here, identify, is_on_one_node

_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_LAUNCH_ELSEWHERE = ("srun", "mpirun", "mpiexec", "mpiexec.hydra", "prun")
_ON_ONE_NODE = frozenset({"-N1", "--nodes=1"})
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of the commands of a job. `nodes` and `tasks`, those of this node, are None where nobody says."""

    job: str
    """The name of the job, as a directory may be called."""
    node: str
    first: bool
    """Whether the run is made here: this is on node 0, and has its daemon."""
    hosts: bool = True
    """Whether this one has the daemon of its node; the others join it."""
    nodes: int | None = None
    tasks: int | None = None
    guessed_of: int | None = None
    """How many tasks the job has, where `nodes` only follows from that: there may be more elsewhere than here."""
    master: str | None = None
    """The host of node 0, where the command says it."""

    @property
    def alone(self) -> bool:
        """Whether there is no other node."""
        return self.nodes == 1


def place_of(
    environ: Mapping[str, str],
    words: Sequence[str],
    here: Here,
    *,
    is_here: Callable[[str], bool] = lambda _: False,
) -> Place | None:
    """Which command of its job this is, None for one that is by itself. `is_here`: whether a host is this node."""
    found = identify(environ, here, warn=lambda _: None, modules={})
    index_alone = environ.get("JOB_COMPLETION_INDEX") and not (environ.get("WORLD_SIZE") or environ.get("RANK"))
    if found.world > 1 and not index_alone:
        nodes, is_guess = _nodes(environ, found.world)
        return Place(
            job=_name(f"{found.launch}~{found.attempt}"),
            node=found.node,
            first=found.rank == 0,
            hosts=found.local_rank == 0,
            nodes=nodes,
            tasks=_tasks(environ, found.world, nodes),
            guessed_of=found.world if is_guess else None,
        )
    return _by_torchrun(environ, words, here.node, is_here) or _by_index(environ, here.node)


def _nodes(environ: Mapping[str, str], world: int) -> tuple[int | None, bool]:
    """How many nodes the tasks of a launcher are on; and whether that holds only if all have as many as this."""
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "FLUX_JOB_NNODES", "GROUP_WORLD_SIZE", "NNODES"):
        if nodes := _number(environ.get(name)):
            return nodes, False
    if is_on_one_node(environ, world):
        return 1, False
    if per_node := _local_world(environ):
        return -(-world // per_node), True
    has_places = any(environ.get(name) for name in _LOCAL_RANK)
    return None if has_places else world, False  # who numbers no places on a node has one command on each


def _tasks(environ: Mapping[str, str], world: int, nodes: int | None) -> int | None:
    """How many commands of the job are on this node."""
    node = _number(environ.get("SLURM_NODEID"))
    per_node = _per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "")
    if node is not None and node < len(per_node):
        return per_node[node]
    return _local_world(environ) or (world if nodes == 1 else 1 if nodes == world else None)


_LOCAL_RANK = (
    "LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID", "JSM_NAMESPACE_LOCAL_RANK", "PMI_LOCAL_RANK",
)  # fmt: skip
_LOCAL_WORLD = (
    "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS",
    "PALS_LOCAL_SIZE", "JSM_NAMESPACE_LOCAL_SIZE", "PMI_LOCAL_SIZE",
)  # fmt: skip


def _local_world(environ: Mapping[str, str]) -> int | None:
    return next((count for name in _LOCAL_WORLD if (count := _number(environ.get(name)))), None)


def _per_node(said: str) -> list[int]:
    """SLURM's `2(x3),1`: so many tasks on each node."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", said):
        counts += [int(count)] * min(int(times or 1), 1_000_000)
    return counts


def _by_torchrun(
    environ: Mapping[str, str], words: Sequence[str], node: str, is_here: Callable[[str], bool]
) -> Place | None:
    """A torchrun on each of several nodes, started by hand or by something that numbers nothing."""
    at = next((at for at, word in enumerate(words, 1) if word.rsplit("/", 1)[-1] in _TORCHRUN), None)
    if at is None:
        return None
    said = _Torchrun(environ, words[at:])
    if said("standalone"):
        return None
    nodes = [_number(part) or 1 for part in said("nnodes", "1").split(":")]
    if max(nodes) < 2:
        return None
    endpoint = said("rdzv_endpoint") or f"{said('master_addr', '127.0.0.1')}:{said('master_port', '29500')}"
    master = endpoint.rpartition(":")[0].strip("[]") or endpoint
    rank = _number(said("node_rank", environ.get("JOB_COMPLETION_INDEX", "")))
    named = said("rdzv_id", "none")
    job = endpoint if named == "none" else f"{named}@{endpoint}"
    return Place(
        job=_name(f"torchrun {job}"),
        node=node,
        first=rank == 0 if rank is not None else is_here(master),
        nodes=nodes[0] if len(nodes) == 1 else None,
        tasks=1,
        master=None if master in _LOCAL else master,
    )


class _Torchrun:
    """Options of torchrun: what its words say, up to the training's own, else the environment."""

    _ALONE = frozenset({"standalone", "m", "module", "no_python", "run_path", "virtual_local_rank", "use_env"})
    """Those with no word after them."""

    def __init__(self, environ: Mapping[str, str], words: Sequence[str]) -> None:
        self._environ = environ
        self._said: dict[str, str] = {}
        left = iter(words)
        for word in left:
            name, equals, value = word.partition("=")
            if not name.startswith("-"):
                break  # the training, and what follows is for that
            name = name.lstrip("-").replace("-", "_")
            self._said[name] = value if equals else "1" if name in self._ALONE else next(left, "")

    def __call__(self, name: str, default: str = "") -> str:
        return self._said.get(name) or self._environ.get(f"PET_{name.upper()}") or default


def _by_index(environ: Mapping[str, str], node: str) -> Place | None:
    """A pod of an indexed job, which says nothing of how many there are."""
    index = _number(environ.get("JOB_COMPLETION_INDEX"))
    if index is None:
        return None
    pods = node.partition(".")[0].removesuffix(f"-{index}")
    nodes = _number(environ.get("NNODES"))
    return Place(job=_name(f"pods {pods}"), node=node, first=index == 0, nodes=nodes, tasks=1)


def starts_elsewhere(environ: Mapping[str, str], words: Sequence[str]) -> str | None:
    """The launcher in the command whose tasks are on other nodes of this job too, where our socket is no use."""
    nodes = _number(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES"))
    program = words[0].rsplit("/", 1)[-1]
    if (nodes or 1) < 2 or program not in _LAUNCH_ELSEWHERE or not _ON_ONE_NODE.isdisjoint(words):
        return None
    return program


def _name(said: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9]+", "-", said).strip("-")[:32].strip("-")
    return f"{stem}-{hashlib.sha256(said.encode(errors='surrogateescape')).hexdigest()[:12]}"


def _number(raw: str | None) -> int | None:
    raw = (raw or "").strip()
    return int(raw) if raw.isdecimal() and len(raw) < 10 else None
