"""What `sidestep doctor` finds, on this machine as it is and as options and directories make it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sidestep.spill import private_folder
from sidestepd import rundir
from sidestepd.config import Config
from sidestepd.doctor import FAIL, LOOKS, OK, WARN, Finding, examine
from sidestepd.rundir import RunFile


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of other tests, and no daemon."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SIDESTEP_ADDRESS", raising=False)


def config(here: Path, **options: object) -> Config:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return Config.load(environ={}, overrides={"run.dir": str(here), **given})


def look(what: str, here: Path, **options: object) -> list[Finding]:
    return list(examine(config(here, **options), {what: LOOKS[what]}))


class TestAMachineOnWhichARunWouldWork:
    def test_has_nothing_in_the_way(self, tmp_path: Path):
        found = list(examine(config(tmp_path)))

        assert [] == [it for it in found if it.level == FAIL]
        assert {"wandb", "directory", "disk", "socket", "GPUs", "launcher"} <= {it.what for it in found}

    def test_is_left_as_it_was(self, tmp_path: Path):
        list(examine(config(tmp_path / "not" / "there")))

        assert [] == [it for it in tmp_path.rglob("*") if not it.name.startswith("sidestep-")]


class TestWhatIsInTheWay:
    def test_is_a_directory_in_which_nothing_can_be_made(self, tmp_path: Path):
        (tmp_path / "file").touch()

        [found] = look("directory", tmp_path / "file" / "runs")

        assert (FAIL, True) == (found.level, "--dir" in found.text)

    def test_is_a_disk_that_has_less_than_is_left_free(self, tmp_path: Path):
        found = look("disk", tmp_path, spool__reserve_bytes=10**18)

        assert FAIL == found[0].level
        assert "would take nothing" in found[0].text

    def test_is_a_server_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)

        [found] = look("server", tmp_path, run__mode="online", sink__server="http://127.0.0.1:1")

        assert (FAIL, True) == (found.level, "can not be reached" in found.text)
        assert "kkkk" not in found.text

    def test_is_what_can_not_be_looked_at_and_hides_nothing_else(self, tmp_path: Path):
        def broken(_: Config) -> Iterator[Finding]:
            raise RuntimeError("oh")
            yield

        found = list(examine(config(tmp_path), {"broken": broken, "launcher": LOOKS["launcher"]}))

        assert [("broken", FAIL), ("launcher", OK)] == [(it.what, it.level) for it in found]
        assert "oh" in found[0].text

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (PermissionError(13, "Permission denied", "/runs"), "/runs: Permission denied"),
            (sqlite3.OperationalError("no such column: seal"), "SQLite says: no such column: seal"),
            (zmq.ZMQError(36, "File name too long"), "File name too long"),
        ],
        ids=["a file", "a database", "a socket"],
    )
    def test_is_told_in_words(self, tmp_path: Path, error: Exception, said: str):
        def broken(_: Config) -> Iterator[Finding]:
            raise error
            yield

        [found] = examine(config(tmp_path), {"broken": broken})

        assert f"this could not be looked at: {said}" == found.text


class TestWhatMayGoWrong:
    def test_is_an_address_where_nobody_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SIDESTEP_ADDRESS", f"ipc://{tmp_path}/nobody.sock")

        [found] = look("daemon", tmp_path)

        assert (WARN, True) == (found.level, "nobody answers" in found.text)

    def test_is_what_earlier_runs_left(self, tmp_path: Path):
        options = config(tmp_path, run__id="old")
        run_dir = rundir.new_run_dir(options, now=0.0)
        rundir.lay_out(run_dir, options, RunFile.of(options, run_dir, f"ipc://{tmp_path}/old.sock"))
        private_folder().mkdir(parents=True)
        (private_folder() / "00.spill").touch()

        spilled, interrupted = look("left behind", tmp_path)

        assert (WARN, WARN) == (spilled.level, interrupted.level)
        assert "sidestep collect" in spilled.text
        assert f"sidestep drain {run_dir}" in interrupted.text

    def test_is_a_run_of_another_version_which_hides_no_other(self, tmp_path: Path):
        made = []
        for name in ("older", "old"):
            options = config(tmp_path, run__id=name)
            made.append(rundir.new_run_dir(options, now=0.0))
            rundir.lay_out(made[-1], options, RunFile.of(options, made[-1], f"ipc://{tmp_path}/{name}.sock"))
        older, _ = sorted(made)
        with sqlite3.connect(older / "spool.db") as database:
            database.execute("CREATE TABLE session (id, name)")

        strange, interrupted = look("left behind", tmp_path)

        assert (WARN, WARN) == (strange.level, interrupted.level)
        assert f"{older} was made by another version of sidestep, which alone can read it" == strange.text
        assert "sidestep drain" in interrupted.text

    def test_is_a_launcher_s_variable_that_is_no_rank(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("RANK", "first")
        monkeypatch.setenv("WORLD_SIZE", "2")

        found = look("launcher", tmp_path)

        assert [WARN, OK] == [it.level for it in found]
        assert "RANK='first'" in found[0].text
