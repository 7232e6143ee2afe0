"""How the commands of a job find each other: whose files are believed, and who may read them."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from sidestep.endpoint import KeyFile
from sidestep.errors import SettingsError
from sidestepd.clients import read_clients
from sidestepd.config import Config
from sidestepd.job import Place
from sidestepd.meeting import LEAST_SECRET_CHARS, SECRET, Meeting
from sidestepd.rundir import make_below

WORD = "w" * LEAST_SECRET_CHARS


def place(node: int = 0) -> Place:
    return Place(job="job-1", node=f"n{node}", first=node == 0, nodes=2, tasks=1, master="h0")


def meeting(folder: Path, node: int = 0, secret: str = "") -> Meeting:
    config = Config.load(environ={}, overrides={"run.dir": str(folder)})
    return Meeting(place(node), config, {SECRET: secret} if secret else {})


def options(folder: Path, **overrides: object) -> Config:
    return Config.load(environ={}, overrides={"run.dir": str(folder), **overrides})


def clear_until(stop: Event, folder: Path, cleared: list[Path]) -> None:
    """Remove it whenever it is there and empty, and note that."""
    while not stop.is_set():
        try:
            folder.rmdir()
        except OSError:
            continue
        cleared.append(folder)


class TestAFolderThatIsShared:
    def test_has_keys_that_nobody_else_can_read(self, tmp_path: Path):
        first = meeting(tmp_path)

        first.open(options(tmp_path))

        assert 0o700 == stat.S_IMODE(first.folder.stat().st_mode)
        assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in first.folder.iterdir()}
        client = KeyFile.read(first.key_file)
        assert (KeyFile.read(first.folder / "server.key").pair.public,) == client.servers
        assert {client.pair.public: "client"} == read_clients(first.folder / "clients")

    def test_that_others_can_enter_is_refused(self, tmp_path: Path):
        first = meeting(tmp_path)
        first.folder.mkdir(parents=True)
        first.folder.chmod(0o755)

        with pytest.raises(SettingsError, match="open to others"):
            first.open(options(tmp_path))

    def test_is_believed_only_when_the_daemon_answers(self, tmp_path: Path):
        first, other = meeting(tmp_path), meeting(tmp_path, 1)
        first.open(options(tmp_path))
        context = {"address": "ipc:///nowhere", "run_id": "old"}
        (first.folder / "context.json").write_text(json.dumps(context))

        assert other.find(0.0) is None

    def test_has_new_keys_at_each_start(self, tmp_path: Path):
        first = meeting(tmp_path)
        first.open(options(tmp_path))
        before = KeyFile.read(first.key_file).pair.public
        (first.folder / "context.json").write_text("{}")

        first.open(options(tmp_path))

        assert before != KeyFile.read(first.key_file).pair.public
        assert not (first.folder / "context.json").exists()

    def test_is_gone_with_the_job(self, tmp_path: Path):
        first = meeting(tmp_path)
        first.open(options(tmp_path))

        first.clear(complete=False)

        assert [] == list((tmp_path / "sidestep-runs").iterdir())

    def test_is_made_whatever_other_jobs_clear_meanwhile(self, tmp_path: Path):
        """The folder of all jobs goes with the last of them."""
        folder, stop, cleared = tmp_path / ".jobs" / "job", Event(), []
        with ThreadPoolExecutor(1) as others:
            clearing = others.submit(clear_until, stop, folder.parent, cleared)
            try:
                made = 0
                while made < 100 or not cleared:
                    make_below(folder, exist_ok=False)
                    folder.rmdir()
                    made += 1
            finally:
                stop.set()

        clearing.result()

    def test_is_the_first_nodes_to_clear(self, tmp_path: Path):
        first, other = meeting(tmp_path), meeting(tmp_path, 1)
        first.open(options(tmp_path))

        other.clear(complete=True)

        assert first.key_file.exists()

    def test_lets_others_in_at_any_free_port(self, tmp_path: Path):
        listen = meeting(tmp_path).open(options(tmp_path)).listen

        assert (("tcp://*:0",), "h0") == (listen.tcp, listen.advertise)

    def test_says_where_it_is_itself_and_not_which_node_is_listed_first(self, tmp_path: Path):
        """Tasks may be laid out so that the first of them is on another node than the first of the list."""
        slurm = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURMD_NODENAME": "n3"}
        first = replace(place(), master=None)

        told = [
            Meeting(first, options(tmp_path), slurm | more).open(options(tmp_path)).listen.advertise
            for more in ({}, {"MASTER_ADDR": "n1-ib"})
        ]

        assert ["n3", "n1-ib"] == told

    def test_leaves_what_was_said_of_that_alone(self, tmp_path: Path):
        said = options(tmp_path, **{"listen.tcp": "tcp://127.0.0.1:7712"})

        assert said == meeting(tmp_path).open(said)


class TestHowManyNodesThereAre:
    """With tasks on nodes as mpirun tells of them: how many there are in all, and how many here."""

    def test_follows_from_the_tasks_of_those_that_came(self, tmp_path: Path):
        """One task on the first node and four on the other: by its own the first would expect four others."""
        first, other = (
            Meeting(replace(place(node), tasks=tasks, nodes=-(-5 // tasks), guessed_of=5), options(tmp_path), {})
            for node, tasks in enumerate((1, 4))
        )
        first.open(options(tmp_path))

        before = first.others()
        other.come()

        assert (1, 1) == (before, first.others())

    def test_is_more_than_came_while_tasks_are_missing(self, tmp_path: Path):
        it = place()
        first, other = (
            Meeting(replace(it, node=name, tasks=1, nodes=3, guessed_of=3), options(tmp_path), {})
            for name in ("a", "b")
        )
        first.open(options(tmp_path))

        other.come()

        assert 2 == first.others()

    def test_is_at_least_how_many_came_where_nobody_says(self, tmp_path: Path):
        first, other = (Meeting(replace(place(node), nodes=None), options(tmp_path), {}) for node in range(2))
        first.open(options(tmp_path))

        before = first.others()
        other.come()

        assert (0, 1) == (before, first.others())


class TestThePort:
    @pytest.mark.parametrize("said", ["http", "0", "70000"])
    def test_that_is_none_is_named(self, tmp_path: Path, said: str):
        with pytest.raises(SettingsError, match=f"SIDESTEP_PORT = '{said}': must be a port"):
            Meeting(place(), options(tmp_path), {"SIDESTEP_PORT": said})


class TestASecret:
    def test_leaves_no_keys_on_a_node_that_handed_on_everything(self, tmp_path: Path):
        other = meeting(tmp_path, 1, WORD)
        other.open(options(tmp_path))

        other.clear(complete=False)
        kept = other.key_file.exists()
        other.clear(complete=True)

        assert (True, False) == (kept, other.folder.exists())

    def test_makes_the_same_keys_in_folders_that_are_not_shared(self, tmp_path: Path):
        first, other = meeting(tmp_path / "a", 0, WORD), meeting(tmp_path / "b", 1, WORD)

        listen = first.open(options(tmp_path / "a")).listen
        assert other.find(0.0) is None

        server, client = KeyFile.read(listen.key_file), KeyFile.read(other.key_file)
        assert (server.pair.public,) == client.servers
        assert [client.pair.public] == list(read_clients(listen.clients))
        assert WORD not in "".join(path.read_text() for path in first.folder.iterdir())
        assert ("tcp://h0:7711", None) == (other.later().address, other.later().context)

    def test_of_others_makes_others(self, tmp_path: Path):
        one, other = meeting(tmp_path / "a", 0, WORD), meeting(tmp_path / "b", 0, f"{WORD}!")
        for it in (one, other):
            it.open(options(tmp_path))

        assert KeyFile.read(one.key_file).servers != KeyFile.read(other.key_file).servers

    def test_that_could_be_guessed_is_refused(self, tmp_path: Path):
        with pytest.raises(SettingsError, match="8 characters: 32 at least"):
            meeting(tmp_path, 0, "password")
