"""What goes wrong on real machines, looked at before it does: a sentence for each, and whether it is in the way.

- everything is tried for real where it will be used: a database with its log, a socket, wandb's own core, NVML
- each look has a deadline and stands for itself; one that fails says so, and the next is taken
- nothing is left behind, nothing is written into a run, and no key is shown
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq

from sidestep import ranks
from sidestep.errors import SettingsError, SidestepError
from sidestep.spill import private_folder, waiting
from sidestepd import placement, rundir, status
from sidestepd.config import Config
from sidestepd.control import Control
from sidestepd.errors import Retry
from sidestepd.room import free_bytes

OK, WARN, FAIL = "ok", "warn", "fail"
MEASURED = "0.31."
"""The wandb that the sink was measured against."""
DEADLINE_S = 20.0
ANSWER_S = 2.0
SLOW_COMMIT_S = 0.1
FEW_FILES = 1024
COMMITS = 5
_NVML = """
import json, pynvml
try:
    pynvml.nvmlInit()
    told = {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "count": pynvml.nvmlDeviceGetCount()}
except pynvml.NVMLError as error:
    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    told = {"why": str(error), "absent": error.value in absent}
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen of one thing. `level`: `ok`, `warn` for what may go wrong, `fail` for what is in the way."""

    what: str
    level: str
    text: str


Look = Callable[[Config], Iterator[Finding]]


def examine(config: Config, looks: Mapping[str, Look] | None = None) -> Iterator[Finding]:
    """Look at everything that a run with these options would need here."""
    for what, look in (LOOKS if looks is None else looks).items():
        try:
            yield from look(config)
        except Exception as error:  # noqa: BLE001 - one thing that can not be looked at must not hide the others
            yield Finding(what, FAIL, f"this could not be looked at: {_said_of(error)}")


def _said_of(error: Exception) -> str:
    """What went wrong, for people; a mistake of ours by its name too."""
    match error:
        case SidestepError():
            return str(error)
        case OSError(strerror=str(why), filename=str(path)):
            return f"{path}: {why}"
        case OSError(strerror=str(why)) | zmq.ZMQError(strerror=why):
            return why
        case sqlite3.Error():
            return f"SQLite says: {error}"
    return f"a mistake in sidestep itself, please report it ({type(error).__name__}: {error})"


def _wandb(config: Config) -> Iterator[Finding]:
    if config.sink.kind != "wandb":
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        yield Finding("wandb", FAIL, "wandb is not installed: pip install 'sidestep[daemon]'")
        return
    version = importlib.metadata.version("wandb")
    known = version.startswith(MEASURED)
    doubt = "" if known else f": rows were only seen to be safe with {MEASURED}x, pip install 'wandb=={MEASURED}*'"
    yield Finding("wandb", OK if known else WARN, f"wandb {version}{doubt}")
    core = Path(spec.origin).parent / "bin" / "wandb-core"
    try:  # it says how it is used, and its version, and ends
        subprocess.run([core, "--help"], capture_output=True, timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("wandb-core", FAIL, f"{core} can not be run: {error}")


def _server(config: Config) -> Iterator[Finding]:
    if config.sink.kind != "wandb" or config.run.mode != "online":
        return
    from sidestepd.sinks.wandb_server import Server  # imports wandb, which takes a second

    url = config.sink.server or "https://api.wandb.ai"
    try:
        Server(url).held(config.run.id or "doctor", config.run.project, config.run.entity)
    except Retry as why:
        yield Finding("server", FAIL, str(why))
    else:
        yield Finding("server", OK, f"{url} answers, and takes the key")


def _directory(config: Config) -> Iterator[Finding]:
    base = config.run.dir.expanduser().absolute()
    there = next(path for path in (base, *base.parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=there, prefix="sidestep-doctor-").cleanup()
    except OSError as error:
        yield Finding("directory", FAIL, f"runs can not be made in {base}: {there}: {error.strerror} (--dir)")
        return
    kind = placement.file_system(there, placement.read_mounts())
    if not placement.is_network(kind):
        yield Finding("directory", OK, f"runs are made in {base / rundir.RUNS}")
        return
    place = placement.choose(there / "doctor", config.spool.dir)
    if place == there / "doctor":
        text = f"{base} is on a network file system ({kind}), and no local disk is to be had: set spool.dir"
        yield Finding("directory", FAIL, text)
        return
    yield Finding("directory", OK, f"{base} is on a network file system ({kind}): records wait in {place.parent}")


def _disk(config: Config) -> Iterator[Finding]:
    base = config.run.dir.expanduser().absolute()
    base = next(path for path in (base, *base.parents) if path.exists())
    place = placement.choose(base / "doctor", config.spool.dir)
    place = next(path for path in place.parents if path.exists())
    for disk in dict.fromkeys((base, place)):
        free, reserve = free_bytes(disk), config.spool.reserve_bytes
        text = f"{free / 1e9:.1f} GB free at {disk}"
        if free <= 2 * reserve:
            yield Finding("disk", FAIL, f"{text}: less than the daemon leaves free, so it would take nothing")
        else:
            few = free < config.spool.max_bytes
            yield Finding("disk", WARN if few else OK, text + (": less than spool.max_bytes" if few else ""))
    if placement.file_system(place, placement.read_mounts()) in placement.IN_MEMORY:
        yield Finding("disk", WARN, f"{place} is in memory: what waits there does not outlive the machine")
    seconds = _seconds_of_a_commit(place)
    slow = "; each acknowledgement waits for one" if seconds > SLOW_COMMIT_S else ""
    yield Finding("disk", WARN if slow else OK, f"a commit takes {seconds * 1000:.1f} ms at {place}{slow}")


def _seconds_of_a_commit(place: Path) -> float:
    """The median, of a database as the spool is one."""
    times = []
    with tempfile.TemporaryDirectory(dir=place, prefix="sidestep-doctor-") as folder:
        database = sqlite3.connect(Path(folder) / "spool.db")
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("CREATE TABLE entry (body BLOB)")
            for _ in range(COMMITS):
                before = time.monotonic()
                with database:
                    database.execute("INSERT INTO entry VALUES (?)", (bytes(4096),))
                times.append(time.monotonic() - before)
        finally:
            database.close()
    return sorted(times)[COMMITS // 2]


def _socket(config: Config) -> Iterator[Finding]:
    address = rundir.private_address(config.run.dir.expanduser().absolute() / f"doctor-{os.getpid()}")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as daemon, context.socket(zmq.DEALER) as worker:
        for one in (daemon, worker):
            one.linger = 0
        try:
            daemon.bind(address)
            worker.connect(address)
            worker.send(b"anybody?")
            heard = bool(daemon.poll(int(DEADLINE_S * 1000)))
        finally:
            rundir.clear_address(address)
    folder = Path(address.removeprefix("ipc://")).parent
    if heard:
        yield Finding("socket", OK, f"sockets work in {folder}")
    else:
        yield Finding("socket", FAIL, f"nothing passes a socket in {folder}: set XDG_RUNTIME_DIR to a local disk")


def _daemon(_: Config) -> Iterator[Finding]:
    address = os.environ.get("SIDESTEP_ADDRESS")
    if not address:
        return
    with Control(address) as control:
        answers = control.ask_status(ANSWER_S) is not None
    text = f"a daemon answers at SIDESTEP_ADDRESS={address}" if answers else f"nobody answers at {address}"
    yield Finding("daemon", OK if answers else WARN, text)


def _limits(_: Config) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FEW_FILES:
        text = f"a process may open {soft} files: with many workers that is too few (ulimit -n {hard})"
        yield Finding("limits", WARN, text)


def _gpus(config: Config) -> Iterator[Finding]:
    if not (config.samplers.enabled and config.samplers.gpu):
        return
    try:  # in a process of its own: a driver may hang in the kernel
        done = subprocess.run(
            [sys.executable, "-c", _NVML], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        told: Mapping[str, object] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield Finding("GPUs", WARN, f"NVML does not answer within {DEADLINE_S:.0f} s: is nvidia-smi well?")
    except ValueError:
        yield Finding("GPUs", WARN, f"NVML can not be asked: {done.stderr.strip()[-200:]}")
    else:
        if "count" in told:
            yield Finding("GPUs", OK, f"{told['count']} NVIDIA GPUs, driver {told['driver']}")
        elif told["absent"]:
            yield Finding("GPUs", OK, "no NVIDIA GPU here")
        else:
            yield Finding("GPUs", WARN, f"NVML fails, so GPUs will not be sampled: {told['why']}")


def _launcher(_: Config) -> Iterator[Finding]:
    warned: list[str] = []
    me = ranks.identify(os.environ, ranks.Here.now(), warn=warned.append)
    yield from (Finding("launcher", WARN, text) for text in warned)
    yield Finding("launcher", OK, f"a worker started here would be rank {me.rank} of {me.world} on {me.node}")


def _left(config: Config) -> Iterator[Finding]:
    if kept := waiting(private_folder()):
        text = f"{len(kept)} workers left records in {kept[0].parent}: `sidestep collect` hands them on"
        yield Finding("left behind", WARN, text)
    runs = (config.run.dir.expanduser().absolute() / rundir.RUNS).glob("*/run.json")
    for run_dir in sorted(path.parent for path in runs):
        try:
            interrupted = status.report(run_dir).state == "interrupted"
        except (SettingsError, OSError) as error:
            yield Finding("left behind", WARN, _said_of(error))
            continue
        if interrupted:
            yield Finding("left behind", WARN, f"a run was interrupted: `sidestep drain {run_dir}` finishes it")


LOOKS: Mapping[str, Look] = {
    "wandb": _wandb, "server": _server, "directory": _directory, "disk": _disk, "socket": _socket,
    "daemon": _daemon, "limits": _limits, "GPUs": _gpus, "launcher": _launcher, "left behind": _left,
}  # fmt: skip
"""What is looked at, in this order."""
