"""What a program is: looked up beside it, told once, and nobody's path to anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sidestep
from sidestep.program import Word
from sidestep.program_facts import without_password
from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Kind, Record
from sidestepd.beside import Beside, described_from, printed_from
from sidestepd.rows import Position
from tests.support.waiting import eventually


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(run={"id": uuid.uuid4().hex, "mode": "offline"}) as served:
        for name, value in environment(served, {}).items():
            monkeypatch.setenv(name, value)
        yield served
        sidestep.finish()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git repository with a program that was changed since its commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text("lr = 1\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["commit", "-qm", "first"],
        ["remote", "add", "origin", "https://me:secret@host/x.git"],
    ):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "src" / "train.py").write_text("lr = 2\n")
    return tmp_path


def found(**asked: Any) -> tuple[dict[str, Any], dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sidestep.program_facts"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    facts, *files = json.loads(done.stdout)
    return facts["facts"], {it["file"]: it["text"] for it in files}


class TestLookingUp:
    def test_program_commit_difference_and_packages(self, project: Path):
        facts, files = found(
            argv=["train.py", "--lr", "2"], directory=str(project / "src"), code=True, cuda="12.4"
        )

        assert (["--lr", "2"], "src/train.py", "12.4", "https://host/x.git", 40) == (
            facts["args"], facts["code_path"], facts["cuda_version"], facts["git"]["remote"],
            len(facts["git"]["commit"]),
        )  # fmt: skip
        assert {"requirements.txt", "diff.patch", "code/src/train.py"} == set(files)
        assert ("+lr = 2" in files["diff.patch"], "lr = 2\n") == (True, files["code/src/train.py"])
        assert "msgpack==" in files["requirements.txt"]

    def test_what_is_not_wanted_is_not_looked_up(self, project: Path):
        facts, files = found(
            argv=["train.py"], directory=str(project / "src"), code=False, git=False, requirements=False
        )

        assert ("git" in facts, {}) == (False, files)

    def test_a_file_that_is_too_large_is_named(self, project: Path):
        (project / "src" / "train.py").write_text("# long\n" * 100_000)

        facts, files = found(argv=["train.py"], directory=str(project / "src"), code=True, requirements=False)

        assert ({}, ["diff.patch", "code/src/train.py"]) == (files, facts["left_out"])

    @pytest.mark.parametrize(
        ("remote", "said"),
        [
            ("https://u:p@host/x", "https://host/x"), ("git@host:x.git", "git@host:x.git"),
            ("ssh://git@host/x", "ssh://host/x"), ("", ""),
        ],
    )  # fmt: skip
    def test_no_password_is_told(self, remote: str, said: str):
        assert said == without_password(remote)


class TestTelling:
    def test_rank_0_tells_in_the_background(
        self, daemon: FakeDaemon, project: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("SIDESTEP_PROGRAM", "1")
        monkeypatch.chdir(project / "src")
        monkeypatch.setattr(sys, "argv", ["train.py"])

        sidestep.init(save_code=True, settings={"x_save_requirements": False})

        def told() -> list[Any]:
            return [it.data for it in daemon.records if it.kind is Kind.PROGRAM]

        eventually(lambda: len(told()) == 3, 30, lambda: str(told()))
        assert {None, "diff.patch", "code/src/train.py"} == {it.get("file") for it in told()}

    def test_other_ranks_do_not(self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
        for name, value in {"SIDESTEP_PROGRAM": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)

        with sidestep.init() as run:
            run.log({"loss": 1.0})

        assert [] == [it for it in daemon.records if it.kind is Kind.PROGRAM]

    def test_what_is_known_too_late_is_no_record_that_is_lost(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
    ):
        """What is offered after a session's last record is counted as dropped, and looks like a loss."""
        monkeypatch.setenv("SIDESTEP_PROGRAM", "0")
        run = sidestep.init()
        word = Word(run._session)
        word.say([{"facts": {"host": "early"}}])
        word.end()
        run.finish()

        word.say([{"facts": {"host": "late"}}])

        assert (1, {}) == (run.stats().offered, {why: it for why, it in run.stats().dropped.items() if it})


def described(**data: Any) -> Any:
    return described_from(Record(kind=Kind.PROGRAM, time=1.0, step=None, data=data), Position(1, 0))


class TestHearing:
    @pytest.mark.parametrize(
        "name",
        [
            "/etc/passwd",
            "../x",
            "code/../../x",
            "code",
            "output.log",
            "wandb-summary.json",
            "code\\x",
            "code/a\nb",
            "",
        ],
    )
    def test_no_file_but_those_that_are_meant_is_written(self, name: str):
        assert described(file=name, text="") is None

    @pytest.mark.parametrize("name", ["requirements.txt", "diff.patch", "code/train.py", "code/a/b.py"])
    def test_those_are(self, name: str):
        assert (name, "x") == ((it := described(file=name, text="x")).file, it.text)

    @pytest.mark.parametrize("data", [{}, {"facts": 1}, {"facts": {1: 2}}, {"file": "diff.patch", "text": b"x"}])
    def test_what_breaks_a_rule_is_nothing(self, data: dict[str, Any]):
        assert described(**data) is None

    def test_each_line_says_who_printed_it(self):
        record = Record(kind=Kind.OUTPUT, time=1.0, step=None, data={"stream": "stdout", "text": "a\nb"})

        said = printed_from(record, Position(1, 0), "[rank 3] ")

        assert said is not None
        assert "[rank 3] a\n[rank 3] b\n" == said.text

    @pytest.mark.parametrize("data", [{"stream": "x", "text": ""}, {"stream": "stdout", "text": b""}, {}])
    def test_output_that_breaks_a_rule_is_nothing(self, data: dict[str, Any]):
        assert printed_from(Record(kind=Kind.OUTPUT, time=1.0, step=None, data=data), Position(1, 0), "") is None

    def test_nothing_is_told_twice(self):
        def said(entry: int, seq: int) -> Any:
            return printed_from(
                Record(kind=Kind.OUTPUT, time=1.0, step=None, data={"stream": "stdout", "text": f"{entry}.{seq}"}),
                Position(entry, seq),
                "",
            )

        first = Beside()
        for place in ((1, 0), (1, 1), (2, 0)):
            first.hear(said(*place))
        assert ["1.0\n", "1.1\n", "2.0\n"] == [it.text for it in first.take()]  # type: ignore[union-attr]

        second = Beside(told=list(first.told))
        for place in ((1, 1), (2, 0), (2, 1)):
            second.hear(said(*place))

        assert ["2.1\n"] == [it.text for it in second.take()]  # type: ignore[union-attr]
