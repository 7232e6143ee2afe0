"""What `import sidestep` gives, and what it costs."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sidestep
from sidestep import __main__ as command
from sidestep import _current, names
from sidestep.notices import Notices
from sidestep.testing import FakeDaemon, environment
from sidestep.wire import Kind


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that the environment names, and a process that has said nothing yet."""
    with FakeDaemon() as made:
        for name, value in environment(made, {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TMPDIR", str(tmp_path))  # what other tests' workers left is no business of these
        monkeypatch.setattr(_current, "_run", None)
        monkeypatch.setattr(_current, "_notices", Notices())
        monkeypatch.setattr(sidestep, "log", _current.log)
        yield made
        sidestep.finish(timeout=0.0)


def in_a_fresh_process(code: str, **environ: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


class TestNames:
    def test_all_are_listed_once(self):
        assert sorted(set(sidestep.__all__)) == sidestep.__all__ == dir(sidestep)
        assert {*names.LAZY, *names.OF_THE_RUN, *names.MODULES, "init", "log", "run"} <= set(sidestep.__all__)

    def test_no_module_takes_the_place_of_a_function(self):
        """Importing a module of that name would overwrite the function."""
        modules = {path.name.removesuffix(".py") for path in Path(sidestep.__file__).parent.iterdir()}

        assert set() == modules & (set(sidestep.__all__) - names.MODULES)

    def test_each_that_is_a_method_of_the_run_is_one(self):
        assert [] == [name for name in names.OF_THE_RUN if not callable(getattr(sidestep.Run, name, None))]

    def test_a_type_checker_is_told_of_each(self):
        """mypy sees no `__getattr__` table: every lazy name is written down for it too."""
        source = Path(sidestep.__file__).read_text()

        told = {*re.findall(r" as (\w+)$", source, re.M), *re.findall(r"^    (\w+) = _run\.\1$", source, re.M)}
        assert set() == {*names.LAZY, *names.MODULES, *names.OF_THE_RUN} - told

    def test_each_is_there(self, daemon: FakeDaemon):
        for name in sidestep.__all__:
            getattr(sidestep, name)

    def test_no_other_is(self):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            sidestep.nothing  # noqa: B018

    def test_the_version_is_the_packages(self):
        assert importlib.metadata.version("sidestep") == sidestep.__version__


class TestImporting:
    def test_brings_in_nothing_heavy(self):
        loaded = in_a_fresh_process(
            "import sys, json, sidestep;"
            "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
        )

        heavy = {
            "wandb",
            "torch",
            "numpy",
            "PIL",
            "sidestepd",
            "asyncio",
            "multiprocessing",
            "click",
            "pydantic",
        }
        assert set() == heavy & set(loaded)
        assert {"msgpack", "zmq"} <= set(loaded)

    def test_leaves_what_is_looked_up_later_for_then(self):
        loaded = in_a_fresh_process(
            "import sys, json, sidestep;"
            "print(json.dumps([name for name in sys.modules if name.startswith('sidestep.')]))"
        )

        at_once = {"sidestep._run", "sidestep.alerts", "sidestep.bags", "sidestep.elsewhere", "sidestep.errors"}
        later = {*names.LAZY.values(), *(f"sidestep.{name}" for name in names.MODULES)} - at_once
        assert {"sidestep.session", "sidestep.media"} == later & set(loaded)

    def test_init_adds_nothing_heavy(self):
        loaded = in_a_fresh_process(
            "import sys, json, sidestep; run = sidestep.init(); run.log({'a': 1}); run.finish(timeout=0);"
            "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))",
            SIDESTEP_ADDRESS="ipc:///tmp/nobody-listens-here.sock",
        )

        assert set() == {"wandb", "torch", "numpy", "PIL", "sidestepd"} & set(loaded)


class TestTheCommandWithoutADaemon:
    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        monkeypatch.setitem(sys.modules, "sidestepd", None)

        with pytest.raises(SystemExit) as ended:
            command.main()

        assert 69 == ended.value.code
        assert "pip install 'sidestep[daemon]'" in capsys.readouterr().err


class TestAsWandb:
    def test_a_script_for_wandb_runs(self, daemon: FakeDaemon):
        import sidestep as wandb

        run = wandb.init(
            project="p", name="n", config={"lr": 0.1}, tags=["a"], settings=wandb.Settings(quiet=True)
        )
        wandb.config.update({"batch": 8}, allow_val_change=True)
        wandb.define_metric("eval/*", step_metric="epoch")
        wandb.log({"loss": 1.0, "epoch": 1})
        wandb.log({"loss": 0.5}, step=10)
        wandb.summary["best"] = 0.5
        assert wandb.run is run
        assert 0.1 == wandb.config.lr == wandb.config["lr"]
        wandb.finish()

        assert [
            (Kind.CONFIG, {"lr": 0.1}),
            (Kind.CONFIG, {"batch": 8}),
            (Kind.DEFINE, "eval/*"),
            (Kind.LOG, {"loss": 1.0, "epoch": 1}),
            (Kind.LOG, {"loss": 0.5}),
            (Kind.SUMMARY, {"best": 0.5}),
        ] == [
            (
                Kind.LOG if record.kind is Kind.COUNTED else record.kind,
                record.data["name"] if record.kind is Kind.DEFINE else record.data,
            )
            for record in daemon.records
        ]
        (seen,) = daemon.sessions.values()
        assert {"project": "p", "name": "n", "tags": ["a"], "quiet": True} == seen.hello.settings

    def test_a_copy_of_the_run_is_itself(self, daemon: FakeDaemon):
        """Trainers are copied with what they hold."""
        run = sidestep.init()
        assert run is copy.deepcopy({"run": run})["run"] is pickle.loads(pickle.dumps(run))

    def test_after_finish_there_is_no_run(self, daemon: FakeDaemon):
        sidestep.init()
        sidestep.finish()

        assert sidestep.run is None
        sidestep.log({"loss": 1.0})

    def test_before_init_everything_is_without_effect_and_said_once(
        self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
    ):
        for _ in range(2):
            sidestep.log({"loss": 1.0})
            sidestep.config.update({"lr": 0.1})
            sidestep.summary["best"] = 1
            sidestep.define_metric("loss")
            sidestep.finish()

        assert sidestep.run is None
        assert 4 == sum("before init()" in line for line in caplog.messages)


class TestInit:
    def test_returns_before_a_daemon_answers(self, daemon: FakeDaemon):
        daemon.freeze()

        run = sidestep.init()

        assert daemon.sessions == {}
        assert "fake" == run.id
        daemon.thaw()

    def test_makes_log_the_runs_own_and_leaves_the_one_imported_before_working(self, daemon: FakeDaemon):
        before = sidestep.log

        run = sidestep.init()
        sidestep.log({"a": 1})
        before({"a": 2})
        run.flush()

        assert sidestep.log == run.log
        assert [{"a": 1}, {"a": 2}] == [it.data for it in daemon.records if it.kind in (Kind.LOG, Kind.COUNTED)]

    def test_a_second_one_returns_the_same_run(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        first = sidestep.init()

        assert first is sidestep.init(config={"more": 1}) is sidestep.init()
        assert {"more": 1} == first.config.as_dict()
        assert 1 == sum("init() again" in line for line in caplog.messages)

    def test_after_finish_it_is_a_new_session(self, daemon: FakeDaemon):
        sidestep.init()
        sidestep.finish()
        sidestep.init()
        sidestep.finish()

        assert 2 == len(daemon.sessions)

    @pytest.mark.parametrize("reinit", [True, "finish_previous"])
    def test_reinit_finishes_the_one_before(self, daemon: FakeDaemon, reinit: Any):
        sidestep.init().log({"n": 1})
        sidestep.init(reinit=reinit).log({"n": 2})
        sidestep.finish()

        assert [True, True] == [seen.bye is not None for seen in daemon.sessions.values()]

    def test_the_commands_run_wins_over_another_id(self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture):
        run = sidestep.init(id="mine")

        assert "fake" == run.id
        assert 1 == sum("joins the run 'fake'" in line for line in caplog.messages)

    def test_keywords_that_do_nothing_are_said_once_and_passed_on(
        self, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
    ):
        run = sidestep.init(save_code=True, sync_tensorboard=False, anonymous="allow", surprise=1, callback=print)
        run.flush()

        assert 1 == sum("without effect here" in line and "surprise" in line for line in caplog.messages)
        daemon.wait_until(lambda: daemon.sessions)
        (seen,) = daemon.sessions.values()
        assert {
            "save_code": True,
            "sync_tensorboard": False,
            "anonymous": "allow",
            "surprise": 1,
        } == seen.hello.settings

    def test_what_the_environment_says_of_this_run_is_told(
        self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
    ):
        """The daemon may have been started in another one."""
        said = {"WANDB_MODE": "online", "WANDB_RESUME": "must", "WANDB_NOTES": "one", "WANDB_PROJECT": "theirs"}
        for name, value in said.items():
            monkeypatch.setenv(name, value)

        sidestep.init(project="ours").log({"n": 1})

        daemon.wait_until(lambda: daemon.sessions)
        (seen,) = daemon.sessions.values()
        expected = {"mode": "online", "resume": "must", "notes": "one", "project": "ours"}
        assert expected == seen.hello.settings

    def test_more_settings_than_a_message_holds_do_not_stop_it(self, daemon: FakeDaemon):
        run = sidestep.init(project="p", notes="x" * 100_000)

        run.log({"n": 1})

        assert run.flush()
        (seen,) = daemon.sessions.values()
        assert {"project": "p"} == seen.hello.settings

    def test_strict_can_be_asked_for_by_the_environment(self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SIDESTEP_STRICT", "1")

        with pytest.raises(sidestep.UnsupportedValue):
            sidestep.init().log({"bad": object()})

    def test_the_exception_hook_is_given_back(self, daemon: FakeDaemon):
        before = sys.excepthook
        sidestep.init()
        during = sys.excepthook
        sidestep.finish()

        assert before is not during
        assert before is sys.excepthook


class TestDisabled:
    @pytest.mark.parametrize("by", ["argument", "SIDESTEP_MODE", "WANDB_MODE"])
    def test_every_call_is_a_no_op(self, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, by: str):
        if by != "argument":
            monkeypatch.setenv(by, "disabled")
        run = sidestep.init(mode="disabled" if by == "argument" else None, config={"lr": 0.1})

        run.log({"loss": object()}, step=-1)
        run.stage("eval").log({"loss": 1.0})
        run.define_metric("loss", summary="min")
        run.summary["best"] = 1.0

        assert run.flush()
        assert sidestep.Stats(offered=0, acknowledged=0, pending=0) == run.stats()
        assert ("disabled", None, 0.1, 1.0) == (run.mode, run.url, run.config.lr, run.summary["best"])
        run.finish()
        assert daemon.sessions == {}
